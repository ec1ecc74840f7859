"""The demo: the functions that a user calls, one after the other, on phantom slides."""

from __future__ import annotations

from pathlib import Path

from slideflow_ray.events import Listener
from slideflow_ray.progress import to_stderr
from slideflow_ray.results import Evaluation, with_interval
from slideflow_ray.specs import RunSpec

SLIDES = 18
TILE_PX, MPP = 64, 1.0
MIN_TISSUE = 0.5  # mostly glass is mostly normal: colour would tell it
EPOCHS = 6


def demo(out: Path, executor: str = "ray", seed: int = 0, listen: Listener | None = None) -> str:
    """Make a cohort, train, score, evaluate and report below `out`; return what to tell the user.

    The slides are phantoms: generated pictures, so the figures say that the path works
    and nothing about tissue.
    """
    from slideflow_ray.evaluate import evaluate
    from slideflow_ray.phantoms import write_cohort
    from slideflow_ray.report import write_report
    from slideflow_ray.run import run
    from slideflow_ray.train.job import TrainJob, train

    listen = listen or to_stderr()
    cohort = write_cohort(out / "cohort", slides=SLIDES, seed=seed)
    values = {
        "cohort": str(cohort),
        "out": str(out / "models" / "phantom-tumor"),
        "work": str(out / "train"),
        "classes": ("normal", "tumor"),
        "tile": {"tile_px": TILE_PX, "mpp": MPP, "min_tissue": MIN_TISSUE},
        "overwrite": True,  # the demo's own folder, made anew each time
        "labels": {"rule": "fraction", "fraction": 0.75},  # of tiles at a border, most belong to neither side
        "fit": {"architecture": "small-cnn", "epochs": EPOCHS, "seed": seed},
    }
    trained = train(TrainJob.parse(values, "demo"), listen=listen)
    spec = {
        "cohort": str(cohort),
        "out": str(out / "run"),
        "model": [{"path": str(trained.bundle)}],
        "min_tissue": MIN_TISSUE,
        "executor": {"kind": executor},
    }
    result = run(RunSpec.parse(spec, "demo"), listen=listen)
    found = evaluate(out / "run")
    page = write_report(out / "run")
    counts = ", ".join(f"{status} {n}" for status, n in result.counts.items())
    return "\n".join([*_answer(found), counts, f"Report: {page}"])


def _answer(found: Evaluation) -> list[str]:
    """The headline in two lines, or why there is none."""
    head = found.headline(found.results[0].model) if found.results else None
    if head is None:
        return [found.summary()]
    auc = with_interval(head.auc, head.auc_interval)
    sensitivity = with_interval(head.rates["sensitivity"], head.sensitivity_interval)
    specificity = with_interval(head.rates["specificity"], head.specificity_interval)
    return [
        f"test AUC {auc} by {head.level}, {head.patients} patients (phantoms: this shows the path, not medicine)",
        f"sensitivity {sensitivity}, specificity {specificity} at the operating point frozen on validation",
    ]
