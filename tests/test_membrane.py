"""Thickness along a membrane, and distances between boundaries, against shapes whose answer is known."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

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


def ring(middle, radii, width=20, size=(300, 400)):
    """A wall that closes; its middle line is a circle or, nearly, an ellipse."""
    angle = np.linspace(0, 2 * math.pi, 4000)
    line = np.column_stack([middle[1] + radii[1] * np.sin(angle), middle[0] + radii[0] * np.cos(angle)])
    return (cKDTree(line).query(np.indices(size).reshape(2, -1).T + 0.5)[0] < width / 2).reshape(size)


@pytest.mark.parametrize(
    ("mask", "length_um"),
    [
        (ring((200, 150), (90, 90)), 2 * math.pi * 0.9),
        (ring((200.4, 149.8), (130, 70)), 6.43),
        (ring((110, 150), (80, 80)) | ring((270, 150), (80, 80)), 2 * 2 * math.pi * 0.8),
        (ring((200, 150), (80, 80)) | (np.abs(np.mgrid[:300, :400][0] - 179.5) < 10), 2 * math.pi * 0.8 + 4),
    ],
    ids=["ring", "ellipse", "eight", "wall and loop"],
)
def test_walls_that_close_are_measured_along_their_way(mask, length_um):
    found = thickness(mask, nm_per_px=10)
    assert found.percentiles_nm((50,))[0] == pytest.approx(200, rel=0.03)
    assert found.mean_nm == pytest.approx(200, rel=0.03)
    assert 0.7 * length_um < found.length_um < 1.12 * length_um


def test_holes_are_filled_below_their_size_and_no_larger():
    mask = band(0.0, 60)
    mask[123:137, 140:154] = False  # 140 nm wide
    assert thickness(mask, 10).mean_nm == pytest.approx(600, rel=0.03)
    mask[122:138, 140:156] = False  # 160 nm: two ways around it
    found = thickness(mask, 10)
    assert not found.nm[np.abs(found.xy_px[:, 0] - 148) < 8].size


@pytest.mark.parametrize("angle", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("cut", [130, 140, 146])
def test_what_is_not_known_cuts_as_the_rim_does(angle, cut):
    mask = band(angle, 30)
    known = np.ones(mask.shape, bool)
    known[cut:] = False
    mask[cut:] = False  # as a plane has it, where nothing was scored
    found, cropped = thickness(mask, 10, known=known), thickness(mask[:cut], 10)
    np.testing.assert_array_equal(found.nm, cropped.nm)
    np.testing.assert_array_equal(found.xy_px, cropped.xy_px)
    np.testing.assert_array_equal(found.weight_um, cropped.weight_um)
    assert (found.nm > 290).all()  # what shows less than its width is left out
    assert (found.length_um > 0.3) == (cut > {0.0: 145, 0.1: 130, 0.3: 0}[angle])


def test_a_membrane_without_an_edge_has_no_thickness():
    known = np.zeros((60, 60), bool)
    known[:40] = True
    assert not len(thickness(np.ones((60, 60), bool), 10).nm)
    assert not len(thickness(known, 10, known=known).nm)


def lined(above, below, bare=()):
    """A membrane 200 nm thick with cells above and below it: 1 endothelium, 2 podocyte; none in columns `bare`."""
    mask = np.zeros((200, 400), bool)
    mask[90:110] = True
    cells = np.zeros(mask.shape, int)
    cells[84:90], cells[110:116] = above, below
    for first, last in bare:
        cells[:, first:last] = 0
    return mask, (cells == 1, cells == 2)


@pytest.mark.parametrize(("above", "below"), [(1, 1), (2, 2), (1, 0), (0, 2), (0, 0)])
def test_what_lacks_a_cell_on_either_side_is_no_wall(above, below):
    mask, sides = lined(above, below)
    assert thickness(mask, 10, sides).length_um == 0


@pytest.mark.parametrize(("above", "below"), [(1, 2), (2, 1)])
def test_only_walls_between_cells_are_measured(above, below):
    mask, sides = lined(above, below)
    both, every = thickness(mask, 10, sides), thickness(mask, 10)
    np.testing.assert_array_equal(both.nm, every.nm)
    half = np.where(np.arange(400) < 150, sides[1], False)
    part = thickness(mask, 10, (sides[0], half))
    assert part.xy_px[:, 0].max() == pytest.approx(150 + math.sqrt((10 + 15) ** 2 - 10**2), abs=2)
    assert part.xy_px[:, 0].min() == every.xy_px[:, 0].min()
    beside = sides[0] & (np.arange(400) < 150), sides[1] & (np.arange(400) >= 150)
    assert thickness(mask, 10, beside).length_um < 0.5  # on its sides, but nowhere opposite


def test_bare_stretches_tear_no_holes_unless_they_are_long():
    mask, sides = lined(1, 2, [(100, 108), (180, 198)])
    sides[0][:, 240:280] = sides[1][:, 310:350] = False
    every = thickness(mask, 10).length_um
    assert thickness(mask, 10, sides).length_um == pytest.approx(every)
    mask, sides = lined(1, 2)
    sides[0][:, 150:250] = False
    assert thickness(mask, 10, sides).length_um == pytest.approx(every - (1.0 - 2 * 0.23), abs=0.08)


def test_a_cell_behind_another_is_not_on_the_other_side():
    mask, (endo, podo) = lined(1, 1)
    podo[116:120] = True
    endo[:100] = False
    assert thickness(mask, 10, (endo, podo)).length_um == 0


@pytest.mark.parametrize("seed", range(4))
def test_phantom_walls_of_few_pixels_are_measured_in_full(seed):
    drawn = draw_micrograph((9, seed), (256, 256), 16.0)
    found = thickness(drawn.mask == 1, 16.0, (drawn.mask == 2, drawn.mask == 3))
    assert found.length_um > 0.95 * thickness(drawn.mask == 1, 16.0).length_um
    assert found.mean_nm == pytest.approx(drawn.thickness_nm.mean(), rel=0.03)
    swapped = thickness(drawn.mask == 1, 16.0, (drawn.mask == 3, drawn.mask == 2))
    np.testing.assert_array_equal(swapped.nm, found.nm)
    lacking = thickness(drawn.mask == 1, 16.0, (drawn.mask == 2, drawn.mask == 4))
    assert lacking.length_um == 0


def test_nothing_measured_is_nan_and_bad_input_is_refused():
    found = thickness(np.zeros((20, 20), bool), 5)
    assert math.isnan(found.mean_nm)
    assert found.length_um == 0
    assert all(math.isnan(p) for p in found.percentiles_nm())
    with pytest.raises(ConfigError, match="scale"):
        thickness(np.zeros((20, 20), bool), 0)


def test_what_has_no_length_is_not_measured():
    mask = np.zeros((21, 21), bool)
    mask[10, 10] = True
    for grain in (mask, ndimage.binary_dilation(mask, iterations=4)):
        found = thickness(grain, 10, least_um=0)
        assert (len(found.nm), math.isnan(found.mean_nm)) == (0, True)
    alone = Thickness(np.array([30.0]), np.zeros(1), np.zeros((1, 2)))
    values = (alone.mean_nm, alone.sd_nm, alone.harmonic_nm, alone.corrected_nm, *alone.percentiles_nm())
    assert all(math.isnan(value) for value in values)


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
