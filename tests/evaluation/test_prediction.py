import numpy as np
import pytest

from avmae_jax.evaluation import metrics, prediction

RANDOM = np.random.default_rng(0)
NAMES = [f'class {i}' for i in range(7)]


def test_softmax_scores_are_shares_and_sigmoid_scores_are_each_their_own():
    logits = RANDOM.normal(size=(5, 7)).astype(np.float32)
    shared = prediction.top_classes('softmax', logits, NAMES, 7)
    for row, guesses in enumerate(shared):
        assert sum(guess.score for guess in guesses) == pytest.approx(1, abs=1e-12)
        assert [guess.number for guess in guesses] == np.argsort(-logits[row]).tolist()
        assert all(guess.name == NAMES[guess.number] for guess in guesses)
    for row, guesses in enumerate(prediction.top_classes('sigmoid', logits, NAMES, 3)):
        assert guesses == sorted(guesses, key=lambda guess: -guess.score) and len(guesses) == 3
        for guess, other in zip(guesses, shared[row], strict=False):
            assert guess.number == other.number
            assert guess.score == pytest.approx(1 / (1 + np.exp(-float(logits[row, guess.number]))), rel=1e-12)


def test_large_logits_overflow_nowhere_and_keep_their_order():
    logits = np.array([[1000.0, 2000.0, -3000.0]], np.float32)
    for kind in prediction.PROBABILITIES:
        (guesses,) = prediction.top_classes(kind, logits, NAMES[:3], 3)
        assert [guess.number for guess in guesses] == [1, 0, 2]
        assert guesses[0].score == 1 and guesses[2].score == 0


def test_equal_classes_come_in_their_order():
    logits = np.array([[1, 2, 1, 2, 1, 0, 2]], np.float32)
    (guesses,) = prediction.top_classes('softmax', logits, NAMES, 5)
    assert [guess.number for guess in guesses] == [1, 3, 6, 0, 2]


def test_actions_are_the_likeliest_of_all_pairs():
    # Whole numbers, so that many pairs are equal.
    verbs, nouns = (RANDOM.integers(0, 4, (6, n)).astype(np.float32) for n in (5, 7))
    actions = prediction.top_actions(verbs, nouns, list('abcde'), NAMES, 8)
    product = prediction.softmax(verbs)[:, :, None] * prediction.softmax(nouns)[:, None]
    for row, guesses in enumerate(actions):
        sums = verbs[row][:, None] + nouns[row]
        order = sorted(np.ndindex(5, 7), key=lambda pair: (-sums[pair], pair))[:8]
        assert [guess.number for guess in guesses] == order
        assert [guess.name for guess in guesses] == [f'{"abcde"[v]} {NAMES[o]}' for v, o in order]
        np.testing.assert_allclose([guess.score for guess in guesses], [product[row][pair] for pair in order])
        # As the benchmark counts them.
        verb, noun = guesses[0].number
        before, _ = metrics.action_ranks(verbs[[row]], nouns[[row]], np.array([verb]), np.array([noun]))
        assert before == 0


def test_verb_and_noun_make_actions_where_each_clip_has_one_of_each():
    logits = {'verb': RANDOM.normal(size=(2, 3)), 'noun': RANDOM.normal(size=(2, 4))}
    names = {'verb': NAMES[:3], 'noun': NAMES[:4]}
    found = prediction.predict({'verb': 'softmax', 'noun': 'softmax'}, logits, names, k=5)
    assert [list(row) for row in found] == [['verb', 'noun', 'action']] * 2
    assert [len(found[0][head]) for head in found[0]] == [3, 4, 5]
    assert 'action' not in prediction.predict({'verb': 'sigmoid', 'noun': 'softmax'}, logits, names)[0]
    assert list(prediction.predict({'verb': 'softmax'}, logits, names)[1]) == ['verb']


def test_a_file_has_a_block_and_every_class_a_line():
    logits = {'verb': np.array([[0.0, 1.0], [3.0, 0.0]]), 'noun': np.array([[0.0, 2.0], [2.0, 0.0]])}
    names = {'verb': ['cut', '--'], 'noun': ['bread', 'tap']}
    paths = ['a.mp4', 'b.wav']
    found = prediction.predict(dict.fromkeys(logits, 'softmax'), logits, names, k=2)
    first, second = prediction.prediction_table(paths, found).split('\n\n')
    assert first.splitlines()[0] == 'a.mp4' and second.splitlines()[0] == 'b.wav'
    lines = [line.split() for line in second.splitlines()[3:]]
    assert lines[:2] == [['verb', 'cut', '0.9526'], ['--', '0.0474']]
    assert lines[4][:3] == ['action', 'cut', 'bread'] and len(lines) == 6


def test_what_cannot_be_ranked_is_refused():
    logits = np.zeros((1, 7), np.float32)
    with pytest.raises(ValueError, match='scores 7 classes and there are 3 names'):
        prediction.top_classes('softmax', logits, NAMES[:3], 5)
    with pytest.raises(ValueError, match="one of .*'sigmoid'.* got 'argmax'"):
        prediction.top_classes('argmax', logits, NAMES, 5)
    with pytest.raises(ValueError, match='got k=0'):
        prediction.top_classes('softmax', logits, NAMES, 0)
    with pytest.raises(ValueError, match='no finite numbers'):
        prediction.top_classes('sigmoid', logits + np.nan, NAMES, 5)
