"""Other objects in a checkpoint's directory: those that an interrupted save left, and foreign ones."""

from collections.abc import Iterable

from dcp_storage.format.contents import Contents
from dcp_storage.format.names import MANIFEST, ObjectName, parse_part_manifest, save_of


def orphans_and_foreign(
    listed: Iterable[ObjectName], contents: Contents | None
) -> tuple[list[ObjectName], list[ObjectName]]:
    """Return the listed objects that are not part of the checkpoint: orphans of this package, and foreign ones.

    Without a `.metadata`, the part manifests of the loaded attempt belong to the checkpoint; all others are orphans.
    """
    listed = set(listed)
    named = set() if contents is None else set(contents.object_names)
    unnamed = sorted(listed - named - {MANIFEST})
    if MANIFEST not in listed:
        loaded = None if contents is None else contents.attempt
        unnamed = [name for name in unnamed if not (part := parse_part_manifest(name)) or part.attempt != loaded]
    orphans = [name for name in unnamed if save_of(name)]
    return orphans, [name for name in unnamed if not save_of(name)]
