"""Every block of Bash and Python on the pages is run as it is printed, in a reader's folder.

Bash runs the text itself. What differs from a reader's machine, so that it takes minutes and no network:
- `python`, `make`, `ray` and their like lead to tests/resident.py, which runs every `python -m …` in one process, and each
  line once. That process has joined a cluster started before; a training with one worker takes place in it, by Ray Train's local
  mode, and so do the processes of `make demo`.
- BEHIND names the settings that are put behind the printed ones to make long commands short. A server is left running until the
  next one starts. Of `make` only demo and serve run; of the others it says what it would do.
- Every model that pages name is a tiny one. Runs whose names end in -HASH become those that are there, the cluster's address its
  own, use_gpu=true false where there is no GPU, and port 8000 another where it is taken.
- NOT_HERE lists the commands that only say that they cannot run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from docs import PAGES, ROOT, blocks, commands
from reader import Reader, reader
from resident import NOT_HERE

READ_ALONE = {"", "json", "yaml"}  # languages of blocks that are no commands
# The Chinese README holds the same blocks. The page whose last server others ask, too, is first.
RUN = sorted(
    (page for page in PAGES if page.name != "README.zh-CN.md"), key=lambda page: page.name != "inference.md"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with reader(tmp_path_factory.mktemp("docs")) as found:
        yield found


@pytest.mark.parametrize(
    "page", [page for page in RUN if blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_a_page_does_what_it_says(folder: Reader, page: Path) -> None:
    folder.begin()
    for block in blocks(page):
        if block.language in READ_ALONE:
            continue
        assert block.language in ("bash", "python"), f"{block}: a block that nothing runs"
        output = folder.run(block)
        if "print(" in block.text:
            assert output.strip(), f"{block}: printed nothing"


def test_what_cannot_run_here_is_on_the_pages() -> None:
    """No entry of NOT_HERE outlives the command that it stands for."""
    lines = [
        " ".join(words)
        for page in RUN
        for block in blocks(page)
        if block.language == "bash"
        for words in commands(block)
    ]
    assert [
        known for known in NOT_HERE if not any(f"{line} ".startswith(f"{known} ") for line in lines)
    ] == []
