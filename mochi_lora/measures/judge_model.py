"""A vision-language model asked whether the clip shows the prompt: the second tier, when cosines are not enough.

The score is P(yes) / (P(yes) + P(no)) of the first word of the answer: VQAScore's idea (Lin et al., 2404.01291) with any
model of transformers' image-text-to-text kind. Divided, because models differ in how much they say besides yes and no.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mochi_lora.errors import UserError
from mochi_lora.measures.encoders import check_frames, choose_frames
from mochi_lora.measures.picture_processor import load_picture_processor
from mochi_lora.measures.pretrained import Pretrained, load_model

_FRAMES = 8
_QUESTION = "These are frames of one video, in order of time. Does this video show: {prompt}? Answer yes or no."
_YES, _NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")


@dataclass(frozen=True)
class JudgeModel:
    """An `Aligner` whose score is a probability."""

    name: str
    model: Any
    processor: Any
    yes: tuple[int, ...]  # tokens of every spelling
    no: tuple[int, ...]
    comparable: bool = True

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - even spacing
        """float32 [P] in [0, 1]; up to 8 evenly spaced frames are shown, one prompt at a time."""
        check_frames(frames)
        pictures = [Image.fromarray(frame) for frame in frames[choose_frames(len(frames), _FRAMES)]]
        return np.array([self._probability(pictures, prompt) for prompt in prompts], np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:  # noqa: ARG002 - of the protocol
        """None: a prompt is nothing beside the pictures."""
        return 0

    def _probability(self, pictures: Sequence[Image.Image], prompt: str) -> float:
        question = {"type": "text", "text": _QUESTION.format(prompt=prompt.rstrip(". "))}
        content = [*({"type": "image", "image": picture} for picture in pictures), question]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, -1].float()
        # Of these tokens only: a model that would rather say something else still leans one way.
        either = logits[[*self.yes, *self.no]].softmax(dim=0)
        return float(either[: len(self.yes)].sum())


def load_judge(found: Pretrained, device: str | torch.device) -> JudgeModel:
    """A chat model that takes several pictures. UserError where it is none, or its processor needs what is not installed."""
    processor = load_picture_processor(found)
    yes, no = _first_tokens(processor.tokenizer, _YES), _first_tokens(processor.tokenizer, _NO)
    if not yes or not no or set(yes) & set(no):
        raise UserError(f"{found.label} ({found.purpose}): its tokenizer cannot tell yes from no by the first token")
    model = load_model(AutoModelForImageTextToText.from_pretrained, found, device)
    return JudgeModel(found.label, model, processor, yes, no)


def _first_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:  # noqa: ANN401 - transformers is untyped
    """First tokens of the spellings that are one token and known: half a word could be the beginning of another."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return tuple(sorted({tokens[0] for tokens in ids if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id}))
