"""What the sampling settings stand for: which noise levels are visited, how strongly each is guided. Plain numbers.

The schema asks these functions whether settings fit together, and the sampler calls them: a rule is written once.
"""

from collections.abc import Sequence
from itertools import pairwise

from mochi_lora.errors import UserError


def linear_quadratic_schedule(steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None) -> list[float]:
    """`steps` + 1 sigmas from 1.0 (noise) to 0.0 (data): small linear steps first, then quadratic ones.

    The first `linear_steps` (None: half of all) remove `threshold_noise` in all. Genmo's `linear_quadratic_schedule`
    (genmoai/mochi @0c86aeb `pipelines.py:53-67`), its order of operations kept so that results agree to the last bit.
    Raises UserError where Genmo divides by zero, or where its parabola overshoots and sigma would not fall.
    """
    linear_steps = length_of_linear_part(steps, linear_steps)
    linear = [i * threshold_noise / linear_steps for i in range(linear_steps)]
    excess = linear_steps - threshold_noise * steps
    quadratic_steps = steps - linear_steps
    quadratic_coefficient = excess / (linear_steps * quadratic_steps**2)
    linear_coefficient = threshold_noise / linear_steps - 2 * excess / (quadratic_steps**2)
    constant = quadratic_coefficient * (linear_steps**2)
    quadratic = [quadratic_coefficient * (i**2) + linear_coefficient * i + constant for i in range(linear_steps, steps)]
    sigmas = [1.0 - removed for removed in [*linear, *quadratic, 1.0]]
    if any(later >= earlier for earlier, later in pairwise(sigmas)):
        share = linear_steps / steps
        raise UserError(
            f"threshold_noise {threshold_noise} with {linear_steps} linear steps of {steps}: sigma does not fall from step to "
            f"step; take a threshold_noise above 0 and not above the linear share, {share:g}"
        )
    return sigmas


def length_of_linear_part(steps: int, linear_steps: int | None) -> int:
    """`linear_steps`, or for None half of `steps`. Raises UserError unless both parts get at least one step."""
    if linear_steps is None:
        linear_steps = steps // 2
    if not 0 < linear_steps < steps:
        raise UserError(f"linear_steps {linear_steps} of {steps} steps: take at least 1 and fewer than the steps")
    return linear_steps


def guidance_schedule(guidance: float | Sequence[float], steps: int) -> list[float]:
    """One guidance scale per step: a single number is repeated, a list must have `steps` entries (else UserError)."""
    if isinstance(guidance, int | float):
        return [float(guidance)] * steps
    if len(guidance) != steps:
        raise UserError(f"guidance has {len(guidance)} values for {steps} steps: give one per step, or a single one")
    return [float(scale) for scale in guidance]


def guidance_inside(scales: Sequence[float], sigmas: Sequence[float], interval: tuple[float, float]) -> list[float]:
    """`scales` where the step's sigma lies in the interval [low, high], elsewhere 1, which is no guidance.

    Kynkaanniemi et al., arXiv 2404.07724: guidance at the highest and lowest noise levels costs variety and gains little.
    """
    low, high = interval
    return [scale if low <= sigma <= high else 1.0 for scale, sigma in zip(scales, sigmas[:-1], strict=True)]
