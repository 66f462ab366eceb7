"""Encodes and puts what a rank writes of a save."""

from collections.abc import Sequence

from dcp_storage.config import Codec, Transfer
from dcp_storage.dcp.saves.save import Part, Save
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.manifest.columns import Columns
from dcp_storage.format.names import data_object
from dcp_storage.observe import Observer, observed
from dcp_storage.store.base import Store
from dcp_storage.transfer.save import Source, save_items


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
) -> tuple[list[str], Columns]:
    """Put the sources of a rank; return the names of its objects, by number, and where in them each source lies.

    The names are noted in the save as the objects are begun.
    """

    def name(number: int) -> str:
        return data_object(save.token, part.rank, number, CODECS[codec.compression].suffix)

    def begin(number: int) -> str:
        save.objects.append(name(number))
        return save.objects[-1]

    with observed(observer, "save", store.url, sum(source.nbytes for source in sources)) as advance:
        stored = await save_items(
            store,
            sources,
            begin,
            codec,
            groups=groups,
            transfer=save.pace.transfer(transfer, remote=store.remote),
            apart=save.pace.encodes_apart,
            advance=advance,
        )
        return list(map(name, range(int(stored.objects.max(initial=-1)) + 1))), stored
