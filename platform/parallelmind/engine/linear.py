"""The events of answers that fork by themselves, as those of ordinary answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from parallelmind.engine.output import Event, FinishReason


@dataclass(slots=True)
class _Answer:
    """An answer of which a segment is shown while the ones after it wait.

    order: the segments that are not shown to their end, in the order of the text. titles: with which they
    begin. waiting: their events. finish_reason: of the answer, as far as it is shown.
    """

    order: list[int]
    titles: dict[int, str] = field(default_factory=dict)
    waiting: dict[int, list[Event]] = field(default_factory=dict)
    finish_reason: FinishReason = "stop"


class Linearizer:
    """Joins the segments of an answer that forks by itself to one text.

    The text is what the first segment wrote, every branch after its title, and the reduce. A segment is shown
    as it is decoded when everything before it is; until then its events wait. Answers that do not fork pass
    as they are.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[int, int], tuple[int, _Answer]] = {}  # by sample and index of a segment

    def push(self, event: Event) -> Iterator[Event]:
        """The events that can be shown now, with the index of the answer's first segment."""
        key = event.sample, event.branch
        root, answer = self._answers.get(key) or (event.branch, _Answer([event.branch]))
        self._answers[key] = root, answer
        if event.fork is not None:
            below = [*event.fork.branches, event.fork.reduce]
            place = answer.order.index(event.branch) + 1
            answer.order[place:place] = below
            answer.titles |= dict(zip(event.fork.branches, event.fork.titles, strict=True))
            self._answers |= {(event.sample, index): (root, answer) for index in below}
        answer.waiting.setdefault(event.branch, []).append(event)
        while answer.order and (shown := answer.waiting.pop(answer.order[0], None)):
            for each in shown:
                yield self._shown(each, root, answer)
            title = answer.titles.get(answer.order[0]) if answer.order else None
            if title and shown[-1].finish_reason is not None:
                yield Event(root, title, None, sample=event.sample)

    def _shown(self, event: Event, root: int, answer: _Answer) -> Event:
        reason = event.finish_reason
        if reason is None:
            return event._replace(branch=root)
        answer.order.pop(0)
        del self._answers[event.sample, event.branch]
        if reason != "stop" and event.fork is None:
            answer.finish_reason = reason
        is_last = not answer.order
        return event._replace(branch=root, fork=None, finish_reason=answer.finish_reason if is_last else None)


def linearized(events: Iterable[Event]) -> Iterator[Event]:
    """The events with every answer as one text."""
    linearizer = Linearizer()
    for event in events:
        yield from linearizer.push(event)
