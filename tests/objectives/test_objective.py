import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.objectives import TERMS, Inpainting, Objective, Reconstruction
from avmae_jax.structs import Batch, Outputs

GRIDS = {'video': (2, 2, 2), 'audio': (3, 2)}
RATIO = {'video': 0.75, 'audio': 0.5}
INPUTS = {'video': np.zeros((2, 1), np.float32), 'audio': np.zeros((2, 1), np.float32)}


class Guesser:
    """Stands for a model: its parameters are what it predicts; patches hold ones in row 0, twos in row 1."""

    def grids(self, inputs):
        return {m: GRIDS[m] for m in inputs}

    def apply(self, variables, inputs, masks, places=None):
        predicted, hidden, inpainted, asked, patches = {}, {}, {}, {}, {}
        for m in inputs:
            num_tokens = int(np.prod(GRIDS[m]))
            patches[m] = jnp.broadcast_to(jnp.asarray([1.0, 2.0])[:, None, None], (2, num_tokens, 4))
            predicted[m] = jnp.broadcast_to(variables['params'][m], (2, num_tokens, 4))
            hidden[m] = predicted[m][:, : masks[m].hidden.shape[1]]
            inpainted[m] = predicted[m]
            asked[m] = jnp.broadcast_to((jnp.arange(num_tokens) >= 3)[None].astype(jnp.float32), (2, num_tokens))
        return Outputs({}, predicted, hidden, inpainted, asked, patches)


ZEROS = {'video': jnp.zeros(()), 'audio': jnp.zeros(())}


def batch(weight=(1, 1), video=(True, True), audio=(True, True)):
    present = {'video': np.asarray(video), 'audio': np.asarray(audio)}
    return Batch(
        {}, present, {}, np.arange(2), np.zeros((2, 2), np.uint32), np.asarray(weight, np.float32), np.zeros(2)
    )


def score(objective, rows=None, params=ZEROS):
    return objective(Guesser(), params, None, INPUTS, rows, jax.random.key(0))


@pytest.mark.parametrize('name', TERMS)
def test_the_loss_of_a_term_is_the_mean_over_rows_that_count(name):
    objective = Objective(RATIO, {name: TERMS[name]()})
    # Predicting zero costs 1 in the first row and 4 in the second.
    assert score(objective)[0] == pytest.approx(2.5)
    assert score(objective, batch(weight=(1, 0)))[0] == pytest.approx(1)
    assert score(objective, batch(weight=(0, 1)))[0] == pytest.approx(4)
    assert score(objective, batch(weight=(0, 0)))[0] == 0


def test_a_row_without_sound_counts_for_the_picture_alone():
    losses = score(Objective(RATIO, {'reconstruction': Reconstruction()}), batch(audio=(True, False)))[1].losses
    np.testing.assert_allclose(losses['reconstruction/audio'], 1)
    np.testing.assert_allclose(losses['reconstruction/video'], 2.5)


def test_painting_a_row_needs_both_of_its_modalities():
    losses = score(Objective(RATIO, {'inpainting': Inpainting()}), batch(audio=(True, False)))[1].losses
    np.testing.assert_allclose([losses['inpainting/audio'], losses['inpainting/video']], 1)


def test_terms_and_modalities_add_up_by_their_weights():
    terms = {'reconstruction': Reconstruction(weight={'video': 2.0, 'audio': 0.5}), 'inpainting': Inpainting()}
    loss, scored = score(Objective(RATIO, terms))
    losses = scored.losses
    wanted = 2 * losses['reconstruction/video'] + 0.5 * losses['reconstruction/audio']
    wanted += 0.5 * (losses['inpainting/video'] + losses['inpainting/audio'])
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_errors_are_summed_over_values_when_not_per_value():
    summed = Objective(RATIO, {'reconstruction': Reconstruction(per_value=False)})
    assert score(summed)[0] == pytest.approx(2.5 * 4)


def test_masks_of_a_modality_do_not_depend_on_the_others():
    draw = functools.partial(Objective(RATIO, {'inpainting': Inpainting()}).draw, jax.random.key(3), batch_size=2)
    both, alone = draw(GRIDS), draw({'audio': GRIDS['audio']})
    np.testing.assert_array_equal(both.masks['audio'].kept, alone.masks['audio'].kept)
    np.testing.assert_array_equal(both.places['audio'], alone.places['audio'])
    assert not np.array_equal(both.places['audio'][0], both.places['audio'][1])


def test_places_are_drawn_only_where_a_term_shuffles():
    for shuffle in (True, False):
        drawn = Objective(RATIO, {'inpainting': Inpainting(shuffle=shuffle)}).draw(jax.random.key(0), GRIDS, 2)
        assert set(drawn.places) == (set(GRIDS) if shuffle else set())


def test_masks_given_from_outside_are_used():
    objective = Objective(RATIO, {'reconstruction': Reconstruction()})
    masks = objective.draw_masks(jax.random.key(9), GRIDS, 2)
    _, scored = objective(Guesser(), ZEROS, None, INPUTS, None, jax.random.key(0), masks)
    np.testing.assert_array_equal(scored.drawn.masks['video'].hidden, masks['video'].hidden)


def test_painting_with_too_many_tokens_says_what_to_change():
    term, (_, scored) = Inpainting(), score(Objective(RATIO, {'reconstruction': Reconstruction()}))
    outputs = scored.outputs._replace(inpainted={'video': scored.outputs.inpainted['video']})
    with pytest.raises(ValueError, match=r'raise mask_ratio\.video'):
        term(outputs, scored.drawn.masks, {m: jnp.ones(2) for m in GRIDS})


def test_settings_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="masking of audio must be one of .*'time'"):
        Objective(RATIO, {'reconstruction': Reconstruction()}, masking={'audio': 'tube'})
    with pytest.raises(ValueError, match='no mask_ratio'):
        Objective({'video': 0.9}, {'reconstruction': Reconstruction()}, masking={'audio': 'time'})
    with pytest.raises(ValueError, match='at least one term'):
        Objective(RATIO, {})


def test_every_term_has_the_fields_the_others_have():
    names = [{field.name for field in dataclasses.fields(term)} for term in TERMS.values()]
    assert all({'weight', 'target', 'on_all_tokens', 'per_value'} <= fields for fields in names)
