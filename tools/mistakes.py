"""Table of docs/mistakes.md: common mistakes, run for real, with the output of the program.

    python -m tools.mistakes

Every command runs as printed in the table, in a folder with a tiny model, its adapter, and a little data.
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
from parallelmind.model.hf_compat import no_progress_bars
from parallelmind.model.patch import patch
from tools.marked import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mistakes.md"

PORT, DISK = 8000, "disk"
_TRAIN = "python -m workloads.train base_model=tiny data_path=train.jsonl"
_LONG = f"{_TRAIN} name=long max_steps=100000 epochs=100000"
_UNREACHABLE = "http://127.0.0.1:9"  # the discard port; usually nothing listens there
_TIMEOUT_S = 240


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake and its command. `around` prepares the circumstances and yields environment variables."""

    name: str
    command: str
    around: Callable[[Path], AbstractContextManager[Mapping[str, str]]] = lambda folder: nullcontext({})


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit code and output of a command; paths are relative to its folder."""

    code: int
    text: str


@contextmanager
def port_taken(folder: Path) -> Iterator[Mapping[str, str]]:
    """Another socket listens on PORT."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", PORT))
            other.listen()
        except OSError:  # another process already uses it
            pass
        yield {}


@contextmanager
def old_python(folder: Path) -> Iterator[Mapping[str, str]]:
    """A python3 that reports version 3.9 comes first in PATH. Copies the files that `make` needs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    python = folder / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9)\nexec(sys.argv[2])\n")
    python.chmod(0o755)
    yield {"PATH": f"{python.parent}:{os.environ['PATH']}"}


@contextmanager
def same_run_active(folder: Path) -> Iterator[Mapping[str, str]]:
    """The same run is already training in another process."""
    with training_run(_LONG, folder) as first:
        yield {}
        _ctrl_c(first)


def no_network(folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    """The model hub is unreachable and its cache empty."""
    return nullcontext({"HF_ENDPOINT": _UNREACHABLE, "HF_HOME": str(folder / "hub")})


def no_gpu(folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    """No GPU is visible."""
    return nullcontext({"CUDA_VISIBLE_DEVICES": ""})


CTRL_C, FULL = "Ctrl-C", "full disk"
MISTAKES = (
    Mistake("wrong path", "python -m workloads.train data_path=trian.jsonl"),
    Mistake("wrong format", "python -m workloads.train base_model=tiny data_path=questions.csv"),
    Mistake("wrong adapter", "python -m workloads.generate base_model=other lora_path=adapter prompt=Hello"),
    Mistake("no GPU", f"{_TRAIN} use_gpu=true", no_gpu),
    Mistake(
        "no network", "python -m workloads.generate base_model=Qwen/Qwen2.5-0.5B prompt=Hello", no_network
    ),
    Mistake("old Python", "make demo", old_python),
    Mistake("port taken", f"python -m serving lora_path=adapter port={PORT}", port_taken),
    Mistake("two runs at once", _LONG, same_run_active),
    Mistake(CTRL_C, _LONG),
    Mistake(FULL, f"{_TRAIN} output_dir={DISK} checkpoint_every=1 max_steps=20"),
)


def prepare(folder: Path) -> None:
    """Write the files that the commands name: two tiny models, an adapter, training data, and a CSV file."""
    tokenizer = tiny_tokenizer()
    with no_progress_bars():
        for name, width in (("tiny", 64), ("other", 128)):
            model = tiny_model("llama", hidden_size=width)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    model = tiny_model("llama")
    patch(model, RopeConfig())
    lora = LoraConfig(lora_rank=2)
    adapted = add_lora(model, lora, seed=0)
    save_adapter(adapted, tokenizer, folder / "adapter", ModelConfig(base_model="tiny"), RopeConfig(), lora)
    records = ({"input_ids": [5 + number % 20, 6, 7, 8, 9], "answer_offset": 2} for number in range(64))
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "questions.csv").write_text("question,answer\nWhat does Ada eat?,rice\n")


def run_mistake(mistake: Mistake, folder: Path) -> Outcome:
    """Run the command of a mistake under its circumstances."""
    with mistake.around(folder) as env:
        if mistake.name == CTRL_C:
            return _interrupted(mistake.command, folder)
        with start(mistake.command, folder, env, full=mistake.name == FULL) as process:
            text, _ = process.communicate(timeout=_TIMEOUT_S)
    return outcome(process.returncode, text, folder)


@contextmanager
def training_run(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a training run and wait for its first logged step."""
    with start(command, folder, {}) as process:
        assert process.stdout is not None
        _wait_for_line(process.stdout, "step ")
        yield process


def _wait_for_line(lines: IO[str], prefix: str) -> None:
    if not any(line.startswith(prefix) for line in lines):
        raise RuntimeError(f"the run ended without a line that starts with {prefix!r}")


def _interrupted(command: str, folder: Path) -> Outcome:
    """Press Ctrl-C during a training run; return the output from then on."""
    with training_run(command, folder) as process:
        text = _ctrl_c(process)
    return outcome(process.returncode, text, folder)


def _ctrl_c(process: subprocess.Popen[str]) -> str:
    """Send SIGINT to the process group, as a terminal does; return the output from then on."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=_TIMEOUT_S)[0]


def start(command: str, folder: Path, env: Mapping[str, str], full: bool = False) -> subprocess.Popen[str]:
    """Start a command. With `full`, the folder DISK is a 500 KB file system, visible to this process only."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if full:
        (folder / DISK).mkdir()
        mount = f'mount -t tmpfs -o size=500k none {DISK} && exec "$@"'
        words = ["unshare", "-rm", "sh", "-c", mount, "sh", *words]
    # Drop the variables of an outer `make`, because one command is itself a `make`.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env = {**inherited, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=folder, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload]


def outcome(code: int, text: str, folder: Path) -> Outcome:
    """Build an outcome without step lines and make's own line, with paths relative to the folder."""
    text = re.sub(r"^(step \d+/|make: \*\*\*).*\n", "", text, flags=re.MULTILINE)
    return Outcome(code, text.replace(f"{folder.resolve()}/", "").strip())


def row(mistake: Mistake, result: Outcome) -> str:
    """Return one line of the table."""
    lines = "<br>".join(map(_code, result.text.replace("|", "\\|").splitlines()))
    return f"| {mistake.name} | {_code(mistake.command)} | {lines} | {result.code} |"


def _code(text: str) -> str:
    """Return text as Markdown inline code."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def rows() -> Iterator[str]:
    """Run every mistake and yield its line of the table."""
    with tempfile.TemporaryDirectory(prefix="mistakes-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        for mistake in MISTAKES:
            print(mistake.name, file=sys.stderr, flush=True)
            yield row(mistake, run_mistake(mistake, folder))


if __name__ == "__main__":
    fill(
        PAGE,
        "mistakes",
        "\n".join(["| mistake | command | output | exit code |", "| --- | --- | --- | ---: |", *rows()]),
    )
