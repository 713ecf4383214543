"""Inspecting finds every kind of damage, names it, and leaves what it looks at as it is."""

import json
import pathlib
import shutil
import subprocess
import sys

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from avmae_jax.data import inspection, schema, tfrecord

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments, cwd=ROOT):
    command = [sys.executable, '-m', 'avmae_jax.inspect', *map(str, arguments)]
    env = {'PYTHONPATH': str(ROOT), 'PATH': '', 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A copy that a test may damage."""
    return epath.Path(shutil.copytree(tiny_dataset, tmp_path / 'tiny'))


def shards(dataset):
    return sorted(path for path in dataset.glob('*.tfrecord*') if not path.name.endswith('.index'))


def flip_bit(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def test_a_dataset_is_described_and_drawn_and_no_jax_is_imported(tiny_dataset, tmp_path):
    sheet = tmp_path / 'sheet.png'
    code = (
        'import sys; from absl import app; from avmae_jax import inspect\n'
        'try: app.run(inspect.main)\n'
        'finally: print("jax" in sys.modules, "tensorflow" in sys.modules)'
    )
    command = [sys.executable, '-c', code, str(tiny_dataset), f'--sheet={sheet}', '--num_clips=3']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for text in ('split train', '9 records', '9 classes', 'metal-glide', 'avmae mean', 'No damage was found.'):
        assert text in done.stdout
    assert done.stdout.split()[-2:] == ['False', 'False']
    assert cv2.imread(str(sheet)).shape[0] > 300


def test_a_run_tells_where_its_time_went_before_it_has_ended(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    parts = {'steps': 75.0, 'compile': 25.0}
    line = {'began': 1e9, 'seconds': 100.0, 'first_step': 0, 'step': 10, 'parts': parts}
    (tmp_path / 'goodput.jsonl').write_text(json.dumps(line) + '\n')
    assert '75 % of 1 min 40 s were steps that count (steps 1 min 15 s, compile 25 s)' in run(tmp_path).stdout


def test_an_undamaged_dataset_has_no_faults(tiny_dataset):
    for check in inspection.CHECKS:
        assert inspection.inspect_dataset(epath.Path(tiny_dataset), check).faults == []


def damage_nothing_but_a_payload(dataset):
    flip_bit(shards(dataset)[0], 5000)


def damage_a_length(dataset):
    flip_bit(shards(dataset)[0], 2)


def damage_by_cutting_at_a_record(dataset):
    path = shards(dataset)[0]
    last = tfrecord.read_index(dataset / f'{path.name}.index')[-1, 0]
    path.write_bytes(path.read_bytes()[:last])


def damage_an_index(dataset):
    path = dataset / f'{shards(dataset)[0].name}.index'
    path.write_text(path.read_text().replace('0 ', '1 ', 1))


def damage_by_exchanging_shards(dataset):
    first, second = shards(dataset)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def damage_by_removing_a_shard(dataset):
    shards(dataset)[0].unlink()


@pytest.mark.parametrize(
    ('damage', 'names', 'seen_without_reading'),
    [
        (damage_nothing_but_a_payload, 'checksum of the record', False),
        (damage_a_length, 'length of the record', True),
        (damage_by_cutting_at_a_record, 'bytes and has', True),
        (damage_an_index, '.index', True),
        (damage_by_exchanging_shards, 'sha256', True),
        (damage_by_removing_a_shard, 'is missing', True),
    ],
)
def test_damage_is_found_and_named(dataset, damage, names, seen_without_reading):
    first = shards(dataset)[0].name
    damage(dataset)
    faults = inspection.inspect_dataset(dataset, 'full').faults
    assert any(names in fault for fault in faults), faults
    assert any(first in fault for fault in faults), faults
    assert bool(inspection.inspect_dataset(dataset, 'framing').faults) == seen_without_reading


def test_records_behind_a_damaged_one_are_still_read(dataset):
    path = shards(dataset)[-1]
    whole = [payload for _, payload in inspection.walk(path)]
    flip_bit(path, 5000)
    found = [payload for _, payload in inspection.walk(path)]
    assert isinstance(found[0], str) and str(path) in found[0] and 'byte 0' in found[0]
    assert found[1:] == whole[1:] and len(whole) > 1


def test_the_exit_code_says_damaged_and_the_sheet_is_drawn_of_what_is_left(dataset, tmp_path):
    flip_bit(shards(dataset)[-1], 5000)
    done = run(dataset, f'--sheet={tmp_path / "sheet.png"}')
    assert done.returncode == 1
    assert 'DAMAGED' in done.stderr and shards(dataset)[-1].name in done.stderr
    assert (tmp_path / 'sheet.png').exists()
    assert run(dataset, '--noverify', '--sheet=').returncode == 0


def test_one_shard_alone_is_held_against_its_dataset(dataset):
    path = shards(dataset)[0]
    assert inspection.inspect_shard(path, 128).faults == []
    other = shards(dataset)[1]
    path.write_bytes(other.read_bytes())
    faults = inspection.inspect_shard(path, 128).faults
    assert any('sha256' in fault for fault in faults) and any('.index' in fault for fault in faults)


def test_sequence_examples_of_the_reference_are_read(reference):
    path = epath.Path(reference) / 'data' / 'tiny_dmvr.tfrecord'
    found = inspection.inspect_shard(path, mel_bins=16)
    assert found.faults == [] and '3 of kind SequenceExample' in dict(found.lines)['records']
    assert len(inspection.sample_clips([path], 2, 16)) == 2
    assert inspection.inspect_shard(path, mel_bins=128).faults == []  # Said, but no damage.


def test_foreign_examples_are_described_by_their_fields(tmp_path):
    path = epath.Path(tmp_path) / 'other.tfrecord'
    record = schema.write_example({'image': [b'1234'], 'label': [3], 'weight': [0.5, 0.25]})
    path.write_bytes(tfrecord.frame_record(record))
    found = inspection.inspect_shard(path, 128)
    assert found.faults == []
    assert 'label: 1 x int: 3' in str(found.lines) and 'weight: 2 x float: 0.5, 0.25' in str(found.lines)


def test_bytes_that_are_no_record_at_all_are_a_fault(tmp_path):
    path = epath.Path(tmp_path) / 'odd.tfrecord'
    path.write_bytes(b'neither this nor that, but long enough')
    assert 'length of the record' in inspection.inspect_shard(path, 128).faults[0]
    path.write_bytes(tfrecord.frame_record(b'\xff\xff\xff'))
    assert 'no Example' in inspection.inspect_shard(path, 128).faults[0]


def test_checkpoints_are_listed_and_checked(tmp_path):
    from avmae_jax.checkpoints import manager

    checkpoints = manager.Checkpoints(tmp_path / 'run' / 'checkpoints')
    params = {'encoder': {'kernel': jnp.ones((4, 6))}}
    checkpoints.save(5, {'params': params}, {'step': 5})
    checkpoints.wait()
    checkpoints.close()
    done = run(tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert '24 values in 1 arrays' in done.stdout and 'encoder/kernel  float32 (4, 6)' in done.stdout
    content = json.loads((tmp_path / 'run' / 'checkpoints' / '5' / 'digests.json').read_text())
    name = max(content['files'], key=lambda name: content['files'][name][0])
    flip_bit(tmp_path / 'run' / 'checkpoints' / '5' / name, -1)
    done = run(tmp_path / 'run' / 'checkpoints' / '5')
    assert done.returncode == 1 and name in done.stderr


@pytest.mark.parametrize('what', ['nothing-there', 'empty-folder', 'notes.txt', 'clips.tfrecord.index'])
def test_what_is_not_known_is_said(tmp_path, what):
    if what == 'empty-folder':
        (tmp_path / what).mkdir()
    elif what != 'nothing-there':
        (tmp_path / what).write_text('0 10\n')
    done = run(tmp_path / what, cwd=tmp_path)
    assert done.returncode == 2 and what in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'arguments, wanted',
    [
        (['--split=nope'], '--split=nope: there are'),
        (['--num_clips=-3'], 'num_clips must be 0 or more'),
        (['--sheet=/'], 'directory'),
        (['--colour=blue'], "Unknown command line flag 'colour'"),
        (['another'], 'give one folder or file'),
    ],
)
def test_a_wrong_option_is_told_in_one_line(dataset, arguments, wanted):
    done = run(dataset, *arguments)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('inspect: ') and wanted in done.stderr.splitlines()[-1]


def test_a_config_that_fails_by_itself_is_named(tmp_path):
    (tmp_path / 'broken.py').write_text('raise OSError(3)')
    done = run(tmp_path / 'broken.py')
    assert done.returncode == 2 and 'broken.py fails in line 1 with OSError: 3.' in done.stderr


def test_configs_are_listed_with_their_values(tmp_path):
    done = run('configs/tiny.py:encoder=early')
    assert done.returncode == 0, done.stderr
    assert 'model.encoder.name = early' in done.stdout and 'objective.mask_ratio.video = 0.9' in done.stdout
    (tmp_path / 'config.json').write_text(json.dumps({'data': {'path': 'x'}, 'seed': 3}))
    assert 'data.path = x' in run(tmp_path / 'config.json').stdout
    (tmp_path / 'config.json').write_text('{')
    assert run(tmp_path / 'config.json').returncode == 2
    assert run('configs/tiny.py:encoder=none').returncode == 2


def test_sizes_read_well():
    assert [inspection.format_bytes(n) for n in (0, 999, 1500, 2_000_000, 3.2e9, 5e12, 7e15)] == [
        '0 bytes', '999 bytes', '1.5 kB', '2.0 MB', '3.2 GB', '5.0 TB', '7,000.0 TB',
    ]  # fmt: skip


def test_labels_outside_their_classes_are_a_fault(dataset):
    info = schema.read_info(dataset)
    text = (dataset / schema.INFO_FILE).read_text()
    tree = json.loads(text)
    names = tree['labels']['label']['names'][:2]
    tree['labels']['label'] = {'names': names, 'multi': False, 'digest': schema.LabelSet(tuple(names), False).digest}
    (dataset / schema.INFO_FILE).write_text(json.dumps(tree))
    faults = inspection.inspect_dataset(dataset, 'full').faults
    assert len(faults) >= 3 and all('none of its 2 classes' in fault for fault in faults)
    assert np.all([info.labels['label'].names[i] for i in range(2)] == names)
