"""Configuration of the doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from parallelmind.config import BoolOrAuto, FrozenConfig, TrackingUri, TrainConfig
from parallelmind.remote import RemotePath

_TRAIN_FIELDS: dict[str, Any] = TrainConfig.flat_fields()


class DoctorConfig(FrozenConfig):
    """Settings of a check, which are fields of a training run."""

    base_model: str = _TRAIN_FIELDS["base_model"]
    output_dir: str = _TRAIN_FIELDS["output_dir"]
    mlflow_uri: TrackingUri = _TRAIN_FIELDS["mlflow_uri"]
    ray_address: str | None = _TRAIN_FIELDS["ray_address"]
    use_gpu: BoolOrAuto = _TRAIN_FIELDS["use_gpu"]
    end_to_end: bool = Field(
        True, description="train a few steps on generated data, and decode with the adapter"
    )

    @property
    def output_path(self) -> RemotePath:
        """`output_dir` as a path or URI."""
        return RemotePath.at(self.output_dir)

    @property
    def local_dir(self) -> Path:
        """`output_dir` on this machine: the folder itself, or the working copy of a URI."""
        return self.output_path.local

    @property
    def joined_address(self) -> str | None:
        """The cluster that `workloads.common.cluster.connect` joins; None means a local cluster."""
        return self.ray_address or os.environ.get("RAY_ADDRESS")
