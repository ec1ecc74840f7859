"""What people hand in, through whole runs: copies of one slide, files that must be refused, masks of their own."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slideflow_ray import cli
from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.layout import read_grid
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import SlideStore

EDGE = {
    "not_a_tiff.svs": "E_NOT_A_SLIDE",
    "lfs_pointer.ndpi": "E_NOT_A_SLIDE",
    "truncated_CMU-1-Small-Region.svs": "E_TRUNCATED",
    "unreadable.svs": "E_READ",
    "unopenable.tiff": "E_BAD_MPP",
    "boxes.tiff": "E_BAD_MPP",
    "boxes_0.dcm": "",
    "boxes_1.dcm": "",
    "small.svs": "",
}
"""The files of ../shared/data/edge, and the error that each ends in; "" is done."""


def run_spec(out: Path, *bundles: Path) -> RunSpec:
    values = {"cohort": "", "out": str(out), "model": [{"path": str(b)} for b in bundles], "store": {"tiles": "none"}}
    return RunSpec.parse({**values, "executor": {"workers": 1}}, "test")


def rows_of(out: Path, slide_id: str) -> dict[str, np.ndarray]:
    """Return boxes, level and margins of a slide's only grid and model."""
    ((grid, model),) = read_run(out)["outcomes"][slide_id]["grids"]
    store = SlideStore(out, slide_id)
    found = read_grid(store, grid)
    return {
        "xy_px0": found.xy_px0,
        "tissue": found.tissue,
        "level": np.array(found.level),
        "margins": store.read(f"scores/{grid}/{model}"),
    }


@pytest.fixture(scope="module")
def at(bundles, tmp_path_factory) -> dict[float, Path]:
    """One network as bundles that want 224 px tiles at 0.5 and at 1.0 um per pixel."""
    folder = tmp_path_factory.mktemp("at")
    card, weights = read_card(bundles["aligned"]), load_weights(bundles["aligned"])
    for mpp in (0.5, 1.0):
        own = card.model_copy(update={"name": f"at-{mpp}", "tile_px": 224, "mpp": mpp})
        write_bundle(folder / str(mpp), own, weights)
    return {mpp: folder / str(mpp) for mpp in (0.5, 1.0)}


@pytest.fixture(scope="module")
def copies(data, tmp_path_factory) -> dict[str, str]:
    """The SVS, its lossless copies, and the OME-Zarr without its coarser levels."""
    import json
    import zipfile

    alone = tmp_path_factory.mktemp("alone") / "level0.ome.zarr"
    with zipfile.ZipFile(data / "slides" / "cmu1small.ome.zarr.zip") as file:
        file.extractall(alone.parent)
    shutil.move(alone.parent / "cmu1small.ome.zarr", alone)
    about = json.loads((alone / ".zattrs").read_text())
    about["multiscales"][0]["datasets"] = about["multiscales"][0]["datasets"][:1]
    (alone / ".zattrs").write_text(json.dumps(about))
    names = {"svs": "CMU-1-Small-Region.svs", "dicom": "cmu1small_dicom", "zarr": "cmu1small.ome.zarr.zip"}
    return {key: str(data / "slides" / name) for key, name in names.items()} | {"zarr0": str(alone)}


@pytest.mark.data
@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_lossless_copies_have_the_margins_of_the_svs(mpp, at, copies, tmp_path):
    items = [Item(slide_id=key, uri=uri) for key, uri in copies.items()]
    result = run(run_spec(tmp_path, at[mpp]), items)
    assert result.counts == {"done": 4, "failed": 0, "refused": 0}
    svs = rows_of(tmp_path, "svs")
    assert len(svs["margins"]) > 20
    for key in ("dicom", "zarr", "zarr0"):
        found = rows_of(tmp_path, key)
        np.testing.assert_array_equal(found["xy_px0"], svs["xy_px0"])
        np.testing.assert_array_equal(found["tissue"], svs["tissue"])
        if found["level"] == svs["level"]:
            np.testing.assert_array_equal(found["margins"], svs["margins"])
        else:  # at 1.0 um the OME-Zarr has a level of its own
            assert (key, mpp) == ("zarr", 1.0)
            assert not np.array_equal(found["margins"], svs["margins"])
    assert SlideStore(tmp_path, "zarr").attrs["mpp_source"] == "file"


@pytest.mark.data
def test_every_edge_file_ends_in_its_named_error_and_the_others_finish(data, marked, bundles, tmp_path, capsys):
    names = sorted(path.name for path in (data / "edge").iterdir())
    assert names == sorted(EDGE)
    cohort = tmp_path / "cohort.csv"
    with cohort.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "modality", "mpp"])
        writer.writerow(["good", marked / "c.tif", "tem", ""])
        writer.writerows([name, data / "edge" / name, "he", ""] for name in names)
        writer.writerow(["unopenable at 0.5", data / "edge" / "unopenable.tiff", "he", 0.5])
        writer.writerow(["nowhere", data / "edge" / "nowhere.svs", "he", ""])
        writer.writerow(["too fine", marked / "c.tif", "mri", ""])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--cohort", str(cohort), "-m", str(bundles["aligned"]), "-o", str(out), "--workers", "1"])
    assert end.value.code == 3
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    outcomes = read_run(out)["outcomes"]
    wanted = EDGE | {"good": "", "unopenable at 0.5": "E_READ", "nowhere": "E_NOT_FOUND", "too fine": "E_BAD_MPP"}
    assert {slide: outcome.get("code") or "" for slide, outcome in outcomes.items()} == wanted
    assert outcomes["good"]["tiles"] > 0
    for slide, code in wanted.items():
        assert not code or f"{slide}: {code}" in said.err
    with (out / "failures.csv").open(newline="") as file:
        assert {row["slide_id"]: row["code"] for row in csv.DictReader(file)} == {s: c for s, c in wanted.items() if c}


def test_a_users_mask_decides_the_grid_by_its_content(marked, bundles, tmp_path):
    pixels = np.zeros((12, 7), np.uint8)
    pixels[2:5, 1:4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    shutil.copy(tmp_path / "mask.png", tmp_path / "same.png")
    Image.fromarray(np.ones((30, 30), np.uint8)).save(tmp_path / "square.png")
    Image.fromarray(pixels * 0).save(tmp_path / "none.png")
    names = ("mask", "same", "square", "none", "lost")
    uri = str(marked / "a.tif")  # 701 x 1203
    items = [Item(slide_id=n, uri=uri, modality="tem", mask=str(tmp_path / f"{n}.png")) for n in names]
    result = run(run_spec(tmp_path / "out", bundles["aligned"]), items)
    ended = {e.slide_id: e for e in result.ended}
    assert {n: e.status for n, e in ended.items()} == {
        "mask": "done", "same": "done", "square": "failed", "none": "done", "lost": "failed",
    }  # fmt: skip
    assert ended["square"].code == ended["lost"].code == "E_MASK"
    assert ended["none"].tiles == 0
    rows = rows_of(tmp_path / "out", "mask")
    corners = rows["xy_px0"]
    assert corners.min(axis=0).tolist() == [64, 192]  # the mask covers x 100 to 401, y 200 to 501
    assert (corners.max(axis=0) < (401, 502)).all()
    assert len(ended["same"].grids) == 1
    assert ended["same"].grids == ended["mask"].grids
    Image.fromarray(np.full((12, 7), 255, np.uint8)).save(tmp_path / "same.png")
    run(run_spec(tmp_path / "out", bundles["aligned"]), items[1:2])
    assert len(rows_of(tmp_path / "out", "same")["margins"]) > len(rows["margins"])


def test_why_a_slide_has_no_tissue_is_kept(bundles, tmp_path):
    from slideflow_ray.phantoms import write_pyramid

    glass = np.full((400, 600, 3), 244, np.uint8)
    write_pyramid(tmp_path / "glass.tif", [glass], 0.5)
    speck = glass.copy()
    speck[100:228, 100:228] = (180, 90, 160)
    write_pyramid(tmp_path / "speck.tif", [speck], 0.5)
    items = [Item(slide_id=name, uri=str(tmp_path / f"{name}.tif")) for name in ("glass", "speck")]
    spec = run_spec(tmp_path / "out", bundles["aligned"]).model_copy(update={"min_tissue": 1.0})
    assert run(spec, items).counts["done"] == 2
    said = {}
    for name in ("glass", "speck"):
        store = SlideStore(tmp_path / "out", name)
        masks = [p.parent for p in store.root.glob("tissue/*/mask/zarr.json")]
        grids = [p.parent for p in store.root.glob("grids/*/zarr.json")]
        said[name] = [
            store.node_attrs(str(p.relative_to(store.root)))[key]
            for p, key in ((masks[0], "reason"), (masks[0], "focus"), (grids[0], "reason"))
        ]
    assert said["glass"] == ["no pixel is stained", None, "no pixel is stained"]
    assert said["speck"][0] == ""
    assert said["speck"][1] > 0


@pytest.mark.data
@pytest.mark.parametrize("name", ["cmu1small_pyramid.ome.tif", "cmu1small_pyramid_jpeg.tif"])
def test_copies_that_were_compressed_again_are_scored_nearly_alike(name, data, at, copies, tmp_path):
    items = [Item(slide_id="svs", uri=copies["svs"]), Item(slide_id="copy", uri=str(data / "slides" / name))]
    assert run(run_spec(tmp_path, at[0.5]), items).counts == {"done": 2, "failed": 0, "refused": 0}
    svs, copy = rows_of(tmp_path, "svs"), rows_of(tmp_path, "copy")
    margins = [
        {tuple(xy): m for xy, m in zip(rows["xy_px0"].tolist(), rows["margins"][:, 1], strict=True)}
        for rows in (svs, copy)
    ]
    both = sorted(set(margins[0]) & set(margins[1]))
    assert len(both) >= 0.95 * max(map(len, margins))
    one, other = (np.array([m[xy] for xy in both]) for m in margins)
    assert not np.array_equal(one, other)
    assert np.corrcoef(one, other)[0, 1] > 0.95
