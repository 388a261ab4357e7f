"""The tiny model: the same for the same seed, loadable by stock diffusers, and not degenerate."""

import inspect

import pytest
import torch
from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

from mochi_lora import spec
from mochi_lora.errors import UserError
from mochi_lora.model.tiny import TEXT_WIDTH, build_tiny

MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def transformer(folder):
    return MochiTransformer3DModel.from_pretrained(folder / "transformer").eval()


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_writes_the_same_bytes_whatever_the_global_random_state(folder, tmp_path):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = build_tiny(tmp_path / "again", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert _content(again) == _content(folder)
    assert sum(map(len, _content(folder).values())) < MOST_BYTES


@pytest.mark.parametrize(
    "weights", ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
)
def test_another_seed_is_another_model(folder, tmp_path, weights):
    other = build_tiny(tmp_path / "other", seed=4)
    assert (other / f"{weights}.safetensors").read_bytes() != (folder / f"{weights}.safetensors").read_bytes()


def test_a_finished_folder_is_kept_and_a_foreign_one_refused(tmp_path):
    folder = build_tiny(tmp_path / "tiny", seed=0)
    stamp = (folder / "model_index.json").stat().st_mtime_ns
    assert build_tiny(folder, seed=0) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="not the tiny model of seed 1"):
        build_tiny(folder, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine: exists"):
        build_tiny(tmp_path / "mine", seed=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("mochi_lora.data.whole_folder.write_json", fail)
    with pytest.raises(OSError, match="no space"):
        build_tiny(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_stock_diffusers_samples_from_it(folder):
    pipe = MochiPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.invert_sigmas
    frames = [
        pipe(
            prompt,
            num_frames=7,
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=4.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames
        for prompt in ("a dog on grass", "a boat at night")
    ]
    assert frames[0].shape == (1, 7, 3, 16, 16)
    assert torch.isfinite(frames[0]).all()
    assert (frames[0] - frames[1]).abs().max() > 0.01


def test_the_velocity_depends_on_text_time_and_place(transformer):
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 2, 4, 6, generator=draw)
    text, other_text = torch.randn(2, 1, 8, TEXT_WIDTH, generator=draw)
    valid = torch.ones(1, 8, dtype=torch.bool)

    @torch.no_grad()
    def velocity(latents, text, time, valid=valid):
        return transformer(latents, text, torch.tensor([time]), valid, return_dict=False)[0]

    usual = velocity(latents, text, 500.0)
    assert 0.5 < usual.std() < 2
    flipped = velocity(latents.flip(-1), text, 500.0).flip(-1)
    for name, changed in {
        "text": velocity(latents, other_text, 500.0),
        "null prompt": velocity(latents, text, 500.0, ~valid),
        "time": velocity(latents, text, 300.0),
        "place": flipped,
    }.items():
        assert (changed - usual).std() > 0.1, f"the velocity hardly depends on {name}"


def test_every_adaptable_linear_has_dimensions_that_quantisation_takes(transformer):
    linears = [module for module in transformer.transformer_blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert {size % 32 for linear in linears for size in linear.weight.shape} == {0}


def test_the_vae_has_mochis_compression_and_a_posterior_with_signal_in_it(folder):
    vae = AutoencoderKLMochi.from_pretrained(folder / "vae").eval()
    published = inspect.signature(AutoencoderKLMochi.__init__).parameters
    assert tuple(vae.config.latents_mean) == published["latents_mean"].default
    assert tuple(vae.config.latents_std) == published["latents_std"].default
    pixels = torch.rand(1, 3, 13, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, *spec.Bucket(13, 32, 48).latent_shape)
    assert decoded.shape == pixels.shape
    assert 0.5 < posterior.mean.std() < 2
    assert -8 < posterior.logvar.mean() < -4
