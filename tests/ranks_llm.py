"""Two ranks of ppo_llm_policy.py, for test_two_ranks (run by torchrun): the gradients of the first minibatches, then a
short training run.

Usage: torchrun ranks_llm.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ppo_llm_policy as ppo

ARGS = ppo.Args(num_minibatches=2, ent_coef=0.1, history=2, norm_adv=True)


def make_batch(rank):
    """A batch of this rank's own, 5 rows on rank 0 and 8 on rank 1; returns name their row."""
    rows, rng = (5, 8)[rank], torch.Generator().manual_seed(rank)
    states = torch.randn(rows, 2, 4, generator=rng)
    actions = torch.randint(2, (rows,), generator=rng)
    vectors = torch.randn(4, rows, generator=rng)
    mask = torch.ones(rows, 2, dtype=torch.bool)
    return ppo.Batch(states, mask, actions, 0.3 * vectors[0] - 0.7, vectors[1], 5 + 3 * vectors[2], vectors[3])


def make_networks():
    """Policy and value function, the same on all ranks."""
    spec = {"obs_dim": 4, "observe": [0, 1, 2, 3], "history": 2, "n": 2}
    torch.manual_seed(0)
    return ppo.StochasticPolicy(ppo.make_network(ARGS, spec, torch.float32)), ppo.mlp(8, 1, 1.0)


def main():
    """Saves the rows of each minibatch of this rank, the gradients that all ranks share, and the trained weights."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    policy, critic = make_networks()
    parameters = ppo.flatten_parameters(policy, critic)
    batch = make_batch(rank)
    torch.manual_seed(100 + rank)
    minibatches = []
    for minibatch, count in ppo.shuffled_minibatches(batch, ARGS):
        parameters.grad.zero_()
        for part in ppo.split_rows(minibatch, 2):
            loss, _ = ppo.policy_ppo_loss(policy, critic, part, count, ARGS)
            loss.backward()
        ppo.sum_over_ranks(parameters.grad)
        rows = [int((batch.returns == value).nonzero()) for value in minibatch.returns]
        minibatches.append({"rows": rows, "gradient": parameters.grad.clone()})
    made, flatten = [], ppo.flatten_parameters
    ppo.flatten_parameters = lambda *modules: (made.append(flatten(*modules)), made[-1])[1]
    small = {"num_envs": 4, "num_steps": 16, "update_epochs": 2, "num_minibatches": 2, "total_timesteps": 100}
    ppo.train(ppo.Args(run_dir=str(folder / "run"), eval_episodes=1, torch_threads=1, **small))
    torch.save({"minibatches": minibatches, "trained": made[0].data}, folder / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
