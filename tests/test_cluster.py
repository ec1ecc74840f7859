"""cluster/: the recipes agree with the package, with each other, and with what can check them here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from slideflow_ray.observe import METRICS
from slideflow_ray.specs import ExecutorSpec

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent
MANIFESTS = sorted(CLUSTER.glob("kuberay/*.yaml"))
UPS = sorted(CLUSTER.glob("ray-up/*.yaml"))
RAY_KINDS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayCronJob": ("jobTemplate", "rayClusterSpec")}


def pinned(name: str) -> str:
    lock = (ROOT / "requirements.lock.txt").read_text()
    return re.search(rf"^{re.escape(name)}==(\S+)", lock, re.M).group(1)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def ray_cluster(path: Path) -> dict | None:
    """The RayCluster's spec in a manifest."""
    manifest = read(path)
    spec = manifest["spec"]
    for key in RAY_KINDS.get(manifest["kind"], ("",)):
        spec = spec.get(key)
    return spec


def containers(value: object):
    """Every container in a manifest."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "containers":
                yield from inner
            else:
                yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def test_there_is_what_the_readme_names():
    named = set(
        re.findall(
            r"`([\w./-]+\.(?:yaml|sbatch|service|timer|json|py)|Dockerfile)`", (CLUSTER / "README.md").read_text()
        )
    )
    there = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    assert {name for name in named if (CLUSTER / name).exists()} >= there - {"README.md", "Dockerfile.dockerignore"} - {
        name for name in there if "__pycache__" in name
    }


# versions


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in str(path)}
    images = {found for said in text.values() for found in re.findall(r"slideflow-ray:([\d.]+)-[cg]pu", said)}
    assert images == {project["version"]}
    rays = {found for said in text.values() for found in re.findall(r"rayVersion: \"([\d.]+)\"", said)}
    assert rays == {pinned("ray")}
    python = (ROOT / ".python-version").read_text().strip()
    assert re.search(r"^FROM python:([\d.]+)-", text[CLUSTER / "Dockerfile"], re.M).group(1) == python
    floor = next(re.search(r">=([\d.]+)", need).group(1) for need in project["dependencies"] if need.startswith("ray["))
    assert tuple(map(int, pinned("ray").split("."))) >= tuple(map(int, floor.split(".")))


# tokens


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_every_container_says_token(path):
    found = list(containers(read(path)))
    assert found
    for container in found:
        said = {each["name"]: each for each in container["env"]}
        assert said["RAY_AUTH_MODE"]["value"] == "token"
        assert said["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"
    spec = ray_cluster(path)
    assert spec is None or spec["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("path", UPS, ids=lambda p: p.name)
def test_every_ray_start_of_ray_up_says_token(path):
    spec = read(path)
    starts = [line for kind in ("head", "worker") for line in spec[f"{kind}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert any("auth_token" in target for target in spec["file_mounts"])
    assert any("chmod 600" in line for line in spec["setup_commands"])


def test_units_image_and_script_say_token_and_no_recipe_of_a_shared_node_stops_ray():
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    for path in [*CLUSTER.glob("systemd/*.service"), CLUSTER / "slurm/score.sbatch"]:
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert any("RAY_AUTH_MODE=token" in line for line in code), path
        assert not any(re.search(r"ray (stop|symmetric-run)", line) for line in code), path


def test_no_port_lies_among_those_of_ray_workers():
    for path in [*CLUSTER.rglob("*.yaml"), *CLUSTER.rglob("*.service")]:
        ports = map(int, re.findall(r"(?:port=|containerPort: )(\d+)", path.read_text()))
        assert not [port for port in ports if 10002 <= port <= 19999], path
    text = (CLUSTER / "slurm/score.sbatch").read_text()
    offset, modulus, step = map(int, re.search(r"base=\$\(\((\d+) \+ SLURM_JOB_ID % (\d+) \* (\d+)\)\)", text).groups())
    ports = [int(n) for n in re.findall(r"port=\$\(\(base \+ (\d+)\)\)", text)]
    assert len(set(ports)) == len(ports) == 10
    assert max(ports) < step
    assert offset > 19999
    assert offset + modulus * step <= 32768  # where the system's ephemeral ports begin


# what can be checked by others


def test_the_cronjob_is_one_to_kubernetes():
    done = subprocess.run(
        [TOOLS / "kubernetes-validate", "--strict", CLUSTER / "kuberay/cronjob.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.name != "cronjob.yaml"], ids=lambda p: p.name)
def test_the_pods_of_a_ray_cluster_are_pods_to_kubernetes(path, tmp_path):
    """KubeRay's own schemas are in no package registry; the pods in its manifests are Kubernetes' own."""
    spec = ray_cluster(path)
    for i, group in enumerate([spec["headGroupSpec"], *spec["workerGroupSpecs"]]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(pod))
    files = sorted(tmp_path.glob("*.yaml"))
    done = subprocess.run([TOOLS / "kubernetes-validate", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_three_ray_clusters_are_one():
    specs = [ray_cluster(path) for path in MANIFESTS if path.name != "cronjob.yaml"]
    assert len(specs) == 3
    assert specs[0] == specs[1] == specs[2]


def test_sizes_have_room_for_a_scorer_and_its_readers():
    group = ray_cluster(CLUSTER / "kuberay/raycluster.yaml")["workerGroupSpecs"][0]
    needs = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(needs["cpu"]) >= int(needs["nvidia.com/gpu"]) * (1 + ExecutorSpec().readers_per_gpu)
    text = (CLUSTER / "slurm/score.sbatch").read_text()
    cpus, gpus = (
        int(re.search(rf"#SBATCH --{name}=(\d+)", text).group(1)) for name in ("cpus-per-task", "gpus-per-node")
    )
    assert cpus >= gpus * (1 + ExecutorSpec().readers_per_gpu)


@pytest.mark.parametrize("path", UPS, ids=lambda p: p.name)
def test_ray_accepts_its_cluster_files(path):
    import jsonschema

    folder = Path(importlib.util.find_spec("ray").origin).parent
    schema = json.loads((folder / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(read(path), schema)
    assert read(path)["head_node_type"] in read(path)["available_node_types"]


def test_scripts_pass_shellcheck():
    scripts = [
        p
        for p in CLUSTER.rglob("*")
        if p.is_file() and p.read_bytes()[:30].startswith((b"#!/usr/bin/env bash", b"#!/bin"))
    ]
    assert scripts
    done = subprocess.run([TOOLS / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run([TOOLS / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    users = re.findall(r"^USER (\S+)", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert users == ["1000"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_units_pass_systemd_analyze(tmp_path):
    for path in CLUSTER.glob("systemd/*"):  # the programs are not installed here, so others stand for them
        said = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text(), flags=re.M)
        (tmp_path / path.name).write_text(said)
    units = sorted(tmp_path.iterdir())
    assert len(units) == 3
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, cwd=tmp_path)
    ours = [line for line in done.stderr.splitlines() if "slideflow-ray" in line]
    assert ours == []
    assert "Persistent=true" in (CLUSTER / "systemd/slideflow-ray-nightly.timer").read_text()


# the dashboard


def test_the_dashboard_asks_for_every_metric_and_no_other():
    board = json.loads((CLUSTER / "grafana/slideflow-ray.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in board["templating"]["list"]]
    names = {name for expr in asked for name in re.findall(r"ray_(slideflow_ray_\w+)", expr)}
    exported = {}
    for name, (kind, _, _) in METRICS.items():
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[kind]
        exported |= {name + suffix: name for suffix in suffixes}
    assert names <= set(exported)
    assert {exported[name] for name in names} == set(METRICS)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


# costs


def test_costs_are_those_of_the_slower():
    spec = importlib.util.spec_from_file_location("costs", CLUSTER / "costs.py")
    costs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(costs)
    times = {"read": [0.64, 1.28], "forward": [3.2, 3.2]}  # 15 and 50 ms a tile
    assert costs.rate(times) == pytest.approx(1 / 0.065)
    assert costs.rate(times, readers=4, forward=1000) == pytest.approx(4 / 0.015)
    assert costs.rate(times, readers=4, forward=100) == 100
    assert costs.cost(3600, 100, 2.0) == pytest.approx((10.0, 20.0))


# the script for Slurm, with what Slurm gives played by scripts


@pytest.mark.soak
def test_the_slurm_script_runs_and_leaves_nothing(marked, bundles, tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    (fake / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    for script in fake.iterdir():
        script.chmod(0o755)
    out = tmp_path / "out"
    (tmp_path / "run.toml").write_text(
        f'cohort = "{marked / "cohort.csv"}"\nout = "{out}"\n[[model]]\npath = "{bundles["aligned"]}"\n'
        '[executor]\nkind = "ray"\n[compute]\ndevice = "cpu"\n'
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "2", "RUN": "run.toml"}
    path = f"{fake}:{TOOLS}:{os.environ['PATH']}"
    env = {**os.environ, **job, "PATH": path, "SLURM_GPUS_ON_NODE": "0", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        ["bash", CLUSTER / "slurm/score.sbatch"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "done 3" in done.stdout
    assert (tmp_path / "run-7.jsonl").exists()
    assert not list(tmp_path.glob(".slideflow-ray-*"))  # the token went with the job
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "/tmp/ray-7/" not in left
    shutil.rmtree("/tmp/ray-7", ignore_errors=True)
