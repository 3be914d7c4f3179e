"""The Dockerfile: what it promises, and its install stages' own commands, run in a folder. No engine runs here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.deploy.debian import program
from tests.deploy.dockerfile import Builder, parse, reaches_builder
from tests.service.live import wait_for

ROOT = Path(__file__).parents[2]
STAGES = parse((ROOT / "docker/Dockerfile").read_text(encoding="utf-8"))
IGNORED = (ROOT / "docker/Dockerfile.dockerignore").read_text(encoding="utf-8")
FINAL = ("cpu", "cuda")
EXACT_IMAGE = re.compile(r"[a-z0-9./-]+:\d+\.\d+\.\d+-[\w.-]+")


def test_base_images_are_arguments_at_an_exact_version() -> None:
    arguments = dict(value.split("=", 1) for value in STAGES[""].values("ARG"))
    assert all(EXACT_IMAGE.fullmatch(image) for image in arguments.values())
    bases = {stage.base for name, stage in STAGES.items() if name}
    assert bases <= {f"${{{name}}}" for name in arguments} | STAGES.keys()


@pytest.mark.parametrize("name", FINAL)
def test_an_image_runs_as_nobody_drains_and_is_watched(name: str) -> None:
    stage = STAGES[name]
    assert stage.values("USER") == ["10001:10001"]
    assert stage.values("STOPSIGNAL") == ["SIGTERM"]
    # Without a shell between: signals reach the server.
    assert json.loads(stage.values("ENTRYPOINT")[0]) == ["tini", "--", "trimkv-serve"]
    (health,) = stage.values("HEALTHCHECK")
    assert re.search(r"--start-period=\d+s", health)
    assert json.loads(health.split("CMD ")[1]) == ["python", "/opt/trimkv/healthcheck.py"]
    assert stage.values("VOLUME") == ["/var/cache/trimkv"]


@pytest.mark.parametrize("name", FINAL)
def test_an_image_ships_what_its_kernels_are_started_with(name: str) -> None:
    assert {"libgomp1", "tini"} <= STAGES[name].packages()
    if name == "cuda":
        assert {"gcc", "libc6-dev", "python3-dev"} <= STAGES[name].packages()


def test_debian_has_the_packages_of_the_cpu_image() -> None:
    packages = STAGES["cpu"].packages()
    apt = program("apt-get", package="apt")
    done = subprocess.run(
        [apt, "install", "--simulate", *sorted(packages)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{done.stderr}(apt-get update comes first)"


@pytest.mark.parametrize("name", [name for name in STAGES if name])
def test_layers_are_small_and_hold_no_secret(name: str) -> None:
    stage = STAGES[name]
    for command in stage.values("RUN"):
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
            assert command.index("rm -rf /var/lib/apt/lists/*") > command.index("apt-get install")
        if "pip install" in command:
            assert "--mount=type=cache,target=/root/.cache/pip" in command
    assert not stage.values("ADD")
    said = " ".join(instruction.value for instruction in stage.instructions if instruction.keyword in ("ARG", "ENV"))
    assert not re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", said.upper())
    for value in stage.values("COPY"):
        assert shlex.split(value)[0] not in (".", "./")


@pytest.mark.parametrize("name", FINAL)
def test_what_an_image_sets_exists_and_what_it_writes_lies_in_the_volume(name: str) -> None:
    variables = STAGES[name].variables()
    for variable in variables:
        if variable.startswith("TRIMKV_") and variable != "TRIMKV_CACHE_HOME":
            assert variable.removeprefix("TRIMKV_").lower() in Settings.model_fields
    for variable in ("HOME", "HF_HOME", "NUMBA_CACHE_DIR"):
        assert variables[variable].startswith("/var/cache/trimkv")
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("name", FINAL)
def test_a_change_of_the_code_keeps_the_layers_of_the_packages(name: str) -> None:
    copied = [value for value in STAGES[name].values("COPY") if value.startswith("--from=")]
    assert copied[-2:] == [
        f"--from={name}-packages /opt/trimkv/venv /opt/trimkv/venv",
        f"--from={name}-app /opt/trimkv/app /opt/trimkv/app",
    ]
    assert STAGES[f"{name}-packages"].values("COPY") == [
        "requirements/cpu-constraints.txt requirements/",
        "--from=requirements /src/packages.txt requirements/",
    ]
    (command,) = [command for command in STAGES[f"{name}-app"].values("RUN") if "pip install" in command]
    assert "--no-deps --target /opt/trimkv/app ." in command
    variables = STAGES[name].variables()
    assert variables["PATH"].split(":")[:2] == ["/opt/trimkv/app/bin", "/opt/trimkv/venv/bin"]
    assert variables["PYTHONPATH"] == "/opt/trimkv/app"


def test_only_what_is_copied_reaches_the_builder() -> None:
    for path in ("README.md", "service/cli.py", "trimkv_core/data/smollm2-135m-instruct/config.json"):
        assert reaches_builder(path, IGNORED)
    for path in (".git/config", ".env", "docker/.env", "tests/conftest.py", "service/__pycache__/a.pyc", "id_ed25519"):
        assert not reaches_builder(path, IGNORED)


def link_torch(command: str, builder: Builder) -> None:
    """Put the torch of this test's own environment into the new one, before the stage asks for it.

    pip then finds the requirement satisfied, if it is: a gigabyte less to install. TRIMKV_TEST_TORCH_INSTALL=1 has
    the stage install it.
    """
    if "-m venv" not in command or os.environ.get("TRIMKV_TEST_TORCH_INSTALL") == "1":
        return
    (target,) = (builder.root / "opt/trimkv/venv/lib").glob("python*/site-packages")
    distribution = importlib.metadata.distribution("torch")
    names = {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    source = Path(str(distribution.locate_file("")))
    for name in names:
        (target / name).symlink_to(source / name)


@pytest.fixture(scope="module")
def built() -> Iterator[Builder]:
    """The stages that install the CPU image, carried out one upon the other."""
    with tempfile.TemporaryDirectory(prefix="trimkv-image-") as folder:
        builder = Builder(Path(folder), ROOT, IGNORED)
        arguments = {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
        for name in ("requirements", "cpu-packages", "cpu-app", "cpu-model"):
            builder.build(
                name, STAGES[name], arguments=arguments, after_run=lambda command: link_torch(command, builder)
            )
        yield builder


def contents(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.timeout(1500)
def test_what_the_stages_install_serves_and_writes_to_its_volume_alone(built: Builder, tmp_path: Path) -> None:
    image, volume = built.root / "opt/trimkv", built.root / "var/cache/trimkv"
    volume.mkdir(parents=True)
    assert list((image / "models").glob("smollm2-*/model.safetensors"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {name: built.inside(value) for name, value in STAGES["cpu"].variables().items()}
    kept = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OPENBLAS_CORETYPE") if name in os.environ}
    environment = kept | variables | {"TRIMKV_HOST": "127.0.0.1", "TRIMKV_PORT": str(port), "TMPDIR": str(tmp_path)}
    environment["PATH"] = environment["PATH"].replace("$PATH", os.environ["PATH"])
    before = contents(image)
    (command,) = STAGES["cpu"].values("ENTRYPOINT")
    program_name = json.loads(command)[2]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [image / "app/bin" / program_name, "--kv-memory", "300MiB"],
            cwd=volume,
            env=environment,
            stdout=log,
            stderr=log,
        )

    def is_healthy() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        check = [image / "venv/bin/python", ROOT / "docker/healthcheck.py"]
        return (
            subprocess.run(check, env=environment, stdout=subprocess.DEVNULL, timeout=30, check=False).returncode == 0
        )

    try:
        assert not is_healthy()  # it cannot have loaded yet
        wait_for(is_healthy, "the image's own health check", 240)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={
                "model": "embedded",
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
                "max_tokens": 12,
                "kv_budget": 64,
            },
            timeout=300,
        )
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()
    assert "converting" not in (tmp_path / "log").read_text()
    assert contents(image) == before
    assert list(volume.glob("numba-*/**/*.nbi"))


def test_what_the_image_copies_can_be_read_by_anybody(built: Builder) -> None:
    """Stages run as root, the image as somebody else."""
    for path in (built.root / "opt/trimkv").rglob("*"):
        needed = 0o5 if path.is_dir() else 0o4
        assert path.is_symlink() or path.stat().st_mode & needed == needed, path


def test_packages_and_code_lie_apart_and_the_code_is_no_link_to_its_sources(built: Builder) -> None:
    image = built.root / "opt/trimkv"
    script = (
        "import service, trimkv_core, transformers, opentelemetry.sdk.trace\n"
        "for module in (service, trimkv_core, transformers, opentelemetry.sdk): print(module.__path__[0])"
    )
    done = subprocess.run(
        [image / "venv/bin/python", "-c", script],
        cwd=built.root,
        env=os.environ | {"PYTHONPATH": str(image / "app")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    homes = [Path(line).relative_to(image).parts[0] for line in done.stdout.splitlines()]
    assert homes == ["app", "app", "venv", "venv"], sys.version
    assert not list((image / "venv").glob("lib/python*/site-packages/trimkv*"))
