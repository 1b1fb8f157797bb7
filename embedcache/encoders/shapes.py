"""The shape of one item's feature."""

from typing import TypeAlias

ItemShape: TypeAlias = tuple[int, ...]
"""`(D,)` a vector, `(T, D)` a fixed number of tokens, `(-1, D)` any number of tokens."""
