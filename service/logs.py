"""What the service writes to its log, and how.

Owns the two formats (text for a person, one JSON object a line for a collector), the quiet paths of the access log and
the one line of every ended request. Prompts and answers are in no line, unless `--log-content` asks for them: then
each answer has one more, which `log_content` writes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime

from service.engine.interface import Event, Failed, Finished, FinishedRequest
from service.metrics import Metrics

Fields = Mapping[str, "str | int | float | None"]

logger = logging.getLogger(__name__)

QUIET_PATHS = ("/health", "/metrics")
# Asked several times a second by a page that watches a cache: worth a line only when refused.
POLLED_PATHS = ("/v1/kv",)
# Libraries that tell at INFO what nobody asked.
QUIET_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "sse_starlette")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of lines that have some."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields_of(record)
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "event", None) or record.getMessage(),
            **{name: value for name, value in fields.items() if value is not None},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def setup_logging(level: str, *, log_format: str = "text") -> None:
    """Send the log to stderr, one line an event, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(is_worth_logging)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's access log tells more than that a probe or a watching page came by."""
    if not isinstance(record.args, tuple) or len(record.args) < 5:
        return True
    path, status = str(record.args[2]), record.args[4]
    is_refused = isinstance(status, int) and status >= 400
    return not path.startswith(QUIET_PATHS) and (is_refused or not path.startswith(POLLED_PATHS))


def log_event(event: str, fields: Fields, *, level: int = logging.INFO) -> None:
    """One line that is an event and its fields: `event name=value …`, or members of a JSON object."""
    text = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    logger.log(level, "%s %s", event, text, extra={"event": event, "fields": fields})


class LoggedMetrics(Metrics):
    """Metrics that also write the line of every ended request."""

    def on_finished(self, request: FinishedRequest) -> None:
        super().on_finished(request)
        log_finished(request)


def log_finished(request: FinishedRequest) -> None:
    """One line an operator can grep by id, reason or any figure."""
    kv = request.kv
    budget = request.budget_entries_per_stream
    log_event(
        "finished",
        {
            "id": request.request_id,
            "http_request_id": request.origin.http_request_id,
            "model": request.origin.model,
            "reason": request.finish_reason.value,
            "abort": request.abort_reason.value if request.abort_reason else None,
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.completion_tokens,
            "kv_budget": "dense" if budget is None else budget,
            "retained": kv.retained_entries if kv else None,
            "evicted": kv.evicted_entries if kv else None,
            "evictions": kv.evictions if kv else None,
            "peak_bytes": kv.peak_bytes if kv else None,
            "queue_s": _seconds(request.queue_time),
            "ttft_s": _seconds(request.time_to_first_token),
            "e2e_s": _seconds(request.e2e_latency),
        },
    )


async def log_content(
    events: AsyncIterator[Event], *, request_id: str, messages: Sequence[Mapping[str, object]]
) -> AsyncIterator[Event]:
    """Hand `events` on, and at their end write what was asked and answered. Only where the operator wants that."""
    answer: list[str] = []
    try:
        async for event in events:
            if not isinstance(event, Failed):
                answer.append(event.text)
            yield event
            if isinstance(event, Finished | Failed):
                break
    finally:
        asked = json.dumps(list(messages), ensure_ascii=False)
        log_event("content", {"id": request_id, "messages": asked, "answer": "".join(answer)})


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _fields_of(record: logging.LogRecord) -> Fields:
    fields = getattr(record, "fields", None)
    if isinstance(fields, Mapping):
        return fields
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, _, status = record.args
        return {
            "client": str(client),
            "method": str(method),
            "path": str(path),
            "status": status if isinstance(status, int) else str(status),
        }
    return {}


def _shown(value: str | float | None) -> str:
    """A value as `name=value` shows it: one word, or a quoted text on one line."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=False)


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
