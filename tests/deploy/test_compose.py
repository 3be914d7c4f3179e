"""The compose files: against the official schema, and what an operator is promised of them. No engine runs here."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from service.server import FLUSH_SECONDS
from service.settings import Settings, parse_size
from tests.deploy import compose
from tests.deploy.dockerfile import parse

# compose-spec's own schema (Apache-2.0), as the package check-jsonschema carries it.
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
FILES = ("compose.yaml", "compose.scale.yaml")
EXACT_IMAGE = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
OWN_IMAGES = {"trimkv-serve:cpu", "trimkv-serve:cuda"}

Service = dict[str, Any]


def services(*names: str) -> dict[str, Service]:
    """All services of the files `names`, one over the other, variables filled in."""
    whole: Any = {}
    for name in names:
        whole = compose.merge(whole, compose.extended(compose.load(name)))
    found: dict[str, Service] = compose.fill_in(whole, compose.read_env())["services"]
    return found


BASE, SCALED = services("compose.yaml"), services(*FILES)
EACH = [pytest.param(service, id=f"base-{name}") for name, service in BASE.items()]
EACH += [pytest.param(service, id=f"scaled-{name}") for name, service in SCALED.items()]


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.mark.parametrize("name", FILES)
def test_each_file_follows_the_compose_specification(name: str) -> None:
    raw = compose.without_marks(compose.load(name))
    for document in (raw, compose.fill_in(raw, compose.read_env())):
        jsonschema.validators.validator_for(SCHEMA)(SCHEMA).validate(document)


def test_the_schema_refuses_what_is_misspelt() -> None:
    broken = {"services": {"cpu": {"image": "a", "helthcheck": {}}}}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate(broken, SCHEMA)


def test_one_file_over_the_other_follows_it_too() -> None:
    jsonschema.validate(compose.without_marks({"services": SCALED}), SCHEMA)


@pytest.mark.parametrize("service", EACH)
def test_no_service_has_more_rights_than_it_needs(service: Service) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert "network_mode" not in service
    assert "pid" not in service


@pytest.mark.parametrize("service", EACH)
def test_every_service_is_watched_and_bounded(service: Service) -> None:
    check = service["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"]
    assert service["logging"]["options"]["max-size"]
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("service", EACH)
def test_ports_are_published_on_the_loopback_alone(service: Service) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@pytest.mark.parametrize("service", EACH)
def test_images_are_of_an_exact_version(service: Service) -> None:
    assert service["image"] in OWN_IMAGES or EXACT_IMAGE.fullmatch(service["image"])


@pytest.mark.parametrize("service", EACH)
def test_folders_of_the_repository_are_mounted_read_only_and_exist(service: Service) -> None:
    volumes = compose.load("compose.yaml")["volumes"]
    for volume in service.get("volumes", []):
        source, _, mode = volume.split(":") if volume.count(":") == 2 else (*volume.split(":"), "rw")
        if source.startswith("."):
            assert (compose.FOLDER / source).is_dir()
            assert mode == "ro"
        else:
            assert source in volumes


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_service_gets_what_it_writes_to_and_the_time_it_drains(name: str) -> None:
    service = BASE[name]
    assert any(volume.endswith(":/var/cache/trimkv") for volume in service["volumes"])
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    drain = Settings.model_fields["drain_timeout"].default
    assert seconds(service["stop_grace_period"]) > drain + FLUSH_SECONDS
    assert service["profiles"] == [name]
    assert compose.read_env()["COMPOSE_PROFILES"] == "cpu"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_health_check_is_the_images_own(name: str) -> None:
    stages = parse((compose.FOLDER / "Dockerfile").read_text(encoding="utf-8"))
    stage = stages[BASE[name]["build"]["target"]]
    (said,) = stage.values("HEALTHCHECK")
    check = BASE[name]["healthcheck"]
    assert json.dumps(check["test"][1:]) in said
    assert f"--start-period={check['start_period']}" in said


def test_threads_are_as_many_as_cores_are_allowed() -> None:
    cpu = BASE["cpu"]
    assert cpu["environment"]["OMP_NUM_THREADS"] == cpu["deploy"]["resources"]["limits"]["cpus"]


def test_the_pool_and_the_weights_fit_in_the_memory_that_is_allowed() -> None:
    cpu = BASE["cpu"]
    pool = parse_size(cpu["environment"]["TRIMKV_KV_MEMORY"])
    allowed = parse_size(cpu["deploy"]["resources"]["limits"]["memory"] + "ib")
    assert isinstance(pool, int)
    assert isinstance(allowed, int)
    assert pool + (3 << 30) <= allowed  # weights, their packed copy, Python and torch: 2 GiB measured


@pytest.mark.parametrize("service", [BASE["cpu"], BASE["gpu"]])
def test_what_is_set_exists(service: Service) -> None:
    for name in service["environment"]:
        if name.startswith("TRIMKV_"):
            assert name.removeprefix("TRIMKV_").lower() in Settings.model_fields


def test_scaled_replicas_are_reached_through_nginx_alone() -> None:
    assert int(SCALED["cpu"]["deploy"]["replicas"]) >= 2
    for name in ("cpu", "gpu", "gpu-1"):
        assert "ports" not in SCALED[name]
        assert SCALED[name]["networks"]["trimkv"]["aliases"] == ["trimkv"]
        assert SCALED["nginx"]["depends_on"][name] == {"condition": "service_healthy", "required": False}
    host_port = BASE["cpu"]["ports"][0].split(":")[1]
    assert SCALED["nginx"]["ports"] == [f"127.0.0.1:{host_port}:8080"]


def test_each_replica_on_a_gpu_has_a_card_of_its_own() -> None:
    """Docker gives every container of a service the same cards, `count: 1` meaning the first."""
    cards = []
    for service in SCALED.values():
        for device in service["deploy"]["resources"].get("reservations", {}).get("devices", []):
            assert service["deploy"].get("replicas", 1) == 1
            assert "count" not in device
            cards += device["device_ids"]
    assert cards == ["0", "1"]


def test_nginx_starts_no_more_workers_than_it_may() -> None:
    configuration = (compose.FOLDER / "nginx/nginx.conf").read_text(encoding="utf-8")
    found = re.search(r"^worker_processes (\d+);$", configuration, re.MULTILINE)  # `auto` counts the host's processors
    assert found is not None
    assert int(found[1]) < SCALED["nginx"]["deploy"]["resources"]["limits"]["pids"]


def test_what_is_handed_to_a_build_is_asked_for_there() -> None:
    stages = parse((compose.FOLDER / "Dockerfile").read_text(encoding="utf-8"))
    for service in (BASE["cpu"], BASE["gpu"]):
        stage = stages[f"{service['build']['target']}-packages"]
        asked = dict(value.split("=", 1) for value in stage.values("ARG"))
        for name, value in service["build"]["args"].items():
            assert asked[name].strip('"') == value


def test_defaults_are_the_same_with_and_without_the_env_file() -> None:
    env, text = compose.read_env(), "".join((compose.FOLDER / name).read_text("utf-8") for name in FILES)
    asked = compose.VARIABLE.findall(text)
    names = {name for name, _, _ in asked}
    assert env.keys() - names == {"COMPOSE_PROFILES"}
    assert names - env.keys() == {"HF_TOKEN"}  # a secret: from the shell, never out of the repository
    for name, _, default in asked:
        assert default == env.get(name, ""), name
