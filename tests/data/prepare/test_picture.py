import struct

import av
import cv2
import numpy as np
import pytest

from avmae_jax.data.prepare import decode, picture


def gray_levels(path, start=0.0, end=None, fps=10.0, short_side=32, **options):
    """The gray level of each sampled frame, and what the reader said."""
    levels, shapes = [], set()

    def write(rgb, repeats):
        levels.extend([float(rgb.mean())] * repeats)
        shapes.add(rgb.shape)

    found = picture.read_picture(path, start, end, fps, short_side, write, max_seconds=60.0, **options)
    assert found.num_frames == len(levels)
    return np.array(levels), shapes, found


def test_every_frame_of_a_steady_video_is_sampled_once(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 1.0})
    levels, shapes, found = gray_levels(path)
    np.testing.assert_allclose(levels, 20 + 10 * np.arange(10), atol=3)
    assert shapes == {(32, 42, 3)} and found.seconds == pytest.approx(1.0) and not found.problems


def test_half_the_rate_takes_every_second_frame(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 1.0})
    np.testing.assert_allclose(gray_levels(path, fps=5.0)[0], 20 + 20 * np.arange(5), atol=3)


def test_a_variable_frame_rate_is_sampled_by_time(media, tmp_path):
    path = media.write(tmp_path / 'a.mkv', video={'times': [0.0, 0.1, 0.5, 0.6, 0.9]})
    levels, _, _ = gray_levels(path)
    # Each frame holds until the next: 0 | 1 1 1 1 | 2 | 3 3 3 | 4 (as long as the gap before it).
    np.testing.assert_allclose(levels[:9], 20 + 10 * np.array([0, 1, 1, 1, 1, 2, 3, 3, 3]), atol=3)
    np.testing.assert_allclose(levels[9:], 60, atol=3)


@pytest.mark.parametrize('codec, suffix', [('mpeg4', 'mp4'), ('libx264', 'mkv'), ('mpeg4', 'ts')])
def test_a_span_is_what_a_pass_over_the_whole_file_shows_there(media, tmp_path, codec, suffix):
    path = media.write(tmp_path / f'a.{suffix}', video={'seconds': 2.0, 'codec': codec})
    whole, _, _ = gray_levels(path)
    part, _, found = gray_levels(path, start=0.7, end=1.4)
    np.testing.assert_allclose(part, whole[7:14], atol=3)
    assert found.seconds == pytest.approx(0.7) and not found.problems


def test_a_start_behind_the_end_is_told(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 1.0})
    with pytest.raises(decode.MediaError) as error:
        gray_levels(path, start=5.0, end=6.0)
    assert error.value.problem.reason == 'beyond_end'


def test_a_picture_is_held_until_the_sound_ends(media, tmp_path):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 1.0})
    levels, _, found = gray_levels(path, hold_until=1.5)
    assert len(levels) == 15 and found.seconds == pytest.approx(1.0)
    np.testing.assert_allclose(levels[10:], levels[9])


def test_rotation_flags_are_applied(media, tmp_path, shared_data):
    levels, shapes, _ = gray_levels(str(shared_data / 'odd/rotated90.mov'), short_side=0)
    assert shapes == {(568, 320, 3)} and len(levels) == 1


# a, b, c, d of the matrix in an mp4's track header: players draw (x, y) at (a x + c y, b x + d y).
@pytest.mark.parametrize(
    'matrix, shown',
    [
        ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, 3)),
        ((-1, 0, 0, -1), lambda rgb: np.rot90(rgb, 2)),
        ((0, -1, 1, 0), lambda rgb: np.rot90(rgb, 1)),
        ((-1, 0, 0, 1), lambda rgb: rgb[:, ::-1]),  # As cameras write it that face their owner.
        ((1, 0, 0, -1), lambda rgb: rgb[::-1]),
        ((0, 1, 1, 0), lambda rgb: rgb.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda rgb: rgb.swapaxes(0, 1)[::-1, ::-1]),
    ],
)
def test_turned_and_mirrored_frames_stand_as_players_show_them(tmp_path, matrix, shown):
    rgb = np.zeros((32, 64, 3), np.uint8)
    rgb[:16, :48] = 255  # White in the top left corner, and wider than high.
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, 'yuv420p', 1_000_000
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format='rgb24')))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 44
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into('>9i', data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = []
    picture.read_picture(str(path), 0.0, None, 10.0, 0, lambda rgb, repeats: frames.append(rgb), max_seconds=1.0)
    wanted = shown(rgb)
    assert frames[0].shape == wanted.shape and np.abs(frames[0].astype(int) - wanted).mean() < 12


@pytest.mark.parametrize(
    'size, aspect, short_side, wanted',
    [
        ((640, 480), 1.0, 256, (342, 256)),
        ((480, 640), 1.0, 256, (256, 342)),
        ((112, 112), 1.0, 256, (112, 112)),  # Nothing is enlarged.
        ((720, 576), 64 / 45, 256, (456, 256)),  # Anamorphic DVD: 16:9 on square pixels.
        ((1, 1), 1.0, 256, (2, 2)),
        ((10000, 100), 1.0, 256, (1024, 10)),  # A strip does not blow up its batch.
        ((641, 361), 1.0, 0, (642, 362)),
    ],
)
def test_sizes_are_even_bounded_and_square(size, aspect, short_side, wanted):
    assert picture.target_size(*size, aspect, short_side) == wanted


def test_pictures_of_insane_size_are_refused_before_decoding(media, tmp_path, monkeypatch):
    path = media.write(tmp_path / 'a.mp4', video={'seconds': 0.2})
    monkeypatch.setattr(decode, 'MAX_PIXELS', 1000)
    with pytest.raises(decode.MediaError) as error:
        gray_levels(path)
    assert error.value.problem.reason == 'too_large'


def test_cover_art_is_no_video(media, tmp_path):
    path = tmp_path / 'song.flac'
    media.write(path, sound={'samples': media.tone(0.5, 16000), 'codec': 'flac'})
    image = cv2.imencode('.png', np.full((16, 16, 3), 200, np.uint8))[1].tobytes()
    block = struct.pack('>II', 3, 9) + b'image/png' + struct.pack('>IIIIII', 0, 16, 16, 24, 0, len(image)) + image
    data = path.read_bytes()
    # Behind the first metadata block (38 bytes), a PICTURE block that is not the last.
    cut = 4 + 4 + 34
    header = bytes([data[4] & 0x7F]) + data[5:cut]
    last = data[4] & 0x80
    picture_block = bytes([6 | last]) + len(block).to_bytes(3, 'big') + block
    path.write_bytes(data[:4] + header + picture_block + data[cut:])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1  # The trap: ffmpeg shows cover art as a stream.
    with pytest.raises(decode.MediaError) as error:
        gray_levels(str(path))
    assert error.value.problem.reason == 'no_video'


def test_a_picture_file_under_a_video_name_is_no_video(tmp_path):
    path = tmp_path / 'a.mp4'
    path.write_bytes(cv2.imencode('.png', np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    with pytest.raises(decode.MediaError) as error:
        gray_levels(str(path))
    assert error.value.problem == decode.Problem('no_video', 'a still picture')


@pytest.mark.parametrize('name, codec, pix_fmt', [('a.gif', 'gif', 'rgb8'), ('a.webm', 'libvpx-vp9', 'yuva420p')])
def test_moving_pictures_of_the_web_are_videos(media, tmp_path, name, codec, pix_fmt):
    path = media.write(tmp_path / name, video={'seconds': 0.5, 'codec': codec, 'pix_fmt': pix_fmt})
    levels, _, _ = gray_levels(path)
    assert len(levels) == 5


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'bmp', 'tif'])
def test_images_of_any_format_become_rgb(tmp_path, suffix):
    rgb = np.zeros((100, 50, 3), np.uint8)
    rgb[..., 0] = 200
    path = tmp_path / f'a.{suffix}'
    cv2.imwrite(str(path), rgb[..., ::-1])
    found = picture.read_image(str(path), 32)
    assert found.shape == (64, 32, 3)
    np.testing.assert_allclose(found.mean((0, 1)), [200, 0, 0], atol=4)


def test_a_file_that_is_no_image_says_so(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'no image')
    with pytest.raises(decode.MediaError):
        picture.read_image(str(tmp_path / 'a.jpg'), 32)
