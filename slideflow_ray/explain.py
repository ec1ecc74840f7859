"""Where a classifier looks: Grad-CAM, saliency and occlusion maps of a finished run's images or tiles.

Grad-CAM: R. Selvaraju et al., ICCV 2017. Saliency: K. Simonyan et al., ICLR workshop 2014. Occlusion: M. Zeiler and
R. Fergus, ECCV 2014. All are of the margin of one class, and computed by captum. A map shows what a score depends on in
one image; it proves neither that the model is right nor why.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideflow_ray import accounting, storage
from slideflow_ray.aggregate import Part
from slideflow_ray.cases import Model, Run, parts_of, read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted, silent
from slideflow_ray.models.bundle import BundleCard, forward_digest
from slideflow_ray.packs import Row, read_image
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.tiles import read_tiles
from slideflow_ray.specs import WholeSpec

Method = Literal["grad-cam", "saliency", "occlusion"]
METHODS: tuple[Method, ...] = ("grad-cam", "saliency", "occlusion")
FOLDER, INDEX = "explanations", "explanations.json"
WINDOW_PX, STRIDE_PX = 40, 20
"""Of the occlusion map, METHODS part 000; windows of small tiles are a third of their side."""
AT_ONCE = 16

Map = npt.NDArray[np.float32]
Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """What is to be explained.

    model : its name, where the run has several; items : slide_ids, by default the `top` ones by probability
    class_name : whose margin, by default the last class of two, else the most probable of each
    methods : by default what suits the network; layers : of Grad-CAM, by name, by default the last two resolutions
    """

    model: str | None = None
    items: tuple[str, ...] = ()
    top: int = 8
    class_name: str | None = None
    methods: tuple[Method, ...] = ()
    layers: tuple[str, ...] = ()
    window_px: int = WINDOW_PX
    stride_px: int = STRIDE_PX


@dataclass(frozen=True)
class Explained:
    """What was written: the index with an entry for each map."""

    index: Path
    maps: tuple[dict[str, Any], ...]

    def summary(self) -> str:
        """Return a few lines for people."""
        items = {(m["slide_id"], m["row"]) for m in self.maps}
        kinds = sorted({m["map"] for m in self.maps})
        return f"{len(self.maps)} maps of {len(items)} images or tiles ({', '.join(kinds)})\nIndex: {self.index}"

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"index": str(self.index), "maps": list(self.maps)}


@dataclass(frozen=True)
class _Place:
    """One row of a run's scores, and its margin of the class that is explained."""

    part: Part
    row: int
    index: int
    margin: float


def explain(out: Path, asked: Asked | None = None, listen: Listener = silent) -> Explained:
    """Draw maps for a finished run's images or tiles, beside it in `explanations/`; those of other models stay.

    Each map is float32 (tile_px, tile_px) in a .npy file, in units of the margin for occlusion; beside it lies a PNG of
    the image under the map, red where the class gains, blue where it loses.

    Raises ConfigError (no run, no such model, item, class or layer; a bundle that is not the one that scored),
    BundleError, SlideError.
    """
    from slideflow_ray.models.networks import load_network

    asked = asked or Asked()
    run = read_run(out)
    model = _model(run, asked.model)
    path = _bundle(out, model)
    card, net = load_network(path)
    if card.stain:
        raise ConfigError(f"{model.name} normalises stains; maps of such bundles are not drawn yet.")
    places = _places(run, model, asked)
    methods = asked.methods or default_methods(card)
    folder = out / FOLDER / model.node
    found = []
    for place in places:
        pixels = pixels_of(run, place.part, place.row, card)
        for name, values in maps_of(card, net, pixels, place.index, methods, asked):
            found.append(_written(folder, run, model, place, name, values, pixels))
        listen(Noted(f"explained {place.part.slide_id}"))
    index = folder / INDEX
    storage.write_atomic(index, storage.to_json({"schema": 1, "model": model.name, "maps": found}))
    return Explained(index, tuple(found))


# what is explained


def _model(run: Run, name: str | None) -> Model:
    found = [model for model in run.models if name in (None, model.name)]
    if len(found) != 1:
        known = ", ".join(model.name for model in run.models) or "none"
        what = "Say which model" if found else f"There is no classifier {name or ''}".rstrip()
        raise ConfigError(
            f"{what}; {run.out} has {known}.",
            next_step="slideflow-ray explain OUT --model NAME",
        )
    return found[0]


def _bundle(out: Path, model: Model) -> str:
    """The bundle's folder, as it was when it scored."""
    record = next(m for m in accounting.read_run(out)["models"] if m["node"] == model.node)
    if forward_digest(record["path"]) != record["digest"]:
        raise ConfigError(f"{record['path']} is not the bundle any more that scored {out}.", next_step="Run again.")
    return str(record["path"])


def _places(run: Run, model: Model, asked: Asked) -> list[_Place]:
    parts = parts_of(run, model)
    if missing := sorted(set(asked.items) - {part.slide_id for part in parts}):
        raise ConfigError(f"{model.name} has no scores of {', '.join(missing[:5])}.")
    found = [_highest(part, model, asked) for part in parts if not asked.items or part.slide_id in asked.items]
    found.sort(key=lambda place: (-place.margin, place.part.slide_id))
    return found if asked.items else found[: asked.top]


def _highest(part: Part, model: Model, asked: Asked) -> _Place:
    """The row of a slide that has most of a class; an image in one piece has one row."""
    margins = part.margins()
    if asked.class_name is not None and asked.class_name not in model.classes:
        raise ConfigError(f"{model.name} has no class {asked.class_name!r}, but {', '.join(model.classes)}.")
    if asked.class_name is not None or len(model.targets) == 1:
        c = model.classes.index(asked.class_name) if asked.class_name is not None else model.targets[0]
        i = int(margins[:, c].argmax())
    else:
        i, c = divmod(int(margins.argmax()), margins.shape[1])
    return _Place(part, part.row if part.pack else i, c, float(margins[i, c]))


def pixels_of(run: Run, part: Part, row: int, card: BundleCard) -> Rgb:
    """Return what the model was given, uint8 (tile_px, tile_px, 3): from the store, else read anew."""
    store, node = part.store, f"grids/{part.grid}"
    if store.has(f"{node}/tiles/zarr.json"):
        return np.asarray(store.read_rows(f"{node}/tiles", row, row + 1)[0], np.uint8)
    item = next(item for item in run.items if item.slide_id == part.slide_id)
    if part.pack:
        return read_image(Row(item, ""), WholeSpec(tile_px=card.tile_px, fit=card.whole or "squash"))
    return _read(item, store.read(f"{node}/xy_px0")[row], int(store.read(f"{node}/wh_px0")[row, 0]), card)


def _read(item: Item, xy_px0: npt.NDArray[np.int64], side_px0: int, card: BundleCard) -> Rgb:
    with open_slide(item.uri, mpp=item.mpp, modality=item.modality) as reader:
        mpp = card.mpp or reader.mpp0 * side_px0 / card.tile_px
        return np.asarray(read_tiles(reader, xy_px0[None], tile_px=card.tile_px, mpp=mpp)[0], np.uint8)


# maps


def default_methods(card: BundleCard) -> tuple[Method, ...]:
    """Return what suits a network: a machine on frozen features has no gradient worth looking at."""
    known: dict[str, tuple[Method, ...]] = {"skip-svm": ("occlusion",), "two-models": ("grad-cam", "occlusion")}
    return known.get(card.architecture, ("grad-cam",))


def maps_of(
    card: BundleCard, net: Any, pixels: Rgb, index: int, methods: Sequence[Method], asked: Asked | None = None
) -> Iterator[tuple[str, Map]]:
    """Yield (name, map float32 (T, T)) of one image for the margin of class `index`: a map for each layer of Grad-CAM.

    Raises ConfigError for a layer that the network has not.
    """
    import torch

    from slideflow_ray.models.scorer import to_margins
    from slideflow_ray.prepare import to_input

    asked = asked or Asked()
    x = to_input(pixels[None], card.mean, card.std, dtype=torch.float32)

    def margin(batch: Any) -> Any:
        return to_margins(net(batch), card.task)[:, index]

    if "grad-cam" in methods:
        for name, layer in layers_of(net, x, asked.layers):
            yield f"grad-cam {name}", _grad_cam(margin, layer, x)
    if "saliency" in methods:
        yield "saliency", _saliency(margin, x)
    if "occlusion" in methods:
        yield "occlusion", _occlusion(margin, x, asked.window_px, asked.stride_px)


def layers_of(net: Any, x: Any, names: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Return layers by name, or the last of each of the two coarsest resolutions: layer3 and layer4 of a ResNet.

    Of two models those of the first. Raises ConfigError for an unknown one.
    """
    modules = dict(net.named_modules())
    if unknown := [name for name in names if name not in modules]:
        known = ", ".join(name for name, _ in _stages(net, x)[-6:])
        raise ConfigError(f"The network has no layer {unknown[0]!r}; among others it has {known}.")
    if names:
        return [(name, modules[name]) for name in names]
    return _stages(net, x)[-2:]


def _stages(net: Any, x: Any) -> list[tuple[str, Any]]:
    """The last module of each resolution, in the order in which they end."""
    import torch

    within = next((name for name in ("first", "trunk") if hasattr(net, name)), "")
    last: dict[int, tuple[str, Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, _: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[-1] > 1:
                last.pop(out.shape[-1], None)
                last[out.shape[-1]] = (name, module)

        return hook

    inside = [(name, m) for name, m in net.named_modules() if name and name.startswith(within)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in inside]
    try:
        with torch.inference_mode():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return list(last.values())


def _grad_cam(margin: Any, layer: Any, x: Any) -> Map:
    from captum.attr import LayerAttribution, LayerGradCam

    small = LayerGradCam(margin, layer).attribute(x, relu_attributions=True)
    return _plain(LayerAttribution.interpolate(small, tuple(x.shape[2:]), "bilinear"))


def _saliency(margin: Any, x: Any) -> Map:
    from captum.attr import Saliency

    return _plain(Saliency(margin).attribute(x.clone().requires_grad_(), abs=True).amax(1, keepdim=True))


def _occlusion(margin: Any, x: Any, window_px: int, stride_px: int) -> Map:
    """How much of the margin is lost where a window shows the image's mean instead, averaged over windows."""
    import torch
    from captum.attr import Occlusion

    side = min(window_px, x.shape[-1] // 3)
    step = max(1, min(stride_px, side // 2))
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    with torch.inference_mode():
        found = Occlusion(margin).attribute(
            x,
            sliding_window_shapes=(x.shape[1], side, side),
            strides=(x.shape[1], step, step),
            baselines=mean,
            perturbations_per_eval=AT_ONCE,
        )
    return _plain(found[:, :1])


def _plain(values: Any) -> Map:
    found: Map = values.detach()[0, 0].float().cpu().numpy()
    return found


# what is written


def _written(
    folder: Path, run: Run, model: Model, place: _Place, name: str, values: Map, pixels: Rgb
) -> dict[str, Any]:
    slide = place.part.slide_id
    stem = "-".join([slide, *([] if place.part.pack else [str(place.row)]), name.replace(" ", "-")])
    raw, png = io.BytesIO(), io.BytesIO()
    np.save(raw, values)
    Image.fromarray(np.concatenate([pixels, overlay(pixels, values)], axis=1)).save(png, "PNG")
    storage.write_atomic(folder / f"{stem}.npy", raw.getvalue())
    storage.write_atomic(folder / f"{stem}.png", png.getvalue())
    y, x = np.unravel_index(int(values.argmax()), values.shape)
    item = next(item for item in run.items if item.slide_id == slide)
    return {
        "slide_id": slide,
        "row": place.row,
        "class": model.classes[place.index],
        "label": item.label,
        "probability": float(1 / (1 + np.exp(-place.margin))),
        "map": name,
        "hottest_px": [int(x), int(y)],
        "array": f"{stem}.npy",
        "picture": f"{stem}.png",
    }


def overlay(pixels: Rgb, values: Map) -> Rgb:
    """Return the image under its map, uint8 (T, T, 3): red where it is positive, blue where it is negative."""
    most = float(np.abs(values).max())
    weight = np.abs(values / most)[..., None] * 0.65 if most > 0 else np.zeros((*values.shape, 1))
    colour = np.where(values[..., None] >= 0, [230.0, 40.0, 20.0], [20.0, 80.0, 230.0])
    found: Rgb = np.rint(pixels * (1 - weight) + colour * weight).astype(np.uint8)
    return found


def read_explanations(out: Path) -> list[dict[str, Any]]:
    """Return the indices of all models that were explained, each with its folder below `out`; for the report."""
    found = []
    for path in sorted((out / FOLDER).glob(f"*/{INDEX}")):
        found.append({**json.loads(path.read_text()), "folder": path.parent})
    return found
