"""What moves when: pure planning (`layout`, `ranges`) beside bounded pipelines (`save`, `load`)."""
