"""What stain normalisation does: tiles before and after, and t-SNE of their features with what becomes of neighbours.

t-SNE (L. van der Maaten, G. Hinton, JMLR 9 (2008) 2579-2605) shows whether scanners fall together while structure
stays; as the eye is easily led, numbers stand beside it: trustworthiness (J. Venna, S. Kaski, ICANN 2001, as
scikit-learn has it), the share of nearest neighbours kept, and how many neighbours are of the same scanner.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.models.bundle import BundleCard, read_card
from slideflow_ray.prepare import restained
from slideflow_ray.specs import ComputeSpec
from slideflow_ray.stain import VERSION, Stained, StainFit, StainTarget, stain_name
from slideflow_ray.staining import Fits, read_fits
from slideflow_ray.store import SlideStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

TILES = 600
"""Tiles whose features are drawn, over all slides; no slide gives more than SLIDE_TILES."""
SLIDE_TILES = 40
ROWS, COLUMNS = 8, 4
"""Slides of the contact sheet, and tiles of each."""
NEIGHBOURS = 10
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
MARKS = "osDv^P*X"


@dataclass(frozen=True, eq=False)
class Shown:
    """Tiles of one slide (or one crop), uint8 (n, T, T, 3), as they are and as the network sees them."""

    item: Item
    before: Pixels
    after: Pixels


@dataclass(frozen=True)
class StainView:
    """The files that were written, and what is said in them; `numbers` is empty without features."""

    model: str
    files: tuple[Path, ...]
    numbers: Mapping[str, Any]

    def summary(self) -> str:
        """Return a few lines for people."""
        lines = [f"{self.model}: {self.numbers['sentence']}"] if self.numbers else []
        return "\n".join([*lines, *map(str, self.files)])

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"model": self.model, "files": [str(path) for path in self.files], "numbers": dict(self.numbers)}


def show_stains(out: Path, model: str | None = None, folder: Path | None = None, seed: int = 0) -> StainView:
    """Draw tiles of a run before and after the normalisation of a model, and t-SNE of the model's features of both.

    Writes stain-<model>.png, and of a model with features stain-<model>-tsne.png and .json, into `folder` (`out`).
    Raises ConfigError where no model normalises, or no tiles are stored.
    """
    record = read_run(out)
    about, card = _model(record, model)
    shown = list(_shown(out, record, about, card))
    if not shown:
        step = 'Run again with store.tiles = "lossless" into a new folder; a few slides are enough.'
        raise ConfigError(f"{out} has no stored tiles that {card.name} normalises.", next_step=step)
    place = folder or out
    place.mkdir(parents=True, exist_ok=True)
    files = {f"stain-{card.name}.png": contact_sheet(shown, card.name)}
    numbers: dict[str, Any] = {}
    if card.task != "segment":
        features = _features(about["path"], card, shown)
        values, names = _groups(shown)
        drawn, numbers = compare_features(*features, names, values, seed)
        files |= {f"stain-{card.name}-tsne.png": drawn, f"stain-{card.name}-tsne.json": storage.to_json(numbers)}
    for name, data in files.items():
        storage.write_atomic(place / name, data)
    return StainView(card.name, tuple(place / name for name in files), numbers)


def _model(record: Mapping[str, Any], name: str | None) -> tuple[dict[str, Any], BundleCard]:
    models = [m for m in record["models"] if name in (None, m["name"])]
    cards = [(m, read_card(m["path"])) for m in models]
    found = next(((m, card) for m, card in cards if card.stain), None)
    if found is None:
        which = f"the model {name!r}" if name else "a model"
        raise ConfigError(
            f"The run has not {which} with stain targets.", next_step="Train with `stain`, or look above."
        )
    return found


def _shown(out: Path, record: Mapping[str, Any], about: Mapping[str, Any], card: BundleCard) -> Iterator[Shown]:
    items = [Item.model_validate(row) for row in record["items"]]
    places = [(item, *place) for item in items for place in _places(record["outcomes"].get(item.slide_id), about)]
    each = max(COLUMNS, min(SLIDE_TILES, TILES // max(1, len(places))))
    for item, slide_id, grid, row in places[:: -(-len(places) // TILES) or 1]:
        store = SlideStore(out, slide_id)
        target = (card.stain or {}).get(stain_name(item.stain, item.modality))
        fits = _fits(out, store, grid, target) if target else None
        if target is None or fits is None or not store.committed(f"grids/{grid}/tiles"):
            continue
        fit = fits.rows[row or 0]
        if isinstance(fit, StainFit):
            tiles = _some(store, grid, row, each)
            yield Shown(item, tiles, restained(tiles, Stained(fits.stain, (fit,)), target))


def _places(outcome: Mapping[str, Any] | None, about: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None]]:
    """The store, the grid and, of a crop, the row of what the model has scored."""
    if outcome is None or outcome["status"] != "done":
        return
    for grid, node in outcome["grids"]:
        if node == about["node"]:
            yield outcome["slide_id"], grid, None
    for grid, node in outcome["packed"]:
        if node == about["node"]:
            yield outcome["pack"], grid, outcome["row"]


def _fits(out: Path, store: SlideStore, grid: str, target: StainTarget) -> Fits | None:
    """The fits that the model used on a grid: a pack's grid names them, a slide has one for each method."""
    node = store.node_attrs(f"grids/{grid}")["determines"].get("stains")
    if node is None:
        wanted = {"method": target.method, "stain": target.stain, "fit": VERSION}
        wanted |= {"lam": target.lam} if target.method == "vahadane" else {}
        node = next((n for n in store.nodes("stains") if wanted.items() <= _determined(store, n).items()), None)
    return read_fits(str(out), store.slide_id, node) if node else None


def _determined(store: SlideStore, node: str) -> dict[str, Any]:
    found: dict[str, Any] = store.node_attrs(node)["determines"]
    return {key: value for key, value in found.items() if key in ("method", "stain", "fit", "lam")}


def _some(store: SlideStore, grid: str, row: int | None, n: int) -> Pixels:
    """A crop's own tile, or up to n of a slide's, evenly spread over those that are at least half tissue."""
    if row is not None:
        return store.read_rows(f"grids/{grid}/tiles", row, row + 1)
    share = store.read(f"grids/{grid}/tissue")
    rows = np.flatnonzero(share >= min(0.5, float(share.max())))
    picked = rows[np.unique(((np.arange(n) + 0.5) * len(rows) / n).astype(np.int64))]
    return np.concatenate([store.read_rows(f"grids/{grid}/tiles", i, i + 1) for i in picked.tolist()])


def _features(path: str, card: BundleCard, shown: Sequence[Shown]) -> tuple[Features, Features]:
    """The model's features of the tiles as they are, and as it sees them."""
    from slideflow_ray.models.scorer import load_scorer
    from slideflow_ray.profile import resolve

    scorer = replace(load_scorer(path, resolve(ComputeSpec())), card=card.model_copy(update={"stain": None}))
    before = scorer.features(np.concatenate([one.before for one in shown]))
    after = scorer.features(np.concatenate([one.after for one in shown]))
    return before.astype(np.float32), after.astype(np.float32)


def _groups(shown: Sequence[Shown]) -> tuple[list[str], str]:
    """By what tiles are told apart: the first of scanner, site and slide that has several values; a value a tile."""
    for name in ("scanner", "site", "slide_id"):
        values = [str(getattr(one.item, name) or "not said") for one in shown for _ in one.before]
        if len(set(values)) > 1:
            break
    return values, "slide" if name == "slide_id" else name


# the picture of features


def compare_features(
    before: Features, after: Features, name: str, groups: Sequence[str], seed: int = 0
) -> tuple[bytes, dict[str, Any]]:
    """Return a PNG of t-SNE of features before and after, float (n, D) each, and what the numbers are.

    `groups` has one value of the column `name` a row. `kept`: of a tile's NEIGHBOURS nearest by features before, the
    share that are still so after; chance is NEIGHBOURS / (n - 1). Raises ConfigError for fewer than 20 tiles.
    """
    n = len(before)
    if n < 2 * NEIGHBOURS:
        raise ConfigError(f"{n} tiles are too few for t-SNE; {2 * NEIGHBOURS} are the least.")
    from sklearn.manifold import trustworthiness

    near = [_nearest(x) for x in (before, after)]
    maps = [_tsne(x, seed) for x in (before, after)]
    labels = np.array(groups)
    numbers: dict[str, Any] = {
        "tiles": n,
        "neighbours": NEIGHBOURS,
        "seed": seed,
        "kept": _overlap(*near),
        "kept_by_chance": NEIGHBOURS / (n - 1),
        "trustworthiness": float(trustworthiness(before, after, n_neighbors=NEIGHBOURS)),
        "told_by": name,
        "values": sorted(set(groups)),
    }
    for when, x, rows, points in zip(("before", "after"), (before, after), near, maps, strict=True):
        numbers[when] = {
            "same": float((labels[rows] == labels[:, None]).mean()),
            "picture_trustworthiness": float(trustworthiness(x, points, n_neighbors=NEIGHBOURS)),
            "picture_kept": _overlap(rows, _nearest(points)),
        }
    numbers["sentence"] = (
        f"{numbers['kept']:.0%} of {NEIGHBOURS} nearest neighbours kept (trustworthiness "
        f"{numbers['trustworthiness']:.3f}); neighbours of the same {name}: {numbers['before']['same']:.0%} before, "
        f"{numbers['after']['same']:.0%} after"
    )
    return _png(_scatter(maps, labels, numbers)), numbers


def _nearest(x: Features) -> npt.NDArray[np.int64]:
    from sklearn.neighbors import NearestNeighbors

    found: npt.NDArray[np.int64] = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(x).kneighbors(return_distance=False)
    return found


def _overlap(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / NEIGHBOURS for a, b in zip(one, other, strict=True)]))


def _tsne(x: Features, seed: int) -> Features:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    found: Features = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
    return found


def _scatter(maps: Sequence[Features], labels: npt.NDArray[np.str_], numbers: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    values = list(dict.fromkeys(sorted(labels.tolist())))
    for axes, when, points in zip(panels, ("before", "after"), maps, strict=True):
        for i, value in enumerate(values):
            own = points[labels == value]
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i // len(COLOURS) % len(MARKS)]
            axes.scatter(*own.T, s=14, c=colour, marker=mark, alpha=0.75, linewidths=0, label=value)
        said = numbers[when]
        axes.set_title(f"{when} normalisation", fontsize=11)
        axes.set_xlabel(
            f"same {numbers['told_by']} among {NEIGHBOURS} neighbours: {said['same']:.0%}\n"
            f"trustworthiness of this picture: {said['picture_trustworthiness']:.3f}",
            fontsize=9,
        )
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.spines[:].set_color("#bbbbbb")
    figure.suptitle(
        f"t-SNE of the features of {numbers['tiles']} tiles: {numbers['kept']:.0%} of the nearest neighbours are kept "
        f"(chance {numbers['kept_by_chance']:.0%})",
        fontsize=11,
    )
    if len(values) <= 16:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, names, title=numbers["told_by"], loc="outside lower center", ncols=8, frameon=False, fontsize=8
        )
    return figure


# the contact sheet


def contact_sheet(shown: Sequence[Shown], model: str) -> bytes:
    """Return a PNG: a row for each of up to ROWS slides, COLUMNS of its tiles before, the same after.

    Crops have one tile each, so those of one patient and scanner share a row.
    """
    from matplotlib.figure import Figure

    rows = _sheet_rows(shown)
    height = len(rows) + 0.75  # inches: a tile is one, and the heading takes the rest
    figure = Figure(figsize=(9.9, height), dpi=120)
    ratios = [1.0] * COLUMNS + [0.12] + [1.0] * COLUMNS
    grid = figure.add_gridspec(len(rows), len(ratios), width_ratios=ratios, wspace=0.04, hspace=0.04)
    grid.update(left=0.16, right=0.99, bottom=0.08 / height, top=1 - 0.65 / height)
    for r, (name, before, after) in enumerate(rows):
        for side, tiles in enumerate((before, after)):
            for c in range(COLUMNS):
                axes = figure.add_subplot(grid[r, c + side * (COLUMNS + 1)])
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if c < len(tiles):
                    axes.imshow(tiles[c], interpolation="antialiased")
                if c == 0 and side == 0:
                    axes.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
                if r == 0 and c == 0:
                    axes.set_title(("before", "after")[side], fontsize=11, loc="left")
    figure.suptitle(f"Stain normalisation of {model}", fontsize=11, y=1 - 0.12 / height)
    return _png(figure)


def _sheet_rows(shown: Sequence[Shown]) -> list[tuple[str, Pixels, Pixels]]:
    """Evenly chosen rows, each with its name and up to COLUMNS tiles before and after."""
    together: dict[str, list[Shown]] = {}
    for one in shown:
        crop = len(one.before) == 1
        scanner = one.item.scanner if crop or one.item.scanner else None
        name = one.item.patient if crop else one.item.slide_id
        together.setdefault("\n".join([_short(name), *([_short(scanner)] if scanner else [])]), []).append(one)
    names = list(together)
    picked = np.unique(np.linspace(0, len(names) - 1, min(ROWS, len(names))).round().astype(int))
    rows = []
    for name in (names[i] for i in picked):
        before = np.concatenate([one.before for one in together[name]])
        after = np.concatenate([one.after for one in together[name]])
        spread = np.unique(np.linspace(0, len(before) - 1, min(COLUMNS, len(before))).round().astype(int))
        rows.append((name, before[spread], after[spread]))
    return rows


def _short(text: str, most: int = 16) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
