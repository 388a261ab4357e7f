"""The processor of a chat model that is shown pictures: template, tokenizer and Pillow's picture processor, no torchvision."""

from inspect import signature
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mochi_lora.errors import UserError
from mochi_lora.measures.pretrained import Pretrained

_VIDEO_ARGUMENT = ["image_processor", "tokenizer", "video_processor"]


def load_picture_processor(found: Pretrained) -> Any:  # noqa: ANN401 - transformers is untyped
    """Chat template, tokenizer and picture processor (Pillow's) of a chat model. Raises UserError where one is missing.

    Qwen's processors (transformers 5.23) insist on a video processor, and there is none without torchvision; we show no
    videos, so the class is made anew without that argument.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(found.folder, **options)
        processor = _processor_class(config).from_pretrained(found.folder, backend="pil", **options)
    except ImportError as error:
        message = f"{found.label} ({found.purpose}): its processor needs a package that is not installed: {str(error).strip()}"
        raise UserError(message) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{found.label} ({found.purpose}): its processor cannot be loaded: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{found.label} ({found.purpose}): it has no chat template; choose an instruction-tuned model")
    return processor


def _processor_class(config: PreTrainedConfig) -> Any:  # noqa: ANN401
    known = PROCESSOR_MAPPING.get(type(config), None)
    if known is None or [*signature(known.__init__).parameters][1:4] != _VIDEO_ARGUMENT:
        return AutoProcessor

    class PicturesOnly(known):  # type: ignore[misc, valid-type]  # transformers reads the parts from this signature
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:  # noqa: ANN401
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return PicturesOnly
