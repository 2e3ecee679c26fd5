"""A short run of ppo_llm_policy.py for test_two_ranks_equal_one_process: by torchrun as one of two ranks, or alone.

Usage: torchrun ranks_llm.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

import ppo_llm_policy as ppo

FLAGS = {"history": 2, "num_envs": 6, "num_steps": 24, "update_epochs": 3, "num_minibatches": 1, "ent_coef": 0.1}
FLAGS |= {"total_timesteps": 300, "learning_rate": 1e-3, "device": "cpu"}


def get_action(policy, states, greedy=False):
    """The side to which the pole leans: one rank's random numbers are not those of the whole."""
    actions = (states[:, -1, 2] > 0).long()
    with torch.no_grad():
        return actions, policy.evaluate_actions(states, actions)[0]


def run(folder, rank, world_size):
    """Trains into a folder, and returns the trained parameters of policy and critic, as this rank has them."""
    ppo.StochasticPolicy.get_action = get_action
    made, adam = [], torch.optim.Adam
    torch.optim.Adam = lambda parameters, **options: (made.extend(parameters), adam(parameters, **options))[1]
    ppo.train(ppo.Args(**FLAGS), folder / "run", rank, world_size)
    torch.optim.Adam = adam
    return [parameter.detach() for parameter in made]


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    torch.save(run(Path(sys.argv[1]), rank, int(os.environ["WORLD_SIZE"])), f"{sys.argv[1]}/{rank}.pt")
