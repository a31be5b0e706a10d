"""The unfinished samples of an engine: how they grow and end, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from parallelmind.engine.adapters import AdapterManager
from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.output import Event, FinishReason
from parallelmind.engine.request import AddedSegments, TokenizedRequest
from parallelmind.engine.sampler import SampledToken
from parallelmind.engine.scheduler import Scheduler
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.sequential_runner import SequentialRunner
from parallelmind.engine.step_plan import SampledBranches
from parallelmind.engine.tokenization import fork_request
from parallelmind.engine.validation import check_group, check_token_ids
from parallelmind.errors import UserError, first_line

_EVENTS_AT_ONCE = 8  # before waiting calls get in


class UnfinishedSamples:
    """Call it with the engine's state lock held, but for `check`.

    groups: by id. events: those that no step has returned yet. num_submitted: the next id.
    on_fork: called with a sample's number and the segments of a fork that its model wrote.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: Scheduler,
        runner: ModelRunner | SequentialRunner,
        adapters: AdapterManager,
        fallback_reason: str | None,
    ) -> None:
        """fallback_reason: why branches cannot share a sequence on this model; None if they can."""
        self._tokenizer, self._scheduler, self._runner = tokenizer, scheduler, runner
        self._adapters, self._fallback_reason = adapters, fallback_reason
        self.groups: dict[int, SequenceGroup] = {}
        self.events: list[Event] = []
        self.on_fork: Callable[[int, AddedSegments], None] = lambda sample_id, added: None
        self.num_submitted = 0

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self.groups

    def __getitem__(self, sample_id: int) -> SequenceGroup:
        """Raises UserError for one that is unknown or finished."""
        if sample_id not in self.groups:
            raise UserError(f"sample {sample_id}: unknown or finished; submit another one")
        return self.groups[sample_id]

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def check(self, group: SequenceGroup) -> None:
        """Raise UserError if the model or the cache cannot hold a sample."""
        check_group(self._adapters.model, group, self._fallback_reason)
        self._scheduler.check_size(group)

    def submit(self, group: SequenceGroup) -> None:
        """Number and queue a new sample."""
        group.id = self.num_submitted
        self._scheduler.submit(group)
        self.groups[group.id] = group
        self.num_submitted += 1
        if group.is_running:
            self.start_ready(group)
        else:  # it has finished on another engine
            self.abort(group, "cancelled")

    def add(
        self, group: SequenceGroup, request: TokenizedRequest, parent: int, as_reduce: bool = False
    ) -> int:
        """Add the segments of a request below a segment; returns the index of the first one.

        Raises UserError, and adds none, if they do not fit.
        """
        check_token_ids(self._adapters.model, request.tokens.ids.tolist(), request.params)
        first = len(group.segments)
        try:
            group.add(request, parent, as_reduce)
            self.check(group)
        except UserError:
            group.remove_from(first)
            raise
        return first - 1

    def start_ready(self, group: SequenceGroup) -> None:
        """Start the segments that can start, and finish those that decode nothing: others read them."""
        group.start_ready()
        while read_only := [branch for branch in group.running_branches if not branch.params.max_new_tokens]:
            for branch in read_only:
                self._finish_one(group, branch, "length", Event(branch.index, "", None, "length"))
            group.start_ready()

    def emit_all(
        self, sampled: SampledBranches, tokens: Sequence[SampledToken], give_way: Callable[[], object]
    ) -> None:
        """The events of sampled tokens. Calls of other threads get in between.

        A branch that is cancelled before its turn emits nothing more.
        """
        rows = zip(sampled.groups, sampled.branches, sampled.pos2d, tokens, strict=True)
        for number, (group, branch, pos2d, token) in enumerate(rows):
            if number % _EVENTS_AT_ONCE == 0:
                give_way()
            if group.is_admitted and branch.is_running:
                self._emit(group, branch, pos2d, token)

    def _emit(
        self, group: SequenceGroup, branch: BranchState, pos2d: tuple[int, int], sampled: SampledToken
    ) -> None:
        """Append a sampled token to its branch, and its event to those of the step.

        pos2d: coordinates of the token.
        """
        token, logprob, top = sampled
        prompt = () if branch.params.prompt_logprobs is None else branch.pop_prompt_logprobs()
        if token is None or (prompt and any(label.logprob != label.logprob for label in prompt)):
            reason = "the model's logits are not finite (NaN or infinity)"
            self.finish_subtree(group, branch, "error", reason)
            return
        matcher = branch.output.matcher
        if matcher is not None and matcher.error is not None:
            self.finish_subtree(group, branch, "error", matcher.error)
            return
        try:
            text, finish_reason = branch.append_token(token)
        except Exception as error:  # of the tokenizer, whose code this is not
            reason = f"token {token} cannot be decoded ({type(error).__name__}: {first_line(error)})"
            self.finish_subtree(group, branch, "error", reason)
            return
        fork = None
        if branch.output.titles:
            fork = self._fork_itself(group, branch)
            rest, finish_reason = (
                branch.output.refuse_fork() if fork is None else (branch.output.accept_fork(), "forked")
            )
            text += rest
        event = Event(
            branch.index, text, token, finish_reason, logprob, top, group.id, pos2d, prompt=prompt, fork=fork
        )
        self.events.append(event)
        if finish_reason is not None:
            self.finish_branch(group, branch, finish_reason)

    def _fork_itself(self, group: SequenceGroup, branch: BranchState) -> Fork | None:
        """Add the branches of the fork that a branch has just written, and their reduce.

        None, and nothing changes, for a fork that does not fit. Segments that follow the branch are those of
        the fork if another engine has added them.
        """
        syntax, titles = self._adapters.fork_syntax(group.adapter_version), branch.output.titles
        assert syntax is not None, "only a model with markers writes a fork"
        request = fork_request(self._tokenizer, titles, syntax.join_ids, branch)
        below = group.children(branch.number)
        if request is None or (below and [each.prompt for each in below] != request.tokens.split()[1:]):
            return None
        if not below:
            group.finish(branch, "forked")  # its own end decides what fits after it
            try:
                first = self.add(group, request, branch.number)
            except UserError:
                return None
            finally:
                group.finish(branch, None)
            below = group.branches[first:]
            self.on_fork(group.id, AddedSegments(request, branch.number))
        *branches, reduce = (each.index for each in below)
        return Fork(titles, tuple(branches), reduce)

    def finish_branch(self, group: SequenceGroup, branch: BranchState, reason: FinishReason) -> None:
        """Finish a segment whose last event is out, and start what waits for its end."""
        self._finish_one(group, branch, reason)
        self.start_ready(group)

    def finish_subtree(
        self, group: SequenceGroup, branch: BranchState, reason: FinishReason, error: str | None = None
    ) -> None:
        """Finish a segment and all below it that has not finished, with an event for each."""
        for each in (branch, *group.below(branch.number)):
            if not each.is_finished:
                self._finish_one(group, each, reason, Event(each.index, "", None, reason, error=error))
        self.start_ready(group)

    def _finish_one(
        self, group: SequenceGroup, branch: BranchState, reason: FinishReason, event: Event | None = None
    ) -> None:
        if event is not None:
            start = start_pos2d(group, branch)
            self.events.append(event._replace(sample=group.id, pos2d=start))
        self._scheduler.finish_branch(group, branch, reason)
        self._free(group, [branch])

    def abort(self, group: SequenceGroup, reason: FinishReason, error: str | None = None) -> None:
        """Finish all segments of a sample that have not finished, with an event for each."""
        unfinished = [branch for branch in group.branches if not branch.is_finished]
        self.events += [
            Event(
                branch.index,
                "",
                None,
                reason,
                sample=group.id,
                pos2d=start_pos2d(group, branch),
                error=error,
            )
            for branch in unfinished
        ]
        self._scheduler.abort(group, reason)
        self._free(group, unfinished)

    def _free(self, group: SequenceGroup, finished: Sequence[BranchState]) -> None:
        """Free what finished branches hold outside of the scheduler."""
        for branch in finished:
            self._runner.free(group, branch)
        if not group.is_running:
            del self.groups[group.id]
            self._adapters.release(group.adapter_version)


def start_pos2d(group: SequenceGroup, branch: BranchState) -> tuple[int, int] | None:
    """Coordinates of a segment's first token; None if it has not started."""
    return group.pos2d(branch) if branch.has_started else None
