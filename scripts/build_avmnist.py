"""Builds the clips of docs/results.md from their two sources: spoken digits, each with a written one that moves.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    # MNIST: t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, in one folder
    python scripts/build_avmnist.py --fsdd=free-spoken-digit-dataset/recordings --mnist=FOLDER --output=avmnist
    python -m avmae_jax.prepare --input=avmnist/avmnist.csv --output=avmnist_shards --short_side=40 --jpeg_quality=95

Every recording gets an image of its own of the same digit, drawn without replacement: the pairing says which digit
it is and nothing else. The digit, 56 of 112 pixels, goes along a straight line from one random place to another; the
word begins at a random moment. 16 frames at 12.5 a second and 1.28 s of 16 kHz sound, as h264 and AAC. Test clips are
those of the recordings 0 to 4 of each speaker and digit, as the spoken digits are commonly split. The same seed gives
the same clips; with 3,000 recordings, about four minutes on one core.
"""

from __future__ import annotations

import csv
import gzip
import re
import struct
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from absl import app, flags

sys.path.append(str(Path(__file__).resolve().parent.parent))

from avmae_jax.data.generate.clip import write_mp4
from avmae_jax.progress import progress

SIDE = 112
DIGIT_SIDE = 56
FPS = 12.5
NUM_FRAMES = 16
SAMPLE_RATE = 16_000
NUM_SAMPLES = round(NUM_FRAMES / FPS * SAMPLE_RATE)
NUM_TEST = 5  # Recordings of each speaker and digit that are held out.
RECORDING = re.compile(r'(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<take>\d+)\.wav')
COLUMNS = ('path', 'label', 'split', 'start', 'end', 'speaker', 'fsdd_wav', 'mnist_t10k_index')

_FSDD = flags.DEFINE_string('fsdd', None, 'Folder with DIGIT_SPEAKER_TAKE.wav, "recordings" of the download.')
_MNIST = flags.DEFINE_string('mnist', None, 'Folder with the t10k files, with or without .gz.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for avmnist.csv and clips/.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of pairs, lines and moments.')


class Pair(NamedTuple):
    """One clip to be; attributes: image: number of the MNIST test image."""

    recording: Path
    digit: int
    speaker: str
    take: int
    image: int


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of MNIST's own format: zeros, type, number of dimensions, sizes, values."""
    for path, opener in ((folder / name, open), (folder / f'{name}.gz', gzip.open)):
        if path.exists():
            with opener(path, 'rb') as file:
                content = file.read()
            try:
                zeros, kind, num_dims = struct.unpack('>HBB', content[:4])
                shape = struct.unpack(f'>{num_dims}I', content[4 : 4 + 4 * num_dims])
            except struct.error:
                zeros, shape = -1, ()
            values = np.frombuffer(content[4 + 4 * len(shape) :], np.uint8)
            if zeros or kind != 8 or len(values) != np.prod(shape):
                raise ValueError(f'{path} is not a whole file of bytes in the IDX format.')
            return values.reshape(shape)
    raise ValueError(f'{folder} has neither {name} nor {name}.gz: --mnist is the folder with the t10k files.')


def read_wav(path: Path) -> np.ndarray:
    """Mono int16 at SAMPLE_RATE; the recordings have half of it, and every other sample is put in between."""
    with wave.open(str(path)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2 or file.getframerate() * 2 != SAMPLE_RATE:
            raise ValueError(f'{path}: mono, 16 bits and {SAMPLE_RATE // 2} Hz are wanted; got {file.getparams()}.')
        samples = np.frombuffer(file.readframes(file.getnframes()), '<i2').astype(np.float64)
    # Band-limited: the spectrum stays as it is, with nothing above the old limit.
    spectrum = np.fft.rfft(samples)
    doubled = np.fft.irfft(np.concatenate([spectrum, np.zeros(len(samples) + 1 - len(spectrum))]), 2 * len(samples)) * 2
    return np.clip(np.round(doubled), -32768, 32767).astype(np.int16)


def find_pairs(fsdd: Path, labels: np.ndarray, rng: np.random.Generator) -> Iterator[Pair]:
    """Every recording with an image of its digit; in the order of the file names."""
    found = sorted((path, match) for path in fsdd.iterdir() if (match := RECORDING.fullmatch(path.name)))
    if not found:
        raise ValueError(f'{fsdd} has no DIGIT_SPEAKER_TAKE.wav: --fsdd is the folder "recordings" of the download.')
    images = {digit: iter(rng.permutation(np.flatnonzero(labels == digit))) for digit in range(10)}
    for path, match in found:
        digit = int(match['digit'])
        image = next(images[digit], None)
        if image is None:
            raise ValueError(f'There are more recordings of {digit} than MNIST test images of it.')
        yield Pair(path, digit, match['speaker'], int(match['take']), int(image))


def make_frames(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, enlarged, on a straight line at constant speed; between pixels where the line is."""
    large = cv2.resize(image, (DIGIT_SIDE, DIGIT_SIDE), interpolation=cv2.INTER_LINEAR)
    start, end = rng.uniform(0, SIDE - DIGIT_SIDE, (2, 2))
    frames = []
    for moment in np.linspace(0, 1, NUM_FRAMES):
        x, y = start + moment * (end - start)
        frames.append(cv2.warpAffine(large, np.float32([[1, 0, x], [0, 1, y]]), (SIDE, SIDE)))
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def make_waveform(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The word at a random moment of silence; of a longer one, the beginning."""
    waveform = np.zeros(NUM_SAMPLES, np.int16)
    samples = samples[:NUM_SAMPLES]
    start = rng.integers(NUM_SAMPLES - len(samples) + 1)
    waveform[start : start + len(samples)] = samples
    return waveform[:, None]


def build(fsdd: Path, mnist: Path, output: Path, seed: int) -> Path:
    """Writes the clips and returns the table of them."""
    images, labels = read_idx(mnist, 't10k-images-idx3-ubyte'), read_idx(mnist, 't10k-labels-idx1-ubyte')
    (output / 'clips').mkdir(parents=True, exist_ok=True)
    pairs = list(find_pairs(fsdd, labels, np.random.default_rng(seed)))
    table = output / 'avmnist.csv'
    with table.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, pair in enumerate(progress(pairs, what='building', unit='clips')):
            rng = np.random.default_rng((seed, i))
            name = f'clips/{pair.recording.stem}_m{pair.image}.mp4'
            frames, waveform = make_frames(images[pair.image], rng), make_waveform(read_wav(pair.recording), rng)
            write_mp4(output / name, frames, waveform, FPS, SAMPLE_RATE)
            split = 'test' if pair.take < NUM_TEST else 'train'
            seconds = NUM_FRAMES / FPS
            writer.writerow([name, pair.digit, split, 0.0, seconds, pair.speaker, pair.recording.name, pair.image])
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
    try:
        table = build(Path(_FSDD.value), Path(_MNIST.value), Path(_OUTPUT.value), _SEED.value)
    except (ValueError, FileNotFoundError) as error:
        print(f'build_avmnist: {error}', file=sys.stderr)
        sys.exit(2)
    print(
        f'Written to {table}. Next: python -m avmae_jax.prepare --input={table} --output=avmnist_shards '
        '--short_side=40 --jpeg_quality=95'
    )


if __name__ == '__main__':
    flags.mark_flags_as_required(['fsdd', 'mnist', 'output'])
    app.run(main)
