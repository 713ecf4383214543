"""VERB: says what a checkpoint has learned, without training any of it further.

    python -m avmae_jax.evaluate --workdir=RUN
    python -m avmae_jax.evaluate --checkpoint=RUN/checkpoints/1000 --split=test --what=knn,probe
    python -m avmae_jax.evaluate --workdir=RUN --random_init          the same, before the first step
    python -m avmae_jax.evaluate --config=configs/finetune/vggsound.py --config.data.path=DIR --checkpoint=RUN
    python -m avmae_jax.evaluate --checkpoint=RUN --files a.mp4 b.wav           a finetuned model's guesses for files

`--what` names any of

  reconstruction   the error in hidden patches under fixed masks, beside answers that need no model
  benchmark        the scores that papers print for a finetuned model: mAP, top-1, actions, ..., and every class's
  modalities       the same for each modality alone, and with each missing
  knn, probe       classes from frozen features of audio, video and both: nearest neighbours, a linear probe
  retrieval        finding a clip's picture by its sound, and the other way round

and is all that a pretrained model allows, or `benchmark` of a finetuned one; of one that was imported without a head,
knn, probe and retrieval. Logits and features are means over
`--num_clips` moments of a clip, spread over time, and over the crops of config.video.eval_crop.

What needs fitting is fitted on `--train_split` and never sees `--split`. Prints tables, and writes into the workdir

  evaluation/SPLIT-step-STEP.json          what was found, of which checkpoint, on which data, by which versions
  evaluation/SPLIT-step-STEP.png           clips, what was left of them, and their reconstructions
  evaluation/SPLIT-step-STEP-sounds/*.wav  the same to listen to: CLIP-input, CLIP-left, CLIP-reconstructed
  evaluation/SPLIT-step-STEP-HEAD-classes.csv, -HEAD-confusion.png, -logits.npz      what a benchmark found

`--config.data.path=DIR` evaluates on another dataset; what else the run says of data, views, preprocessing and
evaluation can be given the same way. With
`--config=FILE` views, preprocessing and how data is read are those of that file; the model is that of the checkpoint.
What is asked for beyond the run's own is in the names, so that nothing overwrites anything else:
SPLIT-step-STEP-noaveraged, -clips-4, -from-TRAIN_SPLIT, -data-DIGEST, -settings-DIGEST; with `--random_init` they
begin with SPLIT-random-init-seed-SEED.

Over several processes the same command is given to each, with --coordinator=HOST:PORT --num_processes=N
--process_id=I where no cluster is recognised; the first one prints and writes.

Exit codes: 0 done; 2 a setting is wrong, or a file cannot be read or written; 65 the data cannot be read, or some of
`--files` cannot (the others are told all the same); 130 interrupted.
"""

from __future__ import annotations

import logging as python_logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from absl import app, flags, logging
from etils import epath

from avmae_jax import experiment, settings, subjects
from avmae_jax.data import files
from avmae_jax.data.batches import TooManyDamagedError
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.workers import LoaderError
from avmae_jax.evaluation import benchmarks, classes, pictures, prediction, results_file, scores, sound, tables
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.objectives import Classification
from avmae_jax.parallel import hosts
from avmae_jax.progress import progress
from avmae_jax.subjects import Subject
from avmae_jax.training import writer

WHAT = ('reconstruction', 'benchmark', 'modalities', 'knn', 'probe', 'retrieval')
PRETRAINED = ('reconstruction', 'knn', 'probe', 'retrieval')
FINETUNED = ('benchmark', 'modalities', 'knn', 'probe', 'retrieval')
EXIT_SETTINGS, EXIT_DATA, EXIT_INTERRUPTED = 2, 65, 130

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run: its last good checkpoint; results go there.')
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'A run, or RUN/checkpoints/STEP, whose results go into that run if --workdir is not given.'
)
_SPLIT = flags.DEFINE_string('split', 'test', 'What is evaluated.')
_TRAIN_SPLIT = flags.DEFINE_string('train_split', 'train', 'What neighbours, probes and maps are fitted on.')
_WHAT = flags.DEFINE_list('what', [], f'Any of {", ".join(WHAT)}; what goes with the checkpoint if not given.')
_RANDOM_INIT = flags.DEFINE_bool('random_init', False, 'Fresh parameters in place of the trained ones, to compare.')
_SEED = flags.DEFINE_integer('seed', None, 'Of fresh parameters; that of the run if not given.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', None, 'Clips at a time; that of the run if not given.', lower_bound=1)
_NUM_CLIPS = flags.DEFINE_integer(
    'num_clips',
    None,
    'Moments of each clip that are averaged; config.evaluation.num_clips if not given.',
    lower_bound=1,
)
_CONFIG = flags.DEFINE_string('config', None, 'Config file whose data, views and preprocessing are used.')
_AVERAGED = flags.DEFINE_bool('averaged', True, 'The moving average of the parameters, where the run kept one.')
_FILES = flags.DEFINE_multi_string('files', [], 'Media files to score, one or several: --files a.mp4 b.wav')
_TOP = flags.DEFINE_integer('top', 5, 'Classes that are printed for each of --files.', lower_bound=1)
_EPIC = flags.DEFINE_string('epic_annotations', None, 'EPIC-KITCHENS-100: folder of EPIC_100_tail_*.csv and so on.')
_LAYERS = flags.DEFINE_list('layers', [], 'Also features after these layers, counted from 1, such as 2,4.')
_NUM_PICTURES = flags.DEFINE_integer('num_pictures', 8, 'Clips to draw and to make audible; 0 for none.', lower_bound=0)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no cluster is recognised.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Of the job, with --coordinator.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Of this process, with --coordinator.')


class Scored(NamedTuple):
    """What was found, and of a benchmark what it was scored from, in the order of the records."""

    results: dict[str, Any]
    ids: list[str]
    heads: dict[str, benchmarks.Head]


def choose_what(subject: Subject, asked: Sequence[str]) -> list[str]:
    """What is to be found out: what was asked for, or what goes with the checkpoint."""
    finetuned = isinstance(subject.objective, Classification)
    possible = FINETUNED if finetuned else PRETRAINED
    wrong = sorted(set(asked) - set(possible))
    if wrong:
        raise ValueError(
            f'--what={",".join(wrong)}: for a {"finetuned" if finetuned else "pretrained"} model there are '
            f'{", ".join(possible)}.'
        )
    if finetuned and not asked:
        return ['knn', 'probe', 'retrieval'] if subject.has_silent_head else ['benchmark']
    return list(asked) or list(possible)


def evaluate(evaluator: Evaluator, what: list[str], epic_annotations: str | None = None) -> Scored:
    """Everything that was asked for and that the data allows."""
    scored = Scored({}, [], {})
    if 'benchmark' in what or 'modalities' in what:
        scored = score_classes(evaluator, what, epic_annotations)
    results = scored.results
    if 'reconstruction' in what:
        results['reconstruction'] = evaluator.reconstruction()
    methods = [method for method in ('knn', 'probe') if method in what]
    labels = evaluator.source.labels
    if methods and not labels:
        logging.warning('The dataset has no labels: no %s.', ' and no '.join(methods))
        methods = []
    retrieving = 'retrieval' in what and len(evaluator.subject.model.tokenizers) > 1
    if methods or retrieving:
        features = evaluator.features()
        if methods:
            results['classification'] = scores.classify(features, labels, methods)
        if retrieving:
            results['retrieval'] = scores.retrieve(features)
    return scored


def score_classes(evaluator: Evaluator, what: Sequence[str], epic_annotations: str | None = None) -> Scored:
    """What a classifier scores: 'benchmark' and 'modalities', as far as they were asked for."""
    objective, labels = evaluator.subject.objective, evaluator.source.labels
    names = {head: labels[head].names for head in objective.heads}
    kind = classes.benchmark_kind(objective.heads)
    ways = classes.ways_of(list(evaluator.subject.model.tokenizers)) if 'modalities' in what else [classes.EVERYTHING]
    if 'benchmark' in what and epic_annotations is not None and kind != 'verb-noun':
        raise ValueError('--epic_annotations is for models with the heads verb and noun.')
    table = evaluator.logits(ways)
    heads = classes.heads_of(table, classes.EVERYTHING, names)
    results: dict[str, Any] = {}
    ids: list[str] = []
    if 'benchmark' in what:
        ids = [evaluator.source[int(record)].id for record in table['record']]
        extra = {}
        if epic_annotations is not None:
            counts = {head: len(names[head]) for head in names}
            extra = benchmarks.read_subsets(epath.Path(epic_annotations), ids, counts)
        results['benchmark'] = benchmarks.score(kind, heads, **extra)
    if 'modalities' in what:
        results['modalities'] = classes.modality_rows(table, kind, ways, names)
    return Scored(results, ids, heads)


def predict_files(subject: Subject, paths: Sequence[str], *, num_clips: int | None, top: int) -> bool:
    """Prints the likeliest classes of media files; False where some could not be scored, which is printed too."""
    if not isinstance(subject.objective, Classification):
        raise ValueError('--files needs a finetuned model, and the checkpoint is of a pretrained one.')
    heads = subject.objective.heads
    with files.open_files(paths, subject.info, modalities=list(subject.model.tokenizers)) as source:
        if len(source):
            num_clips = num_clips or subjects.moments(subject.config)
            rows = min(len(source) * num_clips, subject.config['batch_size'])
            evaluator = Evaluator(
                subject, split=Mixture([source]), batch_size=rows, num_clips=num_clips, in_workers=False
            )
            table = evaluator.logits(what='files')
            names = {head: subject.info.labels[head].names for head in heads}
            told = [source.paths[int(record)] for record in table['record']]
            guesses = prediction.predict(heads, table[classes.EVERYTHING], names, top)
            if jax.process_index() == 0:
                print(prediction.prediction_table(told, guesses))
        for failure in source.failures:
            print(f'evaluate: {files.describe(failure)}', file=sys.stderr, flush=True)
        return not any(failure.outcome == 'skipped' for failure in source.failures)


class FilesError(Exception):
    """Some of `--files` could not be scored."""


def run(overrides: Mapping[str, Any], paths: Sequence[str] = ()) -> None:
    checkpoint = _CHECKPOINT.value or _WORKDIR.value
    if not checkpoint:
        raise ValueError('--workdir or --checkpoint is needed: python -m avmae_jax.evaluate --workdir=RUN')
    unknown = sorted(set(_WHAT.value) - set(WHAT))
    if not all(layer.isdigit() for layer in _LAYERS.value):
        raise ValueError(f'--layers={",".join(_LAYERS.value)} must be numbers of layers, such as 2,4.')
    if unknown:
        raise ValueError(f'--what={",".join(unknown)}: there are {", ".join(WHAT)}.')
    if not _RANDOM_INIT.value:
        settings.refuse_flags([_SEED], 'goes with --random_init')
    if paths:
        settings.refuse_flags(
            [_WHAT, _SPLIT, _TRAIN_SPLIT, _BATCH_SIZE, _EPIC, _LAYERS, _NUM_PICTURES], 'goes without --files'
        )
    else:
        settings.refuse_flags([_TOP], 'goes with --files')
    config = settings.read_config(_CONFIG.value) if _CONFIG.value else None
    job = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if any(value is not None for value in job) or any(name in os.environ for name in hosts.CLUSTER_VARIABLES):
        hosts.initialize(*job)
    began = time.monotonic()
    subject = subjects.load_subject(
        checkpoint,
        overrides=overrides,
        random_init=_RANDOM_INIT.value,
        seed=_SEED.value,
        config=config,
        averaged=_AVERAGED.value,
    )
    if paths:
        if subject.has_silent_head:
            raise ValueError(f'{checkpoint} was imported without a head and guesses nothing: finetune it first.')
        if not predict_files(subject, paths, num_clips=_NUM_CLIPS.value, top=_TOP.value):
            raise FilesError(f'some of the {len(paths)} files could not be scored, see above.')
        return
    what = choose_what(subject, _WHAT.value)
    if not {'knn', 'probe', 'retrieval'} & set(what):
        settings.refuse_flags([_LAYERS], 'goes with --what=knn, probe or retrieval')
    if 'benchmark' not in what:
        settings.refuse_flags([_EPIC], 'goes with --what=benchmark')
    evaluator = Evaluator(
        subject,
        batch_size=_BATCH_SIZE.value,
        num_clips=_NUM_CLIPS.value or subjects.moments(subject.config),
        split=_SPLIT.value,
        train_split=_TRAIN_SPLIT.value,
        layers=[int(layer) for layer in _LAYERS.value],
    )
    if {'benchmark', 'modalities'} & set(what):
        subjects.check_classes(subject, evaluator.source)
    data = describe_data(evaluator)
    notes = results_file.compare_data(subject.about, data)
    for note in notes:
        logging.warning('%s', note)
    scored = evaluate(evaluator, what, _EPIC.value)
    media: dict[str, pictures.PatchedMedia] = {}
    titles: list[str] = []
    if 'reconstruction' in what and _NUM_PICTURES.value:
        media, titles = evaluator.paint(_NUM_PICTURES.value)
    if jax.process_index():
        return
    folder = epath.Path(_WORKDIR.value or experiment.find_checkpoints(checkpoint)[0].parent) / 'evaluation'
    folder.mkdir(parents=True, exist_ok=True)
    name = f'{_SPLIT.value}-{subject.name}{describe_asked(subject, data, num_clips=_NUM_CLIPS.value)}'
    results_file.write(
        folder / f'{name}.json',
        {
            'subject': subject.about,
            'data': data,
            'notes': notes,
            'config': subject.config,
            'versions': experiment.versions(),
            'seconds': round(time.monotonic() - began, 1),
            'results': scored.results,
        },
    )
    written = [f'{name}.json', *write_beside(folder / name, scored, subject, media, titles)]
    print(f'\n{subject.name} of {checkpoint}, split {_SPLIT.value}, {len(evaluator.source):,} clips\n')
    print(tables.describe(scored.results))
    print(''.join(f'\n{note}' for note in notes))
    print(f'Written to {folder}: {", ".join(written)}', flush=True)


def write_beside(
    stem: epath.Path,
    scored: Scored,
    subject: Subject,
    media: Mapping[str, pictures.PatchedMedia],
    titles: Sequence[str],
) -> list[str]:
    """The tables and logits of a benchmark, the picture and the sounds, as far as there are any; their names."""
    folder, name = stem.parent, stem.name
    written = []
    if benchmark := scored.results.get('benchmark'):
        written += [path.name for path in benchmarks.write_details(stem, benchmark, scored.heads)]
        classes.write_logits(folder / f'{name}-logits.npz', scored.ids, scored.heads)
        written.append(f'{name}-logits.npz')
    if titles:
        note = f'{subject.name}, split {_SPLIT.value}.'
        sheet = pictures.reconstruction_sheet(media, titles, num_clips=len(titles), note=note)
        pictures.write_png(folder / f'{name}.png', sheet)
        written.append(f'{name}.png')
        if 'audio' in media and sound.can_be_heard(subject.preprocess):
            write_sounds(folder / f'{name}-sounds', media['audio'], subject.preprocess, len(titles))
            written.append(f'{name}-sounds/')
    return written


def write_sounds(folder: epath.Path, media: pictures.PatchedMedia, preprocess: Any, num_clips: int) -> None:
    """CLIP-ROW.wav for every row of the picture that can be heard; clips count from 1, as they come in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in progress(range(num_clips), what='sounds', unit='clips'):
        for row, waveform in sound.sounds_of_clip(media, clip, preprocess).items():
            data = writer.encode_wav(waveform[:, None], preprocess.sample_rate)
            (folder / f'{clip + 1:02d}-{row}.wav').write_bytes(data)


def describe_asked(subject: Subject, data: Mapping[str, Any], *, num_clips: int | None) -> str:
    """The part of a name that says what is not as the run has it.

    Args:
      num_clips: what was asked for; that stands in the name even where the config says the same.
    """
    own, now = settings.flatten(subject.own), settings.flatten(subject.config)
    changed = {
        name: now.get(name)
        for name in sorted(own.keys() | now.keys())
        if own.get(name) != now.get(name) and settings.is_within(name, results_file.DECIDING)
    }
    as_the_run = num_clips is None and data['num_clips'] == subjects.moments(subject.own)
    return results_file.asked(
        averaged=subject.about.get('averaged', True) or subject.own['optimizer'].get('average_decay') is None,
        num_clips=None if as_the_run else data['num_clips'],
        train_split=data['splits']['train'],
        data='' if data['digest'] == subject.trained_on else data['digest'],
        changed=changed,
    )


def describe_data(evaluator: Evaluator) -> dict[str, Any]:
    """Which clips and classes the results speak of; 'labels' is head -> digest of the names in their order."""
    source = evaluator.source
    return {
        'digest': experiment.dataset_digest(source),
        'splits': dict(evaluator.splits),
        'num_records': len(source),
        'num_clips': evaluator.num_clips,
        'labels': {head: classes.digest for head, classes in source.labels.items()},
    }


def main(argv: list[str], overrides: Mapping[str, Any]) -> None:
    try:
        if len(argv) > 1 and not _FILES.value:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        run(overrides, [*_FILES.value, *argv[1:]] if _FILES.value else [])
    except (TooManyDamagedError, LoaderError, FilesError) as error:
        fail(EXIT_DATA, error)
    except (ValueError, OSError) as error:
        logging.debug('The setting was found wrong here:', exc_info=True)
        fail(EXIT_SETTINGS, error)
    except KeyboardInterrupt:
        fail(EXIT_INTERRUPTED, 'interrupted; nothing was written.')


def fail(code: int, error: object) -> NoReturn:
    print(f'evaluate: {error}', file=sys.stderr, flush=True)
    hosts.leave(code)
    sys.exit(code)


def _not_chatty(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or '/orbax/' not in record.pathname


def run_main() -> None:
    argv, overrides = settings.split_overrides(sys.argv)
    logging.get_absl_handler().addFilter(_not_chatty)  # Orbax tells its every move.
    app.run(lambda rest: main(rest, overrides), argv=argv, flags_parser=settings.flags_parser('evaluate'))


if __name__ == '__main__':
    run_main()
