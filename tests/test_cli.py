"""cli.py as people use it: help, wrong words, one slide, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from slideflow_ray import cli


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = "import sys; from slideflow_ray.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'ray', 'zarr', 'numpy', 'dask', 'tiffslide', 'sklearn', 'pydantic'} & set(sys.modules)\n"
    code += "print('HEAVY', sorted(heavy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in ("run", "plan", "status", "verify", "evaluate", "report", "train", "cohort", "demo", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_what_the_library_takes_the_command_takes():
    """Names in cli are written out, as importing the library would make every --help slow."""
    from slideflow_ray import aggregate, explain, export, label_files, promote
    from slideflow_ray.cli import answers, bundles, training
    from slideflow_ray.models import mil
    from slideflow_ray.train import pretext

    pairs = {
        answers.ExportName: export.To,
        answers.KeysName: label_files.Keys,
        answers.SlideScoreName: aggregate.SlideScore,
        answers.DaskName: aggregate.Scheduler,
        answers.MapName: explain.Method,
        bundles.PromoteRule: promote.By,
        training.MethodName: pretext.Method,
        training.PoolingName: mil.Pooling,
    }
    for names, known in pairs.items():
        assert {name.value for name in names} == set(get_args(known)), names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Give run.toml, or one slide, or --cohort"),
        (["run", "x.svs"], "--model and --out are needed"),
        (["run", "no.toml"], "There is no no.toml"),
        (["run", "--workers", "many"], "Invalid value"),
        (["run", "--cohort", "c.csv", "x.svs"], "Give run.toml, or one slide, or --cohort"),
        (["run", "x.svs", "-m", "b", "-o", "o", "--modality", "xray"], "modality"),
        (["walk"], "No such command"),
        (["run", "x.toml", "--tiles", "none", "--executor", "ray"], "--executor, --tiles beside it would be ignored"),
        (["run", "x.svs", "-m", "b", "-o", "o", "--address", "h:1"], "--address needs --executor ray"),
        (["run", "x.svs", "-m", "b", "-o", "o", "--mpp", "nan"], "mpp"),
        (["verify", "nowhere"], "nowhere is not the output folder of a run"),
        (["train", "--cohort", "c.csv", "-o", "a b", "--classes", "one,two"], "There is no cohort"),
        (["evaluate", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["status", "nowhere"], "nowhere is not the output folder of a run"),
    ],
)
def test_wrong_words_end_with_2_and_one_clear_line(capsys, arguments, said):
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_a_dead_address_ends_with_4_in_one_line(capsys, marked, bundles, tmp_path):
    words = ["run", str(marked / "c.tif"), "-m", str(bundles["aligned"]), "-o", str(tmp_path / "out")]
    code, _, err = call(capsys, *words, "--executor", "ray", "--address", "127.0.0.1:1")
    assert code == 4
    assert "E_INFRA: No Ray at 127.0.0.1:1" in err
    assert "Traceback" not in err


def test_one_slide_is_scored_verified_and_found_done(capsys, marked, bundles, tmp_path):
    slide, out = str(marked / "c.tif"), str(tmp_path / "out")
    words = ["run", slide, "-m", str(bundles["aligned"]), "-o", out, "--workers", "1", "--modality", "tem"]
    code, said, _ = call(capsys, *words, "--json")
    assert code == 0
    assert json.loads(said) == {"out": out, "done": 1, "failed": 0, "refused": 0, "changed": True}
    code, said, _ = call(capsys, *words)
    assert (code, said) == (0, f"Nothing to do: 1 slides were done already in {out}\n")
    code, first, _ = call(capsys, "verify", out, "--digest")
    assert code == 0
    assert len(first.strip()) == 64
    code, said, _ = call(capsys, "status", out)
    assert said == "finished; done 1, failed 0, refused 0\n"


def test_a_bundle_is_not_replaced_unasked(capsys, marked, bundles, tmp_path):
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(f"slide_id,uri,split,label,modality\nc,{marked / 'c.tif'},train,normal,tem\n")
    before = (bundles["aligned"] / "weights.safetensors").read_bytes()
    words = ["train", "--cohort", str(cohort), "-o", str(bundles["aligned"]), "--classes", "normal,tumor"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "exists already" in err
    assert (bundles["aligned"] / "weights.safetensors").read_bytes() == before


def test_what_nobody_planned_for_ends_with_70(capsys, monkeypatch):
    from slideflow_ray import doctor

    monkeypatch.setattr(doctor, "examine", lambda: 1 / 0)
    code, _, err = call(capsys, "doctor")
    assert code == 70
    assert "E_BUG" in err


def test_a_flipped_byte_ends_verify_with_5(capsys, marked, bundles, tmp_path):
    out = tmp_path / "out"
    call(capsys, "run", str(marked / "c.tif"), "-m", str(bundles["aligned"]), "-o", str(out), "--modality", "tem")
    path = next((out / "slides").rglob("tiles/c/0/0/0/0"))
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    code, _, err = call(capsys, "verify", str(out))
    assert code == 5
    assert "has other bytes than were committed" in err


def test_a_run_with_a_bad_slide_ends_with_3_and_says_which_and_why(capsys, marked, bundles, tmp_path):
    words = ["--cohort", str(marked / "with_a_bad_one.csv"), "-m", str(bundles["aligned"]), "-o", str(tmp_path / "o")]
    code, said, err = call(capsys, "run", *words, "--workers", "1")
    assert code == 3
    assert said == f"done 3, failed 0, refused 1: {tmp_path / 'o'}\n"
    assert "d: E_NOT_A_SLIDE" in err
    assert "Next: " in err
    assert "Traceback" not in err
    code, said, _ = call(capsys, "plan", *words, "--json")
    assert json.loads(said)["todo"] == 0
