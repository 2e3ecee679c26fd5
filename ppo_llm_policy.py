# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0",
#     "matplotlib==3.11.2",
#     "mujoco==3.15.0",
#     "numpy==2.4.6",
#     "peft==0.21.2",
#     "safetensors==0.8.0",
#     "tensorboard==2.21.0",
#     "threadpoolctl==3.8.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "transformers==5.23.0",
#     "tyro==1.0.16",
# ]
# ///
"""PPO with a language model as the policy of a control task: any gymnasium environment with Discrete or Box actions.

    python ppo_llm_policy.py                                            # CartPole-v1, a tiny untrained Qwen2, LoRA
    python ppo_llm_policy.py --llm-id Qwen/Qwen2-0.5B                   # a pretrained body, from the hub or a folder
    python ppo_llm_policy.py --play runs/RUN/policy                     # the saved policy, without training code

States are no text: an encoder turns each observation into an input embedding, the body of a causal language model reads
the embeddings, and a head turns its last hidden state into an action distribution. Encoder, head and LoRA adapters are
trained, the body is frozen. The policy stands apart from PPO: a StochasticPolicy samples and scores actions, and a
PolicyNetwork (language model or MLP) is all that it is made of. The value function belongs to the training.

References: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, LoRA
https://arxiv.org/abs/2106.09685.

Where this differs from what is common, and why:
- Only the body runs. A causal LM's forward pass also computes scores of the whole vocabulary, to be thrown away.
- With one observation per state (`--history 1`) a token attends to itself alone: the softmax over one key is 1, and
  the query and key projections get no gradient. With `--history K` the body reads the last K observations.
- There is no dropout, LoRA's own included, so that ratio = 1 where the update starts; the run checks that and says so.
  `--lora-dropout-in-update` is for those who want it regardless.
- Old log-probs come from a pass over the rollout in chunks of the update's size, because in bfloat16 a row's log-prob
  depends on how many rows are computed with it.
- The head's last layer starts small: the first policy is close to uniform.
- An action of a Box policy is in units of the bounds, as in ppo_mlp_continuous.py.
- Truncated episodes bootstrap from the value of their true last observation; the row in which an environment resets is
  left out of the loss, the statistics and the step count.
"""

import contextlib
import csv
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple, final

import gymnasium as gym
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete, flatten_space
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tensorboard.compat.proto.summary_pb2 import Summary
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO with a language model as the policy of a control task."""

    env_id: str = "CartPole-v1"
    """gymnasium id of the task; "module:Name-v0" imports the module first"""
    observe: list[int] = field(default_factory=list)
    """components of the flattened observation that the policy sees, such as 0 2; none given: all"""
    history: int = 1
    """observations that a state is made of, each a token of the language model: the last ones of the episode"""
    seed: int = 1
    """seed of weights, environments, sampling and shuffling"""
    total_timesteps: int = 60_000
    """environment steps to train for, over all environments"""
    target_return: float | None = None
    """stop as soon as the mean return of the last 100 training episodes reaches this"""

    network: Literal["llm", "mlp"] = "llm"
    """what turns states into actions: a language model, or an MLP for comparison"""
    llm_id: str = "tiny-random"
    """hub id or folder of a causal LM; or with random weights: tiny-random (64 wide), qwen2-0.5b-random (full size)"""
    lora_rank: int = 16
    """rank of the adapters; 0: the body has none, and only encoder and head are trained"""
    lora_alpha: float = 32.0
    """scale of the adapters, times 1 / rank"""
    lora_target_modules: list[str] = field(default_factory=list)
    """names of the layers that get adapters, such as q_proj v_proj; none given: all linear layers of the body"""
    lora_dropout: float = 0.05
    """dropout of the adapters' inputs, only with lora_dropout_in_update"""
    lora_dropout_in_update: bool = False
    """apply the adapters' dropout in the update, and only there: it makes ratio differ from 1 at random"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the frozen body; auto is bfloat16 on a GPU, else float32. All that is trained is float32"""
    gradient_checkpointing: bool = False
    """compute the body's activations again in the backward pass instead of keeping them: less memory, more time"""
    log_std_init: float = -0.5
    """Box: log of the policy's first std; its unit is half the range between the bounds, or 1 where there are none"""

    num_envs: int = 32
    """parallel environments"""
    num_steps: int = 64
    """steps per environment and iteration: an iteration collects num_envs x num_steps"""
    vectorization_mode: Literal["auto", "sync", "async", "vector_entry_point", "envpool"] = "auto"
    """gymnasium.make_vec's, or envpool; auto: the environment's own vectorised form where it has one, else sync"""
    learning_rate: float = 3e-3
    """Adam step size at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    gamma: float = 0.99
    """discount factor per step"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (GAE paper eq. 16)"""
    num_minibatches: int = 4
    """minibatches per epoch, of nearly equal size"""
    micro_batch_size: int | None = None
    """rows that are scored and learned from at once; a minibatch's gradient is the sum over its parts. Default: all"""
    update_epochs: int = 8
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise advantages to mean 0, std 1 within each minibatch"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate (PPO paper eq. 7), and of the value clip"""
    clip_vloss: bool = False
    """clip the value loss around the old values (on in CleanRL)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss (half the mean squared error)"""
    max_grad_norm: float = 0.5
    """joint gradient norm of policy and value function is clipped to this"""
    target_kl: float | None = None
    """end the iteration's update before a step whose minibatch has a k3 KL above this [nats]"""

    eval_episodes: int = 20
    """evaluation episodes after training, with greedy and again with sampled actions; 0 skips them"""
    capture_video: bool = False
    """record the evaluation episodes as run-dir/videos/*.mp4 (needs moviepy)"""
    play: str | None = None
    """run this saved policy (a policy folder or its run directory) for eval_episodes and exit"""

    run_dir: str | None = None
    """where the run is written; default runs/<task>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue from its last checkpoint; flags come from its config.json"""
    checkpoint_interval: int = 15
    """iterations between checkpoints; each resets all environments and drops the episodes under way: keep it long"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are; auto is cuda where there is one, else cpu"""
    torch_threads: int = 1
    """CPU threads per process; a large body wants all cores, the tiny one gains little from a second"""
    compile: bool = False
    """torch.compile the network: minutes of compiling; measure whether your body gains by it"""

    @property
    def task(self) -> str:
        """What the run directory and the summary call the task."""
        return self.env_id


# ---------------------------------------------------------------------------------------------- policy and its networks


@final
class StochasticPolicy(nn.Module):
    """Samples actions from the distribution that its network gives, and scores actions of whatever policy. It knows
    nothing of how it is trained.

    A state is a window (K, S) of the last K observations, the newest last. States of a batch are (B, K, S), and the
    mask (B, K) is true where there is an observation: at the start of an episode there are fewer than K. Without a mask
    there are K in each state. Actions are (B,) where they are Discrete, (B, C) where they are a Box."""

    def __init__(self, network: "PolicyNetwork"):
        super().__init__()
        self.network = network

    def get_action(self, states: Tensor, mask: Tensor | None = None, greedy: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for states (B, K, S), sampled or the most likely ones, and their log-probs (B,)."""
        distribution = self.network(states, mask)
        actions = distribution.mode if greedy else distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, states: Tensor, actions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs (B,) of actions in states (B, K, S), and entropies (B,) of the distributions there."""
        distribution = self.network(states, mask)
        return distribution.log_prob(actions), distribution.entropy()


class PolicyNetwork(nn.Module):
    """Turns states into an action distribution: categorical over n Discrete actions, or Gaussian over the C components
    of a Box, with a log-std that does not depend on the state. Subclasses say how the logits or means come about."""

    def __init__(self, spec: dict, log_std_init: float):
        """spec: what `task_spec` returns."""
        super().__init__()
        self.is_discrete = "n" in spec
        self.num_outputs = spec["n"] if self.is_discrete else len(spec["low"])
        if not self.is_discrete:
            self.log_std = nn.Parameter(torch.full((self.num_outputs,), log_std_init))

    def outputs(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, n) or means (B, C)."""
        raise NotImplementedError

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Distribution:
        """The distributions of a batch of B actions, in float32."""
        outputs = self.outputs(states, mask)
        if self.is_discrete:
            return Categorical(logits=outputs, validate_args=False)
        normal = Normal(outputs, self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)  # a log-prob per action, not per component


class LLMNetwork(PolicyNetwork):
    """Encoder S-256-hidden, body of a causal language model, head hidden-128-outputs."""

    def __init__(self, spec: dict, body: nn.Module, log_std_init: float = 0.0):
        """body: what `load_body` or `add_lora` returns."""
        super().__init__(spec, log_std_init)
        hidden_size = body.get_input_embeddings().embedding_dim
        obs_dim = len(spec["observe"])
        self.encoder = nn.Sequential(nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, hidden_size))
        self.body = body
        last_layer = layer_init(nn.Linear(128, self.num_outputs), 0.01)
        self.head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), last_layer)

    def outputs(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, n) or means (B, C) for states (B, K, S). Token k attends to the tokens up to k that the mask
        shows, which have positions 0, 1, 2 ..."""
        tokens = self.encoder(states).to(self.body.get_input_embeddings().weight.dtype)  # (B, K, hidden)
        if states.shape[1] == 1:
            mask = None  # a single token has nothing to hide
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.body(inputs_embeds=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return self.head(hidden.last_hidden_state[:, -1].float())


class MLPNetwork(PolicyNetwork):
    """A tanh MLP over all numbers of a state."""

    def __init__(self, spec: dict, log_std_init: float = 0.0):
        super().__init__(spec, log_std_init)
        self.mlp = mlp(spec["history"] * len(spec["observe"]), self.num_outputs, output_gain=0.01)

    def outputs(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, n) or means (B, C) for states (B, K, S), in which what is not there is 0."""
        return self.mlp(states.flatten(1))


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


RANDOM_BODIES = {  # sizes of Qwen2 bodies that need no download
    "tiny-random": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.125,  # keeps the size of what passes through a layer, so that the attention has a say
    },
    "qwen2-0.5b-random": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
    },
}


def load_body(llm_id: str, dtype: torch.dtype) -> nn.Module:
    """The frozen body of a causal language model (the decoder up to its last norm), without dropout and without its
    token embeddings, which nothing reads here. llm_id: as the flag; random bodies come from PyTorch's seed.
    Raises UserError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its attempts
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would report that the LM head is not used
    if Path(llm_id).is_dir():
        transformers.utils.logging.disable_progress_bar()  # a download shows one
    hint = f"give a hub id that can be reached, the folder of a causal LM, or one of {', '.join(RANDOM_BODIES)}"
    with user_error_in(f"--llm-id {llm_id} cannot be loaded ({hint})"):
        if llm_id in RANDOM_BODIES:
            config = transformers.AutoConfig.for_model("qwen2", vocab_size=1, **RANDOM_BODIES[llm_id])
            body = transformers.AutoModel.from_config(config, dtype=dtype)
        else:
            config = transformers.AutoConfig.from_pretrained(llm_id)
            config.update({name: 0.0 for name in config.to_dict() if "drop" in name})
            body, info = transformers.AutoModel.from_pretrained(
                llm_id, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            if info["missing_keys"]:
                raise ValueError(f"its files lack {len(info['missing_keys'])} weights of the body")
        body.resize_token_embeddings(1)
        tokens = torch.eye(2, body.get_input_embeddings().embedding_dim, dtype=dtype)[None]
        with torch.no_grad():
            both, first = (body(inputs_embeds=x, use_cache=False).last_hidden_state for x in (tokens, tokens[:, :1]))
        if not torch.allclose(both[:, :1], first, rtol=0.1, atol=0.1):
            raise ValueError("it is not causal, a token sees those that follow")
    return body.requires_grad_(False)


def add_lora(body: nn.Module, rank: int, alpha: float, dropout: float, target_modules: list[str]) -> nn.Module:
    """The body with adapters that start at zero; their weights alone are trained, in float32. target_modules: names of
    the layers that get one, none: all linear layers. Raises UserError."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or "all-linear"
    )
    wanted = " ".join(target_modules) or "(all linear layers)"
    with user_error_in(f"--lora-target-modules {wanted}"), warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(body, config)
    layers = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for target in target_modules:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            raise UserError(f"--lora-target-modules {target}: no layer of the body has this name")
    return adapted


def make_network(args: Args, spec: dict, dtype: torch.dtype) -> PolicyNetwork:
    """The untrained network that the flags ask for, its body in dtype. Raises UserError."""
    if args.network == "mlp":
        return MLPNetwork(spec, args.log_std_init)
    body = load_body(args.llm_id, dtype)
    longest = getattr(body.config, "max_position_embeddings", math.inf)
    if args.history > longest:
        raise UserError(f"--history {args.history} is more than the {longest} positions of {args.llm_id}")
    if args.lora_rank:
        dropout = args.lora_dropout if args.lora_dropout_in_update else 0.0
        body = add_lora(body, args.lora_rank, args.lora_alpha, dropout, args.lora_target_modules)
    if args.gradient_checkpointing:
        body.gradient_checkpointing_enable({"use_reentrant": False})
    return LLMNetwork(spec, body, args.log_std_init)


# ------------------------------------------------------------------------------------------------------------ algorithm


def remember(
    states: np.ndarray, mask: np.ndarray, obs: np.ndarray, is_first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Windows (N, K, S) and masks (N, K) of the observations up to the new ones (N, S), from those before. A window
    does not reach beyond its episode: where is_first (N,), nothing older stays. What is not there is 0 and masked."""
    states = np.concatenate([states[:, 1:], obs[:, None]], 1)
    mask = np.concatenate([mask[:, 1:] & ~is_first[:, None], np.ones((len(obs), 1), bool)], 1)
    return np.where(mask[..., None], states, 0), mask


def to_env(actions: np.ndarray, spec: dict) -> np.ndarray:
    """Actions as `env.step` takes them, from the policy's: (N,) that count from 0, or (N, C) in units of half the range
    between the bounds around their centre, or in the environment's where a component has no bounds within 1e6."""
    if "n" in spec:
        return (actions + spec["start"]).astype(spec["dtype"])
    low, high = np.array(spec["low"]), np.array(spec["high"])
    bounded = np.maximum(-low, high) < 1e6
    lowest, highest = np.where(bounded, low, -1), np.where(bounded, high, 1)
    centre = np.where(bounded, (lowest + highest) / 2, np.clip(0, low, high))
    actions = np.clip(centre + (highest - lowest) / 2 * actions, low, high)
    if spec["dtype"].startswith(("int", "uint")):
        actions = np.rint(actions)
    return actions.astype(spec["dtype"]).reshape(-1, *spec["action_shape"])


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


class Batch(NamedTuple):
    """B rows of experience; all that the loss needs to know of them."""

    states: Tensor  # (B, K, S)
    mask: Tensor  # (B, K)
    actions: Tensor  # (B,) Discrete, or (B, C) Box, not clipped
    old_log_probs: Tensor  # (B,)
    old_values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


def policy_ppo_loss(
    policy: StochasticPolicy, critic: nn.Module, batch: Batch, count: float, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a minibatch or a part of one, and its detached parts per row (B,).

    The sum over rows is divided by count, the rows of the whole minibatch over all ranks, so that the gradients of all
    its parts and ranks add up to that of the whole minibatch."""
    log_probs, entropy = policy.evaluate_actions(batch.states, batch.actions, batch.mask)  # (B,) each
    values = critic(batch.states.flatten(1)).squeeze(-1)  # (B,)
    log_ratio = log_probs - batch.old_log_probs  # (B,)

    policy_losses = clipped_policy_loss(log_ratio, batch.advantages, args.clip_coef)
    value_losses = value_loss(values, batch.old_values, batch.returns, args.clip_coef if args.clip_vloss else None)
    loss = (policy_losses + args.vf_coef * value_losses - args.ent_coef * entropy).sum() / count
    parts = {"policy_loss": policy_losses, "value_loss": value_losses, "entropy": entropy, "log_ratio": log_ratio}
    return loss, {name: part.detach() for name, part in parts.items()}


def split_rows(batch: Batch, size: int | None) -> list[Batch]:
    """The batch in parts of size rows, the last one perhaps smaller; whole without a size."""
    return [batch._make(part) for part in zip(*(x.split(size or len(x)) for x in batch))]


def check_ratio(log_ratio: Tensor, dtype: torch.dtype) -> str:
    """Says how far the ratio is from 1 where it should be 1, on any rank. Raises FloatingPointError where that is more
    than rounding explains. log_ratio: (B,). dtype: of the body."""
    deviation = (log_ratio.exp() - 1).abs().max()
    sum_over_ranks(deviation)  # an upper bound of the largest
    if deviation > (1e-3 if dtype == torch.float32 else 0.1):
        reason = "the body has dropout or noise of its own, or --dtype is too coarse for it"
        raise FloatingPointError(f"ratio - 1 before the first step is up to {deviation:.1e}: {reason}")
    return f"before the first step, |ratio - 1| <= {deviation:.1e}"


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
    an observation, a reward or the loss is not finite, or the ratio before the first step is not 1."""
    # Set-up. Flags describe the whole job: under torchrun, each of world_size ranks has its share of the environments.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_args(args, world_size)
    check_env_args(args, world_size)
    run_dir = Path(args.resume or args.run_dir or default_run_dir(args))
    videos = run_dir / "videos" if args.capture_video else None
    device = start_device(args, world_size, auto="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    num_steps, num_envs = args.num_steps, args.num_envs // world_size
    my_envs = slice(rank * num_envs, (rank + 1) * num_envs)
    if args.eval_episodes:
        make_eval_env(args.env_id, args.capture_video).close()  # fails now rather than after training
    envs = make_envs(args.env_id, num_envs, args.vectorization_mode)
    spec = task_spec(args, envs)
    observe, state_shape = spec["observe"], (args.history, len(spec["observe"]))  # (K, S)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 and args.network == "llm" else torch.float32  # of the body
    policy = StochasticPolicy(make_network(args, spec, dtype)).to(device)
    critic = mlp(math.prod(state_shape), 1, output_gain=1.0).to(device)  # the value function
    parameters = flatten_parameters(policy, critic)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    if args.compile:
        policy.network.outputs = torch.compile(policy.network.outputs, dynamic=True)

    # Rollouts are collected in NumPy, where the environments live. Row t holds the state of step t and what came of the
    # action chosen there; the state after the last row becomes row 0 of the next rollout. resets[t]: the step before
    # row t ended an episode, so that row t ignores its action and resets the environment.
    states = np.zeros((num_steps + 1, num_envs, *state_shape), np.float32)
    mask = np.zeros((num_steps + 1, num_envs, args.history), bool)
    resets = np.zeros((num_steps + 1, num_envs), bool)
    rewards = np.zeros((num_steps, num_envs), np.float32)
    terminated, truncated = np.zeros((2, num_steps, num_envs), bool)
    under_way = np.zeros((2, num_envs))  # return and length so far of the current episodes

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    iteration, global_step, checked = 0, 0, False
    recent = deque(maxlen=100)  # (return, length) of the last training episodes
    start = time.perf_counter()
    if args.resume:
        state = load_saved(run_dir / "checkpoint.pt")
        iteration, global_step = state["iteration"], state["global_step"]
        recent.extend(state["recent"])
        start -= state["seconds"]
        parameters.data.copy_(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    elif rank == 0:
        create_run(run_dir, args, world_size)
        if args.network == "llm" and args.llm_id in RANDOM_BODIES:
            print(f"{args.llm_id}: the body is untrained, its weights are random")
    log = MetricsLog(run_dir, iteration, global_step) if rank == 0 else None
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None if rank == 0 else True)

    def solved() -> bool:
        full = len(recent) == recent.maxlen
        return args.target_return is not None and full and np.mean(recent, axis=0)[0] >= args.target_return

    def save_checkpoint() -> None:
        state = {"iteration": iteration, "global_step": global_step, "recent": list(recent)}
        state |= {"parameters": parameters.data, "optimizer": optimizer.state_dict()}
        write_atomically(run_dir / "checkpoint.pt", state | {"seconds": time.perf_counter() - start})

    while global_step < args.total_timesteps and not solved():
        if iteration % args.checkpoint_interval == 0:
            # All that is random starts anew from (seed, iteration): a resumed run goes on just like one never stopped.
            if rank == 0:
                log.sync()
                save_checkpoint()
            env_seed, torch_seed = derive_seeds(args.seed, iteration, 2)
            torch.manual_seed(torch_seed + rank)
            obs, _ = envs.reset(seed=env_seed + my_envs.start)
            states[-1], mask[-1] = remember(states[-1], mask[-1], obs[:, observe], np.ones(num_envs, bool))
            resets[-1], under_way[:] = False, 0

        # 1. Rollout: T steps in N environments.
        policy.eval()
        states[0], mask[0], resets[0] = states[-1], mask[-1], resets[-1]
        actions = []
        with torch.no_grad():
            for t in range(num_steps):
                chosen, _ = policy.get_action(tensor(states[t]), tensor(mask[t]))
                actions.append(chosen)
                obs, rewards[t], terminated[t], truncated[t], _ = envs.step(to_env(chosen.numpy(force=True), spec))
                states[t + 1], mask[t + 1] = remember(states[t], mask[t], obs[:, observe], resets[t])
                resets[t + 1] = terminated[t] | truncated[t]
                if not np.isfinite(states[t + 1]).all():
                    break  # no action can follow from it
        broken = torch.tensor([not np.isfinite(x).all() for x in (states, rewards)], dtype=torch.float32)
        sum_over_ranks(broken)  # all ranks stop together
        if broken.any():
            what = "an observation" if broken[0] else "a reward"
            raise FloatingPointError(f"{what} of iteration {iteration + 1} is not finite: mend the environment")

        # 2. Values and log-probs of the whole rollout, then advantages, and the returns that values aim at. Log-probs
        # are computed in parts as large as those of the update.
        part_size = args.micro_batch_size or math.ceil(num_steps * num_envs / args.num_minibatches)
        inputs, masks, chosen = tensor(states), tensor(mask), torch.stack(actions)  # (T + 1, N, K, S), ...
        with torch.no_grad():
            values = critic(inputs.flatten(2)).squeeze(-1)  # (T + 1, N)
            parts = zip(*(x.flatten(0, 1).split(part_size) for x in (inputs[:-1], chosen, masks[:-1])))
            log_probs = torch.cat([policy.evaluate_actions(*part)[0] for part in parts]).view(num_steps, num_envs)
        outcome = tensor(rewards), values, tensor(terminated), tensor(truncated)
        advantages = compute_gae(*outcome, args.gamma, args.gae_lambda)  # (T, N)
        rollout = inputs[:-1], masks[:-1], chosen, log_probs, values[:-1], advantages, advantages + values[:-1]
        valid = tensor(~resets[:-1])  # (T, N)
        batch = Batch(*(x[valid] for x in rollout))  # (B, ...) with B <= T N

        # 3. Update: several epochs of minibatch steps on this batch.
        policy.train()  # matters to --lora-dropout-in-update and --gradient-checkpointing alone
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        all_parts, grad_norms, stopped = [], [], False
        for _ in range(args.update_epochs):
            for minibatch, count in shuffled_minibatches(batch, args):
                parameters.grad.zero_()
                approx_kl = torch.zeros((), device=device)
                for part in split_rows(minibatch, args.micro_batch_size):
                    loss, parts = policy_ppo_loss(policy, critic, part, count, args)
                    loss.backward()
                    approx_kl += kl_estimates(parts["log_ratio"])[1].sum() / count
                    all_parts.append(parts)
                if not checked and not args.lora_dropout_in_update:
                    said = check_ratio(torch.cat([parts["log_ratio"] for parts in all_parts]), dtype)
                    if rank == 0:
                        progress.write(said)
                checked = True
                sum_over_ranks(parameters.grad, approx_kl)
                grad_norms.append(parameters.grad.norm())
                stopped = args.target_kl is not None and approx_kl > args.target_kl
                if stopped:
                    break
                parameters.grad.mul_((args.max_grad_norm / (grad_norms[-1] + 1e-6)).clamp(max=1))
                optimizer.step()
            if stopped:
                break
        iteration += 1

        # 4. Metrics: means over all minibatches of this iteration and all ranks.
        rows = {name: torch.cat([parts[name] for parts in all_parts]) for name in all_parts[0]}
        log_ratio = rows.pop("log_ratio")
        rows["old_approx_kl"], rows["approx_kl"] = kl_estimates(log_ratio)
        rows["clipfrac"] = (log_ratio.exp() - 1).abs() > args.clip_coef
        rows["grad_norm"] = torch.stack(grad_norms)
        counts, means, stds = global_moments([batch.returns, batch.returns - batch.old_values, *rows.values()])
        if not (np.isfinite(means).all() and parameters.isfinite().all()):
            raise FloatingPointError(f"the loss of iteration {iteration} is not finite")
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
            **{f"losses/{name}": value for name, value in losses.items()},
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
    save_policy(run_dir / "policy", policy, spec, args)
    draw_returns(run_dir)
    summary = {"script": SCRIPT, "task": args.task, "seed": args.seed, "global_step": global_step}
    summary |= {"seconds": seconds, "steps_per_second": global_step / seconds}
    if recent:
        summary["train_return"] = np.mean(recent, axis=0)[0].item()
    if args.eval_episodes:
        saved = load_policy(run_dir / "policy", device)
        for mode in ("greedy", "sampled"):
            returns = evaluate_together(saved, args.eval_episodes, mode, args.seed, videos)
            summary[f"eval_return_{mode}"] = np.mean(returns).item()
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    reached = "".join(f", {name} {summary[name]:.1f}" for name in summary if "return" in name)
    print(f"{args.env_id}: {global_step:,} steps in {seconds:.1f} s{reached}; saved in {run_dir}")
    return summary


# --------------------------------------------------------------------------------------------------- the policy at work


class Policy:
    """The trained policy at work in an application: it remembers the last observations, and takes and gives what the
    environment gives and takes."""

    def __init__(self, spec: dict, policy: StochasticPolicy, device: torch.device):
        """spec: what `task_spec` returns."""
        self.spec, self.policy, self.device = spec, policy.to(device).eval(), device
        self.states = None

    def reset(self) -> None:
        """Forgets all observations: a new episode begins."""
        self.states = None

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = True) -> np.ndarray:
        """Actions for the flat observations that followed the last ones, (obs_dim,) of one environment or (N, obs_dim)
        of N whose episodes began together: the most likely ones, or sampled. Raises UserError for other shapes."""
        obs = np.asarray(obs, np.float32)
        if obs.shape[-1:] != (self.spec["obs_dim"],):
            wanted = f"{self.spec['obs_dim']} numbers, as {self.spec['env_id']} has them"
            raise UserError(f"an observation of shape {obs.shape}: the policy takes observations of {wanted}")
        rows = obs.reshape(-1, obs.shape[-1])[:, self.spec["observe"]]  # (N, S)
        if self.states is not None and len(rows) != len(self.states):
            raise UserError(f"{len(rows)} observations after {len(self.states)}: call reset() before others follow")
        if self.states is None:
            self.states = np.zeros((len(rows), self.spec["history"], rows.shape[-1]), np.float32)
            self.mask = np.zeros((len(rows), self.spec["history"]), bool)
        self.states, self.mask = remember(self.states, self.mask, rows, np.zeros(len(rows), bool))
        states, mask = (torch.from_numpy(x).to(self.device) for x in (self.states, self.mask))
        actions = to_env(self.policy.get_action(states, mask, greedy)[0].numpy(force=True), self.spec)
        return actions.reshape(obs.shape[:-1] + actions.shape[1:])[()]


def save_policy(folder: Path, policy: StochasticPolicy, spec: dict, args: Args) -> None:
    """Writes the policy as a folder: policy.json says what it is, weights.safetensors holds encoder and head (or the
    MLP), the adapter is PEFT's own and belongs on an AutoModel, and a body with random weights is in body/. The folder
    appears when it is whole."""
    part, network = folder.with_name(folder.name + ".part"), policy.network
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    description = {"script": SCRIPT, "format": FORMAT, "spec": spec, "network": args.network}
    if args.network == "llm":
        dtype = network.body.get_input_embeddings().weight.dtype
        description |= {"dtype": str(dtype).removeprefix("torch."), "lora_rank": args.lora_rank}
        description["llm_id"] = str(Path(args.llm_id).resolve()) if Path(args.llm_id).is_dir() else args.llm_id
        if args.lora_rank:
            network.body.save_pretrained(part, save_embedding_layers=False)
        if args.llm_id in RANDOM_BODIES:
            body = network.body.get_base_model() if args.lora_rank else network.body
            frozen = {
                name.replace("base_layer.", ""): x for name, x in body.state_dict().items() if "lora_" not in name
            }
            body.save_pretrained(part / "body", state_dict=frozen)
    weights = {name: x.clone() for name, x in network.state_dict().items() if not name.startswith("body.")}
    save_file(weights, part / "weights.safetensors")
    (part / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> Policy:
    """The policy in a folder that save_policy wrote, or in the run directory that holds one. Raises UserError."""
    folder = Path(path, "policy") if Path(path, "policy").is_dir() else Path(path)
    with user_error_in(f"{folder} holds no policy of {SCRIPT}.py"):
        description = json.loads((folder / "policy.json").read_text())
        found = description["script"], description["format"]
    if found != (SCRIPT, FORMAT):
        raise UserError(
            f"{folder} has format {found[1]} of {found[0]}.py, not {FORMAT} of {SCRIPT}.py: use that version"
        )
    with user_error_in(f"{folder} is not whole, copy all of it"), warnings.catch_warnings(action="ignore"):
        spec = description["spec"]
        if description["network"] == "mlp":
            network = MLPNetwork(spec)
        else:
            llm_id = description["llm_id"]
            source = str(folder / "body") if llm_id in RANDOM_BODIES else llm_id
            body = load_body(source, getattr(torch, description["dtype"]))
            if description["lora_rank"]:
                body = peft.PeftModel.from_pretrained(body, folder)
                adapter = peft.get_peft_model_state_dict(body, save_embedding_layers=False)
                if set(load_file(folder / "adapter_model.safetensors")) != set(adapter):
                    raise ValueError("adapter_model.safetensors is not the adapter of this body")
            network = LLMNetwork(spec, body)
        weights = load_file(folder / "weights.safetensors")
        own = {name: x for name, x in network.state_dict().items() if not name.startswith("body.")}
        if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in own.items()}:
            raise ValueError("weights.safetensors and policy.json are of different policies")
        network.load_state_dict(weights, strict=False)  # the body is there already
    return Policy(spec, StochasticPolicy(network), torch.device(device))


def evaluate_together(policy: Policy, episodes: int, mode: str, seed: int, videos: Path | None = None) -> list[float]:
    """Returns of whole episodes with "greedy" or "sampled" actions, all at once, so that the network meets them as one
    batch; recorded in the folder videos if one is given."""
    envs = [make_eval_env(policy.spec["env_id"], videos is not None) for _ in range(episodes)]
    if videos:
        record = partial(gym.wrappers.RecordVideo, video_folder=str(videos), episode_trigger=lambda _: True)
        envs = [record(env, name_prefix=f"{mode}-{i}") for i, env in enumerate(envs)]
    (eval_seed,) = derive_seeds(seed, 2**32 - 1, 1)
    torch.manual_seed(eval_seed)
    policy.reset()
    obs = np.stack([env.reset(seed=eval_seed + i)[0] for i, env in enumerate(envs)])
    over, returns = np.zeros(episodes, bool), np.zeros(episodes)
    while not over.all():
        actions = policy.act(obs, greedy=mode == "greedy")
        for i in np.flatnonzero(~over):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += float(reward)
            over[i] = terminated or truncated
    for env in envs:
        env.close()
    return returns.tolist()


def play(args: Args) -> None:
    """Runs the saved policy args.play for eval_episodes and prints the returns."""
    if args.eval_episodes < 1:
        raise UserError("--eval-episodes must be at least 1 for --play")
    check_args(args, world_size=1)
    check_env_args(args, world_size=1)
    device = start_device(args, world_size=1, auto="cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(args.play, device)
    videos = Path(args.play, "play_videos") if args.capture_video else None
    for mode in ("greedy", "sampled"):
        returns = evaluate_together(policy, args.eval_episodes, mode, args.seed, videos)
        print(f"{policy.spec['env_id']}, {mode}: mean {np.mean(returns):.1f} of " + " ".join(f"{r:g}" for r in returns))


# ---------------------------------------------------------------------------------------------------------- run-keeping

SCRIPT = "ppo_llm_policy"
FORMAT = 1  # of checkpoint.pt and policy/: raised whenever what they hold changes
# Packages whose versions config.json tells.
LIBRARIES = ("torch", "transformers", "peft", "numpy", "gymnasium", "mujoco", "envpool")
# What check_args demands of the values of flags.
LIMITS = {
    "at least 1": (
        "num_envs total_timesteps num_minibatches update_epochs checkpoint_interval history micro_batch_size",
        lambda x: x >= 1,
    ),
    "at least 2 (one row may be a reset)": ("num_steps", lambda x: x >= 2),
    "between 1 and 1024": ("torch_threads", lambda x: 1 <= x <= 1024),
    "above 0": (
        "learning_rate clip_coef max_grad_norm target_kl lora_alpha",
        lambda x: 0 < x < math.inf,
    ),
    "finite": ("target_return", math.isfinite),
    "between 0 and 2**32 - 1": ("seed ent_coef vf_coef eval_episodes lora_rank", lambda x: 0 <= x < 2**32),
    "between 0 and 1": ("gamma gae_lambda", lambda x: 0 <= x <= 1),
    "at least 0 and below 1": ("lora_dropout", lambda x: 0 <= x < 1),
    "between -20 and 5": ("log_std_init", lambda x: -20 <= x <= 5),
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


def task_spec(args: Args, envs: gym.vector.VectorEnv) -> dict:
    """What the policy needs to know of the task. Raises UserError."""
    obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
    if not all(0 <= i < obs_dim for i in args.observe):
        raise UserError(
            f"--observe {' '.join(map(str, args.observe))}: {args.env_id} has components 0 to {obs_dim - 1}"
        )
    spec = {
        "env_id": args.env_id,
        "obs_dim": obs_dim,
        "observe": args.observe or list(range(obs_dim)),
        "history": args.history,
        "action_shape": list(space.shape or ()),
        "dtype": str(space.dtype),
    }
    if isinstance(space, Discrete):
        return spec | {"n": int(space.n), "start": int(space.start)}
    if isinstance(space, Box):
        return spec | {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
    hint = "use ppo_mlp_discrete.py" if isinstance(space, MultiDiscrete) else "wrap the environment"
    raise UserError(f"--env-id {args.env_id} has actions {space}, neither Discrete nor Box: {hint}")


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
