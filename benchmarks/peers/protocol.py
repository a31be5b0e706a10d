"""What drivers read and write: a JSON line with requests, a JSON line with seconds and tokens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts that share a main, decoded greedily and past end-of-text tokens.

    at: seconds from the start of the measurement until the request arrives.
    adapter: name of the LoRA adapter, for drivers that have some.
    documents: texts after main, which the only prompt reads.
    """

    prompts: list[list[int]]
    new_tokens: int
    main: list[int]
    at: float = 0.0
    adapter: str | None = None
    documents: list[list[int]] = field(default_factory=list)

    @property
    def texts(self) -> list[list[int]]:
        """Main, documents and prompt of every text, for engines that do not know what they are."""
        return [[*self.main, *chain.from_iterable(self.documents), *prompt] for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a driver measured.

    seconds: from the start of the measurement to the last token.
    tokens: the new tokens of every prompt, in the order of the requests.
    """

    seconds: float
    tokens: list[list[int]]


Decode = Callable[[list[Request]], list[list[int]]]


def encode(requests: Sequence[Request]) -> str:
    """The line that asks for the requests."""
    return json.dumps([asdict(request) for request in requests])


def serve(load: Callable[[], Decode]) -> None:
    """Answer every line of stdin until it ends. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    decode = load()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        requests = [Request(**fields) for fields in json.loads(line)]
        start = time.perf_counter()
        tokens = decode(requests)
        print(json.dumps(asdict(Answer(time.perf_counter() - start, tokens))), file=answers, flush=True)


def run_arrivals(
    requests: Sequence[Request],
    submit: Callable[[Request], object],
    step: Callable[[], object],
    is_busy: Callable[[], bool],
) -> None:
    """Submit each request when it arrives, and step until all have finished."""
    waiting, start = deque(sorted(requests, key=lambda request: request.at)), time.perf_counter()
    while waiting or is_busy():
        while waiting and waiting[0].at <= time.perf_counter() - start:
            submit(waiting.popleft())
        if is_busy():
            step()
        else:
            time.sleep(0.001)
