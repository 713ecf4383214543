"""No evaluation takes the place of another one, and each is found again by what was asked for."""

import concurrent.futures
import json
import time

from etils import epath

from avmae_jax.evaluation import results_file


def content(subject=None, config=None, **results):
    return {
        'subject': {'checkpoint': 'run/checkpoints/1', 'digest': 'd', **(subject or {})},
        'data': {'digest': 'e'},
        'config': {'video': {'crop': 8}, 'batch_size': 4, **(config or {})},
        'results': results,
    }


def row(value, **about):
    return {'head': 'label', 'features': 'video', 'method': 'knn', **about, 'value': value}


def test_every_question_has_a_name_of_its_own_and_is_found_by_it(tmp_path):
    questions = [
        {}, {'averaged': False}, {'num_clips': 4}, {'num_clips': 40}, {'train_split': 'a+b'}, {'data': 'f' * 64},
        {'changed': {'video.crop': 8}}, {'changed': {'video.crop': 9}}, {'averaged': False, 'num_clips': 4},
    ]  # fmt: skip
    (tmp_path / 'evaluation').mkdir()
    names = [f'{results_file.asked(**question)}.json' for question in questions]
    assert len(set(names)) == len(questions) and names[0] == '.json' and names[1] == '-noaveraged.json'
    steps = ('0000009', '0000200', '10000000')  # As text the last one comes in between.
    for name in names:
        for subject in (*(f'step-{step}' for step in steps), 'random-init-seed-3'):
            for split in ('test', 'a+b', 'test-2'):
                (tmp_path / 'evaluation' / f'{split}-{subject}{name}').touch()
    for question, name in zip(questions, names, strict=True):
        found = results_file.find(tmp_path, 'a+b', asked=results_file.asked(**question))
        assert [path.name for path in found] == [f'a+b-step-{step}{name}' for step in steps]
        found = results_file.find(tmp_path, 'test', subject='random-init-seed', asked=results_file.asked(**question))
        assert [path.name for path in found] == [f'test-random-init-seed-3{name}']
    assert results_file.find(tmp_path / 'nowhere', 'test') == []


def test_what_is_found_out_one_by_one_comes_together(tmp_path):
    path = epath.Path(tmp_path) / 'results.json'
    scores = [{'head': 'verb', 'subset': subset, 'metric': 'top-1', 'value': 0.5} for subset in ('all', 'tail')]
    results_file.write(path, content(retrieval=[], benchmark={'kind': 'k', 'scores': scores}))
    results_file.write(path, content(classification=[row(0.1), row(0.2, method='probe')]))
    # By another path, in other batches, of another layer, and once more.
    moved = content(
        {'checkpoint': '/there/1'}, {'batch_size': 8}, classification=[row(0.3), row(0.4, features='layer')]
    )
    results_file.write(path, moved)
    results_file.write(path, content(benchmark={'kind': 'k', 'scores': [{**scores[0], 'value': 0.6}]}))
    found = json.loads(path.read_text())['results']
    assert {(one['features'], one['method']): one['value'] for one in found['classification']} == {
        ('video', 'knn'): 0.3, ('video', 'probe'): 0.2, ('layer', 'knn'): 0.4,
    }  # fmt: skip
    assert found['retrieval'] == []
    assert [(score['subset'], score['value']) for score in found['benchmark']['scores']] == [
        ('all', 0.6),
        ('tail', 0.5),
    ]


def test_of_evaluations_that_end_at_once_none_loses_its_rows(tmp_path, monkeypatch):
    path, read, features = epath.Path(tmp_path) / 'results.json', results_file._read, ['video', 'audio', 'joint']

    def read_slowly(path):
        found = read(path)
        time.sleep(0.1)  # For another one to read the same meanwhile.
        return found

    results_file.write(path, content(classification=[row(0.0, features='layer')]))
    monkeypatch.setattr(results_file, '_read', read_slowly)
    with concurrent.futures.ThreadPoolExecutor(len(features)) as pool:
        list(pool.map(lambda one: results_file.write(path, content(classification=[row(0.1, features=one)])), features))
    found = json.loads(path.read_text())['results']['classification']
    assert {one['features'] for one in found} == {'layer', *features}
    assert list(tmp_path.iterdir()) == [tmp_path / 'results.json']


def test_of_another_subject_nothing_is_kept(tmp_path):
    path = epath.Path(tmp_path) / 'results.json'
    for other in ({'subject': {'digest': 'other'}}, {'config': {'video': {'crop': 9}}}):
        results_file.write(path, content(retrieval=[1]))
        results_file.write(path, content(**other, classification=[row(0.1)]))
        assert set(json.loads(path.read_text())['results']) == {'classification'}
