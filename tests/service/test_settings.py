from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service import cli
from service.engine.config import EngineConfig
from service.settings import Settings, build_parser, load_settings, parse_size
from trimkv_core.options import SettingsError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("TRIMKV_")]:
        monkeypatch.delenv(name)


def test_the_defaults_are_the_contracts() -> None:
    settings = load_settings([])
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "embedded")
    assert (settings.max_num_seqs, settings.max_queue_requests, settings.max_queue_tokens) == (64, 256, 1_000_000)
    assert (settings.kv_memory, settings.default_max_tokens, settings.watchdog_seconds) == (None, 1024, 300)
    assert (settings.kv_dtype, settings.gpu_memory_utilization, settings.enforce_eager) == ("auto", 0.9, False)
    assert settings.engine_config() == EngineConfig()


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nkv-buffer: 2\nprefill_chunk: 3\nserved-model-name: [x, y]\n")
    monkeypatch.setenv("TRIMKV_CONFIG", str(file))
    monkeypatch.setenv("TRIMKV_PORT", "10")
    monkeypatch.setenv("TRIMKV_KV_BUFFER", "20")
    settings = load_settings(["--port", "100"])
    assert (settings.port, settings.kv_buffer, settings.prefill_chunk, settings.max_num_seqs) == (100, 20, 3, 64)
    assert settings.served_model_name == ("x", "y")
    assert load_settings(["--config", str(file)]).port == 10


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("80GB", 80 * 10**9), ("1.5 kib", 1536), ("512m", 512 * 10**6), ("7", 7), ("4Gi", 4 << 30)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "1e9", "2GiBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--port", "x"),
        ("--kv-memory", "2Q"),
        ("--kv-memory", "5"),
        ("--gpu-memory-utilization", "0"),
        ("--gpu-memory-utilization", "1.01"),
        ("--gpu-memory-utilization", "nan"),
        ("--gpu-memory-utilization", "90%"),
        ("--kv-dtype", "fp8"),
        ("--enforce-eager", "maybe"),
        ("--block-size", "257"),
        ("--dtype", "int4"),
        ("--device", "tpu"),
        ("--kv-buffer", "0"),
        ("--prefill-chunk", "0"),
        ("--max-num-seqs", "0"),
        ("--watchdog-seconds", "nan"),
        ("--log-level", "loud"),
        ("--allow-dense", "perhaps"),
        ("--kv-budget", "-5"),
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_range(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([f"{flag}={value}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"trimkv-serve: {flag}={value} is not possible: must be ")


def test_the_line_says_where_a_bad_value_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kv-buffer: -1\n")
    with pytest.raises(SettingsError, match="kv_buffer in the file of --config=-1"):
        load_settings(["--config", str(file)])
    file.write_text("kv-bufer: 1\n")
    with pytest.raises(SettingsError, match="'kv_bufer'"):
        load_settings(["--config", str(file)])
    file.write_text("[: broken")
    with pytest.raises(SettingsError, match="--config"):
        load_settings(["--config", str(file)])
    with pytest.raises(SettingsError, match="--config"):
        load_settings(["--config", str(tmp_path / "missing.yaml")])
    monkeypatch.setenv("TRIMKV_PORT", "abc")
    with pytest.raises(SettingsError, match="TRIMKV_PORT=abc"):
        load_settings([])


def test_the_environment_counts_in_any_case_for_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 7\n")
    monkeypatch.setenv("trimkv_config", str(file))
    monkeypatch.setenv("trimkv_kv_buffer", "20")
    settings = load_settings([])
    assert (settings.port, settings.kv_buffer, settings.config) == (7, 20, file)
    monkeypatch.setenv("trimkv_port", "abc")
    with pytest.raises(SettingsError, match="trimkv_port=abc"):
        load_settings([])


@pytest.mark.parametrize("line", ["port: true", "kv-budget: on", "drain-timeout: false", "kv-memory: yes"])
def test_true_in_a_file_is_no_number(line: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(line)
    with pytest.raises(SettingsError, match="is not possible: must be "):
        load_settings(["--config", str(file)])


@pytest.mark.parametrize("second", ["kv_memory", "kv-memory"])
def test_a_setting_said_twice_in_a_file_is_refused(second: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"kv-memory: 1GiB\n{second}: 2GiB\n")
    with pytest.raises(SettingsError, match="must say kv_memory once"):
        load_settings(["--config", str(file)])


@pytest.mark.parametrize("text", ["auto", "Auto", " auto "])
def test_a_pool_of_unsaid_size_is_the_engines_to_size(text: str, tmp_path: Path) -> None:
    assert load_settings(["--kv-memory", text]).engine_config().kv_memory_bytes is None
    assert load_settings(["--kv-memory", "3GiB"]).engine_config().kv_memory_bytes == 3 << 30
    file = tmp_path / "serve.yaml"
    file.write_text(f"kv-memory: {text}\ngpu-memory-utilization: 0.5\n")
    config = load_settings(["--config", str(file)]).engine_config()
    assert (config.kv_memory_bytes, config.gpu_memory_utilization) == (None, 0.5)


def test_the_engine_is_told_of_the_type_of_entries_and_of_eager_steps() -> None:
    config = load_settings(["--kv-dtype", "fp8_e4m3", "--enforce-eager"]).engine_config()
    assert (config.kv_dtype, config.enforce_eager) == ("fp8_e4m3", True)
    assert load_settings(["--no-enforce-eager"]).engine_config().enforce_eager is False


def test_the_engine_is_told_of_the_cap() -> None:
    assert load_settings(["--max-kv-budget", "32"]).engine_config().max_kv_budget == 32


def test_settings_at_odds_are_named() -> None:
    with pytest.raises(SettingsError, match="--no-allow-dense"):
        load_settings(["--kv-budget=0", "--no-allow-dense"])
    with pytest.raises(SettingsError, match="--max-kv-budget=64"):
        load_settings(["--kv-budget=128", "--max-kv-budget=64"])
    with pytest.raises(SettingsError, match="--max-model-len=100"):
        load_settings(["--kv-budget=128", "--max-model-len=100"])


def test_an_unknown_flag_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--kv-bugdet", "5"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_booleans_and_names_have_the_forms_people_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(["--no-allow-dense"]).allow_dense is False
    assert load_settings(["--allow-dense", "false"]).allow_dense is False
    assert load_settings(["--allow-dense"]).allow_dense is True
    assert load_settings(["--served-model-name", "a", "--served-model-name", "b"]).served_model_name == ("a", "b")
    assert load_settings(["--served-model-name", "a,b", "--served-model-name", "c"]).served_model_name == (
        "a",
        "b",
        "c",
    )
    with pytest.raises(SettingsError, match="--served-model-name"):
        load_settings(["--served-model-name", ""])
    monkeypatch.setenv("TRIMKV_SERVED_MODEL_NAME", "c, d")
    assert load_settings([]).served_model_name == ("c", "d")


def test_help_names_every_setting_with_its_default() -> None:
    text = build_parser().format_help()
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
    assert "2GiB on a CPU (default: auto)" in " ".join(text.split())
    assert "a,b" in text


def test_a_taken_port_ends_the_command_with_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert f"--port={port} is not possible" in done.stderr
    assert "Traceback" not in done.stderr
