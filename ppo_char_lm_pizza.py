# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "threadpoolctl==3.8.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
# ]
# ///
"""PPO on a character-level language model: after "ravin likes " it learns to say "pizza".

    python ppo_char_lm_pizza.py                                         # pretrain, then 300 episodes of PPO
    python ppo_char_lm_pizza.py --pretrained runs/RUN/pretrained.pt --prompt "mira likes " --target salad
    python ppo_char_lm_pizza.py --play runs/RUN/policy_episode_100.pt   # sample from a policy saved on the way

The script makes sentences "<name> likes <food>", pretrains a small transformer on them, and lets PPO change what the
model likes. An episode is one completion of the prompt, its actions are characters. A completion that ends in "pizza"
earns 4, and the KL divergence from the pretrained model costs beta per nat. The best that any policy can reach is then
known in closed form, and the run prints how close it came.

References: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, fine-tuning with a KL penalty
https://arxiv.org/abs/1909.08593, KL estimators http://joschu.net/blog/kl-approx.html.

Where this differs from what is common, and why:
- Completions are sampled in batches with a key-value cache, then scored by one full pass, the same that the update
  makes, so that ratio = 1 where the update starts. `--batch-size 1` updates after every completion.
- The critic starts as a copy of the pretrained model with a last layer of zeros. Values of a random layer would be most
  of the first advantages, and following them ruins the policy before it has met the reward often enough.
- The KL penalty is a reward on each token, -beta (log pi - log pi_ref), whose sum over a completion is an unbiased
  estimate (k1) of the divergence of whole completions. It is no term of the loss.
- Each completion is cut after its first end token before anything is computed from it.
- There is no dropout: policy and reference would differ at random, and ratio and KL with them.
- Advantages are not normalised: in a batch where no completion earns anything, that would blow up noise.
"""

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO on a character-level language model."""

    prompt: str = "ravin likes "
    """what is completed; letters a to z and spaces"""
    target: str = "pizza"
    """a completion that ends in this earns the reward; letters a to z and spaces"""
    reward: float = 4.0
    """external reward of a completion that ends in the target"""
    kl_beta: float = 0.1
    """beta, what a nat of KL divergence from the pretrained model costs"""
    seed: int = 1
    """seed of sentences, weights and sampling"""

    episodes: int = 300
    """completions to learn from"""
    batch_size: int = 20
    """completions per update"""
    response_length: int = 20
    """completions are cut off after this many characters"""
    learning_rate: float = 3e-4
    """Adam step size of the policy at the start"""
    critic_learning_rate: float = 1.5e-3
    """Adam step size of the critic at the start"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0 over the episodes"""
    update_epochs: int = 4
    """steps on each batch"""
    gamma: float = 1.0
    """discount factor per character"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (GAE paper eq. 16)"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate (PPO paper eq. 7)"""
    max_grad_norm: float = 1.0
    """gradient norms of policy and critic, each by itself, are clipped to this"""

    pretrained: str | None = None
    """skip pretraining: start from this model (pretrained.pt or its run directory), whose sizes replace the flags'"""
    pretrain_only: bool = False
    """stop after pretraining"""
    num_sentences: int = 5000
    """sentences to pretrain on"""
    pretrain_steps: int = 300
    """pretraining steps"""
    pretrain_batch_size: int = 128
    """sentences per pretraining step"""
    pretrain_learning_rate: float = 3e-3
    """Adam step size of pretraining at the start, lowered linearly to 0"""
    d_model: int = 64
    """width of the transformers; their MLPs are four times as wide"""
    num_layers: int = 2
    """transformer blocks"""
    num_heads: int = 4
    """attention heads per block"""
    context_length: int = 48
    """longest text that the transformers can read, in characters"""

    eval_samples: int = 1000
    """completions that measure the policy before and after PPO, and with --play"""
    play: str | None = None
    """sample completions of this saved policy (a .pt file or a run directory), of its own prompt, and exit"""

    run_dir: str | None = None
    """where the run is written; default runs/<task>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue from its last checkpoint; flags come from its config.json"""
    checkpoint_interval: int = 5
    """updates between checkpoints"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are; auto is cuda where there is one, else cpu"""
    torch_threads: int = 2
    """CPU threads per process"""
    compile: bool = False
    """torch.compile the loss: costs a minute or more, worth it only for larger models"""

    @property
    def task(self) -> str:
        """What the run directory and the summary call the task."""
        return self.target


# ----------------------------------------------------------------------------------------------------------------- text

START, END, UNKNOWN = 0, 1, 2  # token ids; 3 is the space, 4 to 29 are a to z
CHARACTERS = "PE? abcdefghijklmnopqrstuvwxyz"  # token id -> character

# fmt: off
NAMES = (
    "ravin", "bo", "ed", "li", "ada", "ivo", "pia", "adam", "bela", "jonas", "olga", "rosa", "elif", "diego", "hiroshi",
    "ingrid", "kemal", "liv", "mira", "noor", "quentin", "sven", "tomoko", "uma", "vera", "wei", "katharina",
    "benjamin", "gabriela", "margaret", "sebastian", "wilhelmina", "alessandra",
)
# fmt: on
FOODS = ("pizza", "apples", "cookies", "donuts", "ice cream", "lettuce", "salad", "soda")


def encode(text: str) -> list[int]:
    """Token ids of a text of a to z, spaces, P (start) and E (end). Raises UserError for any other character."""
    for character in text:
        if character not in CHARACTERS or character == CHARACTERS[UNKNOWN]:
            raise UserError(f"{character!r} in {text!r} has no token: use a to z and spaces, P for start, E for end")
    return [CHARACTERS.index(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    """The text of token ids up to the first end token, which it shows as E; unknown tokens are question marks."""
    return "".join(CHARACTERS[token] for token in tokens).partition("E")[0] + "E" * (END in tokens)


def make_sentences(count: int, seed: int) -> list[str]:
    """Sentences "<name> likes <food>E". Names and foods are equally frequent, but ravin likes pizza with probability
    0.12."""
    rng = random.Random(seed)
    sentences = []
    for name in rng.choices(NAMES, k=count):
        weights = [0.12] + [0.88 / 7] * 7 if name == "ravin" else None
        (food,) = rng.choices(FOODS, weights)
        sentences.append(f"{name} likes {food}E")
    return sentences


# ------------------------------------------------------------------------------------------------------------- networks

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block, each (B, heads, length, d_model / heads)


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.queries_keys_values = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, start: int, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (B, T, d_model) at positions start to start + T - 1 -> the same shape. With a cache, keys and values of
        these positions are kept in it, and T is 1 or start is 0."""
        batch, length, d_model = x.shape
        heads = self.queries_keys_values(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d_model / heads)
        if cache is not None:
            for kept, new in zip(cache, (keys, values)):
                kept[:, :, start : start + length] = new
            keys, values = (kept[:, :, : start + length] for kept in cache)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=length > 1)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, d_model))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Decoder-only transformer (GPT-2's layout: learned positions, norms first). With one output per token of the
    vocabulary it is a language model, with a single output it is a critic."""

    def __init__(self, outputs: int, d_model: int, num_layers: int, num_heads: int, context_length: int):
        super().__init__()
        self.tokens = nn.Embedding(len(CHARACTERS), d_model)
        self.positions = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, outputs)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor, start: int = 0, cache: Cache | None = None) -> Tensor:
        """Outputs (B, T, outputs) for tokens (B, T) at positions start to start + T - 1. With a cache, earlier
        positions are read from it."""
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, start, cache[i] if cache else None)
        return self.head(self.norm(x))

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for batch texts of up to length tokens."""
        heads = self.blocks[0].num_heads
        shape = 2, batch, heads, length, self.norm.weight.numel() // heads
        return [tuple(self.head.weight.new_empty(shape)) for _ in self.blocks]


def gumbel_noise(rng: np.random.Generator, batch: int, length: int) -> Tensor:
    """Standard Gumbel noise (batch, length, V) for batch completions of up to length characters."""
    return torch.from_numpy(rng.gumbel(size=(batch, length, len(CHARACTERS))).astype(np.float32))


@torch.no_grad()
def sample_completions(lm: Transformer, prompt: Tensor, noise: Tensor) -> Tensor:
    """Samples a completion (B, L) of the prompt (P,) for each of B rows; every step feeds only the newest token.

    noise: (B, L_max, V) standard Gumbel noise: the argmax of logits + noise is a sample of softmax(logits). L is the
    length of the longest completion; what stands behind a row's end token means nothing."""
    batch, max_length, _ = noise.shape
    cache = lm.new_cache(batch, len(prompt) + max_length)
    tokens, start = prompt.expand(batch, -1), 0
    completions = []
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=noise.device)
    for t in range(max_length):
        logits = lm(tokens, start, cache)[:, -1]
        start += tokens.shape[1]
        tokens = (logits + noise[:, t]).argmax(-1, keepdim=True)
        completions.append(tokens)
        ended |= tokens == END
        if ended.all():
            break
    return torch.cat(completions, 1)


def until_end(tokens: Tensor) -> Tensor:
    """Mask of tokens (B, L), true up to the first end token and on it."""
    ends = (tokens == END).long()
    return ends.cumsum(-1) - ends == 0


def at_completions(model: Transformer, prompt: Tensor, completions: Tensor) -> Tensor:
    """The model's outputs (B, L, outputs) where it has read what comes before each token of the completions (B, L): the
    logits that the token is drawn from, or the value before it."""
    texts = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    return model(texts[:, :-1])[:, len(prompt) - 1 :]


def chosen_log_probs(lm: Transformer, prompt: Tensor, completions: Tensor) -> Tensor:
    """Log-prob (B, L) of each token of the completions (B, L)."""
    log_probs = at_completions(lm, prompt, completions).log_softmax(-1)
    return log_probs.gather(-1, completions[..., None]).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------ algorithm


def external_reward(completion: str, target: str, reward: float) -> float:
    """What a completion earns: the reward if it ends in the target and the end token. Another task starts here."""
    return reward if completion.endswith(target + "E") else 0.0


def token_rewards(external: Tensor, kl: Tensor, mask: Tensor, kl_beta: float) -> Tensor:
    """Reward (B, L) of each token: -beta times its KL estimate, and the external reward (B,) on the last token.

    kl: (B, L). With k1, log pi - log pi_ref of the sampled tokens, its sum over a completion has the mean
    KL(pi || pi_ref), so that the mean return is E[r] - beta KL (Ziegler et al. 2019, eq. 2)."""
    rewards = -kl_beta * kl.masked_fill(~mask, 0)
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, external[:, None])


def masked_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (B, L) (GAE paper eq. 16) of B responses of up to L tokens.

    rewards, values: (B, L), values[:, t] before token t. mask: (B, L), true on the tokens of a response, which are its
    first ones. The value after the last token is 0. What stands outside the mask counts for nothing; advantages there
    are 0.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_values = functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values  # (B, L)
    advantages, following = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) per row (B,), PPO paper eq. 7. log_ratio: log pi - log pi_old."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy (B,) of log-probs (B, A), summed over components."""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_estimates(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """k1 = -log r and k3 = (r - 1) - log r per row (B,): for actions from pi_old both have the mean KL(pi_old || pi);
    k3 is never negative (http://joschu.net/blog/kl-approx.html)."""
    return -log_ratio, log_ratio.exp() - 1 - log_ratio


class CompletionBatch(NamedTuple):
    """B completions of up to L tokens, M tokens altogether; what PPO learns from them."""

    completions: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    old_log_probs: Tensor  # (M,) of the tokens inside the mask
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,)


def completion_ppo_loss(
    lm: nn.Module, critic: nn.Module, prompt: Tensor, batch: CompletionBatch, count: float, clip_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of policy and value loss of a batch, and their detached parts per token (M,).

    Policy and critic share no parameters, so each gets the gradient of its own loss. The sum over tokens is divided by
    count, the tokens of this batch over all ranks, so that the gradients of all ranks add up to that of the batch."""
    logits = at_completions(lm, prompt, batch.completions)[batch.mask]  # (M, V)
    values = at_completions(critic, prompt, batch.completions)[batch.mask].squeeze(-1)  # (M,)
    log_probs = logits.log_softmax(-1)
    chosen = batch.completions[batch.mask]  # (M,)
    log_ratio = log_probs.gather(-1, chosen[:, None]).squeeze(-1) - batch.old_log_probs

    policy_losses = clipped_policy_loss(log_ratio, batch.advantages, clip_coef)
    squared_errors = (values - batch.returns).square()
    loss = (policy_losses + 0.5 * squared_errors).sum() / count
    parts = {"policy_loss": policy_losses, "critic_mse": squared_errors, "entropy": categorical_entropy(log_probs)}
    return loss, {name: part.detach() for name, part in (parts | {"log_ratio": log_ratio}).items()}


def optimal_objective(log_p: float, reward: float, kl_beta: float) -> float:
    """The largest E[r] - beta KL(pi || pi_ref) that any policy has: beta ln E_ref[exp(r / beta)], where the reference
    earns the reward with probability exp(log_p), else nothing. Its policy is pi_ref exp(r / beta) / Z (Ziegler et al.
    2019, §2.1)."""
    if kl_beta == 0:
        return reward
    rest = -math.expm1(log_p)  # probability of earning nothing
    log_rest = math.log(rest) if rest > 0 else -math.inf
    return kl_beta * np.logaddexp(log_p + reward / kl_beta, log_rest).item()


def global_moments(parts: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and standard deviation (divisor n - 1) over all ranks of each of P vectors: three arrays (P,)."""
    arrays = [part.numpy(force=True).astype(np.float64) for part in parts]
    sums = np.array([(x.size, x.sum(), np.square(x).sum()) for x in arrays])
    sum_over_ranks(torch.from_numpy(sums))
    count, total, squares = sums.T
    mean = total / np.maximum(count, 1)
    return count, mean, np.sqrt(np.maximum(squares - total * mean, 0) / np.maximum(count - 1, 1))


def flatten_parameters(*modules: nn.Module) -> nn.Parameter:
    """Moves the trained parameters of all modules into one vector (P,) and their gradients into its .grad: each
    parameter becomes a view. Clipping, Adam and the all-reduce then are one operation instead of one per parameter."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    for p, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes)):
        p.data, p.grad = data.view_as(p), grad.view_as(p)
    return flat


# ------------------------------------------------------------------------------------------------------------- training


def pretrain(args: Args, sizes: dict[str, int], run_dir: Path, state: dict, device: torch.device) -> Transformer:
    """A new language model, fitted to made sentences by maximum likelihood. state: of the checkpoint to go on from, if
    there is one. Raises FloatingPointError where the loss is not finite."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    texts = [encode("P" + sentence) for sentence in make_sentences(args.num_sentences, args.seed)]
    longest = max(map(len, texts))
    corpus = torch.tensor([text + [END] * (longest - len(text)) for text in texts])  # (num_sentences, longest)
    torch.manual_seed(args.seed)
    lm = Transformer(len(CHARACTERS), **sizes).to(device)
    parameters = flatten_parameters(lm)
    optimizer = torch.optim.Adam([parameters], eps=1e-5, fused=True)
    start = time.perf_counter() - state.get("seconds", 0)
    first_step, steps = state.get("step", 0), args.pretrain_steps
    if state:
        parameters.data.copy_(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    progress = tqdm(total=steps, initial=first_step, unit="step", disable=None if rank == 0 else True)
    for step in range(first_step, steps):
        if step % 100 == 0 and rank == 0:
            checkpoint = {"stage": "pretraining", "step": step, "seconds": time.perf_counter() - start}
            checkpoint |= {"parameters": parameters.data, "optimizer": optimizer.state_dict()}
            write_atomically(run_dir / "checkpoint.pt", checkpoint)
        rows = np.random.default_rng((args.seed, step)).integers(len(corpus), size=args.pretrain_batch_size)
        batch = corpus[rows]
        mask = until_end(batch)[:, 1:]  # what is predicted: all after the start token, up to the end token
        count = mask.sum().item()
        batch, mask = batch[rank::world_size].to(device), mask[rank::world_size].to(device)
        logits = lm(batch[:, :-1])[mask]  # (M, V)
        loss = functional.cross_entropy(logits, batch[:, 1:][mask], reduction="sum") / count
        parameters.grad.zero_()
        loss.backward()
        loss = loss.detach()
        sum_over_ranks(parameters.grad, loss)
        optimizer.param_groups[0]["lr"] = args.pretrain_learning_rate * (1 - step / steps)
        optimizer.step()
        if not (loss.isfinite() and parameters.isfinite().all()):
            raise FloatingPointError(f"the loss of pretraining step {step + 1} is not finite")
        if rank == 0:
            show_progress(progress, step + 1, f"pretraining loss {loss:.3f} nats per character")
    progress.close()
    return lm


def train(args: Args) -> dict[str, float | str]:
    """Pretrains a language model, trains it with PPO, saves both and measures what was reached. Returns the content of
    summary.json.

    Sets the seed and thread counts of PyTorch and NumPy's thread count. Raises UserError, and FloatingPointError where
    the loss is not finite."""
    # Set-up. Flags describe the whole job: under torchrun, each of world_size ranks has its share of every batch.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_args(args, world_size)
    run_dir = Path(args.resume or args.run_dir or default_run_dir(args))
    state = load_saved(run_dir / "checkpoint.pt") if args.resume else {}
    in_ppo = state.get("stage") == "ppo"
    given = run_dir if in_ppo else Path(args.pretrained) if args.pretrained else None
    pretrained = load_policy(given / "pretrained.pt" if given.is_dir() else given) if given else None
    if pretrained:
        args = replace(args, **pretrained.spec["sizes"])
    sizes = {name: getattr(args, name) for name in ("d_model", "num_layers", "num_heads", "context_length")}
    check_text_args(args, world_size)
    device = start_device(args, world_size, auto="cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter() - state.get("seconds", 0)
    if rank == 0 and not args.resume:
        create_run(run_dir, args, world_size)

    # The reference is the pretrained model for good, the policy starts as a copy of it. So does the critic, except for
    # its head, which says 0 everywhere at first.
    lm = pretrained.lm.to(device) if pretrained else pretrain(args, sizes, run_dir, state, device)
    reference = copy.deepcopy(lm).requires_grad_(False)
    critic = Transformer(1, **sizes).to(device)
    body = {name: weight for name, weight in lm.state_dict().items() if not name.startswith("head.")}
    critic.load_state_dict(body, strict=False)
    nn.init.zeros_(critic.head.weight)
    nn.init.zeros_(critic.head.bias)
    new_critic = copy.deepcopy(critic)
    lm_parameters, critic_parameters = flatten_parameters(lm), flatten_parameters(critic)
    lm_optimizer = torch.optim.Adam([lm_parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam([critic_parameters], lr=args.critic_learning_rate, eps=1e-5, fused=True)
    loss_fn = torch.compile(completion_ppo_loss, dynamic=True) if args.compile else completion_ppo_loss
    prompt = torch.tensor(encode("P" + args.prompt), device=device)  # (P,)
    spec = {"sizes": sizes, "prompt": args.prompt, "target": args.target, "response_length": args.response_length}

    def save_policy(name: str) -> None:
        weights = {key: weight.cpu().clone() for key, weight in lm.state_dict().items()}
        write_atomically(run_dir / name, {"spec": spec, "weights": weights})

    # What the model likes before PPO, and how much any policy can reach.
    summary = {"script": SCRIPT, "task": args.task, "seed": args.seed}
    if rank == 0:
        if not in_ppo:
            save_policy("pretrained.pt")
        reference_policy = load_policy(run_dir / "pretrained.pt")
        texts_before, summary["pizza_rate_before"], _ = measure(reference_policy, reference_policy, args)
        log_p_target, log_p_ref = target_log_probs(reference_policy, args.target, texts_before)
        optimum = optimal_objective(log_p_ref, args.reward, args.kl_beta)
        summary |= {"kl_floor": -log_p_ref, "objective_optimum": optimum}
        print(f"before PPO: {first_of(texts_before)}")
        print(
            f"{args.target!r} has probability {math.exp(log_p_target):.3g} before PPO, all completions ending in it "
            f"{math.exp(log_p_ref):.3g}: the KL floor is {-log_p_ref:.2f}, the optimal objective {optimum:.3f}"
        )
        if math.exp(log_p_ref) * args.episodes < 1:
            print(f"warning: {args.target!r} is too rare to be met in --episodes {args.episodes}", file=sys.stderr)
    if args.pretrain_only:
        leave_ranks()
        if rank > 0:
            return {}
        summary |= {"global_step": 0, "seconds": time.perf_counter() - start, "steps_per_second": 0.0}
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{args.task}: pretrained in {summary['seconds']:.1f} s; saved as {run_dir}/pretrained.pt")
        return summary

    iteration, global_step = 0, 0
    if in_ppo:
        iteration, global_step = state["iteration"], state["global_step"]
        lm_parameters.data.copy_(state["parameters"])
        critic_parameters.data.copy_(state["critic_parameters"])
        lm_optimizer.load_state_dict(state["optimizer"])
        critic_optimizer.load_state_dict(state["critic_optimizer"])
    log = MetricsLog(run_dir, iteration, global_step) if rank == 0 else None
    if rank == 0 and not in_ppo:
        log.events.add_text("completions/before", as_markdown(texts_before, args.prompt), 0)
    progress = tqdm(total=args.episodes, initial=global_step, unit="episode", disable=None if rank == 0 else True)
    ppo_start = time.perf_counter() - state.get("ppo_seconds", 0)

    def save_checkpoint() -> None:
        log.sync()
        state = {"stage": "ppo", "iteration": iteration, "global_step": global_step}
        state |= {"parameters": lm_parameters.data, "optimizer": lm_optimizer.state_dict()}
        state |= {"critic_parameters": critic_parameters.data, "critic_optimizer": critic_optimizer.state_dict()}
        now = time.perf_counter()
        write_atomically(run_dir / "checkpoint.pt", state | {"seconds": now - start, "ppo_seconds": now - ppo_start})

    while global_step < args.episodes:
        if iteration % args.checkpoint_interval == 0 and rank == 0:
            save_checkpoint()

        # 1. Rollout: B completions of the prompt, from noise that depends on nothing but the seed and the iteration.
        # All ranks draw that of all completions, so that a completion meets the same noise however they are spread.
        batch_size = min(args.batch_size, args.episodes - global_step)
        (noise_seed,) = derive_seeds(args.seed, iteration, 1)
        noise = gumbel_noise(np.random.default_rng(noise_seed), batch_size, args.response_length)[rank::world_size]
        completions = sample_completions(lm, prompt, noise.to(device))  # (B, L)
        mask = until_end(completions)  # (B, L)
        texts = [decode(tokens) for tokens in completions.tolist()]

        # 2. Log-probs and values of all tokens in one pass, rewards, advantages, and the returns that values aim at.
        with torch.no_grad():
            log_probs = chosen_log_probs(lm, prompt, completions)  # (B, L)
            log_ratio_ref = log_probs - chosen_log_probs(reference, prompt, completions)  # (B, L)
            values = at_completions(critic, prompt, completions).squeeze(-1)  # (B, L)
        external = torch.tensor([external_reward(text, args.target, args.reward) for text in texts], device=device)
        rewards = token_rewards(external, log_ratio_ref, mask, args.kl_beta)  # (B, L)
        advantages = masked_gae(rewards, values, mask, args.gamma, args.gae_lambda)  # (B, L)
        rollout = log_probs, advantages, advantages + values
        batch = CompletionBatch(completions, mask, *(x[mask] for x in rollout))  # M tokens
        columns = {
            "pizza_rate": external > 0,
            "external_reward": external,
            "total_reward": rewards.sum(-1),
            "kl_per_completion": log_ratio_ref.masked_fill(~mask, 0).sum(-1),
            "response_length": mask.sum(-1),
            "kl_per_token": log_ratio_ref[mask],
        }
        counts, means, _ = global_moments(list(columns.values()))
        charts, num_tokens = dict(zip(columns, means.tolist())), counts[-1].item()

        # 3. Update: several steps on the whole batch.
        annealed = 1 - global_step / args.episodes if args.anneal_lr else 1.0
        lm_optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * annealed
        all_parts, grad_norms = [], []
        for _ in range(args.update_epochs):
            loss, parts = loss_fn(lm, critic, prompt, batch, num_tokens, args.clip_coef)
            lm_parameters.grad.zero_()
            critic_parameters.grad.zero_()
            loss.backward()
            sum_over_ranks(lm_parameters.grad, critic_parameters.grad)
            for parameters, optimizer in ((lm_parameters, lm_optimizer), (critic_parameters, critic_optimizer)):
                grad_norms.append(parameters.grad.norm())
                parameters.grad.mul_((args.max_grad_norm / (grad_norms[-1] + 1e-6)).clamp(max=1))
                optimizer.step()
            all_parts.append(parts)
        iteration += 1
        global_step += batch_size

        # 4. Metrics: of the batch, and of the losses the means over all steps of this iteration, over all ranks.
        columns = {name: torch.cat([parts[name] for parts in all_parts]) for name in all_parts[0]}
        log_ratio = columns.pop("log_ratio")
        columns["old_approx_kl"], columns["approx_kl"] = kl_estimates(log_ratio)
        columns["clipfrac"] = (log_ratio.exp() - 1).abs() > args.clip_coef
        columns["policy_grad_norm"], columns["critic_grad_norm"] = torch.stack(grad_norms).view(-1, 2).T
        losses = dict(zip(columns, global_moments(list(columns.values()))[1].tolist()))
        finite = lm_parameters.isfinite().all() and critic_parameters.isfinite().all()
        if not (finite and np.isfinite([*charts.values(), *losses.values()]).all()):
            raise FloatingPointError(f"the loss of iteration {iteration} is not finite")
        seconds = time.perf_counter() - ppo_start
        row = {
            "iteration": iteration,
            "global_step": global_step,
            **{f"charts/{name}": value for name, value in charts.items()},
            "charts/learning_rate": args.learning_rate * annealed,
            **{f"losses/{name}": value for name, value in losses.items()},
            "time/seconds": seconds,
            "time/episodes_per_second": global_step / seconds,
        }
        if rank == 0:
            log.write(row)
            if global_step // 100 > (global_step - batch_size) // 100:
                save_policy(f"policy_episode_{global_step}.pt")
            text = f"{args.target} {charts['pizza_rate']:.0%}, KL {charts['kl_per_completion']:.2f}"
            show_progress(progress, global_step, f"{text}, {global_step / seconds:.0f} episodes/s")

    # The policy is saved, and what was saved is measured.
    ppo_seconds = time.perf_counter() - ppo_start
    progress.close()
    leave_ranks()
    if rank > 0:
        return {}
    save_checkpoint()
    save_policy("policy.pt")
    seconds = time.perf_counter() - start
    texts, rate, kl = measure(load_policy(run_dir), reference_policy, args)
    log.events.add_text("completions/after", as_markdown(texts, args.prompt), global_step)
    log.close()
    draw_metrics(run_dir)
    draw_critic_values(run_dir, args.prompt, args.target, {"before": new_critic, "after": critic})
    objective = args.reward * rate - args.kl_beta * kl
    summary |= {"global_step": global_step, "seconds": seconds, "ppo_seconds": ppo_seconds}
    summary |= {"steps_per_second": global_step / ppo_seconds, "pizza_rate": rate, "kl_per_completion": kl}
    share = objective / optimum if optimum else 0.0  # nothing to reach where the target is next to impossible
    summary |= {"objective": objective, "objective_share": share}
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    low, high = wilson_interval(rate, args.eval_samples)
    print(f"after PPO: {first_of(texts)}")
    print(
        f"{args.task}: {summary['pizza_rate_before']:.1%} -> {rate:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"KL {kl:.2f} (floor {-log_p_ref:.2f}), objective {objective:.3f} ({share:.1%} of the "
        f"optimum) after {global_step} episodes in {ppo_seconds:.1f} of {seconds:.1f} s; saved in {run_dir}"
    )
    return summary


# --------------------------------------------------------------------------------------------------- the policy at work


class Policy:
    """The language model at work: it completes the prompt that it was trained on."""

    def __init__(self, spec: dict, weights: dict[str, Tensor]):
        """spec: sizes of the transformer, prompt, target, response_length. weights: its state_dict."""
        self.spec = spec
        self.lm = Transformer(len(CHARACTERS), **spec["sizes"])
        self.lm.load_state_dict(weights)
        self.prompt = torch.tensor(encode("P" + spec["prompt"]))

    def sample(self, count: int, rng: np.random.Generator) -> Tensor:
        """Tokens (count, L) of completions."""
        noise = gumbel_noise(rng, count, self.spec["response_length"])
        return sample_completions(self.lm, self.prompt, noise)

    def complete(self, count: int, rng: np.random.Generator) -> list[str]:
        """Completions as texts; those that have come to an end end in E."""
        return [decode(tokens) for tokens in self.sample(count, rng).tolist()]


def load_policy(path: str | Path) -> Policy:
    """The policy in a policy.pt file, or in the run directory that holds one. Raises UserError."""
    path = Path(path)
    path = path / "policy.pt" if path.is_dir() else path
    saved = load_saved(path)
    if "weights" not in saved:
        raise UserError(f"{path} is a checkpoint: give the policy.pt beside it")
    return Policy(saved["spec"], saved["weights"])


def pizza_rate(texts: list[str], target: str) -> float:
    """Share of completions that end in the target."""
    return sum(external_reward(text, target, 1.0) for text in texts) / len(texts)


def target_log_probs(policy: Policy, target: str, texts: list[str]) -> tuple[float, float]:
    """Log-probs of saying the target and nothing else, which is exact, and of saying anything that ends in it: longer
    completions are rare, and their share is that among the policy's sampled texts."""
    tokens = torch.tensor([encode(target + "E")])  # (1, L)
    with torch.no_grad():
        log_p = chosen_log_probs(policy.lm, policy.prompt, tokens).sum().item()
    longer = sum(text.endswith(target + "E") and text != target + "E" for text in texts) / len(texts)
    return log_p, math.log(math.exp(log_p) + longer) if longer else log_p


def measure(policy: Policy, reference: Policy, args: Args) -> tuple[list[str], float, float]:
    """eval_samples completions of a policy, the share that ends in the target, and the KL divergence from the reference
    per completion, as the mean of k1."""
    (eval_seed,) = derive_seeds(args.seed, 2**32 - 1, 1)
    completions = policy.sample(args.eval_samples, np.random.default_rng(eval_seed))
    with torch.no_grad():
        log_ratio = chosen_log_probs(policy.lm, policy.prompt, completions)
        log_ratio -= chosen_log_probs(reference.lm, policy.prompt, completions)
    texts = [decode(tokens) for tokens in completions.tolist()]
    kl = log_ratio.masked_fill(~until_end(completions), 0).sum(-1).mean().item()
    return texts, pizza_rate(texts, args.target), kl


def first_of(texts: list[str]) -> str:
    """The first completions in a line."""
    return ", ".join(texts[:10]) + ", ..."


def as_markdown(texts: list[str], prompt: str) -> str:
    """The prompt with each of the first completions in a line of its own, for TensorBoard."""
    return "  \n".join(prompt + text for text in texts[:30])


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a probability, from the rate seen in count trials (Wilson 1927)."""
    z = 1.96
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def play(args: Args) -> None:
    """Prints completions of the saved policy args.play, and how many of eval_samples end in its target."""
    check_args(args, world_size=1)
    torch.set_num_threads(args.torch_threads)
    policy = load_policy(args.play)
    texts = policy.complete(args.eval_samples, np.random.default_rng(args.seed))
    for text in texts[:20]:
        print(policy.spec["prompt"] + text)
    rate = pizza_rate(texts, policy.spec["target"])
    low, high = wilson_interval(rate, len(texts))
    print(f"{policy.spec['target']}: {rate:.1%} of {len(texts)} (95 % interval {low:.1%} to {high:.1%})")


# ---------------------------------------------------------------------------------------------------------- run-keeping

SCRIPT = "ppo_char_lm_pizza"
FORMAT = 1  # of checkpoint.pt and policy.pt: raised whenever what they hold changes
LIBRARIES = ("torch", "numpy")  # whose versions config.json tells
# What check_args demands of the values of flags.
LIMITS = {
    "at least 1": (
        "episodes batch_size response_length update_epochs num_sentences pretrain_steps pretrain_batch_size"
        " d_model num_layers num_heads context_length checkpoint_interval",
        lambda x: x >= 1,
    ),
    "between 1 and 100,000": ("eval_samples", lambda x: 1 <= x <= 100_000),
    "between 1 and 1024": ("torch_threads", lambda x: 1 <= x <= 1024),
    "above 0": (
        "reward learning_rate critic_learning_rate clip_coef max_grad_norm pretrain_learning_rate",
        lambda x: 0 < x < math.inf,
    ),
    "between 0 and 2**32 - 1": ("seed kl_beta", lambda x: 0 <= x < 2**32),
    "between 0 and 1": ("gamma gae_lambda", lambda x: 0 <= x <= 1),
}


class UserError(Exception):
    """A mistake in what the user gave; its text names the flag or file and the mend."""


def check_args(args: Args, world_size: int) -> None:
    """Raises UserError for a flag whose value cannot work."""
    for limit, (names, holds) in LIMITS.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UserError(f"--{name.replace('_', '-')} must be {limit}, not {value}")
    if args.resume:
        saved = saved_args(args.resume)
        for name in (field.name for field in fields(Args) if field.name != "run_dir"):
            if getattr(args, name) != getattr(saved, name):
                raise UserError(f"--{name.replace('_', '-')} contradicts the run in {args.resume}: leave it out")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        raise UserError(f"--device {args.device} is not available to this PyTorch: use cpu")
    if args.device == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= torch.cuda.device_count():
        raise UserError("--device cuda needs a GPU per process: lower torchrun's --nproc-per-node")
    if args.device == "mps" and world_size > 1:
        raise UserError("--device mps works with a single process: use cpu")


def check_text_args(args: Args, world_size: int) -> None:
    """Raises UserError for flags about texts, models and batches that do not fit together."""
    for name in ("prompt", "target"):
        text = getattr(args, name)
        if not re.fullmatch("[a-z ]+", text):
            raise UserError(f"--{name} {text!r} must be of letters a to z and spaces, at least one")
    if len(args.target) >= args.response_length:
        raise UserError(f"--target {args.target} and the end token need --response-length {len(args.target) + 1}")
    if args.pretrain_only and args.pretrained:
        raise UserError("--pretrain-only contradicts --pretrained, which skips pretraining: leave one out")
    if args.d_model % args.num_heads:
        raise UserError(f"--d-model {args.d_model} must be a multiple of --num-heads {args.num_heads}")
    for name in ("batch_size", "episodes", "pretrain_batch_size"):
        if getattr(args, name) % world_size:
            raise UserError(f"--{name.replace('_', '-')} must be a multiple of the {world_size} processes")
    lengths = {"--prompt and --response-length": len(f"P{args.prompt}") + args.response_length - 1}
    if not args.pretrained:
        lengths["sentences"] = len(f"P{max(NAMES, key=len)} likes {max(FOODS, key=len)}")
    for what, length in lengths.items():
        if length > args.context_length:
            raise UserError(f"{what} need a --context-length of {length}, and the model has {args.context_length}")


def start_device(args: Args, world_size: int, auto: str) -> torch.device:
    """Sets threads and determinism, joins the other ranks, and returns this rank's device. auto: what "auto" means."""
    torch.set_num_threads(args.torch_threads)
    threadpool_limits(args.torch_threads)  # NumPy's too
    device = torch.device(auto if args.device == "auto" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over all ranks, with one all-reduce; a single process keeps its own."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def leave_ranks() -> None:
    """Leaves the other ranks when all have come here: nobody goes while others still talk."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def derive_seeds(seed: int, stage: int, count: int) -> list[int]:
    """count independent 32-bit seeds for one stage of the run with this seed."""
    return np.random.SeedSequence((seed, stage)).generate_state(count).tolist()


def default_run_dir(args: Args) -> str:
    """runs/<task>__<script>__<seed>__<time>"""
    task = re.sub(r"[^A-Za-z0-9.-]", "_", args.task)
    return f"runs/{task}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def create_run(run_dir: Path, args: Args, world_size: int) -> None:
    """Makes the run directory with its config.json. Raises UserError where a run is already."""
    if any(
        (run_dir / name).exists() for name in ("config.json", "metrics.csv", "checkpoint.pt", "policy.pt", "policy")
    ):
        raise UserError(f"--run-dir {run_dir} already holds a run: choose another, or continue it with --resume")
    with user_error_in(f"--run-dir {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if which("git") else ""
    config = {
        "args": asdict(replace(args, run_dir=None)),
        "world_size": world_size,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in LIBRARIES if find_spec(p)},
        "git": commit or None,
        "machine": machine(),
    }
    write_atomically(run_dir / "config.json", json.dumps(config, indent=2) + "\n")


def machine() -> str:
    """Names of the processor, its cores and the GPU, if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores{gpu}"


def write_atomically(path: Path, content: dict | str) -> None:
    """Writes text, or tensors and plain Python in a dict, such that a kill leaves the old or the new file whole."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save({"script": SCRIPT, "format": FORMAT} | content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_saved(path: Path) -> dict:
    """The dict that write_atomically wrote. Raises UserError for a missing, broken or foreign file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run of {SCRIPT}.py that has come so far, or a file in one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["script"], saved["format"]
    except Exception as error:  # torch.load fails in many ways on bytes that are not its own
        raise UserError(f"{path} is cut short or not of {SCRIPT}.py: restore it, or start a new run") from error
    if found != (SCRIPT, FORMAT):
        raise UserError(f"{path} has format {found[1]} of {found[0]}.py, not {FORMAT} of {SCRIPT}.py: use that version")
    return saved


class MetricsLog:
    """metrics.csv and TensorBoard's event file in a run directory: a row per iteration, the same names in both."""

    def __init__(self, run_dir: Path, rows: int, global_step: int):
        """Goes on after the checkpoint's rows and step; later rows, of a run cut short, go. Raises UserError."""
        self.file = open(run_dir / "metrics.csv", "a+")  # noqa: SIM115 (open as long as the run)
        self.file.seek(0)
        kept = list(itertools.islice(self.file, rows + 1 if rows else 0))
        if len(kept) <= rows and rows:
            raise UserError(f"{self.file.name} has lost rows of the {rows} up to the checkpoint: restore it")
        self.file.truncate(len("".join(kept)))
        self.needs_header = not kept
        self.events = SummaryWriter(str(run_dir), purge_step=global_step + 1)

    def write(self, row: dict[str, float]) -> None:
        """Appends a row, handed to the operating system at once: a killed process loses none."""
        if self.needs_header:
            self.file.write(",".join(row) + "\n")
            self.needs_header = False
        self.file.write(",".join(map(repr, row.values())) + "\n")
        self.file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self.events.file_writer.add_summary(Summary(value=values), row["global_step"])

    def sync(self) -> None:
        """Waits until all rows are on the disk, so that no checkpoint is ahead of them."""
        self.events.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes both files."""
        self.file.close()
        self.events.close()


def draw_metrics(run_dir: Path) -> None:
    """Draws all charts and losses of metrics.csv over episodes, and their means so far, as metrics.png."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(("charts/", "losses/"))]
    steps = [int(row["global_step"]) for row in rows]
    figure = Figure(figsize=(16, 9))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.08, top=0.96, hspace=0.25)
    for i, name in enumerate(names):
        axes = figure.add_subplot(3, math.ceil(len(names) / 3), i + 1)
        values = np.array([float(row[name]) for row in rows])
        axes.plot(steps, values, alpha=0.5, label="each update")
        axes.plot(steps, values.cumsum() / np.arange(1, len(values) + 1), label="mean so far")
        axes.ticklabel_format(scilimits=(-3, 4))
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower right", ncols=2)
    figure.supxlabel("episodes")
    figure.savefig(run_dir / "metrics.png")


def draw_critic_values(run_dir: Path, prompt: str, target: str, critics: dict[str, Transformer]) -> None:
    """Draws each critic's values along the prompt and the target, and along another food, as critic_values.png. From
    the last character of the prompt on, a value is the return to expect; before that, nothing has trained it."""
    context_length = len(critics["after"].positions.weight)
    foods = "pizza" if target == "salad" else "salad", target
    texts = [f"P{prompt}{food[:-1]}"[:context_length] for food in foods]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for (when, critic), style in zip(critics.items(), ("--", "-")):
        for text, colour in zip(texts, ("tab:green", "tab:red")):
            with torch.no_grad():
                values = critic(torch.tensor([encode(text)], device=critic.head.weight.device))[0, :, 0]
            axes.plot(values.tolist(), style, color=colour, label=f'"{text}" {when} PPO')
    labels = ["\n".join(pair) for pair in itertools.zip_longest(*texts, fillvalue="")]
    axes.axvspan(0, len(prompt) - 0.5, color="tab:gray", alpha=0.15, label="inside the prompt: not trained")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="value", title=run_dir.name)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(run_dir / "critic_values.png")


def show_progress(progress: tqdm, done: int, text: str) -> None:
    """Moves the bar; where stderr is no terminal, prints a line per tenth of the run instead."""
    done, before = min(done, progress.total), progress.n
    if not progress.disable:
        progress.set_postfix_str(text, refresh=False)
        progress.update(done - before)
        return
    progress.n = done
    if done * 10 // progress.total > before * 10 // progress.total:
        print(f"{done:,}/{progress.total:,}: {text}", file=sys.stderr)


@contextlib.contextmanager
def user_error_in(what: str) -> Iterator[None]:
    """Turns an error that a library raises about the user's wish into a UserError that begins with what."""
    try:
        yield
    except Exception as error:  # libraries, environments and files fail in many ways
        raise UserError(f"{what}: {error}".splitlines()[0]) from error


def parse_flags(default: Args) -> Args:
    """tyro.cli, with its boxed message about a wrong flag turned into one line. Raises UserError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, default=default)
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]
        in_text = itertools.dropwhile(lambda line: not re.search(r"\w", line), lines)  # after the frame
        message = " ".join(itertools.takewhile(re.compile(r"\w").search, in_text))
        raise UserError(f"{message}; --help shows all flags") from None


def saved_args(run_dir: str) -> Args:
    """The flags that continue the run in run_dir: those of its config.json. Raises UserError."""
    with user_error_in(f"--resume {run_dir} holds no run of this script"):
        config = json.loads(Path(run_dir, "config.json").read_text())
        world_size = int(config["world_size"])
        args = replace(Args(**config["args"]), resume=run_dir, run_dir=run_dir)
    if world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(f"--resume {run_dir}: the run had {world_size} processes, give it as many")
    return args


def stop(signum: int, frame: object) -> None:
    """Ctrl-C and SIGTERM end the main process; forked workers, if there are any, end with it, quietly."""
    if parent_process() is None:
        raise KeyboardInterrupt
    if signum == signal.SIGTERM:
        os._exit(0)


def main() -> None:
    """The command line: plays or trains; an error becomes one line and an exit code."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    args = None
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        args = parse_flags(Args())
        if args.resume:
            if args.run_dir:
                raise UserError("--run-dir contradicts --resume, which goes on in its own directory: leave it out")
            args = parse_flags(saved_args(args.resume))
        args.run_dir = args.resume or args.run_dir or default_run_dir(args)
        play(args) if args.play else train(args)
        if "RANK" in os.environ:
            sys.stdout.flush()
            os._exit(0)  # gloo's threads can abort Python's own shutdown (pytorch pull request 179291)
    except UserError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        if speaks:
            print(f"error: {error}; {args.run_dir}/checkpoint.pt is the last good state", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if speaks and args and not args.play and Path(args.run_dir, "checkpoint.pt").exists():
            launcher = ["torchrun", "..."] if "RANK" in os.environ else [sys.executable]
            command = shlex.join([*launcher, sys.argv[0], "--resume", args.run_dir])
            print(f"stopped; resume with: {command}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
