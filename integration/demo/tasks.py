"""What the ranks do: train and save until they are killed; later, on another number of ranks, resume and verify."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from integration.demo.figures import CONTESTANTS, Check, Config
from integration.demo.ranks import Rank

if TYPE_CHECKING:
    from torch import Tensor

    from integration.demo.train import Trainer


def train_and_save(rank: Rank, config: Config) -> NoReturn:
    """Train from the published weights, save with every contestant, and go on until the kill."""
    from integration.demo import storage, train

    weights = train.read_weights(Path(config.model_dir, "model.safetensors"))
    _tell(rank, "weights", train.describe(weights))
    trainer = _trainer(rank, config, weights)
    for _ in range(config.steps):
        _tell(rank, "trained", trainer.step())
    state = _keep_reference(rank, config, trainer)
    for order in orders():
        for name in order:
            _tell(rank, "saved", (name, _timed(storage.save, name, state, config.place)))
    if rank.rank == 0:
        rank.report("stored", {name: storage.stored_parts(name, config.place) for name in CONTESTANTS})
    trainer.step()
    _save_until_killed(rank, config, trainer)


def resume_and_verify(rank: Rank, config: Config) -> None:
    """Load every contestant's checkpoint on this number of ranks, compare it, and go on from ours."""
    from integration.demo import bits, storage

    trainer = _trainer(rank, config, None)
    state = trainer.state()
    rounds = list(orders())
    for order in rounds:
        for name in order:
            bits.poison(state)
            _tell(rank, "loaded", (name, _timed(storage.load, name, state, config.place)))
            if order is rounds[-1]:
                _tell(rank, "checked", (name, _check(rank, config, state)))
    trainer.restore(state)
    _tell(rank, "resumed", (trainer.evaluate(), trainer.step()))


def orders() -> Iterator[tuple[str, ...]]:
    """Yield the contestants in every rotation, so that none is always first; the last is the order as it stands."""
    for shift in range(1, len(CONTESTANTS) + 1):
        yield CONTESTANTS[shift:] + CONTESTANTS[:shift]


def _save_until_killed(rank: Rank, config: Config, trainer: "Trainer") -> NoReturn:
    """Replace our checkpoint in the background and train on; the parent kills the ranks meanwhile."""
    from torch import distributed

    from integration.demo import storage

    state = _keep_reference(rank, config, trainer)
    group = distributed.new_group(backend="gloo")  # the save's collectives must not mix with those of the training
    future = storage.begin_save(state, config.place, group)
    _tell(rank, "second-save")
    told = False
    while True:
        trainer.step()
        if future.done() and not told:
            future.result()
            _tell(rank, "second-save-finished")
            told = True


def _trainer(rank: Rank, config: Config, weights: "dict[str, Tensor] | None") -> "Trainer":
    from integration.demo.train import Trainer
    from integration.demo.wordpiece import Tokenizer

    tokenizer = Tokenizer.from_file(Path(config.model_dir, "vocab.txt"))
    return Trainer(tokenizer, rank.rank, rank.world_size, weights)


def _keep_reference(rank: Rank, config: Config, trainer: "Trainer") -> dict[str, Any]:
    """Return the state; keep a whole copy of it, and the loss that it evaluates to, under its step."""
    from integration.demo import bits

    state = trainer.state()
    whole = bits.gather(state)
    if rank.rank == 0:
        bits.write_reference(_reference(config, trainer.step_number), whole)
    _tell(rank, "evaluated", (trainer.step_number, trainer.evaluate()))
    return state


def _check(rank: Rank, config: Config, state: dict[str, Any]) -> Check:
    """Compare a loaded state, each rank its part, with the reference of the step that it says it is."""
    import torch
    from torch import distributed

    from integration.demo import bits

    path = _reference(config, state["step"])
    reference = bits.read_reference(path) if path.exists() else {}
    parts: list[Any] = [None] * rank.world_size
    distributed.all_gather_object(parts, bits.compare(state, reference))
    different = {name for part in parts for name in part.different}
    compared = sum(part.shard_bytes for part in parts) + parts[0].whole_bytes
    sizes = [leaf.nbytes for leaf in reference.values() if isinstance(leaf, torch.Tensor)]
    if compared != sum(sizes):
        different.add(f"the {sum(sizes) - compared} bytes that no rank has")
    return Check(state["step"], len(sizes), compared, sorted(different))


def _reference(config: Config, step: int) -> Path:
    return Path(config.scratch, f"reference-{step}.pt")


def _timed(work: Callable[..., None], *arguments: Any) -> float:
    """Return the seconds until the slowest rank is done."""
    from torch import distributed

    distributed.barrier()
    begin = time.perf_counter()
    work(*arguments)
    distributed.barrier()
    return time.perf_counter() - begin


def _tell(rank: Rank, name: str, data: Any = None) -> None:
    """Report once, not once a rank."""
    if rank.rank == 0:
        rank.report(name, data)
