"""Data files of a run."""

from __future__ import annotations

from typing import NamedTuple, Self

from parallelmind.config import DataConfig
from parallelmind.data.files import find_files


class DataFiles(NamedTuple):
    """Files of the training data and of the held-out data."""

    train: list[str]
    validation: list[str]

    @classmethod
    def find(cls, data: DataConfig) -> Self:
        """Resolve `data_path` and `validation_path`. Raises UserError if one of them matches no file."""
        validation = find_files(data.validation_path, "validation_path") if data.validation_path else []
        return cls(find_files(data.data_path), validation)
