"""Weights & Biases: a run beside that of MLflow. This is the only module that imports wandb.

wandb is an optional dependency and takes seconds to import, so it is imported when a run is opened. It is
configured by its own environment variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_DIR, …).
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from parallelmind.errors import UserError
from parallelmind.ray_env import WANDB_ENV, set_env_defaults

_EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}  # 255: as wandb's own after Ctrl-C
_FINISH_TIMEOUT_S = 300.0
_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # values of WANDB_MODE
_NO_PROJECT_NAME = re.compile(r"[/\\#?%:]|^$|.{129}")


@dataclass(frozen=True, slots=True)
class WandbTarget:
    """What a process needs to open a run.

    run_id: the run with this id is resumed if it exists. config: the run's settings, as JSON values.
    folder: wandb writes its files below it, unless WANDB_DIR is set. environment: wandb's variables in the
    driver, with the API key; a worker on another machine may lack them.
    """

    run_id: str
    name: str
    project: str
    group: str | None
    config: Mapping[str, Any]
    folder: Path
    environment: Mapping[str, str] = field(repr=False)


def wandb_project(default: str) -> str:
    """The project of all runs: $WANDB_PROJECT, or the default."""
    return os.environ.get("WANDB_PROJECT") or default


def wandb_environment() -> dict[str, str]:
    """wandb's environment variables, with the API key that `wandb login` has stored."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    key = variables.get("WANDB_API_KEY") or _stored_key()
    return {**variables, "WANDB_API_KEY": key} if key else variables


def check_wandb(experiment: str, is_local: bool) -> None:
    """Raise UserError for what would keep a run from Weights & Biases; imports no wandb.

    experiment: name of the project where WANDB_PROJECT is not set. is_local: whether the workers run on this
    machine, which then needs the package.
    """
    if is_local and find_spec("wandb") is None:
        raise UserError("track=wandb: needs wandb; pip install wandb, or drop track")
    project = wandb_project(experiment)
    if _NO_PROJECT_NAME.search(project):
        raise UserError(
            f"track=wandb: {project} is no name of a project there; set WANDB_PROJECT to one without /\\#?%:"
        )
    environment = wandb_environment()
    needs_key = environment.get("WANDB_MODE") not in _WITHOUT_KEY
    if needs_key and not environment.keys() & {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}:
        raise UserError(
            "track=wandb: no API key; run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def _stored_key() -> str | None:
    """The API key in the netrc file, None if there is none."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        login = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError):  # wandb reads no key from it either
        return None
    return login[2] if login else None


class WandbRun:
    """A run that this process has opened. Its methods hand over to wandb's own process, except `finish`.

    A step that the run already has is not logged again.
    """

    def __init__(self, target: WandbTarget) -> None:
        """Create or resume the run. Raises wandb's own errors, and ImportError without the package."""
        set_env_defaults({**target.environment, **WANDB_ENV})
        import wandb

        target.folder.mkdir(parents=True, exist_ok=True)
        self._artifact_type = wandb.Artifact
        self._name = target.name
        self._run = wandb.init(
            id=target.run_id,
            resume="allow",
            name=target.name,
            project=target.project,
            group=target.group,
            config=dict(target.config),
            dir=os.environ.get("WANDB_DIR") or target.folder,
            settings=wandb.Settings(
                console="off",
                silent=True,
                reinit="create_new",
                use_dot_wandb=True,  # of a run at a URI, only hidden local files stay when it resumes
                finish_timeout=_FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )

    @property
    def place(self) -> str:
        """Where the run is: its URL, or the command that sends an offline run."""
        if self._run.offline:
            return f"offline; wandb sync {self._run.settings.sync_dir} sends it"
        return str(self._run.url)

    def log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        """Log one point per metric. time_ms: of the points, since 1970. Steps must not decrease."""
        if step >= self._run.starting_step:
            self._run.log({**metrics, "_timestamp": time_ms / 1000}, step=step)

    def log_folder(self, folder: Path, name: str) -> None:
        """Store a folder as an artifact of type `model`, which is named after the run and `name`."""
        artifact = self._artifact_type(f"{self._name}-{name}", type="model")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def log_file(self, path: Path) -> None:
        """Store a file."""
        self._run.save(path, base_path=path.parent, policy="now")

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED when all is sent.

        Raises TimeoutError after five minutes.
        """
        self._run.finish(exit_code=_EXIT_CODES[status])
