import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.evaluation import painting
from avmae_jax.objectives import Objective, Reconstruction, Target
from avmae_jax.ops.patches import patchify
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.structs import Batch, Outputs

BRIGHT = Preprocess(rgb_mean=(0.1, 0.2, 0.3), rgb_std=(0.2, 0.4, 0.1))


class Echo:
    """A model that answers with its input, whatever was hidden."""

    tokenizers = {'image': types.SimpleNamespace(patch=(4, 4))}

    def grids(self, inputs):
        return {'image': (2, 2)}

    def apply(self, variables, inputs, masks, places):
        values = patchify(inputs['image'], (4, 4))
        return Outputs({}, {'image': values}, {}, {'image': values}, {}, {'image': values})


def make_batch():
    rng = np.random.default_rng(0)
    return Batch(
        media={'image': rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)},
        present={'image': np.ones(3, bool)},
        labels={},
        record=np.array([4, 7, -1], np.int32),
        seed=np.zeros((3, 2), np.uint32),
        weight=np.array([1, 1, 0], np.float32),
        damaged=np.zeros(3, np.int32),
    )


def make_objective(standardise='none'):
    terms = {'reconstruction': Reconstruction(target={'image': Target(standardise=standardise)})}
    return Objective(mask_ratio={'image': 0.5}, terms=terms)


@pytest.mark.parametrize('preprocess', [Preprocess(), BRIGHT])
def test_pictures_show_pixels_whatever_the_model_saw(preprocess):
    objective, batch = make_objective(), make_batch()
    painted = jax.jit(painting.make_painter(Echo(), objective, preprocess, 3))({}, batch)
    media, records = painting.patched(painted, Echo(), objective)
    pixels = patchify(jnp.asarray(batch.media['image'], jnp.float32) / 127.5 - 1, (4, 4))[:2]
    np.testing.assert_allclose(media['image'].patches, pixels, atol=1e-5)
    np.testing.assert_allclose(media['image'].predicted, pixels, atol=1e-5)
    assert records.tolist() == [4, 7]  # Padding is not drawn.
    assert media['image'].inpainted is None  # Nobody taught it.


def test_standardised_predictions_are_left_to_the_drawing():
    objective, batch = make_objective('patch'), make_batch()
    painted = jax.jit(painting.make_painter(Echo(), objective, BRIGHT, 2))({}, batch)
    media, _ = painting.patched(painted, Echo(), objective)
    seen = BRIGHT(batch, train=False)['image'][:2]
    np.testing.assert_allclose(media['image'].predicted, patchify(seen, (4, 4)), atol=1e-5)
    assert media['image'].standardised == 'patch'
