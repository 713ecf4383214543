"""What is submitted, to the letter: golden files, schemas of the YAML, scripts that bash takes; and hostile words."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from launch.__main__ import RENDERERS, main, make_spec
from launch.queued_resources import accelerator_type
from launch.spec import GPUS, TPUS, JobSpec

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden' / 'launch'
AUDIOSET = ['configs/pretrain/audioset.py:size=L', 'gs://bucket/runs/audioset-L']
SHARDS = '--config.data.path=gs://bucket/shards'
IMAGE = '--image=us-docker.pkg.dev/project/images/avmae:1'
ON_DISK = ['configs/pretrain/audioset.py:size=L', '/shared/runs/audioset-L', '--config.data.path=/shared/shards']
CASES = {
    'queued-resources-one-slice': ['queued_resources', *AUDIOSET, SHARDS, '--accelerator=v5e:4x4', '--zone=us-west4-a',
                                   '--source=https://github.com/someone/avmae_jax@v1.0', '--spot'],
    'queued-resources-two-slices': ['queued_resources', *AUDIOSET, SHARDS, '--accelerator=v5p:4x4x4', '--num_nodes=2',
                                    '--zone=us-east5-a', '--project=project', IMAGE, '--option=--reserved'],
    'jobset-tpu': ['jobset', *AUDIOSET, SHARDS, '--accelerator=v6e:16x16', '--num_nodes=2', IMAGE, '--queue=tpus'],
    'jobset-gpu': ['jobset', *AUDIOSET, SHARDS, '--accelerator=h100:8', '--num_nodes=4', IMAGE, '--namespace=vision',
                   '--spot', '--retries=10'],
    'slurm-source': ['slurm', *ON_DISK, '--accelerator=h100:8', '--num_nodes=4', '--source=/shared/avmae_jax',
                     '--queue=gpu', '--hours=24', '--option=--account=vision'],
    'slurm-image': ['slurm', *ON_DISK, '--accelerator=a100-80gb:4', IMAGE, '--env=NCCL_DEBUG=INFO'],
    'sky-gpu': ['sky', *AUDIOSET, SHARDS, '--accelerator=h200:8', '--num_nodes=2', '--source=.', '--spot'],
    'sky-tpu': ['sky', *AUDIOSET, SHARDS, '--accelerator=v5e:4x4', IMAGE, '--option=--infra=gcp'],
    'local': ['local', 'configs/tiny.py', 'runs/tiny', '--config.data.path=shards', '--accelerator=cpu:2',
              '--num_nodes=2', '--python=python'],
}  # fmt: skip


def rendered(arguments: list[str], here: pathlib.Path):
    """Files, and commands, of a command line."""
    spec, given = make_spec(arguments)
    return RENDERERS[given.how].render(spec, here / 'launched' / spec.name)


@pytest.mark.parametrize('case', CASES)
def test_what_would_be_submitted_equals_the_golden_file(case, here, capsys, request):
    assert main(CASES[case]) == 0
    shown = capsys.readouterr().out.replace(str(here), '/HERE')
    assert not list(here.iterdir()), 'a dry run wrote something'
    file = GOLDEN / f'{case}.txt'
    if request.config.getoption('--update-golden'):
        file.write_text(shown)
    assert file.exists() and shown == file.read_text(), f'{file} differs; pytest --update-golden writes it anew'


# -- YAML: which fields there are, which must be, and what they hold --


def fits(value, schema, path='') -> None:
    """Asserts that a value has the form of a schema: a type, a pattern, a list of one, or fields ('name?' may lack)."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        names = {name.rstrip('?'): name for name in schema}
        assert set(value) <= set(names), f'{path}: {set(value) - set(names)} is no field'
        for name, key in names.items():
            assert name in value or key.endswith('?'), f'{path}.{name} lacks'
            if name in value:
                fits(value[name], schema[key], f'{path}.{name}')
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for i, item in enumerate(value):
            fits(item, schema[0], f'{path}[{i}]')
    elif isinstance(schema, str):
        assert isinstance(value, str) and re.fullmatch(schema, value), f'{path}: {value!r} is not {schema}'
    elif callable(schema) and not isinstance(schema, type):
        assert schema(value), f'{path}: {value!r}'
    else:
        assert type(value) is schema, f'{path}: {value!r} is no {schema.__name__}'


def strings(value) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for item in value.items() for x in item)


def positive(value) -> bool:
    return type(value) is int and value >= 1


# After config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset, and the Job and
# the Pod of the Kubernetes API, as far as we use them.
JOBSET = {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {'name': '[a-z]([-a-z0-9]*[a-z0-9])?', 'labels?': strings, 'annotations?': strings},
    'spec': {
        'network': {'enableDNSHostnames': bool, 'publishNotReadyAddresses': bool},
        'failurePolicy': {
            'maxRestarts': int,
            'rules': [{
                'action': 'FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts',
                'onJobFailureReasons': ['BackoffLimitExceeded|DeadlineExceeded|PodFailurePolicy'],
            }],
        },
        'replicatedJobs': [{
            'name': '[a-z]+',
            'replicas': positive,
            'template': {'spec': {
                'parallelism': positive,
                'completions': positive,
                'completionMode': 'Indexed',
                'backoffLimit': int,
                'podFailurePolicy': {'rules': [{
                    'action': 'FailJob|Ignore|Count|FailIndex',
                    'onExitCodes': {'containerName': 'train', 'operator': 'In|NotIn', 'values': [positive]},
                }]},
                'template': {'spec': {
                    'restartPolicy': 'Never',  # The only one that goes with a podFailurePolicy.
                    'terminationGracePeriodSeconds': positive,
                    'hostNetwork?': bool,
                    'dnsPolicy?': 'ClusterFirstWithHostNet',
                    'nodeSelector': strings,
                    'tolerations?': [{'key': str, 'operator': 'Equal|Exists', 'value': str, 'effect': 'NoSchedule'}],
                    'volumes?': [{'name': str, 'emptyDir': {'medium': 'Memory'}}],
                    'containers': [{
                        'name': 'train',
                        'image': str,
                        'workingDir': '/.*',
                        'command': [str],
                        'env': [{'name': '[A-Z_]+', 'value': str}],
                        'securityContext?': {'privileged': bool},
                        'resources': {'limits': {'google.com/tpu?': positive, 'nvidia.com/gpu?': positive}},
                        'volumeMounts?': [{'name': str, 'mountPath': '/.*'}],
                    }],
                }},
            }},
        }],
    },
}  # fmt: skip

# After sky/utils/schemas.py of github.com/skypilot-org/skypilot, as far as we use it.
SKY = {
    'name': '[a-z0-9]([-a-z0-9]*[a-z0-9])?',
    'workdir?': str,
    'num_nodes': positive,
    'resources': {'accelerators': r'[A-Z0-9-]+:\d+|tpu-[a-z0-9]+-\d+', 'use_spot?': bool, 'image_id?': 'docker:.+'},
    'setup?': str,
    'run': str,
}


@pytest.mark.parametrize('case', [case for case in CASES if case.startswith(('jobset', 'sky'))])
def test_the_yaml_has_the_fields_that_its_schema_wants_and_no_others(case, here):
    for name, text in rendered(CASES[case], here).files.items():
        fits(yaml.safe_load(text), JOBSET if name == 'jobset.yaml' else SKY)


def test_a_schema_finds_what_is_wrong(here):
    (text,) = rendered(CASES['jobset-gpu'], here).files.values()
    for wrong in (text.replace('backoffLimit: 0', 'backoffLimit: none'), text.replace('restartPolicy', 'restartPolcy')):
        with pytest.raises(AssertionError, match='backoffLimit|restartPol'):
            fits(yaml.safe_load(wrong), JOBSET)


@pytest.mark.parametrize('kind', TPUS)
def test_chips_of_a_slice_are_the_sum_of_its_pods(kind, here):
    shape = '4x4' if TPUS[kind].num_dims == 2 else '2x2x4'
    arguments = ['jobset', *AUDIOSET, IMAGE, f'--accelerator={kind}:{shape}', '--num_nodes=3']
    (text,) = rendered(arguments, here).files.values()
    (job,) = yaml.safe_load(text)['spec']['replicatedJobs']
    pods = job['template']['spec']
    chips = pods['template']['spec']['containers'][0]['resources']['limits']['google.com/tpu']
    assert job['replicas'] == 3 and pods['parallelism'] == pods['completions'] == 16 // chips
    assert accelerator_type(make_spec(arguments)[0]).endswith('-32' if kind in ('v4', 'v5p') else '-16')


# -- Scripts --


def scripts(case: str, here: pathlib.Path) -> list[str]:
    files = rendered(CASES[case], here).files
    found = [text for text in files.values() if text.startswith('#!')]
    for name, text in files.items():
        if name == 'sky.yaml':
            task = yaml.safe_load(text)
            found += [f'#!/usr/bin/env bash\n{task[part]}' for part in ('setup', 'run') if part in task]
    return found


WITH_SCRIPTS = [case for case in CASES if case.startswith(('queued', 'slurm', 'sky'))]


@pytest.mark.parametrize('case', WITH_SCRIPTS)
def test_bash_and_shellcheck_find_no_fault_in_a_script(case, here):
    assert scripts(case, here)
    for text in scripts(case, here):
        subprocess.run(['bash', '-n'], input=text, text=True, check=True)
        if shutil.which('shellcheck'):
            # SC2016: $ in single quotes is not expanded, which is what they are for.
            done = subprocess.run(['shellcheck', '--exclude=SC2016', '-'], input=text, text=True, capture_output=True)
            assert not done.returncode, done.stdout
    if not shutil.which('shellcheck'):
        pytest.skip('bash -n found no fault; shellcheck is not installed')


HOSTILE = ["it's", '"$(touch /tmp/owned)"', '`id`; rm -rf x', '$HOME', 'a b  c', '\\', 'é\n#x', '$(NAME)', '$$', '*']


def words_given_to_python(how: str, arguments: list[str], here: pathlib.Path, stand_ins) -> list[str]:
    """What the script of a job calls Python with, as bash understands it."""
    note = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$WORDS"\n'
    run = '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nSLURM_PROCID=0 "$@"\n'  # As srun does.
    stand_ins('python', text=note)
    stand_ins('srun', text=run)
    stand_ins('docker', text='#!/usr/bin/env bash\nwhile [[ $1 != python ]]; do shift || exit 0; done\n"$@"\n')
    stand_ins('gcloud', text='#!/usr/bin/env bash\n')
    (text,) = rendered([how, *arguments], here).files.values()
    if how == 'sky':
        text = yaml.safe_load(text)['run'].replace('cd /opt/avmae_jax || exit', '')
    text = re.sub('exec >>/var/log/.*', '', text)
    (here / 'launched/job/logs').mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, 'WORDS': str(here / 'words'), 'SLURM_JOB_ID': '1', 'HOME': '/'}
    subprocess.run(['bash'], input=text, text=True, check=True, env=environment, cwd=here, timeout=30)
    return (here / 'words').read_text().split('\0')[:-1]


@pytest.mark.parametrize('how', ['slurm', 'sky', 'queued_resources'])
def test_a_script_passes_settings_on_as_they_were_given(how, here, stand_ins):
    settings = [f'--config.x{i}={word}' for i, word in enumerate(HOSTILE)]
    where = {
        'slurm': ['--accelerator=h100:8'],
        'sky': ['--accelerator=h100:8'],
        'queued_resources': ['--accelerator=v5e:4x4', '--zone=z'],
    }
    arguments = ['configs/my config.py:a=b', "gs://b/it's $HOME", '--name=job', IMAGE, *where[how], *settings]
    words = words_given_to_python(how, arguments, here, stand_ins)
    assert words == [
        '-m',
        'avmae_jax.train',
        '--config=configs/my config.py:a=b',
        "--workdir=gs://b/it's $HOME",
        *settings,
    ]


def expanded_by_kubernetes(word: str, variables: dict[str, str]) -> str:
    """$$ is $; $(NAME) is the variable, where there is one (third_party/forked/golang/expansion of kubernetes)."""
    known = lambda m: '$' if m[0] == '$$' else variables.get(m[1], m[0])  # noqa: E731
    return re.sub(r'\$\$|\$\(([^)]*)\)', known, word)


def test_kubernetes_passes_settings_on_as_they_were_given(here):
    settings = [f'--config.x{i}={word}' for i, word in enumerate(HOSTILE)]
    arguments = ['jobset', *AUDIOSET, IMAGE, '--accelerator=h100:8', '--num_nodes=2', '--env=A=$(B) $$', *settings]
    (text,) = rendered(arguments, here).files.values()
    container = yaml.safe_load(text)['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][
        0
    ]
    variables = {'JOB_COMPLETION_INDEX': '1', 'NAME': 'replaced', 'B': 'replaced'}
    words = [expanded_by_kubernetes(word, variables) for word in container['command']]
    assert words[5:-3] == settings and words[-1] == '--process_id=1'
    assert [expanded_by_kubernetes(x['value'], variables) for x in container['env'] if x['name'] == 'A'] == ['$(B) $$']


# -- What a tool cannot do is told --

REFUSED = {
    'a workdir that is lost with the machine': (['jobset', 'c.py', '/runs/x', IMAGE, '--accelerator=h100:8'], 'bucket'),
    'no code': (['slurm', 'c.py', '/runs/x', '--accelerator=h100:8'], '--image=IMAGE or --source='),
    'a chip that is not offered': (['slurm', 'c.py', '/runs/x', '--source=/s', '--accelerator=v5e:4x4'], 'a100, '),
    'a field without meaning': (['slurm', 'c.py', '/x', '--source=/s', '--accelerator=h100:8', '--zone=z'], '--zone'),
    'no zone': (['queued_resources', *AUDIOSET, IMAGE, '--accelerator=v5e:4x4'], '--zone=us-west4-a'),
    'slices of one host': (['jobset', *AUDIOSET, IMAGE, '--accelerator=v5e:2x4', '--num_nodes=2'], 'several hosts'),
    'joined slices': (['sky', *AUDIOSET, IMAGE, '--accelerator=v5e:4x4', '--num_nodes=2'], 'queued_resources'),
    'two processes on the same GPUs': (['local', 'c.py', 'x', '--accelerator=h100:8', '--num_nodes=2'], 'one process'),
    'a flag that does not exist': (['local', 'c.py', 'x', '--acelerator=cpu:2'], 'What is'),
    'a variable without a value': (['local', 'c.py', 'x', '--env=NAME'], 'NAME=VALUE'),
    'a mount with a comma': (['slurm', 'c.py', '/runs/a,b', IMAGE, '--accelerator=h100:8'], 'no space, comma or'),
    'a mount of who knows where': (['slurm', 'c.py', 'runs/a', IMAGE, '--accelerator=h100:8'], 'begins with /'),
    'a setting in two words': (['local', 'c.py', 'x', '--config.x', '1'], 'What is'),
}  # fmt: skip


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_is_refused_in_one_line(what, here, capsys):
    arguments, words = REFUSED[what]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_every_gpu_can_be_asked_for_by_its_name(here):
    for kind in GPUS:
        spec = JobSpec('c.py', 'gs://b/x', image='i', accelerator=f'{kind}:8')
        assert kind.partition('-')[0] in RENDERERS['jobset'].render(spec, here).files['jobset.yaml']
