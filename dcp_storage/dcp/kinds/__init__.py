"""Kinds of tensors: which boxes of a global tensor a value of a state dict holds, and in what memory."""
