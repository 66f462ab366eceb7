import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import StoreError
from dcp_storage.progress import progress_bar
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

    raised = []

    @contextmanager
    def log(operation, url, raw_bytes):
        try:
            yield lambda raw_bytes, stored_bytes: None
        except StoreError as error:  # and keeps it to itself
            raised.append(error)

    async def full(store, *args):
        raise StoreError("no space left")

    monkeypatch.setattr(LocalStore, "put", full)
    with pytest.raises(BaseException, match="no space left"):
        dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path, progress=True, observer=log))
    assert [type(error) for error in raised] == [StoreError]


def test_transfers_that_overlap_have_a_bar_each_and_leave_no_thread(tmp_path, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    threads, told = threading.active_count(), []

    @contextmanager
    def log(operation, url, raw_bytes):
        yield lambda raw_bytes, stored_bytes: told.append((url, raw_bytes))

    show = progress_bar(log)
    with show("save", "one", 10) as first, show("load", "two", 20) as second:
        first(3, 1)
        second(5, 1)
        first(7, 1)
    assert told == [("one", 3), ("two", 5), ("one", 7)]
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:  # rich does not wait for them
        assert time.monotonic() < deadline
