from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import frames
from torch import nn

from mochi_lora.errors import UserError
from mochi_lora.measures.aesthetic_head import load_aesthetic_head
from mochi_lora.measures.backbones import load_style
from mochi_lora.measures.encoders import unit_rows

WIDTH, HEADS, PATCH, SIDE, OUT = 128, 2, 16, 64, 24


class Block(nn.Module):
    """OpenAI's residual attention block, from the paper: torch's own attention keeps the fused weights CSD is saved with."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        parts = [("c_fc", nn.Linear(WIDTH, 4 * WIDTH)), ("c_proj", nn.Linear(4 * WIDTH, WIDTH))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Block(), Block())

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer.resblocks(x)[:, 0])


class Csd(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Tower()
        self.last_layer_style = nn.Parameter(torch.randn(WIDTH, OUT))
        self.last_layer_content = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, pixels):
        return self.backbone(pixels) @ self.last_layer_style


@pytest.fixture
def csd():
    torch.manual_seed(0)
    model = Csd().eval()
    with torch.no_grad():  # norms and biases are born 1 and 0: a swap of two of them would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(tensors, folder):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_csd_from_its_file_is_the_network_of_the_paper(csd, tmp_path, prefix):
    path = saved({prefix + name: tensor for name, tensor in csd.state_dict().items()}, tmp_path / "csd")
    encoder = load_style(path, "cpu")
    clip = frames(3, height=70, width=100)
    pixels = encoder.processor(images=list(clip), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = unit_rows(csd(pixels).numpy())
    assert np.allclose(encoder.embed(clip), expected, atol=1e-5)


def test_csd_with_a_weight_missing_or_unknown_is_refused_by_name(csd, tmp_path):
    tensors = csd.state_dict()
    tensors.pop("backbone.ln_post.bias")
    with pytest.raises(UserError, match=r"post_layernorm\.bias"):
        load_style(saved(tensors, tmp_path / "short"), "cpu")
    with pytest.raises(UserError, match="unknown weight stranger"):
        load_style(saved(csd.state_dict() | {"stranger": torch.ones(1)}, tmp_path / "more"), "cpu")


def test_a_damaged_csd_is_refused_by_its_folder(csd, tmp_path):
    path = saved(csd.state_dict(), tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(UserError, match="damaged"):
        load_style(path, "cpu")


# --- aesthetic head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "predictor."])
def test_the_aesthetic_head_is_a_linear_layer(tmp_path, prefix):
    layer = nn.Linear(768, 1)
    path = tmp_path / "head.safetensors"
    save_file({f"{prefix}weight": layer.weight.data, f"{prefix}bias": layer.bias.data}, path)
    rows = unit_rows(np.random.default_rng(0).normal(size=(5, 768)).astype(np.float32))
    with torch.no_grad():
        expected = layer(torch.from_numpy(rows))[:, 0].numpy()
    assert np.allclose(load_aesthetic_head(path).scores(rows), expected, atol=1e-6)


def test_the_aesthetic_head_refuses_embeddings_of_another_clip(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(1, 768), "bias": torch.ones(1)}, path)
    with pytest.raises(UserError, match="made for embeddings of 768 numbers, got 512"):
        load_aesthetic_head(path).scores(unit_rows(np.ones((1, 512), np.float32)))


def test_an_aesthetic_head_that_is_a_pickle_or_no_head_is_refused(tmp_path):
    pickled = tmp_path / "head.pth"
    pickled.write_bytes(b"")
    with pytest.raises(UserError, match="pickles are not opened"):
        load_aesthetic_head(pickled)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2, 768), "bias": torch.ones(2)}, other)
    with pytest.raises(UserError, match=r"expected weight \[1, 768\]"):
        load_aesthetic_head(other)
