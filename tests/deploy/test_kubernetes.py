"""The chart as Helm renders it: valid for Kubernetes, true to the service, with the promises operators rely on."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.server import FLUSH_SECONDS
from service.settings import Settings
from tests.deploy.debian import program
from tests.deploy.helm import CHART, ROOT, helm

GPU = ROOT / "deploy" / "helm" / "examples" / "gpu.yaml"
SCRAPED = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
ADAPTER = ROOT / "deploy" / "helm" / "prometheus-adapter.yaml"
# The oldest that Chart.yaml allows, and the newest whose schemas are installed.
VERSIONS = ("1.30", "1.37")
# Of no Kubernetes version: the Prometheus operator brings it.
CUSTOM = {"ServiceMonitor", "PrometheusRule"}
# The chart's own, or said elsewhere in its values.
NOT_SETTINGS = {"host", "port", "config", "drain_timeout"}

Manifests = dict[str, dict[str, Any]]


@functools.cache
def rendered(*flags: str) -> str:
    return helm("template", "trimkv", str(CHART), "--namespace", "llm", *flags)


def render(*flags: str) -> Manifests:
    """What is installed, by kind."""
    documents = [document for document in yaml.safe_load_all(rendered(*flags)) if document]
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def pod(manifests: Manifests) -> dict[str, Any]:
    found: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return found


def container(manifests: Manifests) -> dict[str, Any]:
    only: dict[str, Any]
    (only,) = pod(manifests)["containers"]
    return only


def variables(manifests: Manifests) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(manifests)["env"]}


EVERYTHING = [
    *("--set", "autoscaling.enabled=true", "--set", "serviceMonitor.enabled=true", "--set", "gpu.enabled=true"),
    *("--set", "gpu.runtimeClassName=nvidia", "--set", "cache.existingClaim=models", "--set", "priorityClassName=high"),
    *("--set", "hubToken.existingSecret=hub", "--set", "image.pullSecrets[0].name=pull", "--set", "nodeSelector.a=b"),
    *("--set-json", 'extraEnv=[{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel:4318"}]'),
    *("--set-json", 'tolerations=[{"key": "llm", "operator": "Exists"}]'),
    *("--set-json", 'affinity={"nodeAffinity": {}}', "--set", "podAnnotations.a=b", "--set", "podLabels.team=x"),
    *("--set-json", 'networkPolicy.extraEgress=[{"ports": [{"protocol": "TCP", "port": 4318}]}]'),
    *("--set", "service.annotations.a=b", "--set", "serviceAccount.annotations.a=b"),
    *("--set-file", f"prometheusRule.rules={RULES}", "--set", "prometheusRule.labels.release=prometheus"),
]


@pytest.mark.parametrize("flags", [[], ["--values", str(GPU)], EVERYTHING], ids=["default", "gpu", "everything"])
def test_what_is_rendered_is_valid_for_kubernetes(flags: list[str]) -> None:
    manifests = render(*flags)
    assert {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"} <= set(manifests)
    for kind, manifest in manifests.items():
        if kind in CUSTOM:
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_finds_a_field_that_kubernetes_does_not_know() -> None:
    manifest = render()["Deployment"]
    manifest["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_helm_has_nothing_to_say() -> None:
    for flags in ([], ["--values", str(GPU)]):
        assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), *flags)


def test_the_settings_of_the_chart_are_those_of_the_service() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    names = schema["properties"]["settings"]["propertyNames"]["enum"]
    assert names == sorted(set(Settings.model_fields) - NOT_SETTINGS)


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    def names(values: dict[str, Any], schema: dict[str, Any], where: str = "") -> None:
        properties = schema.get("properties", {})
        if not properties:
            return
        assert set(values) == set(properties) - {"global"}, where
        for name, value in values.items():
            if isinstance(value, dict):
                names(value, properties[name], f"{where}.{name}")

    names(yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text()))


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("settings.kv_memry=1GiB", "kv_memry"),
        ("settings.port=9000", "port"),
        ("drain.marginSeconds=5", "marginSeconds"),
        ("drain.preStop=5", "preStop"),
        ("image.digest=latest", "digest"),
        ("autoscaling.enabled=true,autoscaling.minReplicas=5", "maxReplicas must be at least"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(flag: str, part: str) -> None:
    assert part in helm("template", "trimkv", str(CHART), "--set", flag, fails=True)


def test_settings_arrive_in_the_service_as_they_were_said(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("settings.max_queue_tokens=4000000", "settings.gpu_memory_utilization=0.85", "settings.allow_dense=false")
    listed = ("--set-json", 'settings.served_model_name=["a","b"]')
    manifests = render("--set", ",".join(flags), *listed)
    for name, value in variables(manifests).items():
        if name.startswith("TRIMKV_"):
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.max_queue_tokens, settings.gpu_memory_utilization, settings.allow_dense) == (
        4_000_000,
        0.85,
        False,
    )
    assert settings.served_model_name == ("a", "b")
    assert settings.model == "embedded"


def test_a_gpu_example_leaves_the_pool_to_the_gpu() -> None:
    manifests = render("--values", str(GPU))
    assert "TRIMKV_KV_MEMORY" not in variables(manifests)
    assert container(manifests)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "OMP_NUM_THREADS" not in variables(manifests)
    assert variables(render())["OMP_NUM_THREADS"]["resourceFieldRef"]["resource"] == "limits.cpu"


@pytest.mark.parametrize("flags", [[], ["--set", "drain.timeoutSeconds=600,drain.preStopSeconds=30"]])
def test_a_pod_is_killed_only_after_its_drain_has_had_its_time(flags: list[str]) -> None:
    manifests = render(*flags)
    args = dict(argument.removeprefix("--").split("=") for argument in container(manifests)["args"])
    sleep = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    # What the server itself allows after the drain: answers on their way, then connections that are still open.
    needed = sleep + float(args["drain-timeout"]) + 2 * FLUSH_SECONDS
    assert pod(manifests)["terminationGracePeriodSeconds"] > needed


def test_a_pod_can_change_nothing_but_its_cache() -> None:
    for flags in ([], ["--values", str(GPU)]):
        manifests = render(*flags)
        security, whole = container(manifests)["securityContext"], pod(manifests)["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] > 0
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod(manifests)["automountServiceAccountToken"] is False
        assert {mount["mountPath"] for mount in container(manifests)["volumeMounts"]} == {"/var/cache/trimkv", "/tmp"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(manifests))


def test_the_user_and_the_folders_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    assert user is not None
    whole = pod(render())["securityContext"]
    assert (str(whole["runAsUser"]), str(whole["runAsGroup"])) == user.groups()
    assert re.search(r"^VOLUME /var/cache/trimkv$", dockerfile, re.MULTILINE)


def test_probes_wait_for_loading_and_ask_what_the_service_answers() -> None:
    probes = container(render("--set", "probes.startupSeconds=1801"))
    startup, ready, live = (probes[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1801
    assert [probe["httpGet"]["path"] for probe in (startup, ready, live)] == [
        "/health/ready",
        "/health/ready",
        "/health/live",
    ]


def test_one_selector_finds_the_pods_everywhere() -> None:
    manifests = render(*EVERYTHING)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert selectors[4].items() <= manifests["Service"]["metadata"]["labels"].items()
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])


def test_the_operators_prometheus_gets_the_rules_and_names_that_they_know() -> None:
    manifests = render(*EVERYTHING)
    shipped = yaml.safe_load(RULES.read_text())
    assert manifests["PrometheusRule"]["spec"] == shipped
    assert manifests["PrometheusRule"]["metadata"]["labels"]["release"] == "prometheus"
    assert "PrometheusRule" not in render()
    (endpoint,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
    relabelled = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
    assert relabelled["job"]["replacement"] == yaml.safe_load(SCRAPED.read_text())["scrape_configs"][0]["job_name"]
    assert relabelled["instance"]["sourceLabels"] == ["__meta_kubernetes_pod_name"]
    (port,) = manifests["Service"]["spec"]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")


def test_the_autoscaler_decides_alone_over_the_number_of_pods() -> None:
    assert render()["Deployment"]["spec"]["replicas"] == 1
    assert "replicas" not in render("--set", "autoscaling.enabled=true")["Deployment"]["spec"]


def test_the_port_is_reached_by_those_named_alone() -> None:
    spec = render()["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    (ingress,) = spec["ingress"]
    assert [peer for peer in ingress["from"] if peer in ({}, {"namespaceSelector": {}})] == []
    closed = render("--set", "networkPolicy.allowHub=false")["NetworkPolicy"]["spec"]["egress"]
    assert {port["port"] for rule in closed for port in rule["ports"]} == {53}


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    metrics = render("--set", "autoscaling.enabled=true")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    wanted = {metric["pods"]["metric"]["name"] for metric in metrics}
    assert wanted == {rule["name"]["as"] for rule in adapter_rules()}
    (ratio,) = (metric for metric in metrics if metric["pods"]["metric"]["name"] == "trimkv_kv_pool_reserved_ratio")
    assert ratio["pods"]["target"]["averageValue"] == "850m"


def test_prometheus_understands_the_adapters_queries_and_they_say_what_they_should(tmp_path: Path) -> None:
    promtool = program("promtool", package="prometheus")
    rules = [{"record": rule["name"]["as"] + ":asked", "expr": asked(rule)} for rule in adapter_rules()]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))
    labels = 'namespace="llm", pod="a"'

    def series(name: str, values: str, more: str = "") -> dict[str, str]:
        return {"series": f"{name}{{{labels}{more}}}", "values": values}

    def expected(expression: str, value: float) -> dict[str, Any]:
        labelled = f'{expression}{{pod="a"}}'
        return {"expr": expression, "eval_time": "4m", "exp_samples": [{"labels": labelled, "value": value}]}

    # The queue: 7 half a minute ago, none now. The pool: 60 of 80 pages promised. Pod b has no pool yet.
    test = {
        "interval": "15s",
        "input_series": [
            series("trimkv_num_requests_waiting", "0x13 7 7 0 0 0x20"),
            series("trimkv_kv_pages", "60x40", ', state="reserved"'),
            series("trimkv_kv_pages", "50x40", ', state="used"'),
            series("trimkv_kv_pages", "30x40", ', state="free"'),
            *(
                {"series": f'trimkv_kv_pages{{namespace="llm", pod="b", state="{state}"}}', "values": "0x40"}
                for state in ("reserved", "used", "free")
            ),
        ],
        "promql_expr_test": [
            expected("trimkv_num_requests_waiting:asked", 7),
            expected("trimkv_kv_pool_reserved_ratio:asked", 0.75),
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(
        [promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def adapter_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    return rules


def asked(rule: dict[str, Any]) -> str:
    """The query the adapter makes of a rule for all pods of a namespace."""
    name = rule["seriesQuery"].partition("{")[0]
    filled: str = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
    return filled.replace("<<.LabelMatchers>>", 'namespace="llm",pod=~"a|b"')
