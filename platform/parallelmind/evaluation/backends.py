"""Ways to decode the questions of one record: as segments of one sequence, or as a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parallelmind.engine.generate import engine_for
from parallelmind.engine.linear import Linearizer
from parallelmind.engine.model_runner import Model, ModelRunner
from parallelmind.engine.output import OutputProcessor
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import eos_token_ids, tokenize_request, tokenize_sample

BackendName = Literal["parallel", "one_by_one", "batch"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Generated text of one sample.

    texts: one for each segment after main, in pre-order. tokens: decoded tokens, end-of-text tokens included.
    kv_bytes: peak size of keys and values; None if the model keeps another kind of state.
    """

    texts: list[str]
    tokens: int
    kv_bytes: int | None


Backend = Callable[[Model, PreTrainedTokenizerBase, RecordPrompt, int], Answer]


def generate_branches(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompt: RecordPrompt, max_new_tokens: int
) -> Answer:
    """Decode all branches of a sample greedily in one sequence."""
    return generate_samples(model, tokenizer, [prompt], max_new_tokens)[0]


def generate_samples(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RecordPrompt], max_new_tokens: int
) -> list[Answer]:
    """Decode several samples greedily in one engine, which shares its steps among them.

    `kv_bytes` of every answer is the peak of the whole engine.
    """
    sampling = {"max_new_tokens": max_new_tokens}
    requests = [tokenize_request(tokenizer, prompt.sample, None, None, sampling) for prompt in prompts]
    engine = engine_for(model, tokenizer, requests)
    texts, tokens = [[""] * prompt.num_outputs for prompt in prompts], [0] * len(prompts)
    linearizer = Linearizer()
    while engine.busy:
        for event in chain.from_iterable(map(linearizer.push, engine.step())):
            event.raise_error()
            texts[event.sample][event.branch] += event.text
            tokens[event.sample] += event.token is not None
    runner = engine.runner
    kv_bytes = runner.cache.bytes() if isinstance(runner, ModelRunner) else None
    return [Answer(*answer, kv_bytes) for answer in zip(texts, tokens, strict=True)]


def generate_padded_batch(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompt: RecordPrompt, max_new_tokens: int
) -> Answer:
    """Decode greedily with the `generate` of transformers: one left-padded row of main and prompt per branch.

    Every row is a single branch that contains main: branch coordinate 0, times 0, 1, 2, …. The prompt is main
    and branches alone.
    """
    main, *prompts = tokenize_sample(tokenizer, prompt.sample).split()
    length, pad_id = len(main) + max(map(len, prompts)), tokenizer.pad_token_id or 0
    padding = [length - len(main) - len(prompt) for prompt in prompts]
    ids = [[pad_id] * pads + main + prompt for pads, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pads + [1] * (length - pads) for pads in padding]
    eos_ids = eos_token_ids(model, tokenizer)
    causal_model: Any = model
    output = causal_model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=pad_id,
        return_dict_in_generate=True,
    )
    new_tokens = output.sequences[:, length:].tolist()  # [branches, new tokens]
    params = SamplingParams(max_new_tokens=max_new_tokens)
    processors = [OutputProcessor(tokenizer, prompt, params, eos_ids) for prompt in prompts]
    decoded = [_decode_row(processor, row) for processor, row in zip(processors, new_tokens, strict=True)]
    texts, tokens = [text for text, _ in decoded], sum(count for _, count in decoded)
    return Answer(texts, tokens, _cache_bytes(output.past_key_values))


BACKENDS: dict[BackendName, Backend] = {
    "parallel": generate_branches,
    "one_by_one": generate_branches,
    "batch": generate_padded_batch,
}


def _decode_row(processor: OutputProcessor, row: list[int]) -> tuple[str, int]:
    """Text and number of tokens of a row, up to its end-of-text token. The rest of the row is padding."""
    text = ""
    for count, token in enumerate(row, start=1):
        piece, finish_reason = processor.process(token)
        text += piece
        if finish_reason:
            return text, count
    return text, len(row)


def _cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values in a cache of transformers. It only grows, so its final size is its peak."""
    layers = getattr(cache, "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
