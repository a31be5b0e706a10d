"""The report of an inspection, for a terminal or as plain text."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallelmind.data.survey import Survey
from parallelmind.layout import Layout
from workloads.data.histogram import bars, histogram
from workloads.data.sample_columns import TokenTexts, sample_columns
from workloads.data.statistics import PERCENTILES, LengthStatistics, percentiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_SHOWN = 10  # bad lines, and unknown keys
_BAR_WIDTH = 16
_INCOMPLETE, _PARTIAL_CHARACTER = "\ufffd", "·"
_MAX_PENDING = 3  # tokens before the last one of a character: UTF-8 has up to four bytes


def print_lines(survey: Survey, complete: bool, console: Console) -> None:
    """Print the counts of lines and records, and the first bad lines."""
    table = _count_table()
    unread = f"only the first {survey.records:,} records; max_records=null reads all"
    table.add_row("lines", f"{survey.lines:,}", "" if complete else unread)
    with_branches = survey.records - survey.standalone
    kinds = f"{with_branches:,} with branches of their own, {survey.standalone:,} standalone"
    table.add_row("records", f"{survey.records:,}", kinds)
    table.add_row("bad", f"{len(survey.bad):,}", "skipped in training" if survey.bad else "")
    if repeated := survey.hashes.repeated():
        table.add_row("repeated", f"{repeated:,}", "records with the content of an earlier one")
    if survey.unknown_keys:
        keys = ", ".join(f"{key} ({count:,})" for key, count in survey.unknown_keys.most_common(_MAX_SHOWN))
        table.add_row("other keys", f"{len(survey.unknown_keys):,}", Text(f"ignored: {keys}"))
    console.print(table)
    for bad in survey.bad[:_MAX_SHOWN]:
        console.print(Text(f"  {bad}", style="red"), soft_wrap=True)
    if len(survey.bad) > _MAX_SHOWN:
        console.print(f"  … and {len(survey.bad) - _MAX_SHOWN:,} more")


def _count_table() -> Table:
    """A table with rows of name, number and remark."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=10)
    table.add_column(min_width=9, justify="right")
    table.add_column()
    return table


def print_lengths(statistics: LengthStatistics, packing: bool, console: Console) -> None:
    """Print counts, percentiles and histograms, and what the limits and the padding cost."""
    table = _count_table()
    limits = f"{statistics.skipped:,} more skipped, {statistics.truncated:,} texts truncated"
    table.add_row("branches", f"{len(statistics.branch_tokens):,}", limits)
    if statistics.reduce_tokens or statistics.depth > 1:
        table.add_row("reduces", f"{len(statistics.reduce_tokens):,}")
        table.add_row("segments", f"{statistics.segments:,}", "main, branches and reduces")
        table.add_row("depth", f"{statistics.depth:,}", "levels of branches below main")
    table.add_row("tokens", f"{statistics.tokens:,}", f"{statistics.targets:,} of them targets")
    table.add_row("samples", f"{len(statistics.sample_branches):,}")
    table.add_row("batches", f"{len(statistics.batch_tokens):,}")
    padded_tokens = f"of the {sum(statistics.batch_padded_tokens):,} tokens in the batches"
    table.add_row("padding", f"{statistics.padding:.1%}", padded_tokens + " (packing=true)" * packing)
    console.print(table)
    series = {
        "tokens per branch": statistics.branch_tokens,
        "tokens per reduce": statistics.reduce_tokens,
        "tokens per main": statistics.main_tokens,
        "branches per sample": statistics.sample_branches,
    }
    _print_percentiles({**series, "tokens per batch": statistics.batch_tokens}, console)
    charts = [
        Text("\n".join([title, *bars(histogram(values), _BAR_WIDTH)]))
        for title, values in series.items()
        if values
    ]
    console.print(Columns(charts, padding=(0, 4)))


def _print_percentiles(series: dict[str, list[int]], console: Console) -> None:
    names = (f"p{percent}" if percent < 100 else "max" for percent in PERCENTILES)
    table = Table("", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, values in series.items():
        if values:
            table.add_row(title, *(f"{value:,}" for value in percentiles(values)))
    console.print("", table, "", sep="\n")


def print_samples(layouts: Iterable[Layout], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print samples as columns. Targets are bold and underlined on a terminal, and in «» elsewhere."""
    marks, legend = (("", ""), "bold and underlined") if console.is_terminal else (("«", "»"), "in «»")
    token_texts = token_decoder(tokenizer)
    for number, layout in enumerate(layouts, start=1):
        console.print(f"\nsample {number}: {len(layout.ids):,} tokens, targets {legend}")
        for line in sample_columns(layout, token_texts, console.width, marks):
            pieces = [(text, "bold underline" if target else "") for text, target in line]
            console.print(Text.assemble(*pieces), no_wrap=True, overflow="crop", crop=True)


def token_decoder(tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
    """A function that gives the text that each token of a sequence adds.

    A character that is divided among several tokens is the text of the last of them.
    """

    @functools.cache
    def decode(ids: tuple[int, ...]) -> str:
        """Decode the ids twice in a row, as some tokenizers drop the space before the first token."""
        once, twice = (
            tokenizer.decode(list(ids) * times, clean_up_tokenization_spaces=False) for times in (1, 2)
        )
        return str(twice[len(once) :])

    def token_texts(ids: list[int]) -> list[str]:
        texts: list[str] = []
        pending: tuple[int, ...] = ()  # tokens of a character that is not complete
        for token in ids:
            text = decode((*pending, token))
            incomplete = text.endswith(_INCOMPLETE) and len(pending) < _MAX_PENDING
            pending = (*pending, token) if incomplete else ()
            texts.append(_PARTIAL_CHARACTER if incomplete else text)
        return texts

    return token_texts
