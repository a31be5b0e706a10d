"""The adapters that one base model carries: which are known by name, which is at work, and which are still
needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from parallelmind.engine.model_runner import Model
from parallelmind.errors import UserError
from parallelmind.model.adapter import add_adapter
from parallelmind.model.weights import ADAPTER

BASE = "base"


class AdapterManager:
    """Every load of an adapter is a version of its own: samples that have begun with an older one end with
    it.

    The base model alone is `BASE`; what the model was loaded with goes by no name, and needs none.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self._tokenizer = model, tokenizer
        self._versions: dict[str, str] = {BASE: BASE}
        self._users: Counter[str] = Counter()
        self._own = self._active = ADAPTER if isinstance(model, PeftModel) else BASE
        self._loads = 0
        self._carried: set[str] = set()  # versions that have been put on the model from here

    def load(self, name: str, folder: str | Path, check: Callable[[Model], None] | None = None) -> str:
        """Make an adapter available under this name, in place of what had it; returns its version.

        check: looks at the model with the adapter at work, and may raise. Raises UserError for a folder that
        is no adapter of this base, or whose rope settings are not the model's. In either case everything is
        as it was.
        """
        if name == BASE:
            raise UserError(
                f"adapter={name!r}: is the name of the model without an adapter; choose another name"
            )
        self._loads += 1
        version = f"{ADAPTER}-{self._loads}"
        self.model = add_adapter(self.model, self._tokenizer, folder, version)
        self._carried.add(version)
        active = version if self._active == BASE else self._active
        try:
            if check is not None:
                self._use(version)
                check(self.model)
            self._versions[name] = version
        finally:
            self._use(active)
            self.collect()
        return version

    def unload(self, name: str) -> None:
        """Forget a name; samples that use its adapter go on. Raises UserError for an unknown one."""
        if name == BASE:
            raise UserError(
                f"adapter={name!r}: is the name of the model without an adapter, which stays; name another"
            )
        self.version(name)
        del self._versions[name]
        self.collect()

    def version(self, name: str | None) -> str:
        """What a sample that asks for this name gets. Raises UserError for an unknown one."""
        if name is None:
            return self._own
        if name not in self._versions:
            raise UserError(f"adapter={name!r}: not loaded; choose from {', '.join(sorted(self._versions))}")
        return self._versions[name]

    def acquire(self, version: str) -> None:
        self._users[version] += 1

    def release(self, version: str) -> None:
        self._users[version] -= 1

    @contextmanager
    def active(self, version: str) -> Iterator[None]:
        """While this lasts the model computes with that version."""
        if version == BASE and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
            return
        if version != self._active:
            self._use(version)
        yield

    def _use(self, version: str) -> None:
        if isinstance(self.model, PeftModel) and version != BASE:
            self.model.set_adapter(version, inference_mode=True)
        self._active = version

    def collect(self) -> None:
        """Take off the model what neither a name nor a sample asks for. To be called by whoever computes, in
        between.
        """
        if not isinstance(self.model, PeftModel):
            return
        needed = {
            ADAPTER,
            *self._versions.values(),
            *(version for version, users in self._users.items() if users),
        }
        spare = sorted(self._carried - needed)
        if len(spare) == len(self.model.peft_config):
            spare.pop()  # peft cannot compute with a model that has lost all of its adapters
        for version in spare:
            if version == self._active:
                self._use(next(known for known in self.model.peft_config if known not in spare))
            self.model.delete_adapter(version)
            self._carried.remove(version)
