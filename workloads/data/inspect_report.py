"""What `workloads.inspect_data` found, for a terminal or as plain text."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallelmind.data.statistics import PERCENTILES, Statistics, Texts, bars, buckets, columns, percentiles
from parallelmind.data.survey import Survey
from parallelmind.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAD_SHOWN = 10
_BAR_WIDTH = 16
_INCOMPLETE, _PART = "\ufffd", "·"
_LONGEST_SPLIT = 3  # tokens before the last of a character: UTF-8 has up to four bytes


def print_lines(survey: Survey, complete: bool, console: Console) -> None:
    """What the lines are, and the first bad ones."""
    some = f"the first {survey.records:,} records only; max_records=null reads all"
    table = _counts()
    table.add_row("lines", f"{survey.lines:,}", "" if complete else some)
    own = survey.records - survey.standalone
    table.add_row(
        "records",
        f"{survey.records:,}",
        f"{own:,} with branches of their own, {survey.standalone:,} standalone",
    )
    table.add_row("bad", f"{len(survey.bad):,}", "left out of training" if survey.bad else "")
    if survey.unknown_keys:
        keys = ", ".join(f"{key} ({count:,})" for key, count in survey.unknown_keys.most_common(_BAD_SHOWN))
        table.add_row("other keys", f"{len(survey.unknown_keys):,}", Text(f"mean nothing here: {keys}"))
    console.print(table)
    for bad in survey.bad[:_BAD_SHOWN]:
        console.print(Text(f"  {bad}", style="red"), soft_wrap=True)
    if len(survey.bad) > _BAD_SHOWN:
        console.print(f"  … and {len(survey.bad) - _BAD_SHOWN:,} more")


def _counts() -> Table:
    """Rows of name, number and remark."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=10)
    table.add_column(min_width=9, justify="right")
    table.add_column()
    return table


def print_lengths(found: Statistics, console: Console) -> None:
    """Counts, percentiles, histograms, and what the limits and the padding cost."""
    table = _counts()
    limited = f"{found.skipped:,} more skipped, {found.truncated:,} texts truncated"
    table.add_row("branches", f"{len(found.branch_tokens):,}", limited)
    table.add_row("tokens", f"{found.tokens:,}", f"{found.targets:,} of them targets")
    table.add_row("samples", f"{len(found.sample_branches):,}")
    table.add_row("batches", f"{len(found.batch_tokens):,}")
    table.add_row(
        "padding", f"{found.padding:.1%}", f"of the {sum(found.batch_places):,} places in the batches"
    )
    console.print(table)
    series = {
        "tokens per branch": found.branch_tokens,
        "tokens per main": found.main_tokens,
        "branches per sample": found.sample_branches,
    }
    _print_percentiles({**series, "tokens per batch": found.batch_tokens}, console)
    charts = [
        Text("\n".join([title, *bars(buckets(values), _BAR_WIDTH)]))
        for title, values in series.items()
        if values
    ]
    console.print(Columns(charts, padding=(0, 4)))


def _print_percentiles(series: dict[str, list[int]], console: Console) -> None:
    table = Table(
        "", *(f"p{share}" if share < 100 else "max" for share in PERCENTILES), box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for title, values in series.items():
        if values:
            table.add_row(title, *(f"{value:,}" for value in percentiles(values)))
    console.print("", table, "", sep="\n")


def print_samples(layouts: Iterable[Layout], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """The first samples as columns: targets in bold and underlined on a terminal, in «» elsewhere."""
    marks, legend = (("", ""), "bold and underlined") if console.is_terminal else (("«", "»"), "in «»")
    texts = token_texts(tokenizer)
    for number, layout in enumerate(layouts, start=1):
        console.print(f"\nsample {number}: {len(layout.ids):,} tokens, targets {legend}")
        for line in columns(layout, texts, console.width, marks):
            pieces = [(text, "bold underline" if target else "") for text, target in line]
            console.print(Text.assemble(*pieces), no_wrap=True, overflow="crop", crop=True)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Texts:
    """What each token of a sequence adds to its text; a character that is split over tokens stands at its
    last one.
    """

    @functools.cache
    def decode(ids: tuple[int, ...]) -> str:
        """Said twice, because some tokenizers drop the space before the first token of what they decode."""
        once, twice = (
            tokenizer.decode(list(ids) * times, clean_up_tokenization_spaces=False) for times in (1, 2)
        )
        return str(twice[len(once) :])

    def texts(ids: list[int]) -> list[str]:
        found: list[str] = []
        waiting: tuple[int, ...] = ()
        for token in ids:
            text = decode((*waiting, token))
            split = text.endswith(_INCOMPLETE) and len(waiting) < _LONGEST_SPLIT
            waiting = (*waiting, token) if split else ()
            found.append(_PART if split else text)
        return found

    return texts
