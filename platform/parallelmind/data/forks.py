"""Records for a model that forks by itself: the text of a segment ends with the fork into its branches.

Main is given by a request, and so are its branches. Any other segment that is a target writes its fork: the
titles between markers. A title is the prompt of a branch. The reduce begins with a marker, which is all that
a decoding engine can give it, so its own prompt is a part of what it writes.
"""

from __future__ import annotations

from dataclasses import replace

from parallelmind.data.records import Record, RecordError, Segment
from parallelmind.fork_markers import ForkMarkers


def write_forks(record: Record, markers: ForkMarkers) -> Record:
    """The record in which every segment that is a target, and is followed by branches, writes its fork.

    A fork without a reduce gets an empty one. Raises RecordError for a fork that cannot be written.
    """
    if record.is_flat:
        return record
    return replace(
        record,
        branches=_all(record.branches, "", markers),
        reduce=None if record.reduce is None else _segment(record.reduce, "reduce", markers),
    )


def _all(branches: tuple[Segment, ...], prefix: str, markers: ForkMarkers) -> tuple[Segment, ...]:
    places = (f"{prefix}branches[{index}]" for index in range(len(branches)))
    return tuple(_segment(branch, place, markers) for branch, place in zip(branches, places, strict=True))


def _segment(segment: Segment, place: str, markers: ForkMarkers) -> Segment:
    """place: such as `branches[0].reduce`, for errors."""
    if not segment.branches:
        return segment
    branches, reduce = _all(segment.branches, f"{place}.", markers), segment.reduce
    if reduce is not None:
        reduce = _segment(reduce, f"{place}.reduce", markers)
    if segment.completion is None and not segment.targets:  # a request gives it, and its branches
        return replace(segment, branches=branches, reduce=reduce)
    if segment.completion is None:
        raise RecordError(f"{place} has no completion, which fork_markers need; give prompt and completion")
    if markers.are_in(segment.completion):
        raise RecordError(f"{place}.completion holds one of fork_markers; choose other markers")
    titles = [_title(branch, f"{place}.branches[{index}]", markers) for index, branch in enumerate(branches)]
    return replace(
        segment,
        completion=segment.completion + markers.write(titles),
        branches=branches,
        reduce=_joined(reduce, f"{place}.reduce", markers),
        writes_fork=True,
    )


def _title(branch: Segment, place: str, markers: ForkMarkers) -> str:
    if branch.completion is None or not isinstance(branch.body, str) or not branch.body.strip():
        raise RecordError(f"{place} has no prompt, which fork_markers need as its title; give one")
    if markers.are_in(branch.body):
        raise RecordError(f"{place}.prompt holds one of fork_markers; choose other markers")
    return branch.body


def _joined(reduce: Segment | None, place: str, markers: ForkMarkers) -> Segment:
    if reduce is None:
        return Segment(markers.join, completion="")
    if reduce.completion is None or not isinstance(reduce.body, str):
        raise RecordError(f"{place} has no completion, which fork_markers need; give prompt and completion")
    return replace(reduce, body=markers.join, completion=reduce.body + reduce.completion)
