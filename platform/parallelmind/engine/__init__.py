"""The decoding engine: continuous batching of branches over a paged KV cache."""
