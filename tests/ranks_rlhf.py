"""A short run of ppo_rlhf_token.py whose responses depend on the prompts alone, by one process or by two.

Usage: torchrun ranks_rlhf.py MODEL RUN_DIR
"""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ppo_rlhf_token as ppo

FLAGS = {"sft_steps": 3, "sft_batch_size": 8, "num_feedback": 20, "reward_steps": 3, "reward_batch_size": 4}
FLAGS |= {"total_episodes": 48, "batch_size": 16, "num_minibatches": 1, "micro_batch_size": 4, "eval_samples": 10}
FLAGS |= {"response_length": 8, "whiten_rewards": True, "device": "cpu", "critic": "separate"}


def run(model, run_dir, patch):
    """Trains a model in run_dir. patch: of a test's monkeypatch, or setattr."""

    def generate(self, examples, heat=1.0):
        sampled = []
        for x in examples:
            rng = random.Random(f"{x.text} {heat}")
            length = rng.randint(1, 8)
            sampled.append(x._replace(response=[rng.randint(2, 12) for _ in range(length)] + [1] * (length < 8)))
        return sampled

    patch(ppo, "NUM_REVIEWS", 200)
    patch(ppo.Model, "generate", generate)
    torch.set_num_threads(1)
    ppo.train(ppo.Args(model=model, **FLAGS), Path(run_dir))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(*sys.argv[1:], setattr)
