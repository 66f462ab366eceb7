"""Loads each kind of checkpoint into a plan, each in its own way."""

from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcp_storage.dcp.loads.native import load_native
from dcp_storage.dcp.stock.load import load_stock
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.format.stock.manifest import StockManifest
from dcp_storage.transfer.context import Context


async def load_plan(context: Context, contents: Contents, plan: LoadPlan, planner: LoadPlanner) -> None:
    """Read every item of a plan; see `load_native` and `load_stock` for the errors."""
    if isinstance(contents, StockManifest):
        await load_stock(context, contents, plan, planner)
    else:
        assert isinstance(contents, Manifest), "there are two kinds"
        await load_native(context, contents, plan, planner)
