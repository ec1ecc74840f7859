"""The promises of the design, as code: layers, heavy imports, docstrings, no asserts on user input."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slideflow_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    ["errors", "exits", "events", "geometry", "processes", "specs", "texts", "uris"],
    ["website", "observe"],
    ["bucket"],
    ["storage"],
    ["cache"],
    ["remote"],
    ["blocks"],
    [
        "identity",
        "cohort",
        "splits",
        "slides",
        "tissue",
        "focus",
        "grid",
        "stain",
        "objects",
        "metrics",
        "membrane",
        "scalebar",
    ],
    ["collect", "label_files", "annotations", "store", "profile", "prepare", "models", "tables", "lease"],
    ["changes"],
    ["packs", "planes", "thickness", "layout", "sparse", "staining", "pipeline"],
    ["execute", "aggregate"],
    [
        "accounting",
        "repair",
        "graph",
        "units",
        "run",
        "results",
        "rules",
        "cases",
        "answers",
        "counts",
        "cascade",
        "detection",
        "overlap",
        "biopsies",
        "evaluate",
        "lesions",
        "labelled",
        "calibrate",
        "compare",
        "promote",
        "train",
        "explain",
        "mil",
    ],
    ["quality", "figures", "gallery", "walls"],
    ["report", "stainview", "export", "web", "nightly", "submit", "progress", "doctor", "privacy", "demo"],
    ["cli"],
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
APART = {"phantoms", "testing"}

HEAVY = {
    "ray": {
        *("execute/on_ray.py", "execute/cluster.py", "execute/actors.py", "aggregate.py", "observe.py"),
        *("train/on_ray.py", "train/job.py", "train/choose.py", "submit/follow.py", "submit/probe.py"),
    },
    "dask": {"aggregate.py"},
    "tiffslide": {"slides/tiff.py"},
    "openslide": {"slides/openslide.py", "doctor.py"},
    "zarr": {"store.py", "slides/omezarr.py", "slides/guarded.py", "bucket.py"},
    "mrcfile": {"slides/electron.py"},
    "tifffile": {"export.py", "slides/image.py", "slides/deep.py", "phantoms/files.py", "phantoms/tem.py"},
    "imagecodecs": {"slides/image.py"},
    "matplotlib": {"report.py", "stainview.py", "train/record.py"},
    "jinja2": {"report.py"},
    "pyarrow": {"tables.py"},
    "shapely": {
        "export.py",
        "planes.py",
        "annotations.py",
        "objects.py",
        "detection.py",
        "overlap.py",
        "walls.py",
        "train/masks.py",
    },
    "segmentation_models_pytorch": {"models/networks.py"},
    "tensorboardX": {"train/record.py"},
    "sklearn": {"train/loop.py", "train/svm.py", "train/machines.py", "lesions.py", "stainview.py"},
    "skimage": {"membrane.py", "train/pretext.py"},
    "defusedxml": {"annotations.py"},
    "captum": {"explain.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports; those under `if TYPE_CHECKING` are only words."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    nodes = ast.walk(tree) if not top_level_only else iter(tree.body)
    typing = {
        id(n)
        for t in ast.walk(tree)
        if isinstance(t, ast.If) and "TYPE_CHECKING" in ast.dump(t.test)
        for n in ast.walk(t)
    }
    for node in nodes:
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_module_has_a_layer():
    assert {name_of(p) for p in MODULES} - {"__init__"} <= set(LAYER) | APART


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = name_of(path)
    if own in APART | {"__init__"}:
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "slideflow_ray" and len(parts) > 1 and parts[1] not in APART and parts[1] in LAYER:
            assert LAYER[parts[1]] <= LAYER[own], f"{own} imports {module}"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_home(library):
    users = {str(p.relative_to(PACKAGE)) for p in MODULES if any(m.split(".")[0] == library for m in imports(p))}
    assert users <= HEAVY[library], f"{library} is imported in {users - HEAVY[library]}"


def test_pipeline_and_what_it_stands_on_load_no_torch_and_no_ray():
    code = (
        "import sys, slideflow_ray.pipeline, slideflow_ray.execute; print({'torch', 'ray', 'dask'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_names_are_documented_and_nothing_asserts(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py" or path.read_text().strip():
        assert ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert) or name_of(path) == "testing", f"line {node.lineno}: assert"
    for node in tree.body:
        drawn = path.name == "errors.py" and isinstance(node, ast.ClassDef)  # the module's docstring draws the tree
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not drawn:
            text = ast.get_docstring(node)
            assert text, f"{node.name} has no docstring"
            assert text.split("\n")[0].rstrip().endswith((".", ":", ";")) or "\n" in text, f"{node.name}: {text!r}"


def test_doctests_of_the_light_modules_run():
    import doctest
    import importlib

    run = 0
    for name in (
        "geometry",
        "specs",
        "storage",
        "store",
        "metrics",
        "annotations",
        "results",
        "rules",
        "cases",
        "counts",
        "phantoms",
        "stain",
        "collect",
        "label_files",
        "splits",
        "texts",
        "uris",
    ):
        result = doctest.testmod(importlib.import_module(f"slideflow_ray.{name}"))
        assert result.failed == 0
        run += result.attempted
    assert run > 10


def test_nothing_in_the_repository_names_a_host_or_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for name in tracked:
        path = ROOT / name
        if not path.exists():
            continue
        assert path.stat().st_size <= 1_500_000, name
        if path.suffix in {".py", ".toml", ".txt", ".md", ".yml", ".yaml", ".j2", ""} and path != Path(__file__):
            text = path.read_text(errors="ignore")
            for bad in (f"index{'-'}url", f"find{'-'}links", f"/{'work'}/", f"/{'root'}/"):
                assert bad not in text, f"{name} holds {bad!r}"


def test_the_nine_packages_are_direct_dependencies():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {d.split(">")[0].split("[")[0] for d in project["dependencies"]}
    assert named >= {"ray", "torch", "torchvision", "tiffslide", "zarr", "dask", "scikit-learn", "numpy", "fsspec"}
