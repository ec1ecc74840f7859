"""Tissue on phantoms whose truth is known, and on constructed thumbnails."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from slideflow_ray.errors import MaskError
from slideflow_ray.focus import focus, slide_focus
from slideflow_ray.geometry import Level
from slideflow_ray.phantoms import write_slide
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import TissueSpec
from slideflow_ray.tissue import (
    LEVEL0_PX,
    TissueMask,
    burnt_in,
    cleaned,
    find_tissue,
    fraction_in,
    mask_identity,
    otsu,
    stained,
    thumbnail,
)

PINK, PURPLE, PALE, GLASS = (221, 160, 200), (120, 70, 150), (234, 220, 231), (243, 243, 245)
INKS = {"blue": (60, 110, 200), "green": (60, 175, 95), "black": (40, 40, 42), "red": (205, 35, 50)}
MAGENTA, BROWN, COUNTERSTAIN = (190, 70, 150), (140, 95, 60), (205, 208, 228)


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
        ("auto", "pas", "pas"),
        ("auto", "silver", "silver"),
        ("auto", "ihc", "ihc"),
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


@pytest.mark.parametrize(
    ("modality", "colours"),
    [
        ("pas", (MAGENTA, PURPLE, (226, 200, 220))),
        ("ihc", (BROWN, COUNTERSTAIN, (190, 150, 120))),
        ("silver", ((60, 58, 62), (150, 150, 151), (190, 205, 196), PALE)),
    ],
)
def test_every_stain_is_found_with_its_counterstain(modality, colours):
    for colour in colours:
        rgb = painted(80, 120)
        paint(rgb, (20, 60, 30, 90), colour, noise=1)
        found = find_tissue(ArrayReader(rgb), TissueSpec(), modality)
        assert found.rule == modality
        assert found.mask[22:58, 32:88].all(), colour
        assert not found.mask[:17].any()


@pytest.mark.parametrize("modality", ["he", "pas"])
def test_blood_and_eosin_are_no_red_ink(modality):
    for colour in ((190, 70, 95), (170, 60, 80), (205, 95, 120), (200, 70, 150), MAGENTA):
        rgb = painted(80, 120)
        paint(rgb, (20, 60, 30, 90), colour, noise=3)
        assert find_tissue(ArrayReader(rgb), TissueSpec(), modality).mask[22:58, 32:88].all(), colour


def test_why_there_is_no_tissue():
    def reason(rgb, modality="he"):
        found = find_tissue(ArrayReader(rgb), TissueSpec(), modality)
        assert not found.mask.any()
        return found.reason

    rgb = painted(80, 120)
    assert reason(rgb) == "no pixel is stained"
    paint(rgb, (20, 26, 60, 66), PINK)
    assert reason(rgb) == "every stained piece is smaller than 4000 um2"
    rgb = painted(80, 120)
    paint(rgb, (20, 30, 10, 110), INKS["blue"], noise=4)
    assert reason(rgb) == "what is stained is pen or a black area"
    paint(rgb, (50, 75, 20, 90), PINK)
    assert find_tissue(ArrayReader(rgb), TissueSpec(), "he").reason == ""


# micrographs


def micrograph(h=600, w=900, seed=0):
    """Grey noise over smooth structures, with a bright lumen that is no label."""
    rng = np.random.default_rng(seed)
    grey = ndimage.gaussian_filter(rng.normal(0, 1, (h, w)), 6) * 400 + 120 + rng.normal(0, 8, (h, w))
    y, x = np.ogrid[:h, :w]
    grey[((y - h + 40) / 30) ** 2 + ((x - 200) / 150) ** 2 < 1] = 255
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def write_label(rgb, box, paper, text="HV 80 kV   x 11,500   gyp"):
    y0, y1, x0, x1 = box
    label = Image.new("RGB", (x1 - x0, y1 - y0), (paper,) * 3)
    ImageDraw.Draw(label).text((2, 0), text, fill=(255 - paper,) * 3, font_size=(y1 - y0) * 0.8)
    rgb[y0:y1, x0:x1] = np.asarray(label)


@pytest.mark.parametrize("paper", [0, 255])
@pytest.mark.parametrize("box", [(560, 600, 0, 900), (0, 40, 0, 900), (570, 590, 500, 800), (10, 30, 30, 300)])
def test_burnt_in_labels_are_no_tissue(box, paper):
    rgb = micrograph()
    assert not burnt_in(rgb).any()
    write_label(rgb, box, paper)
    found = find_tissue(ArrayReader(rgb, mpp0=0.002), TissueSpec(), "tem")
    assert found.rule == "micrograph"
    wanted = np.zeros(rgb.shape[:2], bool)
    wanted[max(0, box[0] - 2) : box[1] + 2, max(0, box[2] - 2) : box[3] + 2] = True
    np.testing.assert_array_equal(~found.mask, wanted)


def test_a_strip_that_touches_a_bright_lumen_is_found_at_either_edge():
    rgb = micrograph()
    write_label(rgb, (560, 600, 0, 900), 255)
    for picture in (rgb, rgb[::-1]):
        found = burnt_in(picture).all(axis=1)
        assert np.count_nonzero(found) == np.count_nonzero(burnt_in(picture)) / 900 == 42


def test_a_bar_in_the_middle_of_a_micrograph_is_structure():
    rgb = micrograph()
    rgb[300:320, 100:700] = 255
    assert not burnt_in(rgb).any()


@pytest.mark.data
def test_the_labels_of_a_real_micrograph(data):
    with open_slide(str(data / "tem/A1--0024.jpg"), mpp=0.002, modality="tem") as reader:
        found = find_tissue(reader, TissueSpec(), "tem")
        assert slide_focus(reader, found) > 0
    assert found.mask.shape == (668, 1024)
    boxes = ndimage.find_objects(ndimage.label(~found.mask)[0])
    assert boxes == [(slice(628, 668), slice(0, 1024))]  # rows of the file from 2298 on, from side to side
    assert found.mask.mean() > 0.93


# copies of one slide


def test_copies_with_other_pyramids_have_one_mask():
    rng = np.random.default_rng(0)
    rgb = painted(640, 900)
    for _ in range(40):
        y, x = rng.integers(0, 560), rng.integers(0, 800)
        paint(rgb, (y, y + 70, x, x + 90), PALE, noise=5)
    masks = [find_tissue(ArrayReader(rgb, mpp0=0.9, levels=n), TissueSpec(), "he").mask for n in (1, 3)]
    np.testing.assert_array_equal(*masks)
    wide = ArrayReader(rgb, mpp0=0.9, levels=3)
    thumbnail(wide, (101, 72), level0_px=rgb.shape[0] * rgb.shape[1] - 1)
    assert wide.largest < 300 * 300  # a larger slide is read from a coarser level
    assert LEVEL0_PX >= 2220 * 2967


@pytest.mark.data
@pytest.mark.parametrize("name", ["cmu1small.ome.zarr.zip", "cmu1small_dicom"])
def test_the_lossless_copies_of_a_real_slide_have_one_mask_and_one_focus(data, name):
    found = []
    for uri in ("CMU-1-Small-Region.svs", name):
        with open_slide(str(data / "slides" / uri)) as reader:
            tissue = find_tissue(reader, TissueSpec(), "he")
            found.append((tissue.mask, slide_focus(reader, tissue)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# user masks


def mask_of(path, pixels, **how):
    Image.fromarray(pixels).save(path, **how)
    return str(path)


def test_a_users_mask_is_taken_as_it_is(tmp_path):
    truth = np.zeros((30, 50), bool)
    truth[3:20, 7:31] = True
    truth[25, 40] = True  # a speck stays
    reader = ArrayReader(painted(600, 1000), mpp0=0.5)
    colours = np.zeros((30, 50, 4), np.uint8)
    colours[..., 3] = 255
    colours[truth, 1] = 9
    palette = Image.fromarray(truth.astype(np.uint8), "P")
    palette.putpalette([200, 10, 10, 0, 0, 0])  # index 1 is black: the index counts
    palette.save(tmp_path / "p.png")
    tifffile.imwrite(tmp_path / "bits.tif", truth, photometric="minisblack", metadata=None)
    uris = [
        mask_of(tmp_path / "bits.png", truth),
        mask_of(tmp_path / "m.png", truth.astype(np.uint8)),
        mask_of(tmp_path / "deep.png", truth.astype(np.uint16) * 300),
        mask_of(tmp_path / "m.tif", truth.astype(np.uint8) * 255, compression="tiff_lzw"),
        mask_of(tmp_path / "c.png", colours),
        str(tmp_path / "p.png"),
        str(tmp_path / "bits.tif"),
    ]
    for uri in uris:
        found = find_tissue(reader, TissueSpec(), "he", uri)
        np.testing.assert_array_equal(found.mask, truth, err_msg=uri)
        assert (found.rule, found.px0_per_px, found.reason) == ("user", (20.0, 20.0), "")
    assert len({mask_identity(uri) for uri in uris}) == len(uris)
    empty = find_tissue(reader, TissueSpec(), "he", mask_of(tmp_path / "none.png", truth & False))
    assert empty.reason == "the user's mask is all zero"


def test_a_mask_of_another_shape_or_no_mask_is_refused(tmp_path):
    reader = ArrayReader(painted(600, 1001), mpp0=0.5)
    fits = [(50, 30), (51, 30), (1001, 600), (2002, 1200), (100, 60), (63, 38)]
    for w, h in fits:
        uri = mask_of(tmp_path / "m.png", np.ones((h, w), np.uint8))
        assert find_tissue(reader, TissueSpec(), "he", uri).mask.all()
    for w, h in ((30, 50), (50, 50), (53, 30), (1001, 620)):
        uri = mask_of(tmp_path / "m.png", np.ones((h, w), np.uint8))
        with pytest.raises(MaskError, match=f"{w} x {h} pixels"):
            find_tissue(reader, TissueSpec(), "he", uri)
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "nowhere.png", "."):
        with pytest.raises(MaskError, match=r"E_MASK.*mask"):
            find_tissue(reader, TissueSpec(), "he", str(tmp_path / name))
    with pytest.raises(MaskError, match="There is no mask"):
        mask_identity(str(tmp_path / "nowhere.png"))


# focus


def blurred(rgb, sigma):
    return np.stack([ndimage.gaussian_filter(rgb[..., c].astype(float), sigma) for c in range(3)], 2).round()


def test_focus_falls_with_every_blur(data):
    tiles = [np.asarray(Image.open(p).convert("RGB")) for p in sorted((data / "tiles_nctcrc").glob("*.tif"))]
    assert len(tiles) == 9
    for tile in tiles:
        if tile.std() < 12:
            continue  # background
        scores = focus(np.stack([tile, *(blurred(tile, s).astype(np.uint8) for s in (0.5, 1, 1.5, 2, 3))]))
        assert scores.dtype == np.float32
        assert (np.diff(scores) < 0).all(), scores


def test_focus_knows_no_brightness_no_direction_and_hardly_contrast():
    rgb = blurred(np.random.default_rng(0).integers(0, 256, (90, 90, 3)), 1.5)
    rgb = (rgb - rgb.mean()) / rgb.std() * 30 + 120
    tile = np.clip(rgb, 0, 255).astype(np.uint8)
    same, lower = np.clip(rgb + 40, 0, 255), np.clip((rgb - 120) * 0.7 + 120, 0, 255)
    score, bright, turned, pale, flat = focus(
        np.stack([tile, same, np.rot90(tile), lower, np.full_like(tile, 93)]).astype(np.uint8)
    )
    assert bright == pytest.approx(score, rel=0.02)
    assert turned == pytest.approx(score, rel=1e-5)
    assert pale == pytest.approx(score, rel=0.15)
    assert flat == 0
    green = tile[..., 1].astype(float)
    laplacian = ndimage.laplace(green)[1:-1, 1:-1]
    assert score == pytest.approx(laplacian.var() / (green.var() + 25), rel=1e-6)
    checks = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    assert 63 < focus(checks[None])[0] <= 64


def test_a_slides_focus_is_that_of_its_tissue(tmp_path):
    sharp = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3)).astype(np.uint8)
    half = sharp.copy()
    half[:, 1000:] = blurred(sharp[:, 1000:], 2)
    left, right = np.zeros((2, 30, 40), bool)
    left[:, :14], right[:, 26:] = True, True
    reader = ArrayReader(half, mpp0=0.5)
    high, low = (slide_focus(reader, TissueMask(m, (50.0, 50.0), "he")) for m in (left, right))
    assert high > 10 > 1 > low > 0
    assert slide_focus(reader, TissueMask(left & False, (50.0, 50.0), "he")) is None
    assert reader.largest <= 2048 * 1500
    fine = ArrayReader(half, mpp0=0.002)  # a micrograph is sampled at its own scale
    assert slide_focus(fine, TissueMask(left, (50.0, 50.0), "he")) == high


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
