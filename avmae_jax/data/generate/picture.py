"""The picture of a scene: a drawn background, and bodies with texture, light and shadow, antialiased."""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from avmae_jax.data.generate.scene import STEPS_PER_SECOND, Scene

SPRITE_REACH = 1.25  # Half a sprite's side in radii: room for corners of boxes and for soft edges.


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255


def _smooth_noise(rng: np.random.Generator, side: int, cells: int) -> Float[np.ndarray, 's s']:
    """Blobs of about side / cells pixels, around 0."""
    coarse = rng.normal(size=(cells + 3, cells + 3)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


# -- Textures of backgrounds: [s s] around 0, from coordinates in [0, 1] --


def _plain(rng, u, v):
    return 0 * u


def _stripes(rng, u, v):
    turn, count = rng.uniform(0, math.pi), rng.uniform(4, 10)
    return np.tanh(2 * np.sin(2 * math.pi * count * (u * math.cos(turn) + v * math.sin(turn)) + rng.uniform(0, 6)))


def _checks(rng, u, v):
    count = rng.uniform(2.5, 6)
    return np.tanh(4 * np.sin(2 * math.pi * count * u) * np.sin(2 * math.pi * count * v))


def _dots(rng, u, v):
    count = rng.uniform(3, 7)
    return np.tanh(3 * (np.cos(2 * math.pi * count * u) + np.cos(2 * math.pi * count * v) - 0.8))


def _clouds(rng, u, v):
    return 0.8 * _smooth_noise(rng, len(u), int(rng.integers(2, 7)))


TEXTURES = (_plain, _stripes, _checks, _dots, _clouds)


def _surface(rng: np.random.Generator, side: int, value: float) -> Float[np.ndarray, 's s 3']:
    """A pale, textured sheet: two colours that a gradient and a texture mix.

    Pale, because errors are counted in pixels: strong backgrounds would be most of what a model learns.
    """
    v, u = np.mgrid[0:side, 0:side].astype(np.float32) / side
    hue, saturation = rng.uniform(), rng.uniform(0.04, 0.28)
    first = _colour(hue, saturation, value)
    second = _colour(hue + rng.uniform(-0.12, 0.12), saturation, value * rng.uniform(0.75, 0.92))
    turn = rng.uniform(0, 2 * math.pi)
    gradient = 0.5 + 0.5 * ((u - 0.5) * math.cos(turn) + (v - 0.5) * math.sin(turn))
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, u, v)
    mixed = np.clip(gradient + rng.uniform(0.15, 0.35) * texture, 0, 1)[..., None]
    sheet = first * (1 - mixed) + second * mixed
    return sheet + 1.0 * rng.normal(size=(side, side, 1)).astype(np.float32)


def _background(rng: np.random.Generator, scene: Scene, side: int) -> Float[np.ndarray, 's s 3']:
    """Wall and ground, or the table with its rim."""
    back = _surface(rng, side, value=rng.uniform(0.78, 0.97))
    front = _surface(rng, side, value=rng.uniform(0.35, 0.6))
    v, u = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side
    if scene.ground is None:
        left, top, right, bottom = scene.walls
        inside = np.minimum(np.minimum(u - left, right - u), np.minimum(v - top, bottom - v)) * side
        cover = np.clip(inside + 0.5, 0, 1)[..., None]
        rim = np.clip(1 - np.abs(inside + 1) / 2.2, 0, 1)[..., None]
        return (front * (1 - cover) + back * cover) * (1 - 0.5 * rim)
    below = (v - scene.ground(u)) * side
    cover = np.clip(below + 0.5, 0, 1)[..., None]
    edge = np.clip(1 - np.abs(below - 0.8) / 1.5, 0, 1)[..., None]
    front = front * (1 - 0.25 * np.clip(below / side / 0.3, 0, 1)[..., None])
    return back * (1 - cover) + front * cover + 35 * edge


# -- Bodies: colour [s s 3] and signed depth inside the outline (in radii), on coordinates in radii --


def _rubber_ball(rng, u, v):
    panels = int(rng.integers(2, 5))
    first, hue = rng.uniform(0, 2 * math.pi), rng.uniform()
    wave = np.sin(panels * np.arctan2(v, u) + first + rng.uniform(0, 2.0) * np.hypot(u, v))
    mixed = (0.5 + 0.5 * np.tanh(6 * wave))[..., None]
    other = _colour(hue + rng.uniform(0.3, 0.7), 0.85, 1.0) if rng.uniform() < 0.6 else _colour(0.0, 0.0, 0.97)
    colour = _colour(hue, 0.9, 0.95) * (1 - mixed) + other * mixed
    return colour, 1 - np.hypot(u, v)


def _wooden_box(rng, u, v):
    hue, value = rng.uniform(0.04, 0.12), rng.uniform(0.55, 0.9)
    bend = 0.25 * _smooth_noise(rng, len(u), 3)
    grain = np.sin(rng.uniform(14, 24) * (v + bend * 0.5))
    reach = 0.86
    depth = reach - np.maximum(np.abs(u), np.abs(v))
    frame = np.clip((0.2 - depth) / 0.05, 0, 1)
    brace = np.clip(1.6 - np.abs(np.abs(u) - np.abs(v)) / 0.1, 0, 1) if rng.uniform() < 0.5 else 0 * u
    shade = 1 + 0.13 * grain - 0.3 * np.maximum(frame * (depth > 0.14), 0.5 * brace * (frame < 0.5))
    return _colour(hue, rng.uniform(0.45, 0.75), value) * shade[..., None], depth


def _metal_gear(rng, u, v):
    teeth = 8
    distance, turn = np.hypot(u, v), np.arctan2(v, u)
    outline = 0.86 + 0.14 * np.tanh(3 * np.cos(teeth * turn))
    depth = np.minimum(outline - distance, distance - 0.24)
    hue, saturation = [(0.6, 0.08), (0.12, 0.55), (0.05, 0.45)][rng.integers(3)]  # Steel, brass, copper.
    brushed = 0.68 + 0.2 * np.cos(2 * turn + rng.uniform(0, 6)) + 0.12 * np.cos(6 * turn + rng.uniform(0, 6))
    groove = np.clip(1 - np.abs(distance - 0.58) / 0.07, 0, 1)
    return _colour(hue, saturation, 1.0) * (brushed * (1 - 0.4 * groove))[..., None], depth


LOOKS = {'rubber': _rubber_ball, 'wood': _wooden_box, 'metal': _metal_gear}


def _sprite(rng: np.random.Generator, material: str, pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """Colour and cover [s s 4] that turns with the body, and the light on it [s s 2] that does not.

    Drawn at 1.5 times the size on the picture, so that turning it by linear interpolation stays sharp.
    """
    side = max(12, math.ceil(2 * SPRITE_REACH * pixels * 1.5))
    v, u = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) * (2 * SPRITE_REACH / side) - SPRITE_REACH
    colour, depth = LOOKS[material](rng, u, v)
    edge = pixels * 1.5
    cover = np.clip(depth * edge + 0.5, 0, 1)
    colour = colour * (1 - 0.35 * np.clip(1 - depth / 0.1, 0, 1))[..., None]  # A dark contour, against any background.
    distance = np.hypot(u + 0.35, v + 0.4)
    shade = 1.12 - 0.42 * np.clip(distance / 1.5, 0, 1) ** 1.5
    gloss = {'rubber': 90.0, 'wood': 0.0, 'metal': 60.0}[material] * np.exp(-((distance / 0.28) ** 2))
    sprite = np.concatenate([colour, cover[..., None]], -1)
    return sprite.astype(np.float32), np.stack([shade, gloss], -1).astype(np.float32)


def _blend(frame: np.ndarray, sprite: np.ndarray, light: np.ndarray, x: float, y: float, radius: float, angle: float):
    """Puts a turned sprite onto the frame (in pixels), changing only the square around it."""
    reach = SPRITE_REACH * radius * 1.1 + 1
    left, top = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
    right, bottom = min(frame.shape[1], math.ceil(x + reach)), min(frame.shape[0], math.ceil(y + reach))
    if left >= right or top >= bottom:
        return
    size = (right - left, bottom - top)
    scale, centre = len(sprite) / (2 * SPRITE_REACH * radius), len(sprite) / 2 - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def warp(image: np.ndarray, turn: float) -> np.ndarray:
        a, b = scale * math.cos(turn), scale * math.sin(turn)
        dx, dy = left - x + 0.5, top - y + 0.5
        matrix = np.array([[a, b, a * dx + b * dy + centre], [-b, a, -b * dx + a * dy + centre]])
        return cv2.warpAffine(image, matrix, size, flags=flags)

    turned, lit = warp(sprite, angle), warp(light, 0.0)
    cover = turned[..., 3:]
    patch = frame[top:bottom, left:right]
    patch += cover * (turned[..., :3] * lit[..., :1] + lit[..., 1:] - patch)


def _shadow(frame: np.ndarray, x: float, y: float, width: float, height: float, strength: float):
    """Darkens a soft ellipse around (x, y), in pixels."""
    left, top = max(0, math.floor(x - 2 * width)), max(0, math.floor(y - 2 * height))
    right = min(frame.shape[1], math.ceil(x + 2 * width))
    bottom = min(frame.shape[0], math.ceil(y + 2 * height))
    if left >= right or top >= bottom:
        return
    across = np.exp(-(((np.arange(left, right) + 0.5 - x) / width) ** 2), dtype=np.float32)
    down = np.exp(-(((np.arange(top, bottom) + 0.5 - y) / height) ** 2), dtype=np.float32)
    frame[top:bottom, left:right] *= (1 - strength * down[:, None] * across)[..., None]


def render(
    rng: np.random.Generator, scene: Scene, seconds: float, fps: float, side: int
) -> UInt8[np.ndarray, 't h w 3']:
    """Frame i shows the moment i / fps."""
    background = _background(rng, scene, side)
    sprites = [_sprite(rng, scene.material, radius * side) for radius in scene.radius]
    frames = np.empty((max(1, round(seconds * fps)), side, side, 3), np.uint8)
    for i in range(len(frames)):
        step = min(round(i / fps * STEPS_PER_SECOND), len(scene.x) - 1)
        frame = background.copy()
        for body, radius in enumerate(scene.radius * side):
            x, y = scene.x[step, body] * side, scene.y[step, body] * side
            if scene.ground is None:
                _shadow(frame, x + 0.25 * radius, y + 0.3 * radius, radius, radius, 0.45)
            else:
                ground = float(scene.ground(scene.x[step, body])) * side
                height = max(0.0, (ground - y) / radius - 1)  # In radii above the ground.
                _shadow(frame, x, ground + 1, radius * (1 + 0.1 * height), 0.28 * radius + 1, 0.5 / (1 + 0.5 * height))
        for body, radius in enumerate(scene.radius * side):
            x, y = scene.x[step, body] * side, scene.y[step, body] * side
            _blend(frame, *sprites[body], x, y, radius, scene.angle[step, body])
        np.clip(frame, 0, 255, out=frame)
        frames[i] = np.rint(frame)
    return frames
