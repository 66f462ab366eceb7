"""Data movement: pure planning (`layout`, `ranges`) and bounded pipelines (`save`, `load`, `check`)."""
