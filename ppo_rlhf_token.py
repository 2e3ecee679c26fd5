# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "peft==0.21.2",
#     "safetensors==0.8.0",
#     "tensorboard==2.21.0",
#     "threadpoolctl==3.8.0",
#     "tokenizers==0.23.3",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "transformers==5.23.0",
#     "tyro==1.0.16",
# ]
# ///
"""RLHF in one file: supervised fine-tuning, a reward model from people's judgements, and token-level PPO against it.

    python ppo_rlhf_token.py                                            # restaurant reviews, a small model, no download
    python ppo_rlhf_token.py --model Qwen/Qwen2-0.5B --dataset rows.jsonl --lora-rank 16 --sft-learning-rate 1e-4 \
        --reward-learning-rate 1e-4 --learning-rate 1e-5
    python ppo_rlhf_token.py --play runs/RUN/policy --prompt "the soup was"

The three stages share one code path, whatever causal language model they train. By default a small grammar writes
restaurant reviews, and a small model learns to continue their opening words. A hidden gold score stands for what people
want; simulated people compare samples with it in mind, and err; the reward model learns from these judgements alone,
and PPO from the reward model alone. So the run can tell whether the gold score rose too.

References: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, fine-tuning with a KL penalty
https://arxiv.org/abs/1909.08593, InstructGPT https://arxiv.org/abs/2203.02155, the N+ implementation details
https://arxiv.org/abs/2403.17031, over-optimisation https://arxiv.org/abs/2210.10760.

Where this differs from what is common, and why:
- Old log-probs are scored by the pass that the update makes, in the very micro-batches of the update, which stay
  together for all epochs: where PPO starts, ratio = 1 to the last bit, and the run checks that.
- The vocabulary scores of a response are computed where its tokens are predicted and nowhere else; they are never kept.
- A mean over tokens is over the tokens of the whole minibatch, not a mean of the means of its micro-batches.
- The KL penalty is a reward on each token; its sum over a response is an unbiased estimate of the divergence of whole
  responses. It is no term of the loss.
- With LoRA there is one copy of the weights: the reference is the model without adapters, and policy, reward model and
  separate critic are adapters. Supervised fine-tuning is merged into the weights before.
- There is no dropout in any model: policy and reference would differ at random, and ratio and KL with them.
- A reward model's scores are shifted and scaled to mean 0 and std 1 on samples of the reference, because neither means
  anything. A reward function's scores are taken as they are.
"""

import contextlib
import copy
import csv
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from multiprocessing import parent_process
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple

import numpy as np
import peft
import tokenizers
import torch
import torch.distributed as dist
import transformers
import tyro
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tensorboard.compat.proto.summary_pb2 import Summary
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """RLHF: supervised fine-tuning, reward model, PPO."""

    model: str = "embedded"
    """hub id or folder of a causal LM; or embedded: a small untrained one, with the words of the data as its tokens"""
    dataset: str | None = None
    """rows to learn from: a .jsonl file, or a hub data set (needs the package datasets). Default: made-up reviews"""
    dataset_split: str = "train"
    """split of a hub data set"""
    reward_model: str | None = None
    """hub id or folder of a sequence classifier with one label, instead of training a reward model"""
    reward_fn: str | None = None
    """FILE.py:NAME of a function (prompts, responses) -> scores, three lists, instead of a reward model"""
    seed: int = 1
    """seed of data, weights, sampling and shuffling"""
    max_prompt_length: int = 128
    """rows whose prompt has more tokens are left out"""
    response_length: int = 40
    """responses are cut off after this many tokens"""
    temperature: float = 1.0
    """divides the scores of the vocabulary, wherever a response is sampled or scored"""

    sft_steps: int = 250
    """steps of supervised fine-tuning on the rows' responses; 0 for a model that has had it"""
    sft_batch_size: int = 32
    """responses per step of supervised fine-tuning"""
    sft_learning_rate: float = 3e-3
    """Adam step size of supervised fine-tuning at the start, lowered linearly to 0"""
    feedback: Literal["comparisons", "ratings"] = "comparisons"
    """reviews: what the simulated people give"""
    num_feedback: int = 3000
    """reviews: pairs of samples that they compare, or of which they rate both"""
    reward_steps: int = 120
    """steps of training the reward model"""
    reward_batch_size: int = 32
    """comparisons or ratings per step of training the reward model"""
    reward_learning_rate: float = 1e-3
    """Adam step size of training the reward model at the start, lowered linearly to 0"""

    total_episodes: int = 4096
    """responses that PPO learns from"""
    batch_size: int = 64
    """responses per iteration"""
    num_minibatches: int = 2
    """minibatches per epoch, each with the same number of responses"""
    micro_batch_size: int | None = 16
    """responses that are scored and learned from at once, parts of a minibatch; None: all of it"""
    update_epochs: int = 2
    """passes over each iteration's responses"""
    learning_rate: float = 5e-4
    """Adam step size of PPO at the start; a pretrained model wants far less, 1e-6 to 1e-5"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_episodes"""
    kl_coef: float = 0.07
    """beta, what a nat of KL divergence from the reference costs"""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """estimate of the KL divergence in the reward: k1 is unbiased, k3 is never negative"""
    kl_target: float | None = None
    """adapt kl_coef such that the KL divergence per response comes to this [nats] (Ziegler et al. 2019, §2.2)"""
    kl_horizon: int = 10_000
    """episodes per change of kl_coef by a fifth, at most: the larger, the slower it adapts"""
    missing_eos_penalty: float = 1.0
    """taken off the score of a response that was cut off"""
    whiten_rewards: bool = False
    """divide the rewards of an iteration by their std"""
    critic: Literal["shared", "separate"] = "shared"
    """the value function is a head on the policy's body, or a model of its own that starts as the reward model"""
    gamma: float = 1.0
    """discount factor per token"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (GAE paper eq. 16)"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate (PPO paper eq. 7), and of the value clip"""
    clip_vloss: bool = True
    """clip the value loss around the old values"""
    vf_coef: float = 0.1
    """weight of the value loss (half the mean squared error)"""
    max_grad_norm: float = 1.0
    """joint gradient norm of policy and critic is clipped to this"""

    lora_rank: int = 0
    """rank of LoRA adapters on a frozen base that all models share; 0: all weights of each model are trained"""
    lora_alpha: float = 32.0
    """scale of the adapters, times 1 / rank"""
    lora_target_modules: list[str] = field(default_factory=list)
    """names of the layers that get adapters, such as q_proj v_proj; none given: all linear layers of the body"""
    bf16: bool = False
    """compute in bfloat16; what is trained stays float32, the frozen base of LoRA is bfloat16"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, more time"""
    compile: bool = False
    """torch.compile the bodies, on a GPU with CUDA graphs for sampling; minutes of compiling"""

    eval_samples: int = 500
    """responses that measure the policy before and after PPO, to held-out prompts"""
    play: str | None = None
    """print a response of this saved policy (folder or run directory), of its length and temperature, and exit"""
    prompt: str | None = None
    """with play: a text, or a JSON list of messages"""

    run_dir: str | None = None
    """where the run is written; default runs/<task>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue from its last checkpoint; flags come from its config.json"""
    checkpoint_interval: int = 10
    """PPO iterations between checkpoints; the other stages make one every 100 steps"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are; auto is cuda where there is one, else cpu"""
    torch_threads: int = 1
    """CPU threads per process"""

    @property
    def task(self) -> str:
        """What the run directory and the summary call the task."""
        return Path(self.dataset).stem if self.dataset else "reviews"


# --------------------------------------------------------------------------------------------------------------- models


class Example(NamedTuple):
    """A row as token ids. A response ends with the end token, unless it was cut off."""

    text: str  # of the prompt
    prompt: list[int]
    responses: list[list[int]]
    rating: float | None


class Texts(NamedTuple):
    """B prompts with their responses, padded to T tokens. The M tokens of all responses stand one after the other."""

    tokens: Tensor  # (B, T): prompts end, and responses begin, in the same column
    mask: Tensor  # (B, T), false on padding
    chosen: Tensor  # (M,) the tokens of the responses
    before: Tensor  # (M,) index, among the B * T positions, of the token before each: what predicts it is read there
    last: Tensor  # (B,) index of the last token of each response


def pad(prompts: list[list[int]], responses: list[list[int]], pad_id: int, device: torch.device) -> Texts:
    """Pads prompts on the left and responses on the right. Both have at least one token each."""
    context, length = max(map(len, prompts)), max(map(len, responses))
    tokens = np.full((len(prompts), context + length), pad_id)
    mask, is_response = np.zeros((2, *tokens.shape), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        columns = slice(context - len(prompt), context + len(response))
        tokens[row, columns], mask[row, columns] = prompt + response, True
        is_response[row, context : context + len(response)] = True
    where = np.flatnonzero(is_response)
    last = where[np.cumsum([len(response) for response in responses]) - 1]
    return Texts(*(torch.from_numpy(x).to(device) for x in (tokens, mask, tokens[is_response], where - 1, last)))


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 at the first token that the mask (B, T) shows; padding moves none of them."""
    mask = mask.long()
    return mask.cumsum(-1) - mask


class Body:
    """The body of a causal language model: all of it but the head. LoRA adapters may sit on it; one of them is switched
    on, or none."""

    def __init__(self, lm: transformers.PreTrainedModel, args: Args):
        """lm: a causal LM, or a sequence classifier made of one."""
        self.lm, self.adapter = lm, None
        self.forward = self.next = lm.base_model
        if args.compile:
            self.forward = self.next = torch.compile(lm.base_model, dynamic=True)
            if lm.device.type == "cuda":
                self.next = torch.compile(lm.base_model, mode="reduce-overhead")  # with CUDA graphs
        self.autocast = partial(torch.autocast, lm.device.type, torch.bfloat16, enabled=args.bf16)

    def add_adapter(self, name: str, args: Args) -> None:
        """Adds an adapter of this name, which changes nothing yet, and switches it on."""
        with warnings.catch_warnings(action="ignore"):  # one adapter is there already, another tells of Conv1D
            self.lm.add_adapter(lora_config(self.lm, args), name)
        for parameter, weight in self.lm.named_parameters():
            if f".{name}." in parameter:
                weight.data = weight.data.float()  # what is trained is not rounded, whatever it sits on
        self.adapter = None  # PEFT has chosen the new one, but not switched on layers that were off
        self.switch_to(name)

    def switch_to(self, adapter: str | None) -> None:
        """Switches one adapter on, or none. Of the adapters, PEFT lets gradients reach only that which is on."""
        if adapter != self.adapter:
            for layer in self.lm.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.enable_adapters(adapter is not None)
                    if adapter:
                        layer.set_adapter(adapter)
            self.adapter = adapter


class Model(NamedTuple):
    """One of the models of RLHF: a body, a head on its last hidden states, and with LoRA the adapter on the body."""

    body: Body
    head: nn.Module
    adapter: str | None = None

    def hidden_states(self, texts: Texts) -> Tensor:
        """Last hidden states (B * T, d)."""
        self.body.switch_to(self.adapter)
        inputs = {"input_ids": texts.tokens, "attention_mask": texts.mask, "position_ids": position_ids(texts.mask)}
        with self.body.autocast():
            return self.body.forward(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def outputs(self, hidden: Tensor) -> Tensor:
        """What a scalar head makes of hidden states (N, d): (N,), in float32."""
        with self.body.autocast():
            return self.head(hidden).squeeze(-1).float()

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """What an LM head makes of hidden states (N, d): log-probs of the vocabulary (N, V), in float32, of scores that
        are divided by the temperature. Padding is no token to choose."""
        with self.body.autocast():
            logits = self.head(hidden)
        logits[:, self.body.lm.config.pad_token_id] = -1e9
        return (logits.float() / temperature).log_softmax(-1)

    def scores(self, texts: Texts) -> Tensor:
        """Scores (B,) of whole texts: what a scalar head reads at the last token of each response."""
        return self.outputs(self.hidden_states(texts)[texts.last])


class Cache(transformers.StaticCache):
    """Room for the keys and values of all tokens to come. Under autocast, keys are float32 and values are not."""

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keeps what is new, in the dtype of the values, and returns all that is kept."""
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


@torch.no_grad()
def generate(policy: Model, prompts: list[list[int]], length: int, temperature: float) -> list[list[int]]:
    """Samples a response of up to length tokens to each of B prompts, all at once; each step feeds only the newest
    token, and the last step is that in which the last response ends. Responses end with the end token or are cut off.
    """
    body, (pad_id, end_id) = policy.body, (policy.body.lm.config.pad_token_id, policy.body.lm.config.eos_token_id)
    body.switch_to(policy.adapter)
    texts = pad(prompts, [[pad_id] * length] * len(prompts), pad_id, body.lm.device)
    context = texts.tokens.shape[1] - length
    positions, cache = position_ids(texts.mask), Cache(body.lm.config, texts.tokens.shape[1])
    tokens, start, responses = texts.tokens[:, :context], 0, []
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=tokens.device)
    for t in range(length):
        inputs = {"input_ids": tokens, "position_ids": positions[:, start : context + t], "past_key_values": cache}
        run = body.next if t else body.lm.base_model
        with body.autocast():
            hidden = run(**inputs, attention_mask=texts.mask, use_cache=True).last_hidden_state[:, -1]
        tokens = torch.multinomial(policy.log_probs(hidden, temperature).exp(), 1)
        start = context + t
        responses.append(tokens)
        ended |= tokens == end_id
        if ended.all():
            break
    rows = torch.cat(responses, 1).tolist()
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


def lora_config(lm: transformers.PreTrainedModel, args: Args) -> peft.LoraConfig:
    """What an adapter of the model looks like. Raises UserError for a layer that the model's body does not have."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = [
        name for name, layer in lm.base_model.named_modules() if isinstance(layer, linear) and "lora_" not in name
    ]
    names = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in layers}
    for target in args.lora_target_modules:
        if target not in names:
            raise UserError(f"--lora-target-modules {target}: the body's linear layers are {', '.join(sorted(names))}")
    targets = sorted(args.lora_target_modules or names)
    return peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets)


def scalar_model(policy: Model, name: str | None, args: Args) -> Model:
    """A model with one number as its output, which is 0 at first. It starts as the policy's body and goes its own way,
    with LoRA as an adapter of this name; without a name it shares all of the policy but the head."""
    lm = policy.body.lm
    head = nn.Linear(lm.config.hidden_size, 1, bias=False, device=lm.device)
    nn.init.zeros_(head.weight)
    if name is None:
        return policy._replace(head=head)
    if args.lora_rank:
        policy.body.add_adapter(name, args)
        return Model(policy.body, head, name)
    return Model(Body(copy.deepcopy(lm.base_model), args), head)


def require_gradients(policy: Model, critic: Model) -> None:
    """Lets gradients reach what PPO trains: both models, or with LoRA both adapters, where PEFT thinks of one."""
    for model in (policy, critic):
        for name, weight in model.body.lm.named_parameters():
            weight.requires_grad_(not model.adapter or f".{policy.adapter}." in name or f".{critic.adapter}." in name)


def copy_weights(source: Model, target: Model) -> bool:
    """Gives the target the head, and the body or adapter, of the source, and says whether they are of one kind: if not,
    nothing happens."""

    def weights(model: Model) -> dict[str, Tensor]:
        if model.adapter:
            return peft.get_peft_model_state_dict(
                model.body.lm, adapter_name=model.adapter, save_embedding_layers=False
            )
        return model.body.lm.base_model.state_dict()

    ours, theirs = weights(target), weights(source)
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        return False
    for name, x in ours.items():
        x.copy_(theirs[name])
    target.head.weight.data.copy_(source.head.weight)
    return True


# ------------------------------------------------------------------------------------------------------------ algorithm


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


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """x (M,) divided by its std over all ranks, and its mean taken off or kept."""
    (count,), (mean,), (std,) = global_moments([x])
    whitened = (x - mean) / (std + 1e-8) if count > 1 else x - mean
    return whitened if shift_mean else whitened + mean


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


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy (B,) of log-probs (B, A), summed over components."""
    return -(log_probs.exp() * log_probs).sum(-1)


def adapted_kl_coef(kl_coef: float, kl: float, args: Args) -> float:
    """The next beta where this iteration's responses are kl nats from the reference and should be kl_target (Ziegler et
    al. 2019, §2.2)."""
    error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * args.batch_size / args.kl_horizon)


def to_texts(model: Model, prompts: list[list[int]], responses: list[list[int]]) -> Texts:
    """The texts as this model reads them."""
    return pad(prompts, responses, model.body.lm.config.pad_token_id, model.body.lm.device)


def sft_losses(policy: Model, examples: list[Example]) -> Tensor:
    """Negative log-probs (M,) of the tokens of the examples' first responses."""
    texts = to_texts(policy, [example.prompt for example in examples], [example.responses[0] for example in examples])
    hidden = policy.hidden_states(texts)[texts.before]
    return -of_chosen(policy.log_probs(hidden, 1.0), texts.chosen)


def reward_losses(model: Model, examples: list[Example]) -> Tensor:
    """Losses (B,) of a reward model. Of comparisons: -log sigma(r_chosen - r_rejected) (Bradley-Terry; InstructGPT
    eq. 1). Of ratings, standardised: half the squared error."""
    count, prompts = len(examples), [example.prompt for example in examples]
    if examples[0].rating is not None:
        scores = model.scores(to_texts(model, prompts, [example.responses[0] for example in examples]))
        return 0.5 * (scores - scores.new_tensor([example.rating for example in examples])).square()
    chosen, rejected = zip(*(example.responses for example in examples))
    scores = model.scores(to_texts(model, 2 * prompts, [*chosen, *rejected]))
    return -functional.logsigmoid(scores[:count] - scores[count:])


class Part(NamedTuple):
    """A micro-batch of experience: texts, and what PPO knows of each of their M response tokens."""

    texts: Texts
    old_log_probs: Tensor  # (M,)
    old_values: Tensor  # (M,)
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,)


def of_chosen(log_probs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probs (M,) of chosen tokens (M,), among those of the vocabulary (M, V)."""
    return log_probs.gather(-1, chosen[:, None]).squeeze(-1)


def score_tokens(
    policy: Model, critic: Model, reference: Model, texts: Texts, args: Args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each response token (M,): log-prob of the policy, value before it, log-prob of the reference, and entropy of
    the distribution that it was drawn from. Log-probs and values come about just as in `add_gradient`."""
    hidden = policy.hidden_states(texts)[texts.before]  # (M, d)
    log_probs = policy.log_probs(hidden, args.temperature)  # (M, V)
    chosen_log_probs, entropy = of_chosen(log_probs, texts.chosen), categorical_entropy(log_probs)
    if args.critic == "separate":
        hidden = critic.hidden_states(texts)[texts.before]
    values = critic.outputs(hidden)
    del log_probs  # before others of this size are made
    log_probs = reference.log_probs(reference.hidden_states(texts)[texts.before], args.temperature)
    return chosen_log_probs, values, of_chosen(log_probs, texts.chosen), entropy


def add_gradient(policy: Model, critic: Model, part: Part, args: Args) -> dict[str, Tensor]:
    """Adds the gradient of policy and value losses, summed over the tokens of a micro-batch, to that of the parameters.
    Returns detached parts of the losses per token (M,). Sums and not means: divided by the number of all tokens, they
    give the same gradient however the tokens are spread over micro-batches and ranks."""
    hidden = policy.hidden_states(part.texts)[part.texts.before]  # (M, d)
    log_ratio = of_chosen(policy.log_probs(hidden, args.temperature), part.texts.chosen) - part.old_log_probs
    policy_losses = clipped_policy_loss(log_ratio, part.advantages, args.clip_coef)
    loss = policy_losses.sum()
    if args.critic == "separate":
        loss.backward()  # before the critic's adapter is switched on, which stops gradients to the policy's
        loss, hidden = 0.0, critic.hidden_states(part.texts)[part.texts.before]
    values = critic.outputs(hidden)
    value_losses = value_loss(values, part.old_values, part.returns, args.clip_coef if args.clip_vloss else None)
    (loss + args.vf_coef * value_losses.sum()).backward()
    parts = {"policy_loss": policy_losses, "value_loss": value_losses, "log_ratio": log_ratio}
    parts["value_clipped"] = (values - part.old_values).abs() > args.clip_coef
    return {name: x.detach() for name, x in parts.items()}


def check_start(log_ratio: Tensor, kl: Tensor | None) -> str:
    """Says how far ratio and KL divergence are from 1 and 0 where PPO starts. Raises FloatingPointError where that is
    more than rounding explains, on any rank. log_ratio, kl: (M,) of the first minibatch, and of all tokens; None where
    a resumed policy has left the reference."""
    found = {"|ratio - 1|": log_ratio.exp() - 1} | ({} if kl is None else {"|log pi - log pi_ref|": kl})
    worst = torch.stack([x.abs().max() for x in found.values()])
    sum_over_ranks(worst)  # upper bounds of the largest
    said = ", ".join(f"{name} <= {x:.1e}" for name, x in zip(found, worst.tolist()))
    if not (worst <= 1e-6).all():
        raise FloatingPointError(f"before the first step, {said}: a model has dropout or noise of its own")
    return f"before the first step, {said}"


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


def in_order(count: int, start: int, number: int, seed: int) -> list[int]:
    """Indices of number of count rows, from the start-th on, where every epoch has all rows in an order of its own."""
    epochs = range(start // count, (start + number - 1) // count + 1)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs])
    return order[start % count :][:number].tolist()


def fit(
    stage: str,
    module: nn.Module,
    losses: Callable[[list[Example]], Tensor],
    examples: list[Example],
    args: Args,
    state: dict,
    keep: Callable[[dict], None],
) -> None:
    """Minimises the mean of losses over the examples with Adam, as the flags of the stage say: "sft" or "reward".

    state: of the checkpoint to go on from, if there is one. keep: what writes one. Raises FloatingPointError where the
    loss is not finite."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    steps, batch_size = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_batch_size")
    parameters = flatten_parameters(module.train())
    optimizer = torch.optim.Adam([parameters], eps=1e-5, fused=True)
    first_step = state.get("step", 0)
    if state:
        parameters.data.copy_(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    progress = tqdm(total=steps, initial=first_step, unit="step", disable=None if rank == 0 else True)
    for step in range(first_step, steps):
        if step % FIT_CHECKPOINT_INTERVAL == 0:
            state = {"stage": stage, "step": step}
            keep(state | {"parameters": parameters.data, "optimizer": optimizer.state_dict()})
        batch = [examples[i] for i in in_order(len(examples), step * batch_size, batch_size, args.seed)]
        batch = sorted(batch[rank::world_size], key=lambda x: len(x.responses[0]))  # little padding that way
        size = args.micro_batch_size or len(batch)
        parameters.grad.zero_()
        total = torch.zeros(2, device=parameters.device)  # sum and number of the losses
        for i in range(0, len(batch), size):
            part = losses(batch[i : i + size])
            part.sum().backward()
            total += torch.stack([part.detach().sum(), torch.ones_like(part).sum()])
        sum_over_ranks(parameters.grad, total)
        parameters.grad /= total[1]
        parameters.grad.mul_((args.max_grad_norm / (parameters.grad.norm() + 1e-6)).clamp(max=1))
        optimizer.param_groups[0]["lr"] = getattr(args, f"{stage}_learning_rate") * (1 - step / steps)
        optimizer.step()
        if not (total.isfinite().all() and parameters.isfinite().all()):
            raise FloatingPointError(f"the loss of step {step + 1} of the {stage} stage is not finite")
        if rank == 0:
            show_progress(progress, step + 1, f"{stage} loss {total[0] / total[1]:.3f}")
    progress.close()


def fine_tune(lm: transformers.PreTrainedModel, examples: list[Example], args: Args, *checkpoint: object) -> Model:
    """Stage 1: the model, fitted to the examples' responses by maximum likelihood. checkpoint: state, keep of `fit`."""
    adapted = None
    if args.lora_rank and args.model != "embedded":  # which has yet to learn everything, in all its weights
        adapted = peft.get_peft_model(lm, lora_config(lm, args))
    model = Model(Body(lm, args), lm.get_output_embeddings())
    fit("sft", lm, partial(sft_losses, model), examples, args, *checkpoint)
    return model._replace(body=Body(adapted.merge_and_unload(), args)) if adapted else model


def train_reward_model(policy: Model, examples: list[Example], args: Args, *checkpoint: object) -> Model:
    """Stage 2: a model with the policy's body, fitted to comparisons or ratings. checkpoint: as for `fine_tune`."""
    model = scalar_model(policy, "reward", args)
    nn.init.normal_(model.head.weight, std=1 / math.sqrt(model.head.in_features + 1))
    module = nn.ModuleList([model.body.lm, model.head])
    fit("reward", module, partial(reward_losses, model), examples, args, *checkpoint)
    return model


def train(args: Args) -> dict[str, float | str]:
    """Trains a policy in three stages, saves it in args.run_dir and measures it. Returns the content of summary.json.

    Sets the seed and thread counts of PyTorch and NumPy's thread count. Raises UserError, and FloatingPointError where
    the loss is not finite, or ratio and KL divergence are not 1 and 0 where PPO starts."""
    # Set-up. Flags describe the whole job: under torchrun, each of world_size ranks has its share of every batch. What
    # the flags name is loaded before anything is written.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_args(args, world_size)
    check_batch_args(args, world_size)
    run_dir = Path(args.resume or args.run_dir or default_run_dir(args))
    state = load_saved(run_dir / "checkpoint.pt") if args.resume else {}
    device = start_device(args, world_size, auto="cuda" if torch.cuda.is_available() else "cpu")
    start, figures = time.perf_counter() - state.get("seconds", 0), state.get("figures", {})
    tokenizer = None if args.model == "embedded" else load_tokenizer(args.model, "--model")
    rows = load_rows(args, tokenizer)
    tokenizer = tokenizer or make_tokenizer(rows)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no end-of-sequence token, set eos_token in it")
    set_padding(tokenizer)
    encoded = encode_rows(rows, tokenizer, args)
    if rank == 0 and len(encoded) < len(rows):
        print(f"{len(rows) - len(encoded)} of {len(rows)} rows are left out: empty or long prompts", file=sys.stderr)
    examples, held_out = hold_out(encoded, args.seed)
    check_examples(examples, args)
    eval_prompts = list(itertools.islice(itertools.cycle(held_out), args.eval_samples))
    micro_batch_size = args.micro_batch_size or args.batch_size // args.num_minibatches // world_size
    stage = state.get("stage", "sft" if args.sft_steps else "reward")
    after_sft = run_dir / "sft" if args.sft_steps else args.model

    def load(source: str | Path) -> transformers.PreTrainedModel:
        torch.manual_seed(args.seed)
        return load_lm(source, tokenizer, args, device)

    lm = load(args.model if stage == "sft" else after_sft)
    if args.lora_rank:
        lora_config(lm, args)
    reward = load_reward(args, tokenizer, device)
    if rank == 0 and not args.resume:
        create_run(run_dir, args, world_size)

    def keep(content: dict) -> None:
        if rank == 0:
            content = content | {"seconds": time.perf_counter() - start, "figures": figures}
            write_atomically(run_dir / "checkpoint.pt", content)

    def hand_over(name: str, model: Model) -> None:
        if rank == 0:
            save_model(run_dir / name, model, tokenizer)
        sum_over_ranks(torch.zeros(1, device=device))  # nobody goes on before it is there

    def sample(model: Model, prompts: list[Example], sample_seed: int, heat: float = 1.0) -> list[list[int]]:
        torch.manual_seed(sample_seed)
        limits, size = (args.response_length, args.temperature * heat), args.batch_size // world_size
        parts = (prompts[i : i + size] for i in range(0, len(prompts), size))
        return [response for part in parts for response in generate(model, [x.prompt for x in part], *limits)]

    def read(prompts: list[Example], responses: list[list[int]]) -> list[str]:
        return decode_responses([x.prompt for x in prompts], responses, tokenizer)

    def score(prompts: list[Example], responses: list[list[int]]) -> Tensor:
        if not isinstance(reward, Model):
            return torch.tensor(reward([x.text for x in prompts], read(prompts, responses)), device=device)
        parts = (slice(i, i + micro_batch_size) for i in range(0, len(prompts), micro_batch_size))
        with torch.no_grad():
            return torch.cat(
                [reward.scores(to_texts(reward, [x.prompt for x in prompts[p]], responses[p])) for p in parts]
            )

    # Stage 1: supervised fine-tuning. A stage leaves a folder and the next one reads it, so that a resumed run finds
    # what a run that was never stopped has.
    seeds = derive_seeds(args.seed, 2**32 - 1, 3)  # of samples outside the loop
    if stage == "sft":
        hand_over("sft", fine_tune(lm, examples, args, state, keep))
        stage, state, lm = "reward", {}, load(after_sft)

    # Stage 2: a reward model, from ratings or comparisons.
    if stage == "reward" and reward is None:
        model = Model(Body(lm, args), lm.get_output_embeddings())
        judged, unseen = examples, held_out
        if args.dataset is None:
            prompts = list(itertools.islice(itertools.cycle(examples), args.num_feedback))
            # The hotter samples show the reward model what PPO may try: mistakes that the model rarely makes.
            samples = sample(model, prompts, seeds[0]), sample(model, prompts, seeds[1], heat=1.5)
            judged, unseen = hold_out(ask_people(prompts, *samples, read, args), args.seed)
        model = train_reward_model(model, standardised(judged), args, state, keep)
        figures |= ranking_accuracy(model, unseen[: args.eval_samples])
        hand_over("reward_model", model)
        lm = load(after_sft)

    # Stage 3: PPO, with four models. Policy and reference start as the same; with LoRA they are one body, with an
    # adapter and without. The critic says 0 at first or, where it is a model of its own, what the reward model says.
    torch.manual_seed(args.seed)
    reference = Model(Body(lm, args), lm.get_output_embeddings())
    if args.lora_rank:
        reference.body.add_adapter("policy", args)
        policy = reference._replace(adapter="policy")
    else:
        lm = copy.deepcopy(lm)
        policy = Model(Body(lm, args), lm.get_output_embeddings())
    if reward is None:
        reward = load_reward_model(run_dir / "reward_model", policy, args)
    before = sample(reference, eval_prompts, seeds[2])
    scores_before = score(eval_prompts, before)
    mean, std = (0.0, 1.0) if args.reward_fn else (scores_before.mean().item(), scores_before.std().item() or 1.0)
    critic = scalar_model(policy, "critic" if args.critic == "separate" else None, args)
    if args.critic == "separate":
        if isinstance(reward, Model) and copy_weights(reward, critic):
            critic.head.weight.data /= std
        elif rank == 0:
            print("the critic starts from the policy, because the reward is not a model of its kind", file=sys.stderr)
    require_gradients(policy, critic)
    trained = nn.ModuleList([lm, critic.body.lm, critic.head])
    parameters = flatten_parameters(trained)
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    iteration, global_step, kl_coef = 0, 0, args.kl_coef
    if stage == "ppo":
        iteration, global_step, kl_coef = (state[name] for name in ("iteration", "global_step", "kl_coef"))
        parameters.data.copy_(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    log = MetricsLog(run_dir, iteration, global_step) if rank == 0 else None
    progress = tqdm(total=args.total_episodes, initial=global_step, unit="episode", disable=None if rank == 0 else True)
    checked = False
    ppo_start = time.perf_counter() - state.get("ppo_seconds", 0)
    num_tokens = state.get("num_tokens", 0)

    def save_checkpoint() -> None:
        log.sync()
        content = {"stage": "ppo", "iteration": iteration, "global_step": global_step, "kl_coef": kl_coef}
        content |= {"parameters": parameters.data, "optimizer": optimizer.state_dict()}
        keep(content | {"ppo_seconds": time.perf_counter() - ppo_start, "num_tokens": num_tokens})

    while global_step < args.total_episodes:
        if iteration % args.checkpoint_interval == 0 and rank == 0:
            save_checkpoint()

        # 1. Rollout: responses of the policy to this rank's share of the next prompts.
        trained.eval()
        indices = in_order(len(examples), global_step, args.batch_size, args.seed)
        prompts = [examples[i] for i in indices[rank::world_size]]
        (sample_seed,) = derive_seeds(args.seed, iteration, 1)
        since = time.perf_counter()
        responses = sample(policy, prompts, sample_seed + rank)
        generation_seconds = time.perf_counter() - since
        share, size = len(prompts) // args.num_minibatches, micro_batch_size  # of a minibatch, and of a part of it
        order = sorted(range(len(prompts)), key=lambda i: (i // share, len(responses[i])))  # little padding that way
        prompts, responses = [prompts[i] for i in order], [responses[i] for i in order]
        scores = (score(prompts, responses) - mean) / std  # (B,)
        has_ended = torch.tensor([response[-1] == tokenizer.eos_token_id for response in responses], device=device)
        scores = scores - args.missing_eos_penalty * ~has_ended

        # 2. Log-probs and values, in micro-batches that the update will meet again, then rewards and advantages. Those
        # of all tokens stand one after the other, (M,), or in a grid of B responses by L tokens.
        trained.train()  # as in the update; matters to --gradient-checkpointing alone
        slices = [slice(i, i + size) for i in range(0, len(prompts), size)]
        texts = [to_texts(policy, [x.prompt for x in prompts[rows]], responses[rows]) for rows in slices]
        with torch.no_grad():
            parts = [score_tokens(policy, critic, reference, text, args) for text in texts]
        log_probs, values, ref_log_probs, entropy = (torch.cat(column) for column in zip(*parts))
        lengths = torch.tensor([len(response) for response in responses], device=device)
        mask = torch.arange(lengths.max().item(), device=device) < lengths[:, None]  # (B, L)

        def grid(x: Tensor, mask: Tensor = mask) -> Tensor:
            return x.new_zeros(mask.shape).masked_scatter(mask, x)

        k1, k3 = kl_estimates(ref_log_probs - log_probs)
        kl_estimate = grid(k1 if args.kl_estimator == "k1" else k3)  # (B, L)
        rewards = token_rewards(scores, kl_estimate, mask, kl_coef)  # (B, L)
        if args.whiten_rewards:
            rewards = grid(whiten(rewards[mask], shift_mean=False))
        advantages = masked_gae(rewards, grid(values), mask, args.gamma, args.gae_lambda)[mask]
        returns = advantages + values
        columns = log_probs, values, whiten(advantages), returns
        counts = [len(text.chosen) for text in texts]
        batch = [Part(text, *part) for text, *part in zip(texts, *(x.split(counts) for x in columns))]

        # 3. Update: several epochs of minibatch steps.
        annealed = 1 - global_step / args.total_episodes if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
        all_parts, grad_norms, since = [], [], time.perf_counter()
        for _ in range(args.update_epochs):
            for i in torch.randperm(args.num_minibatches).tolist():
                minibatch = batch[i * share // size : (i + 1) * share // size]
                parameters.grad.zero_()
                steps = [add_gradient(policy, critic, part, args) for part in minibatch]
                if not checked:
                    said = check_start(torch.cat([x["log_ratio"] for x in steps]), k1 if iteration == 0 else None)
                    checked = True
                    if rank == 0:
                        progress.write(said)
                count = torch.tensor(float(sum(len(part.returns) for part in minibatch)), device=device)
                sum_over_ranks(parameters.grad, count)
                parameters.grad /= count
                grad_norms.append(parameters.grad.norm())
                parameters.grad.mul_((args.max_grad_norm / (grad_norms[-1] + 1e-6)).clamp(max=1))
                optimizer.step()
                all_parts += steps
        iteration += 1
        global_step += args.batch_size

        # 4. Metrics, under TRL's names where it has them: means over responses, over tokens, and of the losses over all
        # steps of this iteration; over all ranks.
        rows = {name: torch.cat([x[name] for x in all_parts]) for name in all_parts[0]}
        ratio = rows["log_ratio"].exp()
        kl_rewards = -kl_coef * kl_estimate.sum(-1)
        columns = {
            "objective/scores": scores,
            "objective/kl": grid(k1).sum(-1),
            "objective/entropy": -grid(log_probs).sum(-1),  # TRL's: an estimate, of whole responses
            "objective/non_score_reward": kl_rewards,
            "objective/rlhf_reward": scores + kl_rewards,
            "objective/eos_rate": has_ended,
            "objective/response_length": lengths,
            "policy/entropy_avg": entropy,
            "policy/approxkl_avg": kl_estimates(rows["log_ratio"])[1],
            "policy/clipfrac_avg": (ratio - 1).abs() > args.clip_coef,
            "loss/policy_avg": rows["policy_loss"],
            "loss/value_avg": rows["value_loss"],
            "val/clipfrac_avg": rows["value_clipped"],
            "val/ratio": ratio,
            "loss/grad_norm": torch.stack(grad_norms),
        }
        if args.dataset is None:
            columns["objective/gold"] = gold_scores(prompts, read(prompts, responses))
        sizes, means, stds = global_moments([returns, returns - values, ratio, *columns.values()])
        logged = dict(zip(columns, means[3:].tolist()))
        if not (np.isfinite(means).all() and parameters.isfinite().all()):
            raise FloatingPointError(f"the loss of iteration {iteration} is not finite")
        num_tokens += int(sizes[0])
        update_seconds = time.perf_counter() - since
        seconds = time.perf_counter() - ppo_start
        row = {
            "iteration": iteration,
            "global_step": global_step,
            **logged,
            "objective/kl_coef": kl_coef,
            "val/ratio_var": stds[2].item() ** 2,
            "val/explained_variance": 1 - (stds[1] / stds[0]).item() ** 2 if stds[0] else math.nan,
            "val/num_eos_tokens": round(logged["objective/eos_rate"] * args.batch_size),
            "lr": args.learning_rate * annealed,
            "time/seconds": seconds,
            "time/episodes_per_second": global_step / seconds,
            "time/tokens_per_second": num_tokens / seconds,
            "time/generation_tokens_per_second": int(sizes[0]) / generation_seconds,
            "time/update_tokens_per_second": args.update_epochs * int(sizes[0]) / update_seconds,
        }
        if args.kl_target:
            kl_coef = adapted_kl_coef(kl_coef, logged["objective/kl"], args)
        if rank == 0:
            log.write(row)
            text = f"score {logged['objective/scores']:.2f}, KL {logged['objective/kl']:.2f}"
            show_progress(progress, global_step, f"{text}, {global_step / seconds:.0f} episodes/s")

    # What was learned is saved and measured, beside what the reference says to the same prompts.
    ppo_seconds = time.perf_counter() - ppo_start
    progress.close()
    leave_ranks()
    if rank > 0:
        return {}
    save_checkpoint()
    save_model(run_dir / "policy", policy, tokenizer)
    save_model(run_dir / "critic", critic, tokenizer)
    trained.eval()
    after = sample(policy, eval_prompts, seeds[2])
    kl = 0.0
    for i in range(0, len(after), micro_batch_size):
        texts = to_texts(
            policy, [x.prompt for x in eval_prompts[i : i + micro_batch_size]], after[i : i + micro_batch_size]
        )
        with torch.no_grad():
            log_probs, _, ref_log_probs, _ = score_tokens(policy, critic, reference, texts, args)
        kl += (log_probs - ref_log_probs).sum().item() / len(after)
    samples = {when: read(eval_prompts, x) for when, x in (("before", before), ("after", after))}
    scores = {"before": (scores_before - mean) / std, "after": (score(eval_prompts, after) - mean) / std}
    wanted = scores  # what decides which of two responses is better: the gold score, where there is one
    if args.dataset is None:
        wanted = {when: gold_scores(eval_prompts, texts) for when, texts in samples.items()}
        figures |= {f"gold_{when}": x.mean().item() for when, x in wanted.items()}
    gain = wanted["after"] - wanted["before"]
    win_rate = ((gain > 0).double() + (gain == 0).double() / 2).mean().item()
    low, high = wilson_interval(win_rate, len(gain))
    for when, responses in (("before", before), ("after", after)):
        figures[f"score_{when}"] = scores[when].mean().item()
        figures[f"eos_rate_{when}"] = np.mean([x[-1] == tokenizer.eos_token_id for x in responses]).item()
    seconds = time.perf_counter() - start
    summary = {"script": SCRIPT, "task": args.task, "seed": args.seed, "global_step": global_step}
    summary |= {"seconds": seconds, "ppo_seconds": ppo_seconds, "steps_per_second": global_step / ppo_seconds}
    summary |= {"episodes_per_second": global_step / ppo_seconds, "tokens_per_second": num_tokens / ppo_seconds}
    summary |= {"win_rate": win_rate, "win_rate_low": low, "win_rate_high": high, "kl": kl} | figures
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    table = as_table(eval_prompts, samples, wanted)
    write_atomically(run_dir / "samples.md", table)
    log.events.add_text("samples", table, global_step)
    log.close()
    draw_frontier(run_dir)
    for x, *answers in list(zip(eval_prompts, samples["before"], samples["after"]))[:3]:
        print(x.text, *(f"  {when}: {text.strip()}" for when, text in zip(("before", "after"), answers)), sep="\n")
    by = "gold score" if args.dataset is None else "score"
    print(
        f"{args.task}: win rate {win_rate:.1%} by {by} (95 % interval {low:.1%} to {high:.1%}), "
        f"KL {kl:.2f} nats per response, after {global_step:,} episodes in {ppo_seconds:.1f} of {seconds:.1f} s; "
        f"saved in {run_dir}"
    )
    return summary


# --------------------------------------------------------------------------------------------------- the policy at work


class Policy:
    """The trained language model at work: it responds to prompts."""

    def __init__(self, lm: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, args: Args):
        """args: response_length, temperature, and how to compute."""
        self.model, self.tokenizer, self.args = Model(Body(lm, args), lm.get_output_embeddings()), tokenizer, args

    def respond(self, prompts: list[str | list[dict]]) -> list[str]:
        """Responses to prompts, texts or lists of messages, sampled with PyTorch's seed. Raises ValueError."""
        rows = [parse_row({"prompt": prompt}, self.tokenizer) for prompt in prompts]
        encoded = [encode_prompt(row.prompt, self.tokenizer) for row in rows]
        responses = generate(self.model, encoded, self.args.response_length, self.args.temperature)
        return decode_responses(encoded, responses, self.tokenizer)


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> Policy:
    """The policy in a folder that this script wrote, or in the run directory that holds one. Raises UserError."""
    folder = Path(path, "policy") if Path(path, "policy").is_dir() else Path(path)
    with user_error_in(f"{folder} holds no policy of {SCRIPT}.py"):
        limits = transformers.GenerationConfig.from_pretrained(folder)
        wanted = {"response_length": limits.max_new_tokens, "temperature": limits.temperature}
        args = Args(model=str(folder), max_prompt_length=1, **wanted)
    tokenizer = load_tokenizer(args.model, "--play")
    return Policy(load_lm(args.model, tokenizer, args, torch.device(device)), tokenizer, args)


def play(args: Args) -> None:
    """Prints a response of the saved policy args.play to args.prompt."""
    check_args(args, world_size=1)
    if not args.prompt:
        raise UserError('--play needs a text to respond to: --prompt "..."')
    device = start_device(args, world_size=1, auto="cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(args.play, device)
    with user_error_in(f"--prompt {args.prompt}"):
        prompt = json.loads(args.prompt) if args.prompt.startswith("[") else args.prompt
        torch.manual_seed(args.seed)
        (response,) = policy.respond([prompt])
    print(prompt + response if isinstance(prompt, str) else response)


def gold_scores(prompts: list[Example], responses: list[str]) -> Tensor:
    """Gold scores (B,) of reviews."""
    return torch.tensor([gold_score(x.text + text) for x, text in zip(prompts, responses)])


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a probability, from the rate seen in count trials (Wilson 1927)."""
    z = 1.96
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def as_table(prompts: list[Example], samples: dict[str, list[str]], wanted: dict[str, Tensor]) -> str:
    """The first prompts with the responses before and after PPO and what these are worth, as a table in Markdown."""
    lines = ["| prompt | before | | after | |", "| --- | --- | ---: | --- | ---: |"]
    for i, prompt in enumerate(prompts[:30]):
        cells = [prompt.text]
        for when in ("before", "after"):
            cells += [samples[when][i], f"{wanted[when][i]:.1f}"]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------ made-up reviews


# fmt: off
DISHES = (
    "soup", "pasta", "pizza", "salad", "steak", "fish", "curry", "bread", "coffee", "dessert", "burger", "rice", "wine",
    "cake", "tea", "chicken",
)
OTHERS = ("waiter", "chef", "host", "service", "room", "music", "table", "terrace", "menu", "kitchen")
GOOD = (
    "delicious", "excellent", "lovely", "wonderful", "perfect", "great", "superb", "charming", "fresh", "splendid",
    "pleasant", "amazing",
)
BAD = (
    "awful", "terrible", "bland", "cold", "stale", "poor", "dreadful", "disappointing", "horrible", "dull", "dirty",
    "sad",
)
PLAIN = ("ordinary", "average", "small", "big", "usual", "plain")
# fmt: on
ADVERBS = ("very", "really", "quite", "so", "rather")
OPENINGS = ("", "", "", "last night", "on friday", "on our first visit", "as always", "to be honest")
ASIDES = (
    "we sat by the window",
    "we came with friends",
    "it was a busy evening",
    "we paid in cash",
    "i had read about the place",
    "there was a long line",
)
NUM_REVIEWS = 5000
ENDINGS = {
    1: ("i will come back", "we loved it", "five stars"),
    0: ("that is all", "we paid and left"),
    -1: ("never again", "i want my money back", "one star"),
}


def write_review(rng: random.Random) -> str:
    """A review: statements about the dishes and the place, most of them of one mind, with an ending that fits. Now and
    then it repeats or contradicts itself, or does not come to an end soon."""
    mind = rng.choices((1, 0, -1), (1, 2, 2))[0]  # what the guest thinks
    things = rng.sample(DISHES + OTHERS, 12)
    review = rng.choice(OPENINGS).split()
    for i in range(rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))):
        if i:
            review.append(rng.choice((".", ".", "and", "but")))
            if rng.random() < 0.15:
                things[i] = things[i - 1]  # says more about the same
        if rng.random() < 0.15:
            review += rng.choice(ASIDES).split()
            continue
        sign = rng.choices((mind, 0, -mind or rng.choice((1, -1))), (70, 15, 15))[0]
        adjective = rng.choice({1: GOOD, 0: PLAIN, -1: BAD}[sign])
        adverb = [rng.choice(ADVERBS)] if rng.random() < 0.4 else []
        review += ["the", things[i], "was", *adverb, adjective]
    return " ".join([*review, ".", *rng.choice(ENDINGS[mind]).split(), "."])


def gold_score(review: str) -> float:
    """What people want of a review, hidden from all that is trained: each word of praise or blame counts 1 or -1, a
    praising or blaming ending 1 more. Off go 1 for each noun or adjective said before, 1 for each thing that is both
    praised and blamed, 0.2 for each word beyond 30, and 3 where the last sentence has no end."""
    words = review.split()
    said = Counter(word for word in words if word in DISHES + OTHERS + GOOD + BAD + PLAIN)
    opinions: dict[str, set[int]] = {}  # of each thing
    sentiment, thing = 0, ""
    for word in words:
        if word in DISHES + OTHERS:
            thing = word
        elif word in GOOD + BAD:
            sign = 1 if word in GOOD else -1
            sentiment += sign
            opinions.setdefault(thing, set()).add(sign)
    for sign, endings in ENDINGS.items():
        sentiment += sign * any(ending in review for ending in endings)
    repetition = sum(count - 1 for count in said.values())
    contradiction = sum(len(signs) == 2 for signs in opinions.values())
    unfinished = words[-1:] != ["."]
    return sentiment - repetition - contradiction - 0.2 * max(0, len(words) - 30) - 3 * unfinished


def ask_people(
    prompts: list[Example], first: list[list[int]], second: list[list[int]], read: Callable, args: Args
) -> list[Example]:
    """What simulated people say of samples of the model: which of two responses they like better, or how they rate
    each from 1 to 10. They have the gold score in mind, and err."""
    rng = random.Random(args.seed)
    judged = []
    for x, a, b, gold_a, gold_b in zip(
        prompts, first, second, *(gold_scores(prompts, read(prompts, y)) for y in (first, second))
    ):
        if args.feedback == "ratings":
            for response, gold in ((a, gold_a), (b, gold_b)):
                rating = min(max(round(rng.gauss(7 + 0.7 * gold.item(), 1)), 1), 10)
                judged.append(x._replace(responses=[response], rating=rating))
        else:
            likes_first = rng.random() < 1 / (1 + math.exp((gold_b - gold_a) / 0.5))  # Bradley-Terry
            judged.append(x._replace(responses=[a, b] if likes_first else [b, a]))
    return judged


# ----------------------------------------------------------------------------------------------------------------- data


class Row(NamedTuple):
    """A row of data as text: a prompt, the response to it or the chosen before the rejected one, and the rating."""

    prompt: str
    responses: tuple[str, ...] = ()
    rating: float | None = None


def parse_row(row: object, tokenizer: transformers.PreTrainedTokenizerBase | None) -> Row:
    """The row of a data set: {"prompt"}, alone or with "response", with "response" and "rating", or with "chosen" and
    "rejected"; or {"messages"}. Prompt and responses are texts or lists of messages {"role", "content"}, and the
    tokenizer's chat template makes the prompt's a text. Other keys do not matter. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    for messages in row.values():
        if isinstance(messages, list) and not all(
            isinstance(x, dict) and {"role", "content"} <= x.keys() for x in messages
        ):
            raise ValueError('its messages need "role" and "content"')
    if "messages" in row and "prompt" not in row:
        is_answered = row["messages"] and row["messages"][-1]["role"] == "assistant"
        split = len(row["messages"]) - bool(is_answered)
        row = {"prompt": row["messages"][:split]} | ({"response": row["messages"][split:]} if is_answered else {})
    prompt, names = row.get("prompt"), [name for name in ("response", "chosen", "rejected") if name in row]
    if prompt is None or names not in ([], ["response"], ["chosen", "rejected"]):
        raise ValueError('it needs "prompt", and may have "response" with a "rating", or "chosen" and "rejected"')
    if isinstance(prompt, list):
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError("its prompt is a list of messages, and the tokenizer of --model has no chat template")
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    responses = []
    for name in names:
        is_message = isinstance(row[name], list) and len(row[name]) == 1
        responses.append(row[name][0]["content"] if is_message else row[name])
    if not all(isinstance(text, str) for text in (prompt, *responses)):
        raise ValueError(
            f"{' and '.join(['prompt', *names])} must be texts, or lists of messages with one response each"
        )
    rating = row.get("rating") if names == ["response"] else None
    if isinstance(rating, bool) or not isinstance(rating, int | float | None) or not math.isfinite(rating or 0):
        raise ValueError(f"its rating {rating!r} is no number")
    return Row(prompt, tuple(responses), rating)


def load_rows(args: Args, tokenizer: transformers.PreTrainedTokenizerBase | None) -> list[Row]:
    """The rows of --dataset, or made-up reviews, of which the first 2 to 6 words are the prompt. Raises UserError."""
    if args.dataset is None:
        rng, rows = random.Random(args.seed), []
        for _ in range(NUM_REVIEWS):
            words = write_review(rng).split()
            length = rng.randint(2, 6)
            rows.append(Row(" ".join(words[:length]), (" ".join(words[length:]),)))
        return rows
    if args.dataset.endswith(".jsonl"):
        with user_error_in(f"--dataset {args.dataset}"):
            lines = Path(args.dataset).read_text(encoding="utf-8").split("\n")
        numbered = (
            (f"{args.dataset}, line {i}", partial(json.loads, line)) for i, line in enumerate(lines, 1) if line.strip()
        )
    else:
        if find_spec("datasets") is None:
            raise UserError(
                f"--dataset {args.dataset}: give a .jsonl file, or for a hub data set: pip install datasets"
            )
        with user_error_in(f"--dataset {args.dataset}"):
            found = import_module("datasets").load_dataset(args.dataset, split=args.dataset_split)
        numbered = ((f"--dataset {args.dataset}, row {i}", partial(found.__getitem__, i)) for i in range(len(found)))
    rows = []
    for where, read in numbered:
        with user_error_in(where):
            rows.append(parse_row(read(), tokenizer))
            forms = [(len(row.responses), row.rating is None) for row in (rows[0], rows[-1])]
            if forms[0] != forms[1]:
                raise ValueError("it has not the form of the rows before")
    if not rows:
        raise UserError(f"--dataset {args.dataset} has no rows")
    return rows


def encode_prompt(text: str, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, to which a chat template may have given its start token already."""
    is_started = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not is_started)


def decode_responses(
    prompts: list[list[int]], responses: list[list[int]], tokenizer: transformers.PreTrainedTokenizerBase
) -> list[str]:
    """Responses as texts that can follow those of the prompts: what is between the two, such as a space, is theirs."""
    starts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    both = [prompt + response for prompt, response in zip(prompts, responses)]
    return [text[len(start) :] for start, text in zip(starts, tokenizer.batch_decode(both, skip_special_tokens=True))]


def encode_rows(rows: list[Row], tokenizer: transformers.PreTrainedTokenizerBase, args: Args) -> list[Example]:
    """The rows as token ids, without those whose prompt is empty or too long. Raises UserError where none is left."""
    examples = []
    for row in rows:
        prompt = encode_prompt(row.prompt, tokenizer)
        responses = [tokenizer.encode(text, add_special_tokens=False) for text in row.responses]
        responses = [[*tokens, tokenizer.eos_token_id][: args.response_length] for tokens in responses]
        if 0 < len(prompt) <= args.max_prompt_length:
            examples.append(Example(row.prompt, prompt, responses, row.rating))
    if not examples:
        raise UserError(f"no row of --dataset {args.dataset} has a prompt of 1 to --max-prompt-length tokens")
    return examples


def hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """The examples in an order of their own, without a tenth of them, and that tenth; fewer than ten serve as both."""
    order = np.random.default_rng(seed).permutation(len(examples))
    count = len(examples) // 10
    shuffled = [examples[i] for i in order]
    return (shuffled[count:], shuffled[:count]) if count else (shuffled, shuffled)


def standardised(examples: list[Example]) -> list[Example]:
    """The examples with ratings of mean 0 and std 1, if they are rated."""
    if examples[0].rating is None:
        return examples
    ratings = np.array([x.rating for x in examples])
    return [x._replace(rating=rating) for x, rating in zip(examples, (ratings - ratings.mean()) / (ratings.std() or 1))]


def ranking_accuracy(model: Model, examples: list[Example]) -> dict[str, float]:
    """How often a reward model ranks responses as people did, as "reward_accuracy": the chosen one above the rejected
    one, or of neighbours that are rated differently the better above the other. Empty where there are none."""
    with torch.no_grad():
        scores = [model.scores(to_texts(model, [x.prompt] * len(x.responses), x.responses)) for x in examples]
    if examples[0].rating is None:
        ranked = [(chosen > rejected).item() for chosen, rejected in scores]
    else:
        pairs = itertools.pairwise(zip((x.rating for x in examples), torch.cat(scores).tolist()))
        ranked = [(a > b) == (score_a > score_b) for (a, score_a), (b, score_b) in pairs if a != b]
    return {"reward_accuracy": np.mean(ranked).item()} if ranked else {}


# --------------------------------------------------------------------------------------------------- loading and saving


EMBEDDED_SIZES = {  # sizes of the small model
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def make_tokenizer(rows: list[Row]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words and punctuation marks of the rows, the 30,000 most frequent of them."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[PAD]", "[EOS]", "[UNK]"]
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=30_000, special_tokens=special, show_progress=False)
    words.train_from_iterator((text for row in rows for text in (row.prompt, *row.responses)), trainer)
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def load_tokenizer(source: str, flag: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder. Raises UserError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its attempts
    with user_error_in(f"{flag} {source} has no tokenizer that can be loaded"):
        config = Path(source, "tokenizer_config.json")
        declared = json.loads(config.read_text()).get("tokenizer_class") if config.exists() else None
        if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):  # AutoTokenizer goes by the kind of the model
            return transformers.PreTrainedTokenizerFast.from_pretrained(source)
        return transformers.AutoTokenizer.from_pretrained(source)


def set_padding(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer a padding token of its own, if it has none or pads with the end token, which has to be told
    from padding."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def load_hf(auto_class: type, source: str | Path, flag: str, args: Args, **config: int) -> transformers.PreTrainedModel:
    """A model of one of transformers' Auto classes, from the hub, a folder, or the folder of a LoRA adapter; without
    dropout. config: of its settings, those that are to be others. Raises UserError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its attempts
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would report what is raised here
    if Path(source).is_dir():
        transformers.utils.logging.disable_progress_bar()  # a download shows one
    adapter = Path(source, "adapter_config.json")
    with user_error_in(f"{flag} {source} cannot be loaded"), warnings.catch_warnings(action="ignore"):
        base = source
        if adapter.exists():
            sibling = adapter.parent.parent / "sft"  # what an adapter of this script sits on, if it was trained here
            base = sibling if sibling.exists() else json.loads(adapter.read_text())["base_model_name_or_path"]
        settings = transformers.AutoConfig.from_pretrained(base, **config)
        settings.update({name: 0.0 for name in settings.to_dict() if "drop" in name})
        dtype = torch.bfloat16 if args.bf16 and args.lora_rank else torch.float32
        kwargs = {"config": settings, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, info = auto_class.from_pretrained(base, **kwargs)
        missing = info["missing_keys"]
        if adapter.exists():
            adapted = peft.PeftModel.from_pretrained(model, source)
            in_file = set(load_file(adapter.with_name(ADAPTER)))
            lacking = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - in_file
            missing = (missing | lacking) - {name.removeprefix("base_model.model.") for name in in_file}
            model = adapted.merge_and_unload()
        if missing:
            raise ValueError(f"its files lack {len(missing)} weights, such as {min(missing)}")
    return model


def load_lm(
    model: str | Path, tokenizer: transformers.PreTrainedTokenizerBase, args: Args, device: torch.device
) -> transformers.PreTrainedModel:
    """A causal LM with rows for all tokens of its tokenizer, that does what this script takes for granted: a new small
    one, with weights from PyTorch's seed, or one from the hub or a folder. Raises UserError."""
    if model == "embedded":
        config = transformers.AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **EMBEDDED_SIZES)
        lm = transformers.AutoModelForCausalLM.from_config(config)
    else:
        lm = load_hf(transformers.AutoModelForCausalLM, model, "--model", args)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer))
    pad_id, end_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    lm.config.pad_token_id, lm.config.eos_token_id = pad_id, end_id
    lm.generation_config = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        temperature=args.temperature,
        max_new_tokens=args.response_length,
        pad_token_id=pad_id,
        eos_token_id=end_id,
        suppress_tokens=[pad_id],
    )
    longest = getattr(lm.config, "max_position_embeddings", math.inf)
    if args.max_prompt_length + args.response_length > longest:
        raise UserError(f"--max-prompt-length and --response-length add up to more than {model}'s {longest} positions")
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        own = lm.get_output_embeddings()(lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
        whole, first = (lm(input_ids=x, use_cache=False).logits for x in (tokens, tokens[:, :3]))
    if not torch.allclose(own, whole, rtol=0.01, atol=0.01):
        raise UserError(f"--model {model}: its scores are more than a linear layer on its body, which they have to be")
    if not torch.allclose(first, whole[:, :3], rtol=0.1, atol=0.1):
        raise UserError(f"--model {model} is not causal: a token sees those that follow")
    if args.gradient_checkpointing:
        with warnings.catch_warnings(action="ignore"):  # of a new name, which older versions do not know
            lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.to(device)


Score = Callable[[list[str], list[str]], list[float]]  # prompts, responses -> scores


def load_reward(
    args: Args, tokenizer: transformers.PreTrainedTokenizerBase, device: torch.device
) -> Model | Score | None:
    """The reward that --reward-model or --reward-fn names, if one does. A model that has this tokenizer's tokens reads
    them as they are, any other reads the text. Raises UserError."""
    if args.reward_fn:
        return load_reward_fn(args.reward_fn)
    if args.reward_model is None:
        return None
    source, flag = args.reward_model, "--reward-model"
    classifier = load_hf(transformers.AutoModelForSequenceClassification, source, flag, args, num_labels=1).to(device)
    own = load_tokenizer(source, flag)
    set_padding(own)
    if len(own) > classifier.get_input_embeddings().num_embeddings:
        classifier.resize_token_embeddings(len(own))
    if own.get_vocab() == tokenizer.get_vocab() and hasattr(classifier, "score"):
        classifier.config.pad_token_id = tokenizer.pad_token_id
        return Model(Body(classifier, args), classifier.score)
    classifier.config.pad_token_id = own.pad_token_id
    body, size = Body(classifier, args), args.micro_batch_size or args.batch_size

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        parts = (texts[i : i + size] for i in range(0, len(texts), size))
        inputs = (own(part, padding=True, truncation=True, return_tensors="pt").to(device) for part in parts)
        with body.autocast():
            return [score for part in inputs for score in classifier(**part).logits[:, 0].tolist()]

    return score


def load_reward_fn(flag: str) -> Score:
    """The function in a Python file that --reward-fn FILE.py:NAME names. Raises UserError."""
    path, _, name = flag.rpartition(":")
    with user_error_in(f"--reward-fn {flag} (give FILE.py:NAME)"):
        spec = spec_from_file_location(Path(path).stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        with user_error_in(f"--reward-fn {flag}"):
            scores = [float(score) for score in function(prompts, responses)]
            if len(scores) != len(responses) or not np.isfinite(scores).all():
                raise ValueError(f"gave {len(scores)} scores for {len(responses)} responses, or some not finite")
        return scores

    return score


def load_reward_model(folder: Path, policy: Model, args: Args) -> Model:
    """The reward model that the second stage left in a folder."""
    if not args.lora_rank:
        classifier = load_hf(transformers.AutoModelForSequenceClassification, folder, "--resume", args)
        classifier = classifier.to(policy.body.lm.device)
        return Model(Body(classifier, args), classifier.score)
    reward = scalar_model(policy, "reward", args)
    state = {name.removeprefix("base_model.model."): x for name, x in load_file(folder / ADAPTER).items()}
    reward.head.weight.data.copy_(state.pop("score.weight"))
    peft.set_peft_model_state_dict(policy.body.lm, state, "reward")
    return reward


def save_model(folder: Path, model: Model, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Writes a model as a folder that transformers loads, or PEFT where it has an adapter: a causal LM, or a sequence
    classifier with one label where the head is scalar. The folder appears when it is whole."""
    part, lm = folder.with_name(folder.name + ".part"), model.body.lm
    is_scalar = model.head.weight.shape[0] == 1
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    transformers.utils.logging.disable_progress_bar()
    if model.adapter:
        state = peft.get_peft_model_state_dict(lm, adapter_name=model.adapter, save_embedding_layers=False)
        config = copy.deepcopy(lm.peft_config[model.adapter])
        config.inference_mode, config.task_type = True, "SEQ_CLS" if is_scalar else "CAUSAL_LM"
        if is_scalar:
            state["score.weight"] = model.head.weight
            config.modules_to_save = ["score"]
        config.save_pretrained(part)
        save_file({f"base_model.model.{name}": x.detach().clone() for name, x in state.items()}, part / ADAPTER)
    else:
        state = lm.state_dict()
        if is_scalar:
            config = copy.deepcopy(lm.config)
            config.num_labels = 1
            prefix = lm.base_model_prefix
            state = {f"{prefix}.{name}": x for name, x in lm.base_model.state_dict().items()}
            state["score.weight"] = model.head.weight
            with torch.device("meta"):
                lm = transformers.AutoModelForSequenceClassification.from_config(config)
        lm.save_pretrained(part, state_dict={name: x.detach().clone() for name, x in state.items()})
    if not is_scalar:
        lm.generation_config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


# ---------------------------------------------------------------------------------------------------------- run-keeping

SCRIPT = "ppo_rlhf_token"
FORMAT = 1  # of checkpoint.pt: raised whenever what it holds changes
FIT_CHECKPOINT_INTERVAL = 100  # steps
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "datasets")  # whose versions config.json tells
ADAPTER = "adapter_model.safetensors"  # PEFT's name
# What check_args demands of the values of flags.
LIMITS = {
    "at least 1": (
        "max_prompt_length response_length sft_batch_size num_feedback reward_steps reward_batch_size total_episodes"
        " batch_size num_minibatches micro_batch_size update_epochs kl_horizon checkpoint_interval",
        lambda x: x >= 1,
    ),
    "at least 2": ("eval_samples", lambda x: x >= 2),
    "between 1 and 1024": ("torch_threads", lambda x: 1 <= x <= 1024),
    "above 0": (
        "temperature sft_learning_rate reward_learning_rate learning_rate kl_target clip_coef max_grad_norm lora_alpha",
        lambda x: 0 < x < math.inf,
    ),
    "between 0 and 2**32 - 1": (
        "seed sft_steps kl_coef missing_eos_penalty vf_coef lora_rank",
        lambda x: 0 <= x < 2**32,
    ),
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


def check_batch_args(args: Args, world_size: int) -> None:
    """Raises UserError for flags about stages and batches that do not fit together."""
    if args.reward_model and args.reward_fn:
        raise UserError("--reward-model contradicts --reward-fn: leave one out")
    per_minibatch = args.num_minibatches * (args.micro_batch_size or 1) * world_size
    if args.batch_size % per_minibatch:
        product = "--num-minibatches times --micro-batch-size times processes"
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of {product}, {per_minibatch}")
    if args.total_episodes % args.batch_size:
        raise UserError(f"--total-episodes {args.total_episodes} must be a multiple of --batch-size {args.batch_size}")
    for name in ("sft_batch_size", "reward_batch_size"):
        if getattr(args, name) % world_size:
            raise UserError(f"--{name.replace('_', '-')} must be a multiple of the {world_size} processes")
    if args.model == "embedded" and not args.sft_steps:
        raise UserError("--sft-steps 0 is for a --model that has learned to write, and the embedded one has not")
    if args.kl_target and not args.kl_coef:
        raise UserError("--kl-target adapts --kl-coef by factors, and 0 stays 0: start with more")
    if args.prompt is not None and not args.play:
        raise UserError("--prompt is for --play POLICY")


def check_examples(examples: list[Example], args: Args) -> None:
    """Raises UserError for rows that cannot serve the stages."""
    if args.sft_steps and not examples[0].responses:
        raise UserError(f"--dataset {args.dataset} has no responses to learn from: set --sft-steps 0")
    is_judged = examples[0].rating is not None or len(examples[0].responses) == 2 or args.dataset is None
    if not (is_judged or args.reward_model or args.reward_fn):
        raise UserError(f"--dataset {args.dataset} has no ratings or comparisons: give --reward-model or --reward-fn")


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


def draw_frontier(run_dir: Path) -> None:
    """Draws the scores, and the gold score where there is one, over the square root of the KL divergence, as
    frontier.png (Gao et al. 2022, fig. 1): a gold score that falls while the other rises is over-optimisation."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    distance = [math.sqrt(max(float(row["objective/kl"]), 0)) for row in rows]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, label, colour in (("scores", "reward (proxy)", "tab:blue"), ("gold", "gold", "tab:orange")):
        if f"objective/{name}" in rows[0]:
            values = [float(row[f"objective/{name}"]) for row in rows]
            axes.plot(distance, values, ".-", color=colour, label=label)
    axes.set(xlabel="square root of the KL divergence from the reference", ylabel="mean score", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "frontier.png")


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
