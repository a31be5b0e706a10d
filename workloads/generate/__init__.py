"""Continue prompts and files with a model."""
