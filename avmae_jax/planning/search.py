"""Which layouts are worth compiling, and in which order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from avmae_jax.planning.result import Layout, Plan, rank

REMAT = ('none', 'dots', 'full')  # From what takes most memory and least time to the opposite.
MAX_GROUP = 64  # Chips that share one copy of the state: beyond it shards get too small to be gathered fast.


def meshes(
    num_chips: int, num_islands: int, rules: Mapping[str, Mapping[str, str]], max_model: int = 8
) -> Iterator[tuple[str, dict[str, int]]]:
    """(rules, mesh) of every sensible way to spread a state over so many chips.

    Args:
      num_islands: slices of TPUs or hosts with GPUs; over the network between them a state is not split.
      rules: name -> dimension -> mesh axis, see `parallel/rules.py`.
      max_model: the most chips to split a layer over.
    """
    for name, table in rules.items():
        axes = set(table.values())
        island = num_chips // num_islands
        for model in _powers(min(max_model, island), 2) if 'model' in axes else [1]:
            if island % model:
                continue
            rest = island // model
            # Groups of two or three share so little that they are for islands that have no more.
            shared = [data for data in _powers(min(MAX_GROUP, rest), 4) if rest % data == 0]
            if not shared and 1 < rest <= MAX_GROUP:
                shared = [rest]
            for data in shared if 'data' in axes else [rest]:
                yield name, {'replica': num_chips // data // model, 'data': data, 'model': model}


def _powers(most: int, least: int) -> list[int]:
    return [2**i for i in range(int(math.log2(max(most, 1))) + 1) if 2**i >= least]


def layouts(
    spread: Iterable[tuple[str, Mapping[str, int]]], batch_size: int, remat: Sequence[str] = REMAT, max_parts: int = 16
) -> Iterator[list[Layout]]:
    """For each way to spread the state, layouts from the one that should be fastest to the one that needs least memory.

    More parts of a batch cost more gathering of weights, and rematerialisation more computing; the cheaper comes first.
    """
    for rules, mesh in spread:
        rows = mesh['replica'] * mesh['data']
        found = [
            Layout(dict(mesh), rules, parts, policy)
            for parts in _powers(max_parts, 1)
            if batch_size % (rows * parts) == 0
            for policy in remat
        ]
        if found:
            # A second forward pass is a third more computing, about as much as gathering the weights four times over.
            yield sorted(found, key=lambda each: REMAT.index(each.remat) + math.log2(each.accumulate_steps))


@dataclasses.dataclass
class _Way:
    """A way to spread the state.

    Attributes:
      left: layouts that were not compiled, the one that should be fastest first.
      best: that was compiled and fits.
    """

    left: list[Layout]
    num_compiled: int = 0
    best: Plan | None = None

    def take(self, plan: Plan) -> None:
        self.num_compiled += 1
        if not plan.memory.fits:
            return
        self.best = min((each for each in (self.best, plan) if each is not None), key=rank)
        # More parts cost time, unless less is computed again for them; that may also save traffic of HBM, and time.
        parts, again = plan.layout.accumulate_steps, REMAT.index(plan.layout.remat)
        self.left = [each for each in self.left if each.accumulate_steps <= parts or REMAT.index(each.remat) < again]


EXPLORING = 2 / 3  # Of all compiles, where something was found that fits: the rest improves what came out best.
SLACK = 1.05  # What one layout takes beside the state another takes too, more or less.


def search(
    ways: Iterable[Sequence[Layout]],
    *,
    bound: Callable[[Layout], tuple[float | int, float]],
    compile_layout: Callable[[Layout], Plan],
    memory_limit: float | int,
    max_compiles: int,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Compiles the layouts that may be the best; gives all that were compiled, the best first.

    Ways to spread the state take turns until something of each fits; the last third of `max_compiles` goes to other
    rematerialisation in the ways that came out best. What cannot fit, by its state or by what another took, or cannot
    be faster than what was found, is passed over without compiling.

    Args:
      bound: least (bytes of HBM, seconds a step) of a layout, computed without compiling.
      max_compiles: how often to compile at most.
      tell: gets each plan when it is there.
    """
    spread = [_Way([each for each in way if bound(each)[0] <= memory_limit]) for way in ways]
    plans: list[Plan] = []

    def is_too_much(layout: Layout) -> bool:
        """Whether another that computes as much again, of smaller layers, took too much to hope for this one."""
        for plan in plans:
            tried, beside = plan.layout, plan.memory.peak - bound(plan.layout)[0]
            if plan.memory.fits or math.isinf(beside) or tried.mesh['model'] < layout.mesh['model']:
                continue
            if REMAT.index(tried.remat) < REMAT.index(layout.remat):
                continue
            beside *= min(1.0, tried.accumulate_steps / layout.accumulate_steps)
            if bound(layout)[0] + beside > SLACK * memory_limit:
                return True
        return False

    while len(plans) < max_compiles and (waiting := [way for way in spread if way.left]):
        fastest = min((plan.time.step for plan in plans if plan.memory.fits and plan.time), default=math.inf)
        improving = math.isfinite(fastest) and len(plans) >= EXPLORING * max_compiles

        def turn(way: _Way, improving: bool = improving) -> tuple[bool, float | int]:
            if way.best is None:
                return improving, way.num_compiled
            return not improving, rank(way.best)[1]

        way = min(waiting, key=turn)
        layout = way.left.pop(0)
        if bound(layout)[1] >= fastest or is_too_much(layout):
            continue
        plan = compile_layout(layout)
        plans.append(plan)
        way.take(plan)
        tell(plan)
    return sorted(plans, key=rank)
