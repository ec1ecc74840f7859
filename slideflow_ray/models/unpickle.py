"""A foreign weights file becomes safetensors: the program that `models.convert` starts, with little to lose.

It runs apart from the package (``python -I unpickle.py FILE SAFETENSORS MEGABYTES SECONDS``), limits its own memory,
time and output, opens the file with ``weights_only=True`` and prints one line of JSON. Nothing else unpickles.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Under which a checkpoint keeps its state dict."""


def main(source: str, goal: str, megabytes: int, seconds: int) -> dict[str, Any]:
    """Write the tensors of `source` to `goal`; return what was found, or what was wrong."""
    import torch
    from safetensors.torch import save_file

    _limit(megabytes, seconds)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        tensors = state_dict(loaded)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > megabytes * 2**20 // 2:
            return {"wrong": "size", "text": f"its {len(tensors)} tensors claim {size / 1e9:,.1f} GB"}
        save_file({key: t.detach().contiguous().clone() for key, t in tensors.items()}, goal)
        return {"tensors": len(tensors)}
    except Exception as error:  # noqa: BLE001 - whatever a foreign file does, it is said and not raised further
        kind = "memory" if isinstance(error, MemoryError) or "alloc" in str(error).lower() else type(error).__name__
        return {"wrong": kind, "text": str(error)[:2000]}


def state_dict(loaded: Any) -> dict[str, Any]:
    """Return the tensors of a state dict, or of one inside a checkpoint. Raises ValueError where there is none."""
    import torch

    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        keys = ", ".join(repr(str(k)[:40]) for k in list(loaded)[:5])
        raise ValueError(f"it holds no tensors (its keys: {keys or 'none'})")
    return tensors


def _limit(megabytes: int, seconds: int) -> None:
    """Bound what comes after torch itself: address space, processor time, size of a file, and no core dump."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + megabytes * 2**20,
        resource.RLIMIT_CPU: seconds + int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])),
        resource.RLIMIT_FSIZE: megabytes * 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for which, limit in limits.items():
        resource.setrlimit(which, (limit, limit))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))  # noqa: T201
