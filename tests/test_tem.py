"""Phantom micrographs: the truth that is stated is the truth that is drawn."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.cluster import KMeans

from slideflow_ray.cli import main
from slideflow_ray.cohort import read_cohort
from slideflow_ray.phantoms.tem import CLASSES, MICROSCOPES, Microscope, draw_micrograph, geojson, write_tem_cohort

SIZE = (420, 300)


@pytest.fixture(scope="module")
def drawn():
    return [draw_micrograph((5, i), SIZE, 8.0, i % 3, 320, microscope=MICROSCOPES[i % 3]) for i in range(6)]


def test_equal_arguments_draw_equal_pixels(drawn):
    again = draw_micrograph((5, 1), SIZE, 8.0, 1, 320, microscope=MICROSCOPES[1])
    assert again.pixels.shape == SIZE[::-1]
    np.testing.assert_array_equal(again.pixels, drawn[1].pixels)
    assert (draw_micrograph((5, 7), SIZE, 8.0).pixels != drawn[1].pixels).any()


def test_podocytes_may_be_darker_and_nothing_else(drawn):
    even = [
        draw_micrograph((5, 1), SIZE, 8.0, 1, 320, microscope=Microscope(noise=0, blur=0), apart=a) for a in (0, 0.1)
    ]
    lower = even[0].pixels.astype(int) - even[1].pixels
    podocytes = even[0].mask == 3
    assert np.median(lower[podocytes]) == pytest.approx(25, abs=1)  # a tenth of 255
    assert not lower[~podocytes & (even[0].mask > 0)].any()
    np.testing.assert_array_equal(even[0].mask, even[1].mask)


def test_thickness_is_that_of_the_mask(drawn):
    """The ridge of the distance transform is half the thickness, on either side of the middle line."""
    for one in drawn:
        depth = ndimage.distance_transform_edt(np.pad(one.mask == 1, 40, mode="edge"))[40:-40, 40:-40]
        inner = depth[40:-40, 40:-40]
        ridge = inner[(inner == ndimage.maximum_filter(inner, 9)) & (inner > 8)]
        assert len(ridge) > 10
        measured = 2 * 8.0 * np.median(ridge - 0.5)
        assert measured == pytest.approx(np.median(one.thickness_nm), rel=0.06)
        assert np.mean(one.thickness_nm) == pytest.approx(320, rel=0.15)


def test_every_class_is_there_and_the_cells_lie_on_their_sides(drawn):
    for one in drawn:
        assert set(np.unique(one.mask)) == {0, 1, 2, 3}
        touching = ndimage.binary_dilation(one.mask == 2) & (one.mask == 3)
        assert touching.sum() < 0.01 * (one.mask == 3).sum()  # the membrane is between them


def test_granules_are_dark_and_at_the_membrane(drawn):
    for one in drawn:
        assert one.label == ("granule" if len(one.granules_px) else "none")
        reach = ndimage.binary_dilation(one.mask == 1, iterations=6)
        for x, y, _ in one.granules_px:
            assert reach[int(y), int(x)]
            core = one.pixels[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean()
            assert core < one.pixels[one.mask == 1].mean() - 15
    assert [len(one.granules_px) for one in drawn] == [0, 1, 2, 0, 1, 2]


def test_grey_values_alone_do_not_segment(drawn):
    """k-means on intensity, its clusters given to classes by the truth itself, stays at or below 0.6 Dice."""
    scores = []
    for one in drawn:
        smooth = ndimage.gaussian_filter(one.pixels.astype(float), 1.5)
        found = KMeans(6, n_init=3, random_state=0).fit_predict(smooth.reshape(-1, 1)).reshape(one.mask.shape)
        best = np.array([np.bincount(one.mask[found == k], minlength=4).argmax() for k in range(6)])[found]
        for c in (1, 2, 3):
            both = (best == c) & (one.mask == c)
            scores.append(2 * both.sum() / ((best == c).sum() + (one.mask == c).sum()))
    assert np.mean(scores) <= 0.6


def test_polygons_fill_the_mask_again(drawn):
    one = drawn[2]
    again = np.zeros_like(one.mask)
    for feature in geojson(one.mask)["features"]:
        picture = Image.new("L", (2 * SIZE[0], 2 * SIZE[1]))
        draw = ImageDraw.Draw(picture)
        shell, *holes = feature["geometry"]["coordinates"]
        for ring, value in [(shell, 1), *[(hole, 0) for hole in holes]]:
            draw.polygon([(2 * x - 0.5, 2 * y - 0.5) for x, y in ring], fill=value)
        inside = np.asarray(picture)[1::2, 1::2].astype(bool)
        again[inside] = CLASSES.index(feature["properties"]["classification"]["name"])
    assert (again != one.mask).mean() < 0.01


def test_the_cohort_splits_patients_and_states_its_truth(tmp_path):
    path = write_tem_cohort(tmp_path, patients=10, images=2, size_px=(96, 80), nm_per_px=20)
    items = read_cohort(str(path))
    assert len(items) == 20
    by_split = {split: {i.patient_id for i in items if i.split == split} for split in ("train", "val", "test")}
    assert [len(by_split[s]) for s in ("train", "val", "test")] == [6, 2, 2]
    for split in by_split:
        labels = {i.label for i in items if i.split == split}
        assert labels == {"granule", "none"}
    assert {i.modality for i in items} == {"tem"}
    truth = json.loads((tmp_path / "tem-001-00.truth.json").read_text())
    assert truth["granules_px"]
    assert 200 < truth["harmonic_nm"] <= truth["thickness_nm"] < 550
    contrasts = [json.loads((tmp_path / f"{i.slide_id}.truth.json").read_text())["contrast"] for i in items]
    drawn = [c for c, i in zip(contrasts, items, strict=True) if i.label == "granule"]
    assert all(0.7 <= c <= 1 for c in drawn)
    assert len(set(drawn)) == len(drawn) == 10
    with tifffile.TiffFile(tmp_path / "tem-001-00.tif") as file:
        assert file.pages[0].shape == (80, 96)
        assert file.pages[0].get_resolution("micrometer")[0] == pytest.approx(1 / 0.020)


def test_the_command_writes_them(tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["phantoms", str(tmp_path), "--kind", "tem", "--patients", "3"])
    assert not ended.value.code
    assert {item.modality for item in read_cohort(tmp_path / "cohort.csv")} == {"tem"}
