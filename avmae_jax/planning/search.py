"""Which layouts are worth compiling, and in which order."""

from __future__ import annotations

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
        models = _powers(min(max_model, num_chips // num_islands), 2) if 'model' in axes else [1]
        for model in models:
            rest = num_chips // model
            whole_island = rest // num_islands
            shards = [each for each in _powers(min(MAX_GROUP, whole_island), 4) if 'data' in axes] or [1]
            for data in shards if 'data' in axes else [whole_island]:
                if rest % data == 0:
                    yield name, {'replica': rest // data, 'data': data, 'model': model}


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

    Of each way to spread the state the first layout that fits is kept. What cannot fit, or cannot be faster than what
    was found, is passed over without compiling.

    Args:
      bound: least (bytes of HBM, seconds a step) of a layout, computed without compiling.
      max_compiles: how often to compile at most.
      tell: gets each plan when it is there.
    """
    candidates: list[list[Layout]] = []
    for way in ways:
        possible = [each for each in way if bound(each)[0] <= memory_limit]
        if possible:
            candidates.append(possible)
    candidates.sort(key=lambda way: bound(way[0])[1])
    plans: list[Plan] = []
    for way in candidates:
        for layout in way:
            if len(plans) >= max_compiles:
                return sorted(plans, key=rank)
            best = min((plan.time.step for plan in plans if plan.memory.fits and plan.time), default=math.inf)
            if bound(layout)[1] >= best:
                continue
            plan = compile_layout(layout)
            plans.append(plan)
            tell(plan)
            if plan.memory.fits:
                break
    return sorted(plans, key=rank)
