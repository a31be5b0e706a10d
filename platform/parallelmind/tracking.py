"""MLflow, and the only file that imports it: one run per training run, found again by its id.

The plain client is used, not the fluent API: no global state, no messages on the terminal.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from parallelmind.config import FrozenConfig
from parallelmind.errors import UserError, first_line

_SQLITE = "sqlite:///"
_KEY = "run_key"  # a tag by which a run is found again, even if its begin was cut short
_PARAMS_AT_ONCE = 100  # MLflow's limit for one request

for _name in ("alembic", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def absolute_uri(uri: str) -> str:
    """The same database from any working directory: a relative SQLite path counts from the current one."""
    file = sqlite_file(uri)
    return f"{_SQLITE}{file}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """Where the database lies, absolute, if it is one in a file."""
    path = uri.removeprefix(_SQLITE)
    return None if path == uri or path.startswith(":") or not path else Path(path).absolute()


class Tracker:
    """One MLflow run. Create it in the driver; workers attach with `Tracker(uri, run_id)`.

    No metric gets two points at one step: what a run repeats after an interruption is left out.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, config: FrozenConfig, key: str, parent: str | None = None
    ) -> Self:
        """Create the database if need be, then go on with the run tagged `key`, else begin one.

        uri: absolute (see `absolute_uri`). config: its fields become parameters, its fingerprint the tag
        `config_hash`. parent: id of the run that it is a child of. Raises UserError if the tracking store
        cannot be used.
        """
        with _told(uri):
            client = MlflowClient(uri)
            experiment_id = _experiment_id(client, uri, experiment)
            found = client.search_runs([experiment_id], f"tags.{_KEY} = '{key}'", max_results=1)
            tags = {"config_hash": config.fingerprint(), _KEY: key} | (
                {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
            )
            run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=tags)
            client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            # A run that is gone on with elsewhere keeps the workers and the like that it began with on
            # record.
            new = {
                key: value
                for key, value in config.model_dump(mode="json").items()
                if key not in run.data.params
            }
            _log_params(client, run.info.run_id, new)
            return cls(uri, run.info.run_id)

    @functools.cached_property
    def _logged(self) -> dict[str, int]:
        """The last step of every metric."""
        return {key: self.metric_history(key)[-1][0] for key in self.metric_names()}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point per metric; values that are not finite are left out (MLflow's SQL store would refuse or
        bend them).
        """
        now = time.time_ns() // 1_000_000
        new = {
            key: value
            for key, value in metrics.items()
            if math.isfinite(value) and step > self._logged.get(key, -1)
        }
        if new:
            points = [Metric(key, float(value), now, step) for key, value in new.items()]
            self._client.log_batch(self.run_id, metrics=points)
        self._logged.update(dict.fromkeys(new, step))

    def metric_names(self) -> list[str]:
        return sorted(self._client.get_run(self.run_id).data.metrics)

    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, by step."""
        return sorted(
            (point.step, point.value) for point in self._client.get_metric_history(self.run_id, key)
        )

    def log_folder(self, folder: Path, name: str) -> None:
        """Store every file of a folder as artifacts under `name`."""
        self._client.log_artifacts(self.run_id, str(folder), name)

    def log_file(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def finish(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED. A run that has ended so before keeps its time."""
        if self._client.get_run(self.run_id).info.status != status:
            self._client.set_terminated(self.run_id, status)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """What keeps a tracking store from being used becomes one line."""
    try:
        yield
    except (
        MlflowException,
        SQLAlchemyError,
        OSError,
        ImportError,
    ) as error:  # the last where a database has no driver here
        reason = _root_reason(error).partition(". ")[0]
        remedy = "give sqlite:///FILE where there is room, or the http address of a server that runs"
        raise UserError(f"mlflow_uri={uri}: cannot be used ({reason}); {remedy}") from error


def _root_reason(error: BaseException) -> str:
    """Of a request that got no answer, what the system said, which lies under four wrappers that repeat the
    request.
    """
    root: BaseException | None = error
    while root is not None and not isinstance(root, ConnectionError | TimeoutError | socket.gaierror):
        root = root.__context__
    return first_line(root or error)


def check_store(uri: str, experiment: str) -> bool:
    """Begin a run, log to it, read that back and remove the run; returns whether no trace of it is left.

    It goes into the experiment if that is there, else into any other. Raises UserError if the tracking store
    cannot be used.
    """
    with _told(uri):
        client = MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        others = [] if known else client.search_experiments(max_results=1)
        experiment_id = others[0].experiment_id if others else _experiment_id(client, uri, experiment)
        run_id = client.create_run(experiment_id, run_name="doctor").info.run_id
        try:
            client.log_batch(run_id, metrics=[Metric("loss", 1.0, 0, 1)], params=[Param("name", "doctor")])
            found = client.get_run(run_id).data
            if (found.metrics, found.params) != ({"loss": 1.0}, {"name": "doctor"}):
                raise UserError(
                    f"mlflow_uri={uri}: gives back {found.metrics} {found.params}; look into the server's log"
                )
        finally:
            client.delete_run(run_id)
        # A deleted run stays in the store, unseen, until `mlflow gc`; only a database lets its client do the
        # same.
        remove = getattr(client._tracking_client.store, "_hard_delete_run", None)
        if remove:
            remove(run_id)
        return remove is not None


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(
            f"mlflow_experiment={name}: was deleted there; restore it in MLflow, or choose another name"
        )
    return found.experiment_id if found is not None else client.create_experiment(name, _artifacts(uri))


def _artifacts(uri: str) -> str | None:
    """Beside a SQLite file, absolute, so that workers anywhere on the machine agree; a server has its own
    place.
    """
    file = sqlite_file(uri)
    return (file.parent / "mlartifacts").as_uri() if file else None


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    params = [Param(key, str(value)) for key, value in values.items()]
    for first in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])


class ModelVersion(NamedTuple):
    """A version of a registered model, and the artifact that it is."""

    version: str
    source: str


def register_model(uri: str, run_id: str, artifact: str, name: str, alias: str) -> str:
    """Make a run's folder a version of a registered model, unless it is one, and give it an alias; returns
    the version.
    """
    client = MlflowClient(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    found = (
        known[0]
        if known
        else client.create_model_version(name, source=f"runs:/{run_id}/{artifact}", run_id=run_id)
    )
    version = found.version
    client.set_registered_model_alias(name, alias, version)
    return str(version)


def find_model_version(uri: str, model: str) -> ModelVersion:
    """What models:/NAME@ALIAS or models:/NAME/VERSION means now. Raises UserError where nothing has that
    name.
    """
    name, at, alias = model.removeprefix("models:/").partition("@")
    client = MlflowClient(uri)
    try:
        if at:
            found = client.get_model_version_by_alias(name, alias)
        else:
            name, _, version = name.partition("/")
            found = client.get_model_version(name, version)
        return ModelVersion(
            str(found.version), client.get_model_version_download_uri(found.name, found.version)
        )
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(
            f"model={model!r}: not in the registry ({first_line(error)}); give models:/NAME@ALIAS"
        ) from error


def download_artifact(uri: str, source: str, folder: Path) -> Path:
    """Copy an artifact into a folder; returns where it is. Raises UserError if it cannot be read."""
    try:
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"model: {source} cannot be fetched ({first_line(error)}); check the artifact store"
        ) from error
