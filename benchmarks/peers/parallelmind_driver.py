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
            number = engine.submit(
                _sample(request), max_new_tokens=request.new_tokens, ignore_eos=True, adapter=request.adapter
            )
            first = len(request.documents)
            tokens.update({(number, first + branch): [] for branch in range(len(request.prompts))})

        def step() -> None:
            for event in engine.step():
                event.raise_error()
                if event.token is not None:  # documents have none
                    tokens[event.sample, event.branch].append(event.token)

        run_arrivals(requests, submit, step, lambda: engine.busy)
        return list(tokens.values())

    return decode


def _sample(request: Request) -> pm.Sample:
    if not request.documents:
        return pm.Sample(request.main, request.prompts)
    (question,) = request.prompts
    return pm.Sample(request.main, reduce=question, documents=request.documents)


if __name__ == "__main__":
    serve(load)
