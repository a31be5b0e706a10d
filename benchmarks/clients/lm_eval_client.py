"""lm-eval: log-likelihoods and texts by local-completions, texts by local-chat-completions.

The log-likelihoods are those that the same model has in transformers.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

URL, MODEL, FOLDER = sys.argv[1:4]
PAIRS = [("The sky is", " blue"), ("The sky is", " a red table"), ("Two and two", " are four")]
STOP: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0}


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=index) for index, item in enumerate(arguments)
    ]


def logprobs(text: str) -> torch.Tensor:
    """`[tokens - 1]` log-probabilities of the tokens of a text after the first."""
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        scores = model.float()(ids).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, ids[0, 1:, None])[:, 0]


def check_scores(batch_size: int) -> None:
    lm = LocalCompletionsAPI(
        base_url=f"{URL}/completions",
        model=MODEL,
        tokenizer=FOLDER,
        tokenizer_backend="huggingface",
        max_retries=1,
        batch_size=batch_size,
    )
    for (context, continuation), (value, _) in zip(
        PAIRS, lm.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True
    ):
        num_context = len(logprobs(context))
        wanted = float(logprobs(context + continuation)[num_context:].sum())
        assert abs(value - wanted) < 1e-3, (continuation, value, wanted)
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("The sky is blue today.",)))
    assert rolling < 0
    texts = lm.generate_until(requests("generate_until", *((context, dict(STOP)) for context, _ in PAIRS)))
    assert all(isinstance(text, str) for text in texts)
    assert texts[0] == texts[1]


def check_chat() -> None:
    lm = LocalChatCompletion(base_url=f"{URL}/chat/completions", model=MODEL, max_retries=1)
    context = lm.apply_chat_template([{"role": "user", "content": "Name a colour."}])
    for until in (["\n"], []):
        settings = {**STOP, "until": until}
        assert isinstance(lm.generate_until(requests("generate_until", (context, settings)))[0], str)


def main() -> None:
    check_scores(batch_size=1)
    check_scores(batch_size=2)
    check_chat()


if __name__ == "__main__":
    main()
