"""Every reader over the real copies of one slide and over generated files; OpenSlide and the pixels are the oracles."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
import zarr
from PIL import Image

from slideflow_ray.errors import BadDimensions, BadMpp, NoMpp, NotASlide, ReadError, TruncatedSlide
from slideflow_ray.slides import image as image_module
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.base import checked_mpp
from slideflow_ray.slides.image import eight_bit
from slideflow_ray.testing import SlideReaderTests

SIZE = (2220, 2967)
COPIES = {
    "CMU-1-Small-Region.svs": "tiffslide",
    "cmu1small_pyramid_jpeg.tif": "tiffslide",
    "cmu1small_pyramid.ome.tif": "tiffslide",
    "cmu1small.ome.zarr.zip": "omezarr",
    "cmu1small_dicom": "openslide",
}


def noise(h: int, w: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """Random pixels, a bright diagonal on them: nothing symmetric about it."""
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (h, w, channels), dtype, endpoint=True)
    return pixels[..., 0] if channels == 1 else pixels


# generated OME-Zarr


def write_omezarr(
    folder, planes, *, version="0.5", axes="cyx", unit="micrometer", mpp=0.5, image=None, chunk=64
) -> Path:
    """Write planes, each (h, w, 3), as an OME-Zarr whose axes stand in the order `axes`."""
    form = 3 if version == "0.5" else 2
    group = zarr.open_group(folder, mode="w", zarr_format=form)
    datasets = []
    for index, plane in enumerate(planes):
        letters = "yxc" if plane.ndim == 3 else "yx"
        extra = [a for a in axes if a not in letters]
        data = plane.reshape(*plane.shape, *(1 for _ in extra))
        data = data.transpose([(letters + "".join(extra)).index(a) for a in axes])
        chunks = tuple(min(chunk, n) if a in "yx" else n for a, n in zip(axes, data.shape, strict=True))
        made = group.create_array(str(index), shape=data.shape, chunks=chunks, dtype=data.dtype)
        made[...] = data
        step = planes[0].shape[1] / plane.shape[1]
        scale = [mpp * step if a in "yx" else 1.0 for a in axes]
        datasets.append({"path": str(index), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"t": "time", "c": "channel"}
    names = [{"name": a, "type": kinds.get(a, "space")} | ({"unit": unit} if a in "zyx" and unit else {}) for a in axes]
    scales = [{"axes": names, "datasets": datasets, **(image or {})}]
    group.attrs.put({"ome": {"version": "0.5", "multiscales": scales}} if form == 3 else {"multiscales": scales})
    return folder


def pyramid_of(pixels: np.ndarray, n: int) -> list[np.ndarray]:
    return [pixels[:: 2**i, :: 2**i] for i in range(n)]


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.with_name(folder.name + ".zip")
    with zipfile.ZipFile(path, "w") as file:
        for entry in sorted(folder.rglob("*")):
            if entry.is_file():
                file.write(entry, f"{prefix}{entry.relative_to(folder).as_posix()}")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """One small picture in every form that the readers of this project write or meet."""
    folder = tmp_path_factory.mktemp("made")
    pixels = noise(301, 203)
    pixels[0, 0], pixels[-1, -1] = (1, 2, 3), (4, 5, 6)
    paths = {
        "zarr04": write_omezarr(folder / "a.ome.zarr", pyramid_of(pixels, 3), version="0.4"),
        "zarr05": write_omezarr(folder / "b.ome.zarr", pyramid_of(pixels, 2), axes="tczyx"),
        "zarr05 yxc": write_omezarr(folder / "c.ome.zarr", pyramid_of(pixels, 2), axes="yxc", chunk=100),
        "png": folder / "a.png",
        "png16": folder / "b.png",
        "tif16": folder / "b.tif",
        "tif planar": folder / "c.tif",
    }
    paths["zip"] = zipped(paths["zarr04"], "inside.ome.zarr/")
    paths["zip05"] = zipped(paths["zarr05"])
    Image.fromarray(pixels).save(paths["png"], dpi=(50800, 50800))
    wide = pixels.astype(np.uint16) * 257
    paths["png16"].write_bytes(imagecodecs.png_encode(wide))
    tifffile.imwrite(paths["tif16"], wide, photometric="rgb", metadata=None, compression="zlib")
    tifffile.imwrite(
        paths["tif planar"], np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate", metadata=None
    )
    return paths


class TestMade(SlideReaderTests):
    @pytest.fixture(params=["zarr04", "zarr05", "zarr05 yxc", "zip", "zip05", "png", "png16", "tif16", "tif planar"])
    def reader(self, request, made):
        with open_slide(str(made[request.param]), mpp=0.5) as reader:
            yield reader

    def test_its_pixels_are_those_that_were_written(self, reader):
        assert reader.name == ("omezarr" if ".zarr" in reader.uri else "image")
        w, h = reader.size_px0
        found = reader.read(0, (0, 0), (w, h))
        expected = noise(301, 203)
        expected[0, 0], expected[-1, -1] = (1, 2, 3), (4, 5, 6)
        if reader.uri.endswith(("b.png", "b.tif")):  # 16 bit, by its window
            low, high = np.percentile(expected.astype(int) * 257, (0.5, 99.5), method="inverted_cdf")
            assert reader.window == (low, high)
            expected = np.clip((expected * 257.0 - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
        np.testing.assert_array_equal(found, expected)
        for level in range(1, len(reader.levels)):
            part = reader.read(level, (3, 2), (40, 30))
            np.testing.assert_array_equal(part, expected[:: 2**level, :: 2**level][2:32, 3:43])


@pytest.mark.data
class TestCopies(SlideReaderTests):
    """The suite on every copy of CMU-1-Small-Region."""

    @pytest.fixture(params=COPIES)
    def reader(self, request, data):
        with open_slide(str(data / "slides" / request.param), modality="he") as reader:
            assert (reader.name, reader.size_px0) == (COPIES[request.param], SIZE)
            assert (reader.mpp0, reader.mpp_source) == (0.499, "file")
            yield reader


@pytest.mark.data
@pytest.mark.parametrize("name", ["cmu1small.ome.zarr.zip", "cmu1small_dicom"])
def test_the_lossless_copies_are_the_svs_bit_for_bit(data, name):
    with open_slide(str(data / "slides" / name)) as copy, open_slide(str(data / "slides" / next(iter(COPIES)))) as svs:
        np.testing.assert_array_equal(copy.read(0, (0, 0), SIZE), svs.read(0, (0, 0), SIZE))
        np.testing.assert_array_equal(copy.read(0, (2000, -5), (400, 99)), svs.read(0, (2000, -5), (400, 99)))


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in COPIES if "zarr" not in name])
def test_every_copy_equals_openslide(data, name):
    path = data / "slides" / name
    first = max(path.iterdir(), key=lambda p: p.stat().st_size) if path.is_dir() else path
    with open_slide(str(path)) as reader, openslide.OpenSlide(str(first)) as slide:
        for x, y in ((0, 0), (1023, 511), (2100, 2900)):
            wanted = slide.read_region((x, y), 0, (120, 67))
            white = Image.new("RGB", wanted.size, "white")
            white.paste(wanted, mask=wanted.getchannel("A"))
            np.testing.assert_array_equal(reader.read(0, (x, y), (120, 67)), np.asarray(white))


# what is opened as what


def test_content_decides_and_not_the_suffix(made, tmp_path):
    for kind, suffix in (("png", ".svs"), ("tif16", ".png"), ("zip", ".dat"), ("png16", ".tif")):
        path = tmp_path / f"{kind}{suffix}"
        shutil.copy(made[kind], path)
        with open_slide(str(path), mpp=1) as reader:
            assert reader.size_px0 == (203, 301)


@pytest.mark.data
def test_a_dicom_folder_needs_one_series_and_nothing_else(data, tmp_path):
    for path in (data / "slides" / "cmu1small_dicom").iterdir():
        shutil.copy(path, tmp_path)
    with open_slide(str(tmp_path)) as reader:
        assert reader.size_px0 == SIZE
    (tmp_path / ".hidden").write_text("")
    open_slide(str(tmp_path)).close()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotASlide, match="folder"):
        open_slide(str(tmp_path))
    (tmp_path / "notes.txt").unlink()
    shutil.copy(data / "slides" / "camelyon_overview_jpeg.dcm", tmp_path)
    with pytest.raises(NotASlide, match="holds 2 DICOM series"):
        open_slide(str(tmp_path))


@pytest.mark.data
def test_a_label_or_overview_file_of_a_series_opens_the_series(data):
    for path in (data / "slides" / "cmu1small_dicom").iterdir():
        with open_slide(str(path)) as reader:
            assert reader.size_px0 == SIZE


def test_mirax_is_no_jpeg(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "slide.mrxs", format="JPEG")
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "Slidedat.ini").write_text("[GENERAL]\n")
    with pytest.raises(NotASlide, match="openslide"):
        open_slide(str(tmp_path / "slide.mrxs"), mpp=1)


def test_a_lazily_loaded_library_stays_unloaded_for_png(made):
    import subprocess
    import sys

    code = "import sys; from slideflow_ray.slides import open_slide; open_slide(sys.argv[1])\n"
    code += "print(sorted({'zarr', 'openslide', 'tiffslide', 'tifffile'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code, made["png"]], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# OME-Zarr refusals


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"unit": ""}, NoMpp, "does not say"),
        ({"unit": "pixel"}, NoMpp, "does not say"),
        ({"unit": "millimeter", "mpp": 0.5}, BadMpp, "500"),
        ({"mpp": 0.0}, BadMpp, "is 0"),
    ],
)
def test_an_omezarr_without_a_credible_scale_is_refused(tmp_path, how, error, words):
    path = write_omezarr(tmp_path / "a.zarr", [noise(40, 30)], **how)
    with pytest.raises(error, match=words):
        open_slide(str(path))
    with open_slide(str(path), mpp=0.25) as reader:
        assert (reader.mpp0, reader.mpp_source) == (0.25, "cohort")


def test_scales_multiply_and_units_count(tmp_path):
    outer = {"coordinateTransformations": [{"type": "scale", "scale": [1, 2, 2]}]}
    path = write_omezarr(tmp_path / "a.zarr", [noise(40, 30)], unit="nanometer", mpp=125.0, image=outer)
    with open_slide(str(path)) as reader:
        assert reader.mpp0 == 0.25


def test_a_zarr_without_an_image_a_stack_and_other_pixels_are_refused(tmp_path):
    zarr.open_group(tmp_path / "plain.zarr", mode="w")
    stack = write_omezarr(tmp_path / "stack.zarr", [noise(40, 30)], axes="zcyx")
    group = zarr.open_group(stack, mode="a")
    del group["0"]
    group.create_array("0", shape=(5, 3, 40, 30), dtype="uint8")
    deep = write_omezarr(tmp_path / "deep.zarr", [noise(40, 30, dtype="uint16")])
    four = write_omezarr(tmp_path / "four.zarr", [noise(40, 30, 4)])
    lost = write_omezarr(tmp_path / "lost.zarr", pyramid_of(noise(40, 30), 2))
    shutil.rmtree(lost / "1")
    (tmp_path / "no.zip").write_bytes(b"PK\3\4" + bytes(100))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "x")
    for name, error, words in (
        ("plain.zarr", NotASlide, "multiscales"),
        ("stack.zarr", NotASlide, "stack"),
        ("deep.zarr", NotASlide, "uint16"),
        ("four.zarr", NotASlide, "4 channels"),
        ("lost.zarr", NotASlide, "'1'|1"),
        ("no.zip", TruncatedSlide, "directory"),
        ("other.zip", NotASlide, "without an OME-Zarr"),
    ):
        with pytest.raises(error, match=words):
            open_slide(str(tmp_path / name))
    assert stack != four != deep


def test_a_group_below_the_root_and_grey_planes(tmp_path):
    grey = noise(40, 30, 1)
    zarr.open_group(tmp_path / "raw.zarr", mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write_omezarr(tmp_path / "raw.zarr" / "0", [grey], version="0.4", axes="yx")
    with open_slide(str(tmp_path / "raw.zarr")) as reader:
        np.testing.assert_array_equal(reader.read(0, (0, 0), (30, 40)), np.repeat(grey[..., None], 3, 2))


def test_a_broken_chunk_names_slide_level_and_box(tmp_path):
    path = write_omezarr(tmp_path / "a.zarr", [noise(130, 130)])
    (path / "0" / "c" / "0" / "1" / "1").write_bytes(b"no chunk")
    with open_slide(str(path)) as reader:
        assert reader.read(0, (0, 0), (60, 60)).std() > 0
        with pytest.raises(ReadError, match=r"a.zarr, level 0, x 70, y 70, 8 x 8 pixels"):
            reader.read(0, (70, 70), (8, 8))


def test_an_omezarr_that_claims_the_sky_is_refused(tmp_path):
    path = write_omezarr(tmp_path / "a.zarr", [noise(40, 30)])
    about = json.loads((path / "0" / "zarr.json").read_text())
    about["shape"] = [3, 900_000, 400_000]
    (path / "0" / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(BadDimensions, match="400,000 x 900,000"):
        open_slide(str(path))
    about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"] = [3, 40_000, 40_000], [3, 40_000, 40_000]
    (path / "0" / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(BadDimensions, match="chunks of 3 x 40000 x 40000"):
        open_slide(str(path))


# plain images


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **how) -> str:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **how)
    return str(path)


def whole(uri: str, mpp: float | None = 0.5) -> np.ndarray:
    with open_slide(uri, mpp=mpp) as reader:
        return reader.read(0, (0, 0), reader.size_px0)


def test_grey_palette_bilevel_and_alpha_become_rgb_on_white(tmp_path):
    grey, colour, clear = noise(20, 31, 1), noise(20, 31), noise(20, 31, 4)
    np.testing.assert_array_equal(whole(save(tmp_path / "g.png", grey)), np.repeat(grey[..., None], 3, 2))
    bits = whole(save(tmp_path / "b.png", grey, "1"))
    assert set(np.unique(bits)) == {0, 255}
    palette = Image.fromarray(colour).quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(whole(str(tmp_path / "p.png")), np.asarray(palette.convert("RGB")))
    expected = clear[..., :3] * (clear[..., 3:] / 255) + 255 * (1 - clear[..., 3:] / 255)
    for name in ("a.png", "a.tif"):
        np.testing.assert_allclose(whole(save(tmp_path / name, clear)), expected, atol=0.51)
    np.testing.assert_array_equal(whole(save(tmp_path / "c.tif", colour)), colour)
    jpeg = save(tmp_path / "j.jpg", colour, quality=95)
    np.testing.assert_array_equal(whole(jpeg), np.asarray(Image.open(jpeg)))


def test_plain_tiffs_of_every_kind_are_read_by_some_reader(tmp_path):
    grey = noise(20, 31, 1)
    inverted = tmp_path / "w.tif"
    tifffile.imwrite(inverted, 65535 - grey.astype(np.uint16) * 257, photometric="miniswhite", metadata=None)
    windowed = eight_bit(grey.astype(np.uint16) * 257)[0]
    np.testing.assert_array_equal(whole(str(inverted)), windowed)
    colours = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "p.tif", grey, photometric="palette", colormap=colours, metadata=None)
    np.testing.assert_array_equal(whole(str(tmp_path / "p.tif")), (colours >> 8).T[grey])
    tifffile.imwrite(tmp_path / "f.tif", grey.astype(np.float32), metadata=None)
    with pytest.raises(NotASlide, match="float32"):
        open_slide(str(tmp_path / "f.tif"), mpp=0.5)
    tifffile.imwrite(
        tmp_path / "s.tif", np.stack([grey.astype(np.uint16)] * 4), metadata=None, photometric="minisblack"
    )
    with pytest.raises(NotASlide, match="stack of 4"):
        open_slide(str(tmp_path / "s.tif"), mpp=0.5)


def test_the_orientation_of_exif_is_ignored(tmp_path):
    pixels = noise(20, 31)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert whole(save(tmp_path / "e.png", pixels, exif=exif)).shape == (20, 31, 3)
    np.testing.assert_array_equal(whole(str(tmp_path / "e.png")), pixels)


def test_a_window_of_16_bit_uses_all_channels_and_survives_a_flat_image():
    raw = np.zeros((100, 100, 3), np.uint16)
    raw[..., 0], raw[..., 1], raw[..., 2] = 1000, 2000, 3000
    raw[0, :20] = 65535  # 0.2 % of hot pixels
    pixels, window = eight_bit(raw)
    assert window == (1000, 3000)
    assert pixels[50, 50].tolist() == [0, 128, 255]
    assert pixels[0, 0].tolist() == [255, 255, 255]
    flat, window = eight_bit(np.full((5, 5), 700, np.uint16))
    assert window == (700, 701)
    assert (flat == 0).all()
    both = np.dstack([np.full((4, 4), 9, np.uint16), np.full((4, 4), 0, np.uint16)])
    assert (eight_bit(both)[0] == 255).all()  # transparent
    both[..., 1] = 0x40FF  # black at a quarter: 0.253
    assert (eight_bit(both)[0] == 191).all()


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 50_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(header + bytes(5000))
    bomb = bytearray(Path(save(tmp_path / "bomb.jpg", noise(16, 16))).read_bytes())
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = struct.pack(">HH", 50_000, 60_000)
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    wide = tmp_path / "bomb.tif"
    tifffile.imwrite(wide, noise(16, 16, dtype="uint16"), photometric="rgb", metadata=None)
    with tifffile.TiffFile(wide, mode="r+b") as file:
        file.pages[0].tags["ImageWidth"].overwrite(60_000)
        file.pages[0].tags["ImageLength"].overwrite(50_000)
    for name in ("bomb.png", "bomb.jpg", "bomb.tif"):
        with pytest.raises(BadDimensions, match="60,000 x 50,000"):
            open_slide(str(tmp_path / name), mpp=0.5)
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadDimensions, match="pyramidal TIFF"):
        open_slide(save(tmp_path / "large.png", noise(11, 11)), mpp=0.5)


def test_images_that_are_cut_or_no_images_are_errors_of_ours(tmp_path):
    data = Path(save(tmp_path / "a.png", noise(200, 300))).read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with open_slide(str(tmp_path / "cut.png"), mpp=0.5) as reader, pytest.raises(ReadError, match=r"cut.png, level 0"):
        reader.read(0, (0, 0), (8, 8))
    for name, head in (("a.jpg", b"\xff\xd8\xff\xe0\0\4ab"), ("b.png", b"\x89PNG\r\n\x1a\nxx")):
        (tmp_path / name).write_bytes(head)
        with pytest.raises(NotASlide):
            open_slide(str(tmp_path / name), mpp=0.5)


# the scale


def test_where_the_scale_comes_from(tmp_path):
    pixels = noise(20, 31)
    with open_slide(save(tmp_path / "a.png", pixels, dpi=(50800, 50800)), modality="he") as reader:
        assert reader.mpp0 == pytest.approx(0.5, rel=1e-3)  # PNG holds whole pixels per metre
        assert reader.mpp_source == "file"
    with pytest.raises(NoMpp, match="does not say"):
        open_slide(save(tmp_path / "b.png", pixels))
    with pytest.raises(BadMpp, match="72 dpi"):
        open_slide(save(tmp_path / "c.jpg", pixels, dpi=(72, 72)))
    with open_slide(save(tmp_path / "d.tif", pixels, dpi=(50800, 50800))) as reader:
        assert reader.mpp0 == pytest.approx(0.5)
    tifffile.imwrite(
        tmp_path / "e.tif", pixels.astype(np.uint16), metadata=None, resolution=(20000, 20000), resolutionunit=3
    )
    with open_slide(str(tmp_path / "e.tif")) as reader:
        assert (reader.name, reader.mpp0) == ("image", 0.5)


@pytest.mark.parametrize(("unit", "size", "expected"), [("µm", 0.25, 0.25), ("nm", 250.0, 0.25), (None, 0.3, 0.3)])
def test_ome_tiffs_say_their_scale_in_xml(tmp_path, unit, size, expected):
    about = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit:
        about |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, noise(130, 90), tile=(64, 64), photometric="rgb", metadata=about, resolution=(72, 72))
    with open_slide(str(path)) as reader:
        assert (reader.name, reader.mpp0, reader.mpp_source) == ("tiffslide", expected, "file")


def test_the_objective_is_a_last_resort_and_said_so(tmp_path):
    def aperio(text: str) -> str:
        path = tmp_path / "a.svs"
        tifffile.imwrite(
            path,
            noise(130, 90),
            tile=(64, 64),
            photometric="rgb",
            metadata=None,
            description=f"Aperio Image Library v1\r\n90x130 (64x64) |{text}",
            resolutionunit=1,
        )
        return str(path)

    for text, mpp, source in (("AppMag = 20|MPP = 0.47", 0.47, "file"), ("AppMag = 40", 0.25, "objective")):
        with open_slide(aperio(text), modality="he") as reader:
            assert (reader.mpp0, reader.mpp_source) == (mpp, source)
    with pytest.raises(NoMpp):
        open_slide(aperio("AppMag = 0"))
    with open_slide(aperio("AppMag = 40"), mpp=0.3) as reader:
        assert (reader.mpp0, reader.mpp_source) == (0.3, "cohort")


@pytest.mark.parametrize(
    ("given", "found", "objective", "modality", "expected"),
    [
        (None, (0.5, 0.5), 40, "he", (0.5, "file")),
        (None, (0.5, 0.52), None, "he", (0.51, "file")),
        (None, (None, None), "20", "he", (0.5, "objective")),
        (None, (None, None), "10x", None, (1.0, "objective")),
        (0.002, (352.8, 352.8), None, "tem", (0.002, "cohort")),
        (1000, (None, None), None, "mri", (1000.0, "cohort")),
        (None, ("28.969", "28.968"), None, "he", (28.9685, "file")),
        (None, (0.5, 0.54), None, "he", BadMpp),
        (None, (0, 0), None, "he", BadMpp),
        (None, ("x", 1), None, "he", BadMpp),
        (None, (352.8, 352.8), 20, "he", BadMpp),  # an absurd tag is not overruled in silence
        (None, (42.3, 42.3), None, "he", BadMpp),  # 600 dpi
        (0.002, (None, None), None, "he", BadMpp),  # an electron micrograph among H&E slides
        (0.5, (None, None), None, "mri", BadMpp),
        (5.0, (None, None), None, "tem", BadMpp),
        (None, (None, None), "0", "he", NoMpp),
        (None, (None, None), None, "he", NoMpp),
        (None, (0.5, None), None, "he", NoMpp),
    ],
)
def test_the_chain_of_the_scale(given, found, objective, modality, expected):
    if isinstance(expected, tuple):
        mpp, source = checked_mpp("x", given, found, objective=objective, modality=modality)
        assert (pytest.approx(mpp), source) == expected
    else:
        with pytest.raises(expected):
            checked_mpp("x", given, found, objective=objective, modality=modality)


def test_the_message_of_a_bad_scale_says_what_would_do():
    with pytest.raises(
        BadMpp, match=r"is 352\.778 \(a default tag of 72 dpi\); between 0\.05 and 32 .* for modality 'pas'"
    ):
        checked_mpp("x", None, (25400 / 72, 25400 / 72), modality="pas")


# colours and depths that must not be misread


@pytest.mark.parametrize("photometric", ["separated", "cielab", "ycbcr"])
def test_other_colours_than_rgb_are_refused(photometric, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 4 if photometric == "separated" else 3), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=photometric)
    with pytest.raises(NotASlide, match=r"grey, RGB or a palette would do"):
        open_slide(str(tmp_path / "x.tif"), mpp=0.5)


def test_a_fourth_channel_is_alpha_only_if_it_says_so(tmp_path):
    rgb = np.full((40, 50, 3), 90, np.uint8)
    fourth = np.zeros((40, 50, 1), np.uint8)
    for name, extra, seen in (("alpha", "unassalpha", 255), ("other", "unspecified", 90)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, np.concatenate([rgb, fourth], 2), photometric="rgb", extrasamples=[extra])
        with open_slide(str(path), mpp=0.5) as reader:
            assert (reader.read(0, (0, 0), (50, 40)) == seen).all(), name


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_sixteen_bits_get_their_window_however_they_are_laid_out(tile, tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 4080, 256).astype(np.uint16), (128, 256))
    tifffile.imwrite(tmp_path / "deep.tif", ramp, tile=tile, photometric="minisblack")
    with open_slide(str(tmp_path / "deep.tif"), mpp=0.5, modality="tem") as reader:
        row = reader.read(0, (0, 64), (256, 1))[0, :, 0]
    assert row[0] == 0
    assert row[-1] == 255
    assert abs(int(row[128]) - 128) <= 2
