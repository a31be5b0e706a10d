"""Speed and memory against their targets, as ratios within one run: `make bench`, or `make bench
ONLY=decoding`.
"""
