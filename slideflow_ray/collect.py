"""A folder of slides -> cohort.csv: every slide once, patients by a pattern, duplicates and gaps named.

Nothing is left out in silence: each file below the folder is part of a slide, is listed
as one that cannot be opened, or is counted as no slide.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

from slideflow_ray import storage
from slideflow_ray.errors import BadMpp, ConfigError, NoMpp, SlideError
from slideflow_ray.identity import identity
from slideflow_ray.label_files import NONE, Labels, label_of
from slideflow_ray.slides import is_dicom, is_zarr, open_slide
from slideflow_ray.specs import Modality, parts_of
from slideflow_ray.splits import Holding, split_of
from slideflow_ray.texts import safe_cell

SUFFIXES: Final = frozenset(
    (".svs", ".tif", ".tiff", ".btf", ".tf8", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi")
) | {".dcm", ".png", ".jpg", ".jpeg", ".zip", ".zarr", ".dm3", ".dm4", ".mrc"}
"""What a slide's name ends in; other files are opened only if they begin as DICOM does."""

INNER: Final = re.compile(r"(?i)(?:\.ome)?(?:\.zarr)?\.(?:zip|zarr|tiff?|[a-z0-9]{2,7})$")
EXPECTED_COLUMNS: Final = ("slide_id", "uri", "file", "filename", "path", "name")
ID_LENGTH: Final = 200
SHOWN: Final = 10
COLUMNS: Final = ("slide_id", "uri", "patient_id", "split", "mpp", "modality")


@dataclass(frozen=True)
class Found:
    """A slide: `name` is its path below the folder; `scale` is why the file's own scale cannot be used.

    label : its classes by a label file, joined by "+", "" for none of them; None where it does not name the slide.
    """

    slide_id: str
    path: Path
    name: str
    patient: str | None
    identity: str
    scale: str = ""
    split: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Collected:
    """What stands below a folder, and how it compares with what should.

    files : all of them; they are `slide_files` + `unreadable` + `others`.
    expected : names of the manifest; they are `present` + `missing` + those that are unreadable.
    blank : slides whose row of a label file has no class where each should have one.
    """

    slides: tuple[Found, ...]
    files: int
    slide_files: int
    others: int
    unreadable: Mapping[str, str] = field(default_factory=dict)
    same_name: tuple[tuple[str, ...], ...] = ()
    same_bytes: tuple[tuple[str, ...], ...] = ()
    expected: int = 0
    present: int = 0
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and everything that looks like a slide is one."""
        return not self.missing and not self.unreadable

    def summary(self) -> dict[str, Any]:
        """Return the counts and lists as plain values."""
        return {
            "slides": len(self.slides),
            "files": self.files,
            "slide_files": self.slide_files,
            "others": self.others,
            "patients": len({s.patient for s in self.slides if s.patient}),
            "without_patient": [s.name for s in self.slides if not s.patient],
            "without_scale": {s.name: s.scale for s in self.slides if s.scale},
            "unreadable": dict(self.unreadable),
            "same_name": [list(names) for names in self.same_name],
            "same_bytes": [list(names) for names in self.same_bytes],
            "expected": self.expected,
            "present": self.present,
            "missing": list(self.missing),
            "extra": list(self.extra),
            "blank": list(self.blank),
            "labels": dict(Counter(s.label for s in self.slides if s.label is not None)),
            "splits": dict(Counter(s.split for s in self.slides if s.split)),
        }


def collect(
    folder: Path,
    *,
    pattern: str | None = None,
    expect: Path | None = None,
    split: str | None = None,
    seed: int = 0,
    modality: str | None = None,
) -> Collected:
    """Look at every file below `folder` and return the slides among them.

    pattern : regular expression searched in the path below the folder; the patient is
        its group `patient`, else its first group, else the whole match.
    expect : a CSV of what should be there, in its column slide_id, uri, file, filename,
        path or name (or the only one): a path, file name or stem of a slide.
    split : parts for train, val and test, as 6:2:2 or 70/15/15; by patient, drawn by `seed`.

    Files of the same bytes go into the same split. Raises ConfigError.
    """
    if storage.is_remote(folder):
        raise ConfigError(f"{folder} lies in an object store, which is not searched.", next_step="List it yourself.")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder.")
    if modality is not None and modality not in get_args(Modality):
        raise ConfigError(f"--modality {modality!r} is none of {', '.join(get_args(Modality))}.")
    search = _compiled(pattern)
    if split is not None:
        parts_of(split)
    wanted = read_expected(expect) if expect else ()
    there = tuple(places(folder))
    opened = {path: _scale_of(path, modality) for path, _ in there if path is not None}
    good = [(path, n) for path, n in there if path is not None and opened[path][0]]
    slides = _found(folder, [path for path, _ in good], {p: scale for p, (_, scale) in opened.items()}, search)
    if split is not None and slides:
        slides = split_by_patient(slides, split, seed)
    unreadable = {_name(folder, path): why for path, (fine, why) in opened.items() if not fine}
    bad = sum(n for path, n in there if path is not None and not opened[path][0])
    total = sum(n for _, n in there)
    slide_files = sum(n for _, n in good)
    present, missing, extra = reconcile(wanted, slides, unreadable) if expect else (0, (), ())
    return Collected(
        slides=slides,
        files=total,
        slide_files=slide_files,
        others=total - slide_files - bad,
        unreadable=unreadable,
        same_name=_repeated((_stem(s.path.name).casefold(), s.name) for s in slides),
        same_bytes=_repeated((s.identity, s.name) for s in slides),
        expected=len(wanted),
        present=present,
        missing=missing,
        extra=extra,
    )


# what is there


def places(folder: Path) -> Iterator[tuple[Path | None, int]]:
    """Yield (slide or what looks like one, number of its files), or (None, number of other files)."""
    for root, dirs, names in os.walk(folder):
        here = Path(root)
        files = [here / name for name in sorted(names)]
        dirs.sort()
        stores = [name for name in dirs if is_zarr(here / name)]
        parts = {path.stem: path for path in files if path.suffix.lower() == ".mrxs"}
        yield from ((here / name, 1) for name in dirs if (here / name).is_symlink() and name not in stores)
        for name in [name for name in dirs if name in stores or name in parts]:
            dirs.remove(name)
            if name in stores:
                yield here / name, _count(here / name)
        dicom = [path for path in files if _begins_as_dicom(path)]
        yield from _of_series(here, dicom, alone=len(dicom) == len([f for f in files if not f.name.startswith(".")]))
        listed = _listed_by_vms(files)
        for path in files:
            odd = path.exists() and not path.is_file()  # a pipe or a socket, on which opening would wait
            if odd or path in listed or path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                yield from () if path in dicom else [(None, 1)]
            elif path not in dicom:
                yield path, 1 + (_count(here / path.stem) if path in parts.values() else 0)


def _count(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def _begins_as_dicom(path: Path) -> bool:
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return False


def _of_series(folder: Path, files: list[Path], *, alone: bool) -> Iterator[tuple[Path, int]]:
    """Yield each DICOM series once: the folder where it holds nothing else, else the series' largest file."""
    if not files:
        return
    from slideflow_ray.slides.openslide import dicom_series

    series = dicom_series(files)
    known = {path for paths in series.values() for path in paths}
    for paths in sorted(series.values()):
        yield (folder if alone and len(series) == 1 and len(known) == len(files) > 1 else paths[0]), len(paths)
    yield from ((path, 1) for path in files if path not in known)


def _listed_by_vms(files: list[Path]) -> set[Path]:
    """Return the images that a Hamamatsu VMS index beside them names: parts of its slide, no slides of their own."""
    text = "\n".join(path.read_text(errors="replace") for path in files if path.suffix.lower() in (".vms", ".vmu"))
    return {path for path in files if text and f"={path.name}" in text}


def _scale_of(path: Path, modality: str | None) -> tuple[bool, str]:
    """Return (True, why the file's own scale cannot be used or ""), or (False, why the file cannot be opened)."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False, "E_NOT_A_SLIDE: Its name is not UTF-8, so cohort.csv cannot hold it; rename it."
    try:
        open_slide(str(path), modality=modality).close()
    except (NoMpp, BadMpp) as error:
        return True, f"{error.code}: {error.message}"
    except SlideError as error:
        return False, f"{error.code}: {error.message}"
    except OSError as error:
        return False, f"E_READ: {error}."
    return True, ""


def _found(
    folder: Path, paths: Sequence[Path], scales: Mapping[Path, str], search: re.Pattern[str] | None
) -> tuple[Found, ...]:
    paths = sorted(paths)
    ids = slide_ids([_name(folder, path) for path in paths])
    sizes = Counter(_size(path) for path in paths)
    return tuple(
        Found(
            slide_id=slide_id,
            path=path,
            name=_name(folder, path),
            patient=_patient(search, _name(folder, path)),
            identity=identity(str(path)) if sizes[_size(path)] > 1 else f"alone: {slide_id}",
            scale=scales[path],
        )
        for slide_id, path in zip(ids, paths, strict=True)
    )


def _name(folder: Path, path: Path) -> str:
    name = path.relative_to(folder).as_posix()
    return folder.name if name == "." else name.encode(errors="replace").decode()


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _stem(name: str) -> str:
    return INNER.sub("", name) or name


def slide_ids(names: Sequence[str]) -> list[str]:
    """Return a slide_id for each path: the stem, else as much more as makes it unique, upper and lower case alike.

    >>> slide_ids(["a/x.ome.tif", "b/y 1.svs", "c/y 1.svs", "c/z.svs", "c/z.tif"])
    ['x', 'b_y 1', 'c_y 1', 'z.svs', 'z.tif']
    """
    stems = [_stem(name.rpartition("/")[2]) for name in names]
    choices = [
        [stem, _stem(name).replace("/", "_"), name.rpartition("/")[2], name.replace("/", "_")]
        for stem, name in zip(stems, names, strict=True)
    ]
    ids = [""] * len(names)
    for rank in range(4):
        tried = [_clean(options[rank]) for options in choices]
        often = Counter(value.casefold() for value in tried)
        taken = {value.casefold() for value in ids if value}
        for i, value in enumerate(tried):
            if not ids[i] and often[value.casefold()] == 1 and value.casefold() not in taken:
                ids[i] = value
    return [value or f"{_clean(name)[:100]}-{_short(name)}" for value, name in zip(ids, names, strict=True)]


def _clean(text: str) -> str:
    """Return a printable text of at most ID_LENGTH characters that neither begins nor ends with a space."""
    text = "".join(c if c.isprintable() else "_" for c in text).strip() or "slide"
    return text if len(text) <= ID_LENGTH else f"{text[: ID_LENGTH - 13].strip()}-{_short(text)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def _repeated(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, name in pairs:
        groups[key].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


# patients and splits


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"--patient-pattern {pattern!r} is not a regular expression: {error}.") from error


def patient_of(pattern: str | None, name: str) -> str | None:
    """Return the patient that a pattern finds in a path, as `collect` does, or None. Raises ConfigError."""
    return _patient(_compiled(pattern), name)


def _patient(search: re.Pattern[str] | None, name: str) -> str | None:
    match = search.search(name) if search else None
    if match is None or search is None:
        return None
    if "patient" in search.groupindex:
        return match["patient"] or None
    return match[1 if search.groups else 0] or None


def split_by_patient(slides: Sequence[Found], parts: str, seed: int) -> tuple[Found, ...]:
    """Return the slides with a split each, as `splits.split_of` deals them out; a folder knows no labels.

    Slides of one patient, and slides of the same bytes, are never parted.
    """
    held = [Holding(s.slide_id, s.patient, s.identity) for s in slides]
    split = split_of(held, parts=parts, seed=seed, stratify="none")
    return tuple(replace(s, split=split[s.slide_id]) for s in slides)


# what should be there


def read_expected(path: Path) -> tuple[str, ...]:
    """Return the names that a manifest lists. Raises ConfigError: no such file, no column to take, a name twice."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no manifest {path}.") from error
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a UTF-8 CSV file: {error}.") from error
    columns = [name for name in rows[0] if name] if rows else []
    column = next((name for name in EXPECTED_COLUMNS if name in columns), columns[0] if len(columns) == 1 else None)
    if column is None:
        raise ConfigError(f"{path} has none of the columns {', '.join(EXPECTED_COLUMNS)}, or no rows.")
    names = [str(row[column] or "").strip() for row in rows]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ConfigError(f"{path} names {twice[0]!r} twice.")
    return tuple(names)


def reconcile(
    wanted: Sequence[str], slides: Sequence[Found], unreadable: Mapping[str, str]
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Return how many `wanted` names are there, those that are missing, and the slides that nobody asked for.

    A name is a path (its end, in whole parts), a file name, a stem or a slide_id. What
    is there but cannot be opened is neither present nor missing.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    for slide in slides:
        for key in {*_ends(slide.name), slide.slide_id}:
            by_key[key].append(slide.name)
    broken = {key for name in unreadable for key in _ends(name)}
    met: set[str] = set()
    present, missing = 0, []
    for name in wanted:
        keys = _ends(name)
        hits = next((by_key[key] for key in keys if key in by_key), [])
        met.update(hits)
        present += bool(hits)
        if not hits and not broken & set(keys):
            missing.append(name)
    return present, tuple(missing), tuple(s.name for s in slides if s.name not in met)


def _ends(name: str) -> list[str]:
    """Return what a path may be called, the most exact first: the path, its ends, the file name, the stem."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    ends = ["/".join(parts[i:]) for i in range(len(parts))]
    return [*ends, *(_stem(end) for end in ends[-1:])] or [name]


def describe(found: Collected) -> Iterator[str]:
    """Yield what a person should know about a collection, a line each; the first SHOWN of a kind."""
    yield (
        f"{found.files} files: {found.slide_files} of {len(found.slides)} slides, "
        f"{found.files - found.slide_files - found.others} of slides that cannot be opened, {found.others} others"
    )
    if found.expected:
        unreadable = found.expected - found.present - len(found.missing)
        yield (
            f"{found.expected} expected: {found.present} present, {len(found.missing)} missing, "
            f"{unreadable} that cannot be opened; {len(found.extra)} not expected"
        )
    some, labelled = any(s.patient for s in found.slides), any(s.label is not None for s in found.slides)
    kinds: dict[str, list[str]] = {
        "missing": list(found.missing),
        "cannot be opened": [f"{name}: {why}" for name, why in found.unreadable.items()],
        "for models of tiles, not for those of whole images, needs a value in the column mpp": [
            f"{s.name}: {s.scale}" for s in found.slides if s.scale
        ],
        "same name": [", ".join(names) for names in found.same_name],
        "same bytes": [", ".join(names) for names in found.same_bytes],
        "no patient in its path": [s.name for s in found.slides if some and not s.patient],
        "not expected": list(found.extra),
        "a label of zeros alone, taken for none at all (`none` in the column label would be a judgement)": list(
            found.blank
        ),
        "no label": [s.name for s in found.slides if s.label is None and s.name not in found.blank] if labelled else [],
    }
    for kind, lines in kinds.items():
        yield from (f"{kind}: {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"{kind}: and {len(lines) - SHOWN} more (--json names them all)"


# labels


def with_labels(found: Collected, labels: Labels) -> Collected:
    """Return the slides with the labels of a file, which may name a slide by its path, file name or stem.

    Zeros for every class are the label "none" where the file names several classes of some image; else no label.
    Raises ConfigError with lines for images that are not there, or are named twice, or not clearly.
    """
    by_end: dict[str, list[str]] = defaultdict(list)
    for slide in found.slides:
        for end in _ends(slide.name):
            by_end[end].append(slide.name)
    line_of: dict[str, int] = {}
    label: dict[str, str] = {}
    lost, blank = [], []
    for image, classes in labels.of.items():
        hits = next((by_end[end] for end in _ends(image) if end in by_end), [])
        where = f"{labels.path}, line {labels.lines[image]}"
        if len(hits) > 1:
            raise ConfigError(f"{where}: {image!r} may be {' or '.join(hits[:SHOWN])}; write the path.")
        if hits and hits[0] in line_of:
            raise ConfigError(f"{where}: {image!r} is the image of line {line_of[hits[0]]} again.")
        if hits:
            line_of[hits[0]] = labels.lines[image]
            if classes or labels.several:
                label[hits[0]] = label_of(classes) if classes else NONE
            else:
                blank.append(hits[0])
        else:
            lost.append(f"line {labels.lines[image]}: {image}")
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise ConfigError(
            f"{labels.path} names {len(lost)} images that are not there or cannot be opened: "
            f"{'; '.join(lost[:SHOWN])}{more}.",
            next_step="Name the folder that holds all of them, or take their rows out.",
        )
    slides = tuple(replace(s, label=label.get(s.name)) for s in found.slides)
    return replace(found, slides=slides, blank=tuple(blank))


# cohort.csv


def check_out(path: Path, *, force: bool = False) -> None:
    """Raise ConfigError where a cohort.csv exists, unless `force`: it may hold labels typed by hand."""
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already.", next_step="Choose another --out, or replace it with --force.")


def write_cohort_csv(path: Path, found: Collected, *, modality: str | None = None, force: bool = False) -> None:
    """Write a cohort.csv; uris are relative to it where the slide lies below its folder.

    Raises ConfigError where the file exists, unless `force`, and where there is no slide.
    """
    check_out(path, force=force)
    if not found.slides:
        raise ConfigError("There is no slide to write into a cohort.", next_step="Name another folder.")
    here = path.absolute().parent
    text = io.StringIO(newline="")
    columns = [*COLUMNS, *(["label"] if any(slide.label is not None for slide in found.slides) else [])]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for slide in found.slides:
        whole = slide.path.absolute()
        uri = whole.relative_to(here).as_posix() if whole.is_relative_to(here) else str(whole)
        row = {"slide_id": slide.slide_id, "uri": uri, "patient_id": slide.patient, "split": slide.split}
        row["label"] = slide.label
        writer.writerow({name: safe_cell(value) for name, value in {**row, "modality": modality}.items()})
    storage.write_atomic(path, text.getvalue().encode())
