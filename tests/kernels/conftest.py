"""Kernels run on a GPU where there is one, and in Triton's interpreter on the CPU where there is none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


class _Skipped(pytest.Module):
    """A test module that cannot be imported here."""

    def collect(self):  # type: ignore[no-untyped-def]
        pytest.skip("triton is not installed: pip install triton==3.6.0", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):  # type: ignore[no-untyped-def]
    return None if HAS_TRITON else _Skipped.from_parent(parent, path=module_path)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
