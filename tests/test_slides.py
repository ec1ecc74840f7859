"""Readers and exact tiles, with OpenSlide and Pillow as oracles."""

from __future__ import annotations

import doctest
import errno
import struct
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from slideflow_ray.errors import (
    BadDimensions,
    BadMpp,
    ConfigError,
    NoMpp,
    NotASlide,
    ReadError,
    SlideNotFound,
    TruncatedSlide,
)
from slideflow_ray.geometry import Level, best_level, size_on_level, to_level
from slideflow_ray.phantoms import halved, read_marks, write_marked_slide, write_pyramid
from slideflow_ray.slides import base, open_slide, read_tiles
from slideflow_ray.slides import openslide as openslide_module
from slideflow_ray.slides.openslide import OpenSlideReader
from slideflow_ray.slides.tiff import TiffReader
from slideflow_ray.testing import SlideReaderTests

SVS = "slides/CMU-1-Small-Region.svs"
PYRAMID = "slides/cmu1small_pyramid_jpeg.tif"


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("marked") / "marked slide.tif"
    write_marked_slide(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A lossless pyramid whose sides halve exactly, so that OpenSlide needs no interpolation at any level."""
    path = tmp_path_factory.mktemp("plain") / "plain.tif"
    write_marked_slide(path, size_px0=(1504, 1000), levels=4)
    return path


class TestTiffReader(SlideReaderTests):
    @pytest.fixture
    def reader(self, marked):
        with open_slide(str(marked)) as reader:
            assert reader.name == "tiffslide"
            yield reader


class TestOpenSlideReader(SlideReaderTests):
    """OpenSlide on odd sides, where its own downsamples are fractions."""

    @pytest.fixture
    def reader(self, marked):
        with OpenSlideReader(str(marked), marked, None) as reader:
            yield reader


class TestRealSvs(SlideReaderTests):
    @pytest.fixture
    def reader(self, data):
        with open_slide(str(data / SVS)) as reader:
            assert (reader.name, reader.size_px0, reader.mpp0) == ("tiffslide", (2220, 2967), 0.499)
            assert len(reader.levels) == 1  # label and macro images are no levels
            yield reader


class TestRealPyramid(SlideReaderTests):
    @pytest.fixture
    def reader(self, data):
        with open_slide((data / PYRAMID).as_uri()) as reader:
            assert [level.downsample[0] for level in reader.levels] == [1, 2, 4, 8]
            yield reader


class TestRealDicom(SlideReaderTests):
    @pytest.fixture
    def reader(self, data):
        with open_slide(str(data / "slides/camelyon_overview_jpeg.dcm")) as reader:
            assert (reader.name, reader.size_px0) == ("openslide", (1152, 700))
            assert reader.mpp0 == pytest.approx(28.9685)
            yield reader


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(base).failed == 0
    assert doctest.testmod(openslide_module).failed == 0


def test_opening_loads_no_library_that_is_not_needed():
    code = (
        "import sys, slideflow_ray.slides; print([m for m in ('tiffslide', 'openslide', 'zarr') if m in sys.modules])"
    )
    import subprocess

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# levels and pixels


def whole_level(path: Path, level: int) -> np.ndarray:
    """Return a level by OpenSlide; read from (0, 0) it is exact whatever the downsample."""
    with openslide.OpenSlide(str(path)) as slide:
        return np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def cut(plane: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
    """Return a box of a level, white outside, pixel by pixel addressed from the whole level."""
    out = np.full((h, w, 3), 255, np.uint8)
    for row in range(max(0, y), min(plane.shape[0], y + h)):
        x0, x1 = max(0, x), min(plane.shape[1], x + w)
        if x1 > x0:
            out[row - y, x0 - x : x1 - x] = plane[row, x0:x1]
    return out


@pytest.mark.parametrize("name", [PYRAMID, SVS])
def test_level_boxes_equal_openslide_on_real_slides(data, name):
    path = data / name
    with open_slide(str(path)) as reader:
        for level in range(len(reader.levels)):
            plane = whole_level(path, level)
            assert plane.shape[1::-1] == reader.levels[level].size
            w, h = reader.levels[level].size
            for x, y in ((0, 0), (w // 3 + 1, h // 2 + 1), (w - 40, h - 70), (-7, -9)):
                np.testing.assert_array_equal(reader.read(level, (x, y), (111, 83)), cut(plane, x, y, 111, 83))


def test_marks_tell_where_every_pixel_stands(marked):
    with open_slide(str(marked)) as reader:
        assert reader.size_px0 == (1501, 2203)
        assert [level.size for level in reader.levels] == [(1501, 2203), (750, 1101), (375, 550)]
        for level, step in enumerate((1, 2, 4)):
            marks = read_marks(reader.read(level, (31, 77), (120, 50)))
            np.testing.assert_array_equal(marks[..., 0], np.broadcast_to(step * (31 + np.arange(120)), (50, 120)))
            np.testing.assert_array_equal(marks[..., 1], np.broadcast_to(step * (77 + np.arange(50)), (120, 50)).T)


def test_openslide_reader_hits_the_box_exactly_where_it_can(plain):
    with OpenSlideReader(str(plain), plain, None) as other, open_slide(str(plain)) as reader:
        assert other.levels == reader.levels
        for level in range(4):
            for xy in ((0, 0), (11, 23), (90, 60)):
                np.testing.assert_array_equal(other.read(level, xy, (77, 55)), reader.read(level, xy, (77, 55)))


def test_openslide_reader_is_within_a_quarter_pixel_elsewhere(data):
    """On 2.0003-fold levels OpenSlide interpolates; the picture is that of the level, softened by a hair."""
    path = data / PYRAMID
    with OpenSlideReader(str(path), path, None) as reader:
        for level in range(1, 4):
            plane = whole_level(path, level).astype(int)
            w, h = reader.levels[level].size
            x, y = (1000, 1000) if level == 1 else (w // 3, h // 3)  # level 1: where four blocks meet
            found = reader.read(level, (x, y), (90, 120)).astype(int)
            here, beside = plane[y : y + 120, x : x + 90], plane[y : y + 120, x + 1 : x + 91]
            assert np.abs(found - here).mean() < 0.35 * np.abs(beside - here).mean()


def test_levels_of_another_picture_are_left_out():
    sizes = [(4000, 3000), (2000, 1500), (1000, 1000), (1000, 750), (1000, 750), (2000, 1500), (500, 375), (0, 0)]
    assert list(base.pyramid(sizes)) == [0, 1, 3, 6]
    assert base.pyramid(sizes)[3] == Level((1000, 750), (4.0, 4.0))


def test_missing_tiles_are_white(tmp_path):
    path = tmp_path / "sparse.tif"
    levels = write_marked_slide(path, size_px0=(600, 513), levels=1, tile=128)
    blank_one_tile(path, index=6)  # row 1, column 1 of 5
    for kind in (TiffReader, OpenSlideReader):
        with kind(str(path), path, None) as reader:
            pixels = reader.read(0, (100, 100), (200, 200))
            expected = levels[0][100:300, 100:300].copy()
            expected[28:156, 28:156] = 255
            np.testing.assert_array_equal(pixels, expected, err_msg=kind.__name__)


def blank_one_tile(path: Path, index: int) -> None:
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = [
            (tag.valueoffset, struct.calcsize(tag.dataformat[-1]) if isinstance(tag.dataformat, str) else 4)
            for tag in (tags["TileOffsets"], tags["TileByteCounts"])
        ]
        kinds = [int(tags[name].dtype) for name in ("TileOffsets", "TileByteCounts")]
    widths = [{3: 2, 4: 4, 16: 8}[kind] for kind in kinds]
    with path.open("r+b") as file:
        for (offset, _), width in zip(places, widths, strict=True):
            file.seek(offset + index * width)
            file.write(bytes(width))


@pytest.mark.parametrize(("shape", "photometric"), [((300, 200), "minisblack"), ((300, 200, 4), "rgb")])
def test_grey_and_alpha_become_rgb(tmp_path, shape, photometric):
    path = tmp_path / "other.tif"
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    extra = {"extrasamples": ["unassalpha"]} if len(shape) == 3 else {}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric=photometric, metadata=None, **extra)
    with open_slide(str(path), mpp=0.5) as reader:
        found = reader.read(0, (10, 20), (50, 40))
    part = pixels[20:60, 10:60]
    if len(shape) == 2:
        np.testing.assert_array_equal(found, np.repeat(part[..., None], 3, axis=2))
    else:
        alpha = part[..., 3:] / 255.0
        np.testing.assert_allclose(found, part[..., :3] * alpha + 255 * (1 - alpha), atol=0.51)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_every_kind_of_tiff_opens_and_is_refused_when_cut(tmp_path, order, big):
    path = tmp_path / "kind.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3)).astype(np.uint8)
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as file:
        for level in (pixels, pixels[::2, ::2]):
            file.write(level, tile=(64, 64), photometric="rgb", metadata=None, subfiletype=int(level is not pixels))
    with open_slide(str(path), mpp=0.5) as reader:
        assert len(reader.levels) == 2
        np.testing.assert_array_equal(reader.read(1, (0, 0), (100, 150)), pixels[::2, ::2])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedSlide):
        open_slide(str(path), mpp=0.5)


# refusals


@pytest.mark.parametrize(
    ("name", "mpp", "error", "words"),
    [
        ("not_a_tiff.svs", None, NotASlide, "not a slide"),
        ("lfs_pointer.ndpi", None, NotASlide, "git-LFS pointer"),
        ("truncated_CMU-1-Small-Region.svs", None, TruncatedSlide, "1,200,000 bytes"),
        ("boxes.tiff", None, BadMpp, "72 dpi"),
        ("unopenable.tiff", None, BadMpp, "352.858"),
        ("nowhere.svs", None, SlideNotFound, "There is no"),
        ("", None, NotASlide, "folder"),
        ("boxes.tiff", 0.0, BadMpp, "given mpp is 0"),
        ("boxes.tiff", -0.5, BadMpp, "given mpp is -0.5"),
        ("boxes.tiff", float("nan"), BadMpp, "given mpp is nan"),
    ],
)
def test_edge_files_are_refused_by_name(data, name, mpp, error, words):
    with pytest.raises(error, match=words):
        open_slide(str(data / "edge" / name), mpp=mpp)


@pytest.mark.parametrize("name", ["unreadable.svs", "unopenable.tiff"])
def test_what_opens_but_cannot_be_read_names_slide_level_and_box(data, name):
    with open_slide(str(data / "edge" / name), mpp=0.5) as reader:
        with pytest.raises(ReadError, match=rf"{name}, level 0, x 0, y 0, 8 x 4 pixels: \w+Error") as caught:
            reader.read(0, (0, 0), (8, 4))
        assert caught.value.__cause__ is not None
        with pytest.raises(ReadError, match=name):
            read_tiles(reader, np.zeros((3, 2), np.int64), tile_px=8, mpp=0.5)


@pytest.mark.parametrize("name", ["small.svs", "boxes_0.dcm", "boxes_1.dcm"])
def test_small_files_open(data, name):
    with open_slide(str(data / "edge" / name)) as reader:
        assert (reader.size_px0, reader.mpp0) == ((16, 16), 0.499)


def test_openslide_recovers_after_a_bad_tile(data, tmp_path):
    """A handle that met one bad tile fails on good ones afterwards, so it is replaced."""
    path = tmp_path / "hurt.tif"
    path.write_bytes((data / PYRAMID).read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xd8\xff\xff" + bytes(count - 4))
    for kind in (OpenSlideReader, TiffReader):
        with kind(str(path), path, None) as reader:
            for _ in range(2):
                with pytest.raises(ReadError, match="level 0, x 10, y 20"):
                    reader.read(0, (10, 20), (8, 8))
                assert reader.read(0, (1500, 1500), (64, 64)).std() > 0


@pytest.mark.parametrize("uri", ["ftp://host/x.svs", "https://host/x.svs", "simplecache::s3://bucket/x.svs"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(ConfigError, match=r"not opened|allowed"):
        open_slide(uri)


def test_a_slide_cut_anywhere_is_refused(marked, tmp_path):
    whole = marked.read_bytes()
    for part in (0.05, 0.5, 0.98):
        path = tmp_path / f"cut{part}.tif"
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(TruncatedSlide):
            open_slide(str(path))
    (tmp_path / "stub.tif").write_bytes(whole[:12])
    with pytest.raises(TruncatedSlide):
        open_slide(str(tmp_path / "stub.tif"))
    (tmp_path / "empty.tif").write_bytes(b"")
    with pytest.raises(NotASlide, match="empty"):
        open_slide(str(tmp_path / "empty.tif"))


def claim_size(path: Path, tag: str, value: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[tag].overwrite(value)


def test_a_header_that_claims_the_sky_is_refused(marked, tmp_path):
    path = tmp_path / "sky.tif"
    path.write_bytes(marked.read_bytes())
    claim_size(path, "ImageWidth", 4_000_000)
    claim_size(path, "ImageLength", 4_000_000)
    with pytest.raises(BadDimensions, match="4,000,000 x 4,000,000"):
        open_slide(str(path))


def test_a_tile_table_that_is_too_short_is_refused(tmp_path):
    path = tmp_path / "short.tif"
    write_marked_slide(path, size_px0=(1024, 512), levels=1)
    claim_size(path, "ImageLength", 700)
    with pytest.raises(BadDimensions, match="its table has fewer"):
        open_slide(str(path))


def test_mpp_comes_from_the_file_or_the_user(tmp_path):
    pixels = np.zeros((300, 200, 3), np.uint8)

    def write(x, y, unit):
        path = tmp_path / "mpp.tif"
        tifffile.imwrite(
            path, pixels, tile=(64, 64), photometric="rgb", metadata=None, resolution=(x, y), resolutionunit=unit
        )
        return str(path)

    for x, y, unit, expected in ((20000, 20000, 3, 0.5), (40000, 39000, 3, (0.25 + 1e4 / 39000) / 2)):
        with open_slide(write(x, y, unit)) as reader:
            assert reader.mpp0 == pytest.approx(expected, rel=1e-6)
    for x, y, unit, error in (
        (40000, 36000, 3, BadMpp),  # x and y 11 % apart
        (96, 96, 2, BadMpp),
        (300, 300, 2, BadMpp),
        (2e6, 2e6, 3, BadMpp),  # 0.005 um per pixel
        (1, 1, 1, NoMpp),
    ):
        uri = write(x, y, unit)
        with pytest.raises(error):
            open_slide(uri)
        with open_slide(uri, mpp=0.31) as reader:
            assert reader.mpp0 == 0.31


def test_a_file_that_may_not_be_read_is_a_read_error(tmp_path, monkeypatch):
    path = tmp_path / "secret.svs"
    path.write_bytes(b"II*\0")

    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ReadError, match="Permission denied"):
        open_slide(str(path))


# tiles


def brute_tile(plane: np.ndarray, corner: tuple[int, int], size: tuple[int, int], tile_px: int) -> np.ndarray:
    box = cut(plane, *corner, *size)
    if size == (tile_px, tile_px):
        return box
    return np.asarray(Image.fromarray(box).resize((tile_px, tile_px), Image.Resampling.BILINEAR))


CASES = [(64, 0.5), (61, 0.5), (64, 1.0), (50, 1.37), (32, 3.1), (48, 0.45), (128, 0.77)]


@pytest.mark.parametrize(("tile_px", "mpp"), CASES)
def test_tiles_are_openslides_pixels_resized_by_pillow(marked, tile_px, mpp):
    check_against_openslide(marked, tile_px, mpp)


@pytest.mark.parametrize(("tile_px", "mpp"), [(240, 0.499), (224, 0.5), (128, 1.0), (96, 2.31), (64, 5.0)])
@pytest.mark.parametrize("name", [SVS, PYRAMID])
def test_tiles_of_real_slides_are_openslides_pixels(data, name, tile_px, mpp):
    check_against_openslide(data / name, tile_px, mpp)


def check_against_openslide(path: Path, tile_px: int, mpp: float) -> None:
    with open_slide(str(path)) as reader:
        scale = mpp / reader.mpp0
        level = best_level(reader.levels, scale)
        plane = whole_level(path, level)
        w, h = reader.size_px0
        rng = np.random.default_rng(5)
        xy = np.column_stack([rng.integers(-20, w, 9), rng.integers(-20, h, 9)]).astype(np.int64)
        tiles = read_tiles(reader, xy, tile_px=tile_px, mpp=mpp)
        assert tiles.shape == (9, tile_px, tile_px, 3)
        size = size_on_level((tile_px, tile_px), scale, reader.levels[level])
        corners = to_level(xy, reader.levels[level]).tolist()
        for tile, corner in zip(tiles, corners, strict=True):
            np.testing.assert_array_equal(tile, brute_tile(plane, tuple(corner), size, tile_px))


def test_tiles_equal_openslides_own_read_region(plain):
    """The oracle of the brief: read_region at round(xy / ds) * ds, then Pillow's resize."""
    rng = np.random.default_rng(1)
    xy = np.column_stack([rng.integers(0, 1400, 12), rng.integers(0, 900, 12)]).astype(np.int64)
    with open_slide(str(plain)) as reader, openslide.OpenSlide(str(plain)) as slide:
        for mpp in (0.5, 0.8, 1.0, 1.7, 2.0, 3.3, 4.0, 4.5):
            level = best_level(reader.levels, mpp / 0.5)
            ds = int(slide.level_downsamples[level])
            side = round(40 * mpp / 0.5 / ds)
            for tile, (x, y) in zip(read_tiles(reader, xy, tile_px=40, mpp=mpp), xy.tolist(), strict=True):
                rgba = slide.read_region((round(x / ds) * ds, round(y / ds) * ds), level, (side, side))
                box = Image.new("RGB", rgba.size, "white")
                box.paste(rgba, mask=rgba.getchannel("A"))
                if side != 40:
                    box = box.resize((40, 40), Image.Resampling.BILINEAR)
                np.testing.assert_array_equal(tile, np.asarray(box))


def test_unresized_tiles_carry_their_marks(marked):
    xy = np.array([[0, 0], [700, 40], [1290, 2100], [3, 1999]], np.int64)
    with open_slide(str(marked)) as reader:
        for mpp, step in ((0.5, 1), (1.0, 2), (2.0, 4)):
            marks = read_marks(read_tiles(reader, xy, tile_px=20, mpp=mpp))
            np.testing.assert_array_equal(marks[:, 0, 0], np.rint(xy / step) * step)
            np.testing.assert_array_equal(marks[:, 7, 0] - marks[:, 0, 0], np.tile([0, 7 * step], (4, 1)))
            np.testing.assert_array_equal(marks[:, 0, 7] - marks[:, 0, 0], np.tile([7 * step, 0], (4, 1)))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(-80, 1600), st.integers(-80, 2300)), max_size=14),
    st.sampled_from(CASES),
    st.sampled_from([64, 300, 2048]),
)
def test_superblocks_change_no_pixel(marked, points, case, superblock):
    xy = np.array(points, np.int64).reshape(-1, 2)
    with open_slide(str(marked)) as reader:
        together = read_tiles(reader, xy, tile_px=case[0], mpp=case[1], superblock=superblock)
        alone = [read_tiles(reader, xy[i : i + 1], tile_px=case[0], mpp=case[1])[0] for i in range(len(xy))]
        assert together.shape == (len(xy), case[0], case[0], 3)
        for tile, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(tile, other)


class CountingReader:
    """A white slide without pixels that remembers what was read."""

    name, uri, size_px0, mpp0 = "counting", "nowhere", (100_000, 80_000), 0.5
    levels = (Level(size_px0, (1.0, 1.0)),)

    def __init__(self):
        self.boxes = []

    def read(self, level, xy, size):
        self.boxes.append(size)
        return np.full((size[1], size[0], 3), 255, np.uint8)


def test_neighbours_are_read_together_and_strangers_alone():
    reader = CountingReader()
    x, y = np.meshgrid(np.arange(0, 2048, 256), np.arange(0, 2048, 256))
    dense = np.column_stack([x.ravel(), y.ravel()])
    read_tiles(reader, dense, tile_px=256, mpp=0.5)
    assert reader.boxes == [(2048, 2048)]
    reader.boxes.clear()
    read_tiles(reader, np.array([[0, 0], [1700, 1700]]), tile_px=256, mpp=0.5)
    assert reader.boxes == [(256, 256)] * 2
    reader.boxes.clear()
    read_tiles(reader, dense * 20, tile_px=256, mpp=2.0)
    assert max(w * h for w, h in reader.boxes) <= (2048 + 1024) ** 2


def test_a_pyramid_halves_by_the_mean(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (301, 203, 3)).astype(np.uint8)
    levels = halved(rgb, 3)
    assert [level.shape for level in levels] == [(301, 203, 3), (150, 101, 3), (75, 50, 3)]
    mean = rgb[:300, :202].reshape(150, 2, 101, 2, 3).mean(axis=(1, 3))
    assert np.abs(levels[1] - mean).max() <= 0.5
    write_pyramid(tmp_path / "p.tif", levels, 0.25)
    with open_slide(str(tmp_path / "p.tif")) as reader:
        assert reader.mpp0 == 0.25
        np.testing.assert_array_equal(reader.read(2, (0, 0), (50, 75)), levels[2])
