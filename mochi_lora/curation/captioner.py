"""Clips shown to a vision-language model, and what it says of them: batched, greedy, so that the same clip gets the same words.

Frames go in as a list of pictures: the video processors of transformers need torchvision, its picture processors do not.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
)

from mochi_lora.curation.caption_text import INSTRUCTION, INSTRUCTION_FOR_PICTURES
from mochi_lora.data.decode import read_stills
from mochi_lora.data.probe import ClipInfo, probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.measures.picture_processor import load_picture_processor
from mochi_lora.measures.pretrained import Pretrained, load_model

_SAME_TIME = 1e-6  # seconds
_OPENING = "These are {count} frames of one video clip of {seconds:.1f} seconds, evenly spaced, in order of time. "


@dataclass(frozen=True)
class Look:
    """What the model sees of one clip."""

    pictures: tuple[Image.Image, ...]
    seconds: float  # 0.0 for an image


@dataclass(frozen=True)
class Answer:
    """What the model said; `finished` is False where it was cut off at the length limit."""

    text: str
    finished: bool


def look_at(clip: ClipSource, frames: int, longest_side: int) -> Look:
    """`frames` stills (fewer where there are fewer): the middles of as many equal parts of the clip's range.

    Raises ClipError where the file cannot be read or the range holds no frame.
    """
    info = _probed(clip.path)
    if info.is_image:
        wanted, seconds = [0], 0.0
    else:
        wanted, seconds = _evenly_spaced(info, clip, frames)
    return Look(tuple(Image.fromarray(still) for still in read_stills(clip, info, wanted, longest_side)), seconds)


_probed: Callable[..., ClipInfo] = lru_cache(maxsize=2)(probe)  # many clips of one film: its time stamps are read once


def _evenly_spaced(info: ClipInfo, clip: ClipSource, frames: int) -> tuple[list[int], float]:
    """(ascending indices into the source's frames, seconds of the range)."""
    first = bisect_left(info.times, clip.start - _SAME_TIME)
    stop = len(info.times) if clip.end is None else bisect_left(info.times, clip.end - _SAME_TIME)
    if first >= stop:
        message = f"{clip.name}: no frame between {clip.start:g} s and {clip.end} s of {info.duration:.3f} s; mend the range"
        raise ClipError(message)
    begin = info.times[first]
    seconds = info.times[stop - 1] + info.frame_seconds - begin
    middles = [begin + (part + 0.5) * seconds / frames for part in range(frames)]
    return sorted({max(first, bisect_left(info.times, middle, first, stop) - 1) for middle in middles}), seconds


@dataclass(frozen=True)
class Captioner:
    """A chat model on its device, with the length its answers may have."""

    name: str  # id@revision
    model: Any
    processor: Any
    answer_tokens: int

    @torch.inference_mode()
    def ask(self, looks: Sequence[Look], instruction: str | None = None) -> list[Answer]:
        """One answer per look, all asked as one batch; `instruction` replaces the built-in ones.

        Greedy. In bf16 the last bits depend on what a clip is batched with, and so, rarely, may a word.
        """
        inputs = self.processor.apply_chat_template(
            [_conversation(look, instruction) for look in looks],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        end = self._ends()
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.answer_tokens,
            eos_token_id=end,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        told = self.model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(told, skip_special_tokens=True)
        return [Answer(text, bool(set(row) & set(end))) for text, row in zip(texts, told.tolist(), strict=True)]

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's own settings know more than its tokenizer does."""
        known = self.model.generation_config.eos_token_id
        ends = known if isinstance(known, list) else [known]
        return [end for end in {*ends, self.processor.tokenizer.eos_token_id} if end is not None]


def _conversation(look: Look, instruction: str | None) -> list[dict[str, Any]]:
    request = instruction or (INSTRUCTION if look.seconds else INSTRUCTION_FOR_PICTURES)
    opening = _OPENING.format(count=len(look.pictures), seconds=look.seconds) if look.seconds else ""
    pictures = [{"type": "image", "image": picture} for picture in look.pictures]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": opening + request}]}]


def load_captioner(
    found: Pretrained, device: str, *, quantisation: Literal["none", "4bit"] = "none", answer_tokens: int = 320
) -> Captioner:
    """A chat model that takes several pictures; bf16 on a GPU, float32 on a CPU.

    Raises UserError where it is none, where its files are damaged, or where it needs a package that is not installed.
    """
    processor = load_picture_processor(found)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"  # answers grow on the right; padding there would stand in between
    options: dict[str, Any] = {"dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    if quantisation == "4bit":
        # The vision tower is a tenth of the weights and has to read small things: it stays as it is.
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=options["dtype"],
            llm_int8_skip_modules=[".*visual", ".*vision_tower", ".*vision_model", "lm_head"],
        )
        options |= {"quantization_config": nf4, "device_map": {"": device}}
    model = load_model(AutoModelForImageTextToText.from_pretrained, found, device, **options)
    return Captioner(found.label, model, processor, answer_tokens)
