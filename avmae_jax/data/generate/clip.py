"""Whole made-up clips: as arrays for tests, as mp4 files with a CSV for everything else."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from avmae_jax.data.generate.picture import render
from avmae_jax.data.generate.scene import LABELS, Contact, simulate
from avmae_jax.data.generate.sound import synthesize

SAMPLE_RATE = 32000
TEST_SHARE = 5  # One clip in five of every class is for testing.


class GeneratedClip(NamedTuple):
    """Attributes:
    frames: the picture at `fps`.
    waveform: left and right at `sample_rate`.
    label: one of LABELS, '<material>-<motion>'.
    contacts: when, where and how hard bodies touched; what the tests hold picture and sound against.
    """

    frames: UInt8[np.ndarray, 't h w 3']
    waveform: Int16[np.ndarray, 'l 2']
    label: str
    contacts: tuple[Contact, ...]


def generate_clip(
    seed: int | tuple[int, ...],
    label: str | None = None,
    *,
    seconds: float | int = 2.0,
    size: int = 112,
    fps: float | int = 25.0,
    sample_rate: int = SAMPLE_RATE,
) -> GeneratedClip:
    """A clip that depends on its arguments alone.

    Args:
      label: what happens; drawn from the seed when None.
      size: side of the square picture in pixels.
    """
    if seconds <= 0 or fps <= 0 or size < 16:
        raise ValueError(f'seconds and fps must be above 0 and size at least 16; got {seconds}, {fps} and {size}.')
    # One stream of numbers each, so that another size or rate of the picture leaves the sound as it is.
    scene_rng, picture_rng, sound_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    drawn = LABELS[scene_rng.integers(len(LABELS))]
    seconds, fps = float(seconds), float(fps)
    scene = simulate(scene_rng, drawn if label is None else label, seconds)
    return GeneratedClip(
        frames=render(picture_rng, scene, seconds, fps, size),
        waveform=synthesize(sound_rng, scene, seconds, sample_rate),
        label=scene.label,
        contacts=scene.contacts,
    )


def write_mp4(
    path: str | os.PathLike,
    frames: UInt8[np.ndarray, 't h w 3'] | None,
    waveform: Int16[np.ndarray, 'l c'] | None,
    fps: float | int,
    sample_rate: int = SAMPLE_RATE,
    crf: int = 20,
) -> None:
    """An mp4 with h264 and AAC, as phones and platforms write them; it appears whole or not at all.

    Args:
      frames: None for sound alone; height and width must be even.
      waveform: None for a silent file; one or two channels.
    """
    path = Path(path)
    part = path.with_name(f'.{path.name}.part')
    with av.open(str(part), 'w', format='mp4') as file:
        if frames is not None:
            picture = file.add_stream('libx264', rate=Fraction(fps).limit_denominator(1001))
            picture.height, picture.width = frames.shape[1:3]
            picture.pix_fmt = 'yuv420p'
            picture.codec_context.thread_count = 1  # The bytes would depend on the number of threads.
            picture.options = {'crf': str(crf), 'preset': 'superfast'}
        if waveform is not None:
            layout = {1: 'mono', 2: 'stereo'}[waveform.shape[1]]
            sound = file.add_stream('aac', rate=sample_rate, layout=layout)
            sound.bit_rate = 64_000 * waveform.shape[1]
            sound.options = {'aac_coder': 'fast'}  # Six times quicker than the default, and no one will hear it.
            audio = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(waveform.reshape(1, -1)), format='s16', layout=layout
            )
            audio.sample_rate = sample_rate
            audio.pts = 0
            for packet in (*sound.encode(audio), *sound.encode(None)):
                file.mux(packet)
        if frames is not None:
            for i, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format='rgb24')
                frame.pts = i
                frame.time_base = 1 / Fraction(fps).limit_denominator(1001)
                for packet in picture.encode(frame):
                    file.mux(packet)
            for packet in picture.encode(None):
                file.mux(packet)
    part.rename(path)


def _write_one(job: tuple[Path, tuple[int, int], str, float | int, int, float | int]) -> None:
    path, seed, label, seconds, size, fps = job
    cv2.setNumThreads(1)  # There is a process a core already.
    clip = generate_clip(seed, label, seconds=seconds, size=size, fps=fps)
    write_mp4(path, clip.frames, clip.waveform, fps)


def write_clips(
    folder: str | os.PathLike,
    num_clips: int,
    seed: int = 0,
    *,
    seconds: float | int = 2.0,
    size: int = 112,
    fps: float | int = 25.0,
    num_processes: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:
    """Writes clips of all classes in turn and a `clips.csv` that lists them; returns the CSV's path.

    Args:
      seed: clip i is a function of (seed, i) alone; more clips leave the first ones as they are.
      num_processes: None for one a core; 0 for none but this one.
      progress: told the number of clips written, after each.
    """
    if num_clips < 1:
        raise ValueError(f'num_clips must be at least 1; got {num_clips}.')
    if size % 2:
        raise ValueError(f'size must be even, h264 halves the resolution of colour; got {size}.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, jobs = [], []
    for i in range(num_clips):
        label = LABELS[i % len(LABELS)]
        split = 'test' if i // len(LABELS) % TEST_SHARE == TEST_SHARE - 1 else 'train'
        name = f'{i:06d}-{label}.mp4'
        rows.append({'path': name, 'label': label, 'split': split, 'start': 0, 'end': seconds})
        jobs.append((folder / name, (seed, i), label, seconds, size, fps))
    num_processes = len(os.sched_getaffinity(0)) if num_processes is None else num_processes
    if num_processes > 1:
        # Spawned: the caller may hold threads (jax, grain), which a fork would copy in any state.
        with ProcessPoolExecutor(num_processes, mp_context=get_context('spawn')) as pool:
            for done, _ in enumerate(pool.map(_write_one, jobs, chunksize=4), start=1):
                progress(done)
    else:
        for done, job in enumerate(jobs, start=1):
            _write_one(job)
            progress(done)
    table = folder / 'clips.csv'
    part = folder / '.clips.csv.part'
    with part.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    part.rename(table)
    return table
