"""Scenes of parts-world as plain data: what stands where, in which colours, and the caption that says so.

A scene is immutable; an edit (`recolour`, `move`, `without`) gives a new scene that differs in that one thing,
so that rendering both gives the ground truth of an edit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.97, 0.52, 0.08),
    "yellow": (0.98, 0.87, 0.16),
    "green": (0.10, 0.60, 0.22),
    "blue": (0.13, 0.28, 0.88),
    "purple": (0.56, 0.18, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.09, 0.09, 0.11),
}
"""Named colours, sRGB in 0…1."""

PARTS: dict[str, tuple[str, ...]] = {
    "figure": ("head", "hair", "torso", "legs"),
    "car": ("body", "hood", "wheels"),
    "chair": ("back", "seat", "legs"),
    "dog": ("head", "torso", "legs", "tail"),
}
"""The parts of each kind of object."""

MAIN_PART = {"figure": "torso", "car": "body", "chair": "back", "dog": "torso"}
"""The part whose colour names the object ("a red car")."""

BACKGROUNDS: dict[str, str] = {
    "field": "on a green field",
    "beach": "on a sandy beach",
    "street": "on a grey street",
    "room": "in a brown room",
    "snow": "on white snow",
}
"""Backgrounds and how a caption says them."""


@dataclass(frozen=True)
class Thing:
    """One object: its kind, the colour of each part, where it stands and how.

    `x`, `y`: centre in the frame, 0…1 from the left and the top; `size`: height of the object's box as a fraction of
    the frame; `flip`: looks the other way; `pose`: four numbers in −1…1, read by the kind's own drawing;
    `shifts`: a part's displacement from its place, as fractions of the frame.
    """

    kind: str
    colours: tuple[tuple[str, str], ...]
    x: float
    y: float
    size: float
    flip: bool
    pose: tuple[float, float, float, float]
    shifts: tuple[tuple[str, tuple[float, float]], ...] = ()

    @property
    def colour(self) -> str:
        """Colour name of the main part."""
        return dict(self.colours)[MAIN_PART[self.kind]]

    def recolour(self, part: str, colour: str) -> Thing:
        """The same object with one part in another named colour. ValueError on an unknown part or colour."""
        _check(part, PARTS[self.kind], f"part of a {self.kind}")
        _check(colour, COLOURS, "colour")
        return replace(self, colours=tuple((p, colour if p == part else c) for p, c in self.colours))

    @property
    def coloured_parts(self) -> tuple[str, ...]:
        """The parts that have the object's colour; black wheels are just wheels, even a black car's."""
        return tuple(part for part, colour in self.colours if colour == self.colour and not _tyres(part, colour))

    def repaint(self, colour: str) -> Thing:
        """The same object with its `coloured_parts` in another named colour. ValueError on an unknown colour."""
        _check(colour, COLOURS, "colour")
        own = self.coloured_parts
        return replace(self, colours=tuple((p, colour if p in own else c) for p, c in self.colours))


@dataclass(frozen=True)
class Scene:
    """Objects, back to front, on a background. `horizon` (0…1 from the top) and `light` (about 1) vary it."""

    things: tuple[Thing, ...]
    background: str
    horizon: float = 0.6
    light: float = 1.0

    def recolour(self, part: str, colour: str, index: int = 0) -> Scene:
        """The scene with one part of object `index` in another colour."""
        return self._with(index, self.things[index].recolour(part, colour))

    def repaint(self, colour: str, index: int = 0) -> Scene:
        """The scene with object `index` in another colour."""
        return self._with(index, self.things[index].repaint(colour))

    def move(self, dx: float, dy: float, part: str | None = None, index: int = 0) -> Scene:
        """The scene with object `index`, or just one part of it, displaced by fractions of the frame."""
        thing = self.things[index]
        if part is None:
            return self._with(index, replace(thing, x=thing.x + dx, y=thing.y + dy))
        _check(part, PARTS[thing.kind], f"part of a {thing.kind}")
        shifts = dict(thing.shifts)
        old = shifts.get(part, (0.0, 0.0))
        shifts[part] = (old[0] + dx, old[1] + dy)
        return self._with(index, replace(thing, shifts=tuple(shifts.items())))

    def without(self, index: int = 0) -> Scene:
        """The scene with object `index` removed."""
        return replace(self, things=self.things[:index] + self.things[index + 1 :])

    def caption(self, parts: int = 0, colour: bool = True, background: bool = True) -> str:
        """Words for the scene: "a red figure with a blue head on a green field".

        parts: up to how many parts per object whose colour differs from the object's are mentioned.
        """
        words = " and ".join(_describe(thing, parts, colour) for thing in self.things) or "nothing"
        return f"{words} {BACKGROUNDS[self.background]}" if background else words

    def _with(self, index: int, thing: Thing) -> Scene:
        return replace(self, things=(*self.things[:index], thing, *self.things[index + 1 :]))


def _check(value: str, known: Collection[str], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what}: {value!r}; known: {', '.join(known)}")


def _describe(thing: Thing, parts: int, colour: bool) -> str:
    name = f"{thing.colour} {thing.kind}" if colour else thing.kind
    others = [part_phrase(part, c) for part, c in thing.colours if c != thing.colour and not _tyres(part, c)]
    mentioned = others[:parts]
    return f"{_article(name)} {name}" + (f" with {' and '.join(mentioned)}" if mentioned else "")


def _tyres(part: str, colour: str) -> bool:
    return part == "wheels" and colour == "black"


def part_phrase(part: str, colour: str) -> str:
    """ "a blue head", "green legs": a coloured part as a caption says it."""
    plural = part in ("legs", "wheels", "hair")
    return f"{colour} {part}" if plural else f"{_article(colour)} {colour} {part}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_scene(
    seed: int,
    kind: str | None = None,
    things: int = 1,
    background: str | None = None,
    colour: str | None = None,
    mixed: bool = False,
) -> Scene:
    """A random scene, the same for the same arguments.

    kind, background, colour (of the first object): fixed if given. things: 1…3 objects side by side.
    mixed: parts coloured independently of the object (about half of them).
    ValueError on an unknown kind, background or colour, or another number of things.
    """
    for value, known, what in (
        (kind, PARTS, "kind of object"),
        (background, BACKGROUNDS, "background"),
        (colour, COLOURS, "colour"),
    ):
        if value is not None:
            _check(value, known, what)
    if things not in (1, 2, 3):
        raise ValueError(f"a scene is drawn with 1 to 3 things, not {things}")
    rng = np.random.default_rng((seed, 7))
    names = list(COLOURS)
    kinds = [kind or str(rng.choice(list(PARTS)))]
    kinds += [str(k) for k in rng.choice(list(PARTS), things - 1)]
    chosen = [colour or str(rng.choice(names))]
    chosen += [str(c) for c in rng.choice(names, things - 1)]
    slots = _slots(things, rng)
    objects = tuple(_sample_thing(k, c, slot, mixed, rng) for k, c, slot in zip(kinds, chosen, slots, strict=True))
    return Scene(
        objects,
        background or str(rng.choice(list(BACKGROUNDS))),
        horizon=float(rng.uniform(0.45, 0.72)),
        light=float(rng.uniform(0.95, 1.03)),
    )


def like_objects(
    seed: int, count: int = 2, kind: str | None = None, colour: str | None = None, background: str | None = None
) -> Scene:
    """A random scene of 1…3 objects of one kind and one colour, side by side, each in a pose of its own.

    The same for the same arguments. kind, colour, background: fixed if given. ValueError as from `sample_scene`.
    """
    scene = sample_scene(seed, kind, count, background, colour)
    rng = np.random.default_rng((seed, 17))
    first = scene.things[0]
    things = (
        _sample_thing(first.kind, first.colour, (thing.x, thing.y, thing.size), False, rng) for thing in scene.things
    )
    return replace(scene, things=tuple(things))


def _slots(things: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre x, centre y and size of each object."""
    if things == 1:
        size = rng.uniform(0.78, 0.94)
        return [(0.5 + rng.uniform(-0.08, 0.08), 0.52 + rng.uniform(-0.02, 0.04), size)]
    width = 1.0 / things
    slots = []
    for i in range(things):
        size = rng.uniform(0.88, 1.0) * (0.56 if things == 2 else 0.40)
        x = (i + 0.5) * width + rng.uniform(-0.02, 0.02)
        slots.append((x, 0.6 + rng.uniform(-0.1, 0.08), size))
    return slots


def _sample_thing(
    kind: str, colour: str, slot: tuple[float, float, float], mixed: bool, rng: np.random.Generator
) -> Thing:
    colours = dict.fromkeys(PARTS[kind], colour)
    if kind == "car":
        colours["wheels"] = "black"
    if mixed:
        for part in PARTS[kind]:
            if part != MAIN_PART[kind] and rng.random() < 0.55:
                colours[part] = str(rng.choice(list(COLOURS)))
    pose = tuple(float(v) for v in rng.uniform(-1, 1, 4))
    x, y, size = (float(v) for v in slot)
    return Thing(kind, tuple(colours.items()), x, y, size, bool(rng.random() < 0.5), pose)  # type: ignore[arg-type]
