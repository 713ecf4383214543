"""What the input path costs: clips a second and CPU milliseconds a clip, stage by stage and as a whole.

    python benchmarks/input_pipeline.py                  JPEG, 16 frames of 224 px out of 10 s at 12.5 a second
    python benchmarks/input_pipeline.py --codec=h264     the same clips as short-GOP h264
    python benchmarks/input_pipeline.py --workers=8 --threads=2 --batch_size=128

It makes its own shards in a temporary folder: moving pictures with the spectrum of natural ones, 256 pixels at the
short side, JPEG quality 85 (about 2.4 MB for 10 s), and sound. "bare decoder" is the codec alone on the frames that
a clip needs: nothing that gives these pixels can be faster. Where TensorFlow is installed, tf.data does the same job
beside it: as the public reference does, and at its best. Prints a table, and JSON as its last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import simplejpeg

from avmae_jax.data import batches, sampling, schema, slots, sources, tfrecord, threads, video, views
from avmae_jax.data.prepare import encode
from avmae_jax.structs import Clip

FPS = 12.5
SAMPLE_RATE = 16_000
SECONDS = 10.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--codec', choices=schema.CODECS, default='jpeg')
    parser.add_argument('--width', type=int, default=340, help='of the stored frames; their height is 256')
    parser.add_argument('--clips', type=int, default=64, help='different clips in the shards')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--threads', type=int, default=1, help='in each worker')
    parser.add_argument('--seconds', type=float, default=5.0, help='to measure each row of the table')
    args = parser.parse_args(argv)
    view = views.View(video=views.VideoView(), audio=views.AudioView(SECONDS))
    results: dict[str, dict[str, float]] = {}

    def report(name: str, milliseconds: float, per_second: float | None = None) -> None:
        results[name] = {'cpu_ms_per_clip': round(milliseconds, 3)}
        wall = ''
        if per_second is not None:
            results[name]['clips_per_second'] = round(per_second, 1)
            wall = f'{per_second:10.1f}'
        print(f'{name:44s}{milliseconds:14.3f}{wall or " " * 10}', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder), args.codec, args.clips, args.width)
        source = sources.open_source(folder)
        size = sum(shard.num_bytes for shard in source.info.splits['train']) / len(source)
        print(f'{len(source)} clips of {size / 1e6:.2f} MB, {args.codec}, 256 x {args.width}; {os.cpu_count()} cores')
        print(f'{"":44s}{"CPU ms a clip":>14s}{"clips/s":>10s}')
        for name, run in stages(source, view).items():
            report(name, cpu_milliseconds(run, len(source), args.seconds))
        for views_per_clip in (1, 2, 4):
            unit = 'clip' if views_per_clip == 1 else f'view, {views_per_clip} views a clip'
            report(f'whole path, in this process, a {unit}', *whole_path(source, view, args, views_per_clip, 0)[:2])
        for views_per_clip in (1, 2):
            unit = 'clip' if views_per_clip == 1 else f'view, {views_per_clip} views a clip'
            cpu, per_second, parent = whole_path(source, view, args, views_per_clip, args.workers)
            report(f'whole path, {args.workers} workers, a {unit}', cpu, per_second)
            report(f'  of which in the parent (transfer), a {unit}', parent)
        measure_tf_data(folder, args, report)
    results['settings'] = {**vars(args), 'cpu_count': os.cpu_count(), 'megabytes_per_clip': round(size / 1e6, 3)}
    print(json.dumps(results))


# -- Shards to read --


def write_shards(folder: pathlib.Path, codec: str, num_clips: int, width: int, num_shards: int = 4) -> None:
    """A prepared dataset with the settings that `prepare` has by default."""
    shards = []
    for k in range(num_shards):
        clips = (
            make_clip(i, codec, width) for i in range(k * num_clips // num_shards, (k + 1) * num_clips // num_shards)
        )
        records = [tfrecord.frame_record(schema.write_clip(clip)) for clip in clips]
        path = folder / f'noise-train.tfrecord-{k:05d}-of-{num_shards:05d}'
        path.write_bytes(b''.join(records))
        index = tfrecord.format_index([len(record) for record in records])
        pathlib.Path(f'{path}.index').write_text(index)
        shards.append(
            schema.ShardInfo(
                file=path.name,
                num_records=len(records),
                num_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                framing_sha256=tfrecord.TFRecordFile(path, tfrecord.read_index(f'{path}.index')).framing_digest(),
                index_sha256=hashlib.sha256(index.encode()).hexdigest(),
            )
        )
    info = schema.DatasetInfo(
        name='noise',
        modalities=('audio', 'video'),
        media=schema.MediaSettings(codec, FPS, 256, 85, SAMPLE_RATE, SECONDS, 12),
        splits={'train': tuple(shards)},
        labels={},
        statistics={},
    )
    (folder / schema.INFO_FILE).write_text(info.to_json())


def make_clip(seed: int, codec: str, width: int) -> Clip:
    """A picture with a 1/f spectrum and fine grain that drifts and fades into another one, and noise for sound."""
    rng = np.random.default_rng(seed)
    height, num_frames = 256, int(SECONDS * FPS)
    first, last = (_picture(rng, height + 32, width + 32) for _ in range(2))
    writer = encode.make_writer(codec, FPS, 85, 12)
    for k in range(num_frames):
        at = k / num_frames
        top, left = int(32 * at), int(32 * (1 - at))
        frame = ((1 - at) * first + at * last)[top : top + height, left : left + width]
        writer.write(np.clip(frame, 0, 255).astype(np.uint8), 1)
    writer.finish()
    waveform = (rng.standard_normal(int(SECONDS * SAMPLE_RATE)) * 3000).astype(np.int16)
    has = {'video': True, 'audio': True}
    return Clip(
        f'noise{seed}', writer.frames, writer.h264, num_frames, FPS, waveform, None, SAMPLE_RATE, SECONDS, has, {}
    )


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = np.full((height, width, 3), 128, np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = rng.standard_normal((cells * height // width + 1, cells, 3)).astype(np.float32)
        picture += 45 / np.sqrt(cells) * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture + rng.standard_normal(picture.shape).astype(np.float32)


# -- One stage at a time, in this thread --


def stages(source: sources.ShardedSource, view: views.View) -> dict[str, Callable[[int], object]]:
    """Name of a stage -> a function that does it for clip i, on input that was made before."""
    part = view.video
    records = [file[i] for file in source.files for i in range(len(file))]
    clips = [schema.read_clip(record) for record in records]
    wanted = sampling.frame_indices(1.0, part.num_frames, part.frame_seconds, FPS, clips[0].num_frames).tolist()
    frames = [[frame.copy() for _, frame in video.decode_frames(clip, wanted, part.short_side)] for clip in clips[:8]]
    crop = video.RandomCrop()
    dataset = batches.train_dataset(source, view, batch_size=1, seed=0)
    out = np.empty(part.shape, np.uint8)
    memory = np.empty(16 << 20, np.uint8)

    def read(i: int) -> bytes:
        file, k = source.locate(i)
        return file[k]

    def decode(i: int) -> None:
        for _ in video.decode_frames(clips[i], wanted, part.short_side):
            pass

    def cut(i: int) -> None:
        draws = sampling.Draws(0, 0, i, 0)
        (box,) = crop.boxes(*frames[0][0].shape[:2], part.short_side, part.crop_size, draws)
        for t, frame in enumerate(frames[i % len(frames)]):
            video.cut(frame, box, out[t])

    return {
        'bare decoder (the limit)': _bare_decoder(clips, wanted),
        'reading (with checksum)': read,
        'parsing': lambda i: schema.read_clip(records[i]),
        'decoding': decode,
        'cropping': cut,
        'a batch of one clip': lambda i: threads.compute(dataset, i, slots.Slot(memory), map),
    }


def _bare_decoder(clips: list[Clip], wanted: list[int]) -> Callable[[int], object]:
    if clips[0].h264:
        return lambda i: [frame.shape for _, frame in video.decode_frames(clips[i], wanted, 256)]
    images = [[bytes(clip.frames[index]) for index in wanted] for clip in clips]

    def decode(i: int) -> None:
        for image in images[i]:
            simplejpeg.decode_jpeg(image, fastdct=True)

    return decode


def cpu_milliseconds(run: Callable[[int], object], num_clips: int, seconds: float) -> float:
    for i in range(min(num_clips, 8)):
        run(i)
    count, began, until = 0, time.thread_time(), time.monotonic() + seconds
    while time.monotonic() < until:
        run(count % num_clips)
        count += 1
    return (time.thread_time() - began) / count * 1e3


# -- Everything together --


def whole_path(source, view, args, views_per_clip: int, num_workers: int) -> tuple[float, float, float]:
    """CPU ms a row in all processes, rows a second, and CPU ms a row in this process."""
    options = {'views_per_clip': views_per_clip, 'num_workers': num_workers, 'num_threads': args.threads}
    with batches.train_stream(source, view, args.batch_size, seed=0, **options) as stream:
        for _ in range(4 * max(1, num_workers)):
            next(stream)
        children = stream.worker_pids
        before, own, began = _cpu_seconds(children), time.process_time(), time.monotonic()
        count = 0
        while time.monotonic() < began + args.seconds or count % (args.batch_size * max(1, num_workers)):
            batch = next(stream)
            count += len(batch.record)
        wall = time.monotonic() - began
        own = time.process_time() - own
        cpu = own + _cpu_seconds(children) - before
    return cpu / count * 1e3, count / wall, own / count * 1e3


def _cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')


# -- tf.data doing the same job --


def measure_tf_data(folder: str, args, report: Callable) -> None:
    if args.codec != 'jpeg':
        print('tf.data is not measured for h264: it has no decoder for it in memory.')
        return
    try:
        import tensorflow as tf
    except ImportError:
        print('tf.data is not measured: TensorFlow is not installed.')
        return
    tf.config.set_visible_devices([], 'GPU')
    tf.config.threading.set_intra_op_parallelism_threads(args.workers * args.threads)
    for name, floating in (('tf.data as the reference does', True), ('tf.data at its best', False)):
        dataset = iter(_tf_dataset(tf, folder, args, floating))
        for _ in range(4):
            next(dataset)
        count, own, began = 0, time.process_time(), time.monotonic()
        while time.monotonic() < began + args.seconds:
            count += len(next(dataset)['waveform'])
        wall = time.monotonic() - began
        report(name, (time.process_time() - own) / count * 1e3, count / wall)


def _tf_dataset(tf, folder: str, args, floating: bool) -> Iterator:
    """The same cut by tf.data.

    Args:
      floating: decode the whole picture, crop, flip and normalise in float32 on the host, as the reference
        does; else decode only the crop (decode_and_crop_jpeg) and leave the rest to the device.
    """
    part = views.VideoView()
    options = tf.data.Options()
    options.threading.private_threadpool_size = args.workers * args.threads
    features = {
        'frames': tf.io.VarLenFeature(tf.string),
        'waveform': tf.io.FixedLenFeature([], tf.string),
    }

    def read(record):
        parsed = tf.io.parse_single_example(record, features)
        images = tf.sparse.to_dense(parsed['frames'])
        stride = round(part.frame_seconds * FPS)
        start = tf.random.uniform([], 0, tf.shape(images)[0] - part.num_frames * stride + 1, tf.int32)
        images = images[start : start + part.num_frames * stride : stride]
        waveform = tf.io.decode_raw(parsed['waveform'], tf.int16)[: int(SECONDS * SAMPLE_RATE)]
        height, width = 256, args.width
        top = tf.random.uniform([], 0, height - part.crop_size + 1, tf.int32)
        left = tf.random.uniform([], 0, width - part.crop_size + 1, tf.int32)
        if floating:
            frames = tf.map_fn(lambda x: tf.io.decode_jpeg(x, 3), images, fn_output_signature=tf.uint8)
            frames = frames[:, top : top + part.crop_size, left : left + part.crop_size]
            frames = tf.cond(tf.random.uniform([]) < 0.5, lambda: tf.reverse(frames, [2]), lambda: frames)
            frames = tf.cast(frames, tf.float32) * (2 / 255) - 1
        else:
            box = tf.stack([top, left, part.crop_size, part.crop_size])
            decode = lambda x: tf.io.decode_and_crop_jpeg(x, box, 3, dct_method='INTEGER_FAST')  # noqa: E731
            frames = tf.map_fn(decode, images, fn_output_signature=tf.uint8)
        shape = (part.num_frames, part.crop_size, part.crop_size, 3)
        return {'video': tf.ensure_shape(frames, shape), 'waveform': tf.ensure_shape(waveform, [160_000])}

    files = sorted(str(path) for path in pathlib.Path(folder).glob('*.tfrecord-*') if path.suffix != '.index')
    dataset = tf.data.TFRecordDataset(files).repeat().shuffle(16)
    dataset = dataset.map(read, num_parallel_calls=args.workers * args.threads, deterministic=False)
    return dataset.batch(args.batch_size).prefetch(2).with_options(options).as_numpy_iterator()


if __name__ == '__main__':
    main()
