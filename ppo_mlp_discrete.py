# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "threadpoolctl==3.8.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
# ]
# ///
"""PPO with an MLP policy for discrete actions: any gymnasium environment with Discrete or MultiDiscrete actions.

    python ppo_mlp_discrete.py                                          # solve CartPole-v1 in seconds
    python ppo_mlp_discrete.py --env-id Acrobot-v1 --seed 2 --total-timesteps 500000
    python ppo_mlp_discrete.py --play runs/RUN/policy.pt                # the saved policy, without training code

References: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, "The 37 Implementation Details
of PPO" https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, CleanRL's ppo.py.

Where this differs from the paper or from CleanRL, and why:
- Truncated episodes bootstrap from the value of their true last observation; CleanRL treats them as terminated.
- Old log-probs and values come from one batched pass over the rollout: no critic call per step, and ratio = 1 exactly
  where the update starts.
- The row in which an environment resets (its action is ignored) is no experience: it is left out of the loss, the
  statistics and the step count.
- The KL stop looks at each minibatch before its step; CleanRL looks once per epoch, after the steps.
- Losses and KL are logged as means over all minibatches; CleanRL logs the last one.
- Actions are chosen in NumPy, and all parameters are views of one vector: both only for speed.
- The learning rate falls with the steps taken, not with the iterations, because reset rows make those differ.
- Value clipping is off by default: Andrychowicz et al. 2021 (https://arxiv.org/abs/2006.05990) found that it hurts.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete, flatten_space
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO with an MLP policy for discrete actions."""

    env_id: str = "CartPole-v1"
    """gymnasium id of the task; "module:Name-v0" imports the module first"""
    seed: int = 1
    """seed of weights, environments, sampling and shuffling"""
    total_timesteps: int = 100_000
    """environment steps to train for, over all environments"""
    target_return: float | None = None
    """stop as soon as the mean return of the last 100 training episodes reaches this"""

    num_envs: int = 8
    """parallel environments"""
    num_steps: int = 64
    """steps per environment and iteration: an iteration collects num_envs x num_steps"""
    vectorization_mode: Literal["auto", "sync", "async", "vector_entry_point", "envpool"] = "auto"
    """gymnasium.make_vec's, or envpool; auto: the environment's own vectorised form where it has one, else sync"""

    objective: Literal["clip", "kl-penalty"] = "clip"
    """policy objective: clipped surrogate (PPO paper eq. 7) or surrogate with adaptive KL penalty (eq. 8)"""
    learning_rate: float = 2e-3
    """Adam step size at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    gamma: float = 0.98
    """discount factor per step"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation (GAE paper eq. 16)"""
    num_minibatches: int = 4
    """minibatches per epoch, of nearly equal size"""
    update_epochs: int = 8
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise advantages to mean 0, std 1 within each minibatch"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate, and of the value clip"""
    clip_vloss: bool = False
    """clip the value loss around the old values (on in CleanRL)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss (half the mean squared error)"""
    max_grad_norm: float = 0.5
    """joint gradient norm of actor and critic is clipped to this"""
    target_kl: float | None = None
    """end the iteration's update before a step whose minibatch has a k3 KL above this [nats]"""
    kl_penalty: float = 1.0
    """kl-penalty: beta in the first iteration"""
    kl_penalty_target: float = 0.01
    """kl-penalty: KL per iteration that beta is adapted to [nats]"""

    eval_episodes: int = 20
    """evaluation episodes after training, with greedy and again with sampled actions; 0 skips them"""
    capture_video: bool = False
    """record the evaluation episodes as run-dir/videos/*.mp4 (needs moviepy)"""
    play: str | None = None
    """run this saved policy (policy.pt or its run directory) for eval_episodes and exit"""

    run_dir: str | None = None
    """where the run is written; default runs/<task>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue from its last checkpoint; flags come from its config.json"""
    checkpoint_interval: int = 100
    """iterations between checkpoints; each resets all environments and drops the episodes under way: keep it long"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are; auto is cpu: for small MLPs it is the fastest"""
    torch_threads: int = 1
    """CPU threads per process; more help only with thousands of rows per minibatch"""
    compile: bool = False
    """torch.compile the loss: up to a minute of compiling, then about a fifth faster on CartPole"""

    @property
    def task(self) -> str:
        """What the run directory and the summary call the task."""
        return self.env_id


# ------------------------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Linear, gain: float) -> nn.Linear:
    """Orthogonal weights with the given gain, zero bias (37 details, no. 2). Returns the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Tanh(nn.Module):
    """tanh(x) = 2 sigmoid(2x) - 1. On a CPU PyTorch's sigmoid takes a fifth of the time of its tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise tanh of x, any shape."""
        return 2 * torch.sigmoid(2 * x) - 1


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    """inputs-64-64-outputs network with tanh between the layers."""
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64), math.sqrt(2)),
        Tanh(),
        layer_init(nn.Linear(64, 64), math.sqrt(2)),
        Tanh(),
        layer_init(nn.Linear(64, outputs), output_gain),
    )


class Policy:
    """The actor at work, in rollouts, evaluation and applications. It is plain NumPy, because for a handful of
    observations that takes a fifth of PyTorch's time.

    An action has C categorical components (1 for a Discrete space) of sizes nvec. The logits of an observation stand in
    one row of A = sum(nvec) columns, component after component."""

    def __init__(self, spec: dict, weights: dict[str, Tensor]):
        """spec: what `discrete_spec` returns. weights: state_dict of the actor's `mlp`."""
        arrays = [weight.numpy(force=True) for weight in weights.values()]
        self.spec = spec
        self.layers = [(weight.T, bias) for weight, bias in zip(arrays[::2], arrays[1::2])]
        ends = np.cumsum(spec["nvec"]).tolist()
        self.components = [slice(end - n, end) for n, end in zip(spec["nvec"], ends)]

    def logits(self, obs: np.ndarray) -> np.ndarray:
        """Logits (..., A) of flat observations (..., obs_dim)."""
        for weight, bias in self.layers[:-1]:
            obs = np.tanh(obs @ weight + bias)
        weight, bias = self.layers[-1]
        return obs @ weight + bias

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Index (..., C) of the highest score (..., A) in each component. For logits + standard Gumbel noise as scores,
        that is a sample of the distribution softmax(logits)."""
        return np.stack([scores[..., columns].argmax(-1) for columns in self.components], -1)

    def to_env(self, choices: np.ndarray) -> np.ndarray:
        """Actions as `env.step` takes them, from indices (..., C) that count from 0."""
        actions = (choices + self.spec["start"]).astype(self.spec["dtype"])
        return actions.reshape((*choices.shape[:-1], *self.spec["action_shape"]))

    def act(self, obs: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Actions for flat observations (..., obs_dim), one or a batch: sampled with rng, else the most likely ones."""
        logits = self.logits(np.asarray(obs, np.float32))
        return self.to_env(self.choose(logits + (rng.gumbel(size=logits.shape) if rng else 0)))[()]


# ------------------------------------------------------------------------------------------------------------ algorithm


def log_softmax_each(logits: Tensor, nvec: list[int]) -> Tensor:
    """Log-probs (..., A) of logits (..., A), normalised within each component."""
    if len(nvec) == 1:
        return logits.log_softmax(-1)
    return torch.cat([part.log_softmax(-1) for part in logits.split(nvec, -1)], -1)


def compute_gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates (GAE paper eq. 16) of T steps in N environments with NEXT_STEP autoreset.

    rewards, terminated, truncated: (T, N). values: (T + 1, N), the last row for the observation after the segment.
    After a finished step t, obs[t + 1] is the true last observation of its episode, so values[t + 1] is what a
    truncated episode bootstraps from; a terminated one bootstraps from 0. The recursion is cut at both. Row t + 1 then
    is the reset: its advantage means nothing, and nothing before it depends on it. Returns (T, N).
    """
    deltas = (rewards + gamma * values[1:] * ~terminated - values[:-1]).numpy(force=True)
    decays = gamma * gae_lambda * (~(terminated | truncated)).numpy(force=True).astype(deltas.dtype)
    advantages, following = np.zeros_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):  # in NumPy: small operations cost a fraction of PyTorch's
        advantages[t] = following = deltas[t] + decays[t] * following
    return torch.from_numpy(advantages).to(values.device)


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) per row (B,), PPO paper eq. 7. log_ratio: log pi - log pi_old."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def kl_penalty_policy_loss(log_ratio: Tensor, advantages: Tensor, kl: Tensor, beta: float) -> Tensor:
    """-(ratio A - beta KL(pi_old || pi)) per row (B,), PPO paper eq. 8. This KL is between the policies before and
    during the update; it has nothing to do with the reference model of RLHF."""
    return beta * kl - log_ratio.exp() * advantages


def adapt_beta(beta: float, kl: float, target: float) -> float:
    """Halves beta after an iteration with KL < target / 1.5, doubles it after KL > 1.5 target (PPO paper, §4); within
    1e-4 to 1e4, so that it finds its way back."""
    factor = 0.5 if kl < target / 1.5 else 2.0 if kl > target * 1.5 else 1.0
    return min(max(beta * factor, 1e-4), 1e4)


def categorical_kl(old_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """Exact KL(pi_old || pi) (B,) of log-probs (B, A), summed over components."""
    return (old_log_probs.exp() * (old_log_probs - log_probs)).sum(-1)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy (B,) of log-probs (B, A), summed over components."""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_estimates(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """k1 = -log r and k3 = (r - 1) - log r per row (B,): for actions from pi_old both have the mean KL(pi_old || pi);
    k3 is never negative (http://joschu.net/blog/kl-approx.html)."""
    return -log_ratio, log_ratio.exp() - 1 - log_ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the squared error per row (B,). With a clip_coef: the larger of that and of the error after the value is
    clipped to old_values +- clip_coef (37 details, no. 9)."""
    squared = (values - returns).square()
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        squared = torch.max(squared, (clipped - returns).square())
    return 0.5 * squared


class CategoricalBatch(NamedTuple):
    """B rows of experience; all that the loss needs to know of them."""

    obs: Tensor  # (B, obs_dim)
    columns: Tensor  # (B, C) column of the chosen action of each component
    old_log_probs: Tensor  # (B, A)
    old_values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


def categorical_ppo_loss(
    actor: nn.Module, critic: nn.Module, batch: CategoricalBatch, count: float, nvec: list[int], beta: float, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a minibatch, and its detached parts per row (B,).

    The sum over rows is divided by count, the rows of this minibatch over all ranks, so that the gradients of all ranks
    add up to that of the whole minibatch."""
    log_probs = log_softmax_each(actor(batch.obs), nvec)  # (B, A)
    values = critic(batch.obs).squeeze(-1)  # (B,)
    log_ratio = (log_probs - batch.old_log_probs).gather(-1, batch.columns).sum(-1)  # (B,)

    if args.objective == "clip":
        policy_losses = clipped_policy_loss(log_ratio, batch.advantages, args.clip_coef)
    else:
        kl = categorical_kl(batch.old_log_probs, log_probs)
        policy_losses = kl_penalty_policy_loss(log_ratio, batch.advantages, kl, beta)
    value_losses = value_loss(values, batch.old_values, batch.returns, args.clip_coef if args.clip_vloss else None)
    entropy = categorical_entropy(log_probs)
    loss = (policy_losses + args.vf_coef * value_losses - args.ent_coef * entropy).sum() / count
    parts = {"policy_loss": policy_losses, "value_loss": value_losses, "entropy": entropy, "log_ratio": log_ratio}
    return loss, {name: part.detach() for name, part in parts.items()}


def global_moments(parts: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and standard deviation (divisor n - 1) over all ranks of each of P vectors: three arrays (P,)."""
    arrays = [part.numpy(force=True).astype(np.float64) for part in parts]
    sums = np.array([(x.size, x.sum(), np.square(x).sum()) for x in arrays])
    sum_over_ranks(torch.from_numpy(sums))
    count, total, squares = sums.T
    mean = total / np.maximum(count, 1)
    return count, mean, np.sqrt(np.maximum(squares - total * mean, 0) / np.maximum(count - 1, 1))


def shuffled_minibatches(batch: NamedTuple, args: Args) -> Iterator[tuple[NamedTuple, float]]:
    """Yields minibatches of nearly equal size, shuffled, that hold every row once, with the number of rows of each over
    all ranks. With norm_adv, the advantages of a minibatch have mean 0 and std 1 over all ranks; a single row has no
    std and stays as it is."""
    order = torch.randperm(len(batch.advantages)).to(batch.advantages.device)
    parts = (x[order].tensor_split(args.num_minibatches) for x in batch)
    minibatches = [batch._make(part) for part in zip(*parts)]
    moments = global_moments([minibatch.advantages for minibatch in minibatches])
    for minibatch, count, mean, std in zip(minibatches, *moments):
        if args.norm_adv and count > 1:
            minibatch = minibatch._replace(advantages=(minibatch.advantages - mean) / (std + 1e-8))
        if count:  # reset rows may have left fewer rows than minibatches
            yield minibatch, count


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


def finished_episodes(rewards: np.ndarray, resets: np.ndarray, under_way: np.ndarray) -> np.ndarray:
    """Return and length (2, T, N) of the episodes that ended in each row of a rollout, NaN where none did.

    rewards: (T, N). resets: (T + 1, N), true in rows in which an environment was reset. under_way: (2, N) return and
    length so far of the current episodes, updated in place.
    """
    finished = np.full((2, *rewards.shape), np.nan)
    valid = ~resets[:-1]
    totals = np.cumsum([rewards * valid, valid], axis=1, dtype=np.float64)  # (2, T, N) since the first row
    for t, n in np.argwhere(resets[1:]):
        finished[:, t, n] = under_way[:, n] + totals[:, t, n]
        under_way[:, n] = -totals[:, t, n]
    under_way += totals[:, -1]
    return finished


# ------------------------------------------------------------------------------------------------------------- training


def train(args: Args) -> dict[str, float | str]:
    """Trains a policy, saves it in args.run_dir and evaluates what was saved. Returns the content of summary.json.

    Sets the seed and thread counts of PyTorch and NumPy's thread count. Raises UserError, and FloatingPointError where
    the loss is not finite."""
    # Set-up. Flags describe the whole job: under torchrun, each of world_size ranks has its share of the environments.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_args(args, world_size)
    check_env_args(args, world_size)
    run_dir = Path(args.resume or args.run_dir or default_run_dir(args))
    videos = run_dir / "videos" if args.capture_video else None
    device = start_device(args, world_size, auto="cpu")
    torch.manual_seed(args.seed)
    num_steps, num_envs = args.num_steps, args.num_envs // world_size
    my_envs = slice(rank * num_envs, (rank + 1) * num_envs)
    if args.eval_episodes:
        make_eval_env(args.env_id, args.capture_video).close()  # fails now rather than after training
    envs = make_envs(args.env_id, num_envs, args.vectorization_mode)
    spec = discrete_spec(args.env_id, envs)
    obs_dim, nvec = spec["obs_dim"], spec["nvec"]
    actor = mlp(obs_dim, sum(nvec), output_gain=0.01).to(device)
    critic = mlp(obs_dim, 1, output_gain=1.0).to(device)
    parameters = flatten_parameters(actor, critic)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    loss_fn = torch.compile(categorical_ppo_loss) if args.compile else categorical_ppo_loss

    # Rollouts are collected in NumPy, where the environments live. Row t holds obs[t], the action chosen there and what
    # came of it; the observation after the last row becomes row 0 of the next rollout. resets[t]: the step before row t
    # ended an episode, so that row t ignores its action and resets the environment.
    obs = np.zeros((num_steps + 1, num_envs, obs_dim), np.float32)
    resets = np.zeros((num_steps + 1, num_envs), bool)
    choices = np.zeros((num_steps, num_envs, len(nvec)), np.int64)
    rewards = np.zeros((num_steps, num_envs), np.float32)
    terminated, truncated = np.zeros((2, num_steps, num_envs), bool)
    under_way = np.zeros((2, num_envs))  # return and length so far of the current episodes

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    iteration, global_step, beta = 0, 0, args.kl_penalty
    recent = deque(maxlen=100)  # (return, length) of the last training episodes
    start = time.perf_counter()
    if args.resume:
        state = load_saved(run_dir / "checkpoint.pt")
        iteration, global_step, beta = state["iteration"], state["global_step"], state["beta"]
        recent.extend(state["recent"])
        start -= state["seconds"]
        parameters.data.copy_(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    elif rank == 0:
        create_run(run_dir, args, world_size)
    log = MetricsLog(run_dir, iteration, global_step) if rank == 0 else None
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None if rank == 0 else True)

    def solved() -> bool:
        full = len(recent) == recent.maxlen
        return args.target_return is not None and full and np.mean(recent, axis=0)[0] >= args.target_return

    def save_checkpoint() -> None:
        state = {"iteration": iteration, "global_step": global_step, "beta": beta, "recent": list(recent)}
        state |= {"parameters": parameters.data, "optimizer": optimizer.state_dict()}
        write_atomically(run_dir / "checkpoint.pt", state | {"seconds": time.perf_counter() - start})

    while global_step < args.total_timesteps and not solved():
        if iteration % args.checkpoint_interval == 0:
            # All that is random starts anew from (seed, iteration): a resumed run goes on just like one never stopped.
            if rank == 0:
                log.sync()
                save_checkpoint()
            env_seed, noise_seed, shuffle_seed = derive_seeds(args.seed, iteration, 3)
            rng = np.random.default_rng(noise_seed)
            torch.manual_seed(shuffle_seed + rank)
            obs[-1], _ = envs.reset(seed=env_seed + my_envs.start)
            resets[-1], under_way[:] = False, 0

        # 1. Rollout: T steps in N environments. All ranks draw the noise of all environments, so that an environment
        # meets the same noise however they are spread.
        policy = Policy(spec, actor.state_dict())
        noise = rng.gumbel(size=(num_steps, args.num_envs, sum(nvec)))[:, my_envs]  # (T, N, A)
        obs[0], resets[0] = obs[-1], resets[-1]
        for t in range(num_steps):
            choices[t] = policy.choose(policy.logits(obs[t]) + noise[t])
            obs[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(policy.to_env(choices[t]))
        resets[1:] = terminated | truncated

        # 2. Values and log-probs of the whole rollout in one pass, then advantages, and the returns that values aim at.
        with torch.no_grad():
            values = critic(tensor(obs)).squeeze(-1)  # (T + 1, N)
            log_probs = log_softmax_each(actor(tensor(obs[:-1])), nvec)  # (T, N, A)
        outcome = tensor(rewards), values, tensor(terminated), tensor(truncated)
        advantages = compute_gae(*outcome, args.gamma, args.gae_lambda)  # (T, N)
        columns = tensor(choices + np.cumsum([0, *nvec[:-1]]))  # (T, N, C) within a row of log-probs
        rollout = tensor(obs[:-1]), columns, log_probs, values[:-1], advantages, advantages + values[:-1]
        valid = tensor(~resets[:-1])  # (T, N)
        batch = CategoricalBatch(*(x[valid] for x in rollout))  # (B, ...) with B <= T N

        # 3. Update: several epochs of minibatch steps on this batch.
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        all_parts, grad_norms, stopped = [], [], False
        for _ in range(args.update_epochs):
            for minibatch, count in shuffled_minibatches(batch, args):
                loss, parts = loss_fn(actor, critic, minibatch, count, nvec, beta, args)
                parameters.grad.zero_()
                loss.backward()
                approx_kl = kl_estimates(parts["log_ratio"])[1].sum() / count
                sum_over_ranks(parameters.grad, approx_kl)
                all_parts.append(parts)
                grad_norms.append(parameters.grad.norm())
                stopped = args.target_kl is not None and approx_kl > args.target_kl
                if stopped:
                    break
                parameters.grad.mul_((args.max_grad_norm / (grad_norms[-1] + 1e-6)).clamp(max=1))
                optimizer.step()
            if stopped:
                break
        iteration += 1
        penalty = {}
        if args.objective == "kl-penalty":
            with torch.no_grad():
                new_log_probs = log_softmax_each(actor(batch.obs), nvec)
            kl = global_moments([categorical_kl(batch.old_log_probs, new_log_probs)])[1].item()
            penalty = {"kl": kl, "kl_penalty": beta}
            beta = adapt_beta(beta, kl, args.kl_penalty_target)

        # 4. Metrics: means over all minibatches of this iteration and all ranks.
        rows = {name: torch.cat([parts[name] for parts in all_parts]) for name in all_parts[0]}
        log_ratio = rows.pop("log_ratio")
        rows["old_approx_kl"], rows["approx_kl"] = kl_estimates(log_ratio)
        rows["clipfrac"] = (log_ratio.exp() - 1).abs() > args.clip_coef
        rows["grad_norm"] = torch.stack(grad_norms)
        counts, means, stds = global_moments([batch.returns, batch.returns - batch.old_values, *rows.values()])
        if not (np.isfinite(means).all() and parameters.isfinite().all()):
            raise FloatingPointError(f"the loss of iteration {iteration} is not finite (NaN from the environment?)")
        losses = dict(zip(rows, means[2:].tolist()))
        losses["explained_variance"] = 1 - (stds[1] / stds[0]).item() ** 2 if stds[0] else math.nan
        global_step += int(counts[0])
        finished = np.zeros((2, num_steps, args.num_envs))
        finished[..., my_envs] = finished_episodes(rewards, resets, under_way)
        sum_over_ranks(torch.from_numpy(finished))  # each rank adds its environments; NaN stays NaN
        recent.extend(finished[:, ~np.isnan(finished[0])].T.tolist())
        mean_return, mean_length = np.mean(recent, axis=0).tolist() if recent else (math.nan, math.nan)
        seconds = time.perf_counter() - start
        row = {
            "iteration": iteration,
            "global_step": global_step,
            "charts/episodic_return": mean_return,
            "charts/episodic_length": mean_length,
            "charts/learning_rate": learning_rate,
            **{f"losses/{name}": value for name, value in (losses | penalty).items()},
            "time/seconds": seconds,
            "time/steps_per_second": global_step / seconds,
        }
        if rank == 0:
            log.write(row)
            show_progress(progress, global_step, f"return {mean_return:.1f}, {global_step / seconds:,.0f} steps/s")

    # The policy is saved, and what was saved is evaluated.
    seconds = time.perf_counter() - start
    envs.close()
    progress.close()
    leave_ranks()
    if rank > 0:
        return {}
    log.close()
    save_checkpoint()
    weights = {name: weight.cpu().clone() for name, weight in actor.state_dict().items()}
    write_atomically(run_dir / "policy.pt", {"spec": spec, "weights": weights})
    draw_returns(run_dir)
    summary = {"script": SCRIPT, "task": args.task, "seed": args.seed, "global_step": global_step}
    summary |= {"seconds": seconds, "steps_per_second": global_step / seconds}
    if recent:
        summary["train_return"] = np.mean(recent, axis=0)[0].item()
    if args.eval_episodes:
        saved = load_policy(run_dir / "policy.pt")
        for mode in ("greedy", "sampled"):
            returns = evaluate(saved, args.eval_episodes, mode, args.seed, videos)
            summary[f"eval_return_{mode}"] = np.mean(returns).item()
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    reached = "".join(f", {name} {summary[name]:.1f}" for name in summary if "return" in name)
    print(f"{args.env_id}: {global_step:,} steps in {seconds:.1f} s{reached}; saved in {run_dir}")
    return summary


# --------------------------------------------------------------------------------------------------- the policy at work


def load_policy(path: str | Path) -> Policy:
    """The policy in a policy.pt file, or in the run directory that holds one. Raises UserError."""
    path = Path(path)
    path = path / "policy.pt" if path.is_dir() else path
    saved = load_saved(path)
    if "weights" not in saved:
        raise UserError(f"{path} is a checkpoint: give the policy.pt beside it")
    return Policy(saved["spec"], saved["weights"])


def evaluate(policy: Policy, episodes: int, mode: str, seed: int, videos: Path | None = None) -> list[float]:
    """Returns of whole episodes with "greedy" or "sampled" actions; recorded in the folder videos if one is given."""
    env = make_eval_env(policy.spec["env_id"], videos is not None)
    if videos:
        env = gym.wrappers.RecordVideo(env, str(videos), episode_trigger=lambda _: True, name_prefix=mode)
    (eval_seed,) = derive_seeds(seed, 2**32 - 1, 1)
    rng = np.random.default_rng(eval_seed)
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=eval_seed + episode)
        over, total = False, 0.0
        while not over:
            action = policy.act(obs, rng if mode == "sampled" else None)
            obs, reward, terminated, truncated, _ = env.step(action)
            over, total = terminated or truncated, total + float(reward)
        returns.append(total)
    env.close()
    return returns


def play(args: Args) -> None:
    """Runs the saved policy args.play for eval_episodes and prints the returns."""
    if args.eval_episodes < 1:
        raise UserError("--eval-episodes must be at least 1 for --play")
    check_args(args, world_size=1)
    check_env_args(args, world_size=1)
    path = Path(args.play)
    policy = load_policy(path)
    videos = (path if path.is_dir() else path.parent) / "play_videos" if args.capture_video else None
    for mode in ("greedy", "sampled"):
        returns = evaluate(policy, args.eval_episodes, mode, args.seed, videos)
        print(f"{policy.spec['env_id']}, {mode}: mean {np.mean(returns):.1f} of " + " ".join(f"{r:g}" for r in returns))


# ---------------------------------------------------------------------------------------------------------- run-keeping

SCRIPT = "ppo_mlp_discrete"
FORMAT = 1  # of checkpoint.pt and policy.pt: raised whenever what they hold changes
LIBRARIES = ("torch", "numpy", "gymnasium", "mujoco", "envpool")  # whose versions config.json tells
# What check_args demands of the values of flags.
LIMITS = {
    "at least 1": (
        "num_envs total_timesteps num_minibatches update_epochs checkpoint_interval",
        lambda x: x >= 1,
    ),
    "at least 2 (one row may be a reset)": ("num_steps", lambda x: x >= 2),
    "between 1 and 1024": ("torch_threads", lambda x: 1 <= x <= 1024),
    "above 0": (
        "learning_rate clip_coef max_grad_norm target_kl kl_penalty kl_penalty_target",
        lambda x: 0 < x < math.inf,
    ),
    "finite": ("target_return", math.isfinite),
    "between 0 and 2**32 - 1": ("seed ent_coef vf_coef eval_episodes", lambda x: 0 <= x < 2**32),
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


def check_env_args(args: Args, world_size: int) -> None:
    """Raises UserError for flags about environments and minibatches that do not fit together."""
    if args.capture_video and not args.eval_episodes:
        raise UserError("--capture-video records evaluation episodes: set --eval-episodes to at least 1")
    if args.num_envs % world_size:
        raise UserError(f"--num-envs {args.num_envs} must be a multiple of the {world_size} processes")
    if args.num_minibatches * world_size > args.num_envs * args.num_steps:
        raise UserError("--num-minibatches is more than the rows of a rollout: raise --num-envs or --num-steps")
    if args.vectorization_mode == "envpool" and find_spec("envpool") is None:
        raise UserError("--vectorization-mode envpool needs a package: pip install envpool")


class EnvPool(gym.vector.VectorWrapper):
    """EnvPool's environments, in C++ threads. They are seeded when they are made, so a seeded reset makes new ones."""

    def __init__(self, env_id: str, num_envs: int):
        self.make_again = partial(import_module("envpool").make_gymnasium, env_id, num_envs=num_envs)
        super().__init__(self.make_again())

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """First observations. seed: of the first environment, counting up."""
        if seed is not None:
            self.env.close()
            self.env = self.make_again(seed=[(seed + i) % 2**31 for i in range(self.num_envs)])
        return self.env.reset(options=options)


def make_envs(env_id: str, num_envs: int, mode: str) -> gym.vector.VectorEnv:
    """num_envs parallel environments with flat observations and NEXT_STEP autoreset. Raises UserError."""
    with user_error_in(f"--env-id {env_id}"):
        if mode == "envpool":
            envs = EnvPool(env_id, num_envs)
        else:
            envs = gym.make_vec(env_id, num_envs, None if mode == "auto" else mode)
    if envs.metadata.get("autoreset_mode") is not gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {env_id} does not autoreset in the next step: use --vectorization-mode sync")
    space = envs.single_observation_space
    if isinstance(space, Box) and len(space.shape) == 1:
        return envs
    with user_error_in(f"--env-id {env_id}"):
        flat_space = flatten_space(space)
    if not isinstance(flat_space, Box):
        raise UserError(f"--env-id {env_id}: observations {space} have no fixed size: wrap the environment")
    return gym.wrappers.vector.FlattenObservation(envs)


def make_eval_env(env_id: str, render: bool) -> gym.Env:
    """One environment with flat observations whose episodes end. Raises UserError, also where it should but cannot
    render."""
    with user_error_in(f"--env-id {env_id}"):
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if render else {}))
    if render:
        hint = 'pip install moviepy "gymnasium[classic-control]"; MuJoCo without a screen: set MUJOCO_GL=egl or osmesa'
        with user_error_in(f"--capture-video of {env_id} ({hint})"):
            import_module("moviepy")
            env.reset()
            env.render()
    if env.spec.max_episode_steps is None:  # a policy may walk in circles for ever
        env = gym.wrappers.TimeLimit(env, 10_000)
    return gym.wrappers.FlattenObservation(env)


def discrete_spec(env_id: str, envs: gym.vector.VectorEnv) -> dict:
    """What Policy needs to know of the spaces. Raises UserError where the actions are not discrete."""
    space = envs.single_action_space
    if not isinstance(space, Discrete | MultiDiscrete):
        hint = "use ppo_mlp_continuous.py" if isinstance(space, Box) else "wrap the environment"
        raise UserError(f"--env-id {env_id} has actions {space}, not Discrete or MultiDiscrete: {hint}")
    return {
        "env_id": env_id,
        "obs_dim": envs.single_observation_space.shape[0],
        "nvec": np.ravel(space.n if isinstance(space, Discrete) else space.nvec).tolist(),
        "start": np.ravel(space.start).tolist(),  # first action of each component
        "action_shape": list(space.shape),
        "dtype": str(space.dtype),
    }


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


def draw_returns(run_dir: Path) -> None:
    """Draws the training return of metrics.csv over steps as returns.png."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*([float(row[name]) for row in rows] for name in ("global_step", "charts/episodic_return")))
    axes.set(xlabel="environment steps", ylabel="return (mean of the last 100 episodes)", title=run_dir.name)
    axes.grid(alpha=0.3)
    figure.savefig(run_dir / "returns.png")


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
