"""A reader's folder: the project, the small files that pages speak of, tiny models under the names of large
ones, a cluster.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clusters
import torch
from docs import ROOT, Block
from processes import kill
from resident import ask
from servers import save_talker

from parallelmind.model.base_model import smollm2_folder
from serving.runtime.ports import free_port

_FOLDERS = "platform workloads serving experiments tools benchmarks".split()
_LOOSE = "Makefile pyproject.toml constraints.txt runtime_env.yaml .gitignore".split()
_WORDS = "python make ray serve pip docker kubectl".split()
_ASK = '#!/bin/sh\nexec {python} -SE {here}/resident.py ask {word} "$@"\n'
_HUB = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
# what a block exports is there in the next one
_KEEP = "trap \"export -p > '$READER_EXPORTS'\" EXIT\nset -eo pipefail\n"
_BLOCK_S = 280
# In place of the package `datasets` and of the hub.
_DATASETS = """
def load_dataset(name, subset, split, streaming):
    assert (name, subset, split, streaming) == ("openai/gsm8k", "main", "train", True)
    return [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(4)]
"""
_SWEEP = """
from workloads.common.read_config import read_config
from workloads.sweep.config import SweepConfig

def config():
    return read_config(SweepConfig, ["SWEEP.yaml"])
"""


class Reader:
    """Runs what pages print, with what is to be filled in filled in."""

    def __init__(self, folder: Path, dashboard: str, env: dict[str, str]) -> None:
        self.folder, self._dashboard, self._env = folder, dashboard, env
        self._done = dict[str, str]()

    def begin(self) -> None:
        """A page. What others have left in the files that all of them write to would be gone on with."""
        for left in self.folder.glob("out*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def run(self, block: Block) -> str:
        """The output of a block of its page; the same block again is not repeated. Raises AssertionError if
        it fails.
        """
        if block.language == "bash" and block.text in self._done:
            return self._done[block.text]
        place, text = str(block.file.relative_to(ROOT)), self.filled(block.text)
        if block.language == "bash":
            self._done[block.text] = output = self.shell(text, place)
        else:
            output = self.python(text, place)
        return output

    def shell(self, text: str, page: str = "", **env: str) -> str:
        exports = self.folder.parent / f"{page.replace('/', '-')}.sh" if page else Path(os.devnull)
        before = exports.read_text() if exports.exists() else ""
        done = subprocess.run(
            ["bash", "-c", before + _KEEP + text],
            cwd=self.folder,
            env={**self._env, "READER_EXPORTS": str(exports), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BLOCK_S,
            check=False,
        )
        assert done.returncode == 0, f"{page}: exit {done.returncode}\n{text}\n{done.stdout[-6000:]}"
        return done.stdout

    def python(self, text: str, page: str) -> str:
        if experiment := re.match(r"# (experiments/\w+\.py)\n", text):
            (self.folder / experiment[1]).write_text(text, encoding="utf-8")
            return ""
        if f":{self._env['READER_PORT']}" in text:
            self.shell("make serve", FRESH="1")
        code, output = ask(self._env["READER_SOCKET"], {"page": page, "text": text})
        assert code == 0, f"{page}:\n{text}\n{output[-6000:]}"
        return output

    def filled(self, text: str) -> str:
        """With real folders, this cluster's port and this machine's accelerators in place of what the page
        says.
        """
        for name in dict.fromkeys(re.findall(r"runs/(\w+)-HASH", text)):
            text = text.replace(f"runs/{name}-HASH", self.newest(name))
        if not torch.cuda.is_available():
            text = text.replace("use_gpu=true", "use_gpu=false")
        return text.replace("http://127.0.0.1:8265", self._dashboard).replace(
            ":8000", f":{self._env['READER_PORT']}"
        )

    def newest(self, name: str) -> str:
        """A run's folder. Where there is none yet, demo is made, and NAME is one whose adapter can be
        merged.
        """
        made = {
            "demo": "make demo",
            "NAME": "python -m workloads.train CONFIG.yaml name=plain rope_2d_ratio=0",
        }
        found = "plain" if name == "NAME" else name
        if name in made and not list(self.folder.glob(f"runs/{found}-*/adapter")):
            self.shell(made[name])
        runs = [adapter.parent for adapter in self.folder.glob(f"runs/{found}-*/adapter")]
        return str(max(runs, key=lambda run: run.stat().st_mtime).relative_to(self.folder))


@contextmanager
def reader(place: Path) -> Iterator[Reader]:
    """Below `place`. What it starts is ended at the end of the block."""
    folder = place / "reader"
    _project(folder)
    env = _models(place)
    _files(folder)
    _served(folder)
    (place / "shared").mkdir()
    shutil.copy(folder / "train.jsonl", place / "shared")
    (place / "standing").mkdir()
    (place / "standing" / "datasets.py").write_text(_DATASETS)
    env["PYTHONPATH"] = os.pathsep.join(map(str, (folder / "platform", folder, place / "standing")))
    env |= {"SHARED": str(place / "shared"), "MLFLOW_TRACKING_URI": f"sqlite:///{place}/shared/mlflow.db"}
    python, gcs = Path(sys.executable), free_port()
    with (
        clusters.cluster(python, cpus=4, gcs_port=gcs, **env) as dashboard,
        tempfile.TemporaryDirectory() as sockets,
    ):
        env = clusters.environment(python, **env, READER_SOCKET=f"{sockets}/resident", READER_PORT=_port())
        with _resident(folder, {**env, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}):
            env |= {
                "PATH": f"{folder / '.venv' / 'bin'}:{env['PATH']}",
                "READER_MAKE": str(shutil.which("make")),
            }
            yield Reader(
                folder, dashboard.url, {**env, "HOME": str(place), "RAY_API_SERVER_ADDRESS": dashboard.url}
            )


def _port() -> str:
    """Of servers: 8000, as on the pages, unless it is taken."""
    with socket.socket() as probe:
        return str(free_port()) if probe.connect_ex(("127.0.0.1", 8000)) == 0 else "8000"


@contextmanager
def _resident(folder: Path, env: dict[str, str]) -> Iterator[None]:
    line = [sys.executable, str(ROOT / "tests" / "resident.py"), "stay", env["READER_SOCKET"]]
    with open(folder.parent / "resident.log", "wb") as log:
        process = subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        while not Path(env["READER_SOCKET"]).exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield
        ask(env["READER_SOCKET"], None)
        assert process.wait(timeout=60) == 0, (folder.parent / "resident.log").read_text()
    finally:
        kill(process.pid)
        process.wait(timeout=60)


def _project(folder: Path) -> None:
    """What pages need of it, in a repository of its own; in its .venv, words that lead to
    tests/resident.py.
    """
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    for name in _LOOSE:
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=reader", "-c", "user.email=reader@localhost", "-c", "commit.gpgsign=false"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a copy"]):
        subprocess.run([*git, *line], cwd=folder, check=True)
    venv.create(folder / ".venv", symlinks=True)
    for word in _WORDS:
        file = folder / ".venv" / "bin" / word
        file.unlink(missing_ok=True)
        file.write_text(_ASK.format(python=sys.executable, here=ROOT / "tests", word=word))
        file.chmod(0o755)
    (folder / ".venv" / ".setup-done").touch()


def _models(place: Path) -> dict[str, str]:
    """The environment in which every model that the pages name is a tiny one."""
    cache, hub = place / "cache", place / "hub"
    save_talker(cache / smollm2_folder().name)
    for name in _HUB:
        model = hub / f"models--{name.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        shutil.copytree(cache / smollm2_folder().name, model / "snapshots" / ("0" * 40))
    return {"PARALLELMIND_CACHE": str(cache), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}


def _files(folder: Path) -> None:
    facts = [("Ada", "rice"), ("Omar", "corn"), ("Vera", "soup"), ("Hugo", "bread")] * 2
    main = " ".join(f"{name} likes {food}." for name, food in facts)
    asked = [{"prompt": f" What does {name} eat?", "completion": f" {food}"} for name, food in facts]
    rows = [{"main": main, "branches": asked}] * 16
    _lines(folder / "train.jsonl", rows)
    _lines(folder / "held_out.jsonl", rows[:4])
    texts = [{"main": "Vera keeps a goat.", "branches": [" Who?", " What?"]}] * 3
    _lines(folder / "samples.jsonl", texts)
    for name in ("a", "b"):
        _lines(folder / "in" / f"{name}.jsonl.gz", texts)
    _lines(
        folder / "dataset" / "pretrain_hq_split.jsonl",
        [{"text": f"Hugo lives in house {number}."} for number in range(32)],
    )
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    _lines(folder / "chats.jsonl", [{"messages": turns}] * 2)
    answers = {"id": "1", "question": "What does Ada eat?", "answers": [{"text": "rice", "answer_start": 10}]}
    squad = {"data": [{"title": "Food", "paragraphs": [{"context": "Ada likes rice.", "qas": [answers]}]}]}
    (folder / "xquad.en.json").write_text(json.dumps(squad))
    (folder / "alpaca.json").write_text(
        json.dumps([{"instruction": "Name a colour.", "input": "", "output": "Red."}])
    )
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("It was a long evening, and nobody came. " * 40)
    (folder / "keys").write_text("a-key-of-the-reader\n")
    (folder / "adapters").mkdir()
    # Paths are absolute: a job's working directory is a copy.
    data = {"data_path": str(folder / "train.jsonl"), "validation_path": str(folder / "held_out.jsonl")}
    uri = f"sqlite:///{folder.parent}/shared/mlflow.db"
    run: dict[str, Any] = {**data, "max_steps": 2, "mlflow_uri": uri}
    (folder / "CONFIG.yaml").write_text(json.dumps(run))  # JSON is YAML
    sweep = {"name": "mine", "train": run, "space": {"lora_rank": [4, 8]}, "search": "random", "trials": 1}
    (folder / "SWEEP.yaml").write_text(json.dumps(sweep))
    (folder / "experiments" / "SWEEP.py").write_text(_SWEEP)


def _served(folder: Path) -> None:
    """What serving/serve.yaml leaves to whoever uses it: where the project is, and a port beside those of
    other servers.
    """
    file = folder / "serving" / "serve.yaml"
    text = file.read_text().replace("# working_dir: s3://BUCKET", f"working_dir: file://{folder}")
    file.write_text(text.replace("port: 8000", f"port: {free_port()}"))


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
