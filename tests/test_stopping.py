"""Signals: noted, not obeyed at once; and a peer that is gone is called so."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch.distributed as dist

from mochi_lora.training.stopping import PeerGoneError, StopFlag, lost_peer_named


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_said(number, capfd):
    with StopFlag(1) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.requested == number
    assert "stopping after this step" in capfd.readouterr().err


def test_a_signal_while_the_ranks_are_asked_counts_at_the_next_step(monkeypatch):
    """It came too late for this answer, which is the same on every rank, and must not be forgotten with it."""
    with StopFlag(1) as stop:
        stop._group = object()
        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert not stop.agreed()
        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
        assert stop.agreed()
        assert stop.requested == signal.SIGTERM


def test_the_handlers_of_before_are_back_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopFlag(1):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_schedulers_and_launchers_may_repeat_themselves():
    """srun and torchrun each pass SIGTERM on: the second one must not kill what is being saved."""
    with StopFlag(1) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested == signal.SIGTERM


def test_a_second_ctrl_c_ends_the_process_at_once():
    code = """
        import os, signal, time
        from mochi_lora.training import stopping
        with stopping.StopFlag(1) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed()
            stop._since -= 60
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize("error", [dist.DistBackendError("NCCL error"), RuntimeError("[gloo/transport/tcp/pair.cc:547] x")])
def test_a_failed_collective_is_a_lost_peer(error):
    told = r"peer_timeout_minutes=0\.5 .*nothing was saved, the last checkpoint stands"
    with pytest.raises(PeerGoneError, match=told), lost_peer_named(0.5):
        raise error


def test_other_errors_keep_their_face():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, lost_peer_named(1):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(caught.value, PeerGoneError)


def test_a_loader_process_hears_its_parent_alone():
    """A hang at exit would be the price of ignoring SIGTERM: multiprocessing sends it, then joins."""
    code = """
        import multiprocessing, os, signal, subprocess, time
        from mochi_lora.training import stopping

        def work(pipe):
            stopping.obey_parent_alone(0)
            pipe.send("ready")
            time.sleep(60)

        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=work, args=(there,), daemon=True)
        child.start()
        here.recv()
        for name in ("INT", "TERM"):
            subprocess.run(["sh", "-c", f"kill -{name} {child.pid}"], check=True)
        time.sleep(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(10)
        assert child.exitcode == 0
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60).returncode == 0
