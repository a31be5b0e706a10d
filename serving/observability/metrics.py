"""What Prometheus may know: meters of each process, and all of them together in its text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

from parallelmind.engine.scheduler import EngineStats

_STEP_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_PREFIX = "parallelmind_"

disable_created_metrics()  # they double what is sent, and nobody asks


class Family(NamedTuple):
    """One meter with all its samples (name, labels, value), as it travels between processes."""

    name: str
    meaning: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class Meters:
    """The meters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str, read: Callable[[], float] | None = None) -> Gauge:
        gauge = Gauge(_PREFIX + name, meaning, registry=self._registry)
        if read is not None:
            gauge.set_function(read)
        return gauge

    def _histogram(self, name: str, meaning: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, meaning, labels, buckets=list(buckets), registry=self._registry)

    def families(self) -> list[Family]:
        return [
            Family(
                each.name,
                each.documentation,
                each.type,
                [(part.name, part.labels, part.value) for part in each.samples],
            )
            for each in self._registry.collect()
        ]


class IngressMetrics(Meters):
    """Of a process in front. Times are as a client feels them, but for the network."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self._counter("requests", "answered requests", "route", "status")
        self.refused = self._counter("refused", "requests that were turned away before any work", "reason")
        self.open = self._gauge("open_requests", "requests that are being answered")
        self.tokens = self._counter("tokens", "tokens read and written", "model", "kind")
        self.first = self._histogram(
            "time_to_first_token_seconds", "from request to first token", _FIRST_S, "model"
        )
        self.each = self._histogram(
            "time_per_token_seconds", "between two tokens of a branch", _TOKEN_S, "model"
        )
        self.moved = self._counter("moved_samples", "samples that went on after their engine was lost")
        self.lost = self._counter("lost_samples", "samples that could not go on after their engine was lost")


class EngineMetrics(Meters):
    """Of an engine. Step time is told apart into the model's and all else."""

    def __init__(self, load: Callable[[], EngineStats], adapters: Callable[[], int]) -> None:
        super().__init__()
        self._steps = self._histogram("step_seconds", "one step of the engine", _STEP_S, "part")
        self._gauge("live_branches", "branches that are being decoded", lambda: load().live_branches)
        self._gauge(
            "waiting_branches", "branches that wait for room in the cache", lambda: load().waiting_branches
        )
        self._gauge("waiting_tokens", "prompt tokens still to be read", lambda: load().waiting_tokens)
        self._gauge("cache_tokens", "tokens that the cache can hold", lambda: load().cache_tokens)
        self._gauge("cache_held_tokens", "tokens of cache that somebody needs", lambda: load().held_tokens)
        self._gauge(
            "prefix_reused_share",
            "share of main tokens that were found in the cache",
            lambda: load().reused_share,
        )
        self._gauge("loaded_adapters", "adapters in memory", adapters)

    def stepped(self, total_s: float, model_s: float) -> None:
        self._steps.labels("model").observe(model_s)
        self._steps.labels("engine").observe(total_s - model_s)


class _Found(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def exposition(processes: dict[str, list[Family]]) -> bytes:
    """All meters in Prometheus' text format, each sample labelled with the process it is of."""
    merged: dict[str, Metric] = {}
    for process, families in processes.items():
        for family in families:
            metric = merged.setdefault(family.name, Metric(family.name, family.meaning, family.kind))
            for name, labels, value in family.samples:
                metric.add_sample(name, {**labels, "process": process}, value)
    registry = CollectorRegistry()
    registry.register(_Found(merged.values()))
    return generate_latest(registry)
