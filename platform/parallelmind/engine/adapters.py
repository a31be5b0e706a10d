"""The adapters on one base model: their names, the active one, and the versions that samples still use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.fork_parser import ForkSyntax
from parallelmind.engine.model_runner import Model
from parallelmind.engine.tokenization import fork_syntax
from parallelmind.errors import UserError
from parallelmind.model.adapter import attach, read_saved
from parallelmind.model.adapter_copy import is_movable, move_adapter
from parallelmind.model.fingerprint import base_fingerprint, fingerprint
from parallelmind.model.fork_markers import fork_markers
from parallelmind.model.patch_state import rope_config
from parallelmind.model.peft_folder import SavedAdapter
from parallelmind.model.structure import causal_lm
from parallelmind.model.weights import ADAPTER

BASE = "base"

# Several engines may share a model. The numbers of loads differ, so that they never take the same version.
_managers: WeakKeyDictionary[PreTrainedModel, WeakSet[AdapterManager]] = WeakKeyDictionary()
_load_numbers = count(1)

# Models whose last switch of adapters has not completed: an error leaves their layers with different ones.
_half_switched: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True, slots=True)
class TriedAdapter:
    """An adapter that fits the model. adapted: a copy of the model with it."""

    version: str
    saved: SavedAdapter
    adapted: PeftModel


class AdapterManager:
    """Loads adapters on a model. Each load is a version, which samples keep until they finish.

    `BASE` names the model without an adapter. The adapter that is active at first has no name: it
    serves samples that name none.

    `install`, `active` and `collect` change the model: call them from the thread that may use it, between
    forward passes. `state_lock` guards names and counts, and is not held while the model changes.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, state_lock: FairLock) -> None:
        self.model, self._tokenizer, self._state_lock = model, tokenizer, state_lock
        self._version_by_name: dict[str, str] = {BASE: BASE}
        self._num_samples: Counter[str] = Counter()  # by version
        self._fingerprints: dict[str, str] = {}  # by version
        self._default = self._active = str(model.active_adapter) if isinstance(model, PeftModel) else BASE
        self._loaded: set[str] = set()  # versions on the model that this manager has loaded
        self._fork_syntax = {self._default: fork_syntax(fork_markers(model), tokenizer)}  # by version
        self._sharers = _managers.setdefault(causal_lm(model), WeakSet())  # managers of the same model
        if not isinstance(model, PeftModel) and any(
            isinstance(other.model, PeftModel) for other in self._sharers
        ):
            raise UserError(
                "model: another engine has loaded adapters on it; give `engine.model` of that engine"
            )
        self._sharers.add(self)

    def read(self, name: str, folder: str | Path) -> SavedAdapter:
        """Read an adapter for `try_on`, while the model may be in use.

        Raises UserError for a folder that is not an adapter of this base model, or whose rope settings differ
        from the model's.
        """
        if name == BASE:
            raise UserError(f"adapter={name!r}: names the model without an adapter; choose another name")
        return read_saved(self.model, self._tokenizer, folder)

    def try_on(
        self, copy: PreTrainedModel, saved: SavedAdapter, check: Callable[[Model], None] | None = None
    ) -> TriedAdapter:
        """Add an adapter to a `shared_copy` of the model, for `install`, while the model may be in use.

        check: called with the adapted copy; may raise. Raises UserError for weights that do not fit.
        """
        version = f"{ADAPTER}-{next(_load_numbers)}"
        adapted = attach(copy, saved, version).eval()
        if check is not None:
            check(adapted)
        return TriedAdapter(version, saved, adapted)

    def install(self, name: str, tried: TriedAdapter) -> None:
        """Add an adapter to the model under a name, in place of an earlier one of that name."""
        if not isinstance(self.model, PeftModel) and len(self._sharers) > 1:
            raise UserError(
                f"adapter={name!r}: another engine decodes with the bare model; load before it is made"
            )
        moved = move_adapter(tried.adapted, self.model, tried.version) if is_movable(tried.adapted) else None
        self.model = moved or attach(self.model, tried.saved, tried.version).eval()
        self._loaded.add(tried.version)
        self._fork_syntax[tried.version] = fork_syntax(tried.saved.fork_markers, self._tokenizer)
        with self._state_lock:
            self._version_by_name[name] = tried.version
        # After the first adapter of a model is added, an adapter must be active.
        self._activate(tried.version if self._active == BASE else self._active)
        self.collect()

    def unload(self, name: str) -> None:
        """Remove a name; samples that use its adapter keep it. Raises UserError for an unknown name."""
        if name == BASE:
            raise UserError(f"adapter={name!r}: the model without an adapter stays; name another")
        with self._state_lock:
            self.version(name)
            del self._version_by_name[name]

    def version(self, name: str | None) -> str:
        """The version that a new sample gets for this name. Raises UserError for an unknown name."""
        if name is None:
            return self._default
        if not isinstance(name, str) or name not in self._version_by_name:
            known = ", ".join(sorted(self._version_by_name))
            raise UserError(f"adapter={name!r}: not loaded; choose from {known}")
        return self._version_by_name[name]

    def fork_syntax(self, version: str) -> ForkSyntax | None:
        """How a version writes a fork; None if it does not fork by itself."""
        return self._fork_syntax.get(version)

    def fingerprint(self, version: str) -> str:
        """What computes keys and values with this version, the same in every process."""
        if version not in self._fingerprints:
            adapter, rope = None if version == BASE else version, rope_config(self.model)
            self._fingerprints[version] = fingerprint(self._base_fingerprint, self.model, adapter, rope)
        return self._fingerprints[version]

    @cached_property
    def _base_fingerprint(self) -> str:
        return base_fingerprint(self.model)

    def acquire(self, version: str) -> None:
        """Count a sample that uses this version."""
        self._num_samples[version] += 1

    def release(self, version: str) -> None:
        """Discount a finished sample of this version. `collect` deletes the version later."""
        self._num_samples[version] -= 1

    @contextmanager
    def active(self, version: str) -> Iterator[None]:
        """Context in which the model computes with this version."""
        if version == BASE and isinstance(self.model, PeftModel):
            self._begin_switch(self.model)
            with self.model.disable_adapter():
                yield
            _half_switched.discard(causal_lm(self.model))
            return
        if version != self._active or self._is_displaced():
            self._activate(version)
        yield

    def _is_displaced(self) -> bool:
        """Whether another engine has activated another adapter on the same model, or a switch has failed."""
        if not isinstance(self.model, PeftModel):
            return False
        return self.model.active_adapter != self._active != BASE or causal_lm(self.model) in _half_switched

    def collect(self) -> bool:
        """Delete the versions that no name and no sample refers to: nothing can refer to them again.

        Returns whether there were any.
        """
        if not isinstance(self.model, PeftModel):
            return False
        defaults = {other._default for other in self._sharers}
        with self._state_lock:
            in_use = {version for version, count in self._num_samples.items() if count}
            in_use |= {ADAPTER, *self._version_by_name.values()}
        unused = sorted(self._loaded - in_use - defaults)
        if len(unused) == len(self.model.peft_config):
            unused.pop()  # peft cannot compute with a model that has lost all of its adapters
        for version in unused:
            if version in (self._active, self.model.active_adapter):
                self._activate(next(kept for kept in self.model.peft_config if kept not in unused))
            self.model.delete_adapter(version)
            self._loaded.remove(version)
            del self._fork_syntax[version]
            self._fingerprints.pop(version, None)
        return bool(unused)

    def _activate(self, version: str) -> None:
        if isinstance(self.model, PeftModel) and version != BASE:
            self._begin_switch(self.model)
            self.model.set_adapter(version, inference_mode=True)
            _half_switched.discard(causal_lm(self.model))
        self._active = version

    def _begin_switch(self, model: PeftModel) -> None:
        if causal_lm(model) in _half_switched:
            base: Any = model.base_model
            base.enable_adapter_layers()
        _half_switched.add(causal_lm(model))
