"""Prompts through T5, for sampling."""

from collections.abc import Iterable
from dataclasses import dataclass

from mochi_lora.config.schema import EncodeConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.model.text import TextEncoder, Tokenised, refuse_foreign

# What `encode.text_batch` is unless somebody sets it, and no setting: beside the weights eight captions take next to nothing
# (0.04 GiB beside 9.08, benchmarks/results/encode.jsonl), and which prompts share a padded batch shows in the last bits of a
# video, whose file does not remember it.
_AT_ONCE = EncodeConfig().text_batch


@dataclass(frozen=True)
class Embedded:
    """Every prompt's embedding, and what T5 made of its words."""

    embeddings: dict[str, TextEmbedding]
    told: dict[str, Tokenised]


def embed_prompts(encoder: TextEncoder, prompts: Iterable[str]) -> Embedded:
    """Each prompt once, a few at a time in sorted order: the same prompts make the same bits, whoever asks.

    Raises UserError for a prompt of which T5 knows no token.
    """
    distinct = sorted(set(prompts))
    told = encoder.tokenise(distinct)
    refuse_foreign(distinct, told)
    batches = (distinct[start : start + _AT_ONCE] for start in range(0, len(distinct), _AT_ONCE))
    embeddings = [embedding for batch in batches for embedding in encoder.embed(batch)]
    return Embedded(dict(zip(distinct, embeddings, strict=True)), dict(zip(distinct, told, strict=True)))
