"""Two ranks of ppo_rlhf_token.py, for test_two_ranks (run by torchrun): the gradient of a batch that they share, then a
short training run.

Usage: torchrun ranks_rlhf.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ppo_rlhf_token as ppo

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2}


def gradient(policy, critic, parameters, rows, args):
    """The gradient of some of eight responses of different lengths, averaged over the tokens of all ranks."""
    rng = torch.Generator().manual_seed(0)
    responses = [torch.randint(3, 9, (2 + i,), generator=rng).tolist() for i in range(8)]
    noise = [torch.randn(4, 2 + i, generator=rng) for i in range(8)]
    parameters.grad.zero_()
    count = torch.zeros(1)
    for i in rows:
        part = ppo.Part(ppo.to_texts(policy, [[4, 5]], [responses[i]]), noise[i][0] - 2, *noise[i][1:])
        ppo.add_gradient(policy, critic, part, args)
        count += len(responses[i])
    return count


def main():
    """Saves the gradient of the ranks together and of this rank alone with all rows, and the trained weights."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    ppo.EMBEDDED_SIZES |= SIZES
    ppo.NUM_REVIEWS = 200
    args = ppo.Args(max_prompt_length=4)
    torch.manual_seed(0)
    tokenizer = ppo.make_tokenizer([ppo.Row("a b c d e f g")])
    lm = ppo.load_lm("embedded", tokenizer, args, torch.device("cpu"))
    policy = ppo.Model(ppo.Body(lm, args), lm.get_output_embeddings())
    critic = ppo.scalar_model(policy, None, args)
    nn.init.ones_(critic.head.weight)
    parameters = ppo.flatten_parameters(nn.ModuleList([lm, critic.head]))
    count = gradient(policy, critic, parameters, range(8), args)
    alone = parameters.grad / count
    count = gradient(policy, critic, parameters, range(rank, 8, 2), args)
    dist.init_process_group("gloo")
    ppo.sum_over_ranks(parameters.grad, count)
    shared = parameters.grad / count
    made, flatten = [], ppo.flatten_parameters
    ppo.flatten_parameters = lambda *modules: (made.append(flatten(*modules)), made[-1])[1]
    small = {"sft_steps": 4, "sft_batch_size": 8, "num_feedback": 20, "reward_steps": 3, "reward_batch_size": 4}
    small |= {"total_episodes": 48, "batch_size": 16, "num_minibatches": 2, "micro_batch_size": 4}
    small |= {"response_length": 8, "eval_samples": 10, "torch_threads": 1}
    ppo.train(ppo.Args(run_dir=str(folder / "run"), **small))
    torch.save({"gradient": shared, "alone": alone, "trained": made[-1].data}, folder / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
