"""stain.py and prepare.restain: known dyes are found, other implementations agree, pixels come out as they should."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.optimize import minimize

from slideflow_ray import stain
from slideflow_ray.errors import BundleError, StainError
from slideflow_ray.models.bundle import BundleCard, forward_digest, load_weights, read_card, write_bundle
from slideflow_ray.models.networks import load_network
from slideflow_ray.models.scorer import make_scorer
from slideflow_ray.phantoms.kidney import glomerulus_picture
from slideflow_ray.prepare import restain, restained, to_tensor
from slideflow_ray.profile import resolve
from slideflow_ray.specs import ComputeSpec
from slideflow_ray.stain import METHODS, RUIFROK, Stained, StainFit, StainTarget, fit_tiles, normalise

SCANNER_B = {"he": ((0.55, 0.76, 0.35), (0.12, 0.93, 0.30)), "pas": ((0.60, 0.72, 0.35), (0.25, 0.90, 0.30))}


def unit(vectors) -> np.ndarray:
    """Stain vectors as unit columns, (3, 2)."""
    matrix = np.array(vectors, float).T
    return matrix / np.linalg.norm(matrix, axis=0)


def amounts(seed: int, side: int = 256) -> np.ndarray:
    """Blobs of a nuclear dye on a patchy second one, (side, side, 2), about half of it glass."""
    rng = np.random.default_rng(seed)
    nuclei, ground = (ndimage.gaussian_filter(rng.random((side, side)), s) for s in (3, 5))
    nuclei, ground = ((x - x.mean()) / x.std() for x in (nuclei, ground))
    nuclei = np.clip(nuclei - 0.8, 0, None) * 1.2
    ground = np.clip(ground + 0.6, 0, None) * 0.6
    return np.stack([nuclei, np.where(nuclei > 0.3, ground * 0.3, ground)], axis=-1)


def picture(
    dyes: np.ndarray, matrix: np.ndarray, seed: int = 0, strength: float = 1.0, noise: float = 2.0
) -> np.ndarray:
    light = 255 * np.exp(-strength * dyes @ matrix.T)
    light += np.random.default_rng(seed).normal(0, noise, light.shape)
    return np.clip(light.round(), 0, 255).astype(np.uint8)


def angles(fit: StainFit, matrix: np.ndarray) -> np.ndarray:
    """Degrees between the vectors found and the true ones."""
    found = np.array(fit.matrix)
    return np.degrees(np.arccos(np.clip((found * matrix).sum(axis=0) / np.linalg.norm(found, axis=0), -1, 1)))


def target(fit: StainFit, name: str = "he", lam: float = stain.LAM) -> StainTarget:
    return StainTarget(method=fit.method, stain=name, fit=fit, lam=lam)


# fits


@pytest.mark.parametrize("vectors", [RUIFROK, SCANNER_B], ids=["ruifrok", "scanner B"])
@pytest.mark.parametrize("name", ["he", "pas"])
def test_known_vectors_are_found_as_exactly_as_methods_says(name, vectors):
    matrix = unit(vectors[name])
    pixels = picture(amounts(1), matrix)
    # METHODS, on images like these: 2.7-3.9 and 1.2-1.7 degrees with lambda 0.1, 1.2-1.9 and 0.3-0.7 with 0.01
    assert (angles(stain.fit_vahadane(pixels, 0.1, name), matrix) < (3.9, 1.7)).all()
    assert (angles(stain.fit_vahadane(pixels, 0.02, name), matrix) < (1.9, 0.7)).all()
    assert (angles(stain.fit_macenko(pixels, name), matrix) < (3.9, 1.7)).all()


def test_the_start_does_not_decide_the_answer(monkeypatch):
    pixels = picture(amounts(2), unit(RUIFROK["he"]))
    want = np.array(stain.fit_vahadane(pixels).matrix)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        start = rng.uniform(0.05, 1, (2, 3))
        monkeypatch.setitem(stain.RUIFROK, "he", tuple(map(tuple, start)))
        np.testing.assert_allclose(np.array(stain.fit_vahadane(pixels).matrix), want, atol=0.01)


def test_sparse_concentrations_are_those_of_a_general_solver():
    """Against scipy's bounded minimiser, pixel by pixel, also where a dye is absent."""
    rng = np.random.default_rng(3)
    w = unit(RUIFROK["he"])
    v = np.abs(rng.normal(0.4, 0.5, (15, 3)))
    for lam in (0.01, 0.1, 0.5):
        got = stain._sparse(v.T, w, lam).T
        for row, h in zip(v, got, strict=True):

            def cost(x, row=row, lam=lam):
                return 0.5 * ((row - w @ x) ** 2).sum() + lam * x.sum()

            found = minimize(cost, [0.5, 0.5], bounds=[(0, None), (0, None)], options={"ftol": 1e-15, "gtol": 1e-12})
            assert cost(h) <= found.fun + 1e-9
            np.testing.assert_allclose(h, found.x, atol=2e-4)
        assert (got == 0).any()


def test_the_factorisation_improves_on_its_start_and_is_no_worse_than_the_truth():
    matrix = unit(SCANNER_B["he"])
    v = stain.od(picture(amounts(4), matrix)).reshape(-1, 3)
    v = v[v.sum(axis=1) > 0.6][::7]

    def cost(w):
        h = stain._sparse(v.T, w, 0.1)
        return 0.5 * ((v.T - w @ h) ** 2).sum() + 0.1 * h.sum()

    found = stain._vahadane(v, 0.1, "he")
    assert cost(found) < cost(unit(RUIFROK["he"]))
    assert cost(found) <= cost(matrix)
    assert (found >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1)


def test_the_median_over_tiles_shrugs_off_a_spoilt_one():
    matrix = unit(RUIFROK["he"])
    tiles = [picture(amounts(seed, 128), matrix, seed) for seed in range(5)]
    spoilt = np.full((128, 128, 3), (40, 90, 200), np.uint8)  # a pen stroke
    spoilt[::2] = (35, 80, 190)
    pooled = stain.fit_vahadane(np.concatenate([*tiles, spoilt, spoilt]))
    assert angles(fit_tiles([*tiles, spoilt, spoilt], "vahadane"), matrix).max() < 3.9
    assert angles(pooled, matrix).max() > 10


def test_p99_is_over_the_tissue_of_all_tiles():
    matrix = unit(RUIFROK["he"])
    tiles = [picture(amounts(seed, 128), matrix, seed, strength) for seed, strength in ((0, 0.7), (1, 1.0), (2, 1.3))]
    fit = fit_tiles(tiles, "macenko")
    rows = np.concatenate([stain.od(tile[stain.tissue(tile)]) for tile in tiles])
    amount = np.linalg.lstsq(np.array(fit.matrix), rows.T, rcond=None)[0]
    np.testing.assert_allclose(np.percentile(amount, 99, axis=1), fit.p99, atol=1e-5)


# other implementations


def all_tissue(seed: int, matrix: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """A picture without glass, so that it does not matter what counts as tissue; its darkest value is 1."""
    pixels = picture(0.35 + amounts(seed, 96), matrix, seed, strength)
    assert stain.tissue(pixels).all()
    return np.clip(pixels, 1, 254)


def macenko_literally(pixels):
    """Macenko et al., ISBI 2009, step by step as torchstain 1.4 does it: alpha 1, beta 0.15, 99th percentiles."""
    density = -np.log(pixels.reshape(-1, 3).astype(float) / 255)
    dense = density[(density >= 0.15).all(1)]
    _, vectors = np.linalg.eigh(np.cov(dense.T))
    plane = dense @ vectors[:, 1:3]
    angle = np.arctan2(plane[:, 1], plane[:, 0])
    low, high = (np.percentile(angle, p) for p in (1, 99))
    ends = [vectors[:, 1:3] @ np.array([np.cos(a), np.sin(a)]) for a in (low, high)]
    first, second = ends if ends[0][0] > ends[1][0] else ends[::-1]
    matrix = np.column_stack([first, second])
    amounts = np.linalg.lstsq(matrix, density.T, rcond=None)[0]
    return matrix, np.percentile(amounts, 99, axis=1), amounts


def test_macenko_is_what_its_paper_says():
    source, into = all_tissue(0, unit(RUIFROK["he"])), all_tissue(1, unit(SCANNER_B["he"]), 1.2)
    matrix, p99, _ = macenko_literally(into)
    ours = stain.fit_macenko(into)
    np.testing.assert_allclose(np.array(ours.matrix), matrix, atol=2e-6)
    np.testing.assert_allclose(ours.p99, p99, atol=2e-5)
    _, source_p99, amounts = macenko_literally(source)
    density = matrix @ (amounts * (p99 / source_p99)[:, None])
    want = np.clip(255 * np.exp(-density), 0, 255).T.reshape(source.shape)
    got = normalise(source, stain.fit_macenko(source), ours)
    assert np.abs(got - want).max() <= 1


def test_reinhard_is_what_its_paper_says_in_cielab():
    from skimage.color import lab2rgb, rgb2lab

    source, into = all_tissue(2, unit(RUIFROK["he"])), all_tissue(3, unit(SCANNER_B["he"]), 0.8)
    lab, other = rgb2lab(source), rgb2lab(into)
    ours = stain.fit_reinhard(into)
    np.testing.assert_allclose(ours.mean, other.mean((0, 1)), atol=2e-2)
    np.testing.assert_allclose(ours.std, other.std((0, 1)), atol=2e-2)
    moved = (lab - lab.mean((0, 1))) / lab.std((0, 1)) * other.std((0, 1)) + other.mean((0, 1))
    got = normalise(source, stain.fit_reinhard(source), ours)
    assert np.abs(got - 255 * lab2rgb(moved)).max() <= 1.5


def test_vahadane_swaps_vectors_and_scales_concentrations_as_staintools_does():
    """StainTools literally: lasso of every pixel with lambda 0.01, H * p99 / p99, 255 exp(-H W)."""
    source, into = picture(amounts(5, 64), unit(RUIFROK["he"])), picture(amounts(6, 64), unit(SCANNER_B["he"]))
    one, other = stain.fit_vahadane(source), stain.fit_vahadane(into)
    w, density = np.array(one.matrix), np.maximum(-np.log(np.maximum(source, 1) / 255), 1e-6)[:16, :16].reshape(-1, 3)
    codes = []
    for row in density:  # every combination of present dyes, the best of those that are not negative
        best = (0.5 * (row**2).sum(), (0.0, 0.0))
        for dyes in ([0], [1], [0, 1]):
            part = w[:, dyes]
            h = np.zeros(2)
            h[dyes] = np.linalg.solve(part.T @ part, part.T @ row - 0.01)
            if (h >= 0).all():
                best = min(best, (0.5 * ((row - w @ h) ** 2).sum() + 0.01 * h.sum(), tuple(h)))
        codes.append(best[1])
    scaled = np.array(codes) * np.array(other.p99) / np.array(one.p99)
    want = np.clip(255 * np.exp(-scaled @ np.array(other.matrix).T), 0, 255).reshape(16, 16, 3)
    assert np.abs(normalise(source, one, other)[:16, :16] - want).max() <= 0.5001


# pixels


@pytest.mark.parametrize("name", ["he", "pas"])
@pytest.mark.parametrize("method", METHODS)
def test_two_scanners_come_nearer(method, name):
    """The same tissue in the colours of two scanners, and a third slide as target: means within a few grey levels."""
    a = picture(amounts(7), unit(RUIFROK[name]), 0)
    b = picture(amounts(7), unit(SCANNER_B[name]), 1, strength=1.25)
    into = target(fit_tiles([picture(amounts(8), unit(RUIFROK[name]), 2, strength=0.9)], method, stain=name), name)
    at = stain.tissue(a) & stain.tissue(b)
    before = np.abs(a[at].mean(axis=0) - b[at].mean(axis=0))
    fits = [fit_tiles([x], method, stain=name) for x in (a, b)]
    one, other = (normalise(x, fit, into)[at].astype(float) for x, fit in zip((a, b), fits, strict=True))
    after = np.abs(one.mean(axis=0) - other.mean(axis=0))
    assert before.max() > 20
    assert after.max() < (7 if method == "reinhard" else 5)  # which knows no dyes
    assert np.abs(one - other).mean() < 0.4 * np.abs(a[at].astype(float) - b[at]).mean()


@pytest.mark.parametrize(("method", "levels"), [("vahadane", 2.0), ("macenko", 1.0), ("reinhard", 0.01)])
def test_its_own_target_changes_next_to_nothing(method, levels):
    pixels = picture(amounts(9), unit(RUIFROK["pas"]))
    fit = fit_tiles([pixels], method, stain="pas")
    assert np.abs(normalise(pixels, fit, fit).astype(float) - pixels).mean() < levels


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_within_one_grey_level_of_the_reference(method):
    """Every colour there is in steps of 5, and grey levels 0 and 255."""
    steps = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 52, 3)
    a, b = (fit_tiles([picture(amounts(s), unit(m["he"]))], method) for s, m in ((1, RUIFROK), (2, SCANNER_B)))
    got = restain(to_tensor(colours), Stained("he", (a,)), target(b)).numpy().astype(int)
    want = normalise(colours, a, b)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 0.02


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_the_tinge_of_a_scanner_s_glass_is_not_taken_for_dye(method):
    """The same tissue under a yellowish light: same vectors and percentiles, and glass becomes the target's glass."""
    clear = picture(amounts(3), unit(RUIFROK["he"]), noise=0)
    light = np.array([240, 238, 222])
    tinged = np.rint(clear / 255.0 * light).astype(np.uint8)
    a, b = (fit_tiles([x], method) for x in (clear, tinged))
    assert a.white is None
    assert b.white == (240, 238, 222)
    assert angles(b, np.array(a.matrix)).max() < 0.5
    np.testing.assert_allclose(a.p99, b.p99, rtol=0.04)
    at = (clear == 255).all(axis=-1)
    assert at.any()
    assert (normalise(tinged, b, a)[at] >= 254).all()
    np.testing.assert_array_equal(normalise(clear, a, b)[at], np.broadcast_to(light, (int(at.sum()), 3)))
    steps = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 52, 3)
    for one, other in ((a, b), (b, a)):
        got = restain(to_tensor(colours), Stained("he", (one,)), target(other)).numpy().astype(int)
        assert np.abs(got - normalise(colours, one, other)).max() <= 1
    with pytest.raises(ValueError, match="reinhard"):
        StainFit(method="reinhard", mean=(1, 2, 3), std=(1, 1, 1), white=(240, 240, 240))


def pale(seed: int, matrix: np.ndarray, light: tuple[int, int, int], mean: float, spread: float) -> np.ndarray:
    """Tissue all over, a little of the second dye everywhere and few nuclei: nothing of it is glass."""
    rng = np.random.default_rng(seed)
    dyes = amounts(seed, 128)
    ground = ndimage.gaussian_filter(rng.random((128, 128)), 3)
    dyes[..., 1] = np.clip(mean + spread * (ground - ground.mean()) / ground.std(), 0.01, None)
    clear = picture(dyes, matrix, seed, noise=1.5)
    return np.rint(clear / 255.0 * np.array(light)).astype(np.uint8)


@pytest.mark.parametrize("vectors", [RUIFROK, SCANNER_B], ids=["ruifrok", "scanner B"])
@pytest.mark.parametrize("name", ["he", "pas"])
@pytest.mark.parametrize("light", [(255, 255, 255), (246, 245, 247), (240, 238, 222)])
def test_pale_tissue_is_not_taken_for_glass(name, vectors, light):
    """Without any glass it is not known, that is 255; one tile that shows some says it for all the others."""
    matrix = unit(vectors[name])
    for mean, spread in ((0.1, 0.04), (0.15, 0.06), (0.25, 0.06)):
        tiles = [pale(seed, matrix, light, mean, spread) for seed in range(4)]
        assert stain.glass(tiles) is None
        shown = np.rint(picture(amounts(9, 128), matrix, noise=1) / 255.0 * np.array(light)).astype(np.uint8)
        assert stain.glass([*tiles, shown]) == (None if light == (255, 255, 255) else light)
    dim = np.rint(shown * 0.9).astype(np.uint8)  # light that falls off, or glass under a smear
    assert stain.glass([dim, *tiles, shown]) == stain.glass([shown])


@pytest.mark.parametrize(("scanner", "light"), [("A", (246, 245, 247)), ("B", (240, 238, 226))])
@pytest.mark.parametrize("name", ["he", "pas"])
def test_the_phantoms_glass_is_seen_in_their_crops(name, scanner, light):
    crops = [glomerulus_picture("Normal", stain=name, scanner=scanner, seed=seed, side_px=256) for seed in range(4)]
    np.testing.assert_allclose(stain.glass(crops), light, atol=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_tile_does_not_depend_on_its_neighbours_nor_on_their_fits(method):
    tiles = np.stack([picture(amounts(s, 40), unit(RUIFROK["he"]), s) for s in range(21)])
    fits = tuple(fit_tiles([picture(amounts(s), unit(RUIFROK["he"]), s, 1 + s / 20)], method) for s in range(3))
    mine = tuple(fits[i % 3] for i in range(21))
    into = target(fit_tiles([picture(amounts(5), unit(SCANNER_B["he"]))], method))
    together = restained(tiles, Stained("he", mine), into)
    for i in (0, 7, 15, 16, 20):
        alone = restain(to_tensor(tiles[i : i + 1]), Stained("he", (mine[i],)), into).numpy()
        assert alone.tobytes() == together[i : i + 1].tobytes()
    assert restained(tiles, Stained("he", (fits[1],)), into)[3].tobytes() != together[3].tobytes()


# what cannot be done


def broken_cases():
    white = np.full((64, 64, 3), 250, np.uint8)
    speck = white.copy()
    speck[:6, :6] = (120, 60, 140)
    eosin = picture(amounts(0)[..., 1:] * np.array([0.0, 1.0]), unit(RUIFROK["he"]), noise=0)
    return {
        "glass": (white, "too little"),
        "a speck": (speck, "too little"),
        "black": (np.zeros((64, 64, 3), np.uint8), "too little"),
        "one colour": (np.full((64, 64, 3), (150, 80, 160), np.uint8), "apart|one colour|hardly there|not defined"),
        "grey": (
            np.random.default_rng(0).integers(20, 150, (64, 64, 1), np.uint8).repeat(3, 2),
            "apart|hardly|one colour",
        ),
        "one dye": (eosin, "apart|hardly there|not defined"),
        "nothing": (np.empty((0, 3), np.uint8), "too little"),
    }


@pytest.mark.parametrize("case", broken_cases())
@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_two_stains_fails_loudly(case, method):
    pixels, text = broken_cases()[case]
    if method == "reinhard" and case == "one dye":
        pytest.skip("Reinhard knows no dyes")
    with pytest.raises(StainError, match=text) as caught:
        fit_tiles([pixels], method)
    assert caught.value.code == "E_STAIN"


def test_fits_and_targets_are_values_that_json_carries():
    for method in METHODS:
        fit = fit_tiles([picture(amounts(0), unit(RUIFROK["he"]))], method)
        made = target(fit)
        assert StainTarget.parse(json.loads(made.model_dump_json(exclude_none=True)), "x") == made
        assert hash(made) == hash(target(fit))
    with pytest.raises(ValueError, match="has matrix and p99"):
        StainFit(method="vahadane", mean=(1, 2, 3), std=(1, 1, 1))
    with pytest.raises(ValueError, match="target is of"):
        StainTarget(method="vahadane", stain="he", fit=fit)
    with pytest.raises(StainError, match="fit is of reinhard"):
        normalise(np.zeros((1, 3), np.uint8), fit, fit_tiles([picture(amounts(0), unit(RUIFROK["he"]))], "macenko"))


def test_the_fit_nearest_the_median_is_the_middle_one():
    matrix = unit(RUIFROK["he"])
    fits = [fit_tiles([picture(amounts(1), matrix, 1, strength)], "vahadane") for strength in (0.6, 1.4, 1.0, 0.8, 1.2)]
    assert stain.nearest_median(fits) == 2
    assert stain.nearest_median(fits[:1]) == 0


# bundles and scorers


@pytest.fixture(scope="module")
def stained_bundle(bundles, tmp_path_factory):
    fit = fit_tiles([picture(amounts(0), unit(SCANNER_B["he"]))], "vahadane")
    card = read_card(bundles["aligned"]).model_copy(update={"stain": {"he": target(fit)}})
    return write_bundle(tmp_path_factory.mktemp("stained") / "aligned", card, load_weights(bundles["aligned"]))


def test_a_card_keeps_its_targets_and_its_digest_covers_them(stained_bundle, bundles, tmp_path):
    card = read_card(stained_bundle)
    assert card.stain is not None
    assert card.stain["he"].fit.method == "vahadane"
    assert forward_digest(stained_bundle) != forward_digest(bundles["aligned"])
    assert "stain" not in json.loads((bundles["aligned"] / "bundle.json").read_text())
    weights = load_weights(bundles["aligned"])

    def with_(**changes):
        own = card.model_copy(update={"stain": {"he": card.stain["he"].model_copy(update=changes)}})
        return forward_digest(write_bundle(tmp_path / "other", own, weights, overwrite=True))

    assert with_(source="another slide") == forward_digest(stained_bundle)
    assert with_(lam=0.02) != forward_digest(stained_bundle)
    p99 = card.stain["he"].fit.model_copy(update={"p99": (1.0, 1.0)})
    assert with_(fit=p99) != forward_digest(stained_bundle)


def test_a_card_refuses_targets_under_other_names(stained_bundle):
    said = read_card(stained_bundle).model_dump(mode="json", by_alias=True, exclude_none=True)
    with pytest.raises(ValueError, match="is for 'he'"):
        BundleCard.model_validate({**said, "stain": {"pas": said["stain"]["he"]}})
    with pytest.raises(ValueError, match="no target"):
        BundleCard.model_validate({**said, "stain": {}})


def test_old_forward_digests_stay(bundles, monkeypatch):
    """A card without targets digests as it did before there were any."""
    from slideflow_ray.models import bundle
    from slideflow_ray.specs import digest

    card = read_card(bundles["odd"])
    said = {"task", "architecture", "arguments", "channels", "mean", "std", "precision"}
    weights = bundle._sha256(bundles["odd"] / "weights.safetensors")
    old = digest({**card.model_dump(mode="json", include=said), "n_classes": 2, "weights": weights})
    assert forward_digest(bundles["odd"]) == old


def test_a_scorer_sees_the_tiles_in_the_targets_colours(stained_bundle, bundles):
    card = read_card(stained_bundle)
    assert card.stain is not None
    profile = resolve(ComputeSpec(precision="fp32", device="cpu"))
    net = load_network(stained_bundle)[1]
    mine, raw = make_scorer(card, net, profile), make_scorer(read_card(bundles["aligned"]), net, profile)
    tiles = np.stack([picture(amounts(s, 64), unit(RUIFROK["he"]), s) for s in range(19)])
    fits = tuple(fit_tiles([picture(amounts(s), unit(RUIFROK["he"]), s)], "vahadane") for s in range(19))
    for stained in (Stained("he", fits[:1]), Stained("he", fits)):
        want = restained(tiles, stained, card.stain["he"])
        assert mine.margins(tiles, stained).tobytes() == raw.margins(want).tobytes()
        assert mine.features(tiles, stained).tobytes() == raw.features(want).tobytes()
    assert (
        mine.margins(tiles[17:18], Stained("he", fits[17:18])).tobytes()
        == mine.margins(tiles, stained)[17:18].tobytes()
    )
    assert raw.margins(tiles, stained).tobytes() == raw.margins(tiles).tobytes()
    with pytest.raises(StainError, match="not told how"):
        mine.margins(tiles)
    with pytest.raises(StainError, match="none for the stain 'pas'"):
        mine.margins(tiles, Stained("pas", fits[:1]))
    with pytest.raises(StainError, match="19 tiles need"):
        mine.margins(tiles, Stained("he", fits[:2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_bytes_of_a_cpu(method):
    tiles = np.stack([picture(amounts(s, 64), unit(RUIFROK["he"]), s) for s in range(33)])
    a, b = (fit_tiles([picture(amounts(s), unit(m["he"]))], method) for s, m in ((1, RUIFROK), (2, SCANNER_B)))
    want = restained(tiles, Stained("he", (a,)), target(b))
    got = restain(to_tensor(tiles, "cuda"), Stained("he", (a,)), target(b)).cpu().numpy()
    assert got.tobytes() == want.tobytes()


def test_unknown_keys_in_a_target_are_refused(stained_bundle, tmp_path):
    said = json.loads((stained_bundle / "bundle.json").read_text())
    said["stain"]["he"]["colour"] = "red"
    (tmp_path / "bundle.json").write_text(json.dumps(said))
    with pytest.raises(BundleError, match=r"stain\.he\.colour"):
        read_card(tmp_path)
