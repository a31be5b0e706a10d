"""Survey of a run's data before training: counts, fingerprints, and what training leaves out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig, OptimizerConfig, RopeConfig, TrainConfig
from parallelmind.data.epoch_estimate import EpochEstimate, estimate_epoch
from parallelmind.data.held_out import HeldOut
from parallelmind.data.pipeline import survey_files
from parallelmind.data.survey import BadLine, Survey, write_quarantine
from parallelmind.data.tokenise import limit_notes, nothing_left
from parallelmind.errors import UserError
from parallelmind.model.vocabulary import check_highest_id
from parallelmind.remote import RemotePath
from parallelmind.training.loop import steps_of_epochs
from workloads.train.data_files import DataFiles

_MAX_BAD_LINES_SHOWN, _MAX_KEYS_SHOWN = 10, 5


class SurveyedData(NamedTuple):
    """Survey of the training data, and the fingerprint of all data."""

    train: Survey
    fingerprint: str


def survey_data(
    files: DataFiles, data: DataConfig, rope: RopeConfig, vocabulary_size: int, quarantine_file: RemotePath
) -> SurveyedData:
    """Check every line of every file; print a summary, and write the bad lines to the quarantine file.

    Raises:
        UserError: more bad lines than the settings tolerate; trees for a model without the patch.
    """
    train = survey_files(files.train, data, vocabulary_size)
    bad, fingerprint = list(train.bad), train.fingerprint
    validation = None
    if files.validation:
        validation = survey_files(files.validation, data, vocabulary_size, "validation_path")
        bad, fingerprint = bad + validation.bad, f"{fingerprint} {validation.fingerprint}"
    _quarantine(bad, quarantine_file)
    _print_summary("data", train)
    if validation is not None:
        _print_summary("validation data", validation)
        _print_shared(train, validation, data)
    if not rope.patch_rope:
        _refuse_trees(train, f"data_path={data.data_path}")
        _refuse_trees(validation, f"validation_path={data.validation_path}")
    return SurveyedData(train, fingerprint)


def _refuse_trees(survey: Survey | None, source: str) -> None:
    if survey is not None and survey.trees:
        raise UserError(
            f"patch_rope=false: {survey.trees} records of {source} hold nested branches or a reduce, which "
            "need the patch; drop patch_rope, or give records of main and branches alone"
        )


def check_limits(
    train: Survey, files: DataFiles, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> EpochEstimate:
    """Estimate the first epoch, and print what the limits remove from training and validation.

    Raises UserError if they remove all of the training data, and for held-out ids without an embedding.
    """
    data, optimizer = config.data, config.optimizer
    epoch = estimate_epoch(train, tokenizer, data, optimizer.seed)
    if epoch.exact and epoch.skipped == train.branches + train.reduces:
        raise nothing_left(epoch.skipped, data)
    print_estimate(epoch, data, optimizer, config.batches_per_step)
    if files.validation:
        pool = config.metrics.validation_samples
        held_out = HeldOut.read(files.validation, pool, tokenizer, data)
        source = f"validation_path={data.validation_path}"
        check_highest_id(held_out.highest_id, source, tokenizer, config.model)
        for note in limit_notes(held_out.truncated, held_out.skipped, data):
            _notice(f"{source} {note}")
        _print_undivided(held_out, source, config.metrics.validation_branches)
    return epoch


def _print_undivided(held_out: HeldOut, source: str, counts: Sequence[int]) -> None:
    """Print how many held-out trees are evaluated at several branch counts, which do not divide them."""
    trees = sum(not record.tokens.tree.is_flat for record in held_out.records)
    if trees and len(counts) > 1:
        _notice(
            f"{source}: {trees} of {len(held_out.records)} records have a reduce or nested branches, and no "
            "sample of one branch holds them, so branch_tax has no meaning; validation_branches=[1] "
            "validates them once"
        )


def print_estimate(
    epoch: EpochEstimate, data: DataConfig, optimizer: OptimizerConfig, batches_per_step: int
) -> None:
    """Print what the length limits remove, and whether the epochs end before max_steps."""
    about = "" if epoch.exact else "about "
    for note in limit_notes(epoch.truncated, epoch.skipped, data, about):
        _notice(note)
    steps = steps_of_epochs(optimizer, epoch.batches, batches_per_step)
    if optimizer.max_steps is not None and steps < optimizer.max_steps:
        _notice(
            f"max_steps={optimizer.max_steps}: training ends before, after {about}{steps:,} steps, as "
            f"epochs={optimizer.epochs}; raise epochs to reach max_steps"
        )


def changed_data(data: DataConfig) -> UserError:
    """The error for a trial whose data differs from that of the earlier trials of its sweep."""
    return UserError(
        f"{data_fields(data)}: the records differ from those of the earlier trials; restore them, or choose "
        "another name"
    )


def data_fields(data: DataConfig) -> str:
    """The fields that name the data, for an error about one of them."""
    fields = f"data_path={data.data_path}"
    return f"{fields} or validation_path={data.validation_path}" if data.validation_path else fields


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


def _print_summary(name: str, survey: Survey) -> None:
    keys = survey.unknown_keys.most_common(_MAX_KEYS_SHOWN)
    ignored = "".join(f", key {key!r} ignored in {count}" for key, count in keys)
    if more := len(survey.unknown_keys) - len(keys):
        ignored += f", {more} more keys ignored"
    about = "" if survey.hashes.share == 1 else "about "
    repeated = f", {about}{count} repeated records" if (count := survey.hashes.repeated()) else ""
    trees = f" ({survey.trees} trees)" if survey.trees else ""
    print(
        f"{name}: {survey.records} records{trees}, {survey.branches} branches, {len(survey.bad)} bad lines"
        f"{repeated}{ignored}",
        flush=True,
    )


def _print_shared(train: Survey, validation: Survey, data: DataConfig) -> None:
    about = "" if train.hashes.share == validation.hashes.share == 1 else "about "
    if shared := validation.hashes.shared_with(train.hashes):
        _notice(
            f"validation_path={data.validation_path}: {about}{shared} of {validation.records} records are "
            f"also in data_path={data.data_path}, so their loss is not held out; remove them from one"
        )


def _notice(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
