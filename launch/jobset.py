"""Google Kubernetes Engine: a JobSet, for TPU slices or machines with GPUs.

Fields: jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2; kubernetes.io/docs/tasks/job/pod-failure-policy; node labels:
cloud.google.com/kubernetes-engine/docs/how-to/tpus and .../tpu-multislice. What depends on the cluster alone
(GPUDirect, service accounts, volumes) is left to it.
"""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

from launch import flags, shell
from launch.spec import (
    CODE_IN_IMAGE,
    FINAL_EXIT_CODES,
    GPUS,
    GRACE_SECONDS,
    PORT,
    TPUS,
    JobSpec,
    check_bucket,
    check_fields,
)
from launch.submission import Command, Submission

FILE = 'jobset.yaml'
NODE = 'node'  # The replicated job: one for each TPU slice, or one of all machines with GPUs.


def render(spec: JobSpec, folder: pathlib.Path) -> Submission:
    check_fields(spec, 'jobset', ('image', 'namespace', 'queue', 'spot', 'options'), ('tpu', 'gpu'))
    if not spec.image:
        raise ValueError('Give --image=IMAGE: Kubernetes runs images, such as launch/Dockerfile makes.')
    check_bucket(spec, 'jobset')
    if spec.node.family == 'tpu' and spec.num_nodes > 1 and spec.node.num_hosts == 1:
        # cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, "Availability".
        raise ValueError(
            f'--accelerator={spec.accelerator} --num_nodes={spec.num_nodes}: GKE joins slices of several hosts only; '
            f'take one larger slice.'
        )
    text = yaml.safe_dump(manifest(spec), sort_keys=False, width=2**31)
    return Submission({FILE: text}, [[*_kubectl(spec), 'apply', f'--filename={folder / FILE}']])


def manifest(spec: JobSpec) -> dict[str, Any]:
    tpu = spec.node.family == 'tpu'
    num_jobs, num_pods = (spec.num_nodes, spec.node.num_hosts) if tpu else (1, spec.num_nodes)
    metadata: dict[str, Any] = {'name': spec.name}
    if spec.queue:
        metadata['labels'] = {'kueue.x-k8s.io/queue-name': spec.queue}
    if tpu:  # One job to one node pool, which is one slice.
        metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'network': {'enableDNSHostnames': True, 'publishNotReadyAddresses': True},
            'failurePolicy': {
                'maxRestarts': spec.retries,  # Of all jobs together: no process goes on without the others.
                'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}],
            },
            'replicatedJobs': [
                {
                    'name': NODE,
                    'replicas': num_jobs,
                    'template': {
                        'spec': {
                            'parallelism': num_pods,
                            'completions': num_pods,
                            'completionMode': 'Indexed',
                            'backoffLimit': 0,  # A failed pod fails its job at once, and so restarts all.
                            'podFailurePolicy': {
                                'rules': [
                                    {
                                        'action': 'FailJob',
                                        'onExitCodes': {
                                            'containerName': 'train',
                                            'operator': 'In',
                                            'values': list(FINAL_EXIT_CODES),
                                        },
                                    }
                                ]
                            },
                            'template': {'spec': pod(spec)},
                        }
                    },
                }
            ],
        },
    }


def pod(spec: JobSpec) -> dict[str, Any]:
    node = spec.node
    command = shell.train_command(spec, 'python')
    container: dict[str, Any] = {
        'name': 'train',
        'image': spec.image,
        'workingDir': CODE_IN_IMAGE,
        'command': [literal(word) for word in command],
        'env': [{'name': name, 'value': literal(value)} for name, value in flags.environment(spec).items()],
    }
    fields: dict[str, Any] = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': GRACE_SECONDS}
    if node.family == 'tpu':
        chips = {'google.com/tpu': node.num_chips // node.num_hosts}
        selector = {
            'cloud.google.com/gke-tpu-accelerator': TPUS[node.kind].gke,
            'cloud.google.com/gke-tpu-topology': node.topology,
        }
        container['securityContext'] = {'privileged': True}  # Of the TPU's devices.
        if spec.num_nodes > 1:  # The full speed of the network between slices.
            fields |= {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
    else:
        chips = {'nvidia.com/gpu': node.num_chips}
        selector = {'cloud.google.com/gke-accelerator': GPUS[node.kind].gke}
        # NCCL talks between GPUs through /dev/shm, of which a container has 64 MB.
        container['volumeMounts'] = [{'name': 'shm', 'mountPath': '/dev/shm'}]
        fields['volumes'] = [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}]
        if spec.num_nodes > 1:
            # The name that JobSet gives the first pod, as <jobset>-<replicated job>-<job>-<pod>.<jobset>.
            first = f'{spec.name}-{NODE}-0-0.{spec.name}:{PORT}'
            container['command'] += shell.identity(first, str(spec.num_nodes), '$(JOB_COMPLETION_INDEX)')
    container['resources'] = {'limits': chips}
    if spec.spot:
        selector['cloud.google.com/gke-spot'] = 'true'
        fields['tolerations'] = [
            {'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true', 'effect': 'NoSchedule'}
        ]
    return {**fields, 'nodeSelector': selector, 'containers': [container]}


def literal(word: str) -> str:
    """Kubernetes reads $(NAME) in commands and variables, and makes one $ of two."""
    return word.replace('$', '$$')


def status(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [
        [*_kubectl(spec), 'get', 'jobset', spec.name],
        [*_kubectl(spec), 'get', 'pods', f'--selector={_label(spec)}', '--output=wide'],
    ]


def logs(spec: JobSpec, folder: pathlib.Path) -> dict[str, Command]:
    """Of the pods that are there: those of the last try; of each line, whose it is."""
    many = f'--max-log-requests={spec.num_processes}'
    return {'pods.log': [*_kubectl(spec), 'logs', f'--selector={_label(spec)}', '--prefix', '--tail=-1', many]}


def teardown(spec: JobSpec, folder: pathlib.Path) -> list[Command]:
    return [[*_kubectl(spec), 'delete', 'jobset', spec.name]]


def _label(spec: JobSpec) -> str:
    return f'jobset.sigs.k8s.io/jobset-name={spec.name}'


def _kubectl(spec: JobSpec) -> Command:
    return ['kubectl', *([f'--namespace={spec.namespace}'] if spec.namespace else []), *spec.options]
