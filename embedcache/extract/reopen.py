"""Opening again what made a folder of features, from what the cache remembers of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from embedcache.artifact import check_same
from embedcache.cache.feature import Feature
from embedcache.cache.group import EncoderGroup
from embedcache.disk import Claims
from embedcache.encoders.contract import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.extract.target import Target, view_fingerprint
from embedcache.extract.turns import Turns
from embedcache.extract.views import open_view


def reopen_target(group: EncoderGroup, features: Sequence[str], *, device: str) -> Target:
    """Open the encoder and the view of a folder, with the precision and the backend it was made with."""
    fingerprint = group.fingerprint
    settings = EncoderSettings(
        device=device,
        precision=fingerprint["precision"],
        backend=fingerprint["backend"],
        features=tuple(features),
    )
    return Target(
        encoder=open_encoder(group.spec, modality="image" if group.modality == "image" else "text", settings=settings),
        group=group,
        features=features,
        dtypes={name: Feature(group, name).dtype for name in features},
        view=open_view(fingerprint["view"]["name"]) if "view" in fingerprint else None,
        claims=Claims(group.path / "chunks"),
        executor=ThreadPoolExecutor(1),
        turns=Turns(device),
    )


def check_unchanged(target: Target) -> None:
    """Refuse an encoder that is not the one that made the folder any more.

    Raises:
        FingerprintError: names each field that differs with both values.
    """
    check_same(
        f"encoder {target.group.path}",
        target.group.fingerprint,
        view_fingerprint(target.encoder, target.view),
        next_step="bring back the versions and files it was made with, or extract into a new folder",
    )
