"""The camera image of a street: textures, light, fog and sensor noise of each pixel's surface."""

import numpy as np

from pipelines.worlds.ray_casting import RAISED, ROAD, Camera, Floats, Hits, Ints, cast_rays
from pipelines.worlds.street_scene import CLASSES, Light, Scene, hit_points, label_hits

_ROAD_COLOR = (0.13, 0.13, 0.14)
_SIDEWALK_COLOR = (0.36, 0.35, 0.33)
_GRASS_COLOR = (0.10, 0.21, 0.06)
_GLASS = np.array([0.05, 0.07, 0.09], np.float32)


def render(light: Light, scene: Scene, camera: Camera, rng: np.random.Generator) -> tuple[np.ndarray, Ints]:
    """Return the image, (H, W, 3) uint8, and the class of each pixel, or -1 for the sky."""
    rays = camera.rays()
    hits = cast_rays(camera.position, rays, scene.solids, scene.ground, camera=camera)
    xyz = hit_points(camera.position, rays, hits)
    labels = label_hits(scene, hits, xyz)

    albedo, glow = _textures(scene, hits, xyz, labels)
    linear = albedo * _illumination(light, scene, hits, xyz) + glow * _glow_scale(light)

    sky = _sky(light, rays)
    linear = np.where((labels < 0)[..., None], sky, linear)

    # The farther a surface, the more of its light the fog replaces by that of the sky.
    if light.fog_per_m:
        clear = np.exp(-light.fog_per_m * np.minimum(hits.distance, 400))[..., None]
        linear = clear * linear + (1 - clear) * np.array(light.sky, np.float32)

    # The exposure varies from frame to frame, and the noise grows with the light, as in a sensor.
    linear = linear * light.exposure * np.float32(np.exp(rng.normal(0, 0.08)))
    noise = rng.standard_normal(linear.shape, dtype=np.float32)
    linear = linear + light.noise * noise * (0.4 + np.sqrt(np.maximum(linear, 0)))

    image = np.clip(linear, 0, 1) ** np.float32(1 / 2.2)
    return np.round(image * 255).astype(np.uint8), labels


def _textures(scene: Scene, hits: Hits, xyz: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """Return the albedo and the color of light that a surface emits, both (H, W, 3)."""
    colors = np.array([scene.materials[solid.material].color for solid in scene.solids], np.float32)
    seeds = np.array([scene.materials[solid.material].seed for solid in scene.solids])
    surface = np.maximum(hits.surface, 0)
    albedo = colors[surface]
    seed = seeds[surface]

    fine = _noise(xyz, 12.0, seed) - 0.5
    coarse = _noise(xyz, 1.3, seed) - 0.5
    # Texture that is finer than a pixel averages out.
    fade = (1 / (1 + (hits.distance / 18) ** 2)).astype(np.float32)
    strength = np.array([0.25, 0.15, 1.0, 0.2, 0.05, 0.3, 0.1], np.float32)[np.maximum(labels, 0)]

    glow = np.zeros_like(albedo)
    _paint_ground(scene, hits, xyz, labels, albedo)
    _paint_buildings(hits, xyz, labels, seed, albedo, glow)
    _paint_vehicles(scene, hits, xyz, labels, albedo, glow)

    shade = 1 + strength * (fine * fade + 0.5 * coarse)
    return (albedo * shade[..., None]).astype(np.float32), glow


def _paint_ground(scene: Scene, hits: Hits, xyz: Floats, labels: Ints, albedo: Floats) -> None:
    x = xyz[..., 0]
    y = xyz[..., 1]
    is_road = hits.surface == ROAD
    is_raised = hits.surface == RAISED

    albedo[is_road] = _ROAD_COLOR

    # Markings end at the crossing, and zebra stripes lie before it.
    ground = scene.ground
    before_crossing = np.abs(x - ground.crossing) - ground.crossing_half_width
    is_dash = (np.abs(y) < 0.09) & (x % 6 < 3) & (before_crossing > 0)
    is_edge = (np.abs(np.abs(y) - ground.half_width + 0.25) < 0.07) & (before_crossing > 0)
    is_zebra = (np.abs(before_crossing - 1.7) < 1.2) & (y % 1.0 < 0.5)
    albedo[is_road & (np.abs(y) < ground.half_width) & (is_dash | is_edge | is_zebra)] = (0.62, 0.62, 0.6)

    is_sidewalk = is_raised & (labels == CLASSES.index("sidewalk"))
    albedo[is_sidewalk] = _SIDEWALK_COLOR
    albedo[is_sidewalk & ((x % 0.9 < 0.05) | (y % 0.9 < 0.05))] = (0.2, 0.2, 0.19)
    albedo[is_raised & ~is_sidewalk] = _GRASS_COLOR


def _paint_buildings(hits: Hits, xyz: Floats, labels: Ints, seed: Ints, albedo: Floats, glow: Floats) -> None:
    along = np.where(np.abs(hits.normal[..., 1]) > 0.5, xyz[..., 0], xyz[..., 1])
    column = along / 2.6
    row = (xyz[..., 2] - 0.6) / 2.9

    is_wall = (labels == CLASSES.index("building")) & (np.abs(hits.normal[..., 2]) < 0.5)
    is_window = is_wall & (np.abs(column % 1 - 0.5) < 0.24) & (np.abs(row % 1 - 0.5) < 0.26) & (row > 0)
    albedo[is_window] = _GLASS

    # A window is lit or dark as a whole, at random.
    number = np.floor(column).astype(np.int64) * 977 + np.floor(row).astype(np.int64) * 131
    is_lit = is_window & (_hash(number + seed) < 0.22)
    glow[is_lit] = (1.0, 0.75, 0.4)


def _paint_vehicles(scene: Scene, hits: Hits, xyz: Floats, labels: Ints, albedo: Floats, glow: Floats) -> None:
    is_vehicle = (labels == CLASSES.index("vehicle")) & (hits.surface >= 0)
    if not is_vehicle.any():
        return

    numbers = hits.surface[is_vehicle]
    center = np.array([solid.center for solid in scene.solids], np.float32)[numbers]
    half = np.array([solid.half for solid in scene.solids], np.float32)[numbers]
    yaw = np.array([solid.yaw for solid in scene.solids], np.float32)[numbers]
    is_cabin = np.array([scene.materials[solid.material].kind == "cabin" for solid in scene.solids])[numbers]
    offset = xyz[is_vehicle] - center
    normal = hits.normal[is_vehicle]

    # Positions and directions along the axes of the vehicle.
    along = np.cos(yaw) * offset[:, 0] + np.sin(yaw) * offset[:, 1]
    across = np.cos(yaw) * offset[:, 1] - np.sin(yaw) * offset[:, 0]
    facing = np.cos(yaw) * normal[:, 0] + np.sin(yaw) * normal[:, 1]
    is_side = np.abs(normal[:, 2]) < 0.5
    level = offset[:, 2] / half[:, 2]

    paint = albedo[is_vehicle]
    light = glow[is_vehicle]
    is_glass = is_side & (is_cabin | ((half[:, 2] > 0.6) & (level > 0.1) & (along > 0.6 * half[:, 0])))
    paint[is_glass & (np.abs(level) < 0.85)] = _GLASS

    is_wheel = ~is_cabin & is_side & (np.abs(facing) < 0.5) & (np.abs(np.abs(along) - 0.62 * half[:, 0]) < 0.33)
    is_low = ~is_cabin & is_side & (xyz[is_vehicle][:, 2] < 0.62)
    paint[is_wheel & is_low] = (0.02, 0.02, 0.02)

    is_lamp = ~is_cabin & (np.abs(facing) > 0.8) & (np.abs(np.abs(across) - 0.75 * half[:, 1]) < 0.16)
    is_lamp &= np.abs(xyz[is_vehicle][:, 2] - 0.72) < 0.12
    light[is_lamp & (facing < 0)] = (1.0, 0.03, 0.02)
    light[is_lamp & (facing > 0)] = (1.6, 1.5, 1.2)

    albedo[is_vehicle] = paint
    glow[is_vehicle] = light


def _illumination(light: Light, scene: Scene, hits: Hits, xyz: Floats) -> Floats:
    """Return the light that reaches each surface: (H, W, 3)."""
    normal = hits.normal
    direction = np.array(light.sun_direction, np.float32)
    sun = np.maximum(normal @ (direction / np.linalg.norm(direction)), 0)[..., None] * np.array(light.sun, np.float32)
    # Surfaces that face upwards see more of the sky.
    sky_fraction = 0.6 + 0.4 * normal[..., 2:]
    total = sun + sky_fraction * np.array(light.ambient, np.float32)

    if light.headlight:
        start = np.array([1.5, scene.lane, 0.7], np.float32)
        ray = xyz - start
        square = np.maximum((ray * ray).sum(axis=-1), 30.0)
        unit = ray / np.maximum(np.linalg.norm(ray, axis=-1, keepdims=True), 1e-3)
        cone = np.exp(-((unit[..., 1] / 0.32) ** 2) - (unit[..., 2] / 0.16) ** 2) * (unit[..., 0] > 0)
        cosine = np.maximum(-(unit * normal).sum(axis=-1), 0.15)  # rough surfaces shine at grazing angles
        total = total + (light.headlight * cone * cosine / square)[..., None] * np.array([1.0, 0.95, 0.85], np.float32)

    for lamp in scene.lamps if light.lamps else ():
        ray = xyz - lamp
        square = np.maximum((ray * ray).sum(axis=-1), 1.0)
        cosine = np.maximum(-(ray * normal).sum(axis=-1) / np.sqrt(square), 0)
        total = total + (light.lamps * cosine / square)[..., None] * np.array([1.0, 0.7, 0.35], np.float32)

    result: Floats = total.astype(np.float32)
    return result


def _glow_scale(light: Light) -> float:
    """Return the strength of lit windows and lamps, which is 0 by day."""
    return 0.25 if light.headlight else 0.0


def _sky(light: Light, rays: Floats) -> Floats:
    height = np.clip(rays[..., 2:], 0, 0.5) * 2
    zenith = np.array(light.sky, np.float32)
    horizon = 0.5 * zenith + 0.5 * zenith.max()
    sky: Floats = (horizon * (1 - height) + zenith * height).astype(np.float32)
    return sky


def _noise(xyz: Floats, per_m: float, seed: Ints) -> Floats:
    """Return a value from 0 to 1 for the cube of side 1 / `per_m` around each point."""
    cells = np.floor(xyz * per_m).astype(np.int64)
    return _hash(cells[..., 0] * 73856093 ^ cells[..., 1] * 19349663 ^ cells[..., 2] * 83492791 ^ seed)


def _hash(numbers: Ints) -> Floats:
    """Return a pseudorandom value from 0 to 1 for each whole number."""
    mixed = numbers.astype(np.uint32)
    for factor in (np.uint32(0x7FEB352D), np.uint32(0x846CA68B)):
        mixed = (mixed ^ (mixed >> np.uint32(16))) * factor
    values: Floats = ((mixed ^ (mixed >> np.uint32(16))) >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)
    return values
