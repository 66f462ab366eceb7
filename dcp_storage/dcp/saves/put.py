"""Encodes and puts a rank's share of a save."""

from collections.abc import Sequence
from dataclasses import replace

from dcp_storage.config import Codec
from dcp_storage.dcp.saves.save import Role, Save
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.manifest.columns import Columns
from dcp_storage.format.names import ObjectName, data_object
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.save import Source, save_items


async def put(
    context: Context, save: Save, role: Role, sources: Sequence[Source], *, groups: Sequence[str], codec: Codec
) -> tuple[list[ObjectName], Columns]:
    """Put the sources of a rank; return the names of its objects, by number, and where each source is stored.

    Each name is recorded in the save when its object is begun.
    """

    def name(number: int) -> ObjectName:
        return data_object(save.token, role.rank, number, CODECS[codec.compression].suffix)

    def begin(number: int) -> ObjectName:
        save.objects.append(name(number))
        return save.objects[-1]

    transfer = save.pace.transfer(context.transfer, remote=context.store.remote)
    in_processes = save.pace.encodes_in_processes
    stored = await save_items(
        replace(context, transfer=transfer), sources, begin, codec, groups=groups, in_processes=in_processes
    )
    return list(map(name, range(int(stored.objects.max(initial=-1)) + 1))), stored
