"""Whatever a manifest, a settings file, a card or an annotation holds: a value, or one of our errors, never another.

Inputs are sound ones with something in them replaced, so that most get far before they are refused.
"""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slideflow_ray.annotations import read_annotation
from slideflow_ray.cohort import read_cohort
from slideflow_ray.errors import SlideflowError
from slideflow_ray.models.bundle import BundleCard, read_card
from slideflow_ray.specs import ComputeSpec, ExecutorSpec, RunSpec, StoreSpec, TileSpec, TissueSpec, load_run
from slideflow_ray.train.spec import load_train

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "nan", "inf", "-1", "1e400", "../..", "s3://b/k", "tem", "0.5", "=1+1", "\0"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))

RUN = {
    "cohort": "c.csv",
    "out": "out",
    "model": [{"path": "b", "where": {"modality": "tem"}, "objects": {"classes": ["a"]}}],
    "tile": [{"tile_px": 64, "mpp": 0.5, "halo_px": 8}],
    "tissue": {"mpp": 8.0},
    "store": {"chunk_rows": 16},
    "compute": {"micro_batch": 4},
    "executor": {"workers": 2},
    "labels": {"rule": "fraction", "names": {"a": "b"}},
}
CARD = {
    "name": "n",
    "task": "classify",
    "architecture": "small-cnn",
    "classes": ["normal", "tumor"],
    "tile_px": 64,
    "mpp": 0.5,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]},
            "properties": {"classification": {"name": "tumor"}},
        }
    ],
}
XML = (
    '<?xml version="1.0"?><ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="tumor">'
    '<Coordinates><Coordinate Order="0" X="1" Y="2"/><Coordinate Order="1" X="9" Y="2"/>'
    '<Coordinate Order="2" X="9" Y="9"/></Coordinates></Annotation></Annotations></ASAP_Annotations>'
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a value, the value itself included."""
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def spoilt(draw: Callable[..., Any], sound: Any) -> Any:
    """A sound value with one to three of its parts replaced, dropped or given a neighbour."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        new = draw(VALUES)
        if not place:
            return draw(st.sampled_from([value, new]))
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = new
    return value


def ours(work: Callable[[], Any]) -> Any:
    """Return what comes of it, None where one of our errors does, which has a code and a next step."""
    try:
        return work()
    except SlideflowError as error:
        said = error
    assert said.code.startswith("E_")
    assert said.code != "E_BUG"
    assert all(letter.isprintable() or letter in "\n\t" for letter in str(said))
    assert said.step
    return None


@FEW
@given(value=spoilt(RUN))
def test_any_settings_are_a_spec_or_a_configuration_error(value):
    spec = ours(lambda: RunSpec.parse(value, "test"))
    if spec is not None:
        assert RunSpec.parse(json.loads(spec.model_dump_json()), "again") == spec
        assert RunSpec.parse(spec.model_dump(mode="json"), "again").digest() == spec.digest()


@FEW
@given(
    text=st.text(max_size=200)
    | st.sampled_from(["[[model]]\npath = 1", "cohort = 3", "a.b.c = 1", "[model]\npath='x'"])
)
@pytest.mark.parametrize("load", [load_run, load_train])
def test_any_text_is_settings_or_a_configuration_error(load, text, tmp_path):
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    ours(lambda: load(tmp_path / "a.toml"))


@FEW
@given(value=spoilt(CARD))
def test_any_card_is_a_card_or_a_bundle_error(value):
    card = ours(lambda: BundleCard.parse(value, "test"))
    if card is not None:
        assert BundleCard.parse(card.model_dump(mode="json"), "again") == card


@FEW
@given(value=spoilt({"schema": 1, **CARD}))
def test_any_bundle_json_is_a_card_or_a_bundle_error(value, tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps(value))
    ours(lambda: read_card(tmp_path))


@FEW
@given(value=spoilt(GEOJSON))
def test_any_geojson_is_regions_or_an_annotation_error(value, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(value))
    regions = ours(lambda: read_annotation(str(tmp_path / "a.geojson")))
    if regions is not None:
        assert all(region.geometry.is_valid for region in regions)


@FEW
@given(at=st.integers(0, len(XML) - 1), less=st.integers(0, 12), text=st.text(max_size=12))
def test_any_xml_is_regions_or_an_annotation_error(at, less, text, tmp_path):
    (tmp_path / "a.xml").write_text(XML[:at] + text + XML[at + less :], encoding="utf-8")
    ours(lambda: read_annotation(str(tmp_path / "a.xml")))


CELLS = st.text(max_size=12) | st.sampled_from(
    ["a", "../a", "s3://b/k", "0.5", "-1", "nan", "train", "he", "", "file:///x"]
)
COLUMNS = ["slide_id", "uri", "patient_id", "split", "mpp", "modality", "label", "sha256", "annotation"]


@FEW
@given(
    rows=st.lists(st.lists(CELLS, min_size=len(COLUMNS), max_size=len(COLUMNS)), max_size=3),
    columns=st.permutations(COLUMNS),
)
def test_any_table_is_a_cohort_or_a_configuration_error(rows, columns, tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    path = Path(tmp_path / "cohort.csv")
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    items = ours(lambda: read_cohort(path))
    if items is not None:
        assert len({item.slide_id for item in items}) == len(items)
        assert all(item.slide_id.isprintable() and item.slide_id.strip() == item.slide_id for item in items)


SPECS = [TileSpec(tile_px=64, mpp=0.5), TissueSpec(), StoreSpec(), ComputeSpec(), ExecutorSpec()]


@FEW
@given(st.sampled_from(SPECS), st.data())
def test_a_digest_tells_settings_apart_and_nothing_else(spec, data):
    values = spec.model_dump(mode="json")
    key = data.draw(st.sampled_from(sorted(values)))
    other = ours(lambda: type(spec).parse({**values, key: data.draw(LEAVES)}, "test"))
    if other is not None:
        assert (other.digest() == spec.digest()) == (other == spec)
