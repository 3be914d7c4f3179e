"""Overview: traffic, errors and latencies, and on top which of memory, latency and queue is the problem."""

from __future__ import annotations

from expressions import mean, of, quantiles, rate
from panels import Json, dashboard, row, stat, timeseries

FOR_PAGES, BY_THE_QUEUE = 'reason="capacity"', 'reason=~"queue_.*"'
SLOW = ((5.0, "yellow"), (10.0, "red"))


def overview() -> Json:
    """The dashboard."""
    return dashboard(
        "trimkv-overview",
        "TrimKV · Overview",
        "Whether memory, latency or the queue is the problem, and what the service does.",
        [
            row("Where is the problem"),
            stat(
                "Memory: pages promised",
                f"max({of('instance:trimkv_kv_pages_reserved:ratio')})",
                "Of the fullest engine. Nothing more is admitted at 100 %.",
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
                "Over five minutes and all engines, from arrival.",
                unit="s",
                steps=SLOW,
            ),
            stat(
                "Latency: between tokens, p95",
                'job:trimkv_inter_token_latency_seconds:p95_5m{job="$job"}',
                "Over five minutes and all engines.",
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
                    (f"sum by (reason) ({rate('trimkv_admission_rejections_total')})", "{{reason}}"),
                    (f"sum by (reason) ({rate('trimkv_requests_aborted_total')})", "{{reason}}"),
                ],
                "At the door (full queues, what never fits, a drain), and after.",
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
                "Requests, all engines together.",
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
