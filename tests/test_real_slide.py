"""A real slide (CMU-1-Small-Region.svs) at 0.499, 0.5 and 1.0 um per pixel, by one and by two bundles."""

from __future__ import annotations

import numpy as np
import pytest

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import single_slide
from slideflow_ray.layout import read_grid
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import SlideStore, verify

SLIDE = "slides/CMU-1-Small-Region.svs"
MPPS = (0.499, 0.5, 1.0)


@pytest.fixture(scope="module")
def three(bundles, tmp_path_factory) -> dict[float, str]:
    """One network as three bundles that want 224 px tiles at three scales."""
    folder = tmp_path_factory.mktemp("three")
    card, weights = read_card(bundles["aligned"]), load_weights(bundles["aligned"])
    made = {}
    for mpp in MPPS:
        own = card.model_copy(update={"name": f"at-{mpp}", "tile_px": 224, "mpp": mpp})
        write_bundle(folder / own.name, own, weights)
        made[mpp] = str(folder / own.name)
    return made


@pytest.fixture(scope="module")
def together(data, three, tmp_path_factory):
    """All three bundles in one run."""
    out = tmp_path_factory.mktemp("together")
    result = run(spec(out, *three.values()), single_slide(str(data / SLIDE)))
    assert result.counts == {"done": 1, "failed": 0, "refused": 0}
    return out


def spec(out, *bundles: str) -> RunSpec:
    models = [{"path": path} for path in bundles]
    return RunSpec.parse({"cohort": "", "out": str(out), "model": models, "executor": {"workers": 2}}, "test")


@pytest.mark.data
@pytest.mark.parametrize("mpp", MPPS)
def test_each_scale_alone_gives_the_bytes_of_all_together(mpp, data, three, together, tmp_path):
    run(spec(tmp_path, three[mpp]), single_slide(str(data / SLIDE)))
    (pair,) = read_run(tmp_path)["outcomes"]["CMU-1-Small-Region"]["grids"]
    alone, both = (SlideStore(out, "CMU-1-Small-Region") for out in (tmp_path, together))
    for node in (f"scores/{pair[0]}/{pair[1]}", f"grids/{pair[0]}", f"grids/{pair[0]}/tiles"):
        assert alone.committed(node) == both.committed(node)
    assert np.isfinite(alone.read(f"scores/{pair[0]}/{pair[1]}")).all()


@pytest.mark.data
def test_two_bundles_on_one_grid_read_it_once(data, three, together, tmp_path):
    card, weights = read_card(three[0.5]), load_weights(three[0.5])
    twin = card.model_copy(update={"name": "twin"})
    write_bundle(tmp_path / "twin", twin, {key: value * 1.5 for key, value in weights.items()})
    run(spec(tmp_path / "out", three[0.5], str(tmp_path / "twin")), single_slide(str(data / SLIDE)))
    ended = read_run(tmp_path / "out")["outcomes"]["CMU-1-Small-Region"]
    assert len(ended["laid"]) == 1
    assert len(ended["grids"]) == 2
    assert verify(tmp_path / "out")[1] == []


@pytest.mark.data
def test_every_stored_tile_is_the_box_that_openslide_cuts(data, together):
    import openslide
    from PIL import Image

    store = SlideStore(together, "CMU-1-Small-Region")
    slide = openslide.OpenSlide(str(data / SLIDE))
    for node in read_run(together)["outcomes"]["CMU-1-Small-Region"]["laid"]:
        grid, tiles = read_grid(store, node), store.read(f"grids/{node}/tiles")
        for (x, y), (w, h), tile in zip(grid.xy_px0.tolist(), grid.wh_px0.tolist(), tiles, strict=True):
            if x + w > slide.dimensions[0] or y + h > slide.dimensions[1]:
                continue  # padded; see test_slides.py
            box = slide.read_region((x, y), 0, (w, h)).convert("RGB")
            wanted = np.asarray(box if w == 224 else box.resize((224, 224), Image.Resampling.BILINEAR), np.int16)
            # the SVS's JPEG is decoded by two libraries, which may round chroma differently
            assert np.abs(wanted - tile.astype(np.int16)).max() <= 2
