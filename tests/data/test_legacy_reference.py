"""The SequenceExamples of the public reference give the batches that its own loader gives."""

import json
import shutil

import numpy as np
import pytest

from avmae_jax.data import batches, sampling, sources, video, views

CASES = {
    'validation': {'num_clips': 1, 'eval_crop': 'central'},
    'test': {'num_clips': 3, 'eval_crop': 'central'},
    'validation_3spatial': {'num_clips': 1, 'eval_crop': 'three'},
    'test_3spatial': {'num_clips': 3, 'eval_crop': 'three'},
}


@pytest.fixture(scope='module')
def settings(reference):
    return json.loads((reference / 'data' / 'pipeline.json').read_text())


@pytest.fixture(scope='module')
def arrays(reference):
    return np.load(reference / 'data' / 'pipeline.npz')


@pytest.fixture(scope='module')
def source(reference, settings, tmp_path_factory):
    # A copy, since the index that opening makes is left beside the file.
    path = tmp_path_factory.mktemp('legacy') / 'tiny_dmvr.tfrecord'
    shutil.copy(reference / 'data' / 'tiny_dmvr.tfrecord', path)
    legacy = sources.Legacy(spectrogram_shape=tuple(settings['spec_shape']), fps=25.0, num_classes=5)
    return sources.open_source(path, legacy=legacy)


def read(source, settings, case):
    given = settings['settings']
    view = views.View(
        video=views.VideoView(
            num_frames=given['num_frames'],
            frame_seconds=given['stride'] / 25.0,
            short_side=given['min_resize'],
            crop_size=given['crop_size'],
            eval_crop=CASES[case]['eval_crop'],
        ),
        audio=views.AudioView(seconds=given['num_spec_frames']),
    )
    num_clips = CASES[case]['num_clips']
    with batches.eval_stream(source, view, batch_size=3 * num_clips * view.eval_crops, num_clips=num_clips) as stream:
        (batch,) = stream
    return batch, view.eval_crops


def truncated_resize(frame, height, width):
    """Bilinear resizing in float32 that drops the fraction, as TensorFlow casts it."""

    def axis(size, resized):
        at = (np.arange(resized, dtype=np.float32) + np.float32(0.5)) * np.float32(size / resized) - np.float32(0.5)
        low = np.floor(at)
        return np.maximum(low, 0).astype(int), np.minimum(low + 1, size - 1).astype(int), at - low

    (top, bottom, down), (left, right, across) = axis(frame.shape[0], height), axis(frame.shape[1], width)
    frame = frame.astype(np.float32)
    across, down = across[None, :, None], down[:, None, None]
    upper = frame[top][:, left] + (frame[top][:, right] - frame[top][:, left]) * across
    lower = frame[bottom][:, left] + (frame[bottom][:, right] - frame[bottom][:, left]) * across
    return (upper + (lower - upper) * down).astype(np.uint8)


@pytest.mark.parametrize('case', CASES)
def test_batches_are_those_of_the_reference(source, settings, arrays, case):
    batch, num_crops = read(source, settings, case)
    np.testing.assert_array_equal(batch.labels['label'][:: len(batch.record) // 3], arrays['validation/label'])
    if f'{case}/image_uint8' in arrays:
        # We round where the reference drops the fraction: one level at most, and never below it.
        ours, theirs = batch.media['video'].astype(int), arrays[f'{case}/image_uint8'].astype(int)
        assert ours.shape == theirs.shape
        assert set(np.unique(ours - theirs)) <= {0, 1}
    # The reference forgets to repeat the sound for the crops (image batch 9, log-mel batch 3); our rows agree.
    name = f'{case}/spectrogram' if f'{case}/spectrogram' in arrays else f'{case.removesuffix("_3spatial")}/spectrogram'
    theirs = np.repeat(arrays[name][..., 0], num_crops, axis=0)
    mean, std = settings['settings']['mean'], settings['settings']['std']
    np.testing.assert_allclose((batch.media['audio'] - mean) / std, theirs, atol=2e-6)


def test_jpegs_decode_to_the_very_bytes_of_the_reference(source, arrays):
    for record in range(3):
        frame = video.decode_image(source[record].frames[0])
        np.testing.assert_array_equal(frame, arrays[f'raw/{record}/decoded_rgb_uint8_frame0'])


def test_resizing_differs_from_the_reference_by_its_dropped_fraction_alone(source, settings, arrays):
    short_side, crop_size = settings['settings']['min_resize'], settings['settings']['crop_size']
    for record in range(3):
        clip = source[record]
        indices = sampling.middle_indices(clip.num_frames, settings['settings']['num_frames'], 2)
        for t, index in enumerate(indices):
            frame = video.decode_image(clip.frames[index])
            resized = truncated_resize(frame, *video.smallest_side_to(*frame.shape[:2], short_side))
            top, left = ((size - crop_size) // 2 for size in resized.shape[:2])
            np.testing.assert_array_equal(
                resized[top : top + crop_size, left : left + crop_size],
                arrays['validation/image_uint8'][record, t],
            )


def test_stored_spectrograms_and_labels_are_read(source, arrays):
    for record in range(3):
        clip = source[record]
        np.testing.assert_array_equal(clip.spectrogram, np.concatenate(arrays[f'raw/{record}/spec']))
        assert clip.labels['label'] == arrays[f'raw/{record}/labels'].tolist()


def test_places_of_sequences_are_those_of_the_reference(reference):
    cases = np.load(reference / 'data' / 'sampling_indices.npz')
    for case in cases.files:
        kind, length, steps = case.split('/')
        length = int(length.removeprefix('len'))
        num_steps, stride = (int(x) for x in steps.removeprefix('n').split('_s'))
        if kind == 'middle':
            found = sampling.middle_indices(length, num_steps, stride)
        elif kind.startswith('linspace'):
            found = sampling.spread_indices(length, int(kind.removeprefix('linspace')), num_steps, stride).ravel()
        else:
            proportion = float(kind.removeprefix('random_prop'))
            found = sampling.proportional_indices(length, num_steps, stride, proportion)
        np.testing.assert_array_equal(found, cases[case], err_msg=case)


def test_evaluation_in_seconds_falls_on_the_frames_of_the_reference(reference):
    cases = np.load(reference / 'data' / 'sampling_indices.npz')
    fps = 25.0
    for case in cases.files:
        kind, length, steps = case.split('/')
        if kind.startswith('random'):
            continue
        length = int(length.removeprefix('len'))
        num_steps, stride = (int(x) for x in steps.removeprefix('n').split('_s'))
        found = []
        for fraction in sampling.spread_fractions(1 if kind == 'middle' else 4):
            start = sampling.fraction_start(float(fraction), span=num_steps * stride / fps, length=length / fps)
            found.append(sampling.frame_indices(start, num_steps, stride / fps, fps, length))
        np.testing.assert_array_equal(np.concatenate(found), cases[case], err_msg=case)


def test_legacy_clips_train_too(source):
    view = views.View(video=views.VideoView(8, 0.08, 36, 32), audio=views.AudioView(3.0))
    with batches.train_stream(source, view, batch_size=6, seed=0, num_steps=2) as stream:
        for batch in stream:
            assert batch.media['audio'].shape == (6, 30, 16) and batch.media['audio'].dtype == np.float32
            assert batch.present['video'].all() and batch.present['audio'].all()
