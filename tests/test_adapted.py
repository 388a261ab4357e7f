"""Linears of one input with their adapters: PEFT's own results and gradients, and one product that reads the input."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from inputs import normal
from kernels_by_formula import kernels  # noqa: F401 - a fixture
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_lora.engine.adapted import project

NAMES = ("to_q", "to_k", "to_v")
ROWS, WIDTH = 11, 6


class Stream(nn.Module):
    """Three linears, of which `config` adapts some."""

    def __init__(self, *configs: LoraConfig, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for width, name in enumerate(NAMES, start=4):
                self.add_module(name, nn.Linear(WIDTH, width))
            for number, config in enumerate(configs):
                inject_adapter_in_model(config, self, str(number))
            for key, parameter in self.named_parameters():
                parameter.data = parameter.data.to(dtype)
                if "lora_" in key:
                    parameter.requires_grad_()
                if "lora_B" in key:
                    nn.init.normal_(parameter)
        if len(configs) > 1:
            for layer in self.layers:
                if isinstance(layer, Linear):
                    layer.set_adapter([str(number) for number in range(len(configs))])

    @property
    def layers(self) -> list[nn.Module]:
        return [getattr(self, name) for name in NAMES]


def one_by_one(layers: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    return [layer(x) for layer in layers]


def outcome(
    stream: Stream, run: Callable[[list[nn.Module], torch.Tensor], list[torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results, and the gradients of the input and of all that is trained."""
    torch.manual_seed(3)  # dropout's
    x = normal(2, ROWS, WIDTH, seed=1).to(next(stream.parameters()).dtype).requires_grad_()
    results = run(stream.layers, x)
    trained = [parameter for key, parameter in stream.named_parameters() if "lora_" in key]
    loss = sum(result.pow(2).sum() for result in results)
    return results, list(torch.autograd.grad(loss, [x, *trained], allow_unused=True))


def config(**words: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(NAMES), **words})


STREAMS = {
    "plain": (config(),),
    "ranks of their own": (config(rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 1}),),
    "one not adapted": (config(target_modules=["to_k", "to_v"]),),
    "one alone adapted": (config(target_modules=["to_k"]),),
    "none": (),
    "dropout": (config(lora_dropout=0.5),),
    "dora": (config(use_dora=True),),
    "bias": (config(lora_bias=True),),
    "two adapters": (config(), config(r=2)),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_results_and_gradients_are_those_of_the_layers_one_by_one(kind: str) -> None:
    stream = Stream(*STREAMS[kind])
    for mine, theirs in zip(outcome(stream, project), outcome(stream, one_by_one), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_adapters_that_are_merged_or_off_are_left_to_peft(state: str) -> None:
    stream = Stream(config())
    x = normal(ROWS, WIDTH, seed=1).double()
    on = project(stream.layers, x)
    for layer in stream.layers:
        assert isinstance(layer, Linear)
        layer.merge() if state == "merged" else layer.enable_adapters(enabled=False)
    for changed, before, theirs in zip(project(stream.layers, x), on, one_by_one(stream.layers, x), strict=True):
        assert torch.equal(changed, theirs)
        assert torch.allclose(changed, before) == (state == "merged")


def test_strengths_are_followed() -> None:
    stream = Stream(config())
    x = normal(ROWS, WIDTH, seed=1).double()
    for layer in stream.layers:
        assert isinstance(layer, Linear)
        layer.set_scale("0", 0.25)
    for mine, theirs in zip(project(stream.layers, x), one_by_one(stream.layers, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Readers(TorchDispatchMode):
    """Counts the products that read the whole input, but for the base's own."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[int] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.mm.default and args[0].shape[-1] == WIDTH and args[0].shape[0] == ROWS:
            self.ranks.append(args[1].shape[1])
        return operation(*args, **(kwargs or {}))


def test_the_input_is_read_once_for_all_adapters() -> None:
    stream, x = Stream(config()), normal(ROWS, WIDTH, seed=1).double()
    with torch.no_grad(), Readers() as together:
        project(stream.layers, x)
    with torch.no_grad(), Readers() as apart:
        one_by_one(stream.layers, x)
    assert (together.ranks, apart.ranks) == ([9], [3, 3, 3])


@pytest.mark.parametrize("fused", [False, True])
def test_under_autocast_it_is_no_further_from_the_exact_sum_than_peft(request, *, fused: bool) -> None:
    stream = Stream(config(), dtype=torch.float32)
    exact = outcome(deepcopy(stream).double(), one_by_one)
    if fused:
        request.getfixturevalue("kernels")
    with torch.autocast("cpu", torch.bfloat16):
        together, apart = (outcome(stream, run) for run in (project, one_by_one))
    for mine, theirs, true in zip(together, apart, exact, strict=True):
        assert [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in theirs]
        mistakes = [
            torch.cat([(tensor - right).flatten() for tensor, right in zip(found, true, strict=True)]).norm()
            for found in (mine, theirs)
        ]
        assert mistakes[0] < 1.1 * mistakes[1] < 0.1 * torch.cat([tensor.flatten() for tensor in true]).norm()


@pytest.mark.parametrize("kind", ["plain", "ranks of their own", "one alone adapted"])
def test_the_kernels_sum_has_pefts_results_and_gradients(kernels, kind: str) -> None:  # noqa: F811
    stream = Stream(*STREAMS[kind])
    adapted = sum(isinstance(layer, Linear) for layer in stream.layers)
    for mine, theirs in zip(outcome(stream, project), outcome(stream, one_by_one), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert len(kernels.low_rank_sum.programs) == adapted > 0


def test_a_low_precision_model_without_autocast_computes_the_adapter_in_its_own_float32() -> None:
    stream = Stream(config(), dtype=torch.float32)
    for layer in stream.layers:
        assert isinstance(layer, Linear)
        layer.get_base_layer().bfloat16()
    x = normal(ROWS, WIDTH, seed=1).bfloat16()
    for mine, theirs in zip(project(stream.layers, x), one_by_one(stream.layers, x), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)
