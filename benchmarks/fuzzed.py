"""Requests to try a server with, as they go over the wire: by schemathesis, by hand, and by chance."""

from __future__ import annotations

import json
from contextlib import suppress
from random import Random
from typing import Any

from benchmarks.oddities import LIVE, VALID, VALUES, oddities, post, wire

# Schemas by which more of what is generated gets as far as the engine.
_NARROW: dict[str, Any] = {
    "model": {"enum": ["base"]},
    "sample": {"enum": [LIVE]},
    "index": {"type": "integer", "minimum": -1, "maximum": 9},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 8},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 8},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "logprobs": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"type": "boolean"}]},
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "top_k": {"type": "integer", "minimum": 0},
    "seed": {"type": "integer", "minimum": 0},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,2}$"},
        "additionalProperties": {"type": "number"},
    },
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 200}},
}

_KEYS = [
    "",
    "x",
    "\x00",
    "\ud800",
    "__class__",
    "best_of",
    "echo",
    "suffix",
    "tools",
    "response_format",
    "stream",
    "reduce",
]


def requests(document: dict[str, Any], count: int, seed: int) -> list[bytes]:
    """So many: up to two fifths each by schemathesis and from a list of oddities; the rest are valid ones
    changed at random.
    """
    draw = Random(seed)
    odd = list(oddities())
    found = [*_generated(document, count * 2 // 5, seed), *draw.sample(odd, min(len(odd), count * 2 // 5))]
    found += [_mutated(draw) for _ in range(count - len(found))]
    draw.shuffle(found)
    return found


def _generated(document: dict[str, Any], count: int, seed: int) -> list[bytes]:
    """By the document and by a narrowed one, valid and invalid, as many of each operation as the others, if
    it has them.
    """
    import schemathesis

    schemas = [schemathesis.openapi.from_dict(each) for each in (document, _narrowed(document))]
    operations: list[Any] = [found.ok() for schema in schemas for found in schema.get_all_operations()]  # type: ignore[union-attr]
    strategies = [
        operation.as_strategy(mode) for operation in operations for mode in schemathesis.GenerationMode
    ]
    found: list[bytes] = []
    for place, strategy in enumerate(strategies):
        found += _drawn(strategy, (count - len(found)) // (len(strategies) - place), seed)
    return found


def _drawn(strategy: Any, count: int, seed: int) -> list[bytes]:
    import hypothesis

    found: list[bytes] = []
    settings = hypothesis.settings(
        max_examples=max(count, 1),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(strategy)
    def draw(case: Any) -> None:
        found.append(_encoded(case))

    with suppress(
        hypothesis.errors.Unsatisfiable
    ):  # where there is neither a body nor a parameter nothing can be wrong
        draw()
    return found[:count]


def _encoded(case: Any) -> bytes:
    from requests import Request

    given = case.as_transport_kwargs(base_url="http://localhost")
    known = ("method", "url", "headers", "params", "cookies", "data", "json", "files")
    prepared: Any = Request(**{name: given[name] for name in known if name in given}).prepare()
    body = prepared.body or b""
    lines = [f"{name}: {value}" for name, value in prepared.headers.items() if name.lower() != "connection"]
    return wire(
        prepared.method, prepared.path_url, body if isinstance(body, bytes) else body.encode(), *lines
    )


def _narrowed(value: Any) -> Any:
    """A document in which properties and parameters of these names have these schemas."""
    if isinstance(value, list):
        return [_narrowed(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: _narrowed(each) for name, each in value.items()}
    if isinstance(found.get("properties"), dict):
        found["properties"] |= {
            name: schema for name, schema in _NARROW.items() if name in found["properties"]
        }
    if found.get("in") == "path":
        found["schema"] = _NARROW.get(found["name"], found["schema"])
    return found


def _mutated(draw: Random) -> bytes:
    path = draw.choice(list(VALID))
    body: Any = VALID[path]
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        body = _changed(body, draw)
    text = json.dumps(body, ensure_ascii=draw.random() < 0.8).encode(errors="surrogatepass")
    if draw.random() < 0.2:
        text = _bitten(text, draw)
    return post(path, text)


def _changed(value: Any, draw: Random) -> Any:
    """A copy, of which something is another or gone."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice(
            [draw.choice(VALUES), draw.choice(VALUES), draw.choice(VALUES), [value], {"x": value}]
        )
    copy: Any = value.copy()
    if isinstance(value, dict) and draw.random() < 0.1:
        return {**copy, draw.choice(_KEYS): draw.choice(VALUES)}
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.1:
        del copy[key]
    else:
        copy[key] = _changed(copy[key], draw)
    return copy


def _bitten(text: bytes, draw: Random) -> bytes:
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        text = (
            text[:at]
            + draw.choice([b"", draw.randbytes(1), b'"', b"{", b"]", b"\\u"])
            + text[at + draw.randint(0, 3) :]
        )
    return text
