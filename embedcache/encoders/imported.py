"""The family of vectors that were imported: nothing here can encode as they were."""

from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError


def open_imported(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Refuse: the encoder is not here.

    Raises:
        SettingError: always; says what can be done without it.
    """
    del settings
    raise SettingError(
        f"the feature {spec.model} was imported, so the encoder that made it is not here and no {modality} can be "
        f"encoded as it was: search with --query-key or --query-vectors, and "
        "repair damage by running the same embedcache import again; for "
        f"new {modality}s, extract with an encoder of your own into a cache of its own"
    )
