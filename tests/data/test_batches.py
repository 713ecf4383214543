import collections
import dataclasses
import pickle

import grain
import numpy as np
import pytest

from avmae_jax.data import batches, mixing, sources, views, workers
from avmae_jax.ops import augment
from avmae_jax.structs import Batch

VIEW = views.View(
    video=views.VideoView(num_frames=3, frame_seconds=0.2, short_side=40, crop_size=24),
    audio=views.AudioView(seconds=0.8),
)


@pytest.fixture(scope='module')
def source(toy_folder):
    return sources.open_source(toy_folder)


def arrays(batch):
    return {
        **{f'media/{k}': v for k, v in batch.media.items()},
        **{f'present/{k}': v for k, v in batch.present.items()},
        **{f'labels/{k}': v for k, v in batch.labels.items()},
        **{k: getattr(batch, k) for k in ('record', 'seed', 'weight', 'damaged')},
    }


def assert_same(left: Batch, right: Batch):
    left, right = arrays(left), arrays(right)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def train(source, **options):
    options = {'batch_size': 6, 'seed': 0, 'num_steps': 4, **options}
    with batches.train_stream(source, VIEW, **options) as stream:
        return list(stream)


# -- Training --


def test_rows_hold_what_the_structs_say(source):
    (batch, *_) = train(source)
    assert batch.media['video'].shape == (6, 3, 24, 24, 3) and batch.media['video'].dtype == np.uint8
    assert batch.media['audio'].shape == (6, 800) and batch.media['audio'].dtype == np.int16
    assert batch.present['video'].all() and batch.present['audio'].all()
    assert batch.seed.shape == (6, 2) and batch.seed.dtype == np.uint32
    assert (batch.weight == 1).all() and (batch.damaged == 0).all()
    np.testing.assert_array_equal(batch.labels['label'].argmax(1), batch.record % 3)


@pytest.mark.parametrize('num_threads', [1, 3])
@pytest.mark.parametrize('views_per_clip', [1, 2])
def test_the_global_batch_is_the_same_for_any_number_of_hosts_and_threads(source, num_threads, views_per_clip):
    options = {'batch_size': 12, 'views_per_clip': views_per_clip}
    whole = train(source, **options)
    for host_count in (2, 3, 6):
        parts = [
            train(source, **options, host_index=h, host_count=host_count, num_threads=num_threads)
            for h in range(host_count)
        ]
        for step, batch in enumerate(whole):
            rows = [arrays(part[step]) for part in parts]
            for name, array in arrays(batch).items():
                np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), array, err_msg=name)


def test_a_run_goes_on_at_any_step(source):
    whole = train(source, num_steps=7)
    for start in (1, 4, 6):
        for ours, theirs in zip(train(source, num_steps=7, start_step=start), whole[start:], strict=True):
            assert_same(ours, theirs)


def test_a_step_far_away_is_reached_without_those_before(source):
    with batches.train_stream(source, VIEW, batch_size=6, seed=0, start_step=10**12) as stream:
        assert next(stream).media['video'].any() and stream.step == 10**12 + 1


def test_every_epoch_has_every_record_once(source):
    records = np.concatenate([batch.record for batch in train(source, batch_size=4, num_steps=33)])
    for epoch in range(12):
        assert sorted(records[epoch * 11 : (epoch + 1) * 11]) == list(range(11))
    assert len({tuple(records[epoch * 11 : (epoch + 1) * 11]) for epoch in range(12)}) == 12


def test_another_seed_gives_another_order_and_other_crops(source):
    one, other = train(source, seed=0)[0], train(source, seed=1)[0]
    assert (one.record != other.record).any()
    assert not set(map(tuple, one.seed)) & set(map(tuple, other.seed))


def test_what_is_drawn_depends_on_record_and_epoch_but_not_on_its_place(source):
    def by_record(batch_size):
        found = {}
        for batch in train(source, batch_size=batch_size, num_steps=33 // batch_size):
            for row in range(batch_size):
                found.setdefault(int(batch.record[row]), []).append(batch.media['video'][row])
        return found

    small, large = by_record(3), by_record(11)
    for record in range(11):
        assert len(small[record]) == len(large[record]) == 3
        for ours, theirs in zip(small[record], large[record], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        first, second, third = small[record]
        assert (first != second).any() and (second != third).any()


def test_views_of_a_clip_are_adjacent_and_show_one_moment_by_different_crops(source):
    for batch in train(source, batch_size=8, views_per_clip=2):
        record, video, audio = batch.record.reshape(4, 2), batch.media['video'], batch.media['audio']
        np.testing.assert_array_equal(record[:, 0], record[:, 1])
        np.testing.assert_array_equal(audio[0::2], audio[1::2])  # The same window.
        assert (video[0::2] != video[1::2]).any(axis=(1, 2, 3, 4)).sum() >= 3
        assert len(set(map(tuple, batch.seed))) == 8


def test_the_first_view_is_the_view_of_a_clip_that_has_but_one(source):
    single = {tuple(b.seed[0]): b.media['video'][0] for b in train(source, batch_size=1, num_steps=11)}
    for batch in train(source, batch_size=2, views_per_clip=2, num_steps=11):
        np.testing.assert_array_equal(batch.media['video'][0], single[tuple(batch.seed[0])])


def test_views_may_each_have_their_window(source):
    view = views.View(video=VIEW.video, audio=VIEW.audio, share_window=False)
    with batches.train_stream(source, view, batch_size=8, seed=0, views_per_clip=2, num_steps=3) as stream:
        audio = np.concatenate([batch.media['audio'].reshape(4, 2, -1) for batch in stream])
    assert (audio[:, 0] != audio[:, 1]).any(axis=1).all()


def test_picture_and_sound_are_of_one_moment(toys, tmp_path):
    toys.write_dataset(tmp_path / 'x', [toys.make_clip(i) for i in range(6)])
    view = views.View(video=views.VideoView(3, 0.2, 40, 32), audio=views.AudioView(1.0))
    source = sources.open_source(tmp_path / 'x')
    starts = set()
    with batches.train_stream(source, view, batch_size=6, seed=0, num_steps=10) as stream:
        for batch in stream:
            for video, audio in zip(batch.media['video'], batch.media['audio'], strict=True):
                # Frame k has level 40 + 10 k and is shown from k / 10 s on; sample j has the value j at 1,000 Hz.
                frames = np.round((video.mean(axis=(1, 2, 3)) - 40) / 10)
                np.testing.assert_array_equal(np.diff(frames), 2)
                assert audio[0] <= frames[0] * 100 + 100 and frames[-1] * 100 <= audio[-1]
                starts.add(int(audio[0]))
    assert len(starts) > 30 and min(starts) < 200 and max(starts) > 800


def test_what_a_clip_lacks_is_zero_and_marked(toys, tmp_path):
    clips = [
        toys.make_clip(0, has={'video': True, 'audio': False}),
        toys.make_clip(1, has={'video': False, 'audio': True}),
        toys.make_clip(2)._replace(waveform=None, has={'video': True, 'audio': False}),
        toys.make_clip(3)._replace(frames=[], num_frames=0, has={'video': False, 'audio': True}),
    ]
    source = sources.open_source(toys.write_dataset(tmp_path / 'x', clips))
    with batches.train_stream(source, VIEW, batch_size=4, seed=0, num_steps=3) as stream:
        for batch in stream:
            for row, record in enumerate(batch.record):
                has = clips[record].has
                assert batch.present['video'][row] == has['video'] and batch.present['audio'][row] == has['audio']
                assert batch.media['video'][row].any() == has['video']
                assert batch.media['audio'][row].any() == has['audio']


def test_clips_that_are_too_short_are_filled(toys, tmp_path):
    source = sources.open_source(toys.write_dataset(tmp_path / 'x', [toys.make_clip(i, seconds=0.5) for i in range(2)]))
    (batch,) = train(source, batch_size=2, num_steps=1)
    assert batch.media['audio'][0, 499] == 499 and not batch.media['audio'][0, 500:].any()
    assert batch.media['video'].all()


def test_a_frame_of_a_clip_serves_as_an_image(source):
    view = views.View(image=views.ImageView(short_side=40, crop_size=24, crop={'name': 'resized', 'area': [0.2, 1.0]}))
    with batches.train_stream(source, view, batch_size=4, seed=0, num_steps=2) as stream:
        for batch in stream:
            assert batch.media['image'].shape == (4, 24, 24, 3) and batch.present['image'].all()


def test_h264_gives_the_picture_that_jpeg_gives(toys, tmp_path):
    found = []
    for codec in ('jpeg', 'h264'):
        clips = [toys.make_clip(i, codec=codec) for i in range(4)]
        source = sources.open_source(toys.write_dataset(tmp_path / codec, clips, codec=codec))
        found.append(train(source, batch_size=4, num_steps=1)[0])
    np.testing.assert_array_equal(found[0].record, found[1].record)
    assert np.abs(found[0].media['video'].astype(int) - found[1].media['video']).max() <= 4


def test_a_mixture_draws_by_weight_on_any_number_of_hosts(source, toys, tmp_path):
    other = sources.open_source(toys.write_dataset(tmp_path / 'x', [toys.make_clip(i) for i in range(5)]))
    mixture = mixing.Mixture([source, other], (1, 3))
    whole = train(mixture, batch_size=8, num_steps=5)
    for batch in whole:
        assert (batch.record >= 11).sum() == 6
    parts = [train(mixture, batch_size=8, num_steps=5, host_index=h, host_count=4) for h in range(4)]
    for step, batch in enumerate(whole):
        records = np.concatenate([part[step].record for part in parts])
        np.testing.assert_array_equal(records, batch.record)


# -- As grain datasets --


@pytest.mark.parametrize('views_per_clip', [1, 2])
def test_a_dataset_gives_what_the_stream_gives(source, views_per_clip):
    options = {'batch_size': 4, 'seed': 0, 'num_steps': 6, 'host_index': 1, 'host_count': 2}
    dataset = batches.train_dataset(source, VIEW, **options, views_per_clip=views_per_clip)
    assert isinstance(dataset, grain.MapDataset) and len(dataset) == 6
    for step, theirs in enumerate(train(source, **options, views_per_clip=views_per_clip)):
        assert_same(dataset[step], theirs)


def test_an_evaluation_dataset_too(source):
    for host in range(2):
        options = {'batch_size': 8, 'num_clips': 2, 'host_index': host, 'host_count': 2}
        dataset = batches.eval_dataset(source, VIEW, **options)
        with batches.eval_stream(source, VIEW, **options) as stream:
            for step, theirs in enumerate(stream):
                assert_same(dataset[step], theirs)
        assert len(dataset) == step + 1 == 3


def test_grain_goes_on_from_a_dataset(source):
    dataset = batches.train_dataset(source, VIEW, batch_size=4, seed=0, num_steps=6)
    whole = train(source, batch_size=4)
    read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    for ours, theirs in zip(dataset[2::2].to_iter_dataset(read_options), whole[2::2], strict=False):
        assert_same(ours, theirs)
    assert len(list(dataset[2::2].to_iter_dataset(read_options))) == 2
    bright = dataset.map(lambda batch: batch._replace(weight=batch.media['video'].astype(np.float32) / 255))
    np.testing.assert_array_equal(bright[3].weight, whole[3].media['video'].astype(np.float32) / 255)


def test_computed_by_grain_alone_damage_is_still_passed_over_and_logged(folder, toys, caplog):
    dataset = batches.train_dataset(damage(folder, toys, [4]), VIEW, batch_size=11, seed=0)
    (batch,) = dataset[:1]
    assert batch.damaged.sum() == 1 and (batch.record == 5).sum() == 2
    assert 'Passed over damaged record 4: ' in caplog.text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch_size': 7, 'host_count': 2}, r'multiple of hosts \* rows a clip = 2 \* 1; got 7'),
        ({'batch_size': 6, 'views_per_clip': 4}, r'1 \* 4; got 6'),
        ({'host_index': 2, 'host_count': 2}, r'host_index must lie in \[0, host_count=2\); got 2'),
        ({'seed': -1}, 'seed'),
        ({'num_threads': 0}, 'num_threads'),
        ({'max_damaged_ratio': 2}, 'max_damaged_ratio'),
    ],
)
def test_wrong_settings_are_named(source, options, message):
    with pytest.raises(ValueError, match=message):
        train(source, **options)


@pytest.mark.parametrize(('stored', 'wanted'), [(('video',), 'audio'), (('audio',), 'video'), (('audio',), 'image')])
def test_a_view_of_what_is_not_stored_is_refused(source, stored, wanted):
    other = pickle.loads(pickle.dumps(source))
    other.info = dataclasses.replace(other.info, modalities=stored)
    parts = {'video': VIEW.video, 'audio': VIEW.audio, 'image': views.ImageView(40, 24)}
    with pytest.raises(ValueError, match=rf"asks for {wanted} and \['toy'\] hold \['{stored[0]}'\] only"):
        batches.train_stream(other, views.View(**{wanted: parts[wanted]}), batch_size=2, seed=0)


# -- Evaluation --


@pytest.mark.parametrize('host_count', [1, 2, 4])
@pytest.mark.parametrize('num_clips', [1, 3])
def test_evaluation_sees_every_record_exactly_once(source, host_count, num_clips):
    seen = collections.Counter()
    for host in range(host_count):
        options = {'batch_size': 4 * num_clips, 'num_clips': num_clips, 'host_index': host, 'host_count': host_count}
        with batches.eval_stream(source, VIEW, **options) as stream:
            assert len(stream) == 3
            for batch in stream:
                assert set(batch.weight.tolist()) <= {0.0, 1.0}
                seen.update(batch.record[batch.weight == 1].tolist())
                padding = batch.weight == 0
                assert (batch.record[padding] == -1).all() and not batch.media['video'][padding].any()
    assert seen == dict.fromkeys(range(11), num_clips)


def test_evaluation_is_the_same_for_any_number_of_hosts(source):
    def read(host_count):
        parts = []
        for host in range(host_count):
            with batches.eval_stream(source, VIEW, 8, 2, host_index=host, host_count=host_count) as stream:
                parts.append([arrays(batch) for batch in stream])
        return [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]

    for ours, theirs in zip(read(1), read(4), strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_moments_come_first_and_their_crops_within(toys, tmp_path):
    source = sources.open_source(toys.write_dataset(tmp_path / 'x', [toys.make_clip(i) for i in range(2)]))
    view = views.View(video=views.VideoView(2, 0.1, 40, 40, eval_crop='three'), audio=views.AudioView(1.0))
    with batches.eval_stream(source, view, batch_size=18, num_clips=3) as stream:
        (batch,) = stream
    np.testing.assert_array_equal(batch.record, [0] * 9 + [1] * 9)
    starts = batch.media['audio'][:9, 0]
    np.testing.assert_array_equal(starts, [0] * 3 + [500] * 3 + [1000] * 3)
    first_frame = np.round((batch.media['video'][:9, 0].mean(axis=(1, 2, 3)) - 40) / 10)
    np.testing.assert_array_equal(first_frame, [0] * 3 + [9] * 3 + [18] * 3)


# -- Damage --


def damage(folder, toys, records):
    """Flips a bit in the payload of these records."""
    source = sources.open_source(folder)
    for record in records:
        file, i = source.locate(record)
        toys.flip_byte(file.path, int(file.index[i, 0]) + 500)
    return sources.open_source(folder)


@pytest.fixture
def folder(toys, tmp_path):
    return toys.write_dataset(tmp_path / 'toy', [toys.make_textured_clip(i) for i in range(11)])


def test_a_damaged_record_is_replaced_by_the_next_one_and_counted(source, folder, toys, caplog):
    healthy = train(source, num_steps=8)
    with batches.train_stream(damage(folder, toys, [4]), VIEW, batch_size=6, seed=0, num_steps=8) as stream:
        hurt = list(stream)
        assert stream.num_damaged == 1
    for ours, theirs in zip(hurt, healthy, strict=True):
        replaced = theirs.record == 4
        np.testing.assert_array_equal(ours.record, np.where(replaced, 5, theirs.record))
        np.testing.assert_array_equal(ours.damaged, replaced.astype(int))
        np.testing.assert_array_equal(ours.media['video'][~replaced], theirs.media['video'][~replaced])
        assert (ours.weight == 1).all()
    assert sum((batch.record == 4).sum() for batch in healthy) > 1
    logged = [record.getMessage() for record in caplog.records if 'damaged' in record.getMessage()]
    assert len(logged) == 1 and 'tfrecord-00000-of-00002 at byte' in logged[0]  # Once, though met every epoch.


def test_media_that_do_not_decode_are_damaged_too(toys, tmp_path):
    clips = [toys.make_clip(i) for i in range(5)]
    clips[2] = clips[2]._replace(frames=[b'\xff\xd8nothing'] * 20)
    clips[4] = clips[4]._replace(labels={'label': [77]})
    source = sources.open_source(toys.write_dataset(tmp_path / 'x', clips))
    records = np.concatenate(
        [batch.record for batch in train(source, batch_size=5, num_steps=2, max_damaged_ratio=0.5)]
    )
    assert collections.Counter(records.tolist()) == {0: 4, 1: 2, 3: 4}


def test_above_a_limit_the_stream_stops_and_says_why(folder, toys):
    hurt = damage(folder, toys, [1, 2, 7])
    train(hurt, num_steps=8, max_damaged_ratio=0.3)
    with pytest.raises(workers.TooManyDamagedError, match=r'different damaged records.*accepts 1.*at byte'):
        train(hurt, num_steps=8)


def test_a_dataset_without_a_readable_record_stops_at_once(folder, toys):
    with pytest.raises(workers.TooManyDamagedError, match='in a row cannot be read'):
        train(damage(folder, toys, range(11)), max_damaged_ratio=1.0)


def test_evaluation_leaves_a_damaged_record_out_and_replaces_it_by_none(folder, toys):
    with batches.eval_stream(damage(folder, toys, [4]), VIEW, batch_size=6) as stream:
        rows = [
            (int(record), int(weight), int(damaged))
            for batch in stream
            for record, weight, damaged in zip(batch.record, batch.weight, batch.damaged, strict=True)
        ]
    assert rows == [(i, int(i != 4), int(i == 4)) for i in range(11)] + [(-1, 0, 0)]


# -- Missing modalities --


def test_a_batch_that_loses_a_modality_is_that_of_clips_stored_without_it(toys, tmp_path):
    clips = [toys.make_textured_clip(i) for i in range(3)]
    lacking = [clip._replace(frames=[], num_frames=0, has={'video': False, 'audio': True}) for clip in clips]
    whole, stored = (
        batches.eval_dataset(sources.open_source(toys.write_dataset(tmp_path / name, kept, 1)), VIEW, 6, num_clips=2)[0]
        for name, kept in (('whole', clips), ('lacking', lacking))
    )
    assert whole.media['video'].any() and not stored.media['video'].any()
    assert_same(augment.without(whole, 'video'), stored)
