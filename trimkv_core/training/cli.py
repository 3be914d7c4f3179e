"""`trimkv-train`: owns exit statuses, signals and what a person reads in a terminal; knows nothing else."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from trimkv_core.options import SettingsError
from trimkv_core.training.loading import PROGRAM, load_settings
from trimkv_core.training.settings import TrainSettings

logger = logging.getLogger(__name__)

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# Libraries that tell at INFO what nobody asked.
_QUIET_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "matplotlib", "PIL", "accelerate", "datasets")


class StopSignal:
    """Notes the first SIGTERM or SIGINT, so that the run can save; a second one ends it as it always did.

    Use as a context manager.

    Attributes:
        received: the signal; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> StopSignal:
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def is_received(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        logger.warning("%s: saving after this step; once more ends at once", self.received.name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the result is the exit status."""
    try:
        settings = load_settings(list(sys.argv[1:] if argv is None else argv))
    except SettingsError as error:
        return _complain(str(error), EXIT_USAGE)
    # Threads that wait for each other spin for microseconds, then sleep: spinning longer, a neighbour on the same cores
    # costs not its share but ten times that. It has to be said before torch loads OpenMP.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Rows are tokenised beside the step, one document at a time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _keep_freed_memory()
    return _train(settings)


def _keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed. Does nothing with another libc.

    Every step asks for them again, and a block that the kernel took back costs a fault a page: 6 % of a step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def _train(settings: TrainSettings) -> int:
    # Torch takes seconds to import: --help and a bad flag do not wait for it.
    from trimkv_core.checkpoint import CheckpointError
    from trimkv_core.embedded import EmbeddedModelError
    from trimkv_core.models import UnsupportedModelError
    from trimkv_core.training.documents import DataError
    from trimkv_core.training.run import TrainingError, train

    _setup_logging()
    with StopSignal() as stop:
        try:
            outcome = train(settings, should_stop=stop.is_received)
        except SettingsError as error:
            return _complain(str(error), EXIT_USAGE)
        except (
            DataError,
            TrainingError,
            CheckpointError,
            UnsupportedModelError,
            EmbeddedModelError,
            OSError,
        ) as error:
            return _complain(str(error), EXIT_FAILURE)
    if outcome.is_complete:
        logger.info("complete: %s holds the gates after %d steps", settings.output, outcome.step)
        return 0
    logger.info(
        "stopped after step %d and saved; go on with %s --output %s --resume", outcome.step, PROGRAM, settings.output
    )
    return EXIT_INTERRUPTED if stop.received is signal.SIGINT else 0


def _setup_logging() -> None:
    from transformers.utils.logging import disable_progress_bar

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    if not sys.stderr.isatty():
        disable_progress_bar()
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
