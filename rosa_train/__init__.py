"""rosa_train: fine-tune Hugging Face causal language models with RoSA and its relatives."""
