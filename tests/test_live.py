"""The live sampler: switching and re-weighting give what a fresh load gives, and read nothing again."""

import shutil
from pathlib import Path

import pytest
import torch
from adapter_files import write_adapter
from inputs import relative
from peft import get_peft_model_state_dict

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file
from mochi_lora.inference import live
from mochi_lora.inference.generate import generate_latents
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.sampler import Cancelled
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter, save_adapter
from mochi_lora.model.tiny import TEXT_WIDTH
from mochi_lora.model.vae import MochiVae

SETTINGS = SampleConfig(frames=7, height=32, width=48, steps=2, guidance=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """Two adapters of different ranks and targets, and one of DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "style.safetensors", tiny, 1),
        write_adapter(folder / "motion.safetensors", tiny, 2, rank=2, targets="visual_attention"),
        write_adapter(folder / "dora.safetensors", tiny, 3, dora=True),
    ]


@pytest.fixture
def files(written, tmp_path):
    """The same files, for a test that deletes or replaces them."""
    return [Path(shutil.copy(path, tmp_path)) for path in written]


@pytest.fixture
def sampler(load_tiny, tiny):
    return fresh(load_tiny, tiny)


def fresh(load_tiny, tiny) -> LiveSampler:
    return LiveSampler(load_tiny(), MochiVae.load(tiny / "vae", device=CPU, precision="fp32"), device=CPU)


def asked() -> tuple:
    draw = torch.Generator().manual_seed(0)
    text, null = TextEmbedding(torch.randn(5, TEXT_WIDTH, generator=draw)), TextEmbedding(torch.zeros(0, TEXT_WIDTH))
    return text, null, SETTINGS, 0


def sample(sampler: LiveSampler, *choices: tuple, on_step=lambda _done, _steps: None, cancelled=lambda: False) -> torch.Tensor:
    adapters = [AdapterChoice(path, strength) for path, strength in choices]
    return sampler.latents(*asked(), adapters, on_step=on_step, cancelled=cancelled)


def sample_attached(model, *choices: tuple) -> torch.Tensor:
    """By PEFT's own way: an adapter of its own for each file, with its alpha, and the strength as PEFT's scale."""
    names = [f"file{number}" for number in range(len(choices))]
    for name, (path, _) in zip(names, choices, strict=True):
        lora.put(model.transformer, load_adapter(path, assume_alpha_is_rank=False), name)
    with lora.strengths(model.transformer, names, [strength for _, strength in choices]):
        return generate_latents(model, *asked(), on_step=lambda _done, _steps: None)


def test_switching_gives_what_a_fresh_load_gives_bit_for_bit(sampler, load_tiny, tiny, written):
    style, motion, dora = written
    wishes = [
        [(style, 1.0)],
        [(style, 0.4)],
        [(motion, 1.0), (style, 0.7)],
        [],
        [(dora, 1.0)],
        [(motion, -0.5)],
        [(style, 1.0)],
    ]
    results = [sample(sampler, *wish) for wish in wishes]
    for wish, result in zip(wishes, results, strict=True):
        assert torch.equal(result, sample(fresh(load_tiny, tiny), *wish)), wish
    assert torch.equal(results[0], results[-1])
    assert len({tuple(result.flatten()[:8].tolist()) for result in results[:-1]}) == len(wishes) - 1, (
        "each wish is another video"
    )


def test_every_kind_of_adapter_acts_as_peft_says(sampler, load_tiny, tiny, tmp_path):
    """Rank, targets, alpha, rsLoRA, DoRA; alone, mixed, weighed, after one another in one sampler."""
    kinds = {
        "style": {},
        "same shape": {"alpha": 3},
        "root": {"rslora": True, "alpha": 5},
        "narrow": {"rank": 2, "alpha": 7, "targets": "visual_attention"},
        "dora": {"dora": True, "alpha": 3},
    }
    files = {
        name: write_adapter(tmp_path / f"{name}.safetensors", tiny, seed, **settings)
        for seed, (name, settings) in enumerate(kinds.items())
    }
    wishes = [{name: 1.0} for name in kinds] + [{name: -0.3} for name in kinds]
    wishes += [{"style": 1.0, "same shape": 0.5}, {"root": 0.7, "narrow": 1.0}, {"same shape": 0.2, "dora": 0.6, "style": 0.4}]
    for wish in wishes:
        choices = [(files[name], strength) for name, strength in wish.items()]
        assert relative(sample(sampler, *choices), sample_attached(load_tiny(), *choices)) < 1e-5, wish
    first = [(files["style"], 1.0)]
    assert torch.equal(sample(sampler, *first), sample_attached(load_tiny(), *first)), "alpha / rank is a power of two"


def test_ranks_and_alphas_of_single_modules_count(sampler, load_tiny, tiny, tmp_path):
    path = write_adapter(tmp_path / "even.safetensors", tiny, 1)
    adapter = load_adapter(path, assume_alpha_is_rank=False)
    odd = "transformer_blocks.0.attn1.to_q"
    config = {**adapter.config, "alpha_pattern": {odd: 20}, "rank_pattern": {odd: 2}}
    cut = {f"{odd}.lora_A.weight": (slice(2),), f"{odd}.lora_B.weight": (slice(None), slice(2))}
    tensors = {key: tensor[cut.get(key, ())].contiguous() for key, tensor in adapter.tensors.items()}
    save_adapter(tmp_path / "odd.safetensors", lora.Adapter(tensors, config, "odd"), {"step": 1})
    choices = [(tmp_path / "odd.safetensors", 1.0)]
    found = sample(sampler, *choices)
    assert relative(found, sample_attached(load_tiny(), *choices)) < 1e-5
    assert relative(found, sample(sampler, (path, 1.0))) > 1e-3


def test_what_is_held_stays_as_read_when_the_file_is_written_over(sampler, files):
    """Files are read as mapped memory, which would change with the file."""
    held = sampler.hold(files[:1])[0]
    before = {key: tensor.clone() for key, tensor in held.adapter.tensors.items()}
    with files[0].open("r+b") as file:
        file.write(bytes(files[0].stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in held.adapter.tensors.items())


def test_files_of_one_shape_share_their_place_on_the_transformer(sampler, tiny, tmp_path):
    files = [write_adapter(tmp_path / f"{seed}.safetensors", tiny, seed, alpha=seed + 1) for seed in range(4)]
    transformer = sampler._model.transformer
    sampler.hold(files)
    assert len(transformer.peft_config) == 1
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in transformer.named_parameters()}
    for path in files:
        sample(sampler, (path, 0.5))
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in transformer.named_parameters()} == before
    sample(sampler, *((path, 0.5) for path in files[:3]))
    assert len(transformer.peft_config) == 3
    sampler.let_go(files[1:3])
    assert len(transformer.peft_config) == 2, "no more places than files held"
    sampler.let_go([files[0], files[3]])
    assert not getattr(transformer, "peft_config", {})


def test_room_made_before_is_there_whatever_comes_and_goes(sampler, load_tiny, tiny, written, tmp_path):
    """A slot for each shape of single files, two where two are used together; nothing of the files is held."""
    style, motion, _ = written
    other = write_adapter(tmp_path / "other.safetensors", tiny, 4, alpha=3)
    for paths in ([style], [motion], [other], [style, other]):
        sampler.make_room(paths)
    transformer = sampler._model.transformer
    there = dict.fromkeys(transformer.peft_config)
    assert (len(there), len(sampler._held)) == (3, 0)
    wishes = [[], [(motion, 1.0)], [(other, 0.5), (style, 1.0)], [(style, 0.3)], []]
    for wish in wishes:
        assert torch.equal(sample(sampler, *wish), sample(fresh(load_tiny, tiny), *wish)), wish
    sampler.let_go([style, motion, other])
    assert dict.fromkeys(transformer.peft_config) == there
    with pytest.raises(UserError, match="no such adapter file"):
        sampler.make_room([tmp_path / "nowhere.safetensors"])
    assert dict.fromkeys(transformer.peft_config) == there


def test_strength_zero_is_the_base_bit_for_bit(sampler, written):
    base = sample(sampler)
    assert not torch.equal(sample(sampler, (written[0], 1.0)), base)
    assert torch.equal(sample(sampler, *((path, 0.0) for path in written)), base)


def test_no_file_is_read_again_for_a_switch(sampler, files):
    style, motion, _ = files
    first = sample(sampler, (style, 1.0)), sample(sampler, (motion, 1.0))
    style.unlink()
    motion.unlink()
    assert torch.equal(sample(sampler, (style, 1.0)), first[0])
    assert torch.equal(sample(sampler, (motion, 1.0)), first[1])
    sample(sampler, (motion, 0.3), (style, 0.6))


def test_a_switch_moves_no_weight_and_makes_no_module(sampler, files):
    style, motion, _ = files
    sampler.hold([style, motion])
    transformer = sampler._model.transformer
    before = {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()}
    modules = [id(module) for module in transformer.modules()]
    for choices in ([(style, 1.0)], [(motion, 0.2)], [], [(style, 0.3), (motion, 1.0)]):
        sample(sampler, *choices)
    assert {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()} == before
    assert [id(module) for module in transformer.modules()] == modules


def test_the_model_is_walked_for_a_slot_once_and_not_for_a_switch(sampler, files, monkeypatch):
    """At 48 blocks such a walk takes a tenth of a second, and PEFT's by name several."""
    style, motion, dora = files
    sampler.hold(files)
    transformer, walks, walk = sampler._model.transformer, [], type(sampler._model.transformer).named_parameters
    monkeypatch.setattr(
        transformer, "named_parameters", lambda *args, **more: walks.append(1) or walk(transformer, *args, **more)
    )
    for name in ("get_peft_model_state_dict", "set_peft_model_state_dict"):
        monkeypatch.setattr(lora, name, lambda *_, **__: walks.append(1))
    for choices in ([(style, 1.0)], [(style, 0.3), (motion, 1.0)], [(dora, 0.5)], [(motion, 0.2)]):
        sample(sampler, *choices)
    assert walks == []
    monkeypatch.undo()
    monkeypatch.setattr(lora, "places_of", lambda *_: walks.append(1) or {})
    sampler.let_go(files)
    sampler.hold([style])
    assert walks == [1]


def test_slots_are_found_where_peft_keeps_them(sampler, files):
    """Also the second of eleven, whose name begins as the last one's does."""
    sampler.hold(files)
    transformer = sampler._model.transformer
    sampler._place(sampler.hold(files[:1] * 9), [1.0] * 9)
    assert [slot.name for slot in sampler._slots][1::9] == ["slot1", "slot10"]
    for slot in sampler._slots:
        peft = get_peft_model_state_dict(transformer, adapter_name=slot.name)
        assert {key: place.data_ptr() for key, place in slot.places.items()} == {
            key: one.data_ptr() for key, one in peft.items()
        }


def test_a_file_that_was_replaced_is_read_anew(sampler, files):
    style, motion, _ = files
    sample(sampler, (style, 1.0))
    expected = sample(sampler, (motion, 1.0))
    style.write_bytes(motion.read_bytes())
    assert torch.equal(sample(sampler, (style, 1.0)), expected)
    assert len(sampler._model.transformer.peft_config) == 1, "the old factors are gone"


def test_a_file_that_is_replaced_while_its_videos_are_made_is_refused(sampler, files):
    """What stands beside a video says which bytes made it, and the videos of one call are of one adapter."""
    style, motion, _ = files
    hashes = {path: sha256_of_file(path) for path in (style, motion)}
    sample(sampler, (style, 1.0), (motion, 0.5))
    sampler.require_unchanged(hashes)
    style.write_bytes(motion.read_bytes())
    sample(sampler, (style, 1.0))
    with pytest.raises(UserError, match=f"{style.name}: replaced while its videos were being made.*copy the file"):
        sampler.require_unchanged(hashes)


def test_the_same_file_twice_acts_twice(sampler, written):
    twice = sample(sampler, (written[0], 0.3), (written[0], 0.5))
    assert torch.allclose(twice, sample(sampler, (written[0], 0.8)), atol=1e-4)
    assert not torch.allclose(twice, sample(sampler, (written[0], 0.5)), atol=1e-4)


def test_what_was_let_go_is_gone(sampler, files):
    base = sample(sampler)
    sample(sampler, (files[0], 1.0))
    sampler.let_go([files[0]])
    assert not getattr(sampler._model.transformer, "peft_config", {})
    assert torch.equal(sample(sampler), base)


def test_an_adapter_of_another_architecture_is_refused_and_leaves_nothing(sampler, files, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    style = files[0]
    expected = sample(sampler, (style, 1.0))
    with safe_open(style, framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({key: tensor[..., :3].contiguous() for key, tensor in tensors.items()}, tmp_path / "odd.safetensors", header)
    with pytest.raises(UserError, match=r"odd\.safetensors.*shape"):
        sample(sampler, (style, 1.0), (tmp_path / "odd.safetensors", 1.0))
    assert len(sampler._model.transformer.peft_config) == 1
    assert torch.equal(sample(sampler, (style, 1.0)), expected)


def test_cancelling_ends_between_two_steps_and_harms_nothing(sampler, written):
    expected, steps = sample(sampler, (written[0], 1.0)), []
    with pytest.raises(Cancelled):
        sample(sampler, (written[0], 0.5), on_step=lambda done, _steps: steps.append(done), cancelled=lambda: bool(steps))
    assert steps == [1]
    assert torch.equal(sample(sampler, (written[0], 1.0)), expected)


class _Part:
    """Stands for a model, and remembers where it is."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> None:
        self.device = device


def test_under_offloading_only_the_part_that_works_is_on_the_device(monkeypatch):
    model, vae = _Part("meta"), _Part("cpu")
    sampler = LiveSampler(model, vae, device=torch.device("meta"), offload=True)
    places = []
    monkeypatch.setattr(live, "render", lambda *_: places.append((model.device.type, vae.device.type)))
    monkeypatch.setattr(live, "generate_latents", lambda *_, **__: places.append((model.device.type, vae.device.type)))
    model.transformer = None  # no adapter is asked for
    sampler.latents(None, None, SETTINGS, 0, [], on_step=lambda _done, _steps: None)
    sampler.frames(torch.zeros(1))
    sampler.latents(None, None, SETTINGS, 0, [], on_step=lambda _done, _steps: None)
    assert places == [("meta", "cpu"), ("cpu", "meta"), ("meta", "cpu")]
    sampler.rest()
    assert (model.device.type, vae.device.type) == ("cpu", "cpu")
