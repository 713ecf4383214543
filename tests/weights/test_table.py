import numpy as np
import pytest

from avmae_jax.weights.table import Row, apply_rows, flatten, join_columns, keep, reshape, unflatten

THEIRS = {
    'block_0/query': np.arange(6.0).reshape(1, 2, 3),
    'block_0/key': np.arange(6.0, 12.0).reshape(1, 2, 3),
    'block_1/query': np.ones((1, 2, 3)),
    'block_1/key': np.zeros((1, 2, 3)),
    'token': np.ones((1, 1, 4)),
    'norm': np.ones(3),
}
ROWS = [
    Row(('block_{layer}/query', 'block_{layer}/key'), ('layer_{layer}/qk',), join_columns((1, 2, 3), (1, -1))),
    Row(('token',), ('class',), reshape((1, 1, -1), (-1,))),
    Row(('norm',), ('scale',), keep()),
]
SHAPES = {'layer_0/qk': (1, 12), 'layer_1/qk': (1, 12), 'class': (4,), 'scale': (3,)}


def test_a_table_applied_backwards_undoes_itself():
    ours = apply_rows(ROWS, THEIRS, SHAPES)
    back = apply_rows([row.reverse() for row in ROWS], ours, {name: array.shape for name, array in THEIRS.items()})
    assert set(back) == set(THEIRS)
    assert all(np.array_equal(back[name], THEIRS[name]) for name in THEIRS)


def test_joined_columns_keep_each_head_whole():
    joined = apply_rows(ROWS, THEIRS, SHAPES)['layer_0/qk']
    assert joined.tolist() == [[0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]]  # Head 0 of query and key, then head 1.


@pytest.mark.parametrize(
    'change, message',
    [
        ({'extra': np.ones(1)}, 'no rule takes them: extra'),
        ({'norm': None}, 'nothing was given for them: scale'),
        ({'block_1/key': None}, 'incomplete'),
        ({'norm': np.ones(5)}, r'scale \(5,\) for \(3,\)'),
        ({'block_2/query': np.ones((1, 2, 3)), 'block_2/key': np.ones((1, 2, 3))}, 'no place for layer_2/qk'),
        ({'block_1/key': np.ones(5)}, r'cannot become .*layer_1/qk'),
        ({'block_1/key': np.ones((1, 3, 2))}, r'layer_1/qk.* of shape \(1, 3, 2\), where \(1, 2, 3\) was due'),
        ({'token': np.ones((2, 2, 1))}, r'class.* of shape \(2, 2, 1\), where \(1, 1, -1\) was due'),
    ],
)
def test_whatever_is_left_over_or_does_not_fit_is_named(change, message):
    source = {name: array for name, array in {**THEIRS, **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        apply_rows(ROWS, source, SHAPES)


def test_a_name_that_two_rows_take_is_an_error():
    with pytest.raises(ValueError, match='used twice'):
        apply_rows([*ROWS, Row(('norm',), ('bias',), keep())], THEIRS)


def test_unflatten_undoes_flatten():
    tree = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
    assert flatten(tree) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
    assert unflatten(flatten(tree)) == tree
