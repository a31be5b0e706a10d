"""`python -m benchmarks [PREFIX]`: run benchmarks, print a table, write experiments/results/bench.json."""

from __future__ import annotations

import sys

from benchmarks import (
    adapter_load,
    cluster,
    comparison,
    data,
    decoding,
    documents,
    engine,
    first_use,
    forking,
    fronts,
    fuzz,
    harness,
    host,
    layout,
    operators,
    reuse,
    scaling,
    serving,
    siblings,
    sweep,
    trainers,
    training,
    trees,
)


def main() -> None:
    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    modules = [
        layout,
        data,
        training,
        trainers,
        trees,
        decoding,
        engine,
        host,
        operators,
        reuse,
        serving,
        fronts,
        adapter_load,
        fuzz,
        scaling,
        sweep,
        siblings,
        forking,
        cluster,
        first_use,
    ]
    modules += [comparison, documents]  # last, because their engines stay loaded
    benches = [bench for module in modules for bench in module.BENCHES]
    if not any(bench.name.startswith(prefix) for bench in benches):
        names = "\n  ".join(bench.name for bench in benches)
        print(
            f"error: ONLY={prefix}: no benchmark name starts with it; choose from\n  {names}", file=sys.stderr
        )
        sys.exit(2)
    harness.show(harness.run(benches, prefix, f"make bench ONLY={prefix}" if prefix else "make bench"))


if __name__ == "__main__":
    main()
