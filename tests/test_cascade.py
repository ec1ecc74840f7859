"""Several models in one run over kidney slides: each glomerulus once, shared tiles once, the same bytes everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw
from segmenters import COLOURS, write_colours

from slideflow_ray.accounting import read_run
from slideflow_ray.events import ChunkScored
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms.files import halved, write_pyramid
from slideflow_ray.phantoms.glomerulus import Glomerulus
from slideflow_ray.phantoms.kidney import lay_out, write_kidney_slide
from slideflow_ray.planes import objects_node, read_objects
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import ObjectSpec, RunSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
SIZE = (1700, 1200)
FOUND = {"split": True, "min_area_um2": 1500.0}
ALL = ("tiles", "discs", "kinds", "second")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, tuple[Glomerulus, ...]]:
    """An HE and a PAS section, bleached, with cyan glomeruli that a hand-made network finds; and the bundles."""
    folder = tmp_path_factory.mktemp("cascade")
    layout = lay_out(np.random.default_rng(3), SIZE, 0.5)
    for name, stain in (("a", "he"), ("b", "pas")):
        write_kidney_slide(folder / "raw.tif", layout, stain=stain, seed=1)
        with open_slide(str(folder / "raw.tif")) as reader:
            pixels = Image.fromarray((120 + 0.53 * reader.read(0, (0, 0), SIZE)).astype(np.uint8))
        for one in layout.glomeruli:
            ImageDraw.Draw(pixels).polygon([tuple(p) for p in one.ring_px0.tolist()], fill=COLOURS["cyan"])
        write_pyramid(folder / f"{name}.tif", halved(np.asarray(pixels), 3), 0.5)
    rows = "a,a.tif,he,tem,1,P1\nb,b.tif,pas,tem,2,P1\n"  # all of it tissue: on HE cyan would be a pen's
    (folder / "cohort.csv").write_text(f"slide_id,uri,stain,modality,section,patient_id\n{rows}")
    write_colours(folder, mpp=2.0)
    for seed, name in enumerate(("tiles", "second", "kinds")):
        torch.manual_seed(seed)
        card = BundleCard(
            name=name,
            task="classify",
            architecture="small-cnn",
            arguments={"width": 8},
            classes=("one", "two"),
            tile_px=64,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            **({"whole": "squash"} if name == "kinds" else {"mpp": 2.0}),
        )
        write_bundle(folder / name, card, build("small-cnn", {"width": 8}, 2).state_dict())
    return folder, layout.seen


def values(folder: Path, out: Path, *models: str, where: dict | None = None, **executor) -> dict:
    more = {"discs": {"objects": FOUND}, "kinds": {"on": "objects:discs", "margin": 0.1}}
    routed = {name: {"where": rule} for name, rule in (where or {}).items()}
    return {
        "cohort": str(folder / "cohort.csv"),
        "out": str(out),
        "model": [{"path": str(folder / m), **more.get(m, {}), **routed.get(m, {})} for m in models],
        "store": {"chunk_rows": 8},
        "executor": {"kind": "inline", "workers": 1, **executor},
    }


@pytest.fixture(scope="module")
def reference(made, tmp_path_factory) -> tuple[Path, list]:
    """All four models in one run, one worker, undisturbed, with what happened."""
    events: list = []
    out = tmp_path_factory.mktemp("reference") / "out"
    result = run(RunSpec.parse(values(made[0], out, *ALL), "test"), listen=events.append)
    assert result.counts["done"] == 2
    return out, events


def grid_of(out: Path, slide_id: str, name: str) -> tuple[str, str]:
    record = read_run(out)
    node = next(m["node"] for m in record["models"] if m["name"] == name)
    (grid,) = [g for g, m in record["outcomes"][slide_id]["grids"] if m == node]
    return grid, node


@pytest.mark.parametrize("slide_id", ["a", "b"])
def test_every_glomerulus_is_found_once(slide_id, made, reference):
    """Cut by the tiles' borders (cores of 160 px0), touching, and at the slide's edge."""
    out, truth = reference[0], made[1]
    grid, node = grid_of(out, slide_id, "discs")
    found = read_objects(SlideStore(out, slide_id), objects_node(grid, node, ObjectSpec.model_validate(FOUND)))
    assert len(found) == len(truth)
    boxes = np.array([one.box_px0 for one in truth])
    assert (boxes[:, 0] // 160 < (boxes[:, 0] + boxes[:, 2]) // 160).all()
    middles = boxes[:, :2] + boxes[:, 2:] / 2
    nearest = [int(np.hypot(*(found.box_px0[:, :2] + found.box_px0[:, 2:] / 2 - at).T).argmin()) for at in middles]
    assert sorted(nearest) == list(range(len(truth)))
    np.testing.assert_allclose(found.box_px0[nearest], boxes, atol=12)
    assert found.touches_edge[nearest].tolist() == [one.box_px0[0] + one.box_px0[2] == SIZE[0] for one in truth]
    objects_grid, kinds = grid_of(out, slide_id, "kinds")
    scores = SlideStore(out, slide_id).read(f"scores/{objects_grid}/{kinds}")
    assert scores.shape == (len(truth), 2)
    assert np.isfinite(scores).all()


def test_tiles_of_a_shared_grid_are_read_once_for_both_classifiers(reference):
    out, events = reference
    names = {m["node"]: m["name"] for m in read_run(out)["models"]}
    scored = [
        (e.slide_id, tuple(sorted(names[m] for m in e.models)), e.chunk) for e in events if type(e) is ChunkScored
    ]
    assert max(Counter(scored).values()) == 1
    assert {models for _, models, _ in scored} == {("discs",), ("kinds",), ("second", "tiles")}
    for slide_id in "ab":
        assert grid_of(out, slide_id, "tiles")[0] == grid_of(out, slide_id, "second")[0]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 4))])
def test_under_ray_the_bytes_are_those_of_inline(workers, made, reference, tmp_path, local_ray):
    share = {"gpu_share": 0.5} if workers == 4 else {}
    told = values(made[0], tmp_path / "out", *ALL, kind="ray", readers_per_gpu=1, workers=workers, **share)
    assert run(RunSpec.parse(told, "test")).counts["done"] == 2
    assert tree_digest(tmp_path / "out") == tree_digest(reference[0])


def test_after_a_kill_the_bytes_are_the_same(made, reference, tmp_path):
    told = values(made[0], tmp_path / "out", *ALL, task_deadline_s=120, silence_s=60)
    (tmp_path / "spec.json").write_text(json.dumps(told))
    strikes = tmp_path / "strikes"
    strikes.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DRIVE_FOLDER": str(strikes)}
    command = [sys.executable, str(ROOT / "tests" / "drive.py"), str(tmp_path / "spec.json")]
    env["DRIVE_FAULT"] = "killed while reading a second chunk"
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert list(strikes.glob("strike-*"))
    assert tree_digest(tmp_path / "out") == tree_digest(reference[0])


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # the one that was killed before may be gone, or a zombie
        return " ".join(process.cmdline())
    return ""


def kill_one(name: str) -> int:
    """Kill an actor process of this test's own Ray by the name of its class; return its id, 0 where there is none."""
    own = [p for p in psutil.Process().children(recursive=True) if f"ray::{name}" in command_of(p)]
    if own:
        os.kill(own[-1].pid, signal.SIGKILL)
    return own[-1].pid if own else 0


@pytest.mark.ray
@pytest.mark.parametrize(
    ("victim", "at"),
    [
        ("GpuScorer", (1,)),
        pytest.param("GpuScorer", (0, 4), marks=pytest.mark.soak),  # a third may hit one task alone for the second
        pytest.param("RemoteReader", (0, 4), marks=pytest.mark.soak),  # time, and its slide is quarantined
    ],
)
def test_after_kills_under_ray_the_bytes_are_those_of_inline(victim, at, made, reference, tmp_path, local_ray):
    killed, seen = [], []

    def listen(event) -> None:
        if type(event) is ChunkScored:
            if len(seen) in at:
                killed.append(kill_one(victim))
            seen.append(event)

    told = values(made[0], tmp_path / "out", *ALL, kind="ray", readers_per_gpu=1, workers=2)
    assert run(RunSpec.parse(told, "test"), listen=listen).counts["done"] == 2
    assert len(killed) == len(at)
    assert all(killed)
    assert tree_digest(tmp_path / "out") == tree_digest(reference[0])


LESIONS = ("Normal", "FSG", "CGN", "GS")


def write_lesions(folder: Path) -> None:
    """Write a multilabel model: dark green is FSG, dark blue is CGN, darkest red is GS, and none of them is Normal."""
    card = BundleCard(
        name="lesions", task="multilabel", architecture="small-cnn", arguments={"width": 4}, classes=LESIONS,
        tile_px=64, whole="squash", mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    net = build("small-cnn", {"width": 4}, len(LESIONS))
    with torch.no_grad():
        for key, tensor in net.named_parameters():
            tensor.fill_(1.0 if key.endswith(".1.weight") else 0.0)
        for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d)):
            middle = conv.kernel_size[0] // 2
            for channel in range(3):
                conv.weight[channel, channel, middle, middle] = 1.0
        stem = net.features[0][0].weight.zero_()
        for channel, colour in enumerate((1, 2, 0)):
            stem[channel, colour, 3, 3] = -1.0
        net.features[0][1].bias[2] = -1.2
        net.head.weight[0, :3] = torch.tensor([-12.0, -12.0, -24.0])
        net.head.weight[1:].fill_diagonal_(20.0)
        net.head.bias.copy_(torch.tensor([5.0, -5.0, -5.0, -3.0]))
    write_bundle(folder / "lesions", card, net.state_dict())


def test_a_glomerulus_with_two_lesions_counts_in_both_shares_and_a_sclerosed_one_in_its_own(tmp_path):
    layout = lay_out(np.random.default_rng(5), SIZE, 0.5, mixed=0.4, sclerosed=0.2, kinds=("Normal", "FSG", "CGN"))
    write_kidney_slide(tmp_path / "raw.tif", layout, stain="pas", seed=1)
    with open_slide(str(tmp_path / "raw.tif")) as reader:
        pixels = Image.fromarray((120 + 0.53 * reader.read(0, (0, 0), SIZE)).astype(np.uint8))
    kinds = [set(one.kind.split("+")) for one in layout.seen]
    for one, lesions in zip(layout.seen, kinds, strict=True):
        colour = (10 if "GS" in lesions else 90, 40 if "FSG" in lesions else 200, 40 if "CGN" in lesions else 200)
        ImageDraw.Draw(pixels).polygon([tuple(p) for p in one.ring_px0.tolist()], fill=colour)
    write_pyramid(tmp_path / "a.tif", halved(np.asarray(pixels), 3), 0.5)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,stain,modality,section,patient_id\na,a.tif,pas,tem,2,P\n")
    write_colours(tmp_path, mpp=2.0)
    write_lesions(tmp_path)
    told = values(tmp_path, tmp_path / "out", "discs", "lesions")
    told["model"][1] |= {"on": "objects:discs", "margin": 0.1}
    assert run(RunSpec.parse(told, "test")).counts["done"] == 1
    want = {name: sum(name in lesions for lesions in kinds) for name in LESIONS}
    assert {"FSG", "CGN"} in kinds
    assert want["GS"] >= 1
    assert sum(want.values()) > len(kinds)
    for row in read_table(tmp_path / "out" / "counts.parquet"):
        assert row["objects"] == len(kinds)
        assert {name: row[f"n_lesions_{name}"] for name in LESIONS} == want
        shares = {name: row[f"share_lesions_{name}"] for name in LESIONS}
        assert shares == {name: pytest.approx(n / len(kinds)) for name, n in want.items()}
        assert (row["global_sclerosis"], row["global_sclerosis_share"]) == (want["GS"], shares["GS"])
    called = sorted(row["called_lesions"] for row in read_table(tmp_path / "out" / "objects.parquet"))
    assert called == sorted("+".join(name for name in LESIONS if name in lesions) for lesions in kinds)


def test_each_stain_goes_to_its_classifier_in_one_run(made, tmp_path):
    where = {"tiles": {"stain": "he"}, "second": {"stain": "pas"}}
    out = tmp_path / "out"
    told = values(made[0], out, "tiles", "second", "discs", where=where)
    assert run(RunSpec.parse(told, "test")).counts["done"] == 2
    names = {m["node"]: m["name"] for m in read_run(out)["models"]}
    got = {s: sorted(names[m] for _, m in o["grids"]) for s, o in read_run(out)["outcomes"].items()}
    assert got == {"a": ["discs", "tiles"], "b": ["discs", "second"]}


def test_the_report_shows_every_model(reference):
    from slideflow_ray.report import write_report

    page = write_report(reference[0]).read_text()
    assert all(name in page for name in ALL)
