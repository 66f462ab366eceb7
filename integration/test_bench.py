"""The benchmark runs, checks what it loads, and adds up right. What it measures is asserted nowhere: a test machine
is no quiet one."""

import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dcp_storage.config import MIB
from dcp_storage.geometry import Box
from integration.bench.contestants import OURS, STOCK, STOCK_T2
from integration.bench.proxy import CONNECTION_BYTES_PER_SECOND, FIRST_BYTE_SECONDS, Pace, far_proxy
from integration.bench.reshard import blocks_touched
from integration.bench.results import OPERATIONS, Peak, Results, Timing
from integration.bench.rounds import rotate
from integration.bench.summary import Table
from integration.bench.targets import check


def _timings(contestant, seconds):
    return [Timing("mixed", "local", contestant, number, "save", each, 100, 50) for number, each in enumerate(seconds)]


def _run(tmp_path, *arguments):
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "integration.bench", "--quick", "--json", str(path), *arguments]
    root, env = Path(__file__).parent.parent, {**os.environ, "COLUMNS": "160", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_local_speed_resharding_and_repeats(tmp_path):
    arguments = ["--states", "mixed", "small", "--stores", "local", "--ranks", "2"]
    arguments += ["--parts", "speed", "ranks", "reshard", "repeats", "steps"]
    output, found = _run(tmp_path, *arguments)
    cells = {(each["state"], each["store"], each["contestant"], each["operation"]) for each in found["timings"]}
    for state in ("mixed", "small"):
        for operation in OPERATIONS:
            assert {(state, "local", name, operation) for name in (OURS, STOCK, STOCK_T2)} <= cells
        assert (state, "local", f"disk: {OURS}", "load cold") in cells
    for name in (OURS, STOCK):
        assert {(f"mixed, 2 ranks{how}", "local", name, "load cold") for how in ("", ", replicated")} <= cells
    assert {each["round"] for each in found["timings"]} == {0, 1}
    assert {each["contestant"] for each in found["reshards"]} >= {OURS, STOCK}
    assert all(check["passed"] for check in found["checks"] if check["number"] == 7)
    assert [len(each["seconds"]) for each in found["repeats"]] == [6, 6]
    assert {(each["contestant"], each["how"]) for each in found["steps"]} == {
        (name, how) for name in (OURS, STOCK) for how in ("save", "async_save")
    }
    assert found["machine"]["cores"] == os.cpu_count()
    assert "stock zstd t2" in output
    assert "Targets" in output
    assert not list(tmp_path.glob("dcp-storage-*"))


def test_far_s3(tmp_path):
    output, found = _run(tmp_path, "--states", "mixed", "--stores", "far", "--parts", "speed")
    assert {each["operation"] for each in found["timings"]} == {"save", "load after save"}
    assert {each["contestant"] for each in found["timings"]} >= {OURS, "fsspec"}
    assert "far" in output


def test_ratios_are_paired_and_leave_out_the_first_round():
    # Whatever slows a round down slows it for both: the ratio is 2 in each.
    table = Table([*_timings(OURS, [99, 1, 10, 2]), *_timings(STOCK, [1, 2, 20, 4]), *_timings(STOCK_T2, [1, 1, 9, 2])])
    assert table.ratio("mixed", "local", "save", OURS, STOCK) == 2
    assert table.least_ratio("mixed", "local", "save", OURS, [STOCK, STOCK_T2, "absent"]) == 1
    assert table.speed("mixed", "local", OURS, "save") == 50
    assert table.stored("mixed", "local", OURS) == 0.5
    assert table.speed("mixed", "s3", OURS, "save") is None


def test_targets_tell_failed_from_not_measured():
    results = Results({}, {}, [*_timings(OURS, [1, 1]), *_timings(STOCK, [1, 3])])
    results.peaks = [Peak("local", OURS, "save", 2048 * MIB, 128 * MIB)]
    outcomes = {each.what: each.passed for each in check(results)}
    assert outcomes["dcp_storage: save, mixed, local, against stock"] is False
    assert outcomes["dcp_storage: save, mixed, local, against stock or stock t2 or stock zstd t2"] is True
    assert outcomes["dcp_storage: save, mixed, far, against fsspec"] is None
    assert outcomes["dcp_storage: save, local, memory above the state"] is True


def test_everybody_goes_first_and_neighbours_change():
    orders = [rotate("abc", number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "a", "c"], ["c", "a", "b"], ["a", "c", "b"]]


def test_blocks_touched():
    # 4 rows of 8 bytes in blocks of 16: two rows a block.
    assert blocks_touched((4, 8), [Box((1, 0), (1, 8))], 1, 16) == 16
    assert blocks_touched((4, 8), [Box((0, 2), (4, 1)), Box((0, 3), (4, 1))], 1, 16) == 32
    assert blocks_touched((3, 8), [Box((2, 0), (1, 8))], 1, 16) == 8


def test_pace():
    pace = Pace(1000)
    assert pace.delay(0.0, 100) == pytest.approx(0.1)
    assert pace.delay(0.1, 100) == pytest.approx(0.1)
    assert pace.delay(5.0, 100) == pytest.approx(0.1)  # idle time is not saved up
    assert pace.delay(5.1, 1) == 0  # too short to sleep


def test_proxy_is_late_for_every_request_and_slow_for_large_ones():
    body = bytes(4 * MIB)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            size = int(self.path[1:])
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(body[:size])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with far_proxy(f"http://127.0.0.1:{server.server_port}") as url:
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            for size in (1, 1, len(body)):
                start = time.perf_counter()
                connection.request("GET", f"/{size}")
                assert connection.getresponse().read() == body[:size]
                least = FIRST_BYTE_SECONDS + (size - MIB) / CONNECTION_BYTES_PER_SECOND
                assert time.perf_counter() - start > max(least, 0.9 * FIRST_BYTE_SECONDS)
            connection.close()
        server.shutdown()
