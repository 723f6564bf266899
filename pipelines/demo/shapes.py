"""The drawn domain of the embedded demo: what its pictures are, and an exact judge of whether a picture is right.

A picture is one subject (a shape in a colour, or the object that fine-tuning teaches) on a neutral background, 64×64.
Because every picture is drawn, what a model should produce is known, and "did this learning rate work" is a number:
the judge measures the hue of the foreground and how far it overlaps the drawn template.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, width and height
_SUPERSAMPLE = 4  # drawn larger, then averaged, so that edges are smooth

COLOURS = {"red": 0.0, "yellow": 52.0, "green": 120.0, "cyan": 182.0, "blue": 230.0, "purple": 285.0}  # hue in degrees
BACKGROUNDS = ("white", "gray", "black", "striped")

# The judge's tolerances. Hues in the table above lie at least 45° apart.
HUE_TOLERANCE = 16.0  # degrees
CHROMA = 0.25  # max − min of RGB in [0, 1] from which a pixel counts as foreground: backgrounds are neutral
OVERLAP = 0.75  # intersection over union with the template from which a shape counts as right

Polygon = np.ndarray  # (points, 2), x to the right and y down, in units of the subject's radius


def _regular(points: int, start: float, radii: tuple[float, ...] = (1.0,)) -> Polygon:
    angles = start + np.arange(points) * 2 * math.pi / points
    radius = np.resize(np.array(radii), points)
    return np.stack([np.cos(angles) * radius, np.sin(angles) * radius], axis=1)


def _heart() -> Polygon:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2.0], axis=1) / 16


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _dome() -> Polygon:
    angles = np.linspace(math.pi, 2 * math.pi, 24)
    return np.stack([np.cos(angles), np.sin(angles) * 0.9 + 0.05], axis=1)


_ARM = 0.36
SHAPES: dict[str, Polygon] = {
    "circle": _regular(48, 0.0) * 0.92,
    "square": _box(-0.82, -0.82, 0.82, 0.82),
    "triangle": _regular(3, -math.pi / 2) * 1.12 + (0.0, 0.2),
    "star": _regular(10, -math.pi / 2, (1.12, 0.46)),
    "cross": np.array(
        [
            *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
            *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
        ]
    ),
    "heart": _heart(),
}


@dataclass(frozen=True)
class Part:
    polygon: Polygon
    hue: float  # degrees


@dataclass(frozen=True)
class Subject:
    """What a picture shows: parts painted in order, all in one frame of reference."""

    name: str  # as captions say it, without the article: "red circle"
    parts: tuple[Part, ...]


def shape(colour: str, name: str) -> Subject:
    return Subject(f"{colour} {name}", (Part(SHAPES[name], COLOURS[colour]),))


# The object that fine-tuning teaches. No picture of the base's training has its outline, or two colours at once.
IDENTIFIER = "sks"
OBJECT = Subject(
    f"{IDENTIFIER} object",
    (Part(_box(-0.36, 0.0, 0.36, 1.0), COLOURS["yellow"]), Part(_dome(), COLOURS["purple"])),  # a toadstool
)


def caption(subject: str, background: str) -> str:
    return f"a {subject} on a {background} background"


def rgb(hue: float, saturation: float = 0.85, value: float = 0.9) -> tuple[int, int, int]:
    sector = (np.array([5.0, 3.0, 1.0]) + hue / 60.0) % 6
    channels = value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    red, green, blue = (round(float(channel) * 255) for channel in channels)
    return red, green, blue


def paint_background(name: str) -> Image.Image:
    side = SIZE * _SUPERSAMPLE
    if name == "striped":
        rows = (np.arange(side) // (8 * _SUPERSAMPLE)) % 2
        grey = np.where(rows, 205, 140).astype(np.uint8)
        return Image.fromarray(np.repeat(grey[:, None], side, axis=1)).convert("RGB")
    level = {"white": 245, "gray": 150, "black": 18}[name]
    return Image.new("RGB", (side, side), (level, level, level))


def draw(
    subject: Subject,
    background: str,
    centre: tuple[float, float] = (SIZE / 2, SIZE / 2),  # pixels
    radius: float = 20.0,  # pixels
    saturation: float = 0.85,
    value: float = 0.9,
) -> Image.Image:
    """Draws one 64×64 picture."""
    image = paint_background(background)
    pen = ImageDraw.Draw(image)
    for part in subject.parts:
        points = (part.polygon * radius + centre) * _SUPERSAMPLE
        pen.polygon([(float(x), float(y)) for x, y in points], fill=rgb(part.hue, saturation, value))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_varied(subject: Subject, background: str, rng: np.random.Generator) -> Image.Image:
    """Draws with the position, size and paint varied as in the base's training pictures."""
    centre = tuple(SIZE / 2 + rng.uniform(-4, 4, size=2))
    return draw(subject, background, centre, rng.uniform(16, 22), rng.uniform(0.78, 0.92), rng.uniform(0.82, 0.97))


@dataclass(frozen=True)
class Verdict:
    colour: bool  # every part has its hue
    shape: bool  # the outline is the subject's, and no other known outline fits better
    overlap: float  # intersection over union of foreground and template, 0 to 1

    @property
    def right(self) -> bool:
        return self.colour and self.shape


def judge(picture: Image.Image, subject: Subject) -> Verdict:
    """Says whether a picture shows the subject, wherever it stands and however large it is.

    The template is moved and scaled to the foreground's centroid and area, then compared: no search, no tuning.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    foreground = chroma > CHROMA
    if not 0.02 < foreground.mean() < 0.7:
        return Verdict(False, False, 0.0)
    templates: dict[str, tuple[Part, ...]] = {name: (Part(polygon, 0.0),) for name, polygon in SHAPES.items()}
    templates[OBJECT.name] = OBJECT.parts
    mine = subject.name if subject.name in templates else subject.name.split()[-1]
    fitted = {name: _fit(parts, foreground) for name, parts in templates.items()}
    overlaps = {name: _overlap(foreground, labels > 0) for name, labels in fitted.items()}
    hue = _hue(pixels, chroma)
    colour = True
    for index, part in enumerate(subject.parts, start=1):
        region = (fitted[mine] == index) & foreground
        near = np.abs((hue - part.hue + 180) % 360 - 180) <= HUE_TOLERANCE
        colour &= bool(region.any()) and float((near & region).sum()) >= 0.75 * float(region.sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return Verdict(colour, best == mine and overlaps[mine] >= OVERLAP, overlaps[mine])


def _hue(pixels: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    red, green, blue = (pixels[..., channel] for channel in range(3))
    top = pixels.max(axis=2)
    span = np.maximum(chroma, 1e-9)
    hue = np.where(
        top == red, (green - blue) / span % 6, np.where(top == green, (blue - red) / span + 2, (red - green) / span + 4)
    )
    return hue * 60


def _rasterise(parts: tuple[Part, ...], centre: np.ndarray, radius: float) -> np.ndarray:
    """Labels of the parts, 1 for the first, 0 where there is none: (SIZE, SIZE)."""
    image = Image.new("L", (SIZE * _SUPERSAMPLE, SIZE * _SUPERSAMPLE), 0)
    pen = ImageDraw.Draw(image)
    for label, part in enumerate(parts, start=1):
        points = (part.polygon * radius + centre) * _SUPERSAMPLE
        pen.polygon([(float(x), float(y)) for x, y in points], fill=label)
    half = _SUPERSAMPLE // 2
    return np.asarray(image)[half::_SUPERSAMPLE, half::_SUPERSAMPLE]


def _fit(parts: tuple[Part, ...], foreground: np.ndarray) -> np.ndarray:
    """The template's labels, with the foreground's area and centroid."""
    reference = 20.0  # pixels; large enough to measure the template's own area and centroid
    middle = np.full(2, SIZE / 2)
    drawn = _rasterise(parts, middle, reference) > 0
    radius = reference * math.sqrt(foreground.sum() / drawn.sum())
    offset = (_centroid(drawn) - middle) / reference
    return _rasterise(parts, _centroid(foreground) - offset * radius, radius)


def _centroid(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def _overlap(mask: np.ndarray, template: np.ndarray) -> float:
    return float((mask & template).sum() / max((mask | template).sum(), 1))
