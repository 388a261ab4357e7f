"""Does an adapter learn as well over a quantised base? Two runs that differ in engine.precision alone, judged on one base.

    python benchmarks/learn_precision.py --config style.yaml --steps 500 --precision fp8 --folder runs/learn

Same seeds, so the same clips, noise and noise levels in the same order; on a CPU fp8 is emulated. Both adapters are then
measured over the plain base in float32, on the held-out clips with the same draws. The margin is stated beforehand: the mean
paired difference may not be worse than --margin of what the plain run gained over no adapter at all. One JSON line is
printed and appended to benchmarks/results/learn_precision.jsonl. The data must be encoded (`mochi-lora encode`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mochi_lora.cli import main as mochi_lora
from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import read_index
from mochi_lora.engine.plan import Plan
from mochi_lora.evaluation.statistics import bootstrap_interval
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import locate
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import load_transformer
from mochi_lora.runs.folder import final_adapter
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.heldout import clip_losses

RESULTS = Path(__file__).parent / "results" / "learn_precision.jsonl"


def main() -> None:
    """Train twice, measure both, and exit with 1 where the margin is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--precision", choices=("fp8", "nf4", "int8"), default="fp8")
    parser.add_argument("--against", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--margin", type=float, default=0.05, help="share of the plain run's gain (default 0.05)")
    parser.add_argument("--folder", type=Path, required=True, help="for the two runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = [_train(arguments, precision) for precision in (arguments.against, arguments.precision)]
    base, plain, quantised = _losses(runs[0], [final_adapter(run) for run in runs])
    gains, differences = base - plain, quantised - plain
    interval = bootstrap_interval(differences, runs[0].run.seed)
    kept = bool(differences.mean() <= arguments.margin * gains.mean())
    line = {
        "precision": arguments.precision,
        "against": arguments.against,
        "steps": arguments.steps,
        "held_out_clips": len(differences),
        "loss_without_adapter": base.mean(),
        "gain": gains.mean(),
        "difference": differences.mean(),
        "difference_low": interval.low,
        "difference_high": interval.high,
        "margin": arguments.margin,
        "kept": kept,
    }
    text = json.dumps(line)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    sys.exit(0 if kept else 1)


def _train(arguments: argparse.Namespace, precision: str) -> Config:
    """One run in a folder of its own; one that is already finished is taken as it is."""
    settings = ["--engine.precision", precision, "--run.folder", str(arguments.folder / precision)]
    settings += ["--train.steps", str(arguments.steps), "--train.sample_every", str(10 * arguments.steps)]
    config = load_config(arguments.config, settings)
    if not final_adapter(config).is_file() and mochi_lora(["train", "--config", str(arguments.config), *settings]):
        sys.exit(f"the {precision} run failed")
    return config


def _losses(config: Config, adapters: Sequence[Path]) -> list[np.ndarray]:
    """Mean loss over noise levels per held-out clip: without an adapter, and with each."""
    index = read_index(config.data)
    stats = LatentStats(index.latents_mean, index.latents_std, index.latents_scale)
    entries = tuple(entry for entry in index.entries if entry.split == "validation")
    source = SampleSource(Cache(config.data.cache), entries, stats, config.objective, config.run.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = locate(config.model.base, config.model.revision, "transformer")
    transformer = load_transformer(folder, device=device, precision="fp32").transformer
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        lora.put(transformer, load_adapter(path), name)
    model = VelocityModel(transformer, Plan(device.type, "fp32", "auto", "none"))
    found = []
    for chosen in [None, *names]:
        with lora.strengths(transformer, names, [float(name == chosen) for name in names]):
            losses = [clip_losses(model, source, item, config.train.validation_bands) for item in range(len(entries))]
        found.append(np.asarray(losses).mean(axis=1))
    return found


if __name__ == "__main__":
    main()
