"""How noisy a training sample is: sigma as a function of (seed, position)."""

import math

from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.streams import Purpose, stream


def draw_sigma(objective: ObjectiveConfig, seed: int, position: int) -> float:
    """Sigma in (0, 1) of one sample; 1 is pure noise.

    uniform: U(0, 1), as Genmo trains (genmoai/mochi @0c86aeb `demos/fine_tuner/train.py`). logit_normal: Esser et al.,
    arXiv 2403.03206, section 3.1. stratified: positions come in blocks of `strata`; each block visits every band
    [k, k+1)/strata once, in an order of its own. The marginal stays uniform and the loss of a block varies less.
    """
    generator = stream(seed, Purpose.SIGMA, position)
    if objective.sigma == "logit_normal":
        logit = generator.normal(objective.logit_mean, objective.logit_std)
        return 0.5 * (1 + math.tanh(logit / 2))  # the logistic function, without exp's overflow
    offset = float(generator.random())
    if objective.sigma == "uniform":
        return offset
    block, place = divmod(position, objective.strata)
    band = int(stream(seed, Purpose.STRATA, block).permutation(objective.strata)[place])
    return (band + offset) / objective.strata
