"""Fields of an application, strictness of request schemas, autoscaling, and the metrics exposition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from ray.serve.config import AutoscalingContext

import serving
from parallelmind.engine.scheduler import EngineStats, PrefillKind
from parallelmind.errors import UserError
from serving.config import AppConfig, ServerConfig
from serving.engine.autoscaling import BranchLoadPolicy
from serving.observability.metrics import (
    EngineMetrics,
    IngressMetrics,
    ProcessMetrics,
    engine_up,
    render_metrics,
)
from serving.protocol.branches import BranchesRequest
from serving.protocol.openai import ChatRequest, CompletionRequest

SHARES: dict[PrefillKind, float] = {"main": 0.5, "document": 0.75, "branch": 0.25, "preempted": 1.0}


def config(**values: Any) -> AppConfig:
    return AppConfig.of({"base_model": "tiny", **values})


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"base_model": None}, ["lora_path", "required", "base_model="]),
        ({"base_model": ""}, ['base_model=""']),
        ({"max_request": 5}, ["max_request:", "did you mean max_requests?", "--help"]),
        ({"max_branches": 257}, ["max_branches=257", "256"]),
        ({"max_requests": "many"}, ["max_requests=many", "integer"]),
        ({"min_replicas": 3, "max_replicas": 2}, ["max_replicas=2", "min_replicas=3"]),
        ({"min_replicas": 2}, ["max_replicas=1", "min_replicas=2"]),
        ({"adapters": {"legal:v2": "x"}}, ["adapters.legal:v2", "colon"]),
        ({"adapters": {"a/b": "x"}}, ["adapters.a/b", "slash"]),
        ({"adapters": {"base": "x"}}, ["adapters.base", "taken"]),
        ({"adapters": {"tiny": "x"}}, ["adapters.tiny", "taken"]),
        ({"lora_path": "adapters/base"}, ["served_name=base", "another served_name"]),
        ({"lora_path": "a", "served_name": "base"}, ["served_name=base", "another served_name"]),
        ({"slow_client_s": 0}, ["slow_client_s=0", "greater than 0"]),
        ({"log_level": "loud"}, ["log_level=loud", "'warning'"]),
    ],
)
def test_an_error_names_field_value_and_remedy(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config(**values)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_numbers_may_be_given_as_text() -> None:
    application = config(
        max_requests="5", slow_client_s="0.5", trust_remote_code="true", rope_2d_ratio="0", min_replicas="0"
    )
    assert (application.limits.max_requests, application.limits.slow_client_s) == (5, 0.5)
    assert (application.model.trust_remote_code, application.model.rope_2d_ratio) == (True, 0)
    assert application.replicas.min_replicas == 0


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("adapters", "{legal: runs/legal}", {"legal": "runs/legal"}),
        ("adapters", "", {}),
        ("cors_origins", "[http://localhost]", ["http://localhost"]),
    ],
)
def test_lists_and_mappings_may_be_given_as_text(field: str, text: str, value: Any) -> None:
    """`serve run serving.app:build` passes text only."""
    assert config(**{field: text}).model_dump()[field] == value


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"base_model": "smollm2-135m"}, "smollm2-135m"),
        ({"base_model": "org/model"}, "org/model"),
        ({"base_model": "/secret/place/model"}, "model"),
        ({"lora_path": "/secret/place/demo-1a2b/adapter"}, "demo-1a2b"),
        ({"lora_path": "runs/demo-1a2b/adapter/"}, "demo-1a2b"),
        ({"lora_path": "/secret/place/legal"}, "legal"),
        ({"lora_path": "adapter"}, "adapter"),
        ({"lora_path": "runs/demo/adapter", "served_name": "mine"}, "mine"),
    ],
)
def test_a_model_is_named_after_its_run_and_never_after_a_path(values: dict[str, Any], name: str) -> None:
    assert config(**values).model.name == name


def test_names_lists_every_model_once() -> None:
    assert config(adapters={"legal": "x", "medical": "y"}).names == [
        "tiny",
        "base",
        "base:legal",
        "base:medical",
    ]
    assert config(served_name="base").names == ["base"]


def test_an_adapter_is_located_by_its_name_in_the_root(tmp_path: Path) -> None:
    for name in ("run/adapter", "plain"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "parallelmind.json").touch()
    (tmp_path / "empty").mkdir()
    application = config(adapter_root=str(tmp_path), adapters={"plain": "elsewhere"})
    assert application.adapter_sources.locate("base:run") == str(tmp_path / "run/adapter")
    assert application.adapter_sources.locate("base:plain") == "elsewhere"  # named ones come first
    assert config(adapter_root=str(tmp_path)).adapter_sources.locate("base:plain") == str(tmp_path / "plain")
    assert (
        application.adapter_sources.locate("base:empty"),
        application.adapter_sources.locate("base:none"),
        config().adapter_sources.locate("base:run"),
    ) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    "name", ["../out", "..", ".", "", "a/b", "/{root}/out", ".hidden", "in\n", "in\0", "./in", "in/"]
)
def test_a_name_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    for folder in ("out", "root", "root/in", "root/a/b", "root/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "parallelmind.json").touch()
    served = config(adapter_root=str(tmp_path / "root"))
    assert served.adapter_sources.locate("base:in")
    name = name.replace("/{root}", str(tmp_path))
    assert (served.adapter_sources.locate(f"base:{name}"), served.adapter_sources.locate(name)) == (
        None,
        None,
    )


@pytest.mark.parametrize("name", ["x" * 300, "漢" * 100])
def test_a_name_that_is_too_long_for_a_folder_is_unknown(tmp_path: Path, name: str) -> None:
    """The second has few characters and too many bytes."""
    assert config(adapter_root=str(tmp_path)).adapter_sources.locate(f"base:{name}") is None


def test_registry_names_are_served_only_with_a_registry(tmp_path: Path) -> None:
    assert config(adapter_root=str(tmp_path)).adapter_sources.locate("models:/legal@best") is None
    assert (
        config(mlflow_uri="sqlite:///x.db").adapter_sources.locate("models:/legal@best")
        == "models:/legal@best"
    )


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"max_token": 5}),
        (CompletionRequest, {"stream_options": {"usage": True}}),
        (CompletionRequest, {"temperature": "0.5"}),
        (CompletionRequest, {"frequency_penalty": 0.1}),
        (CompletionRequest, {"presence_penalty": float("nan")}),
        (CompletionRequest, {"best_of": 2}),
        (CompletionRequest, {"n": 0}),
        *((CompletionRequest, {"logit_bias": {key: 1}}) for key in ("one", "-1", "1.5", "٣", "", "9" * 5000)),
        (CompletionRequest, {"logit_bias": {"5": "much"}}),
        (CompletionRequest, {"logit_bias": [5]}),
        (ChatRequest, {"messages": []}),
        (ChatRequest, {"messages": [{"role": "tool", "content": "who"}]}),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        (ChatRequest, {"response_format": {"type": "xml"}}),
        (ChatRequest, {"tools": [{"type": "function"}]}),
        (ChatRequest, {"tool_choice": "any"}),
        (ChatRequest, {"chat_template": "{{ messages }}"}),
        (BranchesRequest, {"branches": []}),
        (BranchesRequest, {"branches": [{"text": "a", "n": 2}]}),
        (BranchesRequest, {"n": 2}),
    ],
)
def test_an_unsupported_field_is_refused_and_not_ignored(kind: Any, fields: dict[str, Any]) -> None:
    fine = {"prompt": "who", "messages": [{"role": "user", "content": "who"}], "branches": [{"text": "who"}]}
    body = {"model": "tiny"} | {name: value for name, value in fine.items() if name in kind.model_fields}
    kind(**body)
    with pytest.raises(ValidationError, match=next(iter(fields))):
        kind(**{**body, **fields})


def replicas_for(
    live: Sequence[float], waiting: Sequence[float] = (), requests: float = 0, queued: float = 0
) -> float:
    """Replicas that the policy asks for, at 16 branches each."""
    metrics = {
        name: dict(enumerate(values))
        for name, values in {"live_branches": live, "waiting_branches": waiting}.items()
        if values
    }
    fields: dict[str, Any] = dict.fromkeys(signature(AutoscalingContext).parameters)
    fields |= {
        "total_num_requests": requests,
        "total_queued_requests": queued,
        "aggregated_metrics": metrics,
    }
    return BranchLoadPolicy(16)(AutoscalingContext(**fields))[0]


def test_replicas_follow_branches_and_not_requests() -> None:
    assert replicas_for([32], requests=1) == 2
    assert replicas_for([16, 16], [8, 8], requests=2) == 3
    assert replicas_for([1, 0], requests=1) == 1
    assert replicas_for([4, 4], requests=8) == 1


def test_queued_requests_start_the_first_replica() -> None:
    assert replicas_for([], requests=1, queued=1) == 1
    assert replicas_for([], requests=40, queued=40) == 2.5
    assert replicas_for([], requests=0) == replicas_for([0, 0], [0, 0]) == 0


def parse_exposition(processes: dict[str, ProcessMetrics]) -> dict[str, Any]:
    text = render_metrics({name: metrics.families() for name, metrics in processes.items()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE") == text.count("# HELP") == len(families)
    return families


def test_metrics_of_all_processes_are_one_exposition() -> None:
    ingress = IngressMetrics()
    ingress.requests.labels("/v1/completions", "200").inc(3)
    ingress.tokens.labels('ti"ny\n', "prompt").inc(7)
    ingress.time_to_first_token.labels("tiny").observe(0.03)
    engines = []
    for live in (2, 5):
        engines.append(EngineMetrics(lambda: 1))
        engines[-1].observe_step(0.3, 0.25)
        engines[-1].observe_step(60, 1)
        engines[-1].families_of(EngineStats(2, 3, 1, live, 10, 20, 32, 1024, 4, (2.5, 0.5), 0.5, SHARES))
    families = parse_exposition({"front": ingress, "one": engines[0], "two": engines[1]})
    samples = [part for family in families.values() for part in family.samples]
    assert {part.labels["process"] for part in samples} == {"front", "one", "two"}
    assert all(
        part.name.startswith("parallelmind_") and not part.name.endswith("_created") for part in samples
    )
    assert families["parallelmind_requests"].type == "counter"
    read = {(part.name, *sorted(part.labels.items())): part.value for part in samples}
    assert (
        read[
            "parallelmind_requests_total",
            ("process", "front"),
            ("route", "/v1/completions"),
            ("status", "200"),
        ]
        == 3
    )
    assert (
        read["parallelmind_tokens_total", ("kind", "prompt"), ("model", 'ti"ny\n'), ("process", "front")] == 7
    )
    assert [read["parallelmind_live_branches", ("process", name)] for name in ("one", "two")] == [2, 5]
    assert read["parallelmind_oldest_waiting_seconds", ("process", "one")] == 2.5
    assert read["parallelmind_branch_reused_share", ("process", "one")] == 0.25
    assert read["parallelmind_cache_reserved_tokens", ("process", "one")] == 32
    waiting = [
        read["parallelmind_waiting_samples", ("process", "one"), ("seconds", age)] for age in ("0", "1", "5")
    ]
    assert waiting == [2, 1, 0]
    for part, total in (("model", 1.25), ("engine", 59.05)):
        own = [
            sample
            for sample in families["parallelmind_step_seconds"].samples
            if sample.labels["process"] == "two"
        ]
        own = [sample for sample in own if sample.labels["part"] == part]
        buckets = [sample.value for sample in own if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == next(sample.value for sample in own if sample.name.endswith("_count")) == 2
        assert next(sample.value for sample in own if sample.name.endswith("_sum")) == pytest.approx(total)
    assert families["parallelmind_step_seconds"].type == "histogram"


def test_metrics_without_observations_are_valid() -> None:
    families = parse_exposition({"front": IngressMetrics()})
    assert families["parallelmind_open_requests"].samples[0].value == 0
    assert render_metrics({}) == b""


def test_the_dashboard_queries_existing_metrics() -> None:
    families = [*IngressMetrics().families(), *EngineMetrics(lambda: 0).families(), engine_up(True)]
    known = {family.name for family in families}
    queried = set(
        re.findall(
            r"parallelmind_[a-z_]+",
            (Path(serving.__file__).parent / "observability" / "grafana.json").read_text(),
        )
    )
    assert {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in queried} == known


def test_fields_are_flat_outside_and_unique_across_groups() -> None:
    fields = ServerConfig.flat_fields()
    assert config().model_dump().keys() == fields.keys() - {"host", "port", "proxy"}
    assert {
        "base_model",
        "adapters",
        "max_requests",
        "min_replicas",
        "api_keys_file",
        "log_level",
    } <= fields.keys()
    assert not ServerConfig.groups().keys() & fields.keys()
