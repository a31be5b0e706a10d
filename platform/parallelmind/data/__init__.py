"""The data pipeline: lines, records, tokens, samples and batches. Ray is imported in `pipeline.py` only."""
