"""Writes `dashboards/*.json`: three dashboards out of the service's metrics and of `deploy/prometheus/rules.yml`.

    python deploy/grafana/build.py

Change a panel here, never in the JSON: tests/deploy/test_grafana.py compares the two, and
tests/deploy/test_prometheus.py asks every query of a real Prometheus.
"""

from __future__ import annotations

import json
from pathlib import Path

from panels import Json, Query, bars, dashboard, heatmap, row, stat, table, timeseries

FOLDER = Path(__file__).parent / "dashboards"
CHOSEN = 'job="$job", instance=~"$instance"'
FOR_PAGES, BY_THE_QUEUE = 'reason="capacity"', 'reason=~"queue_.*"'
# How Grafana tells apart the columns of several queries that have one name.
REPEATED = ("", *(f" {number}" for number in range(1, 9)))
SLOW = ((5.0, "yellow"), (10.0, "red"))


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


def overview() -> Json:
    """Traffic, errors and latencies, and on top which of memory, latency and queue is the problem."""
    return dashboard(
        "trimkv-overview",
        "TrimKV · Overview",
        "Whether memory, latency or the queue is the problem, and what the service does.",
        [
            row("Where is the problem"),
            stat(
                "Memory: pages promised",
                f"max({of('instance:trimkv_kv_pages_reserved:ratio')})",
                "Of the fullest replica. Nothing more is admitted at 100 %.",
                unit="percentunit",
                steps=((0.8, "yellow"), (0.9, "red")),
            ),
            stat(
                "Memory: waiting for pages",
                f"sum({of('trimkv_num_requests_waiting_by_reason', FOR_PAGES)})",
                "Requests that could be computed, had the pool room for their promise.",
                steps=((1, "yellow"), (10, "red")),
            ),
            stat(
                "Latency: first token, p95",
                'job:trimkv_time_to_first_token_seconds:p95_5m{job="$job"}',
                "Over five minutes and all replicas, from arrival.",
                unit="s",
                steps=SLOW,
            ),
            stat(
                "Latency: between tokens, p95",
                'job:trimkv_inter_token_latency_seconds:p95_5m{job="$job"}',
                "Over five minutes and all replicas.",
                unit="s",
                steps=((0.5, "yellow"), (1, "red")),
            ),
            stat(
                "Queue: waiting",
                f"sum({of('trimkv_num_requests_waiting')})",
                "For pages, for a free slot, or behind one that waits.",
                steps=((10, "yellow"), (100, "red")),
            ),
            stat(
                "Queue: turned away",
                f"sum({rate('trimkv_admission_rejections_total', BY_THE_QUEUE)})",
                "503s of a full queue, each second.",
                unit="reqps",
                steps=((0.001, "yellow"), (0.05, "red")),
            ),
            stat(
                "Errors",
                'job:trimkv_request_errors:ratio_rate5m{job="$job"}',
                "Of the requests that ended in the last five minutes, clients' own breaks aside.",
                unit="percentunit",
                steps=((0.001, "yellow"), (0.02, "red")),
            ),
            stat(
                "Alerts that fire",
                'count(ALERTS{alertstate="firing", alertname=~"TrimKV.*"}) or vector(0)',
                "deploy/runbook.md says what to do about each.",
                steps=((1, "red"),),
            ),
            row("Traffic"),
            timeseries(
                "Requests ended",
                [(f"sum by (finished_reason) ({rate('trimkv_request_success_total')})", "{{finished_reason}}")],
                "By how they ended.",
                unit="reqps",
                is_stacked=True,
            ),
            timeseries(
                "Turned away and broken off",
                [
                    (f"sum by (reason) ({rate('trimkv_admission_rejections_total')})", "turned away: {{reason}}"),
                    (f"sum by (reason) ({rate('trimkv_requests_aborted_total')})", "broken off: {{reason}}"),
                ],
                "At the door, and after.",
                unit="reqps",
            ),
            timeseries(
                "Tokens",
                [
                    (f"sum({rate('trimkv_prompt_tokens_total')})", "prompt"),
                    (f"sum({rate('trimkv_generation_tokens_total')})", "generated"),
                ],
                "Computed each second.",
                unit="short",
            ),
            timeseries(
                "Running and waiting",
                [
                    (f"sum({of('trimkv_num_requests_running')})", "running"),
                    (f"sum({of('trimkv_num_requests_waiting')})", "waiting"),
                ],
                "Requests, all replicas together.",
            ),
            timeseries(
                "Why they wait",
                [(f"sum by (reason) ({of('trimkv_num_requests_waiting_by_reason')})", "{{reason}}")],
                "capacity: pages; slots: --max-num-seqs; order: behind one that waits.",
                is_stacked=True,
            ),
            timeseries(
                "Prompt tokens a request",
                [
                    *quantiles("trimkv_request_prompt_tokens", 0.5, 0.95),
                    (mean("trimkv_request_generation_tokens"), "generated, mean"),
                ],
                "And how long answers are.",
            ),
            row("Latency"),
            timeseries(
                "Time to first token",
                quantiles("trimkv_time_to_first_token_seconds", 0.5, 0.95, 0.99),
                "From arrival, tokenising and queue included.",
                unit="s",
            ),
            timeseries(
                "Between tokens",
                quantiles("trimkv_inter_token_latency_seconds", 0.5, 0.95, 0.99),
                "Of one request.",
                unit="s",
            ),
            timeseries(
                "Whole request",
                quantiles("trimkv_e2e_request_latency_seconds", 0.5, 0.95),
                "From arrival to the last token.",
                unit="s",
            ),
            timeseries(
                "Where the time goes",
                [(mean(f"trimkv_request_{phase}_time_seconds"), phase) for phase in ("queue", "prefill", "decode")],
                "Mean seconds of a request in each phase.",
                unit="s",
                is_stacked=True,
            ),
            timeseries(
                "Steps",
                [(mean("trimkv_step_duration_seconds", by="phase"), "{{phase}}, mean")],
                "Duration of an engine step, by what it computes.",
                unit="s",
            ),
            timeseries(
                "Sequences a step",
                [(mean("trimkv_step_batch_size", by="phase"), "{{phase}}, mean")],
                "How much is batched.",
            ),
        ],
    )


def cache() -> Json:
    """What the page pool holds and what was dropped."""
    layers = f"sum by (layer) ({of('trimkv_kv_layer_entries')})"
    # Two digits, since rows are in the order of their names.
    in_order = f'label_replace({layers}, "layer", "0$1", "layer", "^(.)$")'
    return dashboard(
        "trimkv-cache",
        "TrimKV · KV cache",
        "What the page pool holds, what it has promised, and what was dropped.",
        [
            row("The pool"),
            timeseries(
                "Pages",
                [(f"sum by (state) ({of('trimkv_kv_pages')})", "{{state}}")],
                "used + free = all; reserved: the worst case of all that runs, promised to it.",
            ),
            timeseries(
                "Of all pages",
                [
                    (f"max({of('instance:trimkv_kv_pages_reserved:ratio')})", "promised"),
                    (f"max({of('trimkv_kv_cache_usage_perc')})", "used"),
                ],
                "Of the fullest replica.",
                unit="percentunit",
                largest=1,
            ),
            timeseries(
                "Memory",
                [
                    (f"sum({of('trimkv_kv_pool_bytes')})", "pool"),
                    (f"sum({of('trimkv_kv_pool_bytes')} * {of('trimkv_kv_cache_usage_perc')})", "used pages"),
                    (f"sum({of('instance:trimkv_kv_saved_bytes')})", "saved against dense"),
                ],
                "Saved: what the dropped entries of the running requests would take.",
                unit="bytes",
            ),
            row("Entries"),
            timeseries(
                "Logical against physical",
                [(f"sum by (kind) ({of('trimkv_kv_entries')})", "{{kind}}")],
                "Logical: what a dense cache would hold. Physical: what is held. Allocated: room in used pages.",
            ),
            timeseries(
                "Budget utilisation",
                [
                    (of("instance:trimkv_kv_budget:utilisation"), "{{instance}}"),
                ],
                "Entries held, of the budgets of all that runs. Over 100 % between evictions and with dense requests.",
                unit="percentunit",
            ),
            timeseries(
                "Fragmentation",
                [(of("instance:trimkv_kv_fragmentation:ratio"), "{{instance}}")],
                "Room in used pages that holds no entry: the last page of each stream is partly empty.",
                unit="percentunit",
                largest=1,
            ),
            heatmap(
                "Entries by layer, over time",
                (in_order, "{{layer}}"),
                "Where the gates let memory go: a budget is shared by all layers.",
                is_histogram=False,
                y_label="layer",
            ),
            bars("Entries by layer, now", (in_order, "{{layer}}"), "Of all running requests together."),
            row("Evictions"),
            timeseries(
                "Evictions",
                [(f"sum by (strategy) ({rate('trimkv_kv_evictions_total')})", "{{strategy}}")],
                "Cuts of a sequence's cache, each second.",
                unit="ops",
            ),
            timeseries(
                "Entries dropped",
                [(f"sum({rate('trimkv_kv_evicted_entries_total')})", "entries")],
                "Each second.",
                unit="short",
            ),
            timeseries(
                "Time of a batch of evictions",
                quantiles("trimkv_kv_compress_duration_seconds", 0.5, 0.95),
                "Each runs between two steps, for all sequences that reached their trigger.",
                unit="s",
            ),
            row("What requests ask for and keep"),
            heatmap(
                "Budgets asked for",
                (f"sum by (le) ({rate('trimkv_request_kv_budget_bucket')})", "{{le}}"),
                "kv_budget of ended requests that have one.",
                unit="reqps",
                is_histogram=True,
                y_label="kv_budget",
            ),
            heatmap(
                "Share kept",
                (f"sum by (le) ({rate('trimkv_request_kv_retained_ratio_bucket')})", "{{le}}"),
                "Entries held at the end of a request, of all it wrote.",
                unit="reqps",
                is_histogram=True,
                y_label="share",
            ),
        ],
    )


def instances() -> Json:
    """Replica beside replica."""

    def each(title: str, expression: str, text: str, *, unit: str = "short", largest: float | None = None) -> Json:
        return timeseries(title, [(expression, "{{instance}}")], text, unit=unit, largest=largest)

    return dashboard(
        "trimkv-instances",
        "TrimKV · Instances",
        "Replica beside replica: which one is different.",
        [
            row("Now"),
            table(
                "Replicas",
                {
                    "Up": (of("up"), "bool_yes_no"),
                    "Model": (of("trimkv_model_info"), "short"),
                    "Running": (of("trimkv_num_requests_running"), "short"),
                    "Waiting": (of("trimkv_num_requests_waiting"), "short"),
                    "Pages used": (of("trimkv_kv_cache_usage_perc"), "percentunit"),
                    "Pages promised": (of("instance:trimkv_kv_pages_reserved:ratio"), "percentunit"),
                    "Step age": (of("trimkv_engine_last_step_age_seconds"), "s"),
                    "Pools rebuilt": (of("trimkv_engine_restarts_total"), "short"),
                },
                "What each replica serves, on what, and how it is.",
                key="instance",
                hidden=[
                    "Value #B",
                    *(f"{name}{number}" for name in ("Time", "job", "__name__") for number in REPEATED),
                ],
            ),
            row("Traffic"),
            each("Requests ended", of("instance:trimkv_requests:rate5m"), "Over five minutes.", unit="reqps"),
            each("Tokens generated", of("instance:trimkv_generation_tokens:rate5m"), "Each second, over five minutes."),
            each("Prompt tokens", of("instance:trimkv_prompt_tokens:rate5m"), "Each second, over five minutes."),
            each("Running", of("trimkv_num_requests_running"), "Requests being computed."),
            each("Waiting", of("trimkv_num_requests_waiting"), "Requests in the queue."),
            each(
                "Turned away",
                f"sum by (instance) ({rate('trimkv_admission_rejections_total')})",
                "For any reason, each second.",
                unit="reqps",
            ),
            row("Latency"),
            each(
                "Time to first token, p50",
                of("instance:trimkv_time_to_first_token_seconds:p50_5m"),
                "Over five minutes.",
                unit="s",
            ),
            each(
                "Time to first token, p95",
                of("instance:trimkv_time_to_first_token_seconds:p95_5m"),
                "Over five minutes.",
                unit="s",
            ),
            each(
                "Between tokens, p95",
                of("instance:trimkv_inter_token_latency_seconds:p95_5m"),
                "Over five minutes.",
                unit="s",
            ),
            row("Memory and health"),
            each(
                "Pages promised",
                of("instance:trimkv_kv_pages_reserved:ratio"),
                "Of all pages.",
                unit="percentunit",
                largest=1,
            ),
            each("Step age", of("trimkv_engine_last_step_age_seconds"), "Of the running step; 0 while idle.", unit="s"),
            each(
                "Restarts",
                f"resets({of('trimkv_generation_tokens_total')}[1h])"
                f" + on (job, instance) increase({of('trimkv_engine_restarts_total')}[1h])",
                "Processes started anew and pools rebuilt, within the last hour.",
            ),
        ],
    )


DASHBOARDS = {"overview": overview, "kv-cache": cache, "instances": instances}


def render() -> dict[str, str]:
    """The text of every file in `dashboards/`, by its name."""
    return {
        f"{name}.json": json.dumps(make(), indent=2, ensure_ascii=False) + "\n" for name, make in DASHBOARDS.items()
    }


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
