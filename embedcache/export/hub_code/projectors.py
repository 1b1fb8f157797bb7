"""The projectors of both modalities; in an export, this file is replaced by one that imports those of the run."""

from embedcache.projectors.heads import MlpProjector as ImageProjector
from embedcache.projectors.heads import MlpProjector as TextProjector

__all__ = ["ImageProjector", "TextProjector"]
