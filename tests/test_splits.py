"""splits.py: patients are never parted, classes keep their shares, and the order of the rows does not matter."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from slideflow_ray import cli
from slideflow_ray.cohort import Item, check_splits, read_cohort
from slideflow_ray.errors import ConfigError, SplitLeakError
from slideflow_ray.specs import SplitSpec
from slideflow_ray.splits import SPLITS, identities_of, shares, split_cohort, table, with_splits


def item(slide_id: str, patient: str | None = None, label: str | None = None, sha256: str | None = None) -> Item:
    return Item(slide_id=slide_id, uri=f"{slide_id}.svs", patient_id=patient, label=label, sha256=sha256)


@st.composite
def cohorts(draw) -> list[Item]:
    """Slides of patients of up to three classes; some slides name no patient, some are copies."""
    patients = draw(st.integers(1, 25))
    rows = []
    for p in range(patients):
        label = draw(st.sampled_from(["normal", "benign", "tumor", None]))
        name = draw(st.sampled_from([f"p{p}", f"p{p}", f"p{p}", None]))
        for s in range(draw(st.integers(1, 3)) if name else 1):
            sha = draw(st.sampled_from([None] * 9 + ["ab" * 32]))
            rows.append(
                item(f"s{p}-{s}", name, draw(st.sampled_from([label, label, "normal"])) if label else None, sha)
            )
    return rows


WAYS = st.one_of(
    st.sampled_from(["6:2:2", "70/15/15", "1:1:1", "98:1:1"]).map(lambda parts: {"parts": parts}),
    st.tuples(st.integers(3, 6), st.integers(0, 2)).map(lambda pair: {"folds": pair[0], "fold": pair[1]}),
)
SEVERITY = ("normal", "benign", "tumor")


def together(items: list[Item]) -> list[set[str]]:
    """The slides that belong together, by merging sets until nothing changes: slow and plain."""
    sets = [{i.slide_id, f"patient {i.patient_id or i.slide_id}", f"bytes {i.sha256 or i.slide_id}"} for i in items]
    merged = True
    while merged:
        merged = False
        for a in range(len(sets)):
            for b in range(a + 1, len(sets)):
                if sets[a] and sets[a] & sets[b]:
                    sets[a], sets[b], merged = sets[a] | sets[b], set(), True
    ids = {i.slide_id for i in items}
    return [found & ids for found in sets if found]


@settings(deadline=None, max_examples=150)
@given(cohorts(), WAYS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_split_keeps_its_promises(items, way, seed, shuffler):
    groups = together(items)
    if way.get("folds", 0) > len(groups):
        with pytest.raises(ConfigError, match="folds of"):
            with_splits(items, **way, seed=seed)
        return
    done = with_splits(items, **way, seed=seed, classes=SEVERITY)
    assert [i.model_copy(update={"split": None}) for i in done] == items  # all kept, in their order
    split = {i.slide_id: i.split for i in done}
    assert set(split.values()) <= set(SPLITS)
    for group in groups:
        assert len({split[slide] for slide in group}) == 1
    shuffled = list(items)
    shuffler.shuffle(shuffled)
    again = with_splits(shuffled, **way, seed=seed, classes=SEVERITY)
    assert {i.slide_id: i.split for i in again} == split
    if len(groups) >= 3:
        assert set(split.values()) == set(SPLITS)
    labels = {i.slide_id: i.label for i in items}
    worst = [max((labels[s] for s in g if labels[s]), key=SEVERITY.index, default=None) for g in groups]
    enough = way.get("folds", 3)
    for name, n in Counter(worst).items():
        mine = [split[next(iter(g))] for g, label in zip(groups, worst, strict=True) if label == name]
        if n >= enough:
            assert set(mine) == set(SPLITS), name


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([(6, 2, 2), (70, 15, 15), (1,) * 5]))
def test_class_shares_are_as_near_as_whole_patients_allow(sizes, weights):
    rows = np.array(table(sizes, weights))
    assert rows.sum(axis=1).tolist() == sizes
    w = np.array(weights) / sum(weights)
    assert np.abs(rows - np.outer(sizes, w)).max() < 2
    n = sum(sizes)
    # a cut of each class by itself, which is the usual way, is never nearer to the shares of the whole
    naive = np.array([shares(size, weights) for size in sizes])

    def cost(found: np.ndarray) -> float:
        return float(((found - np.outer(sizes, w)) ** 2).sum() + ((found.sum(axis=0) - n * w) ** 2).sum())

    empty = (naive.sum(axis=0) == 0).any() and n >= len(weights)
    assert empty or cost(rows) <= cost(naive) + 1e-9


def test_five_classes_of_one_patient_do_not_all_train():
    items = [item(f"s{i}", f"p{i}", f"class {i}") for i in range(5)]
    assert Counter(i.split for i in with_splits(items, parts="6:2:2")) == {"train": 3, "val": 1, "test": 1}


@pytest.mark.parametrize("k", [3, 5])
def test_folds_are_as_even_as_those_of_scikit_learn(k):
    rng = random.Random(k)
    for _ in range(20):
        label = [rng.choice("aab") for _ in range(rng.randint(4 * k, 60))]
        items = [item(f"s{i}", f"p{i}", c) for i, c in enumerate(label)]
        if min(Counter(label).values()) < k:
            continue
        folds = [with_splits(items, folds=k, fold=f, seed=1) for f in range(k)]
        ours = np.array([[sum(i.split == "test" and i.label == c for i in done) for c in "ab"] for done in folds])
        test = [rows for _, rows in StratifiedKFold(k, shuffle=True, random_state=0).split(label, label)]
        theirs = np.array([[sum(label[r] == c for r in rows) for c in "ab"] for rows in test])
        assert np.ptp(ours, axis=0).max() <= max(1, np.ptp(theirs, axis=0).max())
        assert np.ptp(ours.sum(axis=1)) <= max(1, np.ptp(theirs.sum(axis=1)))


def test_every_slide_is_tested_once_and_validated_once():
    items = [item(f"s{i}", f"p{i // 2}", "ab"[i % 3 == 0]) for i in range(30)]
    seen: dict[str, list] = defaultdict(list)
    for fold in range(5):
        for done in with_splits(items, folds=5, fold=fold):
            seen[done.slide_id].append(done.split)
    for roles in seen.values():
        assert Counter(roles) == {"train": 3, "val": 1, "test": 1}
        assert roles[(roles.index("test") - 1) % 5] == "val"  # the next fold was validation when this one was tested


def test_the_worst_of_a_patients_slides_is_the_patients_class():
    items = [item(f"s{p}{s}", f"p{p}", "tumor" if p < 3 and s == 0 else "normal") for p in range(30) for s in range(3)]
    for seed in range(5):
        done = with_splits(items, parts="1:1:1", seed=seed)  # the rarer label is the more severe one
        assert {i.split for i in done if i.label == "tumor"} == set(SPLITS)
    plain = [with_splits(items, parts="1:1:1", seed=seed, stratify="none") for seed in range(5)]
    assert any({i.split for i in done if i.label == "tumor"} != set(SPLITS) for done in plain)
    grades = [
        item(f"s{p}{s}", f"p{p}", "3" if p % 5 == s == 0 else "10" if s else "2") for p in range(30) for s in (0, 1)
    ]
    done = with_splits(grades, parts="6:2:2")
    assert Counter(i.split for i in done) == {"train": 36, "val": 12, "test": 12}


def test_the_seed_changes_the_split_and_bad_words_are_refused():
    items = [item(f"s{i}") for i in range(20)]
    one, two = (with_splits(items, parts="6:2:2", seed=seed) for seed in (1, 2))
    assert one != two
    assert with_splits(items) == items
    for words, said in (
        ({"parts": "6:2:2", "folds": 3}, "either parts"),
        ({"parts": "6:2"}, "not three numbers"),
        ({"folds": 2}, "at least 3"),
        ({"folds": 21}, "21 folds of 20 patients"),
        ({"folds": 3, "fold": 3}, "Fold 3 of 3"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_splits(items, **words)
    with pytest.raises(ConfigError, match="no slide"):
        with_splits([], parts="6:2:2")
    for words in (
        {"parts": "a:b:c"},
        {"parts": "1:1:1", "folds": 3},
        {"folds": 3, "fold": 3},
        {"folds": 2},
        {"fold": 1},
    ):
        with pytest.raises(ConfigError):
            SplitSpec.parse(words, "train.toml")


def test_a_leak_is_seen_through_either_column():
    a, b = item("a", "p", sha256="AB" * 32), item("b", "q", sha256="ab" * 32)
    a, b = (x.model_copy(update={"split": split}) for x, split in ((a, "train"), (b, "test")))
    with pytest.raises(SplitLeakError, match="file sha256:abab"):
        check_splits([a, b])
    with pytest.raises(SplitLeakError, match="file sha256:abab"):
        check_splits([a, b], {"a": "sha256:" + "ab" * 32})  # of b only the cohort knows
    lone = [item("x", None).model_copy(update={"split": s}) for s in ("train",)]
    check_splits([*lone, item("y", None).model_copy(update={"split": "test"})])  # two slides, two patients


@settings(deadline=None)
@given(st.integers(0, 60), st.tuples(*[st.integers(0, 9)] * 3).filter(any))
def test_shares_add_up_and_leave_nobody_out(n, weights):
    counts = shares(n, weights)
    assert sum(counts) == n
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)
    if n >= sum(weight > 0 for weight in weights):
        assert all(count for count, weight in zip(counts, weights, strict=True) if weight)
    exact = [n * weight / sum(weights) for weight in weights]
    assert all(abs(c - e) < 3 for c, e in zip(counts, exact, strict=True))


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Ten patients; s3 of one and s7 of another are the same bytes; two slides name no patient."""
    (tmp_path / "slides").mkdir()
    lines = ["slide_id,uri,patient_id,split,label,modality,stain"]
    for i in range(12):
        (tmp_path / "slides" / f"s{i}.svs").write_bytes(b"same" if i in (3, 7) else f"{i:05d}".encode())
        who = f"p{i}" if i < 10 else ""
        lines.append(f"s{i},slides/s{i}.svs,{who},{'train' if i else 'test'},{'tumor' if i % 2 else 'normal'},pas,")
    path = tmp_path / "cohort.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_command_writes_a_cohort_and_says_what_is_where(cohort, capsys):
    out = cohort.parent / "new" / "split.csv"
    words = ["split", str(cohort), "--parts", "6:2:2", "-o", str(out)]
    code, said, err = call(capsys, *words)
    assert (code, err) == (0, "")
    assert "train: 8 slides, 8 patients: normal 4, tumor 4" in said
    assert "2 of 12 slides name no patient" in said
    old, new = read_cohort(cohort, check=False), read_cohort(out)
    assert [i.model_copy(update={"split": None}) for i in new] == [i.model_copy(update={"split": None}) for i in old]
    assert new[3].split == new[7].split
    assert "stain" not in out.read_text()
    check_splits(new, identities_of(new))
    again = out.read_bytes()
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "exists already" in err
    assert call(capsys, *words, "--force")[0] == 0
    assert out.read_bytes() == again
    beside = cohort.parent / "beside.csv"
    assert call(capsys, "split", str(cohort), "--parts", "6:2:2", "-o", str(beside))[0] == 0
    assert ",slides/s0.svs," in "," + beside.read_text().splitlines()[1]


def test_folds_get_a_file_each(cohort, capsys):
    out = cohort.parent / "cv.csv"
    code, said, _ = call(capsys, "split", str(cohort), "--folds", "3", "-o", str(out), "--json")
    assert code == 0
    files = [Path(found["out"]) for found in json.loads(said)]
    assert [file.name for file in files] == ["cv_fold0.csv", "cv_fold1.csv", "cv_fold2.csv"]
    tested = [i.slide_id for file in files for i in read_cohort(file) if i.split == "test"]
    assert sorted(tested) == sorted(f"s{i}" for i in range(12))
    assert all(found[split]["slides"] for found in json.loads(said) for split in SPLITS)
    code, _, err = call(capsys, "split", str(cohort), "--folds", "3", "-o", str(out))
    assert code == 2
    assert "cv_fold0.csv exists already" in err
    code, _, err = call(capsys, "split", str(cohort), "-o", str(out))
    assert code == 2
    assert "Give --parts" in err


def test_only_files_that_might_be_copies_are_read(cohort):
    found = identities_of(read_cohort(cohort, check=False))
    assert found["s3"] == found["s7"]
    assert len(set(found.values())) == len(found) - 1
    (cohort.parent / "slides" / "s5.svs").write_bytes(b"of a size of its own")
    (cohort.parent / "slides" / "s6.svs").unlink()
    assert not {"s5", "s6"} & set(identities_of(read_cohort(cohort, check=False)))


def test_splitting_a_cohort_by_hand_and_by_file_is_the_same(cohort):
    ((_, by_file),) = split_cohort(cohort, cohort.parent / "x.csv", {"parts": "70/15/15", "seed": 3})
    items = read_cohort(cohort, check=False)
    assert by_file == with_splits(items, parts="70/15/15", seed=3, identities=identities_of(items))
