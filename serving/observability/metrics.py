"""Prometheus metrics: those of each process, and the exposition of all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from parallelmind.engine.scheduler import EngineStats, PrefillKind

_STEP_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_PREFIX = "parallelmind_"

disable_created_metrics()  # a `_created` sample per metric would double the exposition


class MetricFamily(NamedTuple):
    """One metric with its samples (name, labels, value), as sent between processes."""

    name: str
    help: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class ProcessMetrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, help, labels, registry=self._registry)

    def _gauge(
        self, name: str, help: str, read: Callable[[], float] | None = None, labels: Sequence[str] = ()
    ) -> Gauge:
        gauge = Gauge(_PREFIX + name, help, labels, registry=self._registry)
        if read is not None:
            gauge.set_function(read)
        return gauge

    def _histogram(self, name: str, help: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, help, labels, buckets=list(buckets), registry=self._registry)

    def families(self) -> list[MetricFamily]:
        return [
            MetricFamily(
                metric.name,
                metric.documentation,
                metric.type,
                [(sample.name, sample.labels, sample.value) for sample in metric.samples],
            )
            for metric in self._registry.collect()
        ]


class IngressMetrics(ProcessMetrics):
    """Metrics of an ingress process. Times are those that a client sees, without the network."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self._counter("requests", "answered HTTP requests", "route", "status")
        self.rejected = self._counter("refused", "requests rejected before any work", "reason")
        self.open_requests = self._gauge("open_requests", "requests being answered")
        self.tokens = self._counter("tokens", "prompt and completion tokens", "model", "kind")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "seconds from the request to its first token",
            _FIRST_TOKEN_BUCKETS_S,
            "model",
        )
        self.time_per_token = self._histogram(
            "time_per_token_seconds", "seconds between two tokens of a branch", _TOKEN_BUCKETS_S, "model"
        )
        self.moved_samples = self._counter(
            "moved_samples", "times that a sample was resumed on another engine after its engine was lost"
        )
        self.lost_samples = self._counter(
            "lost_samples", "samples that no engine could resume after their engine was lost"
        )

    def of_model(self, model: str) -> ModelMetrics:
        """What is counted for a model. Finding a label takes as long as counting: do it once a stream."""
        return ModelMetrics(
            self.tokens.labels(model, "prompt"),
            self.tokens.labels(model, "completion"),
            self.time_to_first_token.labels(model),
            self.time_per_token.labels(model),
        )


class ModelMetrics(NamedTuple):
    """The metrics of an ingress process for one model."""

    prompt_tokens: Counter
    completion_tokens: Counter
    time_to_first_token: Histogram
    time_per_token: Histogram


_KINDS: dict[PrefillKind, str] = {
    "main": "mains",
    "document": "documents",
    "branch": "prompts of branches",
    "preempted": "samples that were preempted",
}
_LOADS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "live_branches": ("branches being decoded", attrgetter("live_branches")),
    "waiting_branches": ("branches waiting for room in the cache", attrgetter("waiting_branches")),
    "waiting_tokens": ("prompt tokens not yet computed", attrgetter("waiting_tokens")),
    "cache_tokens": ("capacity of the KV cache in tokens", attrgetter("cache_tokens")),
    "cache_held_tokens": ("tokens of the KV cache in use", attrgetter("held_tokens")),
    "cache_reserved_tokens": (
        "tokens of the KV cache that running samples still need for their prompts, beyond those in use",
        attrgetter("reserved_tokens"),
    ),
    "oldest_waiting_seconds": (
        "seconds since the oldest sample that waits for room in the cache was submitted",
        lambda stats: max(stats.waiting_s, default=0),
    ),
    "preemptions": (
        "times that a running sample has lost its cache blocks to an older one",
        attrgetter("preemptions"),
    ),
    "prefix_reused_share": (
        "share of all tokens to prefill that were found in the prefix cache",
        attrgetter("reused_share"),
    ),
    **{
        f"{kind}_reused_share": (
            f"prefix_reused_share of {name}",
            lambda stats, kind=kind: stats.reused_share_by_kind[kind],  # type: ignore[misc]
        )
        for kind, name in _KINDS.items()
    },
    "documents_read": (
        "documents whose keys and values were read from the document cache",
        attrgetter("documents_read"),
    ),
    "documents_written": (
        "documents whose keys and values were written to the document cache",
        attrgetter("documents_written"),
    ),
}
_WAITING_AGES_S = (0, 1, 5, 30)


class EngineMetrics(ProcessMetrics):
    """Metrics of an engine process."""

    def __init__(self, num_adapters: Callable[[], int]) -> None:
        super().__init__()
        self._steps = self._histogram(
            "step_seconds",
            "seconds of one engine step, in the model and outside of it",
            _STEP_BUCKETS_S,
            "part",
        )
        self._loads = {name: self._gauge(name, help) for name, (help, _) in _LOADS.items()}
        self._waiting = self._gauge(
            "waiting_samples",
            "samples that have waited for room in the cache at least this long",
            labels=["seconds"],
        )
        self._gauge("loaded_adapters", "adapters in memory", num_adapters)

    def observe_step(self, total_s: float, model_s: float) -> None:
        self._steps.labels("model").observe(model_s)
        self._steps.labels("engine").observe(total_s - model_s)

    def families_of(self, stats: EngineStats) -> list[MetricFamily]:
        """The metrics, with this load of the engine."""
        for name, (_, read) in _LOADS.items():
            self._loads[name].set(read(stats))
        for age in _WAITING_AGES_S:
            self._waiting.labels(str(age)).set(sum(waited >= age for waited in stats.waiting_s))
        return self.families()


def engine_up(answers: bool) -> MetricFamily:
    """Whether an engine process has answered in time, for the exposition of all processes."""
    name = f"{_PREFIX}engine_up"
    return MetricFamily(name, "1 if the engine answers, 0 if not", "gauge", [(name, {}, float(answers))])


class _CollectedMetrics(Collector):
    """Metrics that are already collected, for a registry."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def render_metrics(processes: dict[str, list[MetricFamily]]) -> bytes:
    """All metrics in Prometheus' text format; the label `process` names the process of each sample."""
    merged: dict[str, Metric] = {}
    for process, families in processes.items():
        for family in families:
            metric = merged.setdefault(family.name, Metric(family.name, family.help, family.kind))
            for name, labels, value in family.samples:
                metric.add_sample(name, {**labels, "process": process}, value)
    registry = CollectorRegistry()
    registry.register(_CollectedMetrics(merged.values()))
    return generate_latest(registry)
