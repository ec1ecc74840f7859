"""A run: configuration, lease, profile, the graph worked off; what cli, jobs and nightly call.

`run` is idempotent and is its own resume: what is left is asked of the store, not of a log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slideflow_ray import execute, storage
from slideflow_ray.accounting import Ended, RunResult, failed, note_failure, read_run, refused_before, write_run
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.errors import CohortError, ConfigError
from slideflow_ray.events import Listener, RunFinished, RunStarted, VersionChosen, silent
from slideflow_ray.execute import Pool
from slideflow_ray.graph import RunGraph
from slideflow_ray.lease import lease
from slideflow_ray.models.bundle import BundleCard, forward_digest, read_card
from slideflow_ray.models.service import in_service
from slideflow_ray.observe import observed
from slideflow_ray.packs import Pack
from slideflow_ray.pipeline import LOSSLESS_SHARE, AnyTile, Context, Result, RunModel, SlidePlan
from slideflow_ray.planes import check_classes
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.specs import BoxSpec, ComputeSpec, ModelSpec, ObjectSpec, RunSpec, TileSpec, WholeSpec, digest
from slideflow_ray.store import folder_name
from slideflow_ray.thickness import check_sides
from slideflow_ray.units import Units

# configuration


def load_models(spec: RunSpec) -> tuple[tuple[ModelSpec, BundleCard, str], ...]:
    """Read every bundle's card; return (spec, card, forward digest).

    Raises BundleError for one that is incomplete, ConfigError for two of the same name.
    """
    found = tuple((model, read_card(model.path), forward_digest(model.path)) for model in spec.model)
    names = Counter((card.name, forward) for _, card, forward in found)
    if twice := [name for (name, _), n in names.items() if n > 1]:
        raise ConfigError(f"The same bundle is named twice: {', '.join(twice)}.")
    _check_segmentations(found)
    return found


def _check_segmentations(found: Sequence[tuple[ModelSpec, BundleCard, str]]) -> None:
    """Raise ConfigError where a model wants the objects of what is no segmentation of the run, or a class of none."""
    names = Counter(card.name for _, card, _ in found if card.task == "segment")
    for model, card, _ in found:
        if card.task == "segment":
            check_classes(model.objects, card.classes)
            check_sides(model.thickness, card.classes)
        elif model.objects != ObjectSpec() or model.thickness is not None:
            raise ConfigError(f"{card.name} is no segmentation, so `objects` and `thickness` mean nothing to it.")
        if model.segmentation is not None and names[model.segmentation] != 1:
            known = ", ".join(names) or "none"
            raise ConfigError(
                f'{card.name} runs on = "{model.on}", and the run has {names[model.segmentation]} segmentations '
                f"of that name (segmentations: {known}).",
                next_step="Add the segmentation as a [[model]] of its own, by the name in its bundle.json.",
            )


def resolved(spec: RunSpec, listen: Listener = silent) -> RunSpec:
    """Return the spec with each model's folder (models/<name>) replaced by that of the version in service now.

    Once, when a run starts: what is promoted meanwhile is another run's. Raises BundleError.
    """
    return spec.model_copy(update={"model": tuple(_resolved(model, listen) for model in spec.model)})


def _resolved(model: ModelSpec, listen: Listener) -> ModelSpec:
    folder, current = in_service(model.path)
    if current is None:
        return model
    listen(VersionChosen(model.path, current.forward, current.since, str(folder)))
    return model.model_copy(update={"path": str(folder), "service": model.path})


def run_models(spec: RunSpec, profile: ComputeProfile) -> tuple[RunModel, ...]:
    """Return the run's models with their node names, which carry weights, forward pass and compute profile."""
    return tuple(
        RunModel(
            name=card.name,
            node=f"{card.name}-{digest([forward, profile.digest()])}",
            spec=model,
            tile=tile_spec(spec, model, card),
            task=card.task,
            classes=card.classes,
            results=results_of(model, card),
            digest=forward,
            stain=card.stain,
        )
        for model, card, forward in load_models(spec)
    )


def results_of(model: ModelSpec, card: BundleCard) -> tuple[Result, ...]:
    """Return what a bundle gives in a run. Raises ConfigError for features of a segmentation."""
    if card.task == "segment":
        if model.features:
            raise ConfigError(f"{card.name} is a segmentation, which has no features.")
        return (Result("masks", (card.core_px, card.core_px), "uint8"),)
    scores = () if card.task == "features" else (Result("scores", (card.n_classes,), "float32"),)
    if card.task != "features" and not model.features:
        return scores
    from slideflow_ray.models.networks import feature_dim

    return (*scores, Result("features", (feature_dim(card),), "float16"))


def tile_spec(spec: RunSpec, model: ModelSpec, card: BundleCard) -> AnyTile:
    """Return the tiles that a bundle wants: size and scale are the bundle's, stride and tissue the run's.

    Raises ConfigError when run.toml says `on` what the bundle cannot take.
    """
    if model.segmentation is not None:
        if card.task == "segment":
            raise ConfigError(f"{card.name} is a segmentation; only models of one row per tile run on objects.")
        mpp = None if card.whole else card.mpp
        if mpp and model.margin:
            raise ConfigError(f"{card.name} sees objects at {mpp:g} um per pixel, so `margin` means nothing to it.")
        return BoxSpec(tile_px=card.tile_px, of=model.segmentation, margin=model.margin, mpp=mpp)
    if card.whole or model.on == "whole":
        if card.task == "segment":
            raise ConfigError(f"{card.name} is a segmentation, which needs tiles at its own scale, not whole images.")
        if model.on == "tissue":
            raise ConfigError(f"{card.name} is a bundle of whole images, and run.toml says on = 'tissue'.")
        return WholeSpec(tile_px=card.tile_px, fit=card.whole or "squash")
    if card.mpp is None:
        raise ConfigError(f"{card.name} has no mpp, so it cannot score tiles.")
    if card.task == "segment":
        return TileSpec(tile_px=card.tile_px, mpp=card.mpp, halo_px=card.halo or 0, min_tissue=0.0)
    return TileSpec(tile_px=card.tile_px, mpp=card.mpp, stride_px=spec.stride_px, min_tissue=spec.min_tissue)


def fixed_profile(out: Path, compute: ComputeSpec, pool: Pool) -> ComputeProfile:
    """Return the profile that this output folder uses for `compute`, fixing it before the first chunk.

    The same request keeps its first answer, so a resume on another kind of machine is
    refused by its workers (E_PROFILE) instead of mixing results.
    """
    path = out / "profiles" / f"{compute.digest()}.json"
    known = storage.read_json(path)
    if known is None:
        storage.create(path, storage.to_json(pool.profile(compute).model_dump(mode="json")))
        known = storage.read_json(path)
    return ComputeProfile.parse(known, str(path))


# the run


def run(
    spec: RunSpec,
    items: Sequence[Item] | None = None,
    listen: Listener = silent,
    retry: bool = False,
    rehash: bool = False,
    log: Path | None = None,
) -> RunResult:
    """Score a cohort; run again to resume, or to learn that nothing is left.

    Parameters
    ----------
    spec : what to do
    items : the cohort, if not to be read from ``spec.cohort``
    listen : told of every event
    retry : try refused slides again too
    rehash : read every file again to learn what it is, also where size and modification time are as they were
    log : a file for one JSON line an event; default: what SLIDEFLOW_RAY_LOG names

    Raises ConfigError before anything is started, InfrastructureError (resumable).
    """
    with observed(listen, log) as told:
        return _run(spec, items, told, retry, rehash)


def _run(spec: RunSpec, items: Sequence[Item] | None, listen: Listener, retry: bool, rehash: bool) -> RunResult:
    started = time.monotonic()
    spec = resolved(spec, listen)
    items, out = _checked(spec, items)
    with lease(out) as check:
        if rehash:
            _forget_identities(out)
        want = wanted(spec)
        before = {} if retry else refused_before(out, items, want)
        work, context, changed = _work(spec, items, listen, before, retry, want)
        ended = tuple(work.ended[item.slide_id] for item in items)
        result = RunResult(ended, changed, time.monotonic() - started, work.packs)
        result = _write_heatmaps(spec, items, context, result, want)
        check()
        write_run(out, spec, items, context, result)
        _write_counts(spec, out)
    listen(RunFinished(**result.counts, seconds=result.seconds))
    return result


def tiles_only(spec: RunSpec) -> RunSpec:
    """Return the run that stores the tiles which `spec` would score, and those of its [[tile]], and scores none.

    Raises ConfigError for models of whole images or objects or of some slides only, and where no tiles are kept.
    """
    spec = resolved(spec)
    wanted = [(card.name, tile_spec(spec, model, card)) for model, card, _ in load_models(spec)]
    if other := [name for name, tile in wanted if not isinstance(tile, TileSpec)]:
        raise ConfigError(f"{', '.join(other)} sees whole images or objects, which have no tiles to store beforehand.")
    if any(model.where for model in spec.model):
        raise ConfigError("A [[model]] has `where`; tiles are stored for every slide of the cohort, or for none.")
    if spec.store.tiles != "lossless":
        raise ConfigError(f'store.tiles = "{spec.store.tiles}" keeps no tiles, so there is nothing to do.')
    tiles = [*spec.tile, *(tile for _, tile in wanted if isinstance(tile, TileSpec))]
    return spec.model_copy(update={"model": (), "tile": tuple(dict.fromkeys(tiles))})


def _forget_identities(out: Path) -> None:
    for note in [out / ".cache" / "identities.json", *(out / ".cache" / "identity").glob("*.json")]:
        note.unlink(missing_ok=True)


def settings_of(out: Path) -> tuple[RunSpec, tuple[Item, ...]]:
    """Return what the last run in `out` was told, and its cohort. Raises ConfigError, CorruptStore."""
    record = read_run(out)
    spec = RunSpec.parse({**record["spec"], "out": str(out)}, str(out / "run.json"))
    return spec, tuple(Item.model_validate(item) for item in record["items"])


def _checked(spec: RunSpec, items: Sequence[Item] | None) -> tuple[tuple[Item, ...], Path]:
    """Whatever can be wrong before anything is started."""
    items = tuple(items) if items is not None else read_cohort(spec.cohort)
    _check_folders(items)
    load_models(spec)
    out = storage.place(spec.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be an output folder: {error}.") from error
    return items, out


def _check_folders(items: Sequence[Item]) -> None:
    """Raise CohortError where two slides would share a store."""
    folders: dict[str, str] = {}
    for item in items:
        other = folders.setdefault(folder_name(item.slide_id), item.slide_id)
        if other != item.slide_id:
            raise CohortError(f"{item.slide_id!r} and {other!r} would be stored in the same folder; rename one.")


def _work(
    spec: RunSpec, items: Sequence[Item], listen: Listener, before: dict[str, Ended], retry: bool, want: str
) -> tuple[Units, Context, bool]:
    out = storage.place(spec.out)
    pool = execute.open_pool(spec.executor, spec.compute)
    try:
        profile = fixed_profile(out, spec.compute, pool) if spec.model else None
        models = run_models(spec, profile) if profile else ()
        context = Context(spec.out, models, spec.tissue, spec.store, spec.tile, profile, spec.whole)
        write_run(out, spec, items, context, None)
        units = Units(context, items, before, retry, want)
        graph = RunGraph(units.todo, listen=listen, note=units.note)
        listen(RunStarted(len(units.todo), tuple(model.name for model in models), spec.executor.kind, pool.workers))
        pool.load(context)
        execute.run(graph, pool)
    finally:
        pool.close()
    return units, context, graph.changed


def wanted(spec: RunSpec) -> str:
    """Return a digest of what a run wants of its slides: which tiles, for which of them."""
    tiles = [[tile_spec(spec, model, card).model_dump(), model.where] for model, card, _ in load_models(spec)]
    more = [tile.model_dump() for tile in (*spec.tile, *spec.whole)]
    return digest([tiles, more, spec.tissue.model_dump()])


def _write_heatmaps(spec: RunSpec, items: Sequence[Item], context: Context, result: RunResult, want: str) -> RunResult:
    """Write the heatmaps of what is done; a slide whose stored scores cannot be read fails alone."""
    if not context.models:
        return result
    from slideflow_ray.aggregate import write_heatmaps

    mapped = {m.node for m in context.models if isinstance(m.tile, TileSpec) and m.task in ("classify", "multilabel")}
    done = (e for e in result.ended if e.status == "done" and e.tiles)
    work = [(e.slide_id, grid, model) for e in done for grid, model in e.grids if model in mapped]
    errors = write_heatmaps(context.out, work, scheduler=spec.dask)
    maps: dict[str, list[str]] = {}
    for slide_id, grid, model in work:
        maps.setdefault(slide_id, []).append(f"heatmaps/{grid}/{model}")
    ended = tuple(
        failed(e.slide_id, errors[e.slide_id])
        if e.slide_id in errors
        else replace(e, nodes=(*e.nodes, *maps.get(e.slide_id, ())))
        for e in result.ended
    )
    for item, e in zip(items, ended, strict=True):
        if e.slide_id in errors:
            note_failure(storage.place(spec.out), item, e, want)
    return replace(result, ended=ended)


def _write_counts(spec: RunSpec, out: Path) -> None:
    """Write tables of objects, counts and thickness, of a run with models; from the stores, so again after a kill."""
    if spec.model:
        from slideflow_ray import biopsies
        from slideflow_ray.cascade import write_tables

        write_tables(out, spec.dask)
        biopsies.write_tables(out)


# the cost of a run


def plan(spec: RunSpec, items: Sequence[Item] | None = None) -> dict[str, Any]:
    """Lay every grid and return what a run will cost; nothing is scored.

    Raises ConfigError, LeaseError.
    """
    spec = resolved(spec)
    items, out = _checked(spec, items)
    with lease(out):
        pool = execute.open_pool(spec.executor, spec.compute)
        try:
            profile = fixed_profile(out, spec.compute, pool) if spec.model else None
            models = run_models(spec, profile) if profile else ()
            context = Context(spec.out, models, spec.tissue, spec.store, spec.tile, profile, spec.whole)
            slides = [_cost(context, unit) for unit in Units(context, items, {}, retry=False).todo]
        finally:
            pool.close()
    gigabytes = sum(slide["bytes"] for slide in slides) / 1e9
    return {
        "slides": slides,
        "tiles": sum(slide["tiles"] for slide in slides),
        "todo": sum(slide["todo"] for slide in slides),
        "gigabytes": gigabytes,
        "free_gigabytes": storage.free_bytes(out) / 1e9,
    }


def _cost(context: Context, item: Item | Pack) -> dict[str, Any]:
    from slideflow_ray.execute import Failed, Task
    from slideflow_ray.execute.worker import Reader

    outcome = Reader(context).perform(Task("plan", item.slide_id, item))
    cost: dict[str, Any] = {"slide_id": item.slide_id, "tiles": 0, "todo": 0, "bytes": 0, "note": ""}
    if isinstance(outcome, Failed):
        return cost | {"note": str(outcome.error)}
    found: SlidePlan = outcome.value
    share = LOSSLESS_SHARE if context.store.tiles == "lossless" else 0.0
    raw = sum(chunk.tiles * chunk.tile.tile_px**2 * 3 for chunk in found.todo)
    todo = sum(chunk.tiles for chunk in found.todo)
    return cost | {"tiles": found.tiles, "todo": todo, "bytes": int(raw * share)}
