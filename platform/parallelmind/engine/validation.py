"""Check a request against the model before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from parallelmind.data.records import MAX_DEPTH
from parallelmind.engine.model_runner import Model
from parallelmind.engine.output import FinishReason
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.errors import UserError
from parallelmind.model.patch_state import is_patched
from parallelmind.tree import MAIN


def check_group(model: Model, group: SequenceGroup, fallback_reason: str | None) -> None:
    """Raise UserError for unsupported branches, and for more tokens than the context holds.

    fallback_reason: why the model's branches cannot share a sequence; None if they can.
    """
    tree, branches = group.tree, group.branches
    if tree.depth > MAX_DEPTH:
        raise UserError(f"branches: are nested {tree.depth} deep, {MAX_DEPTH} allowed; nest fewer of them")
    if len(branches) > 1 and group.branch_number is None:
        _check_patched(model, f"{len(branches)} given", fallback_reason)
    if fallback_reason and not tree.is_flat:
        raise UserError(
            f"branches: the model {fallback_reason}, so a branch has no branches and no reduce; "
            "give main and branches alone"
        )
    ends = group.latest_ends()
    positions, last = group.max_positions(ends), branches[int(ends[1:].argmax())]
    _check_context(model, positions, last)
    limit = group.frequency_limit
    if limit is not None and positions > limit and not group.has_long_frequencies:
        raise UserError(
            f"max_new_tokens={last.max_tokens - last.num_prompt}: {positions} positions; above "
            f"{limit} the model has other rotary frequencies, which a sample cannot change to, and which an "
            "accelerator and an unpatched model cannot use; submit all branches at once, or shorten them"
        )


def check_join(group: SequenceGroup, parent: int) -> None:
    """Raise UserError if a segment cannot have one more branch. parent: its number."""
    reduce = group.reduce_of(parent)
    if reduce is not None and (reduce.has_started or reduce.is_finished):
        raise UserError("branches: the reduce branch has started; submit another sample")
    if not group.has_open_branches(parent) and group.segments[parent].is_finished:
        raise UserError(f"branch={parent - 1}: has ended; join one that runs, or whose branches do")


def check_fork(group: SequenceGroup, number: int) -> BranchState:
    """The branch with this number. Raises UserError for main, and for a branch that does not run."""
    if number == MAIN:
        raise UserError("branch=None: main does not decode; join a branch to it")
    branch = group.branches[number - 1]
    if not branch.is_running:
        state = "has ended" if branch.is_finished else "has not started"
        raise UserError(f"branch={branch.index}: {state}; fork a branch that runs")
    return branch


def check_reduce(group: SequenceGroup, parent: int) -> None:
    """Raise UserError if a segment cannot have a reduce. parent: its number."""
    place = "main" if parent == MAIN else f"branch={parent - 1}"
    if group.reduce_of(parent) is not None:
        raise UserError(f"{place}: has a reduce; give the reduce branches and a reduce of its own")
    if not group.children(parent):
        raise UserError(f"{place}: has no branches to reduce; fork it first")
    if not group.has_open_branches(parent):
        raise UserError(f"{place}: its branches have ended; give the reduce while one of them runs")


def check_token_ids(model: Model, token_ids: Sequence[int], params: Sequence[SamplingParams]) -> None:
    """Raise UserError for a token id outside the model's vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    biased = [token for branch_params in params for token, _ in branch_params.logit_bias]
    for field, ids in (("token id", token_ids), ("logit_bias", biased)):
        unknown = [token for token in ids if not 0 <= token < size]
        if unknown:
            raise UserError(
                f"{field} {unknown[0]}: the model's vocabulary is 0..{size - 1}; "
                "encode with the model's own tokenizer"
            )


def check_resume(request: TokenizedRequest, state: ResumeState) -> None:
    """Raise UserError unless the progress can be that of this request on another engine."""
    for name in ("start_times", "token_ids", "finish_reasons"):
        if (given := len(getattr(state, name))) != request.num_branches:
            raise UserError(
                f"resume.{name}: has {given} entries for {request.num_branches} segments after main; "
                "give one for each"
            )
    length_of_main = int(request.tokens.lengths[MAIN])
    segments = zip(state.start_times, state.token_ids, state.finish_reasons, request.params, strict=True)
    for index, (start, tokens, reason, params) in enumerate(segments):
        problem = None
        if start is None and tokens:
            problem = f"has {len(tokens)} tokens and no start; give its start time"
        elif start is not None and start < length_of_main:
            problem = f"starts at {start}, within main; give {length_of_main} or later"
        elif len(tokens) > params.max_new_tokens:
            problem = f"has {len(tokens)} tokens of max_new_tokens={params.max_new_tokens}; raise it"
        elif reason not in (None, *get_args(FinishReason)):
            problem = f"has finish_reason={reason}; give None or one of {', '.join(get_args(FinishReason))}"
        if problem:
            raise UserError(f"resume: branches[{index}] {problem}")


def _check_patched(model: Model, given: str, fallback_reason: str | None) -> None:
    if fallback_reason is None and not is_patched(model):
        raise UserError(f"branches: {given}, but the model is not patched; load it with load_model_with_lora")


def _check_context(model: Model, positions: int, last: BranchState) -> None:
    """Raise UserError for a sample that exceeds the model's positions.

    positions: upper bound of those of the sample. last: the segment that ends last.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1  # -1: none
    num_new = last.max_tokens - last.num_prompt
    if 0 <= limit < positions:
        raise UserError(
            f"max_new_tokens={num_new}: {last.num_prompt} prompt tokens and {num_new} new ones, after "
            f"{positions - last.max_tokens} others, exceed the model's {limit} positions; "
            "shorten the sample or lower max_new_tokens"
        )
