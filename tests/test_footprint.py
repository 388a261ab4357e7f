"""Predicted memory: against tensors that are there, against what was measured, and in what must hold of any plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import MochiTransformer3DModel

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.model.adapter import attach
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.weights import random_transformer
from mochi_lora.planning.footprint import GIB, fitted, kept_bytes, predict_memory, split_bytes, weight_bytes
from mochi_lora.planning.workload import AdapterSize, Films, ModelSize, Workload
from mochi_lora.runs.workloads import adapter_parameters
from mochi_lora.spec import TRANSFORMER_PARAMETERS, Bucket

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MOCHI = ModelSize.of({})
CLIP = Bucket(37, 480, 848)
ADAPTER = AdapterSize(32_882_688, 8, averaged=False)  # rank 16, joint attention
WORK = Workload(MOCHI, CLIP, 1, 1, ADAPTER, None)
FULL = Plan("cuda", "bf16", "cudnn", "full", compile=True)


@pytest.mark.parametrize("config", [{}, TRANSFORMER, {"num_layers": 3, "in_channels": 4}], ids=["published", "tiny", "other"])
def test_the_counts_of_parameters_are_those_of_the_model(config):
    with init_empty_weights():
        model = MochiTransformer3DModel.from_config(config)
    size = ModelSize.of(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    blocks = {name: module for name, module in model.named_modules() if name.startswith("transformer_blocks.")}
    linears = {name: (m.in_features, m.out_features) for name, m in blocks.items() if isinstance(m, torch.nn.Linear)}
    assert {name: (inputs, outputs) for name, inputs, outputs in size.linears()} == linears
    assert MOCHI.parameters == TRANSFORMER_PARAMETERS


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8", "nf4"])
def test_the_predicted_base_is_what_its_tensors_take(precision):
    """Scales per channel are not counted: 2 % of rows as short as the tiny model's, a thousandth of Mochi's."""
    model = random_transformer(TRANSFORMER, device=torch.device("cpu"), precision=precision)
    there = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert weight_bytes(ModelSize.of(TRANSFORMER), precision) == pytest.approx(there, rel=0.03)


@pytest.mark.parametrize("targets", ["visual_attention", "joint_attention", "joint_attention_mlp", r"norm1\..*"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_has_as_many_parameters_as_predicted(targets, dora):
    settings = AdapterConfig(rank=4, alpha=4, targets=targets, dora=dora)
    model = random_transformer(TRANSFORMER, device=torch.device("cpu"), precision="fp32")
    there = sum(parameter.numel() for parameter in attach(model, settings, 0).values())
    assert adapter_parameters(settings, ModelSize.of(TRANSFORMER)) == there


def lines(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


@pytest.mark.parametrize("name", ["train_step.jsonl", "prototype.jsonl"])
def test_predictions_are_within_eight_percent_of_what_was_measured(name):
    checked = 0
    for line in lines(name):
        if line["trainer"] == "diffusers" or "H200" not in line["gpu"] or line.get("error"):
            continue
        plan = Plan(**line["plan"])
        work = replace(WORK, bucket=Bucket(line["frames"], line["height"], line["width"]))
        predicted = dict(predict_memory(plan, work).moments)["training"]
        predicted += line.get("weights_gib", 0) and line["weights_gib"] - weight_bytes(MOCHI, plan.precision) / GIB
        assert predicted == pytest.approx(line["allocated_gib"], rel=0.08), line["plan"]
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("compiled", [False, True])
def test_modes_keep_more_from_the_leanest_to_the_richest(compiled):
    kept = [
        kept_bytes(mode, replace(FULL, compile=compiled), WORK)
        for mode in ("full", "attention_saved", "mlp_recomputed", "none")
    ]
    assert kept == sorted(kept)
    device = [predict_memory(replace(FULL, checkpointing=mode, compile=compiled), WORK).device for mode in ("offload", "none")]
    assert device[0] < device[1]


def test_the_kernel_called_math_holds_all_scores():
    """Three float32 copies of S x S for each head: 11.3 GiB each at 37 frames."""
    plain, written_out = (predict_memory(replace(FULL, attention=name), WORK) for name in ("flash", "math"))
    for (_, before), (moment, after) in zip(plain.moments, written_out.moments, strict=True):
        assert after - before == pytest.approx(3 * 11.3, rel=0.01), moment
    shared = (predict_memory(replace(FULL, attention=name), replace(WORK, context=2)).device for name in ("math", "flash"))
    assert next(shared) - next(shared) == pytest.approx(3 * 11.3 / 2, rel=0.01), "context ranks have half the heads"


def test_float32_doubles_what_is_kept():
    half, whole = (kept_bytes("mlp_recomputed", replace(FULL, precision=name), WORK) for name in ("bf16", "fp32"))
    assert whole == pytest.approx(2 * half, rel=0.01)


def test_rich_blocks_at_the_end_cost_less_than_at_the_beginning():
    """The last blocks' backward comes first: what they keep is gone when an earlier block computes its own again."""
    last, first = (predict_memory(replace(FULL, checkpointing=text), WORK) for text in ("full:44,none", "none:4,full"))
    assert last.device < first.device


def test_kept_activations_of_offloaded_blocks_are_pinned_and_not_on_the_device():
    plain, offloaded = (predict_memory(replace(FULL, checkpointing=mode), WORK) for mode in ("attention_saved", "offload"))
    per_block = kept_bytes("attention_saved", FULL, WORK) / GIB
    assert offloaded.pinned == pytest.approx(48 * per_block)
    assert plain.device - offloaded.device == pytest.approx(46 * per_block)
    assert offloaded.host - plain.host == pytest.approx(offloaded.pinned)


def test_swapped_blocks_leave_two_places_on_the_device():
    plain, swapped = (predict_memory(replace(FULL, block_swap=count), WORK) for count in (0, 48))
    block = (MOCHI.visual + MOCHI.text + MOCHI.modulation) * 2 / GIB
    assert swapped.pinned == pytest.approx(48 * block)
    assert plain.device - swapped.device == pytest.approx(46 * block)


def test_decoding_counts_beside_the_transformer_unless_they_take_turns():
    filmed = replace(WORK, films=Films(CLIP, 64, guided=True, decoding_gib=30.0))
    beside, turned = (predict_memory(replace(FULL, cpu_offload=turn), filmed) for turn in (False, True))
    assert beside.worst == "decoding videos"
    assert beside.device - dict(turned.moments)["decoding videos"] == pytest.approx(weight_bytes(MOCHI, "bf16") / GIB)
    assert turned.host - beside.host == pytest.approx(weight_bytes(MOCHI, "bf16") / GIB)
    assert predict_memory(FULL, WORK).worst == "training"


def test_more_samples_and_optimiser_states_take_more():
    one, two = (predict_memory(FULL, replace(WORK, batch=batch)).device for batch in (1, 2))
    fixed = fitted().base_gib + (weight_bytes(MOCHI, "bf16") + ADAPTER.bytes) / GIB
    assert two - fixed == pytest.approx(2 * (one - fixed))
    assert AdapterSize(10, 8, averaged=True).bytes == 10 * (4 + 4 + 8 + 4)


def test_without_an_adapter_nothing_is_kept_for_a_backward_pass():
    looking = replace(WORK, adapter=None)
    assert predict_memory(replace(FULL, checkpointing="none"), looking).device < predict_memory(FULL, WORK).device
    assert predict_memory(replace(FULL, checkpointing="offload"), looking).pinned == 0


def test_a_quantised_base_is_whole_on_the_host_of_each_shard_rank_before_it_is_split():
    whole = {precision: predict_memory(replace(FULL, precision=precision), WORK).host for precision in ("fp8", "bf16")}
    split = {precision: predict_memory(replace(FULL, precision=precision, shard=8), WORK).host for precision in whole}
    assert split["fp8"] - whole["fp8"] == pytest.approx(sum(split_bytes(MOCHI, "fp8")) / GIB)
    assert split["bf16"] == whole["bf16"]  # mapped from its files


def test_where_nothing_is_trained_the_vae_waits_beside_the_transformer():
    films = Films(CLIP, 64, guided=True, decoding_gib=5.0)
    work = replace(WORK, adapter=None, films=films)
    waits = replace(work, films=replace(films, vae_gib=0.9))

    def denoising(plan, work):
        return dict(predict_memory(plan, work).moments)["denoising videos"]

    assert denoising(FULL, waits) - denoising(FULL, work) == pytest.approx(0.9)
    turned = replace(FULL, cpu_offload=True)
    assert denoising(turned, waits) == denoising(turned, work)
    assert denoising(FULL, replace(waits, adapter=ADAPTER)) == denoising(FULL, replace(work, adapter=ADAPTER))
