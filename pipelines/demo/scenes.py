"""Drawn scenes of one to three shapes, their descriptions, and questions whose answers are exact.

The pictures are 48×48 with the shapes of the embedded Stable Diffusion base, one in each of up to three of four
quarters. No shape and no colour appears twice in a scene, so "what colour is the star?" has one answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from equipoise.pipelines.demo import shapes

SIZE = 48  # pixels, width and height
_SUPERSAMPLE = 4
BACKGROUNDS = ("white", "gray", "black")
NUMBERS = ("one", "two", "three")
KINDS = ("colour", "shape", "presence", "number", "background")  # of questions


@dataclass(frozen=True)
class Item:
    colour: str
    shape: str
    quarter: int  # 0 to 3: top left, top right, bottom left, bottom right

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]  # in the order of their quarters
    background: str


def random_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, 4))
    quarters = sorted(rng.permutation(4)[:count])
    colours, names = rng.permutation(list(shapes.COLOURS))[:count], rng.permutation(list(shapes.SHAPES))[:count]
    items = (Item(str(c), str(s), int(q)) for c, s, q in zip(colours, names, quarters, strict=True))
    return Scene(tuple(items), str(rng.choice(BACKGROUNDS)))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene, with position, size and paint varied."""
    side = SIZE * _SUPERSAMPLE
    image = shapes.paint_background(scene.background).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        centre = np.array([item.quarter % 2, item.quarter // 2]) * SIZE / 2 + SIZE / 4 + rng.uniform(-2, 2, 2)
        points = (shapes.SHAPES[item.shape] * rng.uniform(8, 10) + centre) * _SUPERSAMPLE
        paint = shapes.rgb(shapes.COLOURS[item.colour], rng.uniform(0.78, 0.92), rng.uniform(0.82, 0.97))
        pen.polygon([(float(x), float(y)) for x, y in points], fill=paint)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def caption(scene: Scene) -> str:
    *first, last = map(str, scene.items)
    return f"{', '.join(first)}{' and ' if first else ''}{last} on a {scene.background} background"


def statements(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Sentences that are true of a scene: what a language model can learn of it without being asked anything."""
    absent = [name for name in shapes.SHAPES if name not in {item.shape for item in scene.items}]
    made = [f"the {item.shape} is {item.colour}" for item in scene.items]
    made += [f"there is a {item.shape}" for item in scene.items] + [f"there is no {rng.choice(absent)}"]
    made += [f"the number of shapes is {NUMBERS[len(scene.items) - 1]}", f"the background is {scene.background}"]
    return [made[index] for index in rng.permutation(len(made))]


def question(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question of one of the KINDS, and its answer."""
    item = scene.items[int(rng.integers(len(scene.items)))]
    if kind == "colour":
        return f"what colour is the {item.shape}?", item.colour
    if kind == "shape":
        return f"what shape is {item.colour}?", item.shape
    if kind == "number":
        return "how many shapes are there?", NUMBERS[len(scene.items) - 1]
    if kind == "background":
        return "what colour is the background?", scene.background
    there = bool(rng.integers(2))
    absent = [name for name in shapes.SHAPES if name not in {item.shape for item in scene.items}]
    return f"is there a {item.shape if there else rng.choice(absent)}?", "yes" if there else "no"


def questions(count: int, rng: np.random.Generator) -> Iterator[tuple[Image.Image, str, str]]:
    """Pictures with a question of any kind and its answer."""
    for _ in range(count):
        scene = random_scene(rng)
        asked, answer = question(scene, str(rng.choice(KINDS)), rng)
        yield draw(scene, rng), asked, answer


def write_questions(folder: Path, count: int, seed: int) -> Path:
    """Writes pictures and questions.jsonl, in the LLaVA conversation format, into an existing folder."""
    lines = []
    for index, (picture, asked, answer) in enumerate(questions(count, np.random.default_rng(seed))):
        picture.save(folder / f"{index:05d}.png")
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"image": f"{index:05d}.png", "conversations": turns}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder / "questions.jsonl"
