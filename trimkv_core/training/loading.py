"""Settings out of flags, a config file and the output folder of a run that goes on.

Owns what `--help` says around the settings, and what a resumed run brings along. Knows no setting but where it looks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from trimkv_core.options import OneLineParser, SettingsError, add_flags, read_settings_file
from trimkv_core.training.merging import merge
from trimkv_core.training.settings import TrainSettings

PROGRAM = "trimkv-train"
SETTINGS_NAME = "settings.json"
"""The file of an output folder that holds the exact settings of its run."""


def build_parser() -> OneLineParser:
    """Flags of all settings, grouped."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --model NAME --data FILE ... --output FOLDER --memory-size M --seq-len N --steps N [--flag "
        "value ...]",
        description="Train retention gates for a language model that stays as it is. The output folder is a\n"
        "checkpoint for trimkv-serve --gates. Defaults are the recipe of DBTrimKV (arXiv 2605.09649); several GPUs:\n"
        "accelerate launch -m trimkv_core.training.cli, with the same flags.",
        epilog="A flag goes before the file of --config, the file before the defaults. Example, with the embedded "
        "model:\n"
        f"  {PROGRAM} --model embedded --data texts/ chats.jsonl --output gates --memory-size 64 --seq-len 1024 "
        "--steps 500\n"
        "Killed or stopped, it goes on with the same loss curve:\n"
        f"  {PROGRAM} --output gates --resume",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, TrainSettings)
    return parser


def load_settings(argv: Sequence[str]) -> TrainSettings:
    """Settings out of flags, file and, for a resumed run, what its output folder says.

    Raises:
        SettingsError: a value that is not possible; one line that names where it came from and what is allowed.
        SystemExit: `--help`, or flags that do not exist (status 2).
    """
    flags = vars(build_parser().parse_args(argv))
    file = read_settings_file(str(flags["config"]), example="seq-len: 1024") if "config" in flags else {}
    given = {**file, **flags}
    base: dict[str, object] = {}
    if str(given.get("resume")).lower() == "true" and "output" in given:
        earlier = read_saved_settings(Path(str(given["output"])))
        if earlier is not None:
            base = json.loads(earlier.model_dump_json(exclude={"output", "resume", "config"}, exclude_unset=True))
    return merge(TrainSettings, flags=flags, file=file, base=base)


def read_saved_settings(output: Path) -> TrainSettings | None:
    """The settings of the run in an output folder; None if there is none.

    Raises:
        SettingsError: a settings file that says something else.
    """
    path = output / SETTINGS_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return TrainSettings.model_validate_json(json.dumps(saved["settings"]), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path} does not hold the settings of a run: {reason}") from None
