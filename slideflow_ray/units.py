"""What a run works on: slides of their own, and packs of whole images; and how each item of the cohort ends.

An item that models want in tiles is a slide with a store; one that models want in one piece
is a row of a pack; it may be both, and fails when either does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slideflow_ray.accounting import Ended, failed, failed_before, forget_failure, note_failure
from slideflow_ray.cohort import Item
from slideflow_ray.packs import Pack, Packed, broken_rows, pack_items
from slideflow_ray.pipeline import Context
from slideflow_ray.stain import unstated
from slideflow_ray.storage import place
from slideflow_ray.store import SlideStore


class Units:
    """The units of a run: `todo` in order; `ended` by slide_id of the cohort, and `packs`, filled by `note`."""

    def __init__(
        self, context: Context, items: Sequence[Item], before: Mapping[str, Ended], retry: bool, want: str = ""
    ) -> None:
        self._want = want
        self._out = place(context.out)
        self._items = {item.slide_id: item for item in items}
        self.ended: dict[str, Ended] = dict(before)
        self.packs: dict[str, tuple[str, ...]] = {}
        unsaid = [i for i in items if i.slide_id not in before and not i.says_stain and _restained(context, i)]
        for item in unsaid:
            self._end(failed(item.slide_id, unstated(item.slide_id)))
        left = [item for item in items if item.slide_id not in self.ended]
        packed = [item for item in left if _in_one_piece(context, item)]
        again = failed_before(self._out, packed, refused=retry)
        self._packed = pack_items(self._out, packed, again) if packed else Packed((), {}, {}, {}, {})
        whole = {item.slide_id for item in packed}
        tiled = [i for i in left if i.slide_id not in whole or _in_tiles(context, i)]
        self._both = whole & {item.slide_id for item in tiled}
        self._rows: dict[str, list[str]] = {}
        for slide_id, (pack_id, _) in self._packed.places.items():
            self._rows.setdefault(pack_id, []).append(slide_id)
        self.todo: tuple[Item | Pack, ...] = (*tiled, *self._packed.packs)
        for slide_id, error in self._packed.errors.items():
            self._end(failed(slide_id, error))

    def note(self, ended: Ended) -> None:
        """Learn how a unit ended, and write down what failed, before anyone else is told."""
        if ended.slide_id not in self._rows:
            self._end(ended)
            return
        self.packs[ended.slide_id] = ended.nodes
        broken = _broken(self._out, ended)
        new = any(slide_id in self._packed.why for slide_id in self._rows[ended.slide_id])
        for slide_id in self._rows[ended.slide_id]:
            row = self._packed.places[slide_id][1]
            mine = replace(
                ended,
                slide_id=slide_id,
                identity=self._packed.identities[slide_id],
                tiles=min(1, ended.tiles),
                laid=(),
                grids=(),
                pack=ended.slide_id,
                row=row,
                packed=ended.grids,
                nodes=(),
                why=(self._packed.why[slide_id],) if slide_id in self._packed.why else () if new else ended.why,
            )
            self._end(_broken_one(mine, broken[row]) if row in broken else mine)

    def _end(self, ended: Ended) -> None:
        """Settle an item. One that is a slide and in a pack ends when both have, as the worse of the two."""
        slide_id, first = ended.slide_id, self.ended.get(ended.slide_id)
        if first is not None:
            ended = _worse(first, ended)
        self.ended[slide_id] = ended
        if ended.status != "done":
            note_failure(self._out, self._items[slide_id], ended, self._want)
        elif slide_id not in self._both or first is not None:
            forget_failure(self._out, slide_id)


def _restained(context: Context, item: Item) -> bool:
    """Whether a model would have to choose among the targets of several stains for the item."""
    return any(len(m.stain or {}) > 1 and m.applies_to(item) for m in context.models)


def _in_one_piece(context: Context, item: Item) -> bool:
    return bool(context.wholes) or any(m.whole and m.applies_to(item) for m in context.models)


def _in_tiles(context: Context, item: Item) -> bool:
    return bool(context.tiles) or any(not m.whole and m.applies_to(item) for m in context.models)


def _broken(out: Path, ended: Ended) -> dict[int, dict[str, str]]:
    store = SlideStore(out, ended.slide_id)
    return {row: why for grid in ended.laid for row, why in broken_rows(store, grid).items()}


def _broken_one(ended: Ended, why: Mapping[str, str]) -> Ended:
    return Ended(
        ended.slide_id,
        why["status"],
        identity=ended.identity,
        code=why["code"],
        message=why["message"],
        next_step=why["next_step"],
        pack=ended.pack,
        row=ended.row,
    )


def _worse(one: Ended, other: Ended) -> Ended:
    """Both done: the slide's facts and the pack's place in one; else the first that is not done."""
    if one.status != "done" or other.status != "done":
        return one if one.status != "done" else other
    slide, packed = (other, one) if one.pack else (one, other)
    return replace(slide, pack=packed.pack, row=packed.row, packed=packed.packed)
