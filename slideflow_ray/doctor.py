"""What this machine can do, for a newcomer and for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import psutil

from slideflow_ray.errors import BadMpp, ConfigError, NoMpp
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.base import about_micrograph
from slideflow_ray.specs import ComputeSpec

PACKAGES = ("ray", "torch", "torchvision", "tiffslide", "openslide-python", "zarr", "dask", "scikit-learn", "numpy")


def look(image: str, mpp: float | None = None) -> dict[str, str]:
    """Return what is found of a micrograph: size, scale, scale bar, the rows left out, the window. Raises SlideError.

    Without a scale in the file or given it is looked at all the same, and what is missing is said. Raises ConfigError
    for a given scale that no micrograph has.
    """
    missing = ""
    try:
        reader = open_slide(image, mpp=mpp, modality="tem")
    except (NoMpp, BadMpp) as error:
        if mpp is not None:
            meant = f": {mpp:g} nm are {mpp / 1000:g}" if mpp > 0 else ", and above 0"
            raise ConfigError(error.message, next_step=f"--mpp is in um{meant}.") from error
        missing = f"{error.message} {error.step.replace(' and run with --retry', '')}"
        reader = open_slide(image, mpp=1.0, modality="tem")
    with reader:
        about = about_micrograph(reader).get("micrograph")
        nm = f"{reader.mpp0 * 1000:g}, said by the {reader.mpp_source}"
        lines = {"size": f"{reader.size_px0[0]:,} x {reader.size_px0[1]:,} px", "nm per px": missing or nm}
        if about is None:
            return {**lines, "picture": "coloured, so it is left as it is"}
        x0, y0, x1, y1 = about["keep_px0"]
        bar, (low, high) = about["bar_px"], about["window"]
    length = "" if missing or bar is None else f", {bar * reader.mpp0 * 1000:,.0f} nm"
    lines["scale bar"] = "none found" if bar is None else f"{bar} px{length}"
    lines["picture"] = f"x {x0:,} to {x1:,}, y {y0:,} to {y1:,}; the rest is left out"
    return {**lines, "window": f"{low:g} to {high:g}"}


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
