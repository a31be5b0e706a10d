"""Which causal-LM types can hold parallel branches, and the laws that a tiny model of each was seen to
obey.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from parallelmind.errors import first_line
from parallelmind.evaluation.laws import LAWS, check_save_load, check_separate_rows
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.support import assess

ATTENTIONS = ("eager", "sdpa")
FALLBACK = "separate_rows"  # in place of the laws, for models that cannot be patched
COLUMNS = ("model_type", "family", "supported", "reason", "laws")
_NO_SDPA = "eager attention only"


@dataclass(frozen=True, slots=True)
class SupportRow:
    """One type of the table. reason: why it is not supported, or a limit. laws: names of those that were
    checked.
    """

    model_type: str
    family: str
    supported: bool
    reason: str
    laws: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        return (
            self.model_type,
            self.family,
            "yes" if self.supported else "no",
            self.reason,
            " ".join(self.laws),
        )


def check_model_types(model_types: Sequence[str]) -> Iterator[SupportRow]:
    """Build a tiny model of each type and check every law on it, or the fallback where it cannot be
    patched.
    """
    for model_type in model_types:
        try:
            model = tiny_model(model_type)
        except Exception as error:  # whatever transformers finds wrong with a type of its own
            yield SupportRow(model_type, "not built", False, f"cannot be built here ({_why(error)})", ())
            continue
        yield (
            _row_without_patch(model, model_type) if assess(model).reason else _patched_row(model, model_type)
        )


def attention_implementations(model: PreTrainedModel | type[PreTrainedModel]) -> tuple[str, ...]:
    """The attention implementations that take a mask of two coordinates and that the model (or its class)
    has.
    """
    return ATTENTIONS if model._supports_sdpa else ATTENTIONS[:1]


def _patched_row(model: PreTrainedModel, model_type: str) -> SupportRow:
    family = assess(model).family
    for attention in attention_implementations(model):
        model.set_attn_implementation(attention)
        for name, check in LAWS.items():
            if check is check_save_load and attention != ATTENTIONS[0]:
                continue  # files know nothing of attention
            try:
                check(model)
            except Exception as error:  # a crash breaks a law as much as a wrong logit does
                return SupportRow(
                    model_type, family, False, f"breaks {name} ({attention}: {_why(error)})", ()
                )
    return SupportRow(model_type, family, True, "" if model._supports_sdpa else _NO_SDPA, tuple(LAWS))


def _row_without_patch(model: PreTrainedModel, model_type: str) -> SupportRow:
    support = assess(model)
    try:
        check_separate_rows(model)
    except Exception as error:  # no type is worse off for having no fallback, whatever the cause
        return SupportRow(
            model_type, support.family, False, f"{support.reason}; no fallback ({type(error).__name__})", ()
        )
    return SupportRow(model_type, support.family, False, str(support.reason), (FALLBACK,))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error.__cause__ or error)}"
