"""Scale bars and labels that microscopes burn in."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from slideflow_ray.phantoms.tem import Microscope, draw_micrograph
from slideflow_ray.scalebar import find_furniture

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "tem" / "A1--0024.jpg"


@pytest.mark.skipif(not REAL.exists(), reason="no micrograph at ../shared/data/tem")
def test_the_bar_of_a_real_micrograph_is_614_pixels_long():
    """Measured by eye: 2 um from x = 44 to 658, rows 2390 to 2405; the text begins in row 2307."""
    found = find_furniture(np.asarray(Image.open(REAL)))
    x, y, w, h = found.bar
    assert (abs(x - 44), abs(y - 2390)) <= (1, 1)
    assert abs(w - 614) <= 2
    assert abs(h - 16) <= 1
    assert found.bar_px == w
    assert found.keep[:3] == (0, 0, 3744)
    assert 2444 - 200 < found.keep[3] <= 2307


def burnt(dark=True, top=False, bar=(40, 160, 8), seed=0):
    """A phantom with a bar, its text and a label."""
    image = Image.fromarray(draw_micrograph(seed, (640, 480), 8.0).pixels)
    draw = ImageDraw.Draw(image)
    ink, paper = (0, 255) if dark else (255, 0)
    y = 40 if top else 440
    x, length, thick = bar
    draw.rectangle((x, y, x + length - 1, y + thick - 1), fill=ink)
    draw.text((x, y - 24), "1 um", fill=ink, font=ImageFont.load_default(20))
    draw.rectangle((380, y - 12, 560, y + 14), fill=paper)
    draw.text((386, y - 8), "HV 80 kV", fill=ink, font=ImageFont.load_default(16))
    return np.asarray(image)


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("top", [True, False])
def test_bars_of_both_kinds_at_both_ends_are_found_and_cropped(dark, top):
    found = find_furniture(burnt(dark, top))
    assert found.bar == (40, 40 if top else 440, 160, 8)
    x, y, w, h = found.keep
    assert (x, w) == (0, 640)
    if top:
        assert 54 <= y <= 75
        assert y + h == 480
    else:
        assert y == 0
        assert 395 <= h <= 425


def test_a_strip_across_the_whole_width_goes():
    pixels = draw_micrograph(1, (640, 480), 8.0).pixels.copy()
    pixels[440:] = 0
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 456, 140, 461), fill=255)
    found = find_furniture(np.asarray(image))
    assert found.bar == (20, 456, 121, 6)
    assert found.keep[3] <= 440


@pytest.mark.parametrize("seed", range(5))
def test_a_micrograph_without_any_is_kept_whole(seed):
    found = find_furniture(draw_micrograph(seed, (500, 400), 8.0, granules=3).pixels)
    assert found.bar is None
    assert found.bar_px is None
    assert found.strips == ()
    assert found.keep == (0, 0, 500, 400)


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_are_kept(value):
    found = find_furniture(np.full((200, 300), value, np.uint8))
    assert found.bar is None
    assert found.keep == (0, 0, 300, 200)


@pytest.mark.parametrize("brightness", [-0.25, -0.15, 0.1, 0.15, 0.2, 0.3])
def test_a_lumen_that_is_over_or_underexposed_is_no_label(brightness):
    for seed in range(8):
        grey = draw_micrograph(seed, (512, 512), 8.0, microscope=Microscope(brightness)).pixels
        assert find_furniture(grey).keep == (0, 0, 512, 512), seed
