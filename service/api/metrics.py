"""Metrics for Prometheus: of the requests of this process, and of all jobs in the database."""

import time
from collections.abc import Iterator

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from service.records.job import Status
from service.records.tables import deliveries, jobs, stage_runs

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one API process."""

    def __init__(self, engine: sa.Engine) -> None:
        """Start all counts at zero. The tables behind `engine` are read at each scrape."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "bitwright_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "bitwright_http_request_seconds",
            "Time to answer.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.solve_seconds = Histogram(
            "bitwright_solve_seconds",
            "Time to solve one call's what-ifs.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_TableCollector(engine))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _TableCollector(Collector):
    """Metrics that are computed from the tables at each scrape."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # nothing is read before the first scrape

    def collect(self) -> Iterator[Metric]:
        with self._engine.connect() as connection:
            yield from _job_metrics(connection)
            yield _stage_seconds(connection)
            sent = CounterMetricFamily(
                "bitwright_webhook_deliveries", "Deliveries of webhooks.", labels=["status"]
            )
            query = sa.select(deliveries.c.status, sa.func.count()).group_by(deliveries.c.status)
            for status, count in connection.execute(query):
                sent.add_metric([status], count)
            yield sent


def _job_metrics(connection: sa.Connection) -> Iterator[Metric]:
    by_status = GaugeMetricFamily("bitwright_jobs", "Jobs by status.", labels=["status"])
    query = sa.select(jobs.c.status, sa.func.count().label("number")).group_by(jobs.c.status)
    counts = {row.status: row.number for row in connection.execute(query)}
    for status in Status:
        by_status.add_metric([status], counts.get(status, 0))
    yield by_status
    oldest = connection.execute(
        sa.select(sa.func.min(jobs.c.created_at)).where(jobs.c.status == Status.QUEUED)
    ).scalar()
    age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
    yield GaugeMetricFamily(
        "bitwright_queue_oldest_seconds", "Age of the job that has waited longest.", value=age
    )
    stored = connection.execute(sa.select(sa.func.sum(jobs.c.stored_bytes))).scalar() or 0
    yield GaugeMetricFamily(
        "bitwright_artifact_bytes", "Bytes of the artifacts of all jobs.", value=stored
    )


def _stage_seconds(connection: sa.Connection) -> Metric:
    spent = SummaryMetricFamily(
        "bitwright_stage_seconds", "Wall time of finished stages.", labels=["stage"]
    )
    seconds = stage_runs.c.finished_at - stage_runs.c.started_at
    query = sa.select(stage_runs.c.stage, sa.func.count(), sa.func.sum(seconds)).where(
        stage_runs.c.finished_at.is_not(None)
    )
    for stage, count, total in connection.execute(query.group_by(stage_runs.c.stage)):
        spent.add_metric([stage], count, total)
    return spent
