"""`trimkv-serve`: serve, or plan. Owns exit statuses and what a person reads in a terminal; knows nothing else."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from service.environment import prepare_environment
from service.settings import PROGRAM, Settings, load_settings
from trimkv_core.options import SettingsError

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the result is the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["plan"]:
        return _plan(arguments[1:])
    try:
        settings = load_settings(arguments)
    except SettingsError as error:
        return _complain(str(error), EXIT_USAGE)
    return _serve(settings)


def _serve(settings: Settings) -> int:
    prepare_environment(settings.log_format)
    # Torch takes seconds to import: --help and a bad flag do not wait for it, and a taken port is said first.
    from service.port import PortError, open_port

    try:
        port = open_port(settings.host, settings.port)
    except PortError as error:
        return _complain(str(error), EXIT_FAILURE)
    from service.app import create_app
    from service.engine.worker import EngineWorker
    from service.logs import LoggedMetrics, setup_logging
    from service.server import Server
    from service.traces import TracedMetrics, open_traces

    setup_logging(settings.log_level, log_format=settings.log_format)
    traces = open_traces(os.environ)
    metrics = TracedMetrics(traces) if traces else LoggedMetrics()
    engine = EngineWorker(settings.engine_config(), metrics)
    server = Server(create_app(settings=settings, engine=engine, metrics=metrics), settings)
    host, number = port.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d, loading model=%s", where, number, settings.model)
    try:
        server.run(sockets=[port])
    finally:
        if traces:
            traces.close()
    return server.exit_status


def _plan(arguments: Sequence[str]) -> int:
    from service.plan import PlanError, run_plan

    try:
        print(run_plan(arguments))
    except PlanError as error:
        return _complain(str(error), EXIT_FAILURE)
    return 0


def _complain(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
