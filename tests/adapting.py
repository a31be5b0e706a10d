"""Helpers for tests of adapters and trained models: short training, and logits in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from torch.nn.functional import cross_entropy

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.model.patch import patch

ROPE = RopeConfig(rope_2d_ratio=0.5, branch_stride=16)
IDS = torch.arange(10, 16)[None]
_POS2D = torch.tensor([[[0, 0], [0, 1], [0, 2], [16, 0], [16, 1], [16, 2]]])
_FRESH_PROCESS = """
import json, sys, adapting
from safetensors.torch import save_file
from parallelmind.model.adapter import load_model_with_lora
model, _ = load_model_with_lora(**json.loads(sys.argv[1]))
save_file({"logits": adapting.logits(model)}, sys.argv[2])
"""


def lora_config(**changes: Any) -> LoraConfig:
    """Rank 4 by default."""
    return LoraConfig.model_validate({"lora_rank": 4, "lora_alpha": 6, **changes})


def patched_llama(rope: RopeConfig = ROPE, **overrides: Any) -> Any:
    """A patched tiny Llama."""
    model = tiny_llama(**overrides)
    patch(model, rope)
    return model


def allclose_logits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to float32 rounding, for logits of about 10."""
    return bool((actual - expected).abs().max() < 2e-4)


def branch_logits(model: Any) -> torch.Tensor:
    """`[1, 6, vocab]` of two branches of three tokens; the mask is causal, the coordinates are not."""
    mask = torch.zeros(1, 1, 6, 6, dtype=model.dtype).masked_fill_(
        torch.ones(6, 6).triu(1).bool(), torch.finfo(model.dtype).min
    )
    return model(input_ids=IDS, pos2d=_POS2D, attention_mask=mask).logits


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return branch_logits(model)


def train(model: Any, steps: int = 2) -> Any:
    """A few steps on one batch, then eval mode."""
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    for _ in range(steps):
        cross_entropy(branch_logits(model)[0].float(), IDS[0].roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits_in_fresh_process(**settings: Any) -> torch.Tensor:
    """The logits of `load_model_with_lora(**settings)` in a new process."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent / "platform")))}
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.safetensors"
        subprocess.run(
            [sys.executable, "-c", _FRESH_PROCESS, json.dumps(settings), file], env=env, check=True
        )
        return load_file(file)["logits"]
