"""Thickness in a run: what `membrane` says of each plane, in the store and in the table, by micrograph and biopsy."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from segmenters import CLASSES, COLOURS, write_colours

from slideflow_ray import cli
from slideflow_ray import thickness as thickness_module
from slideflow_ray.accounting import read_run
from slideflow_ray.biopsies import TABLE, measuring, places, read_slide
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.membrane import JENSEN, thickness
from slideflow_ray.phantoms import halved, write_pyramid
from slideflow_ray.phantoms.tem import draw_micrograph
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, ThicknessSpec
from slideflow_ray.store import SlideStore, verify
from slideflow_ray.tables import read_table
from slideflow_ray.thickness import thickness_node, write_thickness

NM = 16.0
SPEC = {"of": "cyan", "between": ["magenta", "other"]}
PATIENTS = {"a0": "A", "a1": "A", "b0": "B", "none": "C", "light": "A"}


def write_painted(folder: Path, name: str, mask: np.ndarray) -> None:
    """A micrograph as it was segmented: membrane cyan, endothelium magenta, all else on its other side."""
    pixels = np.full((*mask.shape, 3), 235, np.uint8)
    pixels[mask == 1], pixels[mask == 2] = COLOURS["cyan"], COLOURS["magenta"]
    write_pyramid(folder / f"{name}.tif", halved(pixels, 1), NM / 1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thickness")
    masks = {name: draw_micrograph((3, i), (150, 130), NM).mask for i, name in enumerate(PATIENTS)}
    masks["none"][:] = 0
    for name, mask in masks.items():
        write_painted(folder, name, mask)
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "split", "modality"])
        writer.writerows([n, f"{n}.tif", p, "test", "he" if n == "light" else "tem"] for n, p in PATIENTS.items())
    write_colours(folder, "walls", NM / 1000)
    out = folder / "out"
    run(spec_of(folder, SPEC))
    return folder, out, masks


def spec_of(folder: Path, how: dict | None, out: str = "out", **more) -> RunSpec:
    model = {"path": str(folder / "walls"), "where": {"modality": "tem"}, **({"thickness": how} if how else {}), **more}
    values = {
        "cohort": str(folder / "cohort.csv"),
        "out": str(folder / out),
        "model": [model],
        "tissue": {"rule": "everything"},
    }
    return RunSpec.parse(values | {"executor": {"workers": 1}}, "test")


def truth(mask: np.ndarray):
    plane = np.where(mask == 3, 0, mask)
    return thickness(plane == 1, NM, (plane == 2, plane == 0))


def test_each_micrograph_has_what_membrane_says_of_its_plane(made):
    _, out, masks = made
    rows = {r["slide_id"]: r for r in read_table(out / TABLE) if r["level"] == "slide"}
    assert set(rows) == {"a0", "a1", "b0", "none"}
    for name in ("a0", "a1", "b0"):
        wanted, row = truth(masks[name]), rows[name]
        assert row["mean_nm"] == pytest.approx(wanted.mean_nm)
        assert row["sd_nm"] == pytest.approx(wanted.sd_nm)
        assert row["corrected_nm"] == pytest.approx(JENSEN * wanted.harmonic_nm)
        assert [row[f"p{p:02}_nm"] for p in (5, 50, 95)] == pytest.approx(wanted.percentiles_nm((5, 50, 95)))
        assert row["length_um"] == pytest.approx(wanted.length_um)
        assert (row["slides"], row["slides_measured"], row["why"]) == (1, 1, None)
    assert (rows["none"]["mean_nm"], rows["none"]["why"]) == (None, "no length of cyan to measure")


def test_a_biopsy_is_its_micrographs_by_length(made):
    _, out, masks = made
    rows = {r["patient_id"]: r for r in read_table(out / TABLE) if r["level"] == "patient"}
    one, other = truth(masks["a0"]), truth(masks["a1"])
    length = one.length_um + other.length_um
    wanted = (one.mean_nm * one.length_um + other.mean_nm * other.length_um) / length
    assert rows["A"]["mean_nm"] == pytest.approx(wanted)
    assert rows["A"]["harmonic_nm"] == pytest.approx(
        length / (one.length_um / one.harmonic_nm + other.length_um / other.harmonic_nm)
    )
    assert (rows["A"]["slides"], rows["A"]["slides_measured"]) == (2, 2)
    assert (rows["C"]["slides"], rows["C"]["slides_measured"], rows["C"]["mean_nm"]) == (1, 0, None)


def test_the_places_are_in_the_store_and_lie_on_the_membrane(made):
    _, out, masks = made
    found = [p for p in places(out, read_run(out)) if p["slide_id"] == "b0"]
    wanted = truth(masks["b0"])
    np.testing.assert_allclose([[p["x_px0"], p["y_px0"]] for p in found], wanted.xy_px)
    np.testing.assert_allclose([p["thickness_nm"] for p in found], wanted.nm)
    assert all(masks["b0"][int(p["y_px0"]), int(p["x_px0"])] == 1 for p in found)
    assert verify(out)[1] == []


def test_it_goes_out_as_csv_and_into_the_report(made, tmp_path):
    _, out, masks = made
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(out), "--to", "thickness", "--folder", str(tmp_path)])
    assert not ended.value.code
    files = {p.name: list(csv.DictReader(p.read_text().splitlines())) for p in tmp_path.rglob("*.csv")}
    assert set(files) == {"thickness.csv", "places.csv"}
    wanted = truth(masks["a1"])
    mine = [float(r["thickness_nm"]) for r in files["places.csv"] if r["slide_id"] == "a1"]
    np.testing.assert_allclose(mine, wanted.nm)
    assert [r["patient_id"] for r in files["thickness.csv"] if r["level"] == "patient"] == ["A", "B", "C"]
    page = write_report(out).read_text()
    assert "Thickness of cyan" in page
    assert f"{wanted.mean_nm:,.0f}\u202fnm" in page
    shown = re.findall(r'class="place"[^>]*d="([^"]*)"', page)
    assert sum(path.count("M") for path in shown) == len(list(places(out, read_run(out))))


def test_running_again_changes_nothing_and_other_settings_measure_anew(made):
    folder, out, masks = made
    before = (out / TABLE).read_bytes()
    assert not run(spec_of(folder, SPEC)).changed
    assert (out / TABLE).read_bytes() == before
    other = folder / "out2"
    run(spec_of(folder, None, "out2"))
    assert not (other / TABLE).exists()
    run(spec_of(folder, {"of": "cyan"}, "out2"))
    row = next(r for r in read_table(other / TABLE) if r["slide_id"] == "a0")
    assert row["mean_nm"] == pytest.approx(thickness(masks["a0"] == 1, NM).mean_nm)
    masks_node = SlideStore(other, "a0").nodes("masks")
    assert len(masks_node) == 1
    run(spec_of(folder, None, "out2"))
    assert not (other / TABLE).exists()


def test_a_membrane_that_the_strip_cuts_is_measured_where_it_is_whole():
    y, x = np.mgrid[:260, :300]
    plane = (np.abs(y - 130 - 0.1 * (x - 150)) < 15).astype(np.uint8)
    plane[140:] = 255
    spec = ThicknessSpec(of="cyan")
    found = thickness_module._measured(plane, 0.01, CLASSES, spec)
    np.testing.assert_array_equal(found.nm, thickness(plane[:140] == 1, 10.0).nm)
    assert (len(found.nm) > 30, found.nm.min() > 280) == (True, True)


def test_a_plane_that_is_too_large_is_said(made, monkeypatch):
    _, out, _ = made
    record = read_run(out)
    (by,) = measuring(record)
    other = replace(by, spec=by.spec.model_copy(update={"least_um": 0.31}))
    store, outcome = SlideStore(out, "a1"), record["outcomes"]["a1"]
    ((grid, node),) = outcome["grids"]
    assert store.committed(thickness_node(grid, node, other.spec)) is None
    monkeypatch.setattr(thickness_module, "MEASURED_PX", 150 * 130 - 1)
    write_thickness(store, grid, node, CLASSES, other.spec)
    item = next(Item.parse(row, "run.json") for row in record["items"] if row["slide_id"] == "a1")
    assert read_slide(out, item, outcome, other) == (None, "the plane is too large")
    assert read_slide(out, item, outcome, by)[1] == ""


@pytest.mark.parametrize(
    "how", [{"of": "gbm"}, {"of": "other"}, {"of": "cyan", "between": ["cyan", "other"]}], ids=["none", "back", "twice"]
)
def test_classes_that_are_none_are_refused(made, how):
    folder, _, _ = made
    with pytest.raises(ConfigError, match=r"thickness (names|is asked of other)"):
        run(spec_of(folder, how, "out3"))


def test_one_side_alone_is_refused():
    with pytest.raises(ConfigError, match="between needs two classes"):
        ThicknessSpec.parse({"of": "membrane", "between": ["endothelium"]}, "run.toml")


def test_what_an_earlier_method_measured_is_measured_anew(monkeypatch):
    spec = ThicknessSpec.parse({"of": "membrane"}, "run.toml")
    node = thickness_node("grid", "walls", spec)
    monkeypatch.setattr(thickness_module, "METHOD", thickness_module.METHOD + 1)
    assert thickness_node("grid", "walls", spec) != node
