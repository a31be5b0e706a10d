"""MLflow tracking and model registry. This is the only module that imports mlflow.

One MLflow run per training run, found again by its id. It uses the client and not the fluent API, which keeps
global state and prints to the terminal.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self
from urllib.parse import quote, unquote

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store import db_migrations
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from parallelmind.config import FrozenConfig
from parallelmind.errors import UserError, first_line
from parallelmind.ray_env import MLFLOW_FAIL_FAST_ENV, set_env_defaults
from parallelmind.redaction import HIDDEN, has_hidden_part, redact_uri
from parallelmind.tracking_database import ensure_database

_SQLITE = "sqlite:///"
_KEY_TAG = "run_key"  # identifies a run from its creation on, before its id is written down anywhere
_EXISTS = "RESOURCE_ALREADY_EXISTS"
_ARTIFACT_STORE = "its artifact store refuses"
_MAX_PARAMS_PER_REQUEST = 100  # MLflow's limit
# In the reason: of a file that is no database, or whose upgrade was interrupted.
_DAMAGED = (
    "not a database",
    "malformed",
    "already exists",
    "duplicate column",
    "no such table",
    "no such column",
)

set_env_defaults(MLFLOW_FAIL_FAST_ENV)  # MLflow reads them at every request
for _name in ("alembic", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def absolute_uri(uri: str) -> str:
    """The URI with a relative SQLite path resolved against the current working directory.

    A password that config.yaml does not hold is taken from $MLFLOW_TRACKING_PASSWORD. Raises UserError if it
    is not set.
    """
    if has_hidden_part(uri):
        return _with_password(uri)
    file, (_, mark, query) = sqlite_file(uri), uri.partition("?")
    return f"{sqlite_uri(file)}{mark}{query}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """Absolute path of the SQLite database file; None if the URI names no such file."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    is_file = uri.startswith(_SQLITE) and path and not path.startswith((":", "file:"))
    return Path(unquote(path)).absolute() if is_file else None


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite database file."""
    return _SQLITE + str(file).replace("%", "%25").replace("?", "%3F")


def _with_password(uri: str) -> str:
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if password is None or f":{HIDDEN}@" not in uri:
        raise UserError(
            f"mlflow_uri={uri}: passwords are not stored; give mlflow_uri again, or set "
            "$MLFLOW_TRACKING_PASSWORD to the password"
        )
    return uri.replace(f":{HIDDEN}@", f":{quote(password, safe='')}@", 1)


def _connect(uri: str) -> MlflowClient:
    """A client of the tracking store. The database is created if it is a SQLite file that does not exist."""
    if file := sqlite_file(uri):
        ensure_database(file, _build_database)
    return MlflowClient(uri)


def _build_database(file: Path) -> None:
    """Create all tables and the default experiment."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = sqlite_uri(file)
    SqlAlchemyStore(uri, _artifact_location(uri)).engine.dispose()


class Tracker:
    """One MLflow run. The driver creates it with `start`; workers attach with `Tracker(uri, run_id)`.

    A metric has at most one point per step: steps that a run repeats after an interruption are not logged.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = _connect(uri)

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        name: str,
        config: FrozenConfig,
        key: str,
        parent_run_id: str | None = None,
    ) -> Self:
        """Resume the run tagged `key`, or create it; creates the database if needed.

        uri: absolute (see `absolute_uri`). config: its fields become parameters, its fingerprint the tag
        `config_hash`. Raises UserError if the tracking store cannot be used.
        """
        with store_errors(uri):
            client = _connect(uri)
            experiment_id = _experiment_id(client, uri, experiment)
            run = _find_run(client, experiment_id, key)
            if run is None:
                tags = {"config_hash": config.fingerprint(), _KEY_TAG: key}
                if parent_run_id:
                    tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
                run = client.create_run(experiment_id, run_name=name, tags=tags)
            run_id = run.info.run_id
            client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            # MLflow parameters cannot change: a resumed run keeps those that it was created with.
            fields = config.model_dump(mode="json").items()
            _log_params(client, run_id, {key: value for key, value in fields if key not in run.data.params})
            return cls(uri, run_id)

    @functools.cached_property
    def _last_steps(self) -> dict[str, int]:
        """The last logged step of every metric."""
        return {key: self.metric_history(key)[-1][0] for key in self.metric_names()}

    def log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Log one point per metric. Non-finite values are skipped: SQL stores reject or alter them.

        time_ms: of the points, in ms since 1970; None: now.
        """
        time_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        new = {
            key: value
            for key, value in metrics.items()
            if math.isfinite(value) and step > self._last_steps.get(key, -1)
        }
        if new:
            points = [Metric(key, float(value), time_ms, step) for key, value in new.items()]
            self._client.log_batch(self.run_id, metrics=points)
        self._last_steps.update(dict.fromkeys(new, step))

    def metric_names(self) -> list[str]:
        """Names of all logged metrics, sorted."""
        return sorted(self._client.get_run(self.run_id).data.metrics)

    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, sorted by step."""
        return sorted(
            (point.step, point.value) for point in self._client.get_metric_history(self.run_id, key)
        )

    def log_folder(self, folder: Path, name: str) -> None:
        """Store all files of a folder as artifacts under `name`."""
        with _library_errors():
            self._client.log_artifacts(self.run_id, str(folder), name)

    def log_file(self, path: Path) -> None:
        """Store a file as an artifact."""
        with _library_errors():
            self._client.log_artifact(self.run_id, str(path))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; values are converted to text, without passwords."""
        texts = [RunTag(key, redact_uri(str(value))) for key, value in tags.items()]
        self._client.log_batch(self.run_id, tags=texts)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED. A run that has this status keeps its end time."""
        if self._client.get_run(self.run_id).info.status != status:
            self._client.set_terminated(self.run_id, status)


# ImportError: the driver of the database is not installed.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError, ImportError)


def store_problem(error: BaseException) -> str:
    """Why a tracking store failed, in a few words and without passwords."""
    return redact_uri(_root_reason(error).partition(". ")[0])


@contextmanager
def go_on_without_store(what: str) -> Iterator[None]:
    """Print one line about `what` if the tracking store fails in the with block."""
    try:
        yield
    except STORE_ERRORS as error:
        print(f"mlflow: lacks {what} ({store_problem(error)})", file=sys.stderr, flush=True)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turn errors of the artifact store's own library, such as boto3, into errors of MLflow."""
    try:
        yield
    except STORE_ERRORS:
        raise
    except Exception as error:
        raise MlflowException(f"{_ARTIFACT_STORE}: {first_line(error)}") from error


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn errors of a tracking store into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (*STORE_ERRORS, ValueError) as error:  # ValueError: of a malformed URI
        reason = store_problem(error)
        raise UserError(f"mlflow_uri={uri}: cannot be used ({reason}); {_remedy(uri, reason)}") from error


def _remedy(uri: str, reason: str) -> str:
    """What to do about a tracking store that fails with this reason."""
    file, version = sqlite_file(uri), re.search(r"found version (\w+)", reason)
    if reason.startswith(_ARTIFACT_STORE):
        return "give this process access to it, or use a server that stores artifacts itself"
    if "No module named" in reason:
        return "install that driver, or give sqlite:///FILE"
    if file and "locked" in reason:
        return f"another program writes to {file}: end it, or give another file"
    if file and "readonly" in reason:
        return f"give yourself permission to write to {file}, or give another file"
    is_later = version is not None and not _is_known_schema(version[1])
    if file and (is_later or "Can't locate revision" in reason):
        return "a later MLflow wrote it: use that version, or give another file"
    if file and "out-of-date database schema" in reason:
        return f"an earlier MLflow wrote it: copy {file}, then run `mlflow db upgrade {uri}`"
    if file and any(mark in reason for mark in _DAMAGED):
        return f"{file} is damaged or no MLflow database: restore a copy, remove it, or give another file"
    return "give sqlite:///FILE on a disk with free space, or the http address of a running server"


def _is_known_schema(version: str) -> bool:
    """Whether this MLflow can upgrade a database of that version of its schema."""
    return any((Path(db_migrations.__file__).parent / "versions").glob(f"{version}_*.py"))


def _root_reason(error: BaseException) -> str:
    """First line of the connection error under the wrappers of a failed request, else of `error` itself."""
    root: BaseException | None = error
    while root is not None and not isinstance(root, ConnectionError | TimeoutError | socket.gaierror):
        root = root.__context__
    return first_line(root or error)


def check_store(uri: str, experiment: str) -> bool:
    """Create a run, log to it, read it back and delete it; returns whether it was deleted for good.

    The run belongs to `experiment` if that exists, else to any existing experiment. Raises UserError if the
    tracking store cannot be used.
    """
    with store_errors(uri):
        client = _connect(uri)
        exists = client.get_experiment_by_name(experiment) is not None
        substitutes = [] if exists else client.search_experiments(max_results=1)
        experiment_id = (
            substitutes[0].experiment_id if substitutes else _experiment_id(client, uri, experiment)
        )
        run_id = client.create_run(experiment_id, run_name="doctor").info.run_id
        try:
            _check_round_trip(client, uri, run_id)
        finally:
            client.delete_run(run_id)
        # `delete_run` only marks the run as deleted, until `mlflow gc`. A database store can delete it.
        hard_delete = getattr(client._tracking_client.store, "_hard_delete_run", None)
        if hard_delete:
            hard_delete(run_id)
        return hard_delete is not None


def _check_round_trip(client: MlflowClient, uri: str, run_id: str) -> None:
    """Raise UserError unless the store returns what is logged to a run."""
    client.log_batch(run_id, metrics=[Metric("loss", 1.0, 0, 1)], params=[Param("name", "doctor")])
    stored = client.get_run(run_id).data
    if (stored.metrics, stored.params) != ({"loss": 1.0}, {"name": "doctor"}):
        raise UserError(
            f"mlflow_uri={uri}: returns {stored.metrics} {stored.params}, which is not what was logged; "
            "look into the server's log"
        )


def _find_run(client: MlflowClient, experiment_id: str, key: str) -> Run | None:
    runs = client.search_runs([experiment_id], f"tags.{_KEY_TAG} = '{key}'", max_results=1)
    return runs[0] if runs else None


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment, which is created if needed. Raises UserError if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, _artifact_location(uri))
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise
        return _experiment_id(client, uri, name)  # another process has created it
    if experiment.lifecycle_stage != "active":
        raise UserError(f"mlflow_experiment={name}: is deleted; restore it in MLflow, or choose another name")
    return experiment.experiment_id


def _artifact_location(uri: str) -> str | None:
    """An absolute folder beside a SQLite file, the same for all workers; None leaves it to the server."""
    file = sqlite_file(uri)
    return (file.parent / "mlartifacts").as_uri() if file else None


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    params = [Param(key, redact_uri(str(value))) for key, value in values.items()]
    for start in range(0, len(params), _MAX_PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + _MAX_PARAMS_PER_REQUEST])


class ModelVersion(NamedTuple):
    """A version of a registered model, and the URI of its artifact."""

    version: str
    source: str


def register_model(uri: str, run_id: str, artifact: str, name: str, alias: str) -> str:
    """Register a run's artifact folder as a version of a model and set its alias; returns the version.

    A run that has a version already gets no second one.
    """
    client = _connect(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != _EXISTS:
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if versions:
        version = versions[0].version
    else:
        source = f"runs:/{run_id}/{artifact}"
        version = client.create_model_version(name, source=source, run_id=run_id).version
    client.set_registered_model_alias(name, alias, version)
    return str(version)


def find_model_version(uri: str, model: str) -> ModelVersion:
    """Resolve models:/NAME@ALIAS or models:/NAME/VERSION. Raises UserError if it is not registered."""
    name, at, alias = model.removeprefix("models:/").partition("@")
    client = _connect(uri)
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
        source = client.get_model_version_download_uri(version.name, version.version)
        return ModelVersion(str(version.version), source)
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(
            f"model={model!r}: not in the registry ({first_line(error)}); give models:/NAME@ALIAS"
        ) from error


def artifact_bytes(uri: str, source: str) -> int:
    """Total size of the files of an artifact. Raises UserError if it cannot be read."""
    with _artifact_errors(source):
        return _listed_bytes(uri, source.rstrip("/"))


def _listed_bytes(uri: str, folder: str) -> int:
    return sum(
        _listed_bytes(uri, f"{folder}/{PurePosixPath(item.path).name}")
        if item.is_dir
        else item.file_size or 0
        for item in list_artifacts(artifact_uri=folder, tracking_uri=uri)
    )


def download_artifact(uri: str, source: str, folder: Path) -> Path:
    """Copy an artifact into a folder; returns its path. Raises UserError if it cannot be read."""
    with _artifact_errors(source):
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=uri))


@contextmanager
def _artifact_errors(source: str) -> Iterator[None]:
    try:
        with _library_errors():
            yield
    except STORE_ERRORS as error:
        raise UserError(
            f"model: {source} cannot be fetched ({first_line(error)}); check the artifact store"
        ) from error
