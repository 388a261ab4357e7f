"""A function in several processes at once, joined over gloo, each forked from a warm server."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from warm_server import warm_server

# What the server has loaded before it forks.
import mochi_lora.model.adapter
import mochi_lora.model.transformer
import mochi_lora.parallel.mesh
import mochi_lora.training.trainer
from mochi_lora.parallel.mesh import Ranks, layout_of, open_ranks

WAIT_SECONDS = 120
_LOADED = mochi_lora


def together(world: int, work: Callable[..., Any], *given: object, parallel: str = "auto") -> list[Any]:
    """What `work(ranks, *given)` returns in each of `world` processes, in order of rank; its tensors come as arrays."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with warm_server() as context:
        started = [_start(context, rank, world, port, parallel, work, given) for rank in range(world)]
    told = []
    for rank, (_, answers) in enumerate(started):
        assert answers.poll(WAIT_SECONDS), f"rank {rank} hangs"
        told.append(answers.recv())
    for process, _ in started:  # only now: a rank leaves when all have told
        process.join(WAIT_SECONDS)
    failed = [answer for done, answer in told if not done]
    assert not failed, "\n".join(failed)
    return [answer for _, answer in told]


def _start(context: Any, rank: int, world: int, port: int, parallel: str, work: Callable[..., Any], given: tuple) -> tuple:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, rank, world, port, parallel, work, given))
    process.start()
    theirs.close()
    return process, ours


def _run(answers: Any, rank: int, world: int, port: int, parallel: str, work: Callable[..., Any], given: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        answer = _plain(work(open_ranks(layout_of(parallel, world), 1.0), *given))
        answers.send((True, answer))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - to be shown where the test is
        answers.send((False, f"rank {rank}: {traceback.format_exc()}"))


def _plain(found: Any) -> Any:
    """Tensors would be shared through file descriptors of a process that is gone."""
    match found:
        case torch.Tensor():
            return found.detach().cpu().float().numpy() if found.is_floating_point() else found.numpy()
        case dict():
            return {name: _plain(item) for name, item in found.items()}
        case list() | tuple():
            return type(found)(_plain(item) for item in found)
    return found


__all__ = ["Ranks", "together"]
