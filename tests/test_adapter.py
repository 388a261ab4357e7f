"""The LoRA: exactly where it is, what it starts from, and that it goes without a trace."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import MochiTransformer3DModel
from inputs import SHAPE, caption, captions, hash_of_base, normal, relative, velocity
from torch import nn

from mochi_lora.config.schema import AdapterConfig, SampleConfig
from mochi_lora.errors import UserError
from mochi_lora.inference.generate import generate_latents
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter import Adapter
from mochi_lora.model.transformer import VelocityModel

Load = Callable[..., VelocityModel]
VISUAL = {"to_q", "to_k", "to_v", "to_out.0"}
TEXT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
MLP = {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
DEPTH = 48


def full_depth() -> MochiTransformer3DModel:
    with init_empty_weights():
        return MochiTransformer3DModel().requires_grad_(requires_grad=False)


def adapted(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name.split(".lora_")[0] for name in parameters}


def expected(inside: set[str]) -> set[str]:
    """The last block has no text stream to give on: no `to_add_out`, no `ff_context`, and its text queries are unused."""
    names = {f"transformer_blocks.{block}.{name}" for block in range(DEPTH) for name in inside}
    return names - {
        f"transformer_blocks.{DEPTH - 1}.{name}" for name in inside if re.search("to_add_out|add_q_proj|ff_context", name)
    }


def attention(names: set[str]) -> set[str]:
    return {f"attn1.{name}" for name in names}


def trained(model: VelocityModel, settings: AdapterConfig, seed: int = 0) -> Adapter:
    """An adapter that changes the output: its B factors, and DoRA's magnitudes, are moved off their start."""
    parameters = lora.attach(model.transformer, settings, seed)
    for number, (name, parameter) in enumerate(parameters.items()):
        if "lora_B" in name:
            parameter.data.copy_(0.05 * normal(*parameter.shape, seed=1000 * seed + number))
        elif "magnitude" in name:
            parameter.data.mul_(1.1)
    return lora.current(model.transformer)


def with_adapters(load_tiny: Load, adapters: list[Adapter], weights: list[float]) -> torch.Tensor:
    model, names = load_tiny(), [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        lora.put(model.transformer, adapter, name)
    with lora.strengths(model.transformer, names, weights):
        return velocity(model)


def merged(load_tiny: Load, adapters: list[Adapter], weights: list[float]) -> torch.Tensor:
    """W + strength * alpha / rank * B A, by hand, in a model that has never heard of adapters."""
    model = load_tiny()
    for adapter, weight in zip(adapters, weights, strict=True):
        root = 0.5 if adapter.config["use_rslora"] else 1
        scale = weight * adapter.config["lora_alpha"] / adapter.config["r"] ** root
        for name in adapted(adapter.tensors):
            factor_a, factor_b = (adapter.tensors[f"{name}.lora_{which}.weight"] for which in "AB")
            model.transformer.get_submodule(name).weight.data += scale * factor_b @ factor_a
    return velocity(model)


@pytest.mark.parametrize(
    ("targets", "inside", "count"),
    [
        ("visual_attention", attention(VISUAL), 48 * 4),
        ("joint_attention", attention(VISUAL | TEXT), 48 * 7 + 47 - 1),
        ("joint_attention_mlp", attention(VISUAL | TEXT) | MLP, 48 * 7 + 47 - 1 + 48 * 2 + 47 * 2),
        (r"ff\.net\.2", {"ff.net.2"}, 48),
        (r"attn1\.add_q_proj", {"attn1.add_q_proj"}, 47),
    ],
)
def test_targets_hit_exactly_these_linears_of_the_full_model(targets: str, inside: set[str], count: int) -> None:
    found = adapted(lora.attach(full_depth(), AdapterConfig(rank=1, targets=targets), 0))
    assert found == expected(inside)
    assert len(found) == count


def test_a_suffix_list_would_hit_the_caption_pooler() -> None:
    """Why the pattern is anchored: PEFT matches a list by suffix, and the pooler's query has the attention's name."""
    transformer = full_depth()
    transformer.add_adapter(lora.LoraConfig(r=1, target_modules=["to_q"]))
    assert "time_embed.pooler.to_q" in adapted(lora.trainable(transformer))


def test_only_the_linear_that_is_left_out_gets_no_gradient(load_tiny: Load) -> None:
    model = load_tiny()
    linears = [module for module in model.transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.weight.requires_grad_()
    model(normal(2, *SHAPE), torch.tensor([0.3, 0.7]), captions(7, 3)).square().mean().backward()
    last = model.transformer.transformer_blocks[-1]
    silent = [linear for linear in linears if linear.weight.grad is None or not linear.weight.grad.any()]
    assert silent == [last.attn1.add_q_proj]


def test_every_trained_parameter_gets_a_gradient_after_one_step(load_tiny: Load) -> None:
    model = load_tiny()
    trained(model, AdapterConfig(targets="joint_attention_mlp"))
    model(normal(2, *SHAPE), torch.tensor([0.3, 0.7]), captions(7, 0)).square().mean().backward()
    parameters = lora.trainable(model.transformer)
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".lora_" not in name)


def test_targets_that_match_nothing_are_refused_with_what_there_is(load_tiny: Load) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: 'to_query' matches no linear .*attn1\.to_q, "):
        lora.attach(load_tiny().transformer, AdapterConfig(targets="to_query"), 0)


def test_targets_that_are_no_regular_expression_are_refused_with_the_presets() -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: 'attn1\.\(' is no regular expression .*visual_attention"):
        lora.target_pattern("attn1.(", 2)


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_adapter_weights_are_float32_on_a_bf16_base(load_tiny: Load, settings: dict) -> None:
    model = load_tiny("bf16")
    before = {name: parameter.dtype for name, parameter in model.transformer.named_parameters()}
    parameters = lora.attach(model.transformer, AdapterConfig(**settings), 0)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    after = {n.replace(".base_layer", ""): p.dtype for n, p in model.transformer.named_parameters() if ".lora_" not in n}
    assert after == before
    assert list(parameters) == sorted(parameters)


def test_an_adam_step_at_a_small_rate_moves_float32_and_would_not_move_bf16(load_tiny: Load) -> None:
    parameters = lora.attach(load_tiny("bf16").transformer, AdapterConfig(), 0)
    factor = next(parameter for name, parameter in parameters.items() if "lora_A" in name)
    moved = (factor + 1e-5 != factor).float().mean()
    rounded = factor.detach().bfloat16()
    assert moved == 1
    assert (rounded + 1e-5 != rounded).float().mean() < 0.1


def test_a_fresh_adapter_follows_its_seed_and_nothing_else(load_tiny: Load) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = lora.attach(load_tiny().transformer, AdapterConfig(), 5)
    torch.manual_seed(2)
    np.random.seed(2)
    again = lora.attach(load_tiny("bf16").transformer, AdapterConfig(), 5)
    other = lora.attach(load_tiny().transformer, AdapterConfig(), 6)
    assert list(first) == list(again)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert not torch.equal(parameter, other[name])
        else:
            assert not parameter.any()


def test_a_fresh_adapter_is_the_base(load_tiny: Load) -> None:
    model = load_tiny()
    before = velocity(model)
    lora.attach(model.transformer, AdapterConfig(), 0)
    assert torch.equal(velocity(model), before)


def test_attaching_leaves_the_global_generators_alone(load_tiny: Load) -> None:
    transformer = load_tiny().transformer
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    lora.attach(transformer, AdapterConfig(), 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize(
    "settings", [{"alpha": 24.0}, {"alpha": 3.0, "rslora": True}, {"rank": 3, "targets": "joint_attention_mlp"}]
)
def test_an_adapter_is_its_merged_weights(load_tiny: Load, settings: dict) -> None:
    adapter = trained(load_tiny(), AdapterConfig(**settings))
    for weight in (1.0, 0.4, -0.7):
        unmerged = with_adapters(load_tiny, [adapter], [weight])
        assert relative(unmerged, merged(load_tiny, [adapter], [weight])) < 1e-5
        assert relative(unmerged, velocity(load_tiny())) > 0.01


def test_adapters_add_up_at_their_strengths(load_tiny: Load) -> None:
    first = trained(load_tiny(), AdapterConfig(rank=4, alpha=8.0), 1)
    second = trained(load_tiny(), AdapterConfig(rank=2, targets="visual_attention"), 2)
    weights = [0.8, -0.5]
    both = with_adapters(load_tiny, [first, second], weights)
    assert relative(both, merged(load_tiny, [first, second], weights)) < 1e-5
    assert relative(both, merged(load_tiny, [first], weights[:1])) > 0.01
    assert relative(both, merged(load_tiny, [second], weights[1:])) > 0.01


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_strength_zero_is_the_base_bit_for_bit(load_tiny: Load, precision: str, settings: dict) -> None:
    model = load_tiny(precision)
    base = velocity(model)
    lora.put(model.transformer, trained(load_tiny(), AdapterConfig(**settings)), "off")
    with lora.strengths(model.transformer, ["off"], [0.0]):
        assert torch.equal(velocity(model), base)
    with lora.strengths(model.transformer, ["off"], [1.0]):
        assert not torch.equal(velocity(model), base)


def test_an_adapter_at_strength_zero_does_not_disturb_its_neighbour(load_tiny: Load) -> None:
    first, second = (trained(load_tiny(), AdapterConfig(), seed) for seed in (1, 2))
    alone = with_adapters(load_tiny, [first], [1.0])
    assert torch.equal(with_adapters(load_tiny, [second, first], [0.0, 1.0]), alone)


def test_no_adapters_at_all_is_the_base(load_tiny: Load) -> None:
    model = load_tiny()
    base = velocity(model)
    with lora.strengths(model.transformer, [], []):
        assert torch.equal(velocity(model), base)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_after_its_strength_an_adapter_is_whole_again(load_tiny: Load, weight: float) -> None:
    model = load_tiny()
    lora.put(model.transformer, trained(load_tiny(), AdapterConfig()), "mine")
    whole = velocity(model)

    def fail_halfway() -> None:
        with lora.strengths(model.transformer, ["mine"], [weight]):
            assert not torch.equal(velocity(model), whole)
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        fail_halfway()
    assert torch.equal(velocity(model), whole)


def test_sampling_leaves_every_bit_of_the_base_as_it_was(load_tiny: Load) -> None:
    model = load_tiny("bf16")
    lora.put(model.transformer, trained(load_tiny(), AdapterConfig()), "mine")
    before = hash_of_base(model)
    settings = SampleConfig(prompts=[], frames=7, height=16, width=16, steps=2)
    with lora.strengths(model.transformer, ["mine"], [0.7]):
        generate_latents(model, caption(3), caption(0), settings, 0, on_step=lambda *_: None)
    assert hash_of_base(model) == before


@pytest.mark.parametrize("settings", [{"dora": True, "alpha": 4.0}, {"rslora": True, "alpha": 4.0}, {"dropout": 0.5}])
def test_an_adapter_put_into_another_model_does_what_it_did(load_tiny: Load, settings: dict) -> None:
    model = load_tiny()
    adapter = trained(model, AdapterConfig(rank=4, **settings))
    model.eval()
    once = velocity(model)
    assert relative(once, velocity(load_tiny())) > 0.01
    assert relative(with_adapters(load_tiny, [adapter], [1.0]), once) < 1e-6
    assert all(tensor.dtype == torch.float32 for tensor in adapter.tensors.values())


def test_what_is_current_is_a_copy(load_tiny: Load) -> None:
    model = load_tiny()
    parameters = lora.attach(model.transformer, AdapterConfig(), 0)
    taken = lora.current(model.transformer).tensors
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    for parameter in parameters.values():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in taken.items())


def test_an_adapter_for_another_architecture_is_refused(load_tiny: Load) -> None:
    tensors = {f"transformer_blocks.7.attn1.to_q.lora_{which}.weight": torch.zeros(4, 4) for which in "AB"}
    with pytest.raises(UserError, match=r"far.safetensors: 1 of 1 modules are not in this model .*another architecture"):
        lora.put(load_tiny().transformer, Adapter(tensors, {"r": 4, "target_modules": ["to_q"]}, "far.safetensors"), "foreign")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "1 tensors differ from what rank and targets ask for"),
        (
            lambda tensors: tensors.update({key: tensor[:, :3] for key, tensor in tensors.items()}),
            "its header states another rank",
        ),
    ],
)
def test_an_adapter_that_does_not_fill_its_places_is_refused(load_tiny: Load, change: Callable, message: str) -> None:
    adapter = trained(load_tiny(), AdapterConfig(rank=4))
    change(adapter.tensors)
    with pytest.raises(UserError, match=message):
        lora.put(load_tiny().transformer, adapter, "short")


@pytest.mark.parametrize(
    ("other", "setting"),
    [
        ({"rank": 4}, "rank: 4"),
        ({"alpha": 2.0}, "alpha: 2.0"),
        ({"rslora": True}, "rslora: True"),
        ({"dora": True}, "dora: True"),
    ],
)
def test_a_starting_adapter_of_another_scale_is_refused_with_the_setting_to_change(
    load_tiny: Load, tmp_path, other: dict, setting: str
) -> None:
    start = replace(trained(load_tiny(), AdapterConfig(**other)), source="start.safetensors")
    with pytest.raises(UserError, match=f"start.safetensors .*set adapter.{setting}"):
        lora.require_same_scale(AdapterConfig(), start)
    lora.require_same_scale(AdapterConfig(), trained(load_tiny(), AdapterConfig()))


@pytest.mark.parametrize("targets", [r"attn1.*", r"attn1\..*", r".*"])
def test_a_pattern_that_also_names_norms_adapts_the_linears(load_tiny: Load, targets: str) -> None:
    parameters = lora.attach(load_tiny().transformer, AdapterConfig(targets=targets), 0)
    assert any("attn1.to_q.lora_A" in name for name in parameters)
    assert not any("norm_q" in name for name in parameters)


@pytest.mark.parametrize(
    "config",
    [{"r": 4, "lora_alpha": 4, "target_modules": ["to_nothing"]}, {"r": 0, "lora_alpha": 4, "target_modules": ["to_q"]}],
)
def test_a_configuration_peft_cannot_read_is_refused_by_file(load_tiny: Load, config: dict) -> None:
    tensors = {f"transformer_blocks.0.attn1.to_q.lora_{which}.weight": torch.zeros(4, 4) for which in "AB"}
    with pytest.raises(UserError, match=r"odd\.safetensors"):
        lora.put(load_tiny().transformer, Adapter(tensors, config, "odd.safetensors"), "odd")
