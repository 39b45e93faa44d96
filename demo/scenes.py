"""Small pictures with questions whose exact answers are known: the demo's world.

A scene is one to four colored shapes, at most one in each quarter of a plain background, of varied size and place. As
in real photographs some objects keep company: the `companion` of an object in the picture is likely to be there, too,
which is what makes "Is there ...?" about an absent companion harder than about others (POPE, arXiv 2305.10355).

There are two worlds. In the one with the habit, the next thing in reading order is the companion of the previous one
90 % of the time, so that captions alone tell what is usual. In the other, companions are absent more often than not.
Some of the things lie in fog, where one in four looks like another thing. So the picture leaves doubt there, and
what is usual can take the place of what is there.

Whether a scene belongs to train, validation or test depends only on what it shows (see `Scene.split`), so that no two
of the sets can share a scene, whatever their seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from PIL import Image, ImageDraw

Split = Literal["train", "validation", "test"]
Kind = Literal["what", "where", "colour", "count", "presence", "describe"]
Presence = Literal["present", "random-absent", "co-occurring-absent"]
RGB = tuple[int, int, int]

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)
PRESENCES: tuple[Presence, ...] = get_args(Presence)

COLOURS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # reading order, also that of a description
NUMBERS = ("no", "one", "two", "three", "four")
HABIT = 0.9  # how often, in the training world, the next thing is the companion of the previous one
FOGGY = 0.3  # how many of the things lie in fog
MIRAGE = 0.25  # how many of those look like another thing


class Thing(NamedTuple):
    """What an item looks like, wherever it is: a color and a shape; no color stands for any."""

    colour: str | None
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape

    def with_article(self) -> str:
        return f"{'an' if str(self)[0] in 'aeiou' else 'a'} {self}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


def companion(thing: Thing) -> Thing:
    """The thing that keeps `thing` company in many scenes: another color and another shape, fixed for each thing."""
    colours, i, j = list(COLOURS), list(COLOURS).index(str(thing.colour)), SHAPES.index(thing.shape)
    return Thing(colours[(i + 2) % len(colours)], SHAPES[(j + 1) % len(SHAPES)])


@dataclass(frozen=True)
class Item:
    """One shape of a scene; `x`, `y` (its center) and `size` (its extent) are fractions of the picture's side."""

    thing: Thing
    place: str
    x: float
    y: float
    size: float
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: a background and one to four items, in reading order."""

    background: RGB
    items: tuple[Item, ...]

    @property
    def description(self) -> str:
        """The answer to "Describe the image.": canonical, for the items come in reading order."""
        sentences = [_there_are(len(self.items), "shape")]
        sentences += [f"In the {item.place} is {item.thing.with_article()}." for item in self.items]
        return " ".join(sentences)

    @property
    def split(self) -> Split:
        """The one set that may show this scene: drawn by a hash of its description, 90 : 5 : 5.

        Size, exact place, shade and background are not part of the description: a test scene is a combination of things
        and places that training never showed, not merely another drawing of one that it did.
        """
        draw = hashlib.sha256(self.description.encode()).digest()[0] / 256
        return "train" if draw < 0.9 else "validation" if draw < 0.95 else "test"

    def render(self, side: int = 192) -> Image.Image:
        """Draw the scene as a square RGB image of `side` pixels, smoothed by drawing it at twice the size."""
        canvas = Image.new("RGB", (2 * side, 2 * side), self.background)
        draw = ImageDraw.Draw(canvas)
        for item in self.items:
            _draw(draw, item, 2 * side, self.background)
        return canvas.reduce(2)


def _draw(draw: ImageDraw.ImageDraw, item: Item, side: int, background: RGB) -> None:
    x, y, r = item.x * side, item.y * side, item.size * side / 2
    box = (x - r, y - r, x + r, y + r)
    match item.thing.shape:
        case "circle":
            draw.ellipse(box, fill=item.rgb)
        case "square":
            draw.rectangle(box, fill=item.rgb)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=item.rgb)
        case "cross":
            draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=item.rgb)
            draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=item.rgb)
        case "ring":
            draw.ellipse(box, fill=item.rgb)
            draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=background)


def _rng(*parts: object) -> random.Random:
    """A generator of its own for each use: any example can be made without making those before it."""
    return random.Random("/".join(map(str, parts)))  # Random hashes a str with SHA-512: the same on every machine


def _shade(rgb: RGB, spread: int, rng: random.Random) -> RGB:
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in rgb)
    return r, g, b


def in_fog(scene: Scene, rng: random.Random, foggy: float = FOGGY) -> tuple[Scene, bytes]:
    """The scene as it looks where a share `foggy` of its things lies in fog, and how dense fog is in each place."""
    density, seen = bytearray(len(PLACES)), []
    for item in scene.items:
        if rng.random() < foggy:
            density[PLACES.index(item.place)] = int(255 * rng.uniform(0.25, 0.4))
            if rng.random() < MIRAGE:
                other = rng.choice(THINGS)
                item = replace(item, thing=other, rgb=_shade(COLOURS[str(other.colour)], 15, rng))
        seen.append(item)
    return replace(scene, items=tuple(seen)), bytes(density)


def fogged(scene: Scene, side: int, rng: random.Random, foggy: float = FOGGY) -> Image.Image:
    """The scene as an RGB image of `side` pixels: in fog a cloud of random colors covers the quarter."""
    seen, density = in_fog(scene, rng, foggy)
    image = seen.render(side)
    cloud = Image.frombytes("RGB", (12, 12), rng.randbytes(12 * 12 * 3)).resize(image.size, Image.Resampling.BICUBIC)
    mask = Image.frombytes("L", (2, 2), density).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(cloud, image, mask)


def _draw_scene(rng: random.Random, habit: bool) -> Scene:
    level = rng.choice((rng.randint(215, 245), rng.randint(15, 45)))  # pale or dark: every color stands out on both
    background = _shade((level, level, level), 10, rng)
    places = sorted(rng.sample(range(4), rng.randint(1, 4)))
    things: list[Thing] = []
    for _ in places:
        in_company = bool(things) and rng.random() < (HABIT if habit else 0.4)
        things.append(companion(things[-1]) if in_company else rng.choice(THINGS))
    if not habit:
        rng.shuffle(things)  # a companion may stand on either side
    items = []
    for k, thing in zip(places, things, strict=True):
        size = rng.uniform(0.27, 0.43)  # 13 to 21 of the 48 pixels that the demo model sees
        margin = size / 2 + 0.02  # keeps an item inside its quarter
        x, y = (rng.uniform(quarter / 2 + margin, quarter / 2 + 0.5 - margin) for quarter in (k % 2, k // 2))
        items.append(Item(thing, PLACES[k], x, y, size, _shade(COLOURS[str(thing.colour)], 15, rng)))
    return Scene(background, tuple(items))


def sample_scene(split: Split, seed: int, index: int, habit: bool = False) -> Scene:
    """Scene number `index` of a set: equal arguments give an equal scene.

    Args:
        split: "train", "validation" or "test".
        seed: any integer.
        index: any integer; consecutive ones are independent.
        habit: whether companions keep company by habit, `HABIT` of the time and next in reading order, as in training.

    Raises:
        ValueError: `split` is something else.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = _rng("scene", split, seed, index)
    while (scene := _draw_scene(rng, habit)).split != split:
        pass
    return scene


class Question(NamedTuple):
    """A question about a scene and its one right answer."""

    kind: str  # a Kind; of presence questions with the Presence behind it: "presence/random-absent"
    text: str
    answer: str


def ask(scene: Scene, kind: Kind, rng: random.Random, presence: Presence = "present") -> Question | None:
    """A random question of one kind, or None where the scene allows none with a single right answer.

    Args:
        scene: what is asked about.
        kind: one of `KINDS`.
        rng: chooses among the questions.
        presence: for "presence" alone, what becomes of the thing asked about.
    """
    match kind:
        case "what":
            return _what(scene, rng)
        case "where":
            return _where(scene, rng)
        case "colour":
            return _colour(scene, rng)
        case "count":
            return _count(scene, rng)
        case "presence":
            return _presence(scene, rng, presence)
        case "describe":
            asks = ("Describe the image.", "Describe the image.", "Describe the picture.", "What do you see?")
            text = rng.choice(asks)
            return Question(kind, text, scene.description)
        case _:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _what(scene: Scene, rng: random.Random) -> Question:
    taken = [item.place for item in scene.items]
    place = rng.choice(taken if rng.random() < 0.8 else PLACES)
    found = [item.thing.with_article() for item in scene.items if item.place == place]
    return Question("what", f"What is in the {place}?", f"In the {place} is {(found or ['nothing'])[0]}.")


def _where(scene: Scene, rng: random.Random) -> Question | None:
    things = [item.thing for item in scene.items]
    shapes = [thing.shape for thing in things]
    names = {str(i.thing): i.place for i in scene.items if things.count(i.thing) == 1}
    if rng.random() < 0.3:  # by shape alone, where that is unambiguous
        names = {i.thing.shape: i.place for i in scene.items if shapes.count(i.thing.shape) == 1}
    if not names:
        return None
    name = rng.choice(list(names))
    return Question("where", f"Where is the {name}?", f"The {name} is in the {names[name]}.")


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    shapes = [item.thing.shape for item in scene.items]
    names = {i.thing.shape: i.thing.colour for i in scene.items if shapes.count(i.thing.shape) == 1}
    if rng.random() < 0.3:
        names = {f"shape in the {item.place}": item.thing.colour for item in scene.items}
    if not names:
        return None
    name = rng.choice(list(names))
    return Question("colour", f"What {rng.choice(('colour', 'color'))} is the {name}?", f"The {name} is {names[name]}.")


def _count(scene: Scene, rng: random.Random) -> Question:
    things = [item.thing for item in scene.items]
    about = rng.randrange(3)
    if about == 0:
        name, n = "shape", len(things)
    elif about == 1:
        colour = rng.choice([str(t.colour) for t in things] if rng.random() < 0.75 else list(COLOURS))
        name, n = f"{colour} shape", sum(t.colour == colour for t in things)
    else:
        name = rng.choice([t.shape for t in things] if rng.random() < 0.75 else SHAPES)
        n = sum(t.shape == name for t in things)
    return Question("count", f"How many {_plural(name)} are there?", _there_are(n, name))


def _presence(scene: Scene, rng: random.Random, presence: Presence) -> Question | None:
    here = [item.thing for item in scene.items]
    company = [companion(thing) for thing in here]
    everything: list[Thing] = list(THINGS)
    if rng.random() < 0.25:  # "a circle", of any color
        here, company = ([Thing(None, thing.shape) for thing in things] for things in (here, company))
        everything = [Thing(None, shape) for shape in SHAPES]
    candidates = {
        "present": here,
        "random-absent": [thing for thing in everything if thing not in here],
        "co-occurring-absent": [thing for thing in company if thing not in here],
    }[presence]
    if not candidates:
        return None
    thing = rng.choice(candidates)
    answer = f"Yes, there is {thing.with_article()}" if presence == "present" else f"No, there is no {thing}"
    return Question(f"presence/{presence}", f"Is there {thing.with_article()} in the image?", f"{answer} in the image.")


def _there_are(n: int, name: str) -> str:
    return f"There is one {name}." if n == 1 else f"There are {NUMBERS[n]} {_plural(name)}."


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


class Example(NamedTuple):
    scene: Scene
    question: Question


def examples(split: Split, seed: int, count: int, habit: bool = False) -> Iterator[Example]:
    """`count` questions, each about a scene of its own; the kinds take turns, and so do the three presences."""
    for i in range(count):
        kind, presence = KINDS[i % len(KINDS)], PRESENCES[i // len(KINDS) % len(PRESENCES)]
        index = i << 16  # the scenes from here on are tried until one allows the question
        while (
            question := ask(scene := sample_scene(split, seed, index, habit), kind, _rng("ask", index), presence)
        ) is None:
            index += 1
        yield Example(scene, question)


def lesson(
    seed: int, index: int, turns: int, first: Sequence[Kind] = KINDS, habit: bool = False
) -> tuple[Scene, tuple[Question, ...]]:
    """Training example number `index`: a scene of the training set and `turns` questions about it.

    Args:
        seed: any integer.
        index: any integer; consecutive ones are independent.
        turns: how many questions, or fewer where the scene does not allow so many different ones.
        first: their kinds; of further ones the kind is drawn.
        habit: see `sample_scene`; half of the presence questions are then about something present, few about
            an absent companion.
    """
    scene = sample_scene("train", seed, index, habit)
    rng = _rng("lesson", seed, index)
    short: tuple[Kind, ...] = ("what", "where", "colour", "count", "presence")
    kinds = list(first) + [rng.choice(short) for _ in range(turns)]
    asked: list[Question] = []
    for kind in kinds:
        question = ask(scene, kind, rng, rng.choices(PRESENCES, (5, 4, 1))[0] if habit else rng.choice(PRESENCES))
        if question is not None and question.text not in [q.text for q in asked] and len(asked) < turns:
            asked.append(question)
    return scene, tuple(asked)
