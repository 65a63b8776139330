"""What a server is doing, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mateconv_jax.inference.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine, max_batch: int):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, max_batch))
        self.requests = Counter("mateconv_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self.refusals = Counter("mateconv_refusals", "Refused requests by reason", ["reason"], registry=self.registry)
        self.first_token = Histogram(
            "mateconv_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=self.registry
        )
        self.between_tokens = Histogram(
            "mateconv_between_tokens_seconds", "Mean of an answer", buckets=SECONDS, registry=self.registry
        )
        self.duration = Histogram("mateconv_request_seconds", "Answered requests", buckets=SECONDS, registry=self.registry)


class _EngineCollector:
    """Reads the engine's own counts when asked."""

    def __init__(self, engine: Engine, max_batch: int):
        self._engine, self._max_batch = engine, max_batch

    def collect(self) -> Iterable[Metric]:
        counters = self._engine.counters
        yield GaugeMetricFamily("mateconv_queue", "Requests that wait for a slot", self._engine.n_waiting)
        yield GaugeMetricFamily("mateconv_slots_active", "Slots that are answering", self._engine.n_active)
        yield GaugeMetricFamily("mateconv_slots", "Slots", self._max_batch)
        yield CounterMetricFamily("mateconv_new_tokens", "Generated tokens", counters.new_tokens)
        yield CounterMetricFamily("mateconv_prompt_tokens", "Tokens of prompts", counters.prompt_tokens)
        yield CounterMetricFamily("mateconv_reused_tokens", "Of these, not read again", counters.reused_tokens)
        yield CounterMetricFamily("mateconv_dispatches", "Decode dispatches", counters.dispatches)
        yield CounterMetricFamily("mateconv_failed_dispatches", "Dispatches that failed", counters.failed_dispatches)
