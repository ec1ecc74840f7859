"""What 1,000 slides cost, from measured task times and your price of an hour.

    python benchmarks/schedule.py --slides 100 --times times.json       # measure here, once
    python cluster/costs.py times.json --price 0.20                     # a CPU worker: one core
    python cluster/costs.py times.json --price 1.10 --readers 4 --forward 3000   # a GPU at 3,000 tiles/s of its own

A worker on a core reads and scores in turn. A scorer on a GPU is as fast as the slower of its forward passes and of the
readers beside it; `--forward` is a rate that you measured or read somewhere, since times.json knows this machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

ROWS = 64
"""Tiles in a chunk of benchmarks/schedule.py."""


def rate(times: Mapping[str, Sequence[float]], readers: int = 0, forward: float = 0.0) -> float:
    """Return tiles/s of one worker: fused on a core, or with `readers` beside a scorer of `forward` tiles/s."""
    read_s, forward_s = (statistics.mean(times[kind]) / ROWS for kind in ("read", "forward"))
    if not readers:
        return 1 / (read_s + forward_s)
    return min(forward or 1 / forward_s, readers / read_s)


def cost(tiles_per_slide: float, tiles_per_s: float, price: float, slides: int = 1000) -> tuple[float, float]:
    """Return the hours of one worker for so many slides, and what they cost at `price` an hour."""
    hours = slides * tiles_per_slide / tiles_per_s / 3600
    return hours, hours * price


def main() -> None:
    """Print the rate, the hours and the cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("times", type=Path)
    parser.add_argument("--price", type=float, required=True, help="of an hour of one worker")
    parser.add_argument("--tiles-per-slide", type=float, default=3000)
    parser.add_argument("--readers", type=int, default=0)
    parser.add_argument("--forward", type=float, default=0.0, help="tiles/s of the scorer")
    given = parser.parse_args()
    tiles_per_s = rate(json.loads(given.times.read_text()), given.readers, given.forward)
    hours, price = cost(given.tiles_per_slide, tiles_per_s, given.price)
    print(f"{tiles_per_s:.0f} tiles/s a worker; 1,000 slides: {hours:.1f} h of one worker, {price:.2f}")


if __name__ == "__main__":
    main()
