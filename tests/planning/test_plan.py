"""What `python -m avmae_jax.plan` takes for data, and what it counts twice, how it searches.

Of FLOPs see tests/models/test_flops.py.
"""

import dataclasses
import json
import math

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from avmae_jax import experiment, plan, settings
from avmae_jax.planning import result
from avmae_jax.planning import topology as topology_lib

PRETRAIN, FINETUNE = 'configs/pretrain/audioset.py', 'configs/finetune/vggsound.py'


@pytest.fixture
def read(repository, monkeypatch):
    monkeypatch.chdir(repository)
    return settings.read_config


def describe(config, file, dataset=None, num_clips=None, num_classes=None):
    return plan.describe_data(config, file, dataset, num_clips, num_classes or {})


def test_the_dataset_is_the_one_that_the_config_is_named_after(read):
    source = describe(read(PRETRAIN), f'{PRETRAIN}:size=B')
    assert len(source) == 2_063_949 and source.sources[0].info.name == 'audioset'
    source = describe(read(FINETUNE), FINETUNE)
    assert len(source.labels['label'].names) == 309 and not source.labels['label'].multi
    assert len(describe(read(PRETRAIN), PRETRAIN, dataset='vggsound')) == 183_730


def test_clips_and_classes_that_no_catalogue_knows_are_asked_for(read):
    imagenet = 'configs/pretrain/imagenet.py'
    with pytest.raises(ValueError, match='--num_clips=N'):
        describe(read(imagenet), imagenet)
    source = describe(read(imagenet), imagenet, num_clips=1_281_167)
    assert len(source) == 1_281_167 and source.sources[0].info.modalities == ('image',)
    sounds = 'configs/finetune/kinetics_sounds.py'
    with pytest.raises(ValueError, match='--num_classes=label=N'):
        describe(read(sounds), sounds, num_clips=22_000)
    assert len(describe(read(sounds), sounds, num_clips=22_000, num_classes={'label': 32}).labels['label'].names) == 32
    with pytest.raises(ValueError, match="^--dataset='vgg' is none of audioset, vggsound"):
        describe(read(sounds), sounds, dataset='vgg')
    with pytest.raises(ValueError, match='--num_classes=label: give HEAD=COUNT'):
        plan.parse_classes(['label'])


def test_clips_that_are_only_described_cannot_be_read(read):
    with pytest.raises(IndexError, match='only described'):
        describe(read(PRETRAIN), PRETRAIN)[0]


def test_what_is_repeated_is_one_more_forward_pass_of_the_layers(read):
    config = read(f'{PRETRAIN}:size=Ti')
    parts = experiment.build(config, describe(config, PRETRAIN))
    once, again = (experiment.step_flops(config, parts, repeated=repeated) for repeated in (False, True))
    assert 1.25 * once < again < 4 / 3 * once


# -- The search --


@pytest.fixture
def planner(read, smallest):
    """(**changes) -> a planner of the smallest config for eight GPUs, in whose place the compiler of this CPU works."""
    chip, shape = topology_lib.parse('h200:1x8')

    def make(memory_bytes: float = chip.memory_bytes, **changes: object) -> plan.Planner:
        values = {**smallest, 'data.path': '', **changes}
        config = settings.override(read('configs/tiny.py:encoder=mid'), values)
        small = chip._replace(memory_bytes=memory_bytes)
        topology = topology_lib.Topology('h200:1x8', small, shape, 1, tuple(jax.devices()))
        return plan.Planner('tiny', config, describe(config, 'tiny', num_clips=1000), topology, None)

    return make


def test_a_layout_that_fails_does_not_end_the_search(planner, monkeypatch, tmp_path, capsys):
    tried = []

    def compile_some(config, *args):
        tried.append(config['parallel']['rules'])
        if len(tried) == 3:
            return jax.jit(lambda x: x + 1).lower(1.0).compile()
        if len(tried) == 2:
            raise TypeError('of no use')
        raise jax.errors.JaxRuntimeError('INTERNAL: of no use\nAt great length')

    monkeypatch.setattr(experiment, 'compile_step', compile_some)
    plans = planner().search(max_compiles=4)
    # What was compiled at last computes nothing but what was bound to be: nothing can be faster.
    assert [found.failure is None for found in plans] == [True, False, False] and len(set(tried)) > 1
    assert plans[0].layout.rules == tried[2] and plans[0].memory.fits
    told = capsys.readouterr().out.splitlines()
    assert [line.split(': ')[1:3] == ['does not compile', 'JaxRuntimeError'] for line in told] == [True, False, False]
    plan.write(plan.epath.Path(tmp_path), plans, searched=True)
    kept = json.loads((tmp_path / 'search.json').read_text())
    assert [each['layout'] for each in kept] == [dataclasses.asdict(found.layout) for found in plans]
    assert kept[0] == json.loads((tmp_path / 'plan.json').read_text())


def test_what_no_layout_can_hold_is_told_without_compiling(planner, monkeypatch):
    monkeypatch.setattr(experiment, 'compile_step', None)
    (found,) = planner(memory_bytes=1000.0).search(max_compiles=4)
    assert not found.memory.fits and found.compile_seconds is None
    assert 1000 < found.memory.peak < math.inf and 'take more chips or a smaller batch' in result.text(found)
    with pytest.raises(ValueError, match='No layout suits 8 chips with config.batch_size=9: .* such as 16'):
        planner(batch_size=9).search(max_compiles=4)
    with pytest.raises(ValueError, match="config.model.compute.attention='splash' is a kernel of tpu"):
        planner(**{'model.compute.attention': 'splash'}).search(max_compiles=4)
    with pytest.raises(ValueError, match="config.data.num_workers is 'many', where a number was due"):
        planner(**{'data.num_workers': 'many'}).search(max_compiles=4)


def test_an_interrupted_plan_ends_in_one_line(monkeypatch, capsys):
    def interrupt(overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, 'run', interrupt)
    assert plan.main(['plan'], {}) == plan.ExitCode.INTERRUPTED == 130
    assert capsys.readouterr().err == 'plan: interrupted; nothing was written.\n'


def test_a_place_that_cannot_be_written_and_a_price_that_is_none_are_told_before_compiling(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='^--output=.*file/plan cannot be made: '):
        plan.make_output(f'{tmp_path}/file/plan')
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver((plan._CONFIG, PRETRAIN), (plan._TOPOLOGY, 'v5e:4x4'), (plan._PRICE, math.nan)):
        with pytest.raises(ValueError, match='^--price=nan must be a finite number'):
            plan.run({})
