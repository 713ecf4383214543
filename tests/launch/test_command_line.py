"""Submitting, and what comes after it, with stand-ins for the tools: they get words, whatever is in them."""

import pytest

from launch.__main__ import main

BUCKET = ['configs/tiny.py', 'gs://b/run', '--image=i']
HOSTILE = '--config.x=it\'s $(touch owned); "x"'
PLACE = ['--zone=z', '--project=p']
NODES = ['run-0', 'run-1']
GCLOUD = ['gcloud', 'compute', 'tpus']
POD_LABEL = '--selector=jobset.sigs.k8s.io/jobset-name=run'
# How -> the command line, and the calls that submit, ask for the status, fetch logs and tear down.
CALLS = {
    'queued_resources': (
        [*BUCKET, *PLACE, '--accelerator=v5e:4x4', '--num_nodes=2'],
        [[*GCLOUD, 'queued-resources', 'create', 'run', *PLACE, '--accelerator-type=v5litepod-16',
          '--runtime-version=v2-alpha-tpuv5-lite', '--node-count=2', '--node-prefix=run',
          '--metadata-from-file=startup-script=launched/run/startup.sh']],
        [[*GCLOUD, 'queued-resources', 'describe', 'run', *PLACE]],
        [[*GCLOUD, 'tpu-vm', 'ssh', node, *PLACE, '--worker=all', '--command=cat /var/log/run.log',
          f'--output-directory=launched/run/logs/{node}'] for node in NODES],
        [[*GCLOUD, 'queued-resources', 'delete', 'run', *PLACE, '--force', '--quiet']],
    ),
    'jobset': (
        [*BUCKET, '--accelerator=h100:8', '--num_nodes=2', '--namespace=n', '--option=--context=c'],
        [['kubectl', '--namespace=n', '--context=c', 'apply', '--filename=launched/run/jobset.yaml']],
        [['kubectl', '--namespace=n', '--context=c', 'get', 'jobset', 'run'],
         ['kubectl', '--namespace=n', '--context=c', 'get', 'pods', POD_LABEL, '--output=wide']],
        [['kubectl', '--namespace=n', '--context=c', 'logs', POD_LABEL, '--prefix', '--tail=-1',
          '--max-log-requests=2']],
        [['kubectl', '--namespace=n', '--context=c', 'delete', 'jobset', 'run']],
    ),
    'slurm': (
        [*BUCKET, '--accelerator=h100:8', '--num_nodes=2', '--queue=q'],
        [['sbatch', '--job-name=run', '--nodes=2', '--ntasks-per-node=1', '--exclusive', '--gpus-per-node=8',
          '--requeue', '--signal=TERM@120', '--open-mode=append', '--output=HERE/launched/run/logs/%j.log',
          '--partition=q', 'HERE/launched/run/job.sh']],
        [['squeue', '--me', '--name=run', '--states=all', '--long']],
        [],
        [['scancel', '--me', '--name=run']],
    ),
    'sky': (
        [*BUCKET, '--accelerator=h100:8', '--num_nodes=2'],
        [['sky', 'jobs', 'launch', '--name=run', '--yes', '--detach-run', 'launched/run/sky.yaml']],
        [['sky', 'jobs', 'queue']],
        [['sky', 'jobs', 'logs', '--name=run', '--no-follow']],
        [['sky', 'jobs', 'cancel', '--name=run', '--yes']],
    ),
}  # fmt: skip
TOOLS = ('gcloud', 'kubectl', 'sbatch', 'squeue', 'scancel', 'sky')


@pytest.mark.parametrize('how', CALLS)
def test_a_job_is_submitted_looked_after_and_torn_down(how, here, stand_ins, capfd):
    made = stand_ins(*TOOLS)
    arguments, *expected = CALLS[how]
    assert main([how, *arguments, HOSTILE]) == 0
    assert not made() and not list(here.iterdir()), 'a dry run is no submission'
    assert main([how, *arguments, HOSTILE, '--submit']) == 0
    for later in ('status', 'logs', 'teardown'):
        assert main([later, 'run']) == 0
    calls = [[word.replace(str(here), 'HERE') for word in call] for call in made()]
    assert calls == [call for calls in expected for call in calls]
    assert not (here / 'owned').exists()
    if how in ('jobset', 'sky'):
        (log,) = (here / 'launched/run/logs').glob('*.log')
        assert log.read_text() == f'said by {expected[2][0][0]}\n'  # Gathered, and the end of it shown:
        assert f'{log.relative_to(here)}: 1 lines\n    said by' in capfd.readouterr().out


def test_a_tool_that_fails_or_lacks_is_told(here, stand_ins, monkeypatch, capfd):
    arguments = ['slurm', 'c.py', '/runs/run', '--source=/s', '--accelerator=h100:8', '--submit']
    with monkeypatch.context() as patch:
        patch.setenv('PATH', '/nowhere')
        assert main(arguments) == 2 and 'sbatch is not installed' in capfd.readouterr().err
    stand_ins('sbatch')
    monkeypatch.setenv('STAND_IN_CODE', '3')
    assert main(arguments) == 3 and 'sbatch ended with exit code 3' in capfd.readouterr().err


def test_a_job_that_was_not_submitted_is_told_with_those_that_were(here, stand_ins, capfd):
    assert main(['status', 'run']) == 2 and 'has no job' in capfd.readouterr().err
    stand_ins('sbatch')
    main(['slurm', 'c.py', '/runs/other', '--source=/s', '--accelerator=h100:8', '--submit'])
    assert main(['status', 'run']) == 2 and 'launched has other' in capfd.readouterr().err
