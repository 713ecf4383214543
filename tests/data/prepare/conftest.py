"""Folders of media files."""

import os
import pathlib

import pytest


@pytest.fixture(scope='session')
def shared_data(repository) -> pathlib.Path:
    """The folder with real media."""
    folder = pathlib.Path(os.environ.get('AVMAE_DATA', repository.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there; set AVMAE_DATA to the folder with the real clips.')
    return folder


@pytest.fixture(scope='session')
def plain_folder(media, tmp_path_factory) -> pathlib.Path:
    """Ten clips of one second with picture and sound, and clips.csv with two classes; never to be written to."""
    folder = tmp_path_factory.mktemp('plain')
    lines = ['path,label,split']
    for i in range(10):
        sound = {'samples': media.tone(1.0, 16000, hz=200 + 100 * i)}
        media.write(folder / f'clip{i}.mp4', video={'gray': 10 + 20 * i}, sound=sound)
        lines.append(f'clip{i}.mp4,{"odd" if i % 2 else "even"},{"test" if i >= 8 else "train"}')
    (folder / 'clips.csv').write_text('\n'.join(lines) + '\n')
    return folder
