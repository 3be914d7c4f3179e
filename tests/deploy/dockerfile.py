"""Dockerfiles, as far as the shipped one goes: its stages, and a builder that runs a stage's commands in a folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

MOUNT = re.compile(r"--mount=\S+\s+")
# Absolute paths of an image that the builder moves into its folder.
IMAGE_PATHS = re.compile(r"(?<![\w./-])/(?=(?:opt/trimkv|src|var/cache/trimkv)\b)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `COPY`, and what follows it on the line and its continuations."""

    keyword: str
    value: str


@dataclass(slots=True)
class Stage:
    """From one FROM to the next."""

    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def values(self, keyword: str) -> list[str]:
        return [instruction.value for instruction in self.instructions if instruction.keyword == keyword]

    def variables(self) -> dict[str, str]:
        """What its ENV lines set."""
        pairs = (pair for value in self.values("ENV") for pair in shlex.split(value))
        return dict(pair.split("=", 1) for pair in pairs)

    def packages(self) -> set[str]:
        """What it installs with apt-get."""
        names: set[str] = set()
        for command in self.values("RUN"):
            for found in re.finditer(r"apt-get install ([^&;]*)", command):
                names |= {word for word in found[1].split() if not word.startswith("-")}
        return names


def parse(text: str) -> dict[str, Stage]:
    """Stages by name, in order; the arguments before the first of them are the stage ``."""
    stages = {"": Stage("")}
    current = stages[""]
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, value = line.split(None, 1)
        if keyword == "FROM":
            base, _, name = value.partition(" AS ")
            current = stages[name] = Stage(base)
        else:
            current.instructions.append(Instruction(keyword, value))
    return stages


def reaches_builder(path: str, ignored: str) -> bool:
    """Whether a path of the build context is sent to the builder under an ignore file; its last match decides."""
    is_sent = True
    for line in ignored.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        is_exception = pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        parts = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        deep = pattern.removeprefix("**/")
        if any(fnmatch(part, pattern) or (deep != pattern and fnmatch(Path(part).name, deep)) for part in parts):
            is_sent = is_exception
    return is_sent


class Builder:
    """Carries out ARG, ENV, WORKDIR, COPY and RUN of stages in `root`, which stands for the image's `/`.

    One folder stands for all stages: a later one finds what any earlier one made.
    """

    def __init__(self, root: Path, context: Path, ignored: str) -> None:
        self.root = root
        self._context = context
        self._ignored = ignored
        # What a stage built upon another one begins with: that one's working directory and ENV.
        self._ends: dict[str, tuple[Path, dict[str, str]]] = {}

    def inside(self, text: str) -> str:
        """`text` with the image's paths moved into the folder."""
        return IMAGE_PATHS.sub(f"{self.root}/", text)

    def build(
        self,
        name: str,
        stage: Stage,
        *,
        arguments: Mapping[str, str],
        after_run: Callable[[str], None] = lambda command: None,
    ) -> None:
        """Carry out `stage`, called `name`; `after_run` is called with each command that has been run."""
        folder, inherited = self._ends.get(stage.base, (self.root, {}))
        variables, asked = dict(inherited), dict[str, str]()
        for instruction in stage.instructions:
            match instruction.keyword:
                case "ARG":
                    argument, _, default = instruction.value.partition("=")
                    asked[argument] = arguments.get(argument, default.strip('"'))
                case "ENV":
                    pairs = (pair.split("=", 1) for pair in shlex.split(instruction.value))
                    variables |= {variable: self.inside(value) for variable, value in pairs}
                case "WORKDIR":
                    folder = Path(self.inside(instruction.value))
                    folder.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(shlex.split(instruction.value), folder)
                case "RUN":
                    command = self.inside(MOUNT.sub("", instruction.value))
                    self._run(command, folder, asked | variables)
                    after_run(command)
                case _:
                    raise ValueError(f"the builder knows no {instruction.keyword}")
        self._ends[name] = folder, variables

    def _copy(self, words: list[str], folder: Path) -> None:
        *sources, target = words
        goal = folder / self.inside(target)
        if sources[0].startswith("--from="):
            for source in sources[1:]:
                path = Path(self.inside(source))
                _copy_file(path, goal / path.name if target.endswith("/") else goal)
            return
        for source in sources:
            path = self._context / source
            if path.is_dir():
                # A folder's content is copied, not the folder.
                for inner in sorted(path.rglob("*")):
                    name = inner.relative_to(self._context).as_posix()
                    if inner.is_file() and reaches_builder(name, self._ignored):
                        _copy_file(inner, goal / inner.relative_to(path))
            elif not reaches_builder(source, self._ignored):
                raise ValueError(f"{source} does not reach the builder: Dockerfile.dockerignore leaves it out")
            else:
                _copy_file(path, goal / path.name if target.endswith("/") else goal)

    def _run(self, command: str, folder: Path, variables: Mapping[str, str]) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{command}\nended with status {done.returncode}:\n{done.stdout[-4000:]}")


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
