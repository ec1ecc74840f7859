"""The one door for foreign weights: a state dict in, a bundle (or safetensors) out.

A pickle is opened by a process of its own with limited memory and time (`models.unpickle`); this one reads
only the safetensors that it wrote. A `.safetensors` file needs no such care.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slideflow_ray import storage
from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import AUXILIARY, build, fit_weights

SECONDS = 120
"""Processor time for opening a foreign file; it takes a few seconds for a gigabyte."""

LEAST_MB, TIMES_SIZE = 512, 4
"""Memory beyond torch itself: four times the file (its tensors, and copies while they are written), at least this."""

State = Mapping[str, torch.Tensor]
PLAIN = "Save the plain weights where the file comes from: torch.save(model.state_dict(), 'weights.pth')."


@dataclass(frozen=True)
class Converted:
    """What was written, and what is to be said of it."""

    path: Path
    tensors: int
    parameters: int
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return it in lines for a terminal."""
        return "\n".join([*self.notes, f"{self.tensors} tensors, {self.parameters:,} numbers: {self.path}"])


def read_foreign(file: str | Path, *, seconds: int = SECONDS, megabytes: int | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a foreign weights file, by name, on the CPU; nothing of it is executed here.

    Raises BundleError for a file that is no state dict, wants code, is cut off, or takes more than its limits.
    """
    path = Path(file)
    if not path.is_file():
        raise BundleError(f"There is no file {path}.", next_step="Name a .pth, .pt or .safetensors file of weights.")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    limit = megabytes or max(LEAST_MB, TIMES_SIZE * path.stat().st_size // 2**20)
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        goal = Path(folder) / "weights.safetensors"
        _in_a_process(path, goal, limit, seconds)
        return _safetensors(goal)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(path.read_bytes()))  # bytes, as a mapped file would go with its temporary folder
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{path} is not a complete safetensors file: {error}.", next_step="Copy the file again from its source."
        ) from error


def _in_a_process(path: Path, goal: Path, megabytes: int, seconds: int) -> None:
    words = [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py")), str(path.absolute()), str(goal)]
    environment = {"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1", "HOME": str(goal.parent)}
    try:
        done = subprocess.run(  # noqa: S603 - our own program; the file's name is one argument
            [*words, str(megabytes), str(seconds)],
            capture_output=True,
            env=environment,
            cwd=goal.parent,
            timeout=4 * seconds + 60,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _over(path, f"{4 * seconds + 60} seconds") from error
    if done.returncode < 0:
        what = signal.Signals(-done.returncode).name
        raise _over(path, f"{seconds} s of processor time or {megabytes:,} MB ({what})")
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{path} could not be opened: the process that tried ended with code {done.returncode}.", next_step=PLAIN
        ) from error
    if "wrong" in said:
        raise _wrong(path, str(said["wrong"]), str(said["text"]), megabytes)


def _over(path: Path, limit: str) -> BundleError:
    return BundleError(f"{path} took more than {limit} to open, which plain weights do not.", next_step=PLAIN)


def _wrong(path: Path, kind: str, text: str, megabytes: int) -> BundleError:
    line = " ".join(text.split())
    if kind in ("memory", "size"):
        more = f": {line}" if kind == "size" else ""
        return _over(path, f"the {megabytes:,} MB that a file of its size may take{more}")
    if found := re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand|global)", line):
        named = found.group(1) or "something else"
        return BundleError(
            f"{path} wants to run code ({named}) or holds a whole model; only plain tensors are taken.",
            next_step=PLAIN,
        )
    if kind == "ValueError":
        return BundleError(f"{path} is no state dict: {line}.", next_step=PLAIN)
    # torch's own text advises to open such a file without care, so it is not passed on
    why = f" ({line[:200]})" if "weights_only" not in line else ""
    return BundleError(
        f"{path} cannot be opened as weights: it is cut off, or is no file of weights{why}.",
        next_step=f"Copy it again from its source. {PLAIN}",
    )


# fit them to a network


def plain_names(state: State, own: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Return the state dict without what wrappers put before every name: module., _orig_mod., model. and the like.

    `own` are the network's names: a first part that all names have is dropped unless the network has it too.
    """
    names = dict(state)
    while names:
        first = {name.partition(".")[0] for name in names}
        prefix = next(iter(first)) + "."
        known = set(own) & set(names)
        if len(first) > 1 or known or any("." not in name for name in names):
            break
        if not own and prefix not in ("module.", "_orig_mod."):
            break
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def fitted(state: State, card: BundleCard, where: str) -> tuple[nn.Module, list[str]]:
    """Return the card's network with these weights, in evaluation mode, and what was done to make them fit.

    Raises BundleError naming some of the keys that miss, are too many or have another shape.
    """
    net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    own, notes = net.state_dict(), []
    weights = plain_names(state, tuple(own))
    if extra := [name for name in weights if name not in own and name.startswith(AUXILIARY)]:
        notes.append(f"{len(extra)} tensors of auxiliary heads, which only serve training, are left out.")
        weights = {name: tensor for name, tensor in weights.items() if name not in extra}
    counts = [n for n in own if n not in weights and n.endswith("num_batches_tracked")]
    weights |= {name: own[name] for name in counts}  # files from before torch 0.4.1 lack them; scoring does not ask
    try:
        fit_weights(net, weights, card, where)
    except BundleError as error:
        raise BundleError(
            error.message,
            next_step=f"Give the --architecture and --classes that it was trained with. {_to_train(where)}",
        ) from error
    return net.eval(), notes


def _to_train(where: str) -> str:
    return f"To train from it with other classes: convert {where} --as-weights FILE.safetensors."


def convert(file: str | Path, card: BundleCard, out: str | Path, *, overwrite: bool = False) -> Converted:
    """Write a bundle of a foreign file's weights; it is tried on one tile first. Nothing is left if that fails.

    Raises BundleError.
    """
    net, notes = fitted(read_foreign(file), card, str(file))
    _try(net, card, str(file))
    state = net.state_dict()
    folder = write_bundle(out, card, state, overwrite=overwrite)
    return Converted(folder, len(state), sum(t.numel() for t in state.values()), tuple(notes))


def _try(net: nn.Module, card: BundleCard, where: str) -> None:
    wrong = f"{where} loads into {card.architecture}, but"
    with torch.inference_mode():
        try:
            found = net(torch.zeros(1, card.channels, card.tile_px, card.tile_px))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise BundleError(f"{wrong} it does not take tiles of {card.tile_px} px: {error}.") from error
    if not isinstance(found, torch.Tensor) or len(found) != 1 or (card.n_classes and found.shape[1] != card.n_classes):
        raise BundleError(f"{wrong} it does not give {card.n_classes} classes.")
    if not bool(found.isfinite().all()):
        raise BundleError(f"{wrong} gives what is not finite: its weights hold NaN or infinity, or overflow.")


def as_weights(file: str | Path, out: str | Path) -> Converted:
    """Write all tensors of a foreign file as safetensors, for `train --weights`; wrappers' module. is taken off.

    Raises BundleError, and ConfigError where `out` exists or is not named .safetensors.
    """
    from safetensors.torch import save

    goal = Path(out)
    if goal.suffix != ".safetensors":
        raise ConfigError(f"{goal} must end in .safetensors.")
    if goal.exists():
        raise ConfigError(f"{goal} exists already.", next_step="Choose another name.")
    state = plain_names(read_foreign(file))
    storage.write_atomic(goal, save({name: tensor.contiguous().clone() for name, tensor in sorted(state.items())}))
    return Converted(goal, len(state), sum(t.numel() for t in state.values()))


def card_of(values: Mapping[str, Any]) -> BundleCard:
    """Return the card that options describe. Raises ConfigError naming each bad one."""
    return BundleCard.parse({key: value for key, value in values.items() if value is not None}, "options")
