"""`mochi-lora train`, of which rank 1 kills itself before its third step, once: what torchrun's restarts are for.

torchrun ... die_once.py MARKER train --config FILE
"""

import os
import signal
import sys
from pathlib import Path

from mochi_lora.cli import main
from mochi_lora.commands import train
from mochi_lora.training import trainer

DIES_AT = 2


def dying(learner, health, step, batches):
    marker = Path(sys.argv[1])
    if step == DIES_AT and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(learner, health, step, batches)


if __name__ == "__main__":
    train_step, trainer.train_step = trainer.train_step, dying
    assert train.run_loop is trainer.run_loop
    sys.exit(main(sys.argv[2:]))
