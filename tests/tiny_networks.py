"""Random networks of hub layout, a few kilobytes each: towers, tokenizers, processors, saved as a download would be."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
    XCLIPConfig,
    XCLIPModel,
    XCLIPTextConfig,
    XCLIPVisionConfig,
)

SIDE, PATCH, LONGEST = 32, 16, 12
WORDS = "a cat dog red blue ball runs . yes no Does this video show : ? Answer or These are frames of one in order time , USER"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
TEXT |= {"max_position_embeddings": LONGEST, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def frames(count=4, height=48, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save_processor(folder: Path) -> None:
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    unknown, first, last = ["<unk>", "<s>", "</s>"]
    names = [unknown, first, last, *extra, *WORDS.split()]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"additional_special_tokens": list(extra)} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, bos_token=first, eos_token=last, pad_token=last, **special
    )


def save(model: torch.nn.Module, folder: Path, *, text: bool = True) -> Path:
    model.save_pretrained(folder)
    save_processor(folder)
    if text:
        tokenizer().save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=CLIPTextConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), projection_dim=16)
    return save(CLIPModel(config), folder)


def siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(
        SiglipModel(SiglipConfig(text_config=SiglipTextConfig(**TEXT), vision_config=SiglipVisionConfig(**VISION))), folder
    )


def xclip(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = XCLIPVisionConfig(
        **VISION, num_frames=4, mit_hidden_size=16, mit_intermediate_size=32, mit_num_hidden_layers=1, mit_num_attention_heads=2
    )
    config = XCLIPConfig(
        text_config=XCLIPTextConfig(**TEXT),
        vision_config=vision,
        projection_dim=16,
        prompt_num_attention_heads=2,
        prompt_layers=1,
    )
    return save(XCLIPModel(config), folder)


def dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    return save(Dinov2Model(config), folder, text=False)


def dino(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(ViTModel(ViTConfig(**VISION), add_pooling_layer=False), folder, text=False)


def llava(folder: Path) -> Path:
    torch.manual_seed(0)
    chat = tokenizer("<image>")
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
        max_position_embeddings=256,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=3,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    size = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    processor = LlavaProcessor(
        pictures,
        chat,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder
