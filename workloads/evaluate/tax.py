"""The branch tax curve, for `python -m workloads.evaluate tax`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

from pydantic import Field, model_validator
from rich.table import Table

from parallelmind import cli
from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.held_out import HeldOut
from parallelmind.data.survey import combine_surveys, survey_part
from parallelmind.errors import UserError
from parallelmind.evaluation.branch_tax import TaxPoint, max_branches, tax_curve
from parallelmind.model.patch import is_patched
from parallelmind.training.step import NoMemoryError
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import console, output_file, write_json, write_png
from workloads.evaluate.plots import tax_figure

_SEED = 0  # of the order of batches, which changes no loss


class TaxConfig(InferenceModelConfig):
    """One run of `evaluate tax`."""

    data_path: str = Field(
        min_length=1,
        description="held-out parallel JSONL or Parquet: file, folder, glob, URL, or several with commas",
    )
    branches: list[int] = Field(
        [1, 2, 4, 8, 16, 32, 64], min_length=1, description="branch counts; 1 is always measured"
    )
    pool: int = Field(64, ge=1, description="held-out branches to measure on, the same at every count")
    max_branch_tokens: int = Field(
        256, ge=2, description="longest main or branch, in tokens; more is cut off"
    )
    batch_tokens: int = Field(
        8192, ge=4, description="most tokens of a batch, and of a sample: what memory has to hold"
    )
    output_path: str | None = Field(
        None, description="JSON file for the figures; the curve goes beside it as .png"
    )

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if wrong := [count for count in self.branches if count < 1]:
            raise ValueError(
                f"branches={wrong[0]}: a sample has one branch at least; give counts of 1 or more"
            )
        return self

    def data(self) -> DataConfig:
        """How validation in training would read the same file."""
        return DataConfig(
            data_path=self.data_path,
            max_branch_tokens=self.max_branch_tokens,
            max_sample_tokens=self.batch_tokens,
            batch_tokens=self.batch_tokens,
        )


def tax(argv: list[str]) -> None:
    config = cli.parse(TaxConfig, argv)
    output = output_file(config.output_path, ".json")
    files = find_files(config.data_path)
    model, tokenizer = config.load_model()
    _survey(files, config.data(), len(tokenizer))
    held_out = _held_out(files, tokenizer, config)
    counts = sorted({1, *config.branches}) if is_patched(model) else [1]
    if not is_patched(model):
        print("patch_rope=false: the model holds one branch in a sequence; measured at 1", flush=True)
    sets = {count: held_out.batches(count, _SEED) for count in counts}
    missed = {count: largest for count, found in sets.items() if (largest := max_branches(found)) < count}
    measured = {count: found for count, found in sets.items() if count not in missed}
    curve = tax_curve(model, measured, tokenizer.pad_token_id or 0)
    with cli.progress("measuring", len(measured)) as tell:
        points: list[TaxPoint] = []
        try:
            for point in curve:
                points.append(point)
                tell(len(points), lambda: f"{len(points)} of {len(measured)} branch counts measured")
        except NoMemoryError as error:
            remedy = "lower it, or leave the largest of branches out"
            raise UserError(f"batch_tokens={config.batch_tokens}: {error.batch}; {remedy}") from error
    _report(config, held_out, points, missed)
    if output:
        write_json(output, _values(config, held_out, points, missed))
        write_png(output.with_suffix(".png"), tax_figure(points))
        print(f"{output} and {output.with_suffix('.png').name}", flush=True)


def _survey(files: Sequence[str], data: DataConfig, vocabulary: int) -> None:
    """Say which lines are malformed. Raises UserError where no line is good."""
    parts = file_parts(files)
    found = combine_surveys(parts, [survey_part(part, data, vocabulary) for part in parts])
    found.raise_if_unusable(data, "data_path")
    if found.bad:
        print(f"bad lines left out: {len(found.bad)}, the first: {found.bad[0]}", file=sys.stderr)


def _held_out(files: Sequence[str], tokenizer: Any, config: TaxConfig) -> HeldOut:
    found = HeldOut.read(files, config.pool, tokenizer, config.data())
    if not found.branches:
        raise UserError(
            f"max_branch_tokens={config.max_branch_tokens} batch_tokens={config.batch_tokens}: "
            f"leave none of {found.skipped} branches; raise them, or lower the answer offsets"
        )
    return found


def _report(config: TaxConfig, held_out: HeldOut, points: Sequence[TaxPoint], missed: dict[int, int]) -> None:
    drawn = Table(caption_justify="left", title_justify="left", title=f"branch tax on {config.data_path}")
    for header in ("branches", "mean of samples", "loss", "tax", "tokens/s", "seconds", "extra memory"):
        drawn.add_column(header, justify="right")
    for point in points:
        drawn.add_row(
            str(point.branches),
            f"{point.mean_branches:.1f}",
            f"{point.loss:.4f}",
            f"{point.tax:+.4f}",
            f"{point.tokens_per_second:.0f}",
            f"{point.seconds:.1f}",
            f"{point.peak_extra_bytes / 2**20:.0f} MiB",
        )
    console().print(drawn)
    cut = f", {held_out.truncated} texts cut, {held_out.skipped} branches skipped for their length"
    few = "" if held_out.branches == config.pool else f" (pool={config.pool}: there are no more)"
    print(f"nats per target token, {points[0].targets} of them in {held_out.branches} branches{few}{cut}")
    for count, largest in missed.items():
        print(
            f"{count} branches: not measured; the largest sample that data and batch_tokens give has {largest}"
        )


def _values(
    config: TaxConfig, held_out: HeldOut, points: Sequence[TaxPoint], missed: dict[int, int]
) -> dict[str, Any]:
    return {
        "points": [asdict(point) for point in points],
        "not_measured": [{"branches": count, "largest_sample": largest} for count, largest in missed.items()],
        "held_out_branches": held_out.branches,
        "truncated_texts": held_out.truncated,
        "skipped_branches": held_out.skipped,
        "config": config.model_dump(mode="json"),
    }
