"""The text encoder: Genmo's rules for captions, and every way a folder can be wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_lora.errors import UserError
from mochi_lora.inference.prompts import embed_prompts
from mochi_lora.model.text import TextEncoder, load_tokenizer
from mochi_lora.model.tiny import TEXT_WIDTH, build_tiny

CPU = torch.device("cpu")
REAL_TOKENIZER = os.environ.get("MOCHI_T5_TOKENIZER", "")
needs_real_tokenizer = pytest.mark.skipif(
    not REAL_TOKENIZER, reason="set MOCHI_T5_TOKENIZER to the tokenizer folder of google/t5-v1_1-xxl or Mochi"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def encoder(base):
    return TextEncoder.load(base, device=CPU, precision="fp32")


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_an_embedding_does_not_depend_on_its_batch(encoder):
    captions = ["a dog", "a watercolor painting of a fox running through the snow, wide shot", "a cat sits by the window"]
    together = encoder.embed(captions)
    for caption, batched in zip(captions, together, strict=True):
        alone = encoder.embed([caption])[0]
        assert alone.length == batched.length == len(encoder.tokenise([caption])[0].ids)
        torch.testing.assert_close(alone.tokens, batched.tokens, rtol=0, atol=1e-5)
    assert together[0].tokens.dtype == torch.float32
    assert together[0].tokens.shape == (3, TEXT_WIDTH)


def test_an_embedding_is_what_stock_t5_gives_under_padding_and_mask(base, encoder):
    from transformers import T5EncoderModel, T5Tokenizer

    caption = "a boat on the sea at sunrise"
    tokens = T5Tokenizer.from_pretrained(base / "tokenizer")(
        [caption], padding="max_length", max_length=256, return_tensors="pt"
    )
    model = T5EncoderModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        padded = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
    valid = padded[tokens.attention_mask[0].bool()]
    torch.testing.assert_close(encoder.embed([caption])[0].tokens, valid, rtol=0, atol=1e-5)


def test_the_empty_caption_has_no_tokens_and_leaves_its_neighbours_alone(encoder):
    empty, dog, blank = encoder.embed(["", "a dog", " \n "])
    assert empty.tokens.shape == blank.tokens.shape == (0, TEXT_WIDTH)
    torch.testing.assert_close(dog.tokens, encoder.embed(["a dog"])[0].tokens, rtol=0, atol=1e-5)
    assert encoder.embed([]) == []


def test_a_prompt_makes_the_same_bits_whoever_is_asked_beside_it(encoder):
    """A video that is made anew, or judged against one made with other prompts, starts from the very same numbers; and a file
    of prompts may be of any length, the GPU's memory is not.
    """
    prompts = ["", *(f"a {'very ' * (number % 7)}red ball rolls past {number} dogs" for number in range(12))]
    rows = []
    hook = encoder._model.register_forward_pre_hook(
        lambda _model, _arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    try:
        found = embed_prompts(encoder, [*prompts, *prompts])
    finally:
        hook.remove()
    assert rows == [1] * (len(prompts) - 1), "each prompt once, the empty one never"
    assert found.embeddings.keys() == found.told.keys() == set(prompts)
    batched = encoder.embed(prompts)
    assert any(
        not torch.equal(found.embeddings[prompt].tokens, other.tokens) for prompt, other in zip(prompts, batched, strict=True)
    )
    for prompt, other in zip(prompts, batched, strict=True):
        assert torch.equal(found.embeddings[prompt].tokens, embed_prompts(encoder, [prompt]).embeddings[prompt].tokens)
        torch.testing.assert_close(found.embeddings[prompt].tokens, other.tokens, rtol=0, atol=1e-5)
        assert len(found.told[prompt].ids) == max(1, other.length)


def test_captions_are_stripped(encoder):
    assert torch.equal(encoder.embed(["  a dog\n"])[0].tokens, encoder.embed(["a dog"])[0].tokens)


def test_a_caption_of_256_tokens_is_whole_and_one_of_257_is_truncated(encoder):
    whole, cut = encoder.tokenise(["dog " * 255, "dog " * 256])
    assert (len(whole.ids), whole.truncated) == (256, False)
    assert (len(cut.ids), cut.truncated) == (256, True)
    assert cut.ids[-1] == 1, "a cut caption still ends with </s>"
    assert encoder.embed(["dog " * 256])[0].length == 256


def test_unknown_tokens_are_counted_without_the_end_mark_and_lone_spaces(encoder):
    known, half, none, empty = encoder.tokenise(["a dog", "dog \u72d0", "\u4e00\u53ea \u72d0\u72f8", ""])
    assert [known.unknown_share, half.unknown_share, none.unknown_share, empty.unknown_share] == [0, 0.5, 1, 0]


def test_bf16_is_close_to_fp32_and_comes_back_as_float32(base, encoder):
    half = TextEncoder.load(base, device=CPU, precision="bf16").embed(["a red ball"])[0].tokens
    full = encoder.embed(["a red ball"])[0].tokens
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() / full.norm() < 0.03


def test_int8_is_close_to_fp32(base, encoder):
    pytest.importorskip("bitsandbytes")
    eighth = TextEncoder.load(base, device=CPU, precision="int8")
    full = encoder.embed(["a red ball"])[0].tokens
    found = eighth.embed(["a red ball"])[0].tokens
    assert any(parameter.dtype == torch.int8 for parameter in eighth._model.parameters())
    assert 0 < (found - full).norm() / full.norm() < 0.1


def test_the_surrounding_autocast_does_not_reach_the_encoder(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.embed(["a dog"])[0].tokens
    assert torch.equal(inside, encoder.embed(["a dog"])[0].tokens)


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder"])
def test_a_missing_component_is_named(copy, component):
    shutil.rmtree(copy / component)
    with pytest.raises(UserError, match=f"copy has no folder {component}"):
        TextEncoder.load(copy, device=CPU, precision="fp32")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("tokenizer/tokenizer.json", "no tokenizer.json and no spiece.model"),
        ("text_encoder/config.json", "no config.json"),
        ("text_encoder/model.safetensors", "no model.safetensors and no model.safetensors.index.json"),
    ],
)
def test_a_missing_file_is_named(copy, file, named):
    (copy / file).unlink()
    with pytest.raises(UserError, match=named):
        TextEncoder.load(copy, device=CPU, precision="fp32")


def test_the_tokenizer_that_knows_nothing_is_refused(tmp_path):
    from transformers import T5Tokenizer

    T5Tokenizer().save_pretrained(tmp_path)  # what transformers 5 makes of T5Tokenizer(vocab_file=...)
    with pytest.raises(UserError, match="104 tokens to which every token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] += [[f"\u2581more{index}", -9.0] for index in range(100)]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 325 tokens, the text_encoder's table 256 rows"):
        TextEncoder.load(copy, device=CPU, precision="fp32")


def test_missing_weights_are_refused_not_drawn_at_random(copy):
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    gone = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=gone):
        TextEncoder.load(copy, device=CPU, precision="fp32")


def test_an_overflow_is_an_error_naming_the_caption(copy):
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"].fill_(float("inf"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="overflowed on caption 'a dog'"):
        TextEncoder.load(copy, device=CPU, precision="fp32").embed(["a dog"])


@needs_real_tokenizer
def test_the_real_t5_tokenizer_gives_t5s_ids(base):
    tokenizer = load_tokenizer(Path(REAL_TOKENIZER))
    encoder = TextEncoder(torch.nn.Linear(1, 1), tokenizer, TEXT_WIDTH)
    fox, chinese = encoder.tokenise(["a watercolor painting of a fox running", "\u4e00\u53ea\u72d0\u72f8\u5728\u5954\u8dd1"])
    assert fox.ids == (3, 9, 27610, 3924, 13, 3, 9, 3, 20400, 1180, 1)
    assert fox.unknown_share == 0
    assert chinese.unknown_share == 1


def test_a_full_gpu_is_not_told_as_a_damaged_download(base, monkeypatch) -> None:
    """An int8 T5 is loaded straight onto the GPU."""

    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mochi_lora.model.text.T5EncoderModel.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        TextEncoder.load(base, device=torch.device("cpu"), precision="fp32")
