"""Run every Bash and Python block of the pages as printed, in a scratch copy of the project.

Bash runs the text itself. These differences keep a page at minutes and without a network:

- `python`, `make`, `ray` and similar words call tests/resident.py, which runs every `python -m …`
  in one process and each line once. The process is connected to a running Ray cluster; training
  with one worker runs in it, in Ray Train's local mode, and so do the processes of `make demo`.
- EXTRA_FIELDS of tests/resident.py are appended to long commands to shorten them. A server keeps
  running until the next one starts. Of `make`, the targets demo and serve run; for others `make -n`
  prints the recipe.
- Every model named on a page is a tiny one. runs/NAME-HASH becomes an existing run, the cluster
  address that of the test's cluster, use_gpu=true becomes false without a GPU, and port 8000 a free
  one.
- NOT_HERE lists the commands that cannot run in the test; they print that and succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docs import PAGES, ROOT, Block, blocks, commands
from reader import Reader, reader
from resident import NOT_HERE

NOT_RUN = {"", "json", "yaml"}  # languages of blocks without commands
# Pages in Chinese have the same blocks. inference.md comes first: other pages use its last server.
RUN = sorted(
    (page for page in PAGES if not page.name.endswith(".zh-CN.md")),
    key=lambda page: page.name != "inference.md",
)
FIRST_READ = {
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
}  # `make test` runs these, `make test-all` the others too

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with reader(tmp_path_factory.mktemp("docs")) as scratch:
        yield scratch


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, marks=() if page in FIRST_READ else pytest.mark.full, id=str(page.relative_to(ROOT))
        )
        for page in RUN
        if blocks(page)
    ],
)
def test_every_block_of_a_page_runs(
    folder: Reader, page: Path, record_property: Callable[[str, object], None]
) -> None:
    """Properties of the JUnit report: the number of commands and Python blocks, and of those NOT_HERE."""
    folder.begin_page()
    ours = [block for block in blocks(page) if block.language not in NOT_RUN]
    typed = [line for block in ours if block.language == "bash" for line in lines_of(block)]
    record_property("examples", len(typed) + sum(block.language == "python" for block in ours))
    record_property("not_here", sum(is_not_here(line) for line in typed))
    for block in ours:
        assert block.language in ("bash", "python"), f"{block}: no way to run this language"
        output = folder.run(block)
        if "print(" in block.text:
            assert output.strip(), f"{block}: printed nothing"


def lines_of(block: Block) -> list[str]:
    return [" ".join(words) for words in commands(block)]


def is_not_here(line: str) -> bool:
    return any(f"{line} ".startswith(f"{prefix} ") for prefix in NOT_HERE)


def test_not_here_lists_no_stale_commands() -> None:
    """Every entry of NOT_HERE is the start of a command on some page."""
    bash = [block for page in RUN for block in blocks(page) if block.language == "bash"]
    lines = [line for block in bash for line in lines_of(block)]
    assert [
        prefix for prefix in NOT_HERE if not any(f"{line} ".startswith(f"{prefix} ") for line in lines)
    ] == []
