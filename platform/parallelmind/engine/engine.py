"""The decoding engine: samples come and go at any step, and one forward pass serves all of their branches.

`submit`, `join` and `cancel` may be called from any thread while another one calls `step`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.engine.adapters import AdapterManager
from parallelmind.engine.model_runner import Model, ModelRunner, Part
from parallelmind.engine.output import Event, FinishReason, OutputProcessor
from parallelmind.engine.request import ResumeState, Sample, Text, TokenizedRequest
from parallelmind.engine.sampler import SampledToken, SamplingRow, fresh_seed, sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig, EngineStats, Scheduler
from parallelmind.engine.sequence_group import Reduction
from parallelmind.engine.sequential_runner import SequentialRunner
from parallelmind.engine.speech import Speech
from parallelmind.engine.tokenization import eos_token_ids, tokenize, tokenize_request
from parallelmind.engine.validation import check_joining, check_sample
from parallelmind.errors import UserError
from parallelmind.model.patch import is_patched, rope_config
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess

# What an unpatched model does anyway, where there is one branch.
_PLAIN = RopeConfig(patch_rope=False, rope_2d_ratio=0, visibility="isolated", positions="time")


class Engine:
    """One model, its pool of keys and values, and the samples that share them."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        limits: EngineConfig | None = None,
        engines: int = 1,
    ) -> None:
        """limits: without any the pool is as large as memory allows, of which so many engines have a part
        each.
        """
        self.tokenizer = tokenizer
        self.adapters = AdapterManager(model, tokenizer)
        self.rope_config = rope_config(model) if is_patched(model) else _PLAIN
        # Why branches cannot share a sequence here, if so; an unpatched model could, but has not been taught
        # how.
        self.fallback_reason = None if is_patched(model) else assess(causal_lm(model)).reason
        self.runner = SequentialRunner(model) if self.fallback_reason else ModelRunner(model)
        self.config = self.runner.limited(limits, self.rope_config, engines)
        self.scheduler = Scheduler(self.config, shares=not self.fallback_reason)
        self.state_lock, self.step_lock = (
            RLock(),
            RLock(),
        )  # of the samples (hold it for calls that belong together), and of the model
        self._samples: dict[int, Speech] = {}  # by number
        self._ends = eos_token_ids(model, tokenizer)
        self.seconds_in_model = 0.0
        self._said: list[Event] = []  # of branches that have ended outside of a step

    @property
    def model(self) -> Model:
        return self.adapters.model

    def load_adapter(
        self, name: str, folder: str | Path, check: Callable[[Model], None] | None = None
    ) -> None:
        """Let samples ask for an adapter by this name; those that have begun with an older one of the name
        end with it.

        check: looks at the model with the adapter at work; what it raises leaves the older one in place.
        Raises UserError for a folder that is no adapter of this base, or whose rope settings are not the
        model's.
        """
        with self.step_lock, self.state_lock:
            try:
                self.adapters.load(name, folder, check)
            finally:
                self.runner.use(self.adapters.model)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; samples that have begun with it end with it. Raises UserError for an unknown
        one.
        """
        with self.step_lock, self.state_lock:
            self.adapters.unload(name)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self._samples or self._said)

    def has_sample(self, number: int) -> bool:
        """Whether a sample is still going on."""
        return number in self._samples

    def is_finished(self, number: int) -> bool:
        """Whether a sample has ended, and steps have told all of it. For the thread that calls `step`."""
        with self.state_lock:
            return not self.has_sample(number) and all(event.sample != number for event in self._said)

    def stats(self) -> EngineStats:
        """What the engine is busy with at this moment."""
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
        """Queue a sample; returns its number.

        sampling: fields of `SamplingParams`; per_branch: other values of them for each branch. reduce: the
        prompt of one more branch, which follows when all others have ended and reads main and all of them.
        adapter: a name that one was loaded by. Raises UserError, before any computing, for a bad setting, an
        empty branch, several branches on an unpatched model, and what the model's context or the engine's
        cache cannot hold.
        """
        return self.enqueue(tokenize_request(self.tokenizer, sample, per_branch, reduce, sampling), adapter)

    def enqueue(
        self, asked: TokenizedRequest, adapter: str | None = None, progress: ResumeState | None = None
    ) -> int:
        """`submit` for what has been put in tokens already.

        progress: how far another engine had come with it. Branches that joined it late stand among the others
        then, and what has been told is not told again; tokens are those that the other engine would have
        drawn, where they are greedy or seeded.
        """
        check_sample(self.model, self.rope_config, asked, self.fallback_reason)
        with self.state_lock:
            number = self._queue(asked, self.adapters.version(adapter))
            if progress is not None:
                self._go_on(self._samples[number], progress)
            return number

    def _go_on(self, sample: Speech, progress: ResumeState) -> None:
        begun = len(progress.start_times)
        sample.entry.decoding.starts[:] = progress.start_times
        for branch in range(begun):
            sample.has_said(branch, progress.token_ids[branch])
        for branch, reason in enumerate(progress.finish_reasons[:begun]):
            if reason is not None:
                self._end(sample, branch, reason)  # the last one makes way for the branch that reads them all
        for branch in range(begun, len(progress.token_ids)):
            sample.has_said(branch, progress.token_ids[branch])

    def _queue(self, asked: TokenizedRequest, version: str) -> int:
        tokens, params, last = asked.tokens, asked.params, asked.reduce
        reduction = None if last is None else Reduction(last.token_ids, last.params.max_new_tokens)
        most = [each.max_new_tokens for each in params]
        entry = self.scheduler.submit(tokens, self.rope_config, most, version, reduction)
        found = Speech(entry, fresh_seed(), last)
        for prompt, each in zip(tokens.split()[1:], params, strict=True):
            self._begin(found, prompt, each)
        self._samples[entry.number] = found
        self.adapters.hold(version)
        return entry.number

    def join(self, number: int, text: Text, **sampling: Any) -> int:
        """Add a branch to a sample that is going on; returns the branch's number.

        Raises UserError if the sample has ended or the branch does not fit, Overloaded if it does not fit
        now.
        """
        ids, params = tokenize(self.tokenizer, text, first=False), SamplingParams.of(sampling)
        with self.state_lock:
            found = self._of(number)
            check_joining(self.model, self.rope_config, found.entry, ids, params, self.fallback_reason)
            branch = self.scheduler.join(found.entry, ids, params.max_new_tokens)
            self._begin(found, ids, params)
            return branch

    def start_pos2d(self, number: int) -> list[tuple[int, int]]:
        """The branch and time coordinates of the first token of every branch. Raises UserError if the sample
        has ended.
        """
        with self.state_lock:
            return self._of(number).places()

    def cancel(self, number: int, branch: int | None = None) -> None:
        """End a sample, or one of its branches, before the next step; what has ended already is left as it
        is.
        """
        with self.state_lock:
            if not self.has_sample(number):
                return
            found = self._samples[number]
            live = found.live
            told = live if branch is None else [each for each in live if each == branch]
            self._said += map(found.cancelled, told)
            if branch is None:
                self.scheduler.drop(found.entry)
                self._forget(found, live)
            elif told:
                self._end(found, branch, "cancelled")

    def step(self) -> list[Event]:
        """One forward pass for every live branch (one for each adapter in use); returns what has been
        said.
        """
        with self.step_lock:
            with self.state_lock:
                events, self._said = self._said, []
                groups: dict[Any, list[Part]] = defaultdict(list)
                for entry, feed in self.scheduler.schedule():
                    groups[entry.version, entry.number if self.runner.alone else None].append((entry, feed))
                entered: list[Any] = [self.runner.enter(parts) for parts in groups.values()]
            for ((version, _), parts), step in zip(groups.items(), entered, strict=True):
                began = perf_counter()
                with self.adapters.active(version):
                    logits = self.runner(step)
                self.seconds_in_model += perf_counter() - began
                with self.state_lock:
                    events += self._accept(parts, logits)
            with self.state_lock:
                self.adapters.tidy()
            return events

    def _accept(self, parts: Sequence[Part], logits: Tensor) -> list[Event]:
        """Draw and enter the next tokens. A branch that was cancelled during the forward pass says nothing
        more.
        """
        asked = [
            (self._samples.get(entry.number), branch)
            for entry, feed in parts
            for branch in feed.sampled.tolist()
        ]
        for entry, _ in parts:
            if entry.number in self._samples:
                self.scheduler.computed(entry)
        live = [
            (sample, branch)
            for sample, branch in asked
            if sample is not None and sample.entry.decoding.live[branch]
        ]
        if len(live) < len(asked):
            logits = logits[[row for row, pair in enumerate(asked) if pair in live]]
        choices = self.sample(logits, [sample.row(branch) for sample, branch in live]) if live else []
        return [
            self._say(sample, branch, choice) for (sample, branch), choice in zip(live, choices, strict=True)
        ]

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """The next token of every row."""
        return sample(logits, rows)

    def _say(self, sample: Speech, branch: int, choice: SampledToken) -> Event:
        event = sample.say(branch, choice)
        if event.finish_reason:
            self._end(sample, branch, event.finish_reason)
        return event

    def _begin(self, sample: Speech, prompt: list[int], params: SamplingParams) -> None:
        sample.add(params, OutputProcessor(self.tokenizer, prompt, params, self._ends))

    def _end(self, sample: Speech, branch: int, reason: FinishReason) -> None:
        follows = self.scheduler.finish(sample.entry, branch, reason)
        if follows is not None and sample.reducing is not None:
            self._begin(sample, sample.reducing.token_ids, sample.reducing.params)
        self._forget(sample, [branch])

    def _forget(self, sample: Speech, branches: Sequence[int]) -> None:
        for branch in branches:
            self.runner.forget(sample.entry, branch)
        if sample.entry.decoding.done:
            del self._samples[sample.entry.number]
            self.adapters.release(sample.entry.version)

    def _of(self, number: int) -> Speech:
        if not self.has_sample(number):
            raise UserError(f"sample {number}: has ended or never was; begin another one")
        return self._samples[number]
