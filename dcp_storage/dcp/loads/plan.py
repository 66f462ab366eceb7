"""How the bytes of each kind of checkpoint become what a plan asks for: the one place that tells the kinds apart."""

from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcp_storage.config import Transfer
from dcp_storage.dcp.loads.native import load_native
from dcp_storage.dcp.stock.load import load_stock
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.format.stock.manifest import StockManifest
from dcp_storage.observe import Observer
from dcp_storage.store.base import Store


async def load_plan(
    contents: Contents,
    plan: LoadPlan,
    planner: LoadPlanner,
    store: Store,
    *,
    transfer: Transfer,
    observer: Observer,
) -> None:
    """Read every item of a plan; see `load_native` and `load_stock` for what is raised."""
    if isinstance(contents, StockManifest):
        await load_stock(store, contents, plan, planner, transfer=transfer, observer=observer)
    else:
        assert isinstance(contents, Manifest), "there are two kinds"
        await load_native(store, contents, plan, planner, transfer=transfer, observer=observer)
