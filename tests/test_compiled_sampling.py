"""Sampling through compiled blocks: what makes another compilation, and what a step waits for."""

from dataclasses import replace

import pytest
import torch
from adapter_files import write_adapter
from compiled_graphs import fresh_compiler, graphs  # noqa: F401 - a fixture of every test here
from inputs import caption, relative
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.inference.generate import generate_latents
from mochi_lora.inference.live import LiveSampler
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer

CPU = torch.device("cpu")
SETTINGS = SampleConfig(prompts=[], frames=7, height=32, width=48, steps=2, guidance=4.0)
PLAIN = Plan("cpu", "fp32", "auto", "none")


def model_of(tiny, plan: Plan) -> VelocityModel:
    return VelocityModel(load_transformer(tiny / "transformer", device=CPU, precision="fp32").transformer, plan)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["two", "one"])
def test_another_prompt_seed_step_or_strength_compiles_nothing_again(tiny, tmp_path, passes) -> None:
    """Compiled are: the adapter, the base, and for the calls that a step cache leaves to one of both prompts a batch of one.
    Each for the block and the last block."""
    style, motion = (AdapterChoice(write_adapter(tmp_path / f"{seed}.safetensors", tiny, seed), 1.0) for seed in (1, 2))
    vae = MochiVae.load(tiny / "vae", device=CPU, precision="fp32")
    plan = replace(PLAIN, guidance_passes=passes)
    quick, plain = (
        LiveSampler(model_of(tiny, replace(plan, compile=compile_it)), vae, device=CPU) for compile_it in (True, False)
    )

    def made(*adapters: AdapterChoice, prompt: int = 5, negative: int = 0, seed: int = 0, **changes) -> int:
        asked = (caption(prompt), caption(negative, seed=3), SETTINGS.model_copy(update=changes), seed, adapters)
        found, expected = (sampler.latents(*asked, on_step=lambda *_: None) for sampler in (quick, plain))
        assert relative(found, expected) < 1e-5
        return graphs()

    quick.hold([style.path, motion.path])
    plain.hold([style.path, motion.path])
    first = made(style)
    assert first == 2
    for changes in ({"prompt": 9}, {"negative": 7}, {"prompt": 1, "seed": 4}, {"steps": 3, "guidance": 2.5}):
        assert made(style, **changes) == first
    for strength in (0.5, 0.25, -0.8, 1.0):
        assert made(replace(style, strength=strength)) == first
    settled = made()
    assert settled == first + 2
    for adapters in ((motion,), (style,), (), (replace(motion, strength=0.3),), (replace(style, strength=0.9),)):
        assert made(*adapters) == settled
    known = made(style, steps=6, guidance=[1.0, 4.0, 4.0, 4.0, 1.0, 1.0], step_cache=1e6)
    assert known - settled <= (0 if passes == "two" else 2)
    for adapters in ((style,), (), (motion,), (replace(style, strength=0.7), replace(motion, strength=0.0))):
        assert made(*adapters) == known


@pytest.mark.slow
def test_an_adapter_of_equal_rank_and_targets_compiles_nothing_whatever_its_alpha(tiny, tmp_path) -> None:
    """Another rank, or a second adapter in one video, is compiled once."""
    changes = {"a": {}, "b": {"alpha": 3}, "c": {"rslora": True}, "other rank": {"rank": 2}}
    files = {
        name: write_adapter(tmp_path / f"{name}.safetensors", tiny, seed, **settings)
        for seed, (name, settings) in enumerate(changes.items())
    }
    vae = MochiVae.load(tiny / "vae", device=CPU, precision="fp32")
    quick, plain = (LiveSampler(model_of(tiny, replace(PLAIN, compile=how)), vae, device=CPU) for how in (True, False))

    def made(**strengths: float) -> int:
        adapters = [AdapterChoice(files[name.replace("_", " ")], strength) for name, strength in strengths.items()]
        asked = (caption(5), caption(0), SETTINGS, 0, adapters)
        found, expected = (sampler.latents(*asked, on_step=lambda *_: None) for sampler in (quick, plain))
        assert relative(found, expected) < 1e-5
        return graphs()

    assert [made(**wish) for wish in ({"a": 1}, {"b": 1}, {"a": 0.5}, {"b": 0.7}, {"c": -1})] == [2] * 5
    assert [made(**wish) for wish in ({}, {"b": 0.2}, {"a": 0}, {"c": 1, "b": 0})] == [4] * 4
    quick.let_go([files["a"], files["b"], files["c"]])
    assert made(a=1) == 4, "what was let go comes back to its graphs"
    wishes = ({"a": 1, "b": 0.5}, {"c": 0.3}, {"other_rank": 1}, {"a": 1}, {})
    for wish in (*wishes, *wishes):  # the last slot is there from the third on
        made(**wish)
    settled = graphs()
    assert [made(**wish) for wish in (*wishes, {"b": 2, "c": 0.5}, {"other_rank": 0.5}, {"b": 0.1})] == [settled] * 8


@pytest.mark.slow
def test_with_room_made_before_each_shape_compiles_once_and_the_base_never_again(tiny, tmp_path) -> None:
    """In any order of choosing; what is used together is compiled once more."""
    ranks = {"a": 4, "b": 4, "c": 2}
    files = {
        name: write_adapter(tmp_path / f"{name}.safetensors", tiny, seed, rank=rank)
        for seed, (name, rank) in enumerate(ranks.items())
    }
    vae = MochiVae.load(tiny / "vae", device=CPU, precision="fp32")
    quick, plain = (LiveSampler(model_of(tiny, replace(PLAIN, compile=how)), vae, device=CPU) for how in (True, False))
    for path in files.values():
        quick.make_room([path])

    def made(*names: str) -> int:
        asked = (caption(5), caption(0), SETTINGS, 0, [AdapterChoice(files[name], 0.5) for name in names])
        found, expected = (sampler.latents(*asked, on_step=lambda *_: None) for sampler in (quick, plain))
        assert relative(found, expected) < 1e-5
        return graphs()

    assert [made(*names) for names in ((), "a", "c", (), "b", "a", "c", ())] == [2, 4, 6, 6, 6, 6, 6, 6]
    assert [made(*names) for names in ("ac", "bc", "c", "a", ())] == [8] * 5


class Waits(TorchDispatchMode):
    """Counts what a host must wait for a device for: reading a value, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize(("settings", "waits"), [({}, 0), ({"step_cache": 0.1}, 2 * 4)], ids=["exact", "step cache"])
def test_a_step_waits_for_nothing_but_the_step_cache(tiny, passes, settings, waits) -> None:
    """Of six steps, the first and the last are computed without asking."""
    model = model_of(tiny, replace(PLAIN, guidance_passes=passes))
    with Waits() as seen:
        asked = SETTINGS.model_copy(update={"steps": 6, **settings})
        generate_latents(model, caption(5), caption(0), asked, 0, on_step=lambda *_: None)
    assert seen.count == waits
