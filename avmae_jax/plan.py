"""Compiles the training step for machines that are not here; tells what it takes of memory, network, time and money.

    python -m avmae_jax.plan --config=configs/pretrain/audioset.py:size=B --topology=v5e:4x4
    python -m avmae_jax.plan --config=configs/pretrain/audioset.py:size=L --topology=v5e:16x16 --num_slices=2 \
        --config.parallel.replica=32 --price=1.2 --output=plan
    python -m avmae_jax.plan --config=configs/pretrain/audioset.py:size=L --topology=v5e:8x8 --search
    python -m avmae_jax.plan --config=configs/pretrain/audioset.py:size=L --topology=h200:4x8 \
        --config.parallel.replica=4

The step is the one that `python -m avmae_jax.train` would compile there, and the compiler is the TPU's own (`pip
install 'avmae_jax[plan]'`) or, for hosts x GPUs, jax's for NVIDIA (`'avmae_jax[cuda]'`); neither a TPU, nor a GPU, nor
data is needed. Without config.data.path, a dataset of the catalogue is taken that the config's file is named after, or
--num_clips clips. --output gets plan.json and plan.png, and with --search all that was tried, search.json.

Exit codes: 0 it fits; 1 it does not; 2 a setting is wrong; 3 the compiler failed; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath

from avmae_jax import checks, experiment, settings, starts
from avmae_jax.data import catalogue
from avmae_jax.data.described import Described
from avmae_jax.data.mixing import Mixture
from avmae_jax.evaluation import drawing
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.planning import estimate, hlo, result, search
from avmae_jax.planning import topology as topology_lib

_CONFIG = flags.DEFINE_string('config', None, 'File with get_config(), and its arguments after a colon.')
_TOPOLOGY = flags.DEFINE_string('topology', None, f'Chip and shape of a slice: {topology_lib.EXAMPLES}.')
_NUM_SLICES = flags.DEFINE_integer('num_slices', 1, 'Slices that are joined by the network between hosts.')
_PRICE = flags.DEFINE_float('price', None, 'Of an hour of one chip, in any currency.', lower_bound=0)
_SEARCH = flags.DEFINE_bool('search', False, 'Try meshes, rules, accumulation and rematerialisation; rank what fits.')
_MAX_COMPILES = flags.DEFINE_integer('max_compiles', 12, 'How often --search compiles at most.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for JSON and a picture.')
_DATASET = flags.DEFINE_string('dataset', None, f'Of the catalogue: {", ".join(catalogue.DATASETS)}.')
_NUM_CLIPS = flags.DEFINE_integer('num_clips', None, 'Clips to train on, of a dataset that is in no catalogue.')
_NUM_CLASSES = flags.DEFINE_multi_string('num_classes', [], 'HEAD=COUNT, of a dataset that is in no catalogue.')


class ExitCode(enum.IntEnum):
    FITS = 0
    DOES_NOT_FIT = 1
    SETTINGS = 2
    COMPILER = 3
    INTERRUPTED = 130


# -- Data that nobody has prepared yet --


def describe_data(
    config: settings.Config, file: str, dataset: str | None, num_clips: int | None, num_classes: Mapping[str, int]
) -> Mixture:
    """The clips of config.data.path, or such as they would be.

    Args:
      file: of the config; without `dataset`, the one that its name begins with.
      num_clips, num_classes: in place of what the catalogue says.
    """
    if config['data']['path']:
        return experiment.open_train_sources(config)
    if dataset is None:
        stem = pathlib.Path(file.partition(':')[0]).stem
        dataset = next((name for name in catalogue.DATASETS if stem.startswith(name)), None)
    known = None if dataset is None else settings.choose_flag(catalogue.DATASETS, 'dataset', dataset)
    if known is None and num_clips is None:
        raise ValueError(
            f'--config={file}: how many clips? Give --num_clips=N, --dataset=({"|".join(catalogue.DATASETS)}) or '
            'config.data.path.'
        )
    heads = config['objective'].get('heads', {})
    classes = {**({} if known is None else known.num_classes), **num_classes}
    for head in heads:
        if head not in classes:
            raise ValueError(
                f'--num_classes={head}=N: how many classes has {head!r}, which config.objective.heads asks?'
            )
    if num_clips is None:
        assert known is not None
        split = config['data']['split']
        counts = [known.num_clips.get(part, known.num_clips.get('train', 0)) for part in split.split('+')]
        num_clips = sum(counts)
    legacy = config['data'].get('legacy')
    described = Described(
        dataset or pathlib.Path(file.partition(':')[0]).stem,
        num_clips,
        classes={head: classes[head] for head in heads},
        multi_label='sigmoid' in heads.values(),
        image={'image', 'audio'} & set(config) == {'image'},
        clip_seconds=None if known is None else known.clip_seconds,
        spectrogram_shape=None if legacy is None else tuple(legacy['spectrogram_shape']),
        conventions=(config['preprocess'].get('convention', ''),),
    )
    return Mixture([described])


# -- One plan --


class Planner:
    """Compiles one config for one topology, under any layout."""

    def __init__(
        self, title: str, config: settings.Config, source: Mixture, topology: topology_lib.Topology, price: float | None
    ):
        self.title, self.config, self.source = title, config, source
        self.topology, self.price = topology, price
        self.parts = experiment.build(config, source)
        self.init = experiment.make_init(self.parts)  # Of a state that is the same, however it is laid out.
        self._given: dict[str, estimate.Memory] = {}
        self._bounds: dict[str, tuple[float | int, float]] = {}
        self._refused: set[str] = set()

    def laid_out(self, layout: result.Layout) -> settings.Config:
        values: dict[str, Any] = {f'parallel.{axis}': size for axis, size in layout.mesh.items()}
        values |= {'parallel.rules': layout.rules, 'optimizer.accumulate_steps': layout.accumulate_steps}
        return settings.override(self.config, {**values, 'model.compute.remat': layout.remat})

    def layout(self) -> result.Layout:
        """That of the config."""
        sizes = {axis: self.config['parallel'][axis] for axis in mesh_lib.AXES}
        mesh = mesh_lib.make_mesh(**sizes, devices=self.topology.devices)
        return result.Layout(
            dict(mesh.shape),
            self.config['parallel']['rules'],
            self.config['optimizer']['accumulate_steps'],
            self.config['model']['compute']['remat'],
        )

    def check(self, layout: result.Layout) -> tuple[settings.Config, jax.sharding.Mesh]:
        """The config and its mesh; raises ValueError where the layout does not suit the config."""
        config = self.laid_out(layout)
        mesh = mesh_lib.make_mesh(**layout.mesh, devices=self.topology.devices)
        checks.check(config, self.source)
        checks.check_devices(config, mesh)
        return config, mesh

    def prepare(self, layout: result.Layout) -> tuple[settings.Config, experiment.Parts, experiment.Placed]:
        """All that compiling needs."""
        config, mesh = self.check(layout)
        parts = experiment.build(config, self.source)
        return config, parts, experiment.place(config, self.init, mesh)

    def given(self, config: settings.Config, parts: experiment.Parts, placed: experiment.Placed) -> estimate.Memory:
        """What the state and the batch take."""
        batch = experiment.abstract_batch(config, parts.view, self.source, placed.rows)
        return estimate.given_memory(placed.state, batch, self.topology.chip.memory_bytes)

    def chip_flops(self, layout: result.Layout) -> float:
        """What each chip computes in a step, with what rematerialisation repeats."""
        repeated = layout.remat == 'full'
        return experiment.step_flops(self.config, self.parts, repeated=repeated) / len(self.topology.devices)

    def bound(self, layout: result.Layout) -> tuple[float | int, float]:
        """Least bytes of HBM and seconds of a step: the state, its gradients, and the matrix products."""
        if str(layout) not in self._bounds:
            try:
                self.check(layout)
                self._bounds[str(layout)] = self._bound(layout)
            except ValueError as error:
                if str(error) not in self._refused:  # Many layouts are refused for the same.
                    logging.info('Not tried: %s', error)
                self._refused.add(str(error))
                self._bounds[str(layout)] = math.inf, math.inf
        return self._bounds[str(layout)]

    def _bound(self, layout: result.Layout) -> tuple[float | int, float]:
        spread = f'{layout.rules} {layout.mesh}'  # The state lies alike, whatever else a layout says.
        if spread not in self._given:
            config, mesh = self.check(layout)
            self._given[spread] = self.given(config, self.parts, experiment.place(config, self.init, mesh))
        given = self._given[spread]
        seconds = self.chip_flops(layout) / self.topology.chip.flops_per_second
        return given.parameters * 2 + given.optimizer + given.teacher + given.batch, seconds

    def uncompiled(
        self, layout: result.Layout, config: settings.Config, parts: experiment.Parts, placed: experiment.Placed
    ) -> result.Plan:
        """What is known without compiling."""
        return result.Plan(
            title=self.title,
            topology=self.topology,
            layout=layout,
            batch_size=config['batch_size'],
            num_steps=parts.length.num_steps,
            num_parameters=sum(leaf.size for leaf in jax.tree.leaves(placed.state.params)),
            clip_flops=experiment.step_flops(config, parts) / config['batch_size'],
            chip_flops=self.chip_flops(layout),
            memory=self.given(config, parts, placed),
        )

    def plan(self, layout: result.Layout) -> result.Plan:
        """Compiles the step."""
        config, parts, placed = self.prepare(layout)
        began = time.monotonic()
        plan = self.uncompiled(layout, config, parts, placed)
        memory = plan.memory
        try:
            compiled = experiment.compile_step(config, parts, self.source, placed)
        except Exception as error:  # Whatever one layout meets, a search goes on with the next.
            plan = dataclasses.replace(plan, compile_seconds=time.monotonic() - began)
            logging.debug('The compiler says:', exc_info=True)
            wanted = estimate.wanted_bytes(str(error))
            if wanted is None:
                return dataclasses.replace(plan, failure=f'{type(error).__name__}: {str(error).strip()}')
            if wanted <= memory.limit:  # Of the temporary memory alone, the rest comes on top.
                wanted += memory.parameters + memory.optimizer + memory.teacher
            return dataclasses.replace(plan, memory=dataclasses.replace(memory, wanted=wanted))
        seconds = time.monotonic() - began
        text = compiled.as_text()
        found = hlo.collectives(text)
        moved = hlo.memory_traffic(text)
        rows = estimate.traffic(found, list(placed.rows.mesh.devices.flat), self.topology)
        taken = estimate.step_time(self.topology, flops=self.chip_flops(layout), memory_bytes=moved, rows=rows)
        frames = config['video']['num_frames'] if 'video' in config else int('image' in config)
        return dataclasses.replace(
            plan,
            memory=estimate.compiled_memory(memory, compiled.memory_analysis()),
            compile_seconds=seconds,
            memory_bytes=moved,
            collectives=tuple(rows),
            gradient_bytes=hlo.gradient_dtypes(found),
            time=taken,
            run=estimate.whole_run(
                self.topology,
                step_seconds=taken.step,
                batch_size=config['batch_size'],
                num_steps=parts.length.num_steps,
                step_flops=plan.clip_flops * config['batch_size'],
                clip_cpu_seconds=estimate.clip_cpu_seconds(frames, config['data']['views_per_clip']),
                price=self.price,
            ),
        )

    def search(self, max_compiles: int) -> list[result.Plan]:
        """The layouts that were compiled, the best first; without any, the one that comes closest to fitting."""
        checks.check(self.config, self.source)
        checks.check_attention(self.config, self.topology.devices[0].platform)  # The same in every layout.
        num_chips, limit = len(self.topology.devices), self.topology.chip.memory_bytes
        spread = search.meshes(num_chips, self.topology.num_islands, rules.RULES)
        ways = list(search.layouts(spread, self.config['batch_size']))
        plans = search.search(
            ways,
            bound=self.bound,
            compile_layout=self.plan,
            memory_limit=limit,
            max_compiles=max_compiles,
            tell=lambda plan: print(_told(plan), flush=True),
        )
        if plans:
            return plans
        smallest = min((layout for way in ways for layout in way), key=lambda each: self.bound(each)[0], default=None)
        least = math.inf if smallest is None else self.bound(smallest)[0]
        if smallest is None or math.isinf(least):
            raise ValueError(
                f'No layout suits {num_chips} chips with config.batch_size={self.config["batch_size"]}: give a '
                f'multiple of the chips, such as {-(-self.config["batch_size"] // num_chips) * num_chips}.'
            )
        plan = self.uncompiled(smallest, *self.prepare(smallest))
        return [dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, wanted=float(least)))]


def _told(plan: result.Plan) -> str:
    if plan.failure is not None:
        return f'  {plan.layout}: {plan.verdict}: {plan.failure.splitlines()[0]}'
    told = plan.verdict if plan.time is None or not plan.memory.fits else f'{plan.time.step * 1e3:.1f} ms'
    return f'  {plan.layout}: {result.gib(plan.memory.peak)}, {told}'


# -- The command --


def run(overrides: Mapping[str, Any]) -> ExitCode:
    if not _CONFIG.value or not _TOPOLOGY.value:
        raise ValueError('--config and --topology are needed, such as --topology=v5e:4x4.')
    if _PRICE.value is not None and not math.isfinite(_PRICE.value):
        raise ValueError(f'--price={_PRICE.value} must be a finite number.')
    config = starts.with_trunk(settings.override(settings.read_config(_CONFIG.value), overrides))
    topology = topology_lib.describe(_TOPOLOGY.value, _NUM_SLICES.value)
    source = describe_data(config, _CONFIG.value, _DATASET.value, _NUM_CLIPS.value, parse_classes(_NUM_CLASSES.value))
    planner = Planner(_CONFIG.value, config, source, topology, _PRICE.value)
    if _OUTPUT.value:
        make_output(_OUTPUT.value)
    plans = planner.search(_MAX_COMPILES.value) if _SEARCH.value else [planner.plan(planner.layout())]
    best = plans[0]
    if _SEARCH.value:
        print(f'\n{result.ranking(plans)}\n')
    print(result.text(best))
    if _SEARCH.value:
        print(f'\nThese are the flags of it: {best.layout.flags()}')
    if _OUTPUT.value:
        write(epath.Path(_OUTPUT.value), plans, searched=_SEARCH.value)
    if best.failure is not None:
        return ExitCode.COMPILER
    return ExitCode.FITS if best.memory.fits else ExitCode.DOES_NOT_FIT


def parse_classes(texts: list[str]) -> dict[str, int]:
    """'label=527' -> {'label': 527}."""
    found = {}
    for text in texts:
        head, equals, count = text.partition('=')
        if not equals or not count.isdigit() or not int(count):
            raise ValueError(f'--num_classes={text}: give HEAD=COUNT, such as label=527.')
        found[head] = int(count)
    return found


def make_output(path: str) -> None:
    """Before minutes go into compiling, so that they are not lost."""
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--output={path} cannot be made: {error}.') from error


def write(folder: epath.Path, plans: list[result.Plan], searched: bool) -> None:
    made: dict[str, Any] = {'plan.json': plans[0].to_json()}
    if searched:
        made['search.json'] = [plan.to_json() for plan in plans]
    for name, content in made.items():
        (folder / name).write_text(json.dumps(content, indent=1, allow_nan=False) + '\n')
    drawing.write_png(folder / 'plan.png', result.picture(plans[0]))
    print(f'\nThe plan is in {folder}: {", ".join(made)}, plan.png.')


def main(argv: list[str], overrides: Mapping[str, Any]) -> int:
    try:
        if len(argv) > 1:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        return run(overrides)
    except (ValueError, OSError) as error:
        logging.debug('The setting was found wrong here:', exc_info=True)
        print(f'plan: {error}', file=sys.stderr, flush=True)
        return ExitCode.SETTINGS
    except KeyboardInterrupt:
        print('plan: interrupted; nothing was written.', file=sys.stderr, flush=True)
        return ExitCode.INTERRUPTED


def run_main() -> None:
    argv, overrides = settings.split_overrides(sys.argv)
    app.run(lambda rest: main(rest, overrides), argv=argv, flags_parser=settings.flags_parser('plan'))


if __name__ == '__main__':
    run_main()
