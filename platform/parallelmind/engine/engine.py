"""The decoding engine: samples come and go at any step, and one forward pass serves all of their branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.engine.adapters import BASE, AdapterManager
from parallelmind.engine.detokenizer import TokenDecoder
from parallelmind.engine.document_cache import DocumentCache
from parallelmind.engine.document_files import MAX_DOCUMENT_BYTES, DocumentFiles
from parallelmind.engine.engine_core import EngineCore
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.fork_parser import ForkParser, ForkSyntax
from parallelmind.engine.grammar_compiler import GrammarCompiler
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.model_runner import Model, ModelRunner
from parallelmind.engine.output import Event, OutputProcessor
from parallelmind.engine.request import ResumeState, Sample, Segment, Text, TokenizedRequest
from parallelmind.engine.sampler import PendingTokens, Sampler, SamplingRow, random_seed
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig, EngineStats, Scheduler
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.sequential_runner import SequentialRunner
from parallelmind.engine.tokenization import eos_token_ids, tokenize_branches, tokenize_request
from parallelmind.engine.unfinished_samples import UnfinishedSamples, start_pos2d
from parallelmind.engine.validation import (
    check_fork,
    check_join,
    check_reduce,
    check_resume,
    check_token_ids,
)
from parallelmind.errors import UserError
from parallelmind.layout import is_free_order
from parallelmind.model.adapter_copy import shared_copy
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess
from parallelmind.progress import waiting
from parallelmind.tree import MAIN

_step_locks: WeakKeyDictionary[PreTrainedModel, FairLock] = WeakKeyDictionary()
_load_locks: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()

# The settings that describe how an unpatched model decodes a single branch.
_UNPATCHED = RopeConfig(patch_rope=False, rope_2d_ratio=0, visibility="isolated", positions="time")


class Engine:
    """Decodes samples with one model and one KV cache. Several engines may share a model.

    One thread calls `step`. `submit`, `join` and `cancel` may be called from any thread at any time. An error
    in one branch ends that branch, and a forward pass that raises ends the samples in it: their last events
    have the finish reason "error". All other samples continue, and nothing that a failed pass computed is
    reused. The weights of the model must not change any more; a model that has changed needs a new engine.

    rope_config: rope settings of the model.
    config: limits of the engine.
    fallback_reason: why branches cannot share a sequence on this model; None if they can. Such a model
        decodes each branch isolated, in a row of its own.
    state_lock: guards the state of all samples. Hold it for calls that belong together.
    samples: those that have not finished, under this lock.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        num_engines: int = 1,
        document_cache: str | Path | None = None,
        document_cache_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        """config: without it the cache takes half of the free memory, divided by `num_engines`.

        document_cache: folder that keeps the keys and values of documents, up to `document_cache_bytes`.
        Raises UserError for a folder that cannot be written to, and for a model whose documents depend on
        more than their path.
        """
        self.tokenizer = tokenizer
        self.rope_config = rope_config(model) if is_patched(model) else _UNPATCHED
        self.fallback_reason = None if is_patched(model) else assess(causal_lm(model)).reason
        self.runner = SequentialRunner(model) if self.fallback_reason else ModelRunner(model)
        self.config = self.runner.resolve_config(config, num_engines)
        self.scheduler = Scheduler(self.config, reuse_prefixes=not self.fallback_reason)
        self.state_lock = FairLock()
        self.adapters = AdapterManager(model, tokenizer, self.state_lock)
        # Held while the model is in use: engines that share a model, in other threads too, take turns.
        self._step_lock = _step_locks.setdefault(causal_lm(model), FairLock())
        self._load_lock = _load_locks.setdefault(causal_lm(model), RLock())
        self.samples = UnfinishedSamples(
            tokenizer, self.scheduler, self.runner, self.adapters, self.fallback_reason
        )
        self._documents = self._make_document_cache(document_cache, document_cache_bytes)
        self._eos_token_ids = eos_token_ids(model, tokenizer)
        embeddings: Any = model.get_input_embeddings()
        self._grammars = GrammarCompiler(tokenizer, len(embeddings.weight), self._eos_token_ids)
        self._decoder, self._sampler = TokenDecoder(tokenizer), Sampler()
        self._core = EngineCore(
            self.scheduler,
            self.runner,
            self.adapters,
            self.samples,
            self._grammars,
            self._documents,
            self.state_lock,
        )

    @property
    def model(self) -> Model:
        return self.adapters.model

    @property
    def seconds_in_model(self) -> float:
        """Total time of all forward passes."""
        return self._core.seconds_in_model

    def _make_document_cache(self, folder: str | Path | None, max_bytes: int) -> DocumentCache | None:
        """None for a model whose documents depend on more than their path."""
        if not (isinstance(self.runner, ModelRunner) and is_free_order(self.rope_config)):
            if folder is not None:
                reason = self.fallback_reason or "needs visibility=isolated and positions=time"
                raise UserError(f"document_cache={folder}: the model {reason}; leave document_cache out")
            return None
        if folder is None:
            return DocumentCache(None, self.scheduler, self.runner, self.state_lock, str)
        files = DocumentFiles(folder, max_bytes)
        self.adapters.fingerprint(BASE)  # reads all weights, before the first sample waits for it
        return DocumentCache(files, self.scheduler, self.runner, self.state_lock, self.adapters.fingerprint)

    def flush_documents(self) -> None:
        """Wait until the document cache is written."""
        if self._documents is not None:
            self._documents.flush()

    def warm_up(self, always: bool = True) -> bool:
        """Compile the forward pass, which takes some 20 s or more; returns whether it is compiled.

        On a CPU this needs a C++ compiler. On a GPU the kernels of attention are compiled. Later starts take
        the code from torch's cache folder. always: also for a small model on a CPU, which gains little.
        """
        with self._step_lock, waiting("packing the weights and compiling the forward pass"):
            return self.runner.warm_up(always, self.scheduler.tables)

    # Adapters

    def load_adapter(
        self, name: str, folder: str | Path, check: Callable[[Model], None] | None = None
    ) -> None:
        """Load an adapter under a name. Samples that run with an earlier adapter of that name keep it.

        Steps continue while it is read and checked on a copy of the model, which shares the model's weights;
        the model takes it between two steps.
        check: called with that copy; if it raises, the earlier adapter stays.
        Raises UserError for a folder that is not an adapter of this base model, or whose rope settings differ
        from the model's.
        """
        with self._load_lock:
            saved = self.adapters.read(name, folder)
            with self._step_lock:
                copy = shared_copy(self.model)
            tried = self.adapters.try_on(copy, saved, check)
            with self._step_lock:
                try:
                    self.adapters.install(name, tried)
                finally:
                    self.runner.set_model(self.adapters.model)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter. Samples that run with it keep it. Raises UserError for an unknown name."""
        self.adapters.unload(name)
        with self._step_lock:
            self._collect_adapters()

    def _collect_adapters(self) -> None:
        if self.adapters.collect():
            self.runner.set_model(self.adapters.model)

    # Samples

    @property
    def busy(self) -> bool:
        """Whether a step would compute or return anything."""
        return bool(self.samples.groups or self.samples.events)

    def has_sample(self, sample_id: int) -> bool:
        """Whether a sample is unfinished."""
        return sample_id in self.samples

    def is_finished(self, sample_id: int) -> bool:
        """Whether a sample is finished and `step` has returned all of its events. For the step thread."""
        with self.state_lock:
            pending = any(event.sample == sample_id for event in self.samples.events)
            return not self.has_sample(sample_id) and not pending

    def stats(self) -> EngineStats:
        """Current load."""
        with self.state_lock:
            stats = self.scheduler.stats()
        if self._documents is None:
            return stats
        read, written = self._documents.num_read, self._documents.num_written
        return replace(stats, documents_read=read, documents_written=written)

    def compile_grammars(self, params: Sequence[SamplingParams]) -> None:
        """Compile grammars, each of which takes up to a second, before a request that uses them.

        Raises UserError for a grammar that is wrong or too complex.
        """
        for grammar in {branch.grammar for branch in params if branch.grammar is not None}:
            self._grammars.compile(grammar)

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

        The segments after main have the indices 0..N-1 in the order of `Sample.walk`.
        per_branch: settings of each branch of main, which override `sampling`.
        reduce: the reduce of main, for a sample without one: it starts when all others have finished and
            attends to main and all of them.
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

        resume: progress of the sample on another engine. Segments that were added late are part of the
        request then, in the order of their numbers. Events that were emitted there are not emitted again. The
        next tokens are those that the other engine would have sampled, if sampling is greedy or seeded.
        Raises UserError as `submit` does, and for a progress that cannot be that of this request.
        """
        check_token_ids(self.model, request.tokens.ids.tolist(), request.params)
        if resume is not None:
            check_resume(request, resume)
            check_token_ids(self.model, list(chain(*resume.token_ids)), ())
        self.compile_grammars(request.params)
        with self.state_lock:
            version = self.adapters.version(adapter)
            self.adapters.acquire(version)
        try:
            group = self._new_group(request, version, resume)
        except BaseException:
            with self.state_lock:
                self.adapters.release(version)
            raise
        with self.state_lock:
            self.samples.submit(group)
            return group.id

    def divide(self, request: TokenizedRequest) -> list[TokenizedRequest]:
        """A sample of independent branches as samples that the cache can hold; any other one as it is."""
        return request.divide(self.scheduler.block_manager.num_blocks)

    def join(self, sample_id: int, prompt: Text | Segment, branch: int | None = None, **sampling: Any) -> int:
        """Add a branch to an unfinished sample; returns its index.

        prompt: a `Segment` brings its own settings, and what follows it.
        branch: index of the branch that the new one continues: one that runs, or whose branches do. None:
            main.
        sampling: fields of `SamplingParams`.
        Raises UserError if the sample or the branch is finished, and if the new one can never fit. A branch
        that does not fit now waits.
        """
        request = tokenize_branches(self.tokenizer, [prompt], sampling)
        self.compile_grammars(request.params)
        with self.state_lock:
            group = self.samples[sample_id]
            parent = _number_of(group, branch)
            check_join(group, parent)
            index = self.samples.add(group, request, parent)
            self.samples.start_ready(group)
            return index

    def fork(
        self, sample_id: int, branch: int, prompts: Sequence[Text | Segment], **sampling: Any
    ) -> list[int]:
        """Stop a running branch and continue its path with several branches; returns their indices.

        Its last event has the finish reason "forked". Branches that were to follow it start now, too.
        prompts, sampling: as those of `join`.
        Raises UserError if the branch does not run, and if the new ones can never fit.
        """
        request = tokenize_branches(self.tokenizer, prompts, sampling)
        self.compile_grammars(request.params)
        with self.state_lock:
            group = self.samples[sample_id]
            forked = check_fork(group, _number_of(group, branch))
            group.finish(forked, "forked")  # its own end decides what fits after it
            try:
                first = self.samples.add(group, request, forked.number)
            except UserError:
                group.finish(forked, None)
                raise
            text, start = forked.output.flush()[0], group.pos2d(forked)
            self.samples.events.append(Event(branch, text, None, "forked", sample=group.id, pos2d=start))
            self.samples.finish_branch(group, forked, "forked")
            return [added.index for added in group.branches[first:] if added.parent == forked.number]

    def reduce(self, sample_id: int, branch: int | None, prompt: Text | Segment, **sampling: Any) -> int:
        """Give a branch, or main (None), a reduce; returns its index.

        It starts when the branches of its parent, and all below them, have ended, and reads them all.
        prompt, sampling: as those of `join`.
        Raises UserError if none of these branches runs, if there is a reduce, and if it can never fit.
        """
        request = tokenize_branches(self.tokenizer, [prompt], sampling)
        self.compile_grammars(request.params)
        if not request.params[0].max_new_tokens and request.num_branches == 1:
            raise UserError("max_new_tokens=0: the reduce branch decodes nothing; raise it")
        with self.state_lock:
            group = self.samples[sample_id]
            parent = _number_of(group, branch)
            check_reduce(group, parent)
            return self.samples.add(group, request, parent, as_reduce=True)

    def start_pos2d(self, sample_id: int) -> list[tuple[int, int] | None]:
        """Branch and time coordinates of the first token of every segment after main.

        None for a segment that has not started. Raises UserError if the sample is finished.
        """
        with self.state_lock:
            group = self.samples[sample_id]
            return [start_pos2d(group, branch) for branch in group.branches]

    def cancel(self, sample_id: int, branch: int | None = None) -> None:
        """Cancel a sample, or a branch and all below it, before the next step.

        Does nothing for what is finished.
        """
        with self.state_lock:
            if not self.has_sample(sample_id):
                return
            group = self.samples[sample_id]
            if branch is None:
                self.samples.abort(group, "cancelled")
            elif 0 <= branch < len(group.branches):
                self.samples.finish_subtree(group, group.branches[branch], "cancelled")

    # Steps

    def step(self) -> list[Event]:
        """Compute the next tokens of all running samples: one forward pass for each adapter in use.

        Returns the events of these tokens, and those that no earlier step has returned. Raises what a forward
        pass raises, once the others are computed; the next step or `take_events` returns the events then.
        """
        with self._step_lock:
            failure = self._core.step(self)
            self._collect_adapters()
            if failure is not None:
                raise failure
            return self.take_events()

    def take_events(self) -> list[Event]:
        """Events that no step has returned: of cancelled branches, and of a step that raised."""
        with self.state_lock:
            return self.samples.take_events()

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        """Whether `sample` needs nothing but the most likely token of every row."""
        return self._sampler.is_greedy(rows, self.model.device)

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        """The next token of every row of `[rows, vocab]` logits, or of these tokens themselves.

        masks: of the rows that have a grammar.
        """
        return self._sampler(logits, rows, masks) if rows else PendingTokens.of([])

    # State

    def _make_output(
        self, syntax: ForkSyntax | None, prompt: Sequence[int], params: SamplingParams
    ) -> OutputProcessor:
        matcher = None if params.grammar is None else self._grammars.matcher(params.grammar)
        forks = ForkParser(syntax, params.max_fork_branches) if syntax and params.may_fork else None
        return OutputProcessor(self._decoder, prompt, params, self._eos_token_ids, matcher, forks)

    def _new_group(
        self, request: TokenizedRequest, version: str, resume: ResumeState | None
    ) -> SequenceGroup:
        """A new sample, not queued yet. The segments that can start have started.

        It takes milliseconds for many branches, without the lock. Raises UserError if it does not fit.
        """
        syntax = None if self.fallback_reason else self.adapters.fork_syntax(version)
        if syntax is not None:
            request = request.as_trained()
        make_output = partial(self._make_output, syntax)
        group = SequenceGroup(
            request, self.rope_config, make_output, adapter_version=version, seed=random_seed()
        )
        if (limit := self.runner.frequency_limit) is not None:
            group.choose_frequencies(limit, self.runner.has_long_frequencies)
        if resume is not None:
            group.resume(resume)
        self.samples.check(group)
        if group.is_running:
            group.start_ready()
        return group


def _number_of(group: SequenceGroup, branch: int | None) -> int:
    """The number of the segment with this index; None: main. Raises UserError for an unknown one."""
    if branch is None:
        return MAIN
    if not 0 <= branch < len(group.branches):
        raise UserError(f"branch={branch}: unknown; the sample has branches 0 to {len(group.branches) - 1}")
    return group.branches[branch].number
