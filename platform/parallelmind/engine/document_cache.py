"""Documents that outlive the KV cache: read from a folder into cached blocks, written once computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from parallelmind.engine.block_manager import BLOCK, BlockDraft, BlockKey, blocks_for, slots_of
from parallelmind.engine.document_files import DocumentFiles
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.scheduler import Scheduler
from parallelmind.engine.sequence import SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import MAIN, Ints

_MAX_UNWRITTEN = 64  # documents that wait to be written; further ones are not written


class DocumentBlock(NamedTuple):
    """A block of a document. before: as in `BlockManager.cache`. block: where it is cached, if it is."""

    number: int
    key: BlockKey
    before: bytes | None
    block: int | None


class DocumentCache:
    """Moves documents between a folder and the KV cache. All methods are for the step thread.

    num_read, num_written: documents that were read and written.
    """

    def __init__(
        self,
        files: DocumentFiles,
        scheduler: Scheduler,
        runner: ModelRunner,
        state_lock: FairLock,
        fingerprint: Callable[[str], str],
    ) -> None:
        """fingerprint: what computes keys and values with an adapter's version."""
        self._files, self._scheduler, self._runner = files, scheduler, runner
        self._state_lock, self._fingerprint = state_lock, fingerprint
        self._writer = ThreadPoolExecutor(1, "documents")
        self._unwritten: dict[str, Future[None]] = {}
        self._noted: dict[str, Ints] = {}  # slots of computed documents by name
        self.num_read = self.num_written = 0

    def restore(self) -> bool:
        """Read the documents of waiting samples, as many as the cache has room for. Call between steps.

        Returns whether any was read, into blocks that had no holder.
        """
        num_read = self.num_read
        self._noted.clear()  # those of a step that raised: their slots may be taken now
        with self._state_lock:
            waiting, left = [*self._scheduler.waiting], self._scheduler.block_manager.num_available
        for group in waiting:
            if not group.num_documents or group.has_sought_documents:
                continue
            left -= sum(blocks_for(segment.num_tokens) for segment in group.documents)
            if left < 0:
                break
            group.has_sought_documents = True
            self._restore_all(group)
        return self.num_read > num_read

    def _restore_all(self, group: SequenceGroup) -> None:
        """Read the documents of a sample. None of its blocks makes room for another one."""
        manager, held = self._scheduler.block_manager, list[int]()
        try:
            for segment in group.documents:
                self._restore(group, segment, held)
        finally:
            with self._state_lock:
                manager.free(held)

    def _restore(self, group: SequenceGroup, segment: SegmentState, held: list[int]) -> None:
        """Read what the KV cache lacks of a document. All of its blocks are held, and appended to `held`."""
        manager = self._scheduler.block_manager
        with self._state_lock:
            blocks = self._blocks(segment)
            found = [block.block for block in blocks if block.block is not None]
            manager.hold(found)
            held += found
        missing, name = [block for block in blocks if block.block is None], self._name(group, segment)
        states = self._files.read(name, segment.num_tokens) if missing and self._files.has(name) else None
        if states is None:
            return
        with self._state_lock:
            new = BlockDraft(manager).allocate(len(missing))
            if new is None:
                return
            manager.uncache(new)
            manager.hold(new)
            held += new
        rows = slots_of([block.number for block in missing])
        slots = slots_of(new)[rows < segment.num_tokens]
        rows = rows[rows < segment.num_tokens]
        index = torch.from_numpy(rows)
        chosen = {key: value[index] for key, value in states.items()}
        self._runner.cache.write_slots(slots, chosen, self._runner.model.device)
        self._scheduler.tables.place(slots, segment.start_time + rows, np.full_like(rows, segment.number))
        with self._state_lock:
            for block, cached in zip(missing, new, strict=True):
                manager.cache(block.key, cached, block.before)
        self.num_read += 1

    def _blocks(self, segment: SegmentState) -> list[DocumentBlock]:
        assert segment.path is not None, "documents depend on their path alone"
        path, blocks = segment.path.start(), list[DocumentBlock]()
        for start in range(0, segment.num_tokens, BLOCK):
            ids = segment.token_ids[start : start + BLOCK]
            before = path.digest() if len(ids) < BLOCK else None
            key = path.extend(ids), len(ids)
            blocks.append(DocumentBlock(len(blocks), key, before, self._scheduler.block_manager.find(key)))
        return blocks

    def _name(self, group: SequenceGroup, segment: SegmentState) -> str:
        """The name of a document: a hash of all that its keys and values depend on, and its length."""
        root = group.root_path(self._fingerprint(group.adapter_version))
        main = group.segments[MAIN].token_ids
        path = root.child(main, group.path_coordinate(segment.number), segment.start_time)
        return f"{path.extend(segment.token_ids).hex()}-{segment.num_tokens}"

    def note_computed(self, groups: Iterable[SequenceGroup]) -> None:
        """Note the documents of these samples that are computed and not in the folder, for `write_noted`.

        Call with the state lock, after a forward pass whose logits are finite.
        """
        for group in dict.fromkeys(groups):
            if group.has_written_documents or not (group.num_documents and group.is_finite):
                continue
            if any(segment.table.length < segment.num_tokens for segment in group.documents):
                continue
            group.has_written_documents = True
            for segment in group.documents:
                name = self._name(group, segment)
                if not self._files.has(name):
                    self._noted[name] = segment.table.slots

    def write_noted(self) -> None:
        """Write the noted documents in another thread. Call before the next step takes their slots."""
        self._unwritten = {name: write for name, write in self._unwritten.items() if not write.done()}
        for name, slots in self._noted.items():
            if name not in self._unwritten and len(self._unwritten) < _MAX_UNWRITTEN:
                states = self._runner.cache.read_slots(slots)
                self._unwritten[name] = self._writer.submit(self._files.write, name, states)
                self.num_written += 1
        self._noted.clear()

    def flush(self) -> None:
        """Wait until all documents are written. May be called from any thread."""
        for write in list(self._unwritten.values()):
            write.result()
