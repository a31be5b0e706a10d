"""Maps of where a branch looks, for `python -m workloads.evaluate attention`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table

import parallelmind as pm
from parallelmind import cli
from parallelmind.engine.tokenization import tokenize_sample
from parallelmind.evaluation.attention_maps import AttentionMap, QueryTokens, attention_map
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import console, output_file, write_json, write_png
from workloads.evaluate.plots import attention_figure

_PARTS = ("main", "own", "siblings")


class AttentionConfig(InferenceModelConfig):
    """One run of `evaluate attention`."""

    main: str = Field("", description="text that all prompts share")
    prompts: list[str] = Field(min_length=1, description="the branches")
    branch: int = Field(0, ge=0, description="which of them asks, from 0")
    tokens: QueryTokens = Field(
        "last", description="whose attention: the branch's last token, or the mean over all its tokens"
    )
    output_path: str = Field(
        min_length=1, description="PNG file for the maps; the shares go beside it as .json"
    )


def attention(argv: list[str]) -> None:
    config = cli.parse(AttentionConfig, argv)
    output = output_file(config.output_path, ".png")
    assert output is not None, "output_path is required"
    model, tokenizer = pm.load_model_with_lora(**config.model_kwargs(), attn_implementation="eager")
    sample = tokenize_sample(tokenizer, pm.Sample(config.main, config.prompts))
    found = attention_map(model, sample, config.branch, config.tokens)
    shares = found.shares()
    write_png(output, attention_figure(found))
    write_json(output.with_suffix(".json"), _values(config, found, shares))
    console().print(_table(shares))
    print(f"{output} and {output.with_suffix('.json').name}", flush=True)


def _named(shares: NDArray[np.float32]) -> dict[str, float]:
    return {name: float(share) for name, share in zip(_PARTS, shares, strict=True)}


def _values(config: AttentionConfig, found: AttentionMap, shares: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "mean": _named(shares.mean(axis=0)),
        "layers": [{"layer": number, **_named(row)} for number, row in enumerate(shares)],
        "times": found.query_times,
        "config": config.model_dump(mode="json"),
    }


def _table(shares: NDArray[np.float32]) -> Table:
    drawn = Table("layer", *_PARTS, title="share of attention", title_justify="left")
    for name, row in [
        *((str(number), row) for number, row in enumerate(shares)),
        ("mean", shares.mean(axis=0)),
    ]:
        drawn.add_row(name, *(f"{share:.1%}" for share in row))
    return drawn
