"""A vision-language model of hub layout, half a megabyte: Qwen3-VL's classes with a byte tokenizer.

Random weights see their pictures but talk nonsense. A scripted one says its sentence whatever it sees: attention and MLPs
add nothing, so that the last token alone chooses the next one, and the sentence is one token.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WIDTH, PATCH = 64, 16  # bitsandbytes quantises 64 weights together
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, _, END, OPEN, CLOSE, PICTURE, VIDEO = SPECIAL
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_captioner(folder: Path, says: str | None = None, seed: int = 0) -> Path:
    """Random weights, or with `says` a model that says just that and stops."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(says)
    model = Qwen3VLForConditionalGeneration(_config(tokenizer))
    model.generation_config.update(do_sample=True, temperature=0.7)  # as on the hub: must not be obeyed
    if says is not None:
        _script(model, [tokenizer("\n")["input_ids"][-1], *tokenizer.convert_tokens_to_ids([says, END])])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 1 << 20}
    Qwen2VLImageProcessorPil(patch_size=PATCH, size=size).save_pretrained(folder)
    # As on the hub: the name of torchvision's class, and a video processor that cannot be loaded without torchvision.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _tokenizer(sentence: str | None) -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, additional_special_tokens=list(SPECIAL)
    )
    if sentence is not None:
        tokenizer.add_tokens([sentence])
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    text = {
        **shape,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }
    vision = {
        **shape,
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    tokens = {"image_token_id": ids[PICTURE], "video_token_id": ids[VIDEO]}
    tokens |= {"vision_start_token_id": ids[OPEN], "vision_end_token_id": ids[CLOSE]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)


def _script(model: Qwen3VLForConditionalGeneration, chain: list[int]) -> None:
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        head.zero_()
        for token, following in pairwise(chain):
            head[following] = table[token] / table[token].norm()
