"""2D RoPE: the patch, masks and attention; base models and adapters."""
