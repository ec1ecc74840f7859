"""Thickness of a segmented membrane in a slide's store: measured in its plane, place by place along its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slideflow_ray.errors import ConfigError
from slideflow_ray.membrane import Thickness, thickness
from slideflow_ray.planes import NOT_SCORED
from slideflow_ray.specs import ThicknessSpec, digest
from slideflow_ray.store import SlideStore

MEASURED_PX = 2**25
"""Pixels of a plane up to which thickness is measured (5,792 x 5,792): it takes about 80 bytes each."""

METHOD = 2
"""Counted up when what is measured changes, so that what an earlier version measured is measured anew."""


def thickness_node(grid: str, model: str, spec: ThicknessSpec) -> str:
    """Return the node of what is measured; how it is measured is in its name."""
    return f"thickness/{grid}/{model}-{digest([METHOD, spec.digest()])}"


def check_sides(spec: ThicknessSpec | None, classes: Sequence[str]) -> None:
    """Raise ConfigError where a class that is to be measured, or one beside it, is no class of the model."""
    named = () if spec is None else (spec.of, *spec.between)
    if unknown := sorted(set(named) - set(classes)):
        raise ConfigError(f"thickness names {', '.join(unknown)}; the model has {', '.join(classes)}.")
    if spec and spec.of == classes[0]:
        raise ConfigError(f"thickness is asked of {spec.of}, the model's background.")
    if len(set(named)) < len(named):
        raise ConfigError(f"thickness names a class twice: {', '.join(named)}.")


def write_thickness(
    store: SlideStore, grid: str, model: str, classes: Sequence[str], spec: ThicknessSpec | None
) -> None:
    """Measure a committed plane, write ``thickness/<grid>/<model>-<digest>`` and commit it; nothing if it is there.

    nm : float64 (N,), thickness at each place; weight_um : float64 (N,), the length it stands for; xy_px0 : float64
    (N, 2), where it is. Pixels that were not scored are as what lies beyond the image. All are empty where the plane
    is too large, and the attribute `too_large` says so.
    """
    if spec is None or store.committed(node := thickness_node(grid, model, spec)):
        return
    at = f"planes/{grid}/{model}"
    mpp = float(
        store.node_attrs(at)["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][0]
    )
    shape = store.open_plane(f"{at}/0").shape
    small = int(shape[0]) * int(shape[1]) <= MEASURED_PX
    found = _measured(store.read_plane(f"{at}/0"), mpp, classes, spec) if small else _nothing()
    store.make_group(node, {"spec": spec.model_dump(mode="json"), "nm_per_px": 1000 * mpp, "too_large": not small})
    store.write_array(f"{node}/nm", found.nm)
    store.write_array(f"{node}/weight_um", found.weight_um)
    store.write_array(f"{node}/xy_px0", found.xy_px * (mpp / float(store.attrs["mpp0"])))
    store.commit(node)


def _measured(plane: np.ndarray, mpp: float, classes: Sequence[str], spec: ThicknessSpec) -> Thickness:
    one, *others = (plane == classes.index(name) for name in (spec.of, *spec.between))
    sides = (others[0], others[1]) if others else None
    return thickness(one, 1000 * mpp, sides, spec.least_um, spec.reach_nm, plane != NOT_SCORED)


def _nothing() -> Thickness:
    return Thickness(np.empty(0), np.empty(0), np.empty((0, 2)))


def read_thickness(store: SlideStore, node: str) -> Thickness:
    """Return what was measured, its places in px0. Raises StoreError, CorruptStore."""
    nm, weight, xy = (store.read(f"{node}/{name}") for name in ("nm", "weight_um", "xy_px0"))
    return Thickness(nm, weight, xy.reshape(-1, 2))
