"""From a folder of videos to a pretrained encoder in a few minutes: every command once, on small data, for real.

    python -m avmae_jax.demo --output=demo                    clips that the project makes itself
    python -m avmae_jax.demo --output=demo --clips=my.csv     your own

Makes clips, prepares shards, pretrains configs/tiny.py, kills the training on purpose and goes on with it,
evaluates, and says where pictures, scalars and checkpoint lie. Each step is the command that it prints; what it
logs is kept in OUTPUT/logs. Run again, it keeps clips and shards and trains anew; --fresh begins from nothing.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from avmae_jax.data import schema
from avmae_jax.evaluation import drawing, results_file
from avmae_jax.progress import format_seconds, progress

_OUTPUT = flags.DEFINE_string('output', 'demo', 'Folder for everything.')
_CLIPS = flags.DEFINE_string(
    'clips', '', 'A CSV of your own clips (path, optional start, end, label, split) or a folder.'
)
_FRESH = flags.DEFINE_bool('fresh', False, 'Remove what an earlier demo left in the output folder, and begin anew.')
_NUM_CLIPS = flags.DEFINE_integer('num_clips', 450, 'Clips to make, when there are none of your own.')
_NUM_STEPS = flags.DEFINE_integer('num_steps', None, 'Training steps; default: those of the config.')

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'tiny.py'
MARK = '.avmae_demo'  # In the output folder: --fresh removes no folder that the demo did not make.
TAIL_LINES = 25


class DemoError(Exception):
    """A step went wrong; the message says which, and shows the end of its log."""


# -- Running a step --


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, '-m', f'avmae_jax.{verb}', *arguments]


def environment() -> dict[str, str]:
    """The demo is made for two cores of any machine; what the user has set is obeyed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    cache = pathlib.Path(_OUTPUT.value).absolute() / 'cache'
    defaults = {
        'JAX_PLATFORMS': 'cpu',
        # Four processes compile the same functions; the second and later ones read them, in a third of the time.
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    }
    return {**defaults, **os.environ, 'PYTHONPATH': path}


def say(text: str) -> None:
    print(text, flush=True)


def show(parts: Sequence[str]) -> None:
    """The command as somebody would type it."""
    say(f'  $ {shlex.join(["python", *parts[1:]])}')


def tail(log: pathlib.Path) -> str:
    lines = log.read_text(errors='replace').splitlines()[-TAIL_LINES:]
    return '\n'.join(f'    {line[:300]}' for line in lines)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Names a step, and says how long it took."""
    say(f'\n== {title}')
    began = time.monotonic()
    yield
    say(f'  ({format_seconds(time.monotonic() - began)})')


def run(parts: Sequence[str], log: pathlib.Path, *, with_bar: bool = False) -> str:
    """Runs a command to its end and returns its report (stdout); the rest goes into the log. Raises DemoError.

    Args:
      with_bar: on a terminal, lets the command draw its own bar in place of logging.
    """
    show(parts)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        stderr = None if with_bar and sys.stderr.isatty() else file
        done = subprocess.run(parts, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(), check=False)
    with log.open('a') as file:
        file.write(done.stdout)
    if done.returncode:
        raise DemoError(f'`{shlex.join(parts[1:4])} ...` ended with exit code {done.returncode}:\n{tail(log)}')
    return done.stdout


# -- The steps --


def obtain_clips(output: pathlib.Path) -> pathlib.Path:
    """The CSV (or folder) of clips: the user's, those of an earlier demo, or new ones."""
    if _CLIPS.value:
        clips = pathlib.Path(_CLIPS.value).absolute()
        if not clips.exists():
            raise DemoError(f'--clips={_CLIPS.value} does not exist.')
        say(f'  yours: {clips}')
        return clips
    table = output / 'clips' / 'clips.csv'
    if table.exists() and len(table.read_text().splitlines()) == _NUM_CLIPS.value + 1:
        say(f'  already there: {_NUM_CLIPS.value} clips in {table.parent}')
        return table
    shutil.rmtree(table.parent, ignore_errors=True)
    shutil.rmtree(output / 'dataset', ignore_errors=True)
    parts = command('make_clips', f'--output={table.parent}', f'--num_clips={_NUM_CLIPS.value}')
    run(parts, output / 'logs/clips.log', with_bar=True)
    say(f'  {_NUM_CLIPS.value} mp4 files of {len(read_labels(table))} classes in {table.parent}')
    return table


def read_labels(table: pathlib.Path) -> set[str]:
    with table.open() as file:
        return {row['label'] for row in csv.DictReader(file)}


def prepare(clips: pathlib.Path, output: pathlib.Path) -> tuple[pathlib.Path, schema.DatasetInfo]:
    """Shards of the clips; of one's own, a fifth becomes the test split where the CSV names none."""
    folder = output / ('dataset' if not _CLIPS.value else f'dataset-{re.sub("[^a-z0-9]+", "_", clips.stem.lower())}')
    parts = command('prepare', f'--input={clips}', f'--output={folder}', '--short_side=128')
    if _CLIPS.value:
        parts.append('--eval_fraction=0.2')
    say(indent(run(parts, output / 'logs/prepare.log', with_bar=True)))
    run(command('inspect', str(folder), f'--sheet={output / "pictures/clips.png"}'), output / 'logs/inspect.log')
    say('  every shard, digest and record was read again and is whole')
    return folder, schema.read_info(folder)


def indent(text: str) -> str:
    return '\n'.join(f'  {line}' for line in text.strip().splitlines())


def choose_splits(info: schema.DatasetInfo) -> tuple[str, str | None]:
    """(split to train on, another one to test on, or None)."""
    splits = list(info.splits)
    train = 'train' if 'train' in splits else splits[0]
    others = sorted((split for split in splits if split != train), key=lambda split: split != 'test')
    return train, others[0] if others else None


def train_command(folder: pathlib.Path, info: schema.DatasetInfo, workdir: pathlib.Path) -> list[str]:
    modalities = [modality for modality in ('video', 'audio') if modality in info.modalities]
    if not modalities:
        raise DemoError(f'The demo trains on video and sound; these files hold {" and ".join(info.modalities)}.')
    train, test = choose_splits(info)
    parts = command(
        'train',
        f'--config={CONFIG}:modalities={"+".join(modalities)}',
        f'--config.data.path={folder}',
        f'--workdir={workdir}',
    )
    if train != 'train':
        parts.append(f'--config.data.split={train}')
    if test is None:
        parts.append('--config.evaluation.every_steps=0')
    elif test != 'test':
        parts.append(f'--config.evaluation.split={test}')
    if _NUM_STEPS.value is not None:
        parts.append(f'--config.num_steps={_NUM_STEPS.value}')
    return parts


def read_losses(workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Step -> scalars of training, as far as they are written."""
    file = workdir / 'metrics.jsonl'
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # The last line may be half there.
            row = json.loads(line)
            if 'loss' in row:
                found[row['step']] = row
    return found


def saved_steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / 'checkpoints'
    found = folder.iterdir() if folder.exists() else []
    return sorted(int(child.name) for child in found if child.name.isdigit() and (child / 'digests.json').exists())


class Interruption:
    """A kill -9 after the first checkpoint and some steps more, so that steps are lost and must be done again.

    Attributes:
      killed_at: the last step that was done, or None while nothing has been killed.
      saved: the last checkpoint at that time.
      losses: of the steps that were lost.
    """

    LOST_STEPS = 10

    def __init__(self) -> None:
        self.killed_at: int | None = None
        self.saved = 0
        self.losses: dict[int, float] = {}
        self._first_saved = 0

    def is_due(self, workdir: pathlib.Path, step: int) -> bool:
        saved = saved_steps(workdir)
        if self.killed_at is not None or not saved:
            return False
        self._first_saved = self._first_saved or saved[0]
        return step >= self._first_saved + self.LOST_STEPS and step > saved[-1]

    def remember(self, workdir: pathlib.Path) -> None:
        losses = read_losses(workdir)
        self.killed_at, self.saved = max(losses), saved_steps(workdir)[-1]
        self.losses = {step: row['loss'] for step, row in losses.items() if step > self.saved}

    def check(self, workdir: pathlib.Path, log: str) -> None:
        """Held against the finished run: it went on at the checkpoint and did the lost steps again, to the bit."""
        resumed = re.findall(r'checkpoint of step (\d+), read', log)
        if resumed != [str(self.saved)]:
            raise DemoError(f'The run should have gone on at step {self.saved}; its log names {resumed or "no step"}.')
        losses = read_losses(workdir)
        differing = [step for step, loss in self.losses.items() if losses.get(step, {}).get('loss') != loss]
        if differing:
            raise DemoError(f'After the interruption the losses of steps {differing} are not what they were before.')
        again = ''
        if self.losses:
            again = (
                f'; steps {self.saved + 1} to {self.killed_at}, done again, have the same losses as before the kill, '
                'bit for bit'
            )
        say(f'  It went on at step {self.saved}{again}.')


def train(parts: list[str], workdir: pathlib.Path, output: pathlib.Path, num_steps: int) -> Interruption:
    """Trains, with one interruption; shows how far it is from the run's own figures."""
    show(parts)
    interruption = Interruption()
    if train_once(parts, workdir, output / 'logs/train-1.log', num_steps, interruption):
        say(
            f'  Killed on purpose (kill -9) at step {interruption.killed_at}; the last checkpoint is of step '
            f'{interruption.saved}. The same command again:'
        )
        train_once(parts, workdir, output / 'logs/train-2.log', num_steps, None)
    losses = read_losses(workdir)
    if not losses or max(losses) != num_steps:
        raise DemoError(f'The run should have ended at step {num_steps} and ended at {max(losses, default=0)}.')
    if interruption.killed_at is None:
        say('  The run was over before it could be interrupted: it has no checkpoint in its middle.')
    else:
        interruption.check(workdir, (output / 'logs/train-2.log').read_text())
    return interruption


def train_once(
    parts: list[str], workdir: pathlib.Path, log: pathlib.Path, num_steps: int, interruption: Interruption | None
) -> bool:
    """Runs the command to its end, or to its interruption; whether it was interrupted."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = max(read_losses(workdir), default=0)
    with log.open('w') as file:
        process = subprocess.Popen(parts, stdout=file, stderr=file, env=environment(), start_new_session=True)
    with contextlib.ExitStack() as stack:
        stack.callback(end, process)
        bar = None
        while process.poll() is None:
            time.sleep(0.2)
            losses = read_losses(workdir)
            step = max(losses, default=0)
            if bar is None and step != before:  # Compiled, and under way: from here on the time left can be told.
                bar = stack.enter_context(progress(num_steps, what='training', unit='steps', initial=step))
            if bar is not None and step > bar.count:
                bar.note(loss=f'{losses[step]["loss"]:.3f}')
                bar.update(step - bar.count)
            if interruption is not None and interruption.is_due(workdir, step):
                end(process)
                interruption.remember(workdir)
                return True
        if process.returncode:
            raise DemoError(f'Training ended with exit code {process.returncode}:\n{tail(log)}')
        if bar is not None:
            bar.update(max(0, max(read_losses(workdir), default=0) - bar.count))
    return False


def end(process: subprocess.Popen) -> None:
    """Kills a process, if it still runs, and what it started, as a machine that loses power would."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# -- What came of it --


class Results(NamedTuple):
    """What `evaluate` wrote of the trained parameters, and of those the run began with (None where not asked)."""

    trained: dict[str, Any]
    untrained: dict[str, Any] | None


def evaluate(info: schema.DatasetInfo, workdir: pathlib.Path, output: pathlib.Path) -> Results:
    """Scores the checkpoint, and random parameters beside it, on the clips that it was not trained on."""
    train, test = choose_splits(info)
    parts = command('evaluate', f'--workdir={workdir}', f'--train_split={train}', f'--split={test or train}')
    if test is None:
        say('  There is but one split: the error is that of clips it has seen, and nothing can be probed.')
        parts.append('--what=reconstruction')
    elif not info.labels:
        say('  The clips have no labels: no neighbours and no probe.')
    report = run(parts, output / 'logs/evaluate.log')
    say(indent(report))
    untrained = None
    if test is not None and (info.labels or len(info.modalities) > 1):
        run([*parts, '--random_init', '--what=knn,probe,retrieval'], output / 'logs/evaluate-random.log')
        untrained = read_results(workdir, test, 'random-init-seed', train)
    return Results(read_results(workdir, test or train, 'step', train), untrained)


def read_results(workdir: pathlib.Path, split: str, subject: str, train_split: str) -> dict[str, Any]:
    file = results_file.find(workdir, split, subject=subject, asked=results_file.asked(train_split=train_split))[-1]
    return json.loads(file.read_text())['results']


def draw_curves(workdir: pathlib.Path, interruption: Interruption, path: pathlib.Path) -> None:
    """The losses of training, and of the other split, over the steps."""
    losses = read_losses(workdir)
    curves: dict[str, drawing.Curve] = {}
    for name in sorted(next(iter(losses.values()))):
        if name.startswith('reconstruction/') or name == 'loss':
            curves[name] = drawing.Curve(list(losses), [row[name] for row in losses.values()])
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    tested = [row for row in rows if any(name.endswith('/loss') for name in row)]
    if tested:
        name = next(name for name in tested[0] if name.endswith('/loss'))
        curves[name.replace('/', ' ')] = drawing.Curve([row['step'] for row in tested], [row[name] for row in tested])
    marks = {} if interruption.killed_at is None else {'killed, resumed': interruption.killed_at}
    drawing.write_png(path, drawing.draw_curves(curves, 'Masked reconstruction error', marks))


def describe_losses(workdir: pathlib.Path) -> str:
    losses = read_losses(workdir)
    steps = sorted(losses)
    count = min(10, len(steps))

    def mean(chosen: Sequence[int]) -> float:
        return sum(losses[step]['loss'] for step in chosen) / len(chosen)

    return f'{mean(steps[:count]):.3f} (first {count} steps) -> {mean(steps[-count:]):.3f} (last {count})'


def describe_results(results: Results) -> list[tuple[str, str]]:
    """The few figures that matter: each beside what is had without training, and by chance."""
    lines = []
    for row in results.trained.get('reconstruction', []):
        if row['unit'] == 'input':
            nearest = row['baselines'].get('nearest')
            beside = '' if nearest is None else f'; a copy of the nearest visible patch: {nearest:.3f}'
            lines.append((f'hidden {row["modality"]}', f'mean squared error {row["mean"]:.3f}{beside}'))
    untrained = results.untrained or {}
    before = {(row['head'], row['features'], row['method']): row for row in untrained.get('classification', [])}
    for row in results.trained.get('classification', []):
        key = (row['head'], row['features'], row['method'])
        if row['features'] in ('video', 'audio', 'both') and key in before:
            name = f'{"neighbours" if row["method"] == "knn" else "probe"}, {row["features"]}'
            lines.append(
                (name, f'{row["metric"]} {row["value"]:.3f}; {beside_values(before[key]["value"], row["chance"])}')
            )
    sought = {(row['query'], row['method']): row['scores'] for row in untrained.get('retrieval', [])}
    for row in results.trained.get('retrieval', []):
        way = (row['query'], row['method'])
        if row['method'] != 'cosine' and way in sought:
            # Of few candidates ten are soon all.
            recall = 'recall@10' if row['num_candidates'] >= 50 else 'recall@1'
            values = beside_values(sought[way][recall], row['chance'][recall])
            lines.append((f'{row["query"]} to {row["candidates"]}', f'{recall} {row["scores"][recall]:.3f}; {values}'))
    return lines


def beside_values(untrained: float, chance: float) -> str:
    return f'random initialisation {untrained:.3f}, chance {chance:.3f}'


def claim(output: pathlib.Path) -> None:
    """Makes the output folder ours; --fresh empties it, but no folder that somebody else made."""
    if output.exists() and any(output.iterdir()) and not (output / MARK).exists():
        raise DemoError(f'{output} holds something else: give another --output.')
    if _FRESH.value:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    shutil.rmtree(output / 'run', ignore_errors=True)
    shutil.rmtree(output / 'pictures', ignore_errors=True)


def read_num_steps() -> int:
    if _NUM_STEPS.value is not None:
        return _NUM_STEPS.value
    sys.path.append(str(ROOT))  # The config imports its neighbours.
    return runpy.run_path(str(CONFIG))['get_config']().num_steps


def demo(output: pathlib.Path) -> None:
    claim(output)
    workdir, pictures = output / 'run', output / 'pictures'
    num_steps = read_num_steps()
    with step('Clips'):
        clips = obtain_clips(output)
    with step('Shards'):
        folder, info = prepare(clips, output)
    with step(f'Pretraining, {num_steps} steps, with an interruption'):
        interruption = train(train_command(folder, info, workdir), workdir, output, num_steps)
        draw_curves(workdir, interruption, pictures / 'losses.png')
    with step('Evaluation'):
        results = evaluate(info, workdir, output)
        (sheet,) = (workdir / 'evaluation').glob('*.png')
        shutil.copy(sheet, pictures / 'reconstructions.png')
    say('\n== What came of it')
    lines = [
        ('loss', describe_losses(workdir)),
        *describe_results(results),
        ('pictures', f'{pictures / "reconstructions.png"}  what it was shown, and what it made of it'),
        ('', f'{pictures / "losses.png"}  {pictures / "clips.png"}'),
        ('scalars', f'{workdir / "metrics.jsonl"}, or: tensorboard --logdir {workdir}'),
        ('checkpoint', f'{workdir / "checkpoints" / str(saved_steps(workdir)[-1])}'),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        say(f'  {name:<{width}}  {text}')


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'not understood: {" ".join(argv[1:])}')
    began = time.monotonic()
    try:
        demo(pathlib.Path(_OUTPUT.value).absolute())
    except (DemoError, ValueError, OSError) as error:
        sys.exit(f'\ndemo: {error}')
    except KeyboardInterrupt:
        sys.exit('\ndemo: stopped. Clips and shards are kept for the next time.')
    say(f'\n{format_seconds(time.monotonic() - began)} in all.')


if __name__ == '__main__':
    app.run(main)
