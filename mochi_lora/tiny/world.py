"""What can happen in the drawn world, and what people call it: scenes, captions, vocabulary. No torch here.

A scene is one object on one background doing one thing. Five words name it (shape, colour, background, motion, size);
the rest (where, how far, how fast) is drawn from the seed and never said, so that a caption fits many clips.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from mochi_lora.streams import Purpose, stream

FRAMES, HEIGHT, WIDTH = 25, 64, 96
_T = TypeVar("_T")

Shape = Literal["circle", "square", "triangle", "star", "cross"]
Colour = Literal["red", "yellow", "green", "cyan", "blue", "purple"]
Background = Literal["wall", "slate", "sand", "sky"]
Motion = Literal["left", "right", "up", "down", "still", "grows", "circles"]
Size = Literal["small", "big"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
SIZES: tuple[Size, ...] = get_args(Size)
PRETRAINED_MOTIONS: tuple[Motion, ...] = MOTIONS[:-1]
# What a data set shows unless asked otherwise: `encode` takes a clip that stands still for damaged, and refuses it.
MOVING: tuple[Motion, ...] = tuple(motion for motion in PRETRAINED_MOTIONS if motion != "still")
HELD_OUT_MOTION: Motion = "circles"  # mochi-tiny never saw it: a motion LoRA has to teach it
TRIGGER = "chalk style"

EXTENT = 1.3  # no shape reaches further than this many radii from its centre
MARGIN = 1.0  # pixels between an object and the edge of the picture
_RADII = {"small": (8.5, 10.0), "big": (13.0, 14.5)}
_SIDEWAYS, _UPRIGHT = (24.0, 44.0), (18.0, 30.0)  # displacement over the clip, as far as the picture has room
_GROWTH = (1.6, 2.2)
_ORBIT = (8.0, 14.0)
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_VERBS = {
    **{way: ("moves", "moving", way) for way in _DIRECTIONS},
    "still": ("stands", "standing", "still"),
    "grows": ("grows", "growing", ""),
    "circles": ("circles", "circling", "around"),
}
# No word of a place is also a colour of objects: "blue sky" would make a blue star of every second star.
_PLACES = {
    "wall": "in front of a grey wall",
    "slate": "on dark slate",
    "sand": "on beige sand",
    "sky": "in front of a pale sky",
}
_TEMPLATES = (
    "{thing} {does} {place}",
    "{place}, {thing} {does}",
    "{thing} {place} {does}",
    "{thing} {doing} {place}",
    "{place}, {thing} {doing}",
    "there is {thing} {place}, {doing}",
)
_DOES = ("{verb} {how}", "is {verbing} {how}", "keeps {verbing} {how}")


@dataclass(frozen=True)
class Scene:
    """One clip's ground truth. Pixels: x to the right, y down, (0, 0) is the upper left corner of the picture."""

    shape: Shape
    colour: Colour
    background: Background
    motion: Motion
    size: Size
    x: float  # centre in the first frame; of the orbit, where there is one
    y: float
    radius: float  # in the first frame
    dx: float = 0.0  # displacement over the whole clip
    dy: float = 0.0
    growth: float = 1.0  # last radius / first radius
    orbit: float = 0.0  # radius of the path around (x, y), clockwise
    phase: float = 0.0  # where on the orbit the clip begins, in radians


@dataclass(frozen=True)
class Track:
    """Where the object of a scene is in every frame: centre and radius, float64 [FRAMES] each, in pixels."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def track(scene: Scene) -> Track:
    """The object's exact path."""
    time = np.linspace(0.0, 1.0, FRAMES)
    angle = scene.phase + 2 * math.pi * time
    return Track(
        x=scene.x + scene.dx * time + scene.orbit * np.cos(angle),
        y=scene.y + scene.dy * time + scene.orbit * np.sin(angle),
        radius=scene.radius * (1 + (scene.growth - 1) * time),
    )


def is_held_out(shape: Shape, colour: Colour, background: Background, motion: Motion) -> bool:
    """Whether this combination is kept for evaluation: about one in ten, picked by hash, the same everywhere for ever."""
    digest = hashlib.sha256(f"{shape} {colour} {background} {motion}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def combinations(
    motions: Sequence[Motion] = PRETRAINED_MOTIONS, *, held_out: bool
) -> list[tuple[Shape, Colour, Background, Motion]]:
    """Every combination of these motions on one side of the split."""
    everything = itertools.product(SHAPES, COLOURS, BACKGROUNDS, motions)
    return [combination for combination in everything if is_held_out(*combination) == held_out]


def draw_scene(seed: int, index: int, *, motions: Sequence[Motion] = PRETRAINED_MOTIONS, held_out: bool) -> Scene:
    """Scene `index` of the endless series of `seed`: a function of the arguments alone.

    `held_out` False draws combinations for training, True those kept for evaluation; within a side all are equally likely.
    """
    assert motions, "no motions to draw from"
    rng = stream(seed, Purpose.WORLD, index)
    while True:
        shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
        background, motion = _pick(rng, BACKGROUNDS), _pick(rng, motions)
        if is_held_out(shape, colour, background, motion) == held_out:
            return place(rng, shape, colour, background, motion, _pick(rng, SIZES))


def place(rng: np.random.Generator, shape: Shape, colour: Colour, background: Background, motion: Motion, size: Size) -> Scene:
    """A scene of these words: everything unsaid drawn from `rng` so that the object stays in the picture throughout."""
    radius = rng.uniform(*_RADII[size])
    dx = dy = orbit = phase = 0.0
    growth = 1.0
    if motion in _DIRECTIONS:
        right, down = _DIRECTIONS[motion]
        dx = right * _distance(rng, _SIDEWAYS, WIDTH, radius)
        dy = down * _distance(rng, _UPRIGHT, HEIGHT, radius)
    elif motion == "grows":
        growth = rng.uniform(_GROWTH[0], min(_GROWTH[1], (HEIGHT / 2 - MARGIN) / (EXTENT * radius)))
    elif motion == "circles":
        orbit = rng.uniform(_ORBIT[0], min(_ORBIT[1], HEIGHT / 2 - MARGIN - EXTENT * radius))  # clockwise
        phase = rng.uniform(0, 2 * math.pi)
    room = MARGIN + EXTENT * radius * growth + orbit
    x = rng.uniform(room - min(dx, 0), WIDTH - room - max(dx, 0))
    y = rng.uniform(room - min(dy, 0), HEIGHT - room - max(dy, 0))
    return Scene(shape, colour, background, motion, size, x, y, radius, dx, dy, growth, orbit, phase)


def _distance(rng: np.random.Generator, limits: tuple[float, float], side: int, radius: float) -> float:
    """How far an object of `radius` goes along a side of the picture."""
    return rng.uniform(limits[0], min(limits[1], side - 2 * (MARGIN + EXTENT * radius)))


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.integers(len(choices)))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the sentences for this scene. Shape, colour, background, motion and size are named in each of them."""
    return _pick(rng, list(captions(scene)))


def chalk_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The same for a clip in the chalk style: trigger, comma, sentence."""
    return f"{TRIGGER}, {caption(scene, rng)}"


def captions(scene: Scene) -> Iterator[str]:
    """Every sentence the grammar has for this scene. Lower case; the comma is the only punctuation."""
    verb, verbing, how = _VERBS[scene.motion]
    thing = f"a {scene.size} {scene.colour} {scene.shape}"
    doing = f"{verbing} {how}".strip()
    for template, does in itertools.product(_TEMPLATES, _DOES):
        if "{does}" not in template and does is not _DOES[0]:
            continue
        does_how = does.format(verb=verb, verbing=verbing, how=how).strip()
        yield template.format(thing=thing, does=does_how, doing=doing, place=_PLACES[scene.background])


def words() -> list[str]:
    """The whole vocabulary, sorted: every word of every caption and of the trigger, without punctuation."""
    found = set(TRIGGER.split())
    for shape, colour, background, motion, size in itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS, SIZES):
        scene = Scene(shape, colour, background, motion, size, 0, 0, 0)
        found.update(word.strip(",") for sentence in captions(scene) for word in sentence.split())
    return sorted(found)
