"""observe.py: what a run says to machines, in a file and on the port that Prometheus reads."""

from __future__ import annotations

import json
import re
import time
import urllib.request

import pytest

from slideflow_ray import cli
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import ChunkScored, RunStarted, SlideDone, SlideFailed, SlidePlanned, WorkersChanged
from slideflow_ray.observe import METRICS, Metrics, grouped, observed
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec


class Recorder(Metrics):
    """Metrics that are kept here instead of by Ray: the last of a gauge, the sum of a counter, all of a histogram."""

    def __init__(self, monkeypatch) -> None:
        super().__init__("r")
        self.found: dict[str, object] = {}
        monkeypatch.setattr("slideflow_ray.observe._ray_is_up", lambda: True)

    def _metric(self, name):
        recorder, kind = self, METRICS[name][0]

        class Metric:
            def inc(self, value, tags):
                assert kind == "counter"
                key = (name, *(v for k, v in tags.items() if k != "run"))
                recorder.found[key] = recorder.found.get(key, 0) + value

            def set(self, value, tags):
                assert kind == "gauge"
                recorder.found[(name,)] = value

            def observe(self, value, tags):
                assert kind == "histogram"
                recorder.found.setdefault((name,), []).append(value)

        return Metric()


def test_events_become_figures(monkeypatch):
    metrics = Recorder(monkeypatch)

    def gauge(name: str) -> object:
        return metrics.found["slideflow_ray_" + name,]

    metrics(RunStarted(3, ("m",), "ray", 2))
    metrics(SlidePlanned("a", 30, 3, 3, 30))
    metrics(SlidePlanned("b", 50, 5, 5, 50))
    assert gauge("chunks_waiting") == 8
    metrics(ChunkScored("a", 0, 10, ("m",), "w0", 100.0, 104.0, 0.5))
    assert gauge("busy_share") == 0.5  # one of two scorers, all the time
    metrics(ChunkScored("a", 1, 10, ("m",), "w1", 102.0, 106.0, 0.7))
    assert gauge("busy_share") == (4 + 4) / (2 * 6)
    metrics(WorkersChanged(4))
    metrics(ChunkScored("a", 2, 10, ("m",), "w0", 160.0, 164.0, 0.1))  # the first two: 0 and 2 s are in its minute
    assert gauge("busy_share") == pytest.approx((4 + 2) / (4 * 60))
    metrics(SlideDone("a", "scored", 30))
    metrics(SlideFailed("b", "E_TRUNCATED", "broken", False))
    assert gauge("chunks_waiting") == 0
    assert gauge("slides_left") == 1
    assert gauge("workers") == 4
    assert metrics.found["slideflow_ray_tiles",] == 30
    assert metrics.found["slideflow_ray_slides", "done"] == metrics.found["slideflow_ray_slides", "failed"] == 1
    assert metrics.found["slideflow_ray_failures", "E_TRUNCATED"] == 1
    assert metrics.found["slideflow_ray_read_seconds",] == [0.5, 0.7, 0.1]
    assert metrics.found["slideflow_ray_forward_seconds",] == [4, 4, 4]
    assert metrics.found["slideflow_ray_scoring_seconds",] == 12
    assert metrics.found["slideflow_ray_reading_seconds",] == pytest.approx(1.3)


def test_a_log_has_a_line_for_each_event_with_run_and_slide(marked, bundles, tmp_path, capsys):
    log = tmp_path / "logs/run.jsonl"
    command = ["run", "--cohort", str(marked / "with_a_bad_one.csv"), "--model", str(bundles["aligned"])]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--out", str(tmp_path / "out"), "--log", str(log), "--workers", "1"])
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.rstrip().splitlines()[-2:] == ["failures by code (1 slides):", "     1 x E_NOT_A_SLIDE: d"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({line["run"] for line in lines}) == 1
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
    assert {line["event"] for line in lines} >= {
        "RunStarted",
        "SlidePlanned",
        "ChunkScored",
        "SlideDone",
        "RunFinished",
    }
    chunks = [line for line in lines if line["event"] == "ChunkScored"]
    assert {line["slide_id"] for line in chunks} == {"a", "b", "c"}
    assert all(line["forward_s"] > 0 and line["read_s"] > 0 and line["chunk"] >= 0 for line in chunks)
    assert all(line["forward_s"] == line["ended"] - line["began"] for line in chunks)
    failures = [line for line in lines if line["level"] == "WARNING"]
    assert [(line["event"], line["slide_id"], line["code"]) for line in failures] == [
        ("SlideFailed", "d", "E_NOT_A_SLIDE")
    ]


def test_the_environment_names_a_log_and_one_that_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDEFLOW_RAY_LOG", str(tmp_path / "log"))
    with observed(lambda event: None, run="mine") as listen:
        listen(SlideDone("a", "scored", 3))
    assert json.loads((tmp_path / "log").read_text())["run"] == "mine"
    with pytest.raises(ConfigError, match="cannot be the log"), observed(lambda event: None, log=tmp_path):
        pass


def test_failures_are_grouped_and_fit_a_jobs_message():
    failures = [(f"E_{i % 9}", f"s{i}") for i in range(100)] + [("E_0", "z")]
    lines = grouped(failures)
    assert lines[0] == "failures by code (101 slides):"
    assert lines[1] == "    13 x E_0: s0, s9, s18, s27, s36 and 8 more"
    assert len(lines) <= 9  # Ray shows ten
    assert sum(int(line.split(" x ")[0]) for line in lines[1:]) == 101
    assert grouped([]) == []


def scraped() -> str:
    """What Prometheus would read from every node."""
    import ray

    pages = []
    for node in ray.nodes():
        where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(where, timeout=10) as page:
            pages.append(page.read().decode())
    return "\n".join(pages)


def value(page: str, name: str, **tags: str) -> float | None:
    for line in page.splitlines():
        if re.match(rf"(ray_)?{name}{{", line) and all(f'{k}="{v}"' in line for k, v in tags.items()):
            return float(line.rsplit(" ", 1)[1])
    return None


@pytest.mark.ray
def test_prometheus_reads_a_run_under_ray(marked, bundles, tmp_path, local_ray):
    values = {
        "cohort": str(marked / "with_a_bad_one.csv"),
        "out": str(tmp_path / "out"),
        "model": [{"path": str(bundles["aligned"])}],
        "executor": {"kind": "ray", "address": "auto", "workers": 2},
        "compute": {"device": "cpu"},
    }
    heard = []
    result = run(RunSpec.parse(values, "test"), listen=heard.append, log=tmp_path / "log.jsonl")
    mine = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["run"]  # other tests' runs are there too
    tiles = sum(event.tiles for event in heard if isinstance(event, ChunkScored))
    deadline = time.monotonic() + 40  # Ray reports every ten seconds
    while value(page := scraped(), "slideflow_ray_failures_total", code="E_NOT_A_SLIDE", run=mine) is None:
        assert time.monotonic() < deadline, page[:2000]
        time.sleep(0.5)
    assert value(page, "slideflow_ray_tiles_total", run=mine) == tiles > 0
    assert value(page, "slideflow_ray_slides_total", status="done", run=mine) == result.counts["done"] == 3
    chunks = [event for event in heard if isinstance(event, ChunkScored)]
    assert value(page, "slideflow_ray_read_seconds_count", run=mine) == len(chunks)
    assert value(page, "slideflow_ray_forward_seconds_count", run=mine) == len(chunks)
    assert value(page, "slideflow_ray_reading_seconds_total", run=mine) == pytest.approx(sum(e.read_s for e in chunks))
    assert value(page, "slideflow_ray_scoring_seconds_total", run=mine) == pytest.approx(
        sum(e.ended - e.began for e in chunks)
    )
    assert value(page, "slideflow_ray_slides_left", run=mine) == 0
    missing = [name for name in METRICS if name not in page and name != "slideflow_ray_worker_deaths"]
    assert missing == []
