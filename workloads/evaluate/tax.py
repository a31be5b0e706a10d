"""`evaluate tax`: the branch tax at several branch counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import Field, model_validator
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from parallelmind import cli
from parallelmind.config import DataConfig, FrozenConfig, GroupedConfig, OutputPath
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.held_out import HeldOut
from parallelmind.data.survey import combine_surveys, survey_part
from parallelmind.engine.validation import check_token_ids
from parallelmind.errors import UserError
from parallelmind.evaluation.branch_tax import SampleBatches, TaxPoint, max_branches, tax_curve
from parallelmind.model.patch_state import is_patched
from parallelmind.training.step import NoMemoryError
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import check_outputs, console, output_file, write_json, write_png
from workloads.evaluate.plots import tax_figure

_SEED = 0  # orders the batches; the loss does not depend on it


class HeldOutConfig(FrozenConfig):
    """Held-out text."""

    data_path: str = Field(
        min_length=1,
        description=("held-out parallel JSONL, Parquet or Arrow: file, folder, glob, URL, or a comma list"),
    )
    branches: list[int] = Field(
        [1, 2, 4, 8, 16, 32, 64], min_length=1, description="branch counts; 1 is always measured"
    )
    pool: int = Field(64, ge=1, description="held-out branches to measure on, the same at every count")
    max_branch_tokens: int = Field(
        256, ge=2, description="maximum length of main or a branch, in tokens; the rest is cut off"
    )
    batch_tokens: int = Field(
        8192, ge=4, description="maximum tokens of a batch and of a sample; bounds the memory"
    )

    @model_validator(mode="after")
    def _check_branches(self) -> Self:
        if invalid := [count for count in self.branches if count < 1]:
            raise ValueError(
                f"branches={invalid[0]}: a sample has at least one branch; give counts of 1 or more"
            )
        return self

    def data_config(self) -> DataConfig:
        """Settings with which validation during training would read the same file."""
        return DataConfig(
            data_path=self.data_path,
            max_branch_tokens=self.max_branch_tokens,
            max_sample_tokens=self.batch_tokens,
            batch_tokens=self.batch_tokens,
        )


class TaxOutputConfig(FrozenConfig):
    """Output."""

    output_path: OutputPath | None = Field(
        None, description="JSON file for the figures; the curve is written beside it as .png"
    )


class TaxConfig(GroupedConfig):
    """Run of `evaluate tax`."""

    model: InferenceModelConfig
    held_out: HeldOutConfig
    output: TaxOutputConfig


@dataclass(frozen=True, slots=True)
class TaxReport:
    """Result of one evaluation.

    not_measured: largest sample by branch count, for the counts that no sample of the data reaches.
    """

    held_out: HeldOut
    points: list[TaxPoint]
    not_measured: dict[int, int]


def evaluate_tax(argv: list[str]) -> None:
    """Measure the branch tax and print it; write the figures and the curve if requested."""
    config = cli.parse(TaxConfig, argv)
    output = output_file(config.output.output_path, ".json")
    files = find_files(config.held_out.data_path)
    check_outputs(output, data_path=files, **config.model.paths())
    model, tokenizer = config.model.load()
    _report_bad_lines(files, config.held_out.data_config(), len(tokenizer))
    held_out = _read_held_out(files, tokenizer, config.held_out)
    check_token_ids(model, [held_out.highest_id], ())
    batches_by_count, not_measured = _select_counts(held_out, _branch_counts(model, config.held_out))
    curve = tax_curve(model, batches_by_count, tokenizer.pad_token_id or 0)
    points = _collect(curve, len(batches_by_count), config.held_out)
    report = TaxReport(held_out, points, not_measured)
    _print_report(config.held_out, report)
    if output:
        write_json(output, _json_values(config, report))
        write_png(output.with_suffix(".png"), tax_figure(report.points))
        print(f"wrote {output} and {output.with_suffix('.png').name}", flush=True)


def _report_bad_lines(files: Sequence[str], data: DataConfig, vocab_size: int) -> None:
    """Report bad lines. Raises UserError if no line is good."""
    parts = file_parts(files)
    survey = combine_surveys(parts, [survey_part(part, data, vocab_size) for part in parts])
    survey.raise_if_unusable(data, "data_path")
    if survey.bad:
        print(f"skipped {len(survey.bad)} bad lines, the first: {survey.bad[0]}", file=sys.stderr)


def _read_held_out(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: HeldOutConfig
) -> HeldOut:
    held_out = HeldOut.read(files, config.pool, tokenizer, config.data_config())
    if not held_out.branches:
        raise UserError(
            f"max_branch_tokens={config.max_branch_tokens} batch_tokens={config.batch_tokens}: "
            f"leave none of {held_out.skipped} branches usable; raise them, or lower the answer offsets"
        )
    _check_flat(held_out, config)
    return held_out


def _check_flat(held_out: HeldOut, config: HeldOutConfig) -> None:
    """Raise UserError for trees: what reads several branches is in no sample of one branch."""
    if trees := sum(not record.tokens.tree.is_flat for record in held_out.records):
        raise UserError(
            f"data_path={config.data_path}: {trees} of {len(held_out.records)} records have a reduce or "
            "nested branches, and no sample of one branch holds them; give records of main and branches alone"
        )


def _branch_counts(model: Any, config: HeldOutConfig) -> list[int]:
    if is_patched(model):
        return sorted({1, *config.branches})
    print("patch_rope=false: the model holds one branch per sequence; measuring one branch only", flush=True)
    return [1]


def _select_counts(
    held_out: HeldOut, counts: Sequence[int]
) -> tuple[Mapping[int, SampleBatches], dict[int, int]]:
    """Batches of each count that the data reaches, and the largest sample at each other count."""
    batches_by_count: dict[int, SampleBatches] = {}
    not_measured: dict[int, int] = {}
    for count in counts:
        batches = held_out.batches(count, _SEED)
        largest = max_branches(batches)
        if largest < count:
            not_measured[count] = largest
        else:
            batches_by_count[count] = batches
    return batches_by_count, not_measured


def _collect(curve: Iterator[TaxPoint], total: int, config: HeldOutConfig) -> list[TaxPoint]:
    """Measure all points. Raises UserError if a batch does not fit into memory."""
    points: list[TaxPoint] = []
    with cli.progress("measuring", total) as report_progress:
        try:
            for point in curve:
                points.append(point)
                report_progress(len(points), lambda: f"{len(points)} of {total} branch counts measured")
        except NoMemoryError as error:
            raise UserError(
                f"batch_tokens={config.batch_tokens}: {error.batch}; "
                "lower it, or drop the largest count of branches"
            ) from error
    return points


def _print_report(config: HeldOutConfig, report: TaxReport) -> None:
    held_out, points = report.held_out, report.points
    table = Table(title_justify="left", title=f"branch tax on {config.data_path}")
    for header in ("branches", "mean per sample", "loss", "tax", "tokens/s", "seconds", "extra memory"):
        table.add_column(header, justify="right")
    for point in points:
        table.add_row(
            str(point.branches),
            f"{point.mean_branches:.1f}",
            f"{point.loss:.4f}",
            f"{point.tax:+.4f}",
            f"{point.tokens_per_second:.0f}",
            f"{point.seconds:.1f}",
            f"{point.peak_extra_bytes / 2**20:.0f} MiB",
        )
    console().print(table)
    fewer = "" if held_out.branches >= config.pool else f" (the data holds fewer than pool={config.pool})"
    print(
        f"loss and tax in nats per target token, over {points[0].targets} target tokens in "
        f"{held_out.branches} branches{fewer}; {held_out.truncated} texts truncated, "
        f"{held_out.skipped} skipped for their length"
    )
    for count, largest in report.not_measured.items():
        print(
            f"{count} branches: not measured; the largest sample of data_path and batch_tokens has {largest}"
        )


def _json_values(config: TaxConfig, report: TaxReport) -> dict[str, Any]:
    return {
        "points": [asdict(point) for point in report.points],
        "not_measured": [
            {"branches": count, "largest_sample": largest} for count, largest in report.not_measured.items()
        ],
        "held_out_branches": report.held_out.branches,
        "truncated_texts": report.held_out.truncated,
        "skipped_branches": report.held_out.skipped,
        "config": config.model_dump(mode="json"),
    }
