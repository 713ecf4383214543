import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import PartitionSpec as P

from avmae_jax.checkpoints import manager
from avmae_jax.parallel import mesh


def _items(value=1.0):
    # Large enough that orbax writes it to a file of its own.
    kernel = value + jax.random.normal(jax.random.key(0), (64, 128))
    return {'params': {'kernel': kernel, 'bias': jnp.zeros(3)}, 'opt_state': {'count': jnp.int32(value)}}


def _targets(items, sharding=None):
    def target(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(target, items)


def _save_steps(folder, steps, **options):
    checkpoints = manager.Checkpoints(folder / 'checkpoints', **options)
    for step in steps:
        checkpoints.save(step, _items(step), {'step': step})
    checkpoints.close()


def _restore(folder, **options):
    checkpoints = manager.Checkpoints(folder / 'checkpoints', **options)
    restored = checkpoints.restore(_targets(_items()))
    checkpoints.close()
    return restored


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    _save_steps(tmp_path, [3])
    restored = _restore(tmp_path)
    assert restored.step == 3 and restored.meta == {'step': 3}
    jax.tree.map(np.testing.assert_array_equal, restored.items, _items(3))


def test_nothing_is_restored_from_an_empty_folder(tmp_path):
    assert _restore(tmp_path) is None


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = manager.Checkpoints(tmp_path / 'checkpoints', keep_last=2, keep_best=1)
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.5), (4, None), (5, float('nan'))):
        checkpoints.save(step, _items(), {}, metric=metric)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['2', '4', '5']


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    _save_steps(tmp_path, [1])
    checkpoints = manager.Checkpoints(tmp_path / 'checkpoints')
    sharding = jax.NamedSharding(mesh.make_mesh(), P(None, 'data'))
    target = {'params': _targets(_items()['params'])}
    target['params']['kernel'] = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)
    restored = checkpoints.restore(target)
    assert restored.items['params']['kernel'].sharding == sharding
    np.testing.assert_array_equal(restored.items['params']['kernel'], _items()['params']['kernel'])
    checkpoints.close()


def _flip_bit(file: pathlib.Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _largest_file(folder: pathlib.Path):
    return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    'flipped bit': lambda folder: _flip_bit(_largest_file(folder / 'params')),
    'flipped bit in meta': lambda folder: _flip_bit(_largest_file(folder / 'meta')),
    'flipped bit in the digests': lambda folder: _flip_bit(folder / manager.DIGESTS_FILE),
    'cut file': lambda folder: _largest_file(folder).write_bytes(b'cut'),
    'missing file': lambda folder: _largest_file(folder / 'opt_state').unlink(),
    'no digests': lambda folder: (folder / manager.DIGESTS_FILE).unlink(),
    'no metadata': lambda folder: (folder / manager.STEP_METADATA_FILE).unlink(),
    'empty folder': lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    'temporary folder': lambda folder: folder.rename(f'{folder}{manager.TEMPORARY_MARK}'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_saying_so_and_its_step_can_be_saved_again(tmp_path, damage, monkeypatch):
    _save_steps(tmp_path, [1, 2])
    DAMAGES[damage](tmp_path / 'checkpoints' / '2')
    said = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    restored = _restore(tmp_path)
    assert restored.step == 1
    jax.tree.map(np.testing.assert_array_equal, restored.items, _items(1))
    if damage != 'temporary folder':  # Orbax itself does not take that for a checkpoint.
        assert any('step 2' in text and 'passed over' in text for text in said)
    _save_steps(tmp_path, [2])
    assert _restore(tmp_path).step == 2


def test_every_single_file_is_covered_by_the_digests(tmp_path):
    _save_steps(tmp_path, [1])
    folder = tmp_path / 'checkpoints' / '1'
    assert manager.find_fault(folder) is None
    own = (manager.DIGESTS_FILE, manager.STEP_METADATA_FILE, manager.COMMIT_FILE)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    assert files - set(own) == set(json.loads((folder / manager.DIGESTS_FILE).read_text())['files'])
    for file in sorted(files - {manager.COMMIT_FILE}):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 16]) if content else b'x')
        assert manager.find_fault(folder) is not None, file
        (folder / file).write_bytes(content)
    assert manager.find_fault(folder) is None


def test_reading_somebodys_run_changes_nothing_in_it(tmp_path):
    _save_steps(tmp_path, [1, 2])
    _flip_bit(_largest_file(tmp_path / 'checkpoints' / '2' / 'params'))
    before = sorted(path.as_posix() for path in tmp_path.rglob('*'))
    assert _restore(tmp_path, read_only=True).step == 1
    assert sorted(path.as_posix() for path in tmp_path.rglob('*')) == before


def test_a_process_lost_in_a_save_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    checkpoints = manager.Checkpoints(tmp_path / 'checkpoints')

    def lose_a_process(*_, **__):
        try:
            raise jax.errors.JaxRuntimeError('UNAVAILABLE: the barrier was not reached')
        except jax.errors.JaxRuntimeError as error:
            raise ValueError('what orbax makes of it') from error

    monkeypatch.setattr(checkpoints._manager, 'save', lose_a_process)
    with pytest.raises(ValueError, match='what orbax makes of it'):  # And no CheckpointError, after which none retries.
        checkpoints.save(1, _items(), {})
    monkeypatch.undo()
    checkpoints.close()


def test_a_full_disk_is_told_with_folder_space_and_need_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    _save_steps(tmp_path, [1])
    checkpoints = manager.Checkpoints(tmp_path / 'checkpoints')
    usage = shutil.disk_usage('/')._replace(free=10)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(manager.CheckpointError, match=r'free there.*last checkpoint is of step 1') as caught:
        checkpoints.save(2, _items(), {})
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    checkpoints.close()
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['1']
    assert _restore(tmp_path).step == 1
