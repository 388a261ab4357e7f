"""What a block's forward pass keeps for its backward, and what is computed again.

The same function runs eagerly and inside a compiled block, where torch's partitioner sees the checkpoint and its policy.

Kept in `attention_saved`: the block's inputs, the attention's output with its log-sum-exp, and matrix products whose result
is tiny beside what they read: LoRA's down-projection, the modulation. By the rates measured on an H200 these save 40 ms and
more per GB kept, the attention 39, a projection 4. `mlp_recomputed` also keeps every product that is no wider than what it
contracts: q, k, v, out and the feed-forward's output, but neither its wide hidden layer nor LoRA's up-projection. `full`
keeps the inputs alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mochi_lora.config.engine import Mode, checkpointing_runs
from mochi_lora.engine.kernels import ATTENTION_OPS
from mochi_lora.engine.quantised import byte_product_kernel, weight_only_product

# (cos, sin) [V, heads, head size / 2] float32
RotaryTables = tuple[torch.Tensor, torch.Tensor]
# (visual [B, V, width], text [B, L, text width], conditioning [B, width], valid text lengths, tables) -> (visual, text)
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], RotaryTables], tuple[torch.Tensor, torch.Tensor]]
# The two context managers of a checkpoint: of the forward pass, and of the second one in the backward.
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

_BOTTLENECK = 32  # a product that reads this many times what it writes is kept everywhere
_checkpoint: Any = checkpoint  # what it returns is not typed
_aten = torch.ops.aten
_DECODED, _BYTES = weight_only_product._opoverload, byte_product_kernel._opoverload
# Product -> where its second factor [K, N] (bmm: [B, K, N]) is among the arguments.
_PRODUCTS = {
    _aten.mm.default: 1,
    _aten.addmm.default: 2,
    _aten.bmm.default: 1,
    _aten._scaled_mm.default: 1,
    _aten._int_mm.default: 1,
}


def modes_of(checkpointing: str, blocks: int) -> tuple[Mode, ...]:
    """The mode of each of `blocks` blocks; what the configuration says about more blocks than there are is an error of ours."""
    modes: list[Mode] = []
    for mode, count in checkpointing_runs(checkpointing):
        modes += [mode] * (blocks - len(modes) if count is None else count)
    assert len(modes) == blocks, f"checkpointing {checkpointing} names {len(modes)} blocks, the model has {blocks}"
    return tuple(modes)


def run_block(
    block: nn.Module,
    mode: Mode,
    visual: torch.Tensor,
    text: torch.Tensor,
    conditioning: torch.Tensor,
    lengths: tuple[int, ...] | torch.Tensor,
    rotary: RotaryTables,
    contexts: Contexts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block, its backward prepared as `mode` says; `contexts` takes the place of the mode's own policy.

    visual [B, V, width], text [B, L, text width], conditioning [B, width], valid text lengths as integers or as int64 [B] on
    the host; returns visual and text. Gradients do not depend on the mode: what is computed again is computed by the same
    kernels, dropout included.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(visual, text, conditioning, lengths, rotary)

    def run(
        visual: torch.Tensor, text: torch.Tensor, conditioning: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return block(visual, text, conditioning, lengths, (cos, sin))

    if mode == "full" and contexts is None:
        # Without torch's empty contexts: under compile they would count as a policy, of keeping everything.
        return _checkpoint(run, visual, text, conditioning, *rotary, use_reentrant=False)
    policy = contexts or _CONTEXTS[mode]
    return _checkpoint(run, visual, text, conditioning, *rotary, use_reentrant=False, context_fn=policy)


def is_kept(operation: Any, arguments: tuple[Any, ...]) -> bool:  # noqa: ANN401 - whatever torch dispatches
    """Whether `attention_saved` keeps the result of an operation of the block."""
    if operation in ATTENTION_OPS:
        return True
    shape = _product(operation, arguments)
    if shape is None:
        return False
    rows, contracted, columns = shape
    # A number of rows that is symbolic (text, under compile) may not be asked: the answer would become a guard.
    few_rows = isinstance(rows, int) and rows * _BOTTLENECK <= contracted
    return columns * _BOTTLENECK <= contracted or few_rows


def _attention(_: SelectiveCheckpointContext, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:  # noqa: ANN401
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, arguments) else CheckpointPolicy.PREFER_RECOMPUTE


def _narrow_products(_: SelectiveCheckpointContext, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:  # noqa: ANN401
    shape = _product(operation, arguments)
    narrow = shape is not None and shape[2] <= shape[1]
    kept = narrow or is_kept(operation, arguments)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _product(operation: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any, Any] | None:  # noqa: ANN401
    """(rows, contracted, columns) of a matrix product [rows, contracted] x [contracted, columns]; None for other operations."""
    if operation is _DECODED:
        rows, (columns, contracted) = arguments[0], arguments[3]
        return rows.shape[:-1].numel(), contracted, columns
    if operation is _BYTES:
        return arguments[0].shape[0], *reversed(arguments[1].shape)
    if operation not in _PRODUCTS:
        return None
    second = _PRODUCTS[operation]
    return arguments[second - 1].shape[-2], arguments[second].shape[-2], arguments[second].shape[-1]


_CONTEXTS: dict[Mode, Contexts] = {
    "attention_saved": partial(create_selective_checkpoint_contexts, _attention),
    "mlp_recomputed": partial(create_selective_checkpoint_contexts, _narrow_products),
}
