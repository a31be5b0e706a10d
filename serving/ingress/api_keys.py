"""API keys: where they are read, and whether a request has one."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import parallelmind as pm

_ENV_VARIABLE = "PARALLELMIND_API_KEYS"


class ApiKeys:
    """The hashes of the known keys. Without any key every request is valid."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    def is_valid(self, authorization: str | None) -> bool:
        """Whether an Authorization header holds a known key: Bearer, or Basic with the key as password.

        The time it takes does not depend on the keys.
        """
        if not self._hashes:
            return True
        given = sha256(_key_bytes(authorization or "")).digest()
        return sum([hmac.compare_digest(given, known) for known in self._hashes]) > 0


def _key_bytes(authorization: str) -> bytes:
    """The key in a header, whose text is its bytes decoded as Latin-1."""
    scheme, _, value = authorization.partition(" ")
    key = value.strip().encode("latin-1")
    if scheme.lower() != "basic":
        return key if scheme.lower() == "bearer" else b""
    try:
        return base64.b64decode(key, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def read_api_keys(path: str | None) -> list[str]:
    """The keys of a file, one a line, and of $PARALLELMIND_API_KEYS, separated by commas.

    Returns [] only if neither is given. Raises UserError for a file that cannot be read, and if what is given
    holds no key.
    """
    variable = os.environ.get(_ENV_VARIABLE)
    candidates = (variable or "").split(",")
    if path is not None:
        try:
            candidates += Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise pm.UserError(
                f"api_keys_file={path}: {error}; give a text file with one key a line"
            ) from error
    keys = [key.strip() for key in candidates if key.strip()]
    if not keys and (path is not None or variable is not None):
        source = f"${_ENV_VARIABLE}={variable!r}" if path is None else f"api_keys_file={path}"
        remedy = "unset it" if path is None else "leave it out"
        raise pm.UserError(f"{source}: holds no key; add one, or {remedy} to serve without keys")
    return keys
