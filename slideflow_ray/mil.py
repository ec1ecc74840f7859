"""Slide classifiers applied to a run: slides' probabilities, attention as rows and heatmaps, and the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slideflow_ray import storage
from slideflow_ray.aggregate import SlideScores, Tiles, write_cells
from slideflow_ray.cases import Model, Run, read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import BundleError, NanScore
from slideflow_ray.evaluate import evaluate_slides
from slideflow_ray.lease import lease
from slideflow_ray.models.bundle import WEIGHTS
from slideflow_ray.models.mil import CARD, Mil, MilCard, load_mil
from slideflow_ray.models.scorer import to_margins
from slideflow_ray.results import Evaluation
from slideflow_ray.specs import digest
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns, write_table
from slideflow_ray.train.mil import Bag, bags_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MilApplied:
    """What a slide classifier says of a run: margins by slide, the evaluation, and slides that have no answer."""

    node: str
    table: Path
    margins: Mapping[str, Floats]
    without: tuple[str, ...]
    evaluation: Evaluation

    def summary(self) -> str:
        """Return a few lines for people."""
        lines = [f"{len(self.margins)} slides scored by {self.node}: {self.table}"]
        if self.without:
            lines.append(f"{len(self.without)} slides have no features, so no answer: {', '.join(self.without[:5])}")
        return "\n".join([*lines, self.evaluation.summary()])

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        about = {
            "node": self.node,
            "table": str(self.table),
            "slides": len(self.margins),
            "without": list(self.without),
        }
        return {**about, **self.evaluation.to_json()}


def mil_node(folder: str | Path, card: MilCard) -> str:
    """Return the name of what a slide classifier gives, which carries the digest of its card and weights."""
    from slideflow_ray.identity import file_sha256

    said = card.model_dump(mode="json", exclude={"name"})
    return f"{card.name}-{digest([said, file_sha256(Path(folder) / WEIGHTS)])}"


def apply_mil(
    run_out: str | Path, folder: str | Path, *, rule: str = "youden", names: Mapping[str, str] | None = None
) -> MilApplied:
    """Score every slide of a run that has the encoder's features; write attention, heatmaps, a table and answers.

    `attention/<grid>/<node>` holds a tile's weight times the number of tiles, float32 (n,), so that 1 is what each
    would have if all weighed alike; its heatmap stands beside the others. Done again, nothing changes.

    Raises BundleError where the run's features are of another encoder, NanScore where a slide's answer is not finite.
    """
    card, net = load_mil(folder)
    run = read_run(storage.place(run_out), names or {})
    node = mil_node(folder, card)
    bags = _bags(run, card, Path(folder))
    with lease(run.out):
        margins = {bag.item.slide_id: _apply(net, bag, node) for bag in bags}
        without = tuple(item.slide_id for item in run.items if item.slide_id not in margins)
        model = Model(node, card.name, "classify", card.classes)
        scores = {name: _as_scores(rows) for name, rows in margins.items()}
        found = evaluate_slides(run, model, Tiles({}, scores), rule)
        table = run.out / "mil" / f"{node}.parquet"
        write_table(
            table,
            _columns(card),
            [_row(card, item, margins[item.slide_id]) for item in run.items if item.slide_id in margins],
        )
        storage.write_atomic(run.out / "mil" / f"{node}.json", storage.to_json({"schema": 1, **found.to_json()}))
    return MilApplied(node, table, margins, without, found)


def _bags(run: Run, card: MilCard, folder: Path) -> list[Bag]:
    try:
        return bags_of(run, card.encoder, card.node)[2]
    except ValueError as error:
        raise BundleError(
            f"{folder / CARD} reads features of {card.node}: {error.args[0]}",
            next_step=f"Score the slides with {card.encoder} as it was at training (same weights, same profile).",
        ) from error


def _apply(net: Mil, bag: Bag, node: str) -> Floats:
    """Return a slide's margins by class, float32 (K,); keep its attention."""
    store = SlideStore(bag.out, bag.item.slide_id)
    rows = [store.read(path) for path in bag.nodes]
    with torch.inference_mode():
        logits, attention = net(torch.from_numpy(np.concatenate(rows).astype(np.float32)))
    if not (torch.isfinite(logits).all() and torch.isfinite(attention).all()):  # before anything is committed
        raise NanScore(
            f"{node} gives {bag.item.slide_id} values that are not finite.",
            next_step="Look for features of this slide that are not finite (verify, then repair).",
        )
    ends = np.cumsum([len(one) for one in rows])[:-1]
    relative = (attention * len(attention)).numpy().astype(np.float32)
    for path, part in zip(bag.nodes, np.split(relative, ends), strict=True):
        grid = path.split("/")[1]
        if not store.committed(f"attention/{grid}/{node}"):
            store.write_array(f"attention/{grid}/{node}", part, {"unit": "weight times number of tiles"})
            store.commit(f"attention/{grid}/{node}")
        write_cells(store, grid, f"heatmaps/{grid}/attention-{node}", part[:, None])
    found: Floats = to_margins(logits[None], "classify")[0].numpy()
    return found


def _as_scores(margins: Floats) -> SlideScores:
    """A slide's margins where evaluation looks for those of its tiles."""
    row = tuple(float(value) for value in margins)
    none = (0,) * len(row)
    return SlideScores(1, row, row, row, none, none, 1)


def _columns(card: MilCard) -> Columns:
    probabilities: Columns = {f"prob_{name}": "float32" for name in card.classes}
    margins: Columns = {f"margin_{name}": "float32" for name in card.classes}
    return {"slide_id": "text", "patient_id": "text", "split": "text", "label": "text", **probabilities, **margins}


def _row(card: MilCard, item: Item, margins: Floats) -> dict[str, Any]:
    row = margins.astype(np.float64)
    values = {f"prob_{c}": float(1 / (1 + np.exp(-row[i]))) for i, c in enumerate(card.classes)}
    values |= {f"margin_{c}": float(row[i]) for i, c in enumerate(card.classes)}
    about = {"slide_id": item.slide_id, "patient_id": item.patient_id, "split": item.split, "label": item.label}
    return {**about, **values}
