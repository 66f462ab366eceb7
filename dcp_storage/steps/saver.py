"""Saves steps, in the training thread or in the background. All ranks do the same, and every failure is reported."""

import logging
from concurrent.futures import Future

from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dcp_storage.dcp.planners.save_planner import releasing
from dcp_storage.errors import ConfigError
from dcp_storage.steps.access import Access
from dcp_storage.steps.background import SaveFuture
from dcp_storage.steps.failures import cause_of, unwrapped
from dcp_storage.steps.groups import Ranks
from dcp_storage.steps.saving import Asked, Prepared, Told, check_alike, check_step
from dcp_storage.steps.step import info_of
from dcp_storage.steps.upkeep import Upkeep

logger = logging.getLogger(__name__)


class Saver:
    """The saves of one `Checkpoints`, of which at most one runs in the background.

    Attributes:
        failed: Number of saves that failed and were only logged.
    """

    def __init__(
        self, ranks: Ranks, access: Access, upkeep: Upkeep, planner: SavePlanner, *, logs_errors: bool
    ) -> None:
        self.failed = 0
        self._ranks, self._access, self._upkeep = ranks, access, upkeep
        self._planner = planner
        self._logs_errors = logs_errors
        self._flight: SaveFuture | None = None

    def save(self, asked: Asked) -> int | None:
        """Save a step while training waits; return it, or `None` if that failed and was logged."""
        try:
            self._save(asked)
        except Exception as error:  # noqa: BLE001 - raised unless it is to be logged
            self._tolerate(asked.step, error)
            return None
        return asked.step

    def begin(self, asked: Asked) -> SaveFuture:
        """Copy a state, and save it in the background."""
        future = SaveFuture(asked.step)
        try:
            if not self._begin(asked, future):
                future.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised unless it is to be logged
            self._tolerate(asked.step, error)
            future.set_result(None)
        return future

    def _save(self, asked: Asked) -> None:
        prepared = self._prepare(asked)
        assert prepared, "it waits for the previous save"
        with self._upkeep.using(asked.step), unwrapped(), releasing(self._planner), prepared.spread() as plain:
            group = self._ranks.asked
            dcp_save(plain, storage_writer=prepared.writer, planner=self._planner, process_group=group)
        self._upkeep.committed(asked.step, self._ranks.rank)

    def _begin(self, asked: Asked, future: SaveFuture) -> bool:
        prepared = self._prepare(asked)
        if prepared is None:
            return False
        group, rank = self._ranks.background, self._ranks.rank
        self._upkeep.hold(asked.step)
        try:
            with prepared.spread() as plain:
                saving = dcp_async_save(
                    plain, storage_writer=prepared.writer, planner=self._planner, process_group=group
                )
        except BaseException:
            self._upkeep.release(asked.step)
            raise
        assert isinstance(saving, Future), "the writer stages before it returns"
        self._flight = future
        saving.add_done_callback(lambda done: self._land(future, rank, done.exception()))
        return True

    def raise_failed(self) -> None:
        """Wait for the save in the background, and raise its failure, if that was not reported yet."""
        failure = self._flight.take_failure() if self._flight else None
        self._flight = None
        if failure:
            raise failure

    def _prepare(self, asked: Asked) -> Prepared | None:
        """Agree with the other ranks; return `None` if nothing is to be saved, because a rank is busy."""
        verdicts = self._upkeep.verdicts

        def here() -> tuple[Prepared | None, Told]:
            step = check_step(asked.step)
            if asked.skip_if_busy and self._flight and not self._flight.done():
                return None, Told(step, busy=True)
            self.raise_failed()
            may_replace = asked.overwrite or step in verdicts.damaged
            writer = self._access.writer(step, info_of(step, asked.metrics), overwrite=may_replace)
            prepared = Prepared.of(asked.state, self._ranks.rank, writer)
            return prepared, Told(step, prepared.names, verdicts.told())

        prepared, told = self._ranks.meet(here)
        if any(each.busy for each in told):
            return None
        check_alike(told)
        verdicts.settle([each.verdicts for each in told])
        return prepared

    def _land(self, future: SaveFuture, rank: int, error: BaseException | None) -> None:
        """Handle the end of a save in the background, in its thread."""
        with releasing(self._planner):  # if it failed, the copy would need memory beside the next one
            self._upkeep.release(future.step)
        if error is None:
            self._upkeep.committed(future.step, rank)
            future.set_result(future.step)
            return
        cause = cause_of(error)
        if self._is_logged(cause):
            self._log(future.step, cause)
            future.set_result(None)
        else:
            future.set_exception(cause)

    def _tolerate(self, step: int, error: Exception) -> None:
        """Log the failure of a save, or raise it."""
        if not self._is_logged(error):
            raise error
        self._log(step, error)

    def _is_logged(self, error: BaseException) -> bool:
        return self._logs_errors and isinstance(error, Exception) and not isinstance(error, ConfigError)

    def _log(self, step: int, error: BaseException) -> None:
        self.failed += 1
        # The text alone: a handler that keeps the error would keep its frames, and with them the copied state.
        text = str(error)
        logger.error("step %s was not saved; the run continues (%d failed so far): %s", step, self.failed, text)
