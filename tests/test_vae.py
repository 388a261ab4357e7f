"""The VAE against Genmo's own outputs, against an independent encoder, and against the traps of the stock one."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLMochi
from golden_files import load_golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_lora.errors import UserError
from mochi_lora.model import vae as vae_room
from mochi_lora.model.vae import MochiVae

FULL_GOLDEN = os.environ.get("MOCHI_GOLDEN_DIR")
CHANNELS = (32, 32, 32, 32)  # group norm has 32 groups: no fewer
WIDTHS = (32, 64, 96, 128)  # of the golden VAE
CASES = ["case0", "case1"]  # 1 and 7 frames; of 13 frames only in the full set
CPU = torch.device("cpu")


def small_module() -> AutoencoderKLMochi:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoencoderKLMochi(
            encoder_block_out_channels=CHANNELS, decoder_block_out_channels=CHANNELS, layers_per_block=(1, 1, 1, 1, 1)
        )
        for name, weight in module.named_parameters():
            if "norm" in name:  # as initialised, 1 and 0 would hide a swapped or forgotten affine
                weight.data.add_(0.3 * torch.randn_like(weight))
    return module


def small_vae(*, precision: str = "fp32") -> MochiVae:
    return MochiVae(small_module(), precision=precision)


def clip(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def latents(frames: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(12, frames, height, width, generator=torch.Generator().manual_seed(frames))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- against Genmo's numbers ---


class _Recorded(torch.nn.Module):
    """Stands for a layer whose weights are not kept: takes only what that layer took, gives what it gave; [C, T, H, W]."""

    def __init__(self, taken: torch.Tensor, given: torch.Tensor) -> None:
        super().__init__()
        self.taken, self.given = taken.permute(1, 2, 3, 0), given.permute(1, 2, 3, 0)

    def forward(self, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for chunk in chunks:
            torch.testing.assert_close(chunk, self.taken, atol=1e-5, rtol=1e-5)
            yield chunk.copy_(self.given)


def recorded_layer(golden: dict[str, torch.Tensor], case: str, block: str) -> _Recorded:
    return _Recorded(golden[f"{case}.{block}.in"], golden[f"{case}.{block}.out"])


def fill_half(half: torch.nn.Module, prefix: str, golden: dict[str, torch.Tensor], recorded: Iterable[str]) -> None:
    """Load an encoder's or decoder's weights; only the residual layers of the `recorded` blocks may and must be missing."""
    weights = {name.removeprefix(prefix): weight.float() for name, weight in golden.items() if name.startswith(prefix)}
    missing, surplus = half.load_state_dict(weights, strict=False)
    assert surplus == []
    assert {name.rsplit(".resnets.0.", 1)[0] for name in missing} == set(recorded)


def golden_tail(golden: dict[str, torch.Tensor]) -> AutoencoderKLMochi:
    """The kept half of the golden decoder as a VAE of its own: no layers before the first up-sampling, identity conv_in."""
    module = AutoencoderKLMochi(
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        layers_per_block=(1, 1, 1, 0, 0),
        latent_channels=128,
    )
    start = {"decoder.conv_in.weight": torch.eye(128).view(128, 128, 1, 1, 1), "decoder.conv_in.bias": torch.zeros(128)}
    fill_half(module.decoder, "decoder.", {**golden, **start}, ["up_blocks.1"])
    return module


@pytest.mark.parametrize("case", CASES)
def test_decoding_equals_genmos(case: str) -> None:
    golden, _ = load_golden("vae_decoder_tail")
    vae = MochiVae(golden_tail(golden), precision="fp32")
    vae._decoder.levels[2].layers[0] = recorded_layer(golden, case, "up_blocks.1")
    decoded = vae.decode(golden[f"{case}.hidden"])
    torch.testing.assert_close(decoded, golden[f"{case}.decoded"].clamp(-1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_decodes_something_else(case: str) -> None:
    """Even if its block made of the frames to keep what Genmo's makes, and copies of the first of those it drops too late."""
    golden, _ = load_golden("vae_decoder_tail")
    module, given = golden_tail(golden), golden[f"{case}.up_blocks.1.out"]
    undropped = torch.cat([given[:, :1], given[:, :1], given], dim=1)[None]
    module.decoder.up_blocks[1].resnets[0].register_forward_hook(lambda *_: (undropped, None))
    with torch.no_grad():
        stock = module.decode(golden[f"{case}.hidden"][None]).sample[0].clamp(-1, 1)
    decoded = golden[f"{case}.decoded"].clamp(-1, 1)
    assert stock.shape == decoded.shape
    assert relative_error(stock, decoded) > 0.02


@pytest.mark.parametrize("case", CASES)
def test_encoding_equals_genmos(case: str) -> None:
    golden, _ = load_golden("vae_encoder")
    module = AutoencoderKLMochi(
        encoder_block_out_channels=WIDTHS, decoder_block_out_channels=CHANNELS, layers_per_block=(1, 1, 1, 1, 1)
    )
    recorded = {"down_blocks.1": 1, "down_blocks.2": 2, "block_out": 3}
    fill_half(module.encoder, "encoder.", golden, recorded)
    vae = MochiVae(module, precision="fp32")
    for block, level in recorded.items():
        vae._encoder.levels[level].residuals.layers[0] = recorded_layer(golden, case, block)
    posterior = vae.encode(golden[f"{case}.pixels"])
    torch.testing.assert_close(posterior.mean, golden[f"{case}.mean"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, golden[f"{case}.logvar"], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(FULL_GOLDEN is None, reason="MOCHI_GOLDEN_DIR is not set: the full golden VAE is 11 MB")
@pytest.mark.parametrize("case", [*CASES, "case2"])
def test_encoding_and_decoding_equal_genmos_from_end_to_end(case: str) -> None:
    folder = Path(str(FULL_GOLDEN))
    with safe_open(folder / "vae_small_diffusers.safetensors", "pt") as file:
        config = {name: value for name, value in json.loads(file.metadata()["config"]).items() if not name.startswith("_")}
    module = AutoencoderKLMochi(**config)
    weights = load_file(folder / "vae_small_diffusers.safetensors")
    module.load_state_dict({name: weight.float() for name, weight in weights.items()})
    vae, recorded = MochiVae(module, precision="fp32"), load_file(folder / "vae_cases.safetensors")
    posterior = vae.encode(recorded[f"{case}.pixels"][0])
    torch.testing.assert_close(posterior.mean, recorded[f"{case}.mean"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, recorded[f"{case}.logvar"][0], atol=1e-5, rtol=1e-5)
    decoded = vae.decode(recorded[f"{case}.mean"][0])
    expected = recorded[f"{case}.decoded"][0].clamp(-1, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        stock = module.decode(recorded[f"{case}.mean"]).sample[0].clamp(-1, 1)
    assert relative_error(stock, expected) > 0.02


# --- decoder ---


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5])
def test_every_latent_frame_count_gives_its_pixel_frames_and_back(latent_frames: int) -> None:
    vae = small_vae()
    pixels = vae.decode(latents(latent_frames, 2, 4))
    assert pixels.shape == (3, 6 * (latent_frames - 1) + 1, 16, 32)
    assert pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1
    assert vae.encode(pixels).mean.shape == (12, latent_frames, 2, 4)


def test_decoding_is_causal() -> None:
    vae = small_vae()
    long = latents(3)
    torch.testing.assert_close(vae.decode(long)[:, :7], vae.decode(long[:, :2]), atol=1e-5, rtol=0)


# --- encoder ---


def reference_moments(module: AutoencoderKLMochi, pixels: torch.Tensor) -> torch.Tensor:
    """Genmo's encoder (`vae/models.py` @0c86aeb) written again over plain tensors: [3, F, H, W] -> [24, T, H/8, W/8]."""
    weights = {name.removeprefix("encoder."): weight for name, weight in module.state_dict().items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x.movedim(1, -1), weights[f"{name}.weight"], weights.get(f"{name}.bias")).movedim(-1, 1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        frames = [F.group_norm(x[:, :, t], 32, weights[f"{name}.weight"], weights[f"{name}.bias"]) for t in range(x.shape[2])]
        return torch.stack(frames, 2)

    def causal_conv(x: torch.Tensor, name: str, *, stride: int | tuple[int, ...], border: int) -> torch.Tensor:
        kernel = weights[f"{name}.conv.weight"]
        x = F.pad(x, (border, border, border, border, kernel.shape[2] - 1, 0), mode="replicate")
        return F.conv3d(x, kernel, weights[f"{name}.conv.bias"], stride)

    def residual(x: torch.Tensor, name: str) -> torch.Tensor:
        h = causal_conv(F.silu(norm(x, f"{name}.norm1.norm_layer")), f"{name}.conv1", stride=1, border=1)
        return x + causal_conv(F.silu(norm(h, f"{name}.norm2.norm_layer")), f"{name}.conv2", stride=1, border=1)

    def attention(x: torch.Tensor, block: str) -> torch.Tensor:
        h = norm(x, f"{block}.norms.0.norm_layer")
        q, k, v = (linear(h, f"{block}.attentions.0.to_{part}") for part in "qkv")
        if x.shape[2] > 1:  # one head of 32 channels; over time, at each cell for itself
            q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
            scores = torch.einsum("bcthw,bcshw->bhwts", q, k) / 32**0.5
            future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
            v = torch.einsum("bhwts,bcshw->bcthw", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return x + linear(v, f"{block}.attentions.0.to_out.0")

    x = pixels[None]
    waves = x.repeat_interleave(2, 1) * (2 * torch.pi * torch.tensor([64.0, 128.0] * 3).view(1, 6, 1, 1, 1))
    x = residual(linear(torch.cat([x, waves.sin(), waves.cos()], 1), "proj_in"), "block_in.resnets.0")
    for index, window in enumerate((1, 2, 3)):
        block = f"down_blocks.{index}"
        x = causal_conv(x, f"{block}.conv_in", stride=(window, 2, 2), border=0)
        x = attention(residual(x, f"{block}.resnets.0"), block)
    x = attention(residual(x, "block_out.resnets.0"), "block_out")
    return linear(F.silu(norm(x, "norm_out.norm_layer")), "proj_out")[0]


@pytest.mark.parametrize("frames", [1, 7, 13])
def test_encoding_equals_an_independent_encoder(frames: int) -> None:
    module = small_module()
    expected = reference_moments(module, clip(frames))
    posterior = MochiVae(module, precision="fp32").encode(clip(frames))
    assert posterior.mean.shape == posterior.logvar.shape == (12, (frames - 1) // 6 + 1, 4, 6)
    torch.testing.assert_close(torch.cat([posterior.mean, posterior.logvar]), expected, atol=1e-5, rtol=1e-5)


def test_log_variance_is_not_clamped() -> None:
    module = small_module()
    module.encoder.proj_out.weight.data.mul_(1000)
    expected = reference_moments(module, clip(1))[12:]
    logvar = MochiVae(module, precision="fp32").encode(clip(1)).logvar
    assert logvar.min() < -30
    assert logvar.max() > 20
    torch.testing.assert_close(logvar, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))


@pytest.mark.parametrize("shape", [(6, 32, 48), (8, 32, 48), (7, 40, 48), (7, 32, 40)])
def test_shapes_whose_tail_would_vanish_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="Mochi takes"):
        small_vae().encode(torch.zeros(3, *shape))


# --- precision ---


def test_pixels_that_were_bf16_are_refused() -> None:
    with pytest.raises(AssertionError, match="float32"):
        small_vae().encode(clip(1).bfloat16())
    with pytest.raises(AssertionError, match="float32"):
        small_vae().decode(latents(1).bfloat16())


def test_bf16_computes_the_fourier_features_in_float32() -> None:
    exact, fast = small_vae().encode(clip(7)).mean, small_vae(precision="bf16").encode(clip(7)).mean
    rounded = small_vae().encode(clip(7).bfloat16().float()).mean
    assert fast.dtype == torch.float32
    assert 0 < relative_error(fast, exact) < 0.05
    assert relative_error(rounded, exact) > 5 * relative_error(fast, exact), "the trap this guards against has gone"


def test_bf16_runs_the_layers_in_bf16_and_keeps_the_norms_in_float32() -> None:
    vae, seen = small_vae(precision="bf16"), []
    vae._decoder.proj_in.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    decoded = vae.decode(latents(2))
    assert seen == [torch.bfloat16]
    assert decoded.dtype == torch.float32
    dtypes = {name.rpartition(".")[2]: weight.dtype for name, weight in vae._encoder.named_buffers() if ".norm." in name}
    assert dtypes == {"gain": torch.float32, "bias": torch.float32}
    assert 0 < relative_error(decoded, small_vae().decode(latents(2))) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_means_no_tf32_and_the_switch_is_put_back(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    vae, seen = small_vae(precision=precision), []
    vae._encoder.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    vae.encode(clip(1))
    assert seen == [precision == "bf16"]
    assert torch.backends.cudnn.allow_tf32


# --- loading ---


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _weights: None) -> Path:
    """A vae folder as on the Hub, with fp16 weights; `change` may damage them first."""
    module = small_module()
    module.save_config(folder)
    weights = {name: weight.half() for name, weight in module.state_dict().items()}
    change(weights)
    save_file(weights, folder / vae_room.WEIGHTS)
    return folder


def load(folder: Path) -> MochiVae:
    return MochiVae.load(folder, device=CPU, precision="fp32")


def test_a_loaded_vae_decodes_as_the_saved_one_and_draws_no_random_numbers(tmp_path: Path) -> None:
    module = small_module()
    module.load_state_dict({name: weight.half().float() for name, weight in module.state_dict().items()})
    expected = MochiVae(module, precision="fp32").decode(latents(2))
    folder, before = saved(tmp_path), torch.get_rng_state()
    vae = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(vae.decode(latents(2)), expected)
    assert vae.device == CPU
    assert not any(weight.requires_grad for part in (vae._encoder, vae._decoder) for weight in part.buffers())


def test_the_statistics_are_the_published_ones(tmp_path: Path) -> None:
    stats = load(saved(tmp_path)).stats
    assert len(stats.mean) == len(stats.std) == 12
    assert stats.std[7] == 1.3720942357788521
    assert stats.mean[0] == -0.06730895953510081
    assert stats.scale == 1.0


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 weights are missing .* decoder\.proj_out\.weight"):
        load(saved(tmp_path, lambda weights: weights.pop("decoder.proj_out.weight")))


def test_a_weight_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another shape.* encoder\.proj_in\.weight"):
        load(saved(tmp_path, lambda weights: weights.update({"encoder.proj_in.weight": torch.zeros(32, 14)})))


def test_a_surplus_weight_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the VAE's, the first is stranger"):
        load(saved(tmp_path, lambda weights: weights.update(stranger=torch.zeros(1))))


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path) / vae_room.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{vae_room.WEIGHTS}: damaged"):
        load(tmp_path)


def test_folders_without_a_mochi_vae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="is a AutoencoderKL, expected AutoencoderKLMochi"):
        load(tmp_path)
    small_module().save_config(tmp_path)
    with pytest.raises(UserError, match=f"{vae_room.WEIGHTS}: not there"):
        load(tmp_path)
    other = {**json.loads((tmp_path / "config.json").read_text()), "temporal_expansions": [1, 2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"by \(4, 8\), not \(6, 8\)"):
        load(tmp_path)
