"""cohort.py: what is read, and what is refused with the row that is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from slideflow_ray.cohort import Item, check_splits, read_cohort, single_slide
from slideflow_ray.errors import CohortError, ConfigError, SplitLeakError


def write(folder: Path, text: str) -> Path:
    path = folder / "cohort.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_uris_are_relative_to_the_file_and_empty_cells_are_none(tmp_path):
    path = write(tmp_path, "slide_id,uri,patient_id,annotation,mpp\na,x/a.svs,,a.geojson,0.5\nb,/abs/b.svs,p,,\n")
    a, b = read_cohort(path)
    assert a.uri == str(tmp_path / "x/a.svs")
    assert a.annotation == str(tmp_path / "a.geojson")
    assert (a.patient_id, a.patient, a.mpp) == (None, "a", 0.5)
    assert (b.uri, b.patient, b.mpp, b.annotation) == ("/abs/b.svs", "p", None, None)


def test_a_byte_order_mark_is_no_column(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_bytes(b"\xef\xbb\xbfslide_id,uri\na,a.svs\n")
    assert read_cohort(path)[0].slide_id == "a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slide_id,path\na,b\n", "lacks the column 'uri'"),
        ("slide_id,uri,colour\na,b,red\n", "unknown column 'colour'"),
        ("slide_id,uri\n", "no rows"),
        ("slide_id,uri,split\na,b,testing\n", "line 2: split"),
        ("slide_id,uri,mpp\na,b,fine\n", "line 2: mpp"),
        ("slide_id,uri\na,b\na,c\n", "'a' stands twice"),
        ("slide_id,uri\na,b,c\n", "line 2: more cells than columns"),
        ("slide_id,uri\n,b\n", "line 2: slide_id"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, said):
    with pytest.raises(CohortError, match=said):
        read_cohort(write(tmp_path, text))


def test_a_missing_or_binary_cohort_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="There is no cohort"):
        read_cohort(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CohortError, match="not a UTF-8 CSV"):
        read_cohort(tmp_path / "b.csv")


def test_a_patient_in_two_splits_is_a_leak(tmp_path):
    text = "slide_id,uri,patient_id,split\na,a,p,train\nb,b,p,test\n"
    with pytest.raises(SplitLeakError, match=r"'p' stands in more than one split: train \(a\), test \(b\)"):
        read_cohort(write(tmp_path, text))


def test_blanks_around_a_cell_make_no_other_patient(tmp_path):
    text = 'slide_id, uri,patient_id ,split,stain\na, a.svs,"14-14134 ",train,\u00a0\nb,b.svs,14-14134,test,pas \n'
    with pytest.raises(SplitLeakError, match=r"'14-14134' stands in more than one split: train \(a\), test \(b\)"):
        read_cohort(write(tmp_path, text))
    a, b = read_cohort(write(tmp_path, text.replace("test", " train")))
    assert (a.uri, a.patient_id, a.stain) == (str(tmp_path / "a.svs"), "14-14134", None)
    assert (b.stain, b.split) == ("pas", "train")
    assert Item(slide_id="a", uri="a", patient_id=" p\t").patient == "p"
    assert Item(slide_id="a", uri="a", patient_id=" ").patient == "a"


def test_the_same_file_in_two_splits_is_a_leak_even_under_two_patients():
    items = [
        Item(slide_id="a", uri="a", patient_id="p", split="val"),
        Item(slide_id="b", uri="b", patient_id="q", split="test"),
    ]
    check_splits(items, {"a": "sha256:1", "b": "sha256:2"})
    with pytest.raises(SplitLeakError, match="file sha256:1"):
        check_splits(items, {"a": "sha256:1", "b": "sha256:1"})


def test_a_single_slide_is_named_after_its_file(tmp_path):
    (item,) = single_slide(str(tmp_path / "case 7.svs"), mpp=0.25)
    assert (item.slide_id, item.mpp) == ("case 7", 0.25)
