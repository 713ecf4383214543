"""mp4 -> prepare -> train -> evaluate, each the command that a person types; killing and resuming is in test_drills."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from avmae_jax import experiment, settings
from avmae_jax.checkpoints import manager
from avmae_jax.data import tfrecord
from avmae_jax.training.writer import read_scalars


@pytest.mark.timeout(900)
def test_from_mp4_files_to_figures_and_pictures(start_training, tiny_dataset, repository, tmp_path):
    arguments = [
        '--config.num_steps=30',
        '--config.checkpoint.every_steps=10',
        '--config.evaluation.every_steps=10',
        '--config.report.pictures_every_steps=15',
        '--config.report.profile_first_step=5',
        '--config.report.profile_num_steps=2',
    ]
    process = start_training(tmp_path, *arguments)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]

    lines = read_scalars(tmp_path)
    trained = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in trained] == list(range(1, 31))
    wanted = {'loss', 'reconstruction/video', 'reconstruction/audio', 'learning_rate', 'grad_norm', 'param_norm'}
    assert wanted | {'update_norm', 'clips_per_second', 'data_wait_share'} <= set(trained[-1])
    assert [line['step'] for line in lines if 'test/loss' in line] == [10, 20, 30]
    events = [path for path in tmp_path.glob('events*') for _ in tfrecord.scan_records(path)]
    assert len(events) > len(lines)
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['step-0000015.png', 'step-0000030.png']
    tags = {value.tag for path in tmp_path.glob('events*') for _, _, event in tfrecord.scan_records(path)
            for value in Event.FromString(event).summary.value}  # fmt: skip
    assert {'test/reconstructions', 'test/sound 1/reconstructed/0'} <= tags
    assert any((tmp_path / 'profile').rglob('*.xplane.pb'))
    assert 'encoder/joint/norm/scale' in (tmp_path / 'parameters.txt').read_text()
    assert settings.load_config(tmp_path)['num_steps'] == 30
    assert manager.find_fault(tmp_path / 'checkpoints' / '30') is None

    restored = experiment.restore_model(tmp_path)
    assert restored.info.modalities == ('audio', 'video') and restored.meta['config']['num_steps'] == 30
    assert np.isfinite(restored.params['encoder']['joint']['norm']['scale']).all()

    command = [sys.executable, '-m', 'avmae_jax.evaluate', f'--workdir={tmp_path}', '--what=reconstruction']
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = (tmp_path / 'evaluation').glob('*.json')
    assert json.loads(result.read_text())
