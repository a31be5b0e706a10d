"""`python -m benchmarks [NAME-PREFIX]`: measure, print one table, write experiments/results/bench.json."""

from __future__ import annotations

import sys

from benchmarks import (
    data,
    decoding,
    engine,
    first_use,
    fuzz,
    harness,
    layout,
    scaling,
    serving,
    sweep,
    training,
)


def main() -> None:
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    parts = [layout, data, training, decoding, engine, serving, fuzz, scaling, sweep, first_use]
    benches = [bench for part in parts for bench in part.BENCHES]
    if not any(bench.name.startswith(only) for bench in benches):
        names = "\n  ".join(bench.name for bench in benches)
        print(f"error: ONLY={only}: no benchmark's name begins so; there are\n  {names}", file=sys.stderr)
        sys.exit(2)
    harness.show(harness.run(benches, only, f"make bench ONLY={only}" if only else "make bench"))


if __name__ == "__main__":
    main()
