"""Which version of a model is in service: `models/<name>/current.json`, replaced whole or not at all.

A model's folder holds `current.json`, `history.jsonl` and `versions/<version>/`, each a bundle that never
changes. Whatever takes a bundle's folder takes a model's folder too: `resolve` turns it into the version's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from slideflow_ray import storage
from slideflow_ray.errors import BundleError, ConfigError, CorruptStore
from slideflow_ray.models.bundle import CARD, forward_digest, read_card
from slideflow_ray.specs import Spec, digest

CURRENT = "current.json"
HISTORY = "history.jsonl"
VERSIONS = "versions"


class Version(Spec):
    """A bundle that is, or was, in service.

    forward : the forward digest ("digest" in the file); card : SHA-256 of bundle.json, so the two cover the bundle;
    path : its folder, relative to the model's where it lies inside; since : when it came into service, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    forward: Annotated[str, Field(pattern="^[0-9a-f]{12}$", alias="digest")]
    card: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    path: Annotated[str, Field(min_length=1)]
    since: str

    def folder(self, model: Path) -> Path:
        """Return the bundle's folder, where `model` is the folder with current.json."""
        return model / self.path

    @property
    def name(self) -> str:
        """What tells this version from the model's others: 12 hex digits of the whole bundle."""
        return digest([self.forward, self.card])


class Current(Version):
    """What current.json holds: the version in service, and those before it, the latest first."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    previous: tuple[Version, ...] = ()

    @property
    def version(self) -> Version:
        """The version in service, without its past."""
        return Version(forward=self.forward, card=self.card, path=self.path, since=self.since)

    def follow(self, version: Version) -> Current:
        """Return what current.json says once `version` takes this one's place."""
        return Current(**version.model_dump(), previous=(self.version, *self.previous))

    def to_json(self) -> bytes:
        """Return the bytes of current.json."""
        return storage.to_json(self.model_dump(mode="json", by_alias=True))


def is_model(folder: str | Path) -> bool:
    """Return whether a folder is a model's (it has current.json, or had versions), not a bundle's."""
    folder = storage.place(str(folder))
    return (folder / CURRENT).exists() or (not (folder / CARD).exists() and (folder / VERSIONS).is_dir())


def read_current(model: str | Path) -> Current | None:
    """Return what is in service, or None where nothing has been promoted. Raises BundleError for a damaged file."""
    path = storage.place(str(model)) / CURRENT
    try:
        values = storage.read_json(path)
    except (CorruptStore, OSError) as error:
        raise _damaged(path, str(error)) from error
    if values is None:
        return None
    try:
        return Current.parse(values, str(path))
    except ConfigError as error:
        raise _damaged(path, error.message) from error


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(
        f"{path} does not say which version is in service: {why.rstrip('.')}.",
        next_step=f"Name a version's folder below {path.parent / VERSIONS}, or take the file's last good content back.",
    )


def card_digest(bundle: str | Path) -> str:
    """Return the SHA-256 of bundle.json as it lies there, 64 hex digits. Raises BundleError where there is none."""
    try:
        return hashlib.sha256((storage.place(str(bundle)) / CARD).read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(f"{bundle} has no readable {CARD}: {error}.") from error


def version_of(bundle: str | Path, model: str | Path, now: datetime | None = None) -> Version:
    """Return how current.json would name a bundle now. Raises BundleError where the bundle is incomplete."""
    bundle, model = Path(bundle).absolute(), Path(model).absolute()
    path = bundle.relative_to(model) if bundle.is_relative_to(model) else bundle
    since = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    return Version(forward=forward_digest(bundle), card=card_digest(bundle), path=path.as_posix(), since=since)


def resolve(path: str | Path) -> Path:
    """Return the bundle's folder that `path` means: the version in service of a model's folder, else `path` itself.

    Raises as `in_service` does.
    """
    return in_service(path)[0]


def in_service(path: str | Path) -> tuple[Path, Current | None]:
    """Return the bundle's folder that `path` means, and what current.json says (None for a bundle's own folder).

    Raises BundleError where current.json is missing or damaged, and where the version's folder has gone or is not
    the bundle that was promoted.
    """
    path = storage.place(str(path))
    if not is_model(path):
        return path, None
    current = read_current(path)
    if current is None:
        raise BundleError(
            f"{path} has versions and no {CURRENT}, so none is in service.",
            next_step=f"Promote a bundle into {path}, or name one of its versions' folders.",
        )
    return checked(path, current), current


def checked(model: Path, version: Version) -> Path:
    """Return a version's folder, or raise BundleError where it has gone or was changed since it was promoted."""
    folder = version.folder(model)
    restore = f"Put the promoted bundle back, or go to the one before: slideflow-ray promote --undo --into {model}"
    if not folder.is_dir():
        raise BundleError(f"{model} has {folder} in service, which is not there.", next_step=restore)
    read_card(folder)
    found = forward_digest(folder), card_digest(folder)
    if found != (version.forward, version.card):
        what = "its weights or forward pass" if found[0] != version.forward else f"its {CARD}"
        raise BundleError(f"{folder} was changed after it was promoted: {what} differ.", next_step=restore)
    return folder


def replace_current(model: str | Path, new: Current, expected: Current | None) -> None:
    """Put `new` into current.json if it still says `expected` (None: nothing); all of it or nothing of it.

    Raises ConfigError where somebody else has replaced it meanwhile: one of two promotions at a time is refused.
    """
    path = storage.place(model) / CURRENT
    before = storage.read_bytes(path)
    if read_current(path.parent) != expected or not storage.swap(path, before, new.to_json()):
        raise ConfigError(
            f"{model} was given another version in the meantime.",
            next_step="Promote again: the candidate is compared with what is in service now.",
        )


def note(model: str | Path, line: Mapping[str, Any]) -> None:
    """Add a line to history.jsonl; what stood there stays, even where two write at a time."""
    path = storage.place(model) / HISTORY
    text = json.dumps(line, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    before = storage.read_bytes(path)
    while not storage.swap(path, before, (before or b"") + text):
        before = storage.read_bytes(path)


def history(model: str | Path) -> list[dict[str, Any]]:
    """Return what happened to a model, the oldest first. Raises CorruptStore for a line that is no JSON."""
    path = storage.place(model) / HISTORY
    try:
        return [json.loads(line) for line in (storage.read_bytes(path) or b"").decode().splitlines()]
    except ValueError as error:
        raise CorruptStore(f"{path} has a line that is no JSON: {error}.", next_step="Correct that line.") from error
