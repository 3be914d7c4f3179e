"""The metrics that clients, rules and dashboards may rely on, without their prefix `trimkv_`."""

from __future__ import annotations

# API.md's table.
GAUGES = (
    "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_pages", "kv_pool_bytes",
    "kv_cache_usage_perc", "kv_entries", "kv_layer_entries", "kv_budget_entries", "engine_last_step_age_seconds",
    "model_info",
)  # fmt: skip
COUNTERS = (
    "prompt_tokens_total", "generation_tokens_total", "request_success_total", "admission_rejections_total",
    "requests_aborted_total", "kv_evictions_total", "kv_evicted_entries_total", "engine_restarts_total",
)  # fmt: skip
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_prompt_tokens", "request_generation_tokens", "request_kv_budget", "request_kv_retained_ratio",
    "kv_compress_duration_seconds", "step_duration_seconds", "step_batch_size",
)  # fmt: skip
