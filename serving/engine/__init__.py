"""The deployment that holds the model."""
