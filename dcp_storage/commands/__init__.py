"""The sub-commands of `dcp-storage` on one checkpoint: each declares its options and has a function that runs it."""
