"""Heatmaps, histograms, slide scores and confusion over many stores, lazily, on threads or on Ray.

The only file that imports dask. Slides are grouped into partitions, each one delayed task
that opens its stores where it runs and returns something small that adds up; partitions
are merged as a tree. So memory does not grow with the number of tiles, and the same
functions run on Dask's threads (default; warm in 0.2 s) and on a Ray cluster.
``da.from_zarr`` is not used, because it does not work under Ray (docs: FACTS, Dask).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import batched
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from slideflow_ray.errors import SlideflowError
from slideflow_ray.geometry import scale_of
from slideflow_ray.metrics import Confusion, Counts, Reliability, Sparse
from slideflow_ray.metrics import probability as probability  # exported: it is what heatmaps hold
from slideflow_ray.store import SlideStore

Scheduler = Literal["threads", "ray"]
SlideScore = Literal["max", "top10", "area"]
"""What a slide's score is: its highest margin, the mean of the ten highest, or the share of tiles at >= 0.5."""

PARTITION = 8
"""Slides of one task: enough that Ray's 2 ms per task vanish, few enough that a small cohort still spreads."""

SPLIT_EVERY = 16
"""Partial results that one merge takes together."""

SMALLEST_PX = 64
"""A heatmap's pyramid ends with the first level that is smaller than this on both sides."""

TOP = 10
"""A slide's second score is the mean of its `TOP` highest margins."""

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Part:
    """One slide's scores by one model: nodes `scores/<grid>/<model>` and `labels` (None where there are none).

    An image in one piece is row `row` of the store `pack`; `whole` is its label by class, 1, 0 or -1.
    annotated : class, its annotated area and what of it lies outside the tissue mask, um2, where that is known.
    """

    out: str
    slide_id: str
    grid: str
    model: str
    patient: str = ""
    labels: str | None = None
    pack: str = ""
    row: int = -1
    whole: tuple[int, ...] | None = None
    annotated: tuple[tuple[str, float, float], ...] = ()

    @property
    def store(self) -> SlideStore:
        """The slide's (or pack's) store, opened where it is used."""
        return SlideStore(self.out, self.pack or self.slide_id)

    @property
    def on_objects(self) -> bool:
        """Whether the rows are objects that a segmentation found, as the grid's name says."""
        return "px-objects-" in self.grid

    def margins(self) -> Floats:
        """Return the slide's margins, float32 (N, C). Raises CorruptStore, StoreError."""
        if self.pack:
            return _pack_scores(self.out, self.pack, self.grid, self.model)[self.row : self.row + 1]
        return self.store.read(f"scores/{self.grid}/{self.model}")

    def truth(self) -> Labels | None:
        """Return the slide's labels, int8 (N, K), -1 unknown; None without labels."""
        if self.pack:
            return None if self.whole is None else np.array([self.whole], np.int8)
        return None if self.labels is None else self.store.read(self.labels)


@lru_cache(maxsize=32)
def _pack_scores(out: str, pack: str, grid: str, model: str) -> Floats:
    """A pack is read once for its thousand images."""
    return SlideStore(out, pack).read(f"scores/{grid}/{model}")


# over many stores


def over_slides[P, R](
    function: Callable[[P], R],
    parts: Sequence[P],
    merge: Callable[[Sequence[R]], R],
    scheduler: Scheduler = "threads",
    partition: int = PARTITION,
) -> R:
    """Return merge(function(part) for every part), partition by partition, merged as a tree.

    `merge` must not mind order or grouping, and returns the neutral element for nothing.
    The first error of any slide is raised.
    """
    if not parts:
        return merge(())
    task, join = delayed(_partition, pure=False, traverse=False), delayed(_join, pure=False)
    results = [task(function, merge, group) for group in batched(parts, partition)]
    while len(results) > 1:
        results = [join(merge, *group) for group in batched(results, SPLIT_EVERY)]
    with _getter(scheduler) as get:
        value: R = results[0].compute(scheduler=get, optimize_graph=False)
    return value


def _partition[P, R](function: Callable[[P], R], merge: Callable[[Sequence[R]], R], parts: Sequence[P]) -> R:
    """Fold as it goes, so that a partition holds two results and not all of them."""
    total = merge(())
    for part in parts:
        total = merge((total, function(part)))
    return total


def _join[R](merge: Callable[[Sequence[R]], R], *results: R) -> R:
    return merge(results)


@contextlib.contextmanager
def _getter(scheduler: Scheduler) -> Iterator[Any]:
    if scheduler == "threads":
        yield "threads"
        return
    import ray
    from ray.util.dask import ray_dask_get

    from slideflow_ray.execute.cluster import connect
    from slideflow_ray.specs import ExecutorSpec

    started = connect(ExecutorSpec(kind="ray"))
    try:
        yield ray_dask_get
    finally:
        if started:
            ray.shutdown()


# heatmaps


def write_heatmaps(
    out: str, work: Sequence[tuple[str, str, str]], scheduler: Scheduler = "threads"
) -> dict[str, SlideflowError]:
    """Write and commit a heatmap for each (slide_id, grid, model) that has none; return the slides that failed."""
    parts = [Part(out, *names) for names in work]
    return over_slides(_try_heatmap, parts, _united, scheduler)


def _try_heatmap(part: Part) -> dict[str, SlideflowError]:
    """One slide that cannot be read must not withhold the others' results."""
    try:
        write_heatmap(part)
    except SlideflowError as error:
        return {part.slide_id: error}
    return {}


def _united(several: Sequence[dict[str, SlideflowError]]) -> dict[str, SlideflowError]:
    return {slide: error for errors in several for slide, error in errors.items()}


def write_heatmap(part: Part) -> int:
    """Write one slide's heatmap, OME-Zarr 0.5, from its rows; return 1, or 0 where it is committed already.

    Level 0 has one pixel per grid cell, float32 (c, y, x) probabilities, NaN where there is no tile.
    Raises CorruptStore, StoreError.
    """
    node = f"heatmaps/{part.grid}/{part.model}"
    return 0 if part.store.committed(node) else write_cells(part.store, part.grid, node, probability(part.margins()))


def write_cells(store: SlideStore, grid: str, node: str, rows: Floats) -> int:
    """Write and commit one value per tile, float32 (N, C), as an OME-Zarr pyramid; return 1, or 0 if it is there."""
    if store.committed(node):
        return 0
    about = store.node_attrs(f"grids/{grid}")
    levels = pyramid(plane(rows, store.read(f"grids/{grid}/rowcol"), tuple(about["shape"])))
    tile, mpp0 = about["determines"]["tile"], about["determines"]["mpp0"]
    side_px0 = max(1, round(tile["tile_px"] * scale_of(tile["mpp"], mpp0)))
    step_um = (tile["stride_px"] or tile["tile_px"]) * tile["mpp"]
    first_um = (side_px0 - 1) / 2 * mpp0
    store.make_group(node, {"ome": multiscales(node.rpartition("/")[2], step_um, first_um, len(levels))})
    for level, values in enumerate(levels):
        name = f"{node}/{level}"
        store.create_rows(name, values.shape, np.float32, 1, fill=math.nan, dimension_names=("c", "y", "x"))
        for channel in range(len(values)):
            store.write_chunk(name, channel, values[channel : channel + 1])
    store.commit(node)
    return 1


def plane(rows: Floats, rowcol: npt.NDArray[np.int32], shape: tuple[int, ...]) -> Floats:
    """Return rows, float32 (N, C), at their cells: float32 (C, rows, cols), NaN where there is no tile."""
    out = np.full((rows.shape[1], *shape), np.nan, np.float32)
    out[:, rowcol[:, 0], rowcol[:, 1]] = rows.T
    return out


def pyramid(values: Floats) -> list[Floats]:
    """Return `values`, float32 (C, h, w), and its halvings by the mean of 2 x 2, down to less than 64 px a side."""
    levels = [values]
    while max(levels[-1].shape[1:]) >= SMALLEST_PX:
        levels.append(halved(levels[-1]))
    return levels


def halved(values: Floats) -> Floats:
    """Return the mean of each 2 x 2 without its NaN, float32 (C, ceil(h/2), ceil(w/2)); NaN where all four are."""
    c, h, w = values.shape
    padded = np.pad(values, ((0, 0), (0, h % 2), (0, w % 2)), constant_values=np.nan)
    blocks = padded.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2)
    n = np.isfinite(blocks).sum(axis=(2, 4))
    total = np.nansum(blocks, axis=(2, 4), dtype=np.float64)
    return np.where(n, total / np.maximum(n, 1), np.nan).astype(np.float32)


def multiscales(name: str, step_um: float, first_um: float, levels: int) -> dict[str, Any]:
    """Return the OME-Zarr 0.5 metadata of a heatmap whose cells are `step_um` apart.

    Physical space is that of the slide: 0 is the centre of px0 (0, 0), and a pixel's
    coordinate is its centre, so cell 0 lies at `first_um`, its tile's centre.
    """
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, step_um * 2**level, step_um * 2**level]},
                {"type": "translation", "translation": [0.0, *[first_um + step_um * (2**level - 1) / 2] * 2]},
            ],
        }
        for level in range(levels)
    ]
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "nanmean"}]}


def read_heatmap(store: SlideStore, grid: str, model: str, level: int = 0) -> Floats:
    """Return a committed heatmap's level, float32 (C, rows, cols) probabilities, NaN where there is no tile."""
    return store.read(f"heatmaps/{grid}/{model}/{level}")


# histograms


Histograms = dict[str, dict[int, tuple[Sparse, Sparse]]]
"""patient -> class -> (positives, negatives)."""


@dataclass(frozen=True)
class SlideScores:
    """What a slide's tiles come to, per class of the model.

    top : highest margin; top10 : mean of the ten highest (of all, if fewer); area : share of the tiles at
    probability >= 0.5. positives, negatives : labelled tiles per class; unknown : tiles without a label.
    """

    tiles: int
    top: tuple[float, ...]
    top10: tuple[float, ...]
    area: tuple[float, ...]
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    unknown: int

    def score(self, name: SlideScore) -> tuple[float, ...]:
        """Return the slide's score by class: a margin (max, top10), or a share of tiles (area)."""
        return {"max": self.top, "top10": self.top10, "area": self.area}[name]


@dataclass(frozen=True)
class Tiles:
    """The tiles of many slides: margin histograms by patient and class, each slide's scores, and calibration."""

    histograms: Histograms
    slides: Mapping[str, SlideScores]
    reliability: Mapping[str, Mapping[int, Reliability]] = field(default_factory=dict)


def read_tiles(parts: Sequence[Part], targets: Sequence[int], scheduler: Scheduler = "threads") -> Tiles:
    """Read every slide's margins once; return histograms by patient of the classes `targets`, and scores by slide."""
    return over_slides(partial(tiles_of, targets=tuple(targets)), parts, merge_tiles, scheduler)


def tiles_of(part: Part, targets: Sequence[int]) -> Tiles:
    """Return what one slide adds."""
    margins, truth = part.margins(), part.truth()
    if truth is None:
        truth = np.full(margins.shape, -1, np.int8)
    sides = {c: (margins[truth[:, c] == 1, c], margins[truth[:, c] == 0, c]) for c in targets}
    found = {c: (Sparse.of(pos), Sparse.of(neg)) for c, (pos, neg) in sides.items()}
    spread = {c: Reliability.of(probability(pos), probability(neg)) for c, (pos, neg) in sides.items()}
    return Tiles({part.patient: found}, {part.slide_id: slide_scores(margins, truth)}, {part.patient: spread})


Sides = tuple[Floats, Floats]
"""Margins of the positives, and of the negatives."""


def read_margins(parts: Sequence[Part], targets: Sequence[int], scheduler: Scheduler = "threads") -> dict[int, Sides]:
    """Return all labelled margins by class, float32: 4 bytes for each tile, where a histogram is too coarse."""
    found = over_slides(partial(_margins_of, targets=tuple(targets)), parts, _listed, scheduler)
    return {c: (_joined(p for p, _ in found.get(c, [])), _joined(n for _, n in found.get(c, []))) for c in targets}


def _joined(several: Iterable[Floats]) -> Floats:
    return np.concatenate([np.empty(0, np.float32), *several])


def _margins_of(part: Part, targets: Sequence[int]) -> dict[int, list[Sides]]:
    margins, truth = part.margins(), part.truth()
    if truth is None:
        return {}
    return {c: [(margins[truth[:, c] == 1, c], margins[truth[:, c] == 0, c])] for c in targets}


def _listed(several: Sequence[dict[int, list[Sides]]]) -> dict[int, list[Sides]]:
    together: dict[int, list[Sides]] = {}
    for classes in several:
        for c, sides in classes.items():
            together.setdefault(c, []).extend(sides)
    return together


def slide_scores(margins: Floats, truth: Labels) -> SlideScores:
    """Return the scores of a slide with at least one tile."""
    n = min(TOP, len(margins))
    highest = np.partition(margins, len(margins) - n, axis=0)[-n:].astype(np.float64)
    return SlideScores(
        tiles=len(margins),
        top=tuple(float(v) for v in highest.max(axis=0)),
        top10=tuple(float(np.float32(math.fsum(column) / n)) for column in highest.T),
        area=tuple(float(v) for v in (margins >= 0).mean(axis=0)),
        positives=tuple(int(v) for v in (truth == 1).sum(axis=0)),
        negatives=tuple(int(v) for v in (truth == 0).sum(axis=0)),
        unknown=int((truth < 0).any(axis=1).sum()),
    )


def merge_tiles(several: Sequence[Tiles]) -> Tiles:
    """Add up; order and grouping do not matter."""
    histograms: Histograms = {}
    slides: dict[str, SlideScores] = {}
    spread: dict[str, dict[int, Reliability]] = {}
    for tiles in several:
        slides |= tiles.slides
        for patient, reliability in tiles.reliability.items():
            ours = spread.setdefault(patient, {})
            for c, counts in reliability.items():
                ours[c] = ours[c] + counts if c in ours else counts
        for patient, classes in tiles.histograms.items():
            mine = histograms.setdefault(patient, {})
            for c, (pos, neg) in classes.items():
                mine[c] = (mine[c][0] + pos, mine[c][1] + neg) if c in mine else (pos, neg)
    return Tiles(histograms, slides, spread)


# confusion


@dataclass(frozen=True)
class Calls:
    """What the tiles of many slides were called, by slide: counts per class, and the table of arg max."""

    counts: Mapping[str, Mapping[int, Counts]]
    confusion: Mapping[str, Confusion]


def read_calls(
    parts: Sequence[Part],
    classes: tuple[str, ...],
    thresholds: Mapping[int, float],
    argmax: bool,
    scheduler: Scheduler = "threads",
) -> Calls:
    """Call every labelled tile: positive for class c when margin >= thresholds[c]; by arg max too, if `argmax`."""
    return over_slides(_Caller(classes, dict(thresholds), argmax), parts, merge_calls, scheduler)


@dataclass(frozen=True)
class _Caller:
    classes: tuple[str, ...]
    thresholds: dict[int, float]
    argmax: bool

    def __call__(self, part: Part) -> Calls:
        margins, truth = part.margins(), part.truth()
        if truth is None:
            return Calls({}, {})
        counts = {c: called(margins[:, c], truth[:, c], threshold) for c, threshold in self.thresholds.items()}
        known = (truth >= 0).all(axis=1)
        if not self.argmax:
            return Calls({part.slide_id: counts}, {})
        table = Confusion.of(truth[known].argmax(axis=1), margins[known].argmax(axis=1), self.classes)
        return Calls({part.slide_id: counts}, {part.slide_id: table})


def called(margins: Floats, truth: Labels, threshold: float) -> Counts:
    """Return the counts of one class: truth is 1, 0 or -1 (left out), called when margin >= threshold."""
    positive = margins >= np.float32(threshold)
    tp, fp = (int(np.count_nonzero(positive & (truth == want))) for want in (1, 0))
    return Counts(tp, int(np.count_nonzero(truth == 1)) - tp, fp, int(np.count_nonzero(truth == 0)) - fp)


def merge_calls(several: Sequence[Calls]) -> Calls:
    """Put slides together."""
    counts: dict[str, Mapping[int, Counts]] = {}
    confusion: dict[str, Confusion] = {}
    for calls in several:
        counts |= calls.counts
        confusion |= calls.confusion
    return Calls(counts, confusion)
