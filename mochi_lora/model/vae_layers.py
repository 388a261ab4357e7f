"""Layers of Mochi's VAE over a clip that comes in chunks of time; joined, the chunks are what the whole clip would give.

What a layer must know of earlier frames, and where that is kept:

- A causal convolution sees two frames back. Its generator keeps the last two frames of its padded input from chunk to
  chunk; before the first frame stands that frame again, as in Genmo's replicate padding.
- Group norm is per frame: nothing.
- A down-sampling convolution takes windows of e frames, the first e-1 of them in the padding; frames that do not fill a
  window wait for the next chunk.
- Attention is over time at each cell for itself, causal, and its keys and values of a long clip would be larger than the
  clip. It wants all frames and few cells: it works on the whole clip, in bands of rows.

Shape legend: T = frames, H, W = cells, C = channels. Chunks are [T, H, W, C], which cuDNN calls channels last: its fast
convolutions want it, and group norm, attention and up-sampling read whole channel vectors. Genmo's layers: genmoai/mochi
@0c86aeb `vae/models.py`; weights are taken from diffusers 0.42.1, norms stay in float32.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as UpstreamAttention
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiChunkedGroupNorm3D, MochiResnetBlock3D, MochiUpBlock3D
from torch.nn.attention import SDPBackend, sdpa_kernel

from mochi_lora.model.vae_kernels import activate_into, add_band_into, add_into, norm_line, sequences, unit

Chunks = Iterator[torch.Tensor]
_ALIGNED = 8  # channels; matrix products of 3, 12 or 15 bf16 values a row miss the tensor cores
_BAND_SHARE = 4  # an attention keeps about eight tensors of a band at once, a residual layer four of a chunk
_SEQUENCES = 2**15  # per call: the kernels' grids end at 2^16 - 1
_ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # cuDNN plans anew for every length


def pieces(clip: torch.Tensor, elements: int) -> tuple[torch.Tensor, ...]:
    """Views of consecutive frames, each of at most `elements` elements, but of one frame at least."""
    return clip.split(max(1, elements // clip[0].numel()))


def joined(chunks: Chunks, frames: int) -> torch.Tensor:
    """The chunks one behind the other, `frames` in all."""
    first = next(chunks)
    clip = first.new_empty(frames, *first.shape[1:])
    stop = len(first)
    clip[:stop] = first
    for chunk in chunks:
        clip[stop : stop + len(chunk)] = chunk
        stop += len(chunk)
    assert stop == frames, (stop, frames)
    return clip


def convolved(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T+2, H+2, W+2, C] with weight [C', C, 3, 3, 3] -> [T, H, W, C'], where cuDNN and oneDNN keep channels last."""
    clip = padded.unsqueeze(0).permute(0, 4, 1, 2, 3)
    return F.conv3d(clip, weight)[0].permute(1, 2, 3, 0).contiguous()


class Norm(torch.nn.Module):
    """Group norm of each frame, as a line per channel."""

    gain: torch.Tensor
    bias: torch.Tensor

    def __init__(self, norm: MochiChunkedGroupNorm3D) -> None:
        super().__init__()
        layer = norm.norm_layer
        self.groups, self.eps = layer.num_groups, layer.eps
        self.register_buffer("gain", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, offset) [T, 1, 1, C]: the norm of x + added is x * scale + offset; x [T, H, W, C], added [C]."""
        scale, offset = norm_line(x, added, self.gain, self.bias, self.groups, self.eps)
        return scale[:, None, None], offset[:, None, None]


class CausalConv(torch.nn.Module):
    """Norm, SiLU and a 3 x 3 x 3 convolution without its bias: who comes next adds it in passing, in float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, norm: MochiChunkedGroupNorm3D, conv: torch.nn.Conv3d, dtype: torch.dtype) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
        assert conv.bias is not None
        self.norm = Norm(norm)
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last_3d)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", conv.bias.detach())

    def forward(self, x: torch.Tensor, added: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x + added [T, H, W, C], which follows the frames `before`: [T, H, W, C'], and `before` of the next chunk."""
        frames, height, width, channels = x.shape
        scale, offset = self.norm(x, added)
        padded = x.new_empty(frames + 2, height + 2, width + 2, channels)
        activate_into(padded[2:], x, scale, offset)
        padded[:2] = padded[2:3] if before is None else before
        return convolved(padded, self.weight), padded[-2:].clone()  # not a view: it would keep the whole chunk


class Residual(torch.nn.Module):
    """x + conv(conv(x)), in place."""

    nothing: torch.Tensor

    def __init__(self, block: MochiResnetBlock3D, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = CausalConv(block.norm1, block.conv1.conv, dtype)
        self.second = CausalConv(block.norm2, block.conv2.conv, dtype)
        self.register_buffer("nothing", torch.zeros_like(self.first.norm.bias))

    def forward(self, chunks: Iterable[torch.Tensor]) -> Chunks:
        """Each chunk [T, H, W, C], changed."""
        before: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        for chunk in chunks:
            before = self._add(chunk, *before)
            yield chunk

    def _add(
        self, x: torch.Tensor, before_first: torch.Tensor | None, before_second: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, before_first = self.first(x, self.nothing, before_first)
        hidden, before_second = self.second(hidden, self.first.bias, before_second)
        add_into(x, hidden, self.second.bias)
        return before_first, before_second


class Down(torch.nn.Module):
    """Convolution whose stride is its kernel (e, s, s), as a product of patches."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, conv: torch.nn.Conv3d, dtype: torch.dtype) -> None:
        super().__init__()
        assert (conv.stride, conv.padding, conv.dilation) == (conv.kernel_size, (0, 0, 0), (1, 1, 1))
        assert conv.bias is not None
        self.window = conv.kernel_size
        self.register_buffer("weight", conv.weight.detach().permute(0, 2, 3, 4, 1).flatten(1).to(dtype))
        self.register_buffer("bias", conv.bias.detach().to(dtype))

    def forward(self, chunks: Iterable[torch.Tensor]) -> Chunks:
        """[T, H, W, C] -> [., H/s, W/s, C']; over all chunks (T + e - 1) / e frames, with T - 1 a multiple of e."""
        time = self.window[0]
        waiting: torch.Tensor | None = None
        for chunk in chunks:
            if time == 1:
                yield self._product(chunk)
                continue
            before = chunk[:1].expand(time - 1, -1, -1, -1) if waiting is None else waiting
            frames = torch.cat([before, chunk])
            full = len(frames) // time * time
            waiting = frames[full:].clone()
            if full:
                yield self._product(frames[:full])

    def _product(self, frames: torch.Tensor) -> torch.Tensor:
        for axis, size in zip((0, 2, 4), self.window, strict=True):
            frames = frames.unflatten(axis, (-1, size))
        patches = frames.permute(0, 2, 4, 1, 3, 5, 6).flatten(3)
        return F.linear(patches, self.weight, self.bias)


class Up(torch.nn.Module):
    """Up-sampling by e in time and s in space; drops the e-1 leading frames the clip would have too many."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, block: MochiUpBlock3D, dtype: torch.dtype) -> None:
        super().__init__()
        self.steps = (block.temporal_expansion, block.spatial_expansion, block.spatial_expansion)
        copies = block.temporal_expansion * block.spatial_expansion**2
        # Upstream's rows count channels, then steps; ours steps, then channels, so that channels stay neighbours.
        weight, bias = block.proj.weight.detach(), block.proj.bias.detach()
        self.register_buffer("weight", weight.unflatten(0, (-1, copies)).transpose(0, 1).flatten(0, 1).to(dtype))
        self.register_buffer("bias", bias.unflatten(0, (-1, copies)).transpose(0, 1).flatten().to(dtype))

    def forward(self, chunks: Iterable[torch.Tensor], elements: int) -> Chunks:
        """[T, H, W, C] -> [eT, sH, sW, C'] of at most about `elements` elements; e-1 frames fewer at the beginning."""
        surplus = self.steps[0] - 1
        for chunk in chunks:
            growth = max(1.0, len(self.bias) / chunk.shape[-1])
            for piece in pieces(chunk, int(elements / growth)):
                yield self._spread(piece)[surplus:]
                surplus = 0

    def _spread(self, chunk: torch.Tensor) -> torch.Tensor:
        spread = F.linear(chunk, self.weight, self.bias).unflatten(-1, (*self.steps, -1))
        return spread.permute(0, 3, 1, 4, 2, 5, 6).flatten(0, 1).flatten(1, 2).flatten(2, 3)


class Attention(torch.nn.Module):
    """x + attention(norm(x)) over the frames up to one's own, at each cell for itself, in place."""

    weight: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor
    nothing: torch.Tensor

    def __init__(self, norm: MochiChunkedGroupNorm3D, attention: UpstreamAttention, dtype: torch.dtype) -> None:
        super().__init__()
        assert attention.is_causal
        assert attention.to_q.bias is None
        self.norm, self.heads, self.eps = Norm(norm), attention.heads, attention.norm_q.eps
        projections = [layer.weight.detach() for layer in (attention.to_q, attention.to_k, attention.to_v)]
        self.register_buffer("weight", torch.cat(projections).to(dtype))
        self.register_buffer("out", attention.to_out[0].weight.detach().to(dtype))
        self.register_buffer("bias", attention.to_out[0].bias.detach())
        self.register_buffer("nothing", torch.zeros_like(self.norm.bias))

    def forward(self, clip: torch.Tensor, elements: int) -> None:
        """Changes the whole clip [T, H, W, C]; works on about `elements` elements at a time."""
        lines = [self.norm(piece, self.nothing) for piece in pieces(clip, elements)]
        scale, offset = (torch.cat(parts) for parts in zip(*lines, strict=True))
        frames, _, width, channels = clip.shape
        rows = max(1, min(elements // _BAND_SHARE // (frames * width * channels), _SEQUENCES // width))
        for band in clip.split(rows, dim=1):
            update = self._attended(sequences(band, scale, offset))
            update = update.unflatten(0, band.shape[1:3]).permute(2, 0, 1, 3)
            add_band_into(band, update, self.bias)

    def _attended(self, cells: torch.Tensor) -> torch.Tensor:
        """[N, T, C] -> [N, T, C], the output's bias not yet added."""
        qkv = F.linear(cells, self.weight).unflatten(-1, (3, self.heads, -1))
        q, k = unit(qkv[:, :, :2], self.eps).transpose(1, 3).unbind(2)
        with sdpa_kernel(_ATTENTIONS):
            attended = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2), is_causal=True)
        return F.linear(attended.transpose(1, 2).flatten(2), self.out)


class Projection(torch.nn.Module):
    """A linear layer over channels, its narrow side filled up with zeros to what tensor cores take."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels, taken = weight.shape
        fill = (0, -taken % _ALIGNED, 0, -self.channels % _ALIGNED)
        self.register_buffer("weight", F.pad(weight.detach().to(dtype), fill))
        bias = weight.new_zeros(self.channels) if bias is None else bias
        self.register_buffer("bias", F.pad(bias.detach().to(dtype), (0, fill[3])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C']; x may come with its zeros already."""
        missing = self.weight.shape[1] - x.shape[-1]
        return F.linear(F.pad(x, (0, missing)) if missing else x, self.weight, self.bias)[..., : self.channels]
