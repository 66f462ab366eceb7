"""The sub-commands of `dcp-storage`: each declares its options and has a function that runs it."""
