"""Every public name is documented with an example, and the examples run."""

import inspect
import re
import textwrap
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcp_storage
from dcp_storage import prune, verify
from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import StoreError
from dcp_storage.testing.faulty import Faulty

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)

PUBLIC = {name: getattr(dcp_storage, name) for name in dcp_storage.__all__ if name not in {"errors", "prune", "verify"}}
PUBLIC |= {"verify": verify.verify, "prune": prune.prune, "Faulty": Faulty}


class Loader:
    """A data loader that knows where it is."""

    def state_dict(self):
        return {"place": 3}

    def load_state_dict(self, state):
        assert state == {"place": 3}


@pytest.fixture
def names(tmp_path):
    """What the examples take for granted: imports, a model, and a run with a step."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        state = {"model": model.state_dict(), "optim": {"step": torch.ones(1)}}
    view = {"model.embed.weight": torch.arange(4800.0).view(1200, 4)}
    dcp.save(state | view, storage_writer=dcp_storage.AsyncStorageWriter(tmp_path / "run" / "step-100"))
    given = {"torch": torch, "dcp": dcp, "timedelta": timedelta, "StoreError": StoreError, "Location": Location}
    given |= {"model": model, "state": state, "loader": Loader(), "step": 101, "steps": 103, "loss": 0.3}
    given |= {"train": lambda state: None, "checkpoints": dcp_storage.Checkpoints(tmp_path / "other")}
    return given | PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_its_examples_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = _BLOCK.findall(inspect.getdoc(PUBLIC[name]))
    assert examples, f"{name} has no example"
    for example in examples:
        code = textwrap.dedent(example).replace("s3://bucket", str(tmp_path)).replace('"/runs', f'"{tmp_path}')
        exec(compile(code, f"the example of {name}", "exec"), dict(names))
