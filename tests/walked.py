"""What a user does, one command a stage: settings in TOML, commands in a folder, figures written down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACCEPT = Path(__file__).resolve().parent.parent / "accept"


def note(file: str, name: str, figures: dict) -> None:
    """Write figures under a name into a JSON file of accept/, beside what it has."""
    path = ACCEPT / file
    known = json.loads(path.read_text()) if path.exists() else {}
    ACCEPT.mkdir(exist_ok=True)
    path.write_text(json.dumps(known | {name: figures}, indent=1) + "\n")


def stage(folder: Path, *command: str) -> tuple[str, float]:
    """Run one command in `folder`; return what it says and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, round(time.perf_counter() - began, 1)


def cli(folder: Path, *command: str) -> tuple[str, float]:
    return stage(folder, "-m", "slideflow_ray.cli", *command)


def toml(values: Mapping[str, Any]) -> str:
    """Settings as TOML; tables within tables are inline, lists of tables are arrays of tables."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"[[{key}]]\n" + "".join(f"{k} = {_inline(v)}\n" for k, v in one.items()) for one in value]
        else:
            lines.append(f"{key} = {_inline(value)}\n")
    return "".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
