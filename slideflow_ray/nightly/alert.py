"""Alerts: a file in the night's folder, a line in a file of the user's, a post to a web address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError
from slideflow_ray.nightly.spec import AlertSpec
from slideflow_ray.website import post

TIMEOUT_S = 20.0


def raise_alert(spec: AlertSpec, folder: Path, night: str, drifted: Sequence[str]) -> None:
    """Write alert.json into the night's folder, and tell whom the settings name.

    A web address that does not answer is written down and ends nothing.
    """
    alert = {"night": night, "drift": list(drifted), "text": f"slideflow-ray, night {night}: {'; '.join(drifted)}"}
    said = [*_to_file(spec.file, alert), *_to_web(spec.webhook, alert)]
    storage.write_atomic(folder / "alert.json", storage.to_json({**alert, "told": said}))


def _to_file(file: str | None, alert: Mapping[str, object]) -> list[str]:
    if file is None:
        return []
    try:
        path = storage.local_path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(alert, ensure_ascii=False) + "\n")
    except (OSError, ConfigError) as error:
        return [f"file: {error}"]
    return ["file: written"]


def _to_web(address: str | None, alert: Mapping[str, object]) -> list[str]:
    if address is None:
        return []
    try:
        return [f"webhook: {post(address, json.dumps(alert).encode(), TIMEOUT_S)}"]
    except (OSError, ValueError) as error:
        return [f"webhook: {getattr(error, 'reason', error)}"]
