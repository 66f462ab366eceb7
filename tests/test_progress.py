import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import StoreError
from dcp_storage.observe import Silent
from dcp_storage.progress import ProgressBar
from dcp_storage.store.local import LocalStore

STATE = {"weight": torch.zeros(1000)}


def on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # of the stream that this test writes to: not in a fixture


def save_and_load(path):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(path, progress=True))
    dcp.load(STATE, storage_reader=AsyncStorageReader(path, progress=True))


def test_a_bar_is_drawn_on_a_terminal_and_nothing_is_left_of_it_on_standard_output(tmp_path, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    save_and_load(tmp_path)
    shown = capsys.readouterr()
    assert "save" in shown.err
    assert "load" in shown.err
    assert not shown.out


def test_nothing_is_drawn_where_standard_error_is_no_terminal(tmp_path, capsys):
    save_and_load(tmp_path)
    assert capsys.readouterr().err == ""


def test_only_one_rank_of_a_machine_draws(tmp_path, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    save_and_load(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_failed_transfer_ends_the_bar_and_tells_the_observer_behind_it(tmp_path, monkeypatch):
    on_a_terminal(monkeypatch)

    class Log(Silent):
        error = None

        def finish(self, error):
            self.error = error

    async def full(store, *args):
        raise StoreError("no space left")

    monkeypatch.setattr(LocalStore, "put", full)
    log = Log()
    with pytest.raises(BaseException, match="no space left"):
        dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path, progress=True, observer=log))
    assert isinstance(log.error, StoreError)
    bar = ProgressBar(log)
    bar.finish(None)
    assert log.error is None
