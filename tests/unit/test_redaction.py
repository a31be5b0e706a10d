"""Passwords in URIs are shown and written nowhere, and a run can be resumed without them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from parallelmind.config import TrainConfig, resolve
from parallelmind.config.yaml_file import load_yaml, save_yaml
from parallelmind.errors import UserError
from parallelmind.redaction import has_hidden_part, redact_uri
from parallelmind.remote import RemotePath

SECRETS = {
    "http://ada:PW@host:5000": "http://ada:***@host:5000",
    "https://ada:P@W@host/path": "https://ada:***@host/path",
    "https://PW@host/path": "https://***@host/path",
    "postgresql+psycopg2://ada:P/W@db:5432/mlflow": "postgresql+psycopg2://ada:***@db:5432/mlflow",
    "s3://KEY:PW@bucket/data.jsonl?endpoint_override=localhost:9000": (
        "s3://KEY:***@bucket/data.jsonl?endpoint_override=localhost:9000"
    ),
    "https://host/d.jsonl?X-Amz-Signature=PW&X-Amz-Expires=60": (
        "https://host/d.jsonl?X-Amz-Signature=***&X-Amz-Expires=60"
    ),
    "https://host/d.jsonl?part=1&token=PW": "https://host/d.jsonl?part=1&token=***",
    "https://account.blob/d?sv=1&sig=PW": "https://account.blob/d?sv=1&sig=***",
    "http://ada@example.org:PW@host:5000": "http://ada@example.org:***@host:5000",
    "http://ada:P/W@host:5000": "http://ada:***@host:5000",
    "s3://KEY:P/W/+@bucket/data": "s3://KEY:***@bucket/data",
    "s3:/KEY:PW@bucket/data": "s3:/KEY:***@bucket/data",
    "http://ada:PW@[::1]:5000": "http://ada:***@[::1]:5000",
    "http://h:80,http://ada:PW@host": "http://h:80,http://ada:***@host",
    "cockroachdb://ada:P/W@db/mlflow": "cockroachdb://ada:***@db/mlflow",
    "mssql+pyodbc:///?odbc_connect=UID%3Dada%3BPWD%3DPW": "mssql+pyodbc:///?odbc_connect=***",
    "https://host/d#access_token=PW": "https://host/d#access_token=***",
    "https://host/d?api-key=PW&private_key=PW": "https://host/d?api-key=***&private_key=***",
    "mlflow_uri=http://ada:PW@host: cannot be used (http://ada:PW@host/api)": (
        "mlflow_uri=http://ada:***@host: cannot be used (http://ada:***@host/api)"
    ),
}
PLAIN = (
    "sqlite:///mlflow.db",
    "http://127.0.0.1:5000",
    "s3://bucket/folder?endpoint_override=localhost:9000&scheme=http",
    "postgresql://ada@db/mlflow",
    "http://host:8000/a@b.jsonl?design=3",
    "http://[::1]:8000/a@b.jsonl",
    "file:///data/a:b@c.jsonl",
    "s3://bucket/a:b@c.jsonl",
    "https://host/d?tokenizer=gpt2&max_tokens=5&monkey=1",
    "data/a,b@c.jsonl",
    "mail ada@host, see http://host:80 or ask grace@host",
)


@pytest.mark.parametrize(("uri", "shown"), SECRETS.items())
def test_passwords_tokens_and_signatures_are_hidden(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown
    assert redact_uri(shown) == shown
    assert has_hidden_part(shown)
    assert str(UserError(f"field={uri}: wrong; change it")) == f"field={shown}: wrong; change it"


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text: str) -> None:
    assert redact_uri(text) == text
    assert not has_hidden_part(text)


def test_a_folder_is_shown_without_its_password_and_used_with_it() -> None:
    folder = RemotePath.at("s3://KEY:PW@bucket/runs").child("demo")
    assert str(folder) == "s3://KEY:***@bucket/runs/demo"
    assert folder.location == "s3://KEY:PW@bucket/runs/demo"
    assert str(folder.local).endswith("/copies/s3/KEY:***@bucket/runs/demo")


def test_settings_are_written_without_passwords_and_can_be_used_again(tmp_path: Path) -> None:
    given = {"data_path": "s3://KEY:PW@bucket/data.jsonl", "mlflow_uri": "http://ada:PW@host"}
    config = TrainConfig(**given)
    save_yaml(config, tmp_path / "config.yaml")
    assert "PW" not in (tmp_path / "config.yaml").read_text()
    stored = load_yaml(tmp_path / "config.yaml")
    with pytest.raises(
        UserError, match=r"^data_path=s3://KEY:\*\*\*@.*: passwords are not stored; give data_path"
    ):
        resolve(TrainConfig, stored)
    resumed = resolve(TrainConfig, stored, [f"data_path={given['data_path']}"])
    assert resumed.fingerprint() == config.fingerprint()


def test_the_password_of_mlflow_is_given_again_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallelmind.tracking import absolute_uri

    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    with pytest.raises(
        UserError, match=r"^mlflow_uri=http://ada:\*\*\*@host: passwords are not stored; give"
    ):
        absolute_uri("http://ada:***@host")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "P@/W")
    assert absolute_uri("http://ada:***@host:5000") == "http://ada:P%40%2FW@host:5000"
    assert absolute_uri("postgresql://ada:***@db/mlflow") == "postgresql://ada:P%40%2FW@db/mlflow"


def test_mlflow_and_its_errors_hold_no_password(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    from parallelmind.tracking import Tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = TrainConfig(data_path="https://host/d.jsonl?token=PW", mlflow_uri="http://ada:PW@host")
    tracker = Tracker.start(uri, "tests", "one", config, "key")
    tracker.set_tags({"folder": "s3://KEY:PW@bucket/runs"})
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert "PW" not in f"{run.data.params} {run.data.tags}"
    found = subprocess.run(["grep", "-c", "PW@", tmp_path / "mlflow.db"], capture_output=True, check=False)
    assert found.stdout == b"0\n"
    with pytest.raises(UserError, match=r"^mlflow_uri=nonsense://ada:\*\*\*@host") as caught:
        Tracker.start("nonsense://ada:PW@host", "tests", "one", config, "key")
    assert "PW" not in str(caught.value)


def test_the_log_of_the_server_holds_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    from serving.observability.log import configure_log, log

    configure_log("info")
    log.warning("cannot reach %s", "http://ada:PW@host")
    assert capsys.readouterr().err.endswith("cannot reach http://ada:***@host\n")
