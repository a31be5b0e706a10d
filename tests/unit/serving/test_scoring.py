"""Options after one main are scored in one pass, each as if it were the only one."""

from __future__ import annotations

import pytest
from engines import run_to_end, tiny_engine
from tiny import tiny_tokenizer

from serving.config import AppConfig
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.openai import CompletionRequest

MAIN, OPTIONS = "The answer to the question is in", [" the passage.", " works", " who lives where"]


def scores(options: list[str]) -> list[list[float | None]]:
    """Log-probabilities of the tokens of each option."""
    tokenizer, config = tiny_tokenizer(), AppConfig.of({"base_model": "x", "served_name": "tiny"})
    body = CompletionRequest(
        model="tiny", main=MAIN, prompt=options, echo=True, logprobs=0, max_tokens=0, temperature=0
    )
    (sample,) = RequestPreprocessor(config, tokenizer, 4096).completion(body).samples
    engine = tiny_engine()
    engine.enqueue(sample)
    events = run_to_end(engine)
    found = {event.branch: [token.logprob for token in event.prompt] for event in events}
    return [found[index] for index in range(len(options))]


def test_options_are_branches_of_one_main_and_scored_as_each_alone() -> None:
    together = scores(OPTIONS)
    for option, found in zip(OPTIONS, together, strict=True):
        assert None not in found
        assert found == pytest.approx(scores([option])[0], abs=1e-4)
