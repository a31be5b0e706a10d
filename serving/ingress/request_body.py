"""The body of a request, which FastAPI has read and parsed."""

from __future__ import annotations

from fastapi import Request


async def body_bytes(request: Request) -> int:
    """Length of the body. The headers may not state it."""
    return len(await request.body())
