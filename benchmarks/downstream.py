"""What the examples of docs/downstream.md reach: an exported encoder, finetuned on real clips without our trainer.

    python benchmarks/downstream.py --data=avmnist_shards --pretrained=RESULTS/mid-seed-0 --examples=flax,torch \
        --finetuned=FINETUNED/mid-both-1-bottleneck-seed-0 --output=DOWNSTREAM

Exports the run in the format of each example, runs the example's block of code as it stands in the document on batches
of the training split (windows and crops as the run drew them), and scores its top-1 on the test split (as `evaluate`
cuts it). Prints a Markdown table, with the figures of runs that `avmae_jax.train` finetuned and `avmae_jax.evaluate`
scored (`--finetuned`) beside. Writes DOWNSTREAM/EXPORT and one EXAMPLE.json each; what is there is not done again.

`transformers` takes the video of a run whose stream stands by itself there: see docs/export.md for what must be alike.
PyTorch takes as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from avmae_jax import pretrained
from avmae_jax.data import batches
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.sources import open_source
from avmae_jax.evaluation import results_file
from avmae_jax.evaluation.tables import format_markdown
from avmae_jax.exports.trained import Trained
from avmae_jax.progress import progress
from avmae_jax.structs import Batch

DOCUMENT = Path(__file__).resolve().parent.parent / 'docs/downstream.md'


class Export(NamedTuple):
    """Attributes:
    folder: the name that the example knows it by.
    format: as `avmae_jax.export` knows it.
    alone: whether only the video is exported.
    """

    folder: str
    format: str
    alone: bool = False


EXAMPLES = {
    'flax': Export('model', 'safetensors'),
    'torch': Export('model_torch', 'torch'),
    'transformers': Export('model_hf', 'huggingface', alone=True),
}

_DATA = flags.DEFINE_string('data', None, 'The prepared clips, with labels.')
_PRETRAINED = flags.DEFINE_string('pretrained', None, 'The pretrained run that is exported.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for exports and figures.')
_EXAMPLES = flags.DEFINE_list('examples', list(EXAMPLES), f'Any of {", ".join(EXAMPLES)}.')
_FINETUNED = flags.DEFINE_list('finetuned', [], 'Runs of our own, evaluated, for comparison.')
_HEAD = flags.DEFINE_string('head', 'label', 'Labels that are asked for.')
_STEPS = flags.DEFINE_integer('num_steps', 504, 'Of finetuning.', lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Clips a step.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order of clips, and of fresh heads.', lower_bound=0)


def read_example(name: str, document: Path = DOCUMENT) -> str:
    """The block of code that the document marks with a name."""
    after = document.read_text().split(f'<!-- {name} -->\n```python\n')
    if len(after) != 2:
        raise ValueError(f'{document} has {len(after) - 1} blocks of Python marked {name}; one is wanted.')
    return after[1].split('```')[0]


def run_example(name: str, **given: Any) -> dict[str, Any]:
    """All that the block defines, among it `losses` and `predict`; exports are looked for in the current folder."""
    exec(compile(read_example(name), f'{DOCUMENT.name} ({name})', 'exec'), given)
    return given


def as_given(batch: Batch, head: str) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """(frames, waveforms in [-1, 1], numbers of classes) of the rows that count."""
    counted = batch.weight > 0
    frames, waveforms = (np.array(batch.media[m][counted]) if m in batch.media else None for m in ('video', 'audio'))
    if waveforms is not None and waveforms.dtype == np.int16:
        waveforms = waveforms.astype(np.float32) / 32768
    return frames, waveforms, batch.labels[head][counted].argmax(axis=1)


def export(run: Path, made: Export, output: Path) -> None:
    command = [sys.executable, '-m', 'avmae_jax.export', f'--checkpoint={run}', f'--format={made.format}']
    command += ['--modality=video'] * made.alone + [f'--output={output}']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])


def finetune(
    name: str, trained: Trained, data: str, folder: Path, *, head: str, num_steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Runs an example in `folder`, where the exports of `trained` lie, and scores what it has made."""
    trained = trained.alone('video') if EXAMPLES[name].alone else trained
    if name != 'flax':
        import torch

        torch.manual_seed(seed)
    train, test = (Mixture([open_source(data, split)]) for split in ('train', 'test'))
    if head not in train.labels:
        raise ValueError(f'--head={head} is none of the labels of {data}: {sorted(train.labels)}.')
    stream = batches.train_stream(train, trained.view, batch_size, seed, num_steps=num_steps)
    start = time.monotonic()
    with contextlib.chdir(folder), stream:
        given = (as_given(batch, head) for batch in progress(stream, what=name, unit='steps', total=num_steps))
        num_classes = len(train.labels[head].names)
        found = run_example(name, batches=given, NUM_CLASSES=num_classes, NUM_STEPS=num_steps)
    seconds = time.monotonic() - start
    correct: list[bool] = []
    with batches.eval_stream(test, trained.view, batch_size * trained.view.eval_crops) as stream:
        for frames, waveforms, labels in (as_given(batch, head) for batch in stream):
            correct += (np.asarray(found['predict'](frames, waveforms)) == labels).tolist()
    return {
        'model': name,
        'given': ' and '.join(trained.modalities),
        'steps': len(found['losses']),
        'top-1': float(np.mean(correct)),
        'clips': len(correct),
        'seconds': seconds,
        'losses': found['losses'],
    }


def our_figure(run: Path) -> dict[str, Any]:
    """What `evaluate --what=benchmark` wrote into a run that `train` finetuned."""
    written = results_file.find(run, 'test')
    if not written:
        raise ValueError(f'--finetuned={run} holds no evaluation: python -m avmae_jax.evaluate --workdir={run}')
    found = json.loads(written[-1].read_text())
    score = next(score for score in found['results']['benchmark']['scores'] if score['metric'] == 'top-1')
    return {
        'model': 'avmae_jax.train',
        'given': ' and '.join(m for m in ('image', 'video', 'audio') if m in found['config']['model']['tokenizers']),
        'steps': found['subject']['step'],
        'top-1': score['value'],
        'clips': score['num_records'],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [['finetuned by', 'given', 'steps', 'top-1']]
    lines += [[row['model'], row['given'], f'{row["steps"]:,}', f'{row["top-1"]:.3f}'] for row in rows]
    return format_markdown(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    unknown = sorted(set(_EXAMPLES.value) - set(EXAMPLES))
    if unknown:
        sys.exit(f'downstream: --examples={",".join(unknown)}: there are {", ".join(EXAMPLES)}.')
    logging.set_verbosity(logging.ERROR)  # Orbax tells its every move.
    output = Path(_OUTPUT.value).absolute()
    output.mkdir(parents=True, exist_ok=True)
    try:
        trained, rows = pretrained.read_run(_PRETRAINED.value), []
        for name in _EXAMPLES.value:
            written = output / f'{name}.json'
            if not (output / EXAMPLES[name].folder).exists():
                export(Path(_PRETRAINED.value).absolute(), EXAMPLES[name], output / EXAMPLES[name].folder)
            if not written.exists():
                found = finetune(
                    name,
                    trained,
                    str(Path(_DATA.value).absolute()),
                    output,
                    head=_HEAD.value,
                    num_steps=_STEPS.value,
                    batch_size=_BATCH_SIZE.value,
                    seed=_SEED.value,
                )
                written.write_text(json.dumps(found) + '\n')
            rows.append(json.loads(written.read_text()))
        rows += [our_figure(Path(run)) for run in _FINETUNED.value]
    except ValueError as error:
        sys.exit(f'downstream: {error}')
    print(table(rows))


if __name__ == '__main__':
    flags.mark_flags_as_required(['data', 'pretrained', 'output'])
    app.run(main)
