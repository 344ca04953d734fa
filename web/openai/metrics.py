"""What the endpoint counts and measures, for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from web.openai.targets import Targets

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One process's figures; `text` is the page that Prometheus reads."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, targets: Targets) -> None:
        self._targets, self._registry = targets, CollectorRegistry()
        self._requests = Counter(
            "openai_requests", "Requests answered; status 499: the client left before its answer began",
            ["route", "status"], registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "openai_request_seconds", "From a request's head to the end of its answer", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "openai_time_to_first_token_seconds", "From a streamed request's head to its first text",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("openai_prompt_tokens", "Tokens of prompts answered", registry=self._registry)
        self.output_tokens = Counter("openai_output_tokens", "Tokens of complete answers", registry=self._registry)
        waiting = Gauge("openai_waiting", "Predictions in line for a target", registry=self._registry)
        waiting.set_function(lambda: targets.num_waiting)
        self._running = Gauge("openai_running", "Predictions at a target", ["target"], registry=self._registry)
        self._up = Gauge("openai_target_up", "1 while a target takes predictions", ["target"], registry=self._registry)

    def count(self, route: str, status: int, seconds: float) -> None:
        """One request and its answer."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        for target in self._targets.all:
            self._running.labels(target.name).set(target.num_running)
            self._up.labels(target.name).set(target.is_up)
        return generate_latest(self._registry)
