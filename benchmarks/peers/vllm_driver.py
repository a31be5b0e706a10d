"""vLLM with prefix caching, its scheduler in this process. Arguments: base model, dtype, adapter folder."""

from __future__ import annotations

import sys
from itertools import count

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from benchmarks.peers.protocol import Decode, Request, run_arrivals, serve


def load() -> Decode:
    """Load the model with vLLM's defaults but for the length of a text, which bounds its warm-up."""
    base_model, dtype, *adapters = sys.argv[1:]
    llm = LLM(
        base_model,
        dtype=dtype,
        enable_prefix_caching=True,
        max_model_len=2048,
        max_num_seqs=64,
        enable_lora=bool(adapters),
    )
    lora = LoRARequest("adapter", 1, adapters[0]) if adapters else None
    engine, numbers = llm.llm_engine, count()

    def decode(requests: list[Request]) -> list[list[int]]:
        tokens: dict[str, list[int]] = {}

        def submit(request: Request) -> None:
            params = SamplingParams(
                temperature=0,
                max_tokens=request.new_tokens,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for text in request.texts:
                name = str(next(numbers))
                tokens[name] = []
                engine.add_request(name, {"prompt_token_ids": text}, params, lora_request=lora)

        def step() -> None:
            for output in engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)

        run_arrivals(requests, submit, step, engine.has_unfinished_requests)
        return list(tokens.values())

    return decode


if __name__ == "__main__":
    serve(load)
