"""The wheel: built, installed apart from the checkout, and run from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_its_template_and_its_script(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "slideflow_ray").rglob("*.py")}
    assert package <= set(names)
    assert "slideflow_ray/templates/report.html.j2" in names
    assert "slideflow_ray/py.typed" in names
    assert {f"slideflow_ray/jobs/{p.name}" for p in (ROOT / "jobs").glob("*.py")} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "jobs", "benchmarks"))]
    (script,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "slideflow-ray = slideflow_ray.cli:main" in zipfile.ZipFile(wheel).read(script).decode()


def test_the_installed_package_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import slideflow_ray, sys; print(slideflow_ray.__file__); from slideflow_ray.cli import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "Score slides" in done.stdout
