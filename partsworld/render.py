"""Draws a scene: anti-aliased picture and one exact mask per part.

Every shape is a signed distance in units of the frame (negative inside); its coverage of a pixel ramps over one
pixel. Shapes are laid over each other back to front, so the picture is background + Σ visible part × its colour,
and a part's mask is exactly the weight with which its colour enters the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, Scene, Thing

Array = np.ndarray
RIM = 0.010  # width of the darker rim inside each shape, as a fraction of the frame
GLASS = (0.72, 0.84, 0.90)  # a car's window: belongs to no part


@dataclass(frozen=True)
class Rendering:
    """`image` [size, size, 3] float32 0…1 (sRGB); `masks` of each object: part name → [size, size] float32 0…1."""

    image: Array
    masks: tuple[dict[str, Array], ...]

    def object_mask(self, index: int = 0) -> Array:
        """All parts of one object together, [size, size]. A car's window is not among its parts."""
        return np.sum(list(self.masks[index].values()), axis=0).clip(0, 1)


def render(scene: Scene, size: int = 256) -> Rendering:
    """Draw the scene at size × size pixels. ValueError unless size is a positive multiple of 8."""
    if size <= 0 or size % 8:
        raise ValueError(f"size {size} is not a positive multiple of 8")
    image = _background(scene, size)
    layers: list[tuple[int, str | None, Array]] = []
    for index, thing in enumerate(scene.things):
        colours = dict(thing.colours)
        for part, distance in _draw(thing, size):
            cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
            shade = 1 - 0.42 * np.clip(1 + distance / (RIM * thing.size), 0, 1)[..., None]
            colour = np.asarray(COLOURS[colours[part]] if part else GLASS, np.float32)
            image = (1 - cover) * image + cover * (colour * shade)  # exact where cover is 0 or 1
            layers = [(i, p, seen * (1 - cover[..., 0])) for i, p, seen in layers]
            layers.append((index, part, cover[..., 0]))
    masks: tuple[dict[str, Array], ...] = tuple(
        {part: np.zeros((size, size), np.float32) for part, _ in thing.colours} for thing in scene.things
    )
    for index, part, seen in layers:
        if part:
            masks[index][part] += seen
    return Rendering(image, masks)


# ---------------------------------------------------------------- backgrounds

_GROUNDS = {  # far, near
    "field": ((0.70, 0.85, 0.95), (0.58, 0.78, 0.45)),
    "beach": ((0.55, 0.78, 0.88), (0.93, 0.84, 0.66)),
    "street": ((0.80, 0.79, 0.78), (0.52, 0.53, 0.55)),
    "room": ((0.88, 0.80, 0.68), (0.55, 0.40, 0.30)),
    "snow": ((0.66, 0.74, 0.84), (0.88, 0.92, 0.96)),
}


def _background(scene: Scene, size: int) -> Array:
    far, near = (np.asarray(c, np.float32) for c in _GROUNDS[scene.background])
    x, y = _grid(size)
    level = np.full_like(x, scene.horizon)
    if scene.background in ("field", "snow"):
        level = level + 0.035 * np.sin(6.0 * x + 20 * scene.horizon)
    ground = np.clip(0.5 + (y - level) * size, 0, 1)[..., None]
    depth = (0.94 + 0.12 * y)[..., None]
    return (np.clip((far + ground * (near - far)) * depth * scene.light, 0, 1)).astype(np.float32)


def _grid(size: int) -> tuple[Array, Array]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(axis[None, :], (size, size)), np.broadcast_to(axis[:, None], (size, size))


# ---------------------------------------------------------------- shapes: signed distance at (x, y)


def _circle(x: Array, y: Array, cx: float, cy: float, r: float) -> Array:
    return np.hypot(x - cx, y - cy) - r


def _ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """First-order distance to an ellipse: exact on its boundary."""
    u, v = (x - cx) / rx, (y - cy) / ry
    k = np.hypot(u, v)
    slope = np.hypot(u / rx, v / ry)
    return k * (k - 1) / np.maximum(slope, 1e-6)


def _capsule(x: Array, y: Array, ax: float, ay: float, bx: float, by: float, r: float) -> Array:
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - ax - t * dx, y - ay - t * dy) - r


def _box(x: Array, y: Array, cx: float, cy: float, hw: float, hh: float, r: float, slant: float = 0.0) -> Array:
    """Rounded box of half width hw and half height hh; slant shears it sideways."""
    qx = np.abs(x - cx - slant * (cy - y)) - (hw - r)
    qy = np.abs(y - cy) - (hh - r)
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - r


# ---------------------------------------------------------------- objects

Shape = Callable[[Array, Array], Array]


def _draw(thing: Thing, size: int) -> list[tuple[str | None, Array]]:
    """Shapes of one object, back to front, as (part or None, signed distance [size, size])."""
    gx, gy = _grid(size)
    shifts = dict(thing.shifts)
    drawn = []
    for part, shape in _SHAPES[thing.kind](thing.pose):
        dx, dy = shifts.get(part or "", (0.0, 0.0))
        x = (gx - thing.x - dx) / thing.size * (-1 if thing.flip else 1)
        y = (gy - thing.y - dy) / thing.size
        drawn.append((part, shape(x, y) * thing.size))
    return drawn


def _union(*shapes: Shape) -> Shape:
    return lambda x, y: np.minimum.reduce([shape(x, y) for shape in shapes])


Parts = list[tuple[str | None, Shape]]


def _figure(pose: tuple[float, ...]) -> Parts:
    """1 high: head and hair −0.5…−0.16, torso −0.17…0.17, legs 0.15…0.5."""
    arm, spread, lean, hair = pose
    hx, hy, r = 0.03 * lean, -0.285, 0.185
    hand_y, hand_x = 0.045 + 0.15 * -arm, 0.28 - 0.05 * abs(arm)
    foot = 0.095 + 0.045 * spread
    fringe = hy - 0.04 + 0.02 * hair
    lock = hy + 0.05 + 0.06 * hair

    def hair_shape(x: Array, y: Array) -> Array:
        cap = np.maximum(_circle(x, y, hx, hy - 0.008, r + 0.03), y - fringe)
        sides = np.minimum(
            _capsule(x, y, hx - r, hy - 0.03, hx - r, lock, 0.042),
            _capsule(x, y, hx + r, hy - 0.03, hx + r, lock, 0.042),
        )
        return np.minimum(cap, sides)

    return [
        ("legs", _union(
            lambda x, y: _capsule(x, y, -0.07, 0.17, -foot, 0.435, 0.066),
            lambda x, y: _capsule(x, y, 0.07, 0.17, foot, 0.435, 0.066),
        )),
        ("torso", _union(
            lambda x, y: _capsule(x, y, -0.13, -0.065, -hand_x, hand_y, 0.052),
            lambda x, y: _capsule(x, y, 0.13, -0.065, hand_x, hand_y, 0.052),
            lambda x, y: _box(x, y, 0, 0.035, 0.155, 0.16, 0.06),
        )),
        ("head", lambda x, y: _circle(x, y, hx, hy, r)),
        ("hair", hair_shape),
    ]  # fmt: skip


def _car(pose: tuple[float, ...]) -> Parts:
    """1 long, front at the right: body −0.5…0.2, hood 0.12…0.5, wheels below."""
    height, cabin, nose, wheel = pose
    top = -0.075 - 0.02 * height
    roof = top - 0.19 - 0.02 * cabin
    hood = top + 0.015 + 0.01 * nose
    r = 0.112 + 0.008 * wheel
    return [
        ("body", _union(
            lambda x, y: _box(x, y, -0.14, (roof + top) / 2 + 0.03, 0.255, (top - roof) / 2 + 0.05, 0.07, 0.16),
            lambda x, y: _box(x, y, -0.15, (top + 0.19) / 2, 0.35, (0.19 - top) / 2, 0.05),
        )),
        (None, lambda x, y: _box(x, y, -0.13, (roof + top) / 2 + 0.005, 0.185, (top - roof) / 2 - 0.035, 0.03, 0.16)),
        ("hood", lambda x, y: _box(x, y, 0.31, (hood + 0.19) / 2, 0.19, (0.19 - hood) / 2, 0.06)),
        ("wheels", _union(
            lambda x, y: _circle(x, y, -0.29, 0.19, r),
            lambda x, y: _circle(x, y, 0.29, 0.19, r),
        )),
    ]  # fmt: skip


def _chair(pose: tuple[float, ...]) -> Parts:
    """1 high: back −0.5…0.04, seat 0.0…0.16, legs to 0.5."""
    wide, lean, splay, thick = pose
    hw = 0.25 + 0.03 * wide
    slant = 0.10 * lean
    foot = 0.03 * splay
    r = 0.036 + 0.006 * thick
    return [
        ("legs", _union(
            lambda x, y: _capsule(x, y, -hw + 0.01, 0.12, -hw + 0.01 - foot, 0.46, r),
            lambda x, y: _capsule(x, y, hw - 0.01, 0.12, hw - 0.01 + foot, 0.46, r),
            lambda x, y: _capsule(x, y, -hw * 0.42, 0.12, -hw * 0.42 - foot / 2, 0.41, r),
            lambda x, y: _capsule(x, y, hw * 0.42, 0.12, hw * 0.42 + foot / 2, 0.41, r),
        )),
        ("back", lambda x, y: _box(x, y, slant * 0.25, -0.235, hw - 0.02, 0.265, 0.08, slant)),
        ("seat", lambda x, y: _box(x, y, 0, 0.09, hw + 0.06, 0.085, 0.05)),
    ]  # fmt: skip


def _dog(pose: tuple[float, ...]) -> Parts:
    """1 long, head at the right: tail −0.5…−0.25, torso, head 0.1…0.5."""
    wag, nod, stride, ear = pose
    hx, hy = 0.27, -0.165 + 0.035 * nod
    step = 0.04 * stride
    return [
        ("tail", lambda x, y: _capsule(x, y, -0.27, -0.02, -0.435 - 0.02 * wag, -0.19 - 0.07 * wag, 0.048)),
        ("legs", _union(
            lambda x, y: _capsule(x, y, -0.24, 0.12, -0.25 - step, 0.35, 0.048),
            lambda x, y: _capsule(x, y, -0.12, 0.12, -0.12 + step, 0.35, 0.048),
            lambda x, y: _capsule(x, y, 0.07, 0.12, 0.07 - step, 0.35, 0.048),
            lambda x, y: _capsule(x, y, 0.19, 0.12, 0.20 + step, 0.35, 0.048),
        )),
        ("torso", lambda x, y: _capsule(x, y, -0.2, 0.06, 0.14, 0.05, 0.13)),
        ("head", _union(
            lambda x, y: _circle(x, y, hx, hy, 0.14),
            lambda x, y: _capsule(x, y, hx + 0.08, hy + 0.05, hx + 0.165, hy + 0.055, 0.062),
            lambda x, y: _capsule(x, y, hx - 0.09, hy - 0.09, hx - 0.135, hy - 0.13 - 0.02 * ear, 0.045),
        )),
    ]  # fmt: skip


_SHAPES: dict[str, Callable[[tuple[float, ...]], Parts]] = {
    "figure": _figure,
    "car": _car,
    "chair": _chair,
    "dog": _dog,
}
