import jax.numpy as jnp
import numpy as np

from avmae_jax.ops import losses


def test_what_has_no_weight_does_not_count():
    values, weight = jnp.asarray([[1.0, 2.0], [3.0, 99.0]]), jnp.asarray([[1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(losses.masked_mean(values, weight), 2.0, rtol=1e-6)


def test_a_batch_in_which_nothing_counts_has_no_loss():
    assert losses.masked_mean(jnp.ones((2, 2)), jnp.zeros((2, 2))) == 0


def test_errors_are_added_up_in_float32_whatever_the_model_computes_in():
    error = losses.squared_error(jnp.ones((1, 1, 1000), jnp.bfloat16), jnp.zeros((1, 1, 1000)))
    assert error.dtype == jnp.float32 and error[0, 0] == 1000
