"""Prompts through T5, for sampling."""

from collections.abc import Iterable
from dataclasses import dataclass

from mochi_lora.data.samples import TextEmbedding
from mochi_lora.model.text import TextEncoder, Tokenised, refuse_foreign


@dataclass(frozen=True)
class Embedded:
    """Every prompt's embedding, and what T5 made of its words."""

    embeddings: dict[str, TextEmbedding]
    told: dict[str, Tokenised]


def embed_prompts(encoder: TextEncoder, prompts: Iterable[str]) -> Embedded:
    """Each prompt once, and alone: which prompts share a padded batch shows in the last bits of a video, and who goes on with
    half of them, or asks for more, has to come to the same ones.

    Raises UserError for a prompt of which T5 knows no token.
    """
    distinct = sorted(set(prompts))
    told = encoder.tokenise(distinct)
    refuse_foreign(distinct, told)
    embeddings = {prompt: encoder.embed([prompt])[0] for prompt in distinct}
    return Embedded(embeddings, dict(zip(distinct, told, strict=True)))
