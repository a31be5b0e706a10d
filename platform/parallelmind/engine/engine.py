"""The decoding engine: samples come and go at any step, and one forward pass serves all of their branches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.engine.adapters import AdapterManager
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.model_runner import Model, ModelRunner
from parallelmind.engine.output import Event, FinishReason, OutputProcessor
from parallelmind.engine.planner import ScheduledGroup
from parallelmind.engine.request import ResumeState, Sample, Text, TokenizedRequest
from parallelmind.engine.sampler import SampledToken, Sampler, SamplingRow, random_seed
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig, EngineStats, Scheduler
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.sequential_runner import SequentialRunner
from parallelmind.engine.tokenization import eos_token_ids, tokenize, tokenize_request
from parallelmind.engine.validation import check_added_branch, check_request
from parallelmind.errors import UserError, first_line
from parallelmind.model import forward_context
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess
from parallelmind.tree import Ints

GroupBranch = tuple[SequenceGroup, BranchState]

_step_locks: WeakKeyDictionary[PreTrainedModel, FairLock] = WeakKeyDictionary()
_load_locks: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()

# The settings that describe how an unpatched model decodes a single branch.
_UNPATCHED = RopeConfig(patch_rope=False, rope_2d_ratio=0, visibility="isolated", positions="time")


class Engine:
    """Decodes samples with one model and one KV cache. Several engines may share a model.

    One thread calls `step`. `submit`, `join` and `cancel` may be called from any thread at any time. An error
    in one branch ends that branch, and a forward pass that raises ends the samples in it: their last events
    have the finish reason "error". All other samples continue, and nothing that a failed pass computed is
    reused.

    rope_config: rope settings of the model.
    config: limits of the engine.
    fallback_reason: why branches cannot share a sequence on this model; None if they can. Such a model
        decodes each branch isolated, in a row of its own.
    state_lock: guards the state of all samples. Hold it for calls that belong together.
    seconds_in_model: total time of all forward passes.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        num_engines: int = 1,
    ) -> None:
        """config: without it the cache takes half of the free memory, divided by `num_engines`."""
        self.tokenizer = tokenizer
        self.rope_config = rope_config(model) if is_patched(model) else _UNPATCHED
        self.fallback_reason = None if is_patched(model) else assess(causal_lm(model)).reason
        self.runner = SequentialRunner(model) if self.fallback_reason else ModelRunner(model)
        self.config = self.runner.resolve_config(config, num_engines)
        self.scheduler = Scheduler(self.config, reuse_prefixes=not self.fallback_reason)
        self.state_lock = RLock()
        self.adapters = AdapterManager(model, tokenizer, self.state_lock)
        # Held while the model is in use: engines that share a model, in other threads too, take turns.
        self._step_lock = _step_locks.setdefault(causal_lm(model), FairLock())
        self._load_lock = _load_locks.setdefault(causal_lm(model), RLock())
        self._groups: dict[int, SequenceGroup] = {}  # unfinished samples by id
        self._num_submitted = 0
        self._pending_events: list[Event] = []  # that no step has returned yet
        self._sampler = Sampler()
        self._eos_token_ids = eos_token_ids(model, tokenizer)
        self.seconds_in_model = 0.0

    @property
    def model(self) -> Model:
        return self.adapters.model

    def warm_up(self) -> None:
        """Compile the forward pass."""
        with self._step_lock:
            self.runner.warm_up()

    # Adapters

    def load_adapter(
        self, name: str, folder: str | Path, check: Callable[[Model], None] | None = None
    ) -> None:
        """Load an adapter under a name. Samples that run with an earlier adapter of that name keep it.

        Steps continue while its files are read; the model takes it between two steps.
        check: called with the model while the new adapter is active; if it raises, the earlier one stays.
        Raises UserError for a folder that is not an adapter of this base model, or whose rope settings differ
        from the model's.
        """
        with self._load_lock:
            saved = self.adapters.read(name, folder)
            with self._step_lock:
                try:
                    self.adapters.install(name, saved, check)
                finally:
                    self.runner.set_model(self.adapters.model)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter. Samples that run with it keep it. Raises UserError for an unknown name."""
        self.adapters.unload(name)
        with self._step_lock:
            self.adapters.collect()

    # Samples

    @property
    def busy(self) -> bool:
        """Whether a step would compute or return anything."""
        return bool(self._groups or self._pending_events)

    def has_sample(self, sample_id: int) -> bool:
        """Whether a sample is unfinished."""
        return sample_id in self._groups

    def is_finished(self, sample_id: int) -> bool:
        """Whether a sample is finished and `step` has returned all of its events. For the step thread."""
        with self.state_lock:
            pending = any(event.sample == sample_id for event in self._pending_events)
            return not self.has_sample(sample_id) and not pending

    def stats(self) -> EngineStats:
        """Current load."""
        with self.state_lock:
            return self.scheduler.stats()

    def submit(
        self,
        sample: Sample,
        *,
        per_branch: Sequence[dict[str, Any]] | None = None,
        reduce: Text | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> int:
        """Queue a sample; returns its id.

        per_branch: settings of each branch, which override `sampling`.
        reduce: prompt of one more branch, which starts when all others have finished and attends to main and
            all of them.
        adapter: name of a loaded adapter.
        sampling: fields of `SamplingParams`.
        Raises UserError, before anything is computed, for a bad setting, an empty branch, several branches on
        an unpatched model, and a sample that exceeds the model's context or the cache.
        """
        return self.enqueue(tokenize_request(self.tokenizer, sample, per_branch, reduce, sampling), adapter)

    def enqueue(
        self, request: TokenizedRequest, adapter: str | None = None, resume: ResumeState | None = None
    ) -> int:
        """`submit` for a tokenized request.

        resume: progress of the sample on another engine. Branches that joined it late are part of the request
        then. Events that were emitted there are not emitted again. The next tokens are those that the other
        engine would have sampled, if sampling is greedy or seeded.
        """
        check_request(self.model, self.rope_config, request, self.fallback_reason)
        with self.state_lock:
            version = self.adapters.version(adapter)
            group = SequenceGroup(
                request,
                self.rope_config,
                self._make_output,
                id=self._num_submitted,
                adapter_version=version,
                seed=random_seed(),
            )
            self.scheduler.submit(group)
            self.adapters.acquire(version)
            self._groups[group.id] = group
            self._num_submitted += 1
            if resume is not None:
                self._resume(group, resume)
            self._finish_read_only(group)
            return group.id

    def join(self, sample_id: int, text: Text, **sampling: Any) -> int:
        """Add a branch to an unfinished sample; returns the index of the branch.

        sampling: fields of `SamplingParams`.
        Raises UserError if the sample is finished, and if the branch can never fit. A branch that does not
        fit now waits.
        """
        token_ids, params = tokenize(self.tokenizer, text, first=False), SamplingParams.of(sampling)
        with self.state_lock:
            group = self._group(sample_id)
            check_added_branch(self.model, self.rope_config, group, token_ids, params, self.fallback_reason)
            branch = self.scheduler.add_branch(group, token_ids, params)
            self._finish_read_only(group)
            return branch.index

    def start_pos2d(self, sample_id: int) -> list[tuple[int, int]]:
        """Branch and time coordinates of the first token of every branch. Raises UserError if finished."""
        with self.state_lock:
            group = self._group(sample_id)
            return [group.pos2d(branch) for branch in group.branches]

    def cancel(self, sample_id: int, branch: int | None = None) -> None:
        """Cancel a sample, or one of its branches, before the next step. Does nothing if it is finished."""
        with self.state_lock:
            if not self.has_sample(sample_id):
                return
            group = self._groups[sample_id]
            cancelled = [
                running for running in group.running_branches if branch is None or running.index == branch
            ]
            self._pending_events += [
                Event(running.index, "", None, "cancelled", sample=sample_id) for running in cancelled
            ]
            if branch is None:
                self._abort(group, "cancelled")
            else:
                for running in cancelled:
                    self._finish_branch(group, running, "cancelled")

    # Steps

    def step(self) -> list[Event]:
        """Compute the next tokens of all running samples: one forward pass for each adapter in use.

        Returns the events of these tokens, and those that no earlier step has returned. Raises what a forward
        pass raises, once the others are computed; the next step or `take_events` returns the events then.
        """
        with self._step_lock:
            passes = self._prepare()
            failure = None
            for index, (scheduled, inputs) in enumerate(passes):
                try:
                    self._compute(scheduled, inputs)
                except Exception as error:
                    self._fail([item.group for item in scheduled], error)
                    failure = failure or error
                except BaseException as error:  # Ctrl-C: the remaining passes are not computed
                    self._fail([item.group for left, _ in passes[index:] for item in left], error)
                    raise
            self.adapters.collect()
            if failure is not None:
                raise failure
            return self.take_events()

    def take_events(self) -> list[Event]:
        """Events that no step has returned: of cancelled branches, and of a step that raised."""
        with self.state_lock:
            events, self._pending_events = self._pending_events, []
            return events

    def _prepare(self) -> list[tuple[list[ScheduledGroup], Any]]:
        """Plan a step; returns its forward passes, and the inputs of each."""
        with self.state_lock:
            plan = self.scheduler.schedule()
            try:
                for group in plan.preempted:
                    self.runner.forget(group)
                self.scheduler.begin(plan)
                passes = self._split(plan.scheduled)
                return [(scheduled, self.runner.prepare_inputs(scheduled)) for scheduled in passes]
            except BaseException as error:
                self._fail(plan.groups, error)
                raise

    def _compute(self, scheduled: Sequence[ScheduledGroup], inputs: Any) -> None:
        """One forward pass and its events.

        Through a dense mask a NaN of one sample reaches all others: each is computed alone then.
        """
        logits = self._run(scheduled, inputs)
        branches = _sampled_branches(scheduled)
        tokens = self.sample(logits, [_sampling_row(group, branch) for group, branch in branches])
        with self.state_lock:
            # A branch that was cancelled during the forward pass emits nothing more.
            sampled = [item for item in zip(branches, tokens, strict=True) if item[0][1].is_running]
            not_finite = [group for (group, _), token in sampled if token.token is None]
            if len(scheduled) == 1 or not not_finite:
                for group in not_finite:
                    self.scheduler.mark_not_finite(group)
                self.scheduler.commit(scheduled)
                for branch, token in sampled:
                    self._pending_events.append(self._emit(*branch, token))
                return
        parts = inputs.split([len(item.tokens.ids) for item in scheduled])
        for item, part in zip(scheduled, parts, strict=True):
            self._compute([item], part)

    def _fail(self, groups: Sequence[SequenceGroup], error: BaseException) -> None:
        """End the samples of a forward pass that raised. Their blocks hold nothing that was computed."""
        reason = f"the forward pass failed ({type(error).__name__}: {first_line(error)})"
        with self.state_lock:
            for group in [group for group in dict.fromkeys(groups) if group.is_running]:
                failed = [branch.index for branch in group.running_branches]
                failed += [len(group.branches)] if group.reduce else []
                self._pending_events += [
                    Event(index, "", None, "error", sample=group.id, error=reason) for index in failed
                ]
                self._abort(group, "error")

    def _split(self, scheduled: Sequence[ScheduledGroup]) -> list[list[ScheduledGroup]]:
        """Divide a step into forward passes: one for each adapter, or for each sample."""
        passes: dict[Any, list[ScheduledGroup]] = defaultdict(list)
        for item in scheduled:
            sample_id = item.group.id if self.runner.one_sample_per_forward else None
            passes[item.group.adapter_version, sample_id].append(item)
        return list(passes.values())

    def _run(self, scheduled: Sequence[ScheduledGroup], inputs: Any) -> Tensor:
        """`[sampled, vocab]` logits of one forward pass."""
        start = perf_counter()
        with self.adapters.active(scheduled[0].group.adapter_version), forward_context.restored():
            logits = self.runner(inputs)
        self.seconds_in_model += perf_counter() - start
        return logits

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """The next token of every row of `[rows, vocab]` logits."""
        return self._sampler(logits, rows) if rows else []

    def _emit(self, group: SequenceGroup, branch: BranchState, sampled: SampledToken) -> Event:
        """Append a sampled token to its branch; returns its event."""
        if sampled.token is None:
            return self._emit_error(group, branch, "the model's logits are not finite (NaN or infinity)")
        pos2d = group.pos2d(branch, branch.num_tokens)
        try:
            text, finish_reason = branch.append_token(sampled.token)
        except Exception as error:  # of the tokenizer, whose code this is not
            reason = f"token {sampled.token} cannot be decoded ({type(error).__name__}: {first_line(error)})"
            return self._emit_error(group, branch, reason)
        if finish_reason is not None:
            self._finish_branch(group, branch, finish_reason)
        return Event(
            branch.index, text, sampled.token, finish_reason, sampled.logprob, sampled.top, group.id, pos2d
        )

    def _emit_error(self, group: SequenceGroup, branch: BranchState, reason: str) -> Event:
        self._finish_branch(group, branch, "error")
        return Event(branch.index, "", None, "error", sample=group.id, error=reason)

    # State

    def _make_output(self, prompt: Sequence[int], params: SamplingParams) -> OutputProcessor:
        return OutputProcessor(self.tokenizer, prompt, params, self._eos_token_ids)

    def _group(self, sample_id: int) -> SequenceGroup:
        if not self.has_sample(sample_id):
            raise UserError(f"sample {sample_id}: unknown or finished; submit another one")
        return self._groups[sample_id]

    def _resume(self, group: SequenceGroup, resume: ResumeState) -> None:
        """Bring a new sample to the progress that it had on another engine."""
        num_started = len(resume.start_times)
        started = list(group.branches)
        group.set_start_times(resume.start_times)
        for branch in started:
            finished = resume.finish_reasons[branch.index] is not None
            branch.append_tokens(resume.token_ids[branch.index], finished)
        for branch in started:
            reason = resume.finish_reasons[branch.index]
            if reason is not None:  # the last branch that finishes starts the reduce branch
                self._finish_branch(group, branch, reason)
        for branch in group.branches[num_started:]:
            if branch.index < len(resume.token_ids):
                branch.append_tokens(resume.token_ids[branch.index])

    def _finish_read_only(self, group: SequenceGroup) -> None:
        """Finish the branches that decode nothing; siblings and the reduce branch read them."""
        for branch in group.running_branches:
            if not branch.params.max_new_tokens:
                self._pending_events.append(Event(branch.index, "", None, "length", sample=group.id))
                self._finish_branch(group, branch, "length")

    def _finish_branch(self, group: SequenceGroup, branch: BranchState, reason: FinishReason) -> None:
        self.scheduler.finish_branch(group, branch, reason)
        self._free(group, [branch])

    def _abort(self, group: SequenceGroup, reason: FinishReason) -> None:
        running = group.running_branches
        self.scheduler.abort(group, reason)
        self._free(group, running)

    def _free(self, group: SequenceGroup, finished: Sequence[BranchState]) -> None:
        """Free what finished branches hold outside of the scheduler."""
        for branch in finished:
            self.runner.free(group, branch)
        if not group.is_running:
            del self._groups[group.id]
            self.adapters.release(group.adapter_version)


def _sampled_branches(scheduled: Sequence[ScheduledGroup]) -> list[GroupBranch]:
    """The branches that the rows of logits continue."""
    return [
        (item.group, branch)
        for item in scheduled
        for branch in map(item.group.branches.__getitem__, item.tokens.sampled_branches.tolist())
    ]


def _sampling_row(group: SequenceGroup, branch: BranchState) -> SamplingRow:
    num_generated = branch.num_tokens - branch.num_prompt
    history: Sequence[int] | Ints = branch.token_ids
    if branch.params.repetition_penalty != 1:
        history = np.concatenate([group.main, branch.token_ids])
    return SamplingRow(branch.params, branch.seed, branch.index, num_generated, history)
