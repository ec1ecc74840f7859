"""What is sent to a cluster: a job script, its settings, a cohort, small bundles. Slides are never sent.

The parcel is made of what is named, so whatever else lies beside it (slides, stores, .git, virtual
environments) cannot get into it. A relative path is of this machine, and what it names is sent along; an absolute path
or a uri is the cluster's. A cohort.csv that exists here is sent either way.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slideflow_ray import storage
from slideflow_ray.cohort import COLUMNS, FILES, Item, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.models.bundle import CARD, WEIGHTS, read_card
from slideflow_ray.models.service import in_service
from slideflow_ray.nightly.spec import parse_nightly
from slideflow_ray.specs import RunSpec, digest, folder_of, relative_to
from slideflow_ray.texts import read_toml, safe_row

SETTINGS, COHORT, TOLD, PROBE = "settings.toml", "cohort.csv", "job.json", "probe.py"
"""Names in the parcel; the last two are the job's first step and what it is told."""
SAMPLE = 20
"""So many uris are tried on the cluster before a job begins."""
KEPT = (".json", ".jsonl", ".md", ".txt")
"""Files of a bundle that go along beside its weights."""
"""Columns of the cohort that name files."""


@dataclass(frozen=True)
class Kind:
    """A job: its script, whether it is told by a settings file, and whether it ever counts as finished for good."""

    script: str
    settings: bool = True
    repeats: bool = False
    report: bool = False


KINDS = {
    "score": Kind("score.py", report=True),
    "tile": Kind("tile.py"),
    "evaluate": Kind("evaluate.py", settings=False, report=True),
    "nightly": Kind("nightly.py", repeats=True),
    "retrain": Kind("retrain.py"),
    "pretrain": Kind("pretrain.py"),
}


@dataclass(frozen=True)
class Parcel:
    """A job as it is sent. `files` are by their names in the parcel; `told` is what the first step must know."""

    kind: str
    arguments: tuple[str, ...]
    out: str
    files: Mapping[str, bytes | Path]
    told: Mapping[str, Any]

    @property
    def script(self) -> str:
        """The script's name in the parcel."""
        return f"jobs/{KINDS[self.kind].script}"

    @property
    def size(self) -> int:
        """Bytes, before they are packed."""
        return sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in self.files.values())

    @property
    def submission_id(self) -> str:
        """The name under which the cluster knows the job: of what it does, where to, and this package's version."""
        content = {name: _sha256(data) for name, data in self.files.items() if name != PROBE}
        return f"sfr-{self.kind}-{digest([version(), self.kind, self.arguments, self.out, content])}"

    def unpack(self, folder: Path, *, check: bool = True, any_version: bool = False) -> None:
        """Write the parcel to a folder; `check`, `any_version`: what the first step looks at, and minds."""
        told = {**self.told, "check": check, "any_version": any_version}
        for name, data in {**self.files, TOLD: json.dumps(told, indent=1).encode()}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if isinstance(data, bytes) else data.read_bytes())


def version() -> str:
    """Return this package's version."""
    return importlib.metadata.version("slideflow-ray")


def _sha256(data: bytes | Path) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Places:
    """Where relative output folders, and what lies beside the cohort here, lie on the cluster's side; see `Profile`."""

    out: str | None = None
    slides: str | None = None


NOWHERE = Places()


@dataclass
class Packing:
    """A parcel in the making; `here` is what relative paths are relative to.

    named : what the user calls the settings. mark : the folder in which the cluster tries to write, where that is not
    `out`.
    """

    here: str
    places: Places = NOWHERE
    named: str = "arguments"
    out: str = ""
    mark: str = ""
    files: dict[str, bytes | Path] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    cohorts: list[str] = field(default_factory=list)
    uris: list[str] = field(default_factory=list)
    slides_known: int = 0

    def target(self, path: str, what: str = "out") -> str:
        """Return a place on the cluster's side for results. Raises ConfigError for one that is not said."""
        if "://" in path:
            storage.scheme_of(path)
            return path.rstrip("/")
        if Path(path).is_absolute():
            return path
        if self.places.out is None:
            raise ConfigError(
                f"{what} = {path!r} is relative, and the cluster has no such place.",
                next_step="Give a path that every node sees, or s3://...; or set `out` in the profile.",
            )
        return relative_to(self.places.out, path)

    def cohort(self, path: str, name: str = COHORT) -> str:
        """Return where a cohort will be: sent along if it exists here. Raises CohortError, ConfigError."""
        local = relative_to(self.here, path)
        if "://" in local or (not Path(local).exists() and Path(path).is_absolute()):
            self.cohorts.append(local)
            return local
        items = [self._moved(item, folder_of(local)) for item in read_cohort(local)]
        self.files[name] = _csv(items)
        named = [value for item in items for column in FILES if (value := getattr(item, column))]
        self.slides_known += len(items)
        self.uris += named[:: -(-len(named) // SAMPLE)][:SAMPLE]
        return name

    def _moved(self, item: Item, folder: str) -> Item:
        """The item with what lies below the cohort's folder here as it lies on the cluster's side."""
        if self.places.slides is None:
            return item
        values = {column: getattr(item, column) for column in FILES}
        below = f"{folder.rstrip('/')}/"
        moved = {
            column: f"{self.places.slides.rstrip('/')}/{value.removeprefix(below)}"
            for column, value in values.items()
            if value and value.startswith(below)
        }
        return item.model_copy(update=moved)

    def bundle(self, path: str) -> str:
        """Return where a bundle will be: one by a relative path is sent along, into `out`. Raises BundleError."""
        if "://" in path or Path(path).is_absolute():
            self.read.append(path)
            return path
        folder = Path(str(in_service(relative_to(self.here, path))[0]))
        card = read_card(folder)
        found = {file.name: file for file in sorted(folder.iterdir()) if _belongs(file)}
        name = f"{card.name}-{digest({name: _sha256(file) for name, file in found.items()})}"
        self.files |= {f"bundles/{name}/{file}": path for file, path in found.items()}
        self.copies.append((f"bundles/{name}", f"{self.out}/bundles/{name}"))
        return self.copies[-1][1]

    def there(self, path: str, what: str) -> str:
        """Return a file or folder that must be on the cluster's side already. Raises ConfigError."""
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{what} = {path!r} is relative, and the cluster has no such place.",
                next_step="Give its path as the cluster's nodes see it, or s3://...",
            )
        self.read.append(path)
        return path

    def told(self, kind: str) -> dict[str, Any]:
        """Return what the first step must know."""
        return {
            "out": self.out,
            "mark": self.mark or self.out,
            "read": list(dict.fromkeys(self.read)),
            "cohorts": self.cohorts,
            "uris": list(dict.fromkeys(self.uris)),
            "of": self.slides_known,
            "copies": self.copies,
            "report": KINDS[kind].report,
            "package": version(),
            "python": platform.python_version(),
        }


def _belongs(file: Path) -> bool:
    return file.is_file() and (file.name in (CARD, WEIGHTS) or (file.suffix in KEPT and not file.name.startswith(".")))


def _csv(items: Sequence[Item]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [item.written() for item in items]
    used = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    writer.writerow(used)
    writer.writerows(safe_row(row.get(column) for column in used) for row in rows)
    return text.getvalue().encode()


# settings, placed for the cluster


def _placed_run(values: dict[str, Any], pack: Packing) -> None:
    _need(values, pack, "out", "cohort")
    pack.out = values["out"] = pack.target(values["out"])
    _place_models(values, pack)
    RunSpec.parse(values, pack.named)
    values["cohort"] = pack.cohort(values["cohort"])


def _placed_nightly(values: dict[str, Any], pack: Packing) -> None:
    _need(values, pack, "out")
    pack.out = values["out"] = pack.target(values["out"])
    _place_models(values, pack)
    if isinstance(values.get("watch"), str):
        values["watch"] = [values["watch"]]
    parse_nightly(values, pack.named)
    if values.get("cohort"):  # it may grow, so a copy would be of today
        values["cohort"] = pack.there(values["cohort"], "cohort")
    values["watch"] = [pack.there(uri, "watch") for uri in values.get("watch") or ()]
    if values.get("reference"):
        values["reference"]["cohort"] = pack.cohort(values["reference"]["cohort"], "reference.csv")
    if (values.get("alert") or {}).get("file"):
        values["alert"]["file"] = pack.target(values["alert"]["file"], "alert.file")


def _placed_train(values: dict[str, Any], pack: Packing) -> None:
    from slideflow_ray.train.spec import IMAGENET, RANDOM, read_job

    _need(values, pack, "out", "cohort")
    read_job({"work": values["out"], **values}, pack.named)
    pack.out = values["out"] = pack.target(values["out"])
    pack.mark = values["work"] = pack.target(values.get("work", f"{pack.out}.work"), "work")  # `out` must not exist
    fit, crew = values.get("fit") or {}, values.get("crew") or {}
    if fit.get("weights", RANDOM) not in (RANDOM, IMAGENET):
        fit["weights"] = pack.there(fit["weights"], "fit.weights")
    if crew.get("storage"):
        crew["storage"] = pack.target(crew["storage"], "crew.storage")
    if mine := (values.get("sample") or {}).get("mine"):
        mine["run"] = pack.there(mine["run"], "sample.mine.run")
    values["cohort"] = pack.cohort(values["cohort"])


def _placed_pretraining(values: dict[str, Any], pack: Packing) -> None:
    from slideflow_ray.train.spec import as_pretraining

    values |= as_pretraining(values)
    _placed_train(values, pack)


PLACED: dict[str, Callable[[dict[str, Any], Packing], None]] = {
    "score": _placed_run,
    "tile": _placed_run,
    "nightly": _placed_nightly,
    "retrain": _placed_train,
    "pretrain": _placed_pretraining,
}


def _need(values: Mapping[str, Any], pack: Packing, *keys: str) -> None:
    if bad := [key for key in keys if not isinstance(values.get(key), str) or not values[key]]:
        raise ConfigError(f"{pack.named}: {', '.join(bad)} must be said (text).")


def _place_models(values: dict[str, Any], pack: Packing) -> None:
    models = values.get("model", [])
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("path"), str) for m in models):
        raise ConfigError("Write [[model]], with two brackets each side, and its path.")
    for model in models:
        model["path"] = pack.bundle(model["path"])


def to_toml(values: Mapping[str, Any]) -> str:
    """Return settings as TOML, tables within one line.

    >>> print(to_toml({"out": "/data/out", "model": [{"path": "b", "where": {"stain": "PAS"}}]}), end="")
    "out" = "/data/out"
    "model" = [{"path" = "b", "where" = {"stain" = "PAS"}}]
    """
    return "".join(f"{_quoted(key)} = {_toml(value)}\n" for key, value in values.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_quoted(key)} = {_toml(below)}" for key, below in value.items() if below is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(below) for below in value) + "]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else str(value)  # what is left of TOML: dates and times


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for this


# parcels


def jobs_folder() -> Path:
    """Return the folder of the job scripts: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "jobs"
    return inside if inside.is_dir() else package.parent / "jobs"


def pack_settings(
    kind: str, source: str | Mapping[str, Any], arguments: Sequence[str] = (), places: Places = NOWHERE
) -> Parcel:
    """Return the parcel of a job that is told by a settings file, or by the values that would stand in one.

    Relative paths in a file are relative to it, others to the current folder.

    Raises ConfigError and its like for what could not work.
    """
    if isinstance(source, str):
        values, pack = _settings(Path(source)), Packing(folder_of(source), places, source)
    else:
        values, pack = {**source}, Packing(str(Path.cwd()), places)
    PLACED[kind](values, pack)
    pack.files[SETTINGS] = to_toml(values).encode()
    return _parcel(kind, (SETTINGS, *arguments), pack)


def pack_arguments(kind: str, out: str, arguments: Sequence[str] = (), places: Places = NOWHERE) -> Parcel:
    """Return the parcel of a job that is told an output folder and arguments. Raises ConfigError."""
    pack = Packing(str(Path.cwd()), places)
    pack.out = pack.target(out)
    return _parcel(kind, (pack.out, *arguments), pack)


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {path}.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _parcel(kind: str, arguments: tuple[str, ...], pack: Packing) -> Parcel:
    scripts = {f"jobs/{KINDS[kind].script}": jobs_folder() / KINDS[kind].script, PROBE: Path(__file__).parent / PROBE}
    return Parcel(kind, arguments, pack.out, {**pack.files, **scripts}, pack.told(kind))
