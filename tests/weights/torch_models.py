"""The published models, written down once more in PyTorch under the parameter names of their projects.

No more of them than computes: no dropout, no initialisation. Every number is random, see `randomised`.
"""

import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)


def randomised(model, seed=0, small=()):
    """The model in evaluation with random numbers, norms around 1.

    Names that start with one of `small` are near zero: what comes behind lets a LayerNorm show what it adds to the
    variance.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
                parameter.add_(1.0 if 'norm' in name and name.endswith('weight') else 0.0)
                parameter.mul_(1e-3 if name.startswith(tuple(small)) else 1.0)
    return model.eval()


class Attention(nn.Module):
    """With a bias for all of queries, keys and values, or (`split`) one for queries and one for values."""

    def __init__(self, width, heads, split=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=not split)
        self.proj = nn.Linear(width, width)
        if split:
            self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x):
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        parts = functional.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
        return self.proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, split=False, epsilon=1e-6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attn, self.mlp = Attention(width, heads, split), Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(count, *args, **kwargs):
    return nn.ModuleList(Block(*args, **kwargs) for _ in range(count))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch, stride=None):
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = convolution(channels, width, kernel_size=patch, stride=stride or patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def take(x, indices):
    return torch.gather(x, 1, indices[..., None].expand(-1, -1, x.shape[-1]))


class MAE(nn.Module):
    """MAE and AudioMAE with plain blocks in its decoder; `places` tokens, a class token in front."""

    def __init__(self, places, patch, channels, width=12, heads=3, depth=2, decoder=8, decoder_heads=2):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, places + 1, width))
        self.blocks, self.norm = blocks(depth, width, heads, 20), nn.LayerNorm(width, 1e-6)
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, places + 1, decoder))
        self.decoder_blocks = blocks(3, decoder, decoder_heads, 14)
        self.decoder_norm = nn.LayerNorm(decoder, 1e-6)
        self.decoder_pred = nn.Linear(decoder, channels * patch[0] * patch[1])

    def encode(self, x, kept=None):
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x = x if kept is None else take(x, kept)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(run(self.blocks, torch.cat([first, x], 1)))

    def forward(self, x, kept, hidden):
        """Values of all patches in their order."""
        tokens = self.decoder_embed(self.encode(x, kept))
        masked = self.mask_token.expand(len(x), hidden.shape[1], -1)
        restore = torch.argsort(torch.cat([kept, hidden], 1), 1)
        placed = take(torch.cat([tokens[:, 1:], masked], 1), restore)
        decoded = run(self.decoder_blocks, torch.cat([tokens[:, :1], placed], 1) + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(decoded))[:, 1:]


class MAEClassifier(nn.Module):
    """The finetuned one: of the mean over the patches, or of the class token."""

    def __init__(self, places, patch, channels, mean, width=12, heads=3, classes=5):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, places + 1, width))
        self.blocks, self.head = blocks(2, width, heads, 20), nn.Linear(width, classes)
        self.mean = mean
        self.add_module('fc_norm' if mean else 'norm', nn.LayerNorm(width, 1e-6))

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = run(self.blocks, x)
        return self.head(self.fc_norm(x[:, 1:].mean(1)) if self.mean else self.norm(x)[:, 0])


def sinusoids(places, width):
    """VideoMAE's table: sines in even channels, cosines in odd ones."""
    angle = torch.arange(places)[:, None] / 10000 ** (2 * (torch.arange(width) // 2) / width)
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())[None]


class VideoMAEEncoder(nn.Module):
    def __init__(self, patch, width, heads, depth):
        super().__init__()
        self.patch_embed = PatchEmbed(3, width, patch)
        self.blocks, self.norm = blocks(depth, width, heads, 20, split=True), nn.LayerNorm(width, 1e-6)

    def forward(self, x, kept):
        x = self.patch_embed(x)
        return self.norm(run(self.blocks, take(x + sinusoids(*x.shape[1:]), kept)))


class VideoMAEDecoder(nn.Module):
    def __init__(self, width, heads, values):
        super().__init__()
        self.blocks, self.norm = blocks(3, width, heads, 14, split=True), nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, values)

    def forward(self, x, hidden):
        return self.head(self.norm(run(self.blocks, x)[:, -hidden:]))


class VideoMAE(nn.Module):
    def __init__(self, patch, width=12, heads=3, decoder=8, decoder_heads=2):
        super().__init__()
        self.encoder = VideoMAEEncoder(patch, width, heads, 2)
        self.decoder = VideoMAEDecoder(decoder, decoder_heads, 3 * patch[0] * patch[1] * patch[2])
        self.encoder_to_decoder = nn.Linear(width, decoder, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))

    def forward(self, x, kept, hidden):
        """Values of the hidden patches."""
        seen = self.encoder_to_decoder(self.encoder(x, kept))
        table = sinusoids(kept.shape[1] + hidden.shape[1], seen.shape[2]).expand(len(x), -1, -1)
        masked = self.mask_token + take(table, hidden)
        return self.decoder(torch.cat([seen + take(table, kept), masked], 1), hidden.shape[1])


class VideoMAEClassifier(nn.Module):
    """The finetuned one: of the mean, or (not `mean`) of the first token."""

    def __init__(self, patch, mean, width=12, heads=3, classes=5):
        super().__init__()
        self.patch_embed = PatchEmbed(3, width, patch)
        self.blocks, self.head = blocks(2, width, heads, 20, split=True), nn.Linear(width, classes)
        self.mean = mean
        self.add_module('fc_norm' if mean else 'norm', nn.LayerNorm(width, 1e-6))

    def forward(self, x):
        x = self.patch_embed(x)
        x = run(self.blocks, x + sinusoids(*x.shape[1:]))
        return self.head(self.fc_norm(x.mean(1)) if self.mean else self.norm(x)[:, 0])


class DeiT(nn.Module):
    """What AST and SSAST call `v`, with the heads of ImageNet that nobody uses; patches are (frequency, time)."""

    def __init__(self, places, patch, stride, distilled, width=12, heads=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, width))
            self.head_dist = nn.Linear(width, 7)
        self.pos_embed = nn.Parameter(torch.empty(1, places + 1 + distilled, width))
        self.patch_embed = PatchEmbed(1, width, patch, stride)
        self.blocks, self.norm = blocks(2, width, heads, 20), nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, 7)

    def forward(self, x):
        x = self.patch_embed(x[:, None].transpose(2, 3))
        front = [self.cls_token, self.dist_token] if hasattr(self, 'dist_token') else [self.cls_token]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], 1) + self.pos_embed
        return self.norm(run(self.blocks, x))


class AST(nn.Module):
    """Scores of the mean of the tokens in front, or (`mean`, as SSAST is finetuned) of the patches."""

    def __init__(self, places, patch, stride, distilled=True, mean=False, width=12, classes=5):
        super().__init__()
        self.v = DeiT(places, patch, stride, distilled, width)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        self.front, self.mean = 1 + distilled, mean

    def forward(self, x):
        x = self.v(x)
        return self.mlp_head((x[:, self.front :] if self.mean else x[:, : self.front]).mean(1))


class SSAST(nn.Module):
    """A pretrained one: DeiT and what its task needs; what it was trained on is among its parameters."""

    def __init__(self, places, patch, shape, distilled=True, width=12):
        super().__init__()
        self.v = DeiT(places, patch, patch, distilled, width)
        self.p_input_tdim, self.p_input_fdim = (nn.Parameter(torch.tensor(n), requires_grad=False) for n in shape)
        self.mask_embed = nn.Parameter(torch.empty(1, 1, width))
        for name in ('cpredlayer', 'gpredlayer'):
            self.add_module(name, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6)))


class ModalityBlock(Block):
    """A block with two more pairs of norms, which a modality alone goes through."""

    def __init__(self, width, heads, hidden):
        super().__init__(width, heads, hidden, epsilon=1e-5)
        for name in ('norm1_a', 'norm1_v', 'norm2_a', 'norm2_v'):
            self.add_module(name, nn.LayerNorm(width))

    def forward(self, x, modality=''):
        x = x + self.attn(getattr(self, f'norm1{modality}')(x))
        return x + self.mlp(getattr(self, f'norm2{modality}')(x))


class CAVMAE(nn.Module):
    """Pretrained, or (`classes`) finetuned. Sound comes as (time, frequency) and is turned; pictures colours first."""

    def __init__(self, places, patch, classes=0, width=12, heads=3, decoder=8):
        super().__init__()
        for letter, channels in (('a', 1), ('v', 3)):
            self.add_module(f'patch_embed_{letter}', PatchEmbed(channels, width, patch[letter]))
            self.register_parameter(f'modality_{letter}', nn.Parameter(torch.empty(1, 1, width)))
            self.register_parameter(f'pos_embed_{letter}', nn.Parameter(torch.empty(1, places[letter], width)))
            self.add_module(f'norm_{letter}', nn.LayerNorm(width))
        for letter, depth in (('a', 2), ('v', 2), ('u', 1)):
            layers = nn.ModuleList(ModalityBlock(width, heads, 20) for _ in range(depth))
            self.add_module(f'blocks_{letter}', layers)
        self.norm = nn.LayerNorm(width)
        if classes:
            self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
            return
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        for letter, channels in (('a', 1), ('v', 3)):
            table = nn.Parameter(torch.empty(1, places[letter], decoder))
            self.register_parameter(f'decoder_pos_embed_{letter}', table)
            self.register_parameter(f'decoder_modality_{letter}', nn.Parameter(torch.empty(1, 1, decoder)))
            values = channels * patch[letter][0] * patch[letter][1]
            self.add_module(f'decoder_pred_{letter}', nn.Linear(decoder, values))
        self.decoder_blocks = nn.ModuleList(ModalityBlock(decoder, 2, 14) for _ in range(2))
        self.decoder_norm = nn.LayerNorm(decoder)

    def stream(self, letter, x, kept=None):
        x = x[:, None].transpose(2, 3) if letter == 'a' else x
        x = getattr(self, f'patch_embed_{letter}')(x)
        x = x + getattr(self, f'pos_embed_{letter}') + getattr(self, f'modality_{letter}')
        return run(getattr(self, f'blocks_{letter}'), x if kept is None else take(x, kept))

    def joint(self, x, letter=''):
        for layer in self.blocks_u:
            x = layer(x, letter and f'_{letter}')
        return getattr(self, f'norm_{letter}' if letter else 'norm')(x)

    def encode(self, inputs, kept=None):
        """Letter -> tokens."""
        parts = {letter: self.stream(letter, x, kept and kept[letter]) for letter, x in inputs.items()}
        if len(parts) == 1:
            return {letter: self.joint(x, letter) for letter, x in parts.items()}
        whole = self.joint(torch.cat(list(parts.values()), 1))
        return dict(zip(parts, whole.split([x.shape[1] for x in parts.values()], 1), strict=True))

    def classify(self, inputs):
        return self.mlp_head(torch.cat(list(self.encode(inputs).values()), 1).mean(1))

    def forward(self, inputs, kept, hidden):
        """Letter -> values of all patches."""
        placed = []
        for letter, x in self.encode(inputs, kept).items():
            masked = self.mask_token.expand(len(x), hidden[letter].shape[1], -1)
            restore = torch.argsort(torch.cat([kept[letter], hidden[letter]], 1), 1)
            tokens = take(torch.cat([self.decoder_embed(x), masked], 1), restore)
            own = getattr(self, f'decoder_pos_embed_{letter}') + getattr(self, f'decoder_modality_{letter}')
            placed.append(tokens + own)
        x = self.decoder_norm(run(self.decoder_blocks, torch.cat(placed, 1)))
        parts = x.split([part.shape[1] for part in placed], 1)
        return {m: getattr(self, f'decoder_pred_{m}')(part) for m, part in zip(inputs, parts, strict=True)}
