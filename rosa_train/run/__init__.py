"""One training run, from a model and a file of examples to an adapter."""
