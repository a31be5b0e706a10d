"""`generate` of Hugging Face on one left-padded batch. Arguments: base model, dtype."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.protocol import Decode, Request, serve


def load() -> Decode:
    """Load the model as its own documentation does."""
    base_model, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def decode(requests: list[Request]) -> list[list[int]]:
        (new_tokens,) = {request.new_tokens for request in requests}
        texts = [text for request in requests for text in request.texts]
        batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        tokens: list[list[int]] = output[:, batch["input_ids"].shape[1] :].tolist()
        return tokens

    return decode


if __name__ == "__main__":
    serve(load)
