"""Aligners that see a clip as a clip: X-CLIP and the video branch of Perception Encoder AV (PE-AV).

Both score by cosine, not by their logits: the logits' scale is the checkpoint's, and margins are stated once for all.
Checked against transformers 5.23.0.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PeVideoModel, XCLIPModel

from mochi_lora.errors import UserError
from mochi_lora.measures.encoders import check_frames, choose_frames, exactly, unit_rows
from mochi_lora.measures.hub_encoders import count_longer, image_processor, pixel_values, text_tokenizer, tokenise
from mochi_lora.measures.pretrained import Pretrained, kind_of, load_model

VIDEO_TEXT_KINDS = ("xclip", "pe_video", "pe_audio_video")
_PE_FRAMES = 16  # what the -16-frame checkpoints were trained on
_PE_TOKENS = 512  # of ModernBERT's 8192: no prompt is longer, and Mochi itself reads 256


@dataclass(frozen=True)
class XClipAligner:
    """X-CLIP (Ni et al., 2208.02816): the prompt is adapted to the clip before they are compared."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    comparable: bool = True

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - even spacing
        """float32 [P] in [-1, 1]; the clip is seen as the 8 (config) evenly spaced frames of its training."""
        check_frames(frames)
        chosen = frames[exactly(len(frames), self.model.config.vision_config.num_frames)]
        pixels = pixel_values(self.processor, chosen).unsqueeze(0).to(self.model.device)
        tokens = tokenise(self.tokenizer, prompts, self._longest).to(self.model.device)
        with torch.inference_mode():
            outputs = self.model(pixel_values=pixels, **tokens)
        # Normalised inside the model; text comes as [1, P, D] because it depends on the clip.
        video, text = outputs.video_embeds.float(), outputs.text_embeds.float()
        return (text[0] @ video[0]).cpu().numpy().astype(np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than the 77 tokens of its CLIP text tower."""
        return count_longer(self.tokenizer, prompts, self._longest)

    @property
    def _longest(self) -> int:
        return self.model.config.text_config.max_position_embeddings


@dataclass(frozen=True)
class PeAligner:
    """PE-AV's video-text branch."""

    name: str
    model: Any
    tokenizer: Any
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    comparable: bool = True

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - even spacing
        """float32 [P] in [-1, 1]; up to 16 evenly spaced frames are looked at."""
        check_frames(frames)
        pixels = self._pixels(frames[choose_frames(len(frames), _PE_FRAMES)]).unsqueeze(0).to(self.model.device)
        tokens = tokenise(self.tokenizer, prompts, _PE_TOKENS).to(self.model.device)
        with torch.inference_mode():
            # `get_text_features` and `get_video_features` are nested in `__init__` there (one indent too many) and do not
            # exist; the whole forward does.
            outputs = self.model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values_videos=pixels
            )
        video = unit_rows(outputs.video_embeds.float().cpu().numpy())
        return (unit_rows(outputs.text_video_embeds.float().cpu().numpy()) @ video[0]).astype(np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 512 tokens."""
        return count_longer(self.tokenizer, prompts, _PE_TOKENS)

    def _pixels(self, frames: np.ndarray) -> torch.Tensor:
        """float32 [F, 3, side, side]: squeezed to a square, bilinear, as its processor (which needs torchvision) does."""
        size = (self.side, self.side)
        small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in frames])
        normalised = (small.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))


def load_video_text(found: Pretrained, device: str | torch.device) -> XClipAligner | PeAligner:
    """An X-CLIP, or a PE-AV (whose picture tower comes from timm, which this package does not bring along)."""
    if kind_of(found, VIDEO_TEXT_KINDS) == "xclip":
        model = load_model(XCLIPModel.from_pretrained, found, device)
        return XClipAligner(found.label, model, image_processor(found), text_tokenizer(found))
    side, mean, std = _pe_preprocessing(found)
    model = load_model(PeVideoModel.from_pretrained, found, device)
    return PeAligner(found.label, model, text_tokenizer(found), side, mean, std)


def _pe_preprocessing(found: Pretrained) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and standard deviation from the video processor's settings, wherever the checkpoint keeps them."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        path = found.folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("video_processor", content)
        size = content.get("size") or {}
        if {"height", "width"} <= size.keys() and "image_mean" in content and "image_std" in content:
            return int(size["height"]), tuple(content["image_mean"]), tuple(content["image_std"])
    message = f"{found.folder}: no file says the size, image_mean and image_std of its video processor"
    raise UserError(f"{message}; {found.label} is needed for {found.purpose}: download it whole")
