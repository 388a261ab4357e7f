"""Blocks compiled one by one by `torch.compile`: one function for all of them, so that 48 blocks cost a few compilations.

What is compiled once for each: block (the last one differs), mode of checkpointing, with or without gradients, batch size,
video size, choice of adapters by PEFT's names, and the second strength that PEFT is told (as a variable, for all that follow;
`LiveSampler` tells it none). What never compiles again: another caption. Inductor keeps its kernels on disk for the next run,
in `$TORCHINDUCTOR_CACHE_DIR` or torch's own default, a folder of this user below the system's temporary folder.

Dropout draws from inductor's own streams: seeded and repeatable, but other values than without compilation.
"""

import logging

import torch
import torch.nn.functional as F
from torch import _dynamo, nn
from torch._inductor import config as inductor

from mochi_lora.config.engine import Mode
from mochi_lora.engine.attention import host_lengths
from mochi_lora.engine.checkpoints import RotaryTables, run_block

BACKEND = "inductor"
# Video sizes that get kernels of their own; from the next one on a single set of kernels serves all further sizes.
STATIC_SIZES = 4
# Every variant of a block is an entry of one list in dynamo, and 8 would do for two video sizes; a demo that runs for days sees
# every size with every choice of adapters. With fullgraph, going beyond is an error, never a silent return to eager.
_MOST_VARIANTS = 256
# It warns of in-place operations under a checkpoint; a block has none.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


class CompiledBlocks:
    """Runs blocks compiled; holds the video sizes seen, nothing of the blocks."""

    def __init__(self) -> None:
        self._sizes: set[int] = set()
        # What torch's compiler is told holds for the thread that told it, and the demo works in a thread of each click: said
        # anew around every call. Made once, because torch never frees such a patch: 13 us a call on a CPU, 75 made each time.
        self._room = _dynamo.config.patch(recompile_limit=_MOST_VARIANTS, accumulated_recompile_limit=4 * _MOST_VARIANTS)
        # To see whether padding a product pays, inductor compares the caption's length with bounds, and each side of a bound is
        # one more compilation. Mochi's widths need no padding. Asked in the forward pass alone, for the backward as well.
        self._unpadded = inductor.patch(shape_padding=False)
        self._run = torch.compile(run_block, fullgraph=True, backend=BACKEND)

    def __call__(
        self,
        block: nn.Module,
        mode: Mode,
        visual: torch.Tensor,
        text: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...],
        rotary: RotaryTables,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`run_block`, compiled. A text stream of one row comes back with a second, of padding."""
        if text.shape[1] == 1:  # torch specialises on sizes 0 and 1, so the null prompt would compile again
            text = F.pad(text, (0, 0, 0, 1))
        if not torch.is_grad_enabled():
            mode = "none"  # nothing is kept in any of them: one variant
        else:
            visual, text = _as_from_a_block(block, visual), _as_from_a_block(block, text)
        self._mark(visual, text, conditioning, rotary)
        with self._room, self._unpadded:
            # As a tensor on the host: a graph guards on integers, not on a tensor's values.
            return self._run(block, mode, visual, text, conditioning, host_lengths(lengths), rotary)

    def _mark(self, visual: torch.Tensor, text: torch.Tensor, conditioning: torch.Tensor, rotary: RotaryTables) -> None:
        if len(self._sizes) < STATIC_SIZES:
            self._sizes.add(visual.shape[1])
        is_static = visual.shape[1] in self._sizes
        for tensor, dimension in ((visual, 1), (rotary[0], 0), (rotary[1], 0)):
            mark = _dynamo.mark_static if is_static else _dynamo.maybe_mark_dynamic
            mark(tensor, dimension)
        for tensor in (visual, text, conditioning):
            _dynamo.mark_static(tensor, 0)
        _dynamo.maybe_mark_dynamic(text, 1)


def _as_from_a_block(block: nn.Module, stream: torch.Tensor) -> torch.Tensor:
    """`stream` as the second block sees it. The first one's streams need no gradient, and that alone would be a variant of its
    own: a compilation, to spare one block in 48 the gradients of six products.
    """
    if stream.requires_grad or not any(parameter.requires_grad for parameter in block.parameters()):
        return stream
    return stream.detach().requires_grad_()
