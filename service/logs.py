"""What the service writes to its log, and how.

Owns the two formats (text for a person, one JSON object a line for a collector), the id of the HTTP request on every
line that is written on its behalf, the quiet paths of the access log, and the last line of every request: `finished`
from the engine, `refused` from the door. Prompts and answers are in no line, unless `--log-content` asks for them: then
each answer has one more, which `log_content` writes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime

from service.engine.interface import Event, Failed, Finished, FinishedRequest
from service.metrics import Metrics

Fields = Mapping[str, object]

logger = logging.getLogger(__name__)

# The HTTP request that the running task answers, None outside of one.
current_http_request: ContextVar[str | None] = ContextVar("current_http_request", default=None)
# What an orchestrator asks all day; that a server is not ready yet is news to nobody but its asker.
PROBED_PATHS = ("/health",)
# Asked again and again by a scraper, or by a page that watches a cache: worth a line only when refused.
POLLED_PATHS = ("/metrics", "/v1/kv")
# Libraries that tell at INFO what nobody asked, or at DEBUG what an answer says.
QUIET_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "sse_starlette")
# Libraries that write to stderr by themselves, in a form of their own.
SELF_WRITING_LOGGERS = ("transformers", "huggingface_hub")


class TextFormatter(logging.Formatter):
    """Time, level, logger and message; the id of the HTTP request at the end of lines that do not have it yet."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        request = current_http_request.get()
        return line if request is None or request in record.message else f"{line} http_request_id={request}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of lines that have some.

    ASCII only, so that it is one line and JSON whatever the terminal's encoding and the collector's idea of a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "event", None) or record.getMessage(),
            "http_request_id": current_http_request.get(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None}, default=str)


def setup_logging(level: str, *, log_format: str = "text") -> None:
    """Send the log, warnings of Python included, to stderr: one line an event, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in SELF_WRITING_LOGGERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(is_worth_logging)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's access log tells more than that a probe, a scraper or a watching page came by."""
    if not isinstance(record.args, tuple) or len(record.args) < 5:
        return True
    path, status = str(record.args[2]), record.args[4]
    is_refused = isinstance(status, int) and status >= 400
    return not _is_under(path, PROBED_PATHS) and (is_refused or not _is_under(path, POLLED_PATHS))


def log_event(event: str, fields: Fields, *, level: int = logging.INFO) -> None:
    """One line that is an event and its fields: `event name=value …`, or members of a JSON object."""
    if logger.isEnabledFor(level):
        text = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        logger.log(level, "%s %s", event, text, extra={"event": event, "fields": fields})


class LoggedMetrics(Metrics):
    """Metrics that also write the last line of every request that the engine has ended."""

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
            "stream": request.origin.is_streaming,
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


def log_refused(*, path: str, status: int, code: str | None, param: str | None = None) -> None:
    """The last line of a request that never reached the engine, without the message: that may repeat a prompt."""
    log_event(
        "refused",
        {
            "http_request_id": current_http_request.get(),
            "path": path,
            "status": status,
            "code": code,
            "param": param,
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
        log_event("content", {"id": request_id, "messages": messages, "answer": "".join(answer)})


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _is_under(path: str, places: Sequence[str]) -> bool:
    path = path.partition("?")[0]
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _fields_of(record: logging.LogRecord) -> Fields:
    fields = getattr(record, "fields", None)
    if isinstance(fields, Mapping):
        return fields
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, _, status = record.args
        return {"client": client, "method": method, "path": path, "status": status}
    return {}


def _shown(value: object) -> str:
    """A value as `name=value` shows it: one word, or a quoted text on one line."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.3f}"
        case str() if value and value.isprintable() and not set(value) & set(' "='):
            return value
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
