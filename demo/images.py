"""Draws demo/images: pictures of the test set, and two unlike those of any set, with questions and their exact answers.

    python -m demo.images [--out FOLDER] [--model CHECKPOINT]

questions.json records for each question whether the checkpoint answers it exactly right with DoLa off; the tests check
that it does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from PIL import Image

from demo.evaluate import SEED, answers, drawn
from demo.scenes import COLOURS, KINDS, PRESENCES, Item, Question, Scene, Thing, ask, examples, sample_scene
from janus_dola.programs.checkpoint import load
from janus_dola.programs.options import ModelConfig

SIDE = 256
PICKED = 539


def pictures() -> dict[str, tuple[Scene, Image.Image]]:
    """Each picture by its file's name, with the scene that it shows.

    The first four are scenes of the test set, of three, one, two and four things. `sky.png` has a colored background
    that darkens downwards, `wide.png` is not square: training showed neither.
    `habit.png` belongs to a question of the evaluation, picked because the habit shows there and DoLa removes it.
    """
    found: dict[str, tuple[Scene, Image.Image]] = {}
    for name, count in (("scene.png", 3), ("one.png", 1), ("two.png", 2), ("four.png", 4)):
        index = 0
        while not _clear(scene := sample_scene("test", 1, index), count):
            index += 1
        found[name] = (scene, scene.render(SIDE))
    sky = _scene((198, 219, 240), ("red circle", "top left", 0.36), ("green triangle", "bottom right", 0.34))
    found["sky.png"] = (sky, _darkened(sky.render(SIDE), sky.background))
    wide = _scene((252, 246, 225), ("blue square", "top right", 0.3), ("purple cross", "bottom left", 0.31))
    found["wide.png"] = (wide, wide.render(SIDE).crop((0, SIDE // 8, SIDE, SIDE - SIDE // 8)))
    picked = next(islice(examples("test", SEED, PICKED + 1), PICKED, None)).scene
    found["habit.png"] = (picked, drawn(picked, PICKED))
    return found


def _clear(scene: Scene, count: int) -> bool:
    """Whether the scene has `count` things of different colors and, if there are at most three, different shapes."""
    things = [item.thing for item in scene.items]
    shapes = {thing.shape for thing in things}
    return len(things) == count == len({thing.colour for thing in things}) and len(shapes) >= min(count, 3)


def _scene(background: tuple[int, int, int], *items: tuple[str, str, float]) -> Scene:
    """A scene written down: things, their places and sizes, each in the middle of its quarter."""
    made = []
    for name, place, size in items:
        colour, shape = name.split()
        x, y = 0.75 if "right" in place else 0.25, 0.75 if "bottom" in place else 0.25
        made.append(Item(Thing(colour, shape), place, x, y, size, COLOURS[colour]))
    return Scene(background, tuple(made))


def _darkened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture with a background that darkens to three quarters of its brightness, from top to bottom."""
    result = image.copy()
    for y in range(image.height):
        light = 1 - 0.25 * y / (image.height - 1)
        row = tuple(round(level * light) for level in background)
        for x in range(image.width):
            if image.getpixel((x, y)) == background:
                result.putpixel((x, y), row)
    return result


def questions(scene: Scene, seed: int) -> list[Question]:
    """One question of each kind that the scene allows, and of presence questions one of each sort."""
    rng = random.Random(seed)
    sorts = [
        (kind, presence) for kind in KINDS for presence in PRESENCES if kind == "presence" or presence == "present"
    ]
    asked = (ask(scene, kind, rng, presence) for kind, presence in sorts)
    return [question for question in asked if question is not None]


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.images", description="Draws the demo's pictures.")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "images", help="folder of the pictures (%(default)s)")
    parser.add_argument("--model", default=str(here / "checkpoint"), help="checkpoint folder (%(default)s)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if not (Path(options.model) / "config.json").is_file():
        parser.error(
            f"argument --model: {options.model} is not a checkpoint folder; make one with python -m demo.train"
        )
    wrapper, processor = load(ModelConfig(model_path=options.model, device="cpu", dtype="float32", use_dola_lm=False))
    options.out.mkdir(parents=True, exist_ok=True)
    table = {}
    for seed, (name, (scene, image)) in enumerate(pictures().items()):
        image.save(options.out / name, optimize=True)
        asked = questions(scene, seed)
        given = answers(wrapper, processor, [(image, question.text) for question in asked], [wrapper.config])
        table[name] = [
            q._asdict() | {"right": answer.text == q.answer} for q, (answer,) in zip(asked, given, strict=True)
        ]
    (options.out / "questions.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
