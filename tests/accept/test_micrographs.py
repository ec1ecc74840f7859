"""Micrographs at full size: 2,048 x 2,048 in tiles as in one piece, and a montage of 20,000 x 20,000 in under 4 GB.

Not part of the tests; `make accept` runs it, and writes its figures to accept/009-micrographs.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import shapely
import tifffile
import torch
from PIL import Image, ImageDraw
from segmenters import write_colours
from test_segment import MEAN, STD, card, laid_out, network
from walked import note

from slideflow_ray.cohort import single_slide
from slideflow_ray.models.bundle import write_bundle
from slideflow_ray.models.scorer import make_scorer
from slideflow_ray.phantoms.tem import draw_micrograph
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import resolve
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import ComputeSpec, RunSpec
from slideflow_ray.store import SlideStore, tree_digest

FIGURES = "009-micrographs.json"
SIDE = 20_000
GB = 1e9


def burnt(grey: np.ndarray, first: int) -> np.ndarray:
    """A picture with a strip of paper and a bar at its lower edge, from row `first` on."""
    image = Image.fromarray(grey)
    h, w = grey.shape
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, first, w - 1, h - 1), fill=255)
    draw.rectangle((w // 20, first + (h - first) // 3, w // 4, first + (h - first) // 2), fill=0)
    return np.asarray(image)


# one piece


def test_a_micrograph_in_tiles_is_one_piece(tmp_path):
    """A network of three levels that uses its whole radius: every logit of every core, and the plane of a run."""
    grey = burnt(draw_micrograph(3, (2048, 2048), 4.0, 3).pixels, 1900)
    tifffile.imwrite(tmp_path / "m.tif", grey, compression="zlib")
    net = network(levels=3)
    of = card(
        arguments={"levels": 3, "width": 8}, stride=net.stride, radius=net.radius, halo=56, tile_px=368, mpp=0.004
    )
    write_bundle(tmp_path / "net", of, net.state_dict())
    values = {"cohort": "m", "out": str(tmp_path / "out"), "model": [{"path": str(tmp_path / "net")}]}
    compute = {"precision": "fp32"}
    run(RunSpec.parse({**values, "compute": compute}, "test"), single_slide(str(tmp_path / "m.tif"), 0.004, "tem"))
    store = SlideStore(tmp_path / "out", "m")
    (path,) = [p for p in (store.root / "planes").glob("*/*") if p.is_dir()]
    plane = store.read_plane(f"{path.relative_to(store.root)}/0")
    with open_slide(str(tmp_path / "m.tif"), mpp=0.004, modality="tem") as reader:
        pixels, bottom = reader.read(0, (0, 0), (2048, 2048)), reader.keep_px0[3]
    whole = laid_out(pixels, of.core_px, 56)
    scorer = make_scorer(of, net, resolve(ComputeSpec.model_validate(compute)))
    with torch.inference_mode():
        logits = (
            scorer.network(to_input(whole[None], MEAN, STD, dtype=scorer.dtype))[0].float().numpy()[:, 56:-56, 56:-56]
        )
    worst = 0.0
    for row in range(0, 2048, of.core_px):
        for col in range(0, 2048, of.core_px):
            tile = whole[row : row + of.tile_px, col : col + of.tile_px]
            core = scorer.logits(tile[None])[0][:, 56:-56, 56:-56]
            there = logits[:, row : row + of.core_px, col : col + of.core_px]
            worst = max(worst, float(np.abs(core - there).max()))
    differ = int((plane[:bottom] != logits.argmax(0)[:bottom, :2048]).sum())
    note(FIGURES, "tiles against one piece, 2,048 x 2,048", {"worst logit": worst, "pixels that differ": differ})
    assert bottom <= 1900
    assert (plane[bottom:] == 255).all()
    assert worst <= 1e-4
    assert differ == 0


# a montage


class Peak(threading.Thread):
    """The most memory that a process and its children have at one time: the sum of their own and shared parts (PSS)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.ended = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            self.most = max(self.most, sum(map(self._pss, self._all())))

    def _all(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return []

    @staticmethod
    def _pss(process: psutil.Process) -> int:
        try:
            return int(process.memory_full_info().pss)
        except (psutil.Error, OSError):
            return 0


def cli(folder: Path, *words: str) -> tuple[float, float]:
    """Run a command; return its seconds and the GB of its peak."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "slideflow_ray.cli", *words]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        peak = Peak(process.pid)
        peak.start()
        code = process.wait()
    peak.ended.set()
    peak.join()
    assert code == 0, (folder / "said.txt").read_text()[-3000:]
    return round(time.perf_counter() - began, 1), round(peak.most / GB, 2)


@pytest.fixture(scope="module")
def montage(tmp_path_factory) -> Path:
    """A folder with a tiled BigTIFF of 20,000 x 20,000 grey pixels, its cohort and a small U-Net.

    One phantom of 2,000 x 2,000, mirrored from field to field, so that membranes run on; below a strip with a bar.
    """
    folder = tmp_path_factory.mktemp("montage")
    field = draw_micrograph(1, (2000, 2000), 4.0, 4).pixels
    whole = np.empty((SIDE, SIDE), np.uint8)
    for row in range(10):
        for col in range(10):
            turned = field[:: -1 if row % 2 else 1, :: -1 if col % 2 else 1]
            whole[row * 2000 : (row + 1) * 2000, col * 2000 : (col + 1) * 2000] = turned
    whole[19_000:] = burnt(whole[18_000:], 1000)[1000:]
    tifffile.imwrite(folder / "m.tif", whole, tile=(512, 512), bigtiff=True, compression="zlib")
    (folder / "cohort.csv").write_text("slide_id,uri,modality,nm_per_px\nm,m.tif,tem,4\n")
    write_colours(folder, "dark", 0.004, tile_px=560, smooth=True)
    return folder


def settings(folder: Path, name: str, executor: dict) -> None:
    kind, workers = executor["kind"], executor["workers"]
    text = f'cohort = "cohort.csv"\nout = "{name}"\nstore = {{tiles = "none"}}\n'
    text += f'executor = {{kind = "{kind}", workers = {workers}}}\n'
    text += '[[model]]\npath = "dark"\nobjects = {min_area_um2 = 0.05}\n'
    (folder / f"{name}.toml").write_text(text)


def test_a_montage_of_20_000_pixels_a_side_in_under_4_gb_and_the_same_bytes(montage):
    digests = {}
    for name, executor in {
        "one": {"kind": "inline", "workers": 1},
        "two": {"kind": "inline", "workers": 2},
        "ray": {"kind": "ray", "workers": 2},
    }.items():
        settings(montage, name, executor)
        seconds, peak = cli(montage, "run", f"{name}.toml")
        digests[name] = tree_digest(montage / name)
        store = SlideStore(montage / name, "m")
        (path,) = [p for p in (store.root / "planes").glob("*/*") if p.is_dir()]
        areas = store.node_attrs(str(path.relative_to(store.root)))["area_um2"]
        about = {"peak_gb": peak, "seconds": seconds, "area_um2": areas, **store.attrs["micrograph"]}
        note(FIGURES, f"montage of 20,000 x 20,000, {name}", about)
        assert 18_000 < about["keep_px0"][3] <= 19_000
        assert about["bar_px"] == pytest.approx(4001, abs=10)
        assert areas["cyan"] > 0
        assert peak < 4
        if name != "one":
            assert digests[name] == digests["one"]
            shutil.rmtree(montage / name)
    for to in ("geojson", "ome-zarr"):
        seconds, peak = cli(montage, "export", "one", "--to", to)
        note(FIGURES, f"montage of 20,000 x 20,000, export to {to}", {"peak_gb": peak, "seconds": seconds})
        assert peak < 4
    (path,) = (montage / "one" / "geojson").rglob("m*.geojson")
    shapes = [shapely.geometry.shape(f["geometry"]) for f in json.loads(path.read_text())["features"]]
    note(
        FIGURES,
        "montage of 20,000 x 20,000, objects",
        {"objects": len(shapes), "geojson_mb": path.stat().st_size / 1e6},
    )
    assert shapes
