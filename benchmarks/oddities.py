"""Hand-written raw HTTP requests: malformed, extreme and unusual ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

LIVE = "LIVE"  # placeholder for the id of a running sample, replaced when the request is sent
_ADD_BRANCH = f"/v1/branches/{LIVE}/branches"

_COMPLETION = """{"model": "base", "prompt": ["The sky is", [5, 6, 7]], "max_tokens": 4, "n": 2, "seed": 1,
    "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1,
    "stop": ["x", "\\n"], "logit_bias": {"5": 1, "6": -1.5}, "logprobs": 2, "ignore_eos": true, "echo": true,
    "stream": true, "stream_options": {"include_usage": true}, "user": "me",
    "main": "At dusk. ", "visibility": "isolated"}"""
_RESPONSE = """{"model": "base", "input": "Name a colour.", "instructions": "Be brief.", "user": "me",
    "max_output_tokens": 4, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}, "stream": true}"""
_CHAT = """{"model": "base", "max_completion_tokens": 4, "n": 2, "logprobs": true, "top_logprobs": 3,
    "seed": 1, "messages": [
    {"role": "system", "content": "Be brief.", "name": "me"},
    {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}],
    "questions": ["Why?", "And why not?"]}"""
_BRANCHES = """{"model": "base", "main": "The sea", "reduce": " So", "stream": true, "temperature": 1,
    "max_tokens": 4, "branches": [
    {"text": " is", "seed": 1, "logprobs": 3}, {"text": [5, 6], "stop": "x", "max_tokens": 2},
    " was", {"role": "user", "content": "Who?"}]}"""
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": json.loads(_COMPLETION),
    "/v1/chat/completions": json.loads(_CHAT),
    "/v1/responses": json.loads(_RESPONSE),
    "/v1/branches": json.loads(_BRANCHES),
    _ADD_BRANCH: {"text": " was", "max_tokens": 4, "temperature": 0.5, "seed": 1},
    "/tokenize": {"prompt": "The sky is", "model": "base"},
    "/detokenize": {"tokens": [5, 6, 7], "model": "base"},
}

VALUES: list[Any] = [
    *(None, True, False, "", " ", "x", "\x00", "\ud800", "\udfff\ud800", "💥" * 9, "a" * 5000, "user"),
    *("base", "base:x", "base:" + "漢" * 100, "base:\x00", "base:..", "models:/x@y", "models:/x/" + "9" * 30),
    *(0, 1, -1, 20, 21, 64, 65, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**64), 10**400, 10**4000),
    *(0.0, -0.0, 0.5, 1.5, 5e-324, 1e-45, 1e-38, 1e39, 1.7e308, float("nan"), float("inf"), float("-inf")),
    *([], {}, [[]], [None], [0], [-1], [2**63], ["x"] * 300, [0] * 300),
    *({"": {}}, {"0": 1}, {"-1": 1}, {"9" * 30: 1}),
]


def wire(method: str, target: str, body: bytes = b"", *lines: str) -> bytes:
    """Return a raw HTTP/1.1 request. `lines` are additional header lines."""
    head = [f"{method} {target} HTTP/1.1", "host: localhost", "connection: close", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def post(path: str, body: bytes, *lines: str, media_type: str = "application/json") -> bytes:
    """Return a raw POST request with a content length."""
    return wire("POST", path, body, f"content-type: {media_type}", f"content-length: {len(body)}", *lines)


def oddities() -> Iterator[bytes]:
    """Yield all requests, in the same order on every call."""
    yield from _odd_values()
    yield from _odd_bodies()
    yield from _odd_targets()
    yield from _odd_heads()
    yield from _long_bodies()


def _odd_values() -> Iterator[bytes]:
    for path, body in VALID.items():
        for name in body:
            yield from (post(path, json.dumps({**body, name: value}).encode()) for value in VALUES)


def _odd_bodies() -> Iterator[bytes]:
    for path, body in VALID.items():
        whole = json.dumps(body)
        first = whole.split(":")[0]
        deep = [f"{first}: {nested}}}" for nested in _NESTED]
        duplicate_keys = [f"{first}: 0, {whole[1:]}", f'{whole[:-1]}, "max_tokens": 2, "max_tokens": 1}}']
        texts = (*_TEXTS, *deep, *duplicate_keys, whole[:-1], whole + ",", whole * 2)
        yield from (post(path, text.encode()) for text in texts)
        yield from (
            post(path, text)
            for text in (b"\xff\xfe", b"\xef\xbb\xbf{}", whole.encode("utf-16"), whole.encode("utf-32"))
        )
        yield post(path, whole.replace("a", "\xff").encode("latin-1"))
        yield from (post(path, whole.encode(), media_type=media_type) for media_type in _MEDIA_TYPES)
        yield from (wire("POST", path, chunks, *_CHUNKED_HEAD) for chunks in _CHUNKED_BODIES)


_TEXTS = ["", " ", "null", "[]", "0", '""', "{}", "{", "}", "{'a': 1}", "NaN", "-Infinity", "1e999999"]
_TEXTS += ["9" * 5000, "\x00", "\ufeff{}", " " * 60_000, "[" * 100_000, '{"a":' * 100_000]
_TEXTS += ["[" * 50_000 + "]" * 50_000, '["', "{} // so", '{"a": 1,}', '{"__proto__": {}}']
# Python's json parses deeper nesting than it can serialise: the limit lies within these depths.
_NESTED = ["[" * depth + "]" * depth for depth in range(100, 1000, 60)]
_NESTED += ['{"a":' * depth + "0" + "}" * depth for depth in (400, 900)]
_MEDIA_TYPES = [
    "",
    "/",
    "\xfc",
    "a" * 300,
    "application/json; charset=x",
    "application/json, text/html",
    "application/vnd.x+json",
]
_MEDIA_TYPES += [
    "text/plain",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
]
_CHUNKED_HEAD = ["content-type: application/json", "transfer-encoding: chunked"]
_CHUNKED_BODIES = [
    b"0\r\n\r\n",
    b"2\r\n{}\r\n0\r\n\r\n",
    b"1\r\n{\r\n1\r\n}\r\n0\r\nx: y\r\n\r\n",
    b"zz\r\n{}\r\n",
    b"f" * 40,
]


def _odd_targets() -> Iterator[bytes]:
    for path in [*_PATHS, *VALID]:
        yield from (wire(method, path) for method in _METHODS)


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO", "get"]
_PATHS = "/ // /v1 /v1/ /v1/completions/ /v1//completions /v1/models /v1/models/x".split()
_PATHS += "/health /metrics /metrics/ /docs /openapi.json /-/routes /%00 /%ff /% /%zz * x".split()
_PATHS += "http://x/ http://localhost/health /../etc /%2e%2e/etc".split()
_PATHS += [
    f"/web/{rest}"
    for rest in ("", "%00", ".", "%2e%2e/app.py", "a" * 300, "a/" * 3000, "/etc/passwd", "%ed%a0%80")
]
_PATHS += [
    f"/v1/branches/{rest}"
    for rest in ("", "%00", "%ed%a0%80", "%2f/branches/0", "a" * 5000, LIVE, f"{LIVE}/x/0")
]
_PATHS += [
    f"{_ADD_BRANCH}/{index}"
    for index in ("", "-1", "0", "1", "2", "9" * 20, "9" * 5000, "1.0", "true", "%00", "%ed%a0%80")
]
_PATHS += ["/health?" + "x=%00&" * 900]


def _odd_heads() -> Iterator[bytes]:
    whole = json.dumps(VALID["/v1/completions"]).encode()
    for line in _HEADER_LINES:
        yield post("/v1/completions", whole, line)
        yield from (wire("GET", path, b"", line) for path in ("/health", "/", "/v1/models"))
    yield from (
        post("/v1/completions", whole)[:-9],
        post("/v1/completions", whole) * 2,
        b"POST /v1/branches HTTP/1.1\r\n\r\n",
    )
    yield from (b"GET / HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n", b"GET /health\r\n\r\n")
    yield from (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"\x00" * 99 + b"\r\n\r\n",
        b"\r\n" * 99 + wire("GET", "/health"),
    )


_HEADER_LINES = """no colon
: no name
two words: x
name\x00: x
value: \x00
x-request-id: \t
x-request-id: \xfc\x01
authorization: Basic \xfc
cookie: \x7f=\xff
origin: null
host: x
te: trailers
expect: 100-continue
upgrade: websocket
connection: x-request-id
transfer-encoding: gzip
transfer-encoding: chunked
content-length: -1
content-length: 5
content-length: \xb2
content-type: text/plain
content-encoding: gzip
accept: x/y
accept-encoding: \xff
range: bytes=x
if-none-match: *
if-modified-since: x
x-forwarded-for: \x01""".split("\n")
_HEADER_LINES += [
    "content-length: " + "9" * 40,
    "authorization: Bearer " + "x" * 9000,
    "range: bytes=0-" + ",0-" * 900,
]
_HEADER_LINES += ["x: y\r\n folded", "x:" * 2000, "x: " + "y" * 5000, "x: " + "y" * 20_000]


def _long_bodies() -> Iterator[bytes]:
    """Yield bodies just below the size limit, and one above it."""
    yield post("/tokenize", b" " * (1 << 20 | 1))
    for path, begin, item, end in _FILLED:
        body = (
            begin + item * ((_BODY_BYTES - len(begin) - len(end)) // len(item)) + item[:-1] + end
        ).encode()
        yield post(path, body)
        yield wire("POST", path, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), *_CHUNKED_HEAD)


_BODY_BYTES = 1_000_000
_FILLED = [
    ("/v1/completions", '{"model": "base", "prompt": "', "a ", '"}'),
    ("/v1/completions", '{"model": "base", "prompt": [', '"a",', "]}"),
    ("/v1/completions", '{"model": "base", "prompt": "a", "stop": [', "1,", "]}"),
    ("/v1/chat/completions", '{"model": "base", "messages": [', "{},", "]}"),
    ("/v1/chat/completions", '{"model": "base", "messages": [{"role": "user", "content": [', "{},", "]}]}"),
    ("/v1/branches", '{"model": "base", "branches": [', '{"text": 1},', "]}"),
    ("/detokenize", '{"tokens": [', "-1,", "]}"),
    ("/tokenize", '{"prompt": "', "1", '"}'),
    ("/tokenize", " ", "  ", "{}"),
]
