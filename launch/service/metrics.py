"""What Prometheus reads: how many requests were answered how, how long they took, how many questions are computed."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from starlette.responses import Response

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # set where several processes of one service count together
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "influence_requests", "requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "influence_request_seconds", "seconds to an answer", ["route"], buckets=BUCKETS, registry=self.registry
        )
        self.attributing = Gauge(
            "influence_attributing", "POST attribute computed or waiting", registry=self.registry,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request. `route` is the pattern, never the path: ids and texts stay out of the metrics."""
        known = method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
        self.requests.labels(route, known, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> Response:
        """Return all counters in Prometheus' text format, summed over the processes of the service."""
        registry = self.registry
        if os.environ.get(SHARED):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
