"""Whole images as training data: rows of packs, made by the run that would score them, labelled by the cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideflow_ray.accounting import RunResult
from slideflow_ray.annotations import class_of, classes_of
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted
from slideflow_ray.label_files import NONE
from slideflow_ray.packs import Pack, pack_items
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.splits import with_splits, write_items
from slideflow_ray.stain import stain_name, stain_numbers
from slideflow_ray.train.enlarge import enlarge
from slideflow_ray.train.spec import TrainJob
from slideflow_ray.train.tiles import LabelledChunk, Labels

GRIDS = "grids/"

LEAKING = (
    "LEAKING split (paper): copies of one image and images of one patient lie on both sides. "
    "This is for reproduction only and says nothing about new patients."
)
"""What a training by image says wherever it is shown: in the record, on its curves, on the card, on the terminal."""


def labelled_images(
    job: TrainJob, context: Context, items: Sequence[Item], split: str, result: RunResult
) -> list[LabelledChunk]:
    """Return the chunks of the packs that hold `items`, with the labels of the images of one split.

    Images of other splits lie in the same packs and are unknown, -1, there. Raises ConfigError where a pack has no
    grid of the job's images.
    """
    packed = pack_items(Path(context.out), items)
    wanted = {item.slide_id for item in items if item.split == split}
    stains = stain_numbers(items)
    rows = context.store.rows(job.shape.tile_px)
    found = []
    for pack in packed.packs:
        grid = _grid_of(pack, result.packs)
        labels = image_labels(job, [row.item if row.item.slide_id in wanted else None for row in pack.rows])
        stain = stains[stain_name(pack.example.stain, pack.example.modality)]
        for start in range(0, len(labels), rows):
            part = labels[start : start + rows]
            chunk = Chunk(pack, grid, job.shape, start // rows, len(part), ())
            found.append(LabelledChunk(chunk, part, None, stain, start))
    return found


def _grid_of(pack: Pack, nodes: Mapping[str, Sequence[str]]) -> str:
    """A run without models lays one grid of whole images in each pack."""
    grids = [node.removeprefix(GRIDS) for node in nodes.get(pack.slide_id, ()) if node.startswith(GRIDS)]
    grids = [grid for grid in grids if "/" not in grid]
    if len(grids) != 1:
        raise ConfigError(f"{pack.slide_id} has {len(grids)} grids of whole images, not one; use another `work`.")
    return grids[0]


def image_labels(job: TrainJob, items: Sequence[Item | None]) -> Labels:
    """Return the labels of images by the cohort: int64 (n,) for classify, int8 (n, K) for multilabel; -1 unknown.

    To classify, a label must be one class; to multilabel, every class that it names is 1 and the others are 0.
    """
    labels = [(item.label if item else None) for item in items]
    if job.task == "multilabel":
        return np.array([_hot(job, label) for label in labels], np.int8).reshape(len(labels), len(job.classes))
    places = {name: i for i, name in enumerate(job.classes)}
    meant = [class_of(label, job.classes, job.labels.names) if label else None for label in labels]
    indices: npt.NDArray[np.int64] = np.array([-1 if name is None else places[name] for name in meant], np.int64)
    return indices


def _hot(job: TrainJob, label: str | None) -> list[int]:
    if label is None:
        return [-1] * len(job.classes)
    meant = classes_of(label, job.classes, job.labels.names)
    return [int(name in meant) for name in job.classes]


def left_out(job: TrainJob, items: Sequence[Item]) -> str:
    """Return what must be said of images that cannot be trained on because of their label; "" where there are none."""
    if job.task == "multilabel":
        return _passed_over(job, items)
    if job.task != "classify":
        return ""
    strange = [i.label or "" for i in items if i.label and class_of(i.label, job.classes, job.labels.names) is None]
    several = [label for label in strange if len(classes_of(label, job.classes, job.labels.names)) > 1]
    bare = sum(item.label is None for item in items)
    said = [f"{len(several)} of several classes ({', '.join(sorted(set(several)))})"] if several else []
    other = sorted(set(strange) - set(several))
    said += [f"{len(strange) - len(several)} whose label is no class ({', '.join(other[:5])})"] if other else []
    said += [f"{bare} without a label"] if bare else []
    if not said:
        return ""
    hint = ' task = "multilabel" takes images of several classes.' if several else ""
    return f"Left out of {len(items)} images: {'; '.join(said)}.{hint}"


def _passed_over(job: TrainJob, items: Sequence[Item]) -> str:
    """Return which parts of labels mean no class of a multilabel training, for a slip of the pen says "none" there."""
    odd = {
        part.strip()
        for item in items
        if item.label and class_of(item.label, job.classes, job.labels.names) is None
        for part in item.label.split("+")
        if part.strip() != NONE and class_of(part.strip(), job.classes, job.labels.names) is None
    }
    if not odd:
        return ""
    return f"Labels that name no class are passed over, as none of them: {', '.join(sorted(odd)[:10])}."


def leaks(job: TrainJob) -> bool:
    """Return whether the job splits by image, as source 001 did."""
    return job.split.mode == "paper"


def leaking_split(job: TrainJob, listen: Listener) -> list[Item]:
    """Return the cohort, enlarged first if it is to be, split by image as if each were a patient.

    It is written to `work` without patients, so that runs and evaluations take it.
    """
    listen(Noted(LEAKING))
    items = [item.model_copy(update={"split": None}) for item in read_cohort(job.cohort, check=False)]
    if job.sample.enlarge:
        items += more_images(job, items, listen)
    alone = [item.model_copy(update={"patient_id": None}) for item in items]
    done = with_splits(alone, **job.split.model_dump(exclude={"mode"}), classes=job.classes)
    write_split(job, done)
    return [item.model_copy(update={"patient_id": old.patient_id}) for item, old in zip(done, items, strict=True)]


def judged_cohort(job: TrainJob) -> Path:
    """Return the cohort whose test split a job's bundles are judged on: its own, or what `write_split` wrote."""
    if job.split.parts is None and job.split.folds is None:
        return Path(job.cohort)
    return Path(job.work) / ("LEAKING_split.csv" if leaks(job) else "split.csv")


def write_split(job: TrainJob, items: Sequence[Item]) -> Path:
    """Write the cohort with the job's own split to `work`, for those who score and judge its test split."""
    path = judged_cohort(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_items(path, items)
    return path


def more_images(job: TrainJob, items: Sequence[Item], listen: Listener) -> list[Item]:
    """Return the rows of the synthetic images beside `items`, which are written below `work`/enlarged."""
    if job.whole is None:
        return []
    found = enlarge(items, job.sample.enlarge, Path(job.work) / "enlarged", job.whole, job.fit.seed)
    listen(Noted(f"{len(found)} synthetic images beside {len(items)} (rotation, noise, mixup)"))
    return found
