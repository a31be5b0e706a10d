"""The clients that run unmodified against this server, and what each of them checks.

`make clients` installs those that are no dependencies of the project.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from parallelmind.storage import cache_dir

_SCRIPTS = Path(__file__).parent
_MAX_RUN_S = 600
# litellm asks a host on the internet for prices otherwise, and Hugging Face's libraries ask the hub.
_OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}


@dataclass(frozen=True, slots=True)
class Server:
    """The server that a client calls. url: with /v1. folder: the model's files."""

    url: str
    model: str
    folder: str


@dataclass(frozen=True, slots=True)
class Client:
    """A client and its script, which ends with 0 if all checks pass.

    checks: what the script checks. argument: passed to the script after the server.
    program: runs the script.
    """

    checks: str
    script: str
    program: Callable[[], Path]
    argument: str = ""

    @property
    def reason(self) -> str | None:
        """Why the client cannot run here."""
        return None if self.program().is_file() else "not installed; run make clients"

    def run(self, server: Server) -> subprocess.CompletedProcess[str]:
        """Run all checks against a server; stdout holds all that the client writes."""
        command = [self.program(), _SCRIPTS / self.script, server.url, server.model, server.folder]
        return subprocess.run(
            [*map(str, command), *filter(None, [self.argument])],
            env={**_without_paths(os.environ), **_OFFLINE, "CLIENTS_NODE": str(node_packages())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_MAX_RUN_S,
            check=False,
        )


def folder() -> Path:
    """Where `make clients` installs."""
    return Path(os.environ.get("CLIENTS") or cache_dir() / "clients")


def _project_python() -> Path:
    return Path(sys.executable)


def client_python() -> Path:
    """The Python of the venv of the clients."""
    return folder() / "bin" / "python"


def _node() -> Path:
    """The node program, if the client for node is installed."""
    installed = node_packages().is_dir()
    return Path(shutil.which("node") or "") if installed else node_packages()


def node_packages() -> Path:
    return folder() / "node" / "node_modules"


def _without_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the project's import paths."""
    return {name: value for name, value in environment.items() if name != "PYTHONPATH"}


_OPENAI = "models, chat, history, completions, echo with log-probabilities, responses, streams, errors"

CLIENTS = {
    "openai": Client(f"{_OPENAI}, classes, tools", "openai_python.py", _project_python, "sync"),
    "openai async": Client(f"{_OPENAI}, classes, tools", "openai_python.py", _project_python, "async"),
    "openai for node": Client(_OPENAI, "openai_node.mjs", _node),
    "litellm": Client(
        "chat, streams, history, completions, responses, its error for a long prompt",
        "litellm_client.py",
        client_python,
    ),
    "langchain-openai": Client(
        "chat, streams, batches, history, log-probabilities, completions, responses, "
        "its error for a long prompt",
        "langchain_client.py",
        client_python,
    ),
    "lm-eval": Client(
        "local-completions: log-likelihoods as in transformers, alone and in batches, rolling ones, texts; "
        "the command of docs/serving.md on a task of options and a task of texts; "
        "local-chat-completions: texts",
        "lm_eval_client.py",
        client_python,
    ),
    "pydantic-ai": Client(
        "conversations, streams, tools and answers of a class, by chat completions and by responses",
        "pydantic_ai_client.py",
        client_python,
    ),
}
