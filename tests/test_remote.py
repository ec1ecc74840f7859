"""Slides and results in an object store: the same answers as on disk, whatever the network does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from object_store import BUCKET, Faults, object_store
from PIL import Image
from scored import two_class, write_scored_run
from web_server import Web, web_server

from slideflow_ray import bucket, storage, website
from slideflow_ray.blocks import BLOCK, Blocks, NoRanges
from slideflow_ray.cache import cache_folder, room
from slideflow_ray.calibrate import calibrate
from slideflow_ray.collect import collect
from slideflow_ray.errors import ConfigError, DiskFull, LeaseError, ReadError, SlideNotFound, SourceChanged
from slideflow_ray.evaluate import evaluate
from slideflow_ray.export import export
from slideflow_ray.identity import identity
from slideflow_ray.lease import held, lease
from slideflow_ray.phantoms import halved, write_pyramid
from slideflow_ray.promote import promote
from slideflow_ray.remote import at_hand, fetched, look
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import stores, verify

ROOT = Path(__file__).resolve().parent.parent
SECRET = "wJalrXUtnFEMI-SECRET"


@pytest.fixture(scope="module")
def server():
    with object_store() as (url, faults):
        yield url, faults


@pytest.fixture
def faults(server, monkeypatch, tmp_path) -> Faults:
    url, found = server
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "SLIDEFLOW_RAY_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket.opened.cache_clear()
    storage._zarr_store.cache_clear()
    found.calm()
    yield found
    found.calm()


def uploaded(folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_atomic(
                storage.place(f"s3://{BUCKET}/{name}/{path.relative_to(folder).as_posix()}"), path.read_bytes()
            )
    return f"s3://{BUCKET}/{name}"


def arrays(out: str) -> dict[str, bytes]:
    """Every array of a run by slide and node, as dtype, shape and bytes."""
    found = {}
    for store in stores(out):
        group = zarr.open_group(storage.zarr_store(store.root), mode="r")
        for name, member in group.members(max_depth=None):
            if isinstance(member, zarr.Array):
                values = np.asarray(member[...])
                found[f"{store.slide_id}/{name}"] = f"{values.dtype} {values.shape}".encode() + values.tobytes()
    return found


def run_of(cohort: str, bundle: str, out: str) -> dict[str, int]:
    values = {"cohort": cohort, "out": out, "model": [{"path": bundle}], "executor": {"workers": 2}}
    return run(RunSpec.parse(values, "test")).counts


def test_slides_and_results_in_an_object_store_are_those_on_disk(faults, marked, bundles, tmp_path):
    (marked / "remote.csv").write_text("slide_id,uri,modality\nb,b.tif,tem\nc,c.tif,tem\nd,d.svs,tem\n")
    here = run_of(str(marked / "remote.csv"), str(bundles["aligned"]), str(tmp_path / "out"))
    cohort = uploaded(marked, "slides")
    bundle = uploaded(bundles["aligned"], "bundles/aligned")
    faults.every = 23
    out = f"s3://{BUCKET}/results/night 1"
    there = run_of(f"{cohort}/remote.csv", bundle, out)
    assert here == there == {"done": 2, "failed": 0, "refused": 1}
    assert sum(faults.counts.values()) > 15
    assert {"503", "reset", "429", "short"} <= set(faults.counts)
    local, remote = arrays(str(tmp_path / "out")), arrays(out)
    assert sorted(local) == sorted(remote)
    assert [name for name in local if local[name] != remote[name]] == []
    assert verify(out)[1] == []
    again = run(RunSpec.parse(json.loads((storage.place(out) / "run.json").read_text())["spec"], "test"))
    assert not again.changed
    everything = b"".join(path.read_bytes() for path in storage.place(out).rglob("*") if path.is_file())
    assert SECRET.encode() not in everything


def test_an_object_that_changes_while_it_is_read_is_an_error(faults):
    place = storage.place(f"s3://{BUCKET}/changing/slide.tif")
    storage.write_atomic(place, b"old" * 1000)
    seen = look(str(place))
    storage.write_atomic(place, b"new" * 1000)
    with pytest.raises(SourceChanged, match="changed while it was read"):
        fetched(seen)
    assert at_hand(str(place)).read_bytes() == b"new" * 1000


def test_what_is_known_is_not_fetched_again(faults):
    place = storage.place(f"s3://{BUCKET}/known/slide.tif")
    storage.write_atomic(place, b"x" * 5000)
    asked = []
    faults.before = lambda environ: asked.append(environ["REQUEST_METHOD"])
    first = at_hand(str(place))
    assert asked.count("GET") == 1
    assert at_hand(str(place)) == first
    assert asked.count("GET") == 1
    assert first.name == "slide.tif"  # siblings and suffixes matter to libraries


def test_identities_of_remote_files_are_remembered_by_etag_and_size(faults, tmp_path):
    place = storage.place(f"s3://{BUCKET}/identity/slide.tif")
    storage.write_atomic(place, b"x" * 5000)
    wanted = f"sha256:{hashlib.sha256(b'x' * 5000).hexdigest()}"
    assert identity(str(place), tmp_path / "notes") == wanted
    shutil.rmtree(cache_folder())
    asked = []
    faults.before = lambda environ: asked.append(environ["REQUEST_METHOD"])
    assert identity(str(place), tmp_path / "notes") == wanted
    assert "GET" not in asked
    with pytest.raises(ReadError, match="the cohort says"):
        identity(str(place), tmp_path / "notes", "0" * 64)


def test_the_cache_is_bounded_and_keeps_what_was_asked_for_last(faults, monkeypatch):
    monkeypatch.setenv("SLIDEFLOW_RAY_CACHE_GB", "0.000012")
    uris = [f"s3://{BUCKET}/bounded/{name}.tif" for name in "abc"]
    for uri in uris:
        storage.write_atomic(storage.place(uri), uri.encode() * 200)
    a, b = at_hand(uris[0]), at_hand(uris[1])
    os.utime(a.parent, (1, 1))
    at_hand(uris[0])  # asked for again: b is the older one
    os.utime(b.parent, (2, 2))
    c = at_hand(uris[2])
    assert a.exists()
    assert c.exists()
    assert not b.exists()
    storage.write_atomic(storage.place(uris[0]), b"x" * 13_000)
    with pytest.raises(DiskFull, match="SLIDEFLOW_RAY_CACHE"):
        at_hand(uris[0])


def test_what_is_not_there_or_not_open_to_us_is_said_without_secrets(faults):
    with pytest.raises(SlideNotFound, match="does not exist"):
        at_hand(f"s3://{BUCKET}/none.tif")
    faults.before = lambda environ: "403 Forbidden"
    with pytest.raises(ReadError, match="cannot be fetched") as error:
        at_hand(f"s3://{BUCKET}/closed.tif")
    assert SECRET not in str(error.value)


def test_two_runs_on_one_folder_in_a_bucket_keep_out_of_each_other_s_way(faults):
    out = storage.place(f"s3://{BUCKET}/leased")
    with lease(out):
        assert held(out)
        with pytest.raises(LeaseError, match="in use by process"), lease(out):
            pass
    assert not held(out)


def test_a_stale_lease_is_taken_over_by_one_of_two(faults):
    out = storage.place(f"s3://{BUCKET}/stale")
    dead = storage.to_json({"owner": "dead", "host": "gone", "pid": 1})
    storage.write_atomic(out / "lease.json", dead)
    assert storage.swap(out / "lease.json", dead, b"{}")
    assert not storage.swap(out / "lease.json", dead, b"{ }")
    assert (out / "lease.json").read_bytes() == b"{}"


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_swap_is_refused_where_anything_changed_since_the_look(where, faults, tmp_path):
    path = storage.place(tmp_path if where == "disk" else f"s3://{BUCKET}/swapped") / "file.json"
    assert not storage.swap(path, b"1", b"2")  # there is none
    assert storage.swap(path, None, b"1")
    assert not storage.swap(path, None, b"2")
    assert not storage.swap(path, b"0", b"2")
    assert path.read_bytes() == b"1"
    faults.every = 2
    assert storage.swap(path, b"1", b"2")
    faults.every = 0
    storage.discard(path, b"1")
    assert path.read_bytes() == b"2"
    storage.discard(path, b"2")
    assert storage.read_bytes(path) is None


def test_a_swap_whose_object_changes_in_between_is_refused(faults):
    path = storage.place(f"s3://{BUCKET}/swapped/late.json")
    storage.write_atomic(path, b"1")

    def other_first(environ) -> None:
        if environ["REQUEST_METHOD"] == "PUT":
            faults.before = lambda environ: None
            storage.write_atomic(path, b"theirs")

    faults.before = other_first
    assert not storage.swap(path, b"1", b"ours")
    assert path.read_bytes() == b"theirs"


def test_created_once_even_if_the_answer_got_lost(faults):
    path = storage.place(f"s3://{BUCKET}/once.json")
    assert storage.create(path, b"1")
    assert storage.create(path, b"1")  # the same bytes: ours, as far as anybody can tell
    assert not storage.create(path, b"2")
    assert path.read_bytes() == b"1"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("simplecache::s3://bucket/a", "chains protocols"),
        ("ftp://host/a", "scheme 'ftp'"),
        ("https://host/a", "SLIDEFLOW_RAY_ALLOW=https"),
        ("s3://key:secret@bucket/a", "credentials"),
    ],
)
def test_other_schemes_chains_and_credentials_are_refused(uri, why):
    with pytest.raises(ConfigError, match=why) as error:
        at_hand(uri)
    assert "key:secret" not in str(error.value)


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]"])
def test_link_local_addresses_are_refused(monkeypatch, host):
    monkeypatch.setenv("SLIDEFLOW_RAY_ALLOW", "http,https")
    with pytest.raises(ConfigError, match="link-local"):
        at_hand(f"http://{host}/latest/meta-data")


@pytest.fixture
def web(monkeypatch, tmp_path) -> Iterator[tuple[str, Web]]:
    monkeypatch.setenv("SLIDEFLOW_RAY_ALLOW", "http")
    monkeypatch.setenv("SLIDEFLOW_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    with web_server(tmp_path / "www") as (url, found):
        yield url, found


@pytest.mark.parametrize("tags", [True, False])
def test_a_slide_on_the_web_where_that_is_allowed(tags, web, marked):
    url, server = web
    server.tags = tags
    shutil.copy(marked / "a.tif", server.folder / "a slide.tif")
    with open_slide(f"{url}/a%20slide.tif", modality="tem") as reader:
        assert reader.size_px0 == (701, 1203)
    with pytest.raises(SlideNotFound):
        at_hand(f"{url}/none.tif")


def test_a_server_with_weak_tags_is_one_to_copy_from(web):
    url, server = web
    server.weak = True
    (server.folder / "a").write_bytes(b"abc" * 1000)
    assert not look(f"{url}/a").fixed
    assert at_hand(f"{url}/a").read_bytes() == b"abc" * 1000


def test_without_tags_the_date_tells_versions_apart(web):
    url, server = web
    server.tags = False
    (server.folder / "a").write_bytes(b"A" * 1000)
    os.utime(server.folder / "a", (1e9, 1e9))
    assert at_hand(f"{url}/a").read_bytes() == b"A" * 1000
    (server.folder / "a").write_bytes(b"B" * 1000)
    assert at_hand(f"{url}/a").read_bytes() == b"B" * 1000
    server.dates = False
    with pytest.raises(ReadError, match="neither ETag nor Last-Modified"):
        at_hand(f"{url}/a")


def test_a_copy_that_was_cut_short_is_fetched_again(web):
    url, server = web
    (server.folder / "a").write_bytes(b"abc" * 1000)
    at_hand(f"{url}/a").write_bytes(b"abc")
    assert at_hand(f"{url}/a").read_bytes() == b"abc" * 1000


def test_parts_of_a_file_on_the_web(web):
    url, server = web
    data = np.random.default_rng(3).bytes(3 * BLOCK)
    (server.folder / "a").write_bytes(data)
    assert Blocks(look(f"{url}/a")).pread(BLOCK, 9) == data[9 : BLOCK + 9]
    assert [wanted for _, _, wanted in server.asked] == ["", f"bytes=0-{2 * BLOCK - 1}"]
    server.ranges = False
    with pytest.raises(NoRanges):
        Blocks(look(f"{url}/a")).pread(1, 2 * BLOCK)
    assert at_hand(f"{url}/a").read_bytes() == data
    server.tags = False
    assert not look(f"{url}/a").fixed  # nothing would say that parts belong together


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_on_the_web_that_changes_is_an_error(conditions, web):
    url, server = web
    (server.folder / "a").write_bytes(b"old" * 1000)
    seen = look(f"{url}/a")
    (server.folder / "a").write_bytes(b"new" * 1000)
    server.conditions = conditions  # not every server knows If-Match
    for read in (fetched, lambda seen: Blocks(seen).pread(1, 0)):
        with pytest.raises(SourceChanged):
            read(seen)
    server.tags = server.dates = False
    with pytest.raises(ReadError, match="neither ETag nor Last-Modified"):
        look(f"{url}/a")
    server.dates = True
    os.utime(server.folder / "a", (1e9, 1e9))
    seen = look(f"{url}/a")
    (server.folder / "a").write_bytes(b"longer" * 1000)
    os.utime(server.folder / "a", (1e9, 1e9))  # within the same second, all that a date can say
    with pytest.raises(ReadError, match="bytes"):
        fetched(seen)


@pytest.mark.parametrize(
    "goal",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://0xA9FEA9FE/latest/meta-data",
        "http://user:secret@127.0.0.1/a",
        "https://127.0.0.1/a",  # allowed is http
        "file:///etc/hostname",
        "ftp://127.0.0.1/a",
    ],
)
def test_a_redirect_to_where_a_cohort_may_not_go_is_refused(goal, web):
    url, server = web
    server.moved["/r"] = goal
    with pytest.raises(ReadError, match=r"cannot be fetched") as error:
        at_hand(f"{url}/r")
    assert "secret" not in str(error.value)
    assert len(server.asked) == 1


def test_a_redirect_to_elsewhere_is_followed_and_one_in_circles_is_not(web):
    url, server = web
    (server.folder / "b").write_bytes(b"here")
    server.moved = {"/a": "/b", "/r": "/s", "/s": "/r"}
    assert at_hand(f"{url}/a").read_bytes() == b"here"
    with pytest.raises(ReadError):
        at_hand(f"{url}/r")


def test_a_name_that_turns_out_to_be_a_link_local_address_is_not_asked(web, monkeypatch):
    url, server = web
    monkeypatch.setattr(website, "is_forbidden", lambda address: address == "127.0.0.1")
    with pytest.raises(ReadError, match="link-local"):
        at_hand(f"{url}/a")
    assert server.asked == []


# by blocks


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """A slide of 9 MB in which every native tile has its own bytes, a mask of its upper left eighth, and a cohort."""
    folder = tmp_path_factory.mktemp("noisy")
    pixels = np.random.default_rng(7).integers(0, 256, (1536, 1536, 3), np.uint8)
    write_pyramid(folder / "n.tif", halved(pixels, 4), 0.5)
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, :32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(folder / "all.png")
    (folder / "sparse.csv").write_text("slide_id,uri,modality,mask\nn,n.tif,he,mask.png\n")
    (folder / "dense.csv").write_text("slide_id,uri,modality,mask\nn,n.tif,he,all.png\n")
    return folder


def sums(arrays: dict[str, bytes]) -> dict[str, str]:
    """Arrays by kind of node, which leaves out what the identity changes of a node's name."""
    kinds = {re.sub(r"-[0-9a-f]{12}", "", name): value for name, value in arrays.items()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in kinds.items()}


def test_a_file_by_blocks_is_the_file(faults, noisy):
    data = (noisy / "n.tif").read_bytes()
    uri = f"s3://{BUCKET}/blocks/n.tif"
    storage.write_atomic(storage.place(uri), data)
    faults.every = 3
    file = Blocks(look(uri))
    for offset, count in [(0, 16), (BLOCK - 5, 10), (3 * BLOCK, BLOCK), (len(data) - 7, 100), (len(data) + 5, 10)]:
        assert file.pread(count, offset) == data[offset : offset + count]
    file.want([(5 * BLOCK, 10 * BLOCK), (len(data) - 3, 3)])
    faults.every = 0
    faults.before = lambda environ: "403 Forbidden"
    again = Blocks(file.seen)  # another reader of this machine
    assert again.pread(10 * BLOCK, 5 * BLOCK) == data[5 * BLOCK : 15 * BLOCK]
    again.seek(-7, os.SEEK_END)
    assert again.read() == data[-7:]
    with pytest.raises(ReadError):
        again.pread(1, 30 * BLOCK)


def test_neighbouring_blocks_come_by_one_request(faults):
    uri = f"s3://{BUCKET}/blocks/runs"
    storage.write_atomic(storage.place(uri), bytes(12 * BLOCK))
    file = Blocks(look(uri))
    asked = []
    faults.before = lambda environ: asked.append(environ.get("HTTP_RANGE"))
    file.pread(1, 4 * BLOCK)
    file.pread(10 * BLOCK, 0)  # all but the one that is there
    assert sorted(asked) == sorted(f"bytes={a * BLOCK}-{b * BLOCK - 1}" for a, b in [(4, 5), (0, 4), (5, 10)])


def test_an_object_that_changes_between_two_blocks_is_an_error(faults):
    place = storage.place(f"s3://{BUCKET}/blocks/changing")
    storage.write_atomic(place, b"a" * (3 * BLOCK))
    file = Blocks(look(str(place)))
    assert file.pread(1, 0) == b"a"
    storage.write_atomic(place, b"b" * (3 * BLOCK))
    with pytest.raises(SourceChanged, match="changed while it was read"):
        file.pread(1, 2 * BLOCK)


def test_blocks_stay_within_the_cache_and_within_reach_when_evicted(faults, monkeypatch):
    data = np.random.default_rng(1).bytes(12 * BLOCK)
    uri = f"s3://{BUCKET}/blocks/evicted"
    storage.write_atomic(storage.place(uri), data)
    monkeypatch.setenv("SLIDEFLOW_RAY_CACHE_GB", str(4.5 * BLOCK / 1e9))
    file = Blocks(look(uri))
    for offset in [*range(0, 12 * BLOCK, BLOCK), 0, 5 * BLOCK]:
        assert file.pread(BLOCK, offset) == data[offset : offset + BLOCK]
        assert sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file()) <= 4.5 * BLOCK
    with pytest.raises(DiskFull, match="SLIDEFLOW_RAY_CACHE"):
        file.pread(8 * BLOCK, 0)


def test_what_a_killed_process_was_fetching_is_swept_and_a_living_one_s_is_counted(faults, monkeypatch):
    monkeypatch.setenv("SLIDEFLOW_RAY_CACHE_GB", "0.000010")
    dead = cache_folder() / ".partial-9000-dead"
    dead.mkdir()
    (dead / "owner").touch()
    with room("one", 6000):
        assert not dead.exists()
        with pytest.raises(DiskFull, match="being fetched"), room("two", 6000):
            pass
    with room("two", 6000):
        pass


@pytest.mark.parametrize("how", ["sparse", pytest.param("dense", marks=pytest.mark.soak)])
def test_both_ways_of_reading_give_the_bytes_of_the_local_run(how, faults, noisy, bundles, tmp_path):
    run_of(str(noisy / f"{how}.csv"), str(bundles["aligned"]), str(tmp_path / "out"))
    cohort = uploaded(noisy, f"noisy-{how}")
    sizes: list[int] = []
    faults.sent = lambda environ, size: sizes.append(size) if "n.tif" in environ["PATH_INFO"] else None
    faults.every = 11
    out = f"s3://{BUCKET}/results/noisy-{how}"
    counts = run_of(f"{cohort}/{how}.csv", str(bundles["aligned"]), out)
    faults.every = 0
    assert counts == {"done": 1, "failed": 0, "refused": 0}
    assert sums(arrays(str(tmp_path / "out"))) == sums(arrays(out))
    (identity_,) = (o["identity"] for o in storage.read_json(storage.place(out) / "run.json")["outcomes"].values())
    size = (noisy / "n.tif").stat().st_size
    assert sum(sizes) < size / 2 if how == "sparse" else sum(sizes) >= size
    assert identity_.startswith("etag:" if how == "sparse" else "sha256:")
    assert [s.attrs["identity"] for s in stores(out)] == [identity_]
    sizes.clear()
    shutil.rmtree(cache_folder())
    again = run(RunSpec.parse(json.loads((storage.place(out) / "run.json").read_text())["spec"], "test"))
    assert not again.changed
    assert sum(sizes) < size / 2 if how == "sparse" else sum(sizes) >= size  # opened again, from nothing


@pytest.mark.soak
def test_under_ray_slides_and_results_in_a_bucket_give_the_arrays_of_the_local_run(
    faults, marked, bundles, tmp_path, request
):
    """The driver starts a small Ray of its own; its workers take endpoint and credentials from their environment."""
    (marked / "ray.csv").write_text("slide_id,uri,modality\nb,b.tif,tem\nc,c.tif,tem\n")
    run_of(str(marked / "ray.csv"), str(bundles["aligned"]), str(tmp_path / "out"))
    cohort = uploaded(marked, "ray")
    bundle = uploaded(bundles["aligned"], "bundles/ray")
    out = f"s3://{BUCKET}/results/ray"
    values = {"cohort": f"{cohort}/ray.csv", "out": out, "model": [{"path": bundle}]}
    spec = json.dumps({**values, "executor": {"kind": "ray", "workers": 2}})
    folder = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))  # short: names of sockets have at most 107 bytes
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder)}
    faults.every = 29
    driver = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "drive_bucket.py"), spec],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    faults.every = 0
    assert driver.returncode == 0, driver.stderr[-3000:]
    assert json.loads(driver.stdout) == {"done": 2, "failed": 0, "refused": 0}
    local, remote = arrays(str(tmp_path / "out")), arrays(out)
    assert sorted(local) == sorted(remote)
    assert [name for name in local if local[name] != remote[name]] == []
    logs = [path for path in folder.rglob("*") if path.suffix in (".log", ".out", ".err")]
    assert logs
    assert [path for path in logs if SECRET in path.read_text(errors="replace")] == []


@pytest.mark.soak
def test_answers_and_exports_of_a_run_in_a_bucket_are_those_on_disk(faults, tmp_path):
    rng = np.random.default_rng(0)
    drawn = [
        (name, split, tumour) for split in ("val", "test") for name, tumour in ((f"{split}1", True), (split, False))
    ]
    slides = [two_class(tmp_path, rng, name, f"p{name}", split, tumour) for name, split, tumour in drawn]
    places = [tmp_path / "out", storage.place(f"s3://{BUCKET}/answers")]
    found = []
    for out in places:
        write_scored_run(out, slides, heatmaps=True)
        evaluate(out)
        calibrate(out)
        write_report(out)
        for to in ("geojson", "parquet", "csv", "ome-tiff", "ome-zarr", "ome-zarr"):  # the second replaces the first
            export(out, to)
        found.append({p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    here, there = ({n: b for n, b in files.items() if ".cache" not in n} for files in found)
    assert sorted(here) == sorted(there)
    differ = [name for name in here if here[name] != there[name]]
    assert set(differ) <= {"run.json", "report.html"}  # they name the place
    local = export(places[1], "ome-zarr", folder=tmp_path / "copied").files
    assert zarr.open_group(local[0], mode="r")["0"][...].tobytes()


def test_what_works_on_disk_only_says_so(tmp_path):
    with pytest.raises(ConfigError, match="promoted on disk only"):
        promote(tmp_path, f"s3://{BUCKET}/models/a", "cohort.csv")
    with pytest.raises(ConfigError, match="not searched"):
        collect(storage.place(f"s3://{BUCKET}/slides"))
    with pytest.raises(ConfigError, match="taken for a local path"):
        storage.place(Path(f"s3://{BUCKET}/out"))  # pathlib has made one slash of two
