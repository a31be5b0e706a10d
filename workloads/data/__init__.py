"""Convert sources to parallel JSONL and inspect them."""
