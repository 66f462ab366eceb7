"""The saves of this process: how DCP calls a writer, and what depends on it.

A save calls, in one thread, `reset` (if `dcp.save` was given a `checkpoint_id`), `storage_meta`,
`set_up_storage_writer`, `prepare_local_plan`, on the coordinator `prepare_global_plan`, `write_data`, and on the
coordinator `finish`; without collectives every rank calls all of them. DCP passes no handle from one hook to the next,
so a writer looks up its `Save` by thread. If another rank fails, DCP calls no further hook (`failing.py`).

`dcp.save` calls the hooks in the caller's thread. `dcp.async_save` calls `stage` there, if the writer is its stager,
and the hooks in a thread created for this save, or in a process created for all saves. `stage` knows neither the path
nor the planner, and with a custom stager no hook is called in the caller's thread at all. So saves are ordered by the
start of DCP's threads (`order.py`), and a save's thread or process shows whether it runs alongside training
(`pace.py`). `undocumented.py` recognizes them.
"""
