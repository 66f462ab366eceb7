"""Manifests of DCP's own writers: pickles, which are read without executing anything."""
