import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import avmae_jax
from avmae_jax import experiment, export, pretrained, starts, subjects
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.weights.table import flatten


def equal_bits(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert set(found) == set(wanted)
    return all(np.asarray(found[name]).tobytes() == np.asarray(wanted[name]).tobytes() for name in wanted)


@pytest.mark.parametrize('average_last', [1, 2])
def test_orbax_itself_and_a_start_read_what_was_exported(average_last, pretrained_run, tmp_path):
    trained = pretrained.read_run(pretrained_run, average_last=average_last)
    export.export(tmp_path / 'out', trained, 'orbax', 'float32')
    plain = ocp.StandardCheckpointer().restore(tmp_path / 'out/checkpoints/7/params')
    assert equal_bits(plain, trained.params)
    assert equal_bits(experiment.restore_model(tmp_path / 'out').params, trained.params)
    assert {path.name for path in (tmp_path / 'out/checkpoints/7').iterdir() if path.is_dir()} == {'params', 'meta'}


def test_a_finetuning_starts_from_it_as_from_the_run(pretrained_run, small_finetuning, tmp_path):
    export.export(tmp_path / 'out', pretrained.read_run(pretrained_run), 'orbax', 'float32')
    begun = []
    for path in (pretrained_run, tmp_path / 'out'):
        config = small_finetuning('', **{'start.path': str(path)})
        source = experiment.open_train_sources(config)
        begun.append(starts.start_params(config, experiment.build(config, source), source)[0])
    assert equal_bits(*begun)


def test_the_average_is_stored_as_the_parameters_and_is_evaluated(finetuned_run, tmp_path):
    trained = pretrained.read_run(finetuned_run)
    export.export(tmp_path / 'out', trained, 'orbax', 'float32')
    subject = subjects.load_subject(tmp_path / 'out', overrides={})
    assert equal_bits(subject.params, trained.params) and not subject.about['averaged']
    assert equal_bits(avmae_jax.load_pretrained(tmp_path / 'out').params, trained.params)


def test_bfloat16_is_stored_and_read_as_float32(pretrained_run, tmp_path):
    trained = pretrained.read_run(pretrained_run)
    export.export(tmp_path / 'out', trained, 'orbax', 'bfloat16')
    plain = ocp.StandardCheckpointer().restore(tmp_path / 'out/checkpoints/7/params')
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in flatten(trained.params).items()}
    assert equal_bits(plain, rounded)
    wide = experiment.restore_model(tmp_path / 'out').params
    assert equal_bits(wide, {name: x.astype(np.float32) for name, x in rounded.items()})


def files_with(folder, text):
    return [path.name for path in folder.rglob('*') if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize('format_name', ['orbax', 'safetensors', 'torch'])
def test_no_folder_of_the_machine_is_published(format_name, finetuned_run, tmp_path):
    trained = pretrained.read_run(finetuned_run)
    trained.config['start'] = {**trained.config['start'], 'path': '/home/somebody/run'}
    data = trained.config['data']['path']
    trained.config['data'] = {**trained.config['data'], 'data_dir': '/home/somebody/tfds'}
    assert str(finetuned_run) in trained.about['checkpoint'] and data
    export.export(tmp_path / 'out', trained, format_name, 'float32')
    for text in (data, str(finetuned_run), '/home/somebody'):
        assert not files_with(tmp_path / 'out', text), text
    assert files_with(tmp_path / 'out', f'{finetuned_run.name}/checkpoints/3')
    assert trained.config['data']['path'] == data


def test_evaluating_an_export_asks_for_the_data(finetuned_run, tiny_dataset, tmp_path):
    export.export(tmp_path / 'out', pretrained.read_run(finetuned_run), 'orbax', 'float32')
    with pytest.raises(ValueError, match='config.data.path is empty: give --config.data.path=DIR'):
        Evaluator(subjects.load_subject(tmp_path / 'out', overrides={}), split='test')
    subject = subjects.load_subject(tmp_path / 'out', overrides={'data.path': str(tiny_dataset)})
    assert len(Evaluator(subject, split='test').source)
