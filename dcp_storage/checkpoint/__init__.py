"""A checkpoint as something that lies somewhere, without torch: found, read, committed, checked, cleaned up."""
