"""What this machine can do, for a newcomer and for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import psutil

from slideflow_ray.specs import ComputeSpec

PACKAGES = ("ray", "torch", "torchvision", "tiffslide", "openslide-python", "zarr", "dask", "scikit-learn", "numpy")


def examine() -> dict[str, str]:
    """Return one line for each thing worth knowing."""
    import openslide
    import torch

    from slideflow_ray.execute.inline import cores
    from slideflow_ray.profile import resolve

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    profile = resolve(ComputeSpec())
    lines = {name: importlib.metadata.version(name) for name in ("slideflow-ray", *PACKAGES)}
    lines["openslide"] = openslide.__library_version__
    lines["python"] = platform.python_version()
    lines["cores"] = str(cores())
    lines["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    lines["GPUs"] = ", ".join(gpus) or "none"
    lines["profile"] = f"{profile.device} {profile.isa}, {profile.precision}, micro-batch {profile.micro_batch}"
    return lines
