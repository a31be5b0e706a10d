"""Generated text of one sample, and the outcome of one input line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import parallelmind as pm
from parallelmind.engine.output import FinishReason
from parallelmind.engine.record_prompt import RecordPrompt
from workloads.common.empty_answers import is_empty
from workloads.generate.lines import InputLine


@dataclass(slots=True)
class GeneratedSample:
    """What is continued, and the text so far of each segment after main, in pre-order."""

    prompt: RecordPrompt
    texts: list[str]
    finish_reasons: list[FinishReason | None]

    @classmethod
    def empty(cls, prompt: RecordPrompt) -> Self:
        """State before the first event."""
        return cls(prompt, [""] * prompt.num_outputs, [None] * prompt.num_outputs)

    def append(self, event: pm.Event) -> None:
        """Add the text and the finish reason of one decoding event."""
        self.texts[event.branch] += event.text
        self.finish_reasons[event.branch] = event.finish_reason

    @property
    def is_finished(self) -> bool:
        return all(self.finish_reasons)

    @property
    def empty_segments(self) -> list[int]:
        """Indices of the segments that the model ended without any text."""
        ends = zip(self.texts, self.finish_reasons, strict=True)
        return [index for index, end in enumerate(ends) if is_empty(*end)]

    def to_row(self) -> dict[str, Any]:
        """One JSON object of the output."""
        return {
            **self.prompt.to_row(),
            "outputs": self.texts,
            "finish_reasons": self.finish_reasons,
        }


@dataclass(slots=True)
class LineResult:
    """Outcome of an input line: the generated sample, or the reason why the line is skipped."""

    line: InputLine
    generated: GeneratedSample | None = None
    skip_reason: str = ""

    def append(self, event: pm.Event) -> None:
        """Add one decoding event of the sample. An error in one of its branches skips the line."""
        assert self.generated is not None, f"{self.line.location} has no sample"
        self.generated.append(event)
        if event.error is not None:
            self.skip_reason = f"branches[{event.branch}]: {event.error}"

    @property
    def is_finished(self) -> bool:
        return self.generated is None or self.generated.is_finished

    @property
    def num_empty(self) -> int:
        """Outputs that the model ended without any text."""
        return len(self.generated.empty_segments) if self.generated is not None else 0

    def to_row(self) -> dict[str, Any]:
        """One JSON object of the output. Only valid for a line that was not skipped."""
        assert self.generated is not None, f"{self.line.location} was skipped and has no row"
        return {"line": self.line.number, **self.generated.to_row()}
