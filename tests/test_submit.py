"""submit/: which cluster, what is sent, what is said; against servers that answer as a cluster may (test_jobs.py has
real ones)."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideflow_ray import cli
from slideflow_ray.cohort import read_cohort
from slideflow_ray.errors import BundleError, ConfigError, InfrastructureError, SlideflowError
from slideflow_ray.specs import load_run
from slideflow_ray.submit import cluster as clusters
from slideflow_ray.submit import probe
from slideflow_ray.submit.cluster import Cluster, find_cluster, look
from slideflow_ray.submit.parcel import (
    PROBE,
    SETTINGS,
    Parcel,
    Places,
    pack_arguments,
    pack_settings,
    to_toml,
)

TOKEN = "f" * 64
NODES = {"data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 2.0}}]}}}


# a cluster as it may answer


class Answers(http.server.BaseHTTPRequestHandler):
    """A job server: what it answers, and what it was sent."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.seen.append((path, self.headers.get("Authorization")))
        status, body = self.server.answers.get(path, (404, {}))
        if path != "/api/authentication_mode" and self.server.token and status == 200:
            status = {None: 401, f"Bearer {self.server.token}": 200}.get(self.headers.get("Authorization"), 403)
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def server(token: str = TOKEN, mode: str = "token", version: str | None = None, **more) -> Iterator:
    """A job server on 127.0.0.1, and what it has been sent."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    made.seen, made.token = [], token
    made.answers = {
        "/api/authentication_mode": (200, {"authentication_mode": mode}),
        "/api/version": (200, {"ray_version": version or importlib.metadata.version("ray")}),
        "/api/v0/nodes": (200, NODES),
        **more,
    }
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def refusal(error: type[SlideflowError], cluster: Cluster, **options) -> str:
    """What `look` says of a cluster that it refuses: one line, in seconds."""
    began = time.monotonic()
    with pytest.raises(error) as caught:
        look(cluster, **options)
    assert time.monotonic() - began < clusters.ANSWER_S + 2
    text = str(caught.value)
    assert "\n" not in text
    assert "Next: " in text
    assert TOKEN not in text
    return text


def test_a_cluster_that_takes_the_token_is_described():
    with server() as made:
        about = look(Cluster(made.url, TOKEN), gpus=2)
    assert (about.nodes, about.cpus, about.gpus, about.open) == (1, 4, 2, False)
    assert "token accepted, 1 node with 4 cores and 2 GPUs" in about.summary()


def test_nobody_listens():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        said = refusal(InfrastructureError, Cluster(f"http://127.0.0.1:{s.getsockname()[1]}", TOKEN))
    assert "does not answer: [Errno 111] Connection refused" in said


def test_somebody_listens_and_says_nothing(monkeypatch):
    monkeypatch.setattr(clusters, "ANSWER_S", 0.5)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert "does not answer: timed out" in refusal(
            InfrastructureError, Cluster(f"http://127.0.0.1:{s.getsockname()[1]}", TOKEN)
        )


def test_what_listens_is_no_http():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

        def answer():
            connection, _ = s.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        said = refusal(ConfigError, Cluster(f"http://127.0.0.1:{s.getsockname()[1]}", TOKEN))
        thread.join()
    assert "does not speak HTTP. Next: Give http://HEAD:8265" in said


def test_what_answers_is_no_ray():
    with server(**{"/api/authentication_mode": (404, {})}) as made:
        assert "not as Ray with authentication does (HTTP 404)" in refusal(ConfigError, Cluster(made.url, TOKEN))


def test_what_takes_no_jobs_is_said_by_each_command(token, capfd):
    with server() as made:
        made.answers |= {"/foo/api/authentication_mode": made.answers["/api/authentication_mode"]}
        for name in ("list", "status x"):
            assert ends("jobs", *name.split(), "--address", f"{made.url}/foo") == 2
            assert "answers, but takes no jobs. Next: Give http://HEAD:8265" in capfd.readouterr().err


def test_a_job_without_a_name_is_none(token, capfd):
    with server(**{"/api/jobs/": (200, [])}) as made:  # Ray lists all
        assert ends("jobs", "status", "", "--address", made.url) == 2
    assert "knows no job ''" in capfd.readouterr().err


def test_a_report_goes_into_a_folder(tmp_path, monkeypatch, capfd):
    from slideflow_ray.cli import clusters as commands
    from slideflow_ray.submit import follow

    monkeypatch.setattr(commands, "_client", lambda *_: None)
    monkeypatch.setattr(follow, "report", lambda *_: b"<html>")
    assert ends("jobs", "report", "sfr-x", "--to", str(tmp_path)) == 0
    assert (tmp_path / "report.html").read_bytes() == b"<html>"
    assert capfd.readouterr().out == f"{tmp_path}/report.html\n"


def test_a_wrong_token_a_missing_one_and_an_open_cluster_are_told_apart():
    with server() as made:
        assert "refuses the token (HTTP 403)" in refusal(ConfigError, Cluster(made.url, "0" * 64))
        assert "asks for a token, and none is configured" in refusal(ConfigError, Cluster(made.url))
    with server(token="", mode="disabled") as made:
        assert "it has no authentication" in refusal(ConfigError, Cluster(made.url, TOKEN))
        assert {sent for _, sent in made.seen} == {None}  # the token did not leave
        assert look(Cluster(made.url, allow_open=True)).open


def test_another_ray_is_refused_unless_told():
    with server(version="2.59.1") as made:
        said = refusal(ConfigError, Cluster(made.url, TOKEN))
        assert "runs Ray 2.59.1" in said
        assert importlib.metadata.version("ray") in said
        assert look(Cluster(made.url, TOKEN), any_version=True).ray == "2.59.1"


def test_gpus_that_are_asked_for_must_be_there():
    with server() as made:
        assert "has 2 GPUs now, and --gpus asks for 3" in refusal(ConfigError, Cluster(made.url, TOKEN), gpus=3)


def test_a_redirect_does_not_get_the_token():
    with server(token="") as other, server(**{"/api/version": (302, f"{other.url}/api/version")}) as made:
        made.token = ""
        refusal(InfrastructureError, Cluster(made.url, TOKEN))
        assert other.seen == []


def test_the_way_to_a_cluster_that_is_not_here_is_spoken_of():
    assert "unencrypted" in clusters.warn_of(Cluster("http://head.example:8265", TOKEN))
    for fine in ("https://head.example", "http://127.0.0.1:8265", "http://localhost:1"):
        assert clusters.warn_of(Cluster(fine, TOKEN)) == ""


# which cluster


@pytest.fixture
def token(tmp_path, monkeypatch) -> Path:
    """The token's file; nothing else of the environment names a cluster."""
    for name in (*clusters.ADDRESSES, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return file


def test_the_environment_names_the_cluster_and_its_token(token, monkeypatch):
    with pytest.raises(ConfigError, match="No cluster is named"):
        find_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    assert find_cluster() == Cluster("http://second:8265", TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265/")
    assert find_cluster() == Cluster("http://first:8265", TOKEN)
    assert find_cluster(address="https://third") == Cluster("https://third", TOKEN)
    assert TOKEN not in repr(find_cluster())


def test_a_token_that_others_can_read_is_refused(token):
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others") as caught:
        find_cluster(address="http://head:8265")
    assert caught.value.step == f"chmod 600 {token}"


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "ray://head:10001", "head", "ftp://head", "http://"])
def test_what_is_no_job_servers_address_is_refused(token, address):
    with pytest.raises(ConfigError, match="no job server's address"):
        find_cluster(address=address)


def test_a_profile_names_the_cluster_where_its_token_is_and_where_results_go(token, tmp_path):
    file = tmp_path / "config" / "slideflow-ray" / "profiles.toml"
    file.parent.mkdir(parents=True)
    (file.parent / "lab.token").write_text("a" * 64)
    (file.parent / "lab.token").chmod(0o600)
    text = '[lab]\naddress = "http://lab:8265"\ntoken_path = "lab.token"\nout = "/shared"\npython = "/venv/python"\n'
    file.write_text(text + '[other]\naddress = "http://other:8265"\n')
    assert find_cluster("lab") == Cluster("http://lab:8265", "a" * 64, out="/shared", python="/venv/python")
    assert find_cluster("other") == Cluster("http://other:8265", TOKEN)
    with pytest.raises(ConfigError, match="no profile 'lub'; it has: lab, other"):
        find_cluster("lub")
    elsewhere = tmp_path / "mine.toml"
    elsewhere.write_text('[one]\naddress = "http://one:1"\n')
    assert find_cluster(str(elsewhere)).address == find_cluster(f"one@{elsewhere}").address == "http://one:1"
    elsewhere.write_text('[one]\naddress = "http://one:1"\ntoken = "x"\n')
    with pytest.raises(ConfigError, match="token"):
        find_cluster(f"one@{elsewhere}")


# what is sent


@pytest.fixture
def laptop(tmp_path, bundles) -> Path:
    """A folder with all that must not be sent, and what may."""
    folder = tmp_path / "laptop"
    (folder / "slides").mkdir(parents=True)
    (folder / "slides" / "a.svs").write_bytes(b"pixels" * 1000)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "out.zarr").mkdir()
    (folder / "out.zarr" / "zarr.json").write_text("{}")
    (folder / "aligned").mkdir()
    for file in bundles["aligned"].iterdir():
        (folder / "aligned" / file.name).write_bytes(file.read_bytes())
    (folder / "aligned" / "a.svs").write_bytes(b"pixels")
    (folder / "aligned" / ".hidden.json").write_text("{}")
    rows = "a,slides/a.svs,P1,s3://bucket/a.geojson\nb,/data/b.svs,=P2,\n"
    (folder / "cohort.csv").write_text(f"slide_id,uri,patient_id,annotation\n{rows}")
    (folder / "run.toml").write_text(
        'cohort = "cohort.csv"\nout = "/shared/out"\n[[model]]\npath = "aligned"\nwhere = {stain = "PAS"}\n'
        '[[model]]\npath = "/shared/bundles/x"\n[compute]\nprecision = "fp32"\n'
    )
    return folder


def packed(laptop: Path, **options) -> Parcel:
    return pack_settings("score", str(laptop / "run.toml"), **options)


def test_only_what_is_named_is_sent(laptop):
    parcel = packed(laptop)
    (copied,) = {name.rsplit("/", 1)[0] for name in parcel.files if name.startswith("bundles/")}
    bundle = {f"{copied}/bundle.json", f"{copied}/weights.safetensors"}
    assert set(parcel.files) == {SETTINGS, "cohort.csv", "jobs/score.py", PROBE, *bundle}
    assert parcel.size == sum(len(d) if isinstance(d, bytes) else d.stat().st_size for d in parcel.files.values())


def test_what_is_sent_says_what_was_asked_for(laptop, tmp_path):
    parcel = packed(laptop)
    parcel.unpack(tmp_path / "there")
    spec = load_run(tmp_path / "there" / SETTINGS)
    asked = load_run(laptop / "run.toml")
    (name,) = (tmp_path / "there" / "bundles").iterdir()
    assert [m.path for m in spec.model] == [f"/shared/out/bundles/{name.name}", "/shared/bundles/x"]
    assert spec.model[0].where == {"stain": "PAS"}
    assert spec.compute == asked.compute
    assert spec.out == "/shared/out"
    before, after = read_cohort(laptop / "cohort.csv"), read_cohort(spec.cohort)
    assert after == before
    told = json.loads((tmp_path / "there" / "job.json").read_text())
    assert told["read"] == ["/shared/bundles/x"]
    assert set(told["uris"]) == {str(laptop / "slides/a.svs"), "s3://bucket/a.geojson", "/data/b.svs"}
    assert told["copies"] == [[f"bundles/{name.name}", f"/shared/out/bundles/{name.name}"]]


def test_slides_beside_the_cohort_may_lie_elsewhere_on_the_cluster(laptop, tmp_path):
    packed(laptop, places=Places(slides="s3://bucket/all/")).unpack(tmp_path / "there")
    items = read_cohort(tmp_path / "there" / "cohort.csv")
    assert [item.uri for item in items] == ["s3://bucket/all/slides/a.svs", "/data/b.svs"]


def test_at_most_twenty_uris_are_tried(laptop):
    (laptop / "cohort.csv").write_text("slide_id,uri\n" + "".join(f"s{i},/data/{i}.svs\n" for i in range(1001)))
    uris = packed(laptop).told["uris"]
    assert 10 < len(uris) <= 20
    assert len({int(Path(uri).stem) // 100 for uri in uris}) == 10  # from all over the cohort


def test_the_id_is_of_what_is_submitted_and_where_to(laptop, monkeypatch):
    first = packed(laptop).submission_id
    assert first.startswith("sfr-score-")
    assert packed(laptop).submission_id == first
    seen = {first}

    def changed() -> bool:
        seen.add(packed(laptop).submission_id)
        return len(seen) == changes

    changes = 2
    text = (laptop / "run.toml").read_text()
    (laptop / "run.toml").write_text(text.replace("/shared/out", "/shared/out2"))
    assert changed()
    changes = 3
    (laptop / "run.toml").write_text(text.replace("fp32", "bf16"))
    assert changed()
    changes = 4
    (laptop / "cohort.csv").write_text("slide_id,uri\na,slides/a.svs\n")
    assert changed()
    changes = 5
    card = (laptop / "aligned" / "bundle.json").read_text()
    (laptop / "aligned" / "bundle.json").write_text(card.replace("64", "96"))
    assert changed()
    changes = 6
    monkeypatch.setattr("slideflow_ray.submit.parcel.version", lambda: "9")
    assert changed()


def test_a_relative_out_needs_a_place_on_the_cluster(laptop):
    (laptop / "run.toml").write_text('cohort = "cohort.csv"\nout = "out"\n[[model]]\npath = "/b"\n')
    with pytest.raises(ConfigError, match="relative, and the cluster has no such place"):
        packed(laptop)
    assert packed(laptop, places=Places(out="s3://bucket/runs")).out == "s3://bucket/runs/out"


def test_what_could_not_work_is_refused_here(laptop):
    text = (laptop / "run.toml").read_text()
    for old, new, error, said in [
        ("precision", "precisoin", ConfigError, "precisoin"),
        ('"aligned"', '"slides"', BundleError, "slides"),
        ('"cohort.csv"', '"other.csv"', ConfigError, "There is no cohort"),
        ("[[model]]", "[model]", ConfigError, "run.toml is not valid TOML"),
        ("out =", "frob = 1\nout =", ConfigError, "run.toml: frob"),  # the user's own file, not its copy
        ('out = "/shared/out"', "", ConfigError, "out must be said"),
    ]:
        (laptop / "run.toml").write_text(text.replace(old, new))
        with pytest.raises(error, match=said):
            packed(laptop)


def test_a_cohort_that_is_not_here_is_the_clusters(laptop):
    text = (laptop / "run.toml").read_text().replace('"cohort.csv"', '"/shared/cohort.csv"')
    (laptop / "run.toml").write_text(text)
    parcel = packed(laptop)
    assert "cohort.csv" not in parcel.files
    assert parcel.told["cohorts"] == ["/shared/cohort.csv"]


def test_a_nightly_watches_on_the_clusters_side(laptop):
    text = 'out = "/shared/nightly"\nwatch = "{}"\n[reference]\ncohort = "cohort.csv"\n[[model]]\npath = "aligned"\n'
    (laptop / "nightly.toml").write_text(text.format("slides"))
    with pytest.raises(ConfigError, match="watch = 'slides' is relative"):
        pack_settings("nightly", str(laptop / "nightly.toml"))
    (laptop / "nightly.toml").write_text(text.format("/shared/incoming"))
    parcel = pack_settings("nightly", str(laptop / "nightly.toml"))
    values = tomllib.loads(parcel.files[SETTINGS].decode())
    assert values["watch"] == ["/shared/incoming"]
    assert values["reference"]["cohort"] == "reference.csv"
    assert "reference.csv" in parcel.files
    assert parcel.told["read"] == ["/shared/incoming"]


def test_a_training_is_told_where_its_bundle_goes(laptop):
    text = 'cohort = "cohort.csv"\nout = "/shared/models/t"\nclasses = ["normal", "tumor"]\n'
    (laptop / "train.toml").write_text(text + "[tile]\ntile_px = 64\nmpp = 0.5\n")
    parcel = pack_settings("retrain", str(laptop / "train.toml"), ["--overwrite"])
    values = tomllib.loads(parcel.files[SETTINGS].decode())
    assert (values["out"], values["work"]) == ("/shared/models/t", "/shared/models/t.work")
    assert parcel.arguments == (SETTINGS, "--overwrite")
    assert parcel.told["mark"] == values["work"]  # a first look that made `out` would have it there already


@pytest.mark.parametrize("kind", ["retrain", "pretrain"])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("fit = 'x'", "fit:"),
        ("fit = {weights = 3}", "fit.weights:"),
        ("crew = 3", "crew:"),
        ("crew = {storage = 3}", "crew.storage:"),
        ("sample = 'x'", "sample:"),
        ("sample = {mine = {times = 4}}", "sample.mine.run:"),
        ("work = 3", "work:"),
    ],
)
def test_what_no_training_takes_is_refused_here(laptop, kind, bad, said):
    text = 'cohort = "cohort.csv"\nout = "/shared/t"\nclasses = ["a", "b"]\ntile = {tile_px = 64, mpp = 0.5}\n'
    (laptop / "t.toml").write_text(text + bad)
    with pytest.raises(ConfigError, match=f"t.toml: .*{said}"):
        pack_settings(kind, str(laptop / "t.toml"))


def test_an_evaluation_is_told_by_arguments():
    parcel = pack_arguments("evaluate", "/shared/out", ["--rule", "f1"])
    assert parcel.arguments == ("/shared/out", "--rule", "f1")
    assert set(parcel.files) == {"jobs/evaluate.py", PROBE}
    assert parcel.submission_id != pack_arguments("evaluate", "/shared/out", ["--rule", "youden"]).submission_id


texts = st.text(max_size=8)
leaves = st.one_of(texts, st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.datetimes())
trees = st.recursive(
    leaves, lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3), max_leaves=8
)


@given(st.dictionaries(texts, trees, max_size=4))
@settings(max_examples=100, deadline=None)
def test_settings_are_the_same_after_a_journey_as_toml(values):
    assert tomllib.loads(to_toml(values)) == values


# the job's first step


def test_what_cannot_be_read_is_named_with_its_cause(tmp_path):
    (tmp_path / "a").write_text("a")
    missing = str(tmp_path / "b")
    found = probe.unreadable([str(tmp_path / "a"), str(tmp_path), missing, "ftp://host/x"])
    assert list(found) == [missing, "ftp://host/x"]
    assert found[missing] == "No such file or directory"


@pytest.fixture
def told(tmp_path, monkeypatch) -> dict:
    """What a first step is told; the cluster is this process."""
    for name in "abcde":
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(probe, "everywhere", lambda paths: {"head": probe.unreadable(paths)})
    uris = [str(tmp_path / name) for name in "abcde"]
    return {"mark": str(tmp_path / "out"), "read": [uris[0]], "cohorts": [], "uris": uris}


def test_what_all_can_be_read_passes_and_leaves_nothing_behind(told, tmp_path):
    wrong, seen = probe.look(told)
    assert wrong == []
    assert "6 files, folders and bundles" in seen
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    probe.look({**told, "mark": str(tmp_path / "out" / "deep" / "er")})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_slide_that_is_missing_is_said_and_most_of_them_are_refused(told, tmp_path, capfd):
    (tmp_path / "e").unlink()
    assert probe.look(told)[0] == []
    assert f"cannot read 1 of 5 files that the cohort names, as {tmp_path / 'e'}" in capfd.readouterr().err
    for name in "bc":
        (tmp_path / name).unlink()
    (line,) = probe.look(told)[0]
    assert "cannot read 3 of 5 files" in line
    assert "slides are not sent" in line


def test_a_bundle_a_cohort_and_an_output_folder_must_be_there(told, tmp_path):
    missing = str(tmp_path / "bundle")
    assert missing in probe.look(told | {"read": [missing]})[0][0]
    assert "The cohort" in probe.look(told | {"cohorts": [missing]})[0][0]
    assert "cannot be written" in probe.look(told | {"mark": str(tmp_path / "a" / "out")})[0][0]


def test_a_node_that_does_not_share_the_output_folder_is_named(told, monkeypatch):
    def everywhere(paths):
        assert all(Path(path).exists() for path in paths)
        return {"head": {}, "node": {paths[0]: "No such file or directory"}}

    monkeypatch.setattr(probe, "everywhere", everywhere)
    (line,) = probe.look(told)[0]
    assert line.startswith(f"node does not see what another node writes to {told['mark']}")


def test_one_node_of_each_other_machine_is_tried():
    nodes = [{"NodeManagerHostname": f"m{i // 2:02}", "NodeID": f"n{i}"} for i in range(60)]
    found = probe._others(nodes, own="m01")
    assert len(found) == probe.NODES - 1
    assert found["m00"] in ("n0", "n1")
    assert "m01" not in found
    assert probe._others(nodes[:2], own="m00") == {}


def test_a_cohort_on_the_clusters_side_is_read_there(told, tmp_path):
    (tmp_path / "cohort.csv").write_text("slide_id,uri\nx,/not/there.svs\n")
    (line,) = probe.look(told | {"cohorts": [str(tmp_path / "cohort.csv")], "uris": []})[0]
    assert "cannot read 1 of 1 files that the cohort names, as /not/there.svs" in line


def test_other_versions_are_refused_unless_told():
    told = {"package": importlib.metadata.version("slideflow-ray"), "python": "3.12.99"}
    assert probe.versions(told) == []
    assert "Python" in probe.versions(told | {"python": "3.11.4"})[0]
    assert "slideflow-ray" in probe.versions(told | {"package": "0.0.1"})[0]
    assert probe.versions({"package": "0", "python": "2.7", "any_version": True}) == []


def test_a_bundle_is_copied_once_and_its_card_last(tmp_path, bundles):
    probe.copy(bundles["aligned"], str(tmp_path / "out" / "bundles" / "x"))
    copied = {file.name: file.read_bytes() for file in (tmp_path / "out" / "bundles" / "x").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in bundles["aligned"].iterdir()}
    times = {name: (tmp_path / "out" / "bundles" / "x" / name).stat().st_mtime_ns for name in copied}
    assert max(times, key=lambda name: times[name]) == "bundle.json"
    probe.copy(bundles["aligned"], str(tmp_path / "out" / "bundles" / "x"))
    assert times["weights.safetensors"] == (tmp_path / "out/bundles/x/weights.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize(
    ("ends", "code"),
    [("sys.exit(3)", 3), ("sys.exit()", 0), ("pass", 0), ("sys.exit('x')", 1), ("raise KeyboardInterrupt", 130)],
)
def test_the_script_gives_the_exit_code(tmp_path, ends, code):
    script = tmp_path / "job.py"
    script.write_text(f"import sys\nassert sys.argv[1:] == ['x']\nif __name__ == '__main__':\n    {ends}\n")
    call = f"from slideflow_ray.submit import probe; import sys; sys.exit(probe.perform([{str(script)!r}, 'x']))"
    assert subprocess.run([sys.executable, "-c", call]).returncode == code


# following, without a cluster


def details(status: str, code: int | None = None, message: str = ""):
    from ray.job_submission import JobDetails

    values = {"type": "SUBMISSION", "submission_id": "sfr-x", "entrypoint": "", "message": message}
    return JobDetails(**values, status=status, driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        *(("FAILED", code, code) for code in (2, 3, 4, 5, 6, 70)),
        *(("FAILED", code, 4) for code in (None, -9, 137, 1)),
        ("FAILED", 127, 2),
        ("STOPPED", None, 130),
    ],
)
def test_the_jobs_own_exit_code_is_passed_on(status, code, exit_code):
    from slideflow_ray.submit.follow import ended
    from slideflow_ray.submit.follow import exit_code as exit_code_

    found = details(status, code, "The head is gone.")
    assert exit_code_(found) == exit_code
    assert ("Next: " in ended(found, exit_code)) == (exit_code != 0)
    assert ("failed" in ended(found, exit_code)) == (code in (2, 4, 5, 70))
    assert ("drifted" in ended(found, exit_code)) == (code == 6)


class Tails:
    """A client whose connection breaks: each time it tells the log from its beginning, a little further."""

    cluster = Cluster("http://head:8265", TOKEN)

    def __init__(self, *told: str, status: str = "SUCCEEDED", broken: bool = False) -> None:
        self.told, self.status, self.broken = list(told), status, broken

    async def tail_job_logs(self, job):
        text = self.told.pop(0) if self.told else ""
        for i in range(0, len(text), 7):
            yield text[i : i + 7]
        if self.told or self.broken:
            raise RuntimeError("WebSocket closed while job is still running")

    def known(self, job):
        if self.broken:
            raise InfrastructureError("nobody answers")
        return details("RUNNING" if self.told else self.status, 3)


def test_a_log_that_breaks_off_is_shown_once(monkeypatch):
    from slideflow_ray.submit import follow

    monkeypatch.setattr(follow.time, "sleep", lambda _: None)
    whole = "".join(f"line {i}\n" for i in range(50))
    shown: list[str] = []
    client = Tails(whole[:100], whole[:30], whole[:250], whole, status="FAILED")
    assert follow.follow(client, "sfr-x", shown.append) == 3
    assert "".join(shown) == whole


def test_a_cluster_that_is_gone_ends_the_following(monkeypatch):
    from slideflow_ray.submit import follow

    monkeypatch.setattr(follow, "LOST_S", 1.0)
    with pytest.raises(InfrastructureError, match="has not answered for 1 s") as caught:
        follow.follow(Tails("x", broken=True), "sfr-x", lambda _: None)
    assert "resumes" in caught.value.step


def test_what_is_too_large_is_refused_before_it_is_sent(laptop):
    from slideflow_ray.submit.follow import check_size, upload_limit

    parcel = packed(laptop)
    check_size(parcel, upload_limit())
    with pytest.raises(ConfigError, match=r"weights.safetensors; the limit is 0 MB"):
        check_size(parcel, 1000)
    huge = Parcel("score", (), "/o", {"x": b"0" * 100, "y": laptop / "aligned" / "weights.safetensors"}, {})
    assert huge.size > 100


# the command


def ends(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return int(end.value.code or 0)


def test_a_dead_address_ends_in_one_line_with_the_code_to_try_again(token, laptop, capfd):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
        assert ends("submit", str(laptop / "run.toml"), "--address", address) == 4
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("frobnicate",), "the jobs are score, tile, evaluate, nightly, retrain, pretrain"),
        ((), "Give run.toml, or --cohort, --model and --out"),
        (("evaluate",), "slideflow-ray submit evaluate OUT"),
        (("nightly",), "nightly.toml"),
        (("run.toml", "--cohort", "c.csv"), "run.toml says everything; --cohort beside it"),
        (("evaluate", "/shared/out", "--rul", "f1", "--frob"), "unrecognized arguments: --frob"),
        (("--cohort", "c.csv", "--model", "/b", "--out", "/o", "--retyr"), "unrecognized arguments: --retyr"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_a_cluster_is_asked(token, capfd, arguments, said):
    assert ends("submit", *arguments, "--address", "http://127.0.0.1:1") == 2
    assert said in capfd.readouterr().err


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(monkeypatch, capfd):
    from slideflow_ray.cli import clusters as commands
    from slideflow_ray.submit import follow

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow", interrupted)
    with pytest.raises(SystemExit) as end:
        commands._follow(Tails("x"), "sfr-x")
    assert end.value.code == 130
    said = capfd.readouterr().err
    assert "jobs logs sfr-x --follow" in said
    assert "jobs stop sfr-x" in said
