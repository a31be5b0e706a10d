"""What the pages for readers hold: fenced blocks, links, headings, and the commands of shell blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEREDOC = re.compile(r"<<\s*'?(\w+)'?")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. line: of its first line of text, from 1."""

    language: str
    text: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language, indent = number + 1, fence["language"], len(fence["indent"])
        elif fence and not fence["language"] and start is not None:
            text = "".join(f"{inner[indent:]}\n" for inner in lines[start:number])
            found.append(Block(language, text, path, start + 1))
            start = None
    assert start is None, f"{path}:{start}: a block without an end"
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every simple command of a shell block; continued lines are joined, here-documents left
    out.
    """
    end, begun = None, ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if end is not None:
            end = None if line == end else end
            continue
        try:
            words = shlex.split(begun + line, comments=True)
        except ValueError:  # a quotation goes on in the next line
            begun += f"{line}\n"
            continue
        heredoc = _HEREDOC.search(line)
        end, begun = heredoc[1] if heredoc else None, ""
        if words:
            yield words
    assert not begun, f"{block}: a quotation without an end"


def prose(path: Path) -> str:
    """A page without its blocks and spans of code, in which nothing is a link."""
    outside, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            outside.append(line)
    return "\n".join(outside)


def links(path: Path) -> list[str]:
    """Targets within the repository."""
    bare = re.sub(r"`[^`\n]*`(?!\])", "", prose(path))
    targets = [found["target"] for found in _LINK.finditer(bare)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names
