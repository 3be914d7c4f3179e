"""PromQL that panels have in common, on the instances chosen at the top of a dashboard."""

from __future__ import annotations

from panels import Query

CHOSEN = 'job="$job", instance=~"$instance"'
# An engine is an instance of its own, or one of several behind the door of a fleet.
ENGINE = "{{instance}} {{replica}}"


def of(metric: str, *labels: str) -> str:
    """The series of `metric` on the chosen instances."""
    return f"{metric}{{{', '.join((CHOSEN, *labels))}}}"


def rate(metric: str, *labels: str) -> str:
    """A counter's growth, each second."""
    return f"rate({of(metric, *labels)}[$__rate_interval])"


def mean(histogram: str, *, by: str = "") -> str:
    """The mean of what a histogram observed."""
    grouping = f" by ({by}) " if by else ""
    return f"sum{grouping}({rate(histogram + '_sum')}) / sum{grouping}({rate(histogram + '_count')})"


def quantiles(histogram: str, *shares: float) -> list[Query]:
    """One query for each share, over all chosen instances together."""
    buckets = f"sum by (le) ({rate(histogram + '_bucket')})"
    return [(f"histogram_quantile({share}, {buckets})", f"p{share * 100:g}") for share in shares]


def by_engine(expression: str, *labels: str) -> str:
    """One value for each engine, with its name in the label `engine`, `labels`, and no others."""
    named = f'label_join({expression}, "engine", " ", "instance", "replica")'
    return f"max by ({', '.join(('engine', *labels))}) ({named})"
