"""What an application serves, given as text: `serve run serving.app:build lora_path=…` knows no other types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ConfigDict, Field, model_validator

import parallelmind as pm
from parallelmind.config import Dtype, Part, resolve

_ADAPTER = "adapter"  # what a run calls the folder of its adapter

AppT = TypeVar("AppT", bound="AppConfig")


class AppConfig(Part):
    """One model under one name."""

    model_config = ConfigDict(strict=False)  # the command line gives "true" for true

    lora_path: str | None = Field(None, min_length=1, description="adapter folder; none: the base model alone")
    base_model: str | None = Field(None, min_length=1, description="smollm2-135m, a folder, or a hub id; none: the adapter's")
    served_name: str | None = Field(None, min_length=1, description="model name in requests; none: the run's or the base model's")
    dtype: Dtype = Field("float32", description="compute type of the base weights")
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")

    @model_validator(mode="after")
    def _something_to_serve(self) -> Self:
        if self.lora_path is None and self.base_model is None:
            raise ValueError("lora_path: required and not given; add lora_path=runs/NAME/adapter, or base_model=smollm2-135m")
        return self

    @classmethod
    def of(cls: type[AppT], given: Mapping[str, Any]) -> AppT:
        """Raises UserError for an unknown field, a bad value, and nothing to serve."""
        return resolve(cls, dict(given), source="serving")

    @property
    def name(self) -> str:
        """What `model` in a request must be; never a path of this machine."""
        if self.served_name:
            return self.served_name
        path = Path(self.lora_path or self.base_model or "")
        if self.lora_path:
            return path.parent.name if path.name == _ADAPTER and path.parent.name else path.name
        return path.name if path.is_absolute() else str(path)

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises UserError for what cannot be loaded."""
        return pm.load_model_with_lora(
            self.base_model, self.lora_path, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
