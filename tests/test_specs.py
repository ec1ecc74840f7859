"""specs.py, storage.py, identity.py, lease.py, errors.py: settings and files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slideflow_ray import errors, lease, storage
from slideflow_ray.errors import ConfigError, LeaseError, NotASlide, SlideNotFound
from slideflow_ray.identity import identity
from slideflow_ray.specs import RunSpec, StoreSpec, TileSpec, load_run, worked_off

TOML = """
cohort = "cohort.csv"
out = "out"
[[model]]
path = "bundles/a"
where = {stain = "HE"}
[store]
tiles = "none"
"""


def test_run_toml_is_relative_to_itself(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    spec = load_run(tmp_path / "run.toml")
    assert spec.cohort == str(tmp_path / "cohort.csv")
    assert spec.model[0].path == str(tmp_path / "bundles/a")
    assert spec.store.tiles == "none"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TOML + "[tissu]\n", "tissu: there is no such setting"),
        (TOML.replace('tiles = "none"', 'tiles = "jpeg"'), "store.tiles"),
        (TOML.replace("stain", "colour"), "unknown columns"),
        ('cohort = "c"\nout = "o"\n', "name at least one"),
        ("cohort = ", "not valid TOML"),
        (TOML.replace("[store]", 'on = "everything"\n[store]'), "is unknown"),
    ],
)
def test_a_bad_setting_is_named(tmp_path, text, said):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_run(tmp_path / "run.toml")


def test_a_digest_changes_exactly_with_the_settings():
    tile = TileSpec(tile_px=224, mpp=0.5)
    assert tile.digest() == TileSpec(tile_px=224, mpp=0.5).digest()
    assert tile.digest() != TileSpec(tile_px=224, mpp=0.5, stride_px=112).digest()


@pytest.mark.parametrize("tile_px", [8, 64, 224, 256, 299, 512, 1024, 4096])
def test_a_chunk_is_at_most_64_mb_where_sixteen_tiles_fit(tile_px):
    rows = StoreSpec().rows(tile_px)
    assert rows % 16 == 0
    assert rows == 16 or rows * tile_px**2 * 3 <= 64 * 2**20


def test_run_spec_round_trips_through_json():
    spec = RunSpec.parse({"cohort": "c", "out": "o", "model": [{"path": "p"}]}, "test")
    assert RunSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def test_every_error_survives_pickling_and_keeps_its_next_step():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.SlideflowError)]
    assert len({k.code for k in kinds}) == len(kinds)
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("what", next_step="do this.")))
        assert (type(error), str(error)) == (kind, f"{kind.code}: what Next: do this.")
        assert kind.code in (errors.__doc__ or "") or kind is errors.SlideflowError


def test_only_allowed_schemes_are_opened():
    assert storage.local_path("file:///a/b%20c").as_posix() == "/a/b c"
    with pytest.raises(ConfigError, match="'ftp'"):
        storage.local_path("ftp://host/x")


def test_create_writes_once(tmp_path):
    assert storage.create(tmp_path / "a/x", b"1")
    assert not storage.create(tmp_path / "a/x", b"2")
    assert (tmp_path / "a/x").read_bytes() == b"1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]


def test_identity_is_the_content_and_is_remembered(tmp_path):
    slide = tmp_path / "s.svs"
    slide.write_bytes(b"abc")
    first = identity(str(slide), tmp_path / "cache")
    assert first == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (note,) = (tmp_path / "cache").iterdir()
    note.write_text(note.read_text().replace("ba7816bf", "00000000"))
    assert identity(str(slide), tmp_path / "cache").startswith("sha256:00000000")  # not hashed again
    slide.write_bytes(b"abcd")
    assert identity(str(slide), tmp_path / "cache") == identity(str(slide))
    with pytest.raises(SlideNotFound):
        identity(str(tmp_path / "none.svs"))


def test_a_pipe_or_a_device_is_no_slide(tmp_path):
    """Opening one would wait for ever, and reading the other never end."""
    os.mkfifo(tmp_path / "f.tif")
    (tmp_path / "zero.tif").symlink_to("/dev/zero")
    for name in ("f.tif", "zero.tif"):
        with pytest.raises(NotASlide, match="no file"):
            identity(str(tmp_path / name))


def test_an_unreadable_lease_counts_until_it_is_old(tmp_path):
    (tmp_path / "lease.json").write_text("")
    with pytest.raises(LeaseError), lease.lease(tmp_path):
        pass
    then = time.time() - 2 * lease.EXPIRES_S
    os.utime(tmp_path / "lease.json", (then, then))
    assert not lease.held(tmp_path)
    with lease.lease(tmp_path):
        assert lease.held(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_configuration_error():
    with pytest.raises(ConfigError, match="cannot be written"), lease.lease(Path("/proc")):
        pass


def test_who_has_lost_the_lease_sweeps_and_writes_nothing(tmp_path):
    partial = tmp_path / "slides" / "b.zarr" / "x.partial"
    partial.parent.mkdir(parents=True)
    with pytest.raises(LeaseError, match="taken over"), lease.lease(tmp_path) as check:  # noqa: PT012
        check()
        (tmp_path / "lease.json").write_text('{"owner": "another", "host": "elsewhere"}')
        partial.write_text("theirs")
        with pytest.raises(LeaseError):
            check()
    assert partial.exists()
    assert "another" in (tmp_path / "lease.json").read_text()


def test_a_second_run_is_kept_out_and_a_dead_one_is_taken_over(tmp_path):
    with lease.lease(tmp_path):
        with pytest.raises(LeaseError, match=f"process {os.getpid()}"), lease.lease(tmp_path):
            pass
        assert (tmp_path / "lease.json").exists()
        mine = storage.read_json(tmp_path / "lease.json")
    assert not (tmp_path / "lease.json").exists()
    dead = {**mine, "started": mine["started"] - 1}  # another process had our number before
    storage.write_atomic(tmp_path / "lease.json", storage.to_json(dead))
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/c.partial").touch()
    with lease.lease(tmp_path):
        assert not (tmp_path / "slides/c.partial").exists()
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = {**mine, "pid": int(child.stdout)}
    storage.write_atomic(tmp_path / "lease.json", storage.to_json(gone))
    assert not lease.held(tmp_path)
    with lease.lease(tmp_path):
        pass


def test_a_pid_of_another_container_says_nothing_about_ours(tmp_path):
    with lease.lease(tmp_path):
        mine = storage.read_json(tmp_path / "lease.json")
    theirs = {**mine, "owner": "x", "pid": 2**22, "space": "another"}
    storage.write_atomic(tmp_path / "lease.json", storage.to_json(theirs))
    with pytest.raises(LeaseError), lease.lease(tmp_path):
        pass


def test_of_two_that_take_over_a_dead_lease_one_gets_it(tmp_path):
    storage.write_atomic(tmp_path / "lease.json", storage.to_json({"owner": "x", "pid": 1, "host": "h"}))
    old = time.time() - lease.EXPIRES_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    got, start, release = [], threading.Barrier(8), threading.Event()

    def take():
        start.wait()
        try:
            with lease.lease(tmp_path):
                got.append(1)
                release.wait(10)
        except LeaseError:
            got.append(0)
            if len(got) == 8:
                release.set()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0] * 7 + [1]


def test_the_lease_of_another_host_counts_until_it_is_silent(tmp_path):
    path = tmp_path / "lease.json"
    storage.write_atomic(path, storage.to_json({"owner": "x", "host": "elsewhere", "pid": 1}))
    with pytest.raises(LeaseError, match="elsewhere"), lease.lease(tmp_path):
        pass
    old = time.time() - lease.EXPIRES_S - 1
    os.utime(path, (old, old))
    with lease.lease(tmp_path):
        pass


@pytest.mark.parametrize(
    ("said", "told", "default", "kind"),
    [
        ({}, None, "ray", "ray"),
        ({}, None, "inline", "inline"),
        ({"kind": "inline"}, None, "ray", "inline"),
        ({"kind": "ray"}, "inline", "ray", "inline"),
        ({"workers": 3}, "ray", "inline", "ray"),
    ],
)
def test_a_run_is_worked_off_by_what_it_is_told_else_by_what_its_settings_name(said, told, default, kind):
    spec = RunSpec.parse({"cohort": "c.csv", "out": "o", "model": [{"path": "m"}], "executor": said}, "test")
    assert worked_off(spec, told, default=default).executor.kind == kind
    assert worked_off(spec, told, default=default).executor.workers == said.get("workers", 0)
    assert worked_off(spec, told, 5, default=default).executor.workers == 5
