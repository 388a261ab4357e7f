"""The VAE in chunks of time is the VAE: at any chunk size, for any clip; and the yardstick it is held against."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLMochi

from mochi_lora.model import fusion, vae_kernels, vae_layers, vae_upstream
from mochi_lora.model.vae import CHUNK_ELEMENTS, MochiVae
from mochi_lora.model.vae_kernels import fourier_features
from mochi_lora.model.vae_network import Decoder, Encoder
from mochi_lora.spec import Bucket

ROOT = Path(__file__).parent.parent
WHOLE = 2**40
FRAMES = [1, 7, 13, 25]
CHUNKS = [1, 30_000, 200_000]  # one frame at a time everywhere; several, other numbers at every level; nearly the whole


@pytest.fixture(scope="module")
def module() -> AutoencoderKLMochi:
    """Two layers in one level, two widths, in float64: what differs is not rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (32, 32, 64, 64)
        found = AutoencoderKLMochi(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=(1, 1, 2, 1, 1)
        )
        for name, weight in found.named_parameters():
            if "norm" in name:  # as initialised, 1 and 0 would hide a swapped or forgotten affine
                weight.data.add_(0.3 * torch.randn_like(weight))
    return found.requires_grad_(requires_grad=False).double()


class _ExactFeatures(torch.nn.Module):
    """Upstream rounds its Fourier features to float32; ours stay in the pixels' dtype."""

    def __init__(self, waves: torch.Tensor) -> None:
        super().__init__()
        self.waves = waves

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = fourier_features(pixels.permute(0, 2, 3, 4, 1)[0], self.waves, pixels.dtype)
        return found[None, ..., :15].permute(0, 4, 1, 2, 3)


@pytest.fixture(scope="module")
def yardstick(module: AutoencoderKLMochi) -> AutoencoderKLMochi:
    """diffusers' own layers, mended, whole clips at a time."""
    mended = copy.deepcopy(module)
    vae_upstream.mend(mended)
    mended.encoder.fourier_features = _ExactFeatures(Encoder(module.encoder, torch.float64).waves)
    return mended


def pixels_of(frames: int) -> torch.Tensor:
    return torch.rand(3, frames, 32, 48, generator=torch.Generator().manual_seed(frames), dtype=torch.float64) * 2 - 1


def latents_of(frames: int) -> torch.Tensor:
    return torch.randn(12, frames, 4, 6, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)


@pytest.mark.parametrize("elements", [*CHUNKS, WHOLE])
@pytest.mark.parametrize("frames", FRAMES)
def test_encoding_in_chunks_equals_the_whole_clip(
    module: AutoencoderKLMochi, yardstick: AutoencoderKLMochi, frames: int, elements: int
) -> None:
    expected = yardstick.encoder(pixels_of(frames)[None])[0][0].permute(1, 2, 3, 0)
    found = Encoder(module.encoder, torch.float64)(pixels_of(frames), elements)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("elements", [*CHUNKS, WHOLE])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_decoding_in_chunks_equals_the_whole_clip(
    module: AutoencoderKLMochi, yardstick: AutoencoderKLMochi, frames: int, elements: int
) -> None:
    expected = yardstick.decoder(latents_of(frames)[None])[0][0].permute(1, 2, 3, 0)
    chunks = list(Decoder(module.decoder, torch.float64)(latents_of(frames), elements))
    assert (len(chunks) == 1) == (elements == WHOLE or frames == 1)
    torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_size_of_the_chunks_is_no_part_of_the_result(module: AutoencoderKLMochi, precision: str, bound: float) -> None:
    single = copy.deepcopy(module).float()
    whole = MochiVae(single, precision=precision, chunk_elements=WHOLE)
    small = MochiVae(single, precision=precision, chunk_elements=30_000)
    pixels, latents = pixels_of(13).float(), latents_of(3).float()
    for found, expected in (
        (small.encode(pixels).mean, whole.encode(pixels).mean),
        (small.encode(pixels).logvar, whole.encode(pixels).logvar),
        (small.decode(latents), whole.decode(latents)),
    ):
        assert found.shape == expected.shape
        assert (found - expected).norm() < bound * expected.norm()


def test_the_module_is_left_as_it_was(module: AutoencoderKLMochi) -> None:
    single = copy.deepcopy(module).float()
    before = copy.deepcopy(single.state_dict())
    latents = latents_of(2).float()
    decoded = single.decode(latents[None]).sample
    MochiVae(single, precision="bf16").decode(latents)
    assert all(torch.equal(weight, before[name]) for name, weight in single.state_dict().items())
    assert torch.equal(single.decode(latents[None]).sample, decoded)


def test_what_is_kept_of_a_chunk_is_its_last_frames_and_not_the_chunk(module: AutoencoderKLMochi) -> None:
    residual = vae_layers.Residual(module.decoder.block_out.resnets[0], torch.float64)
    chunk = torch.zeros(50, 4, 6, 32, dtype=torch.float64)
    for kept in residual._add(chunk, None, None):
        assert kept.untyped_storage().nbytes() == 2 * (4 + 2) * (6 + 2) * 32 * 8


def test_every_weight_is_where_the_modules_are(module: AutoencoderKLMochi) -> None:
    vae = MochiVae(copy.deepcopy(module).float().to("meta"), precision="bf16")
    assert {weight.device.type for part in (vae._encoder, vae._decoder) for weight in part.buffers()} == {"meta"}


def test_moving_to_a_device_moves_every_weight(module: AutoencoderKLMochi) -> None:
    vae = MochiVae(copy.deepcopy(module).float(), precision="bf16")
    assert vae.device == torch.device("cpu")
    vae.to(torch.device("meta"))
    assert vae.device == torch.device("meta")
    assert {weight.device.type for part in (vae._encoder, vae._decoder) for weight in part.buffers()} == {"meta"}


# --- the yardstick ---


def test_mending_cuts_a_long_clip_between_windows_only(module: AutoencoderKLMochi, monkeypatch: pytest.MonkeyPatch) -> None:
    mended = copy.deepcopy(module)
    vae_upstream.mend(mended)
    whole = mended.encoder(pixels_of(19)[None])[0]
    monkeypatch.setattr(vae_upstream, "_PART_ELEMENTS", 1)  # every window a part of its own
    torch.testing.assert_close(mended.encoder(pixels_of(19)[None])[0], whole, atol=1e-11, rtol=0)


def test_mending_leaves_no_strided_convolution_to_upstreams_cutting(yardstick: AutoencoderKLMochi) -> None:
    """Upstream cuts above 2^30 elements, too many for a test: 164 frames in two parts, the second one frame off."""
    strided = [layer for layer in yardstick.modules() if getattr(layer, "stride", (1,))[0] > 1]
    assert [type(layer) for layer in strided] == [vae_upstream._WindowConv3d] * 2


# --- memory, by count ---


@pytest.mark.slow
@pytest.mark.parametrize(("what", "gib"), [("encode", 11.0), ("decode", 9.0)])
def test_163_frames_fit_a_card_of_16_gib_by_count(what: str, gib: float) -> None:
    specification = importlib.util.spec_from_file_location("vae_floor", ROOT / "benchmarks" / "vae_floor.py")
    floor = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(floor)
    peaks = {}
    for frames in (79, 163):
        count = floor.Count(7e14, 4.3e12)
        peaks[frames] = floor.floor(what, Bucket(frames, 480, 848), CHUNK_ELEMENTS, count)
        operations = sum(cost.flops for cost in count.costs.values())
    assert peaks[163] < gib
    assert operations == pytest.approx({"encode": 279e12, "decode": 1053e12}[what], rel=0.01)
    if what == "decode":
        pixels = 3 * (163 - 79) * 480 * 848 * 4 / 2**30
        assert peaks[163] - peaks[79] < 1.5 * pixels, "only pixels and latents grow with the clip"


# --- compiled passes ---


def passes() -> dict[str, tuple[int, list[object]]]:
    """Each compiled pass: dimensions that vary, and arguments as the layers give them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, scale, offset = torch.randn(3, 4, 6, 32).bfloat16(), torch.randn(3, 1, 1, 32), torch.randn(3, 1, 1, 32)
        bias, band = torch.randn(32), torch.randn(3, 4, 6, 32).bfloat16()[:, 1:3]
        update = torch.randn(12, 3, 32).bfloat16().unflatten(0, (2, 6)).permute(2, 0, 1, 3)
        vectors = torch.randn(12, 3, 3, 1, 32).bfloat16()[:, :, :2]
        pixels = (torch.rand(3, 3, 4, 6) * 2 - 1).permute(1, 2, 3, 0)
    padded = torch.zeros(5, 6, 8, 32, dtype=torch.bfloat16)
    return {
        "norm_line": (1, [x, bias, bias, bias, 16, 1e-5]),
        "activate_into": (1, [padded[2:], x, scale, offset]),
        "add_into": (1, [x, x.flip(0), bias]),
        "add_band_into": (2, [band, update, bias]),
        "sequences": (2, [band, scale, offset]),
        "unit": (2, [vectors, 1e-5]),
        "fourier_features": (1, [pixels, torch.tensor([402.1, 804.2] * 3), torch.bfloat16]),
    }


def test_every_compiled_pass_is_checked_here() -> None:
    assert set(passes()) == {name for name, value in vars(vae_kernels).items() if hasattr(value, "__wrapped__")}


@pytest.mark.slow
@pytest.mark.parametrize("name", passes())
def test_a_compiled_pass_computes_what_it_says(name: str) -> None:
    """On the CPU's compiler; the GPU's has the same source. Rounding may differ where sums are taken in another order."""
    moving, plain = passes()[name]
    expected = getattr(vae_kernels, name)(*plain)
    _, again = passes()[name]
    with fusion.room_for_kernels(torch.device("cuda")):
        found = fusion.compiled(getattr(vae_kernels, name).__wrapped__, moving)(*again)
    assert (found is None) == name.endswith("_into")
    torch.testing.assert_close(*((again[0], plain[0]) if found is None else (found, expected)))


@pytest.mark.slow
def test_another_length_of_chunk_needs_no_other_kernel_and_another_width_does() -> None:
    function = vae_kernels.add_into.__wrapped__
    compiled = fusion.compiled(function, 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = []
    with fusion.room_for_kernels(torch.device("cuda")):
        for frames, width in ((4, 32), (5, 32), (9, 32), (5, 64), (4, 64)):
            x = torch.zeros(frames, 2, 3, width)
            compiled(x, torch.ones_like(x), torch.zeros(width))
            assert x.min() == 1
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen == [1, 1, 1, 2, 2]
