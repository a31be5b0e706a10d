"""What is wrong with a run, as far as it is known before Ray and a model library are imported."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import PurePosixPath

from parallelmind.config import DataConfig, TrainConfig
from parallelmind.data.convert.kinds import find_kind
from parallelmind.data.convert.readers import read_records
from parallelmind.data.files import FileFormat, file_parts
from parallelmind.data.survey import combine_surveys, survey_part
from parallelmind.errors import UserError
from parallelmind.model.preflight import check_base_model, check_quantize
from parallelmind.remote import is_uri
from parallelmind.wandb_run import check_wandb
from workloads.train.data_files import DataFiles

_HEAD_BYTES = 1 << 20  # of a file
_WITH_TEMPLATE = ("messages", "sharegpt")


def check_run(config: TrainConfig, files: DataFiles) -> None:
    """Raise UserError for a model that cannot be loaded here, data whose first records are none, and services
    that cannot be used.
    """
    services = config.services
    is_local = not (services.ray_address or os.environ.get("RAY_ADDRESS"))  # the workers run on this machine
    if is_local:
        check_quantize(config.model.quantize)
    if services.track == "wandb":
        check_wandb(services.mlflow_experiment, is_local)
    if config.hub.push_to:
        from parallelmind.model.push import check_push  # imports most of huggingface_hub

        check_push(config.hub.push_to)
    check_base_model(config.model.base_model)
    for field, paths in (("data_path", files.train), ("validation_path", files.validation)):
        if paths:
            _check_head(config.data, field, paths[0], config.model.base_model)


def _check_head(data: DataConfig, field: str, file: str, base_model: str) -> None:
    """Raise UserError if there is no record at the start of a file."""
    file_format = FileFormat.of(file)
    if not (file_format.is_divisible or file_format.is_parquet):
        return  # a compressed file would be read whole
    for part in file_parts([file], field)[:1]:
        head = replace(part, end=min(part.end, part.start + _HEAD_BYTES))
        survey = combine_surveys([head], [survey_part(head, data, vocab_size=None)])
        if survey.bad and not survey.records:
            survey.raise_if_unusable(data, field, _convert_fields(file, base_model))


def _convert_fields(file: str, base_model: str) -> str:
    """The fields of the command that converts a file."""
    name = PurePosixPath(file).name.partition(".")[0]
    path = os.path.relpath(file) if not is_uri(file) else file
    fields = [f"data_path={path}", f"output_path={name}.parallel.jsonl"]
    if _has_turns(file):
        fields.append(f"base_model={base_model}")
    return shlex.join(fields)


def _has_turns(file: str) -> bool:
    """Whether the records are conversations, which need the chat template of the base model."""
    try:
        first = next(iter(read_records(file)), None)
    except UserError:  # `convert` tells what is wrong
        return False
    kind = find_kind(getattr(first, "value", None), "auto", text_column="text")
    return kind is not None and kind.source in _WITH_TEMPLATE
