"""Speed and memory benchmarks with targets: `make bench`, or `make bench ONLY=decoding`."""
