"""The manifest of this format: its contents, and how they are encoded and decoded."""
