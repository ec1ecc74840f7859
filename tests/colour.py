"""What colour alone gives away: channel means, deviations and histograms of tiles, judged by logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry import shape
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slideflow_ray.phantoms import Truth, geojson, write_slide
from slideflow_ray.slides import open_slide

BINS = 32


def features(tiles: np.ndarray) -> np.ndarray:
    """Means and deviations of the channels, then a histogram of each: float64, shape (n, 6 + 3 * BINS)."""
    flat = tiles.reshape(len(tiles), -1, 3)
    bins = flat // (256 // BINS)
    histograms = [(bins == b).mean(axis=1) for b in range(BINS)]
    return np.hstack([flat.mean(axis=1), flat.std(axis=1), *histograms])


def aucs(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """AUC on `test` (features, truth) of regressions on all features and on means and deviations, weak and strong."""
    found = {}
    for name, columns in (("means and deviations", slice(0, 6)), ("with histograms", slice(None))):
        for c in (0.01, 1.0):
            model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
            fitted = make_pipeline(StandardScaler(), model).fit(train[0][:, columns], train[1])
            found[f"{name}, C = {c}"] = float(roc_auc_score(test[1], fitted.decision_function(test[0][:, columns])))
    return found


def tiles_of(path: Path, truth: Truth, tile_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The tissue tiles of level 1 of a phantom, and whether the centre of each lies in tumour."""
    with open_slide(str(path)) as reader:
        pixels = reader.read(1, (0, 0), reader.levels[1].size)
    h, w = (side // tile_px for side in pixels.shape[:2])
    tiles = pixels[: h * tile_px, : w * tile_px].reshape(h, tile_px, w, tile_px, 3).swapaxes(1, 2)
    step = 2 * tile_px
    rows, cols = np.mgrid[:h, :w]
    x, y = (cols + 0.5) * step, (rows + 0.5) * step
    tissue = truth.tissue[(y / truth.px0_per_px[1]).astype(int), (x / truth.px0_per_px[0]).astype(int)]
    regions = shapely.unary_union([shape(f["geometry"]) for f in geojson(truth.tumours)["features"]])
    tumour = shapely.contains_xy(regions, x, y)
    return tiles[tissue], tumour[tissue]


def phantom_tiles(
    folder: Path, seeds: Sequence[int], size_px0: tuple[int, int], tile_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features and truth of the tiles of several phantoms; every second one has tumours."""
    found = []
    for seed in seeds:
        truth = write_slide(folder / "p.tif", size_px0=size_px0, seed=seed, tumour=seed % 2 == 0)
        tiles, tumour = tiles_of(folder / "p.tif", truth, tile_px)
        found.append((features(tiles), tumour))
    return np.concatenate([f for f, _ in found]), np.concatenate([t for _, t in found])
