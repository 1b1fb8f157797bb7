"""A synthetic street with the views of a camera and a lidar, in several domains.

Everything is a function of a domain and a random generator. The street is coarse: boxes and ellipsoids with simple
textures, no shadows. It serves to study shifts between domains, not to predict figures on real streets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from pipelines.worlds.ray_casting import (
    NOTHING,
    RAISED,
    ROAD,
    Camera,
    Floats,
    Ground,
    Hits,
    Ints,
    Solid,
    Vector,
    cast_rays,
)

CLASSES = ("road", "sidewalk", "vegetation", "building", "vehicle", "person", "pole")
_NUMBERS = {name: number for number, name in enumerate(CLASSES)}
WIDTH = 448
HEIGHT = 224
_FARTHEST_M = 75.0


@dataclass(frozen=True, kw_only=True)
class Light:
    """Illumination of a domain and the camera's response, in arbitrary linear units; colors are red, green, blue."""

    ambient: Vector = (0.42, 0.47, 0.55)
    sun: Vector = (0.95, 0.9, 0.8)
    sun_direction: Vector = (0.4, -0.5, 0.77)
    sky: Vector = (0.55, 0.7, 1.0)
    headlight: float = 0.0
    lamps: float = 0.0
    exposure: float = 0.85
    noise: float = 0.006
    fog_per_m: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mount:
    """Position and direction of the camera on the car."""

    height: float = 1.6
    left: float = 0.0
    yaw: float = 0.0
    pitch: float = -0.03
    fov: float = 72.0


@dataclass(frozen=True, kw_only=True)
class Lidar:
    """Beams at equal steps of elevation and azimuth, both in degrees."""

    beams: int = 32
    lowest: float = -24.0
    highest: float = 4.0
    step: float = 0.85
    height: float = 1.85
    noise_m: float = 0.02
    dropout: float = 0.08


@dataclass(frozen=True, kw_only=True)
class Style:
    """Kind of street. Left-hand traffic mirrors the street."""

    left_hand: bool = False
    vehicle_scale: float = 1.0
    person_scale: float = 1.0
    building_height: tuple[float, float] = (5.0, 14.0)
    trees: tuple[int, int] = (3, 7)
    half_width: tuple[float, float] = (3.6, 5.2)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A place, a time and the sensors."""

    light: Light = field(default_factory=Light)
    mount: Mount = field(default_factory=Mount)
    lidar: Lidar = field(default_factory=Lidar)
    style: Style = field(default_factory=Style)


_NIGHT = Light(
    ambient=(0.010, 0.011, 0.016), sun=(0.0, 0.0, 0.0), sky=(0.010, 0.012, 0.02), headlight=22.0, lamps=0.5,
    exposure=1.7, noise=0.03,
)  # fmt: skip
DOMAINS: Mapping[str, Domain] = {
    "day": Domain(),
    "sg": Domain(
        light=Light(exposure=1.05, ambient=(0.46, 0.48, 0.5), sun=(1.0, 0.9, 0.72)),
        style=Style(
            left_hand=True, vehicle_scale=0.92, person_scale=0.95, building_height=(9.0, 26.0), trees=(5, 10),
            half_width=(3.2, 4.6),
        ),
    ),
    "dusk": Domain(
        light=Light(
            ambient=(0.085, 0.075, 0.10), sun=(0.20, 0.10, 0.05), sun_direction=(0.93, -0.3, 0.2),
            sky=(0.42, 0.25, 0.22), headlight=5.0, lamps=0.2, exposure=1.25, noise=0.018,
        ),
    ),
    "night": Domain(light=_NIGHT),
    "a2": Domain(
        light=Light(exposure=0.75, sun=(0.7, 0.68, 0.62)),
        mount=Mount(height=1.35, fov=60.0),
        lidar=Lidar(beams=40, lowest=-16.0, highest=7.0, step=0.9, height=1.75, noise_m=0.03, dropout=0.05),
    ),
    "sk": Domain(
        light=Light(exposure=1.0),
        mount=Mount(height=1.65, fov=81.0, pitch=-0.05),
        lidar=Lidar(beams=64, lowest=-24.8, highest=2.0, step=0.9, height=1.73, noise_m=0.015, dropout=0.5),
        style=Style(half_width=(3.2, 4.4), trees=(5, 9), building_height=(4.0, 9.0)),
    ),
    "fog": Domain(
        light=Light(
            ambient=(0.55, 0.57, 0.6), sun=(0.1, 0.1, 0.1), sky=(0.72, 0.74, 0.78), fog_per_m=0.055, noise=0.01,
        ),
    ),
    "roof": Domain(mount=Mount(height=2.9, left=-0.8, yaw=0.14, pitch=-0.24, fov=88.0)),
    "headlight": Domain(light=replace(_NIGHT, ambient=(0.0, 0.0, 0.0), sky=(0.0, 0.0, 0.0), lamps=0.0)),
}  # fmt: skip
"""Domains by name. `fog` and `roof` differ from the others, and no setting was chosen on them."""


class Material(NamedTuple):
    """Class and color of a solid; `kind` decides its texture."""

    number: int
    color: Vector
    kind: str
    seed: int


class Scene(NamedTuple):
    """A street: its ground, its solids and their materials, the lane of the car, and the positions of lamps."""

    ground: Ground
    solids: list[Solid]
    materials: list[Material]
    sidewalk: float
    lane: float
    lamps: Floats


def build_scene(style: Style, rng: np.random.Generator) -> Scene:
    """Draw a street. The car drives in the right lane of right-hand traffic, or mirrored."""
    builder = _Builder(style, rng)
    builder.add_buildings()
    builder.add_vehicles()
    builder.add_people()
    builder.add_poles()
    builder.add_plants()

    lane = -builder.ground.half_width / 2
    scene = Scene(
        builder.ground, builder.solids, builder.materials, builder.sidewalk, lane, np.array(builder.lamps, np.float32)
    )
    return _mirrored(scene) if style.left_hand else scene


class _Builder:
    """Collects the solids of a street with right-hand traffic."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style = style
        self.rng = rng
        self.ground = Ground(rng.uniform(*style.half_width), rng.uniform(14, 50), rng.uniform(3, 4.5))
        self.sidewalk = rng.uniform(1.6, 2.6)
        self.front = self.ground.half_width + self.sidewalk + rng.uniform(1.0, 4.0)
        self.solids: list[Solid] = []
        self.materials: list[Material] = []
        self.lamps: list[Vector] = []

    def add(self, shape: str, center: Vector, half: Vector, material: Material, yaw: float = 0.0) -> None:
        self.materials.append(material)
        box = shape == "box"
        self.solids.append(Solid("box" if box else "ellipsoid", center, half, yaw, len(self.materials) - 1))

    def material(self, name: str, color: Vector, kind: str = "") -> Material:
        return Material(_NUMBERS[name], color, kind or name, int(self.rng.integers(1 << 30)))

    def is_free(self, x: float, margin: float) -> bool:
        """Return whether an object next to the road at x stays clear of the crossing road."""
        return abs(x - self.ground.crossing) > self.ground.crossing_half_width + margin

    def add_buildings(self) -> None:
        palette = ((0.55, 0.33, 0.25), (0.62, 0.58, 0.5), (0.5, 0.5, 0.52), (0.7, 0.62, 0.48), (0.42, 0.4, 0.4))
        for side in (-1, 1):
            x = -12.0 + self.rng.uniform(0, 6)
            while x < 75:
                length = self.rng.uniform(8, 18)
                depth = self.rng.uniform(6, 10)
                height = self.rng.uniform(*self.style.building_height)
                setback = self.rng.uniform(0, 2.5)
                middle = x + length / 2
                if self.is_free(middle, length / 2 + 1):
                    color = palette[int(self.rng.integers(len(palette)))]
                    center = (middle, side * (self.front + setback + depth / 2), height / 2)
                    self.add("box", center, (length / 2, depth / 2, height / 2), self.material("building", color))
                x += length + self.rng.choice([0.0, 0.0, 1.5, 4.0])

            wall = (self.ground.crossing, side * 70.0, 5.0)  # closes the crossing road
            self.add("box", wall, (20.0, 2.0, 5.0), self.material("building", palette[1]))

    def add_vehicles(self) -> None:
        half_width = self.ground.half_width
        for side, heading in ((-1, 0.0), (1, np.pi)):
            x = self.rng.uniform(3, 14)
            while x < 65:
                if self.rng.random() < 0.65 and self.is_free(x, 3):
                    self.add_vehicle(x, side * (half_width - 1.0), heading + self.rng.normal(0, 0.04))
                x += self.rng.uniform(6, 16)

            if self.rng.random() < 0.8:
                self.add_vehicle(self.rng.uniform(12, 55), side * half_width * 0.42, heading + self.rng.normal(0, 0.05))

        if self.rng.random() < 0.5:
            self.add_vehicle(self.ground.crossing, self.rng.uniform(-9, 9), np.pi / 2 + self.rng.normal(0, 0.1))

    def add_vehicle(self, x: float, y: float, yaw: float) -> None:
        color = tuple(self.rng.choice([0.04, 0.12, 0.3, 0.55, 0.8]) * self.rng.uniform(0.6, 1.1, 3))
        if self.rng.random() < 0.35:
            color = ((0.55, 0.05, 0.04), (0.05, 0.12, 0.45), (0.05, 0.25, 0.12))[int(self.rng.integers(3))]

        scale = self.style.vehicle_scale * self.rng.uniform(0.92, 1.08)
        body = self.material("vehicle", (color[0], color[1], color[2]))
        is_van = self.rng.random() < 0.22
        half = (2.5 * scale, 1.0 * scale, 1.0 * scale) if is_van else (2.15 * scale, 0.9 * scale, 0.36 * scale)
        self.add("box", (x, y, 0.22 + half[2]), half, body, yaw)

        if not is_van:
            cabin = (1.15 * scale, 0.78 * scale, 0.29 * scale)
            back = -0.25 * scale
            center = (x + back * np.cos(yaw), y + back * np.sin(yaw), 0.22 + 2 * half[2] + cabin[2])
            self.add("box", center, cabin, body._replace(kind="cabin"), yaw)

    def add_people(self) -> None:
        for _ in range(int(self.rng.integers(4, 10))):
            x = self.rng.uniform(4, 38)
            side = self.rng.choice([-1, 1])
            offset = self.rng.uniform(0.2, self.sidewalk) if self.rng.random() < 0.8 else -self.rng.uniform(0.3, 2.5)
            self.add_person(x, side * (self.ground.half_width + offset), 0.15 if offset > 0 else 0.0)

    def add_person(self, x: float, y: float, floor: float) -> None:
        scale = self.style.person_scale * self.rng.uniform(0.88, 1.08)
        color = self.rng.uniform(0.03, 0.6, 3)
        coat = self.material("person", (color[0], color[1], color[2]))
        legs = self.material("person", (0.06, 0.07, 0.12))
        skin = self.material("person", (0.6, 0.42, 0.32))

        self.add("ellipsoid", (x, y, floor + 0.45 * scale), (0.17 * scale, 0.17 * scale, 0.47 * scale), legs)
        self.add("ellipsoid", (x, y, floor + 1.15 * scale), (0.22 * scale, 0.27 * scale, 0.40 * scale), coat)
        self.add("ellipsoid", (x, y, floor + 1.65 * scale), (0.11 * scale, 0.11 * scale, 0.14 * scale), skin)

    def add_poles(self) -> None:
        gray = (0.3, 0.31, 0.32)
        for side in (-1, 1):
            x = self.rng.uniform(3, 10)
            while x < 60:
                if self.is_free(x, 0.5):
                    y = side * (self.ground.half_width + 0.35)
                    radius = self.rng.uniform(0.06, 0.12)
                    height = self.rng.uniform(3.0, 6.5)
                    pole = self.material("pole", gray)
                    self.add("box", (x, y, height / 2), (radius, radius, height / 2), pole, self.rng.uniform(0, 1.5))

                    # Tall poles carry lamps, and short ones may carry a sign.
                    if height > 4.5:
                        self.lamps.append((x, y - side * 1.2, height))
                        self.add("box", (x, y - side * 0.6, height), (0.08, 0.65, 0.06), pole)
                    elif self.rng.random() < 0.7:
                        sign = self.material("pole", ((0.7, 0.1, 0.08), (0.1, 0.2, 0.6))[int(self.rng.integers(2))])
                        self.add("box", (x - 0.1, y, height - 0.4), (0.02, 0.32, 0.32), sign)
                x += self.rng.uniform(6, 14)

    def add_plants(self) -> None:
        for _ in range(int(self.rng.integers(*self.style.trees))):
            x = self.rng.uniform(5, 50)
            side = self.rng.choice([-1, 1])
            if not self.is_free(x, 2):
                continue

            y = side * (self.ground.half_width + self.sidewalk + self.rng.uniform(0.2, 0.9))
            crown = self.rng.uniform(1.1, 2.1)
            height = self.rng.uniform(2.8, 4.2)
            green = (0.07 * self.rng.uniform(0.6, 1.6), 0.2 * self.rng.uniform(0.7, 1.3), 0.05)
            trunk = self.material("vegetation", (0.2, 0.13, 0.08), "trunk")
            self.add("box", (x, y, height / 2), (0.13, 0.13, height / 2), trunk, self.rng.uniform(0, 1.5))
            leaves = self.material("vegetation", green)
            self.add("ellipsoid", (x, y, height + 0.6 * crown), (crown, crown, 0.9 * crown), leaves)

        for _ in range(int(self.rng.integers(2, 6))):
            x = self.rng.uniform(4, 40)
            side = self.rng.choice([-1, 1])
            y = side * (self.front - self.rng.uniform(0.2, 0.8))

            bush = self.material("vegetation", (0.06, 0.17, 0.05))
            if self.is_free(x, 2):
                self.add("ellipsoid", (x, y, 0.5), (self.rng.uniform(0.6, 1.6), 0.5, self.rng.uniform(0.5, 0.9)), bush)


def _mirrored(scene: Scene) -> Scene:
    solids = [
        replace(solid, center=(solid.center[0], -solid.center[1], solid.center[2]), yaw=-solid.yaw)
        for solid in scene.solids
    ]
    return scene._replace(solids=solids, lane=-scene.lane, lamps=scene.lamps * np.array([1, -1, 1], np.float32))


def open_camera(mount: Mount, scene: Scene, rng: np.random.Generator) -> Camera:
    """Return the camera in a scene; its pitch varies slightly from frame to frame."""
    position = (0.0, scene.lane + mount.left, mount.height)
    return Camera(position, mount.yaw, mount.pitch + float(rng.normal(0, 0.008)), mount.fov, WIDTH, HEIGHT)


def label_hits(scene: Scene, hits: Hits, xyz: Floats) -> Ints:
    """Return the class of each ray's surface, in the shape of `hits.distance`, or -1 for the sky."""
    numbers = np.array([scene.materials[solid.material].number for solid in scene.solids] or [0])
    ground = scene.ground

    beside = np.abs(xyz[..., 1]) - ground.half_width
    before_crossing = np.abs(xyz[..., 0] - ground.crossing) - ground.crossing_half_width

    # Raised ground near a road is sidewalk, and farther away grass.
    is_sidewalk = np.minimum(beside, before_crossing) < scene.sidewalk
    raised = np.where(is_sidewalk, _NUMBERS["sidewalk"], _NUMBERS["vegetation"])

    labels = numbers[np.maximum(hits.surface, 0)]
    labels = np.where(hits.surface == ROAD, _NUMBERS["road"], labels)
    labels = np.where(hits.surface == RAISED, raised, labels)

    is_nothing = (hits.surface == NOTHING) | (hits.distance > _FARTHEST_M)
    is_solid = hits.surface >= 0
    result: Ints = np.where(is_nothing & ~is_solid, -1, labels).astype(np.int64)
    return result


def hit_points(origin: Vector, rays: Floats, hits: Hits) -> Floats:
    """Return the end of each ray, (H, W, 3) float32. Rays without a hit end at a large distance."""
    distance = np.minimum(hits.distance, 500)[..., None]
    points: Floats = (np.array(origin, np.float32) + distance * rays).astype(np.float32)
    return points


def scan(lidar: Lidar, scene: Scene, camera: Camera, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the points that a lidar measures within the camera's image: `xyz`, `uv` and `label`."""
    origin = (-0.2, scene.lane, lidar.height)
    half = camera.fov / 2 + 3

    # Slightly wider than the image, whose borders are then full of points.
    azimuth = np.radians(np.arange(-half, half, lidar.step)) + camera.yaw
    elevation = np.radians(np.linspace(lidar.highest, lidar.lowest, lidar.beams))
    azimuth, elevation = np.meshgrid(azimuth, elevation)
    cos = np.cos(elevation)
    rays = np.stack([cos * np.cos(azimuth), cos * np.sin(azimuth), np.sin(elevation)], axis=2).astype(np.float32)

    hits = cast_rays(origin, rays, scene.solids, scene.ground)
    xyz = hit_points(origin, rays, hits)
    labels = label_hits(scene, hits, xyz)

    # Leaves scatter the beam more than walls; flat raised ground less.
    rough = np.where(labels == _NUMBERS["vegetation"], 0.12, 0.0)
    errors = rng.normal(size=labels.shape) * (lidar.noise_m + rough) * np.where(hits.surface == RAISED, 0.4, 1)
    is_measured = rng.random(labels.shape) >= lidar.dropout
    xyz = xyz + (errors[..., None] * rays).astype(np.float32)

    uv, depth = camera.project(xyz.reshape(-1, 3))
    is_inside = (depth > 0.5) & (uv >= 0).all(axis=1) & (uv < 1).all(axis=1)
    is_seen = is_inside & (labels.ravel() >= 0) & is_measured.ravel() & (hits.distance.ravel() < _FARTHEST_M)
    return {
        "xyz": xyz.reshape(-1, 3)[is_seen].astype(np.float32),
        "uv": uv[is_seen].astype(np.float32),
        "label": labels.ravel()[is_seen].astype(np.int16),
    }
