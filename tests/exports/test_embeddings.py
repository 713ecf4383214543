import csv
import shutil

import jax
import numpy as np
import pytest

import avmae_jax
from avmae_jax import export, pretrained, subjects
from avmae_jax.data import schema
from avmae_jax.evaluation import passes
from avmae_jax.evaluation.evaluator import Evaluator
from avmae_jax.exports import embeddings

parquet = pytest.importorskip('pyarrow.parquet', reason="needs pip install 'avmae_jax[export]'")


def test_a_list_of_clips_becomes_rows_with_the_features_that_evaluate_scores(
    run_export, pretrained_run, tiny_clips, tmp_path
):
    """The test clips of the prepared dataset, from their files: `prepare` and this read them alike."""
    rows = [row for row in csv.DictReader(tiny_clips.open()) if row['split'] == 'test']
    with (tmp_path / 'list.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['path', 'start', 'end'])
        writer.writeheader()
        for row in rows:
            writer.writerow({'path': tiny_clips.parent / row['path'], 'start': row.get('start'), 'end': row.get('end')})
    run_export(
        f'--checkpoint={pretrained_run}', f'--embeddings={tmp_path}/list.csv', f'--output={tmp_path}/out.parquet'
    )
    table = parquet.read_table(tmp_path / 'out.parquet')
    assert table.column_names == ['path', 'start', 'end', 'video', 'audio']
    assert table.schema.metadata[b'avmae_jax'] == repr(f'{pretrained_run.name}/checkpoints/7').encode()
    assert table['path'].to_pylist() == [str(tiny_clips.parent / row['path']) for row in rows]
    subject = subjects.load_subject(pretrained_run, overrides={})
    evaluator = Evaluator(subject, split='test')
    wanted = evaluator.collect(passes.make_feature_step(subject.model, subject.preprocess), 'test', what='features')
    ids = [evaluator.source[i].id for i in range(len(evaluator.source))]
    order = [ids.index(row['path'].rsplit('.', 1)[0]) for row in rows]
    for m in ('video', 'audio'):
        found = np.asarray(table[m].to_pylist(), np.float32)
        np.testing.assert_allclose(found, wanted['alone'][m][order], rtol=1e-4, atol=1e-5)
    assert schema.read_info(subject.config['data']['path']).media.short_side == 64


def test_what_cannot_be_read_is_listed_and_what_is_missing_is_empty(
    run_export, pretrained_run, tiny_clips, tmp_path, capsys
):
    export.export(tmp_path / 'model', avmae_jax.load_pretrained(pretrained_run).trained, 'safetensors', 'float32')
    folder = tmp_path / 'media'
    folder.mkdir()
    shutil.copy(next(tiny_clips.parent.rglob('*.mp4')), folder / 'a.mp4')
    (folder / 'b.mp4').write_bytes(b'no film')
    import wave

    with wave.open(str(folder / 'c.wav'), 'wb') as file:
        file.setparams((1, 2, 16_000, 0, 'NONE', ''))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 8000).astype('<i2').tobytes())
    assert [row.path.rsplit('/', 1)[1] for row in embeddings.read_rows(str(folder))] == ['a.mp4', 'b.mp4', 'c.wav']
    named = [*(f'media/{name},,' for name in ('a.mp4', 'b.mp4', 'c.wav')), 'gone.mp4,0,1', 'gone.mp4,1,2']
    (tmp_path / 'list.csv').write_text('\n'.join(['path,start,end', *named]))
    arguments = [f'--checkpoint={tmp_path}/model', f'--embeddings={tmp_path}/list.csv', '--num_clips=2']
    with pytest.raises(SystemExit) as caught:
        run_export(*arguments, f'--output={tmp_path}/out.parquet')
    assert caught.value.code == export.EXIT_DATA
    told = capsys.readouterr()
    assert 'b.mp4' in told.err and f'{tmp_path}/gone.mp4: not scored: the file that the list names' in told.err
    assert '3 of 5 clips cannot be read' in told.err and '2 of 5 clips' in told.out
    table = parquet.read_table(tmp_path / 'out.parquet')
    assert [path.rsplit('/', 1)[1] for path in table['path'].to_pylist()] == ['a.mp4', 'c.wav']
    assert [x is None for x in table['video'].to_pylist()] == [False, True]
    assert np.isfinite(table['audio'].to_pylist()).all()
    with pytest.raises(SystemExit):
        run_export(*arguments, f'--output={tmp_path}/out.parquet')
    assert 'is there already' in capsys.readouterr().err
    assert not list(tmp_path.glob('*.partial.*'))


def test_the_example_of_the_documentation_finds_the_clip_itself_first(tmp_path, monkeypatch, capsys, repository):
    import pyarrow

    text = (repository / 'docs' / 'export.md').read_text()
    code = text.split('<!-- neighbours -->')[1].split('```python\n')[1].split('```')[0]
    vectors = [np.random.default_rng(i).normal(size=6).astype(np.float32) for i in range(7)]
    table = {'path': [f'{i}.wav' for i in range(8)], 'audio': [*vectors[:3], None, *vectors[3:]]}
    parquet.write_table(pyarrow.table(table), tmp_path / 'features.parquet')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'docs/export.md', 'exec'), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '1.000  0.wav' and len(lines) == 5


@pytest.mark.parametrize(
    'subject, arguments, message',
    [
        ('run', ['--embeddings=media', '--format=torch'], '--format is for exports'),
        ('run', ['--embeddings=media', '--dtype=bfloat16'], '--dtype is for exports'),
        ('run', ['--embeddings=media', '--modality=audio'], '--modality is for exports'),
        ('export', ['--embeddings=media', '--noaveraged'], '--averaged chooses parameters of a run'),
        ('export', ['--embeddings=media', '--average_last=2'], '--average_last chooses parameters of a run'),
        ('run', ['--batch_size=3'], '--batch_size is for --embeddings alone'),
        ('run', ['--num_clips=3'], '--num_clips is for --embeddings alone'),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    subject, arguments, message, run_export, pretrained_run, tmp_path, capsys
):
    where = pretrained_run
    if subject == 'export':
        where = tmp_path / 'model'
        export.export(where, avmae_jax.load_pretrained(pretrained_run).trained, 'safetensors', 'float32')
    with pytest.raises(SystemExit) as caught:
        run_export(f'--checkpoint={where}', f'--output={tmp_path}/out', *arguments)
    assert caught.value.code == export.EXIT_SETTINGS
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'run, flag, chosen',
    [
        ('finetuned_run', '--noaveraged', {'averaged': False}),
        ('pretrained_run', '--average_last=2', {'average_last': 2}),
    ],
)
def test_features_are_of_the_parameters_that_are_chosen(run, flag, chosen, run_export, request, tmp_path, monkeypatch):
    embedded = []
    monkeypatch.setattr(embeddings, 'read_rows', lambda media: [])
    monkeypatch.setattr(embeddings, 'write_embeddings', lambda path, trained, *_, **__: embedded.append(trained) or [])
    folder = request.getfixturevalue(run)
    run_export(f'--checkpoint={folder}', '--embeddings=media', f'--output={tmp_path}/out.parquet', flag)
    wanted, usual = pretrained.read_run(folder, **chosen), pretrained.read_run(folder)
    same = [
        all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (embedded[0].params, x.params)), strict=True))
        for x in (wanted, usual)
    ]
    assert same == [True, False]
