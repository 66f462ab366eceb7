"""`Checkpoints`: the steps of a run, saved, resumed from, checked, pinned and removed."""
