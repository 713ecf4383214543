"""Sheets show what they say: grey where the encoder saw nothing, the input where it saw something."""

import cv2
import numpy as np
import pytest

from avmae_jax.evaluation import drawing, pictures
from avmae_jax.ops.patches import patchify
from avmae_jax.structs import Mask, Outputs

PATCHES = {'video': (2, 8, 8), 'audio': (8, 8), 'image': (8, 8)}
SHAPES = {'video': (2, 4, 16, 24, 3), 'audio': (2, 32, 16, 1), 'image': (2, 16, 16, 3)}


def make_media(modality, standardised='none', seed=0):
    rng = np.random.default_rng(seed)
    medium = rng.uniform(-0.9, 0.9, SHAPES[modality]).astype(np.float32)
    patches = np.asarray(patchify(medium, PATCHES[modality]))
    tokens = patches.shape[1]
    hidden = np.stack([rng.permutation(tokens)[: tokens // 2] for _ in range(2)]).astype(np.int32)
    grid = tuple(d // p for d, p in zip(SHAPES[modality][1:-1], PATCHES[modality], strict=True))
    return medium, pictures.PatchedMedia(patches, patches.copy(), hidden, grid, PATCHES[modality], standardised)


@pytest.mark.parametrize('modality', ['video', 'image'])
def test_rows_show_input_then_what_was_left_then_the_reconstruction(modality):
    medium, media = make_media(modality)
    media = media._replace(predicted=np.ones_like(media.patches))  # Predicts white.
    rows = list(pictures._video_rows(media, 1, num_frames=4, side=16).values())
    truth = np.rint((medium[1] + 1) * 127.5).astype(np.uint8)
    if modality == 'video':
        truth = np.concatenate([np.pad(frame, ((0, 0), (0, 2), (0, 0))) for frame in truth], axis=1)[:, :-2]
    np.testing.assert_array_equal(rows[0][truth > 0], truth[truth > 0])
    grey = (rows[1] == pictures.GREY).all(-1)
    gaps = (rows[0] == 255).all(-1)  # White lines between the frames.
    hidden = grey & ~gaps
    assert 0.4 < hidden.mean() < 0.6
    np.testing.assert_array_equal(rows[1][~hidden], rows[0][~hidden])
    np.testing.assert_array_equal(rows[2][~hidden], rows[0][~hidden])
    assert (rows[2][hidden] == 255).all()


@pytest.mark.parametrize('standardised', pictures.STANDARDISED)
def test_restore_scale_undoes_the_standardisation_of_targets(standardised):
    _, media = make_media('video')
    groups = 3 if standardised == 'channel' else 1
    values = media.patches.reshape(*media.patches.shape[:2], -1, groups)
    mean, var = values.mean(-2, keepdims=True), values.var(-2, keepdims=True)
    target = media.patches if standardised == 'none' else ((values - mean) / np.sqrt(var + 1e-6))
    restored = pictures.restore_scale(target.reshape(media.patches.shape), media.patches, standardised, 3)
    np.testing.assert_allclose(restored, media.patches, atol=1e-5)


def test_restore_scale_names_what_it_does_not_know():
    _, media = make_media('audio')
    with pytest.raises(ValueError, match="'frame'.*channel"):
        pictures.restore_scale(media.predicted, media.patches, 'frame', 1)


def test_a_sheet_of_all_modalities_is_written_and_read_back(tmp_path):
    media = {modality: make_media(modality)[1] for modality in ('audio', 'video', 'image')}
    media['audio'] = media['audio']._replace(inpainted=media['audio'].predicted)
    sheet = pictures.reconstruction_sheet(media, ['first', 'second'], num_frames=2, side=32, note='Step 3.')
    assert sheet.dtype == np.uint8 and sheet.shape[-1] == 3
    pictures.write_png(tmp_path / 'pictures' / 'sheet.png', sheet)
    read = cv2.imread(str(tmp_path / 'pictures' / 'sheet.png'))[..., ::-1]
    np.testing.assert_array_equal(read, sheet)
    one = pictures.reconstruction_sheet({'video': media['video']}, num_clips=1, num_frames=2, side=32)
    assert one.shape[0] < sheet.shape[0] and one.shape[1] < sheet.shape[1]


def test_patched_media_takes_the_first_clips_of_a_forward_pass():
    _, media = make_media('audio')
    hidden = media.hidden
    kept = np.stack([np.setdiff1d(np.arange(media.patches.shape[1]), row) for row in hidden])
    outputs = Outputs({}, {'audio': media.predicted}, {}, {}, {}, {'audio': media.patches})
    masks = {'audio': Mask(kept, hidden)}
    found = pictures.patched_media(outputs, masks, {'audio': media.grid}, {'audio': (8, 8)}, num_clips=1)
    np.testing.assert_array_equal(found['audio'].patches, media.patches[:1])
    assert found['audio'].inpainted is None and found['audio'].grid == media.grid


def test_high_pitch_is_up_and_later_is_to_the_right():
    spectrogram = np.zeros((4, 6), np.float32)
    spectrogram[3, 5] = 1
    picture = drawing.colour_spectrogram(spectrogram, (0.0, 1.0)).astype(int).sum(-1)
    assert picture.shape == (6, 4)
    assert np.unravel_index(picture.argmax(), picture.shape) == (0, 3)


def test_the_spectrogram_to_look_at_puts_a_tone_where_its_pitch_is():
    time = np.arange(16000) / 16000
    rows = []
    for hz in (300, 3000):
        tone = np.rint(8000 * np.sin(2 * np.pi * hz * time)).astype(np.int16)
        rows.append(drawing.look_at_sound(tone, 16000).mean(0).argmax())
    mel = 2595 * np.log10(1 + np.array([300, 3000]) / 700) / (2595 * np.log10(1 + 8000 / 700))
    np.testing.assert_allclose(np.array(rows) / 96, mel, atol=0.03)


def test_curves_leave_out_what_is_not_finite_and_refuse_to_draw_nothing():
    steps = range(200)
    curves = {
        'loss': drawing.Curve(steps, [1 / (step + 1) if step != 7 else float('nan') for step in steps]),
        'one': drawing.Curve([100], [0.5]),
        'flat': drawing.Curve([0, 10], [0.3, 0.3]),
    }
    picture = drawing.draw_curves(curves, 'Loss', {'interrupted': 50})
    for colour in drawing.LINE_COLOURS[:3]:
        assert (picture == colour).all(-1).any()
    with pytest.raises(ValueError, match='Loss'):
        drawing.draw_curves({'loss': drawing.Curve([1], [float('inf')])}, 'Loss')


@pytest.mark.parametrize(('low', 'high'), [(0.0, 1.0), (-3.2, 17.0), (1e-5, 3e-5), (100.0, 100.5)])
def test_ticks_are_a_few_round_numbers_within_the_limits(low, high):
    ticks = drawing._ticks(low, high, 6)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_captions_break_between_words():
    short, long = drawing.caption('a word', 200), drawing.caption('many words ' * 10, 200)
    assert short.shape[1] == long.shape[1] == 200 and long.shape[0] > 3 * short.shape[0] // 2


def confusion_cells(picture, num_classes, cell):
    """The cells [c c 3] of a drawn matrix, found by its lines: each begins with a faint one."""
    faint = (picture == drawing.FAINT).all(-1)
    top, left = (int(np.flatnonzero(faint.sum(axis=1 - i) >= 0.9 * num_classes * cell)[0]) for i in (0, 1))
    # The upper right corner of a cell, where no number is written.
    at = [np.arange(num_classes) * cell + start for start in (top + 2, left + cell - 3)]
    return picture[at[0][:, None], at[1][None]]


@pytest.mark.parametrize('num_classes, cell', [(3, 44), (10, 44), (40, 15), (120, 10)])
def test_a_confusion_is_darker_the_more_of_a_class_it_takes(num_classes, cell):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (num_classes, num_classes)) * 1.0 + 20 * np.eye(num_classes)
    picture = drawing.draw_confusion(counts, [f'class {i}' for i in range(num_classes)], 'title')
    cells = confusion_cells(picture, num_classes, cell)
    for share, row in zip(counts / counts.sum(axis=1, keepdims=True), cells.astype(int).sum(axis=-1), strict=True):
        order = np.argsort(share, kind='stable')
        assert (np.diff(row[order])[np.diff(share[order]) > 0] < 0).all()
        assert (row[share == 0] == 3 * 255).all()


def test_classes_without_a_record_are_grey_and_long_names_are_cut():
    counts = np.diag([4.0, 0, 2])
    picture = drawing.draw_confusion(counts, ['a', 'b', 'c' * 90], 'title')
    cells = confusion_cells(picture, 3, 44)
    assert (cells[1] == drawing.FAINT).all() and not (cells[[0, 2]] == drawing.FAINT).all(-1).any()
    assert picture.shape[1] < 700
