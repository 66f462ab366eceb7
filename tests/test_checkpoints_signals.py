"""`should_save`: signals that ask for a save, counted and passed on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from dcp_storage import Checkpoints


@pytest.fixture
def before():
    """A handler of the program's own for SIGTERM and SIGUSR1, and what it was called with."""
    calls = []
    old = {number: signal.signal(number, lambda *args: calls.append(args[0])) for number in NUMBERS}
    yield calls
    for number, handler in old.items():
        signal.signal(number, handler)


NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


def test_a_signal_is_told_once_and_the_handler_before_it_called(tmp_path, before):
    mine = signal.getsignal(signal.SIGTERM)
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.should_save(0)
        assert signal.getsignal(signal.SIGTERM) is not mine
        signal.raise_signal(signal.SIGTERM)
        assert [checkpoints.should_save(step) for step in (1, 2)] == [True, False]
        assert checkpoints.preempted
        assert before == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_second_signal_is_left_to_the_handler_before(tmp_path, before):
    mine = signal.getsignal(signal.SIGTERM)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.should_save(0)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert before == [signal.SIGTERM] * 2
        assert checkpoints.should_save(1)


def test_other_signals_and_requests(tmp_path, before):
    with Checkpoints(tmp_path, signals=[signal.SIGUSR1]) as checkpoints:
        checkpoints.request_save()
        assert [checkpoints.should_save(step) for step in (0, 1)] == [True, False]
        assert not checkpoints.preempted
        signal.raise_signal(signal.SIGTERM)
        assert not checkpoints.should_save(2)
        signal.raise_signal(signal.SIGUSR1)
        assert [checkpoints.should_save(step) for step in (3, 4)] == [True, False]
        assert checkpoints.preempted
    assert before == [signal.SIGTERM, signal.SIGUSR1]


def test_a_signal_that_comes_while_ranks_talk_counts_for_the_next_time(tmp_path, before, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.should_save(0)
        real = checkpoints._ranks.greatest

        def interrupted(numbers):
            signal.raise_signal(signal.SIGTERM)
            checkpoints.request_save()
            return real(numbers)

        monkeypatch.setattr(checkpoints._ranks, "greatest", interrupted)
        assert not checkpoints.should_save(1)
        monkeypatch.undo()
        assert [checkpoints.should_save(step) for step in (2, 3)] == [True, False]


def test_in_another_thread_requests_count_alone(tmp_path, before):
    mine = signal.getsignal(signal.SIGTERM)
    found = []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.request_save()
        thread = threading.Thread(target=lambda: found.append(checkpoints.should_save(1)))
        thread.start()
        thread.join()
        assert found == [True]
        assert signal.getsignal(signal.SIGTERM) is mine


def test_a_handler_that_came_later_stays(tmp_path, before):
    def later(*_):
        pass

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.should_save(0)
        signal.signal(signal.SIGTERM, later)
    assert signal.getsignal(signal.SIGTERM) is later


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_closed_one_is_deaf_to_nothing(tmp_path, before, order, elsewhere):
    """Its handler stays below a later one, and where another thread closes it."""
    both = [Checkpoints(tmp_path / str(number)) for number in range(2)]
    for each in both:
        each.should_save(1)
    for number in order:
        closing = threading.Thread(target=both[number].close)
        closing.run() if not elsewhere else (closing.start(), closing.join())
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM] * 2


def test_the_one_that_is_still_open_counts(tmp_path, before):
    first, second = (Checkpoints(tmp_path / str(number)) for number in range(2))
    first.should_save(1)
    second.should_save(1)
    first.close()
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGTERM]
    assert second.should_save(2)
    second.close()


def work(pipe):
    pipe.send("begun")
    threading.Event().wait()


def test_a_forked_worker_ends_as_it_would_without(tmp_path):
    """As a data loader's: `terminate` must not be taken for a request to save."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.should_save(0)
        here, there = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=work, args=(there,))
        worker.start()
        assert here.recv() == "begun"
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == -signal.SIGTERM


def test_a_script_is_never_deaf_to_a_second_signal(tmp_path):
    """Nor, before the first call of should_save, to the first."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from dcp_storage import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        if sys.argv[2] == "asks":
            checkpoints.should_save(0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert checkpoints.should_save(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        """
    )
    for how in ("asks", "never asks"):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path, how],
            timeout=60,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == -signal.SIGTERM
