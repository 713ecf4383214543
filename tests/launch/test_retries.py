"""Scripts run to their end with stand-ins: what is tried again, how often, and what is told at the end."""

import os
import subprocess

import pytest
import yaml

from launch.__main__ import RENDERERS, make_spec
from launch.spec import FINAL_EXIT_CODES

# Ends with the codes in $CODES, one after the other.
PYTHON = """\
#!/usr/bin/env bash
read -r code rest <"$CODES"
echo "$rest" >"$CODES"
echo "$code" >>"$CODES.seen"
exit "$code"
"""
# Two tasks; srun ends the other when one fails, and tells the highest code.
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
SLURM_PROCID=0 "$@"
code=$?
exit $((code ? 137 : 0))
"""
SCONTROL = """\
#!/usr/bin/env bash
case $1 in
  show) echo first; echo second ;;
  requeue) echo "requeue $2" >>"$CODES.seen"; kill "$PPID" ;;
esac
"""


@pytest.fixture
def run_script(here, stand_ins):
    """(how, flags of the job, exit codes of the program) -> (code of the script, exit codes that were met)."""

    def run(how: str, flags: list[str], codes: list[int], **environment: str) -> tuple[int, list[str]]:
        stand_ins('python', text=PYTHON)
        stand_ins('srun', text=SRUN)
        stand_ins('scontrol', text=SCONTROL)
        stand_ins('sleep', text='#!/usr/bin/env bash\n')
        arguments = [how, 'c.py', 'gs://b/x', '--image=i', '--name=job', '--accelerator=h100:8', *flags]
        (text,) = RENDERERS[how].render(make_spec(arguments)[0], here / 'launched/job').files.values()
        (here / 'launched/job/logs').mkdir(parents=True, exist_ok=True)
        if how == 'sky':
            text = yaml.safe_load(text)['run'].replace('cd /opt/avmae_jax || exit', '')
        given, seen = here / 'codes', here / 'codes.seen'
        given.write_text(' '.join(map(str, codes)) + '\n')
        seen.write_text('')
        variables = {**os.environ, 'CODES': str(given), 'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'x', **environment}
        variables |= {'SLURM_NTASKS': '2', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2'}
        variables |= {'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'}
        done = subprocess.run(['bash'], input=text, text=True, env=variables, cwd=here, timeout=60)
        return done.returncode, seen.read_text().split('\n')[:-1]

    return run


@pytest.mark.parametrize('nodes', ['1', '2'])
def test_a_loop_tries_again_until_it_succeeds(run_script, nodes):
    assert run_script('sky', [f'--num_nodes={nodes}'], [75, 134, 1, 0]) == (0, ['75', '134', '1', '0'])


def test_a_loop_ends_after_its_retries(run_script):
    assert run_script('sky', ['--retries=2'], [1, 1, 137, 0]) == (137, ['1', '1', '137'])


@pytest.mark.parametrize('code', FINAL_EXIT_CODES)
def test_what_would_end_the_same_is_not_tried_again(run_script, code):
    assert run_script('sky', [], [code, 0]) == (code, [str(code)])
    # srun itself tells 137 then.
    assert run_script('slurm', ['--num_nodes=2'], [code]) == (code, [str(code)])


def test_slurm_queues_a_job_again_that_may_succeed_and_counts(run_script):
    assert run_script('slurm', ['--num_nodes=2'], [75]) == (-15, ['75', 'requeue 7'])  # Ended by the requeue.
    assert run_script('slurm', ['--num_nodes=2'], [1], SLURM_RESTART_COUNT='2') == (-15, ['1', 'requeue 7'])
    assert run_script('slurm', ['--num_nodes=2'], [1], SLURM_RESTART_COUNT='3') == (137, ['1'])
    assert run_script('slurm', [], [0]) == (0, ['0'])
