"""The plan that is picked: the fastest that fits, the same every time, and what is said where none does."""

from dataclasses import replace

import pytest
import torch
from test_footprint import CLIP, WORK

from mochi_lora.config.engine import EngineConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.choice import Room, candidates, choose, forecast, next_smaller, room_here
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.planning.workload import Films
from mochi_lora.spec import Bucket

H200 = card_named("H200")
HOST = 200.0
LONG = replace(WORK, bucket=Bucket(163, 480, 848))


def pick(gib, work=WORK, card=H200, host=HOST, **engine):
    return choose(EngineConfig(**engine), work, card, Room(gib, host), "cudnn")


@pytest.mark.parametrize("gib", [139.0, 40.0, 23.0, 15.0, 11.0])
@pytest.mark.parametrize("work", [WORK, LONG], ids=["37 frames", "163 frames"])
def test_the_pick_fits_and_no_other_that_fits_is_clearly_faster(gib, work):
    choice = pick(gib, work)
    assert choice.fits
    assert choice.pick.footprint.device <= choice.room.usable
    every = [forecast(plan, work, H200) for plan in candidates(EngineConfig(), work, H200, "cudnn")]
    fitting = [item for item in every if choice.room.holds(item.footprint, 1)]
    assert choice.pick.seconds * 0.95 <= min(item.seconds for item in fitting)


def test_the_same_question_has_the_same_answer():
    assert pick(23.0).pick == pick(23.0).pick


def test_less_memory_is_never_faster():
    seconds = [pick(gib).pick.seconds for gib in (139.0, 80.0, 40.0, 23.0, 15.0, 11.0)]
    assert seconds == sorted(seconds)


def test_exact_stays_bf16_and_smallest_takes_the_least():
    assert pick(23.0, plan="exact").pick.plan.precision == "bf16"
    least, fast = pick(139.0, plan="smallest").pick, pick(139.0).pick
    assert least.footprint.device < fast.footprint.device / 4
    assert least.seconds > fast.seconds


def test_rounding_the_base_must_be_worth_it():
    """On a card whose fp8 is 2 % faster, the exact plan is taken."""
    slow = replace(H200, products={"bf16": 750.0, "fp8": 780.0})
    assert pick(139.0, card=slow).pick.plan.precision == "bf16"
    assert pick(139.0).pick.plan.precision == "fp8"


@pytest.mark.parametrize(
    ("setting", "value"), [("precision", "int8"), ("checkpointing", "full:40,none"), ("block_swap", 7), ("compile", False)]
)
def test_a_part_set_by_hand_is_kept_and_the_rest_is_chosen(setting, value):
    plan = pick(60.0, **{setting: value}).pick.plan
    assert getattr(plan, setting) == value
    assert plan != pick(60.0).pick.plan


def test_a_plan_set_by_hand_in_every_part_is_taken_although_it_does_not_fit():
    choice = pick(
        20.0, precision="bf16", checkpointing="none", block_swap=0, compile=True, cpu_offload=False, attention="cudnn"
    )
    assert choice.pick.plan == Plan("cuda", "bf16", "cudnn", "none", compile=True)
    assert not choice.fits


@pytest.mark.parametrize(
    ("card", "settings", "told"),
    [
        ("RTX 3090", {"precision": "fp8"}, r"precision: fp8, but RTX 3090 has no fp8 .*set it to bf16, fp32, nf4 or int8"),
        (
            "A100 40GB",
            {"attention": "flash4"},
            r"attention: flash4 wants compute capability .*this GPU has 8\.0; set it to auto",
        ),
        ("RTX 4090", {"attention": "flash4"}, r"this GPU has 8\.9"),
        ("H200", {"attention": "cudnn", "precision": "fp32"}, "cudnn takes no float32, .*auto, efficient or math"),
    ],
)
def test_what_the_card_has_no_kernel_for_is_refused_with_what_it_has(card, settings, told):
    engine = EngineConfig(**settings)
    with pytest.raises(UserError, match=told):
        choose(engine, WORK, card_named(card), Room(200.0, HOST), engine.attention)
    with pytest.raises(UserError, match="RTX 3090 has no fp8"):  # a base that is stored so, too
        choose(EngineConfig(), replace(WORK, stored="fp8"), card_named("RTX 3090"), Room(200.0, HOST), "flash")


def test_auto_offers_no_precision_that_this_machine_has_no_kernels_for():
    small = Room(12.0, 20.0)
    nf4 = choose(EngineConfig(), WORK, card_named("RTX 3090"), small, "flash").pick.plan
    assert nf4.precision == "nf4", "the test is about a card that would take it"
    without = replace(card_named("RTX 3090"), lacks=frozenset({"nf4"}))
    assert choose(EngineConfig(), WORK, without, small, "flash").pick.plan.precision == "int8"


def test_smallest_does_not_round_the_base_of_videos():
    looking = replace(WORK, adapter=None, films=Films(CLIP, 64, guided=True, decoding_gib=8.0))
    assert pick(139.0, looking, plan="smallest").pick.plan.precision == "bf16"
    assert pick(139.0, plan="smallest").pick.plan.precision != "bf16", "of a step it does"


def test_the_next_smaller_plan_fits_the_host_and_rounds_nothing_for_little():
    found = choose(EngineConfig(), WORK, card_named("RTX 3060"), Room(12.0, 24.0), "flash")
    assert found.smaller is None or found.smaller.footprint.host <= 0.8 * 24
    assert choose(EngineConfig(), WORK, card_named("RTX 3060"), Room(12.0, 200.0), "flash").smaller is not None
    exact = choose(EngineConfig(), WORK, card_named("RTX 3090"), Room(24.0, 64.0), "flash")
    assert exact.pick.plan.precision == "bf16"
    assert exact.smaller.plan.precision == "bf16"


def test_where_nothing_fits_the_worst_moment_and_the_way_out_are_told():
    with pytest.raises(UserError, match=r"no plan fits this GPU.* needed while training, .*fewer frames.*data\.buckets"):
        pick(3.0, LONG)
    filmed = replace(WORK, films=Films(CLIP, 64, guided=True, decoding_gib=30.0))
    with pytest.raises(UserError, match=r"while decoding videos, .*in sample \(frames, .*or train\.sample_every 0"):
        pick(24.0, filmed)


def test_little_host_memory_forbids_what_is_pinned():
    poor, rich = pick(15.0, host=12.0).pick, pick(15.0).pick
    assert poor.footprint.host <= 0.8 * 12
    assert poor.seconds > rich.seconds
    with pytest.raises(UserError, match="GiB of host memory are needed"):
        pick(15.0, host=1.0)
    assert pick(15.0, replace(WORK, processes=4), host=40.0).pick.footprint.host <= 8


def test_parts_take_turns_only_where_memory_asks_for_it():
    filmed = replace(WORK, films=Films(CLIP, 64, guided=True, decoding_gib=8.0))
    assert not pick(139.0, filmed).pick.plan.cpu_offload
    assert pick(10.5, filmed, precision="bf16", block_swap=40).pick.plan.cpu_offload


def test_videos_are_made_in_bf16_and_swap_before_they_are_rounded():
    looking = replace(WORK, adapter=None, films=Films(CLIP, 64, guided=True, decoding_gib=8.0))
    plan = pick(15.0, looking).pick.plan
    assert plan.precision == "bf16"
    assert plan.checkpointing == "none"
    assert plan.block_swap > 0 or plan.cpu_offload
    assert pick(15.0, looking, precision="fp8").pick.plan.precision == "fp8"


def test_a_base_that_lies_there_quantised_stays_what_it_is():
    assert pick(139.0, replace(WORK, stored="fp8"), plan="exact").pick.plan.precision == "fp8"


def test_the_next_smaller_plan_is_clearly_smaller_and_the_last_has_none():
    choice = pick(139.0)
    assert choice.smaller.footprint.device < 0.93 * choice.pick.footprint.device
    chain = [choice.pick]
    while (smaller := next_smaller(EngineConfig(), WORK, H200, choice.room, chain[-1])) is not None:
        chain.append(smaller)
        assert len(chain) < 100
    assert chain[-1].footprint.device == pytest.approx(pick(139.0, plan="smallest").pick.footprint.device, rel=0.1)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"block_swap": 49}, r"engine\.block_swap: got 49, expected at most the model's 48 blocks"),
        ({"checkpointing": "full:50,none"}, r"engine\.checkpointing: full:50,none names 50 blocks, the model has 48"),
        ({"checkpointing": "full:4,none:3"}, "names 7 blocks"),
    ],
)
def test_counts_that_the_model_does_not_have_are_refused(setting, told):
    with pytest.raises(UserError, match=told):
        pick(139.0, **setting)
    with pytest.raises(UserError, match=told):
        resolve_plan(EngineConfig(device="cpu", **setting), WORK)


def test_on_a_cpu_everything_is_kept_and_exact_unless_asked_for():
    small = replace(WORK, bucket=Bucket(7, 32, 48))
    assert resolve_plan(EngineConfig(device="cpu"), small).plan == Plan("cpu", "fp32", "auto", "none")
    asked = EngineConfig(device="cpu", precision="nf4", checkpointing="offload", block_swap=2, compile=True)
    assert resolve_plan(asked, small).plan == Plan("cpu", "nf4", "auto", "offload", 2, compile=True)


def filming(frames: int, **changes):
    bucket = Bucket(frames, 480, 848)
    films = Films(bucket, 64, **{"guided": True, "decoding_gib": 8.0} | changes)
    return replace(WORK, bucket=bucket, batch=1, adapter=None, films=films)


def test_both_prompts_go_in_one_batch_where_that_saves_time_and_fits():
    """Nothing is saved on long clips whose weights stay; fetched in each pass they come once instead of twice."""
    assert pick(139.0, filming(163)).pick.plan.guidance_passes == "two"
    assert pick(139.0, filming(37)).pick.plan.guidance_passes == "two"
    assert pick(139.0, filming(37), block_swap=48).pick.plan.guidance_passes == "one"
    small = {"precision": "fp8"}
    assert pick(139.0, filming(1), **small).pick.plan.guidance_passes == "one"
    assert pick(139.0, filming(1, guided=False), **small).pick.plan.guidance_passes == "two"
    assert pick(139.0, filming(1), plan="smallest", **small).pick.plan.guidance_passes == "two"
    assert pick(139.0, replace(WORK, films=filming(1).films), **small).pick.plan.guidance_passes == "two", "training decides"
    tight = {"block_swap": 48, "cpu_offload": True}
    assert pick(2.5, filming(37, decoding_gib=0.5), **tight).pick.plan.guidance_passes == "two"
    assert pick(4.0, filming(37, decoding_gib=0.5), **tight).pick.plan.guidance_passes == "one"


def test_passes_set_by_hand_are_kept_and_their_memory_is_counted():
    one, two = (pick(139.0, filming(163), guidance_passes=passes).pick for passes in ("one", "two"))
    assert (one.plan.guidance_passes, two.plan.guidance_passes) == ("one", "two")
    moments = [dict(item.footprint.moments)["denoising videos"] for item in (one, two)]
    assert moments[0] - moments[1] == pytest.approx(3.1, abs=0.3)
    assert "guidance_passes one" in str(one.plan)
    assert resolve_plan(EngineConfig(device="cpu", guidance_passes="one"), filming(1)).plan.guidance_passes == "one"
    assert resolve_plan(EngineConfig(device="cpu"), filming(1)).plan.guidance_passes == "two"


@pytest.mark.parametrize(("device", "place"), [("cuda", 1), ("cuda:0", 0)])
@pytest.mark.parametrize(("share", "room"), [(40 / 140, 35), (1.0, 103)], ids=["capped", "whole"])
def test_the_room_here_is_what_is_free_or_held_unused_or_what_a_cap_leaves(device, place, share, room, monkeypatch):
    """torch takes "cuda" without a number for most figures, but not for the cap: a launch of one process has none."""
    asked = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: asked.append("page-locked memory is given back"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, gib in {"mem_get_info": (100, 140), "memory_allocated": 5, "memory_reserved": 8}.items():
        told = tuple(part * 2**30 for part in gib) if isinstance(gib, tuple) else gib * 2**30
        monkeypatch.setattr(torch.cuda, name, lambda _, told=told: told)

    def fraction(where):
        asked.append(torch.cuda._utils._get_device_index(where))
        return share

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    assert room_here(torch.device(device)).device == pytest.approx(room)
    assert asked == ["page-locked memory is given back", place]
