"""Which causal-LM types can hold parallel branches, checked on a tiny random model of each type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from parallelmind.errors import first_line
from parallelmind.evaluation.laws import LAWS, check_save_load, check_separate_rows
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.support import assess

ATTENTIONS = ("eager", "sdpa")
FALLBACK = "separate_rows"  # checked in place of the laws on a model that cannot be patched
COLUMNS = ("model_type", "family", "supported", "reason", "laws")
_EAGER_ONLY = "eager attention only"


@dataclass(frozen=True, slots=True)
class SupportRow:
    """One model type of the table.

    reason: why the type is not supported, or a limitation. laws: names of the laws that the type obeys.
    """

    model_type: str
    family: str
    supported: bool
    reason: str
    laws: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """The texts of COLUMNS."""
        supported = "yes" if self.supported else "no"
        return (self.model_type, self.family, supported, self.reason, " ".join(self.laws))


def check_model_types(model_types: Sequence[str]) -> Iterator[SupportRow]:
    """Build a tiny model of each type and check all laws, or the fallback if it cannot be patched."""
    for model_type in model_types:
        try:
            model = tiny_model(model_type)
        except Exception as error:  # a type may fail with any error of transformers
            reason = f"cannot be built here ({_error_summary(error)})"
            yield SupportRow(model_type, "not built", False, reason, ())
            continue
        can_be_patched = assess(model).reason is None
        yield _check_laws(model, model_type) if can_be_patched else _check_fallback(model, model_type)


def attention_implementations(model: PreTrainedModel | type[PreTrainedModel]) -> tuple[str, ...]:
    """Attention implementations of the model (or model class) that accept a dense mask."""
    return ATTENTIONS if model._supports_sdpa else ATTENTIONS[:1]


def _check_laws(model: PreTrainedModel, model_type: str) -> SupportRow:
    family = assess(model).family
    for attention in attention_implementations(model):
        model.set_attn_implementation(attention)
        for name, check in LAWS.items():
            if check is check_save_load and attention != ATTENTIONS[0]:
                continue  # saved files do not depend on the attention implementation
            try:
                check(model)
            except Exception as error:  # a crash counts as a broken law
                reason = f"breaks {name} ({attention}: {_error_summary(error)})"
                return SupportRow(model_type, family, False, reason, ())
    return SupportRow(model_type, family, True, "" if model._supports_sdpa else _EAGER_ONLY, tuple(LAWS))


def _check_fallback(model: PreTrainedModel, model_type: str) -> SupportRow:
    support = assess(model)
    try:
        check_separate_rows(model)
    except Exception as error:  # any error means that the type has no fallback
        reason = f"{support.reason}; no fallback ({type(error).__name__})"
        return SupportRow(model_type, support.family, False, reason, ())
    return SupportRow(model_type, support.family, False, str(support.reason), (FALLBACK,))


def _error_summary(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error.__cause__ or error)}"
