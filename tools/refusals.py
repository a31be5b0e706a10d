"""Write the second table of docs/mistakes.md: what commands refuse before Ray starts, with the seconds.

python -m tools.refusals
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.marked import fill
from tools.mistakes import PAGE, ROOT, outcome, prepare, start

_REPEATS = 3
_TRAIN = "train base_model=tiny data_path=train.jsonl"
COMMANDS = (
    "trian data_path=train.jsonl",
    "train data_path=trian.jsonl",
    "train base_model=tiny",
    "train demmo",
    f"{_TRAIN} lora_rnak=8",
    f"{_TRAIN} lora_rank=0",
    f"{_TRAIN} global_batch_size=3",
    f"{_TRAIN} quantize=4bit",
    "train base_model=tiny data_path=questions.csv",
    "train base_model=tiny data_path=chat.jsonl",
    "train base_model=./tinny data_path=train.jsonl",
    "train base_model=org/name data_path=train.jsonl",
    "sweep demo",
    "generate prompt=Hello prompts=[Who?]",
    "generate lora_path=adptr prompt=Hello",
    "generate lora_path=adapter rope_2d_ratio=0.3 prompt=Hello",
    "chat lora_path=adapter temperature=-1",
    "evaluate answer data_path=train.jsonl",
    "serve lora_path=adapter host=0.0.0.0",
    "convert data_path=chat.jsonl output_path=chat.txt",
)
_CHAT = '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]}\n'
_UNREACHABLE = "http://127.0.0.1:9"  # the discard port; usually nothing listens there


class Refusal(NamedTuple):
    """A command, the line that it ends with, its exit code and the seconds until then."""

    command: str
    text: str
    code: int
    seconds: float


def prepare_folder(folder: Path) -> dict[str, str]:
    """Write the files that the commands name; return the environment without hub and bitsandbytes."""
    prepare(folder)
    (folder / "chat.jsonl").write_text(_CHAT, encoding="utf-8")
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text('import sys\nsys.modules["bitsandbytes"] = None\n')
    paths = f"{hidden}:{ROOT / 'platform'}:{ROOT}"
    return {"HF_ENDPOINT": _UNREACHABLE, "HF_HOME": str(folder / "hub"), "PYTHONPATH": paths}


@cache
def refusals() -> tuple[Refusal, ...]:
    """Run every command, each several times; the seconds are those of its fastest run."""
    with tempfile.TemporaryDirectory(prefix="refusals-") as scratch:
        folder = Path(scratch)
        env = prepare_folder(folder)
        return tuple(min(_runs(command, folder, env), key=lambda run: run.seconds) for command in COMMANDS)


def _runs(command: str, folder: Path, env: dict[str, str]) -> Iterator[Refusal]:
    for _ in range(_REPEATS):
        started = time.perf_counter()
        with start(f"python -m workloads {command}", folder, env) as process:
            text, _ = process.communicate(timeout=60)
        seconds = time.perf_counter() - started
        ended = outcome(process.returncode, text, folder)
        yield Refusal(command, ended.text, ended.code, seconds)


def slowest_s() -> float:
    """Seconds of the slowest refusal. Raises AssertionError if a command was not refused."""
    for refusal in refusals():
        assert refusal.code == 2, refusal
    return max(refusal.seconds for refusal in refusals())


def table() -> str:
    """The table as Markdown."""
    rows = ["| command | output | seconds |", "| --- | --- | ---: |"]
    for refusal in refusals():
        rows.append(f"{first_cells(refusal.command, refusal.text)} {refusal.seconds:.1f} |")
    return "\n".join(rows)


def first_cells(command: str, text: str) -> str:
    """The cells of a command and of its output."""
    text = text.replace("|", "\\|").replace("python -m workloads.", "parallelmind ")
    cell = f"`` {text} ``" if "`" in text else f"`{text}`"
    return f"| `parallelmind {command}` | {cell} |"


if __name__ == "__main__":
    fill(PAGE, "refusals", table())
