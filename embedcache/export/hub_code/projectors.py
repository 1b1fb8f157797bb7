"""The projectors of both sides. In an export, this file names those of the pair."""

from embedcache.projectors.heads import MlpProjector as ImageProjector
from embedcache.projectors.heads import MlpProjector as TextProjector

__all__ = ["ImageProjector", "TextProjector"]
