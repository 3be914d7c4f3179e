"""What libraries read from the environment when they are imported, set before they are.

The same for the service and for an engine of a fleet. Knows no setting's reading, and imports nothing heavy.
"""

from __future__ import annotations

import os


def prepare_environment(log_format: str) -> None:
    """Set what an operator has not set. To be called before torch and huggingface_hub are imported."""
    # Threads that wait for each other spin for microseconds, then sleep: spinning longer, a neighbour on the same cores
    # costs not its share but ten times that; sleeping at once doubles a decode step. Read when torch loads OpenMP.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if log_format == "json":
        # A progress bar is no JSON. Read when huggingface_hub is imported, and by transformers then.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
