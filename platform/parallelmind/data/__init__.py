"""The data pipeline: lines, records, tokens, samples and batches. Only `data/pipeline.py` imports Ray."""
