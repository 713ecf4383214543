import cv2
import numpy as np
import pytest
import simplejpeg

from avmae_jax.data import sampling, video

SIZES = [(256, 340), (340, 256), (256, 256), (100, 37), (48, 64)]


def draws(i=0):
    return sampling.Draws(0, 0, i, 0)


def gradient(height, width):
    """Every pixel tells its place: red the row, green the column."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 250, height).astype(np.uint8)[:, None]
    picture[..., 1] = np.linspace(0, 250, width).astype(np.uint8)[None, :]
    return picture


# -- Crops --


@pytest.mark.parametrize('name', video.CROPS)
@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_crops_lie_within_the_picture(name, height, width):
    crop = video.make_crop(name)
    for i in range(20):
        boxes = crop.boxes(height, width, 32, 28, draws(i))
        assert len(boxes) == crop.num_crops
        for box in boxes:
            top, left, high, wide = box.source
            assert 0 <= top and top + high <= height and 0 <= left and left + wide <= width
            assert 0 <= box.corner[0] <= box.resized[0] - 28 and 0 <= box.corner[1] <= box.resized[1] - 28
            out = np.zeros((28, 28, 3), np.uint8)
            video.cut(np.full((height, width, 3), 200, np.uint8), box, out)
            assert (out == 200).all()


@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_the_smallest_side_becomes_the_short_side_and_the_shape_stays(height, width):
    high, wide = video.smallest_side_to(height, width, 64)
    assert min(high, wide) == 64
    assert abs(high / wide - height / width) < 0.05 * height / width


def test_random_crops_reach_every_place():
    corners = {video.RandomCrop().boxes(8, 10, 8, 6, draws(i))[0].corner for i in range(300)}
    assert corners == {(top, left) for top in range(3) for left in range(5)}


def test_scale_jitter_stays_in_its_range_and_above_the_crop():
    heights = {video.RandomCrop(scale=(0.5, 1.5)).boxes(64, 80, 64, 48, draws(i))[0].resized[0] for i in range(300)}
    assert min(heights) == 48 and 90 <= max(heights) <= 96


def test_three_crops_are_the_ends_and_the_middle_of_the_longer_side():
    picture = gradient(64, 100)
    boxes = video.ThreeCrops().boxes(64, 100, 64, 64, None)
    assert [box.corner for box in boxes] == [(0, 0), (0, 18), (0, 36)]
    assert [box.corner for box in video.ThreeCrops().boxes(100, 64, 64, 64, None)] == [(0, 0), (18, 0), (36, 0)]
    out = np.zeros((64, 64, 3), np.uint8)
    video.cut(picture, boxes[2], out)
    np.testing.assert_array_equal(out, picture[:, 36:])


def test_resized_crops_keep_their_share_of_the_area():
    areas = []
    for i in range(200):
        _, _, high, wide = video.ResizedCrop(area=(0.2, 0.5)).boxes(100, 100, 32, 32, draws(i))[0].source
        areas.append(high * wide / 1e4)
    assert 0.19 < min(areas) < 0.25 and 0.45 < max(areas) < 0.51


def test_a_crop_without_resizing_copies_pixels():
    picture = gradient(40, 50)
    (box,) = video.CentralCrop().boxes(40, 50, 40, 32, None)
    out = np.zeros((32, 32, 3), np.uint8)
    video.cut(picture, box, out)
    np.testing.assert_array_equal(out, picture[4:36, 9:41])


def test_an_unknown_crop_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"central.*random.*got 'middle'"):
        video.make_crop('middle')


# -- Decoding --


@pytest.mark.parametrize('codec', ['jpeg', 'h264'])
@pytest.mark.parametrize('wanted', [[0], [19], [3, 4, 5], [0, 7, 14], [13, 2, 2, 18], range(20)])
def test_frame_k_is_frame_k_in_either_codec(toys, codec, wanted):
    clip = toys.make_clip(0, codec=codec)
    found = {index: int(frame.mean().round()) for index, frame in video.decode_frames(clip, wanted, 40)}
    assert sorted(found) == sorted(set(wanted))
    for index, level in found.items():
        assert abs(level - (40 + 10 * index % 200)) <= 3, index


def test_h264_of_a_fractional_rate_is_found_frame_by_frame(toys):
    clip = toys.make_clip(0, codec='h264', fps=30000 / 1001, seconds=20 * 1001 / 30000)
    for index in (0, 5, 11, 19):
        ((found, frame),) = video.decode_frames(clip, [index], 40)
        assert found == index and abs(frame.mean() - (40 + 10 * index % 200)) <= 3


def test_the_codecs_agree_on_colours(toys):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :32], picture[:, 32:64], picture[:, 64:] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    for codec in ('jpeg', 'h264'):
        writer = toys.make_writer(codec)
        for _ in range(3):
            writer.write(picture, 1)
        writer.finish()
        clip = toys.make_clip(0)._replace(frames=writer.frames, h264=writer.h264, num_frames=3)
        ((_, frame),) = video.decode_frames(clip, [1], 64)
        for left, colour in ((8, (200, 40, 40)), (40, (40, 200, 40)), (72, (40, 40, 200))):
            assert np.abs(frame[20:40, left : left + 16].mean((0, 1)) - colour).max() < 8, codec


def test_gray_and_png_images_come_out_as_rgb():
    gray = cv2.imencode('.jpg', np.full((30, 40), 90, np.uint8))[1].tobytes()
    frame = video.decode_image(gray)
    assert frame.shape == (30, 40, 3) and (np.abs(frame.astype(int) - 90) < 2).all()
    picture = gradient(30, 40)
    png = cv2.imencode('.png', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    np.testing.assert_array_equal(video.decode_image(png), picture)


def test_large_pictures_are_decoded_smaller_but_never_below_the_short_side():
    data = simplejpeg.encode_jpeg(gradient(512, 640), quality=95)
    assert video.decode_image(data, short_side=64).shape == (64, 80, 3)
    assert video.decode_image(data, short_side=100).shape == (128, 160, 3)
    assert video.decode_image(data, short_side=300).shape == (512, 640, 3)
    full = cv2.resize(video.decode_image(data), (160, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(video.decode_image(data, short_side=128).astype(int) - full).max() <= 4


@pytest.mark.parametrize('codec', ['jpeg', 'h264'])
@pytest.mark.parametrize('damage', ['cut', 'noise', 'empty', 'missing'])
def test_media_that_do_not_decode_say_whose_they_are(toys, codec, damage):
    def hurt(data):
        if damage == 'cut':
            return data[: len(data) // 2]
        return np.random.default_rng(0).bytes(len(data)) if damage == 'noise' else b''

    clip = toys.make_clip(7, codec=codec)
    if damage == 'missing':
        clip = clip._replace(num_frames=99)
    elif codec == 'jpeg':
        clip = clip._replace(frames=[hurt(frame) for frame in clip.frames])
    else:
        clip = clip._replace(h264=hurt(clip.h264))
    with pytest.raises(video.DamagedMediaError, match='clip7'):
        list(video.decode_frames(clip, [5, 98 if damage == 'missing' else 6], 40))
