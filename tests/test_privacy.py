"""Nothing of a slide's tags, label or macro reaches a result; what searches for it finds it wherever it hides."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import zarr
from corpus import DESCRIPTION, page, tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from slideflow_ray.cli import main
from slideflow_ray.errors import ConfigError
from slideflow_ray.privacy import read_words, search
from slideflow_ray.texts import plain_cell, safe_cell
from slideflow_ray.uris import check_uri

CANARY = "Zq7Canary-Müller"
LABEL_RGB = (1, 254, 3)
TEXT_TAGS = (269, 271, 272, 285, 305, 306, 315, 316, 700, 33432, 34377, 65000)


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code or 0, *capfd.readouterr()


def write_canary_slide(path, seed: int, ome: bool) -> None:
    """A slide with the canary in every text tag, and a label and a macro of one colour with it in their tags."""
    rng = np.random.default_rng(seed)
    tile = zlib.compress(rng.integers(0, 200, (256, 256, 3), np.uint8).tobytes())
    tags = {tag: (2, f"{CANARY} {tag}\0".encode()) for tag in TEXT_TAGS}
    said = "|".join(f"{key} = {CANARY}" for key in ("User", "Filename", "Date", "Patient"))
    aperio = f"Aperio Image Library v11\r\n512x512|AppMag = 20|MPP = 0.5|{said}\0"
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Experimenter ID="Experimenter:0" LastName="{CANARY}"/><Image ID="Image:0" Name="{CANARY}">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="512" SizeY="512" '
        'SizeC="3" SizeZ="1" SizeT="1" '
        'PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0"/>'
        "</Pixels></Image></OME>\0"
    )
    first = page(tile=tile) | tags | {DESCRIPTION: (2, (xml if ome else aperio).encode())}
    paint = zlib.compress(np.full((256, 256, 3), LABEL_RGB, np.uint8).tobytes())
    extra = [
        page(200, 190, tile=paint) | tags | {DESCRIPTION: (2, f"Aperio\r\n{n} {CANARY}\0".encode())}
        for n in ("label", "macro")
    ]
    path.write_bytes(tiff(first, *([] if ome else extra)))


@pytest.fixture
def canaries(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = []
    for i, (split, label) in enumerate((s, c) for s in ("val", "test") for c in ("normal", "tumor")):
        name = f"s{i}.{'ome.tif' if i % 2 else 'svs'}"
        write_canary_slide(folder / name, i, bool(i % 2))
        rows.append(f"s{i},{name},{split},{label},tem\n")
    (folder / "cohort.csv").write_text("slide_id,uri,split,label,modality\n" + "".join(rows))
    return folder


def test_a_canary_in_every_tag_and_label_appears_nowhere(canaries, bundles, tmp_path, capfd):
    assert CANARY.encode() in (canaries / "s0.svs").read_bytes()
    out, said = tmp_path / "out", ""
    words = ["run", "--cohort", canaries / "cohort.csv", "-m", bundles["aligned"], "-o", out, "--workers", "1"]
    for arguments in (words, ["evaluate", out], ["report", out], ["export", out, "--to", "csv"], ["status", out]):
        code, told, logged = call(capfd, *arguments)
        assert code == 0, logged
        said += told + logged
    call(capfd, "export", out, "--to", "geojson")
    call(capfd, "export", out, "--to", "ome-zarr")
    (tmp_path / "log.txt").write_text(said)
    assert search(out, [CANARY, "Zq7Canary"]) == ()
    assert search(tmp_path / "log.txt", [CANARY, "Zq7Canary"]) == ()
    assert call(capfd, "doctor", "--privacy", out, "--string", CANARY)[0] == 0
    assert not any(LABEL_RGB in colours for colours in pictures(out / "report.html"))
    (out / "slides" / "notes.txt").write_text(f"seen by {CANARY.upper()}")  # and so it can be found
    code, told, _ = call(capfd, "doctor", "--privacy", out, "--string", CANARY, "--json")
    assert code == 5
    assert json.loads(told) == [{"word": CANARY, "path": "slides/notes.txt", "part": "bytes"}]


def test_a_canary_in_every_text_of_a_dicom_series_appears_nowhere(data, bundles, tmp_path, capfd):
    source, folder = data / "slides" / "cmu1small_dicom", tmp_path / "in" / "series"
    folder.mkdir(parents=True)
    texts = {"LO", "LT", "PN", "SH", "ST", "UT"}
    people = ("PatientName", "PatientID", "InstitutionName", "OperatorsName", "AccessionNumber", "ImageComments")
    for path in source.iterdir():
        slide = pydicom.dcmread(path)
        slide.SpecificCharacterSet = "ISO_IR 192"
        for element in [e for e in slide.iterall() if e.VR in texts and e.keyword != "ContainerIdentifier"]:
            element.value = CANARY
        for keyword in people:
            setattr(slide, keyword, CANARY)
        slide.add_new(0x00090010, "LO", CANARY)  # a private block
        slide.add_new(0x00091001, "LT", f"{CANARY} again")
        slide.save_as(folder / path.name)
        assert (folder / path.name).read_bytes().count(CANARY.encode()) > len(people)
    out = tmp_path / "out"
    words = ["run", folder, "-m", bundles["aligned"], "-o", out, "--workers", "1", "--min-tissue", "0.9"]
    said = ""
    for arguments in (words, ["report", out], ["export", out, "--to", "csv"], ["status", out]):
        code, told, logged = call(capfd, *arguments)
        assert code == 0, logged
        said += told + logged
    assert search(out, [CANARY, "Zq7Canary"]) == ()
    assert "Zq7Canary" not in said


def pictures(html):
    """The colours of each picture in a page."""
    for part in html.read_text().split("base64,")[1:]:
        data = base64.b64decode(part.split('"')[0].split(")")[0])
        yield {tuple(c) for c in np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3)}


def _png(folder):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Comment", CANARY, zip=True)
    Image.new("RGB", (9, 9)).save(folder / "a.png", pnginfo=info)


def _page(folder):
    _png(folder)
    picture = base64.b64encode((folder / "a.png").read_bytes()).decode()
    (folder / "a.png").unlink()
    (folder / "r.html").write_text(f'<img src="data:image/png;base64,{picture}">')


def _table(folder):
    pq.write_table(pa.table({"a": ["x" * 500] * 99 + [CANARY]}), folder / "a.parquet", compression="zstd")


def _about_a_table(folder):
    table = pa.table({"a": [1]}).replace_schema_metadata({"who": CANARY})
    pq.write_table(table, folder / "a.parquet")


def _chunk(folder):
    array = zarr.create_array(folder / "a.zarr", shape=(9000,), chunks=(4500,), shards=(9000,), dtype="uint8")
    data = np.zeros(9000, np.uint8)
    text = CANARY.encode()
    data[5000 : 5000 + len(text)] = np.frombuffer(text, np.uint8)
    array[:] = data


def _zip(folder):
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", "x" * 999 + CANARY)


HIDING = {
    "text": lambda f: (f / "a.txt").write_text(CANARY),
    "over a seam": lambda f: (f / "a.log").write_bytes(b"x" * (2**22 - 5) + CANARY.encode() + b"x" * 99),
    "json": lambda f: (f / "a.json").write_text(json.dumps({"a": CANARY})),
    "html": lambda f: (f / "a.html").write_text(CANARY.replace("ü", "&uuml;")),
    "utf-16": lambda f: (f / "a").write_bytes(CANARY.encode("utf-16")),
    "name": lambda f: (f / f"{CANARY}.bin").touch(),
    "folder": lambda f: (f / CANARY).mkdir(),
    "link": lambda f: (f / "a").symlink_to(f"/nowhere/{CANARY}"),
    "gzip": lambda f: (f / "a.gz").write_bytes(gzip.compress(CANARY.encode())),
    "png": _png,
    "page": _page,
    "table": _table,
    "about a table": _about_a_table,
    "chunk": _chunk,
    "zip": _zip,
    "attribute": lambda f: zarr.open_group(f / "g.zarr", mode="w").attrs.update(who=CANARY),
}


@pytest.mark.parametrize("where", HIDING)
def test_a_word_is_found_wherever_it_hides(where, tmp_path):
    (tmp_path / "t").mkdir()
    HIDING[where](tmp_path / "t")
    assert search(tmp_path / "t", [CANARY])
    assert not search(tmp_path / "t", ["Zq8Canary"])


def test_words_come_from_options_and_a_file_and_short_ones_are_refused(tmp_path, capfd):
    (tmp_path / "w.txt").write_text("Alice\n\n Bob B. \n")
    assert read_words(["Carol"], tmp_path / "w.txt") == ("Carol", "Alice", "Bob B.")
    for words in ([], ["ab"]):
        with pytest.raises(ConfigError):
            read_words(words, None)
    assert call(capfd, "doctor", "--string", "Alice")[0] == 2
    assert call(capfd, "doctor", "--privacy", tmp_path / "none", "--string", "Alice")[0] == 2


@given(st.text())
def test_no_cell_is_a_formula_or_moves_a_cursor(text):
    cell = safe_cell(text)
    assert cell.isprintable() or cell == ""
    if cell[:1] in tuple("=+-@\t\r\n"):
        float(cell)
    if text.isprintable():
        assert cell == text or plain_cell(cell) == text


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))), min_size=1, max_size=4))
def test_rows_survive_the_csv_module(row):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([safe_cell(v) for v in row])
    assert next(csv.reader(io.StringIO(out.getvalue()))) == [safe_cell(v) for v in row]


@given(st.integers(0, 255), st.integers(0, 255), st.sampled_from(["{}", "{}/a.svs", "{}:8080/x"]))
def test_link_local_in_any_spelling_is_refused(c, d, form):
    number = 169 << 24 | 254 << 16 | c << 8 | d
    octal = f"0251.0376.{c:#o}.{d:#o}".replace("0o", "0")
    for host in (f"169.254.{c}.{d}", str(number), hex(number), octal, f"[::ffff:169.254.{c}.{d}]"):
        for scheme in ("http", "https", "s3"):
            with pytest.raises(ValueError, match="link-local"):
                check_uri(f"{scheme}://{form.format(host)}")


def test_a_signed_address_is_refused_and_not_repeated(tmp_path, bundles, capfd):
    with pytest.raises(ValueError, match="query"):
        check_uri("https://host/a.svs?X-Amz-Signature=SECRETSIG")
    (tmp_path / "cohort.csv").write_text("slide_id,uri\nc,https://host/c.tif?X-Amz-Signature=SECRETSIG\n")
    words = ["run", "--cohort", tmp_path / "cohort.csv", "-m", bundles["aligned"], "-o", tmp_path / "out"]
    code, told, logged = call(capfd, *words)
    assert code == 2
    assert "SECRETSIG" not in told + logged
    assert "query" in logged


@given(st.text(min_size=1))
def test_a_uri_is_taken_as_it_is_or_refused(text):
    try:
        assert check_uri(text) == text
    except ValueError:
        assert not text.isprintable() or "://" in text or len(text) > 4096
