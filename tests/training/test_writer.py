import math

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from avmae_jax.data import tfrecord
from avmae_jax.training import writer


def _events(folder):
    files = sorted(folder.glob('events*'))
    return [Event.FromString(payload) for file in files for _, _, payload in tfrecord.scan_records(file)]


def _values(folder):
    return {value.tag: value for event in _events(folder) for value in event.summary.value}


def test_a_float32_comes_back_as_the_same_bits(tmp_path):
    value = np.float32(0.1) * np.float32(3)
    metric_writer = writer.MetricWriter(tmp_path)
    metric_writer.write_scalars(1, {'loss': value, 'broken': np.float32('nan')})
    metric_writer.close()
    (line,) = writer.read_scalars(tmp_path)
    assert np.float32(line['loss']) == value and line['broken'] == 'nan'
    values = _values(tmp_path)
    assert np.float32(values['loss'].simple_value) == value and math.isnan(values['broken'].simple_value)


def test_images_sound_text_and_settings_are_written_as_tensorboard_reads_them(tmp_path):
    metric_writer = writer.MetricWriter(tmp_path)
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 255
    metric_writer.write_images(1, {'one': image, 'two': np.zeros((2, 4, 6, 1), np.float32)})
    metric_writer.write_audios(1, {'sound': np.zeros((1, 160, 1), np.float32)}, sample_rate=16_000)
    metric_writer.write_texts(1, {'note': 'hello'})
    metric_writer.write_hparams({'lr': 0.1, 'name': None})
    metric_writer.close()
    values = _values(tmp_path)
    assert {'one', 'two/0', 'two/1', 'sound/0'} <= set(values)
    assert (values['one'].image.height, values['one'].image.width) == (4, 6)
    assert values['one'].image.encoded_image_string.startswith(b'\x89PNG')
    assert values['sound/0'].audio.encoded_audio_string.startswith(b'RIFF')
    assert any('note' in tag for tag in values)
    with pytest.raises(ValueError, match='1 or 3 channels'):
        writer.encode_png(np.zeros((4, 4, 7), np.uint8))


def test_lines_of_steps_that_run_again_are_dropped_and_a_line_cut_off_is_survived(tmp_path):
    metric_writer = writer.MetricWriter(tmp_path)
    for step in range(1, 6):
        metric_writer.write_scalars(step, {'loss': step})
    metric_writer.close()
    with (tmp_path / writer.METRICS_FILE).open('a') as file:
        file.write('{"step": 6, "lo')
    metric_writer = writer.MetricWriter(tmp_path, start_step=3)
    metric_writer.write_scalars(4, {'loss': 4.5})
    metric_writer.close()
    lines = [(line['step'], line['loss']) for line in writer.read_scalars(tmp_path)]
    assert lines == [(1, 1), (2, 2), (3, 3), (4, 4.5)]
    (restart,) = [event for event in _events(tmp_path) if event.WhichOneof('what') == 'session_log']
    assert restart.step == 4  # TensorBoard forgets what older files say from here on.


def test_both_writers_have_the_methods_of_clus_interface():
    names = ('write_scalars', 'write_images', 'write_audios', 'write_texts', 'write_hparams', 'flush', 'close')
    for kind in (writer.MetricWriter, writer.NullWriter):
        assert all(callable(getattr(kind, name)) for name in names)
