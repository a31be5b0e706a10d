"""Parse the documentation pages: fenced blocks, links, headings, and commands of shell blocks."""

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
    """A fenced code block. `line`: number of its first line of text, from 1."""

    language: str
    text: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    result: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language, indent = number + 1, fence["language"], len(fence["indent"])
        elif fence and not fence["language"] and start is not None:
            text = "".join(f"{inner[indent:]}\n" for inner in lines[start:number])
            result.append(Block(language, text, path, start + 1))
            start = None
    assert start is None, f"{path}:{start}: a block without an end"
    return result


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of every command of a shell block, joining continued lines and skipping heredocs."""
    end, open_quote = None, ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if end is not None:
            end = None if line == end else end
            continue
        try:
            words = shlex.split(open_quote + line, comments=True)
        except ValueError:  # a quotation continues on the next line
            open_quote += f"{line}\n"
            continue
        heredoc = _HEREDOC.search(line)
        end, open_quote = heredoc[1] if heredoc else None, ""
        if words:
            yield words
    assert not open_quote, f"{block}: a quotation without an end"


def as_module(words: list[str]) -> list[str]:
    """`parallelmind NAME …` as the `python -m …` that is the same; other commands unchanged."""
    if len(words) < 2 or (not words[0].endswith("bin/parallelmind") and words[0] != "parallelmind"):
        return words
    if words[1].startswith("-"):
        return ["python", "-m", "workloads", *words[1:]]
    module = "serving" if words[1] == "serve" else f"workloads.{words[1]}"
    return ["python", "-m", module, *words[2:]]


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    outside, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            outside.append(line)
    return "\n".join(outside)


def code_spans(path: Path) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def links(path: Path) -> list[str]:
    """Return the link targets within the repository."""
    bare = re.sub(r"`[^`\n]*`(?!\])", "", prose(path))
    targets = [match["target"] for match in _LINK.finditer(bare)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    counts: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = counts[name] = counts.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names
