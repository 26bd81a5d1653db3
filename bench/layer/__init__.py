"""Training of a linear layer or a small model: RoSA, LoRA, full fine-tuning, PEFT."""
