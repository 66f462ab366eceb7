"""The saves of this process. How DCP calls a writer, and what rests on it.

A save is, in one thread, `reset` (where `dcp.save` was given a `checkpoint_id`), `storage_meta`,
`set_up_storage_writer`, `prepare_local_plan`, on the coordinator `prepare_global_plan`, `write_data`, and on the
coordinator `finish`; without collectives every rank calls all of them. DCP passes no handle from one hook to the next,
so a writer looks its `Save` up by the thread. Where another rank fails, DCP calls no further hook (`failing.py`).

`dcp.save` calls the hooks in the caller's thread. `dcp.async_save` calls `stage` there, if the writer is its stager,
and the hooks in a thread made for this one save, or in a process made for all of them. Neither the place nor the
planner is known to `stage`, and with a stager of the user's own no hook is called in the caller's thread at all. So the
order of saves is that in which DCP's threads started (`order.py`), and whether a save runs beside training is seen by
its thread or process (`pace.py`). What tells them is in `undocumented.py`.
"""
