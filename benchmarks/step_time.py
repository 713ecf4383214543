"""Times one jitted training step (masks, forward, backward, Adam) for shapes given on the command line; prints JSON.

    python benchmarks/step_time.py                                   # small shapes, for CPUs
    python benchmarks/step_time.py --width 1024 --layers 24 --fusion 2 --heads 16 --mlp 4096 --decoder-width 512 \
        --decoder-layers 4 --decoder-heads 8 --decoder-mlp 2048 --video 16 224 224 --audio 1000 128 --batch 64 \
        --dtype bfloat16

`xla_flops` is XLA's own count for the step with its layers written out one by one (a loop would be counted once).
`gemm` is the limit: matrix products of the same number of FLOPs, in the same process, at the same dtype.
`cpu_seconds` adds up all threads of this process, and hardly changes with what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import REMAT, Compute
from avmae_jax.models.decoders import DECODERS
from avmae_jax.models.encoders import ENCODERS
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.objectives import TERMS, Objective
from avmae_jax.ops.attention import IMPLEMENTATIONS
from avmae_jax.training.optimizer import adam
from avmae_jax.training.step import compile_on


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--width', type=int, default=192)
    add('--layers', type=int, default=12, help='of the encoder, joint ones included')
    add('--fusion', type=int, default=2, help='joint layers at the end, for --encoder mid')
    add('--heads', type=int, default=3)
    add('--mlp', type=int, default=768)
    add('--decoder-width', type=int, default=96)
    add('--decoder-layers', type=int, default=2)
    add('--decoder-heads', type=int, default=3)
    add('--decoder-mlp', type=int, default=384)
    add('--video', type=int, nargs='*', default=[8, 112, 112], metavar='N', help='FRAMES HEIGHT WIDTH; none: no video')
    add('--tubelet', type=int, nargs=3, default=[2, 16, 16], help='frames, height, width')
    add('--video-mask-ratio', type=float, default=0.9)
    add('--audio', type=int, nargs='*', default=[200, 128], metavar='N', help='BINS MEL; none: no audio')
    add('--audio-patch', type=int, nargs=2, default=[16, 16])
    add('--audio-mask-ratio', type=float, default=0.7)
    add('--batch', type=int, default=2)
    add('--encoder', choices=ENCODERS, default='mid')
    add('--decoder', choices=DECODERS, default='shared')
    add('--terms', nargs='+', choices=TERMS, default=['reconstruction'])
    add('--dtype', choices=('float32', 'bfloat16'), default='float32')
    add('--scan', action=argparse.BooleanOptionalAction, default=False, help='layers as one loop: for deep models')
    add('--donate', action=argparse.BooleanOptionalAction, help='reuse the memory of the old state; not so on CPU')
    add('--remat', choices=REMAT, default='none')
    add('--attention', choices=IMPLEMENTATIONS, default='auto')
    add('--steps', type=int, default=20, help='steps that are timed, after three that are not')
    arguments = parser.parse_args(argv)
    for name, sizes, wanted in (
        ('--video', arguments.video, ('FRAMES', 'HEIGHT', 'WIDTH')),
        ('--audio', arguments.audio, ('BINS', 'MEL')),
    ):
        if len(sizes) not in (0, len(wanted)):
            parser.error(f'{name} takes {" ".join(wanted)}, or nothing for none of it; got {sizes}.')
    if not arguments.video and not arguments.audio:
        parser.error('one of --video and --audio must be given sizes.')
    return arguments


def build(arguments: argparse.Namespace) -> tuple[MaskedAutoencoder, Objective, dict[str, jax.Array]]:
    """The model, the objective and a batch of random inputs."""
    args = arguments
    compute = Compute(dtype=args.dtype, scan=args.scan, remat=args.remat, attention=args.attention)
    extra = {'fusion_layer': args.layers - args.fusion} if args.encoder == 'mid' else {}
    encoder = ENCODERS[args.encoder](Size(args.width, args.heads, args.mlp, args.layers), compute, **extra)
    decoder_size = Size(args.decoder_width, args.decoder_heads, args.decoder_mlp, args.decoder_layers)
    tokenizers, ratios, inputs, random = {}, {}, {}, np.random.default_rng(0)
    if args.video:
        tokenizers['video'], ratios['video'] = VideoTokenizer(tuple(args.tubelet)), args.video_mask_ratio
        inputs['video'] = random.uniform(-1, 1, (args.batch, *args.video, 3))
    if args.audio:
        tokenizers['audio'], ratios['audio'] = AudioTokenizer(tuple(args.audio_patch)), args.audio_mask_ratio
        inputs['audio'] = random.normal(size=(args.batch, *args.audio))
    model = MaskedAutoencoder(tokenizers, encoder, DECODERS[args.decoder](decoder_size, compute))
    objective = Objective(ratios, {name: TERMS[name]() for name in args.terms})
    return model, objective, {m: jnp.asarray(x, jnp.float32) for m, x in inputs.items()}


def make_step(model: MaskedAutoencoder, objective: Objective, donate: bool = False) -> tuple[Callable, Callable]:
    """init(key, inputs) -> state and step(state, inputs) -> state, loss."""
    optimizer = adam(optax.constant_schedule(1e-3), beta1=0.9, beta2=0.95, weight_decay=0.0)

    def init(key: jax.Array, inputs: dict[str, jax.Array]) -> dict[str, Any]:
        batch_size = len(next(iter(inputs.values())))
        masks = objective.draw_masks(key, model.grids(inputs), batch_size)
        params = model.init(key, inputs, masks)['params']
        return {'params': params, 'optimizer': optimizer.init(params), 'step': jnp.zeros((), jnp.int32), 'rng': key}

    def step(state: dict[str, Any], inputs: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        rng = jax.random.fold_in(state['rng'], state['step'])

        def loss_of(params):
            return objective(model, params, None, inputs, None, rng)[0]

        loss, gradients = jax.value_and_grad(loss_of)(state['params'])
        updates, optimizer_state = optimizer.update(gradients, state['optimizer'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {**state, 'params': params, 'optimizer': optimizer_state, 'step': state['step'] + 1}, loss

    return jax.jit(init), jax.jit(step, donate_argnums=0 if donate else ())


def time_calls(call: Callable[[], Any], repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Wall and CPU seconds of one call: median and least of many."""
    wall, cpu = [], []
    for i in range(warm_up + repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        if i >= warm_up:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
    return {
        'seconds': float(np.median(wall)),
        'seconds_min': min(wall),
        'cpu_seconds': float(np.median(cpu)),
        'cpu_seconds_min': min(cpu),
    }


def time_gemm(flops: float, dtype: str, repeats: int) -> dict[str, float]:
    """The same number of FLOPs in square matrix products of at most 4,096 rows."""
    rows = 512
    while rows < 4096 and 2 * (2 * rows) ** 3 <= flops / 4:
        rows *= 2
    count = max(1, round(flops / (2 * rows**3)))
    a = jnp.full((rows, rows), 1 / rows, dtype)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.dot(y, a), x)

    exact = flops / (2 * rows**3 * count)
    timed = {name: value * exact for name, value in time_calls(lambda: products(a), repeats).items()}
    return {'rows': rows, 'flops_per_second': flops / timed['seconds'], **timed}


def peak_bytes(compiled: Any) -> int:
    """What the device held at most; where it does not tell, what the compiler planned."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in statistics:
        return int(statistics['peak_bytes_in_use'])
    memory = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def count_flops(arguments: argparse.Namespace) -> float:
    """XLA's count for the step with layers and attention written out and no rematerialisation, before it optimises."""
    written_out = {'scan': False, 'remat': 'none', 'attention': 'xla'}
    model, objective, inputs = build(argparse.Namespace(**{**vars(arguments), **written_out}))
    init, step = make_step(model, objective)
    lowered = step.lower(jax.eval_shape(init, jax.random.key(0), inputs), inputs)
    return float(lowered.cost_analysis()['flops'])


def main() -> None:
    args = parse_arguments()
    model, objective, inputs = build(args)
    # On CPU, updating in place costs a fifth of the step: kernels that may alias are not vectorised.
    donate = jax.default_backend() != 'cpu' if args.donate is None else args.donate
    init, step = make_step(model, objective, donate)
    shapes = jax.eval_shape(init, jax.random.key(0), inputs)
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled = compile_on(step.trace(shapes, inputs), jax.default_backend())
    compile_seconds, compile_cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    state = init(jax.random.key(0), inputs)
    losses = []

    def one_step():
        nonlocal state
        state, loss = compiled(state, inputs)
        losses.append(loss)
        return loss

    timed = time_calls(one_step, args.steps)
    flops = count_flops(args)
    result = {
        **timed,
        'xla_flops': flops,
        'peak_memory_bytes': peak_bytes(compiled),
        'process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        'compile_seconds': compile_seconds,
        'compile_cpu_seconds': compile_cpu_seconds,
        'gemm': time_gemm(flops, args.dtype, min(args.steps, 10)),
        'num_parameters': sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])),
        'loss_first_last': [float(losses[0]), float(losses[-1])],
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'donate': donate,
        'arguments': vars(args),
    }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
