import jax
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.encoders import EarlyEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer

ENCODER = EarlyEncoder(Size(12, 2, 16, 1), Compute('float32', scan=False))
SOUND = {'audio': np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)}


@pytest.mark.parametrize('pooling, pooled_norm', [('mean', True), ('token', False)])
def test_it_gives_each_modality_a_score_for_each_class(pooling, pooled_norm):
    tokenizers = {'audio': AudioTokenizer((4, 2), class_token=pooling == 'token')}
    model = Classifier(tokenizers, ENCODER, num_classes=5, pooling=pooling, pooled_norm=pooled_norm)
    logits, variables = model.init_with_output(jax.random.key(0), SOUND)
    assert logits['audio'].shape == (2, 5)
    assert ('norm' in variables['params']) == pooled_norm


def test_pooling_a_token_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match='class_token=True'):
        Classifier({'audio': AudioTokenizer((4, 2))}, ENCODER, num_classes=5, pooling='token')
