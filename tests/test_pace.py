"""Predicted time: against what was measured, and in what must hold of any plan and card."""

from dataclasses import replace

import pytest
from test_footprint import CLIP, WORK, lines

from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.planning.cards import card_named, card_nearest, cards, price_of
from mochi_lora.planning.pace import decoding_seconds, seconds_per_guided_step, seconds_per_pass, seconds_per_step
from mochi_lora.spec import Bucket

H200 = card_named("H200")
PLAN = Plan("cuda", "bf16", "cudnn", "attention_saved", compile=True)


def step(card=H200, work=WORK, **changes):
    return seconds_per_step(replace(PLAN, **changes), work, card)


@pytest.mark.parametrize("name", ["train_step.jsonl", "prototype.jsonl"])
def test_predictions_are_within_fifteen_percent_of_what_was_measured(name):
    checked = 0
    for line in lines(name):
        if line["trainer"] == "diffusers" or "H200" not in line["gpu"] or line.get("error"):
            continue
        plan = Plan(**line["plan"])
        plan = replace(plan, attention="cudnn") if plan.attention == "auto" else plan
        work = replace(WORK, bucket=Bucket(line["frames"], line["height"], line["width"]))
        assert seconds_per_step(plan, work, H200) == pytest.approx(line["step_seconds"]["median"], rel=0.15), line["plan"]
        checked += 1
    assert checked >= 5


def test_what_is_recomputed_costs_time_in_order():
    seconds = [step(checkpointing=mode) for mode in ("none", "mlp_recomputed", "attention_saved", "full")]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4
    between = step(checkpointing="full:24,none")
    assert between == pytest.approx((step(checkpointing="full") + step(checkpointing="none")) / 2)


def test_transfers_show_in_part_while_there_is_work_to_hide_them_and_in_full_without():
    slow_bus = replace(H200, host=0.5)
    hidden = step(block_swap=48) - step()
    assert 0 < hidden < 0.2 * step()
    assert step(slow_bus, block_swap=48) > 5 * step()
    assert step(slow_bus, checkpointing="offload") > 5 * step()
    assert step(checkpointing="offload", block_swap=48) > step(checkpointing="offload")


def test_micro_steps_and_samples_multiply_the_work():
    fixed = 2 * step() - step(work=replace(WORK, micro_steps=2))
    assert 0 <= fixed < 0.05
    assert step(work=replace(WORK, batch=2)) == pytest.approx(2 * step(), rel=0.05)


def test_a_card_without_fp8_products_is_not_faster_in_fp8():
    a100 = card_named("A100 40GB")
    assert step(a100, precision="fp8", attention="flash") > step(a100, attention="flash")
    assert "fp8" not in a100.precisions
    assert step(precision="fp8") < step()


def test_quantised_for_memory_alone_is_slower_than_bf16():
    assert step() < step(precision="int8") < 1.1 * step()
    assert step() < step(precision="nf4") < 1.1 * step()


def test_the_kernel_called_math_is_the_slowest_and_float32_is_slower():
    assert step(attention="math") > 2 * step(attention="efficient") > 2 * step(attention="flash")
    assert step(attention="efficient", precision="fp32") > 1.5 * step(attention="efficient")


def test_attention_rates_lie_between_their_neighbours_and_end_with_the_last():
    (below, *_), (above, *_) = H200.attention_rates("flash4", 11_250), H200.attention_rates("flash4", 23_970)
    assert above < H200.attention_rates("flash4", 17_000)[0] < below
    assert H200.attention_rates("flash4", 10**6) == H200.attention_rates("flash4", 44_640)
    assert H200.attention_rates("flash4", 7) == H200.attention_rates("flash4", 11_250)
    a100 = card_named("A100 80GB")
    assert a100.attention_rates("cudnn", 11_250) == a100.attention_rates("flash", 11_250)  # of a kernel nobody measured there
    assert a100.attention_rates("efficient", 11_250) < a100.attention_rates("flash", 11_250)


def test_a_pass_is_a_part_of_a_step():
    assert seconds_per_pass(PLAN, replace(WORK, adapter=None), H200) < step() / 2


def test_a_decoded_video_takes_what_our_vae_was_measured_at():
    found = {
        Bucket(line["frames"], line["height"], line["width"]): line["clip_seconds"]["median"]
        for line in lines("encode.jsonl")
        if line["what"] == "decode"
        and line["implementation"] == "mochi-lora"
        and "H200" in line["gpu"]
        and not line["channels"]
    }
    assert {bucket.frames for bucket in found} == {37, 163}
    for bucket, seconds in found.items():
        assert decoding_seconds(bucket, H200) == pytest.approx(seconds, rel=0.03), bucket


def test_only_measured_cards_give_one_figure():
    assert [card.name for card in cards() if card.spread(PLAN) == (1.0, 1.0)] == ["H200"]
    low, high = card_named("RTX 4090").spread(PLAN)
    assert low < 1 < high
    for never_timed in ({"precision": "nf4"}, {"precision": "int8"}, {"precision": "fp32"}, {"attention": "math"}):
        assert H200.spread(replace(PLAN, **never_timed)) == (low, high), "a step at full size of this was never timed"


def test_a_card_is_found_by_a_part_of_its_name_and_a_stranger_is_told_the_names():
    assert card_named("nvidia geforce rtx 4090").name == "RTX 4090"
    assert card_named("a100-40").name == "A100 40GB"
    assert card_nearest(16).name == "RTX 4060 Ti 16GB"
    with pytest.raises(UserError, match=r"--gpu A100: expected one of H200, .*did you mean A100 80GB or A100 40GB\?"):
        card_named("A100")
    with pytest.raises(UserError, match=r"--gpu TPU: expected one of"):
        card_named("TPU")


def test_every_price_is_of_a_card_in_the_table_with_source_and_date():
    told = [price for card in cards() if (price := price_of(card))]
    assert len(told) >= 5
    assert all(usd > 0 and ", 20" in source for usd, source in told)


def test_a_longer_clip_takes_more_than_its_share():
    """Attention grows with the square."""
    double = replace(WORK, bucket=Bucket(79, 480, 848))  # 14 latent frames instead of 7
    assert CLIP.tokens * 2 == double.bucket.tokens
    assert step(work=double) > 2.2 * step()


def test_a_guided_step_is_two_passes_or_one_over_twice_the_tokens():
    looking = replace(WORK, adapter=None)
    two, one = (seconds_per_guided_step(replace(PLAN, guidance_passes=passes), looking, H200) for passes in ("two", "one"))
    assert two == 2 * seconds_per_pass(PLAN, looking, H200)
    assert one == seconds_per_pass(PLAN, replace(looking, batch=2), H200)
    assert 0.99 * two < one < two
