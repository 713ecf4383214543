import io

import pytest

from avmae_jax import progress as progress_lib


def test_an_iterable_passes_through_and_the_last_line_tells_count_and_rate():
    stream = io.StringIO()
    assert list(progress_lib.progress([3, 1, 2], what='reading', unit='clips', stream=stream)) == [3, 1, 2]
    (line,) = stream.getvalue().splitlines()
    assert line.startswith('reading: 3 of 3 clips, in 0 s') and 'clips/s' in line


def test_no_terminal_gets_a_line_now_and_then_with_the_time_left(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: next(clock))
    stream = io.StringIO()
    with progress_lib.progress(4, what='training', unit='steps', stream=stream) as bar:
        bar.note(loss='0.5')
        for _ in range(4):
            bar.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and 'loss=0.5' in lines[0] and 'left' in lines[0] and '%' in lines[0]


def test_a_number_cannot_be_gone_over():
    with pytest.raises(ValueError, match='nothing to go over'):
        list(progress_lib.progress(3, what='reading', stream=io.StringIO()))


@pytest.mark.parametrize('seconds, text', [(0.4, '0 s'), (200, '3 min 20 s'), (7500, '2 h 5 min')])
def test_seconds_read_as_people_say_them(seconds, text):
    assert progress_lib.format_seconds(seconds) == text
