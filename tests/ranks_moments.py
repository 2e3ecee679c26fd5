"""RunningMoments on each of several ranks, for test_running_moments_of_two_ranks (run by torchrun).

Usage: torchrun ranks_moments.py FOLDER ROWS_OF_RANK_0 ROWS_OF_RANK_1 ...
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import ppo_mlp_continuous as ppo


def make_rows(rank, update, rows):
    """This rank's rows (rows, 3) of an update, each rank and update with a mean of its own."""
    rng = np.random.default_rng([rank, update])
    return (1e4 + 10 * rank + 5 * update + rng.normal(size=(rows, 3)) * [0.1, 1, 10]).astype(np.float32)


def main():
    """Saves this rank's statistics after three updates."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    moments = ppo.RunningMoments(3)
    for update in range(3):
        moments.update(make_rows(rank, update, int(sys.argv[2 + rank])))
    torch.save(moments.state_dict(), Path(sys.argv[1], f"{rank}.pt"))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
