"""Predicted traffic: against the bytes that real processes hand to their collectives, and in what must hold of its time."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from gang import Ranks, together
from inputs import SHAPE, captions, normal
from test_context import PLAIN, model_of
from test_footprint import WORK as MOCHI_WORK

from mochi_lora.engine import compiled as compiled_blocks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.shards import GATHER
from mochi_lora.model.flow import velocity_loss
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.parallel.mesh import reduce_gradients
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.pace import seconds_per_pass, seconds_per_step
from mochi_lora.planning.traffic import pass_traffic, reduce_seconds, step_traffic
from mochi_lora.planning.workload import AdapterSize, ModelSize, Workload
from mochi_lora.spec import Bucket

H200 = card_named("H200")
PLAN = Plan("cuda", "bf16", "cudnn", "attention_saved", compile=True)
LENGTHS = (5, 2)
LAYERS = 5
CLIP = Bucket(7, 64, 96)


class Counter:
    """Bytes handed to each collective of this process; of a gather, the whole."""

    def __init__(self) -> None:
        self.bytes = {"all_to_all_single": 0, "all_gather": 0, GATHER: 0, "all_reduce": 0}
        for name in self.bytes:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, collective):
        def counted(first, *others, **named):
            self.bytes[name] += sum(tensor.nbytes for tensor in (first if isinstance(first, list) else [first]))
            return collective(first, *others, **named)

        return counted

    def taken(self) -> dict[str, int]:
        taken, self.bytes = self.bytes, dict.fromkeys(self.bytes, 0)
        return taken


def counted(ranks: Ranks, plans: tuple[Plan, ...], layers: int) -> list[tuple[dict, dict, int]]:
    """Of each plan the bytes of a step and of a pass without gradients, each after one of its kind; trained parameters."""
    compiled_blocks.BACKEND = "aot_eager"
    counter, found = Counter(), []
    for plan in plans:
        model = model_of(ranks, plan, layers=layers)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        taken = []
        for act in (step, look):
            for _ in range(2):
                counter.taken()
                act(model, trained, ranks)
            taken.append(counter.taken())
        found.append((*taken, sum(parameter.numel() for parameter in trained)))
    return found


def step(model: VelocityModel, trained: list[torch.Tensor], ranks: Ranks) -> None:
    predicted = velocity(model)
    loss = velocity_loss(predicted, normal(len(LENGTHS), *SHAPE, seed=9)).mean()
    loss.backward()
    reduce_gradients(trained, loss.detach(), ranks.layout)


@torch.no_grad()
def look(model: VelocityModel, _trained: list[torch.Tensor], _ranks: Ranks) -> None:
    velocity(model)


def velocity(model: VelocityModel) -> torch.Tensor:
    return model(normal(len(LENGTHS), *SHAPE), torch.linspace(0.3, 0.8, len(LENGTHS)), captions(*LENGTHS))


def work_of(parameters: int, layers: int = LAYERS, **changes: int) -> Workload:
    size = ModelSize.of(TRANSFORMER | {"num_layers": layers})
    adapter = AdapterSize(parameters, 8, averaged=False)
    return Workload(size, CLIP, len(LENGTHS), 1, adapter, None, text_tokens=max(LENGTHS), **changes)


def require_counted(told: dict[str, int], predicted, tolerance: float = 0.0) -> None:
    for name, expected in (
        ("all_to_all_single", predicted.exchanged),
        ("all_gather", predicted.collected),
        (GATHER, predicted.gathered),
        ("all_reduce", predicted.reduced),
    ):
        assert told[name] == pytest.approx(expected, rel=tolerance, abs=0), name


@pytest.mark.slow
def test_context_ranks_hand_over_the_predicted_bytes_in_every_mode_and_precision():
    world = 2
    modes = ("none", "mlp_recomputed", "attention_saved", "full", "offload", "attention_saved:2,none")
    plans = [replace(PLAIN, checkpointing=mode) for mode in modes]
    plans += [replace(PLAIN, checkpointing="full", precision=precision) for precision in ("bf16", "fp8")]
    assert work_of(1).bucket.latent_shape == SHAPE
    for rank in together(world, counted, tuple(plans), LAYERS, parallel=f"context:{world}"):
        for plan, (stepped, looked, parameters) in zip(plans, rank, strict=True):
            work, placed = work_of(parameters, context=world, world=world), replace(plan, context=world)
            require_counted(stepped, step_traffic(placed, work))
            require_counted(looked, pass_traffic(placed, work))
            assert stepped["all_to_all_single"] > 2 * looked["all_to_all_single"] > 0 or plan.checkpointing == "none"


@pytest.mark.slow
def test_compiled_blocks_hand_over_the_same():
    plan, layers = replace(PLAIN, checkpointing="attention_saved", compile=True), 2
    for ((stepped, looked, parameters),) in together(2, counted, (plan,), layers, parallel="context:2"):
        work, placed = work_of(parameters, layers, context=2, world=2), replace(plan, context=2)
        require_counted(stepped, step_traffic(placed, work))
        require_counted(looked, pass_traffic(placed, work))


@pytest.mark.slow
def test_shard_ranks_gather_the_predicted_bytes_at_every_precision():
    """What is stored begins at multiples of 256 bytes, which shows in linears as small as these."""
    world = 3
    plans = [replace(PLAIN, checkpointing="full", precision=precision) for precision in ("fp32", "bf16", "fp8", "int8", "nf4")]
    plans += [replace(PLAIN, checkpointing="none")]
    for rank in together(world, counted, tuple(plans), LAYERS, parallel=f"shard:{world}"):
        for plan, (stepped, looked, parameters) in zip(plans, rank, strict=True):
            work, placed = work_of(parameters, world=world), replace(plan, shard=world)
            require_counted(stepped, step_traffic(placed, work), 0.05)
            require_counted(looked, pass_traffic(placed, work), 0.05)
        assert rank[0][0] == rank[-1][0], "whatever is recomputed"
        assert rank[0][0]["all_reduce"] == 4 * (rank[0][2] + 1)


def launch(world: int = 8, hosts: int = 1, **changes: int) -> Workload:
    return replace(MOCHI_WORK, world=world, processes=world // hosts, **changes)


def test_of_one_process_nothing_is_sent_and_no_time_is_added():
    alone = step_traffic(PLAN, MOCHI_WORK)
    assert alone.sum == 0
    slow = replace(H200, link=1e-6, network=1e-6)
    assert seconds_per_step(PLAN, MOCHI_WORK, slow) == seconds_per_step(PLAN, MOCHI_WORK, H200)


def test_micro_steps_exchange_each_and_reduce_once():
    placed = replace(PLAN, context=2)
    one, three = (step_traffic(placed, launch(2, context=2, micro_steps=times)) for times in (1, 3))
    assert three.exchanged == 3 * one.exchanged
    assert three.reduced == one.reduced == 4 * (MOCHI_WORK.adapter.parameters + 1)


def test_exchanges_show_in_full_and_gathers_by_what_two_gpus_lost():
    bare, ten = replace(H200, link=1e9), replace(H200, link=10.0)
    placed, work = replace(PLAN, context=2), launch(2, context=2)
    shown = seconds_per_step(placed, work, ten) - seconds_per_step(placed, work, bare)
    traffic = step_traffic(placed, work)
    carried = (traffic.exchanged + traffic.collected + 2 * traffic.reduced) / 2
    assert shown == pytest.approx(carried / 10e9, rel=1e-3)
    split = replace(PLAN, shard=2)
    lost = seconds_per_step(split, launch(2), H200) - seconds_per_step(PLAN, launch(2), H200)
    gathered = step_traffic(split, launch(2)).gathered / 2
    assert lost == pytest.approx(0.9 * gathered / (H200.link * 1e9), rel=0.01)
    assert seconds_per_step(split, launch(2), ten) > gathered / 10e9 > seconds_per_step(PLAN, launch(2), H200)


def test_a_group_over_two_hosts_goes_by_the_network():
    placed = replace(PLAN, context=8)
    one_host, two_hosts = (seconds_per_step(placed, launch(8, hosts, context=8), H200) for hosts in (1, 2))
    apart = seconds_per_step(replace(PLAN, context=4), launch(8, 2, context=4), H200)
    near = seconds_per_step(replace(PLAN, context=4), launch(8, 1, context=4), H200)
    assert two_hosts > one_host
    assert apart - near < 0.001, "groups of four on a host of four: only the gradients go over the network"
    slow = replace(H200, network=0.1)
    assert reduce_seconds(launch(16, 2), slow) > 10 * reduce_seconds(launch(8), slow)


def test_a_pass_of_context_ranks_is_shorter_and_one_over_a_slow_link_is_longer():
    placed, work = replace(PLAN, context=2), launch(2, context=2)
    alone = seconds_per_pass(PLAN, MOCHI_WORK, H200)
    assert alone / 2 < seconds_per_pass(placed, work, H200) < alone
    assert seconds_per_pass(placed, work, replace(H200, link=2.0)) > alone


def test_a_card_without_nvlink_reaches_others_over_its_bus():
    assert H200.link == pytest.approx(369)
    assert card_named("RTX 4090").link == card_named("RTX 4090").host
    assert card_named("H100").network > card_named("A100 80GB").network > card_named("RTX 4090").network
