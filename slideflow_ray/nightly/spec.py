"""nightly.toml: what to watch, what to score with, when to raise the alarm, what to keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from slideflow_ray.errors import ConfigError
from slideflow_ray.specs import (
    Fraction,
    Modality,
    Positive,
    RunSpec,
    Spec,
    folder_of,
    read_settings,
    relative_to,
    worked_off,
)
from slideflow_ray.website import check_address

RESULTS, REFERENCE, NIGHTS = "results", "reference", "nights"
"""Below a nightly's folder: the run of the cohort so far, that of the reference, a folder for each night."""


class ReferenceSpec(Spec):
    """The slides that new ones are compared with: those of `split` in `cohort`, scored by the bundles in service."""

    cohort: str
    split: str = "val"


class DriftSpec(Spec):
    """When what comes in differs too much from the reference.

    window : the latest so many slides are judged together; least : fewer than so many are not judged.
    psi : a population stability index above this, and above what chance alone gives at `alpha`, is drift.
    ks : a Kolmogorov-Smirnov distance above this, with a p value below `alpha` shared among the measures, is drift.
    """

    window: Annotated[int, Field(ge=1)] = 50
    least: Annotated[int, Field(ge=2)] = 4
    psi: Positive = 0.25
    ks: Fraction = 0.3
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01


class AlertSpec(Spec):
    """Where an alert goes besides the night's folder: a file that gets a line, a web address that gets a post."""

    file: str | None = None
    webhook: str | None = None

    @field_validator("webhook")
    @classmethod
    def _may_be_posted_to(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value


class KeepSpec(Spec):
    """What stays: folders of the latest `nights` (0: all), and scores that a later bundle or file has `superseded`."""

    nights: Annotated[int, Field(ge=0)] = 0
    superseded: bool = True


class NightlySpec(Spec):
    """Everything a nightly job is told.

    run : how slides are scored; cohort and out in it are not used.
    watch : folders, or s3:// and gs:// prefixes, in which slides appear. cohort : a cohort.csv that may grow; its
    rows say more of slides than their files do. patient_pattern : as in `slideflow-ray cohort`. modality : of the
    slides that no row names.
    may_empty : whether a watched place may lose all its slides at once, as it seems to when it is not mounted.
    settle_s : a file that changed less than so long ago is still being copied, and left for another night.
    rescore : slides that an earlier bundle has scored are scored again, at most so many a night; None is all of them.
    """

    out: str
    run: RunSpec
    watch: tuple[str, ...] = ()
    cohort: str | None = None
    patient_pattern: str | None = None
    modality: Modality = "he"
    may_empty: bool = False
    settle_s: Annotated[float, Field(ge=0)] = 600.0
    rescore: Annotated[int, Field(ge=0)] | None = None
    reference: ReferenceSpec | None = None
    drift: DriftSpec = DriftSpec()
    alert: AlertSpec = AlertSpec()
    keep: KeepSpec = KeepSpec()

    @model_validator(mode="after")
    def _something_to_watch(self) -> Self:
        if not self.watch and self.cohort is None:
            raise ValueError("name a folder in `watch`, or a `cohort`")
        if not self.run.model:
            raise ValueError("name at least one [[model]]")
        return self


def parse_nightly(values: Mapping[str, Any], where: str) -> NightlySpec:
    """Return the settings of a nightly job; those of the run stand beside its own. Raises ConfigError.

    Tiles are not kept unless the settings say so: lossless pixels cost several times the slides.
    """
    mine = {key: value for key, value in values.items() if key not in RunSpec.model_fields or key in ("out", "cohort")}
    shared = {key: value for key, value in values.items() if key not in mine}
    store = shared.get("store", {})
    if isinstance(store, Mapping):
        shared["store"] = {"tiles": "none", **store}
    run = {"cohort": str(mine.get("cohort") or ""), "out": str(mine.get("out") or ""), **shared}
    if "run" in mine:
        raise ConfigError(f"{where}: the run's settings stand at the top, not below [run].")
    return NightlySpec.parse({**mine, "run": RunSpec.parse(run, where)}, where)


def load_nightly(path: Path, executor: str | None = None, *, default: str = "inline") -> NightlySpec:
    """Read nightly.toml; relative paths in it are relative to the file. Raises ConfigError.

    executor, default : what works the night off, as `specs.worked_off` says.
    """
    spec = parse_nightly(_placed(read_settings(path), folder_of(path)), str(path))
    return spec.model_copy(update={"run": worked_off(spec.run, executor, default=default)})


def _placed(values: dict[str, Any], here: str) -> dict[str, Any]:
    tables = [(values, ("cohort", "out")), (values.get("reference"), ("cohort",)), (values.get("alert"), ("file",))]
    models = values.get("model")
    tables += [(model, ("path",)) for model in (models if isinstance(models, list) else [])]
    for table, keys in tables:
        for key in keys:
            if isinstance(table, dict) and isinstance(table.get(key), str):
                table[key] = relative_to(here, table[key])
    watch = values.get("watch")
    if isinstance(watch, str):
        watch = [watch]
    if isinstance(watch, list):
        values["watch"] = [relative_to(here, uri) if isinstance(uri, str) else uri for uri in watch]
    return values
