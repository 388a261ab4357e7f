"""CSD (Somepalli et al., 2404.01292): a CLIP ViT-L/14 picture tower fine-tuned to tell styles apart, and its style head.

Weights: `yuxi-liu-wired/CSD` on the hub (MIT), a safetensors copy of the authors' pickle. It keeps OpenAI's names, which
this room maps onto transformers' CLIP tower:

    backbone.class_embedding, .positional_embedding, .conv1.weight   -> embeddings.*
    backbone.ln_pre, .ln_post                                        -> pre_layrnorm, post_layernorm (transformers' spelling)
    backbone.transformer.resblocks.N.ln_1, .ln_2, .mlp.c_fc, .c_proj -> encoder.layers.N.layer_norm1, 2, mlp.fc1, fc2
    backbone.transformer.resblocks.N.attn.in_proj_weight, _bias      -> q_proj, k_proj, v_proj, in this order of rows
    last_layer_style [1024, 768]                                     -> visual_projection.weight, transposed
    last_layer_content                                               unused
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from mochi_lora.errors import UserError
from mochi_lora.measures.hub_encoders import HubImageEncoder
from mochi_lora.measures.pretrained import Pretrained, weight_files

_STYLE, _CONTENT = "last_layer_style", "last_layer_content"
_HEAD_WIDTH = 64  # of attention, in every CLIP
_PLAIN = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
}
_NORMS = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def is_csd(folder: Path) -> bool:
    """Whether the folder holds a CSD: weights with a style head. Reads headers only."""
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as tensors:
                if {_STYLE, f"module.{_STYLE}"} & set(tensors.keys()):
                    return True
    except SafetensorError as error:
        raise UserError(f"{folder}: damaged weights ({error}); download them again") from error
    return False


def load_csd(found: Pretrained, device: str | torch.device) -> HubImageEncoder:
    """Style descriptors, 768 numbers a frame. Raises UserError where the weights are not CSD's."""
    path = weight_files(found.folder, found.label)[0]
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error}); download {found.label} again") from error
    weights = converted(tensors, path)
    model = CLIPVisionModelWithProjection(_config(weights))
    expected = set(model.state_dict())
    if wrong := sorted(expected ^ set(weights)):
        message = f"{path}: {len(wrong)} weights are missing or unknown, first {wrong[0]}"
        raise UserError(f"{message}; expected CSD with OpenAI's names, as in yuxi-liu-wired/CSD")
    model.load_state_dict(weights)
    side = model.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    model = model.eval().requires_grad_(requires_grad=False).to(device)
    return HubImageEncoder(found.label, model, processor, "image_embeds")


def converted(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """CSD's tensors under the names of transformers' `CLIPVisionModelWithProjection`, float32; see this room's head."""
    weights: dict[str, torch.Tensor] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix("module.")
        if name == _STYLE:
            weights["visual_projection.weight"] = tensor.T.float().contiguous()
        elif name.startswith("backbone."):
            weights.update(_tower(name.removeprefix("backbone."), tensor.float()))
        elif not name.startswith(_CONTENT):
            message = f"{path}: unknown weight {full}"
            raise UserError(f"{message}; expected CSD with OpenAI's names, as in yuxi-liu-wired/CSD")
    if "visual_projection.weight" not in weights:
        raise UserError(f"{path}: no {_STYLE}; expected CSD, as in yuxi-liu-wired/CSD")
    return weights


def _tower(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if name in _PLAIN:
        return {f"vision_model.{_PLAIN[name]}": tensor}
    module, _, kind = name.rpartition(".")
    if module in _NORMS:
        return {f"vision_model.{_NORMS[module]}.{kind}": tensor}
    if fused := _FUSED.match(name):
        layer = f"vision_model.encoder.layers.{fused[1]}.self_attn"
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.{letter}_proj.{fused[2]}": part.contiguous() for letter, part in parts}
    if block := _BLOCK.match(name):
        part = "self_attn.out_proj" if block[2] == "attn.out_proj" else _PARTS.get(block[2], block[2])
        return {f"vision_model.encoder.layers.{block[1]}.{part}.{block[3]}": tensor}
    return {f"vision_model.{name}": tensor}  # unknown: the comparison of names tells


def _config(weights: dict[str, torch.Tensor]) -> CLIPVisionConfig:
    """The tower's sizes, read from its weights."""
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if lacking := [name for name in needed if f"vision_model.{name}" not in weights]:
        raise UserError(f"CSD: no weight for {lacking[0]}; expected CSD with OpenAI's names, as in yuxi-liu-wired/CSD")
    patches, positions, first = (weights[f"vision_model.{name}"] for name in needed)
    width, patch = patches.shape[0], patches.shape[-1]
    layers = {name.split(".")[3] for name in weights if name.startswith("vision_model.encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=first.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=round((positions.shape[0] - 1) ** 0.5) * patch,
        patch_size=patch,
        projection_dim=weights["visual_projection.weight"].shape[0],
        hidden_act="quick_gelu",  # OpenAI's
    )
