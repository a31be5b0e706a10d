"""A scratch folder in which the blocks of the pages run.

It holds a copy of the project, the small files that pages name, and tiny models under the names of large
ones. Programs in it are connected to a Ray cluster.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
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

from parallelmind.model.smollm2 import smollm2_folder
from serving.runtime.ports import free_port

_PROJECT_FOLDERS = "platform workloads serving experiments tools benchmarks".split()
_PROJECT_FILES = "Makefile pyproject.toml constraints.txt runtime_env.yaml .gitignore".split()
_PROGRAMS = "python parallelmind make ray serve pip docker kubectl lm_eval wandb hf".split()
_ASK = '#!/bin/sh\nexec {python} -SE {here}/resident.py ask {word} "$@"\n'
_HUB = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
# Variables that a block exports are set in the next block of the page.
_PROLOGUE = "trap \"export -p > '$READER_EXPORTS'\" EXIT\nset -eo pipefail\n"
_BLOCK_S = 280
# Stands in for the package `datasets` and the hub. transformers asks whether data is a Dataset.
_DATASETS = """
class Dataset:
    pass

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
    """Runs blocks of pages after replacing placeholders such as runs/NAME-HASH."""

    def __init__(self, folder: Path, dashboard: str, env: dict[str, str]) -> None:
        self.folder, self._dashboard, self._env = folder, dashboard, env
        self._outputs = dict[str, str]()

    def begin_page(self) -> None:
        """Delete outputs of other pages, which commands of this page would otherwise resume."""
        for output in self.folder.glob("out*"):
            shutil.rmtree(output) if output.is_dir() else output.unlink()

    def run(self, block: Block) -> str:
        """Run a block and return its output; an identical Bash block is not run again.

        Raises:
            AssertionError: The block fails.
        """
        if block.language == "bash" and block.text in self._outputs:
            return self._outputs[block.text]
        page, text = str(block.file.relative_to(ROOT)), self.filled(block.text)
        if block.language == "bash":
            self._outputs[block.text] = output = self.shell(text, page)
        else:
            output = self.python(text, page)
        return output

    def shell(self, text: str, page: str = "", **env: str) -> str:
        exports = self.folder.parent / f"{page.replace('/', '-')}.sh" if page else Path(os.devnull)
        exported = exports.read_text() if exports.exists() else ""
        completed = subprocess.run(
            ["bash", "-c", exported + _PROLOGUE + text],
            cwd=self.folder,
            env={**self._env, "READER_EXPORTS": str(exports), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BLOCK_S,
            check=False,
        )
        assert completed.returncode == 0, (
            f"{page}: exit {completed.returncode}\n{text}\n{completed.stdout[-6000:]}"
        )
        return completed.stdout

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
        """Replace run folders, cluster address, port and GPU settings by those of this machine."""
        for name in dict.fromkeys(re.findall(r"runs/(\w+)-HASH", text)):
            text = text.replace(f"runs/{name}-HASH", self.newest(name))
        if not torch.cuda.is_available():
            text = text.replace("use_gpu=true", "use_gpu=false")
        return text.replace("http://127.0.0.1:8265", self._dashboard).replace(
            ":8000", f":{self._env['READER_PORT']}"
        )

    def newest(self, name: str) -> str:
        """Return the newest folder of a run; create the run if there is none.

        NAME stands for a run whose adapter can be merged, and that two workers can resume.
        """
        commands = {
            "demo": "make demo",
            "NAME": "python -m workloads.train CONFIG.yaml name=plain rope_2d_ratio=0 global_batch_size=8",
        }
        run_name = "plain" if name == "NAME" else name
        if name in commands and not list(self.folder.glob(f"runs/{run_name}-*/adapter")):
            self.shell(commands[name])
        runs = [adapter.parent for adapter in self.folder.glob(f"runs/{run_name}-*/adapter")]
        return str(max(runs, key=lambda run: run.stat().st_mtime).relative_to(self.folder))


@contextmanager
def reader(parent: Path) -> Iterator[Reader]:
    """Create the folder below `parent`; end all started processes at the end of the block."""
    folder = parent / "reader"
    _copy_project(folder)
    env = _write_models(parent)
    _write_data(folder)
    _edit_serve_config(folder)
    (parent / "shared" / "data").mkdir(parents=True)
    shutil.copy(folder / "train.jsonl", parent / "shared" / "data")
    (parent / "standing").mkdir()
    (parent / "standing" / "datasets.py").write_text(_DATASETS)
    env["PYTHONPATH"] = os.pathsep.join(map(str, (folder / "platform", folder, parent / "standing")))
    env["WANDB_MODE"] = "offline"
    env |= {"SHARED": str(parent / "shared"), "MLFLOW_TRACKING_URI": f"sqlite:///{parent}/shared/mlflow.db"}
    python, gcs = Path(sys.executable), free_port()
    with (
        clusters.cluster(python, cpus=4, gcs_port=gcs, **env) as dashboard,
        tempfile.TemporaryDirectory() as sockets,
    ):
        env = clusters.environment(
            python, **env, READER_SOCKET=f"{sockets}/resident", READER_PORT=str(free_port())
        )
        with _resident(folder, {**env, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}):
            env |= {
                "PATH": f"{folder / '.venv' / 'bin'}:{env['PATH']}",
                "READER_MAKE": str(shutil.which("make")),
            }
            yield Reader(
                folder, dashboard.url, {**env, "HOME": str(parent), "RAY_API_SERVER_ADDRESS": dashboard.url}
            )


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


def _copy_project(folder: Path) -> None:
    """Copy the project into a new repository; programs in its .venv call tests/resident.py."""
    for name in _PROJECT_FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    for name in _PROJECT_FILES:
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=reader", "-c", "user.email=reader@localhost", "-c", "commit.gpgsign=false"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a copy"]):
        subprocess.run([*git, *line], cwd=folder, check=True)
    venv.create(folder / ".venv", symlinks=True)
    for word in _PROGRAMS:
        file = folder / ".venv" / "bin" / word
        file.unlink(missing_ok=True)
        file.write_text(_ASK.format(python=sys.executable, here=ROOT / "tests", word=word))
        file.chmod(0o755)
    (folder / ".venv" / ".setup-done").touch()


def _write_models(parent: Path) -> dict[str, str]:
    """Write a tiny model under every name on the pages; return the environment that finds them."""
    cache, hub = parent / "cache", parent / "hub"
    save_talker(cache / smollm2_folder().name)
    for name in _HUB:
        model = hub / f"models--{name.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        shutil.copytree(cache / smollm2_folder().name, model / "snapshots" / ("0" * 40))
    return {"PARALLELMIND_CACHE": str(cache), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}


def _write_data(folder: Path) -> None:
    """Write the data files and configurations that the pages name."""
    facts = [("Ada", "rice"), ("Omar", "corn"), ("Vera", "soup"), ("Hugo", "bread")] * 2
    main = " ".join(f"{name} likes {food}." for name, food in facts)
    branches = [{"prompt": f" What does {name} eat?", "completion": f" {food}"} for name, food in facts]
    rows = [{"main": main, "branches": branches}] * 16
    _lines(folder / "train.jsonl", rows)
    _lines(folder / "held_out.jsonl", rows[:4])
    parts = [{"prompt": f"\n{name}", "completion": f": {food}"} for name, food in facts[:4]]
    answer = {"prompt": main + " Who likes what?", "completion": " These", "branches": parts}
    _lines(folder / "trees.jsonl", [{"branches": [answer]}] * 16)
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
    trace = "<Parallel><Path>1: rice</Path><Path>2: corn</Path></Parallel> Both."
    keys = ("question", "deepseek_thinking_trajectory_parallel", "deepseek_attempt")
    (folder / "multiverse-1k.json").write_text(
        json.dumps([dict(zip(keys, ("Which?", trace, "2"), strict=True))])
    )
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


def _edit_serve_config(folder: Path) -> None:
    """Fill in serving/serve.yaml: the location of the project, and a free port."""
    file = folder / "serving" / "serve.yaml"
    text = file.read_text().replace("# working_dir: s3://BUCKET", f"working_dir: file://{folder}")
    file.write_text(text.replace("port: 8000", f"port: {free_port()}"))


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
