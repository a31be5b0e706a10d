"""Survey of a run's data before training: counts, fingerprints, bad lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from parallelmind.config import DataConfig
from parallelmind.data.pipeline import survey_files
from parallelmind.data.survey import BadLine, Survey, write_quarantine
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.train.data_files import DataFiles

_MAX_BAD_LINES_SHOWN, _MAX_KEYS_SHOWN = 10, 5


class SurveyedData(NamedTuple):
    """Survey of the training data, and the fingerprint of all data."""

    train: Survey
    fingerprint: str


def survey_data(
    files: DataFiles, config: DataConfig, vocabulary_size: int, quarantine_file: RemotePath
) -> SurveyedData:
    """Check every line of every file; print a summary, and write the bad lines to the quarantine file.

    Raises:
        UserError: more bad lines than the settings tolerate.
    """
    train = survey_files(files.train, config, vocabulary_size)
    bad, fingerprint = list(train.bad), train.fingerprint
    if files.validation:
        validation = survey_files(files.validation, config, vocabulary_size, "validation_path")
        bad, fingerprint = bad + validation.bad, f"{fingerprint} {validation.fingerprint}"
    _quarantine(bad, quarantine_file)
    _print_summary(train)
    return SurveyedData(train, fingerprint)


def changed_data(config: DataConfig) -> UserError:
    """The error for a trial whose data differs from that of the earlier trials of its sweep."""
    fields = f"data_path={config.data_path}"
    if config.validation_path:
        fields += f" or validation_path={config.validation_path}"
    return UserError(
        f"{fields}: the records differ from those of the earlier trials; restore them, or choose another name"
    )


def _quarantine(bad: Sequence[BadLine], file: RemotePath) -> None:
    """Print the first bad lines and write all of them to the quarantine file."""
    for line in bad[:_MAX_BAD_LINES_SHOWN]:
        print(f"skipped: {line}", file=sys.stderr)
    write_quarantine(file.local, bad)
    file.upload()
    if bad:
        print(
            f"bad lines skipped: {len(bad)}, listed in {file}; strict=true stops at the first",
            file=sys.stderr,
        )


def _print_summary(train: Survey) -> None:
    ignored = "".join(
        f", key {key!r} ignored in {count}" for key, count in train.unknown_keys.most_common(_MAX_KEYS_SHOWN)
    )
    print(
        f"data: {train.records} records, {train.branches} branches, {len(train.bad)} bad lines{ignored}",
        flush=True,
    )
