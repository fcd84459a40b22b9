"""The server's Prometheus metrics, under vLLM's names where the meaning is vLLM's: its dashboards work."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    """Counts and times of one server, in a registry of its own.

    `model_name` labels every series, as vLLM's `model_name`; `engine` is always "0": there is one engine.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        names = tuple(self._labels)
        self._running = self._gauge("num_requests_running", "Requests that the engine computes now.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for room.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.")
        self._preemptions = self._counter("num_preemptions", "Times a running request was put back.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got an answer.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self._next_token = self._histogram(
            "inter_token_latency_seconds", "From one token of a request to the next.", TOKEN_BUCKETS
        )
        self._request = self._histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to its end.", REQUEST_BUCKETS
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*names, "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self._labels, finished_reason=reason)
        self._preempted = 0

    def engine_stats(self, stats: Mapping[str, Any]) -> None:
        """Takes the engine's gauges: running, waiting, kv_usage (0..1), preemptions (total so far)."""
        self._running.set(stats.get("running", 0))
        self._waiting.set(stats.get("waiting", 0))
        self._kv_usage.set(stats.get("kv_usage", 0.0))
        preempted = stats.get("preemptions", 0)
        self._preemptions.inc(max(0, preempted - self._preempted))
        self._preempted = preempted

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A request got its first token `seconds` after it came in."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def tokens(self, count: int, seconds: float | None) -> None:
        """`count` tokens came, `seconds` after those before them (None: they are the first)."""
        self._generation_tokens.inc(count)
        if seconds is not None:
            for _ in range(count):
                self._next_token.observe(seconds / count)

    def finished(self, reason: str, seconds: float) -> None:
        """A request ended after `seconds` because of stop, length, abort or error."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._request.observe(seconds)

    def render(self) -> bytes:
        """The exposition text of all series."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", help, tuple(self._labels), registry=self.registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(f"vllm:{name}", help, tuple(self._labels), registry=self.registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", help, tuple(self._labels), registry=self.registry, buckets=buckets)
        return histogram.labels(**self._labels)
