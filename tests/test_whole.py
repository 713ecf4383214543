"""Folders and files that appear whole or not at all, whoever is killed and whoever writes beside."""

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from etils import epath

from avmae_jax import settings, whole
from avmae_jax.evaluation import results_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_at_the_end_and_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / 'run').mkdir()
    with whole.new_folder(tmp_path / 'run') as folder:
        (folder / 'a').write_text('1')
        assert names(tmp_path / 'run') == []
    assert names(tmp_path) == ['run'] and names(tmp_path / 'run') == ['a']
    with pytest.raises(ValueError, match='run is there already'), whole.new_folder(tmp_path / 'run'):
        pass
    assert names(tmp_path / 'run') == ['a']


@pytest.mark.parametrize('name', ['link', '.'])
def test_an_empty_folder_may_be_called_otherwise(tmp_path, monkeypatch, name):
    (tmp_path / 'disk/run').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'disk/run')
    monkeypatch.chdir(tmp_path / 'disk/run' if name == '.' else tmp_path)
    with whole.new_folder(name) as folder:
        (folder / 'a').write_text('1')
    assert names(tmp_path) == ['disk', 'link'] and (tmp_path / 'link').is_symlink()
    assert names(tmp_path / 'disk') == ['run'] and names(tmp_path / 'disk/run') == ['a']


def write_results(folder, text):
    content = {'subject': {}, 'data': {}, 'config': {}, 'results': {'reconstruction': text}}
    results_file.write(epath.Path(folder) / 'config.json', content)


@pytest.mark.parametrize('write', [lambda folder, text: settings.save_config({'a': text}, folder), write_results])
def test_a_disk_that_is_full_leaves_settings_and_results_as_they_were(tmp_path, write):
    write(tmp_path, 'old')
    before, limits = (tmp_path / 'config.json').read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match='too large'):
            write(tmp_path, 'new')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ['config.json'] and (tmp_path / 'config.json').read_text() == before


def test_what_an_earlier_version_left_by_halves_is_told_or_written_anew(tmp_path):
    (tmp_path / 'config.json').write_text('{"a": ')
    with pytest.raises(ValueError, match='config.json is not whole: .* Remove it'):
        settings.load_config(tmp_path)
    write_results(tmp_path, 'new')
    assert settings.load_config(tmp_path)['results'] == {'reconstruction': 'new'}


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    (tmp_path / 'x').write_text('old')
    with whole.new_file(tmp_path / 'x') as path:
        path.write_text('new')
        assert (tmp_path / 'x').read_text() == 'old'
    assert names(tmp_path) == ['x'] and (tmp_path / 'x').read_text() == 'new'


def test_a_file_may_be_made_within_a_folder_that_is_being_made(tmp_path):
    def write():
        with whole.new_folder(tmp_path / 'run') as folder, whole.new_file(folder / 'x') as path:
            path.write_text('new')

    thread = threading.Thread(target=write, daemon=True)  # Which would wait for its own lock for ever.
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert names(tmp_path / 'run') == ['x'] and (tmp_path / 'run/x').read_text() == 'new'


@pytest.mark.parametrize('new', [whole.new_folder, whole.new_file])
def test_what_fails_leaves_nothing(tmp_path, new):
    with pytest.raises(KeyboardInterrupt), new(tmp_path / 'deep/x') as path:
        (path / 'part').write_text('half') if path.is_dir() else path.write_text('half')
        raise KeyboardInterrupt
    assert names(tmp_path / 'deep') == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    code = f"""
from avmae_jax import whole
with whole.new_folder({str(tmp_path / 'run')!r}) as folder:
    (folder / 'a').write_text('half')
    print(folder, flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    left = process.stdout.readline().strip()
    other = tmp_path / 'run2.partial.1'  # Of another place.
    other.mkdir()
    with whole.new_file(tmp_path / 'run') as path:
        path.write_text('mine')
        assert os.path.isdir(left)
    (tmp_path / 'run').unlink()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert os.path.isdir(left)
    with whole.new_folder(tmp_path / 'run') as folder:
        assert not os.path.isdir(left)
        (folder / 'b').write_text('whole')
    assert names(tmp_path) == ['run', 'run2.partial.1'] and names(tmp_path / 'run') == ['b']
