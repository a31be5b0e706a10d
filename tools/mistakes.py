"""The table of docs/mistakes.md: likely mistakes, really made, and what the program says to each.

    python -m tools.mistakes

Every command is run as it stands in the table, in a folder with a tiny model, an adapter on it, and little
data.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.evaluation.tiny_models import tiny_model, tiny_tokenizer
from parallelmind.model.adapter import add_lora, save_adapter
from parallelmind.model.base_model import no_progress_bars
from parallelmind.model.patch import patch
from tools.marked import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mistakes.md"

PORT, DISK = 8000, "disk"
_TRAIN = "python -m workloads.train base_model=tiny data_path=train.jsonl"
_LONG = f"{_TRAIN} name=long max_steps=100000 epochs=100000"
_NOWHERE = "http://127.0.0.1:9"  # the port that discards, if anyone listens there at all
_ENDS_S = 240


@dataclass(frozen=True, slots=True)
class Mistake:
    """around: what has to be so for it to be one, while the command runs in a folder."""

    name: str
    command: str
    around: Callable[[Path], AbstractContextManager[Mapping[str, str]]] = lambda folder: nullcontext({})


@dataclass(frozen=True, slots=True)
class Told:
    """How a command ended and what it printed, with paths as seen from its folder."""

    code: int
    text: str


@contextmanager
def taken(folder: Path) -> Iterator[Mapping[str, str]]:
    """The port of the table in somebody else's hands."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", PORT))
            other.listen()
        except OSError:  # it is in use already
            pass
        yield {}


@contextmanager
def old(folder: Path) -> Iterator[Mapping[str, str]]:
    """A python3 that says it is 3.9, in front of the real one, and what `make` needs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    python = folder / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9)\nexec(sys.argv[2])\n")
    python.chmod(0o755)
    yield {"PATH": f"{python.parent}:{os.environ['PATH']}"}


@contextmanager
def going(folder: Path) -> Iterator[Mapping[str, str]]:
    """The same run, begun before in another window."""
    with begun(_LONG, folder) as other:
        yield {}
        _ctrl_c(other)


def unplugged(folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    return nullcontext({"HF_ENDPOINT": _NOWHERE, "HF_HOME": str(folder / "hub")})


def no_gpu(folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    return nullcontext({"CUDA_VISIBLE_DEVICES": ""})


CTRL_C, FULL = "Ctrl-C", "full disk"
MISTAKES = (
    Mistake("wrong path", "python -m workloads.train data_path=trian.jsonl"),
    Mistake("wrong format", "python -m workloads.train base_model=tiny data_path=questions.csv"),
    Mistake("wrong adapter", "python -m workloads.generate base_model=other lora_path=adapter prompt=Hello"),
    Mistake("no GPU", f"{_TRAIN} use_gpu=true", no_gpu),
    Mistake(
        "no network", "python -m workloads.generate base_model=Qwen/Qwen2.5-0.5B prompt=Hello", unplugged
    ),
    Mistake("old Python", "make demo", old),
    Mistake("port taken", f"python -m serving lora_path=adapter port={PORT}", taken),
    Mistake("two runs at once", _LONG, going),
    Mistake(CTRL_C, _LONG),
    Mistake(FULL, f"{_TRAIN} output_dir={DISK} checkpoint_every=1 max_steps=20"),
)


def prepare(folder: Path) -> None:
    """What the commands name: two models that differ, an adapter on one of them, data, and a table that is
    none.
    """
    tokenizer = tiny_tokenizer()
    with no_progress_bars():
        for name, width in (("tiny", 64), ("other", 128)):
            model = tiny_model("llama", hidden_size=width)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    model = tiny_model("llama")
    patch(model, RopeConfig())
    settings = LoraConfig(lora_rank=2)
    adapted = add_lora(model, settings, seed=0)
    save_adapter(
        adapted, tokenizer, folder / "adapter", ModelConfig(base_model="tiny"), RopeConfig(), settings
    )
    records = ({"input_ids": [5 + number % 20, 6, 7, 8, 9], "answer_offset": 2} for number in range(64))
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "questions.csv").write_text("question,answer\nWhat does Ada eat?,rice\n")


def made(mistake: Mistake, folder: Path) -> Told:
    """Make it."""
    with mistake.around(folder) as setting:
        if mistake.name == CTRL_C:
            return _stopped(mistake.command, folder)
        with _start(mistake.command, folder, setting, full=mistake.name == FULL) as process:
            text, _ = process.communicate(timeout=_ENDS_S)
    return told(process.returncode, text, folder)


@contextmanager
def begun(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A training run that has made its first steps."""
    with _start(command, folder, {}) as process:
        assert process.stdout is not None
        _until(process.stdout, "step ")
        yield process


def _until(lines: IO[str], start: str) -> None:
    if not any(line.startswith(start) for line in lines):
        raise RuntimeError(f"the run ended without {start!r}")


def _stopped(command: str, folder: Path) -> Told:
    """What is printed after Ctrl-C."""
    with begun(command, folder) as process:
        text = _ctrl_c(process)
    return told(process.returncode, text, folder)


def _ctrl_c(process: subprocess.Popen[str]) -> str:
    """As a terminal does it: to all that the command has started, too. Returns what is printed from then
    on.
    """
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=_ENDS_S)[0]


def _start(
    command: str, folder: Path, setting: Mapping[str, str], full: bool = False
) -> subprocess.Popen[str]:
    """full: the folder DISK holds half a megabyte and no more, for this process alone."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if full:
        (folder / DISK).mkdir()
        mount = f'mount -t tmpfs -o size=500k none {DISK} && exec "$@"'
        words = ["unshare", "-rm", "sh", "-c", mount, "sh", *words]
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # this may be a part of `make`
    setting = {**kept, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", **setting}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=folder, env=setting, start_new_session=True, **pipes)  # type: ignore[call-overload]


def told(code: int, text: str, folder: Path) -> Told:
    """Without steps that were on their way, and what make adds."""
    kept = re.sub(r"^(step \d+/|make: \*\*\*).*\n", "", text, flags=re.MULTILINE)
    return Told(code, kept.replace(f"{folder.resolve()}/", "").strip())


def row(mistake: Mistake, said: Told) -> str:
    """One line of the table."""
    lines = "<br>".join(map(_code, said.text.replace("|", "\\|").splitlines()))
    return f"| {mistake.name} | {_code(mistake.command)} | {lines} | {said.code} |"


def _code(text: str) -> str:
    """In Markdown."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def rows() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mistakes-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        for mistake in MISTAKES:
            print(mistake.name, file=sys.stderr, flush=True)
            yield row(mistake, made(mistake, folder))


if __name__ == "__main__":
    fill(
        PAGE,
        "mistakes",
        "\n".join(
            ["| mistake | command | what it says | exit code |", "| --- | --- | --- | ---: |", *rows()]
        ),
    )
