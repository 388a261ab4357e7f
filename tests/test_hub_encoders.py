import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny_networks
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_networks import frames
from transformers import CLIPModel

from mochi_lora.errors import UserError
from mochi_lora.measures.backbones import load_aligner, load_image_encoder, load_style, load_vision_language_judge
from mochi_lora.measures.encoders import choose_frames, exactly, unit_rows
from mochi_lora.measures.pretrained import Pretrained, load_model
from mochi_lora.measures.video_text import PeAligner

PROMPTS = ("a red ball", "a blue cat runs")
LONG = "a red ball runs . " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dino"])
def test_frames_are_embedded_one_by_one_whatever_their_batch(folder, kind):
    encoder = load_image_encoder(str(getattr(tiny_networks, kind)(folder / kind)), "cpu")
    many = frames(19)
    rows = encoder.embed(many)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.allclose(rows[17], encoder.embed(many[17:18])[0], atol=1e-5)
    assert not np.allclose(rows[0], rows[1], atol=1e-4)
    assert encoder.comparable
    assert encoder.name.startswith(f"{kind}@")


def test_clip_embeddings_are_those_of_the_joint_model(folder):
    path = tiny_networks.clip(folder / "joint")
    encoder = load_image_encoder(str(path), "cpu")
    pixels = encoder.processor(images=list(frames(3)), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = CLIPModel.from_pretrained(path).eval().get_image_features(pixel_values=pixels).pooler_output
    assert np.allclose(encoder.embed(frames(3)), unit_rows(expected.numpy()), atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "xclip"])
def test_a_prompts_score_does_not_depend_on_the_others(folder, kind):
    aligner = load_aligner(str(getattr(tiny_networks, kind)(folder / f"{kind}-pair")), "cpu")
    scores = aligner.scores(frames(9), 30.0, PROMPTS)
    alone = [aligner.scores(frames(9), 30.0, [prompt])[0] for prompt in PROMPTS]
    assert scores.dtype == np.float32
    assert np.allclose(scores, alone, atol=1e-5)
    assert scores[0] != scores[1]
    assert np.all(np.abs(scores) <= 1 + 1e-6)


def test_x_clip_scores_are_its_logits_without_their_scale(folder):
    aligner = load_aligner(str(tiny_networks.xclip(folder / "xclip-logits")), "cpu")
    clip = frames(4)
    tokens = aligner.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    pixels = aligner.processor(images=list(clip), return_tensors="pt")["pixel_values"][None]
    with torch.inference_mode():
        logits = aligner.model(pixel_values=pixels, **tokens).logits_per_video[0] / aligner.model.logit_scale.exp()
    assert np.allclose(aligner.scores(clip, 30.0, PROMPTS), logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "xclip"])
def test_long_prompts_are_cut_and_counted(folder, kind):
    aligner = load_aligner(str(getattr(tiny_networks, kind)(folder / f"{kind}-long")), "cpu")
    assert aligner.truncated([*PROMPTS, LONG]) == 1
    scores = aligner.scores(frames(4), 30.0, [LONG, LONG + "cat dog"])
    assert scores[0] == pytest.approx(scores[1])  # they differ only where nobody reads


def test_the_judge_says_yes_as_often_as_its_logits(folder):
    judge = load_vision_language_judge(str(tiny_networks.llava(folder / "llava")), "cpu")
    before = judge.scores(frames(3), 30.0, PROMPTS)
    assert np.all((before > 0) & (before < 1))
    with torch.no_grad():
        head = judge.model.get_output_embeddings()
        head.weight[list(judge.yes)] = head.weight[list(judge.no)]
    assert judge.scores(frames(3), 30.0, PROMPTS) == pytest.approx(0.5)


def test_the_judge_sees_the_pictures(folder):
    judge = load_vision_language_judge(str(tiny_networks.llava(folder / "llava-sees")), "cpu")
    assert judge.scores(frames(3), 30.0, PROMPTS)[0] != judge.scores(frames(3, seed=1), 30.0, PROMPTS)[0]


def test_a_judge_without_a_chat_template_is_refused(folder):
    with pytest.raises(UserError, match=r"chat template|processor"):
        load_vision_language_judge(str(tiny_networks.clip(folder / "no-chat")), "cpu")


class Recorder:
    """Stands for PE-AV, whose tower needs timm: answers with fixed embeddings and keeps what it was asked."""

    device = torch.device("cpu")

    def __call__(self, *, input_ids, attention_mask, pixel_values_videos):
        self.pixels = pixel_values_videos
        outputs = torch.nn.Module()
        outputs.video_embeds = torch.tensor([[3.0, 0.0]])
        outputs.text_video_embeds = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
        return outputs


def test_pe_av_scores_by_cosine_and_sees_sixteen_squeezed_frames():
    model = Recorder()
    aligner = PeAligner("pe@0", model, tiny_networks.tokenizer(), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    white = np.full((40, 48, 80, 3), 255, np.uint8)
    assert aligner.scores(white, 30.0, PROMPTS).tolist() == [1.0, 0.0]
    assert model.pixels.shape == (1, 16, 3, 8, 8)
    assert torch.all(model.pixels == 1)


def test_style_takes_any_image_tower(folder):
    assert load_style(str(tiny_networks.dinov2(folder / "dino-style")), "cpu").embed(frames(2)).shape == (2, 32)


# --- what cannot be had -----------------------------------------------------------------------------------------------


def test_what_is_not_on_disk_and_cannot_be_fetched_is_named_with_its_purpose(monkeypatch):
    asked = []

    def offline(repository, **options):
        asked.append(options["local_files_only"])
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"(?s)openai/clip.*background consistency.*builtin:"):
        load_image_encoder("openai/clip-vit-base-patch32", "cpu", "background consistency")
    assert asked == [True, False]


def test_the_hub_is_not_asked_for_what_is_on_disk(monkeypatch, folder):
    stored = tiny_networks.dinov2(folder / "models--x--y" / "snapshots" / "0123456789abcdef")
    asked = []

    def on_disk(repository, **options):
        asked.append((repository, options["revision"], options["local_files_only"]))
        return str(stored)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", on_disk)
    assert load_image_encoder("x/y@v1", "cpu").name == "x/y@0123456789ab"
    assert asked == [("x/y", "v1", True)]


def test_half_a_download_is_not_taken_for_the_model(monkeypatch, folder):
    half = folder / "half"
    half.mkdir()
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(half))
    with pytest.raises(UserError, match=r"model-2\.safetensors missing"):
        load_image_encoder("x/y", "cpu")


def test_pickled_weights_are_refused(tmp_path):
    path = tiny_networks.dinov2(tmp_path / "pickled")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        load_image_encoder(str(path), "cpu")


def test_a_missing_weight_is_refused_instead_of_drawn_at_random(tmp_path):
    path = tiny_networks.dinov2(tmp_path / "hole")
    weights = load_file(path / "model.safetensors")
    gone = next(name for name in weights if "fc1.weight" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing"):
        load_image_encoder(str(path), "cpu")


def test_cut_off_weights_are_refused_by_name(tmp_path):
    path = tiny_networks.dinov2(tmp_path / "cut")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut@"):
        load_image_encoder(str(path), "cpu")


def test_a_network_of_another_kind_is_refused(tmp_path):
    path = tiny_networks.dinov2(tmp_path / "dino")
    with pytest.raises(UserError, match="dinov2 cannot be used"):
        load_aligner(str(path), "cpu")


def test_a_copy_under_the_same_name_with_other_weights_has_another_name(tmp_path):
    path = tiny_networks.dinov2(tmp_path / "net")
    name = load_image_encoder(str(path), "cpu").name
    weights = load_file(path / "model.safetensors")
    save_file({key: tensor + 0.1 for key, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"})
    assert load_image_encoder(str(path), "cpu").name != name
    shutil.rmtree(path)
    with pytest.raises(UserError, match="not there"):
        load_image_encoder(str(path), "cpu")


@pytest.mark.parametrize("load", [load_image_encoder, load_style, load_aligner, load_vision_language_judge])
def test_an_unknown_builtin_is_refused_with_what_there_is(load):
    with pytest.raises(UserError, match="built-in one"):
        load("builtin:vgg", "cpu")


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "wanted", "expected"), [(5, 3, [0, 2, 4]), (2, 8, [0, 1]), (1, 2, [0]), (37, 2, [0, 36])])
def test_frames_are_chosen_evenly_with_both_ends(count, wanted, expected):
    assert choose_frames(count, wanted) == expected


def test_a_short_clip_is_stretched_in_order_where_a_network_wants_a_number():
    assert exactly(2, 4) == [0, 0, 1, 1]
    assert exactly(9, 5) == choose_frames(9, 5)


def test_a_full_gpu_is_not_told_as_a_network_that_cannot_be_loaded() -> None:
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        load_model(full, Pretrained(Path("folder"), "a network", "judging"), "cpu")
