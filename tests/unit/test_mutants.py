"""The list of `make mutants`: each mutation still applies to the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.mutants import MUTATIONS, ROOT, Mutation


def test_every_mutation_has_a_name_of_its_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(tmp_path: Path, mutation: Mutation) -> None:
    source = ROOT / mutation.file
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    shutil.copy(source, copy)
    mutation.apply(tmp_path)
    assert copy.read_bytes() != source.read_bytes()
    compile(copy.read_text(encoding="utf-8"), mutation.file, "exec")
    assert (ROOT / mutation.tests.split()[0]).exists()
