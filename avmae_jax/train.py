"""Trains what a config describes: config + workdir -> checkpoints, figures, pictures.

    python -m avmae_jax.train --config=configs/tiny.py --config.data.path=DIR --workdir=RUN

The same command goes on with a run that was interrupted, at the step it had saved, bit for bit as if nothing had
happened. The workdir gets

    config.json       the settings, every flag resolved       checkpoints/STEP   parameters, optimiser, position
    metrics.jsonl     a line of figures every so many steps    events.*          the same for TensorBoard
    parameters.txt    the table of parameters                 pictures/*.png    what the model sees, and makes of it
    train.log         what was logged; not in buckets         profile/          a trace, if one was asked for
    goodput.jsonl     where the time went                     start.txt         what a start gave, if there was one
    lock              of the job that is at work              damaged/          checkpoints that were passed over

Exit codes: 0 done; 2 a setting is wrong, or another job is at work in the workdir; 65 the data cannot be read; 70 the
loss was not finite (see nonfinite-STEP/ in the workdir); 71 stuck: no step for parallel.watchdog_seconds, or no batch
for data.stall_seconds; 74 no checkpoint could be written (disk full); 75 stopped by SIGTERM after saving. After 71, 75
and everything else (1, or a signal: a crash, another process of the job was lost) the same command goes on.
docs/reliability.md has the whole list.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging as python_logging
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, logging
from absl import flags as absl_flags
from etils import epath
from ml_collections import config_flags

from avmae_jax import checks, experiment, settings, starts
from avmae_jax.checkpoints.manager import CheckpointError, Checkpoints
from avmae_jax.data.batches import TooManyDamagedError
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.schema import unnamed_classes
from avmae_jax.data.workers import LoaderError, StalledError
from avmae_jax.evaluation import painting, pictures, sound
from avmae_jax.evaluation.reconstruction import draw_fixed
from avmae_jax.objectives import Classification, Objective
from avmae_jax.parallel import hosts, rules
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.structs import Batch
from avmae_jax.training import goodput, lock, loop, nonfinite, report, writer
from avmae_jax.training import state as state_lib
from avmae_jax.training.optimizer import averaged

_STARTED = time.monotonic()  # What was imported before takes a second or two more.
NUM_SOUNDS = 2  # Clips of the picture that TensorBoard gets as sound; 3 sounds of 10 s take 2.4 s of CPU.
LOG_FILE, START_FILE, OVERVIEW_FILE = 'train.log', 'start.txt', 'parameters.txt'
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'File with get_config(), and its arguments after a colon.')
_WORKDIR = absl_flags.DEFINE_string('workdir', None, 'Folder of the run; a run that lies there is gone on with.')
_DISTRIBUTED = absl_flags.DEFINE_bool(
    'distributed', True, 'Start jax.distributed. Without it, SIGTERM ends the process before it has saved.'
)
_COORDINATOR = absl_flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no cluster is recognised.')
_NUM_PROCESSES = absl_flags.DEFINE_integer('num_processes', None, 'Of the job, with --coordinator.')
_PROCESS_ID = absl_flags.DEFINE_integer('process_id', None, 'Of this process, with --coordinator.')


class ExitCode(enum.IntEnum):
    """What a scheduler needs to know; the numbers are those of sysexits.h."""

    DONE = 0
    FAILED = 1
    SETTINGS = 2
    DATA = 65
    NONFINITE = 70
    STUCK = 71
    STORAGE = 74
    PREEMPTED = 75


def train(config: settings.Config, workdir: epath.Path, source: Mixture, watchdog: hosts.Watchdog) -> ExitCode:
    """Trains, or goes on training, on the devices of this job; needs `checks.check` to have passed."""
    mesh = mesh_lib.make_mesh(**{axis: config['parallel'][axis] for axis in mesh_lib.AXES})
    checks.check_devices(config, mesh)
    parts = experiment.build(config, source)
    length = parts.length
    logging.info(
        '%d clips, %d steps of %d, %.1f epochs, %.4g GFLOP a clip, on %d x %s.',
        len(source), length.num_steps, config['batch_size'], length.num_steps / length.steps_per_epoch,
        experiment.step_flops(config, parts) / config['batch_size'] / 1e9, mesh.size, jax.devices()[0].device_kind,
    )  # fmt: skip
    init = experiment.make_init(parts)
    placed = experiment.place(config, init, mesh)
    shardings, rows = placed.shardings, placed.rows
    is_first = jax.process_index() == 0
    account = goodput.Account(workdir if is_first else None, time.monotonic() - _STARTED)
    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        keep_last=config['checkpoint']['keep_last'],
        keep_best=config['checkpoint']['keep_best'],
    )
    with account.spend('restore'):
        state = restore(checkpoints, placed.state, shardings)
    if state is None:
        state = first_state(config, parts, source, init=init, shardings=shardings, folder=workdir)
    if is_first:
        settings.save_config(config, workdir)
    start_step = int(state.step)
    watchdog.progress(slow=True)
    with account.spend('compile'):  # Last, as what may be wrong with a start or a checkpoint is told sooner.
        train_step = compile_step(config, parts, source, placed)
    watchdog.progress(slow=True)
    report.write_overview(state.params, workdir / OVERVIEW_FILE)

    def make_meta(state: state_lib.TrainState) -> dict[str, Any]:
        return experiment.make_meta(config, source, parts.shapes, state)

    def save(state: state_lib.TrainState, metric: float | None) -> None:
        checkpoints.save(int(state.step), state_lib.to_items(state), make_meta(state), metric)

    def stop_at_nonfinite(state: state_lib.TrainState, step: int, host_rows: Batch, batch: Batch) -> None:
        folder = workdir / f'nonfinite-{step}'
        diagnosis = nonfinite.diagnose(
            model=parts.model,
            objective=parts.objective,
            preprocess=parts.preprocess,
            state=state,
            batch=batch,
            lose_modality_ratio=parts.preprocess.lose_modality_ratio,
        )
        clip_ids = [source[int(record)].id for record in host_rows.record]
        message = nonfinite.report_nonfinite(folder, step=step, diagnosis=diagnosis, rows=host_rows, clip_ids=clip_ids)
        evidence = Checkpoints(folder / 'checkpoints', keep_best=0)
        evidence.save(step, state_lib.to_items(state), make_meta(state))
        evidence.close()
        raise nonfinite.NonFiniteError(message)

    try:
        with contextlib.ExitStack() as stack:
            metric_writer = writer.MetricWriter(workdir, start_step) if is_first else writer.NullWriter()
            stack.callback(metric_writer.close)
            if start_step == 0:
                metric_writer.write_hparams(settings.flatten(config))
            stream = stack.enter_context(experiment.build_train_stream(config, source, start_step, length.num_steps))
            batches = hosts.Prefetch(stream, rows)
            stack.callback(batches.close)
            finished = loop.train(
                state,
                train_step,
                batches,
                num_steps=length.num_steps,
                report=report.Report(
                    metric_writer,
                    log_every_steps=config['report']['log_every_steps'],
                    clips_per_step=config['batch_size'],
                    flops_per_step=experiment.step_flops(config, parts),
                    wait_share_warning=config['report']['wait_share_warning'],
                ),
                account=account,
                profile=report.Profile(
                    workdir / 'profile',
                    first_step=config['report']['profile_first_step'],
                    num_steps=config['report']['profile_num_steps'],
                ),
                watchdog=watchdog,
                hooks=make_hooks(
                    config,
                    parts,
                    rows=rows,
                    metric_writer=metric_writer,
                    folder=workdir / 'pictures',
                    watchdog=watchdog,
                ),
                save=save,
                save_every_steps=config['checkpoint']['every_steps'],
                check_save=checkpoints.check,
                preempted=hosts.preempted,
                on_nonfinite=stop_at_nonfinite,
            )
            with account.spend('save'):
                checkpoints.close()
            account.write(int(finished.state.step), batches.wait_seconds)
            if is_first:
                goodput.tell(workdir)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        checkpoints.give_up(error)
    if finished.preempted:
        logging.warning('Stopped by SIGTERM; step %d is saved, and the same command goes on.', finished.state.step)
        return ExitCode.PREEMPTED
    logging.info('Done: %d steps. Scalars, pictures and checkpoints are in %s.', length.num_steps, workdir)
    return ExitCode.DONE


def compile_step(
    config: settings.Config, parts: experiment.Parts, source: Mixture, placed: experiment.Placed
) -> Callable[..., Any]:
    """The training step, compiled for this mesh."""
    began = time.monotonic()
    compiled = experiment.compile_step(config, parts, source, placed)
    memory = compiled.memory_analysis()
    logging.info(
        'Compiled the step in %.1f s; it takes %.1f MB a device besides the state.',
        time.monotonic() - began, memory.temp_size_in_bytes / 1e6,
    )  # fmt: skip
    return compiled


def first_state(
    config: settings.Config,
    parts: experiment.Parts,
    source: Mixture,
    *,
    init: Callable[[jax.Array], state_lib.TrainState],
    shardings: state_lib.TrainState,
    folder: epath.Path,
) -> state_lib.TrainState:
    """The state before the first step: fresh, or with the parameters of the model that config.start names."""
    key = jax.random.key(config['seed'])
    if 'start' not in config or not config['start']['path']:
        return state_lib.init_sharded(init, key, shardings)
    params, told = starts.start_params(config, parts, source)
    logging.info('Starting from %s:\n%s', config['start']['path'], told)
    if jax.process_index() == 0:
        (folder / START_FILE).write_text(f'{told}\n')
    params = jax.tree.map(hosts.global_array, params, shardings.params)
    return state_lib.init_from(params, key, shardings, parts.objective.init, parts.optimizer)


def check_data(workdir: epath.Path, config: settings.Config, source: Mixture) -> None:
    """Refuses to go on with a run on other data than its own; looks at its workdir and changes nothing there."""
    if not has_checkpoints(workdir):
        return
    checkpoints = Checkpoints(workdir / 'checkpoints', read_only=True)
    found = checkpoints.read_meta()
    checkpoints.close()
    if found is None:
        return
    dataset = found[1]['dataset']
    if not dataset['digest']:
        return check_classes(workdir, config, source, dataset['info']['labels'])
    digest = experiment.dataset_digest(source)
    if dataset['digest'] != digest:
        raise ValueError(
            f'{checkpoints.directory} is a run on a dataset of other content than config.data.path: its digest was '
            f'{dataset["digest"][:16]}... and is {digest[:16]}.... Give the old data, or another --workdir to begin '
            'anew.'
        )


def check_classes(workdir: epath.Path, config: settings.Config, source: Mixture, labels: Mapping[str, Any]) -> None:
    """Refuses to go on training an imported classifier, which has seen no data of ours, on other classes than its own.

    Args:
      labels: of the imported model, as `DatasetInfo` stores them.
    """
    for head in config['objective'].get('heads', {}):
        stored, names = tuple(labels[head]['names']), source.labels[head].names
        if len(stored) != len(names):
            how = f'the model has {len(stored)} and the data {len(names)}'
        elif stored not in (names, unnamed_classes(len(stored))):
            i = next(i for i, (a, b) in enumerate(zip(stored, names, strict=True)) if a != b)
            how = f'number {i} of the model is {stored[i]!r}, and of the data {names[i]!r}'
        else:
            continue
        raise ValueError(
            f'{workdir} is an imported model, whose classes of {head!r} are others than those of config.data.path: '
            f'{how}. To train a new head, start from it: --config.start.path={workdir} --config.start.heads=False '
            '--workdir=NEW'
        )


def restore(
    checkpoints: Checkpoints, abstract: state_lib.TrainState, shardings: state_lib.TrainState
) -> state_lib.TrainState | None:
    """The state of the last good checkpoint, or None where there is none yet."""
    began = time.monotonic()
    restored = checkpoints.restore(state_lib.to_items(abstract))
    if restored is None:
        return None
    logging.info('Going on from the checkpoint of step %d, read in %.1f s.', restored.step, time.monotonic() - began)
    return state_lib.from_items(restored.items, restored.meta, shardings)


# -- What is done now and then --


def make_hooks(
    config: settings.Config,
    parts: experiment.Parts,
    *,
    rows: Any,
    metric_writer: Any,
    folder: epath.Path,
    watchdog: hosts.Watchdog,
) -> dict[str, loop.Hook]:
    """Evaluation on the other split, whose loss ranks checkpoints, and pictures of reconstructions."""
    evaluation, num_pictures = config['evaluation'], config['report']['num_pictures']
    split = evaluation['split'] if evaluation['every_steps'] else config['data']['split']
    everywhere = jax.NamedSharding(rows.mesh, jax.P())
    classifying = isinstance(parts.objective, Classification)
    evaluated = make_scores(parts) if classifying else make_fixed_loss(parts)
    evaluate_batch = jax.jit(rules.on_mesh(evaluated, rows.mesh), out_shardings=everywhere)

    def evaluate(state: state_lib.TrainState) -> dict[str, float]:
        table = []
        average = averaged(state.opt_state)
        params = state.params if average is None else average
        with experiment.build_eval_stream(config, split) as stream:
            for batch in itertools.islice(stream, evaluation['max_batches']):
                scored = evaluate_batch(params, hosts.global_batch(batch, rows))
                table.append(jax.tree.map(float, scored))
                watchdog.progress(slow=True)
        means = mean_of_batches(table)
        means = {'loss': parts.objective.total({name: means.get(name, 0.0) for name in table[0].losses}), **means}
        metric_writer.write_scalars(int(state.step), {f'{split}/{name}': value for name, value in means.items()})
        told = ', '.join(f'{name} {value:.5g}' for name, value in means.items())
        logging.info('Step %d, split %s: %s.', int(state.step), split, told)
        return {'metric': means['loss']}

    def paint(state: state_lib.TrainState) -> None:
        num_rows = rows.num_devices * -(-num_pictures // rows.num_devices)
        with experiment.build_eval_stream(config, split, batch_size=num_rows) as stream:
            painted = paint_batch(state.params, hosts.global_batch(next(stream), rows))
            media, records = painting.patched(painted, parts.model, parts.objective)
            ids = [stream.source[int(record)].id for record in records]
        sheet = pictures.reconstruction_sheet(media, ids, num_clips=num_pictures, note=f'Step {int(state.step)}.')
        if jax.process_index() == 0:
            pictures.write_png(folder / f'step-{int(state.step):07d}.png', sheet)
            metric_writer.write_images(int(state.step), {f'{split}/reconstructions': sheet})
            if 'audio' in media and sound.can_be_heard(parts.preprocess):
                for clip in range(min(NUM_SOUNDS, len(ids))):
                    heard = sound.sounds_of_clip(media['audio'], clip, parts.preprocess)
                    metric_writer.write_audios(
                        int(state.step),
                        {f'{split}/sound {clip + 1}/{row}': waveform[None, :, None] for row, waveform in heard.items()},
                        sample_rate=parts.preprocess.sample_rate,
                    )

    hooks = {'evaluate': loop.Hook(evaluation['every_steps'], evaluate)}
    if not classifying:
        painter = painting.make_painter(parts.model, parts.objective, parts.preprocess, num_pictures)
        paint_batch = jax.jit(rules.on_mesh(painter, rows.mesh), out_shardings=everywhere)
        hooks['paint'] = loop.Hook(config['report']['pictures_every_steps'], paint)
    return hooks


class BatchScores(NamedTuple):
    """What one batch gives; where several are put together, each row that counts must count once.

    Attributes:
      losses: name -> mean over the rows that count for it.
      others: the same of what is no part of the loss.
      counts: name -> how many rows that were.
    """

    losses: dict[str, Any]
    others: dict[str, Any]
    counts: dict[str, Any]


def mean_of_batches(table: Sequence[BatchScores]) -> dict[str, float]:
    """Name -> mean over the rows of all batches; without the names for which no row counts."""
    means = {}
    for name in {**table[0].losses, **table[0].others}:
        counts = [row.counts[name] for row in table]
        if any(counts):
            means[name] = float(np.average([{**row.losses, **row.others}[name] for row in table], weights=counts))
    return means


def make_scores(parts: experiment.Parts) -> Callable[[Any, Batch], BatchScores]:
    """(params, batch) -> losses without augmentation, and the accuracy of heads with one class."""

    objective = parts.objective
    assert isinstance(objective, Classification)

    def scores(params, batch):
        inputs = parts.preprocess(batch, train=False)
        _, scored = objective(parts.model, params, None, inputs, batch, jax.random.key(0), train=False)
        accuracies = objective.accuracies(scored, batch)
        return BatchScores(scored.losses, accuracies.values, {**scored.counts, **accuracies.counts})

    return scores


def make_fixed_loss(parts: experiment.Parts) -> Callable[[Any, Batch], BatchScores]:
    """(params, batch) -> losses without augmentation, each record under the same mask every time."""

    objective = parts.objective
    assert isinstance(objective, Objective)

    def losses(params, batch):
        inputs = parts.preprocess(batch, train=False)
        masks, places = draw_fixed(objective, parts.model.grids(inputs), batch.record)
        _, scored = objective(
            parts.model,
            params,
            objective.init(params),
            inputs,
            batch,
            jax.random.key(0),  # Everything that chance decides is given.
            masks=masks,
            places=places or None,
        )
        return BatchScores(scored.losses, {}, scored.counts)

    return losses


# -- The command --


def run(config: settings.Config, workdir: epath.Path) -> ExitCode:
    """Checks settings and data, starts the job, trains."""
    with hosts.Watchdog(config['parallel']['watchdog_seconds'], ExitCode.STUCK) as watchdog:
        config = starts.with_trunk(config)
        source = experiment.open_train_sources(config)
        checks.check(config, source)
        # Before its first checkpoint a run has nothing to lose: a setting that was told to be wrong may be put right.
        if (workdir / settings.CONFIG_FILE).exists() and has_checkpoints(workdir):
            old = experiment.brought_up(settings.load_config(workdir), config, source.sources[0].info)
            settings.check_resumable(old, config, workdir)
        hosts.keep_freed_memory()
        if _DISTRIBUTED.value:
            hosts.initialize(
                _COORDINATOR.value,
                _NUM_PROCESSES.value,
                _PROCESS_ID.value,
                heartbeat_seconds=config['parallel']['heartbeat_seconds'],
            )
        check_data(workdir, config, source)
        before = set(workdir.iterdir()) if workdir.is_dir() else None
        with contextlib.closing(claim(workdir)):
            log_file = log_to_file(workdir / LOG_FILE)
            try:
                return train(config, workdir, source, watchdog)
            except ValueError as error:
                if jax.process_index() == 0 and not hosts.is_lost_process(error):
                    leave_as_found(workdir, before, log_file)
                raise


def claim(workdir: epath.Path) -> lock.WorkdirLock | contextlib.ExitStack:
    """Has process 0 lock the workdir; ValueError on all processes when another job has it."""
    mine = lock.WorkdirLock(workdir) if jax.process_index() == 0 else None
    if hosts.broadcast(mine is not None and mine.holder is not None):
        by = '' if mine is None else f' by {mine.holder}'
        raise ValueError(
            f'{workdir} is in use{by}: two jobs in one workdir would overwrite each other. Wait for its end, or give '
            'another --workdir.'
        )
    return mine or contextlib.ExitStack()


def leave_as_found(
    workdir: epath.Path, before: Set[epath.Path] | None, log_file: python_logging.Handler | None
) -> None:
    """Takes away what a start has made that was refused before its first step; call while its lock is held.

    Args:
      before: what lay there; None where the folder was not there.
    """
    if '://' in os.fspath(workdir) or (workdir / writer.METRICS_FILE).exists():
        return
    there = before or set()
    if log_file is not None and workdir / LOG_FILE not in there:
        logging.get_absl_logger().removeHandler(log_file)
        log_file.close()
    for name in (LOG_FILE, START_FILE, OVERVIEW_FILE, settings.CONFIG_FILE, lock.FILE):
        if workdir / name not in there:
            (workdir / name).unlink(missing_ok=True)
    for folder in [workdir / 'checkpoints', *([workdir] if before is None else [])]:
        if folder not in there:
            with contextlib.suppress(OSError):  # It was not made, or something lies in it.
                os.rmdir(folder)


def has_checkpoints(workdir: epath.Path) -> bool:
    try:
        experiment.find_checkpoints(workdir)
    except ValueError:
        return False
    return any(child.name.isdigit() for child in (workdir / 'checkpoints').iterdir())


def log_to_file(path: epath.Path) -> python_logging.Handler | None:
    """Also into a file, on local disks; and of orbax, which tells its every move, errors alone."""
    logging.get_absl_handler().addFilter(_not_chatty)
    handler = None
    if '://' not in str(path) and jax.process_index() == 0:
        handler = python_logging.FileHandler(path)
        handler.setFormatter(logging.PythonFormatter())
        handler.addFilter(_not_chatty)
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # On a full disk the message itself still goes to the terminal.
        logging.get_absl_logger().addHandler(handler)
    return handler


def _not_chatty(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR or '/orbax/' not in record.pathname


def parse_flags(argv: list[str]) -> list[str]:
    """The command line; a config that cannot be read, or a setting that it does not have, ends here in one line."""
    config: Mapping[str, Any] = {}
    try:
        for argument, following in zip(argv, [*argv[1:], ''], strict=True):
            # Flags read the file as soon as they are parsed, and say in a traceback what is wrong with it.
            if re.fullmatch('--?config(=.*)?', argument):
                config = settings.read_config(argument.partition('=')[2] or following)
    except ValueError as error:
        print(f'train: {error}', file=sys.stderr)
        sys.exit(ExitCode.SETTINGS)
    try:
        return absl_flags.FLAGS(argv)
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error)
        if isinstance(error, AttributeError | KeyError | TypeError):  # Of ml_collections, which does not say where.
            text = settings.find_unknown(config, argv) or text
        print(f'train: {text}\nSettings are given as --config.name=value; --help lists the flags.', file=sys.stderr)
        sys.exit(ExitCode.SETTINGS)


def main(argv: list[str]) -> int:
    """Runs the command; every failure that can be foreseen has an exit code of its own."""
    if len(argv) > 1:
        return fail(ExitCode.SETTINGS, f'What is {" ".join(argv[1:])}? Settings are given as --config.name=value.')
    workdir = epath.Path(_WORKDIR.value)
    try:
        return run(settings.to_plain(_CONFIG.value), workdir)
    except StalledError as error:
        return fail(ExitCode.STUCK, error)
    except (TooManyDamagedError, LoaderError) as error:
        return fail(ExitCode.DATA, error)
    except nonfinite.NonFiniteError as error:
        return fail(ExitCode.NONFINITE, error)
    except CheckpointError as error:
        return fail(ExitCode.STORAGE, error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(workdir).free if '://' not in str(workdir) else 0
        return fail(ExitCode.STORAGE, f'{error}. {free / 1e6:,.1f} MB are free in {workdir}: make room and run again.')
    except ValueError as error:
        if hosts.is_lost_process(error):
            hosts.leave(ExitCode.FAILED, traceback.format_exc())
            raise
        logging.debug('The setting was found wrong here:', exc_info=True)
        return fail(ExitCode.SETTINGS, error)
    except Exception:
        hosts.leave(ExitCode.FAILED, traceback.format_exc())
        raise


def fail(code: ExitCode, error: object) -> ExitCode:
    logging.error('%s', error)
    print(f'train: {error}', file=sys.stderr, flush=True)
    hosts.leave(code)
    return code


if __name__ == '__main__':
    absl_flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main, flags_parser=parse_flags)
