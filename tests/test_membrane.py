"""Thickness along a membrane, and distances between boundaries, against shapes whose answer is known."""

import math

import numpy as np
import pytest
from scipy import ndimage

from slideflow_ray.errors import ConfigError
from slideflow_ray.membrane import JENSEN, Thickness, assd, boundary_f, hd95, surface_distances, thickness
from slideflow_ray.phantoms.tem import MICROSCOPES, draw_micrograph


def band(angle, width, size=(260, 300), wave=0.0):
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    u, v = x - size[1] / 2, y - size[0] / 2
    along, across = np.cos(angle) * u + np.sin(angle) * v, -np.sin(angle) * u + np.cos(angle) * v
    return np.abs(across - wave * np.sin(along / 25)) < width / 2


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4, 1.2, math.pi / 2])
@pytest.mark.parametrize("width", [18, 30])
def test_a_straight_band_is_as_thick_as_it_is_at_any_angle(angle, width):
    found = thickness(band(angle, width), nm_per_px=10)
    assert found.mean_nm == pytest.approx(10 * width, rel=0.04)
    assert found.sd_nm < 0.03 * 10 * width
    across = 260 if abs(math.sin(angle)) > 0.75 else 300
    assert 0.6 * across / 100 < found.length_um < 4.2


def test_means_are_by_length():
    t = Thickness(np.array([100.0, 300.0]), np.array([3.0, 1.0]), np.zeros((2, 2)))
    assert t.mean_nm == 150
    assert t.sd_nm == pytest.approx(math.sqrt((3 * 50**2 + 150**2) / 4))
    assert t.harmonic_nm == pytest.approx(4 / (3 / 100 + 1 / 300))
    assert t.corrected_nm == pytest.approx(t.harmonic_nm * 8 / (3 * math.pi))
    assert round(JENSEN, 4) == 0.8488
    assert t.percentiles_nm((0, 100)) == (100, 300)


@pytest.mark.parametrize("seed", range(8))
def test_phantom_membranes_within_five_percent(seed):
    drawn = draw_micrograph((3, seed), (512, 400), 8.0, 2, 280 + 25 * seed, microscope=MICROSCOPES[0])
    sides = (drawn.mask == 2, drawn.mask == 3)
    found = thickness(drawn.mask == 1, 8.0, sides)
    assert found.length_um > 1
    assert found.mean_nm == pytest.approx(drawn.thickness_nm.mean(), rel=0.05)


def test_twice_as_many_pixels_give_the_same_nanometres():
    small = thickness(band(0.4, 20, wave=4), 10)
    large = thickness(ndimage.zoom(band(0.4, 20, wave=4).astype(np.uint8), 2, order=0) == 1, 5)
    assert large.mean_nm == pytest.approx(small.mean_nm, rel=0.04)
    assert large.length_um == pytest.approx(small.length_um, rel=0.1)


def test_knobs_and_holes_change_little():
    mask = band(0.2, 20)
    rough = mask.copy()
    rough[120:124, 100:104] = False
    rng = np.random.default_rng(0)
    edge = ndimage.binary_dilation(mask) & ~mask
    rough |= edge & (rng.random(mask.shape) < 0.3)
    assert thickness(rough, 10).mean_nm == pytest.approx(thickness(mask, 10).mean_nm, rel=0.05)


def test_only_walls_between_cells_are_measured():
    mask = np.zeros((200, 400), bool)
    mask[90:110] = True
    endo, podo = np.zeros_like(mask), np.zeros_like(mask)
    endo[110:116, :150] = True
    podo[84:90, :150] = True
    part, all_of_it = thickness(mask, 10, (endo, podo)), thickness(mask, 10)
    assert part.length_um < 0.6 * all_of_it.length_um
    assert part.xy_px[:, 0].max() < 180


def test_nothing_measured_is_nan_and_bad_input_is_refused():
    found = thickness(np.zeros((20, 20), bool), 5)
    assert math.isnan(found.mean_nm)
    assert found.length_um == 0
    assert all(math.isnan(p) for p in found.percentiles_nm())
    with pytest.raises(ConfigError, match="scale"):
        thickness(np.zeros((20, 20), bool), 0)


def test_distances_are_those_of_every_pair():
    rng = np.random.default_rng(1)
    one = ndimage.binary_opening(ndimage.gaussian_filter(rng.standard_normal((40, 50)), 3) > 0)
    other = np.roll(one, (2, 3), (0, 1))

    def rim(mask):
        return np.array(
            [
                (r, c)
                for r, c in np.argwhere(mask)
                if any(
                    0 <= r + dr < 40 and 0 <= c + dc < 50 and not mask[r + dr, c + dc]
                    for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0))
                )
            ]
        )

    a, b = rim(one), rim(other)
    apart = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    there, back = apart.min(1), apart.min(0)
    np.testing.assert_allclose(surface_distances(one, other, 4), 4 * np.concatenate([there, back]))
    assert hd95(one, other, 4) == pytest.approx(4 * np.percentile(np.concatenate([there, back]), 95))
    assert assd(one, other, 4) == pytest.approx(4 * (there.mean() + back.mean()) / 2)
    p, r = (there <= 2).mean(), (back <= 2).mean()
    assert boundary_f(one, other, 8, 4) == pytest.approx(2 * p * r / (p + r))


def test_empty_masks_have_no_distance():
    nothing, some = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    some[3:6, 3:6] = True
    assert math.isnan(hd95(nothing, nothing))
    assert math.isnan(boundary_f(nothing, nothing, 1))
    assert hd95(nothing, some) == math.inf
    assert assd(some, nothing) == math.inf
    assert boundary_f(some, nothing, 1) == 0
    assert hd95(some, some) == 0
    assert boundary_f(some, some, 0.5) == 1
