"""What `benchmarks/scale.py` finds, predicted from what GPUs send each other: 2 beside what came out, 8 and 16 in a paragraph.

    python benchmarks/predict_scale.py

The paragraph goes into docs/performance.md (`tables.py`). The plan is the one that `scale.py` measures, compiled.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from result_tables import lines

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.parallel.mesh import Layout, check_layout, layouts_of
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.footprint import predict_memory, resident_bytes, weight_bytes
from mochi_lora.planning.pace import seconds_per_pass, seconds_per_step
from mochi_lora.planning.traffic import step_traffic
from mochi_lora.planning.workload import AdapterSize, ModelSize, Workload
from mochi_lora.runs.workloads import adapter_parameters
from mochi_lora.spec import Bucket

CARD = card_named("H200")
LENGTHS = (37, 85, 163)
_SIZE = ModelSize.of({})
_PLAN = Plan("cuda", "bf16", "cudnn", "attention_saved", compile=True)
_PER_HOST = 8


@dataclass(frozen=True)
class Prediction:
    """One layout at one length, against one GPU."""

    frames: int
    layout: Layout
    seconds: float
    sent: float  # bytes that each process hands to its collectives in a step
    times: float  # samples per second of one GPU
    sampling: float  # the same of passes without gradients
    gib: float


def predicted(frames: int, layout: Layout) -> Prediction:
    """By `planning.pace` and `planning.traffic`."""
    plan, work = placed(frames, layout)
    plan_alone, alone = placed(frames, Layout())
    seconds = seconds_per_step(plan, work, CARD)
    looked = seconds_per_pass(plan, work, CARD)
    return Prediction(
        frames,
        layout,
        seconds,
        step_traffic(plan, work).sum,
        layout.data * seconds_per_step(plan_alone, alone, CARD) / seconds,
        layout.data * seconds_per_pass(plan_alone, alone, CARD) / looked,
        predict_memory(plan, work).device,
    )


def placed(frames: int, layout: Layout) -> tuple[Plan, Workload]:
    """Rank 16 and batch 1, as `scale.py` has it."""
    adapter = AdapterSize(adapter_parameters(AdapterConfig(rank=16), _SIZE), 8, averaged=False)
    work = Workload(_SIZE, Bucket(frames, 480, 848), 1, 1, adapter, None)
    work = replace(work, context=layout.context, world=layout.world, processes=min(_PER_HOST, layout.world))
    return replace(_PLAN, context=layout.context, shard=layout.shard), work


def legal(frames: int, world: int) -> list[Layout]:
    """Data alone, the largest context that divides, the base split over all."""
    bucket = Bucket(frames, 480, 848)
    found = [layout for layout in layouts_of(world) if layout.shard == 1 and _starts(layout, bucket)]
    return [*dict.fromkeys((found[0], found[-1])), Layout(world, shard=world)]


def _starts(layout: Layout, bucket: Bucket) -> bool:
    try:
        check_layout(layout, _SIZE.heads, [bucket])
    except UserError:
        return False
    return True


def table_rows() -> list[list[str]]:
    """8 and 16 GPUs at each length."""
    every = [predicted(frames, layout) for frames in LENGTHS for world in (8, 16) for layout in legal(frames, world)]
    return [_row(one) for one in every]


def _row(one: Prediction) -> list[str]:
    layout = one.layout
    figures = (one.sent / 1e9, one.gib, one.seconds, one.times, one.sampling)
    return [f"{one.frames}", f"{layout.world}", f"{layout}", *map("{:.{}f}".format, figures, (1, 1, 2, 1, 1))]


HEAD = ("Frames", "GPUs", "`engine.parallel`", "GB a step", "GiB", "s / step", "Training", "Sampling")


def paragraph() -> str:
    """In words, with the figures of the longest and the shortest clip."""
    short, long = LENGTHS[0], LENGTHS[-1]
    data = {world: predicted(short, Layout(world)) for world in (8, 16)}
    context = {world: predicted(long, legal(long, world)[1]) for world in (8, 16)}
    pair = predicted(short, legal(short, 8)[1])
    split = predicted(short, Layout(8, shard=8))
    return (
        f"**A prediction: nobody has run 8 or 16 GPUs.** Of {_PLAN} on {CARD.name}s, {_PER_HOST} to a host, from the bytes "
        f"that the code hands to its collectives (tests count them) over {CARD.link:.0f} GB/s inside a host and "
        f"{CARD.network:.0f} per GPU between hosts, each 82 % of its datasheet. Data ranks send {data[8].sent / 1e9:.2f} GB a "
        f"step, whatever the clip: {data[8].times:.1f} times one GPU's samples on 8 and {data[16].times:.1f} on 16, less what "
        "waiting for the slowest costs, which is not predicted. What context ranks exchange grows with the clip, what they "
        f"compute with its square: {pair.sent / 1e9:.0f} GB a step for `{pair.layout}` at {short} frames ({pair.times:.1f} "
        f"times one GPU), {context[8].sent / 1e9:.0f} GB for `{context[8].layout}` at {long} ({context[8].times:.1f} times, "
        f"one step in {context[8].seconds:.1f} s); on 16, `{context[16].layout}` comes to {context[16].times:.1f} times. A "
        f"base split over 8 gathers {split.sent / 1e9:.0f} GB a step beside the computation: {split.times:.1f} times one GPU "
        f"at {short} frames, in {split.gib:.1f} GiB instead of {predicted(short, Layout()).gib:.1f}.{outcomes()}\n"
    )


def outcomes() -> str:
    """The committed lines of several GPUs beside the same arithmetic, as a sentence; empty without one."""
    told = {}
    for line in lines("scale"):
        plan = Plan(**line["plan"])
        if line["world_size"] > 1 and line["layers"] == _SIZE.layers and replace(plan, context=1, shard=1) == _PLAN:
            layout = Layout(line["world_size"], context=plan.context, shard=plan.shard)
            one = predicted(line["frames"], layout)
            told[layout, one.frames] = (
                f"{one.times:.2f} and {line['speed_up']:.2f} times (sampling {one.sampling:.2f} and "
                f"{line['sampling_speed_up']:.2f}) for `{layout}` at {one.frames} frames"
            )
    return (
        f" Two GPUs, from which a call's and a gather's seconds are, predicted and measured: {'; '.join(told.values())}."
        if told
        else ""
    )


def bars() -> list[str]:
    """What two GPUs are predicted to come to, with the bars of the task."""
    data, split = (predicted(37, layout) for layout in (Layout(2), Layout(2, shard=2)))
    context = {frames: predicted(frames, Layout(2, context=2)) for frames in LENGTHS}
    return [
        f"data, 37 frames: {data.times:.2f}x (bar 1.93)",
        *(
            f"context, {frames} frames: {context[frames].times:.2f}x{bar}"
            for frames, bar in ((37, ""), (85, " (bar 1.6)"), (163, " (bar 1.75)"))
        ),
        f"shard, 37 frames: {split.times / data.times:.3f} of the speed of data (bar 0.9), "
        f"static memory {static_share(Layout(2, shard=2)):.1%} (bar 55 %)",
        f"sampling by context, 163 frames: {context[163].sampling:.2f}x (bar 1.75)",
    ]


def static_share(layout: Layout) -> float:
    """Of weights and adapter before the first step, one GPU's part of a split base against a whole one."""
    plan, work = placed(37, layout)
    whole, adapter = weight_bytes(_SIZE, plan.precision), 4 * work.adapter.parameters if work.adapter else 0
    return (resident_bytes(_SIZE, plan) + adapter) / (whole + adapter)


def main(_words: Sequence[str] = ()) -> int:
    """Prints both."""
    print("two H200, predicted:", *bars(), "", paragraph(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
