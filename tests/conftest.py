"""What tests share: the folder of real slides, small slides and bundles, and one local Ray."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Token authentication with a token of the tests' own; Ray reads the mode once, when it is first imported."""
    folder = Path(tempfile.mkdtemp(prefix="slideflow-ray-token-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    token = folder / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    os.environ.pop("RAY_ADDRESS", None)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests, and all tests of the one local Ray, in one process when there are several.

    What needs Ray comes first: it takes longest, and the other process meanwhile does the rest.
    """

    def uses_ray(item: pytest.Item) -> bool:
        return "local_ray" in getattr(item, "fixturenames", ())

    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if uses_ray(item) else item.path.stem))
    items.sort(key=lambda item: not uses_ray(item))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real slides, or skip."""
    folder = Path(os.environ.get("SLIDEFLOW_RAY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real slides: {folder} is absent (set SLIDEFLOW_RAY_DATA)")
    return folder


@pytest.fixture(scope="session")
def marked(tmp_path_factory) -> Path:
    """A cohort of three small slides in which no two tiles are alike, and one file that is no slide."""
    from slideflow_ray.phantoms import write_marked_slide

    folder = tmp_path_factory.mktemp("marked")
    sizes = {"a": (701, 1203), "b": (1203, 401), "c": (512, 512)}
    for name, size_px0 in sizes.items():
        write_marked_slide(folder / f"{name}.tif", size_px0=size_px0)
    (folder / "d.svs").write_text("not a slide")
    rows = "".join(f"{name},{name}.tif,tem\n" for name in sizes)
    (folder / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    (folder / "with_a_bad_one.csv").write_text(f"slide_id,uri,modality\n{rows}d,d.svs,tem\n")
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Two small networks with fixed random weights: 64 px at 0.5 um (aligned) and 48 px at 0.7 um (resampled)."""
    import torch

    from slideflow_ray.models.bundle import BundleCard, write_bundle
    from slideflow_ray.models.networks import build

    folder = tmp_path_factory.mktemp("bundles")
    made = {}
    for seed, (name, tile_px, mpp) in enumerate([("aligned", 64, 0.5), ("odd", 48, 0.7)]):
        torch.manual_seed(seed)
        card = BundleCard(
            name=name,
            task="classify",
            architecture="small-cnn",
            classes=("normal", "tumor"),
            tile_px=tile_px,
            mpp=mpp,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        )
        write_bundle(folder / name, card, build("small-cnn", {}, 2).state_dict())
        made[name] = folder / name
    return made


@pytest.fixture(scope="session")
def ray_env() -> dict[str, str]:
    """Token authentication, as set below for this process and those it starts."""
    return {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED")}


@pytest.fixture(scope="session")
def local_ray(ray_env) -> Iterator[None]:
    """One Ray of two cores and two pretended GPUs for all Ray tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=256 * 2**20,
    )
    yield
    ray.shutdown()
