"""Ray casting of boxes, ellipsoids and a street's ground, with NumPy: the surface that each ray of a grid hits first.

Coordinates are in meters: x forward, y left, z up. A ray is a point and a direction of length 1; rays form a grid of
(H, W) directions from one origin, such as the pixels of a camera or the beams of a lidar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Vector = tuple[float, float, float]

_NEAREST_M = 0.3  # surfaces closer than this to the origin are not seen


@dataclass(frozen=True)
class Solid:
    """A box that may be turned around the vertical axis, or an ellipsoid.

    Args:
        shape: `box` or `ellipsoid`.
        center: middle of the solid.
        half: half the size along the axes of the solid.
        yaw: rotation around z in radians, for a box.
        material: number of its material, an index into a list of the caller.
    """

    shape: Literal["box", "ellipsoid"]
    center: Vector
    half: Vector
    yaw: float = 0.0
    material: int = 0


@dataclass(frozen=True)
class Ground:
    """Flat road along x with a crossing road, both between raised areas.

    Args:
        half_width: half the width of the road.
        crossing: x of the middle of the crossing road.
        crossing_half_width: half its width.
        curb: height of the raised areas.
    """

    half_width: float
    crossing: float
    crossing_half_width: float
    curb: float = 0.15


class Camera(NamedTuple):
    """Pinhole camera.

    Args:
        position: position of its center.
        yaw: direction of view, in radians to the left of x.
        pitch: upward direction in radians.
        fov: horizontal field of view in degrees.
        width: width of the image in pixels.
        height: height of the image in pixels.
    """

    position: Vector
    yaw: float
    pitch: float
    fov: float
    width: int
    height: int

    @property
    def focal_px(self) -> float:
        """Focal length in pixels."""
        return self.width / 2 / float(np.tan(np.radians(self.fov) / 2))

    def axes(self) -> Floats:
        """Return the directions right, down and forward: (3, 3) float32, one per row."""
        cos_yaw = np.cos(self.yaw)
        sin_yaw = np.sin(self.yaw)
        cos_pitch = np.cos(self.pitch)
        sin_pitch = np.sin(self.pitch)
        forward = (cos_yaw * cos_pitch, sin_yaw * cos_pitch, sin_pitch)
        right = (sin_yaw, -cos_yaw, 0.0)
        return np.array([right, np.cross(forward, right), forward], np.float32)

    def rays(self) -> Floats:
        """Return the direction through the middle of each pixel: (height, width, 3) float32, length 1."""
        columns = (np.arange(self.width, dtype=np.float32) + 0.5 - self.width / 2) / self.focal_px
        rows = (np.arange(self.height, dtype=np.float32) + 0.5 - self.height / 2) / self.focal_px
        right, down, forward = self.axes()
        rays = forward + columns[None, :, None] * right + rows[:, None, None] * down
        unit: Floats = (rays / np.linalg.norm(rays, axis=2, keepdims=True)).astype(np.float32)
        return unit

    def project(self, xyz_N3: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
        """Return the position in the image, (N, 2) fractions of width and height, and the depth, (N,), of points.

        Points with a depth of 0 or less are behind the camera; their position has no meaning.
        """
        along_N3 = (xyz_N3 - np.array(self.position, np.float32)) @ self.axes().T
        depth_N = along_N3[:, 2]

        # Points behind the camera would divide by zero or less.
        scale_N = self.focal_px / np.where(depth_N > 1e-3, depth_N, 1e-3)
        u_N = along_N3[:, 0] * scale_N / self.width + 0.5
        v_N = along_N3[:, 1] * scale_N / self.height + 0.5
        uv_N2 = np.stack([u_N, v_N], axis=1)
        return uv_N2.astype(np.float32), depth_N.astype(np.float32)


class Hits(NamedTuple):
    """The first hit of each ray of an (H, W) grid.

    Args:
        distance: (H, W) in meters, infinite if nothing is hit.
        surface: (H, W) number of the solid, or -1 for the road, -2 for a raised area, -3 for nothing.
        normal: (H, W, 3) outward direction of the surface, length 1.
    """

    distance: Floats
    surface: npt.NDArray[np.int32]
    normal: Floats


ROAD = -1
RAISED = -2
NOTHING = -3


def cast_rays(
    origin: Vector, rays: Floats, solids: Sequence[Solid], ground: Ground, *, camera: Camera | None = None
) -> Hits:
    """Find the first surface along each ray.

    Args:
        origin: start of all rays.
        rays: (H, W, 3) float32 of length 1.
        solids: the solids. A ray that starts inside a solid does not see it.
        ground: the ground.
        camera: camera of the rays. With it, a solid is tested only in its part of the image.
    """
    hits = _hit_ground(origin, rays, ground)
    for number, solid in enumerate(solids):
        window = (slice(None), slice(None)) if camera is None else _window(camera, solid)
        if window is None:
            continue

        test = _hit_box if solid.shape == "box" else _hit_ellipsoid
        distance, normal = test(origin, rays[window], solid)

        is_nearer = distance < hits.distance[window]
        hits.distance[window][is_nearer] = distance[is_nearer]
        hits.surface[window][is_nearer] = number
        hits.normal[window][is_nearer] = normal[is_nearer]
    return hits


def _hit_ground(origin: Vector, rays: Floats, ground: Ground) -> Hits:
    """Return the hits on the road and the raised areas. The curb between them belongs to the raised area."""
    down = np.minimum(rays[..., 2], -1e-6)
    low = ((0.0 - origin[2]) / down).astype(np.float32)
    high = ((ground.curb - origin[2]) / down).astype(np.float32)
    is_down = rays[..., 2] < -1e-4

    def is_outside(distance: Floats) -> npt.NDArray[np.bool_]:
        x = origin[0] + distance * rays[..., 0]
        y = origin[1] + distance * rays[..., 1]
        is_beside = np.abs(y) > ground.half_width
        outside: npt.NDArray[np.bool_] = is_beside & (np.abs(x - ground.crossing) > ground.crossing_half_width)
        return outside

    # A ray that passes over the raised area at its height, but reaches it at the height of the road, hits the curb.
    is_raised = is_outside(high)
    is_curb = is_outside(low)
    surface = np.where(is_raised | is_curb, RAISED, ROAD).astype(np.int32)
    distance = np.where(is_raised, high, np.where(is_curb, (low + high) / 2, low)).astype(np.float32)
    surface[~is_down] = NOTHING
    distance[~is_down] = np.inf

    normal = np.zeros_like(rays)
    normal[..., 2] = 1
    return Hits(distance, surface, normal)


def _hit_box(origin: Vector, rays: Floats, box: Solid) -> tuple[Floats, Floats]:
    # Turn the rays into the axes of the box.
    cos = np.float32(np.cos(box.yaw))
    sin = np.float32(np.sin(box.yaw))
    dx = origin[0] - box.center[0]
    dy = origin[1] - box.center[1]
    dz = origin[2] - box.center[2]
    starts = (cos * dx + sin * dy, cos * dy - sin * dx, np.float32(dz))
    along = (cos * rays[..., 0] + sin * rays[..., 1], cos * rays[..., 1] - sin * rays[..., 0], rays[..., 2])

    # A ray is inside the box between the last slab that it enters and the first slab that it leaves.
    enter = np.full(rays.shape[:2], -np.inf, np.float32)
    leave = np.full(rays.shape[:2], np.inf, np.float32)
    axis = np.zeros(rays.shape[:2], np.int8)
    for number, (start, step, half) in enumerate(zip(starts, along, box.half, strict=True)):
        inverse = 1 / np.where(np.abs(step) < 1e-7, np.float32(1e-7), step)
        middle = -start * inverse
        reach = np.abs(half * inverse)
        near = middle - reach
        far = middle + reach
        axis = np.where(near > enter, np.int8(number), axis)
        enter = np.maximum(enter, near)
        leave = np.minimum(leave, far)
    distance = np.where((enter < leave) & (enter > _NEAREST_M), enter, np.float32(np.inf))

    normal = np.zeros_like(rays)
    sign_x, sign_y, sign_z = (-np.sign(step) for step in along)
    on_x = axis == 0
    on_y = axis == 1
    normal[..., 0] = np.where(on_x, sign_x * cos, np.where(on_y, -sign_y * sin, 0))
    normal[..., 1] = np.where(on_x, sign_x * sin, np.where(on_y, sign_y * cos, 0))
    normal[..., 2] = np.where(axis == 2, sign_z, 0)
    return distance, normal


def _hit_ellipsoid(origin: Vector, rays: Floats, ellipsoid: Solid) -> tuple[Floats, Floats]:
    # In units of the half axes the ellipsoid is a ball, and the hits are the roots of a quadratic equation.
    half = np.array(ellipsoid.half, np.float32)
    start = (np.array(origin, np.float32) - np.array(ellipsoid.center, np.float32)) / half
    along = rays / half
    a = (along * along).sum(axis=-1)
    b = along @ start
    c = np.float32(start @ start - 1)
    root = b * b - a * c
    distance = (-b - np.sqrt(np.maximum(root, 0))) / a
    distance = np.where((root > 0) & (distance > _NEAREST_M), distance, np.float32(np.inf))

    point = start + np.where(np.isfinite(distance), distance, 0)[..., None] * along
    normal = point / half
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    return distance.astype(np.float32), normal.astype(np.float32)


def _window(camera: Camera, solid: Solid) -> tuple[slice, slice] | None:
    """Return the rows and columns of the image that may show a solid, or None if it is behind the camera."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    corners = signs * np.array(solid.half, np.float32)
    cos = np.cos(solid.yaw)
    sin = np.sin(solid.yaw)
    x = cos * corners[:, 0] - sin * corners[:, 1]
    y = sin * corners[:, 0] + cos * corners[:, 1]
    corners = np.stack([x, y, corners[:, 2]], axis=1)

    uv, depth = camera.project((corners + np.array(solid.center)).astype(np.float32))
    if depth.max() <= 0:
        return None

    # A solid that reaches behind the camera has another outline than its projected corners.
    if depth.min() < 0.1:
        return slice(0, camera.height), slice(0, camera.width)

    low = np.floor(uv.min(axis=0) * (camera.width, camera.height)).astype(int)
    high = np.ceil(uv.max(axis=0) * (camera.width, camera.height)).astype(int) + 1
    left = max(int(low[0]), 0)
    right = min(int(high[0]), camera.width)
    top = max(int(low[1]), 0)
    bottom = min(int(high[1]), camera.height)
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None
