"""The text encoder: captions in, T5 v1.1 embeddings out. The only room that knows a tokenizer.

Genmo's rules (genmoai/mochi @0c86aeb `demos/fine_tuner/embed_captions.py`, `t2v_synth_mochi.py`): captions are stripped,
cut at 256 tokens, encoded with their attention mask and outside autocast; the empty prompt masks every token. Padding is
cut off afterwards: T5's position bias is relative and its padding masked, so the valid tokens do not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from transformers import BitsAndBytesConfig, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.spec import TEXT_TOKENS

Precision = Literal["bf16", "fp32", "int8"]

# int8 keeps what it does not quantise (norms, embedding table, `wo`) in bf16
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_PLAIN_ENGLISH = "a video of a dog"
_WORD_BOUNDARY = "\u2581"  # SentencePiece's visible space; alone it says nothing about whether a word is known


class Tokenizer(Protocol):
    """The little this room needs of a Hugging Face tokenizer."""

    unk_token_id: int
    eos_token_id: int
    vocab_size: int

    def __call__(self, text: list[str], **options: Any) -> Any:  # noqa: ANN401 - a BatchEncoding
        """Token ids per text, under `input_ids`."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """Id of one token."""


@dataclass(frozen=True)
class Tokenised:
    """One caption as T5 sees it."""

    ids: tuple[int, ...]  # at most 256, the closing </s> included
    truncated: bool
    unknown_share: float  # unknown tokens / tokens, not counting </s> and lone spaces; 0 for an empty caption


def load_tokenizer(folder: Path) -> Tokenizer:
    """The T5 tokenizer of a diffusers `tokenizer` folder (`tokenizer.json` or `spiece.model`), without asking the hub.

    Raises UserError naming the folder if neither file is there, or if the result does not know plain English. Both are
    traps of transformers 5: `T5Tokenizer.from_pretrained` of a folder without vocabulary, and `T5Tokenizer(vocab_file=...)`
    of any file, give a 104-token vocabulary that turns every letter into <unk>, and say nothing.
    """
    _require(folder, _TOKENIZER_FILES, "tokenizer")
    tokenizer = cast("Tokenizer", T5Tokenizer.from_pretrained(folder, local_files_only=True))
    share = tokenise(tokenizer, [_PLAIN_ENGLISH])[0].unknown_share
    if share == 1:
        message = (
            f"{folder}: a tokenizer of {tokenizer.vocab_size} tokens to which every token of {_PLAIN_ENGLISH!r} is unknown; "
            "expected T5's (32100 tokens): copy the tokenizer folder of the base model again"
        )
        raise UserError(message)
    return tokenizer


class TextEncoder:
    """A frozen T5 encoder with its tokenizer, on one device. What it is batched with shows in the last bits of an embedding."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, width: int) -> None:
        self._model = model.eval().requires_grad_(False)  # noqa: FBT003 - torch's signature
        self._tokenizer = tokenizer
        self._width = width

    @classmethod
    def load(cls, base: Path, *, device: torch.device, precision: Precision) -> "TextEncoder":
        """Read `tokenizer/` and `text_encoder/` (safetensors only) of a diffusers folder; nothing is fetched.

        `precision` is explicit: transformers 5 would take the stored one. int8 is bitsandbytes', on a GPU or a CPU.
        Raises UserError naming the component and the file that is missing, incomplete or does not fit.
        """
        for component in ("tokenizer", "text_encoder"):
            if not (base / component).is_dir():
                message = f"model.base: {base} has no folder {component}; expected a diffusers layout with {component}/ inside"
                raise UserError(message)
        tokenizer = load_tokenizer(base / "tokenizer")
        model = _load_model(base / "text_encoder", device=device, precision=precision)
        rows = model.config.vocab_size
        if not rows / 2 <= tokenizer.vocab_size <= rows:  # T5 v1.1: 32100 tokens, 32128 rows
            message = (
                f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the text_encoder's table {rows} rows; "
                "they are not a pair: copy both folders from the same model"
            )
            raise UserError(message)
        return cls(model, tokenizer, model.config.d_model)

    def to(self, device: torch.device) -> None:
        """Move the weights, for offloading. Not for int8, whose weights stay where they were loaded."""
        self._model.to(device)

    def tokenise(self, captions: Sequence[str]) -> list[Tokenised]:
        """Token ids of each caption (stripped first), cut at 256 with </s> kept."""
        return tokenise(self._tokenizer, captions)

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """One float32 CPU embedding [L, D] per caption, in order, all in one batch padded to its longest: callers bound it.

        A caption empty after stripping gives L = 0: Genmo masks every token of it. Raises UserError if an embedding is
        not finite (T5 v1.1's feed-forward overflows float16).
        """
        found = {index: ids for index, ids in enumerate(self._ids(captions)) if ids}
        embeddings = [TextEmbedding(torch.zeros(0, self._width)) for _ in captions]
        if not found:
            return embeddings
        longest = max(map(len, found.values()))
        ids = torch.zeros(len(found), longest, dtype=torch.long)  # 0 is <pad>, masked below
        mask = torch.zeros(len(found), longest, dtype=torch.long)
        for row, tokens in enumerate(found.values()):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        device = next(self._model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            states = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))[0].float().cpu()
        for (index, tokens), state in zip(found.items(), states, strict=True):
            embeddings[index] = TextEmbedding(_finite(state[: len(tokens)].clone(), captions[index]))
        return embeddings

    def _ids(self, captions: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids per caption; none at all for an empty one, whose only token would be </s>."""
        return [item.ids if caption.strip() else () for caption, item in zip(captions, self.tokenise(captions), strict=True)]


def tokenise(tokenizer: Tokenizer, captions: Sequence[str]) -> list[Tokenised]:
    """Token ids of each caption (stripped first), cut at 256 with </s> kept, and what was lost on the way."""
    if not captions:
        return []
    # Not cut by the tokenizer: what it cut off could not be reported. `verbose` would warn about just that.
    rows = tokenizer([caption.strip() for caption in captions], verbose=False)["input_ids"]
    boundary = tokenizer.convert_tokens_to_ids(_WORD_BOUNDARY)
    found = []
    for row in rows:
        words = [token for token in row if token not in (tokenizer.eos_token_id, boundary)]
        unknown = words.count(tokenizer.unk_token_id) / len(words) if words else 0.0
        truncated = len(row) > TEXT_TOKENS
        ids = (*row[: TEXT_TOKENS - 1], tokenizer.eos_token_id) if truncated else tuple(row)
        found.append(Tokenised(ids=ids, truncated=truncated, unknown_share=unknown))
    return found


def refuse_foreign(prompts: Sequence[str], told: Sequence[Tokenised]) -> None:
    """Raises UserError for a prompt of unknown tokens only: to T5 v1.1, any two Chinese prompts are the same."""
    for prompt, item in zip(prompts, told, strict=True):
        if item.unknown_share == 1:
            message = f"prompt {prompt!r}: every token is unknown to T5 (it knows English); translate it"
            raise UserError(message)


def _load_model(folder: Path, *, device: torch.device, precision: Precision) -> T5EncoderModel:
    _require(folder, ("config.json",), "text_encoder")
    _require(folder, _WEIGHT_FILES, "text_encoder")
    options: dict[str, Any] = {"dtype": _DTYPES[precision], "local_files_only": True, "use_safetensors": True}
    if precision == "int8":
        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    transformers_logging.disable_progress_bar()  # a second bar would tear ours
    try:
        model, report = T5EncoderModel.from_pretrained(folder, output_loading_info=True, **options)
    except torch.OutOfMemoryError:  # a RuntimeError, of which the file knows nothing: int8 is loaded straight onto the GPU
        raise
    except (OSError, RuntimeError) as error:  # a missing shard; tensors of another shape
        message = f"{folder}: the text_encoder cannot be read ({error}); is the download complete?"
        raise UserError(message) from error
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        names = ", ".join(sorted(report["missing_keys"])[:3])
        message = f"{folder}: the text_encoder lacks {len(report['missing_keys'])} tensors ({names}, ...); download it again"
        raise UserError(message)
    return model if precision == "int8" else model.to(device)


def _require(folder: Path, names: tuple[str, ...], component: str) -> None:
    if not any((folder / name).is_file() for name in names):
        message = f"{folder}: no {' and no '.join(names)}; the {component} of the base model is missing or incomplete"
        raise UserError(message)


def _finite(tokens: torch.Tensor, caption: str) -> torch.Tensor:
    if not tokens.isfinite().all():
        message = f"the text encoder overflowed on caption {caption[:80]!r}; use encode.text_precision bf16 or fp32"
        raise UserError(message)
    return tokens
