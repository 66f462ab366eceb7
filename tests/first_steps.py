"""What may lie as the first step of a run before the programs of the model begin, as objects by name."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from xxhash import xxh3_64_hexdigest

from dcp_storage.format.manifest.draft import Draft, encode
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.manifest import StoredObject
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.format.names import MANIFEST, Part, data_object, part_manifest
from tests.drafts import columns_of

BEGUN = "2001-09-09T01:46:40+00:00"


def nothing():
    return {}


@cache
def stock():
    """What DCP's own writer makes."""
    with tempfile.TemporaryDirectory() as directory:
        dcp.save({"a": torch.ones(2)}, checkpoint_id=directory)
        return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


@cache
def parts():
    """What two ranks make without collectives."""
    token = "f" * 16
    made = {}
    for rank in range(2):
        name = data_object(token, rank, 0, ".distcp")
        draft = Draft(
            save_id=token,
            created=BEGUN,
            libraries={},
            world_size=2,
            codec=StoredCodec("none", 1 << 20, 1),
            objects=[StoredObject(name, 1)],
            tensors={},
            entries={f"entry-{rank}": 1},
            stored=columns_of([[Segment(0, 0, (1,), xxh3_64_hexdigest(b"x"))]], 16),
            planner_data=None,
            rank=rank,
            attempt=token,
        )
        made |= {name: b"x", part_manifest(Part(token, rank)): encode(draft)}
    return made


def damaged():
    """A manifest that nobody can read, and an object that it named."""
    return {MANIFEST: b"\x28\xb5\x2f\xfd damaged", data_object("e" * 16, 0, 0, ".distcp"): b"x"}


KINDS = (nothing, nothing, stock, parts, damaged)
