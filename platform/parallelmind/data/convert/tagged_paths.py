"""Answers with tagged parallel paths, as Multiverse and ThreadWeaver write them, as trees.

A block is <Parallel>, an outline of its paths, the paths (each in <Path> or <Thread>), an optional
<Conclusion> and </Parallel>. Blocks follow one another, and a path may hold blocks of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from parallelmind.data.convert.source_records import ParallelRecord
from parallelmind.data.records import MAX_DEPTH, RecordError

_MAX_FORKS = MAX_DEPTH - 1  # the answer itself is a branch

_PATHS = ("Path", "Thread")  # of Multiverse and of ThreadWeaver
_TAG = re.compile(r"<(?P<close>/?)(?P<name>Parallel|Goal|Outlines|Conclusion|Path|Thread)>")
_NUMBER = re.compile(r"\s*\d+(?:\.\d+)*(?::|\.(?=\s))")  # "1:", "1.2:" or "1. " after the tag of a path
_JOINED = "joined"  # stands for an open <Parallel> whose paths have ended


def has_block(text: str) -> bool:
    """Whether a text holds the tag that opens a block of parallel paths."""
    return "<Parallel>" in text


def tree_of_answer(prompt: str, answer: str) -> ParallelRecord | None:
    """A segment with `prompt` whose completion is the answer up to its first paths, which are its branches.

    The texts of all segments in order give the answer again. The prompt of a path is its tag with its number;
    that of the segment that reads the paths is the tag after them. None: the answer has no block. Raises
    RecordError for tags that are not nested as they should be.
    """
    segment = _Parser(answer, list(_TAG.finditer(answer))).segment(0, 0, [])
    return {**segment, "prompt": prompt} if "branches" in segment else None


@dataclass
class _Parser:
    """Reads the tags of a text in order. index: of the next tag. depth: of the segment that is read."""

    text: str
    tags: list[re.Match[str]]
    index: int = 0
    depth: int = 0

    def segment(self, start: int, completion: int, elements: list[str]) -> ParallelRecord:
        """The segment from `start` to the end of its path, or of the text, with what it forks into.

        completion: where the completion starts. elements: names of the open elements, the innermost one last.
        """
        while self.index < len(self.tags):
            tag = self.tags[self.index]
            if _opens_path(tag):
                return self._fork(start, completion, elements)
            self._step(elements)
            if tag["name"] in _PATHS:
                return self._segment_text(start, completion, tag.end())
        if elements:
            raise RecordError(f"has a <{_tag_name(elements[-1])}> that is not closed")
        return self._segment_text(start, completion, len(self.text))

    def _step(self, elements: list[str]) -> None:
        """Move past the next tag, which opens an element or closes the innermost one."""
        tag = self.tags[self.index]
        self.index += 1
        if not tag["close"]:
            elements.append(tag["name"])
        elif not elements or _tag_name(elements[-1]) != tag["name"]:
            inside = f"in <{_tag_name(elements[-1])}>" if elements else "that closes nothing"
            raise _misplaced(tag, inside)
        elif elements.pop() == "Parallel":
            raise _misplaced(tag, "of a block without <Path> or <Thread>")

    def _fork(self, start: int, completion: int, elements: list[str]) -> ParallelRecord:
        """The segment that ends before the path that the next tag opens, with its branches and its reduce."""
        tag = self.tags[self.index]
        *outer, innermost = elements or [""]
        if innermost != "Parallel":
            where = {"": "outside of <Parallel>", _JOINED: "after the paths of its <Parallel> have ended"}
            raise _misplaced(tag, where.get(innermost, f"in <{innermost}>, which is not closed"))
        end = len(self.text[: tag.start()].rstrip())
        segment, branches = self._segment_text(start, completion, end), []
        self._enter()
        while _opens_path(tag):
            branches.append(self._branch(end))
            end = self.tags[self.index - 1].end()
            tag = self._tag_after_path(end)
        elements = [*outer, _JOINED]
        self._step(elements)
        reduce = self.segment(end, tag.end(), elements)
        self.depth -= 1
        return {**segment, "branches": branches, "reduce": reduce}

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > _MAX_FORKS:
            raise RecordError(f"has more than {_MAX_FORKS} <Parallel> blocks in or after one another")

    def _branch(self, start: int) -> ParallelRecord:
        """The branch of the path that the next tag opens."""
        tag = self.tags[self.index]
        self.index += 1
        number = _NUMBER.match(self.text, tag.end())
        return self.segment(start, (number or tag).end(), [tag["name"]])

    def _tag_after_path(self, end: int) -> re.Match[str]:
        """The next tag, which opens another path, opens the conclusion, or closes the block."""
        if self.index == len(self.tags):
            raise RecordError("has a <Parallel> that is not closed")
        tag = self.tags[self.index]
        if not _opens_path(tag) and tag[0] not in ("<Conclusion>", "</Parallel>"):
            raise _misplaced(tag, "after a path, where another path, <Conclusion> or </Parallel> is expected")
        if self.text[end : tag.start()].strip():
            raise _misplaced(tag, "after a path and a text that belongs to no path")
        return tag

    def _segment_text(self, start: int, completion: int, end: int) -> dict[str, Any]:
        """A text without a completion is given as such: its first token is no target."""
        if completion == end:
            return {"text": self.text[start:end]}
        return {"prompt": self.text[start:completion], "completion": self.text[completion:end]}


def _opens_path(tag: re.Match[str]) -> bool:
    return tag["name"] in _PATHS and not tag["close"]


def _tag_name(element: str) -> str:
    return "Parallel" if element == _JOINED else element


def _misplaced(tag: re.Match[str], where: str) -> RecordError:
    return RecordError(f"has {tag[0]} {where}, at character {tag.start():,} of the answer")
