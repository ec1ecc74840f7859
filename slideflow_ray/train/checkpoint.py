"""Checkpoints of a training as safetensors and JSON: written whole or not at all, and never unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slideflow_ray.errors import CorruptStore, DiskFull
from slideflow_ray.train.loop import EpochResult, Progress, State, Validation

KEEP = 2
"""Checkpoints of a training that are kept: should the newest be damaged, the one before goes on."""

NETWORK, BEST, OPTIMISER, NOTE = "network.safetensors", "best.safetensors", "optimiser.safetensors", "progress.json"


def write_checkpoint(folder: Path, progress: Progress) -> None:
    """Write `progress` into an existing empty folder. Raises DiskFull."""
    from safetensors.torch import save_file

    tensors, numbers = _flat(progress.optimiser["state"])
    try:
        save_file(_plain(progress.net), folder / NETWORK)
        save_file(_plain(progress.best), folder / BEST)
        save_file(_plain(tensors), folder / OPTIMISER)
        note = {
            "history": [result_json(result) for result in progress.history],
            "best_epoch": progress.best_epoch,
            "optimiser": numbers,
        }
        (folder / NOTE).write_text(json.dumps(note))
    except Exception as error:
        # safetensors wraps what the system said into an error of its own.
        if _no_space(error):
            raise DiskFull(
                f"No space left for a checkpoint in {folder.parent}; the one before is whole.",
                next_step="Free some space and run the same command again: it goes on from the last checkpoint.",
            ) from error
        raise


def read_checkpoint(folder: Path) -> Progress:
    """Read what `write_checkpoint` wrote. Raises CorruptStore when it is incomplete or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        note = json.loads((folder / NOTE).read_text())
        history = tuple(result_of(values) for values in note["history"])
        state = _deep(load_file(folder / OPTIMISER), note["optimiser"])
        return Progress(
            history, note["best_epoch"], load_file(folder / BEST), load_file(folder / NETWORK), {"state": state}
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptStore(f"The checkpoint {folder} is not complete: {error}.") from error


def save_epoch(root: Path, progress: Progress) -> Path:
    """Write a checkpoint below `root` as epoch-NNNN, whole or not at all, and drop all but the last few."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"epoch-{len(progress.history):05d}"
    scratch = Path(tempfile.mkdtemp(prefix=".epoch-", suffix=".partial", dir=root))
    try:
        write_checkpoint(scratch, progress)
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.rename(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in _epochs(root)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def last_epoch(root: Path) -> Progress | None:
    """Return the newest checkpoint below `root` that can be read, None where there is none."""
    for stray in root.glob(".epoch-*.partial"):
        shutil.rmtree(stray, ignore_errors=True)
    for folder in reversed(_epochs(root)):
        with contextlib.suppress(CorruptStore):
            return read_checkpoint(folder)
    return None


def _epochs(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("epoch-*") if path.is_dir())


def _plain(state: Mapping[str, torch.Tensor]) -> State:
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _flat(state: Mapping[int, Mapping[str, Any]]) -> tuple[State, dict[str, Any]]:
    """An optimiser's state as tensors by "parameter/name", and the rest."""
    tensors: State = {}
    numbers: dict[str, Any] = {}
    for parameter, values in state.items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else numbers)[f"{parameter}/{name}"] = value
    return tensors, numbers


def _deep(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        parameter, _, name = key.partition("/")
        state.setdefault(int(parameter), {})[name] = value
    return state


def result_json(result: EpochResult) -> dict[str, Any]:
    """Return an epoch's result as JSON takes it: NaN becomes None."""
    flat = {key: getattr(result, key) for key in ("epoch", "train_loss", "train_accuracy", "lr", "tiles", "seconds")}
    if result.val:
        flat |= {f"val_{key}": value for key, value in result.val.said().items()}
    flat |= {"parts": dict(result.parts)} if result.parts else {}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in flat.items()}


def result_of(values: Mapping[str, Any]) -> EpochResult:
    """Return the result that `result_json` wrote down."""
    known: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    val = {key.removeprefix("val_"): value for key, value in known.items() if key.startswith("val_")}
    return EpochResult(
        known["epoch"],
        known["train_loss"],
        known["lr"],
        Validation(**val) if val else None,
        known["train_accuracy"],
        known["tiles"],
        known["seconds"],
        known.get("parts", {}),
    )


def _no_space(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (isinstance(error, OSError) and error.errno in codes) or any(
        f"os error {code}" in str(error) for code in codes
    )
