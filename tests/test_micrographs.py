"""Micrographs: one window and one crop for every reader, coordinates of the stored file, the same pixels everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
from dmfiles import write_dm
from PIL import Image, ImageDraw

from slideflow_ray import cli
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.collect import collect
from slideflow_ray.errors import CohortError, NoMpp, SlideError
from slideflow_ray.packs import Row, read_image, size_px0
from slideflow_ray.phantoms.tem import draw_micrograph
from slideflow_ray.scalebar import find_furniture
from slideflow_ray.slides import micrograph as micrographs
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.base import kept_px0
from slideflow_ray.slides.micrograph import luma, percentiles, shown
from slideflow_ray.specs import TissueSpec, WholeSpec
from slideflow_ray.tissue import find_tissue

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "tem" / "A1--0024.jpg"
MPP = 0.008
SIZE = (320, 240)
BAR = (20, 215, 100, 5)
"""x, y, width, height of what `burnt` draws: in a strip of paper from row 205 on."""


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing that one test finds of a file is there for the next."""
    monkeypatch.setattr(micrographs, "_TONES", {})


def burnt(seed: int = 0) -> np.ndarray:
    """A phantom of 320 x 240 between 30 and 200, uint8, with a strip of white paper and a black bar."""
    drawn = draw_micrograph(seed, SIZE, 8.0).pixels
    image = Image.fromarray((30 + drawn.astype(np.float64) * 170 / 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 205, 319, 239), fill=255)
    x, y, w, h = BAR
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=0)
    return np.asarray(image)


def expected(values: np.ndarray, keep: slice) -> np.ndarray:
    """What a model is to see of stored values, uint8 (h, w): slow, with NumPy's own percentiles."""
    kept = values[keep].astype(np.float64)
    low, high = (np.percentile(kept, q, method="inverted_cdf") for q in (0.5, 99.5))
    out = np.full(values.shape, 255, np.uint8)
    share = np.clip((kept - low) / (high - low), 0, 1)
    out[keep] = np.floor(255 * share + 0.5).astype(np.uint8)
    return out


def keep_of(grey: np.ndarray) -> slice:
    _, y, _, h = find_furniture(grey).keep
    assert 0 < h < len(grey)
    return slice(y, y + h)


def whole(path: Path, mpp: float | None = MPP) -> np.ndarray:
    with open_slide(str(path), mpp=mpp, modality="tem") as reader:
        return reader.read(0, (0, 0), reader.size_px0)


@pytest.mark.parametrize("kind", ["png", "tif", "tiled.tif", "rgb.png", "16.png", "16.tif", "bmp-like.jpg"])
def test_every_format_is_windowed_over_what_is_kept(kind, tmp_path):
    grey, path = burnt(), tmp_path / f"a.{kind}"
    stored: np.ndarray = grey
    if kind.startswith("16"):
        stored = grey.astype(np.uint16) * 12 + 1000  # a camera's 12 bits
    if kind.endswith("tif"):
        tifffile.imwrite(path, stored, tile=(64, 64) if kind == "tiled.tif" else None)
    elif kind == "rgb.png":
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(path)
    else:
        Image.fromarray(stored).save(path, **({"quality": 95} if kind.endswith("jpg") else {}))
    if kind.endswith("jpg"):
        stored = np.asarray(Image.open(path))
    keep = keep_of(grey)
    pixels = whole(path)
    assert pixels.shape == (240, 320, 3)
    np.testing.assert_array_equal(pixels, np.repeat(expected(stored, keep)[..., None], 3, axis=2))
    assert (pixels[keep.stop :] == 255).all()
    assert (pixels[keep] == 0).any()


def test_boxes_across_every_edge_are_cut_from_the_whole(tmp_path):
    Image.fromarray(burnt()).save(tmp_path / "a.png")
    with open_slide(str(tmp_path / "a.png"), mpp=MPP, modality="tem") as reader:
        pixels = np.full((400, 500, 3), 255, np.uint8)
        pixels[70:310, 60:380] = reader.read(0, (0, 0), SIZE)
        for x, y, w, h in [(-60, -70, 500, 400), (-10, 190, 50, 30), (300, 230, 40, 40), (5, 6, 7, 8), (0, 236, 9, 3)]:
            box = reader.read(0, (x, y), (w, h))
            np.testing.assert_array_equal(box, pixels[y + 70 : y + 70 + h, x + 60 : x + 60 + w])


def test_colours_and_other_modalities_are_left_as_they_are(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "c.png")
    np.testing.assert_array_equal(whole(tmp_path / "c.png"), rgb)
    Image.fromarray(burnt()).save(tmp_path / "a.png")
    with open_slide(str(tmp_path / "a.png"), mpp=0.5, modality="he") as reader:
        np.testing.assert_array_equal(reader.read(0, (0, 0), SIZE)[..., 0], burnt())
        assert kept_px0(reader) == (0, 0, 320, 240)


def test_an_arrow_in_colour_is_no_coloured_picture(tmp_path):
    rgb = np.repeat(burnt()[..., None], 3, axis=2)
    rgb[20:24, 20:60] = (255, 0, 0)
    Image.fromarray(rgb).save(tmp_path / "c.png")
    pixels = whole(tmp_path / "c.png")
    assert (np.ptp(pixels, axis=2) == 0).all()
    red = luma(rgb)[22, 22]
    assert red == np.asarray(Image.fromarray(rgb).convert("L"))[22, 22] == 76


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_percentiles_are_numpy_s(dtype):
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1000, 20_001)
    if dtype == "float64":
        values = values.astype(np.float32)  # what it is rounded to
    values = np.abs(values) % 250 if dtype.startswith("u") else values
    values = values.astype(dtype).reshape(3, -1)
    shares = (0.5, 10, 50, 99.5, 100)
    found = percentiles(lambda: iter(values), shares)
    assert found == tuple(float(np.percentile(values, q, method="inverted_cdf")) for q in shares)
    if dtype == "float32":
        values[0, :5], values[1, 7] = np.nan, np.inf
        fine = values[np.isfinite(values)]
        found = percentiles(lambda: iter(values), shares)
        assert found == tuple(float(np.percentile(fine, q, method="inverted_cdf")) for q in shares)
        assert shown(values[:1, :1], (0, 1)) == 0


def test_large_pictures_are_searched_small_and_windowed_exactly(tmp_path, monkeypatch):
    grey = np.kron(burnt(), np.ones((3, 3), np.uint8))[:, :-1]
    tifffile.imwrite(tmp_path / "a.tif", grey, tile=(128, 128))
    monkeypatch.setattr(micrographs, "FURNITURE_PX", 320)
    monkeypatch.setattr(micrographs, "BLOCK_PIXELS", 5000)
    with open_slide(str(tmp_path / "a.tif"), mpp=MPP, modality="tem") as reader:
        _, top, _, bottom = kept_px0(reader)
        assert (top, bottom % 3) == (0, 0)
        assert 180 * 3 <= bottom <= 206 * 3
        pixels = reader.read(0, (0, 0), reader.size_px0)
    np.testing.assert_array_equal(pixels[..., 0], expected(grey, slice(0, bottom)))


def test_a_pyramid_has_one_window(tmp_path):
    grey = burnt()
    with tifffile.TiffWriter(tmp_path / "p.tif") as file:
        file.write(grey, tile=(64, 64), subifds=1, photometric="minisblack")
        file.write(grey[::2, ::2], tile=(64, 64), subfiletype=1, photometric="minisblack")
    with open_slide(str(tmp_path / "p.tif"), mpp=MPP, modality="tem") as reader:
        assert len(reader.levels) == 2
        fine, coarse = (reader.read(i, (0, 0), level.size) for i, level in enumerate(reader.levels))
        rows = kept_px0(reader)[3] // 2
    np.testing.assert_array_equal(fine[: 2 * rows : 2, ::2], coarse[:rows])
    assert (coarse[rows:] == 255).all()


# tissue, packs


def test_furniture_is_no_tissue_and_is_cropped_off_whole_images(tmp_path):
    grey = burnt()
    Image.fromarray(grey).save(tmp_path / "a.png")
    keep = keep_of(grey)
    with open_slide(str(tmp_path / "a.png"), mpp=MPP, modality="tem") as reader:
        for rule in ("auto", "everything"):
            mask = find_tissue(reader, TissueSpec(rule=rule, mpp=MPP), "tem").mask
            assert mask.shape == (240, 320)
            assert mask[keep].all()
            assert not mask[keep.stop :].any()
    row = Row(Item(slide_id="a", uri=str(tmp_path / "a.png"), modality="tem"), "sha256:0")
    assert size_px0(row) == SIZE
    image = read_image(row, WholeSpec(tile_px=96, fit="squash"))
    oracle = Image.fromarray(expected(grey, keep)[keep]).resize((96, 96), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image[..., 1], np.asarray(oracle))


# formats of microscopes


def deep(dtype: str) -> np.ndarray:
    """A phantom in values that a detector gives, signed where the type is."""
    drawn = draw_micrograph(2, (200, 150), 8.0).pixels.astype(np.float64)
    values = drawn / 2 if dtype == "int8" else drawn * 9 + 300
    return (values - (100 if not dtype.startswith("u") else 0)).astype(dtype)


def check(path: Path, values: np.ndarray, mpp: float = 0.008) -> None:
    """A file without furniture: size, scale, and every pixel, whether or not its row says what it is."""
    for modality in ("tem", None):
        with open_slide(str(path), modality=modality) as reader:
            assert reader.size_px0 == values.shape[::-1]
            assert reader.mpp0 == pytest.approx(mpp, rel=1e-6)
            assert reader.mpp_source == "file"
            pixels = reader.read(0, (0, 0), reader.size_px0)
            assert kept_px0(reader) == (0, 0, *values.shape[::-1])
    np.testing.assert_array_equal(pixels[..., 0], expected(values, slice(None)))
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32", "float16"])
def test_mrc_is_read_from_above(dtype, tmp_path):
    values = deep(dtype)
    with mrcfile.new(tmp_path / "a.mrc", values[::-1].copy()) as file:
        file.voxel_size = 80
    check(tmp_path / "a.mrc", values)


def test_mrc_of_either_byte_order_and_with_a_longer_header(tmp_path):
    values = deep("float32")
    with mrcfile.new(tmp_path / "a.mrc", values[::-1].copy()) as file:
        file.voxel_size = 80
        file.set_extended_header(np.zeros(7, "V100"))
    check(tmp_path / "a.mrc", values)
    data = bytearray((tmp_path / "a.mrc").read_bytes())
    big = np.frombuffer(data, "<u4").byteswap().tobytes()
    other = bytearray(big)
    other[208:216] = b"MAP \x11\x11\0\0"
    (tmp_path / "b.mrc").write_bytes(bytes(other))
    check(tmp_path / "b.mrc", values)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_dm_is_read_behind_its_preview(version, dtype, tmp_path):
    values = deep(dtype) if dtype != "uint8" else draw_micrograph(2, (200, 150), 8.0).pixels
    check(write_dm(tmp_path / f"a.dm{version}", values, version=version), values)
    check(write_dm(tmp_path / f"b.dm{version}", values, 0.016, "\u00b5m", version), values, 0.016)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", "int32"])
@pytest.mark.parametrize("tile", [(64, 48), None])
def test_deep_tiff_is_read_in_pieces(dtype, tile, tmp_path):
    values = deep(dtype)
    how = {"resolution": (1.25e6, 1.25e6), "resolutionunit": "CENTIMETER", "compression": "zlib", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", values, tile=tile, rowsperstrip=None if tile else 7, bigtiff=True, **how)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", None)[..., 1], expected(values, slice(None)))
    with open_slide(str(tmp_path / "a.tif"), modality="tem") as reader:
        np.testing.assert_array_equal(reader.read(0, (30, 40), (70, 50)), whole(tmp_path / "a.tif")[40:90, 30:100])


@pytest.mark.parametrize("kind", ["truncated.mrc", "stack.mrc", "complex.mrc", "truncated.dm3", "stack.dm4", "cut.dm4"])
def test_what_is_no_image_is_refused_with_a_code(kind, tmp_path):
    path, values = tmp_path / kind, deep("float32")
    if kind.endswith("mrc"):
        data = {"stack": np.stack([values] * 3), "complex": values.astype(np.complex64)}.get(kind.split(".")[0], values)
        mrcfile.write(path, data, voxel_size=80)
    else:
        write_dm(path, np.stack([values] * 3) if kind.startswith("stack") else values, version=int(kind[-1]))
    whole_file = path.read_bytes()
    if kind.startswith(("truncated", "cut")):
        path.write_bytes(whole_file[: 300 if kind.startswith("cut") else len(whole_file) // 2])
    code, said = {"truncated": ("E_TRUNCATED", "bytes|tags"), "cut": ("E_TRUNCATED", "tags")}.get(
        kind.split(".")[0], ("E_NOT_A_SLIDE", "stack of 3|complex")
    )
    with pytest.raises(SlideError, match=said) as caught:
        open_slide(str(path), modality="tem")
    assert caught.value.code == code


def test_diffraction_and_unmeasured_files_have_no_scale(tmp_path):
    with pytest.raises(NoMpp):
        open_slide(str(write_dm(tmp_path / "a.dm3", deep("int16"), 0.1, "1/nm")), modality="tem")
    mrcfile.write(tmp_path / "a.mrc", deep("int16"))
    with pytest.raises(NoMpp):
        open_slide(str(tmp_path / "a.mrc"), modality="tem")


def test_without_ncempy_the_error_names_it(tmp_path, monkeypatch):
    path = write_dm(tmp_path / "a.dm3", deep("int16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "slideflow_ray._ncempy_dm", raising=False)
    with pytest.raises(SlideError, match="ncempy") as caught:
        open_slide(str(path), modality="tem")
    assert "slideflow-ray[dm]" in caught.value.step


# scale


def test_without_a_scale_the_bar_is_named(tmp_path):
    Image.fromarray(burnt()).save(tmp_path / "a.png", dpi=(72, 72))
    with pytest.raises(NoMpp, match=r"Its scale bar is 100 pixels long \(x 20 to 120, row 215\)") as caught:
        whole(tmp_path / "a.png", mpp=None)
    assert "nm_per_px" in caught.value.step
    Image.fromarray(draw_micrograph(0, SIZE, 8.0).pixels).save(tmp_path / "b.png")
    with pytest.raises(NoMpp, match="No scale bar"):
        whole(tmp_path / "b.png", mpp=None)


@pytest.mark.skipif(not REAL.exists(), reason="no micrograph at ../shared/data/tem")
def test_the_real_micrograph_is_kept_above_its_label():
    with pytest.raises(NoMpp, match="614 pixels"):
        open_slide(str(REAL), modality="tem")
    with open_slide(str(REAL), mpp=2 / 614, modality="tem") as reader:
        assert kept_px0(reader) == (0, 0, 3744, 2298)
        stored = np.asarray(Image.open(REAL))
        oracle = expected(stored, slice(0, 2298))
        np.testing.assert_array_equal(reader.read(0, (500, 2000), (700, 444))[..., 2], oracle[2000:, 500:1200])


VENDORS = {
    "imagej": {"imagej": True, "resolution": (0.125, 0.125), "metadata": {"unit": "nm"}},
    "imagej in um": {"imagej": True, "resolution": (125, 125), "metadata": {"unit": "um"}},
    "gatan": {"extratags": [(65003, 2, 3, "nm", True), (65009, 12, 1, 8.0, True)], "metadata": None},
    "fei": {"extratags": [(34682, 2, 0, "[Scan]\r\nPixelWidth=8e-009\r\nPixelHeight=8e-009\r\n", True)]},
    "ome": {"ome": True, "metadata": {"PhysicalSizeX": 8, "PhysicalSizeXUnit": "nm"}},
}
VENDORS["ome"]["metadata"] |= {"PhysicalSizeY": 8, "PhysicalSizeYUnit": "nm", "axes": "YX"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("vendor", VENDORS)
def test_what_a_microscope_s_software_says_is_the_scale(vendor, dtype, tmp_path):
    path = tmp_path / ("a.ome.tif" if vendor == "ome" else "a.tif")
    how = {"resolution": (72, 72), "resolutionunit": "INCH", **VENDORS[vendor]}
    if vendor.startswith("imagej"):
        del how["resolutionunit"]
    tifffile.imwrite(path, deep("uint16").astype(dtype), **how)
    with open_slide(str(path), modality="tem") as reader:
        assert reader.mpp0 == pytest.approx(0.008)
        assert reader.mpp_source == "file"


def test_a_cohort_may_say_nm(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_text("slide_id,uri,modality,nm_per_px\na,a.tif,tem,8.5\nb,b.tif,tem,\n")
    assert [item.mpp for item in read_cohort(path)] == [0.0085, None]
    path.write_text("slide_id,uri,mpp,nm_per_px\na,a.tif,0.0085,8.5\n")
    with pytest.raises(CohortError, match="line 2: mpp and nm_per_px"):
        read_cohort(path)
    path.write_text("slide_id,uri,nm_per_px\na,a.tif,eight\n")
    with pytest.raises(CohortError, match="nm_per_px is no number"):
        read_cohort(path)


def test_doctor_says_what_it_finds(tmp_path, capsys):
    Image.fromarray(burnt()).save(tmp_path / "a.png")
    bottom = keep_of(burnt()).stop
    assert main("doctor", str(tmp_path / "a.png")) == 0
    out = capsys.readouterr().out
    assert "scale bar      100 px\n" in out
    assert f"y 0 to {bottom};" in out
    assert "nm_per_px" in out
    assert "--retry" not in out
    assert main("doctor", str(tmp_path / "a.png"), "--mpp", "5") == 2
    assert "5 nm are 0.005" in capsys.readouterr().err
    assert main("doctor", str(tmp_path / "a.png"), "--mpp", "0.02") == 0
    assert "100 px, 2,000 nm" in capsys.readouterr().out


def main(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0)


def test_a_folder_of_micrographs_becomes_a_cohort(tmp_path):
    with mrcfile.new(tmp_path / "a.mrc", deep("int16")) as file:
        file.voxel_size = 80
    write_dm(tmp_path / "b.dm4", deep("int16"), version=4)
    Image.fromarray(burnt()).save(tmp_path / "c.png")
    found = collect(tmp_path, modality="tem")
    assert {slide.slide_id: slide.scale[:9] for slide in found.slides} == {"a": "", "b": "", "c": "E_NO_MPP:"}
    assert "100 pixels long" in next(slide.scale for slide in found.slides if slide.slide_id == "c")
