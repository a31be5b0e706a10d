"""Read a file as training would, and collect its survey, its statistics and its first samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.duplicates import RecordHashes, pack_hashes, record_hash
from parallelmind.data.files import file_parts
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.packing import EpochSeed, TokenRecord, sample_batches
from parallelmind.data.records import Record
from parallelmind.data.survey import BadLine, Survey, check_line
from parallelmind.data.tokenise import nothing_left, tokenise_stream
from parallelmind.layout import Layout, Tokens, arrange
from parallelmind.tree import Ints
from workloads.data.statistics import LengthStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NumberedLine(NamedTuple):
    """A line with its file and its number in the file, counted from 1."""

    file: str
    number: int
    line: Line


def numbered_lines(files: Sequence[str]) -> Iterator[NumberedLine]:
    """Every line of the files."""
    for file in files:
        lines = chain.from_iterable(map(read_lines, file_parts([file])))
        for number, line in enumerate(lines, start=1):
            yield NumberedLine(file, number, line)


class Inspection:
    """One pass over the lines of some files.

    max_samples: number of samples to keep. max_records: number of records to read, None for all. complete:
    False if records were left unread.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_samples: int,
        max_records: int | None,
    ) -> None:
        self.survey, self.statistics = Survey(), LengthStatistics()
        self.complete = True
        self._config, self._tokenizer = config, tokenizer
        self._max_samples, self._max_records = max_samples, max_records
        self._hashes: list[int] = []
        self._samples: list[tuple[Tokens, Ints]] = []  # with the delays of their branches

    def read(self, lines: Iterable[NumberedLine]) -> None:
        """Read the lines, and build the batches that training would build of them."""
        for batch in sample_batches(self._tokenise(self._check(lines)), self._config, EpochSeed(0)):
            self.statistics.add_batch(batch.samples, self._config.packing)
            room = self._max_samples - len(self._samples)
            self._samples += list(zip(batch.samples, batch.delays, strict=True))[:room]
        self.survey.hashes = RecordHashes.unpack(pack_hashes(self._hashes, 1.0), 1.0)

    def layouts(self, rope: RopeConfig) -> Iterator[Layout]:
        """The layouts of the first samples."""
        return (arrange(tokens, rope, delays) for tokens, delays in self._samples)

    def raise_if_empty(self) -> None:
        """Raise UserError if training would have no record or no branch to train on."""
        config = self._config
        if not self.survey.records:
            self.survey.raise_if_unusable(config, "data_path")
        if not self.statistics.branch_tokens:
            raise nothing_left(self.survey.branches + self.survey.reduces, config)

    def _tokenise(self, records: Iterator[Record]) -> Iterator[TokenRecord]:
        for record in tokenise_stream(records, self._tokenizer, self._config):
            self.statistics.add_record(record)
            yield from record.for_packing()

    def _check(self, lines: Iterable[NumberedLine]) -> Iterator[Record]:
        survey = self.survey
        for file, number, line in lines:
            result = check_line(line, self._config, len(self._tokenizer))
            if result is None:
                continue
            if survey.records == self._max_records:
                self.complete = False
                return
            survey.lines += 1
            if isinstance(result, Record):
                survey.records += 1
                survey.branches += len(result.branches)
                survey.standalone += result.standalone
                survey.unknown_keys.update(result.unknown_keys)
                self._hashes.append(record_hash(result))
                yield result
            else:
                survey.bad.append(BadLine(file, line.offset, number, result))
