"""`evaluate attention`: draw attention maps of one branch and its shares per layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table
from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind import cli
from parallelmind.config import FrozenConfig, GroupedConfig, OutputPath
from parallelmind.engine.tokenization import tokenize, tokenize_sample
from parallelmind.engine.validation import check_token_ids
from parallelmind.evaluation.attention_maps import AttentionMap, QueryTokens, attention_map
from parallelmind.layout import Tokens
from parallelmind.tree import Tree
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import check_outputs, console, output_file, write_json, write_png
from workloads.evaluate.plots import attention_figure

Shares = dict[str, NDArray[np.float32]]  # `[layers]` by group, as `AttentionMap.shares` returns them


class SampleConfig(FrozenConfig):
    """Sample."""

    main: str = Field("", description="text that all prompts share")
    prompts: list[str] = Field(min_length=1, description="the branches")
    reduce: str | None = Field(
        None, min_length=1, description="text after all branches, which reads main and all of them"
    )


class QueryConfig(FrozenConfig):
    """Query tokens."""

    branch: int = Field(
        0, ge=0, description="index, from 0, of the branch that is shown; the reduce comes after the last"
    )
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
    model, tokenizer = config.model.load(attn_implementation="eager")
    tokens = _tokenize(tokenizer, config.sample)
    check_token_ids(model, tokens.ids.tolist(), ())
    attention = attention_map(model, tokens, config.query.branch, config.query.tokens)
    shares = attention.shares()
    texts = [[_shown(tokenizer.decode([token])) for token in part] for part in tokens.split()]
    write_png(output, attention_figure(attention, texts))
    write_json(output.with_suffix(".json"), _json_values(config, attention, shares))
    console().print(_shares_table(shares))
    print(f"wrote {output} and {output.with_suffix('.json').name}", flush=True)


def _tokenize(tokenizer: PreTrainedTokenizerBase, sample: SampleConfig) -> Tokens:
    tokens = tokenize_sample(tokenizer, pm.Sample(sample.main, sample.prompts))
    if sample.reduce is None:
        return tokens
    segments = [*tokens.split(), tokenize(tokenizer, sample.reduce, first=False)]
    return Tokens.of_tree(segments, Tree.flat(tokens.branches, has_reduce=True))


def _shown(text: str) -> str:
    """A token's text without spaces at its ends; a line break is visible."""
    return text.replace("\n", "⏎").strip().replace("$", r"\$")


def _json_values(config: AttentionConfig, attention: AttentionMap, shares: Shares) -> dict[str, Any]:
    layers = zip(*(share.tolist() for share in shares.values()), strict=True)
    return {
        "mean": {name: float(share.mean()) for name, share in shares.items()},
        "layers": [
            {"layer": number, **dict(zip(shares, row, strict=True))} for number, row in enumerate(layers)
        ],
        "times": attention.query_times,
        "config": config.model_dump(mode="json"),
    }


def _shares_table(shares: Shares) -> Table:
    table = Table("layer", *shares, title="share of attention", title_justify="left")
    by_layer = np.stack(list(shares.values()), axis=1)
    rows = [*((str(number), row) for number, row in enumerate(by_layer)), ("mean", by_layer.mean(axis=0))]
    for name, row in rows:
        table.add_row(name, *(f"{share:.1%}" for share in row))
    return table
