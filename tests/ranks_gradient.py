"""One update's first minibatches on each of several ranks, for test_gradients_of_two_ranks (run by torchrun).

Usage: torchrun ranks_gradient.py FOLDER ROWS_OF_RANK_0 ROWS_OF_RANK_1 ...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ppo_mlp_discrete as ppo


def make_batch(rank, rows):
    """A batch of this rank's own; the advantages are far from mean 0 and std 1, and name their row."""
    rng = torch.Generator().manual_seed(rank)
    advantages = 5 + 3 * torch.randn(rows, generator=rng)
    logits = torch.randn(rows, 3, generator=rng)
    vectors = torch.randn(2, rows, generator=rng)
    columns = torch.randint(3, (rows, 1), generator=rng)
    obs = torch.randn(rows, 4, generator=rng)
    return ppo.CategoricalBatch(obs, columns, logits.log_softmax(-1), vectors[0], advantages, vectors[1])


def make_networks():
    """Actor and critic, the same on all ranks."""
    torch.manual_seed(0)
    return ppo.mlp(4, 3, 1.0), ppo.mlp(4, 1, 1.0)


def main():
    """Saves the rows of each minibatch of this rank and the gradient that all ranks share."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    actor, critic = make_networks()
    parameters = ppo.flatten_parameters(actor, critic)
    args = ppo.Args(num_minibatches=3, ent_coef=0.1)
    batch = make_batch(rank, int(sys.argv[2 + rank]))
    torch.manual_seed(100 + rank)
    record = []
    for minibatch, count in ppo.shuffled_minibatches(batch, args):
        loss, _ = ppo.categorical_ppo_loss(actor, critic, minibatch, count, [3], 1.0, args)
        parameters.grad.zero_()
        loss.backward()
        ppo.sum_over_ranks(parameters.grad)
        rows = [int((batch.returns == value).nonzero()) for value in minibatch.returns]
        record.append({"rows": rows, "gradient": parameters.grad.clone()})
    torch.save(record, Path(sys.argv[1], f"{rank}.pt"))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
