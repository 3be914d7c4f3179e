"""`GET /metrics` of a fleet: every engine's own metrics under the label `replica`, and the door's beside them.

Only the door's refusals and its queue are its own: what happens to a request behind it, the engine that computes it
counts. So a sum over `replica` counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.engine.interface import Engine, EngineStats
from service.fleet.calls import ReplicaReport
from service.fleet.engine import FleetEngine
from service.metrics import PREFIX, Metrics

LABEL = "replica"
# Of the door's own metrics, these count something that no engine sees.
DOORS_OWN = (f"{PREFIX}admission_rejections",)


class FleetMetrics(Metrics):
    """Metrics of the door, which show those of the engines.

    Args:
        name: the door's own value of `replica`; two doors need two.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    async def render(self, engine: Engine, *, accept: str, stats: EngineStats | None = None) -> tuple[bytes, str]:
        """The exposition of the whole fleet, and its content type; every engine brings figures of its own."""
        if not isinstance(engine, FleetEngine):
            raise TypeError("the metrics of a fleet are those of its engine")
        reports = await engine.figures.reports()
        families = merge(
            [
                *((report.name, text_string_to_metric_families(report.exposition)) for report in reports),
                (self._name, self._own(engine)),
            ]
        )
        registry = CollectorRegistry()
        registry.register(_Fixed([*families, _replica_info(reports)]))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _own(self, engine: FleetEngine) -> Iterator[Metric]:
        unanswered = "Requests without a first token, wherever they wait."
        yield GaugeMetricFamily(f"{PREFIX}fleet_requests_unanswered", unanswered, value=engine.unanswered)
        age = "How old the engines' figures are: more than a few seconds while one of them hangs."
        yield GaugeMetricFamily(f"{PREFIX}fleet_figures_age_seconds", age, value=engine.figures.age_seconds)
        yield from (family for family in self.registry.collect() if family.name in DOORS_OWN)


def merge(sources: Iterable[tuple[str, Iterable[Metric]]]) -> list[Metric]:
    """The families of several sources as one of each name, every sample under its source's `replica`."""
    merged: dict[str, Metric] = {}
    for name, families in sources:
        for family in families:
            whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [_labelled(sample, name) for sample in family.samples]
    return list(merged.values())


def _labelled(sample: Sample, name: str) -> Sample:
    return sample._replace(labels={**sample.labels, LABEL: name})


def _replica_info(reports: Sequence[ReplicaReport]) -> Metric:
    family = GaugeMetricFamily(
        f"{PREFIX}replica_info", "The engines that answer, and where; always 1.", labels=(LABEL, "host", "pid")
    )
    for report in reports:
        family.add_metric((report.name, report.host, str(report.pid)), 1)
    return family


class _Fixed(Collector):
    """Families that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
