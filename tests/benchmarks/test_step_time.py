"""The command line of the benchmark of a training step."""

import runpy

import pytest


@pytest.fixture(scope='module')
def parse(repository):
    return runpy.run_path(str(repository / 'benchmarks/step_time.py'), run_name='step_time')['parse_arguments']


@pytest.mark.parametrize('flag, wanted', [('--video', 'FRAMES HEIGHT WIDTH'), ('--audio', 'BINS MEL')])
def test_a_wrong_number_of_sizes_is_refused_with_what_is_wanted(flag, wanted, parse, capsys):
    with pytest.raises(SystemExit):
        parse([flag, '16'])
    assert f'{flag} takes {wanted}' in capsys.readouterr().err


def test_a_modality_can_be_left_out_but_not_both(parse, capsys):
    assert parse(['--audio']).audio == []
    with pytest.raises(SystemExit):
        parse(['--audio', '--video'])
    assert '--video and --audio' in capsys.readouterr().err
