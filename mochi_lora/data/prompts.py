"""Embeddings of prompts, wherever they come from."""

from dataclasses import dataclass
from typing import Protocol

from mochi_lora.data.cache import Cache
from mochi_lora.data.index import Index, prompt_key
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError


class PromptEmbeddings(Protocol):
    """A prompt in, its embedding out; the empty prompt is the null condition (no valid token)."""

    def __call__(self, prompt: str) -> TextEmbedding:
        """Embed, or look up, one prompt."""
        ...


@dataclass(frozen=True)
class CachedPrompts:
    """Prompts that `encode` embedded beside the captions: training never loads T5."""

    cache: Cache
    index: Index

    def __call__(self, prompt: str) -> TextEmbedding:
        """Raises UserError for a prompt that was not embedded."""
        key = prompt_key(self.index, prompt)
        if not self.cache.holds("text", key):
            message = (
                f"prompt {prompt!r} of sample is not in the cache {self.cache.root}; run encode again with this configuration"
            )
            raise UserError(message)
        return self.cache.read_text(key)
