"""Tissue on phantoms whose truth is known, and on constructed thumbnails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from slideflow_ray.geometry import Level
from slideflow_ray.phantoms import write_slide
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import TissueSpec
from slideflow_ray.tissue import TissueMask, cleaned, find_tissue, fraction_in, otsu, stained, thumbnail

PINK, PURPLE, PALE, GLASS = (221, 160, 200), (120, 70, 150), (234, 220, 231), (243, 243, 245)
INKS = {"blue": (60, 110, 200), "green": (60, 175, 95), "black": (40, 40, 42)}


class ArrayReader:
    """A slide held in memory, its levels halved from it; remembers the largest box."""

    name, uri = "array", "memory"

    def __init__(self, pixels, mpp0=8.0, levels=1):
        self.planes = [pixels]
        while len(self.planes) < levels:
            h, w = (side // 2 * 2 for side in self.planes[-1].shape[:2])
            self.planes.append(np.asarray(Image.fromarray(self.planes[-1][:h, :w].copy()).reduce(2)))
        self.size_px0, self.mpp0 = pixels.shape[1::-1], mpp0
        self.levels = tuple(Level(p.shape[1::-1], (2.0**i, 2.0**i)) for i, p in enumerate(self.planes))
        self.largest = 0

    def read(self, level, xy, size):
        self.largest = max(self.largest, size[0] * size[1])
        plane = self.planes[level]
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        part = plane[max(xy[1], 0) : xy[1] + size[1], max(xy[0], 0) : xy[0] + size[0]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


def painted(h, w, background=GLASS, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.array(background) + rng.integers(-1, 2, (h, w, 3)), 0, 255).astype(np.uint8)


def paint(rgb, box, colour, noise=6, seed=1):
    y0, y1, x0, x1 = box
    rng = np.random.default_rng(seed)
    rgb[y0:y1, x0:x1] = np.clip(np.array(colour) + rng.integers(-noise, noise + 1, (y1 - y0, x1 - x0, 3)), 0, 255)


@pytest.mark.parametrize(("seed", "tumour"), [(1, True), (2, True), (3, False), (4, False)])
def test_a_phantoms_tissue_is_found_and_its_pen_is_not(tmp_path, seed, tumour):
    path = tmp_path / "p.tif"
    truth = write_slide(path, size_px0=(2496, 1808), seed=seed, tumour=tumour)
    with open_slide(str(path)) as reader:
        found = find_tissue(reader, TissueSpec(), "he")
    assert found.rule == "he"
    assert found.mask.shape == truth.tissue.shape == (113, 156)
    wanted = truth.tissue & ~truth.pen
    assert (found.mask & wanted).sum() / (found.mask | wanted).sum() > 0.9
    assert found.mask[wanted].mean() > 0.96
    on_glass = truth.pen & ~ndimage.binary_dilation(truth.tissue, iterations=3)
    assert on_glass.sum() > 20
    assert not (found.mask & on_glass).any()
    assert not found.mask[
        ndimage.distance_transform_edt(~(truth.tissue | truth.pen)) > 5
    ].any()  # dust (fat cells overhang)


def test_real_tissue(data):
    with open_slide(str(data / "slides/CMU-1-Small-Region.svs")) as reader:
        tissue = find_tissue(reader, TissueSpec(), "he")
        picture = thumbnail(reader, tissue.mask.shape[::-1])
    assert 0.3 < tissue.mask.mean() < 0.45
    glass = picture.min(axis=2) > 238
    assert tissue.mask[glass].mean() < 0.06
    assert tissue.mask[picture.min(axis=2) < 150].mean() > 0.97
    with open_slide(str(data / "slides/camelyon_overview_jpeg.dcm")) as reader:
        assert 0.2 < find_tissue(reader, TissueSpec(), "he").mask.mean() < 0.3


@pytest.mark.parametrize("background", [GLASS, (255, 255, 255), (246, 243, 228), (222, 224, 230)])
@pytest.mark.parametrize("colour", [PINK, PURPLE, PALE])
def test_pale_and_dark_tissue_on_any_glass(background, colour):
    rgb = painted(80, 120, background)
    shade = np.array(colour) * np.array(background) / 245
    paint(rgb, (20, 60, 30, 90), shade, noise=1 if colour == PALE else 6)
    mask = find_tissue(ArrayReader(rgb), TissueSpec(), "he").mask
    truth = np.zeros((80, 120), bool)
    truth[20:60, 30:90] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.9


@pytest.mark.parametrize("colour", [PINK, PURPLE])
def test_a_slide_that_is_all_tissue_is_all_tissue(colour):
    rgb = painted(60, 90, colour)
    paint(rgb, (0, 30, 0, 90), colour, noise=20)
    assert find_tissue(ArrayReader(rgb), TissueSpec(), "he").mask.all()


def test_half_pale_half_dark_is_all_tissue():
    """Otsu would cut between the two tissues."""
    rgb = painted(60, 90, PURPLE)
    paint(rgb, (0, 60, 0, 45), (229, 205, 222), noise=2)
    assert find_tissue(ArrayReader(rgb), TissueSpec(), "he").mask.all()


@pytest.mark.parametrize("background", [GLASS, (255, 255, 255), (235, 235, 225)])
def test_a_slide_that_is_all_glass_has_no_tissue(background):
    assert not find_tissue(ArrayReader(painted(60, 90, background)), TissueSpec(), "he").mask.any()


@pytest.mark.parametrize("ink", sorted(INKS))
def test_pens_are_no_tissue(ink):
    rgb = painted(80, 120)
    paint(rgb, (40, 75, 10, 110), PINK)
    paint(rgb, (5, 13, 10, 110), INKS[ink], noise=4)
    blurred = np.stack([ndimage.gaussian_filter(rgb[..., c], 0.8) for c in range(3)], axis=2)
    mask = stained(blurred, 8.0, "he")
    assert not mask[:30].any()
    assert mask[44:70, 15:105].all()


def test_black_frames_and_grey_dust_are_no_tissue():
    rgb = painted(80, 120)
    rgb[:, :6] = 3
    rgb[:5] = (0, 8, 2)
    rgb[30:36, 40:46] = (150, 150, 152)
    paint(rgb, (20, 26, 60, 66), PINK)  # 2304 um2
    assert not find_tissue(ArrayReader(rgb), TissueSpec(), "he").mask.any()
    assert find_tissue(ArrayReader(rgb), TissueSpec(min_area_um2=1500), "he").mask[22:24, 62:64].all()


def test_grey_silver_tissue_is_found():
    rgb = painted(80, 120)
    paint(rgb, (20, 60, 30, 90), (150, 150, 151), noise=1)
    assert find_tissue(ArrayReader(rgb), TissueSpec(), "silver").mask[22:58, 32:88].all()
    assert not find_tissue(ArrayReader(rgb), TissueSpec(), "he").mask[30:50, 40:80].any()


@pytest.mark.parametrize(
    ("rule", "modality", "expected"),
    [
        ("auto", "he", "he"),
        ("auto", "pas", "he"),
        ("auto", "silver", "he"),
        ("auto", "ihc", "he"),
        ("auto", "tem", "everything"),
        ("auto", "mri", "everything"),
        ("he", "tem", "he"),
        ("everything", "he", "everything"),
    ],
)
def test_rules(rule, modality, expected):
    found = find_tissue(ArrayReader(painted(40, 60), mpp0=4.0), TissueSpec(rule=rule), modality)
    assert found.rule == expected
    assert found.mask.shape == (20, 30)
    assert found.mask.dtype == bool
    assert found.px0_per_px == (2.0, 2.0)
    assert found.mask.all() == (expected == "everything")


# thumbnail


@pytest.mark.parametrize("block", [50, 173, 4096])
def test_a_thumbnail_in_blocks_is_the_mean_of_its_area(monkeypatch, block):
    monkeypatch.setattr("slideflow_ray.tissue.BLOCK_PX", block)
    rgb = np.random.default_rng(0).integers(0, 256, (480, 360, 3)).astype(np.uint8)
    reader = ArrayReader(rgb)
    mean = rgb.reshape(48, 10, 36, 10, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail(reader, (36, 48)) - mean).max() <= 1
    whole = np.asarray(Image.fromarray(rgb).resize((37, 53), Image.Resampling.BOX), int)
    assert np.abs(thumbnail(reader, (37, 53)) - whole).max() <= 1
    assert reader.largest <= max(block + 20, 30) ** 2


def test_a_thumbnail_keeps_left_and_top():
    rgb = painted(300, 500)
    rgb[:100, 300:] = 0
    small = thumbnail(ArrayReader(rgb, levels=3), (50, 30))
    assert (small[:9, 31:] < 5).all()
    assert (small[11:] > 235).all()
    assert (small[:, :29] > 235).all()


# cleaning


def test_small_pieces_go_and_small_holes_close():
    mask = np.zeros((40, 60), bool)
    mask[5:25, 5:35] = True
    mask[10:12, 10:12] = False  # 4 px hole
    mask[14:20, 20:30] = False  # 60 px hole
    mask[30:33, 50:53] = True  # 9 px piece
    mask[0:2, 50:60] = True  # 20 px piece at the edge
    found = cleaned(mask, 2.0, min_area_um2=40, max_hole_um2=40)
    expected = mask.copy()
    expected[10:12, 10:12] = True
    expected[30:33, 50:53] = False
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(cleaned(mask, 2.0, 0, 0), mask)


def test_a_gap_at_the_edge_of_the_slide_is_no_hole():
    mask = np.ones((20, 20), bool)
    mask[0:2, 5:8] = False
    np.testing.assert_array_equal(cleaned(mask, 1.0, 0, 100), mask)


def within(values, cut):
    """Return the variance within both classes, times their sizes."""
    return sum(part.var() * len(part) for part in (values[values <= cut], values[values > cut]))


def test_otsu_splits_two_heaps_and_survives_one_value():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(1, 0.1, 3000), rng.normal(5, 0.5, 500)]).astype(np.float32)
    cut = otsu(values)
    assert ((values > cut) == (np.arange(3500) >= 3000)).all()
    brute = [within(values, t) for t in np.linspace(values.min() + 0.1, values.max() - 0.1, 400)]
    assert within(values, cut) <= min(brute) * 1.001
    assert np.isfinite(otsu(np.zeros((5, 5), np.float32)))


# fractions


def brute_fraction(tissue, xy, wh, fine=20):
    """Return the fraction by sampling each box at fine x fine points of each px0."""
    x = xy[0] + (np.arange(wh[0] * fine) + 0.5) / fine
    y = xy[1] + (np.arange(wh[1] * fine) + 0.5) / fine
    col, row = np.floor(x / tissue.px0_per_px[0]).astype(int), np.floor(y / tissue.px0_per_px[1]).astype(int)
    h, w = tissue.mask.shape
    ok = ((row >= 0) & (row < h))[:, None] & ((col >= 0) & (col < w))
    return (tissue.mask[np.clip(row, 0, h - 1)[:, None], np.clip(col, 0, w - 1)] & ok).mean()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(-6, 50),
    st.integers(-6, 40),
    st.integers(1, 17),
    st.integers(1, 13),
    st.sampled_from([(2.5, 4.0), (1.0, 1.0), (0.5, 2.0), (5.0, 3.2)]),
)
def test_fractions_are_exact_areas(seed, x, y, w, h, scale):
    mask = np.random.default_rng(seed).random((9, 14)) > 0.5
    tissue = TissueMask(mask, scale, "he")
    found = fraction_in(tissue, np.array([[x, y]], np.int64), np.array([[w, h]], np.int32))
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(brute_fraction(tissue, (x, y), (w, h)), abs=2e-6)


def test_fractions_at_the_ends():
    tissue = TissueMask(np.ones((30, 50), bool), (8.0, 8.0), "everything")
    xy = np.array([[0, 0], [392, 232], [400, 0], [13, 17]], np.int64)
    found = fraction_in(tissue, xy, np.full((4, 2), 16, np.int32))
    np.testing.assert_array_equal(found, np.float32([1, 0.25, 0, 1]))
    assert fraction_in(tissue, xy[:0], np.zeros((0, 2), np.int32)).shape == (0,)
