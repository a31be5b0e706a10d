"""Documents of earlier samples: found elsewhere in the KV cache or in a folder, and moved to their place.

A document follows those before it, so in another order it starts at another time. Its keys and values there
are those that were computed, rotated by the distance in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from parallelmind.engine.block_manager import BLOCK, BlockDraft, BlockKey, blocks_for, slots_of
from parallelmind.engine.document_files import DocumentFiles, SavedDocument, States
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.key_rotation import KeyRotation
from parallelmind.engine.kv_cache import Change
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.scheduler import Scheduler
from parallelmind.engine.sequence import SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import Ints

_MAX_UNWRITTEN = 64  # documents that wait to be written; further ones are not written


class DocumentBlock(NamedTuple):
    """A block of a document. before: as in `BlockManager.cache`. block: where it is cached, if it is."""

    number: int
    key: BlockKey
    before: bytes | None
    block: int | None


class ComputedDocument(NamedTuple):
    """Where a document was computed: its start time, and the keys of its blocks."""

    start_time: int
    keys: list[BlockKey]


class FoundDocument(NamedTuple):
    """Where the states of a document are: in cached blocks, or read from the folder. start_time: of these."""

    start_time: int
    blocks: list[int]
    states: States


class Move(NamedTuple):
    """A document that is found elsewhere. blocks: those that it lacks at its start time, and new ones."""

    segment: SegmentState
    blocks: list[tuple[DocumentBlock, int]]
    found: FoundDocument

    @property
    def steps(self) -> int:
        """Time steps from where it is found to where it belongs."""
        return self.segment.start_time - self.found.start_time


class DocumentCache:
    """Moves documents within the KV cache, and between it and a folder. All methods are for the step thread.

    num_read, num_written: documents that were read from the folder, and written to it.
    """

    def __init__(
        self,
        files: DocumentFiles | None,
        scheduler: Scheduler,
        runner: ModelRunner,
        state_lock: FairLock,
        fingerprint: Callable[[str], str],
    ) -> None:
        """files: the folder, if there is one. fingerprint: what computes keys with an adapter's version."""
        self._files, self._scheduler, self._runner = files, scheduler, runner
        self._state_lock, self._fingerprint = state_lock, fingerprint
        self._writer = ThreadPoolExecutor(1, "documents")
        self._unwritten: dict[str, Future[None]] = {}
        self._noted: dict[str, tuple[Ints, int]] = {}  # slots and start times to write, by name
        self._computed: dict[str, ComputedDocument] = {}  # by name; some of their blocks may be evicted
        self._rotated: dict[int, BlockKey] = {}  # blocks that were not computed but rotated
        self.num_read = self.num_written = 0

    @cached_property
    def _rotation(self) -> KeyRotation | None:
        return KeyRotation.find(self._runner.model)

    def restore(self) -> bool:
        """Move the documents of waiting samples to their places, as many as the cache has room for.

        Call between steps. Returns whether any was moved, into blocks that had no holder.
        """
        has_moved = False
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
            has_moved |= self._restore_all(group)
        return has_moved

    def _restore_all(self, group: SequenceGroup) -> bool:
        """Move the documents of a sample. None of its blocks makes room for another one."""
        manager, held = self._scheduler.block_manager, list[int]()
        try:
            moves = [move for segment in group.documents if (move := self._move(group, segment, held))]
            self._copy([move for move in moves if move.found.blocks])
            for move in moves:
                if move.found.states:
                    self._write(move)
            with self._state_lock:
                for block, new in chain.from_iterable(move.blocks for move in moves):
                    manager.cache(block.key, new, block.before)
        finally:
            with self._state_lock:
                manager.free(held)
        return bool(moves)

    def _move(self, group: SequenceGroup, segment: SegmentState, held: list[int]) -> Move | None:
        """What to move for a document; None if nothing is found. `held` gets all blocks that it needs."""
        with self._state_lock:
            blocks = self._blocks(segment)
            self._hold([block.block for block in blocks if block.block is not None], held)
        missing = [block for block in blocks if block.block is None]
        found = self._find(self._name(group, segment), segment.num_tokens, held) if missing else None
        if found is None:
            return None
        with self._state_lock:
            new = BlockDraft(self._scheduler.block_manager).allocate(len(missing))
            if new is None:
                return None
            self._scheduler.block_manager.uncache(new)
            self._hold(new, held)
        move = Move(segment, list(zip(missing, new, strict=True)), found)
        if move.steps:
            self._rotated |= {new: block.key for block, new in move.blocks}
        return move

    def _copy(self, moves: Sequence[Move]) -> None:
        """Copy documents within the cache, all at once."""
        if not moves:
            return
        parts = []
        for move in moves:
            rows, slots = self._place(move)
            parts.append((slots_of(move.found.blocks)[rows], slots, np.full(len(rows), move.steps)))
        sources, targets, steps = map(np.concatenate, zip(*parts, strict=True))
        change, device = self._rotation_by(steps), self._runner.model.device
        self._runner.cache.copy_slots(sources, targets, change, device)

    def _write(self, move: Move) -> None:
        """Write a document of the folder to the cache."""
        rows, slots = self._place(move)
        change, index = self._rotation_by(np.full(len(rows), move.steps)), torch.from_numpy(rows)
        states = {name: change(name, value[index]) for name, value in move.found.states.items()}
        self._runner.cache.write_slots(slots, states, self._runner.model.device)

    def _place(self, move: Move) -> tuple[Ints, Ints]:
        """The indices of the tokens in the new blocks of a document, and their slots, which get its times."""
        segment = move.segment
        rows = slots_of([block.number for block, _ in move.blocks])
        slots = slots_of([new for _, new in move.blocks])[rows < segment.num_tokens]
        rows = rows[rows < segment.num_tokens]
        self._scheduler.tables.place(slots, segment.start_time + rows, np.full_like(rows, segment.number))
        return rows, slots

    def _rotation_by(self, steps: Ints) -> Change:
        if not steps.any():
            return lambda name, states: states
        assert self._rotation is not None, "names hold the start time of what cannot be rotated"
        return self._rotation.by(steps)

    def _find(self, name: str, num_tokens: int, held: list[int]) -> FoundDocument | None:
        """A document elsewhere in the cache, or in the folder."""
        if (computed := self._computed.get(name)) is not None:
            with self._state_lock:
                blocks = [self._scheduler.block_manager.find(key) for key in computed.keys]
                found = [block for block in blocks if block is not None]
                if len(found) == len(blocks):
                    self._hold(found, held)
                    return FoundDocument(computed.start_time, found, {})
            del self._computed[name]
        saved = self._files.read(name, num_tokens) if self._files and self._files.has(name) else None
        if saved is None:
            return None
        self.num_read += 1
        return FoundDocument(saved.start_time, [], saved.states)

    def _hold(self, blocks: list[int], held: list[int]) -> None:
        """Hold blocks until the documents are moved. Call with the state lock under which they were found."""
        self._scheduler.block_manager.hold(blocks)
        held += blocks

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
        """The name of a document: a hash of all that its keys and values depend on, and its length.

        If keys can be rotated, they do not depend on the start time.
        """
        version, start_time = group.adapter_version, 0 if self._rotation else segment.start_time
        path = group.document_path(self._fingerprint(version), segment.number, start_time)
        return f"{path.extend(segment.token_ids).hex()}-{segment.num_tokens}"

    def note_computed(self, groups: Iterable[SequenceGroup]) -> None:
        """Note where the documents of these samples are computed, and those to write, for `write_noted`.

        Call with the state lock, after a forward pass whose logits are finite.
        """
        for group in dict.fromkeys(groups):
            if group.has_noted_documents or not (group.num_documents and group.is_finite):
                continue
            if any(segment.table.length < segment.num_tokens for segment in group.documents):
                continue
            group.has_noted_documents = True
            for segment in group.documents:
                self._note(group, segment)

    def _note(self, group: SequenceGroup, segment: SegmentState) -> None:
        keys = [block.key for block in self._blocks(segment)]
        held = zip(segment.table.blocks, keys, strict=False)
        if any(self._rotated.get(block) == key for block, key in held):
            return  # what was rotated twice would be less exact
        name = self._name(group, segment)
        if len(self._computed) > self._scheduler.block_manager.num_blocks:
            self._forget_evicted()
        self._computed[name] = ComputedDocument(segment.start_time, keys)
        if self._files is not None and not self._files.has(name):
            self._noted[name] = segment.table.slots, segment.start_time

    def _forget_evicted(self) -> None:
        find = self._scheduler.block_manager.find
        self._computed = {
            name: computed
            for name, computed in self._computed.items()
            if all(find(key) is not None for key in computed.keys)
        }

    def write_noted(self) -> None:
        """Write the noted documents in another thread. Call before the next step takes their slots."""
        self._unwritten = {name: write for name, write in self._unwritten.items() if not write.done()}
        for name, (slots, start_time) in self._noted.items():
            if name not in self._unwritten and len(self._unwritten) < _MAX_UNWRITTEN:
                assert self._files is not None, "documents to write are noted for a folder"
                document = SavedDocument(self._runner.cache.read_slots(slots), start_time)
                self._unwritten[name] = self._writer.submit(self._files.write, name, document)
                self.num_written += 1
        self._noted.clear()

    def flush(self) -> None:
        """Wait until all documents are written. May be called from any thread."""
        for write in list(self._unwritten.values()):
            write.result()
