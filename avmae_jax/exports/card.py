"""The model card: README.md of an export, filled from the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from avmae_jax.evaluation import tables
from avmae_jax.exports.trained import Trained, describe_preprocessing
from avmae_jax.weights.huggingface_files import CONFIG_FILE

NORMALISED = ('huggingface', 'scenic')  # Formats whose models are not shown media, but what is made of them.
TO_FILL = 'TODO'  # What only the people who publish the model can say.

# Format -> how to load what lies beside the card.
USES = {
    'safetensors': """
```python
import avmae_jax

model = avmae_jax.load_pretrained('.')
{calls}
```
""",
    'orbax': """
```python
import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore('/absolute/path/of/params')
```

`config.start.path` of a finetuning takes this folder too.
""",
    'scenic': '\n`checkpoint_{step}` is read by `flax.serialization.msgpack_restore`, in the names of Scenic.\n',
    'jax_export': """
```python
import jax, pathlib

program = jax.export.deserialize(pathlib.Path('embed.stablehlo').read_bytes())
features = program.call({rows})          # any number of clips; cpu, cuda or tpu
```
""",
    'torch': """
```python
from avmae_torch import AVMAE

model = AVMAE.from_pretrained('.')
{calls}
```
""",
    'huggingface': """
```python
import transformers

model = transformers.{architecture}.from_pretrained('.')
```
""",
}


def write_card(folder: epath.Path, trained: Trained, format_name: str, dtype: str) -> None:
    """Writes README.md."""
    architecture = ''
    if format_name == 'huggingface':
        (architecture,) = json.loads((folder / CONFIG_FILE).read_text())['architectures']
    text = card(trained, format_name, dtype, find_results(trained.about), architecture)
    (folder / 'README.md').write_text(text)


def card(trained: Trained, format_name: str, dtype: str, results: Sequence[str], architecture: str = '') -> str:
    """The text; `architecture` is the class of transformers, of that format."""
    about, info = trained.about, trained.info
    kind = 'audio-visual' if len(trained.modalities) > 1 else trained.modalities[0]
    task = f'classifier of {kind} clips' if trained.heads else f'masked autoencoder of {kind} clips'
    steps = about.get('averaged_steps', [])
    if about.get('averaged'):
        weights = f'the moving average of the parameters at step {about["step"]:,}'
    elif len(steps) > 1:
        weights = f'the mean of the checkpoints of steps {", ".join(map(str, sorted(steps)))}'
    else:
        weights = f'the checkpoint of step {about.get("step", 0):,}'
    libraries = {
        key: ', '.join(f'{name} {version}' for name, version in about.get(key, {}).items())
        for key in ('trained_with', 'versions')
    }
    classes = ''.join(f'- `{head}`: {count} classes\n' for head, count in trained.heads.items())
    shapes = ''.join(f'- `{m}`: [b, {", ".join(map(str, s))}]\n' for m, s in trained.row_shapes.items())
    size = trained.model.encoder.size
    inputs = f'Inputs, uint8 frames and samples in [-1, 1]:\n\n{shapes}'
    if format_name in NORMALISED:
        inputs = 'The model takes normalised arrays, float32; what they are made of and how is said below.\n'
    # An imported model that was never trained here has seen no dataset of ours.
    imported = not about.get('trained_on', '')
    origin = f'imported by avmae_jax from {info.name}'
    made = origin if imported else f'trained with avmae_jax: {weights}'
    use = USES[format_name].format(
        calls=_calls(trained), rows=_rows(trained), step=about.get('step', 0), architecture=architecture
    )
    sections = [
        f'---\nlicense: {TO_FILL}\nlibrary_name: avmae_jax\ntags: [{", ".join(["avmae", *trained.modalities])}]\n---\n',
        f'# {task[0].upper()}{task[1:]}, {origin if imported else f"trained on {info.name}"}\n',
        f'A {task} ({type(trained.model.encoder).__name__}, width {size.width}, {size.num_layers} layers, '
        f'{size.num_heads} heads), {made}, stored as {dtype}.\n',
        f'## Use\n{use}',
        inputs
        + (f'\nHeads:\n\n{classes}' if classes else '')
        + '\n## Preprocessing\n\n```json\n'
        + json.dumps(describe_preprocessing(trained), indent=1)
        + '\n```\n',
        '## Training\n',
        (
            f'- {origin}, and not trained further\n'
            if imported
            else f'- data: {info.name}, digest `{about["trained_on"]}`\n- steps: {about.get("step", 0):,}\n'
        )
        + f'- checkpoint: sha256 of its digests `{about.get("digest", "")}`\n'
        f'- {"imported" if imported else "trained"} with: {libraries["trained_with"]}\n'
        f'- exported with: {libraries["versions"]}\n',
        '## Evaluation\n',
        '\n'.join(results) if results else 'The run holds no results of `python -m avmae_jax.evaluate`.\n',
        '## Licence\n',
        f'- weights: {TO_FILL}\n- training data: {TO_FILL}\n- contact: {TO_FILL}\n',
        '## Limits\n',
        f'{TO_FILL}: what the model was not made for, and whom its data show.\n',
    ]
    return '\n'.join(sections)


def _calls(trained: Trained) -> str:
    example = {'video': 'video=frames', 'audio': 'audio=waveform', 'image': 'image=pixels'}
    given = ', '.join(example[m] for m in trained.modalities)
    call = f"logits = model.classify({given})['{next(iter(trained.heads))}']" if trained.heads else ''
    return f'features = model.embed({given})' + (f'\n{call}' if call else '')


def _rows(trained: Trained) -> str:
    example = {'video': 'frames', 'audio': 'waveform', 'image': 'pixels'}
    return '{' + ', '.join(f"'{m}': {example[m]}" for m in trained.modalities) + '}'


def find_results(about: Mapping[str, Any]) -> list[str]:
    """The tables of what the run's folder `evaluation` holds of these very parameters, each with its split.

    Of a file that cannot be read it is told that it cannot: what is exported is no less whole.
    """
    if 'checkpoint' not in about or len(about.get('averaged_steps', [])) > 1:
        return []
    folder = epath.Path(about['checkpoint']).parent.parent / 'evaluation'
    found = []
    for path in sorted(folder.glob('*.json')) if folder.is_dir() else []:
        try:
            content = json.loads(path.read_text())
            subject = content['subject']
            if (subject.get('digest'), subject.get('averaged')) == (about['digest'], about['averaged']):
                split, digest = content['data']['splits']['test'], content['data']['digest']
                results = tables.describe(content['results'])
                found.append(f'`{path.name}`, split {split} of data `{digest}`:\n\n```\n{results}\n```\n')
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            logging.warning('%s holds no results that can be read: %r. The model card says so.', path, error)
            found.append(f'`evaluation/{path.name}` of the run could not be read: its results are not here.\n')
    return found
