"""Nothing in the folder of the reference is passed over in silence."""

import fnmatch
import json

# What the tests look at; a kind of case that none of these names needs a test of its own.
LOOKED_AT = (
    '*.md', '*.py', '*/index*.json', 'data/*', 'mbt/av_mae__*.*', 'mbt/mbt__*.*', 'mbt/*.npz', 'multimae/*__*.*',
    'multimae/*.npz',
    'optim/layerwise_lr_and_wd.json', 'optim/lr_schedules.*', 'single/vi*__*.*', 'single/*.npz',
    'steps/pretrain_adam_explicit_wd.*', 'steps/finetune_sgd_layerwise_mixup_mixmod.*',
    'steps/finetune_sgd_layerwise_mixup_shared.*', 'transfer/*__to__*.*', 'transfer/*.npz',
)  # fmt: skip


def test_every_file_of_the_reference_is_of_a_kind_that_is_tested(reference):
    files = [str(path.relative_to(reference)) for path in reference.rglob('*') if path.is_file()]
    assert not [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in LOOKED_AT)]


def test_every_listed_case_is_there(reference):
    for index in sorted(reference.glob('*/index*.json')):
        variant = index.stem.removeprefix('index').removeprefix('_')
        for entry in json.loads(index.read_text()):
            name = f'{variant}__{entry["case"]}' if variant else entry['case']
            assert entry.get('error') or (index.parent / f'{name}.json').exists(), f'{index}: {name}'
