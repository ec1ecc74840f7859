"""Label files of crops come in and go out as they are; what is wrong in one is named with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slideflow_ray import cli, label_files
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.collect import collect, describe, with_labels
from slideflow_ray.errors import ConfigError
from slideflow_ray.label_files import CHINESE, label_lines, label_of, read_labels
from slideflow_ray.train.images import image_labels, left_out
from slideflow_ray.train.spec import TrainJob

ROW = {"image_name": "0496052bb_1.png", "正常肾小球": 1, "节段性硬化": 0, "系膜细胞增生": 0, "新月体形成": 0}
"""As the source's figure has it."""

TRUTH = {
    "0496052bb_1.png": ("Normal",),
    "0496052bb_2.png": (),
    "he/7_1.png": ("FSG", "CGN"),
    "he/7_2.png": ("MsPGN",),
}


def rows(keys: str = "chinese") -> list[dict]:
    names = {name: CHINESE[name] if keys == "chinese" else name for name in CHINESE}
    return [
        {"image_name": image, **{names[name]: int(name in mine) for name in CHINESE}} for image, mine in TRUTH.items()
    ]


def as_csv(keys: str) -> str:
    first, *rest = rows(keys)
    table = [list(first), *(list(row.values()) for row in (first, *rest))]
    return "\r\n".join(",".join(map(str, line)) for line in table) + "\r\n"


def dumped(found) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in found]


FORMS = {
    "list": json.dumps(rows(), ensure_ascii=False),
    "escaped": json.dumps(rows()),
    "indented": json.dumps(rows("english"), indent=2),
    "lines": "\n".join(dumped(rows())),
    "lines with commas": ",\n".join(dumped(rows("english"))) + "\n",
    "list without commas": "[" + "\n".join(dumped(rows())) + "]",
    "in one line": "".join(dumped(rows())),
    "chinese csv": as_csv("chinese"),
    "english csv": as_csv("english"),
}


@pytest.fixture
def write(tmp_path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "labels.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form, bom, write):
    found = read_labels(write(bom + FORMS[form].encode()))
    assert found.of == TRUTH
    assert found.classes == tuple(CHINESE)
    assert label_of(found.of["he/7_1.png"]) == "FSG+CGN"


@pytest.mark.parametrize("keys", ["english", "chinese"])
def test_what_is_written_is_read_again(keys, write):
    text = label_lines(list(TRUTH.items()), list(CHINESE), keys)
    assert json.loads(text) == rows(keys)
    assert len(text.splitlines()) == len(TRUTH) + 2
    found = read_labels(write(text))
    assert found.of == TRUTH
    assert list(found.lines.values()) == [2, 3, 4, 5]


def test_other_keys_are_mapped(write):
    text = '{"image_name": "a.png", "球性硬化": 1, "normal": 0}'
    assert read_labels(write(text), {"球性硬化": "GS"}).of == {"a.png": ("GS",)}
    with pytest.raises(ConfigError, match="cannot be a class"):
        read_labels(write(text), {"球性硬化": "FSG+GS"})


ENGLISH = '"Normal": 1, "FSG": 0'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither JSON nor a CSV"),
        ("[]", "has no rows"),
        ("hello\n1", "neither JSON nor a CSV"),
        ("[1, 2]", "line 1: 1 is no object"),
        ('{"image_name": "a.png", "Normal": 1}\n{"image_name": "a.png", "Normal": 0}', "line 2: .*already, in line 1"),
        (f'{{"image_name": "a.png",\n {ENGLISH}}}\n\n{{"image_name": "b.png", "Normal": 2}}', r"line 4: Normal is 2"),
        *(
            (f'{{"image_name": "a.png", "Normal": {value}}}', "0 or 1 would do")
            for value in ("true", "1.0", '"1"', "null", "-1", "NaN", "1e999", "[]", '{"a": 1}')
        ),
        ('{"image_name": "a.png", "Crescent": 1}', "the key 'Crescent' means no class"),
        ('{"image_name": "a.png", "Normal": 1, "正常肾小球": 0}', "class Normal stands twice"),
        ('{"image_name": "a.png", "Normal": 1, "Normal": 1}', "class Normal stands twice"),
        ('{"image_name": "a.png", "image_name": "b.png", "Normal": 1}', "'image_name' stands twice"),
        ('{"Normal": 1}', "image_name is missing"),
        ('{"image_name": "a.png"}', "a class is missing"),
        ('{"image_name": "a.png", "Normal": 1}\n{"image_name": "b.png", "FSG": 1}', "line 2: its classes are not"),
        *(
            (json.dumps({"image_name": name, "Normal": 1}), said)
            for name, said in [
                ("../../etc/passwd", "would not lie below"),
                ("a/../b.png", "would not lie below"),
                ("/etc/passwd", "would not lie below"),
                ("C:\\x.png", "would not lie below"),
                ("\\\\host\\x.png", "would not lie below"),
                ("..\\x.png", "would not lie below"),
                ("s3://bucket/x.png", "would not lie below"),
                ("", "a file's name would do"),
                ("a\u202e.png", "a file's name would do"),
                ("x" * 2000, "a file's name would do"),
                (7, "a file's name would do"),
                (["a.png"], "a file's name would do"),
            ]
        ),
        ('[{"image_name": "a.png", "Normal": 1}', "the list does not end"),
        ('[{"image_name": "a.png", "Normal": 1}] x', "after the end"),
        ('{"image_name": "a.png", "Normal": 1}]', "after the end"),
        ('{"image_name": "a.png", "Normal": 1}\n{"image_name": ', "line 2: this is not JSON"),
        ('{"image_name": "a.png", "Normal": ' + "9" * 5000 + "}", "not JSON|0 or 1"),
        ("[" * 100_000, "not JSON"),
        ('{"image_name":' + '{"a":' * 100_000, "not JSON"),
        ("image_name,Normal\na.png,1\nb.png", "line 3: 1 cells for 2 columns"),
        ("image_name,Normal\na.png,yes", "line 2: Normal is 'yes'"),
        ("image_name,Normal,Normal\na.png,1,1", "stands twice"),
        ('image_name,Normal\n"a.png,1', "not CSV"),
        (b"image_name,\xd5\xfd\n", "not UTF-8"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(text, said, write):
    with pytest.raises(ConfigError, match=said):
        read_labels(write(text))


def test_there_is_a_bound(write, monkeypatch):
    monkeypatch.setattr(label_files, "MAX_ROWS", 3)
    with pytest.raises(ConfigError, match="more than 3 rows"):
        read_labels(write(FORMS["list"]))
    monkeypatch.setattr(label_files, "MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="up to 100"):
        read_labels(write(FORMS["list"]))
    with pytest.raises(ConfigError, match="no label file"):
        read_labels("nowhere.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_labels("/dev")


# with images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate([*TRUTH, "extra.png"]):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return folder


def invoke(*words) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return left.value.code


def test_a_folder_and_its_labels_become_a_cohort(images, write, tmp_path, capsys):
    path, out = write(FORMS["list without commas"]), tmp_path / "cohort.csv"
    words = ["cohort", images, "--labels", path, "--out", out, "--patient-pattern", r"([^/_]+)_\d"]
    assert invoke(*words) == 3  # one image is broken
    said = capsys.readouterr()
    assert "no label: extra.png" in said.err
    items = {Path(item.uri).relative_to(images).as_posix(): item for item in read_cohort(out)}
    assert {name: item.label for name, item in items.items()} == {
        name: (label_of(TRUTH[name]) or "none") if name in TRUTH else None for name in [*TRUTH, "extra.png"]
    }
    assert items["he/7_1.png"].patient_id == "7"
    with out.open(newline="") as file:
        assert next(csv.reader(file))[-1] == "label"
    again = label_lines([(name, (item.label or "").split("+")) for name, item in items.items()], list(CHINESE))
    assert read_labels(write(again)).of == TRUTH | {"extra.png": ()}
    assert invoke(*words) == 2  # it is there


def test_images_may_be_named_by_file_name_or_stem(images):
    found = collect(images)
    text = {"0496052bb_1": ("Normal",), "7_1.png": ("FSG",), "images/he/7_2.png": ()}
    labels = label_files.Labels("l.json", ("Normal", "FSG"), text, dict.fromkeys(text, 1))
    given = {s.name: s.label for s in with_labels(found, labels).slides if s.label is not None}
    assert given == {"0496052bb_1.png": "Normal", "he/7_1.png": "FSG"}


def test_zeros_alone_are_a_judgement_where_classes_are_judged_one_by_one(images):
    """In a one-hot file they say nothing, and are named; with an image of two classes they say "none of these"."""
    found = collect(images)
    text = {"7_1.png": ("FSG",), "7_2.png": ()}
    one_hot = with_labels(found, label_files.Labels("l.json", ("FSG", "CGN"), text, dict.fromkeys(text, 1)))
    assert {s.name: s.label for s in one_hot.slides if s.label is not None} == {"he/7_1.png": "FSG"}
    assert one_hot.blank == ("he/7_2.png",)
    assert any(line.startswith("a label of zeros alone") and "he/7_2.png" in line for line in describe(one_hot))
    assert not any(line == "no label: he/7_2.png" for line in describe(one_hot))
    text = {"7_1.png": ("FSG", "CGN"), "7_2.png": ()}
    judged = with_labels(found, label_files.Labels("l.json", ("FSG", "CGN"), text, dict.fromkeys(text, 1)))
    labels = {s.name: s.label for s in judged.slides if s.label is not None}
    assert labels == {"he/7_1.png": "FSG+CGN", "he/7_2.png": "none"}
    assert judged.blank == ()
    values = {"cohort": "c", "out": "o", "work": "w", "classes": ["FSG", "CGN"], "whole": {"tile_px": 8, "fit": "pad"}}
    items = [Item(slide_id=name, uri="x.png", label=label) for name, label in labels.items()]
    several = TrainJob.parse({**values, "task": "multilabel"}, "test")
    hot = {i.slide_id: row for i, row in zip(items, image_labels(several, items).tolist(), strict=True)}
    assert hot == {"he/7_1.png": [1, 1], "he/7_2.png": [0, 0]}
    assert left_out(several, items) == ""  # it was said on purpose
    assert "no class (none)" in left_out(TrainJob.parse(values, "test"), items)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["7_1.png", "gone.png", "broken.png"], r"names 2 images .*line 2: gone.png; line 3: broken.png"),
        (["7_1.png", "he/7_1.png"], r"line 2: 'he/7_1.png' is the image of line 1 again"),
    ],
)
def test_labels_without_an_image_are_refused(names, said, images):
    lines = {name: i for i, name in enumerate(names, start=1)}
    labels = label_files.Labels("l.json", ("Normal",), dict.fromkeys(names, ()), lines)
    with pytest.raises(ConfigError, match=said):
        with_labels(collect(images), labels)


def test_a_name_for_two_images_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / name / "x.png")
    labels = label_files.Labels("l.json", ("Normal",), {"x.png": ()}, {"x.png": 1})
    with pytest.raises(ConfigError, match=r"may be a/x\.png or b/x\.png"):
        with_labels(collect(tmp_path), labels)


def test_names_on_the_command_line(images, write, tmp_path):
    path = write('{"image_name": "extra.png", "球性硬化": 1}')
    words = ["cohort", images, "--labels", path, "--out", tmp_path / "c.csv"]
    assert invoke(*words) == 2
    assert invoke(*words, "--name", "球性硬化") == 2
    assert invoke(*words, "--name", "球性硬化=GS") == 3
    assert "GS" in (tmp_path / "c.csv").read_text()
