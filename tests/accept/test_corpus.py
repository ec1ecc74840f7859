"""The whole corpus at the promise's own limits: from open to refusal below 1 s and 300 MB above an idle worker."""

from __future__ import annotations

import json
from pathlib import Path

from corpus import CASES, Worker, check

FIGURES = Path(__file__).resolve().parent.parent.parent / "accept" / "006-corpus.json"


def test_every_file_ends_in_its_code_within_the_promise(tmp_path):
    worker = Worker()
    try:
        got = {c.name: check(worker, c, tmp_path / str(i)) for i, c in enumerate(CASES)}
    finally:
        worker.close()
    slow = max(got, key=lambda name: got[name].seconds)
    large = max(got, key=lambda name: got[name].mb)
    figures = {
        "files": len(CASES),
        "deaths": worker.deaths,
        "slowest": [slow, round(got[slow].seconds, 2)],
        "largest_mb": [large, round(got[large].mb)],
    }
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    assert not [f"{c.name}: {got[c.name]} instead of {c.code}" for c in CASES if got[c.name].code != c.code]
    assert not [f"{name}: {it}" for name, it in got.items() if it.seconds >= 1 or it.mb > 300]
    assert worker.deaths == 0
