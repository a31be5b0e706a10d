"""Ways to put questions about one passage to a model, and what each of them keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parallelmind.engine.generate import engine_for
from parallelmind.engine.model_runner import Model, ModelRunner
from parallelmind.engine.output import OutputProcessor
from parallelmind.engine.request import Sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import eos_token_ids, tokenize_request, tokenize_sample

BackendName = Literal["parallel", "one_by_one", "batch"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said, by branch. tokens: decoded, those that end a text included.

    kv_bytes: of keys and values at their most; None where the model keeps something else.
    """

    texts: list[str]
    tokens: int
    kv_bytes: int | None


Ask = Callable[[Model, PreTrainedTokenizerBase, Sample, int], Answer]


def generate_branches(
    model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, max_new_tokens: int
) -> Answer:
    """Every question a branch of one sequence, by an engine of its own. Greedy."""
    return generate_samples(model, tokenizer, [sample], max_new_tokens)[0]


def generate_samples(
    model: Model, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], max_new_tokens: int
) -> list[Answer]:
    """Samples as `generate_branches`, all in one engine: their steps are shared, and so is what is told of
    memory.
    """
    sampling = {"max_new_tokens": max_new_tokens}
    engine = engine_for(
        model, tokenizer, [tokenize_request(tokenizer, sample, None, None, sampling) for sample in samples]
    )
    texts, tokens = [[""] * len(sample.branches) for sample in samples], [0] * len(samples)
    while engine.busy:
        for event in engine.step():
            texts[event.sample][event.branch] += event.text
            tokens[event.sample] += 1
    forward = engine.runner
    kept = forward.cache.bytes() if isinstance(forward, ModelRunner) else None
    return [Answer(*said, kept) for said in zip(texts, tokens, strict=True)]


def generate_padded_batch(
    model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, max_new_tokens: int
) -> Answer:
    """Every question a row of main and question, padded on the left, through Hugging Face's own `generate`.
    Greedy.

    Every row is a lone branch, main included: branch coordinate 0, times 0, 1, 2…
    """
    main, *prompts = tokenize_sample(tokenizer, sample).split()
    longest, pad = len(main) + max(map(len, prompts)), tokenizer.pad_token_id or 0
    gaps = [longest - len(main) - len(prompt) for prompt in prompts]
    ids = [[pad] * gap + main + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    ends = eos_token_ids(model, tokenizer)
    whole: Any = model
    found = whole.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )
    new = found.sequences[:, longest:].tolist()
    writers = [
        OutputProcessor(tokenizer, prompt, SamplingParams(max_new_tokens=max_new_tokens), ends)
        for prompt in prompts
    ]
    read = [_read(writer, row) for writer, row in zip(writers, new, strict=True)]
    return Answer(
        [text for text, _ in read], sum(count for _, count in read), _cache_bytes(found.past_key_values)
    )


BACKENDS: dict[BackendName, Ask] = {
    "parallel": generate_branches,
    "one_by_one": generate_branches,
    "batch": generate_padded_batch,
}


def _read(writer: OutputProcessor, row: list[int]) -> tuple[str, int]:
    """The text of a row, and its tokens up to its end; padding follows."""
    text = ""
    for count, token in enumerate(row, start=1):
        piece, reason = writer.write(token)
        text += piece
        if reason:
            return text, count
    return text, len(row)


def _cache_bytes(cache: Any) -> int | None:
    """What Hugging Face's cache holds: it only grows, so at the end it is at its most."""
    layers = getattr(cache, "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
