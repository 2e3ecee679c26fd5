# /// script
# requires-python = ">=3.11"
# dependencies = ["datasets==5.2.0", "numpy==2.4.6", "peft==0.21.2", "safetensors==0.8.0", "tensorboard==2.21.0",
#                 "tokenizers==0.23.3", "torch==2.13.0", "tqdm==4.70.1", "transformers==5.23.0", "tyro==1.0.16"]
# ///
"""RLHF of a language model: supervised fine-tuning, a reward model of people's judgements, PPO on tokens against it.

    python ppo_rlhf_token.py --run-dir runs/reviews     # learns kind reviews, win rate 94 %, in two minutes
    python ppo_rlhf_token.py --play runs/reviews --prompt "the soup was"    # a response of the policy of this run
    python ppo_rlhf_token.py --resume runs/reviews      # goes on from the last checkpoint of a run that was stopped
    python ppo_rlhf_token.py --model Qwen/Qwen2-0.5B-Instruct --dataset rows.jsonl --sft-steps 0 --lora-rank 16 --bf16 \
        --reward-fn my_reward.py:score --learning-rate 1e-5 --micro-batch-size 4 --response-length 256
    torchrun --nproc-per-node 2 ppo_rlhf_token.py       # two processes, each with half of every batch

Three stages, each of which leaves folders for transformers or PEFT, from which the next one starts:
- `fine_tune`: the model learns to write responses like those in the data (sft/).
- `train_reward_model`: a model learns to score responses, from people's comparisons or ratings (reward_model/).
- PPO in `train`: the policy, at first the model in sft/, learns to write responses of high score (policy/, critic/).

PPO repeats one iteration, which is numbered in `rollout`, `update` and `train`:
1. Rollout: the policy responds to the next prompts, token by token, and the reward model scores the responses.
2. Advantages: the last token of a response earns the score, and each pays for being likelier to the policy than to the
   reference, the model in sft/. How much better than the critic expected did it turn out? (`masked_gae`)
3. Update: in several passes over these responses, good tokens become likelier and bad ones less likely; beyond a factor
   of 1 ± epsilon there is nothing to gain (`ppo_loss`). The critic learns what to expect. Then the data is thrown away.
4. Metrics, and now and then a checkpoint.
To change the loss edit `ppo_loss`, the form of the data `parse_row`, what the critic is `train` and where it speaks,
`rollout` and `ppo_loss`. Another reward is a function for --reward-fn: it gets prompts, responses and by name the
data's other columns, all lists, and returns numbers, best spread by about 1.

Without --dataset, a grammar writes restaurant reviews, and simulated people compare samples by a hidden gold score, and
err. PPO sees the reward model alone: so the run can tell whether the policy is better, or only scores higher.

Shapes: B responses of a batch or part of it, P and L tokens of its longest prompt and response, M tokens of all of its
responses, V tokens in the vocabulary, H numbers in a hidden state.
Sources: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, KL penalty (Ziegler et al.)
https://arxiv.org/abs/1909.08593, InstructGPT https://arxiv.org/abs/2203.02155, N+ implementation details
https://arxiv.org/abs/2403.17031, KL estimates http://joschu.net/blog/kl-approx.html.

Where this differs from TRL's PPOTrainer:
- The critic is a second head on the policy's body, unless --critic separate asks for a model of its own.
- Micro-batches are of responses of like length, and stay as they are. Log-probs before the update are computed on them
  as in the update: the first ratio is 1. Means are over a minibatch's tokens, not means of micro-batches' means.
- The end token itself earns the score, not the padding after it. Gradients are clipped.
- With LoRA there is one copy of the weights: policy, reward model and separate critic are adapters, and the reference
  is the body without them, into which the adapter of fine-tuning is merged.
- Scores of a reward model are shifted and scaled to mean 0 and standard deviation 1 on responses of the reference.
"""

import contextlib
import copy
import inspect
import json
import logging
import math
import os
import random
import runpy
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import numpy as np
import peft
import tokenizers
import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Args:
    """RLHF: supervised fine-tuning, reward model, PPO. The defaults are for made-up reviews and a small new model."""

    model: str = "embedded"  # causal LM, hub id or folder; embedded: a small new one, whose tokens are words
    dataset: str | None = None  # rows: a .jsonl, .json or .parquet file, or a hub id; default: made-up reviews
    dataset_split: str = "train"  # of a data set, such as test or train[:1000]
    reward_model: str | None = None  # sequence classifier with one label, hub id or folder, instead of the second stage
    reward_fn: str | None = None  # FILE.py:NAME of a function (prompts, responses, **columns), instead of that stage
    seed: int = 1  # of data, weights, samples and shuffling
    max_prompt_length: int = 64  # rows whose prompt has more tokens are left out
    response_length: int = 40  # responses are cut off after this many tokens
    temperature: float = 1.0  # divides the logits wherever PPO samples or scores a response
    sft_steps: int = 250  # of supervised fine-tuning; 0 for a model that has had it
    sft_batch_size: int = 32  # responses per step
    sft_learning_rate: float = 3e-3  # Adam's step size at the start, lowered linearly to 0; pretrained: 1e-5, LoRA 1e-4
    num_feedback: int = 3000  # pairs of made-up reviews that simulated people compare
    reward_steps: int = 120  # of training the reward model
    reward_batch_size: int = 32  # comparisons or ratings per step
    reward_learning_rate: float = 1e-3  # as for fine-tuning

    total_episodes: int = 4096  # length of PPO in responses
    batch_size: int = 64  # responses per iteration, sampled together
    num_minibatches: int = 2  # per pass
    micro_batch_size: int = 16  # responses that a model reads at once, parts of a minibatch; fewer need less memory
    update_epochs: int = 2  # passes over each iteration's responses
    learning_rate: float = 5e-4  # Adam's step size at the start; a pretrained model wants far less: 1e-6, LoRA 1e-5
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    kl_coef: float = 0.07  # beta: what a nat of KL divergence from the reference costs
    kl_estimator: Literal["k1", "k3"] = "k1"  # of this divergence: in the reward k1 is unbiased, k3 never negative
    kl_target: float | None = None  # nats per response to which beta is adapted (Ziegler et al., section 2.2)
    kl_horizon: int = 500  # episodes in which beta changes by a fifth, at most; Ziegler et al. take 10,000
    missing_eos_penalty: float = 1.0  # taken off the score of a response that was cut off
    whiten_rewards: bool = False  # scale the rewards of an iteration's tokens to a standard deviation of 1
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's body, or a model of its own
    gamma: float = 1.0  # discount factor per token
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon of the clipped objective, and of the clipped value loss
    clip_vloss: bool = True  # clip the value loss
    vf_coef: float = 0.1  # coefficient of the value loss
    max_grad_norm: float = 1.0  # the gradient of all that is trained together is clipped to this norm
    lora_rank: int = 0  # of adapters on a frozen body that all models share; 0: each model has all weights of its own
    lora_alpha: float = 32.0  # what an adapter adds is multiplied by alpha / rank
    bf16: bool = False  # compute in bfloat16; what is trained stays float32, the frozen body of LoRA is bfloat16
    gradient_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    eval_samples: int = 500  # responses to held-out prompts, at most, by which policy and reference are compared
    run_dir: str | None = None  # folder for all that the run leaves; default: runs/<task>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on from, with its flags unless given anew; before PPO a stage restarts
    checkpoint_interval: int = 10  # iterations of PPO between checkpoints
    play: str | None = None  # respond to --prompt with the policy of this run folder, with its flags unless given anew
    prompt: str = "the soup was"  # play: a text, or a JSON list of messages
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the models are


# ------------------------------------------------------------------------------------------------------------ models


class Example(NamedTuple):
    """A prompt, and perhaps a response. A response ends with the end token, unless it was cut off."""

    prompt: str | list[dict]  # a text, or messages {"role", "content"}
    text: str  # of the prompt, as a chat template makes it of messages
    tokens: list[int]  # of the prompt
    response: list[int]  # tokens, from the data or sampled; of a comparison those of the chosen one
    rejected: list[int]  # tokens of the other one
    rating: float | None
    columns: dict  # the row that all this is from, but for the prompt


class Model:
    """A transformer at work: policy, reference, reward model or critic. With LoRA they share a body, `lm`, and differ
    in the adapter that is switched on. The scalar head is for scores or values: the shared critic is the policy's."""

    def __init__(self, lm: transformers.PreTrainedModel, tokenizer: Tokenizer, args: Args, adapter: str | None = None):
        self.lm, self.tokenizer, self.args, self.adapter = lm, tokenizer, args, adapter
        self.pad_id, self.end_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        if args.lora_rank:  # what an adapter is
            self.lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear")
        self.head = nn.Linear(lm.config.hidden_size, 1, bias=False, device=args.device)
        nn.init.zeros_(self.head.weight)

    def branch(self, name: str, folder: Path | None = None) -> "Model":
        """A model to train, a copy or (LoRA) an adapter, that starts as this one or as the reward model in a folder."""
        args = self.args
        if not args.lora_rank:
            return load_model(folder, args, is_scalar=True) if folder else copy.deepcopy(self)
        with warnings.catch_warnings(action="ignore"):  # it has an adapter already
            if folder:
                self.lm.load_adapter(str(folder), name)
            else:
                self.lm.add_adapter(self.lora, name)
        model = Model(self.lm, self.tokenizer, args, name)
        for weight in model.parameters():
            weight.data = weight.data.float()  # what is trained is not rounded, whatever it sits on
        if folder:
            saved = peft.load_peft_weights(str(folder), args.device)
            model.head.weight.data.copy_(saved["base_model.model.score.weight"])
        return model

    def parameters(self) -> list[nn.Parameter]:
        """What training changes: the weights of the adapter, or all of them, and the head."""
        weights = [p for name, p in self.lm.named_parameters() if not self.adapter or f".{self.adapter}." in name]
        return [*weights, self.head.weight]

    def pad(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Tokens (B, P + L), prompts padded on the left and responses on the right; and the responses' mask (B, L)."""
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_value=self.pad_id)
        prompts = pad([torch.tensor(x.tokens) for x in examples], padding_side="left")  # (B, P)
        responses = pad([torch.tensor(x.response, dtype=torch.long) for x in examples])  # (B, L)
        tokens = torch.cat([prompts, responses], 1).to(self.args.device)
        return tokens, tokens[:, prompts.shape[1] :] != self.pad_id

    def run(self, module: Callable, tokens: Tensor, **options):
        """What `lm`, or a part of it, makes of tokens (B, T). Padding, on either side, moves no position."""
        for layer in self.lm.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.enable_adapters(self.adapter is not None)
                if self.adapter:
                    layer.set_adapter(self.adapter)  # gradients reach this one alone from now on
        mask = (tokens != self.pad_id).long()  # (B, T)
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.bf16):
            return module(tokens, attention_mask=mask, position_ids=mask.cumsum(-1) - mask, **options)

    def log_probs(self, examples: list[Example], temperature: float) -> tuple[Tensor, Tensor]:
        """Of the tokens of responses: log-probs (B, L), and what the head says before each (B, L); 0 in padding."""
        tokens, mask = self.pad(examples)  # (B, P + L), (B, L)
        length = mask.shape[1]
        output = self.run(self.lm, tokens, logits_to_keep=length + 1, output_hidden_states=True)
        logits = output.logits[:, :-1].float() / temperature  # (B, L, V), each of the next token
        logits[..., self.pad_id] = -1e9  # which is never sampled
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, -length:, None]).squeeze(-1)  # (B, L)
        hidden = output.hidden_states[-1][:, -length - 1 : -1]  # (B, L, H)
        return log_probs.masked_fill(~mask, 0), self.head(hidden.float()).squeeze(-1).masked_fill(~mask, 0)

    def values(self, examples: list[Example]) -> Tensor:
        """What the head says (B, L + 1) before each token of responses and after the last."""
        tokens, mask = self.pad(examples)  # (B, P + L), (B, L)
        hidden = self.run(self.lm.base_model, tokens).last_hidden_state[:, -mask.shape[1] - 1 :]  # (B, L + 1, H)
        return self.head(hidden.float()).squeeze(-1)

    def scores(self, examples: list[Example]) -> Tensor:
        """Scores (B,) of responses: what the head says after their last token."""
        return self.values(examples)[range(len(examples)), [len(x.response) for x in examples]]

    @torch.no_grad()
    def generate(self, examples: list[Example], heat: float = 1.0) -> list[Example]:
        """The examples with responses that are sampled at `heat` times the temperature."""
        self.lm.eval()  # in training --gradient-checkpointing allows no cache
        sampled = []
        for part in split(examples, self.args.batch_size):
            tokens, _ = self.pad([x._replace(response=[]) for x in part])  # (B, P)
            texts = self.run(self.lm.generate, tokens, temperature=heat * self.args.temperature)  # (B, P + L)
            for x, row in zip(part, texts[:, tokens.shape[1] :].tolist()):
                sampled.append(x._replace(response=[token for token in row if token != self.pad_id]))
        self.lm.train()
        return sampled


# ------------------------------------------------------------------------------------- stages 1 and 2, before PPO


def process() -> tuple[int, int]:
    """Which of the processes that torchrun started this is, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_over_ranks(tensors: list[Tensor], weight: float) -> None:
    """Replaces each tensor by its mean over all processes that torchrun started, in which this one has that weight."""
    if dist.is_initialized():
        weights = torch.ones(1, device=tensors[0].device)
        vector = nn.utils.parameters_to_vector([*tensors, weights]) * weight
        dist.all_reduce(vector)  # now the sum over all processes
        nn.utils.vector_to_parameters(vector[:-1] / vector[-1], tensors)


def optimizer_step(optimizer: torch.optim.Optimizer, count: int, args: Args) -> Tensor:
    """A step along the mean gradient of count losses, of whose sum .grad is the gradient. Returns its norm."""
    parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    for p in parameters:
        p.grad /= count
    average_over_ranks([p.grad for p in parameters], count)
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    if not grad_norm.isfinite():
        raise FloatingPointError("the gradient is not finite: a learning rate is too large, or a score is not finite")
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def fit(model: Model, losses: Callable, examples: list[Example], stage: str) -> None:
    """Minimises the mean of the losses of examples with Adam, as the flags of the stage say: sft or reward."""
    args, (rank, _) = model.args, process()
    if args.resume and rank == 0:
        print(f"the {stage} stage was not finished: it starts from its beginning")
    steps, batch_size = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_batch_size")
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5, fused=True)
    progress = tqdm(range(steps), stage, disable=rank > 0)
    for step in progress:
        batch = in_order(examples, step * batch_size, batch_size, args.seed)
        batch.sort(key=lambda x: len(x.response))  # for little padding
        total, count = 0.0, 0
        for part in split(batch, args.micro_batch_size):
            part_losses = losses(model, part)
            part_losses.sum().backward()
            total += part_losses.sum().item()
            count += len(part_losses)
        optimizer.param_groups[0]["lr"] = getattr(args, f"{stage}_learning_rate") * (1 - step / steps)
        optimizer_step(optimizer, count, args)
        progress.set_postfix_str(f"loss {total / count:.3f}")


def sft_losses(policy: Model, examples: list[Example]) -> Tensor:
    """Negative log-probs (M,) of the tokens of responses."""
    log_probs, _ = policy.log_probs(examples, temperature=1.0)  # (B, L)
    return -log_probs[policy.pad(examples)[1]]


def fine_tune(examples: list[Example], tokenizer: Tokenizer, folder: Path, args: Args) -> None:
    """Stage 1: fits --model to the (chosen) responses, and leaves it in the folder."""
    torch.manual_seed(args.seed)
    policy = load_model(args.model, args, tokenizer)
    if args.lora_rank and args.model != "embedded":  # which has yet to learn everything
        policy.adapter = "sft"
        adapted = peft.get_peft_model(policy.lm, policy.lora, policy.adapter)
        fit(policy, sft_losses, examples, "sft")
        policy.lm, policy.adapter = adapted.merge_and_unload(), None
    else:
        fit(policy, sft_losses, examples, "sft")
    save_model(folder, policy)


def reward_losses(model: Model, examples: list[Example]) -> Tensor:
    """Losses (B,): half the squared error of ratings, or -log sigma(r_chosen - r_rejected) (InstructGPT, eq. 1)."""
    scores = model.scores(examples)
    if examples[0].rating is not None:
        return 0.5 * (scores - scores.new_tensor([x.rating for x in examples])).square()
    return -functional.logsigmoid(scores - model.scores([x._replace(response=x.rejected) for x in examples]))


def train_reward_model(source: str | Path, examples: list[Example], folder: Path, args: Args) -> None:
    """Stage 2: fits a model that starts as the one in source to comparisons or ratings, and leaves it in the folder."""
    torch.manual_seed(args.seed)
    model = load_model(source, args)
    if args.dataset is None:
        examples = ask_people(model, examples, args)
    if examples[0].rating is not None:  # mean 0 and standard deviation 1 are easy to learn
        ratings = [x.rating for x in examples]
        mean, std = np.mean(ratings), np.std(ratings) or 1.0
        examples = [x._replace(rating=(x.rating - mean) / std) for x in examples]
    model = model.branch("reward")
    nn.init.normal_(model.head.weight, std=1 / math.sqrt(model.head.in_features + 1))
    fit(model, reward_losses, examples, "reward")
    save_model(folder, model, is_scalar=True)


# -------------------------------------------------------------------------------------------------------- stage 3, PPO


def token_rewards(scores: Tensor, ref_kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, L) of tokens: the last one of a response earns the score (B,), and each pays for its KL estimate.
    With log pi - log pi_ref (k1) as ref_kl, (B, L) and 0 outside the mask (B, L), the sum over a response has the mean
    E[score] - kl_coef KL(pi || pi_ref) (Ziegler et al., eq. 2)."""
    is_last = functional.one_hot(mask.sum(-1) - 1, mask.shape[1])  # (B, L)
    return is_last * scores[:, None] - kl_coef * ref_kl


def masked_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (B, L) (GAE paper, eq. 16), 0 outside the mask.

    rewards: (B, L), of each token. values: (B, L), of the text before it. mask: (B, L), true on the tokens of a
    response, which come first in their row. The last one ends it, cut off or not: the value after it is 0.
    """
    next_values = functional.pad((values * mask)[:, 1:], (0, 1))  # (B, L)
    deltas = (rewards + gamma * next_values - values) * mask  # TD errors
    advantages, advantage = torch.zeros_like(deltas), 0.0
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * gae_lambda * advantage
        advantages[:, t] = advantage
    return advantages


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the numbers x (M,) of all processes."""
    mean = x.mean()
    average_over_ranks([mean], len(x))
    variance = (x - mean).square().mean()
    average_over_ranks([variance], len(x))
    return mean, variance.sqrt()


class Batch(NamedTuple):
    """A micro-batch of responses, and what policy and critic said of their tokens before the update."""

    examples: list[Example]  # B prompts and responses
    mask: Tensor  # (B, L), true on the M tokens of the responses
    log_probs: Tensor  # (B, L)
    values: Tensor  # (B, L), before each token
    advantages: Tensor  # (B, L)
    returns: Tensor  # (B, L), the targets of the critic


@torch.no_grad()
def rollout(
    policy: Model, critic: Model, reference: Model, reward: "Reward", prompts: list[Example], kl_coef: float, args: Args
) -> tuple[list[Batch], dict[str, Tensor]]:
    """Responses to the prompts as micro-batches for the update, and metrics, which are means over the responses."""
    # 1. Rollout. Sorted by length, responses need little padding in their micro-batches.
    responses = sorted(policy.generate(prompts), key=lambda x: len(x.response))
    has_ended = torch.tensor([x.response[-1] == policy.end_id for x in responses], device=args.device)  # (B,)
    scores = reward(responses) - args.missing_eos_penalty * ~has_ended  # (B,)

    # 2. Advantages. The models read micro-batches, each padded to the length of its own longest response.
    lengths = torch.tensor([len(x.response) for x in responses], device=args.device)  # (B,)
    mask = torch.arange(lengths.max(), device=args.device) < lengths[:, None]  # (B, L)
    log_probs, ref_log_probs, values = torch.zeros(3, *mask.shape, device=args.device)  # (B, L) each
    parts = []  # rows and columns of the micro-batches
    for start in range(0, len(responses), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        part = rows, slice(0, lengths[rows].max())
        log_probs[part], values[part] = policy.log_probs(responses[rows], args.temperature)
        if args.critic == "separate":
            values[part] = critic.values(responses[rows])[:, :-1]
        ref_log_probs[part], _ = reference.log_probs(responses[rows], args.temperature)
        parts.append(part)
    ref_kl = log_probs - ref_log_probs  # (B, L), k1: 0 outside the mask; its mean is KL(pi || pi_ref)
    kl = ref_kl.sum(-1)  # (B,), of responses
    if args.kl_estimator == "k3":  # which has this mean, too
        ref_kl += (-ref_kl).exp() - 1
    rewards = token_rewards(scores, ref_kl, mask, kl_coef)  # (B, L)
    metrics = {"objective/scores": scores.mean(), "objective/rlhf_reward": rewards.sum(-1).mean()}
    if args.whiten_rewards:
        mean, std = moments(rewards[mask])
        rewards = ((rewards - mean) / (std + 1e-8) + mean) * mask
    gae = masked_gae(rewards, values, mask, args.gamma, args.gae_lambda)  # (B, L)
    returns = gae + values  # (B, L)
    mean, std = moments(gae[mask])
    advantages = (gae - mean) / (std + 1e-8)  # (B, L)
    columns = mask, log_probs, values, advantages, returns
    batches = [Batch(responses[part[0]], *(column[part] for column in columns)) for part in parts]

    metrics |= {"objective/kl": kl.mean(), "objective/entropy": -log_probs.sum(-1).mean()}  # both estimated
    metrics |= {"objective/eos_rate": has_ended.float().mean(), "objective/response_length": lengths.float().mean()}
    metrics["val/explained_variance"] = 1 - (std / moments(returns[mask])[1]).square()  # as gae = returns - values
    if args.dataset is None:
        metrics["objective/gold"] = torch.tensor(gold_scores(responses, policy.tokenizer), device=args.device).mean()
    average_over_ranks([*metrics.values()], len(responses))
    return batches, metrics


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new), in nats, estimated from log(new / old probability) (B,) of actions that the old policy took: the
    mean of r - 1 - log r, which is unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    return (log_ratio.expm1() - log_ratio).mean()


def ppo_loss(policy: Model, critic: Model, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch, and figures for the log: sums over its tokens, to be divided by those of the minibatch."""
    log_probs, values = policy.log_probs(batch.examples, args.temperature)  # (B, L) each
    log_ratio = (log_probs - batch.log_probs)[batch.mask]  # (M,)
    ratio = log_ratio.exp()  # new / old probability of the token
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantages = batch.advantages[batch.mask]
    # The lesser (PPO paper, eq. 7): changes beyond the clip gain nothing, but may cost.
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).sum()
    if args.critic == "separate":
        policy_loss.backward()  # now: the critic's pass switches adapters. Other terms of the policy belong above
        policy_loss = policy_loss.detach()
        values = critic.values(batch.examples)[:, :-1]  # (B, L)
    squared_errors = (values - batch.returns).square()  # (B, L)
    if args.clip_vloss:
        clipped_values = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        squared_errors = torch.max(squared_errors, (clipped_values - batch.returns).square())
    value_loss = 0.5 * squared_errors[batch.mask].sum()
    figures = {"loss/policy_avg": policy_loss, "loss/value_avg": value_loss}
    figures |= {"policy/approxkl_avg": approximate_kl(log_ratio) * len(ratio), "val/ratio": ratio.sum()}
    figures |= {"policy/clipfrac_avg": (ratio != clipped_ratio).sum(), "val/ratio_var": (ratio - 1).square().sum()}
    loss = policy_loss + args.vf_coef * value_loss
    return loss, {name: figure.detach() for name, figure in figures.items()}


def update(policy: Model, critic: Model, batches: list[Batch], optimizer: torch.optim.Adam, args: Args) -> dict:
    """Trains policy and critic. Returns the figures of ppo_loss, means over the tokens of all steps."""
    # 3. Update: a step for each minibatch. Micro-batches stay as they are: in others the first ratio would not be 1
    sums, total_count, grad_norms = {}, 0, []
    for _ in range(args.update_epochs):
        for minibatch in torch.randperm(len(batches)).chunk(args.num_minibatches):
            count = sum(batches[i].mask.sum().item() for i in minibatch)
            for i in minibatch:
                loss, figures = ppo_loss(policy, critic, batches[i], args)
                if not sums and not figures["val/ratio_var"] < 1e-12 * count:
                    raise FloatingPointError("ratio is not 1 before the first step: a model has dropout or noise")
                loss.backward()
                for name, figure in figures.items():
                    sums[name] = sums.get(name, 0) + figure
            grad_norms.append(optimizer_step(optimizer, count, args))
            total_count += count
    means = {name: total / total_count for name, total in sums.items()}
    average_over_ranks([*means.values()], total_count)
    return means | {"loss/grad_norm": torch.stack(grad_norms).mean()}


def train(args: Args, run_dir: Path) -> dict[str, float]:
    """The three stages, of which 1 and 2 are skipped where their folder is there. Returns figures for the summary."""
    start_time, (rank, _) = time.perf_counter(), process()
    iteration, global_step, kl_coef, seconds = 0, 0, args.kl_coef, 0.0  # global_step counts responses
    has_checkpoint = (run_dir / "checkpoint.pt").exists()
    if has_checkpoint:
        iteration, global_step, kl_coef, seconds = load(run_dir / "checkpoint.pt")["progress"]
        start_time -= seconds
    examples, tokenizer = load_examples(args)
    examples, held_out = hold_out(examples, args.seed)
    reward = Reward(tokenizer, args)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(run_dir, args, iteration, global_step)

    # Stages 1 and 2. A folder appears when its stage is finished, and tells a resumed run to go on behind it.
    source, reward_folder = args.model, run_dir / "reward_model"
    is_adapter = args.lora_rank and Path(args.model, "adapter_config.json").exists()
    if args.sft_steps or is_adapter:  # which 0 steps merge into the one body
        source = run_dir / "sft"
        if not source.exists():
            fine_tune(examples, tokenizer, source, args)
    if not (args.reward_model or args.reward_fn or reward_folder.exists()):
        train_reward_model(source, examples, reward_folder, args)

    # Stage 3, PPO. Policy and reference start as the same model.
    reference = load_model(source, args)
    torch.manual_seed(args.seed)  # the same new weights in all processes
    policy = reference.branch("policy")
    before = reference.generate(held_out[: args.eval_samples])  # what the policy is compared with
    critic = policy  # by its head
    is_trained = reward_folder.exists()
    if args.critic == "separate":  # it starts as the reward model, which knows what is worth how much, but says 0
        critic = reference.branch("critic", reward_folder if is_trained else None)
        nn.init.zeros_(critic.head.weight)
    if is_trained:
        reward.model = reference.branch("reward", reward_folder)
    if not args.reward_fn:
        scores = reward(before)
        reward.mean, reward.std = scores.mean(), scores.std().nan_to_num() or 1.0
    parameters = nn.ParameterList(dict.fromkeys([*policy.parameters(), *critic.parameters()]))  # each of them once
    optimizer = torch.optim.Adam(parameters, eps=1e-5, fused=True)
    if has_checkpoint:
        load(run_dir / "checkpoint.pt", parameters=parameters, optimizer=optimizer)

    def save_run() -> None:
        save_model(run_dir / "policy", policy)
        save_model(run_dir / "critic", critic, is_scalar=True)
        if rank == 0:
            states = {"parameters": parameters.state_dict(), "optimizer": optimizer.state_dict()}
            save(run_dir / "checkpoint.pt", progress=(iteration, global_step, kl_coef, seconds), **states)

    save_run()
    bar = tqdm(total=args.total_episodes, initial=global_step, desc="PPO", disable=rank > 0)

    while global_step < args.total_episodes:
        # All that is random comes from seed and iteration alone: a resumed run goes on as if it had never stopped.
        torch.manual_seed(np.random.SeedSequence((args.seed, iteration)).generate_state(1).item() + rank)
        prompts = in_order(examples, global_step, args.batch_size, args.seed)
        batches, metrics = rollout(policy, critic, reference, reward, prompts, kl_coef, args)
        annealing = 1 - global_step / args.total_episodes if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = annealing * args.learning_rate
        metrics |= update(policy, critic, batches, optimizer, args)

        # 4. Metrics, under TRL's names where it has them; but approxkl is k3, and ratio_var the mean of (ratio - 1)².
        iteration, global_step = iteration + 1, global_step + args.batch_size
        seconds = time.perf_counter() - start_time
        row = {"global_step": global_step, "lr": annealing * args.learning_rate, "objective/kl_coef": kl_coef}
        row |= {name: metric.item() for name, metric in metrics.items()} | {"time/seconds": seconds}
        if args.kl_target:  # Ziegler et al., section 2.2
            error = min(max(row["objective/kl"] / args.kl_target - 1, -0.2), 0.2)
            kl_coef *= 1 + error * args.batch_size / args.kl_horizon
        bar.update(args.batch_size)
        bar.set_postfix_str(f"score {row['objective/scores']:.2f}, KL {row['objective/kl']:.2f}")
        if rank == 0:
            log.write(row)
        if iteration % args.checkpoint_interval == 0:
            save_run()

    bar.close()
    save_run()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return {}
    log.csv.close()
    log.writer.close()
    return {"global_step": global_step, "seconds": seconds} | evaluate(policy, reference, reward, before, run_dir)


@torch.no_grad()
def evaluate(policy: Model, reference: Model, reward: "Reward", before: list[Example], run_dir: Path) -> dict:
    """Compares responses of the policy and the reference to the same prompts. Returns figures for the summary."""
    args = policy.args
    torch.manual_seed(args.seed)
    after, kl = policy.generate(before), 0.0
    for part in split(after, args.micro_batch_size):
        log_probs, _ = policy.log_probs(part, args.temperature)  # (B, L)
        ref_log_probs, _ = reference.log_probs(part, args.temperature)  # (B, L)
        kl += (log_probs - ref_log_probs).sum().item() / len(after)
    samples = {"prompt": [x.text for x in before]}
    for when, examples in (("before", before), ("after", after)):
        samples |= {when: to_texts(examples, policy.tokenizer), f"score_{when}": reward(examples).tolist()}
        samples[f"eos_rate_{when}"] = [x.response[-1] == policy.end_id for x in examples]
        if args.dataset is None:
            samples[f"gold_{when}"] = gold_scores(examples, policy.tokenizer)
    (run_dir / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")
    judge = "score" if args.dataset else "gold"
    gains = np.subtract(samples[f"{judge}_after"], samples[f"{judge}_before"])
    win_rate = (np.sign(gains).mean() + 1) / 2  # a draw is half a win
    for name in ("prompt", "before", "after"):
        print(f"{name}:", *samples[name][:3], sep="\n  ")
    print(f"win rate {win_rate:.1%} by {judge}, KL {kl:.2f} nats per response")
    return {"win_rate": win_rate, "kl": kl} | {name: np.mean(x) for name, x in samples.items() if "_" in name}


# ------------------------------------------------------------------------------------------------------ reward and data


class Reward:
    """What PPO maximises: scores of responses by --reward-fn, --reward-model, or the reward model of stage 2."""

    def __init__(self, tokenizer: Tokenizer, args: Args):
        self.tokenizer, self.args = tokenizer, args  # of the policy
        self.mean, self.std = 0.0, 1.0  # of scores of the reference; train sets them
        self.reads_text = args.reward_model is not None
        if args.reward_fn:
            path, _, name = args.reward_fn.rpartition(":")
            sys.path.append(os.path.dirname(path))  # for what the file imports from beside it
            with user_error_in(f"--reward-fn {args.reward_fn} is no FILE.py:NAME of a function"):
                self.function = runpy.run_path(path)[name]
        if args.reward_model:
            self.model = load_model(args.reward_model, args, is_scalar=True)
            own = self.model.tokenizer
            own.truncation_side = "left"  # where the prompt is
            same_tokens = hasattr(self.model.lm, "score") and own.get_vocab() == tokenizer.get_vocab()
            self.reads_text = not same_tokens or own.model_max_length < args.max_prompt_length + args.response_length

    @torch.no_grad()
    def __call__(self, examples: list[Example]) -> Tensor:
        """Scores (B,). Those of models are on a scale on which the reference's have mean 0 and standard deviation 1."""
        if self.args.reward_fn:
            return self.call_function(examples)
        score = self.score_texts if self.reads_text else self.model.scores
        scores = torch.cat([score(part) for part in split(examples, self.args.micro_batch_size)])
        return (scores - self.mean) / self.std

    def call_function(self, examples: list[Example]) -> Tensor:
        """Scores (B,) by --reward-fn, which gets prompts, responses and those of the rows' columns that it takes."""
        takes = inspect.signature(self.function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        names = (name for name in examples[0].columns if takes_all or name in takes)
        columns = {name: [x.columns[name] for x in examples] for name in names}
        scores = self.function([x.prompt for x in examples], to_texts(examples, self.tokenizer), **columns)
        with user_error_in(f"--reward-fn {self.args.reward_fn} returned something else"):
            scores = torch.tensor([float(score) for score in scores], device=self.args.device)
            if len(scores) != len(examples) or not scores.isfinite().all():
                raise ValueError(f"{len(scores)} scores for {len(examples)} responses, or one is not finite")
        return scores

    def score_texts(self, examples: list[Example]) -> Tensor:
        """Scores (B,) by a model whose tokens are not the policy's."""
        own, answers = self.model.tokenizer, to_texts(examples, self.tokenizer)
        texts = [x.text + answer for x, answer in zip(examples, answers)]
        is_chat = own.chat_template is not None and not isinstance(examples[0].prompt, str)
        if is_chat:
            chats = [[*x.prompt, {"role": "assistant", "content": answer}] for x, answer in zip(examples, answers)]
            texts = own.apply_chat_template(chats, tokenize=False)
        inputs = own(texts, padding=True, truncation=True, add_special_tokens=not is_chat, return_tensors="pt")
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.bf16):
            return self.model.lm(**inputs.to(self.args.device)).logits[:, 0].float()


def split(items: list, size: int) -> list[list]:
    """The items in parts of this size."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def in_order(examples: list[Example], start: int, number: int, seed: int) -> list[Example]:
    """This process's share of the next examples, from the start-th on. Every epoch has all of them in its own order."""
    count, (rank, world_size) = len(examples), process()
    epochs = range(start // count, (start + number - 1) // count + 1)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs])
    return [examples[i] for i in order[start % count :][:number][rank::world_size]]


def hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """The examples without those of a tenth of the prompts, and those; fewer than ten prompts serve as both."""
    prompts = sorted({x.text for x in examples})
    unseen = set(random.Random(seed).sample(prompts, len(prompts) // 10))
    return [x for x in examples if x.text not in unseen], [x for x in examples if x.text in unseen] or examples


def parse_row(row: dict) -> tuple[str | list[dict], list[str], float | None]:
    """Prompt, responses (none, one, or chosen and rejected) and rating of a row. It has a prompt and a response (TRL:
    completion), perhaps with a rating; prompt, chosen and rejected, or these two alone, which begin with the prompt
    (Anthropic HH, UltraFeedback); messages; or a prompt alone. Each is a text or a list of messages."""
    row = {name: value for name, value in row.items() if value is not None}  # None is what `datasets` fills up with
    if "chosen" in row or "rejected" in row:
        answers = [row["chosen"], row["rejected"]]
    else:
        answers = [row[name] for name in ("response", "completion", "messages") if name in row][:1]
    prompt, rating = row.get("prompt"), row.get("rating") if len(answers) == 1 else None
    if answers and isinstance(answers[0], list):  # of messages, of which the last one is the response
        if len(answers) == 1 and answers[0][-1]["role"] == "user":  # they want a response
            return answers[0], [], None
        starts = [messages[:-1] for messages in answers]
        if any(messages[-1]["role"] != "assistant" for messages in answers) or starts[0] != starts[-1]:
            raise ValueError("its messages do not end with the assistant's, or differ before that")
        if isinstance(prompt, list) and starts[0][: len(prompt)] != prompt:  # which they may or may not repeat
            starts[0] = prompt + starts[0]
        prompt, answers = starts[0] or prompt, [messages[-1]["content"] for messages in answers]
    elif prompt is None and len(answers) == 2:  # whole dialogues as text
        both = os.path.commonprefix(answers)  # noqa: RUF071
        start, turn, _ = both.rpartition("\n\nAssistant:")
        prompt = start + turn or both.rpartition(" ")[0]  # without turns, it is whole words
        answers = [answer[len(prompt) :] for answer in answers]
    if not prompt or not isinstance(prompt, str | list) or not all(isinstance(text, str) for text in answers):
        raise ValueError("it has no prompt, or a response that is no text")
    if rating is not None and not math.isfinite(rating):
        raise ValueError(f"its rating is {rating}")
    return prompt, answers, rating


def encode_prompt(prompt: str | list[dict], tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Text and tokens of a prompt, of which a list of messages wants a tokenizer with a chat template."""
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return text, tokenizer.encode(text, add_special_tokens=False)  # the template has them already


def to_texts(examples: list[Example], tokenizer: Tokenizer) -> list[str]:
    """Responses as texts that can follow the prompts: what is between the two, such as a space, is theirs."""
    text = partial(tokenizer.decode, skip_special_tokens=True)
    return [text(x.tokens + x.response)[len(text(x.tokens)) :] for x in examples]


def load_examples(args: Args) -> tuple[list[Example], Tokenizer]:
    """The data as examples of one form, and the tokenizer of --model. Raises UserError."""
    if args.dataset is None:
        rng = random.Random(args.seed)
        rows = [write_review(rng) for _ in range(NUM_REVIEWS)]
    else:
        path = Path(args.dataset).resolve()
        source = {"path": str(path.parent), "data_files": path.name} if path.is_file() else {"path": args.dataset}
        datasets.logging.set_verbosity(logging.CRITICAL)  # it would report what is raised here
        with user_error_in(f"--dataset {args.dataset} cannot be loaded"):
            rows = [*datasets.load_dataset(**source, split=args.dataset_split)]
    if args.model == "embedded":
        tokenizer = make_tokenizer([text for row in rows for text in row.values() if isinstance(text, str)])
    else:
        tokenizer = load_tokenizer(args.model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no end token for responses; set its eos_token")
    examples, forms = [], set()
    for number, row in enumerate(rows):
        with user_error_in(f"row {number} of --dataset {args.dataset}, where the first is row 0"):
            prompt, answers, rating = parse_row(row)
            text, tokens = encode_prompt(prompt, tokenizer)
            forms.add((len(answers), rating is None))
            if len(forms) > 1:
                raise ValueError("it has another form than those before it")
        responses = [[*tokenizer.encode(x, add_special_tokens=False), tokenizer.eos_token_id] for x in answers]
        response, rejected, *_ = [*(x[: args.response_length] for x in responses), [], []]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        if 0 < len(tokens) <= args.max_prompt_length:
            examples.append(Example(prompt, text, tokens, response, rejected, rating, columns))
    if process()[0] == 0 and len(examples) < len(rows):
        print(f"{len(rows) - len(examples)} of {len(rows)} rows are left out, by the length of their prompts")
    if not examples:
        raise UserError(f"--dataset {args.dataset} has no row with a prompt of 1 to --max-prompt-length tokens")
    is_judged = len(answers) == 2 or rating is not None or args.reward_model or args.reward_fn or args.dataset is None
    if not is_judged or (args.sft_steps and not answers):
        raise UserError(f"--dataset {args.dataset} lacks responses (--sft-steps 0) or judgements (give a --reward-fn)")
    return examples, tokenizer


# ----------------------------------------------------------------------------------------------------- models and files


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer whose tokens are the words and punctuation marks of the texts, the 30,000 most frequent of them."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    words.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=[*special.values()]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a hub id or folder, with a padding token that is not the end token. Raises UserError."""
    with user_error_in(f"the tokenizer of {name} cannot be loaded"):
        # As it was saved: AutoTokenizer goes by the model, and makes a Qwen2's of whatever lies beside a Qwen2.
        is_file = Path(name, "tokenizer.json").exists()
        auto_class = transformers.PreTrainedTokenizerFast if is_file else transformers.AutoTokenizer
        tokenizer = auto_class.from_pretrained(name)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def load_model(name: str | Path, args: Args, tokenizer: Tokenizer | None = None, is_scalar: bool = False) -> Model:
    """A causal LM or a classifier with one label, from the hub, a folder or that of an adapter. Raises UserError."""
    auto_class = Classifier if is_scalar else transformers.AutoModelForCausalLM
    tokenizer = tokenizer or load_tokenizer(name)
    adapter = Path(name, "adapter_config.json")
    if name == "embedded":
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, num_labels=1, **sizes)
        lm = auto_class.from_config(config)
    else:
        with user_error_in(f"the model {name} cannot be loaded"):
            base = name
            if adapter.exists():  # trained on what is beside it, if that is there: a run folder may have been moved
                sft = adapter.parent.parent / "sft"
                base = sft if sft.exists() else peft.PeftConfig.from_pretrained(name).base_model_name_or_path
            config = transformers.AutoConfig.from_pretrained(base, num_labels=1)
            config.update({key: 0.0 for key in config.to_dict() if "drop" in key})
            dtype = torch.bfloat16 if args.bf16 and args.lora_rank else torch.float32
            options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}  # others are pickles
            lm, info = auto_class.from_pretrained(base, config=config, **options)
            if info["missing_keys"] and not adapter.exists():
                raise ValueError(f"it lacks weights of a {type(lm).__name__}: {min(info['missing_keys'])}")
    positions = getattr(lm.config, "max_position_embeddings", math.inf)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if not is_scalar and args.max_prompt_length + args.response_length > positions:
        raise UserError(f"--max-prompt-length and --response-length exceed the {positions} positions of {name}")
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer))
    if adapter.exists():
        lm = peft.PeftModel.from_pretrained(lm, name).merge_and_unload()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    lm.config.update(special | {"use_cache": False})
    limits = {"max_new_tokens": args.response_length, "temperature": args.temperature, "top_k": 0, "do_sample": True}
    lm.generation_config = transformers.GenerationConfig(suppress_tokens=[tokenizer.pad_token_id], **special, **limits)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = Model(lm.to(args.device).train(), tokenizer, args)
    if hasattr(lm, "score"):
        model.head = lm.score.float()
    return model


def save_model(folder: Path, model: Model, is_scalar: bool = False) -> None:
    """Saves a model for transformers, or its adapter for PEFT, as a causal LM or (is_scalar) a classifier."""
    if process()[0] == 0:
        part, lm = folder.with_name(folder.name + ".part"), model.lm
        if model.adapter:
            config = copy.copy(lm.peft_config[model.adapter])
            weights = peft.get_peft_model_state_dict(lm, adapter_name=model.adapter, save_embedding_layers=False)
            config.task_type = "CAUSAL_LM"
            if is_scalar:
                config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
                weights["score.weight"] = model.head.weight
            config.save_pretrained(part)
            save_file({f"base_model.model.{key}": x for key, x in weights.items()}, part / "adapter_model.safetensors")
        elif is_scalar:
            with torch.device("meta"):  # without weights of its own
                classifier = Classifier.from_config(lm.config)
            setattr(classifier, classifier.base_model_prefix, lm.base_model)
            classifier.score = model.head
            classifier.save_pretrained(part)
        else:
            lm.save_pretrained(part)
        model.tokenizer.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)  # it appears when it is whole
    if dist.is_initialized():
        dist.barrier()


class UserError(Exception):
    """A mistake in what the user gave. It ends the program with one line."""


@contextlib.contextmanager
def user_error_in(what: str) -> Iterator[None]:
    """Makes a UserError of whatever goes wrong with something that the user gave."""
    try:
        yield
    except Exception as error:  # libraries fail in many ways
        raise UserError(f"{what}: {error.__cause__ or error}") from error


class MetricsLog:
    """config.json, and a row per iteration in metrics.csv and TensorBoard; a resumed run drops what it repeats."""

    def __init__(self, run_dir: Path, args: Args, iteration: int, global_step: int):
        (run_dir / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        path = run_dir / "metrics.csv"
        rows = path.read_text().splitlines(keepends=True)[: 1 + iteration] if iteration else []
        path.write_text("".join(rows))
        self.csv = open(path, "a", buffering=1)  # noqa: SIM115
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)

    def write(self, metrics: dict[str, float]) -> None:
        """Adds a row, whose step is metrics["global_step"]. A kill after this loses nothing of it."""
        if self.csv.tell() == 0:
            print(*metrics, sep=",", file=self.csv)
        print(*metrics.values(), sep=",", file=self.csv)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, metrics["global_step"])
        self.writer.flush()


def save(path: Path, **content) -> None:
    """Writes a file for load. A kill leaves the old file or the new one, never half of one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path: Path, **parts) -> dict:
    """What save wrote. The parts (networks, optimizer) take on the states that it has for them. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content[name])
    except Exception as error:  # torch fails in many ways on bytes that are not its own
        raise UserError(f"{path} is missing, damaged or of other sizes than the flags say: {error}") from error
    return content


def play(args: Args) -> None:
    """Prints a response to --prompt of the policy in a run folder."""
    policy = load_model(Path(args.play, "policy"), args)
    with user_error_in(f"--prompt {args.prompt}"):
        prompt = json.loads(args.prompt) if args.prompt.startswith("[{") else args.prompt
        text, tokens = encode_prompt(prompt, policy.tokenizer)
    torch.manual_seed(args.seed)
    print(text + to_texts(policy.generate([Example(prompt, text, tokens, [], [], None, {})]), policy.tokenizer)[0])


# -------------------------------------------------------------------------------------------------- made-up reviews

NUM_REVIEWS = 5000
THINGS = (
    "soup pasta pizza salad fish bread coffee rice wine cake tea chicken waiter chef host service music menu kitchen"
)
ADJECTIVES = {
    1: "delicious excellent lovely wonderful perfect great superb charming fresh splendid pleasant amazing",
    0: "ordinary average small big usual plain",
    -1: "awful terrible bland cold stale poor dreadful disappointing horrible dull dirty sad",
}
ENDINGS = {1: ("we loved it", "five stars"), 0: ("that is all", "we paid and left"), -1: ("never again", "one star")}


def write_review(rng: random.Random) -> dict[str, str]:
    """A review: statements, most of them of one mind, and an ending that fits. Its first words are the prompt."""
    mind = rng.choices((1, 0, -1), (1, 2, 2))[0]  # what the guest thinks
    words = []
    for i in range(rng.randint(1, 5)):
        sign = rng.choices((mind, 1, 0, -1), (7, 1, 1, 1))[0]
        words += [rng.choice((".", ".", "and", "but"))] if i else []
        words += f"the {rng.choice(THINGS.split())} was {rng.choice(ADJECTIVES[sign].split())}".split()
    words += f". {rng.choice(ENDINGS[mind])} .".split()
    length = rng.randint(2, 6)
    return {"prompt": " ".join(words[:length]), "response": " ".join(words[length:])}


def gold_score(review: str) -> float:
    """What people want, hidden from all that is trained: each word of praise or blame counts 1 or -1, such an ending 1
    more. Off go 1 for each noun or adjective said before, 0.2 for each word beyond 30, and 3 without a full stop."""
    words = review.split()
    signs = {adjective: sign for sign, adjectives in ADJECTIVES.items() for adjective in adjectives.split()}
    sentiment = sum(signs.get(word, 0) for word in words)
    sentiment += sum(sign * any(ending in review for ending in endings) for sign, endings in ENDINGS.items())
    said = [word for word in words if word in signs or word in THINGS.split()]
    repetition = len(said) - len(set(said))
    return sentiment - repetition - 0.2 * max(0, len(words) - 30) - 3 * (words[-1:] != ["."])


def gold_scores(examples: list[Example], tokenizer: Tokenizer) -> list[float]:
    """Gold scores of reviews."""
    return [gold_score(x.text + text) for x, text in zip(examples, to_texts(examples, tokenizer))]


def ask_people(model: Model, examples: list[Example], args: Args) -> list[Example]:
    """Comparisons by simulated people. The hotter samples show what PPO may try: mistakes that are rare."""
    rng, judged = random.Random(args.seed), []
    prompts = rng.choices(examples, k=args.num_feedback)
    for chosen, rejected in zip(model.generate(prompts), model.generate(prompts, heat=1.5)):
        gold_chosen, gold_rejected = gold_scores([chosen, rejected], model.tokenizer)
        if rng.random() > 1 / (1 + math.exp((gold_rejected - gold_chosen) / 0.5)):  # Bradley-Terry
            chosen, rejected = rejected, chosen
        judged.append(chosen._replace(rejected=rejected.response))
    return judged


def main() -> None:
    """Trains and evaluates, or only responds, as the flags say. Raises UserError."""
    args = tyro.cli(Args)
    if (args.run_dir, args.resume, args.play).count(None) < 2:
        raise UserError("give only one of --run-dir, --resume and --play")
    earlier_run, before = args.resume or args.play, Args()
    if earlier_run:  # its flags, but for those that are given now
        config = Path(earlier_run, "config.json")
        with user_error_in(f"{config} is missing, damaged or of another script"):
            before = Args(**json.loads(config.read_text()))
        args = tyro.cli(Args, default=before)
    has_reward = args.reward_model or args.reward_fn
    unused = "prompt num_feedback " if args.dataset or has_reward else "prompt "
    unused += "reward_steps reward_batch_size reward_learning_rate " if has_reward else ""
    unused += "sft_batch_size sft_learning_rate " if args.sft_steps == 0 else ""
    unused += "lora_alpha " if args.lora_rank == 0 else ""
    unused += "dataset_split " if args.dataset is None else ""
    unused += "kl_horizon " if args.kl_target is None else ""
    names = [*vars(args)]
    if earlier_run:  # stages 1 and 2 are over, and their models are what those of PPO are made of
        unused += " ".join(names[: names.index("total_episodes")])
        unused += " critic lora_rank lora_alpha kl_coef batch_size eval_samples"
    if args.play:
        used = "seed response_length temperature bf16 device prompt run_dir resume play"
        unused = " ".join(name for name in names if name not in used.split())
    for name in unused.split():
        if getattr(args, name) != getattr(before, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with the other flags, or so late in a run")
    above_0 = "response_length temperature sft_batch_size num_feedback reward_batch_size total_episodes batch_size"
    above_0 += " num_minibatches micro_batch_size update_epochs learning_rate max_grad_norm checkpoint_interval"
    for name in f"{above_0} clip_coef eval_samples reward_steps kl_horizon kl_target".split():
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    multiple = args.num_minibatches * args.micro_batch_size * world_size
    fits = args.batch_size % multiple == 0 and min(args.sft_batch_size, args.reward_batch_size) >= world_size
    mistakes = {
        f"--batch-size must be a multiple of minibatches × micro-batch × processes, {multiple}": not fits,
        "--total-episodes must be a multiple of --batch-size": args.total_episodes % args.batch_size,
        "--reward-fn excludes --reward-model": args.reward_model and args.reward_fn,
        "--seed, --lora-rank, --sft-steps must be at least 0": min(args.seed, args.lora_rank, args.sft_steps) < 0,
        "--kl-target adapts --kl-coef by factors, and 0 stays 0": args.kl_target and args.kl_coef == 0,
        "--sft-steps 0 is for a --model that can write": args.model == "embedded" and args.sft_steps == 0,
        f"--device {args.device}: PyTorch sees no GPU": "cuda" in args.device and not torch.cuda.is_available(),
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            raise UserError(mistake)
    transformers.logging.set_verbosity_error()  # it would report what is raised here
    transformers.logging.disable_progress_bar()
    if args.model == "embedded":
        torch.set_num_threads(1)  # more only slow networks of this size down
    if args.play:
        return play(args)
    run_name = f"{Path(args.dataset or 'reviews').stem}__{Path(__file__).stem}__{args.seed}"
    run_dirs = [earlier_run or args.run_dir or f"runs/{run_name}__{time.strftime('%Y%m%d-%H%M%S')}"]
    if world_size > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        dist.broadcast_object_list(run_dirs)  # the time may differ
    run_dir = Path(run_dirs[0])
    if not earlier_run and rank == 0 and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} holds a run: give another --run-dir, or --resume it")
    summary = train(args, run_dir)
    if rank == 0:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"saved in {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
