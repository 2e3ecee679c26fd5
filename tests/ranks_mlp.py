"""A short run of ppo_mlp_continuous__torchrun for test_two_ranks_equal_one_process: by torchrun as one of two ranks, or
alone.

Usage: torchrun ranks_mlp.py FOLDER, where the patched script is
"""

import importlib
import sys

import numpy as np
import torch

FLAGS = "--env-id probe_envs:NumberedBox-v0 --num-envs 4 --num-steps 24 --update-epochs 3 --num-minibatches 1"
FLAGS += " --total-timesteps 200 --ent-coef 0.01 --norm-adv --learning-rate 1e-2 --eval-episodes 2"


def run(ppo, folder):
    """Trains in folder/run, and returns the trained parameters of policy and critic, as this rank has them. All that is
    random depends on the environments alone."""

    def choose(policy, obs, greedy=False):
        means = policy.actor(policy.normalize(obs)).detach().numpy()
        return means + np.sin(1000 * obs[:, :1] + [0, 1])

    def make_envs(args, num_envs, **options):
        envs = own_envs(args, num_envs, **options)
        reset = envs.reset
        envs.reset = lambda seed: reset(seed=[ppo.RANK * num_envs + n for n in range(num_envs)])
        return envs

    own_envs, own_choose, adam, made, argv = ppo.make_envs, ppo.Policy.choose, torch.optim.Adam, [], sys.argv
    ppo.make_envs, ppo.Policy.choose = make_envs, choose
    torch.optim.Adam = lambda parameters, **options: (made.extend(parameters), adam(parameters, **options))[1]
    torch.set_default_dtype(torch.float64)  # so that sums in another order differ by less than what is looked for
    sys.argv = ["ppo.py", *FLAGS.split(), "--run-dir", f"{folder}/run"]
    try:
        ppo.main()
    finally:
        torch.set_default_dtype(torch.float32)
        ppo.make_envs, ppo.Policy.choose, torch.optim.Adam, sys.argv = own_envs, own_choose, adam, argv
    return [parameter.detach() for parameter in made]


if __name__ == "__main__":
    folder = sys.argv[1]
    sys.path.append(folder)
    ppo = importlib.import_module("ppo_mlp_continuous__torchrun")
    torch.save(run(ppo, folder), f"{folder}/{ppo.RANK}.pt")
