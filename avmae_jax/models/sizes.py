"""How large models are, and what they are made of. Ti to g are the sizes of the ViT papers."""

from __future__ import annotations

import dataclasses

from avmae_jax.ops.dense import GELUS, NORM_EPSILON


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What blocks are made of, where published models differ; ours are those of Scenic and big_vision.

    Attributes:
      gelu: key of GELUS: 'tanh', or 'exact' as in models made with PyTorch.
      norm_epsilon: what LayerNorms add to the variance: 1e-12 in Hugging Face's ViTs, 1e-6 in timm's.
      qkv_bias: whether queries, keys and values have a bias. A model that has none for keys has one of zero here, which
        is the same to the last bit: what a bias on keys adds to a query's logits is alike for all keys.
    """

    gelu: str = 'tanh'
    norm_epsilon: float | int = NORM_EPSILON
    qkv_bias: bool = True

    def __post_init__(self):
        if self.gelu not in GELUS:
            raise ValueError(f'gelu must be one of {tuple(GELUS)}; got {self.gelu!r}.')
        if not self.norm_epsilon >= 0:
            raise ValueError(f'norm_epsilon must be 0 or more; got {self.norm_epsilon}.')


USUAL = Architecture()


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a stack of blocks is, and what it is made of.

    Attributes:
      width: channels of a token.
      num_heads: attention heads; each has width / num_heads channels.
      mlp_width: channels in the middle of each MLP.
      num_layers: blocks.
      architecture: of each block.
    """

    width: int
    num_heads: int
    mlp_width: int
    num_layers: int
    architecture: Architecture = USUAL

    def __post_init__(self):
        for name in ('width', 'num_heads', 'mlp_width', 'num_layers'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1; got {getattr(self, name)}.')
        if self.width % self.num_heads:
            raise ValueError(f'width must be a multiple of num_heads; got width={self.width}, {self.num_heads} heads.')


# Dosovitskiy et al. 2021 (B, L, H), Touvron et al. 2021 (Ti, S), Zhai et al. 2022 (g, without its patches of 14).
SIZES = {
    'Ti': Size(width=192, num_heads=3, mlp_width=768, num_layers=12),
    'S': Size(width=384, num_heads=6, mlp_width=1536, num_layers=12),
    'B': Size(width=768, num_heads=12, mlp_width=3072, num_layers=12),
    'L': Size(width=1024, num_heads=16, mlp_width=4096, num_layers=24),
    'H': Size(width=1280, num_heads=16, mlp_width=5120, num_layers=32),
    'g': Size(width=1408, num_heads=16, mlp_width=6144, num_layers=40),
}

# The decoder that goes with each encoder. B and L: AV-MAE's released configs. Ti and S: half and the same width as the
# encoder, ours. H: that of L. g: that of VideoMAE V2's ViT-g (Wang et al. 2023), the same again. `mae` is the decoder
# of the image MAE (He et al. 2022).
DECODER_SIZES = {
    'Ti': Size(width=96, num_heads=3, mlp_width=384, num_layers=2),
    'S': Size(width=192, num_heads=3, mlp_width=768, num_layers=4),
    'B': Size(width=384, num_heads=6, mlp_width=1536, num_layers=4),
    'L': Size(width=512, num_heads=8, mlp_width=2048, num_layers=4),
    'H': Size(width=512, num_heads=8, mlp_width=2048, num_layers=4),
    'g': Size(width=512, num_heads=8, mlp_width=2048, num_layers=4),
    'mae': Size(width=512, num_heads=16, mlp_width=2048, num_layers=8),
}
