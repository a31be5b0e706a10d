"""This project's engine. Arguments: base model, settings of the model as JSON, folders of adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import parallelmind as pm
from benchmarks.peers.protocol import Decode, Request, run_arrivals, serve


def load() -> Decode:
    """Load the model and one warm engine, which serves every request."""
    base_model, settings, *adapters = sys.argv[1:]
    engine = pm.Engine(*pm.load_model_with_lora(base_model, **json.loads(settings)))
    for folder in adapters:
        engine.load_adapter(Path(folder).name, folder)
    engine.warm_up()

    def decode(requests: list[Request]) -> list[list[int]]:
        tokens: dict[tuple[int, int], list[int]] = {}

        def submit(request: Request) -> None:
            sample = pm.Sample(request.main, request.prompts)
            number = engine.submit(
                sample, max_new_tokens=request.new_tokens, ignore_eos=True, adapter=request.adapter
            )
            tokens.update({(number, branch): [] for branch in range(len(request.prompts))})

        def step() -> None:
            for event in engine.step():
                event.raise_error()
                assert event.token is not None
                tokens[event.sample, event.branch].append(event.token)

        run_arrivals(requests, submit, step, lambda: engine.busy)
        return list(tokens.values())

    return decode


if __name__ == "__main__":
    serve(load)
