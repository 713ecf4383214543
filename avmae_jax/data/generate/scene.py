"""What happens in a made-up clip: which bodies there are, how they move, when and how hard they touch.

Places are in picture coordinates: x to the right and y downwards, 1 is the side of the picture. Everything
here is plain arithmetic on numbers drawn from one generator, so that a seed gives the same clip everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STEPS_PER_SECOND = 500  # Of the simulation: 2 ms, a fraction of the 40 ms that a frame lasts at 25 fps.
MATERIALS = ('rubber', 'wood', 'metal')
SMALLEST_RADIUS, LARGEST_RADIUS = 0.1, 0.21  # Of bodies, in picture sides, seen from distance 1.
SILENT_SPEED = 0.06  # Contacts slower than this are not heard.


class Contact(NamedTuple):
    """A touch that sounds.

    Attributes:
      seconds: when.
      body: which of the scene's bodies sounds; two bodies that meet give two contacts.
      x: where, from 0 (left) to 1 (right).
      speed: how fast the surfaces approached, in picture sides a second.
    """

    seconds: float
    body: int
    x: float
    speed: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that picture and sound are made from.

    Attributes:
      material: of all bodies; with `motion` it makes the label.
      motion: a key of MOTIONS.
      distance: of the camera, 1 to 1.6: divides sizes and speeds on the picture and dampens the sound.
      radius: [bodies] on the picture.
      x, y, angle: [steps + 1, bodies] centre and rotation (radians) at STEPS_PER_SECOND.
      contacts: in the order of time.
      ground: x -> y of the ground, or None when it is a table seen from above.
      walls: (left, top, right, bottom) of the room or the table.
    """

    material: str
    motion: str
    distance: float
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    contacts: tuple[Contact, ...]
    ground: Callable[[np.ndarray], np.ndarray] | None
    walls: tuple[float, float, float, float]

    @property
    def label(self) -> str:
        return f'{self.material}-{self.motion}'

    @property
    def sizes(self) -> np.ndarray:
        """[bodies] radius as it would be at distance 1: what the pitch follows."""
        return self.radius * self.distance


class _Body:
    """One moving disc while it is simulated: shapes only differ in how they look and sound."""

    __slots__ = ('x', 'y', 'vx', 'vy', 'angle', 'spin', 'radius')

    def __init__(self, x: float, y: float, vx: float, vy: float, angle: float, spin: float, radius: float):
        self.x, self.y, self.vx, self.vy = x, y, vx, vy
        self.angle, self.spin, self.radius = angle, spin, radius


class _Recorder:
    """Collects contacts, one per body and 30 ms: resting bodies would chatter at every step."""

    def __init__(self) -> None:
        self.contacts: list[Contact] = []
        self._last: dict[int, float] = {}

    def __call__(self, seconds: float, body: int, x: float, speed: float) -> None:
        if speed > SILENT_SPEED and seconds - self._last.get(body, -1.0) > 0.03:
            self.contacts.append(Contact(seconds, body, min(max(x, 0.0), 1.0), speed))
            self._last[body] = seconds


def _collide(bodies: list[_Body], bounciness: float, touch: _Recorder, seconds: float) -> None:
    """Pushes overlapping discs apart and exchanges momentum along the line between them; mass is area."""
    for i, a in enumerate(bodies):
        for j in range(i + 1, len(bodies)):
            b = bodies[j]
            dx, dy, reach = b.x - a.x, b.y - a.y, a.radius + b.radius
            squared = dx * dx + dy * dy
            if squared >= reach * reach or squared == 0:
                continue
            gap = math.sqrt(squared)
            nx, ny = dx / gap, dy / gap
            mass_a, mass_b = a.radius**2, b.radius**2
            share = mass_b / (mass_a + mass_b)
            overlap = reach - gap
            a.x, a.y = a.x - nx * overlap * share, a.y - ny * overlap * share
            b.x, b.y = b.x + nx * overlap * (1 - share), b.y + ny * overlap * (1 - share)
            approach = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
            if approach <= 0:
                continue
            push = (1 + bounciness) * approach
            a.vx, a.vy = a.vx - push * share * nx, a.vy - push * share * ny
            b.vx, b.vy = b.vx + push * (1 - share) * nx, b.vy + push * (1 - share) * ny
            x = a.x + nx * a.radius
            touch(seconds, i, x, approach)
            touch(seconds, j, x, approach)


def _hit_side_walls(body: _Body, left: float, right: float, bounciness: float) -> float:
    """Keeps a body between the side walls; the speed of the hit, 0 without one."""
    low, high = left + body.radius, right - body.radius
    if (body.x < low and body.vx < 0) or (body.x > high and body.vx > 0):
        speed = abs(body.vx)
        body.x = min(max(body.x, low), high)
        body.vx *= -bounciness
        return speed
    return 0.0


def _place_apart(rng: np.random.Generator, radii: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[bodies 2] centres in a box, farther apart than they are large where chance allows it."""
    low, high = low + radii.max() * 1.05, high - radii.max() * 1.05
    for _ in range(50):
        centres = rng.uniform(low, np.maximum(high, low + 1e-3), (len(radii), 2))
        gaps = np.hypot(*np.moveaxis(centres[:, None] - centres[None], -1, 0)) + 9 * np.eye(len(radii))
        if gaps.min() > 2.1 * radii.max():
            break
    return centres


def _bounce(rng, radii, distance, bounciness, num_steps, touch):
    """Bodies fall onto a floor, bounce until they rest, and are then kicked up again."""
    floor = 0.93 - 0.16 * (distance - 1)
    gravity = rng.uniform(3.2, 4.6) / distance
    walls = (0.0, 0.0, 1.0, floor)
    centres = _place_apart(rng, radii, np.array([0.0, 0.02]), np.array([1.0, 0.55]))
    bodies = [
        _Body(x, y, rng.uniform(-0.7, 0.7) / distance, rng.uniform(-0.6, 0.4), rng.uniform(0, 6.3), rng.normal() * 3, r)
        for (x, y), r in zip(centres.tolist(), radii.tolist(), strict=True)
    ]
    kicks = rng.uniform((-0.8, 0.65), (0.8, 0.95), (64, 2)).tolist()
    dt, num_kicks = 1 / STEPS_PER_SECOND, 0

    def step(seconds: float) -> None:
        nonlocal num_kicks
        for i, body in enumerate(bodies):
            body.vy += gravity * dt
            body.x += body.vx * dt
            body.y += body.vy * dt
            body.angle += body.spin * dt
            touch(seconds, i, body.x, _hit_side_walls(body, 0.0, 1.0, bounciness))
            if body.y > floor - body.radius and body.vy > 0:
                body.y = floor - body.radius
                touch(seconds, i, body.x, body.vy)
                body.vy *= -bounciness
                body.spin += 0.6 * (body.vx / body.radius - body.spin)
                if -body.vy < 0.22 / distance:
                    across, up = kicks[num_kicks % len(kicks)]
                    num_kicks += 1
                    body.vx, body.vy = across / distance, -up * math.sqrt(2 * gravity * (floor - 0.15))
                    body.spin = body.vx / body.radius
                    touch(seconds, i, body.x, -body.vy)
        _collide(bodies, bounciness, touch, seconds)

    return bodies, step, (lambda x: np.full_like(x, floor)), walls


def _roll(rng, radii, distance, bounciness, num_steps, touch):
    """Bodies roll to and fro in a valley and knock against each other in its middle."""
    floor = 0.93 - 0.14 * (distance - 1)
    depth = rng.uniform(0.9, 1.5) / distance  # The ground is floor - depth * (x - middle)^2.
    middle, pull = rng.uniform(0.42, 0.58), rng.uniform(9.0, 22.0)
    order = rng.permutation(len(radii))
    starts = np.linspace(0.12, 0.88, len(radii)) if len(radii) > 1 else rng.choice([0.1, 0.9], 1)
    starts = starts + rng.uniform(-0.04, 0.04, len(radii))
    bodies = [
        _Body(float(starts[i]), 0.0, rng.normal() * 0.4, 0.0, rng.uniform(0, 6.3), 0.0, float(radii[order[i]]))
        for i in range(len(radii))
    ]
    dt = 1 / STEPS_PER_SECOND

    def step(seconds: float) -> None:
        for i, body in enumerate(bodies):
            body.vx += (-pull * (body.x - middle) - 0.15 * body.vx) * dt
            body.x += body.vx * dt
            body.angle += body.vx / body.radius * dt
            touch(seconds, i, body.x, _hit_side_walls(body, 0.0, 1.0, bounciness))
        for body in bodies:
            body.y, body.vy = floor - depth * (body.x - middle) ** 2 - body.radius, 0.0
        _collide(bodies, 0.5 + 0.5 * bounciness, touch, seconds)
        for body in bodies:
            body.y, body.vy = floor - depth * (body.x - middle) ** 2 - body.radius, 0.0

    step(0.0)
    return bodies, step, (lambda x: floor - depth * (x - middle) ** 2), (0.0, 0.0, 1.0, 1.0)


def _glide(rng, radii, distance, bounciness, num_steps, touch):
    """Bodies glide without friction over a table seen from above, from rim to rim."""
    inset = 0.04 + 0.09 * (distance - 1)
    low, high = inset, 1 - inset
    centres = _place_apart(rng, radii, np.array([low, low]), np.array([high, high]))
    bodies = []
    for (x, y), r in zip(centres.tolist(), radii.tolist(), strict=True):
        speed, heading = rng.uniform(0.5, 1.3) / distance, rng.uniform(0, 2 * math.pi)
        vx, vy = speed * math.cos(heading), speed * math.sin(heading)
        bodies.append(_Body(x, y, vx, vy, rng.uniform(0, 6.3), rng.normal() * 2, r))
    dt = 1 / STEPS_PER_SECOND

    def step(seconds: float) -> None:
        for i, body in enumerate(bodies):
            body.x += body.vx * dt
            body.y += body.vy * dt
            body.angle += body.spin * dt
            speed = _hit_side_walls(body, low, high, 0.97)
            body.x, body.y, body.vx, body.vy = body.y, body.x, body.vy, body.vx  # The same for top and bottom.
            speed = max(speed, _hit_side_walls(body, low, high, 0.97))
            body.x, body.y, body.vx, body.vy = body.y, body.x, body.vy, body.vx
            if speed:
                body.spin *= -0.8
                touch(seconds, i, body.x, speed)
        _collide(bodies, 0.97, touch, seconds)

    return bodies, step, None, (low, low, high, high)


MOTIONS = {'bounce': _bounce, 'roll': _roll, 'glide': _glide}
BOUNCINESS = {'rubber': 0.84, 'wood': 0.6, 'metal': 0.72}
LABELS = tuple(f'{material}-{motion}' for material in MATERIALS for motion in MOTIONS)


def simulate(rng: np.random.Generator, label: str, seconds: float) -> Scene:
    """Draws a scene of this label and lets it happen."""
    if label not in LABELS:
        raise ValueError(f'label is {label!r}; there are {", ".join(LABELS)}.')
    material, motion = label.split('-')
    distance = float(rng.uniform(1.0, 1.6))
    num_bodies = int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.3]))
    # Evenly on a logarithmic scale, as pitch is heard.
    radii = SMALLEST_RADIUS * (LARGEST_RADIUS / SMALLEST_RADIUS) ** rng.uniform(0, 1, num_bodies) / distance
    num_steps = round(seconds * STEPS_PER_SECOND)
    touch = _Recorder()
    bodies, step, ground, walls = MOTIONS[motion](rng, radii, distance, BOUNCINESS[material], num_steps, touch)
    track = [[(body.x, body.y, body.angle) for body in bodies]]
    for i in range(num_steps):
        step((i + 1) / STEPS_PER_SECOND)
        track.append([(body.x, body.y, body.angle) for body in bodies])
    x, y, angle = np.moveaxis(np.array(track), -1, 0)
    return Scene(
        material=material,
        motion=motion,
        distance=distance,
        radius=np.array([body.radius for body in bodies]),
        x=x,
        y=y,
        angle=angle,
        contacts=tuple(touch.contacts),
        ground=ground,
        walls=walls,
    )
