"""A synthetic street as a source: camera images and lidar points with labels, in several domains.

    open_source("world=0,domains=day+night", kind="pipelines.worlds.street:StreetSource")

A sample is a frame. Its image and its points are computed from the key and the number of the world when they are
read, so nothing is stored: the same key gives the same bytes in every process of a machine. Samples have the columns
`domain`, `split` and `world`. The splits are:

- `image`, of a source domain: frames to train an image model on; points are only labels of pixels
- `points`, of a source domain: other frames, without images, to train a point model on
- `target`, of a target domain: frames to adapt to, whose labels are only for the oracle and for reports
- `test`, of a target domain: frames to measure on
"""

import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from embedcache.errors import ItemError
from embedcache.modalities import FileItem, Sample
from embedcache.registry import unknown_name
from embedcache.sources.open import SourceSettings
from pipelines.worlds.locations import parse_location
from pipelines.worlds.ray_casting import Camera
from pipelines.worlds.street_image import render
from pipelines.worlds.street_scene import DOMAINS, Domain, Scene, build_scene, open_camera, scan

KIND = "pipelines.worlds.street:StreetSource"
SOURCE_DOMAINS = ("day", "sg", "night", "a2")
TARGET_DOMAINS = ("sg", "dusk", "night", "sk", "fog", "roof", "headlight")
_DEFAULTS: Mapping[str, Any] = {"world": 0, "frames": 24, "test": 14, "calibration": 0.0, "domains": "+".join(DOMAINS)}


class StreetSource:
    """Frames of a street. The location is `name=value,…`, all optional.

    - `world`: number of the world; other worlds have other frames
    - `domains`: names of `DOMAINS` joined by `+`
    - `frames`: frames of each domain for `image`, `points` and `target`; `test`: frames for `test`
    - `calibration`: standard deviation of an error of the camera's orientation in degrees, drawn per frame. It moves
      only `uv`
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("street")
        self._values = parse_location("street", location, _DEFAULTS)
        self._domains = tuple(str(self._values["domains"]).split("+"))
        for name in self._domains:
            if name not in DOMAINS:
                raise unknown_name("domain", name, DOMAINS)

    def describe(self) -> Mapping[str, Any]:
        path = ",".join(f"{name}={value}" for name, value in self._values.items())
        return {"type": KIND, "path": path, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the frames, by domain and split."""
        for domain in self._domains:
            for split in splits_of(domain):
                for number in range(self._values["test" if split == "test" else "frames"]):
                    key = f"{domain}/{split}/{number:03d}"
                    yield Sample(
                        key=key,
                        images=() if split == "points" else (FileItem(path=f"{key}.png"),),
                        files={"points": (FileItem(path=f"{key}.npz"),)},
                        columns={"domain": domain, "split": split, "world": self._values["world"]},
                    )

    def read(self, item: FileItem) -> bytes:
        """Compute the bytes of an image (PNG) or of points (NPZ with `xyz`, `uv` and `label`)."""
        key, _, suffix = item.path.rpartition(".")
        domain_name = key.partition("/")[0]
        if domain_name not in DOMAINS or suffix not in {"png", "npz"}:
            raise ItemError(f"expected DOMAIN/SPLIT/NUMBER.png or .npz, got {item.path}")

        domain = DOMAINS[domain_name]
        buffer = io.BytesIO()
        if suffix == "png":
            Image.fromarray(self.render(key, domain)).save(buffer, "PNG", compress_level=1)
        else:
            np.savez(buffer, **self.scan(key, domain))  # type: ignore[arg-type]  # its stub also has a named option

        return buffer.getvalue()

    def render(self, key: str, domain: Domain) -> np.ndarray:
        """Return the image of a frame: (H, W, 3) uint8."""
        scene, camera = self._open(key, domain)
        return render(domain.light, scene, camera, self._rng(key, "image"))[0]

    def scan(self, key: str, domain: Domain) -> dict[str, np.ndarray]:
        """Return the points of a frame by name, one row per point."""
        scene, camera = self._open(key, domain)
        points = scan(domain.lidar, scene, camera, self._rng(key, "points"))

        # Only the link to the pixels is wrong, as after a poor calibration of a real car.
        error_deg = float(self._values["calibration"])
        if error_deg:
            yaw, pitch = np.radians(error_deg) * self._rng(key, "calibration").standard_normal(2)
            shifted = camera._replace(yaw=camera.yaw + yaw, pitch=camera.pitch + pitch)
            points["uv"] = np.clip(shifted.project(points["xyz"])[0], 0, np.nextafter(np.float32(1), np.float32(0)))
        return points

    def _open(self, key: str, domain: Domain) -> tuple[Scene, Camera]:
        rng = self._rng(key, "scene")
        scene = build_scene(domain.style, rng)
        return scene, open_camera(domain.mount, scene, rng)

    def _rng(self, key: str, what: str) -> np.random.Generator:
        return np.random.default_rng([self._values["world"], zlib.crc32(key.encode()), zlib.crc32(what.encode())])


def splits_of(domain: str) -> list[str]:
    """Return the splits that a domain has."""
    source = ["image", "points"] if domain in SOURCE_DOMAINS else []
    return source + (["target", "test"] if domain in TARGET_DOMAINS else [])
