"""Our masked autoencoder of video beside VideoMAE in PyTorch (`transformers`): the same training step, in one run.

    pip install -e '.[interop]'
    python benchmarks/beside_videomae.py --size Ti                                       # a CPU: float32
    python benchmarks/beside_videomae.py --size B --batch 64 --dtype bfloat16 --compile  # a GPU

Both take the same batch: 16 frames of 224 x 224, tubelets 2 x 16 x 16, 0.9 of them hidden at random, targets
standardised by tubelet and colour, Adam with decay; theirs has SDPA attention and a fused AdamW. Each side runs in
processes of its own, in turns; medians over the rounds are compared. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Encoder and decoder: width, heads, MLP, layers."""

    encoder: tuple[int, int, int, int]
    decoder: tuple[int, int, int, int]


# VideoMAE's own (Tong et al. 2022, appendix) but for Ti, which is ours.
SHAPES = {
    'Ti': Shape((192, 3, 768, 12), (96, 3, 384, 4)),
    'S': Shape((384, 6, 1536, 12), (192, 3, 768, 4)),
    'B': Shape((768, 12, 3072, 12), (384, 6, 1536, 4)),
    'L': Shape((1024, 16, 4096, 24), (512, 8, 2048, 4)),
}
TUBELET = (2, 16, 16)
MASK_RATIO = 0.9
PEAKS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12}  # bfloat16, NVIDIA.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--size', choices=SHAPES, default='Ti')
    add('--frames', type=int, default=16)
    add('--pixels', type=int, default=224, help='height and width')
    add('--batch', type=int, default=2)
    add('--dtype', choices=('float32', 'bfloat16'), default='float32')
    add('--compile', action='store_true', help='torch.compile for theirs')
    add('--scan', action='store_true', help='ours with its layers as one loop: compiles faster')
    add('--rounds', type=int, default=3, help='processes of each side')
    add('--steps', type=int, default=8, help='steps that are timed in each, after three that are not')
    add('--side', choices=('ours', 'theirs'), help='what a process of this script runs')
    return parser.parse_args()


def inputs(args: argparse.Namespace) -> np.ndarray:
    """Frames [b t h w 3] in [-1, 1], float32."""
    shape = (args.batch, args.frames, args.pixels, args.pixels, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def time_steps(step: Any, num_steps: int, warm_up: int = 3) -> dict[str, Any]:
    """`step` runs one and waits for it; gives the loss."""
    wall, cpu, losses = [], [], []
    for i in range(warm_up + num_steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        if i >= warm_up:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
    return {'seconds': wall, 'cpu_seconds': cpu, 'losses': losses}


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    from step_time import make_step

    from avmae_jax.models.autoencoder import MaskedAutoencoder
    from avmae_jax.models.blocks import Compute
    from avmae_jax.models.decoders import SharedDecoder
    from avmae_jax.models.encoders import SeparateEncoder
    from avmae_jax.models.flops import training_flops
    from avmae_jax.models.sizes import Size
    from avmae_jax.models.tokenizers import VideoTokenizer
    from avmae_jax.objectives import Objective, Reconstruction, Target
    from avmae_jax.training.step import compile_on

    compute = Compute(dtype=args.dtype, scan=args.scan)
    sizes = [Size(*numbers) for numbers in SHAPES[args.size]]
    model = MaskedAutoencoder(
        {'video': VideoTokenizer(TUBELET)}, SeparateEncoder(sizes[0], compute), SharedDecoder(sizes[1], compute)
    )
    term = Reconstruction(target={'video': Target('channel')})
    objective = Objective({'video': MASK_RATIO}, {'reconstruction': term})
    platform = jax.default_backend()
    init, step = make_step(model, objective, donate=platform != 'cpu')
    batch = {'video': jax.numpy.asarray(inputs(args))}
    state = init(jax.random.key(0), batch)
    began = time.perf_counter()
    compiled = compile_on(step.trace(state, batch), platform)
    compile_seconds = time.perf_counter() - began

    def one_step() -> float:
        nonlocal state
        state, loss = compiled(state, batch)
        return float(loss)

    shapes = {'video': batch['video'].shape}
    return {
        **time_steps(one_step, args.steps),
        'compile_seconds': compile_seconds,
        'clip_flops': training_flops(model, shapes, objective.mask_ratio),
        'device': jax.devices()[0].device_kind,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state['params'])),
    }


def run_theirs(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device('cuda' if gpu else 'cpu')
    encoder, decoder = SHAPES[args.size]
    names = ('hidden_size', 'num_attention_heads', 'intermediate_size', 'num_hidden_layers')
    fields = dict(zip(names, encoder, strict=True))
    fields |= {f'decoder_{name}': number for name, number in zip(names, decoder, strict=True)}
    config = VideoMAEConfig(image_size=args.pixels, num_frames=args.frames, attn_implementation='sdpa', **fields)
    model = VideoMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    video = torch.from_numpy(inputs(args)).permute(0, 1, 4, 2, 3).contiguous().to(device)
    num_tokens = args.frames // TUBELET[0] * (args.pixels // TUBELET[1]) * (args.pixels // TUBELET[2])
    num_hidden = int(num_tokens * MASK_RATIO)
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == 'bfloat16')

    def loss_of(video: Any, hidden: Any) -> Any:
        with half:
            return model(video, bool_masked_pos=hidden).loss

    loss_of = torch.compile(loss_of) if args.compile else loss_of

    def one_step() -> float:
        ranks = torch.rand(args.batch, num_tokens, device=device).argsort(dim=1)
        loss = loss_of(video, ranks < num_hidden)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return {**time_steps(one_step, args.steps), 'parameters': sum(p.numel() for p in model.parameters())}


def run_side(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], '--side', side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'beside_videomae: {side} ended with {done.returncode}: {done.stderr[-3000:]}')
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    args = parse_arguments()
    if args.side:
        print(json.dumps((run_ours if args.side == 'ours' else run_theirs)(args)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {'ours': [], 'theirs': []}
    for number in range(args.rounds):
        for side, found in rounds.items():
            print(f'round {number + 1} of {args.rounds}: {side}', file=sys.stderr, flush=True)
            found.append(run_side(args, side))
    first = rounds['ours'][0]
    flops, peak = first['clip_flops'] * args.batch, PEAKS.get(first['device'])
    print(
        f'{args.size}, batch {args.batch}, {args.dtype}, {first["device"]}; '
        f'{first["clip_flops"] / 1e9:.1f} GFLOP a clip in training'
    )
    print(f'\n| | parameters | ms a step | clips/s | CPU ms a step | MFU | loss, first and last |\n|{"---|" * 7}')
    medians = {}
    for side, found in rounds.items():
        wall = medians[side] = statistics.median(second for each in found for second in each['seconds'])
        cpu = statistics.median(second for each in found for second in each['cpu_seconds'])
        used = f'{100 * flops / wall / peak:.0f} %' if peak else f'{flops / wall / 1e9:.0f} GFLOP/s'
        losses = found[0]['losses']
        print(
            f'| {side} | {found[0]["parameters"] / 1e6:.1f} M | {wall * 1e3:.0f} | {args.batch / wall:.2f} | '
            f'{cpu * 1e3:.0f} | {used} | {losses[0]:.3f}, {losses[-1]:.3f} |'
        )
    per_round = [
        statistics.median(theirs['seconds']) / statistics.median(ours['seconds'])
        for ours, theirs in zip(rounds['ours'], rounds['theirs'], strict=True)
    ]
    ratios = ', '.join(f'{ratio:.2f}' for ratio in per_round)
    print(
        f'\nOurs does {medians["theirs"] / medians["ours"]:.2f} times the clips of theirs in a second '
        f'(by round: {ratios}).'
    )


if __name__ == '__main__':
    main()
