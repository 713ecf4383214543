"""The pre-norm transformer block and the stack of them, as a loop or scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from avmae_jax.models.sizes import Size
from avmae_jax.ops import attention
from avmae_jax.ops.dense import GELUS, NORM_EPSILON, dense, layer_norm
from avmae_jax.ops.dims import constrain
from avmae_jax.structs import Array

DENSE = 'dense'

# What the backward pass finds stored of a block: everything; the results of the matrix products with weights; its
# input alone.
REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.save_only_these_names(DENSE),
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it computes.

    Attributes:
      dtype: 'bfloat16' or 'float32', of activations. Parameters, norms' statistics and logits are float32 always.
      scan: the layers of a stack are one loop over stacked parameters: compiles in time independent of depth.
      remat: key of REMAT; trades memory for computing a part of the forward pass twice.
      attention: one of `ops.attention.IMPLEMENTATIONS`; 'auto' suits the devices and the length of the sequence.
    """

    dtype: str = 'bfloat16'
    scan: bool = True
    remat: str = 'none'
    attention: str = 'auto'

    def __post_init__(self):
        if self.dtype not in ('bfloat16', 'float32'):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32'; got {self.dtype!r}.")
        if self.remat not in REMAT:
            raise ValueError(f'remat must be one of {tuple(REMAT)}; got {self.remat!r}.')
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(f'attention must be one of {attention.IMPLEMENTATIONS}; got {self.attention!r}.')


class LayerNorm(nn.Module):
    """Layer normalisation with statistics in float32; `epsilon` is added to the variance."""

    dtype: str
    epsilon: float | int = NORM_EPSILON

    @nn.compact
    def __call__(self, x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.dtype, self.epsilon)


class Dense(nn.Module):
    """x @ kernel + bias. Fan-in and fan-out of the initialiser are those of the kernel as written here.

    Attributes:
      dims: what the channels of x and of the result are called, see `ops/dims.py`.
    """

    features: int
    dtype: str
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Any] = nn.initializers.zeros
    use_bias: bool = True
    dims: tuple[str, str] = ('width', 'width')

    @nn.compact
    def __call__(self, x: Float[Array, '*rows d']) -> Float[Array, '*rows e']:
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        bias = self.param('bias', self.bias_init, (self.features,)) if self.use_bias else None
        # The name is how a rematerialisation policy finds what took a matrix product to compute.
        y = dense(constrain(x, 'batch', self.dims[0]), kernel, bias, self.dtype)
        return checkpoint_name(constrain(y, 'batch', self.dims[1]), DENSE)


def qkv_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform for each of query, key and value by itself, although they share one kernel."""
    limit = (6.0 / (shape[0] + shape[1] // 3)) ** 0.5
    return jax.random.uniform(key, tuple(shape), dtype, -limit, limit)


class Attention(nn.Module):
    """Multi-head self-attention.

    One kernel [d, 3 d] makes queries, keys and values; its columns are ordered (head, query | key | value, channel), so
    that splitting them over devices splits the heads and keeps each whole.
    """

    num_heads: int
    compute: Compute
    segments: tuple[int, ...]
    carried: int | None = None
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, 'b n d']) -> Float[Array, 'b _ d']:
        batch, tokens, width = x.shape
        qkv = Dense(
            3 * width, self.compute.dtype, kernel_init=qkv_init, use_bias=self.bias, dims=('width', 'heads'), name='qkv'
        )(x)
        qkv = qkv.reshape(batch, tokens, self.num_heads, 3, width // self.num_heads)
        parts = jax.lax.split(qkv, self.segments, axis=1)
        outs = [attention.self_attention(part, self.compute.attention) for part in parts]
        out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
        out = last_tokens(out.reshape(batch, tokens, width), self.carried)
        return Dense(width, self.compute.dtype, dims=('heads', 'width'), name='out')(out)


def last_tokens(x: Float[Array, 'b n d'], count: int | None) -> Float[Array, 'b _ d']:
    """The last `count` tokens; all for None."""
    return x if count is None else x[:, x.shape[1] - count :]


class Mlp(nn.Module):
    """Two dense layers with a GELU between."""

    mlp_width: int
    dtype: str
    gelu: str = 'tanh'

    @nn.compact
    def __call__(self, x: Float[Array, 'b n d']) -> Float[Array, 'b n d']:
        tiny = nn.initializers.normal(stddev=1e-6)
        hidden = Dense(self.mlp_width, self.dtype, bias_init=tiny, dims=('width', 'mlp'), name='up')(x)
        hidden = GELUS[self.gelu](hidden)
        return Dense(x.shape[-1], self.dtype, bias_init=tiny, dims=('mlp', 'width'), name='down')(hidden)


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy and added back.

    Attributes:
      segments: lengths of the parts of the sequence that look only at themselves; together the whole sequence.
      collect: a scan collects the outputs of its layers.
      carried: how many tokens, the last ones, are carried on; the others are only looked at. None for all.
    """

    size: Size
    compute: Compute
    segments: tuple[int, ...]
    collect: bool = False
    carried: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'b n d'], scales: Float[Array, '2 b'] | None = None
    ) -> tuple[Float[Array, 'b _ d'], Array | None]:
        """`scales` is what each example's two residuals are multiplied by, see `residual_scales`."""
        dtype, size, made = self.compute.dtype, self.size, self.size.architecture
        y = LayerNorm(dtype, made.norm_epsilon, name='attention_norm')(x)
        attention = Attention(
            size.num_heads, self.compute, self.segments, self.carried, made.qkv_bias, name='attention'
        )
        x = last_tokens(x, self.carried) + scaled(attention(y), scales, 0)
        y = LayerNorm(dtype, made.norm_epsilon, name='mlp_norm')(x)
        x = x + scaled(Mlp(size.mlp_width, dtype, made.gelu, name='mlp')(y), scales, 1)
        return x, x if self.collect else None  # The shape of a scan's body: what is carried on, what is collected.


def scaled(y: Float[Array, 'b n d'], scales: Float[Array, '2 b'] | None, which: int) -> Float[Array, 'b n d']:
    return y if scales is None else y * scales[which, :, None, None].astype(y.dtype)


def drop_rates(drop_path: float, num_layers: int) -> tuple[float, ...]:
    """How often the residuals of each layer are dropped: never in the first, `drop_path` in the last."""
    return tuple(drop_path * i / max(num_layers - 1, 1) for i in range(num_layers))


def residual_scales(rng: jax.Array, rates: Sequence[float], *shape: int) -> Float[Array, 'layers *shape']:
    """0 for a residual that is dropped, 1 / (1 - rate) for one that stays: the mean of a residual is what it was."""
    kept = 1.0 - jnp.asarray(rates, jnp.float32).reshape(-1, *(1 for _ in shape))
    return jax.random.bernoulli(rng, kept, (len(rates), *shape)) / kept


def block_class(compute: Compute) -> Any:
    """Block, rematerialised as asked for."""
    if compute.remat == 'none':
        return Block
    # Inside a scan the loop already keeps the compiler from merging the two forward passes.
    return nn.remat(Block, policy=REMAT[compute.remat], prevent_cse=not compute.scan)


@functools.cache
def layer_function(size: Size, compute: Compute, segments: tuple[int, ...]) -> Callable[..., Any]:
    """A block as one function, so that it is traced and differentiated once and not layer by layer."""
    block = block_class(compute)(size, compute, segments, parent=None)
    return jax.jit(lambda params, x, scales: block.apply({'params': params}, x, scales)[0])


class Stack(nn.Module):
    """`size.num_layers` blocks and a final norm.

    What each layer gave is sown as `layer_0`, `layer_1`, ... into the collection 'intermediates', where somebody makes
    it mutable. Nothing else sees into a layer: when it runs, its code may long have been traced.

    Attributes:
      final_norm: whether the stack ends with a LayerNorm.
      final_norm_epsilon: of that norm; None for that of the blocks.
      drop_rates: in training, how often a residual of each layer is dropped, example by example; () for never.
    """

    size: Size
    compute: Compute
    final_norm: bool = True
    drop_rates: tuple[float, ...] = ()
    final_norm_epsilon: float | int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'b n d'], segments: tuple[int, ...] | None = None, train: bool = False
    ) -> Float[Array, 'b n d']:
        """Runs the blocks over a sequence whose `segments` (default: one, the whole) do not see each other.

        Dropping residuals in training draws from the rng 'drop_path'.
        """
        compute = self.compute
        x = x.astype(compute.dtype)
        fields: dict[str, Any] = {'size': self.size, 'compute': compute, 'segments': segments or (x.shape[1],)}
        names = [f'layer_{i}' for i in range(self.size.num_layers)]
        watched = self.is_mutable_collection('intermediates')
        scales = None
        if train and any(self.drop_rates):
            scales = residual_scales(self.make_rng('drop_path'), self.drop_rates, 2, x.shape[0])
        if compute.scan:
            scanned = nn.scan(
                block_class(compute), variable_axes={'params': 0}, split_rngs={'params': True}, length=len(names)
            )
            x, collected = scanned(**fields, collect=watched, name='layers')(x, scales)
            for i, name in enumerate(names if watched else []):
                self.sow('intermediates', name, collected[i])
        elif self.is_initializing():
            for name in names:
                x, _ = Block(**fields, name=name)(x, None)
        else:
            layer, params = layer_function(**fields), self.variables['params']
            for i, name in enumerate(names):
                x = layer(params[name], x, None if scales is None else scales[i])
                self.sow('intermediates', name, x)
        return final_norm(self.size, compute, self.final_norm_epsilon)(x) if self.final_norm else x


def final_norm(size: Size, compute: Compute, epsilon: float | int | None) -> LayerNorm:
    """The norm behind the last layer, for inside of a compact method."""
    return LayerNorm(compute.dtype, size.architecture.norm_epsilon if epsilon is None else epsilon, name='norm')


@functools.cache
def block_init(size: Size, compute: Compute) -> Callable[[jax.Array], Any]:
    """Parameters of a block from a key; one function, so that it is compiled once for all layers."""
    block = Block(size, compute, (1,), parent=None)
    return jax.jit(lambda key: block.init(key, jnp.zeros((1, 1, size.width), compute.dtype))['params'])


class Layers(nn.Module):
    """The parameters of the blocks of a stack, named as Stack names them, for a model that runs the blocks itself."""

    size: Size
    compute: Compute

    @nn.compact
    def blocks(self) -> Any:
        """One tree with the layers in front where they are to be scanned, otherwise a list of trees."""
        init, num_layers = block_init(self.size, self.compute), self.size.num_layers
        if self.compute.scan:
            return self.param('layers', lambda key: jax.vmap(init)(jax.random.split(key, num_layers)))
        return [self.param(f'layer_{i}', init) for i in range(num_layers)]


def stack_layers(params: Any) -> Any:
    """Parameters of a looped model (`layer_0`, `layer_1`, ...) in the layout of a scanned one (`layers`)."""
    if not isinstance(params, dict):
        return params
    names = [f'layer_{i}' for i in range(len(params)) if f'layer_{i}' in params]
    rest = {name: stack_layers(value) for name, value in params.items() if name not in names}
    if not names:
        return rest
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {**rest, 'layers': layers}


def unstack_layers(params: Any) -> Any:
    """Undoes `stack_layers`."""
    if not isinstance(params, dict):
        return params
    rest = {name: unstack_layers(value) for name, value in params.items() if name != 'layers'}
    if 'layers' not in params:
        return rest
    layers = params['layers']
    depth = len(jax.tree.leaves(layers)[0])
    return {**rest, **{f'layer_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth)}}
