"""The model organism: a small language model whose memories are known."""
