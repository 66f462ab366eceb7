"""Manifests of DCP's own writers: pickles, of which nothing is executed."""
