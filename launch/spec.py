"""What is to run, and on what, in words of ours; each renderer says it in the words of its tool."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

# Exit codes of avmae_jax.train after which the same command would only fail again: a wrong setting, unreadable data, a
# loss that is not finite, no room for checkpoints. All others are worth another try: preempted (75), a stuck step (71),
# crashes, signals.
FINAL_EXIT_CODES = (2, 65, 70, 74)
GRACE_SECONDS = 120  # Between SIGTERM and SIGKILL: a step ends, and a checkpoint is written.
CODE_IN_IMAGE = '/opt/avmae_jax'  # Where launch/Dockerfile puts the checkout.
PORT = 8476  # Of process 0, where machines are the job's own and no other job can hold it.


class Tpu(NamedTuple):
    """Names of a TPU generation.

    Attributes:
      gcloud: what an accelerator type begins with; its number counts TensorCores up to v5p, chips on the others.
      cores: TensorCores that this number counts for each chip.
      num_dims: of a topology.
      gke: the node label cloud.google.com/gke-tpu-accelerator.
      runtime: the machine image of TPU VMs.
    """

    gcloud: str
    cores: int
    num_dims: int
    gke: str
    runtime: str


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for types and topologies, .../runtimes for images,
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus for labels.
TPUS = {
    'v4': Tpu('v4', 2, 3, 'tpu-v4-podslice', 'tpu-ubuntu2204-base'),
    'v5e': Tpu('v5litepod', 1, 2, 'tpu-v5-lite-podslice', 'v2-alpha-tpuv5-lite'),
    'v5p': Tpu('v5p', 2, 3, 'tpu-v5p-slice', 'v2-alpha-tpuv5'),
    'v6e': Tpu('v6e', 1, 2, 'tpu-v6e-slice', 'v2-alpha-tpuv6e'),
}


class Gpu(NamedTuple):
    """Attributes:
    gke: the node label cloud.google.com/gke-accelerator (cloud.google.com/kubernetes-engine/docs/concepts/gpus).
    sky: the name in `sky show-gpus`.
    """

    gke: str
    sky: str


GPUS = {
    'l4': Gpu('nvidia-l4', 'L4'),
    'a100': Gpu('nvidia-tesla-a100', 'A100'),
    'a100-80gb': Gpu('nvidia-a100-80gb', 'A100-80GB'),
    'h100': Gpu('nvidia-h100-80gb', 'H100'),
    'h100-mega': Gpu('nvidia-h100-mega-80gb', 'H100-MEGA'),
    'h200': Gpu('nvidia-h200-141gb', 'H200'),
    'b200': Gpu('nvidia-b200', 'B200'),
}
CPU = 'cpu'


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a node has: a TPU slice, the GPUs of a machine, or devices that a CPU pretends to have.

    Attributes:
      kind: a key of TPUS or GPUS, or 'cpu'.
      shape: the topology of a TPU slice; else the number of devices, alone.
    """

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Accelerator:
        """'v5e:4x4', 'h100:8', 'cpu:2'."""
        kind, _, shape = text.partition(':')
        if kind not in (*TPUS, *GPUS, CPU):
            raise ValueError(f'--accelerator={text}: {kind!r} is none of {", ".join((*TPUS, *GPUS, CPU))}.')
        num_dims = TPUS[kind].num_dims if kind in TPUS else 1
        if not re.fullmatch('x'.join([r'[1-9]\d*'] * num_dims), shape):
            example = {1: '8', 2: '4x4', 3: '2x2x4'}[num_dims]
            raise ValueError(
                f'--accelerator={text}: {kind} is followed by a colon and its size, as in {kind}:{example}.'
            )
        sizes = tuple(int(size) for size in shape.split('x'))
        if kind in TPUS and any(size > 2 and size % 4 for size in sizes):
            raise ValueError(f'--accelerator={text}: the sides of a slice are 1, 2 or multiples of 4.')
        return cls(kind, sizes)

    def __str__(self) -> str:
        return f'{self.kind}:{self.topology}'

    @property
    def family(self) -> str:
        return 'tpu' if self.kind in TPUS else 'gpu' if self.kind in GPUS else 'cpu'

    @property
    def topology(self) -> str:
        return 'x'.join(map(str, self.shape))

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        """Machines of one node: a TPU slice has several, of four chips each."""
        if self.family != 'tpu':
            return 1
        most = 8 if TPUS[self.kind].num_dims == 2 else 4  # v5e and v6e slices of up to 8 chips are one machine.
        return 1 if self.num_chips <= most else self.num_chips // 4


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """Attributes:
    config: FILE.py and its arguments after a colon, from the root of the checkout.
    workdir: of the run: seen by all hosts, and still there after they are gone.
    settings: --config.x=y, passed on unread.
    name: of the job, for all its later commands.
    accelerator: of one node: v5e:4x4, h100:8, cpu:2.
    num_nodes: TPU slices; machines with GPUs; local processes.
    image: with the code in it, as launch/Dockerfile makes it.
    source: the code itself: a checkout on a shared disk (slurm), a folder to copy (sky), URL@REF (queued_resources).
    python: interpreter of the checkout, from its root.
    retries: how often at most the job is started anew after a failure that another try may get over.
    environment: further variables; XLA_FLAGS and LIBTPU_INIT_ARGS are added behind those of launch/flags.py.
    project, zone: of Google Cloud.
    namespace: of Kubernetes.
    queue: a partition of SLURM, a local queue of Kueue.
    hours: after which SLURM may end the job.
    spot: machines that may be taken away, for less.
    options: further flags for the tool that submits, as they are.
    """

    config: str
    workdir: str
    settings: tuple[str, ...] = ()
    name: str = ''
    accelerator: str = 'cpu:1'
    num_nodes: int = 1
    image: str = ''
    source: str = ''
    python: str = ''
    retries: int = 3
    environment: tuple[tuple[str, str], ...] = ()
    project: str = ''
    zone: str = ''
    namespace: str = ''
    queue: str = ''
    hours: int = 0
    spot: bool = False
    options: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, 'name', make_name(self.workdir))
        check(self)

    @property
    def node(self) -> Accelerator:
        return Accelerator.parse(self.accelerator)

    @property
    def num_processes(self) -> int:
        """One for each machine; it drives all the chips there."""
        return self.num_nodes * self.node.num_hosts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        fields: dict[str, Any] = json.loads(text)
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        return cls(**fields)


def make_name(workdir: str) -> str:
    """The last part of a path, as a name that all tools take."""
    slug = re.sub('[^a-z0-9]+', '-', pathlib.PurePosixPath(workdir).name.lower()).strip('-')
    return re.sub('^(?![a-z])', 'job-', slug)[:30].rstrip('-')


def check(spec: JobSpec) -> None:
    """Raises ValueError for what is wrong wherever the job is to run."""
    if not spec.config.partition(':')[0].endswith('.py'):
        raise ValueError(f'{spec.config!r} is no config: give FILE.py, and its arguments after a colon.')
    if not spec.workdir:
        raise ValueError('WORKDIR is empty: give the folder of the run.')
    for setting in spec.settings:
        if not re.match(r'--config\.[^=]+=', setting):
            raise ValueError(f'What is {setting!r}? Settings are given as --config.name=value, in one word.')
    # A pod of a JobSet is called NAME-node-SLICE-HOST-xxxxx, and must fit into 63 letters.
    if not re.fullmatch('[a-z]([-a-z0-9]{0,28}[a-z0-9])?', spec.name):
        raise ValueError(f'--name={spec.name}: at most 30 of a-z, 0-9 and -, from a letter to a letter or digit.')
    for name, _ in spec.environment:
        if not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
            raise ValueError(f'--env={name}=...: {name!r} is no name of a variable; give NAME=VALUE.')
    if spec.num_nodes < 1:
        raise ValueError(f'--num_nodes={spec.num_nodes}: at least 1.')
    if spec.retries < 0:
        raise ValueError(f'--retries={spec.retries}: 0 or more.')
    if spec.hours < 0:
        raise ValueError(f'--hours={spec.hours}: 1 or more; 0 leaves it to the queue.')
    Accelerator.parse(spec.accelerator)


# Fields that mean something to some renderers only.
SPECIAL = ('image', 'source', 'python', 'project', 'zone', 'namespace', 'queue', 'hours', 'spot', 'options')


def check_fields(spec: JobSpec, how: str, takes: tuple[str, ...], families: tuple[str, ...]) -> None:
    """Raises ValueError for fields and accelerators that this renderer cannot express."""
    for field in SPECIAL:
        if getattr(spec, field) and field not in takes:
            flag = 'option' if field == 'options' else field
            raise ValueError(f'--{flag} means nothing to {how}: leave it out.')
    if spec.node.family not in families:
        kinds = [kind for kind in (*TPUS, *GPUS, CPU) if Accelerator(kind, (1,)).family in families]
        raise ValueError(f'--accelerator={spec.accelerator} cannot be had by {how}; it offers {", ".join(kinds)}.')


def check_code(spec: JobSpec, source: str) -> None:
    """Raises ValueError unless the job says where its code comes from.

    Args:
      source: what a source is here.
    """
    if bool(spec.image) == bool(spec.source):
        raise ValueError(f'Give either --image=IMAGE or --source={source}, not {"both" if spec.image else "neither"}.')
    if spec.image and spec.python:
        raise ValueError(f'--python={spec.python} means nothing to an image, which has its own: leave it out.')


def check_bucket(spec: JobSpec, how: str) -> None:
    """Raises ValueError for a workdir that would go with the machine."""
    if '://' not in spec.workdir:
        raise ValueError(
            f'WORKDIR={spec.workdir} would be lost with the machines of {how}: give a bucket, as in gs://...'
        )
