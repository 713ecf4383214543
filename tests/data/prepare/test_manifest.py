import os
import pathlib
import shutil

import pytest

from avmae_jax.data.prepare import lists, manifest


def touch(folder, *names):
    for name in names:
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'x')


def write(folder, text, name='clips.csv'):
    path = pathlib.Path(folder) / name
    path.write_text(text)
    return str(path)


def rows_of(found, split='train'):
    return sorted(found.splits[split], key=lambda row: row.id)


# -- plain CSV --


def test_a_plain_list_gives_paths_spans_labels_and_splits(tmp_path):
    touch(tmp_path, 'a.mp4', 'sub/b.mp4', 'c.mp4')
    path = write(
        tmp_path,
        'path,start,end,label,split,notes\n'
        'a.mp4,1.5,00:00:03,dog,train,x\nsub/b.mp4,,,cat,train,\nc.mp4,0,2,dog,test,"a, b"\n',
    )
    found = manifest.read_manifest([path])
    a, b = rows_of(found)
    assert (a.id, a.start, a.end, a.labels) == ('a', 1.5, 3.0, {'label': (1,)})
    assert (b.id, b.start, b.end, b.labels) == ('sub/b', 0.0, None, {'label': (0,)})
    assert b.path == str(tmp_path / 'sub/b.mp4') and found.labels['label'].names == ('cat', 'dog')
    assert list(found.splits) == ['train', 'test'] and not found.labels['label'].multi


def test_several_labels_and_heads(tmp_path):
    touch(tmp_path, 'a.mp4', 'b.mp4')
    path = write(tmp_path, 'path,labels,label/verb\na.mp4,dog; cat,2\nb.mp4,,0\n')
    found = manifest.read_manifest([path])
    a, b = rows_of(found)
    assert a.labels == {'label': (0, 1), 'verb': (2,)} and b.labels == {'label': (), 'verb': (0,)}
    assert found.labels['label'].multi and found.labels['verb'].names == ('0', '1', '2')


@pytest.mark.parametrize(
    'text',
    [
        '\ufeffpath,label\r\n"a, b.mp4","x, y"\r\n',
        'path;label\n"a, b.mp4";x, y\n',
        'path\tlabel\na, b.mp4\tx, y\n',
        '\npath,label\r"a, b.mp4","x, y"\r',
    ],
    ids=['windows', 'semicolons', 'tabs', 'old mac'],
)
def test_what_spreadsheets_write_is_read(tmp_path, text):
    touch(tmp_path, 'a, b.mp4')
    (tmp_path / 'clips.csv').write_bytes(text.encode())
    found = manifest.read_manifest([str(tmp_path / 'clips.csv')])
    assert [row.path for row in found.splits['train']] == [str(tmp_path / 'a, b.mp4')]
    assert found.labels['label'].names == ('x, y',)


def test_what_is_no_list_is_told_for_what_it_is(tmp_path):
    touch(tmp_path, 'a.mp4')
    with pytest.raises(ValueError, match=r'a\.mp4 is a medium; give its folder'):
        manifest.read_manifest([str(tmp_path / 'a.mp4')])
    (tmp_path / 'clips.csv').write_bytes('path\na.mp4\n'.encode('utf-16'))
    with pytest.raises(ValueError, match='UTF-16 text; save it as CSV in UTF-8'):
        manifest.read_manifest([str(tmp_path / 'clips.csv')])
    os.mkfifo(tmp_path / 'pipe.csv')
    for format in ('auto', 'csv', 'vggsound'):
        with pytest.raises(ValueError, match=r'must be a list or a folder; .*pipe\.csv is no plain file'):
            manifest.read_manifest([str(tmp_path / 'pipe.csv')], format)
    with pytest.raises(ValueError, match='must be a list or a folder; .* is no plain file'):
        manifest.read_manifest([str(tmp_path)], 'epic')


@pytest.mark.parametrize('format, column', [('epic', 'stop_timestamp'), ('esc50', 'category')])
@pytest.mark.parametrize('text', ['', 'video_id,fold\na,1\n'])
def test_a_list_of_another_format_is_told_by_its_columns(tmp_path, format, column, text):
    with pytest.raises(ValueError, match=rf'clips\.csv: the header must have the columns .*{column} is not there'):
        manifest.read_manifest([write(tmp_path, text)], format)


def test_what_would_change_nothing_is_refused(tmp_path):
    touch(tmp_path, 'a.mp4')
    with pytest.raises(ValueError, match='media_dir=elsewhere is for lists'):
        manifest.read_manifest([str(tmp_path)], media_dir='elsewhere')
    with pytest.raises(ValueError, match=r"label_names names \['label'\], and the clips have no labels"):
        manifest.read_manifest([str(tmp_path)], label_names={'label': 'names.txt'})


def test_names_of_classes_are_kept_on_one_line(tmp_path):
    touch(tmp_path, 'a.mp4', 'b.mp4')
    found = manifest.read_manifest([write(tmp_path, 'path,label\na.mp4,"big\n dog"\nb.mp4,big  dog\n')])
    assert found.labels['label'].names == ('big dog',)
    with pytest.raises(ValueError, match='a head of labels is a word'):
        manifest.read_manifest([write(tmp_path, 'path,label/../x\na.mp4,1\n')])


@pytest.mark.parametrize('names', ['dog\ncat\nowl\n', 'index,mid,display_name\n2,/m/3,owl\n0,/m/1,dog\n1,/m/2,cat\n'])
@pytest.mark.parametrize('label', ['cat', '1', '/m/2'])
def test_class_names_come_from_a_file(tmp_path, names, label):
    if label.startswith('/m') and 'mid' not in names:
        pytest.skip('a plain list of names has no codes')
    touch(tmp_path, 'a.mp4')
    path = write(tmp_path, f'path,label\na.mp4,{label}\n')
    found = manifest.read_manifest([path], label_names={'label': write(tmp_path, names, 'names.csv')})
    assert found.labels['label'].names == ('dog', 'cat', 'owl') and rows_of(found)[0].labels == {'label': (1,)}


@pytest.mark.parametrize(
    'text, wanted',
    [
        ('', 'is empty'),
        ('name,start\n', 'must have a column "path"'),
        ('path,start\na.mp4,soon\n', r'clips.csv:2: start must be seconds'),
        ('path,start\na.mp4,nan\n', r'clips.csv:2: start must be a time'),
        ('path,start,end\na.mp4,5,2\n', r'clips.csv:2: end must lie behind start=5'),
        ('path,start,end\na.mp4,5\n', r'clips.csv:2: 2 columns, and the header has 3'),
        ('path,label\n\na.mp4,x\n,y\n', r'clips.csv:4: path is empty'),
        ('path,split\na.mp4,my split\n', r'clips.csv:2: a split is a word'),
        ('path,label\na.mp4,99999999\n', 'too large'),
        ('path,label\n', 'names no clip'),
        ('path,label,label\na.mp4,x,y\n', r"clips.csv:1: the header has 'label' twice"),
        ('path,label,labels\na.mp4,x,y\n', r"clips.csv:1: the header has both 'label' and 'labels'"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, wanted):
    touch(tmp_path, 'a.mp4')
    with pytest.raises(ValueError, match=wanted):
        manifest.read_manifest([write(tmp_path, text)])


def test_an_unknown_class_is_an_error_with_its_line(tmp_path):
    touch(tmp_path, 'a.mp4', 'b.mp4')
    path = write(tmp_path, 'path,label\na.mp4,dog\nb.mp4,dgo\n')
    with pytest.raises(ValueError, match=r"clips.csv:3: 'dgo' is none of the 2 classes"):
        manifest.read_manifest([path], label_names={'label': write(tmp_path, 'dog\ncat\n', 'names.txt')})


def test_a_missing_file_is_counted_and_none_found_is_an_error(tmp_path):
    touch(tmp_path, 'a.mp4')
    path = write(tmp_path, 'path\na.mp4\nb.mp4\nc.mp4\n')
    found = manifest.read_manifest([path])
    assert [(failure.path, failure.reason) for failure in found.missing] == [('b.mp4', 'missing'), ('c.mp4', 'missing')]
    with pytest.raises(ValueError, match='none of the 3 clips .* is media_dir right'):
        manifest.read_manifest([path], media_dir=str(tmp_path / 'elsewhere'))


def test_media_dir_is_where_paths_start(tmp_path):
    touch(tmp_path / 'media', 'a.mp4')
    found = manifest.read_manifest([write(tmp_path, 'path\na.mp4\n')], media_dir=str(tmp_path / 'media'))
    assert rows_of(found)[0].path == str(tmp_path / 'media/a.mp4')


def test_ids_are_unique_and_tell_the_span(tmp_path):
    touch(tmp_path, 'a.mp4', 'a.wav', 'b.mp4')
    text = 'path,start,end\na.mp4,0,1\na.mp4,1,2\na.mp4,1,2\na.wav,,\nb.mp4,,\n'
    found = manifest.read_manifest([write(tmp_path, text)])
    assert [row.id for row in rows_of(found)] == ['a.wav', 'a_0-1', 'a_1-2', 'a_1-2#2', 'b']


def test_the_order_of_records_does_not_depend_on_the_order_of_lines(tmp_path):
    names = [f'{i}.mp4' for i in range(30)]
    touch(tmp_path, *names)
    one = manifest.read_manifest([write(tmp_path, 'path\n' + '\n'.join(names) + '\n')])
    two = manifest.read_manifest([write(tmp_path, 'path\n' + '\n'.join(names[::-1]) + '\n')])
    assert one.splits == two.splits and one.digest() == two.digest()
    assert [row.id for row in one.splits['train']] != [name[:-4] for name in names]  # Mixed.
    other = manifest.read_manifest([write(tmp_path, 'path\n' + '\n'.join(names) + '\n')], seed=1)
    assert other.splits != one.splits


def test_clips_of_one_file_stay_on_one_side_of_a_drawn_split(tmp_path):
    names = [f'{i}.mp4' for i in range(200)]
    touch(tmp_path, *names)
    lines = [f'{name},{k},{k + 1}' for name in names for k in range(3)]
    found = manifest.read_manifest([write(tmp_path, 'path,start,end\n' + '\n'.join(lines))], eval_fraction=0.25)
    train, test = ({row.path for row in found.splits[split]} for split in ('train', 'test'))
    assert not train & test and 30 < len(test) < 70


def test_several_lists_and_a_split_by_name(tmp_path):
    touch(tmp_path, 'a.mp4', 'b.mp4')
    one, two = write(tmp_path, 'path\na.mp4\n'), write(tmp_path, 'path\nb.mp4\n', 'more.csv')
    found = manifest.read_manifest([one, f'val={two}'])
    assert {split: [row.id for row in rows] for split, rows in found.splits.items()} == {'train': ['a'], 'val': ['b']}


def test_a_name_of_strange_bytes_is_found(tmp_path):
    name = b'caf\xe9.mp4'
    with open(os.fsencode(tmp_path) + b'/' + name, 'wb') as file:
        file.write(b'x')
    (tmp_path / 'clips.csv').write_bytes(b'path\n' + name + b'\n')
    (row,) = manifest.read_manifest([str(tmp_path / 'clips.csv')]).splits['train']
    assert os.path.exists(row.path) and row.id == 'caf\\udce9'


# -- folders --


def test_a_folder_of_folders_has_labels_and_splits(tmp_path):
    touch(tmp_path, 'train/dog/a.wav', 'train/cat/b.wav', 'test/dog/c.wav', 'train/notes.txt', '.hidden/d.wav')
    found = manifest.read_manifest([str(tmp_path)])
    assert {split: len(rows) for split, rows in found.splits.items()} == {'train': 2, 'test': 1}
    assert found.labels['label'].names == ('cat', 'dog') and found.kinds == {'wav': 3}


def test_a_file_without_a_folder_means_no_labels(tmp_path):
    touch(tmp_path, 'dog/a.mp4', 'b.mp4')
    found = manifest.read_manifest([str(tmp_path)])
    assert not found.labels and len(found.splits['train']) == 2


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, 'dog/a.mp4')
    (tmp_path / 'dog/again').symlink_to(tmp_path)
    (tmp_path / 'dog/loop.mp4').symlink_to(tmp_path / 'dog/loop.mp4')
    assert len(manifest.read_manifest([str(tmp_path)]).splits['train']) == 2


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='holds no file'):
        manifest.read_manifest([str(tmp_path)])
    with pytest.raises(ValueError, match='does not exist'):
        manifest.read_manifest([str(tmp_path / 'nowhere')])


# -- published lists, as they are --


@pytest.fixture(scope='module')
def labels(shared_data):
    return shared_data / 'labels'


def test_audioset_is_read_with_files_named_by_any_downloader(labels, tmp_path):
    spans = {
        '--4gqARaEJE.mp4': (0.0, 10.0),
        '--BfvyPmVMo_20.000_30.000.wav': (0.0, 10.0),
        'Y--U7joUcTCo.flac': (0.0, 10.0),
        '-0RWZT-miFs_420000_430000.mkv': (0.0, 10.0),
        '-0CamVQdP_Y_0.wav': (0.0, 6.0),
        '-0BIyqJj9ZU.webm': (30.0, 40.0),
    }
    touch(tmp_path / 'deep', *spans)
    found = manifest.read_manifest([str(labels / 'audioset/eval_segments.csv')], media_dir=str(tmp_path))
    assert {os.path.basename(row.path): (row.start, row.end) for row in found.splits['test']} == spans
    assert len(found.missing) == 20_371 - len(spans) and all(row.labels['label'] for row in found.splits['test'])
    assert len(found.labels['label'].names) == 527 and found.labels['label'].multi


def test_the_original_audioset_list_has_comments_and_spaces(labels, tmp_path):
    touch(tmp_path, '--PJHxphWEs.mp4')
    shutil.copy(labels / 'audioset/class_labels_indices.csv', tmp_path)
    path = write(
        tmp_path,
        '# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=1, num_segs=1\n'
        '# YTID, start_seconds, end_seconds, positive_labels\n--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n',
        'balanced_train_segments.csv',
    )
    found = manifest.read_manifest([path])
    (row,) = found.splits['train']
    assert (row.id, row.start, row.end, row.trimmed) == ('--PJHxphWEs_30000', 30.0, 40.0, True)
    assert found.labels['label'].names[row.labels['label'][0]] == 'Speech' and len(row.labels['label']) == 2


def test_the_vggsound_test_list_is_read(labels, tmp_path):
    touch(tmp_path, 'glLQrEijrKg_000300.mp4', '6jiO0tPLK7U_90.mp4', 'LDoXsip0BEQ.mp4')
    found = manifest.read_manifest([str(labels / 'vggsound/test.csv')], media_dir=str(tmp_path))
    cut, seconds, whole = (
        next(row for row in found.splits['test'] if row.id.startswith(ytid))
        for ytid in ('glLQrEijrKg', '6jiO0tPLK7U', 'LDoXsip0BEQ')
    )
    assert cut.start == seconds.start == 0.0 and (whole.start, whole.end, whole.trimmed) == (177.0, 187.0, True)
    names = found.labels['label'].names
    assert len(names) == 309 and names[cut.labels['label'][0]] == 'playing hammond organ'
    assert len(found.missing) == 15_446 - 3


def test_the_official_vggsound_list_is_read(labels, tmp_path):
    touch(tmp_path, '---g-f_I2yQ_000001.mp4', '--0PQM4-hqg_000030.mp4')
    shutil.copy(labels / 'vggsound/class_labels_indices_vgg.csv', tmp_path)
    path = write(
        tmp_path,
        '---g-f_I2yQ,1,"bird chirping, tweeting",test\n--0PQM4-hqg,30,waterfall burbling,train\n',
        'vggsound.csv',
    )
    found = manifest.read_manifest([path])
    assert set(found.splits) == {'train', 'test'} and len(found.labels['label'].names) == 309
    assert found.labels['label'].names[found.splits['test'][0].labels['label'][0]] == 'bird chirping_ tweeting'


def test_epic_kitchens_has_two_heads_and_spans(labels, tmp_path):
    touch(tmp_path, 'P01/videos/P01_11.MP4')
    found = manifest.read_manifest([str(labels / 'epic100/EPIC_100_validation.csv')], media_dir=str(tmp_path))
    row = next(row for row in found.splits['validation'] if row.id == 'P01_11_1')
    assert (row.start, row.end) == pytest.approx((1.56, 2.45)) and row.labels == {'verb': (1,), 'noun': (2,)}
    assert len(found.labels['verb'].names) == 97 and len(found.labels['noun'].names) == 300
    assert found.labels['noun'].names[2] == 'plate'
    assert sum(len(rows) for rows in found.splits.values()) + len(found.missing) == 9_668


def test_esc_has_its_folds(shared_data):
    found = manifest.read_manifest([str(shared_data / 'esc10/esc10.csv')])
    assert {split: len(rows) for split, rows in found.splits.items()} == {f'fold{i}': 80 for i in range(1, 6)}
    assert all(row.id.startswith(f'{split[-1]}-') for split, rows in found.splits.items() for row in rows)
    assert len(found.labels['label'].names) == 10 and not found.missing


def test_a_fold_is_a_number(tmp_path):
    (tmp_path / 'esc50.csv').write_text('filename,fold,target,category\n1-0-A-0.wav,one,0,dog\n')
    with pytest.raises(ValueError, match=r"esc50\.csv:2: fold must be a number; got 'one'"):
        manifest.read_manifest([str(tmp_path / 'esc50.csv')])


@pytest.mark.parametrize('name, counts', [('avmnist', (2700, 300)), ('scenes', (72, 21))])
def test_the_real_clips_are_read_as_they_are(shared_data, name, counts):
    found = manifest.read_manifest([str(shared_data / name / f'{name}.csv')])
    assert (len(found.splits['train']), len(found.splits['test'])) == counts and not found.missing


@pytest.mark.parametrize(
    'list_, wanted',
    [
        ('audioset/eval_segments.csv', 'audioset'), ('vggsound/test.csv', 'vggsound'),
        ('epic100/EPIC_100_validation.csv', 'epic'), ('esc50/esc50_rebuilt.csv', 'esc50'),
    ],
)  # fmt: skip
def test_formats_are_told_from_their_first_line(labels, list_, wanted):
    assert lists.detect_format(str(labels / list_)) == wanted


def test_an_unknown_format_lists_the_known():
    with pytest.raises(ValueError, match='audioset'):
        manifest.read_manifest(['x'], format='xml')
