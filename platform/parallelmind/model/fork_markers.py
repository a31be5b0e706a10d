"""The markers with which a loaded model forks by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from parallelmind.model.structure import causal_lm

_ATTRIBUTE = "_fork_markers"


def set_fork_markers(model: nn.Module, markers: Sequence[str]) -> None:
    """Let an engine of this model, or of the one in a PeftModel, open the forks that it writes.

    markers: as `DataConfig.fork_markers`.
    """
    inner: Any = causal_lm(model)
    setattr(inner, _ATTRIBUTE, tuple(markers))


def fork_markers(model: nn.Module) -> tuple[str, ...]:
    """The markers of a model; empty if it does not fork by itself."""
    markers: tuple[str, ...] = getattr(causal_lm(model), _ATTRIBUTE, ())
    return markers
