"""What the service writes to its log, and how.

Owns the format, the quiet paths of the access log and the one line of every ended request. Knows no prompt and no
answer: neither is ever logged.
"""

from __future__ import annotations

import logging
import sys

from service.engine.interface import FinishedRequest
from service.metrics import Metrics

logger = logging.getLogger(__name__)

QUIET_PATHS = ("/health", "/metrics")
# Libraries that tell at INFO what nobody asked.
QUIET_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "sse_starlette")


def setup_logging(level: str) -> None:
    """Send the log to stderr, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(is_worth_logging)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's access log tells more than that a probe came by."""
    if not isinstance(record.args, tuple) or len(record.args) < 3:
        return True
    return not str(record.args[2]).startswith(QUIET_PATHS)


class LoggedMetrics(Metrics):
    """Metrics that also write the line of every ended request."""

    def on_finished(self, request: FinishedRequest) -> None:
        super().on_finished(request)
        log_finished(request)


def log_finished(request: FinishedRequest) -> None:
    """One line an operator can grep by id, reason or any figure."""
    kv = request.kv
    logger.info(
        "finished id=%s reason=%s abort=%s prompt_tokens=%d completion_tokens=%d kv_budget=%s retained=%s evicted=%s "
        "peak_bytes=%s queue_s=%s ttft_s=%s e2e_s=%s",
        request.request_id,
        request.finish_reason,
        request.abort_reason or "-",
        request.prompt_tokens,
        request.completion_tokens,
        request.budget_entries_per_stream if request.budget_entries_per_stream is not None else "dense",
        kv.retained_entries if kv else "-",
        kv.evicted_entries if kv else "-",
        kv.peak_bytes if kv else "-",
        _seconds(request.queue_time),
        _seconds(request.time_to_first_token),
        _seconds(request.e2e_latency),
    )


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
