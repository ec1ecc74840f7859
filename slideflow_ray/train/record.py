"""What a training leaves beside the weights: the record, a line for each epoch, curves, TensorBoard files."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray import storage
from slideflow_ray.packs import Pack
from slideflow_ray.specs import digest
from slideflow_ray.train.checkpoint import result_json
from slideflow_ray.train.loop import EpochResult, Trained
from slideflow_ray.train.tiles import LabelledChunk

RECORD, METRICS, CURVES = "training.json", "metrics.jsonl", "curves.png"
SOFTWARE = ("slideflow-ray", "torch", "torchvision", "timm", "numpy", "ray")


def versions() -> dict[str, str]:
    """Return the versions of what trained."""
    return {name: importlib.metadata.version(name) for name in SOFTWARE}


def data_record(chunks: Mapping[str, Sequence[LabelledChunk]], identities: Mapping[str, str]) -> dict[str, Any]:
    """Return which slides, patients and tiles each split has, and a digest of the tiles and how often they come."""
    found: dict[str, Any] = {"slides": {}, "patients": {}, "slide_ids": {}, "digest": {}}
    for split, several in chunks.items():
        items = {item.slide_id: item for c in several for item in c.items}
        found["slides"][split] = sorted(identities[name] for name in items)
        found["slide_ids"][split] = sorted(items)
        found["patients"][split] = sorted({getattr(item, "patient", name) for name, item in items.items()})
        found["digest"][split] = digest(
            [[_identity(c, identities), c.chunk.grid, c.chunk.index, _bytes(c)] for c in several]
        )
    return found


def _identity(c: LabelledChunk, identities: Mapping[str, str]) -> str:
    item = c.chunk.item
    return item.identity if isinstance(item, Pack) else identities[item.slide_id]


def _bytes(c: LabelledChunk) -> str:
    times = np.ones(len(c.labels)) if c.times is None else c.times
    return digest([c.labels.tolist(), times.tolist(), c.stain, *([c.masks] if c.masks else [])])


class Diary:
    """Writes down each epoch as it ends: metrics.jsonl, and TensorBoard's files below `folder`/tensorboard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: list[EpochResult] = []
        self._board: Any = None

    def begin(self, history: Sequence[EpochResult]) -> None:
        """Begin with the epochs of an earlier start, if any."""
        self._lines = list(history)
        self._write()

    def add(self, result: EpochResult) -> None:
        """Write down an epoch; one that is known already is written again."""
        self._lines = [*self._lines[: result.epoch], result]
        self._write()
        board = self._open(result.epoch)
        for name, value in scalars(result).items():
            board.add_scalar(name, value, result.epoch + 1)
        board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board:
            self._board.close()

    def _write(self) -> None:
        storage.write_atomic(self.folder / METRICS, metrics_jsonl(self._lines))

    def _open(self, epoch: int) -> Any:
        from tensorboardX import SummaryWriter

        if self._board is None:
            # What an interrupted start wrote of this epoch and later ones is not shown.
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch + 1 if epoch else None)
        return self._board


def metrics_jsonl(history: Sequence[EpochResult]) -> bytes:
    """Return a line of JSON for each epoch."""
    return "".join(json.dumps(result_json(result)) + "\n" for result in history).encode()


def scalars(result: EpochResult) -> dict[str, float]:
    """Return what TensorBoard draws of an epoch, by the names it groups by."""
    found = {"loss/train": result.train_loss, "accuracy/train": result.train_accuracy, "lr": result.lr}
    if result.seconds:
        found["tiles_per_second"] = result.tiles / result.seconds
    if result.val:
        found |= {"loss/val": result.val.loss, "accuracy/val": result.val.accuracy, "auc/val": result.val.auc}
        found |= {"dice/val": result.val.dice} if result.val.dice is not None else {}
    found |= {f"pretext/{name}": value for name, value in result.parts.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def training_record(trained: Trained, **more: Any) -> dict[str, Any]:
    """Return what training.json says: settings, data, versions and every epoch, but no times and no paths of a machine.

    Equal trainings give equal records.
    """
    epochs = [{k: v for k, v in result_json(r).items() if k != "seconds"} for r in trained.history]
    return {"schema": 1, **more, "software": versions(), "best_epoch": trained.best_epoch, "epochs": epochs}


def beside(trained: Trained, record: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that stand beside the weights in a bundle."""
    return {
        RECORD: storage.to_json(record),
        METRICS: metrics_jsonl(trained.history),
        CURVES: draw_curves(trained, record.get("leaking", "")),
    }


def draw_curves(trained: Trained, warning: str = "") -> bytes:
    """Return a PNG of loss and accuracy by epoch, training and validation, with the kept epoch marked.

    warning : what stands above in red.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    history = trained.history
    x = [result.epoch + 1 for result in history]
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(x, [getattr(r, f"train_{what}") for r in history], "o-", ms=3, color="#0072B2", label="training")
        if any(r.val for r in history):
            val = [getattr(r.val, what) if r.val else math.nan for r in history]
            axes.plot(x, val, "s-", ms=3, color="#D55E00", label="validation")
        if what == "accuracy" and any(r.val and r.val.dice is not None for r in history):
            dice = [r.val.dice if r.val and r.val.dice is not None else math.nan for r in history]
            axes.plot(x, dice, "^-", ms=3, color="#009E73", label="validation, mean Dice")
        axes.axvline(
            trained.best_epoch + 1, color="#777777", lw=1, ls=":", label=f"kept: epoch {trained.best_epoch + 1}"
        )
        axes.set(xlabel="epoch", ylabel={"loss": "loss per tile", "accuracy": "share of right tiles"}[what])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    if warning:
        figure.suptitle(warning, color="#B00020", fontsize=8, wrap=True)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, in place of what stood there, as a whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if out.exists():
            os.rename(out, scratch / "old")
        try:
            os.rename(new, out)
        except OSError:
            if (scratch / "old").exists():  # the scratch folder goes: what stood here comes back first
                os.rename(scratch / "old", out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
