"""Passwords, tokens and signatures: `***` takes their place wherever a text or URI is shown or written."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_MIN_SECRET_CHARS = 8  # a shorter value is no key, and may be a part of any word

_SCHEME = r"[a-z][a-z0-9+.-]+:/{1,2}(?!/)"  # Path writes one slash
_DATABASE = r"(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w+)?://"
_USER = r"[^\s/:?#\[]*"  # may be a mail address
_PASSWORD = r"(?!//)[^\s@]+(?:@[^\s/@]+)*"  # may contain slashes
_PORT = r"\d+[/?#,]"
_SECRET_NAMES = (
    r"[\w.-]*(?:token(?!s\b|i)|secret|signature|passw|passphrase|credential|odbc_connect"
    r"|(?:api|access|account|private|subscription)[_-]?key)[\w.-]*"
    r"|sig|key|pwd|pass|auth"
)
_PATTERNS = (
    (re.compile(rf"({_DATABASE}{_USER}:){_PASSWORD}@", re.I), r"\1***@"),
    (re.compile(rf"({_SCHEME}{_USER}:)(?!{_PORT}){_PASSWORD}@", re.I), r"\1***@"),
    # A user without a password is a token.
    (re.compile(r"(https?://)[^\s/:@?#]+@(?![^\s/]*@)", re.I), r"\1***@"),
    (re.compile(rf"([?&;#](?:{_SECRET_NAMES})=)[^\s&;'\"]*[^\s&;:,.)'\"]", re.I), r"\1***"),
)
_IS_HIDDEN = re.compile(r":/{1,2}(?:[^\s/]*:)?\*\*\*@|[?&;#][\w.-]+=\*\*\*")


def redact_uri(text: str) -> str:
    """The text with `***` in place of every password, token and signature of the URIs in it.

    The values of `SECRET_VARIABLES` of this process are replaced anywhere.
    """
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    for name in SECRET_VARIABLES:
        if len(secret := os.environ.get(name, "")) >= _MIN_SECRET_CHARS:
            text = text.replace(secret, HIDDEN)
    return text


def redact_values(value: Any) -> Any:
    """A value of lists and mappings with `redact_uri` applied to every text in it."""
    if isinstance(value, dict):
        return {key: redact_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact_values(inner) for inner in value]
    return redact_uri(value) if isinstance(value, str) else value


def has_hidden_part(uri: str) -> bool:
    """Whether the URI is one that `redact_uri` has shortened, which cannot be used as it is."""
    return _IS_HIDDEN.search(uri) is not None
