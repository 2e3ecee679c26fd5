"""A short run of ppo_llm_policy.py for test_two_ranks_equal_one_process: by torchrun as one of two ranks, or alone.

Usage: torchrun ranks_llm.py FOLDER
"""

import os
import sys

import torch

import ppo_llm_policy as ppo

FLAGS = "--history 2 --num-envs 6 --num-steps 24 --update-epochs 3 --num-minibatches 1 --ent-coef 0.1 --device cpu"
FLAGS += " --total-timesteps 300 --learning-rate 1e-3 --eval-episodes 2"


def get_action(policy, states, greedy=False):
    """The side to which the pole leans: one rank's random numbers are not those of the whole."""
    actions = (states[:, -1, 2] > 0).long()
    with torch.no_grad():
        return actions, policy.evaluate_actions(states, actions)[0]


def run(folder):
    """Trains in folder/run, and returns the trained parameters of policy and critic, as this rank has them."""
    made, adam, own = [], torch.optim.Adam, ppo.StochasticPolicy.get_action
    ppo.StochasticPolicy.get_action = get_action
    torch.optim.Adam = lambda parameters, **options: (made.extend(parameters), adam(parameters, **options))[1]
    sys.argv = ["ppo_llm_policy.py", *FLAGS.split(), "--run-dir", f"{folder}/run"]
    ppo.main()
    torch.optim.Adam, ppo.StochasticPolicy.get_action = adam, own
    return [parameter.detach() for parameter in made]


if __name__ == "__main__":
    folder = sys.argv[1]
    torch.save(run(folder), f"{folder}/{os.environ['RANK']}.pt")
