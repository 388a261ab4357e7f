"""How mochi-tiny is made, on a CPU and at a thousandth of its size: the stages, the exam, and the folder that comes out."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import MochiPipeline
from safetensors import safe_open

from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import weight_dtype
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.tiny import tiny_text_encoder, word_tokenizer
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny import exam, pretrain, transformer_stage, vae_stage, world
from mochi_lora.tiny import stage as stage_room
from mochi_lora.tiny.architecture import TRANSFORMER, new_transformer, new_vae
from mochi_lora.tiny.looks import LOOKS
from mochi_lora.tiny.render import render_batch, scene_batch
from mochi_lora.tiny.sentences import pretraining_caption, vocabulary

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    """Fresh, mended and quick, in float32."""
    torch.manual_seed(0)
    return vae_stage._quick(new_vae()).requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(vocabulary())


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(1)
    return tiny_text_encoder(len(tokenizer)).eval()


def shrink(patch):
    """Budgets of a few steps, on a handful of scenes."""
    patch.setattr(vae_stage, "_BUDGET", replace(vae_stage._BUDGET, steps=2, warmup=1))
    patch.setattr(vae_stage, "_POOL", 4)
    patch.setattr(vae_stage, "_CHUNK", 2)
    patch.setattr(vae_stage, "_PHASES", ((1, 1, 7), (0, 2, 1)))
    patch.setattr(vae_stage, "_EXAMINED", 1)
    patch.setattr(transformer_stage, "_BUDGET", replace(transformer_stage._BUDGET, steps=2, warmup=1))
    patch.setattr(transformer_stage, "_BATCH", 4)
    patch.setattr(transformer_stage, "_RUNS", 2)
    patch.setattr(transformer_stage, "_SCENES", 4)
    patch.setattr(pretrain, "_EXAMINED", 2)
    patch.setattr(pretrain, "_STEPS", 2)


# --- the VAE ------------------------------------------------------------------------------------------------------------


def test_the_quick_vae_is_the_mended_one():
    """13 frames: more than a chunk of the group norm, and both temporal strides."""
    torch.manual_seed(0)
    module = new_vae()
    quick = vae_stage._quick(copy.deepcopy(module))
    pixels = torch.rand(3, 13, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mended = MochiVae(module, precision="fp32")
    posterior = mended.encode(pixels)
    with torch.no_grad():
        mean, logvar = quick.encoder(pixels[None])[0][0].chunk(2)
        decoded = quick.decoder(posterior.mean[None])[0][0].clamp(-1, 1)
    assert torch.allclose(mean, posterior.mean, atol=1e-5)
    assert torch.allclose(logvar, posterior.logvar, atol=1e-5)
    assert torch.allclose(decoded, mended.decode(posterior.mean), atol=1e-5)
    assert decoded.std() > 0.01
    assert quick.state_dict().keys() == module.state_dict().keys()
    assert all(parameter.requires_grad for parameter in quick.parameters())


def test_half_of_the_pool_is_what_mochi_tiny_sees_and_half_is_outlines(monkeypatch):
    monkeypatch.setattr(vae_stage, "_CHUNK", 3)
    pool = vae_stage.picture_pool(4, vae_stage.scene_pool(4, 8, CPU))
    drawn = scene_batch([world.draw_scene(4, index, held_out=False) for index in range(8)])
    assert pool.shape == (8, world.FRAMES, world.HEIGHT, world.WIDTH, 3)
    assert torch.equal(pool[:4], render_batch(drawn.part(slice(0, 4)), "base"))
    for style in ("base", "chalk"):
        there = render_batch(drawn.part(slice(4, 8)), style)
        assert all((one.float() - other.float()).abs().mean() > 8 for one, other in zip(pool[4:], there, strict=True))
    assert torch.equal(pool, vae_stage.picture_pool(4, vae_stage.scene_pool(4, 8, CPU)))


def test_clips_of_the_pool_are_runs_of_frames_in_range():
    pool = torch.arange(6)[:, None] * 30 + torch.arange(world.FRAMES)
    pool = pool.to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 2, 2, 3)
    clips = vae_stage.draw_clips(pool, 40, 7, np.random.default_rng(0))
    assert clips.shape == (40, 3, 7, 2, 2)
    values = ((clips[:, 0, :, 0, 0] + 1) * 127.5).round().int()
    assert (values.diff(dim=1) == 1).all()
    assert len(set((values[:, 0] // 30).tolist())) == 6
    assert vae_stage.to_pixels(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1)).flatten().tolist() == [-1, 1]


def test_three_steps_lower_the_vaes_loss(tmp_path, monkeypatch):
    pool = vae_stage.picture_pool(0, vae_stage.scene_pool(0, 4, CPU))
    pixels = vae_stage.to_pixels(pool[:, :1])
    torch.manual_seed(0)
    stage = vae_stage.Stage(tmp_path / "v.pt", {"vae": vae_stage._quick(new_vae())}, betas=(0.9, 0.99), decay=0.9)
    losses = []

    def loss(step):
        torch.manual_seed(1)
        losses.append(vae_stage.vae_loss(stage.modules["vae"], pixels))
        return losses[-1]

    assert stage.run(loss, replace(vae_stage._BUDGET, steps=4, warmup=1, minutes=9.0))
    found = [float(loss.detach()) for loss in losses]
    assert found[-1] < 0.8 * found[0], found


def test_a_killed_call_loses_only_the_steps_since_it_last_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_room, "_SAVE_EVERY", 2)
    begun = stage_room.Stage(tmp_path / "s.pt", {"one": torch.nn.Linear(2, 2)}, betas=(0.9, 0.99), decay=0.9)

    def loss(step):
        if step == 5:
            raise KeyboardInterrupt
        return begun.modules["one"].weight.square().sum()

    with pytest.raises(KeyboardInterrupt):
        begun.run(loss, stage_room.Budget(steps=9, minutes=9.0, warmup=1, learning_rate=0.1))
    again = stage_room.Stage(tmp_path / "s.pt", {"one": torch.nn.Linear(2, 2)}, betas=(0.9, 0.99), decay=0.9)
    assert again.step == 4


def test_the_vaes_exam_knows_a_perfect_one_from_a_fresh_one(vae, monkeypatch):
    monkeypatch.setattr(vae_stage, "_EXAMINED", 2)
    fresh = vae_stage.examine_vae(vae, "base")
    assert fresh["psnr"] < 20

    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encoder(self, pixels):
            return torch.cat([pixels, pixels], dim=1), None

        def decoder(self, latents):
            return latents + 0.02, None

    found = vae_stage.examine_vae(Perfect(), "base")
    assert found["psnr"] == pytest.approx(40, abs=0.7), "an error of 0.02 in a range of 2, less where it is clamped"
    assert {found[word] for word in ("colour", "shape", "motion", "background", "size")} == {1.0}
    assert abs(found["style"]) < 0.1


# --- transformer and text encoder ---------------------------------------------------------------------------------------


def ids_of(tokenizer, *sentences):
    rows = [tokenizer(sentence)["input_ids"] if sentence else [] for sentence in sentences]
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def test_the_null_prompt_is_zero_and_padding_has_no_influence(tokenizer, encoder):
    tokens, lengths = ids_of(tokenizer, "a big red star moves up", "", "a small cross")
    text = transformer_stage.embed(encoder, tokens, lengths)
    assert text.lengths == (int(lengths[0]), 0, int(lengths[2]))
    assert text.tokens.isfinite().all()
    assert (text.tokens[1] == 0).all()
    assert (text.tokens[2, lengths[2] :] == 0).all()
    alone, length = ids_of(tokenizer, "a small cross")
    assert torch.allclose(transformer_stage.embed(encoder, alone, length).tokens[0], text.tokens[2, : lengths[2]], atol=1e-5)
    strange = tokens.clone()
    strange[2, lengths[2] :] = 17
    assert torch.equal(transformer_stage.embed(encoder, strange, lengths).tokens, text.tokens)
    assert text.tokens[0].std() > 0.01


def test_embeddings_are_those_of_the_product(tokenizer, encoder):
    sentences = ["a big red star moves up in front of a grey wall", "", "zzz on dark slate"]
    product = TextBatch.collate(TextEncoder(encoder, tokenizer, 64).embed(sentences))
    ours = transformer_stage.embed(encoder, *ids_of(tokenizer, *sentences))
    assert ours.lengths == product.lengths
    assert torch.allclose(ours.tokens, product.tokens, atol=1e-5)


@pytest.fixture(scope="module")
def lesson(vae, tokenizer):
    drawn, original = [], transformer_stage.draw_scene

    def spy(*arguments, **options):
        drawn.append(original(*arguments, **options))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_stage, "draw_scene", spy)
        patch.setattr(transformer_stage, "_ENCODED_AT_ONCE", 4)
        return transformer_stage.prepare(vae, tokenizer, 0, 6), drawn


def test_a_lesson_holds_latents_and_sentences_of_scenes_that_are_not_held_out(lesson, vae, tokenizer):
    taught, drawn = lesson
    assert len(drawn) == 6
    assert not any(world.is_held_out(s.shape, s.colour, s.background, s.motion) for s in drawn)
    assert {scene.motion for scene in drawn} <= set(world.PRETRAINED_MOTIONS)
    for index, style in ((3, "base"), (5, LOOKS[0])):  # every other chunk of scenes wears a look
        pixels = vae_stage.to_pixels(render_batch(scene_batch([drawn[index]]), style))
        with torch.no_grad():
            mean = vae.encoder(pixels)[0].chunk(2, dim=1)[0]
        assert torch.allclose(mean[0], taught.means[index], atol=1e-4)
    rng = stream(0, Purpose.WORLD, 2**34)
    said = [
        pretraining_caption(scene, rng, None if index < 4 else LOOKS[0]) for index, scene in enumerate(drawn) for _ in range(3)
    ]
    for sentence, row, length in zip(said, taught.tokens.flatten(0, 1), taught.lengths.flatten(), strict=True):
        assert row[:length].tolist() == tokenizer(sentence)["input_ids"]
        assert (row[length:] == 0).all()


def test_the_statistics_are_those_of_draws_from_the_posterior(lesson):
    taught, _ = lesson
    noise = torch.randn(taught.means.shape, generator=torch.Generator().manual_seed(0))
    normal = taught.stats.normalise(taught.means + vae_stage.NOISE * noise)
    assert normal.mean(dim=(0, 2, 3, 4)).abs().max() < 0.02
    assert (normal.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.03


def test_looks_take_turns_and_half_of_all_scenes_wear_one():
    worn = [transformer_stage._look_of(chunk) for chunk in range(4 * len(LOOKS))]
    assert worn[::2] == [None] * 2 * len(LOOKS)
    assert worn[1::2] == [*LOOKS, *LOOKS]


def test_a_batch_has_few_lengths_and_favours_none(monkeypatch):
    monkeypatch.setattr(transformer_stage, "_BATCH", 64)
    lengths = torch.from_numpy(np.random.default_rng(1).integers(5, 30, (500, 3)))
    rng = np.random.default_rng(0)
    counts, kinds = np.zeros(30), []
    for _ in range(400):
        rows, which, found = transformer_stage.draw_rows(lengths, rng)
        assert len(rows) == 64
        assert ((found == lengths[rows, which]) | (found == 0)).all()
        assert (found.diff() >= 0).all()
        kinds.append(len(found.unique()))
        counts += np.bincount(found, minlength=30)
    assert np.mean(kinds) < 17, "of 26"
    shares = counts / counts.sum()
    assert shares[0] == pytest.approx(0.1, abs=0.02), "a tenth is dropped"
    told = np.bincount(lengths.flatten(), minlength=30)[5:] / lengths.numel()
    assert np.abs(shares[5:] / 0.9 / told - 1).max() < 0.2


def test_the_loss_reaches_both_networks_and_rows_come_sorted_by_length(lesson, encoder, monkeypatch):
    monkeypatch.setattr(transformer_stage, "_BATCH", 40)
    taught, _ = lesson
    torch.manual_seed(0)
    model = VelocityModel(new_transformer(), Plan("cpu", "fp32", "auto", "none"))
    text_encoder = copy.deepcopy(encoder).requires_grad_(requires_grad=True)
    seen = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2].lengths))
    loss = transformer_stage.training_loss(model, text_encoder, taught, np.random.default_rng(0))
    loss.backward()
    assert 0.5 < float(loss.detach()) < 10
    assert list(seen[0]) == sorted(seen[0])
    for module in (model.transformer.proj_out, text_encoder.encoder.block[0].layer[0].SelfAttention.q):
        assert module.weight.grad.abs().max() > 0


def test_the_architecture_can_be_split_and_quantised():
    assert TRANSFORMER["num_attention_heads"] % 6 == 0
    linears = [part for part in new_transformer().transformer_blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert {size % 64 for linear in linears for size in linear.weight.shape} == {0}


# --- the exam -----------------------------------------------------------------------------------------------------------


def test_true_pictures_get_full_marks():
    some = exam.exam_scenes(12)
    assert all(world.is_held_out(s.shape, s.colour, s.background, s.motion) for s in some)
    clips = {style: render_batch(scene_batch(some), style).numpy() for style in ("base", "chalk")}
    for style, expected in (("base", 0.0), ("chalk", 1.0)):
        found = exam.marks(clips[style], some)
        assert found.pop("style") == pytest.approx(expected, abs=0.02)
        assert set(found.values()) == {1.0}, style
    assert exam.marks(clips["base"], some[1:] + some[:1])["colour"] < 0.7, "of other scenes they are wrong"


def test_exam_sentences_are_plain_and_always_the_same():
    some = exam.exam_scenes(20)
    assert all(text in set(world.captions(scene)) for text, scene in zip(exam.exam_sentences(some), some, strict=True))
    assert exam.exam_sentences(some)[:5] == exam.exam_sentences(some[:5])


def test_a_drawn_clip_does_not_depend_on_the_others(vae, tokenizer, encoder, monkeypatch):
    torch.manual_seed(5)
    model = VelocityModel(new_transformer().eval(), Plan("cpu", "fp32", "auto", "none"))
    stats = LatentStats((0.1,) * 12, (0.9,) * 12)
    drawer = transformer_stage.Drawer(model, encoder, tokenizer, stats, done=True)
    sentences = exam.exam_sentences(exam.exam_scenes(3))
    together = exam.draw(drawer, vae, sentences, steps=2, guidance=3.0, seed=4)
    monkeypatch.setattr(exam, "_AT_ONCE", 2)
    apart = exam.draw(drawer, vae, sentences, steps=2, guidance=3.0, seed=4)
    assert together.shape == (3, world.FRAMES, world.HEIGHT, world.WIDTH, 3)
    assert np.abs(together.astype(int) - apart).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 5


# --- the whole of it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(statuses of the calls, folder of the states): the first call has no time at all, the second none for stage two."""
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        words, statuses = [str(folder), "--device", "cpu"], []
        for vae_minutes, transformer_minutes in ((0.0, 0.0), (9.0, 0.0), (9.0, 9.0)):
            patch.setattr(vae_stage, "_BUDGET", replace(vae_stage._BUDGET, minutes=vae_minutes))
            patch.setattr(transformer_stage, "_BUDGET", replace(transformer_stage._BUDGET, minutes=transformer_minutes))
            statuses.append(pretrain.main(words))
    return statuses, folder


def stored(path):
    with safe_open(path, framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_a_call_that_has_not_finished_ends_with_3_and_the_last_with_0(made, capsys):
    statuses, folder = made
    assert statuses == [3, 3, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["mochi-tiny", "transformer.pt", "vae.pt"]


@pytest.mark.slow
def test_the_averaged_weights_are_written_in_half_precision_but_for_genmos_list(made):
    _, folder = made
    for part, name, key in (
        ("transformer", "transformer.pt", "transformer"),
        ("vae", "vae.pt", "vae"),
        ("text_encoder", "transformer.pt", "text_encoder"),
    ):
        averages = torch.load(folder / name, weights_only=True)["average"]
        (path,) = (folder / "mochi-tiny" / part).glob("*.safetensors")
        weights = stored(path)
        kept = {weight for weight, tensor in weights.items() if tensor.dtype == torch.float32}
        assert {tensor.dtype for tensor in weights.values()} <= {torch.float16, torch.float32}
        assert (
            kept
            == {
                "transformer": {name for name in weights if weight_dtype(name, "bf16") == torch.float32},
                "vae": set(),
                "text_encoder": set(weights),  # stock pipelines open T5 as stored, and the rest in float32
            }[part]
        )
        assert all(torch.equal(tensor, averages[f"{key}.{weight}"].to(tensor.dtype)) for weight, tensor in weights.items())


@pytest.mark.slow
def test_what_is_written_opens_in_stock_diffusers_and_here(made):
    _, folder = made
    model = folder / "mochi-tiny"
    pipe = MochiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red star", num_frames=7, height=32, width=48, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 7, 3, 32, 48)
    assert frames.isfinite().all()
    loaded = load_transformer(model / "transformer", device=CPU, precision="fp32")
    assert loaded.rounded == ()
    (text,) = TextEncoder.load(model, device=CPU, precision="fp32").embed(["a red star moves up"])
    velocity = VelocityModel(loaded.transformer, Plan("cpu", "fp32", "auto", "none"))
    with torch.no_grad():
        out = velocity(torch.zeros(1, 12, 2, 4, 6), torch.ones(1), TextBatch.collate([text]))
    assert out.isfinite().all()
    vae = MochiVae.load(model / "vae", device=CPU, precision="fp32")
    assert vae.stats.mean == tuple(pipe.vae.config.latents_mean)
    assert vae.decode(torch.zeros(12, 2, 4, 6)).isfinite().all()
    assert min(vae.stats.std) >= vae_stage.NOISE


@pytest.mark.slow
def test_a_damaged_state_is_one_line_and_status_1(made, tmp_path, capsys, monkeypatch):
    shrink(monkeypatch)
    (tmp_path / "vae.pt").write_bytes(b"half")
    assert pretrain.main([str(tmp_path), "--device", "cpu"]) == 1
    assert "vae.pt: not the state of a stage; delete it" in capsys.readouterr().err
