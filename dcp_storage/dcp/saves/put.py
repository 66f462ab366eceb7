"""Encodes and puts what a rank writes of a save."""

from collections.abc import Sequence

from dcp_storage.config import Codec, Transfer
from dcp_storage.dcp.saves.save import Part, Save
from dcp_storage.format.names import data_object
from dcp_storage.observe import Observer, observed
from dcp_storage.store.base import Store
from dcp_storage.transfer.save import Source, StoredSegment, save_items


async def put(
    store: Store,
    save: Save,
    part: Part,
    sources: Sequence[Source],
    groups: Sequence[str],
    *,
    codec: Codec,
    transfer: Transfer,
    observer: Observer,
) -> list[list[StoredSegment]]:
    """Put the sources of a rank; return the segments of each. The names of its objects are noted in the save."""

    def name(number: int) -> str:
        save.objects.append(data_object(save.token, part.rank, number, compression=codec.compression))
        return save.objects[-1]

    with observed(observer, "save", store.url, sum(source.nbytes for source in sources)) as advance:
        return await save_items(
            store,
            sources,
            name,
            codec,
            groups=groups,
            transfer=save.pace.transfer(transfer, remote=store.remote),
            apart=save.pace.encodes_apart,
            advance=advance,
        )
