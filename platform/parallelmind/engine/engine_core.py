"""The steps of the engine: what a plan schedules is computed and sampled, and each sample gets its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from parallelmind.engine.adapters import AdapterManager
from parallelmind.engine.document_cache import DocumentCache
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.grammar_compiler import GrammarCompiler
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.look_ahead import LookAhead
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.output import TokenLogprob
from parallelmind.engine.sampler import PendingTokens, SampledToken, SamplingRow, prompt_logprobs
from parallelmind.engine.scheduler import Scheduler
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.sequential_runner import SequentialRunner
from parallelmind.engine.step_plan import ForwardPlan, SampledBranches, ScheduledGroup
from parallelmind.engine.unfinished_samples import UnfinishedSamples
from parallelmind.errors import first_line
from parallelmind.model import forward_context


class _Pass(NamedTuple):
    """A forward pass of a step. inputs: those of the runner. logits: if they were computed ahead."""

    forward: ForwardPlan
    inputs: Any = None
    logits: Tensor | None = None


class Sampling(Protocol):
    """What chooses the next tokens."""

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        """Whether `sample` needs nothing but the most likely token of every row."""

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        """The next token of every row of `[rows, vocab]` logits, or of these tokens themselves.

        masks: of the rows that have a grammar.
        """


class EngineCore:
    """Computes the steps of an engine, one after another. `step` is for one thread.

    seconds_in_model: total time of all forward passes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner | SequentialRunner,
        adapters: AdapterManager,
        samples: UnfinishedSamples,
        grammars: GrammarCompiler,
        documents: DocumentCache | None,
        state_lock: FairLock,
    ) -> None:
        """samples: those of the scheduler, under the state lock. documents: None if they are not moved."""
        self._scheduler, self._runner, self._adapters = scheduler, runner, adapters
        self._samples, self._grammars, self._documents = samples, grammars, documents
        self._state_lock = state_lock
        self._ahead: LookAhead | None = None  # the step that follows the last one
        self.seconds_in_model = 0.0

    def step(self, sampling: Sampling) -> Exception | None:
        """One forward pass for each adapter in use; returns what the first of them that failed raised.

        The samples get their events. Those of a pass that raised end, the other passes are computed.
        """
        passes, failure = self._prepare(), None
        for index, item in enumerate(passes):
            try:
                self._compute(item, sampling, may_look_ahead=len(passes) == 1)
            except Exception as error:
                self._fail(item.forward.groups, error)
                failure = failure or error
            except BaseException as error:  # Ctrl-C: the remaining passes are not computed
                self._fail([group for left in passes[index:] for group in left.forward.groups], error)
                raise
        if self._documents is not None:
            self._documents.write_noted()
        return failure

    def _prepare(self) -> list[_Pass]:
        """Plan a step; returns its forward passes."""
        if self._documents is not None and self._documents.restore():
            self._ahead = None  # its blocks may be taken
        with self._state_lock:
            ahead, self._ahead = self._ahead, None
            plan = self._scheduler.schedule(self._state_lock.give_way, ahead.step if ahead else None)
            try:
                for group in plan.stuck:
                    self._samples.abort(
                        group, "error", "the cache has no room for the sample; raise cache_tokens"
                    )
                for group in plan.preempted:
                    self._runner.forget(group)
                self._scheduler.begin(plan)
                return self._passes(plan.forward, ahead)
            except BaseException as error:
                self._fail(plan.groups, error)
                raise

    def _passes(self, forward: ForwardPlan, ahead: LookAhead | None) -> list[_Pass]:
        """The forward passes of a plan that has begun. What was computed ahead is a pass of its own."""
        decoding, passes = forward.decoding, list[_Pass]()
        logits = ahead.logits_of(decoding) if ahead and decoding else None
        if logits is not None:
            passes = [_Pass(ForwardPlan(decoding, []), logits=logits)]
            forward = ForwardPlan(None, forward.scheduled)
        return passes + [_Pass(part, self._prepare_inputs(part)) for part in self._split(forward)]

    def _prepare_inputs(self, forward: ForwardPlan) -> Any:
        return self._runner.prepare_inputs(forward, self._scheduler.tables)

    def _compute(self, item: _Pass, sampling: Sampling, may_look_ahead: bool = False) -> None:
        """One forward pass and its events.

        Through a dense mask a NaN of one sample reaches all others: each is computed alone then.
        """
        forward, inputs, logits = item
        sampled = forward.sampled()
        masks = self._grammars.begin_masks([row.matcher for row in sampled.rows])
        if logits is None:
            greedy = masks is None and not forward.scores_prompts and sampling.takes_most_likely(sampled.rows)
            logits = self._run(forward, inputs, greedy=greedy)
        num_sampled = len(sampled.rows)
        pending = sampling.sample(logits[:num_sampled], sampled.rows, masks.result() if masks else None)
        if may_look_ahead and self._runner.computes_ahead:
            self._look_ahead(forward, pending.ids)
        tokens = pending.read()
        labels = _prompt_labels(forward.scheduled)
        scores = _score_prompts(logits[num_sampled:], labels) if labels else []
        filled = self._scheduler.filled(forward)
        with self._state_lock:
            not_finite = _not_finite(sampled, tokens)
            if not not_finite or len(forward.groups) == 1:
                for group in not_finite:
                    self._distrust(group)
                    self._ahead = None
                self._scheduler.commit(forward, filled)
                for (branch, position), score in zip(labels, scores, strict=True):
                    branch.prompt_logprobs[position] = score
                if self._documents is not None:
                    self._documents.note_computed(sampled.groups)
                self._samples.emit_all(sampled, tokens, self._state_lock.give_way)
                return
            self._ahead = None  # it read what is computed again
            inputs = self._prepare_inputs(forward) if inputs is None else inputs
        each = forward.each()
        parts = inputs.split([len(scheduled.tokens.ids) for scheduled in each])
        for scheduled, part in zip(each, parts, strict=True):
            self._compute(_Pass(ForwardPlan(None, [scheduled]), part), sampling)

    def _look_ahead(self, forward: ForwardPlan, token_ids: Tensor) -> None:
        """Begin the next step, if it is known what it computes: the tokens that are being sampled."""
        if forward.decoding is None or forward.scheduled:
            return
        with self._state_lock:
            step = self._scheduler.look_ahead(forward.decoding)
            if step is None:
                return
            following = ForwardPlan(step, [])
            inputs = self._prepare_inputs(following)
            step.unstage(self._scheduler.tables)
        self._ahead = LookAhead(step, self._run(following, inputs, token_ids))

    def _distrust(self, group: SequenceGroup) -> None:
        """Share no blocks of a sample with logits that are not finite; if it read others, compute it anew."""
        if not group.has_adopted:
            self._scheduler.mark_not_finite(group)
            return
        self._runner.forget(group)
        self._scheduler.recompute(group)

    def _fail(self, groups: Sequence[SequenceGroup], error: BaseException) -> None:
        """End the samples of a forward pass that raised. Their blocks hold nothing that was computed."""
        reason = f"the forward pass failed ({type(error).__name__}: {first_line(error)})"
        with self._state_lock:
            for group in [group for group in dict.fromkeys(groups) if group.is_running]:
                self._samples.abort(group, "error", reason)

    def _split(self, forward: ForwardPlan) -> list[ForwardPlan]:
        """Divide a step into forward passes: one for each adapter, or for each sample."""
        alone, together = self._runner.one_sample_per_forward, self._runner.batches_adapters
        passes: dict[Any, list[ScheduledGroup]] = defaultdict(list)
        if not alone and (together or len({group.adapter_version for group in forward.groups}) == 1):
            return [forward] if forward.groups else []
        for item in forward.each():
            passes[item.group.adapter_version, item.group.id if alone else None].append(item)
        return [ForwardPlan(None, items) for items in passes.values()]

    def _run(
        self, forward: ForwardPlan, inputs: Any, token_ids: Tensor | None = None, greedy: bool = False
    ) -> Tensor:
        """`[sampled, vocab]` logits of one forward pass. token_ids: in place of those of the inputs.

        greedy: as in `ModelRunner`.
        """
        start = perf_counter()
        version = forward.groups[0].adapter_version
        active = nullcontext() if self._runner.batches_adapters else self._adapters.active(version)
        with active, forward_context.restored(), forward_context.for_length(_text_length(forward)):
            logits = self._runner(inputs, token_ids, greedy)
        self.seconds_in_model += perf_counter() - start
        return logits


def _text_length(forward: ForwardPlan) -> int | None:
    """The length that sets the rotary frequencies of a pass over one sample; None: that of its tokens."""
    group = forward.groups[0]
    return group.frequency_limit + 1 if group.frequency_limit and group.has_long_frequencies else None


def _not_finite(sampled: SampledBranches, tokens: Sequence[SampledToken]) -> list[SequenceGroup]:
    """Samples with a running branch that no token could be sampled for."""
    missing = [number for number, token in enumerate(tokens) if token.token is None]
    running = [number for number in missing if sampled.branches[number].is_running]
    return list(dict.fromkeys(sampled.groups[number] for number in running))


def _prompt_labels(scheduled: Sequence[ScheduledGroup]) -> list[tuple[BranchState, int]]:
    """The prompt tokens that the rows of logits after the sampled ones belong to: branches and indices."""
    return [
        (item.group.branches[branch], position)
        for item in scheduled
        for branch, position in zip(
            item.tokens.labels.branches.tolist(), item.tokens.labels.positions.tolist(), strict=True
        )
    ]


def _score_prompts(logits: Tensor, labels: Sequence[tuple[BranchState, int]]) -> list[TokenLogprob]:
    token_ids = [branch.prompt[position] for branch, position in labels]
    return prompt_logprobs(logits, token_ids, [branch.params.prompt_logprobs for branch, _ in labels])
