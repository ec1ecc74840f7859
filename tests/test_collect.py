"""collect.py: every file of a folder is accounted for; ids, patients, duplicates, splits and what is missing."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slideflow_ray import cli
from slideflow_ray.cohort import check_splits, read_cohort
from slideflow_ray.collect import Found, collect, read_expected, reconcile, slide_ids, split_by_patient
from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms import write_marked_slide


def slide(path: Path, seed: int = 0, dpi: int | None = 50800) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, **({"dpi": (dpi, dpi)} if dpi else {}), format="PNG")
    return path


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


LONGEST = "ä" * 125 + "x.png"  # 255 bytes


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six slides of odd names, a duplicate, a broken one and files that are none."""
    root = tmp_path / "slides"
    slide(root / "P01" / "one.png", 1)
    slide(root / "P01" / "two with spaces.png", 2)
    slide(root / "P02" / "one.png", 3)
    slide(root / "P02" / "🔬 liver.png", 4)
    slide(root / "P03" / LONGEST, 5)
    slide(root / "P04" / "copy.png", 1)
    (root / "P04" / "broken.svs").write_text("not a slide")
    (root / "P04" / "notes.txt").write_text("x")
    (root / ".hidden.png").write_text("x")
    return root


def test_every_file_is_accounted_for(folder):
    found = collect(folder, pattern=r"(P\d+)/")
    assert (found.files, found.slide_files, found.others, len(found.unreadable)) == (9, 6, 2, 1)
    assert "E_NOT_A_SLIDE" in found.unreadable["P04/broken.svs"]
    assert not found.complete
    assert {s.slide_id for s in found.slides} == {
        "P01_one", "P02_one", "two with spaces", "🔬 liver", "copy", LONGEST.removesuffix(".png"),
    }  # fmt: skip
    assert [s.patient for s in found.slides] == ["P01", "P01", "P02", "P02", "P03", "P04"]
    assert found.same_name == (("P01/one.png", "P02/one.png"),)
    assert found.same_bytes == (("P01/one.png", "P04/copy.png"),)


def test_the_cohort_that_is_written_can_be_read_and_run(folder, capsys):
    out = folder.parent / "cohort.csv"
    words = ["cohort", str(folder), "--patient-pattern", r"(?P<patient>P\d+)", "-o", str(out), "--split", "2:1:1"]
    code, said, err = call(capsys, *words, "--json")
    assert code == 3  # one cannot be opened
    assert "P04/broken.svs: E_NOT_A_SLIDE" in err
    summary = json.loads(said)
    assert (summary["slides"], summary["patients"], summary["files"]) == (6, 4, 9)
    items = read_cohort(out)
    assert all(Path(item.uri).is_file() for item in items)
    assert out.read_text().splitlines()[1].split(",")[1] == "slides/P01/one.png"
    splits = {item.patient_id: item.split for item in items}
    assert splits["P01"] == splits["P04"]  # they share a file
    assert set(splits.values()) == {"train", "val", "test"}
    check_splits(items, {s.slide_id: s.identity for s in collect(folder).slides})
    again = out.read_bytes()
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "exists already" in err
    assert call(capsys, *words, "--force")[0] == 3
    assert out.read_bytes() == again


def test_what_is_missing_is_named_and_ends_with_3(folder, capsys):
    (folder / "P04" / "broken.svs").unlink()
    manifest = folder.parent / "manifest.csv"
    names = ["P01/one.png", "two with spaces", r"P02\one.png", "🔬 liver.png", "gone.svs", "lost"]
    manifest.write_text("file\n" + "\n".join(names) + "\n", encoding="utf-8")
    words = ["cohort", str(folder), "--expect", str(manifest), "-o"]
    code, said, err = call(capsys, *words, str(folder.parent / "a.csv"))
    assert code == 3
    assert said == f"6 slides: {folder.parent / 'a.csv'}\n"
    assert "6 expected: 4 present, 2 missing, 0 that cannot be opened; 2 not expected" in err
    for line in ("missing: gone.svs", "missing: lost", f"not expected: P03/{LONGEST}", "not expected: P04/copy.png"):
        assert line in err.splitlines()
    manifest.write_text("file\n" + "\n".join(names[:4]) + "\n", encoding="utf-8")
    assert call(capsys, *words, str(folder.parent / "b.csv"))[0] == 0


def test_a_broken_slide_that_was_expected_is_neither_present_nor_missing(folder):
    slides = collect(folder).slides
    present, missing, extra = reconcile(["broken", "copy", "none"], slides, {"P04/broken.svs": "E_NOT_A_SLIDE"})
    assert (present, missing, len(extra)) == (1, ("none",), 5)


def test_slides_without_a_scale_are_listed_with_what_to_fill_in(tmp_path, capsys):
    for i in range(12):
        slide(tmp_path / f"s{i}.png", i, dpi=None)
    slide(tmp_path / "dpi.png", 99, dpi=72)
    code, _, err = call(capsys, "cohort", str(tmp_path), "-o", str(tmp_path / "c.csv"), "--modality", "pas")
    assert code == 0
    assert (
        "for models of tiles, not for those of whole images, needs a value in the column mpp: s0.png: E_NO_MPP" in err
    )
    assert "column mpp: dpi.png: E_BAD_MPP" in err
    assert "column mpp: and 3 more (--json names them all)" in err
    assert {item.modality for item in read_cohort(tmp_path / "c.csv")} == {"pas"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patient-pattern", "("], "not a regular expression"),
        (["--split", "6:2"], "not three numbers"),
        (["--split", "a:b:c"], "not three numbers"),
        (["--split", "0:0:0"], "not three numbers"),
        (["--split", "nan:1:1"], "not three numbers"),
        (["--modality", "xray"], "none of he, pas"),
        (["--expect", "nowhere.csv"], "There is no manifest"),
    ],
)
def test_wrong_words_end_with_2(tmp_path, capsys, words, said):
    slide(tmp_path / "a.png")
    code, _, err = call(capsys, "cohort", str(tmp_path), "-o", str(tmp_path / "c.csv"), *words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "c.csv").exists()


def test_an_empty_folder_and_no_folder_are_configuration_errors(tmp_path, capsys):
    assert call(capsys, "cohort", str(tmp_path), "-o", str(tmp_path / "c.csv"))[0] == 2
    assert "not a folder" in call(capsys, "cohort", str(tmp_path / "none"))[2]


def test_a_name_that_is_not_utf8_is_told_and_not_written(tmp_path):
    slide(tmp_path / "good.png")
    odd = bytes(tmp_path) + b"/\xff\xfe.png"
    try:
        shutil.copy(bytes(tmp_path / "good.png"), odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = collect(tmp_path)
    assert [s.name for s in found.slides] == ["good.png"]
    ((name, why),) = found.unreadable.items()
    assert "not UTF-8" in why
    name.encode()


@pytest.mark.data
def test_slides_of_several_files_are_one_row(data, tmp_path):
    root = tmp_path / "all"
    shutil.copytree(data / "slides", root)
    shutil.copy(data / "slides" / "camelyon_overview_jpeg.dcm", root / "cmu1small_dicom")  # two series in one folder
    shutil.copytree(data / "slides" / "cmu1small_dicom", root / "dicom")
    found = collect(root)
    names = [s.name for s in found.slides]
    assert sum(name.startswith("dicom") for name in names) == 1
    assert "dicom" in names
    assert sum(name.startswith("cmu1small_dicom/") for name in names) == 2
    assert found.files == found.slide_files + found.others + len(found.unreadable)
    assert found.slide_files == 14
    assert ("camelyon_overview_jpeg.dcm", "cmu1small_dicom/camelyon_overview_jpeg.dcm") in found.same_bytes


def test_an_omezarr_folder_is_one_slide_and_masks_of_a_vms_are_none(tmp_path):
    import zarr

    group = zarr.open_group(tmp_path / "a.ome.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=np.zeros((3, 40, 30), np.uint8), chunks=(3, 20, 20))
    axes = [{"name": "c"}, *({"name": a, "unit": "micrometer"} for a in "yx")]
    step = [{"type": "scale", "scale": [1, 0.5, 0.5]}]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": step}]}]
    (tmp_path / "b.vms").write_text("[Virtual Microscope Specimen]\nImageFile=b.jpg\n")
    slide(tmp_path / "b.jpg")
    write_marked_slide(tmp_path / "c.tif", size_px0=(300, 200), levels=1)
    found = collect(tmp_path)
    assert [s.name for s in found.slides] == ["a.ome.zarr", "c.tif"]
    assert [s.slide_id for s in found.slides] == ["a", "c"]
    assert list(found.unreadable) == ["b.vms"]
    assert found.others == 1


# the small pieces


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40).filter(lambda t: t.strip("/.")), unique=True, max_size=12))
def test_ids_are_unique_printable_and_short_whatever_the_names(names):
    ids = slide_ids(names)
    assert len({value.casefold() for value in ids}) == len(names)
    for value in ids:
        assert value.isprintable()
        assert value == value.strip()
        assert 0 < len(value) <= 255
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    assert slide_ids([names[i] for i in order]) == [ids[i] for i in order]


def test_ids_say_as_little_as_is_unique():
    assert slide_ids(["x/A.svs", "y/a.svs", "z.ome.tif"]) == ["x_A", "y_a", "z"]
    assert slide_ids(["a b.svs", "a\nb.svs", "a_b.svs"])[0] == "a b"
    assert len(slide_ids(["n" * 250 + ".svs"])[0]) == 200


def test_a_split_keeps_patients_and_bytes_together_and_depends_on_the_seed():
    slides = [
        Found(f"s{i}", Path(f"s{i}"), f"s{i}", f"p{i // 3}" if i < 60 else None, f"bytes{i % 58}") for i in range(66)
    ]
    split = split_by_patient(slides, "6:2:2", seed=1)
    for key in ("patient", "identity"):
        seen: dict[str, set] = {}
        for s in split:
            if getattr(s, key):
                seen.setdefault(getattr(s, key), set()).add(s.split)
        assert all(len(v) == 1 for v in seen.values())
    assert split == split_by_patient(slides, "6:2:2", seed=1)
    assert split != split_by_patient(slides, "6:2:2", seed=2)
    assert [s.slide_id for s in split] == [s.slide_id for s in slides]


def test_manifests_need_one_column_that_is_known(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbfwhatever\na\nb\n")
    assert read_expected(path) == ("a", "b")
    for text, words in (("x,y\n1,2\n", "none of the columns"), ("uri\na\na\n", "names 'a' twice"), ("", "or no rows")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_expected(path)


def test_pipes_and_links_to_folders_are_accounted_for(tmp_path):
    from slideflow_ray.phantoms import write_marked_slide

    folder, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_marked_slide(folder / "a.tif", size_px0=(200, 300))
    write_marked_slide(elsewhere / "b.tif", size_px0=(200, 300))
    os.mkfifo(folder / "pipe.tif")
    (folder / "link").symlink_to(elsewhere)
    found = collect(folder)
    assert [s.path.name for s in found.slides] == ["a.tif"]
    assert found.others == 1
    assert list(found.unreadable) == ["link"]
    assert "folder" in found.unreadable["link"]
    assert found.files == found.slide_files + found.others + len(found.unreadable)
