"""Objects that no manifest names: what saves that died leave behind."""

import asyncio
from typing import Any

from dcp_storage.format.manifest import Manifest
from dcp_storage.format.names import MANIFEST
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.transfer.manifests import read_manifest


def find_orphans(url: str, options: dict[str, Any] | None) -> list[str]:
    """Return the names at a place that its manifest does not name."""
    return asyncio.run(_find(open_store(url, options)))


def remove_orphans(url: str, options: dict[str, Any] | None) -> None:
    """Delete them; no save may be under way."""
    asyncio.run(_remove(open_store(url, options)))


async def _find(store: Store) -> list[str]:
    async with store:
        return await _orphans(store)


async def _remove(store: Store) -> None:
    async with store:
        await store.delete(await _orphans(store))


async def _orphans(store: Store) -> list[str]:
    manifest = await read_manifest(store)
    assert isinstance(manifest, Manifest)
    named = {MANIFEST, *(stored.name for stored in manifest.objects)}
    return sorted(set(await store.list()) - named)
