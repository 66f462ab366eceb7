import re
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.config import Codec
from dcp_storage.dcp.saves.results import Results, items_of
from dcp_storage.dcp.saves.summary import slowest
from dcp_storage.errors import ConfigError, StoreError
from dcp_storage.format.manifest.columns import NOTHING
from dcp_storage.progress import progress_bar
from tests.hooks import On, fail, hooked

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


def test_a_line_says_what_was_moved_also_where_standard_error_is_no_terminal(tmp_path, capsys):
    save_and_load(tmp_path)
    saved, loaded = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"save {tmp_path}: 4.0 kB as \d+ bytes \(0.\d+\) in 0.\d+ s \([\d,]+ MB/s\)", saved)
    assert re.fullmatch(rf"load {tmp_path}: 4.0 kB as \d+ bytes \(0.\d+\) in 0.\d+ s \([\d,]+ MB/s\)", loaded)


def test_the_log_has_a_line_for_each_save_and_load(tmp_path, caplog):
    with caplog.at_level("INFO", logger="dcp_storage"):
        save_and_load(tmp_path)
        dcp.async_save(STATE, storage_writer=AsyncStorageWriter(tmp_path)).result()
    saved, loaded, beside = (record.message for record in caplog.records)
    assert re.match(rf"saved {tmp_path} from 1 rank: 4.0 kB as \d+ bytes \(0.\d+\) in ", saved)
    assert re.match(rf"loaded {tmp_path}: 4.0 kB as \d+ bytes \(0.\d+\) in ", loaded)
    assert re.search(r"MB/s\); training waited 0.\d\d s$", beside)


def test_an_observer_that_raises_fails_nothing(tmp_path, caplog):
    def at_once(operation, url, raw_bytes):
        raise RuntimeError("at once")

    @contextmanager
    def later(operation, url, raw_bytes):
        def advance(raw_bytes, stored_bytes):
            calls.append(raw_bytes)
            raise RuntimeError("later")

        yield advance

    @contextmanager
    def at_the_end(operation, url, raw_bytes):
        yield lambda raw_bytes, stored_bytes: None
        raise RuntimeError("at the end")

    calls = []
    state = {f"w{number}": torch.zeros(1000) for number in range(5)}
    for observer in (at_once, later, at_the_end, lambda operation, url, raw_bytes: None):
        caplog.clear()
        dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path, observer=observer))
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "an observer raised" in record.message
        dcp.load(state, storage_reader=AsyncStorageReader(tmp_path, observer=observer))
    assert len(calls) == 2, "one for the save and one for the load"


@pytest.mark.parametrize("observer", ["print", 5, object()])
def test_what_is_no_observer_is_refused_by_the_constructors(tmp_path, observer):
    for make in (AsyncStorageWriter, AsyncStorageReader):
        with pytest.raises(ConfigError, match="is not callable"):
            make(tmp_path, observer=observer)


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

    full = hooked(tmp_path, before=On("put", fail))
    with pytest.raises(BaseException, match="no space left"):
        dcp.save(STATE, storage_writer=AsyncStorageWriter(full, progress=True, observer=log))
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


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (
            [9.0, 2.0, 3.0, 2.5],
            "rank 0 wrote its 3.0 MB in 9.0 s, while half of the ranks took at most 2.8 s for 1.0 MB",
        ),
        ([2.0, 3.9, 2.0], None),
        ([0.1, 0.9], None),
        ([5.0], None),
        ([0.0, 0.0], None),
    ],
)
def test_a_rank_that_is_much_slower_than_the_others_is_told_of(seconds, told):
    results = []
    for number, each in enumerate(seconds):
        items = items_of([()], [1_000_000 if number else 3_000_000])
        results.append(Results(["w"], items, [], NOTHING, Codec(), each))
    assert slowest(results) == told
