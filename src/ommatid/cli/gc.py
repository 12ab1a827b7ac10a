"""The verb `gc`: a table of all caches, from which what is superfluous is removed."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from ommatid.cli.terminal import align
from ommatid.errors import ConfigError
from ommatid.store.caches import CACHES, Cache
from ommatid.store.filesystem import in_words


def clean(data: Path, dry_run: bool, everything: bool, names: Sequence[str] = ()) -> list[str]:
    """Remove what is superfluous in caches.

    Args:
        data: Root of the study whose drafts are looked at; the other caches belong to the user of this machine.
        dry_run: Whether to remove nothing.
        everything: Whether to remove all entries.
        names: Names of the caches; none means all.

    Returns:
        The lines of a table with a row per cache, and a line that sums up what was, or would be, removed.

    Raises:
        ConfigError: There is no cache of a name.
    """
    known = {cache.name: cache for cache in CACHES}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: there is no cache of this name; name one or more of {', '.join(known)}")
    rows, n_removed, freed = [], 0, 0
    for cache in [known[name] for name in names or known]:
        entries = cache.by_use(data)
        found = cache.superfluous(entries, everything)
        removed = [entry.bytes if dry_run else entry.remove() for entry in found]
        n_removed, freed = n_removed + len(removed), freed + sum(removed)
        used = datetime.datetime.fromtimestamp(entries[0].used).strftime("%Y-%m-%d %H:%M") if entries else "-"
        size = in_words(sum(entry.bytes for entry in entries))
        rows.append((cache.name, str(len(entries)), size, used, _bound(cache), in_words(sum(removed)) if removed else "-", cache.about))
        rows[-1] += (str(cache.folder(data)),)
    header = ("cache", "entries", "size", "last used", "bound", "to remove" if dry_run else "removed", "holds", "folder")
    total = f"{n_removed} {'entry' if n_removed == 1 else 'entries'}, {in_words(freed)}"
    return [*align([header, *rows]), f"would remove {total}" if dry_run else f"removed {total}"]


def _bound(cache: Cache) -> str:
    """Return the bound of a cache in words, such as "50.0 GB" or "30 days unused"."""
    bounds = [in_words(bound)] if (bound := cache.bound()) < float("inf") else []
    return ", ".join([*bounds, *([f"{cache.days:.0f} days unused"] if cache.days < float("inf") else [])])
