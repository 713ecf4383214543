"""An audio-visual model in PyTorch: one file that needs torch, safetensors, and the folder it was exported with.

    from avmae_torch import AVMAE

    model = AVMAE.from_pretrained('DIR')
    features = model.embed(video=frames, audio=waveform)        # modality -> [b d]
    logits = model.classify(video=frames, audio=waveform)       # head -> [b classes]

    model = AVMAE.from_pretrained('DIR', num_classes={'label': 10})     # with a fresh head, to be finetuned
    model.train()
    loss = torch.nn.functional.cross_entropy(model.classify(video=frames)['label'], labels)

Any subset of the modalities may be given: video uint8 [b t h w 3] and image uint8 [b h w 3], RGB; audio float [b l] in
[-1, 1]. `model.settings['row_shapes']` tells the shapes that the model was trained on and preprocessing.json how to get
there; a model with fixed positions takes others too. A model trained on stored log-mels takes those, float [b s f].

Tokens run over time, height, width (video), time, frequency (audio), height, width (image), the last one fastest; so do
the values inside a patch, colours last.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODALITIES = ('image', 'video', 'audio')  # The order in which they are concatenated.
JOINT = 'joint'  # A part that is of all modalities.


# -- From media to what the model is given --


class LogMel(nn.Module):
    """Waveforms [b l] in [-1, 1] -> log-mel spectrograms [b s f], natural logarithm of power; no parameters.

    Args:
      settings: 'log_mel' of preprocessing.json.
      num_frames: cut, or filled up with `pad_value`, to this many frames.
    """

    def __init__(self, settings: dict, num_frames: int | None):
        super().__init__()
        self.settings, self.num_frames = settings, num_frames
        self.window = round(settings['window_seconds'] * settings['sample_rate'])
        self.hop = round(settings['hop_seconds'] * settings['sample_rate'])
        make = {'hamming': torch.hamming_window, 'hann': torch.hann_window}[settings['window']]
        self.register_buffer('taper', make(self.window, periodic=False, dtype=torch.float64).float(), persistent=False)
        self.register_buffer('filters', self._filters(), persistent=False)

    def _filters(self) -> Tensor:
        """[points f]: triangles of height 1, evenly spaced on the mel scale; the last point lies in none."""
        s = self.settings
        mel = lambda hz: 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700.0)  # noqa: E731
        low, high = float(mel(s['min_hz'])), float(mel(s['max_hz']))
        edges = low + (high - low) * torch.arange(s['num_mel_bins'] + 2, dtype=torch.float64) / (s['num_mel_bins'] + 1)
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        points = torch.arange(s['fft_length'] // 2, dtype=torch.float64) * s['sample_rate'] / s['fft_length']
        point = mel(points)[:, None]
        rising, falling = (point - left) / (centre - left), (right - point) / (right - centre)
        return torch.minimum(rising, falling).clamp(min=0).float()

    def forward(self, waveform: Tensor) -> Tensor:
        s = self.settings
        if waveform.shape[1] < self.window:
            raise ValueError(f'audio of {waveform.shape[1]} samples is shorter than one window of {self.window}.')
        if s['centred']:  # Frame i lies around the middle of hop i.
            before, after = (self.window - self.hop) // 2, self.window - self.hop - (self.window - self.hop) // 2
            waveform = F.pad(waveform[:, None], (before, after), mode='reflect')[:, 0]
        frames = waveform.unfold(1, self.window, self.hop)
        if s['remove_dc']:
            frames = frames - frames.mean(dim=-1, keepdim=True)
        if s['pre_emphasis']:
            frames = frames - s['pre_emphasis'] * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(frames * self.taper, n=s['fft_length'])[..., :-1]
        power = spectrum.real**2 + spectrum.imag**2
        log_mel = torch.log((power @ self.filters).clamp(min=s['floor']))
        if self.num_frames is None:
            return log_mel
        missing = self.num_frames - log_mel.shape[1]
        return F.pad(log_mel[:, : self.num_frames], (0, 0, 0, max(0, missing)), value=s['pad_value'])


class Preprocess(nn.Module):
    """Frames and sound as the model is given them: standardised, float32; `settings` is preprocessing.json."""

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings
        sound = settings.get('audio', {})
        self.log_mel = LogMel(sound['log_mel'], sound['num_spec_frames']) if 'log_mel' in sound else None

    def forward(self, modality: str, media: Tensor) -> Tensor:
        s = self.settings[modality]
        if modality == 'audio':
            if media.ndim != (3 if self.log_mel is None else 2) or not media.is_floating_point():
                wanted = 'log-mels [b s f]' if self.log_mel is None else '[b l] in [-1, 1]'
                raise ValueError(f'audio is float {wanted}; got {media.dtype} {list(media.shape)}.')
            log_mel = media.float() if self.log_mel is None else self.log_mel(media.float())
            return (log_mel - s['mean']) / s['std']
        if media.dtype != torch.uint8 or media.ndim != {'video': 5, 'image': 4}[modality] or media.shape[-1] != 3:
            raise ValueError(f'{modality} is uint8 with colours last; got {media.dtype} {list(media.shape)}.')
        mean, std = (torch.tensor(s[name], device=media.device) for name in ('rgb_mean', 'rgb_std'))
        return (media.float() / 255 - mean) / std


# -- Tokens --


def patchify(x: Tensor, patch: list[int], stride: list[int] | None) -> tuple[Tensor, tuple[int, ...]]:
    """[b *dims c] -> values of every patch [b n v], and patches along each axis; the rest of an axis is not used."""
    axes = len(patch)
    for i in range(axes):
        x = x.unfold(1 + i, patch[i], (stride or patch)[i])  # The values of the patch come last.
    grid = tuple(x.shape[1 : 1 + axes])
    x = x.movedim(1 + axes, -1)  # Colours behind the values of the patch.
    return x.reshape(x.shape[0], math.prod(grid), -1), grid


def sincos_1d(count: int, width: int) -> Tensor:
    """[n d] along the flattened sequence: even channels sines, odd ones cosines."""
    frequency = torch.exp(-torch.arange(0, width, 2, dtype=torch.float64) * (math.log(1e4) / width))
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(count, width).float()


def sincos_grid(grid: tuple[int, ...], width: int) -> Tensor:
    """[n d] each axis in its own share of the channels, in the order (t,) x, y; sines first."""
    share = width // (2 * len(grid))
    frequency = 1e4 ** (-torch.arange(share, dtype=torch.float64) / (width / (2 * len(grid))))
    *leading, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing='ij')
    angles = [place.reshape(-1, 1) * frequency for place in (*leading, x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class Positions(nn.Module):
    """Where tokens are: a table [in_front + n, d], learned or computed."""

    def __init__(self, kind: str, grid: tuple[int, ...], width: int, in_front: int):
        super().__init__()
        self.kind, self.grid, self.width, self.in_front = kind, grid, width, in_front
        if kind == 'learned':
            self.table = nn.Parameter(torch.zeros(in_front + math.prod(grid), width))
        elif kind == 'learned_space_time':
            self.time = nn.Parameter(torch.zeros(grid[0], width))
            self.space = nn.Parameter(torch.zeros(math.prod(grid[1:]), width))

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        if self.kind == 'sincos_1d':
            return sincos_1d(self.in_front + math.prod(grid), self.width)
        if self.kind in ('sincos_2d', 'sincos_3d'):
            return sincos_grid(grid, self.width)
        if tuple(grid) != tuple(self.grid):
            raise ValueError(f'positions were learned for {self.grid} patches along each axis; got {grid}.')
        if self.kind == 'learned':
            return self.table
        return (self.time[:, None] + self.space[None]).reshape(-1, self.width)


class Tokenizer(nn.Module):
    """Media of one modality, standardised -> tokens [b n d], class tokens in front."""

    def __init__(self, settings: dict, width: int):
        super().__init__()
        self.settings = settings
        self.num_in_front = settings['class_token'] + settings['distillation_token']
        self.embedding = nn.Linear(math.prod(settings['patch']) * settings['channels'], width)
        in_front = self.num_in_front if settings['class_position'] else 0
        self.positions = Positions(settings['positions'], tuple(settings['grid']), width, in_front)
        for name in ('modality_token', 'class_token', 'distillation_token'):
            if settings[name]:
                setattr(self, name, nn.Parameter(torch.zeros(width)))

    def forward(self, x: Tensor) -> Tensor:
        s = self.settings
        if x.ndim == 1 + len(s['patch']):  # Spectrograms have one value a bin, and maybe a stem for three.
            x = x[..., None].expand(*x.shape, s['channels'])
        values, grid = patchify(x, s['patch'], s['stride'])
        table = self.positions(grid).to(values)
        first, table = table[: self.positions.in_front], table[self.positions.in_front :]
        tokens = self.embedding(values) + table
        if s['modality_token']:
            tokens = tokens + self.modality_token
        front = []
        for i, name in enumerate(('class_token', 'distillation_token')[: self.num_in_front]):
            token = getattr(self, name)
            if s['class_position']:
                token = token + first[i] + (self.modality_token if s['modality_token'] else 0)
            front.append(token.expand(len(tokens), 1, -1))
        return torch.cat([*front, tokens], dim=1)


# -- Transformer --


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are all queries, all keys, all values, head by head."""

    def __init__(self, width: int, num_heads: int, bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int, gelu: str):
        super().__init__()
        self.up, self.down = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.approximate = {'tanh': 'tanh', 'exact': 'none'}[gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy and added back.

    Args:
      drop_path: in training, how often a residual is dropped, example by example.
    """

    def __init__(self, size: dict, drop_path: float):
        super().__init__()
        width, epsilon = size['width'], size['norm_epsilon']
        self.attention_norm = nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, size['num_heads'], size['qkv_bias'])
        self.mlp_norm = nn.LayerNorm(width, eps=epsilon)
        self.mlp = Mlp(width, size['mlp_width'], size['gelu'])
        self.drop_path = drop_path

    def forward(self, x: Tensor, carried: int | None = None, norms: LayerNorms | None = None) -> Tensor:
        """All tokens look at all; the last `carried` of them go on (None: all). `norms` take the place of its own."""
        own = self if norms is None else norms
        y = self.attention(own.attention_norm(x))
        x, y = (x, y) if carried is None else (x[:, -carried:], y[:, -carried:])
        x = x + self._dropped(y)
        return x + self._dropped(self.mlp(own.mlp_norm(x)))

    def _dropped(self, y: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return y
        kept = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * kept / (1 - self.drop_path)


class LayerNorms(nn.Module):
    """The norms of a Block, for a modality that has its own."""

    def __init__(self, size: dict):
        super().__init__()
        self.attention_norm = nn.LayerNorm(size['width'], eps=size['norm_epsilon'])
        self.mlp_norm = nn.LayerNorm(size['width'], eps=size['norm_epsilon'])


class Norms(nn.Module):
    """The norms of a Stack, likewise."""

    def __init__(self, settings: dict, num_layers: int):
        super().__init__()
        size = settings['size']
        self.layers = nn.ModuleList(LayerNorms(size) for _ in range(num_layers))
        has_norm, epsilon = settings['final_norm'], settings['final_norm_epsilon']
        self.norm = nn.LayerNorm(size['width'], eps=epsilon) if has_norm else None


class Stack(nn.Module):
    """Layers `start` to `stop`, and a final norm if there is one."""

    def __init__(self, settings: dict, start: int = 0, stop: int | None = None, final_norm: bool | None = None):
        super().__init__()
        size, last = settings['size'], max(settings['size']['num_layers'] - 1, 1)
        numbers = range(size['num_layers'])[start:stop]
        self.layers = nn.ModuleList(Block(size, settings['drop_path'] * i / last) for i in numbers)
        has_norm = settings['final_norm'] if final_norm is None else final_norm
        self.norm = nn.LayerNorm(size['width'], eps=settings['final_norm_epsilon']) if has_norm else None

    def forward(self, x: Tensor, norms: Norms | None = None) -> Tensor:
        """`norms` take the place of its own."""
        own = self if norms is None else norms
        for layer, layer_norms in zip(self.layers, own.layers, strict=True):
            x = layer(x, norms=layer_norms)
        return x if own.norm is None else own.norm(x)


Tokens = dict[str, Tensor]  # By modality, in the order of MODALITIES.


def join(tokens: Tokens) -> Tensor:
    return torch.cat(list(tokens.values()), dim=1)


def split(sequence: Tensor, tokens: Tokens) -> Tokens:
    """Undoes `join`; `tokens` is what was joined."""
    parts = sequence.split([x.shape[1] for x in tokens.values()], dim=1)
    return dict(zip(tokens, parts, strict=True))


class SeparateEncoder(nn.Module):
    """A stack for each modality; they never meet."""

    def __init__(self, settings: dict, modalities: list[str]):
        super().__init__()
        self.stacks = nn.ModuleDict({m: Stack(settings) for m in modalities})

    def forward(self, tokens: Tokens) -> Tokens:
        return {m: self.stacks[m](x) for m, x in tokens.items()}


class SharedEncoder(nn.Module):
    """One stack for all, applied to each modality by itself."""

    def __init__(self, settings: dict, modalities: list[str]):
        super().__init__()
        self.stacks = nn.ModuleDict({'shared': Stack(settings)})

    def forward(self, tokens: Tokens) -> Tokens:
        return {m: self.stacks['shared'](x) for m, x in tokens.items()}


class EarlyEncoder(nn.Module):
    """One stack over the tokens of all modalities."""

    def __init__(self, settings: dict, modalities: list[str]):
        super().__init__()
        self.stacks = nn.ModuleDict({JOINT: Stack(settings)})

    def forward(self, tokens: Tokens) -> Tokens:
        return split(self.stacks[JOINT](join(tokens)), tokens)


class MidEncoder(nn.Module):
    """A stack for each modality up to `fusion_layer`, then one over the tokens of all.

    With `modality_norms`, a modality that is given alone goes through the latter with norms of its own, as in CAV-MAE
    (Gong et al. 2023).
    """

    def __init__(self, settings: dict, modalities: list[str]):
        super().__init__()
        layer, ends = settings['fusion_layer'], settings['final_norm'] and settings['stream_norm']
        self.stacks = nn.ModuleDict({m: Stack(settings, stop=layer, final_norm=ends) for m in modalities})
        joint = self.stacks[JOINT] = Stack(settings, start=layer)
        own = modalities if settings['modality_norms'] else []
        self.norms = nn.ModuleDict({m: Norms(settings, len(joint.layers)) for m in own})

    def forward(self, tokens: Tokens) -> Tokens:
        tokens = {m: self.stacks[m](x) for m, x in tokens.items()}
        alone = next(iter(tokens)) if len(tokens) == 1 else None
        norms = self.norms[alone] if alone in self.norms else None
        return split(self.stacks[JOINT](join(tokens), norms), tokens)


class MBT(nn.Module):
    """A stream for each modality; from `fusion_layer` on they exchange, through bottleneck tokens or looking at all.

    Nagrani et al. 2021, Attention Bottlenecks for Multimodal Fusion.
    """

    def __init__(self, settings: dict, modalities: list[str]):
        super().__init__()
        self.settings = settings
        size = settings['size']
        names = ['shared'] if settings['shared_weights'] else modalities
        self.stacks = nn.ModuleDict({name: Stack(settings, final_norm=False) for name in names})
        self.norm = nn.LayerNorm(size['width'], eps=settings['final_norm_epsilon']) if settings['final_norm'] else None
        self.bottlenecks = None
        if settings['has_bottlenecks']:
            self.bottlenecks = nn.Parameter(torch.zeros(settings['num_bottlenecks'], size['width']))

    def forward(self, tokens: Tokens) -> Tokens:
        s, depth = self.settings, self.settings['size']['num_layers']
        through_bottlenecks = s['fusion'] == 'bottleneck'
        start = s['fusion_layer']
        if through_bottlenecks and (self.bottlenecks is None or not (self.training or s['test_with_bottlenecks'])):
            start = depth
        bottlenecks = self.bottlenecks
        for i in range(depth):
            block = {m: self.stacks['shared' if s['shared_weights'] else m].layers[i] for m in tokens}
            if i < start:
                tokens = {m: block[m](x) for m, x in tokens.items()}
            elif through_bottlenecks:
                tokens, bottlenecks = self._through_bottlenecks(block, tokens, bottlenecks)
            elif s['shared_weights']:
                tokens = split(next(iter(block.values()))(join(tokens)), tokens)
            else:
                tokens = {m: self._looking_at_all(block[m], m, tokens) for m in tokens}
        return tokens if self.norm is None else {m: self.norm(x) for m, x in tokens.items()}

    @staticmethod
    def _through_bottlenecks(block: dict[str, Block], tokens: Tokens, bottlenecks: Tensor) -> tuple[Tokens, Tensor]:
        """Each stream on its tokens and the bottlenecks; what the streams make of these is averaged."""
        out, made = {}, []
        for m, x in tokens.items():
            y = block[m](torch.cat([x, bottlenecks.expand(len(x), -1, -1)], dim=1))
            out[m] = y[:, : x.shape[1]]
            made.append(y[:, x.shape[1] :])
        return out, torch.stack(made).mean(dim=0)

    @staticmethod
    def _looking_at_all(block: Block, modality: str, tokens: Tokens) -> Tensor:
        """A stream on its own tokens, which attend to those of all."""
        others = [x for m, x in tokens.items() if m != modality]
        return block(torch.cat([*others, tokens[modality]], dim=1), carried=tokens[modality].shape[1])


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    'separate': SeparateEncoder,
    'shared': SharedEncoder,
    'early': EarlyEncoder,
    'mid': MidEncoder,
    'mbt': MBT,
}


# -- Pooling: (patches by modality, class tokens by modality) -> what heads get, by part --

POOLINGS: dict[str, Callable[[Tokens, Tokens], Tokens]] = {
    'mean': lambda patches, classes: {m: x.mean(dim=1) for m, x in patches.items()},
    'max': lambda patches, classes: {m: x.amax(dim=1) for m, x in patches.items()},
    'first': lambda patches, classes: {m: x[:, 0] for m, x in patches.items()},
    'token': lambda patches, classes: classes,
    'one_token': lambda patches, classes: {JOINT: next(iter(classes.values()))},
    'joint_mean': lambda patches, classes: {JOINT: join(patches).mean(dim=1)},
}


class AVMAE(nn.Module):
    """Tokenizers, an encoder, and of a classifier a pooling and heads.

    Args:
      settings: config.json, but for preprocessing: 'preprocessing' is preprocessing.json.
    """

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings
        width = settings['encoder']['size']['width']
        self.modalities = [m for m in MODALITIES if m in settings['tokenizers']]
        self.preprocess = Preprocess(settings['preprocessing'])
        self.tokenizers = nn.ModuleDict({m: Tokenizer(settings['tokenizers'][m], width) for m in self.modalities})
        self.encoder = ENCODERS[settings['encoder']['name']](settings['encoder'], self.modalities)
        head = settings['classifier']
        epsilon, representation = head['pooled_norm_epsilon'], head['representation']
        self.norm = nn.LayerNorm(width, eps=epsilon) if head['pooled_norm'] else None
        self.representation = nn.Linear(width, representation) if representation else None
        features = representation or width
        self.heads = nn.ModuleDict({name: nn.Linear(features, n) for name, n in head['num_classes'].items()})

    @classmethod
    def from_pretrained(cls, folder: str | pathlib.Path, num_classes: dict[str, int] | None = None) -> AVMAE:
        """The model in a folder, in evaluation mode.

        Args:
          num_classes: head -> classes of fresh heads in place of those that were trained, to be finetuned.
        """
        from safetensors.torch import load_file

        folder = pathlib.Path(folder)
        settings = json.loads((folder / 'config.json').read_text())
        settings['preprocessing'] = json.loads((folder / 'preprocessing.json').read_text())
        arrays = {name: array.float() for name, array in load_file(folder / 'model.safetensors').items()}
        if num_classes is not None:
            settings['classifier']['num_classes'] = dict(num_classes)
            arrays = {name: array for name, array in arrays.items() if not name.startswith('heads.')}
        model = cls(settings)
        if num_classes is not None:
            for name, head in model.heads.items():
                nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
                arrays |= {f'heads.{name}.weight': head.weight.detach(), f'heads.{name}.bias': head.bias.detach()}
        model.load_state_dict(arrays)
        return model.eval()

    def encode(self, **media: Tensor | None) -> Tokens:
        """Tokens after the encoder [b n d], by modality; class tokens come first."""
        given = {m: x for m in self.modalities if (x := media.pop(m, None)) is not None}
        if not given or any(x is not None for x in media.values()):
            raise ValueError(f'the model takes {" and ".join(self.modalities)}; got {[*given, *media]}.')
        if not all(isinstance(x, Tensor) for x in given.values()):
            raise ValueError(f'media are tensors of torch; got {", ".join(type(x).__name__ for x in given.values())}.')
        if len({x.shape[:1] for x in given.values()}) > 1 or any(0 in x.shape for x in given.values()):
            shapes = ', '.join(f'{m} {list(x.shape)}' for m, x in given.items())
            raise ValueError(f'as many clips of each modality are wanted, and at least one; got {shapes}.')
        return self.encoder({m: self.tokenizers[m](self.preprocess(m, x)) for m, x in given.items()})

    def embed(self, **media: Tensor | None) -> Tokens:
        """The mean over the patches of each modality [b d]."""
        return {m: x[:, self.tokenizers[m].num_in_front :].mean(dim=1) for m, x in self.encode(**media).items()}

    def classify(self, **media: Tensor | None) -> dict[str, Tensor]:
        """Head -> logits [b classes]: the mean over the parts that pooling leaves."""
        encoded = self.encode(**media)
        fronts = {m: self.tokenizers[m].num_in_front for m in encoded}
        patches = {m: x[:, fronts[m] :] for m, x in encoded.items()}
        classes = {m: x[:, : fronts[m]].mean(dim=1) for m, x in encoded.items() if fronts[m]}
        pooled = POOLINGS[self.settings['classifier']['pooling']](patches, classes)
        if self.norm is not None:
            pooled = {part: self.norm(x) for part, x in pooled.items()}
        if self.representation is not None:
            pooled = {part: torch.tanh(self.representation(x)) for part, x in pooled.items()}
        return {name: torch.stack([head(x) for x in pooled.values()]).mean(dim=0) for name, head in self.heads.items()}

    forward = classify
