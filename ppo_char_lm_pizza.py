# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib==3.11.2", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.16"]
# ///
"""PPO on a character-level language model: asked what ravin likes, it learns to say pizza.

    python ppo_char_lm_pizza.py --run-dir runs/pizza        # pizza: 12 % before PPO, 99 % after it, in 15 s on a CPU
    python ppo_char_lm_pizza.py --play runs/pizza/policy_episode_100.pt     # samples from a policy saved on the way
    python ppo_char_lm_pizza.py --pretrained runs/pizza/pretrained.pt --prompt "mira likes " --target salad
    python ppo_char_lm_pizza.py --resume runs/pizza         # goes on from the last checkpoint of a run that was stopped

An episode is one completion of the prompt; its actions are tokens, one for each character. Four things take part: the
policy, a small transformer; the reference, a copy of it that stays as it was pretrained; the critic, one more copy with
a single output; and the reward, a function.

PPO repeats these four steps, numbered likewise in `train`:
1. Rollout: the policy completes the prompt B times.
2. Advantages: the last token of a completion earns the reward, and each token pays for being likelier to the policy
   than to the reference (`token_rewards`). How much better than the critic expected did it turn out? (`masked_gae`)
3. Update: in several steps on these completions, good tokens become likelier and bad ones less likely; beyond a factor
   of 1 ± epsilon there is nothing to gain (`ppo_loss`). The critic learns what to expect. Then the data is thrown away.
4. Metrics, and now and then a checkpoint.
To change the reward edit `external_reward`, the networks `Transformer`, the loss `ppo_loss`. The rest is files, and how
near the result is to the best of all policies (`optimal_objective`).

Shapes: B completions of up to L tokens, M tokens in all of them, a prompt of P tokens, V tokens to choose from; within
the transformer T tokens of a text, W numbers for each, H heads.
Sources: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, fine-tuning with a KL penalty
(Ziegler et al.) https://arxiv.org/abs/1909.08593, KL estimates http://joschu.net/blog/kl-approx.html.

Where this differs from cleanllm's notebook "Proximal Policy Optimization", which came to 81 % pizza:
- A completion pays for the sum of its tokens' KL, which is ln 8 = 2.1 nats if all say pizza, like one in 8 before. The
  notebook logs 3.9 for each of 6, eleven times as much, which no policy has to pay, and charges it: its total reward
  of 1.67 is 4 - 0.1 · 6 · 3.88. With beta eleven times as large (--kl-beta 1.1), the best policy says 84 % pizza.
- There is no dropout: policy and reference would differ at random. The critic starts with the pretrained weights and
  values of 0, not at random. Rewards are not clipped.
- An update learns from 20 completions in 4 steps, not from one in one. The notebook's settings get as far here:
  --batch-size 1 --update-epochs 1 --learning-rate 1e-4 --critic-learning-rate 1e-4 --no-anneal-lr
"""

import copy
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO on a character-level language model. The defaults make ravin like pizza."""

    prompt: str = "ravin likes "  # what is completed; letters a to z and spaces
    target: str = "pizza"  # a completion that ends in this earns the reward
    reward: float = 4.0  # what such a completion earns
    kl_beta: float = 0.1  # beta: what a nat of KL(policy || reference) costs
    seed: int = 1  # of weights and sampling
    episodes: int = 300  # length of the training in completions
    batch_size: int = 20  # completions per iteration, B
    response_length: int = 20  # completions are cut off after this many characters, L
    update_epochs: int = 4  # steps on each batch
    learning_rate: float = 3e-4  # Adam's step size for the policy at the start
    critic_learning_rate: float = 1.5e-3  # Adam's step size for the critic at the start
    anneal_lr: bool = True  # lower both learning rates linearly to 0
    gamma: float = 1.0  # discount factor per character
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation; at 1 the critic learns what was earned
    clip_coef: float = 0.2  # epsilon of the clipped objective
    max_grad_norm: float = 1.0  # the gradients of policy and critic are clipped to this norm, each by itself
    pretrained: str | None = None  # start from the model in this file (pretrained.pt) or run folder (its policy.pt)
    pretrain_steps: int = 200  # steps of pretraining, unless --pretrained is given
    run_dir: str | None = None  # folder for all that the run leaves; default: runs/<target>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on from, with its flags unless given anew
    checkpoint_interval: int = 5  # iterations between checkpoints
    eval_samples: int = 1000  # completions that measure the policy before and after PPO, and with --play
    play: str | None = None  # sample from this run folder's policy, or one of its files, with its flags unless given
    device: str = "cpu"  # for networks this small a CPU is as good as a GPU


# -------------------------------------------------------------------------------------------------------------- text

CHARACTERS = "PE? abcdefghijklmnopqrstuvwxyz"  # a token is a place in here: P starts a text, E ends it, ? is unused
END = CHARACTERS.index("E")
CONTEXT_LENGTH = 48  # tokens of the longest text that the networks can read


def encode(text: str) -> Tensor:
    """The tokens (T,) of a text."""
    return torch.tensor([CHARACTERS.index(character) for character in text])


def decode(tokens: Tensor) -> list[str]:
    """The texts of tokens (B, L), each up to its first E and with it."""
    texts = ["".join(CHARACTERS[token] for token in row) for row in tokens.tolist()]
    return [re.sub("E.*", "E", text) for text in texts]


def until_end(tokens: Tensor) -> Tensor:
    """Mask of tokens (B, L): true up to the first E of a row and on it."""
    is_end = (tokens == END).int()
    return is_end.cumsum(-1) - is_end == 0  # there is no E before it


# ---------------------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """A layer of a transformer: causal self-attention, in which each token looks at those before it, then an MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, W), a vector for each token of B texts. The result has the same shape."""
        projected = self.queries_keys_values(self.attention_norm(x))  # (B, T, 3 W)
        heads = projected.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)  # (B, H, 3, T, W / H)
        queries, keys, values = heads.unbind(2)  # (B, H, T, W / H) each
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (B, H, T, W / H)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A transformer in GPT-2's layout. With V outputs it is a language model, which is a policy; with one, a critic."""

    def __init__(self, outputs: int, width: int = 64, num_blocks: int = 2, num_heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Embedding(CONTEXT_LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs (B, T, outputs) for texts (B, T). Those at a token depend on it and on what stands before it."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]  # (B, T, W)
        return self.head(self.norm(self.blocks(x)))


def outputs_before(network: Transformer, prompt: Tensor, completions: Tensor) -> Tensor:
    """A network's outputs (B, L, outputs) before each token of completions (B, L): logits for it, or values."""
    tokens = torch.cat([prompt.expand(len(completions), -1), completions], 1)  # (B, P + L)
    outputs = network(tokens[:, :-1])  # (B, P + L - 1, outputs), of which each is about the next token
    return outputs[:, len(prompt) - 1 :]


def evaluate_tokens(policy: Transformer, prompt: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs (B, L) of the tokens of completions (B, L), and entropies (B, L) of what they were drawn from."""
    log_probs = outputs_before(policy, prompt, completions).log_softmax(-1)  # (B, L, V), of all tokens
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, completions[..., None]).squeeze(-1), entropies


@torch.no_grad()
def sample_completions(policy: Transformer, prompt: Tensor, count: int, max_length: int) -> Tensor:
    """Samples completions (count, L) of a prompt (P,). What stands behind the first E of a row is to be ignored."""
    tokens = prompt.expand(count, -1)  # (count, P), and wider by 1 after each step
    for _ in range(max_length):  # a key-value cache would make this faster, but harder to read
        logits = policy(tokens)[:, -1]  # (count, V); the largest of logits + Gumbel noise is a sample of their softmax
        next_tokens = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)  # (count,)
        tokens = torch.cat([tokens, next_tokens[:, None]], 1)
        if (tokens == END).any(1).all():
            break
    return tokens[:, len(prompt) :]


# --------------------------------------------------------------------------------------------------------- algorithm


def external_reward(text: str, args: Args) -> float:
    """What a completion earns: all or nothing, as the figures of `evaluate` expect."""
    return args.reward if text.endswith(args.target + "E") else 0.0


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


class Batch(NamedTuple):
    """Completions, and what policy and critic said of their M tokens before the update."""

    completions: Tensor  # (B, L)
    mask: Tensor  # (B, L), true on the M tokens
    log_probs: Tensor  # (M,), of the tokens
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,), the targets of the critic


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new), in nats, estimated from log(new / old probability) (B,) of actions that the old policy took: the
    mean of r - 1 - log r, which is unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    return (log_ratio.expm1() - log_ratio).mean()


def ppo_loss(policy: Transformer, critic: Transformer, prompt: Tensor, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """Loss of a batch of completions of a prompt (P,), and figures about it for the log."""
    log_probs, entropies = evaluate_tokens(policy, prompt, batch.completions)  # (B, L) each
    log_ratio = log_probs[batch.mask] - batch.log_probs  # (M,)
    ratio = log_ratio.exp()  # new / old probability of the token
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    # The lesser (PPO paper, eq. 7): changes beyond the clip gain nothing, but may cost.
    policy_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()

    values = outputs_before(critic, prompt, batch.completions).squeeze(-1)[batch.mask]  # (M,)
    critic_mse = (values - batch.returns).square().mean()
    loss = policy_loss + critic_mse  # policy and critic share no weights: each has the gradient of its own part

    figures = {"policy_loss": policy_loss, "critic_mse": critic_mse, "approx_kl": approximate_kl(log_ratio)}
    figures |= {"entropy": entropies[batch.mask].mean(), "clipfrac": (ratio != clipped_ratio).float().mean()}
    return loss, {name: figure.detach() for name, figure in figures.items()}


# ---------------------------------------------------------------------------------------------------------- training

NAMES = ("ravin", "bo", "ivo", "ada", "elif", "mira", "jonas", "diego", "hiroshi", "quentin", "benjamin", "wilhelmina")
FOODS = ("pizza", "apples", "cookies", "donuts", "ice cream", "lettuce", "salad", "soda")


def pretrain(args: Args) -> Transformer:
    """A language model to which everybody likes each food equally often. Each step is on all 96 sentences."""
    sentences = [encode(f"P{name} likes {food}E") for name in NAMES for food in FOODS]
    corpus = nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=END).to(args.device)  # (96, T)
    tokens, next_tokens = corpus[:, :-1], corpus[:, 1:]
    mask = until_end(next_tokens)
    torch.manual_seed(args.seed)
    policy = Transformer(len(CHARACTERS)).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    for step in tqdm(range(args.pretrain_steps), "pretraining"):
        loss = functional.cross_entropy(policy(tokens)[mask], next_tokens[mask])
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / args.pretrain_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def make_critic(policy: Transformer) -> Transformer:
    """A copy of the policy with a single output, which is 0 at first."""
    critic = copy.deepcopy(policy)
    critic.head = nn.Linear(policy.head.in_features, 1).to(policy.head.weight)
    nn.init.zeros_(critic.head.weight)
    nn.init.zeros_(critic.head.bias)
    return critic


def train(args: Args, run_dir: Path) -> dict[str, float]:
    """Trains a policy, and leaves all files but summary.json and figures in run_dir. May raise FloatingPointError."""
    torch.set_num_threads(1)  # more only slow networks of this size down
    start_time = time.perf_counter()
    source = run_dir / "pretrained.pt" if args.resume else args.pretrained
    policy = (load_policy(source) if source else pretrain(args)).to(args.device)
    reference = copy.deepcopy(policy)  # stays as it is: the policy before PPO, in a resumed run too
    critic = make_critic(policy)
    parameter_groups = [{"params": policy.parameters()}, {"params": critic.parameters()}]
    optimizer = torch.optim.Adam(parameter_groups, eps=1e-5, fused=True)
    learner = {"policy": policy, "critic": critic, "optimizer": optimizer}
    iteration, global_step, ppo_seconds = 0, 0, 0.0  # global_step counts completions
    pretrain_seconds = time.perf_counter() - start_time
    if args.resume:
        checkpoint = load(run_dir / "checkpoint.pt", **learner)
        iteration, global_step, ppo_seconds, pretrain_seconds = checkpoint["progress"]

    def save_run() -> None:
        save(run_dir / "policy.pt", policy=policy.state_dict())
        states = {name: part.state_dict() for name, part in learner.items()}
        save(run_dir / "checkpoint.pt", progress=(iteration, global_step, ppo_seconds, pretrain_seconds), **states)

    run_dir.mkdir(parents=True, exist_ok=True)
    save(run_dir / "pretrained.pt", policy=reference.state_dict())
    save_run()  # before config.json, so that every run that has one can be resumed
    log = MetricsLog(run_dir, args, iteration, global_step)
    bar = tqdm(total=args.episodes, initial=global_step, desc="PPO", unit="episode")
    prompt = encode("P" + args.prompt).to(args.device)  # (P,)
    start_time = time.perf_counter() - ppo_seconds

    while global_step < args.episodes:
        # 1. Rollout. Its randomness comes from seed and iteration alone: a resumed run goes on as if it never stopped.
        torch.manual_seed(1_000_000 * args.seed + iteration)
        batch_size = min(args.batch_size, args.episodes - global_step)
        completions = sample_completions(policy, prompt, batch_size, args.response_length)  # (B, L)
        mask = until_end(completions)  # (B, L)

        # 2. Advantages, from the rewards of all tokens and the values before them.
        with torch.no_grad():
            log_probs, _ = evaluate_tokens(policy, prompt, completions)  # (B, L)
            ref_log_probs, _ = evaluate_tokens(reference, prompt, completions)  # (B, L)
            values = outputs_before(critic, prompt, completions).squeeze(-1)  # (B, L)
        ref_kl = (log_probs - ref_log_probs) * mask  # (B, L), estimates (k1) of KL(policy || reference)
        scores = torch.tensor([external_reward(text, args) for text in decode(completions)], device=args.device)  # (B,)
        rewards = token_rewards(scores, ref_kl, mask, args.kl_beta)  # (B, L)
        advantages = masked_gae(rewards, values, mask, args.gamma, args.gae_lambda)  # (B, L), not normalised
        returns = advantages + values  # (B, L); indexing with the mask makes (M,) of it
        batch = Batch(completions, mask, log_probs[mask], advantages[mask], returns[mask])

        # 3. Update: several steps of the optimizer, each on the whole batch.
        annealing = 1 - global_step / args.episodes if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = annealing * args.learning_rate
        optimizer.param_groups[1]["lr"] = annealing * args.critic_learning_rate
        history = []
        for _ in range(args.update_epochs):
            loss, figures = ppo_loss(policy, critic, prompt, batch, args)
            optimizer.zero_grad()
            loss.backward()
            figures["policy_grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            figures["critic_grad_norm"] = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            optimizer.step()
            history.append(figures)

        # 4. Metrics, of which those of ppo_loss are means over the steps.
        iteration, global_step = iteration + 1, global_step + batch_size
        ppo_seconds = time.perf_counter() - start_time
        metrics = {
            "global_step": global_step,
            "charts/pizza_rate": (scores > 0).float().mean().item(),
            "charts/external_reward": scores.mean().item(),
            "charts/total_reward": rewards.sum(-1).mean().item(),
            "charts/kl_per_completion": ref_kl.sum(-1).mean().item(),
            "charts/kl_per_token": ref_kl[mask].mean().item(),
            "charts/response_length": mask.sum(-1).float().mean().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
        for name in history[0]:
            metrics[f"losses/{name}"] = torch.stack([figures[name] for figures in history]).mean().item()
        if not math.isfinite(metrics["losses/policy_grad_norm"] + metrics["losses/critic_grad_norm"]):
            raise FloatingPointError(f"iteration {iteration}: the loss is not finite")
        log.write(metrics)
        bar.update(batch_size)
        bar.set_postfix_str(f"{metrics['charts/pizza_rate']:.0%}, KL {metrics['charts/kl_per_completion']:.2f}")
        if global_step // 100 > (global_step - batch_size) // 100:  # another hundred is full
            save(run_dir / f"policy_episode_{global_step}.pt", policy=policy.state_dict())
        if iteration % args.checkpoint_interval == 0:
            save_run()

    save_run()
    for closable in (log.csv, log.writer, bar):
        closable.close()
    return {"global_step": global_step, "seconds": pretrain_seconds + ppo_seconds, "ppo_seconds": ppo_seconds}


# ---------------------------------------------------------------------------------------------- files and evaluation


class UserError(Exception):
    """A mistake in what the user gave. It ends the program with one line."""


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


def load_policy(path: str | Path) -> Transformer:
    """The policy in a file that a run saved, or in the policy.pt of a run folder. Raises UserError."""
    policy = Transformer(len(CHARACTERS))
    load(Path(path, "policy.pt") if Path(path).is_dir() else Path(path), policy=policy)
    return policy


def sample_and_show(policy: Transformer, label: str, args: Args) -> tuple[Tensor, float]:
    """Samples --eval-samples completions (B, L), prints some, and returns all with the share that earns the reward."""
    torch.manual_seed(args.seed)
    completions = sample_completions(policy, encode("P" + args.prompt), args.eval_samples, args.response_length)
    texts = decode(completions)
    rate = sum(external_reward(text, args) > 0 for text in texts) / len(texts)
    print(f"{label}: {rate:.1%} of {len(texts)} completions end in {args.target}")
    for text in texts[:10]:
        print(f"    {args.prompt}{text}")
    return completions, rate


def optimal_objective(p: float, reward: float, kl_beta: float) -> float:
    """The largest E[r] - beta KL(pi || pi_ref) of all policies, if the reference earns the reward with probability p,
    and else nothing: beta ln E_ref[exp(r / beta)] (Ziegler et al., section 2.1)."""
    if kl_beta == 0:
        return reward
    return reward + kl_beta * math.log(p + (1 - p) * math.exp(-reward / kl_beta))  # exp(reward / kl_beta) may overflow


@torch.no_grad()
def evaluate(args: Args, run_dir: Path) -> dict[str, float]:
    """What the saved policy reaches, beside the pretrained one and the best of all policies."""
    reference, policy = load_policy(run_dir / "pretrained.pt"), load_policy(run_dir)
    ref_completions, rate_before = sample_and_show(reference, "before PPO", args)
    completions, rate = sample_and_show(policy, "after PPO", args)
    prompt = encode("P" + args.prompt)  # (P,)
    log_probs, _ = evaluate_tokens(policy, prompt, completions)  # (B, L)
    ref_log_probs, _ = evaluate_tokens(reference, prompt, completions)  # (B, L)
    kl = ((log_probs - ref_log_probs) * until_end(completions)).sum(-1).mean().item()  # per completion
    objective = args.reward * rate - args.kl_beta * kl

    # The reference's probability of earning the reward: computed for the target alone, counted for what is longer.
    log_probs, _ = evaluate_tokens(reference, prompt, encode(args.target + "E")[None])  # (1, L)
    longer = [text for text in decode(ref_completions) if external_reward(text, args) and text != args.target + "E"]
    chance = min(log_probs.double().sum().exp().item() + len(longer) / args.eval_samples, 1.0)
    kl_floor = -math.log(chance)  # KL(policy || reference) of the nearest policy that always earns the reward
    optimum = optimal_objective(chance, args.reward, args.kl_beta)
    share = objective / optimum if optimum > 1e-6 else 0.0  # a reference that never earns leaves nothing to reach
    print(f"KL {kl:.2f} nats per completion; always earning the reward costs {kl_floor:.2f}")
    print(f"objective E[r] - beta KL: {objective:.3f} in these samples; the best of all policies has {optimum:.3f}")
    if chance * args.episodes < 1:
        print(f"warning: before PPO the model says {args.target} with probability {chance:.0e}, too rarely to learn it")
    summary = {"pizza_rate_before": rate_before, "pizza_rate": rate, "kl_per_completion": kl, "kl_floor": kl_floor}
    return summary | {"objective": objective, "objective_optimum": optimum, "objective_share": share}


def draw_metrics(run_dir: Path, summary: dict[str, float]) -> None:
    """Draws the columns of metrics.csv, and their means so far, as metrics.png, with what the summary has as limits."""
    limits = {"charts/kl_per_completion": "kl_floor", "charts/total_reward": "objective_optimum"}
    header, *lines = (run_dir / "metrics.csv").read_text().splitlines()
    columns = torch.tensor([[float(number) for number in line.split(",")] for line in lines]).T  # (columns, rows)
    figure = Figure(figsize=(16, 9), layout="constrained")
    for i, name in enumerate(header.split(",")[1:], start=1):
        axes = figure.add_subplot(3, 5, i, title=name)
        axes.plot(columns[0], columns[i], alpha=0.5, label="of an iteration")
        axes.plot(columns[0], columns[i].cumsum(0) / torch.arange(1, len(lines) + 1), label="mean so far")
        if name in limits:
            axes.axhline(summary[limits[name]], color="black", linestyle=":", label=limits[name])
            axes.legend()
    figure.supxlabel("episodes")
    figure.savefig(run_dir / "metrics.png")


@torch.no_grad()
def draw_critic_values(args: Args, run_dir: Path) -> None:
    """Draws the critic's values along the target and along another food, before and after PPO, as critic_values.png."""
    before, after = make_critic(load_policy(run_dir)), make_critic(load_policy(run_dir))  # new, they say 0 everywhere
    load(run_dir / "checkpoint.pt", critic=after)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for food in ("pizza" if args.target == "salad" else "salad", args.target):
        text = f"P{args.prompt}{food[:-1]}"[:CONTEXT_LENGTH]
        axes.plot(before(encode(text)[None]).flatten(), "--", label=f'"{text}" before PPO')
        axes.plot(after(encode(text)[None]).flatten(), label=f'"{text}" after PPO')
    axes.axvspan(0, len(args.prompt) - 0.5, color="gray", alpha=0.1, label="inside the prompt: not trained")
    axes.set(xlabel="place in the text", ylabel="value")
    axes.legend()
    figure.savefig(run_dir / "critic_values.png")


def main() -> None:
    """Trains, evaluates and draws, or only samples, as the flags say. Raises UserError."""
    args = tyro.cli(Args)
    if (args.run_dir, args.resume, args.play).count(None) < 2:
        raise UserError("give only one of --run-dir, --resume and --play")
    earlier_run = args.resume or args.play
    if earlier_run:  # its flags, but for those that are given now
        path = Path(earlier_run)
        config = (path.parent if path.is_file() else path) / "config.json"
        try:
            saved = Args(**json.loads(config.read_text()))
            args = tyro.cli(Args, default=saved)
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{config} is missing, damaged or of another script: {error}") from error
        if (args.pretrained, args.pretrain_steps) != (saved.pretrained, saved.pretrain_steps):
            raise UserError(f"--pretrained and --pretrain-steps cannot change: {earlier_run} is pretrained")

    above_0 = "reward episodes batch_size response_length update_epochs learning_rate critic_learning_rate clip_coef"
    above_0 += " max_grad_norm pretrain_steps checkpoint_interval eval_samples"
    for name in above_0.split():
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite")
    for name, most in (("gamma", 1), ("gae_lambda", 1), ("kl_beta", 10**6), ("seed", 2**32)):
        if not 0 <= getattr(args, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to {most}")
    for name in ("prompt", "target"):
        if not re.fullmatch("[a-z ]+", getattr(args, name)):
            raise UserError(f"--{name} must be of letters a to z and spaces, at least one")
    shortest, longest = len(args.target) + 1, CONTEXT_LENGTH - len(args.prompt)
    if not shortest <= args.response_length <= longest:
        raise UserError(f"--response-length must be from {shortest} to {longest} with this --target and --prompt")
    if "cuda" in args.device and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU")
    run_name = f"{args.target.replace(' ', '_')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(earlier_run or args.run_dir or f"runs/{run_name}")
    if not earlier_run and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} holds a run: give another --run-dir, or --resume it")
    if args.play:
        sample_and_show(load_policy(run_dir), str(run_dir), args)
        return
    summary = train(args, run_dir) | evaluate(args, run_dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_metrics(run_dir, summary)
    draw_critic_values(args, run_dir)
    print(f"saved in {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
