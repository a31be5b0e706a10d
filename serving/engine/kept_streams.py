"""Histories of streams, kept for clients that lose their connection, or their ingress, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from serving.engine.messages import EngineRequest, PackedStep, StreamHistory, num_items

_KEEP_S = 60.0  # after a stream has ended
_MAX_ITEMS = 200_000  # of all streams


@dataclass(eq=False, slots=True)
class _KeptStream:
    """expires: when it is dropped; None while the stream is open."""

    request: EngineRequest
    steps: list[PackedStep] = field(default_factory=list)
    num_items: int = 0
    expires: float | None = None

    def add(self, step: PackedStep) -> None:
        self.steps.append(step)
        self.num_items += num_items(step)


class KeptStreams:
    """The streams of one engine, by the id of the request.

    If all of them together are too long, those that ended first are dropped, and of open ones the oldest.
    """

    def __init__(self) -> None:
        self._streams: dict[str, _KeptStream] = {}
        self._num_items = 0  # of all streams

    @contextmanager
    def keep(self, request: EngineRequest) -> Iterator[Callable[[PackedStep], None]]:
        """Context of a stream, with a function that adds a step. Requests without a history are not kept."""
        if request.history is None:
            yield lambda step: None
            return
        stream = _KeptStream(request.history.request)
        if request.id in self._streams:
            self._remove(request.id)
        self._streams[request.id] = stream

        def add(step: PackedStep) -> None:
            if any(step) and stream.expires is None:
                stream.add(step)
                self._num_items += num_items(step)
                if self._num_items > _MAX_ITEMS:
                    self._drop()

        for step in request.history.steps:
            add(step)

        try:
            yield add
        finally:
            _end(stream)
            self._drop()

    def end(self, id: str) -> StreamHistory | None:
        """The history of a stream, to which nothing is added any more; None if it is not kept."""
        self._drop()
        stream = self._streams.get(id)
        if stream is None:
            return None
        _end(stream)
        return StreamHistory(stream.request, tuple(stream.steps))

    def _drop(self) -> None:
        now = monotonic()
        first_ended = sorted(
            self._streams.items(), key=lambda item: (item[1].expires is None, item[1].expires or 0)
        )
        for id, stream in first_ended:
            if self._num_items > _MAX_ITEMS or (stream.expires is not None and stream.expires <= now):
                self._remove(id)

    def _remove(self, id: str) -> None:
        """Remove a stream, to which nothing is added any more."""
        stream = self._streams.pop(id)
        _end(stream)
        self._num_items -= stream.num_items
        stream.steps.clear()


def _end(stream: _KeptStream) -> None:
    if stream.expires is None:
        stream.expires = monotonic() + _KEEP_S
