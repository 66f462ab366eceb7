"""`verify` and `prune`: they find and remove all that they should, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedSavePlanner, Transfer, cli
from dcp_storage.errors import CheckpointNotFound, ConfigError, ManifestCorrupt, StoreError, UnsupportedFormat
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.prune import prune
from dcp_storage.testing.place import Place, put, run
from dcp_storage.verify import verify
from tests.hooks import On, flaky, hooked
from tests.states import assert_same, blank_like

STATE = {"weight": torch.arange(3 << 18, dtype=torch.float32), "half": torch.ones(99, dtype=torch.bfloat16), "step": 7}
TRANSFER = Transfer(object_bytes=1 << 20)
ORPHAN, OTHER = "0123456789abcdef-0-0.distcp.zst", "fedcba9876543210-3-11.distcp"
LEFT_BEHIND = [
    ORPHAN,
    OTHER,
    f"{ORPHAN}.tmp-0123456789abcdef",
    ".metadata.tmp-0123456789abcdef",
    "__3.metadata.tmp-0123456789abcdef",
    "__12.metadata",
]
FOREIGN = [
    "notes.txt",
    "__0_0.distcp",
    ".metadata.tmp",
    ".metadata.bak",
    "0123456789abcdef-0-0.distcp.zst.bak",
    "0123456789ABCDEF-0-0.distcp.zst",
    "model-0-0.distcp",
    "x0123456789abcdef-0-0.distcp",
]


def save(path, state=STATE, **options):
    dcp.save(state, storage_writer=AsyncStorageWriter(path, transfer=TRANSFER, **options), planner=ShardedSavePlanner())


@pytest.fixture(params=[Codec(block_bytes=65_536), Codec("none", block_bytes=65_536)], ids=["zstd", "none"])
def saved(tmp_path, request):
    save(tmp_path, codec=request.param)
    return tmp_path


def manifest_of(path):
    return decode((path / ".metadata").read_bytes(), "here")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def age(path, hours):
    stamp = time.time() - 3600 * hours
    os.utime(path, (stamp, stamp))


def leave(path, *names, hours=48):
    for name in names:
        (path / name).write_bytes(b"left")
        age(path / name, hours)


def test_a_sound_checkpoint(saved):
    found = verify(saved)
    assert found.sound
    assert not found.stock
    assert (found.tensors, found.others, found.raw_bytes) == (
        2,
        1,
        (3 << 20) + 198 + manifest_of(saved).bytes["step"].size,
    )
    assert found.blocks == 48 + 2
    files = {file.name: file.stat().st_size for file in saved.iterdir() if file.name != ".metadata"}
    assert (found.objects, found.stored_bytes) == (len(files), sum(files.values()))
    assert (found.orphans, found.foreign) == ({}, ())


def test_every_damaged_block_is_told(saved):
    manifest = manifest_of(saved)
    expected = set()
    for segment in manifest.tensors["weight"].segments(0):
        name, offset = manifest.objects[segment.object].name, segment.offset
        for number, length in enumerate(segment.lengths):
            if number % 3 == 0:
                flip(saved / name, offset + length // 2)
                expected.add((name, offset, ("weight",)))
            offset += length
    [segment] = manifest.bytes["step"].segments
    flip(saved / manifest.objects[segment.object].name, segment.offset)
    expected.add((manifest.objects[segment.object].name, segment.offset, ("step",)))
    found = verify(saved)
    assert not found.sound
    assert {(fault.object_name, fault.offset, fault.fqns) for fault in found.damage} == expected
    assert len(found.damage) == len(expected) > 10


def test_missing_short_and_long_objects(saved):
    names = sorted(file.name for file in saved.glob("*.distcp*"))
    (saved / names[0]).unlink()
    os.truncate(saved / names[1], 1000)
    with (saved / names[2]).open("ab") as file:
        file.write(b"more")
    faults = {fault.object_name: fault for fault in verify(saved).damage}
    assert faults.keys() == set(names[:3])
    assert all(fault.offset is None and fault.fqns for fault in faults.values())
    assert faults[names[0]].what == "the object is missing"
    assert "too early" in faults[names[1]].what
    assert faults[names[2]].what == "the object is 4 bytes too long"


def test_a_block_that_only_one_reading_damaged_is_sound(saved):
    assert verify(flaky(saved)).sound
    assert not verify(flaky(saved, reads=2)).sound


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_called_damaged(saved):
    replaced = hooked(saved, before=On("list", lambda _: save(saved), 1))
    with pytest.raises(StoreError, match="replaced by another save"):
        verify(replaced)


def test_what_lies_beside_the_checkpoint(saved):
    leave(saved, *LEFT_BEHIND, *FOREIGN)
    found = verify(saved)
    assert found.sound
    assert found.orphans == dict.fromkeys(sorted(LEFT_BEHIND), 4)
    assert found.foreign == tuple(sorted(FOREIGN))


def test_stock_checkpoints_are_told_by_what_is_there(tmp_path):
    dcp.save(STATE, storage_writer=dcp.FileSystemWriter(tmp_path))
    found = verify(tmp_path)
    assert (found.stock, found.sound, found.tensors, found.others, found.blocks) == (True, True, 2, 1, 0)
    [file] = tmp_path.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)
    [fault] = verify(tmp_path).damage
    assert (fault.object_name, fault.what) == (file.name, "the object ends 1 bytes too early")
    file.unlink()
    [fault] = verify(tmp_path).damage
    assert fault.what == "the object is missing"
    assert set(fault.fqns) == set(STATE)


@pytest.mark.parametrize("call", [verify, prune])
def test_without_a_manifest_to_trust_both_refuse(tmp_path, call):
    leave(tmp_path, ORPHAN)
    (tmp_path / ".metadata").write_bytes(b"\x28\xb5\x2f\xfd and nonsense")
    with pytest.raises(ManifestCorrupt):
        call(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsupportedFormat):
        call(tmp_path)
    (tmp_path / ".metadata").unlink()
    (tmp_path / "__0.metadata").write_bytes(b"")
    with pytest.raises(ManifestCorrupt):
        call(tmp_path)
    assert (tmp_path / ORPHAN).exists()


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFound):
        verify(tmp_path / "none")
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointNotFound):
            prune(wrong)
    assert not (tmp_path / "none").exists()


def test_the_steps_below_are_named(tmp_path, moto_s3):
    for step in (9, 10, 200):
        save(tmp_path / f"step-{step}")
        save(f"{moto_s3.url}/step-{step}", storage_options=moto_s3.storage_options)
    for path, options in ((tmp_path, None), (moto_s3.url, moto_s3.storage_options)):
        for look in (verify, prune):
            with pytest.raises(CheckpointNotFound, match="one of the directories below it: step-9, step-10, step-200"):
                look(path, storage_options=options)


@pytest.mark.parametrize("command", ["verify", "prune"])
def test_errors_as_json(tmp_path, capsys, command):
    assert cli.main([command, "--json", str(tmp_path / "none")]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "CheckpointNotFound"
    save(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"damaged")
    assert cli.main([command, "--json", str(tmp_path)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"] in {"ManifestCorrupt", "UnsupportedFormat"}
    assert str(tmp_path) in document["message"]


@pytest.mark.parametrize("path", ["nothere", "s3:/x/y", ""])
def test_prune_of_a_wrong_path_fails(tmp_path, path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", path]) == 2
    assert capsys.readouterr().err.startswith("dcp-storage: ")


def test_prune_removes_what_is_left_behind_and_nothing_else(saved):
    before = {file.name for file in saved.iterdir()}
    leave(saved, *LEFT_BEHIND, *FOREIGN)
    for file in before:
        age(saved / file, 1000)
    dry = prune(saved, dry_run=True)
    assert {file.name for file in saved.iterdir()} == before | {*LEFT_BEHIND, *FOREIGN}
    assert prune(saved) == dry
    assert dry.removed == dict.fromkeys(sorted(LEFT_BEHIND), 4)
    assert {file.name for file in saved.iterdir()} == before | set(FOREIGN)
    loaded = blank_like(STATE)
    dcp.load(loaded, storage_reader=AsyncStorageReader(saved))
    assert_same(loaded, STATE)


def test_prune_removes_what_a_dead_first_save_left(tmp_path):
    leave(tmp_path, ORPHAN)
    assert prune(tmp_path).removed == {ORPHAN: 4}


def test_prune_leaves_a_save_alone_of_which_one_object_is_young(tmp_path):
    """A slow save: its first objects are old, and all of them are needed once it commits."""
    newest = ORPHAN.replace("-0-0", "-5-7")
    leave(tmp_path, ORPHAN, OTHER, hours=25)
    leave(tmp_path, newest, hours=23)
    done = prune(tmp_path)
    assert (set(done.removed), set(done.kept)) == ({OTHER}, {ORPHAN, newest})
    assert set(prune(tmp_path, older_than=timedelta(hours=22)).removed) == {ORPHAN, newest}


def test_prune_keeps_what_seems_to_come_from_the_future(tmp_path):
    leave(tmp_path, ORPHAN, hours=-48)
    assert set(prune(tmp_path, older_than=timedelta(0)).kept) == {ORPHAN}


def test_a_commit_between_listing_and_deleting_is_safe(saved, tmp_path_factory):
    """The objects of a save that commits while `prune` looks are in its lists as orphans, and old."""
    new = tmp_path_factory.mktemp("new")
    save(new)
    for file in new.glob("*.distcp*"):
        shutil.copy(file, saved)
        age(saved / file.name, 1000)
    commit = On("list", lambda _: shutil.copy(new / ".metadata", saved))
    prune(hooked(saved, after=commit))
    assert verify(saved).sound


def test_the_ranks_manifests_are_the_checkpoint_where_there_is_no_other(tmp_path):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path), use_collectives=False)
    assert len(list(tmp_path.glob("__0-*.metadata"))) == 1
    for file in tmp_path.iterdir():
        age(file, 1000)
    assert prune(tmp_path).removed == {}
    found = verify(tmp_path)
    assert (found.sound, found.orphans) == (True, {})


def test_on_s3(moto_s3: Place):
    save(moto_s3.url, storage_options=moto_s3.storage_options)
    run(moto_s3, lambda store: put(store, ORPHAN, b"left"))
    found = verify(moto_s3.url, storage_options=moto_s3.storage_options)
    assert (found.sound, found.orphans) == (True, {ORPHAN: 4})
    assert prune(moto_s3.url, storage_options=moto_s3.storage_options).kept == {ORPHAN: 4}
    done = prune(moto_s3.url, storage_options=moto_s3.storage_options, older_than=timedelta(0))
    assert done.removed == {ORPHAN: 4}
    assert verify(moto_s3.url, storage_options=moto_s3.storage_options).orphans == {}


def test_impossible_ages():
    with pytest.raises(ConfigError, match="negative"):
        prune("/tmp/x", older_than=timedelta(seconds=-1))


def test_verify_on_the_command_line(saved, capsys):
    leave(saved, ORPHAN)
    assert cli.main(["verify", str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"SOUND  {saved}: 2 tensors and 1 other entry in")
    assert "Left over: 1 object (4 bytes)" in out
    flip(saved / manifest_of(saved).objects[0].name, 100)
    assert cli.main(["verify", str(saved)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"DAMAGED  {saved}: 1 fault in")
    assert "a damaged block of" in out
    assert cli.main(["verify", str(saved), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["sound"] is False
    assert len(document["damage"]) == 1
    assert document["orphans"] == {ORPHAN: 4}


def test_names_are_no_markup(tmp_path, capsys):
    save(tmp_path, {"[red]w[/red]": torch.ones(3)})
    next(tmp_path.glob("*.zst")).unlink()
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "[red]w[/red]" in capsys.readouterr().out


def test_prune_on_the_command_line(tmp_path, capsys):
    leave(tmp_path, ORPHAN, hours=3)
    assert cli.main(["prune", str(tmp_path)]) == 0
    assert "0 objects (0 bytes) removed; 1 object too recent" in capsys.readouterr().out
    assert cli.main(["prune", str(tmp_path), "--older-than", "2h", "--dry-run"]) == 0
    assert f"Would remove  {ORPHAN}" in capsys.readouterr().out
    assert cli.main(["prune", str(tmp_path), "--older-than", "2h", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"url": str(tmp_path), "dry_run": False, "removed": {ORPHAN: 4}, "kept": {}}
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_of_what_cannot_be_judged(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert cli.main(["verify", "nosuch://x"]) == 2
    assert cli.main(["verify", str(tmp_path), "--storage-options", '{"key": "x"}']) == 2
    (tmp_path / ".metadata").write_bytes(b"")
    assert cli.main(["verify", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("dcp-storage: ") == 4


@pytest.mark.parametrize(
    "options",
    [
        ["verify"],
        ["verify", "x", "--storage-options", "not-json-but-a-secret"],
        ["verify", "x", "--storage-options", "[1]"],
        ["prune", "x", "--older-than", "1"],
        ["prune", "x", "--older-than", "-1h"],
        ["prune", "x", "--older-than", "1w"],
    ],
)
def test_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(options)
    assert caught.value.code == 2
    assert "a-secret" not in capsys.readouterr().err


def test_verify_needs_no_torch(tmp_path):
    save(tmp_path)
    code = (
        "import sys; from dcp_storage.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules;"
        "sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, "verify", str(tmp_path)], check=True, timeout=60)
