"""KV cache: what the page pool holds, what it has promised, and what was dropped."""

from __future__ import annotations

from expressions import ENGINE, of, quantiles, rate
from panels import Json, bars, dashboard, heatmap, row, timeseries


def kv_cache() -> Json:
    """The dashboard."""
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
                "Of the fullest engine.",
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
                [(of("instance:trimkv_kv_budget:utilisation"), ENGINE)],
                "Entries held, of the budgets of all that runs. Over 100 % between evictions and with dense requests.",
                unit="percentunit",
            ),
            timeseries(
                "Fragmentation",
                [(of("instance:trimkv_kv_fragmentation:ratio"), ENGINE)],
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
