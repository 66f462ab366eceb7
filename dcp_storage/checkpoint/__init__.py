"""A checkpoint in its store, without torch: found, read, committed, checked, cleaned up."""
