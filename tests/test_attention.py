"""Joint attention against a softmax written out, in stock's place and compiled, and kernels that do not exist here."""

import pytest
import torch
from diffusers.models.attention_processor import MochiAttention
from diffusers.models.transformers.transformer_mochi import MochiAttnProcessor2_0
from inputs import normal
from torch._dynamo.testing import CompileCounterWithBackend

from mochi_lora.engine.attention import JointAttention, attend, check_attention, host_lengths
from mochi_lora.engine.rotary import rotate
from mochi_lora.errors import UserError

B, S, H, D = 3, 10, 2, 8
LENGTHS = (10, 4, 7)


def qkv(batch: int = B) -> list[torch.Tensor]:
    return [normal(batch, S, H, D, seed=seed) for seed in (1, 2, 3)]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Softmax of the scaled scores of the valid tokens, sample by sample and head by head."""
    result = torch.zeros_like(q)
    for sample, valid in enumerate(lengths):
        for head in range(q.shape[2]):
            scores = q[sample, :valid, head] @ k[sample, :valid, head].T / q.shape[3] ** 0.5
            result[sample, :valid, head] = scores.softmax(-1) @ v[sample, :valid, head]
    return result


@pytest.mark.parametrize("attention", ["auto", "flash", "math"])
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (7, 7, 4), (4, 7, 7), (S, S, S), (1, S, 1)])
def test_attention_is_the_softmax_over_valid_tokens(attention: str, lengths: tuple[int, ...]) -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, lengths, attention), naive(q, k, v, lengths), atol=1e-6, rtol=1e-5)


def test_the_kernel_called_math_stays_float32_under_autocast() -> None:
    """Training runs under autocast, which reaches into an operator: its products would round scores and weights to bf16."""
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    grad = normal(B, S, H, D, seed=4)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = attend(q, k, v, LENGTHS, "math")
            found.append((result, *torch.autograd.grad(result, (q, k, v), grad)))
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)


def test_no_lengths_means_that_all_tokens_are_valid() -> None:
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v, None), attend(q, k, v, (S, S, S)))
    torch.testing.assert_close(attend(q, k, v, None), naive(q, k, v, (S, S, S)), atol=1e-6, rtol=1e-5)


def test_padding_neither_attends_nor_is_attended() -> None:
    q, k, v = qkv()
    result = attend(q, k, v, LENGTHS)
    for sample, valid in enumerate(LENGTHS):
        assert not result[sample, valid:].any()
        for tensor in (q, k, v):
            tensor[sample, valid:] = float("nan")
    assert torch.equal(attend(q, k, v, LENGTHS), result)


def test_a_batch_is_its_samples() -> None:
    q, k, v = qkv()
    together = attend(q, k, v, LENGTHS)
    for sample, valid in enumerate(LENGTHS):
        row = slice(sample, sample + 1)
        torch.testing.assert_close(together[row], attend(q[row], k[row], v[row], (valid,)))


def test_gradients_do_not_reach_padding() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    attend(q, k, v, LENGTHS).square().sum().backward()
    for tensor in (q, k, v):
        assert not tensor.grad[1, 4:].any()
        assert tensor.grad[1, :4].any()


def test_rotation_turns_interleaved_pairs_by_their_angle() -> None:
    angle = torch.full((S, H, D // 2), torch.pi / 2)
    x = normal(1, S, H, D)
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned[..., 0::2], -x[..., 1::2])
    torch.testing.assert_close(turned[..., 1::2], x[..., 0::2])


def test_rotation_keeps_lengths_and_depends_on_the_difference_of_positions_only() -> None:
    q, k = normal(1, 1, H, D, seed=1), normal(1, 1, H, D, seed=2)
    frequencies = normal(H, D // 2, seed=3)

    def score(first: float, second: float) -> torch.Tensor:
        turned = [rotate(x, (p * frequencies)[None].cos(), (p * frequencies)[None].sin()) for x, p in ((q, first), (k, second))]
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(3.0, 1.0), score(7.0, 5.0))
    assert (score(3.0, 1.0) - score(3.0, 2.0)).abs().max() > 0.1


def test_rotation_of_bf16_is_computed_in_float32() -> None:
    x, angle = normal(1, S, H, D).bfloat16(), normal(S, H, D // 2, seed=1)
    turned = rotate(x, angle.cos(), angle.sin())
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), angle.cos(), angle.sin()).bfloat16())


V, WIDTH, TEXT_WIDTH = 20, H * D, 12


@pytest.fixture
def layer() -> MochiAttention:
    """Mochi's attention layer with random weights, norms included."""
    layer = MochiAttention(
        query_dim=WIDTH,
        added_kv_proj_dim=TEXT_WIDTH,
        heads=H,
        dim_head=D,
        added_proj_bias=False,
        out_dim=WIDTH,
        out_context_dim=TEXT_WIDTH,
        context_pre_only=False,
        processor=JointAttention("auto"),
        eps=1e-5,
    )
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed) / 3
    return layer


ANGLE = normal(V, H, D // 2, seed=7)


def run(layer: MochiAttention, visual: torch.Tensor, text: torch.Tensor, lengths: object) -> tuple[torch.Tensor, torch.Tensor]:
    return layer(visual, text, attention_mask=lengths, image_rotary_emb=(ANGLE.cos(), ANGLE.sin()))


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (1, 5)])
def test_the_layer_is_stocks_on_valid_tokens(layer: MochiAttention, lengths: tuple[int, ...]) -> None:
    visual, text = normal(2, V, WIDTH), normal(2, 5, TEXT_WIDTH, seed=1)
    found = run(layer, visual, text, lengths)
    of_tensor = run(layer, visual, text, host_lengths(lengths))
    layer.processor = MochiAttnProcessor2_0()
    expected = run(layer, visual, text, torch.arange(5) < torch.tensor(lengths).unsqueeze(1))
    torch.testing.assert_close(found, of_tensor, atol=0, rtol=0)
    torch.testing.assert_close(found[0], expected[0])
    for sample, length in enumerate(lengths):
        torch.testing.assert_close(found[1][sample, :length], expected[1][sample, :length])


def test_the_compiled_layer_is_the_eager_one_for_every_caption_after_one_compilation(layer: MochiAttention) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    visual = normal(1, V, WIDTH).requires_grad_()
    for size, length in ((5, 5), (9, 9), (2, 0), (2, 1), (30, 30)):
        text = normal(1, size, TEXT_WIDTH, seed=1)
        torch._dynamo.mark_dynamic(text, 1)
        found, exact = compiled(layer, visual, text, host_lengths((length,))), run(layer, visual, text, (length,))
        torch.testing.assert_close(found, exact)
        grads = [torch.autograd.grad(sum(stream.square().sum() for stream in pair), visual) for pair in (found, exact)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


def test_a_tensor_mask_is_refused() -> None:
    """The stock forward would pass one: its padding would be attended without a word."""
    visual, text, mask = normal(1, 4, 16), normal(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="attends by host lengths"):
        JointAttention("auto")(None, visual, text, mask, (visual, visual))


@pytest.mark.parametrize("attention", ["auto", "math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_run_on_a_cpu_pass_the_check(attention: str, dtype: torch.dtype) -> None:
    check_attention(attention, torch.device("cpu"), dtype, 32)


@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_a_kernel_that_is_not_there_is_refused_by_its_setting(attention: str) -> None:
    with pytest.raises(UserError, match=f"engine.attention: {attention} does not run on this cpu .*set it to auto"):
        check_attention(attention, torch.device("cpu"), torch.float32, 32)


def test_a_kernel_with_a_non_finite_gradient_is_refused(monkeypatch) -> None:
    """Genmo's code keeps cuDNN out of training for this."""

    def poisoned(q, k, v, lengths, attention):
        return (q - q.detach()).sqrt() + k + v  # the square root of 0 has an infinite slope

    monkeypatch.setattr("mochi_lora.engine.attention.attend", poisoned)
    with pytest.raises(UserError, match=r"engine\.attention: math gives a non-finite gradient"):
        check_attention("math", torch.device("cpu"), torch.float32, 32)


def test_the_check_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    check_attention("auto", torch.device("cpu"), torch.float32, 32)
    assert torch.equal(torch.get_rng_state(), state)
