"""`evaluate attention`: draw attention maps of one branch and its shares per layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table

import parallelmind as pm
from parallelmind import cli
from parallelmind.config import FrozenConfig, GroupedConfig, OutputPath
from parallelmind.engine.tokenization import tokenize_sample
from parallelmind.evaluation.attention_maps import AttentionMap, QueryTokens, attention_map
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import check_outputs, console, output_file, write_json, write_png
from workloads.evaluate.plots import attention_figure

_KEY_GROUPS = ("main", "own", "siblings")  # the columns of `AttentionMap.shares`


class SampleConfig(FrozenConfig):
    """Sample."""

    main: str = Field("", description="text that all prompts share")
    prompts: list[str] = Field(min_length=1, description="the branches")


class QueryConfig(FrozenConfig):
    """Query tokens."""

    branch: int = Field(0, ge=0, description="the branch whose attention is shown, from 0")
    tokens: QueryTokens = Field(
        "last", description="attention of the branch's last token, or the mean over all its tokens"
    )


class AttentionOutputConfig(FrozenConfig):
    """Output."""

    output_path: OutputPath = Field(
        min_length=1, description="PNG file for the maps; the shares are written beside it as .json"
    )


class AttentionConfig(GroupedConfig):
    """Run of `evaluate attention`."""

    model: InferenceModelConfig
    sample: SampleConfig
    query: QueryConfig
    output: AttentionOutputConfig


def evaluate_attention(argv: list[str]) -> None:
    """Write the maps as PNG and the shares as JSON, and print the shares."""
    config = cli.parse(AttentionConfig, argv)
    output = output_file(config.output.output_path, ".png")
    check_outputs(output, **config.model.paths())
    assert output is not None, "output_path is a required field"
    model, tokenizer = pm.load_model_with_lora(**config.model.load_kwargs(), attn_implementation="eager")
    tokens = tokenize_sample(tokenizer, pm.Sample(config.sample.main, config.sample.prompts))
    attention = attention_map(model, tokens, config.query.branch, config.query.tokens)
    shares = attention.shares()
    write_png(output, attention_figure(attention))
    write_json(output.with_suffix(".json"), _json_values(config, attention, shares))
    console().print(_shares_table(shares))
    print(f"wrote {output} and {output.with_suffix('.json').name}", flush=True)


def _json_values(
    config: AttentionConfig, attention: AttentionMap, shares: NDArray[np.float32]
) -> dict[str, Any]:
    return {
        "mean": _by_key_group(shares.mean(axis=0)),
        "layers": [{"layer": number, **_by_key_group(row)} for number, row in enumerate(shares)],
        "times": attention.query_times,
        "config": config.model_dump(mode="json"),
    }


def _by_key_group(shares: NDArray[np.float32]) -> dict[str, float]:
    return {name: float(share) for name, share in zip(_KEY_GROUPS, shares, strict=True)}


def _shares_table(shares: NDArray[np.float32]) -> Table:
    table = Table("layer", *_KEY_GROUPS, title="share of attention", title_justify="left")
    rows = [*((str(number), row) for number, row in enumerate(shares)), ("mean", shares.mean(axis=0))]
    for name, row in rows:
        table.add_row(name, *(f"{share:.1%}" for share in row))
    return table
