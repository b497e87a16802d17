"""A JSON file of entries by key, one per user: read often, written by tuning runs, which may overlap.

Writes are locked and atomic. D2D_CACHE names another folder than the user's cache.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from filelock import FileLock

from .errors import DenseFallbackWarning, TuningError

FORMAT = 1
_LOCK = threading.Lock()  # filelock's locks are reentrant within a process


class Keyed(Protocol):
    """A dataclass of JSON's types with a key."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> str: ...


def folder() -> Path:
    """Where schedules and generated files are kept: $D2D_CACHE, or d2dcompile in the user's cache."""
    given = os.environ.get("D2D_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2dcompile"


class Store:
    """The file `name` in `folder()`, with entries of several kinds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kinds: dict[str, Callable[[Any], Keyed]] = {}
        self._held: tuple[Path, int, Mapping[str, Keyed]] | None = None

    def register(self, field: str, parse: Callable[[Any], Keyed]) -> None:
        """Take entries of another kind, told by a field that no other kind has.

        parse makes one of its JSON, or raises ValueError or TypeError.
        """
        self._kinds[field] = parse

    def _parse(self, item: Any) -> Keyed:
        kind = next((parse for field, parse in self._kinds.items() if field in item), None)
        if kind is None:
            raise ValueError(f"an entry has none of the fields {', '.join(self._kinds)}")
        return kind(item)

    @property
    def path(self) -> Path:
        return folder() / self.name

    def read(self, path: Path | None = None) -> dict[str, Keyed]:
        """All entries of a file by key; none if it does not exist. Raises TuningError if it is damaged."""
        path = path or self.path
        if not path.exists():
            return {}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise TuningError(f"{path} has format {document['format']!r}; expected {FORMAT}.")
            entries = [self._parse(item) for item in document["entries"]]
        except TuningError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise TuningError(
                f"{path} does not hold schedules as `d2dcompile tune` writes them "
                f"({type(error).__name__}: {error}). Delete it and tune again."
            ) from None
        return {entry.key: entry for entry in entries}

    def add(self, entries: Iterable[Keyed], path: Path | None = None) -> Path:
        """Put entries into a file, in place of older ones of the same key; returns its path."""
        path = path or self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _LOCK, FileLock(f"{path}.lock"):
            held = self.read(path) | {entry.key: entry for entry in entries}
            document = {"format": FORMAT, "entries": [asdict(held[name]) for name in sorted(held)]}
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
            ) as file:
                file.write(text)
            os.replace(file.name, path)
        self._held = None
        return path

    def get(self, key: str) -> Keyed | None:
        """The user's entry of a key; a damaged file is one warning, not an error."""
        path = self.path
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return None
        if self._held is None or self._held[:2] != (path, stamp):
            self._held = (path, stamp, self._read_or_warn(path))
        return self._held[2].get(key)

    def _read_or_warn(self, path: Path) -> Mapping[str, Keyed]:
        try:
            return self.read(path)
        except TuningError as error:
            warnings.warn(
                f"{error} Until then default schedules run.", DenseFallbackWarning, stacklevel=4
            )
            return {}


STORE = Store("schedules.json")
