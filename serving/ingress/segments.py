"""Segments of requests as those of the library, with token ids as their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import parallelmind as pm
from parallelmind.data.records import MAX_DEPTH
from parallelmind.engine.sampling_params import SamplingParams
from serving.protocol.branches import Branch, BranchesRequest, BranchSettings, ForkRequest, Segment

# Token ids of the text of a field; True for the one that opens the sample.
Encode = Callable[[str, str | list[int], bool], list[int]]


def sample_of(
    request: BranchesRequest,
    main: list[int],
    prompts: Sequence[list[int]],
    settings: Sequence[Mapping[str, Any]],
    encode: Encode,
) -> pm.Sample:
    """prompts, settings: those of the branches of main.

    Raises UserError for an empty text, and for a reduce alone.
    """
    branches = [
        pm.Segment(prompt, *_below(f"branches[{index}].", branch, encode), sampling=sampling)
        for index, (branch, prompt, sampling) in enumerate(
            zip(request.branches, prompts, settings, strict=True)
        )
    ]
    reduce = None if request.reduce is None else _segment("reduce.", request.reduce, encode)
    return pm.Sample(main, branches, reduce, request.documents)


def segment_of(request: Segment, encode: Encode) -> pm.Segment:
    """A segment for a running sample. Raises UserError as `sample_of` does."""
    return _segment("", request, encode)


def branches_of(request: ForkRequest, encode: Encode) -> list[pm.Segment]:
    """Branches for a running sample. Raises UserError as `sample_of` does."""
    return _branches("", request, encode)


def with_params(segment: pm.Segment, params: Iterator[SamplingParams]) -> pm.Segment:
    """The segment, and all below it, with these settings. params: those of the segments in pre-order."""
    own = next(params)
    sampling = {field.name: getattr(own, field.name) for field in fields(own)}
    branches = [with_params(branch, params) for branch in segment.branches]  # type: ignore[arg-type]
    reduce = None if segment.reduce is None else with_params(segment.reduce, params)  # type: ignore[arg-type]
    return pm.Segment(segment.text, branches, reduce, sampling)


def _segment(path: str, request: Segment, encode: Encode) -> pm.Segment:
    """path: of the segment, with a dot at its end. Raises UserError for one that is nested too deeply."""
    if path.count(".") > MAX_DEPTH:
        raise pm.UserError(f"branches: are nested more than {MAX_DEPTH} deep; nest fewer of them")
    text = encode(f"{path}text", request.text, False)
    return pm.Segment(text, *_below(path, request, encode), sampling=own_settings(path, request))


def own_settings(path: str, request: BranchSettings) -> dict[str, Any]:
    """The settings that a segment has itself. Raises UserError, with the path, for a wrong grammar."""
    try:
        return request.given_sampling_fields()
    except pm.UserError as error:
        raise pm.UserError(f"{path}{error}") from error


def _below(
    path: str, request: Branch | Segment, encode: Encode
) -> tuple[list[pm.Segment], pm.Segment | None]:
    """Branches and reduce of a segment."""
    branches = _branches(path, request, encode)
    if request.reduce is None:
        return branches, None
    if not branches:
        raise pm.UserError(f"{path}reduce: has no branches to read; give branches, or no reduce")
    return branches, _segment(f"{path}reduce.", request.reduce, encode)


def _branches(path: str, request: Branch | ForkRequest | Segment, encode: Encode) -> list[pm.Segment]:
    return [
        _segment(f"{path}branches[{index}].", branch, encode) for index, branch in enumerate(request.branches)
    ]
