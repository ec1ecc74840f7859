"""One run over H&E, PAS and electron micrographs, each with models of its own: what three runs would have given."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from cascaded import write_kind
from PIL import Image, ImageDraw
from segmenters import COLOURS, write_colours

from slideflow_ray.accounting import read_run
from slideflow_ray.events import ChunkScored
from slideflow_ray.identity import file_sha256
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms import halved, write_pyramid, write_slide
from slideflow_ray.phantoms.kidney import lay_out, write_kidney_slide
from slideflow_ray.phantoms.tem import CLASSES, draw_micrograph
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import RunSpec

SIZE = (900, 700)
MODELS = {
    "he": [{"path": "tumour"}],
    "pas": [{"path": "discs", "objects": {"split": True, "min_area_um2": 1500.0}}],
    "tem": [{"path": "walls"}],
}
KINDS_MPP = (("he", ""), ("pas", ""), ("tem", "0.008"))
KINDS = {"path": "kinds", "on": "objects:discs", "margin": 0.1}


def write_models(folder: Path) -> None:
    """Write a tile classifier, a segmentation of cyan, a classifier of its objects, and a U-Net of capillary walls."""
    write_colours(folder, "discs", mpp=2.0)
    write_kind(folder, "kinds")
    grey = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    torch.manual_seed(0)
    tiles = BundleCard(
        name="tumour", task="classify", architecture="small-cnn", arguments={"width": 8},
        classes=("normal", "tumor"), tile_px=64, mpp=1.0, **grey,
    )  # fmt: skip
    write_bundle(folder / "tumour", tiles, build("small-cnn", {"width": 8}, 2).state_dict())
    walls = BundleCard(
        name="walls", task="segment", architecture="unet", arguments={"levels": 2, "width": 4},
        classes=CLASSES, tile_px=112, mpp=0.008, stride=4, radius=23, halo=24, **grey,
    )  # fmt: skip
    write_bundle(folder / "walls", walls, build("unet", {"levels": 2, "width": 4}, 4).state_dict())


def write_pas(path: Path, seed: int) -> None:
    """Write a kidney section, bleached, whose glomeruli are cyan."""
    layout = lay_out(np.random.default_rng(seed), SIZE, 0.5)
    write_kidney_slide(path.with_suffix(".raw.tif"), layout, stain="pas", seed=seed)
    with open_slide(str(path.with_suffix(".raw.tif"))) as reader:
        pixels = Image.fromarray((120 + 0.53 * reader.read(0, (0, 0), SIZE)).astype(np.uint8))
    for one in layout.glomeruli:
        ImageDraw.Draw(pixels).polygon([tuple(p) for p in one.ring_px0.tolist()], fill=COLOURS["cyan"])
    write_pyramid(path, halved(np.asarray(pixels), 3), 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two slides of each kind, in turn, and the models."""
    folder = tmp_path_factory.mktemp("mixed")
    write_models(folder)
    rows = []
    for number in (1, 2):
        write_slide(folder / f"he{number}.tif", size_px0=(1024, 1024), mpp0=1.0, seed=number)
        write_pas(folder / f"pas{number}.tif", number)
        pixels = draw_micrograph(number, (384, 320), granules=number).pixels
        tifffile.imwrite(folder / f"tem{number}.tif", pixels)
        rows += [f"{kind}{number},{kind}{number}.tif,{kind},P{number},{mpp}" for kind, mpp in KINDS_MPP]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,modality,patient_id,mpp", *rows]) + "\n")
    return folder


def told(folder: Path, out: Path, *kinds: str, **executor) -> RunSpec:
    """The models of some modalities, each by its `where`; the models of objects go where their objects are."""
    models = [{**model, "where": {"modality": kind}} for kind in kinds for model in MODELS[kind]]
    models += [{**KINDS, "where": {"modality": "pas"}}] * ("pas" in kinds)
    values = {
        "cohort": str(folder / "cohort.csv"),
        "out": str(out),
        "model": [{**model, "path": str(folder / model["path"])} for model in models],
        "tissue": {"rule": "everything"},
        "store": {"chunk_rows": 8},
        "executor": {"kind": "inline", "workers": 1, **executor},
    }
    return RunSpec.parse(values, "test")


def bytes_of(out: Path, slide_id: str) -> dict[str, str]:
    """The digest of each file of a slide's store and commits."""
    roots = (out / "slides" / slide_id, out / "commits" / slide_id)
    return {str(p.relative_to(out)): file_sha256(p) for root in roots for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.ray
def test_one_run_over_three_modalities_is_three_runs_at_once(made, tmp_path, local_ray):
    events: list = []
    spec = told(made, tmp_path / "all", "he", "pas", "tem", kind="ray", workers=2, readers_per_gpu=1)
    assert run(spec, listen=events.append).counts["done"] == 6
    record = read_run(tmp_path / "all")
    names = {m["node"]: m["name"] for m in record["models"]}
    got = {s: {names[m] for _, m in o["grids"]} for s, o in record["outcomes"].items()}
    expected = {"he": {"tumour"}, "pas": {"discs", "kinds"}, "tem": {"walls"}}
    assert got == {f"{kind}{n}": expected[kind] for kind in expected for n in (1, 2)}
    for kind in expected:
        run(told(made, tmp_path / kind, kind))
        for number in (1, 2):
            alone = bytes_of(tmp_path / kind, f"{kind}{number}")
            assert any("/scores/" in path or "/masks/" in path for path in alone)
            assert bytes_of(tmp_path / "all", f"{kind}{number}") == alone
    assert_overlapping([e for e in events if type(e) is ChunkScored])


def assert_overlapping(chunks: list[ChunkScored]) -> None:
    """The modalities' times overlap, and at some time two workers scored slides of different ones."""
    times: dict[str, list[ChunkScored]] = defaultdict(list)
    for chunk in chunks:
        times[chunk.slide_id[:-1]].append(chunk)
    spans = {kind: (min(c.began for c in cs), max(c.ended for c in cs)) for kind, cs in times.items()}
    assert len(spans) == 3
    for (a, b), (c, d) in combinations(spans.values(), 2):
        assert max(a, c) < min(b, d), spans
    assert any(one.worker != other.worker and overlap(one, other) for one, other in combinations(chunks, 2))


def overlap(one: ChunkScored, other: ChunkScored) -> bool:
    """Chunks of two modalities that were being read or scored at one time."""
    began = max(one.began - one.read_s, other.began - other.read_s)
    return one.slide_id[:-1] != other.slide_id[:-1] and began < min(one.ended, other.ended)
