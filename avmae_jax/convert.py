"""Makes a run of somebody else's weights: an ordinary workdir, at step 0.

    python -m avmae_jax.convert --from=huggingface --input=DIR --output=RUN --config=configs/pretrain/imagenet.py

The model is that of the file, and so is what the file says of its pictures and sound; the rest (data, optimiser,
objective) is of `--config`, a config of pretraining for an autoencoder and one of configs/finetune for a classifier.
`--config.name=value` changes one of its settings. Where both say something, what is taken is printed; what cannot be is
an error, and nothing is written then. RUN gets

    config.json, config.py   the settings; to go on with it:
                             train --config=RUN/config.py --config.data.path=SHARDS --workdir=RUN
    start.txt                what became of every array
    parameters.txt           the table of parameters
    checkpoints/0            parameters, fresh optimiser

and is evaluated, planned (--config=RUN/config.py --num_clips=N), finetuned (--config.start.path=RUN) and gone on with
like any other. With config.data.path the data is looked at, and its classes are those of the head; without, RUN has
none, and every command that reads data is to be told where it is.

Exit codes: 0 done; 2 a setting is wrong, or the weights do not fit, or a file cannot be read or written; 130
interrupted.
"""

from __future__ import annotations

import dataclasses
import logging as python_logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath

from avmae_jax import checks, experiment, settings, whole
from avmae_jax.checkpoints.manager import CheckpointError, Checkpoints
from avmae_jax.data.described import Described
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.schema import LabelSet, unnamed_classes
from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.parallel import hosts
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.training import report
from avmae_jax.training import state as state_lib
from avmae_jax.weights import files
from avmae_jax.weights import imported as imported_lib
from avmae_jax.weights.formats import FORMATS
from avmae_jax.weights.imported import HEAD, Imported

EXIT_SETTINGS, EXIT_INTERRUPTED = 2, 130
NUM_CLIPS = 1_000_000  # Of data that is not there; only the length of a run by epochs hangs on it.
CONFIG_MODULE = '''"""The settings of this run, for commands that take --config."""

import json
import pathlib

from ml_collections import config_dict


def for_flags(value):
    """What JSON has no name for: tuples, and settings that are open and take any value."""
    if isinstance(value, dict):
        return {name: for_flags(one) for name, one in value.items()}
    if isinstance(value, list):
        return tuple(map(for_flags, value))
    return config_dict.placeholder(object) if value is None else value


def get_config():
    config = json.loads((pathlib.Path(__file__).parent / 'config.json').read_text())
    return config_dict.ConfigDict(for_flags(config))
'''


def describe_given() -> str:
    """What may be told of which format."""
    told = [f'{name} ({what}) of {kind}' for kind, each in FORMATS.items() for name, what in each.given.items()]
    return ', '.join(told)


_FROM = flags.DEFINE_string('from', None, f'How the weights are published: {", ".join(FORMATS)}.')
_INPUT = flags.DEFINE_string('input', None, 'The file or folder that is read.')
_OUTPUT = flags.DEFINE_string('output', None, 'The workdir that is written; it must not be there yet.')
_CONFIG = flags.DEFINE_string('config', None, 'Config file for what the weights do not say, with its arguments.')
_SHA256 = flags.DEFINE_string('sha256', '', 'Of the input file, as its publisher gives it; another one is refused.')
_GIVEN = flags.DEFINE_multi_string('given', [], f'NAME=VALUE, what a format needs told: {describe_given()}.')


def convert(
    kind: str,
    path: epath.PathLike,
    output: epath.PathLike,
    config: settings.Config,
    *,
    overrides: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
    sha256: str = '',
) -> str:
    """Reads weights and writes the run; the text that tells what became of what.

    Args:
      kind: key of FORMATS.
      config: for all that the weights do not say.
      overrides: 'section.name' -> value, put into the config; where the file says another, it is refused for the model
        and taken for all else.
      given: what the format needs told.
      sha256: that the file must have; '' for any.
    """
    folder, overrides = epath.Path(output), dict(overrides or {})
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f'--output={output} is there already: give a folder that is not, or is empty.')
    config = settings.override(config, overrides)
    files.check_digest(path, sha256)
    imported = read(kind, path, config, given or {})
    try:
        config, told = merge(config, imported, overrides)
        source, digest = open_data(config, imported, f'{kind} {epath.Path(path).name}')
        checks.check(config, source)
        parts = experiment.build(config, source)
        check_shapes(imported, parts, source)
        params = with_head(imported, parts)
    except ValueError as error:
        raise ValueError(f'{path} and the config: {error}') from error
    text = '\n\n'.join([*told, imported_lib.table(imported)])
    write(folder, config, parts, source, digest=digest, params=params, text=text)
    return text


def read(kind: str, path: epath.PathLike, config: settings.Config, given: Mapping[str, str]) -> Imported:
    """The model in a file."""
    format = settings.choose_flag(FORMATS, 'from', kind)
    unknown = sorted(set(given) - set(format.given))
    if unknown:
        raise ValueError(f'--given={unknown[0]}: {kind} takes {", ".join(format.given) or "nothing"}.')
    if not epath.Path(path).exists():
        raise ValueError(f'--input={path}: there is no such file or folder.')
    compute = settings.construct(Compute, 'model.compute', config['model']['compute'])
    return format.read(epath.Path(path), compute, given)


def merge(
    config: settings.Config, imported: Imported, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The config with the model of the file and what the file says of data, and a table of what that changed."""
    classifying = isinstance(imported.model, Classifier)
    if classifying == ('decoder' in config['model']):
        raise ValueError(
            'the weights are of a classifier, and the config pretrains: give one of configs/finetune.'
            if classifying
            else 'the weights are of an autoencoder, and the config is for a classifier: give one of configs/pretrain.'
        )
    ours, theirs = set(config['model']['tokenizers']), set(imported.model.tokenizers)
    if ours != theirs:
        raise ValueError(
            f'the weights are of {", ".join(sorted(theirs))}, and the config is for {", ".join(sorted(ours))}: choose '
            'another config, or its argument modalities=....'
        )
    if classifying and list(config['objective']['heads']) != [HEAD]:
        raise ValueError(
            f'the weights have one head, {HEAD!r}, and config.objective.heads names '
            f'{", ".join(config["objective"]["heads"])}.'
        )
    merged = settings.to_plain(config)
    changes = []
    model = experiment.describe_model(imported.model)
    # How a model is trained is not in its weights.
    model['encoder']['drop_path'] = merged['model']['encoder'].get('drop_path', 0.0)
    known = settings.flatten({'model': model})
    # With its defaults, and numbers for the name of a size.
    described = Described('', 1, classes=dict.fromkeys(config['objective'].get('heads', {}), 1))
    before = settings.flatten({'model': experiment.describe_model(experiment.build_model(config, described.info))})
    for name in sorted(known.keys() | before.keys()):
        there, here = known.get(name, '-'), before.get(name, '-')
        if there == here:
            continue
        if asked := next((one for one in overrides if name == one or name.startswith(f'{one}.')), None):
            raise ValueError(
                f'--config.{asked}={overrides[asked]!r} makes {name}={here!r}, and the weights are of a model with '
                f'{there!r}.'
            )
        changes.append((name, here, there, 'file'))
    merged['model'] = model
    for name, there in sorted(settings.flatten(dict(settings.to_plain(imported.settings))).items()):
        *sections, last = name.split('.')
        section: Any = merged
        for part in sections:
            section = section.setdefault(part, {})
        here = section.get(last, '-')
        wins = 'config' if name in overrides else 'file'
        if here != there:
            changes.append((name, here, there, wins))
        if wins == 'file':
            section[last] = there
    if not changes:
        return merged, []
    lines = [('setting', 'config', 'file', 'taken'), *((name, *map(str, rest)) for name, *rest in changes)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return merged, ['\n'.join('  '.join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines)]


def open_data(config: settings.Config, imported: Imported, name: str) -> tuple[Mixture, str]:
    """The clips of config.data.path and their digest, or such as they would be and ''."""
    if config['data']['path']:
        source = experiment.open_train_sources(config)
        check_classes(imported, source)
        return source, experiment.dataset_digest(source)
    described = Described(
        name, NUM_CLIPS, image={'image', 'audio'} & set(config) == {'image'}, clip_seconds=None, conventions=()
    )
    if isinstance(imported.model, Classifier):
        count = imported.model.num_classes[HEAD]
        names = tuple(imported.classes or unnamed_classes(count))
        multi = config['objective']['heads'][HEAD] == 'sigmoid'
        described.info = dataclasses.replace(described.info, labels={HEAD: LabelSet(names, multi)})
    return Mixture([described]), ''


def check_classes(imported: Imported, source: Mixture) -> None:
    """Refuses a head for other classes than those of the data."""
    if not isinstance(imported.model, Classifier) or imported.classes is None or HEAD not in source.labels:
        return
    names, count = source.labels[HEAD].names, imported.model.num_classes[HEAD]
    if len(names) != count:
        raise ValueError(f'the head has {count} classes, and the data in config.data.path {len(names)}.')
    differing = [(a, b) for a, b in zip(imported.classes, names, strict=False) if a != b]
    if differing:
        raise ValueError(
            f'{len(differing)} of {count} classes have other names in the file than in the data, such as '
            f'{differing[0][0]!r} and {differing[0][1]!r}: prepare the data with the label map of the file.'
        )


def check_shapes(imported: Imported, parts: experiment.Parts, source: Mixture) -> None:
    """Refuses views of another size than the model was trained on."""
    for modality, shape in imported.shapes.items():
        if parts.shapes[modality] != tuple(shape):
            where = {
                'image': 'config.image.crop_size',
                'video': 'config.video.num_frames and crop_size',
                'audio': 'config.preprocess.num_spec_frames and num_mel_bins',
            }[modality]
            raise ValueError(
                f'the model was trained on {modality} of shape {tuple(shape)}, and the config gives '
                f'{parts.shapes[modality]}: set {where}. To train at another size, finetune it with config.start.path.'
            )


def with_head(imported: Imported, parts: experiment.Parts) -> Any:
    """The parameters for the model that was built; a head that says nothing has as many classes as the data."""
    model, params = parts.model, imported.params
    if isinstance(model, Classifier) and imported.classes is None:
        count = model.num_classes[HEAD]
        width = params[f'head_{HEAD}']['kernel'].shape[0]
        params = {**params, f'head_{HEAD}': {'kernel': jnp.zeros((width, count)), 'bias': jnp.zeros(count)}}
    wanted = jax.eval_shape(experiment.make_init_params(model, parts.objective, parts.shapes), jax.random.key(0))
    ours, theirs = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (wanted, params))
    assert ours == theirs, 'the model of the file is not rebuilt from its settings'
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def write(
    folder: epath.Path,
    config: settings.Config,
    parts: experiment.Parts,
    source: Mixture,
    *,
    digest: str,
    params: Any,
    text: str,
) -> None:
    """The workdir, whole or not at all."""
    place = experiment.place(config, experiment.make_init(parts), mesh_lib.make_mesh())
    on_devices = jax.tree.map(hosts.global_array, params, place.shardings.params)
    key = jax.random.key(config['seed'])
    state = state_lib.init_from(on_devices, key, place.shardings, parts.objective.init, parts.optimizer)
    meta = experiment.make_meta(config, source, parts.shapes, state)
    meta['dataset']['digest'] = digest
    with whole.new_folder(folder) as made:
        settings.save_config(config, made)
        (made / 'config.py').write_text(CONFIG_MODULE)
        (made / 'start.txt').write_text(f'{text}\n')
        report.write_overview(state.params, made / 'parameters.txt')
        checkpoints = Checkpoints(made / 'checkpoints', keep_best=0)
        checkpoints.save(0, state_lib.to_items(state), meta)
        checkpoints.close()


# -- The command --


def parse_given(texts: Sequence[str]) -> dict[str, str]:
    """'num_heads=12' -> {'num_heads': '12'}."""
    pairs = [text.partition('=') for text in texts]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f'--given={name}: give NAME=VALUE.')
    return {name: value for name, _, value in pairs}


def run(overrides: Mapping[str, Any]) -> None:
    values: dict[str, Any] = {flag.name: flag.value for flag in (_FROM, _INPUT, _OUTPUT, _CONFIG)}
    for name, value in values.items():
        if not value:
            raise ValueError(f'--{name} is needed. {flags.FLAGS[name].help}')
    config, given = settings.read_config(values['config']), parse_given(_GIVEN.value)
    text = convert(
        values['from'],
        values['input'],
        values['output'],
        config,
        overrides=overrides,
        given=given,
        sha256=_SHA256.value,
    )
    print(f'{text}\n\nWritten to {values["output"]}.', flush=True)


def main(argv: list[str], overrides: Mapping[str, Any]) -> int:
    try:
        if len(argv) > 1:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        run(overrides)
    except (ValueError, OSError, CheckpointError) as error:
        logging.debug('The setting was found wrong here:', exc_info=True)
        print(f'convert: {error}', file=sys.stderr, flush=True)
        return EXIT_SETTINGS
    except KeyboardInterrupt:
        print('convert: interrupted; nothing was written.', file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def _not_chatty(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING


def run_main() -> None:
    argv, overrides = settings.split_overrides(sys.argv)
    logging.get_absl_handler().addFilter(_not_chatty)  # Orbax tells its every move.
    app.run(lambda rest: main(rest, overrides), argv=argv, flags_parser=settings.flags_parser('convert'))


if __name__ == '__main__':
    run_main()
