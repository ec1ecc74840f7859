"""nightly: three nights of a clinic, with slides added, replaced, moved, doubled, removed, broken and half copied."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tifffile

from slideflow_ray import bucket, cli, storage
from slideflow_ray.accounting import read_run
from slideflow_ray.errors import ConfigError, LeaseError
from slideflow_ray.events import ChunkScored
from slideflow_ray.lease import lease
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.nightly.alert import raise_alert
from slideflow_ray.nightly.drift import compare, outlying, stability
from slideflow_ray.nightly.night import Night, run_night
from slideflow_ray.nightly.sources import list_sources
from slideflow_ray.nightly.spec import AlertSpec, DriftSpec, load_nightly, parse_nightly
from slideflow_ray.phantoms import halved, write_pyramid, write_slide
from slideflow_ray.repair import verify
from tests.object_store import BUCKET, object_store

MONDAY, TUESDAY, FRIDAY = date(2026, 11, 16), date(2026, 11, 17), date(2026, 11, 20)


def old(path: Path) -> Path:
    """Say that a file was last changed an hour ago."""
    then = time.time() - 3600
    os.utime(path, (then, then))
    return path


def phantom(path: Path, seed: int, stain: float = 1.0) -> Path:
    """A small H&E slide, its optical density times `stain`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, seed=seed, size_px0=(768, 640), tumour=bool(seed % 2))
    if stain != 1.0:
        rgb = tifffile.imread(path, key=0)
        density = -np.log10((rgb.astype(np.float64) + 1) / 256) * stain
        shifted = np.clip(np.rint(256 * 10**-density - 1), 0, 255).astype(np.uint8)
        write_pyramid(path, halved(shifted, 2), 0.5)
    return old(path)


@pytest.fixture(scope="module")
def clinic(bundles, tmp_path_factory) -> Path:
    """A folder that is watched, a reference of sixteen slides, and nightly.toml."""
    folder = tmp_path_factory.mktemp("clinic")
    for seed in range(16):
        phantom(folder / "reference" / f"r{seed}.tif", seed)
    rows = "".join(f"r{seed},reference/r{seed}.tif,p{seed},val\n" for seed in range(16))
    (folder / "reference.csv").write_text(f"slide_id,uri,patient_id,split\n{rows}")
    shutil.copytree(bundles["aligned"], folder / "bundle")
    (folder / "inbox").mkdir()
    (folder / "nightly.toml").write_text(
        'out = "nightly"\nwatch = ["inbox"]\npatient_pattern = "(p\\\\d+)_"\nrescore = 3\nsettle_s = 60\n'
        '[[model]]\npath = "bundle"\n[executor]\nworkers = 2\n[reference]\ncohort = "reference.csv"\n'
        '[alert]\nfile = "alerts.jsonl"\n'
    )
    return folder


def night(clinic: Path, day: date, listen=lambda event: None) -> Night:
    return run_night(load_nightly(clinic / "nightly.toml"), day, listen)


def main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_nights_of_a_clinic(clinic, capsys):
    inbox = clinic / "inbox"
    for seed in range(4):
        phantom(inbox / f"p{seed}_a.tif", 100 + seed)
    (inbox / "notes.txt").write_text("no slide")
    first = night(clinic, MONDAY)
    assert first.source == {"new": 4, "changed": 0, "renamed": 0, "unchanged": 0, "duplicate": 0, "waiting": 0}
    assert first.accounted == {"done": 4, "failed": 0, "refused": 0, "duplicate": 0, "waiting": 0, "turn": 0}
    assert (first.others, first.missed, first.drifted) == (1, (), ())
    assert first.outlying == {}
    assert len(first.tonight) >= 5
    assert all(m.n == 4 and m.m == 16 for m in first.tonight)
    record = read_run(clinic / "nightly" / "results")
    assert [item["patient_id"] for item in record["items"]] == ["p0", "p1", "p2", "p3"]
    assert not (clinic / "nightly" / "nights" / "2026-11-16" / "alert.json").exists()

    # a replaced, a removed, a moved, a doubled, a touched, a broken and a half-copied one; two of them are new
    phantom(inbox / "p0_a.tif", 200)
    (inbox / "p1_a.tif").unlink()
    old((inbox / "p2_a.tif").rename(inbox / "p2_moved.tif"))
    os.utime(inbox / "p3_a.tif", (time.time() - 7200,) * 2)
    old(shutil.copy(inbox / "p3_a.tif", inbox / "p3_copy.tif"))
    whole = phantom(clinic / "whole.tif", 201).read_bytes()
    (inbox / "p5_broken.tif").write_bytes(whole[: len(whole) // 2])
    old(inbox / "p5_broken.tif")
    (inbox / "p6_half.tif").write_bytes(whole[: len(whole) // 3])  # now
    phantom(inbox / "p7_b.tif", 202)
    scored: list = []
    second = night(clinic, TUESDAY, scored.append)
    assert set(second.new) == {"p7_b", "p5_broken"}
    assert second.changed == ("p0_a",)
    assert second.renamed == ("p2_a",)  # it keeps its id
    assert second.removed == ("p1_a",)
    assert [Path(uri).name for uri in second.waiting] == ["p6_half.tif"]
    assert [Path(uri).name for uri in second.duplicates] == ["p3_copy.tif"]
    assert second.ended["p5_broken"]["code"].startswith("E_")
    assert second.accounted == {"done": 4, "failed": 0, "refused": 1, "duplicate": 1, "waiting": 1, "turn": 0}
    assert {e.slide_id for e in scored if isinstance(e, ChunkScored)} == {"p0_a", "p7_b"}
    assert {i["slide_id"] for i in read_run(clinic / "nightly" / "results")["items"]} == {
        "p0_a",
        "p2_a",
        "p3_a",
        "p5_broken",
        "p7_b",
    }

    # the copy is whole, the broken one mended; nights were missed
    (inbox / "p6_half.tif").write_bytes(whole)
    old(inbox / "p6_half.tif")
    phantom(inbox / "p5_broken.tif", 203)
    third = night(clinic, FRIDAY)
    assert third.missed == ("2026-11-18", "2026-11-19")
    assert (third.new, third.changed, third.drifted) == (("p6_half",), ("p5_broken",), ())
    assert third.accounted == {"done": 6, "failed": 0, "refused": 0, "duplicate": 1, "waiting": 0, "turn": 0}

    # five slides come in another stain
    for seed in range(5):
        phantom(inbox / f"p1{seed}_dark.tif", 300 + seed, stain=1.9)
    assert main(["nightly", str(clinic / "nightly.toml"), "--date", "2026-11-20", "--json"]) == 6
    fourth = json.loads(capsys.readouterr().out)
    assert fourth["name"] == "2026-11-20-2"
    assert len(fourth["new"]) == 5
    assert {text.split(" of ")[0] for text in fourth["drift"]} >= {"stain, red", "stain, green", "stain, blue"}
    assert not any("tissue" in text for text in fourth["drift"])
    assert set(fourth["outlying"]) <= set(fourth["new"])
    assert fourth["outlying"]
    folder = clinic / "nightly" / "nights" / fourth["name"]
    assert json.loads((folder / "alert.json").read_text())["drift"] == fourth["drift"]
    assert len((clinic / "alerts.jsonl").read_text().splitlines()) == 1
    assert "Drift." in (folder / "night.html").read_text()
    assert (folder / "report.html").exists()

    # another bundle: three of eleven each night, and its scores stay apart from the earlier one's
    card = read_card(clinic / "bundle")
    weights = {name: value * 1.1 for name, value in load_weights(clinic / "bundle").items()}
    write_bundle(clinic / "bundle", card, weights, overwrite=True)
    text = (clinic / "nightly.toml").read_text().replace("[reference]", "[keep]\nnights = 2\nsuperseded = false\n#")
    (clinic / "nightly.toml").write_text(text.replace('cohort = "reference.csv"', ""))
    fifth = night(clinic, date(2026, 11, 21))
    assert fifth.accounted == {"done": 3, "failed": 0, "refused": 0, "duplicate": 1, "waiting": 0, "turn": 8}
    assert set(fifth.rescored) <= set(fourth["new"])  # the latest first
    record = read_run(clinic / "nightly" / "results")
    assert set(record["outcomes"]) == set(fifth.rescored)
    assert {node for o in record["outcomes"].values() for _, node in o["grids"]} == {record["models"][0]["node"]}
    assert f"nights/{MONDAY}" in fifth.pruned
    nodes = [node for node in fifth.pruned if ": scores/" in node]
    assert {node.split(":")[0] for node in nodes} == set(fifth.rescored)  # the others keep what they have
    assert verify(clinic / "nightly" / "results")[1] == []
    sixth = night(clinic, date(2026, 11, 22))
    assert (sixth.accounted["done"], sixth.accounted["turn"]) == (6, 5)
    assert not set(sixth.rescored) & set(fifth.rescored)


def test_two_nights_never_overlap(clinic):
    (clinic / "nightly").mkdir(exist_ok=True)
    with lease(clinic / "nightly"), pytest.raises(LeaseError, match="in use"):
        night(clinic, FRIDAY)


# what is there


def test_a_file_that_has_just_changed_waits_unless_it_was_seen_so(clinic, tmp_path):
    shutil.copy(clinic / "nightly.toml", tmp_path / "nightly.toml")
    phantom(tmp_path / "inbox" / "a.tif", 1)
    spec = load_nightly(tmp_path / "nightly.toml")
    (uri,) = list_sources(spec, {}).slides
    assert list_sources(spec, {}).slides[uri].waits == ""
    os.utime(tmp_path / "inbox" / "a.tif")
    found = list_sources(spec, {}).slides[uri]
    assert "ago" in found.waits
    assert list_sources(spec, {uri: found.seen}).slides[uri].waits == ""


def test_rows_of_a_cohort_say_more_of_slides_that_are_watched(clinic, tmp_path):
    phantom(tmp_path / "inbox" / "a.tif", 1)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label,split\nA,inbox/a.tif,tumor,test\nB,gone.tif,normal,val\n")
    text = (clinic / "nightly.toml").read_text()
    (tmp_path / "nightly.toml").write_text(f'cohort = "cohort.csv"\n{text}')
    listing = list_sources(load_nightly(tmp_path / "nightly.toml"), {})
    by_id = {source.item.slide_id: source for source in listing.slides.values() if source.item}
    assert by_id["A"].item.label == "tumor"
    assert by_id["B"].problem == "it is not there"
    assert len(listing.slides) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('out = "o"\n[[model]]\npath = "b"\n', "watch"),
        ('out = "o"\nwatch = ["w"]\n', "model"),
        ('out = "o"\nwatch = ["w"]\nwach = 3\n[[model]]\npath = "b"\n', "wach"),
        ('out = "o"\nwatch = ["w"]\n[[model]]\npath = "b"\n[drift]\npsi = -1\n', "psi"),
        ("out = ", "TOML"),
    ],
)
def test_a_bad_setting_is_named(text, said, tmp_path):
    (tmp_path / "nightly.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_nightly(tmp_path / "nightly.toml")


def test_a_folder_that_is_not_there_is_no_empty_folder(clinic, tmp_path):
    """A share that is not mounted must not make every slide a removed one."""
    shutil.copy(clinic / "nightly.toml", tmp_path / "nightly.toml")
    with pytest.raises(ConfigError, match="not a folder"):
        list_sources(load_nightly(tmp_path / "nightly.toml"), {})
    (tmp_path / "inbox").mkdir()
    spec = load_nightly(tmp_path / "nightly.toml")
    assert list_sources(spec, {}).slides == {}
    known = {str(tmp_path / "inbox" / "a.tif"): [1, "2"]}
    with pytest.raises(ConfigError, match="holds none now"):
        list_sources(spec, known)
    assert list_sources(spec.model_copy(update={"may_empty": True}), known).slides == {}


@pytest.fixture
def scans(monkeypatch, tmp_path) -> Iterator[str]:
    """A bucket's prefix, on a server of our own."""
    monkeypatch.setenv("SLIDEFLOW_RAY_CACHE", str(tmp_path / "cache"))
    with object_store() as (url, _):
        for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        bucket.opened.cache_clear()
        yield f"s3://{BUCKET}/scans"
        bucket.opened.cache_clear()


def test_a_prefix_of_a_bucket_is_watched_like_a_folder(scans, marked, bundles, tmp_path):
    def put(name: str, path: Path) -> None:
        storage.write_atomic(storage.place(f"{scans}/{name}"), path.read_bytes())

    values = {"out": str(tmp_path / "nightly"), "watch": [scans], "modality": "tem", "executor": {"workers": 1}}
    spec = parse_nightly({**values, "model": [{"path": str(bundles["aligned"])}]}, "test")
    assert list_sources(spec, {}).slides == {}
    put("2026/a.tif", marked / "a.tif")
    put("notes.txt", marked / "cohort.csv")
    first = run_night(spec, MONDAY)
    assert (first.new, first.accounted["done"], first.others) == (("a",), 1, 1)
    put("2026/a.tif", marked / "b.tif")
    put("2026/copy.tif", marked / "b.tif")
    put("c.tif", marked / "c.tif")
    second = run_night(spec, TUESDAY)
    assert (second.changed, second.new) == (("a",), ("c",))
    assert list(second.duplicates) == [f"{scans}/2026/copy.tif"]
    assert second.accounted["done"] == 2


def small(tmp_path: Path, bundles: dict[str, Path], **more: object) -> dict:
    """Settings of a night without a reference."""
    values = {"out": str(tmp_path / "nightly"), "watch": [str(tmp_path / "inbox")], "modality": "tem", "settle_s": 60}
    return {**values, "model": [{"path": str(bundles["aligned"])}], "executor": {"workers": 1}, **more}


def test_odd_files_are_left_alone_and_the_others_scored(marked, bundles, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    old(shutil.copy(marked / "c.tif", inbox / "c.tif"))
    old(shutil.copy(marked / "a.tif", inbox / "=a.tif"))
    shutil.copy(marked / "b.tif", os.fsencode(inbox) + b"/b\xff.tif")
    shutil.copy(marked / "b.tif", inbox / "b.tif")
    ahead = time.time() + 4e7  # a clock that is wrong
    os.utime(inbox / "b.tif", (ahead, ahead))
    (tmp_path / "link").symlink_to(inbox)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label,modality\nPAT1,link/c.tif,tumor,tem\n")
    spec = parse_nightly(small(tmp_path, bundles, cohort=str(tmp_path / "cohort.csv")), "test")
    first = run_night(spec, MONDAY)
    assert set(first.new) == {"PAT1", "_=a"}
    assert first.accounted["done"] == 2
    assert list(first.unusable) == ["'b\\udcff.tif'"]
    assert [Path(uri).name for uri in first.waiting] == ["b.tif"]
    rows = {i["slide_id"]: i.get("label") for i in read_run(tmp_path / "nightly" / "results")["items"]}
    assert rows["PAT1"] == "tumor"
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label,modality\n_=a,link/b.tif,tumor,tem\n")
    second = run_night(spec, TUESDAY)  # the id is another slide's; c goes on without a row
    assert second.accounted["waiting"] == 1
    assert "is that of" in next(iter(second.waiting.values()))


def test_a_night_without_anything_scored_shows_no_old_report(marked, bundles, tmp_path):
    (tmp_path / "inbox").mkdir()
    old(shutil.copy(marked / "c.tif", tmp_path / "inbox" / "c.tif"))
    shutil.copytree(bundles["aligned"], tmp_path / "bundle")
    values = small(tmp_path, bundles, rescore=0, model=[{"path": str(tmp_path / "bundle")}])
    assert run_night(parse_nightly(values, "test"), MONDAY).report
    weights = {name: value * 2 for name, value in load_weights(bundles["aligned"]).items()}
    write_bundle(tmp_path / "bundle", read_card(tmp_path / "bundle"), weights, overwrite=True)
    second = run_night(parse_nightly(values, "test"), TUESDAY)
    assert (second.accounted["turn"], second.report) == (1, "")
    assert not (tmp_path / "nightly" / "nights" / "2026-11-17" / "report.html").exists()


# drift


def test_stability_is_the_sum_of_the_textbook():
    rng = np.random.default_rng(0)
    before, now = rng.normal(size=400), rng.normal(0.5, 1, 300)
    psi, _ = stability(now, before, 0.01)
    edges = np.concatenate([[-np.inf], np.quantile(before, np.linspace(0, 1, 11)[1:-1]), [np.inf]])
    p, q = ((np.histogram(values, edges)[0] + 0.5) / (len(values) + 5) for values in (before, now))
    assert psi == pytest.approx(sum((b - a) * np.log(b / a) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize(("n", "m"), [(5, 30), (50, 100)])
def test_without_change_there_is_hardly_ever_an_alarm(n, m):
    rng = np.random.default_rng(1)
    spec = DriftSpec()
    alarms = 0
    for _ in range(200):
        before, now = ([{name: float(rng.normal()) for name in "abcde"} for _ in range(k)] for k in (m, n))
        alarms += any(measure.drift for measure in compare(now, before, spec))
    assert alarms <= 8  # alpha is 0.01 for all measures together, by two tests


@pytest.mark.parametrize(("shift", "n"), [(3.0, 6), (1.2, 40)])
def test_a_shift_is_found_in_the_measure_that_shifts(shift, n):
    rng = np.random.default_rng(2)
    before = [{"a": float(rng.normal()), "b": float(rng.normal())} for _ in range(100)]
    now = [{"a": float(rng.normal(shift)), "b": float(rng.normal())} for _ in range(n)]
    assert {m.name: m.drift for m in compare(now, before, DriftSpec())} == {"a": True, "b": False}


def test_one_slide_far_outside_is_named_where_the_many_hide_it():
    before = [{"a": 0.1 * i, "b": 0.1 * i} for i in range(20)]
    now = {f"s{i}": {"a": 0.1 * i, "b": 0.1 * i} for i in range(10)} | {"odd": {"a": 9.0, "b": 1.0}}
    assert not any(m.drift for m in compare(list(now.values()), before, DriftSpec()))
    assert list(outlying(now, before, DriftSpec())) == ["odd"]
    assert outlying(now, before, DriftSpec())["odd"].startswith("a 9 (reference 0.95)")


def test_where_no_shift_could_be_found_that_is_said():
    (measure,) = compare([{"a": 1e6}] * 4, [{"a": float(i)} for i in range(4)], DriftSpec())
    assert not measure.drift
    assert "too few" in measure.why


def test_a_reference_that_never_varies_makes_no_drift_of_rounding():
    before, now = [{"a": 1.0}] * 30, [{"a": 1.0 - 1e-9 * i} for i in range(6)]
    (measure,) = compare(now, before, DriftSpec())
    assert not measure.drift
    assert compare([{"a": float("nan")}] * 6, before, DriftSpec())[0].n == 0
    assert outlying({"s": {"a": 1.0 - 1e-9}}, before, DriftSpec()) == {}


def test_too_few_slides_are_not_judged():
    (measure,) = compare([{"a": 99.0}], [{"a": 0.0}] * 50, DriftSpec())
    assert not measure.drift
    assert "1 new slides and 50" in measure.why


# alerts


def test_an_alert_is_posted_and_a_dead_address_ends_nothing(tmp_path):
    got = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/hook"
        raise_alert(AlertSpec(webhook=address), tmp_path, "2026-11-21", ["stain: PSI 3"])
        server.shutdown()
    assert got[0]["drift"] == ["stain: PSI 3"]
    assert json.loads((tmp_path / "alert.json").read_text())["told"] == ["webhook: 204"]
    raise_alert(AlertSpec(webhook=address), tmp_path, "2026-11-21", ["stain: PSI 3"])
    assert "refused" in json.loads((tmp_path / "alert.json").read_text())["told"][0]


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n"]
)
def test_a_webhook_that_answers_oddly_is_written_down(answer, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        raise_alert(AlertSpec(webhook=f"http://127.0.0.1:{server.getsockname()[1]}/x"), tmp_path, "n", ["x"])
    (told,) = json.loads((tmp_path / "alert.json").read_text())["told"]
    assert told.startswith("webhook: 302" if answer.startswith(b"HTTP") else "webhook: no answer in HTTP")


@pytest.mark.parametrize(
    "address", ["htp://x", "http://169.254.169.254/x", "http://h:80a/x", "http://h/a b", "https://h/é"]
)
def test_a_webhook_that_cannot_be_is_refused_before_the_night(address):
    with pytest.raises(ValueError, match="webhook"):
        AlertSpec.parse({"webhook": address}, "test")
