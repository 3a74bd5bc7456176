"""What the ingress counts, for Prometheus (GET /metrics)."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.limits import Admission

_ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/feedback", "/v1/models", "/v1/versions",
    "/v1/versions/pin", "/v1/versions/rollback", "/health", "/metrics",
)  # fmt: skip
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """Counters of one ingress process; `headrace_serving_` is before each name."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "headrace_serving_requests", "HTTP answers", ["route", "status"], registry=self._registry
        )
        self._tokens = Counter("headrace_serving_tokens", "prompt and response", ["kind"], registry=self._registry)
        self._asked_again = Counter(
            "headrace_serving_asked_again", "requests sent to another replica", ["why"], registry=self._registry
        )
        self._cut = Counter("headrace_serving_cut", "streams that ended with an error", registry=self._registry)
        self._first_token = Histogram(
            "headrace_serving_first_token_seconds",
            "from a request's arrival to the first byte of its answer",
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        waiting = Gauge("headrace_serving_waiting", "requests without a place in an engine", registry=self._registry)
        waiting.set_function(lambda: admission.waiting)
        running = Gauge("headrace_serving_inside", "requests let in and not yet answered", registry=self._registry)
        running.set_function(lambda: admission.inside)
        self._versions = Gauge(
            "headrace_serving_version", "the weights that a slot answers with", ["slot"], registry=self._registry
        )
        self._replicas = Gauge("headrace_serving_replicas", "by slot", ["slot"], registry=self._registry)

    def answered(self, path: str, status: int) -> None:
        """Paths that are none count together: callers choose them, and each label costs memory."""
        self._requests.labels(path if path in _ROUTES else "other", status).inc()

    def asked_again(self, why: str) -> None:
        self._asked_again.labels(why).inc()

    def cut(self) -> None:
        self._cut.inc()

    def first_byte(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def tokens(self, prompt: int, response: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("response").inc(response)

    def version(self, slot: str, version: int) -> None:
        self._versions.labels(slot).set(version)

    def replicas(self, counts: Mapping[str, int]) -> None:
        for slot, count in counts.items():
            self._replicas.labels(slot).set(count)

    def text(self) -> bytes:
        return generate_latest(self._registry)
