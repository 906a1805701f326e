"""The synthetic set: each class is a shape with a texture; colour, place, scale, angle and background tell nothing.

Raw pixels hardly help to find the class (tests/training/test_synthetic.py shows the figures), the eye and a small
ResNet find it easily, and a gigabyte need not be downloaded.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from training.data.config import Synthetic
from training.data.draws import seeded
from training.data.folder import Split

CHUNK = 256  # images drawn at once: few enough to stay in the processor's cache
SHAPES, TEXTURES = ("disc", "square", "triangle", "cross"), ("plain", "stripes", "checks", "grid")
SUPERSAMPLING = 2  # samples per pixel and axis, averaged: smooth edges


def generate(config: Synthetic, size: int, split: Split) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, size, size] and classes int64 [N], equally many of each (to within one).

    The class is shape * num_textures + texture. Equal seeds make equal images; the splits are drawn apart.
    """
    count = config.num_train if split == "train" else config.num_val
    generator = seeded(config.seed, split)
    labels = torch.arange(count) % (config.num_shapes * config.num_textures)
    shapes, textures = labels // config.num_textures, labels % config.num_textures
    chunks = zip(torch.split(shapes, CHUNK), torch.split(textures, CHUNK), strict=True)
    return torch.cat([_draw(*chunk, size, generator) for chunk in chunks]), labels


def class_names(config: Synthetic) -> tuple[str, ...]:
    """What the classes show, in their order."""
    return tuple(f"{shape}, {texture}" for shape in SHAPES[:config.num_shapes]
                 for texture in TEXTURES[:config.num_textures])


def _draw(shapes: Tensor, textures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    count = len(shapes)
    u, v = _object_coordinates(count, size * SUPERSAMPLING, generator)
    phase_u, phase_v = _uniform(count, -1, 1, generator), _uniform(count, -1, 1, generator)
    inside, marked = _select(_shapes(u, v), shapes), _select(_textures(u + phase_u, v + phase_v), textures)
    body, marks, ground = _colours(count, generator)
    background = _background(ground, size * SUPERSAMPLING, generator)
    image = torch.where(inside, torch.where(marked, marks, body), background)
    noise = 0.03 * torch.randn(count, 3, size, size, generator=generator)
    return ((avg_pool2d(image, SUPERSAMPLING) + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _object_coordinates(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coordinates [N, 1, size, size] of every sample in the object's own frame, where it reaches from -1 to 1."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    radius = _uniform(count, 0.6, 0.9, generator)
    room = 1 - radius
    x = x - room * _uniform(count, -1, 1, generator)
    y = y - room * _uniform(count, -1, 1, generator)
    angle = _uniform(count, -math.pi / 8, math.pi / 8, generator)
    return (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius


def _shapes(u: Tensor, v: Tensor) -> list[Tensor]:
    """Disc, square, triangle and cross, of about equal area; bool."""
    disc = u.square() + v.square() < 0.85**2
    square = torch.maximum(u.abs(), v.abs()) < 0.75
    triangle = (v < 0.8) & (2 * u.abs() - v < 0.95)
    cross = (torch.minimum(u.abs(), v.abs()) < 0.33) & (torch.maximum(u.abs(), v.abs()) < 1)
    return [disc, square, triangle, cross]


def _textures(u: Tensor, v: Tensor) -> list[Tensor]:
    """Where plain, striped, chequered and gridded bodies carry their second colour; bool."""
    across, along = torch.sin(8 * u), torch.sin(8 * v)  # two and a half periods from edge to edge
    plain = torch.zeros_like(u, dtype=torch.bool)
    return [plain, along > 0, across * along > 0, torch.minimum(across, along) > -0.3]


def _colours(count: int, generator: torch.Generator) -> Tensor:
    """Of body, marks and background, [3, N, 3, 1, 1]: any tint; body and marks light and dark, or the reverse."""
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    lightness = 0.5 + 0.4 * torch.stack([sign, -sign, torch.zeros(count)])
    tint = torch.rand(3, count, 3, generator=generator) - 0.5
    tint = tint - tint.mean(dim=2, keepdim=True)
    return (lightness[..., None] + 0.6 * tint).clamp(0, 1)[..., None, None]


def _background(ground: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Its colour [N, 3, 1, 1] with smooth blotches, [N, 3, size, size]."""
    blotches = 0.15 * torch.randn(len(ground), 3, 4, 4, generator=generator)
    return ground + interpolate(blotches, size=(size, size), mode="bilinear", align_corners=True)


def _select(options: list[Tensor], which: Tensor) -> Tensor:
    return torch.stack(options)[which, torch.arange(len(which))]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low
