"""Drift: whether the latest slides look like the reference in tissue, stain and scores.

A slide counts once, however many tiles it has: tiles of one slide are no independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray.errors import SlideflowError
from slideflow_ray.nightly.spec import DriftSpec
from slideflow_ray.store import SlideStore

BINS = 10
PERCENTILES = (5, 25, 50, 75, 95)
STAINS = ("red", "green", "blue")
FAR = 3.0
"""Interquartile ranges beyond the quartiles from which a slide is far out (Tukey, Exploratory Data Analysis, 1977)."""
SMALL = 0.01
"""A slide within so much of the reference's median is not far out, however narrow the reference."""
FEW = 5.0
"""The least reference slides of a bin: with fewer reference slides there are fewer bins."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One measure of the latest slides against the reference; `n` and `m` slides.

    psi : population stability index over bins of equal share of the reference; `chance` is what it exceeds with
    probability alpha when nothing has changed. distance : Kolmogorov-Smirnov, with its p value.
    latest, reference : 5th, 25th, 50th, 75th and 95th percentile of both. drift : the verdict; why : what it is, or
    why there is none.
    """

    name: str
    n: int
    m: int
    psi: float | None = None
    chance: float | None = None
    distance: float | None = None
    p: float | None = None
    latest: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    drift: bool = False
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def measures_of(out: Path, outcome: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return one number for each measure of a slide that is done: tissue, stain, the mean probability of each class.

    What cannot be read is left out.
    """
    found: dict[str, float] = {}
    store = SlideStore(out, outcome["slide_id"])
    for grid in outcome["laid"]:
        try:
            found |= _of_tissue(store, grid)
        except (SlideflowError, OSError, KeyError):
            continue
    by_node = {m["node"]: m for m in models if m["task"] in ("classify", "multilabel")}
    pairs = [(store, grid, node, slice(None)) for grid, node in outcome["grids"] if node in by_node]
    if outcome["pack"]:
        pack, row = SlideStore(out, outcome["pack"]), slice(outcome["row"], outcome["row"] + 1)
        pairs += [(pack, grid, node, row) for grid, node in outcome["packed"] if node in by_node]
    for where, grid, node, rows in pairs:
        try:
            margins = where.read(f"scores/{grid}/{node}")[rows]
        except (SlideflowError, OSError):
            continue
        found |= _of_scores(margins, by_node[node])
    return found


def _of_tissue(store: SlideStore, grid: str) -> dict[str, float]:
    about = store.node_attrs(f"grids/{grid}")
    node = about["determines"].get("tissue")
    if node is None:
        return {}
    tissue = store.node_attrs(f"{node}/mask")
    found = {"tissue share": float(store.read(f"{node}/mask").mean())}
    if tissue.get("stain") is not None:
        found |= {f"stain, {name}": float(v) for name, v in zip(STAINS, tissue["stain"], strict=True)}
    return found


def _of_scores(margins: npt.NDArray[np.float32], model: Mapping[str, Any]) -> dict[str, float]:
    if not len(margins):
        return {}
    probability = (1 / (1 + np.exp(-margins.astype(np.float64)))).mean(axis=0)
    first = 1 if model["task"] == "classify" and len(model["classes"]) == 2 else 0  # of two, one says all
    return {f"{model['name']}, {name}": float(probability[i]) for i, name in enumerate(model["classes"]) if i >= first}


def compare(
    latest: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]], spec: DriftSpec
) -> tuple[Measure, ...]:
    """Compare the latest slides with the reference, measure by measure."""
    names = list(dict.fromkeys(name for slide in (*reference, *latest) for name in slide))
    pairs = ((name, _column(latest, name), _column(reference, name)) for name in names)
    return tuple(_compared(name, new, old, spec, spec.alpha / len(names)) for name, new, old in pairs)


def outlying(
    latest: Mapping[str, Mapping[str, float]], reference: Sequence[Mapping[str, float]], spec: DriftSpec
) -> dict[str, str]:
    """Return the slides that lie far outside the reference in a measure, and in which; drift or not."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for slide in reference for name in slide):
        old = _column(reference, name)
        if len(old) < 2 * spec.least:
            continue
        low, middle, high = np.percentile(old, [25, 50, 75])
        far = FAR * (high - low)
        for slide_id, slide in latest.items():
            value = slide.get(name, middle)
            if not low - far <= value <= high + far and abs(value - middle) > SMALL * abs(middle):
                found.setdefault(slide_id, []).append(f"{name} {value:.3g} (reference {middle:.3g})")
    return {slide_id: ", ".join(said) for slide_id, said in found.items()}


def _column(slides: Sequence[Mapping[str, float]], name: str) -> Floats:
    values = np.array([slide[name] for slide in slides if name in slide], np.float64)
    return values[np.isfinite(values)]


def _compared(name: str, new: Floats, old: Floats, spec: DriftSpec, alpha: float) -> Measure:
    n, m = len(new), len(old)
    if n < spec.least or m < spec.least:
        return Measure(name, n, m, why=f"{n} new slides and {m} of the reference; from {spec.least} on they are judged")
    from scipy.stats import ks_2samp

    if not _could_tell(n, m, old, alpha):
        return Measure(name, n, m, why=f"{n} new slides against {m}: too few to tell any shift from chance")
    new, old = _rounded(new, old)
    found = ks_2samp(new, old, method="auto")
    distance, p = float(found.statistic), float(found.pvalue)
    psi, chance = stability(new, old, alpha)
    said = [f"PSI {psi:.2f}"] if psi > max(spec.psi, chance) else []
    said += [f"KS {distance:.2f} (p {p:.1g})"] if distance > spec.ks and p < alpha else []
    latest, before = (tuple(np.percentile(values, PERCENTILES).tolist()) for values in (new, old))
    return Measure(name, n, m, psi, chance, distance, p, latest, before, bool(said), ", ".join(said))


def _could_tell(n: int, m: int, old: Floats, alpha: float) -> bool:
    """Whether the largest shift would be found: the exact test has a least p value, the index a largest value."""
    if 2 / math.comb(n + m, n) < alpha:
        return True
    psi, chance = stability(np.full(n, np.inf), old, alpha)
    return psi > chance


def _rounded(new: Floats, old: Floats) -> tuple[Floats, Floats]:
    """Round both to a millionth of the reference's size: differences below are arithmetic, not slides."""
    unit = 1e-6 * max(float(np.abs(old).max(initial=0)), 1e-12)
    return np.round(new / unit) * unit, np.round(old / unit) * unit


def stability(new: Floats, old: Floats, alpha: float) -> tuple[float, float]:
    """Return the population stability index, and what chance alone gives with probability `alpha`.

    The index is sum((q - p) ln(q / p)) over bins that hold equal shares of the reference (Siddiqi, Credit Risk
    Scorecards, 2006), with half a slide added to each bin. Without change it is about chi2(bins - 1) times
    (1 / n + 1 / m) (Yurdakul and Naranjo, J. Risk Model Validation 14(4), 2020).
    """
    from scipy.stats import chi2

    bins = int(max(2, min(BINS, len(old) // FEW)))
    edges = np.unique(np.quantile(old, np.linspace(0, 1, bins + 1)[1:-1]))
    p, q = (_shares(values, edges) for values in (old, new))
    psi = float(((q - p) * np.log(q / p)).sum())
    chance = float(chi2.isf(alpha, max(1, len(p) - 1))) * (1 / len(new) + 1 / len(old))
    return psi, chance if math.isfinite(chance) else math.inf


def _shares(values: Floats, edges: Floats) -> Floats:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) + 0.5
    return counts / counts.sum()
