"""The projectors of both modalities; in an export, this file is replaced by one that imports those of the run."""

from functools import partial

from embedcache.projectors.heads import MlpProjector

ImageProjector = partial(MlpProjector)
TextProjector = partial(MlpProjector)

__all__ = ["ImageProjector", "TextProjector"]
