"""The scheme computed token by token, and segment by segment: the slow reference for the vectorised code.

A segment is a dict: `tokens`, and optionally `offset` (the index of its first target; without one, none is a
target), `branches` and `reduce`. The root may have `documents`: how many of its first branches are documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallelmind.config import RopeConfig
from parallelmind.layout import IGNORE

Segment = dict[str, Any]


def flat(main: list[int], branches: list[list[int]], offsets: list[int]) -> Segment:
    """Main and branches as a segment."""
    parts = [{"tokens": branch, "offset": offset} for branch, offset in zip(branches, offsets, strict=True)]
    return {"tokens": main, "branches": parts}


def walk(segment: Segment) -> Iterator[Segment]:
    """The segment and all below it, in pre-order."""
    yield segment
    for branch in segment.get("branches", []):
        yield from walk(branch)
    if "reduce" in segment:
        yield from walk(segment["reduce"])


def reference_sample(
    main: list[int], branches: list[list[int]], offsets: list[int], config: RopeConfig
) -> dict[str, list]:
    """`reference_tree` of main and branches."""
    return reference_tree(flat(main, branches, offsets), config)


def reference_tree(root: Segment, config: RopeConfig) -> dict[str, list]:
    """Columns of one sample in physical order, and its visibility as nested lists of bool.

    Gives every segment its `number`, `coordinate`, `start`, `path` and `joined`.
    """
    for number, segment in enumerate(walk(root)):
        segment["number"] = number
    root["coordinate"] = 0
    documents = root.get("documents", 0)
    _place(root, 0, [], [], config, first=documents + (0 if root["tokens"] else 1))
    rows = [row for segment in walk(root) for row in _rows(segment)]
    if not (config.visibility == "isolated" and config.positions == "time"):
        rows = sorted(rows, key=lambda row: (row["time"], row["sequence"]))
    for flat, row in enumerate(rows):
        row["position"] = row["time"] if config.positions == "time" else flat
    segments = list(walk(root))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["visible"] = [[_sees(i, j, segments, config) for j in rows] for i in rows]
    return columns


def _place(
    segment: Segment, start: int, path: list[int], joined: list[int], config: RopeConfig, first: int
) -> int:
    """Place a segment and all below it; returns the latest end of them. path, joined: what it continues."""
    segment["start"], segment["path"], segment["joined"] = start, [*path, segment["number"]], joined
    end = latest = start + len(segment["tokens"])
    branches = segment.get("branches", [])[segment.get("documents", 0) :]
    for document in segment.get("branches", [])[: segment.get("documents", 0)]:
        document["coordinate"] = 0
        latest = _place(document, latest, [], [], config, first)
    longest = max((len(branch["tokens"]) for branch in branches if "branches" not in branch), default=0)
    for branch in branches:
        is_shifted = config.align_to == "right" and "branches" not in branch
        shift = longest - len(branch["tokens"]) if is_shifted else 0
        branch["coordinate"] = (branch["number"] - first) * config.branch_stride
        latest = max(latest, _place(branch, end + shift, segment["path"], joined, config, first))
    if "reduce" in segment:
        below = [inner["number"] for branch in segment["branches"] for inner in walk(branch)]
        segment["reduce"]["coordinate"] = segment["coordinate"]
        latest = _place(segment["reduce"], latest, segment["path"], [*joined, *below], config, first)
    return latest


def _rows(segment: Segment) -> Iterator[dict[str, int]]:
    text = segment["tokens"]
    for k, token in enumerate(text):
        is_target = "offset" in segment and k + 1 < len(text) and k + 1 >= segment["offset"]
        yield {
            "id": token,
            "sequence": segment["number"],
            "branch": segment["coordinate"],
            "time": segment["start"] + k,
            "label": text[k + 1] if is_target else IGNORE,
        }


def _sees(query: dict[str, int], key: dict[str, int], segments: list[Segment], config: RopeConfig) -> bool:
    if query is key:
        return True
    if key["time"] >= query["time"]:
        return False
    if config.visibility == "columnar":
        return True
    reader = segments[query["sequence"]]
    return key["sequence"] in reader["path"] or key["sequence"] in reader["joined"]
