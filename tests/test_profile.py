"""The compute profile: what this machine is, and the refusal to be another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slideflow_ray import profile
from slideflow_ray.errors import ConfigError, ProfileError
from slideflow_ray.profile import ComputeProfile, check, resolve
from slideflow_ray.specs import ComputeSpec

CPU = ComputeSpec(device="cpu")


def test_it_describes_this_machine() -> None:
    got = resolve(CPU)
    assert (got.torch, got.device, got.threads, got.compiled) == (torch.__version__, "cpu", 1, False)
    assert got.isa.startswith(torch.backends.cpu.get_cpu_capability())
    assert got.micro_batch == 16
    assert resolve(ComputeSpec(device="cpu", micro_batch=5)).micro_batch == 5
    check(got)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [("avx512f avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512f avx512bw", "fp32"), ("", "fp32")],
)
def test_auto_is_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, flags: str, precision: str) -> None:
    monkeypatch.setattr(profile, "_cpu_flags", lambda: frozenset(flags.split()))
    assert resolve(CPU).precision == precision
    assert resolve(ComputeSpec(device="cpu", precision="fp32")).precision == "fp32"
    assert resolve(ComputeSpec(device="cpu", precision="bf16")).precision == "bf16"


def test_the_cpus_flags_agree_with_torch() -> None:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if supported is None or not Path("/proc/cpuinfo").exists():
        pytest.skip("torch or the system does not tell")
    assert ("avx512_bf16" in profile._cpu_flags()) == supported()


@pytest.mark.parametrize(
    "changes",
    [
        {"torch": "2.0"},
        {"device": "cuda"},
        {"isa": "AVX2"},
        {"precision": "bf16"},
        {"micro_batch": 2},
        {"threads": 2},
        {"compiled": True},
    ],
)
def test_every_field_changes_the_digest(changes: dict[str, Any]) -> None:
    base = ComputeProfile(torch="2.9", device="cpu", isa="AVX512", precision="fp32", micro_batch=16)
    other = ComputeProfile.model_validate({**base.model_dump(), **changes})
    assert base.digest() != other.digest()
    assert ComputeProfile.model_validate_json(base.model_dump_json()).digest() == base.digest()


@pytest.mark.parametrize(("field", "value"), [("torch", "1.0"), ("isa", "VSX")])
def test_a_profile_of_another_machine_is_refused_by_field(field: str, value: str) -> None:
    with pytest.raises(ProfileError, match=f"{field} is .*, not '{value}'"):
        check(resolve(CPU).model_copy(update={field: value}))


def test_isa_follows_what_limits_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    before = profile.isa("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert profile.isa("cpu") == f"{before} ONEDNN_MAX_CPU_ISA=AVX2"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve(ComputeSpec()).device == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        resolve(ComputeSpec(device="cuda"))
    with pytest.raises(ProfileError, match="no GPU"):
        check(resolve(CPU).model_copy(update={"device": "cuda", "isa": "NVIDIA H200"}))


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for capability, precision in (((9, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        got = resolve(ComputeSpec())
        assert (got.device, got.isa, got.precision, got.micro_batch) == ("cuda", "NVIDIA H200", precision, 256)
        check(got)
    assert resolve(CPU).device == "cpu"


def test_a_system_without_proc_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert profile.isa("cpu") == torch.backends.cpu.get_cpu_capability()
    assert not profile.has_bf16("cpu")
