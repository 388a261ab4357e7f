"""Image encoders and frame-text aligners that transformers loads: CLIP, SigLIP (1 and 2, fixed size), DINO, DINOv2.

Frames go through each model's own image processor in its PIL version, which gives the same pixels with and without
torchvision. Checked against transformers 5.23.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipVisionModel,
    ViTModel,
)

from mochi_lora.errors import UserError
from mochi_lora.measures.encoders import check_frames, choose_frames, unit_rows
from mochi_lora.measures.pretrained import Pretrained, config_of, kind_of, load_model

IMAGE_KINDS = ("clip", "siglip", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")  # vit: DINO
FRAME_TEXT_KINDS = ("clip", "siglip")
_BATCH = 16  # frames at once: 16 of CLIP L/14 take 0.5 GB
_ALIGNED_FRAMES = 16  # of a clip; frames of two seconds repeat each other


@dataclass(frozen=True)
class HubImageEncoder:
    """One vision tower and the name of the output that stands for the frame."""

    name: str
    model: Any
    processor: Any
    output: str  # image_embeds, pooler_output, or class_token
    comparable: bool = True

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] -> float32 [N, D], rows of length 1."""
        check_frames(frames)
        batches = [self._batch(frames[start : start + _BATCH]) for start in range(0, len(frames), _BATCH)]
        return unit_rows(np.concatenate(batches))

    def _batch(self, frames: np.ndarray) -> np.ndarray:
        pixels = pixel_values(self.processor, frames).to(self.model.device)
        with torch.inference_mode():
            outputs = self.model(pixel_values=pixels)
        picked = outputs.last_hidden_state[:, 0] if self.output == "class_token" else outputs[self.output]
        return picked.float().cpu().numpy()


def load_image_tower(found: Pretrained, device: str | torch.device) -> HubImageEncoder:
    """The image side of a CLIP or SigLIP (their joint space), or a DINO's class token after the last norm."""
    content, kind = config_of(found), kind_of(found, IMAGE_KINDS)
    options: dict[str, Any] = {}
    match kind:
        case "clip":
            # The width of the joint space belongs to the whole model; a tower alone would assume 512.
            config = CLIPVisionConfig.from_pretrained(found.folder, local_files_only=True)
            config.projection_dim = content.get("projection_dim", config.projection_dim)
            load, output, options = CLIPVisionModelWithProjection.from_pretrained, "image_embeds", {"config": config}
        case "siglip" | "siglip_vision_model":
            load, output = SiglipVisionModel.from_pretrained, "pooler_output"
        case "dinov2" | "dinov2_with_registers":
            load, output = AutoModel.from_pretrained, "class_token"
        case _:  # vit: DINO's release has no pooler, and asking for one would draw it at random
            load, output, options = ViTModel.from_pretrained, "class_token", {"add_pooling_layer": False}
    model = load_model(load, found, device, **options)
    return HubImageEncoder(found.label, model, image_processor(found), output)


@dataclass(frozen=True)
class FrameTextAligner:
    """Mean cosine between frames and a prompt (CLIPScore without its factor and floor). Blind to motion."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    longest: int  # tokens
    pad_to_longest: bool  # SigLIP was trained so and gives other numbers without
    comparable: bool = True

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - frames are enough
        """float32 [P] in [-1, 1] for uint8 [F, H, W, 3]; up to 16 evenly spaced frames are looked at."""
        check_frames(frames)
        chosen = frames[choose_frames(len(frames), _ALIGNED_FRAMES)]
        pixels = pixel_values(self.processor, chosen).to(self.model.device)
        tokens = tokenise(self.tokenizer, prompts, self.longest, pad_to_longest=self.pad_to_longest).to(self.model.device)
        with torch.inference_mode():
            images = self.model.get_image_features(pixel_values=pixels).pooler_output
            texts = self.model.get_text_features(**tokens).pooler_output
        cosines = unit_rows(images.float().cpu().numpy()) @ unit_rows(texts.float().cpu().numpy()).T
        return cosines.mean(axis=0).astype(np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the text tower reads (77 of CLIP, 64 of SigLIP)."""
        return count_longer(self.tokenizer, prompts, self.longest)


def load_frame_text(found: Pretrained, device: str | torch.device) -> FrameTextAligner:
    """A CLIP or SigLIP with both towers."""
    kind = kind_of(found, FRAME_TEXT_KINDS)
    model = load_model((CLIPModel if kind == "clip" else SiglipModel).from_pretrained, found, device)
    longest = model.config.text_config.max_position_embeddings
    processor, tokenizer = image_processor(found), text_tokenizer(found)
    return FrameTextAligner(found.label, model, processor, tokenizer, longest, pad_to_longest=kind == "siglip")


def image_processor(found: Pretrained) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model's own preprocessing, by PIL."""
    try:
        return AutoImageProcessor.from_pretrained(found.folder, local_files_only=True, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{found.label} ({found.purpose}): its image processor cannot be loaded: {error}") from error


def text_tokenizer(found: Pretrained) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{found.label} ({found.purpose}): its tokenizer cannot be loaded: {error}") from error


def pixel_values(processor: Any, frames: np.ndarray) -> torch.Tensor:  # noqa: ANN401
    """float32 [N, 3, h, w]. The channel position is said: 3 rows of pixels would be taken for channels otherwise."""
    return processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def tokenise(tokenizer: Any, prompts: Sequence[str], longest: int, *, pad_to_longest: bool = False) -> Any:  # noqa: ANN401
    """Token tensors of `prompts`, cut at `longest` tokens."""
    padding = "max_length" if pad_to_longest else True
    return tokenizer(list(prompts), padding=padding, truncation=True, max_length=longest, return_tensors="pt")


def count_longer(tokenizer: Any, prompts: Sequence[str], longest: int) -> int:  # noqa: ANN401
    """How many prompts have more than `longest` tokens."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]
    return sum(length > longest for length in lengths)
