"""Back to Scenic's names: what is written is read by `convert`'s reader as the same model, to the bit."""

import jax
import numpy as np
import pytest

from avmae_jax import experiment, export, pretrained
from avmae_jax.exports import scenic
from avmae_jax.exports.trained import difference, named_arrays
from avmae_jax.models.blocks import Compute
from avmae_jax.weights import scenic_files
from avmae_jax.weights.table import flatten


def make_trained(run, config, seed=0):
    """What `read_run` gives of a run with another model, without one."""
    restored = pretrained.read_run(run)
    model, objective = experiment.build_model(config, restored.info), experiment.build_objective(config)
    shapes = {m: shape for m, shape in restored.shapes.items() if m in model.tokenizers}
    params = jax.eval_shape(experiment.make_init_params(model, objective, shapes), jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    return restored._replace(model=model, objective=objective, params=params, shapes=shapes, config=config)


def some(names, quick):
    """All of the names; those that are not quick for `-m slow`."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def changed(config, changes):
    """With settings put in, those included that the config leaves at their defaults."""
    for path, value in changes.items():
        *sections, name = path.split('.')
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return config


def assert_round_trip(trained, folder):
    export.export(folder, trained, 'scenic', 'float32')
    variant = scenic.variant_of(trained.model)
    imported = scenic_files.read_imported(folder / 'checkpoint_7', Compute('float32', scan=False), {}, variant)
    looped = flatten(imported.params)
    wanted = named_arrays(trained.params)
    assert set(looped) == set(wanted)
    assert all(np.asarray(looped[name]).tobytes() == wanted[name].tobytes() for name in wanted)
    assert not difference(trained.model, imported.model)
    assert imported.shapes == trained.shapes
    return imported


TOKEN = {f'model.tokenizers.{m}.class_token': True for m in ('video', 'audio')}
LEARNED = {f'model.tokenizers.{m}.positions': 'learned' for m in ('video', 'audio')}
AUTOENCODERS = {
    'separate': ('encoder=separate', {}),
    'shared': ('encoder=shared,decoder=joint', {}),
    'early': ('encoder=early,decoder=separate', {'model.decoder.positions': 'learned'}),
    'mid': ('encoder=mid', {**TOKEN, **LEARNED}),
    'audio': ('encoder=shared,modalities=audio', {}),
    'video': ('encoder=separate,modalities=video', {'model.tokenizers.video.positions': 'learned_space_time'}),
}


@pytest.mark.parametrize('name', some(AUTOENCODERS, ('mid', 'audio')))
def test_autoencoders_come_back_bit_for_bit(name, pretrained_run, small_config, tmp_path):
    arguments, changes = AUTOENCODERS[name]
    assert_round_trip(make_trained(pretrained_run, changed(small_config(arguments), changes)), tmp_path / 'out')


MBTS = {
    'bottlenecks': ('', {}),
    'concatenation': ('fusion=concatenation', {}),
    'tokens': (
        '',
        {**TOKEN, **{name.replace('class_token', 'class_position'): True for name in TOKEN}, 'model.pooling': 'token'},
    ),
    'older': ('', {**LEARNED, 'model.pooling': 'joint_mean', 'model.representation': 6}),
}


@pytest.mark.parametrize('name', some(MBTS, ('tokens',)))
def test_mbts_come_back_bit_for_bit(name, pretrained_run, small_finetuning, tmp_path):
    arguments, changes = MBTS[name]
    assert_round_trip(make_trained(pretrained_run, changed(small_finetuning(arguments), changes)), tmp_path / 'out')


REFUSED = {
    'gelu': (
        'pretraining', 'encoder=early', {'model.architecture': {'gelu': 'exact'}}, 'encoder.size.architecture.gelu',
    ),
    'several by mid': ('finetuning', 'encoder=mid', {}, 'by MBT alone, not by MidEncoder'),
    'pooled norm': ('finetuning', '', {'model.pooled_norm': True}, 'no counterpart.*norm/scale'),
    'patches': (
        'pretraining', 'encoder=early', {'model.tokenizers.audio.patch': (8, 8)}, 'tokenizers.audio.patch',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', some(REFUSED, ('gelu', 'patches')))
def test_a_model_without_counterpart_is_refused_with_the_field(
    name, pretrained_run, small_config, small_finetuning, tmp_path
):
    kind, arguments, changes, message = REFUSED[name]
    config = changed({'pretraining': small_config, 'finetuning': small_finetuning}[kind](arguments), changes)
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path / 'out', make_trained(pretrained_run, config), 'scenic', 'float32')
    assert not list(tmp_path.iterdir())


def test_scenic_has_no_bfloat16(pretrained_run, tmp_path):
    with pytest.raises(ValueError, match='--dtype=bfloat16'):
        export.export(tmp_path / 'out', pretrained.read_run(pretrained_run), 'scenic', 'bfloat16')
