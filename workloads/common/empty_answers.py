"""Why a branch has no text, with the form of the prompts that its adapter was trained on."""

from __future__ import annotations

import json
from typing import Any

from parallelmind.engine.output import FinishReason
from parallelmind.errors import UserError
from parallelmind.model.manifest import MANIFEST, SAMPLES
from parallelmind.remote import RemotePath

_MAX_CHARS = 80  # of a text of the sample


def is_empty(text: str, reason: FinishReason | None) -> bool:
    """Whether the model has ended a segment without any text."""
    return reason == "stop" and not text.strip()


def ended_at_once(subject: str, lora_path: str | None, has_stops: bool = False) -> str:
    """One line for a user. subject: what has no text, such as "branch 2". has_stops: it has stop texts."""
    reason = "the model began with an end-of-text token"
    if has_stops:
        reason += " or with one of the texts of stop"
    if lora_path is None:
        return f"{subject}: no text; {reason}; end the prompt in another way, or set ignore_eos=true"
    sample = _trained_sample(lora_path)
    remedy = "give prompts the form of the training data"
    return f"{subject}: no text; {reason}; {remedy}{f', such as {sample}' if sample else ''}"


def _trained_sample(lora_path: str) -> str:
    """Main and first prompt of a sample that the manifest of an adapter holds; empty without one."""
    try:
        content = RemotePath.at(lora_path, "lora_path").child(MANIFEST).read_bytes()
        sample = json.loads(content or b"{}")["extra"][SAMPLES][0]
        return f"main={_quoted(sample['main'])} prompts=[{_quoted(sample['branches'][0]['text'])}]"
    except (UserError, OSError, ValueError, LookupError, TypeError):  # saved without samples, or elsewhere
        return ""


def _quoted(text: Any) -> str:
    """A text with its line breaks and spaces as JSON shows them; the middle of a long one is left out."""
    half = _MAX_CHARS // 2
    return json.dumps(
        text if len(text) <= _MAX_CHARS else f"{text[:half]} … {text[-half:]}", ensure_ascii=False
    )
