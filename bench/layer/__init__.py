"""A linear layer, or a small model, in training: RoSA, LoRA, full fine-tuning, PEFT."""
