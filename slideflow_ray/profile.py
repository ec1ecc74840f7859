"""The compute profile: on what, and how, margins are computed. Within one profile they are the same bytes.

torch is imported inside the functions, so a profile can be read and compared without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slideflow_ray.errors import ConfigError, ProfileError
from slideflow_ray.specs import ComputeSpec, Spec

MICRO_BATCH = {"cpu": 16, "cuda": 256}
"""Tiles per forward pass; on a CPU 256 are a third slower than 16."""


class ComputeProfile(Spec):
    """Everything that may change a margin's bits besides the model and the pixels.

    torch : version with its build; `isa` : the CPU's instruction sets and L2 size, or the GPU's name;
    micro_batch : tiles per forward pass; threads : torch threads of one scorer.
    """

    torch: str
    device: Literal["cpu", "cuda"]
    isa: str
    precision: Literal["bf16", "fp32"]
    micro_batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)] = 1
    compiled: bool = False


def resolve(spec: ComputeSpec) -> ComputeProfile:
    """Return what `spec` becomes on this machine.

    Precision "auto" is bf16 where the hardware computes in it, else fp32: emulated bf16 is slower
    than fp32. Raises ConfigError when a GPU is asked for and there is none.
    """
    import torch

    device = _device(spec.device)
    native = has_bf16(device)
    precision = spec.precision if spec.precision != "auto" else ("bf16" if native else "fp32")
    return ComputeProfile(
        torch=torch.__version__,
        device=device,
        isa=isa(device),
        precision=precision,
        micro_batch=spec.micro_batch or MICRO_BATCH[device],
        compiled=spec.compile,
    )


def check(profile: ComputeProfile) -> None:
    """Raise ProfileError, naming each field, when this machine cannot compute the profile's bytes."""
    import torch

    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ProfileError(f"The run was fixed to the GPU {profile.isa!r}, and this machine has no GPU.")
    here = {"torch": torch.__version__, "isa": isa(profile.device)}
    differ = [
        f"{key} is {now!r}, not {getattr(profile, key)!r}" for key, now in here.items() if now != getattr(profile, key)
    ]
    if differ:
        raise ProfileError(f"This machine cannot compute the same bytes as the run's first: {'; '.join(differ)}.")


def isa(device: Literal["cpu", "cuda"]) -> str:
    """Return the GPU's name, or what of this CPU decides which kernels run, and how they split their sums.

    A CPU reads like "AVX512 avx512_bf16 L2=1024K".
    """
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    words = [torch.backends.cpu.get_cpu_capability(), *sorted(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})]
    if l2 := _l2_cache():
        words.append(f"L2={l2}")
    # oneDNN chooses its kernels by these too, and a cluster's nodes may be set up differently
    words += [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
    return " ".join(words)


def has_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """True when the hardware multiplies bf16 natively: AVX512-BF16, AMX or Arm bf16, or a GPU from Ampere on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    import torch

    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError('compute.device = "cuda", and torch sees no GPU here; use "auto" or "cpu".')
    return "cpu"


def _cpu_flags() -> frozenset[str]:
    """Return the instruction sets as the kernel lists them, which needs none of torch's private functions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), ()))


def _l2_cache() -> str:
    """Return the L2 size, such as '1024K', or '': oneDNN sizes its blocks, hence its partial sums, by it."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    except OSError:
        return ""
