"""The output items of /v1/responses, and the events that stream them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serving.protocol.openai_response import Json


class MessageOutput:
    """A message with one text.

    index: of the item in the output. name: of the response; ids of items follow from it, so that a stream
    which is sent again has the same ones.
    """

    def __init__(self, index: int, name: str) -> None:
        self._index, self._id = index, f"msg-{name}"
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def opening(self) -> Iterator[Json]:
        """The events before the text."""
        item = {**self.item("in_progress"), "content": []}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        yield {"type": "response.content_part.added", **self._place(), "part": self._part()}

    def append(self, text: str, logprobs: Sequence[Json]) -> Json:
        """The event of new text."""
        self._texts.append(text)
        self._logprobs += logprobs
        place = self._place()
        return {"type": "response.output_text.delta", **place, "delta": text, "logprobs": [*logprobs]}

    def closing(self, status: str) -> Iterator[Json]:
        """The events after the text."""
        part = self._part()
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.output_text.done", **self._place(), **text}
        yield {"type": "response.content_part.done", **self._place(), "part": part}
        yield {
            "type": "response.output_item.done",
            "output_index": self._index,
            "item": self.item(status),
        }

    def item(self, status: str) -> Json:
        """The message as it is now."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> Json:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _place(self) -> Json:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}


class CallOutput:
    """A call of a tool.

    index, name: as in `MessageOutput`. function: the tool. arguments: a JSON object as text.
    """

    def __init__(self, index: int, name: str, function: str, arguments: str) -> None:
        self._index, self._id, self._call_id = index, f"fc-{name}-{index}", f"call-{name}-{index}"
        self._function, self._arguments = function, arguments

    def events(self) -> Iterator[Json]:
        """A call is streamed once it is complete."""
        place, item = {"item_id": self._id, "output_index": self._index}, self.item()
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": begun}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": self._arguments}
        done = {"name": self._function, "arguments": self._arguments}
        yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def item(self, status: str = "completed") -> Json:
        """The call. status: of the response; a call is whole even if the answer was cut after it."""
        return {
            "id": self._id,
            "type": "function_call",
            "status": "completed",
            "call_id": self._call_id,
            "name": self._function,
            "arguments": self._arguments,
        }
