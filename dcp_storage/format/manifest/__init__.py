"""The manifest of this format: what it says of a checkpoint, and its way to bytes and back."""
