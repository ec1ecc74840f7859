"""Who is trained on and who is tested on: splits and folds by patient, stratified, drawn by a seed.

What is dealt out are patients, never slides: all slides of a patient, and slides of the
same bytes, stay together. A slide without a patient is a patient of its own. The answer
depends on the slides and the seed, not on the order of the rows.
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from slideflow_ray import storage
from slideflow_ray.cohort import COLUMNS, FILES, Item, Split, check_splits, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.identity import identity
from slideflow_ray.specs import SplitSpec, parts_of
from slideflow_ray.texts import safe_cell

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
Stratify = Literal["label", "none"]
Table = list[list[int]]
"""Patients of each class (rows) on each side (columns)."""

_MISSING: Final = 1e6
"""The cost of a side without anybody, or without a class that has enough patients: above all others."""


@dataclass(frozen=True)
class Holding:
    """A slide as far as splitting is concerned: whose it is, what the file is ("" where unknown), its label."""

    slide_id: str
    patient: str | None
    identity: str = ""
    label: str | None = None


def with_splits(
    items: Iterable[Item],
    *,
    parts: str | None = None,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    stratify: Stratify = "label",
    classes: Sequence[str] = (),
    identities: Mapping[str, str] | None = None,
) -> list[Item]:
    """Return the items in their order, each with a split; as they are where neither `parts` nor `folds` is given.

    parts : shares of train, val and test, as 6:2:2 or 70/15/15
    folds : number of folds, at least 3: fold `fold` is test, the next one is val, the rest train
    stratify : "label", each side gets its share of every class; "none", of patients only
    classes : the classes from harmless to severe; a patient is of its slides' most severe one. Classes that are
        not named follow by rarity (numbers by their value): the rarest counts as the most severe
    identities : slide_id -> what the file is, besides the column sha256 (see `identities_of`)

    Raises ConfigError: both or bad `parts` and `folds`, fewer patients than folds, no items.
    """
    items = list(items)
    if parts is None and folds is None:
        return items
    if not items:
        raise ConfigError("There is no slide to split.")
    hashes = known_identities(items, identities)
    held = [Holding(i.slide_id, i.patient_id, hashes.get(i.slide_id, ""), i.label) for i in items]
    split = split_of(held, parts=parts, folds=folds, fold=fold, seed=seed, stratify=stratify, classes=classes)
    done = [item.model_copy(update={"split": split[item.slide_id]}) for item in items]
    check_splits(done, hashes)
    return done


def split_of(
    slides: Sequence[Holding],
    *,
    parts: str | None = None,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    stratify: Stratify = "label",
    classes: Sequence[str] = (),
) -> dict[str, Split]:
    """Return slide_id -> split; the parameters and errors are those of `with_splits`."""
    if (parts is None) == (folds is None):
        raise ConfigError("A split needs either parts, as 6:2:2, or a number of folds.")
    groups = bound_together(slides)
    strata = _strata(slides, groups, classes) if stratify == "label" else dict.fromkeys(groups.values(), "")
    if parts is not None:
        side = deal(strata, parts_of(parts), seed)
        return {slide_id: SPLITS[side[group]] for slide_id, group in groups.items()}
    role = _roles(int(folds or 0), fold, len(strata))
    side = deal(strata, (1.0,) * len(role), seed)
    return {slide_id: role[side[group]] for slide_id, group in groups.items()}


def _roles(folds: int, fold: int, patients: int) -> tuple[Split, ...]:
    """Return what each fold is for: `fold` is test, the one after it val."""
    if not 3 <= folds <= patients:
        raise ConfigError(
            f"{folds} folds of {patients} patients: there must be at least 3, and a patient for each.",
            next_step="Choose another number of folds, or split by parts.",
        )
    if not 0 <= fold < folds:
        raise ConfigError(f"Fold {fold} of {folds} does not exist; they count from 0 to {folds - 1}.")
    roles: list[Split] = ["train"] * folds
    roles[fold], roles[(fold + 1) % folds] = "test", "val"
    return tuple(roles)


# who belongs together


def bound_together(slides: Iterable[Holding]) -> dict[str, str]:
    """Return slide_id -> the name of its group: one patient's slides, and those of patients who share bytes."""
    leader: dict[str, str] = {}

    def top(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    own = {s.slide_id: f"patient {s.patient}" if s.patient else f"slide {s.slide_id}" for s in slides}
    for slide in slides:
        first, second = sorted((top(own[slide.slide_id]), top(f"~{slide.identity or slide.slide_id}")))
        leader[second] = first  # the least name leads, whatever the order
    return {slide_id: top(key) for slide_id, key in own.items()}


def _strata(slides: Iterable[Holding], groups: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
    """Return the class of each group: the most severe label among its slides, "" where none has one."""
    slides = list(slides)
    severity = {label: rank for rank, label in enumerate(_by_severity([s.label for s in slides if s.label], classes))}
    worst: dict[str, str] = {}
    for slide in slides:
        group, label = groups[slide.slide_id], slide.label or ""
        if severity.get(label, -1) >= severity.get(worst.get(group, ""), -1):
            worst[group] = label
    return worst


def _by_severity(labels: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the labels from harmless to severe.

    >>> _by_severity(["tumor", "normal", "normal"], ()), _by_severity(["2", "10"], ()), _by_severity("ab", "ba")
    (['normal', 'tumor'], ['2', '10'], ['b', 'a'])
    """
    often = Counter(labels)
    rest = sorted(set(labels) - set(classes))
    numbers = all(label.isascii() and label.isdigit() for label in rest)
    rest.sort(key=lambda label: int(label) if numbers else -often[label])
    return [*(label for label in classes if label in often), *rest]


def known_identities(items: Iterable[Item], identities: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return slide_id -> identity: `identities`, else what the column sha256 says."""
    said = {i.slide_id: f"sha256:{i.sha256.lower()}" for i in items if i.sha256}
    return said | dict(identities or {})


def identities_of(items: Iterable[Item]) -> dict[str, str]:
    """Return slide_id -> identity of those local files that might be copies of another: those of equal size.

    A file of a size of its own is not read, nor is one that is not there (the run will say so).
    """
    sizes: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        path = storage.local_path(item.uri)
        if path.exists():
            sizes[_size(path)].append(item)
    return {item.slide_id: identity(item.uri) for same in sizes.values() if len(same) > 1 for item in same}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# dealing


def deal(strata: Mapping[str, str], weights: Sequence[float], seed: int) -> dict[str, int]:
    """Return the side of each group: the groups of a class in an order drawn by `seed`, cut as `table` says."""
    members: dict[str, list[str]] = defaultdict(list)
    for group in sorted(strata):
        members[strata[group]].append(group)
    names = sorted(members)
    counts = table([len(members[name]) for name in names], weights)
    side: dict[str, int] = {}
    for name, row in zip(names, counts, strict=True):
        random.Random(f"{seed} {name}").shuffle(members[name])
        sides = [place for place, n in enumerate(row) for _ in range(n)]
        side.update(zip(members[name], sides, strict=True))
    return side


def table(sizes: Sequence[int], weights: Sequence[float]) -> Table:
    """Return how many of each class (rows, of `sizes`) each side (columns, of `weights`) gets.

    Each class by itself is cut by `shares`; then patients change sides one at a time while
    that brings the counts, of the classes and of all together, nearer (in squares) to what the
    weights ask for. No side stays empty, nor without a class, that there are enough patients for.

    >>> table([1, 1, 1, 1, 1], (6, 2, 2))
    [[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    """
    rows = [shares(n, weights) for n in sizes]
    change = _best_change(rows, sizes, weights)
    while change:
        c, old, new = change
        rows[c][old], rows[c][new] = rows[c][old] - 1, rows[c][new] + 1
        change = _best_change(rows, sizes, weights)
    return rows


def _best_change(rows: Table, sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, int, int] | None:
    """Return (class, from, to) of the change that helps most, None where none does."""
    total = [sum(column) for column in zip(*rows, strict=True)]
    best: tuple[float, tuple[int, int, int] | None] = (-1e-9, None)
    sides = range(len(weights))
    for c, row in enumerate(rows):
        for old, new in ((s, t) for s in sides for t in sides if s != t and row[s] and weights[t] > 0):
            gain = _moved(row, sizes[c], weights, old, new) + _moved(total, sum(sizes), weights, old, new)
            if gain < best[0]:
                best = (gain, (c, old, new))
    return best[1]


def _moved(row: Sequence[int], n: int, weights: Sequence[float], old: int, new: int) -> float:
    """Return by how much a row's cost changes when one of its patients goes from `old` to `new`."""
    scarce = _MISSING if n >= sum(weight > 0 for weight in weights) else 0.0

    def cost(side: int, count: int) -> float:
        return float((count - n * weights[side] / sum(weights)) ** 2 + (scarce if count == 0 else 0.0))

    after = cost(old, row[old] - 1) + cost(new, row[new] + 1)
    return after - cost(old, row[old]) - cost(new, row[new])


def shares(n: int, weights: Sequence[float]) -> list[int]:
    """Return how many of `n` each weight gets: at least one where there are enough, the rest by largest remainders.

    >>> shares(10, (6, 2, 2)), shares(3, (8, 1, 1)), shares(2, (6, 2, 2)), shares(7, (1, 1, 0))
    ([6, 2, 2], [1, 1, 1], [1, 1, 0], [4, 3, 0])
    """
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    for i, weight in enumerate(weights):
        richest = counts.index(max(counts))
        if weight > 0 and counts[i] == 0 and counts[richest] > 1:
            counts[i], counts[richest] = 1, counts[richest] - 1
    return counts


# files and people


def split_cohort(
    cohort: Path, out: Path, how: Mapping[str, Any], *, classes: Sequence[str] = (), force: bool = False
) -> list[tuple[Path, list[Item]]]:
    """Write a cohort with its splits, with folds one file for each (`out`_fold0.csv, ...); return paths and items.

    how : the keys of SplitSpec. What the cohort's own column split says is overwritten in the new file. Files of
    the same bytes are found by their identity. Raises ConfigError, where a file exists too, unless `force`.
    """
    spec = SplitSpec.parse(how, "options")
    if spec.parts is None and spec.folds is None:
        raise ConfigError("Give --parts, as 6:2:2, or --folds.", next_step="slideflow-ray split --help")
    paths = [out] if not spec.folds else [out.with_stem(f"{out.stem}_fold{fold}") for fold in range(spec.folds)]
    if there := [path for path in paths if path.exists() and not force]:
        raise ConfigError(f"{there[0]} exists already.", next_step="Choose another --out, or replace it with --force.")
    items = read_cohort(cohort, check=False)
    hashes = identities_of(items)
    values = spec.model_dump(exclude={"fold", "mode"})
    done = [with_splits(items, **values, fold=fold, classes=classes, identities=hashes) for fold, _ in enumerate(paths)]
    for path, split in zip(paths, done, strict=True):
        write_items(path, split)
    return list(zip(paths, done, strict=True))


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write items as a cohort.csv, columns that nobody uses left out; files below its folder are named from there."""
    rows = [item.written() for item in items]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    here = path.resolve().parent
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        places = {name: _from(here, row[name]) for name in FILES}
        writer.writerow({name: safe_cell(value) for name, value in {**row, **places}.items()})
    storage.write_atomic(path, text.getvalue().encode())


def _from(folder: Path, uri: str | None) -> str | None:
    path = Path(uri or "")
    return path.relative_to(folder).as_posix() if path.is_absolute() and path.is_relative_to(folder) else uri


def summary(items: Sequence[Item]) -> dict[str, Any]:
    """Return the counts of each split, and of the slides that name no patient."""
    out: dict[str, Any] = {"without_patient": sum(not item.patient_id for item in items)}
    for split in SPLITS:
        mine = [item for item in items if item.split == split]
        labels = Counter(item.label or "" for item in mine)
        out[split] = {"slides": len(mine), "patients": len({i.patient for i in mine}), "labels": dict(labels)}
    return out


def describe(items: Sequence[Item]) -> Iterator[str]:
    """Yield a line for each split, slides and patients and labels, and one about slides that name no patient."""
    for split in SPLITS:
        mine = [item for item in items if item.split == split]
        labels = Counter(item.label or "no label" for item in mine)
        counts = ", ".join(f"{label} {n}" for label, n in sorted(labels.items()))
        yield f"{split}: {len(mine)} slides, {len({i.patient for i in mine})} patients" + (f": {counts}" * bool(mine))
    if note := lone_note(items):
        yield note


def lone_note(items: Iterable[Item]) -> str | None:
    """Return what must be said of slides whose patient the cohort does not name; None where it names all.

    >>> lone_note([Item(slide_id="a", uri="a.svs"), Item(slide_id="b", uri="b.svs", patient_id="p")])
    '1 of 2 slides name no patient; each counts as a patient of its own, which only you can know.'
    """
    items = list(items)
    lone = sum(not item.patient_id for item in items)
    if not lone:
        return None
    return (
        f"{lone} of {len(items)} slides name no patient; each counts as a patient of its own, which only you can know."
    )
