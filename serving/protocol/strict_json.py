"""JSON as its standard has it: Python's module also reads and writes NaN, infinity and half characters."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator

from serving.protocol.fields import require_encodable


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, also if nested too deeply."""
    try:
        return require_json(json.loads(text))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def require_json(value: Any) -> Any:
    """The value itself. Raises ValueError if its JSON text is not valid or has no encoding."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("holds NaN or infinity, which JSON does not have; send numbers or null") from None
    require_encodable(text)
    return value


AnyJson = Annotated[Any, AfterValidator(require_json)]
JsonObject = Annotated[dict[str, Any], AfterValidator(require_json)]
