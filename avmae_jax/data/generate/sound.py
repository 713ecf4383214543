"""The sound of a scene: every contact rings the body that was hit, and what rolls or glides is heard."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int16

from avmae_jax.data.generate.scene import LARGEST_RADIUS, STEPS_PER_SECOND, Scene


@dataclasses.dataclass(frozen=True)
class Timbre:
    """How a material sounds.

    Attributes:
      lowest_hz: pitch of the largest body; half the size sounds an octave higher.
      modes: frequencies of its vibrations, as multiples of the lowest.
      decay_seconds: until the lowest mode has fallen to 1/e; higher modes die sooner.
      click: share of noise at the moment of contact.
      moving_hz: pitch of the largest body rolling or gliding one picture side a second.
      breath: share of noise in that sound.
      bumps: corners that knock in one turn of rolling; 0 rolls smoothly.
    """

    lowest_hz: float
    modes: tuple[float, ...]
    decay_seconds: float
    click: float
    moving_hz: float
    breath: float
    bumps: int


TIMBRES = {
    'rubber': Timbre(95.0, (1.0, 1.59, 2.14), 0.07, 0.1, moving_hz=75.0, breath=0.08, bumps=0),
    'wood': Timbre(360.0, (1.0, 2.57, 4.95), 0.035, 0.5, moving_hz=150.0, breath=0.5, bumps=4),
    'metal': Timbre(640.0, (1.0, 1.48, 2.09, 2.76, 3.41, 4.23), 0.45, 0.2, moving_hz=320.0, breath=0.15, bumps=8),
}
MAX_RING_SECONDS = 1.5


def _ring(rng: np.random.Generator, timbre: Timbre, size: float, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """A body's answer to a soft and to a hard touch, float32 [l] each: hard ones are brighter."""
    base = timbre.lowest_hz * LARGEST_RADIUS / size
    time = np.arange(int(min(MAX_RING_SECONDS, 6 * timbre.decay_seconds) * rate), dtype=np.float32) / rate
    soft, hard = np.zeros_like(time), np.zeros_like(time)
    for number, mode in enumerate(timbre.modes):
        hz = base * mode * (1 + 0.01 * rng.normal())
        if hz > 0.45 * rate:
            continue
        wave = np.sin(np.float32(2 * math.pi * hz) * time) * np.exp(
            -time * np.float32(mode**0.7 / timbre.decay_seconds)
        )
        soft += wave * 0.45**number
        hard += wave * 0.85**number
    click = rng.normal(size=len(time)).astype(np.float32) * np.exp(-time / np.float32(0.004))
    fade = np.minimum(1, (time[-1] - time) / np.float32(0.01))  # No step where the tail is cut off.
    return (soft + 0.3 * timbre.click * click) * fade, (hard + timbre.click * click) * fade


def _pan(x: Float[np.ndarray, '*l']) -> Float[np.ndarray, '*l 2']:
    """Gains of left and right, of constant power over the place from 0 to 1."""
    # From 0.05 to 0.95 of the quarter circle: what is at the rim is still heard faintly on the other side.
    turn = (0.05 + 0.9 * np.clip(x, 0, 1)) * (math.pi / 2)
    return np.stack([np.cos(turn), np.sin(turn)], axis=-1).astype(np.float32)


def _shaped_noise(rng: np.random.Generator, num_samples: int, rate: int, slope: float) -> Float[np.ndarray, 'l']:
    """Noise of unit power whose amplitude falls as frequency**-slope."""
    size = 1 << max(8, (num_samples - 1).bit_length())  # Powers of two: FFTs of odd lengths can be 20 times slower.
    spectrum = np.fft.rfft(rng.normal(size=size).astype(np.float32))
    hz = np.fft.rfftfreq(size, 1 / rate)
    noise = np.fft.irfft(spectrum * np.maximum(hz, 40.0) ** -slope, size)[:num_samples]
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def _moving_sound(rng: np.random.Generator, scene: Scene, num_samples: int, rate: int) -> Float[np.ndarray, 'l 2']:
    """What rolls or glides hums and breathes; pitch and loudness rise with its speed."""
    mix = np.zeros((num_samples, 2), np.float32)
    if scene.motion == 'bounce':
        return mix
    timbre = TIMBRES[scene.material]
    at = np.arange(num_samples) * (STEPS_PER_SECOND / rate)
    steps = np.arange(len(scene.x))
    breath = timbre.breath * _shaped_noise(rng, num_samples, rate, slope=0.5)
    for body, size in enumerate(scene.sizes):
        x, y = scene.x[:, body] * scene.distance, scene.y[:, body] * scene.distance
        stride = np.hypot(np.gradient(x), np.gradient(y))
        # The phase follows the way that was travelled, so that the pitch is exactly the speed that is seen.
        travelled = np.interp(at, steps, np.cumsum(stride))
        phase = travelled * (2 * math.pi * timbre.moving_hz * (LARGEST_RADIUS / size) ** 0.7)
        tone = sum(
            np.sin((mode * phase % (2 * math.pi)).astype(np.float32)) * 0.6**number
            for number, mode in enumerate(timbre.modes[:3])
        )
        sound = np.minimum(np.interp(at, steps, stride * STEPS_PER_SECOND).astype(np.float32), 1.5) * (tone + breath)
        if scene.motion == 'roll' and timbre.bumps:
            angle = np.interp(at, steps, scene.angle[:, body])
            sound *= (0.5 + 0.5 * np.cos(timbre.bumps * angle).astype(np.float32)) ** 2
        mix += 0.06 * sound[:, None] * _pan(np.interp(at, steps, scene.x[:, body]))
    return mix


def synthesize(rng: np.random.Generator, scene: Scene, seconds: float, sample_rate: int) -> Int16[np.ndarray, 'l 2']:
    """Left and right of the scene; sample i sounds at i / sample_rate seconds."""
    num_samples = round(seconds * sample_rate)
    timbre = TIMBRES[scene.material]
    rings = [_ring(rng, timbre, size, sample_rate) for size in scene.sizes]
    mix = _moving_sound(rng, scene, num_samples, sample_rate)
    for contact in scene.contacts:
        start = round(contact.seconds * sample_rate)
        soft, hard = rings[contact.body]
        speed = min(contact.speed * scene.distance / 2.0, 1.0)  # 2 is about the fastest fall.
        count = min(len(soft), num_samples - start)
        if count <= 0:
            continue
        brightness = np.float32(speed)
        ring = (soft[:count] * (1 - brightness) + hard[:count] * brightness) * np.float32(0.5 * speed**1.2)
        mix[start : start + count] += ring[:, None] * _pan(np.array(contact.x))
    mix *= np.float32(scene.distance**-1.5)
    room = _shaped_noise(rng, num_samples, sample_rate, slope=1.0)
    mix += (room * np.float32(10 ** rng.uniform(-3.0, -2.4)))[:, None]
    return np.rint(np.tanh(mix) * 32000).astype(np.int16)
