"""Two stains, two scanners: amounts of stain on a phantom become colours by Beer-Lambert's law.

A pixel is `white * 10 ** -(gamma * (amounts @ vectors))`: what a stain normaliser undoes is
what was done. Vectors after Ruifrok and Johnston (Anal. Quant. Cytol. Histol. 23 (2001) 291-299),
turned for scanner B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms.shapes import Pixels, Random

Stain = Literal["he", "pas"]
STAINS: Final[tuple[Stain, ...]] = ("he", "pas")

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Scanner:
    """What a laboratory and its scanner make of stained tissue.

    vectors : optical density of red, green and blue for one unit of the nuclear stain and
        of the other one (eosin, or Schiff's reagent), by stain.
    strength : density of the full amount (255) of each.
    white : red, green and blue of empty glass. gamma : of the scanner's curve.
    """

    vectors: Mapping[Stain, tuple[Vector, Vector]]
    strength: Mapping[Stain, tuple[float, float]]
    white: Vector
    gamma: float


SCANNERS: Final = {
    "A": Scanner(
        {"he": ((0.65, 0.70, 0.29), (0.09, 0.95, 0.28)), "pas": ((0.66, 0.69, 0.29), (0.18, 0.94, 0.30))},
        {"he": (1.15, 0.62), "pas": (1.05, 0.72)},
        (246.0, 245.0, 247.0),
        1.0,
    ),
    "B": Scanner(
        {"he": ((0.47, 0.72, 0.51), (0.03, 0.74, 0.67)), "pas": ((0.45, 0.70, 0.55), (0.10, 0.98, 0.17))},
        {"he": (0.85, 0.95), "pas": (0.80, 1.05)},
        (240.0, 238.0, 226.0),
        0.85,
    ),
}


def colour_table(rng: Random, scanner: str, stain: Stain) -> Pixels:
    """Return the colour of nuclear * 256 + other amount on one slide, uint8, shape (65536, 3).

    Vectors vary by up to 4 % and strengths by up to 12 % from slide to slide, with `rng`.
    Raises ConfigError for a scanner or stain that there is none of.
    """
    if scanner not in SCANNERS or stain not in STAINS:
        raise ConfigError(f"There is no scanner {scanner} with stain {stain}; A and B scan {' and '.join(STAINS)}.")
    made = SCANNERS[scanner]
    vectors = np.array(made.vectors[stain]) * rng.uniform(0.96, 1.04, (2, 3))
    strength = np.array(made.strength[stain]) * rng.uniform(0.88, 1.12, 2)
    amounts = np.stack(np.divmod(np.arange(65536), 256), axis=1) / 255 * strength
    density = made.gamma * amounts @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.asarray(np.rint(np.array(made.white) * 10**-density), np.uint8)
