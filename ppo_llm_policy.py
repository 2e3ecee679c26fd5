# /// script
# requires-python = ">=3.11"
# dependencies = ["gymnasium==1.4.0", "numpy==2.4.6", "peft==0.21.2", "tensorboard==2.21.0", "torch==2.13.0",
#                 "tqdm==4.70.1", "transformers==5.23.0", "tyro==1.0.16"]
# ///
"""PPO with a language model as the policy of a control task, in any gymnasium environment with Discrete or Box actions.

    python ppo_llm_policy.py                            # CartPole-v1, a tiny untrained Qwen2: return 500 in a minute
    python ppo_llm_policy.py --llm-id Qwen/Qwen2-0.5B --learning-rate 1e-3 --run-dir runs/qwen    # hub id or folder
    python ppo_llm_policy.py --play runs/qwen           # returns of the policy that this run saved
    python ppo_llm_policy.py --resume runs/qwen         # goes on from the last checkpoint of a run that was stopped
    torchrun --nproc-per-node 2 ppo_llm_policy.py       # two processes, each with half of the environments
    python ppo_llm_policy.py --algorithm reinforce --gae-lambda 1 --learning-rate 1e-3 --total-timesteps 300000

The language model sees no text. An encoder turns each observation into an embedding, as if it were a token, and a head
turns the hidden state at the last one into a distribution over actions (`LLMNetwork`). Trained are encoder, head, small
additions to the frozen matrices of the model (LoRA), and apart from all that a critic, an MLP. Neither this network nor
the `StochasticPolicy` around it knows of PPO: `--algorithm reinforce` trains it, too, and `load_policy` returns it.

PPO repeats these four steps, numbered likewise in `train`:
1. Rollout: the policy takes T steps in each of N environments.
2. Advantages: how much better than the critic expected did each action turn out? (`compute_gae`)
3. Update: in several passes over these steps, good actions become likelier and bad ones less likely; beyond a factor of
   1 ± epsilon there is nothing to gain (`ppo_loss`). The critic learns what to expect. Then the data is thrown away.
4. Metrics, and now and then a checkpoint.
To change a network edit `LLMNetwork` and `load_body` or add to `NETWORKS`; the loss: `ppo_loss`; tasks: `make_envs`.

Shapes: T steps, N environments, B rows of a batch or minibatch, K observations in a state, S numbers in an observation,
H numbers in an embedding, A actions to choose from, or C numbers in an action.
Sources: the article "From MLP to LLM: Refactoring PPO Policy implementations", PPO https://arxiv.org/abs/1707.06347,
GAE https://arxiv.org/abs/1506.02438, LoRA https://arxiv.org/abs/2106.09685.

Where this differs from the article:
- Only the body of the model runs. The article's AutoModelForCausalLM scores the whole vocabulary, too.
- A lone token attends to itself: adapters of query and key learn nothing. With `--history 4` a state is four of them.
- No dropout: the old and the new probability of an action would differ by chance, before anything was learned.
- The outputs of a network are the logits, without a softplus around them, which makes another distribution.
Where it differs from CleanRL's ppo.py:
- An episode that a time limit cuts off (truncated) counts with the value of its last observation, not with 0.
- The step after an episode, which gymnasium 1.x spends on the reset whatever the action, is left out.
- Advantages are normalised over the whole rollout, since minibatches may be small. The value loss is not clipped.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, final

import gymnasium as gym
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
import tyro
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformAction
from numpy import ndarray
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO with a language model as the policy of a control task. The defaults solve CartPole-v1."""

    env_id: str = "CartPole-v1"  # id of a gymnasium environment; "module:Name-v0" imports the module first
    seed: int = 1  # of weights, environments, actions and shuffling
    network: Literal["llm", "mlp"] = "llm"  # what the policy is made of: a language model, or an MLP to compare with
    llm_id: str = "tiny-random"  # llm: hub id or folder of a causal LM; tiny-random: a Qwen2, 64 wide, untrained
    lora_rank: int = 16  # llm: of the adapters; 0: there are none, and only encoder and head are trained
    lora_alpha: float = 32.0  # llm: what an adapter adds is multiplied by alpha / rank
    lora_dropout: float = 0.0  # llm: of the adapters, in the update alone
    bfloat16: bool = False  # llm: the frozen body in bfloat16; all that is trained stays float32
    history: int = 1  # K: a state is the last K observations, and each is a token for the language model
    log_std_init: float = -0.5  # Box: log of the first std; a std of 1 is half the range between an action's bounds
    algorithm: Literal["ppo", "reinforce"] = "ppo"  # reinforce: one step along the plain policy gradient per rollout
    total_timesteps: int = 60_000  # length of the training in steps, over all environments
    num_envs: int = 16  # parallel environments, N, shared out among the processes of torchrun
    num_steps: int = 32  # steps of each environment in a rollout, T; at least 2, as one may only reset
    learning_rate: float = 2e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount factor per step
    gae_lambda: float = 0.9  # lambda of generalised advantage estimation
    update_epochs: int = 8  # ppo: passes over each rollout
    num_minibatches: int = 4  # ppo: per pass; more of them need less memory
    clip_coef: float = 0.2  # ppo: epsilon of the clipped objective
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # the gradient of policy and critic together is clipped to this norm
    target_kl: float | None = None  # ppo: end an update before a minibatch with a larger KL(old || new), in nats
    run_dir: str | None = None  # folder for all that the run leaves; default: runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on from, with its flags unless given anew; episodes start afresh
    checkpoint_interval: int = 20  # iterations between checkpoints
    eval_episodes: int = 20  # episodes of the evaluation, with greedy and again with sampled actions
    play: str | None = None  # evaluate the policy of this run folder, with its flags unless given anew; train nothing
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks are


# ---------------------------------------------------------------------------------------------------------- networks


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    """Two tanh layers of 64 units and a linear one, with orthogonal weights and zero biases (37 details, no. 2)."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class PolicyNetwork(nn.Module):
    """Turns states into distributions over actions: categorical over A Discrete actions, or a Gaussian of C components
    whose standard deviations do not depend on the state. Subclasses say where logits or means come from."""

    def __init__(self, num_outputs: int, is_discrete: bool, log_std_init: float):
        super().__init__()
        self.is_discrete = is_discrete
        if not is_discrete:
            self.log_std = nn.Parameter(torch.full((num_outputs,), log_std_init))

    def distribution(self, outputs: Tensor) -> Distribution:
        """Distributions of B actions that have these logits (B, A) or means (B, C)."""
        if self.is_discrete:
            return Categorical(logits=outputs, validate_args=False)
        normal = Normal(outputs, self.log_std.exp(), validate_args=False)
        return Independent(normal, 1)  # one log-prob per action, the sum over its components


class MLPNetwork(PolicyNetwork):
    """An MLP that reads all numbers of a state at once."""

    def __init__(self, args: Args, obs_dim: int, num_outputs: int, is_discrete: bool):
        super().__init__(num_outputs, is_discrete, args.log_std_init)
        self.mlp = mlp(args.history * obs_dim, num_outputs, output_gain=0.01)

    def forward(self, states: Tensor) -> Distribution:
        """Distributions of B actions for states (B, K, S)."""
        return self.distribution(self.mlp(states.flatten(1)))


class LLMNetwork(PolicyNetwork):
    """The body of a language model, between an encoder in place of its tokenizer and a head for its last output."""

    def __init__(self, args: Args, obs_dim: int, num_outputs: int, is_discrete: bool):
        super().__init__(num_outputs, is_discrete, args.log_std_init)
        self.body = load_body(args)
        hidden_size = self.body.get_input_embeddings().embedding_dim  # H
        self.encoder = nn.Sequential(nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, hidden_size))
        self.head = nn.Sequential(nn.Linear(hidden_size, 128), nn.ReLU(), nn.Linear(128, num_outputs))
        nn.init.orthogonal_(self.head[-1].weight, 0.01)  # all actions are about equally likely at first

    def forward(self, states: Tensor) -> Distribution:
        """Distributions of B actions for states (B, K, S)."""
        embeddings = self.encoder(states).to(self.body.dtype)  # (B, K, H)
        hidden = self.body(inputs_embeds=embeddings, use_cache=False).last_hidden_state  # (B, K, H)
        return self.distribution(self.head(hidden[:, -1].float()))


def load_body(args: Args) -> nn.Module:
    """The body of a causal language model: all but the layer that scores the next word. It is frozen. Its linear layers
    (Qwen2: q, k, v, o, gate, up, down) have adapters to be trained, which add nothing at first. Raises UserError."""
    try:
        if args.llm_id == "tiny-random":
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            # Weights of 1 / sqrt(64), not of the usual 0.02, with which attention would have next to no effect.
            config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=1, initializer_range=0.125)
            body = transformers.AutoModel.from_config(config)
        else:
            config = transformers.AutoConfig.from_pretrained(args.llm_id)
            config.update({name: 0.0 for name in config.to_dict() if "drop" in name})  # no dropout
            options = {"use_safetensors": True, "output_loading_info": True}  # safetensors are no pickles
            body, loading = transformers.AutoModel.from_pretrained(args.llm_id, config=config, **options)
            if loading["missing_keys"]:
                raise ValueError(f"its files lack {', '.join(loading['missing_keys'])}")
            body.resize_token_embeddings(1)  # nothing reads them here, and they may be a quarter of the model
    except Exception as error:  # transformers fails in many ways
        raise UserError(f"--llm-id {args.llm_id} cannot be loaded: {error}") from error
    body = body.to(torch.bfloat16 if args.bfloat16 else torch.float32).requires_grad_(False)
    if args.lora_rank == 0:
        return body
    options = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    return peft.get_peft_model(body, peft.LoraConfig(**options, target_modules="all-linear"))


@final
class StochasticPolicy(nn.Module):
    """Samples actions and scores actions of whatever policy, by the distributions that its network gives. Actions are
    (B,) where they are Discrete, and (B, C) where they are a Box."""

    def __init__(self, network: PolicyNetwork):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def get_action(self, states: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for states (B, K, S), the likeliest ones or samples, and their log-probs (B,)."""
        distribution = self.network(states)
        actions = distribution.mode if greedy else distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs (B,) of actions in states (B, K, S), and entropies (B,) of the distributions there."""
        distribution = self.network(states)
        return distribution.log_prob(actions), distribution.entropy()


NETWORKS = {"llm": LLMNetwork, "mlp": MLPNetwork}  # by --network


# --------------------------------------------------------------------------------------------------------- algorithm


def compute_gae(
    rewards: ndarray, values: ndarray, terminated: ndarray, truncated: ndarray, gamma: float, gae_lambda: float
) -> ndarray:
    """Generalised advantage estimates (T, N) (GAE paper, eq. 16).

    rewards, terminated, truncated: (T, N), what came of each step. values: (T + 1, N), of the observations before each
    step and after the last. An episode's last observation counts with its value if truncated, with 0 if terminated."""
    # TD errors. values[t + 1] is of where step t led, at an episode's end too: the reset comes a step later.
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    continues = ~(terminated | truncated)  # an episode's end takes nothing from step t + 1, which only resets
    advantages, advantage = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + gamma * gae_lambda * continues[t] * advantage
        advantages[t] = advantage
    return advantages


def average_over_ranks(tensors: list[Tensor], weight: float) -> None:
    """Replaces each tensor by its mean over all processes that torchrun started, in which this one has that weight."""
    if dist.is_initialized():
        weights = torch.ones(1, device=tensors[0].device)
        vector = nn.utils.parameters_to_vector([*tensors, weights]) * weight
        dist.all_reduce(vector)  # now the sum over all processes
        nn.utils.vector_to_parameters(vector[:-1] / vector[-1], tensors)


def normalise(advantages: Tensor) -> Tensor:
    """Advantages (B,) shifted and scaled to a mean of 0 and a standard deviation of 1, over all processes."""
    mean = advantages.mean()
    average_over_ranks([mean], len(advantages))
    variance = (advantages - mean).square().mean()
    average_over_ranks([variance], len(advantages))
    return (advantages - mean) / (variance.sqrt() + 1e-8)


class Batch(NamedTuple):
    """Steps of a rollout, and what the policy said of them before the update."""

    states: Tensor  # (B, K, S)
    actions: Tensor  # (B,) or (B, C)
    log_probs: Tensor  # (B,), of the actions
    advantages: Tensor  # (B,), normalised
    returns: Tensor  # (B,), the targets of the critic


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new), in nats, estimated from log(new / old probability) (B,) of actions that the old policy took: the
    mean of r - 1 - log r, which is unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    return (log_ratio.expm1() - log_ratio).mean()


def ppo_loss(policy: StochasticPolicy, critic: nn.Module, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """Loss of a minibatch by either algorithm, and figures about it for the log."""
    log_probs, entropies = policy.evaluate_actions(batch.states, batch.actions)  # (B,) each
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()  # new / old probability of the action
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)

    if args.algorithm == "ppo":  # the lesser: changes beyond the clip gain nothing, but may cost
        policy_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()
    else:  # this has the gradient of the line above as long as new and old policy are the same
        policy_loss = -(log_probs * batch.advantages).mean()

    values = critic(batch.states.flatten(1)).squeeze(-1)  # (B,)
    value_loss = 0.5 * (values - batch.returns).square().mean()

    entropy = entropies.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    figures = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    figures |= {"approx_kl": approximate_kl(log_ratio), "clipfrac": (ratio != clipped_ratio).float().mean()}
    return loss, {name: figure.detach() for name, figure in figures.items()}


def minibatches(batch: Batch, args: Args) -> Iterator[Batch]:
    """The minibatches of all passes. In each pass every row comes once, in a random order."""
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.states)).tensor_split(args.num_minibatches):  # as many on each rank
            yield Batch(*(column[rows] for column in batch))


# ---------------------------------------------------------------------------------------------------------- training


def train(args: Args, run_dir: Path, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    """Trains a policy, and leaves all files but summary.json in run_dir. Raises UserError and FloatingPointError.
    Of the world_size processes that torchrun starts, each has a share of the environments and a copy of the networks.
    As they average their gradients, the copies stay the same. Rank 0 writes the files."""
    if world_size > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    if args.network == "mlp" or args.llm_id == "tiny-random":
        torch.set_num_threads(1)  # more only slow networks of this size down; larger ones have what PyTorch gives them
    if args.lora_dropout and rank == 0:
        print("--lora-dropout: from the start, new and old probabilities of an action differ by chance")
    torch.manual_seed(args.seed)  # the same weights in all processes
    num_envs = args.num_envs // world_size
    envs = make_envs(args, num_envs)
    obs_dim, action_space = envs.single_observation_space.shape[-1], envs.single_action_space
    is_discrete = isinstance(action_space, gym.spaces.Discrete)
    num_outputs = gym.spaces.flatdim(action_space)  # A or C
    spec = (obs_dim, num_outputs, is_discrete)
    policy = StochasticPolicy(NETWORKS[args.network](args, *spec)).to(args.device)
    critic = mlp(args.history * obs_dim, 1, output_gain=1.0).to(args.device)
    parameters = [p for p in [*policy.parameters(), *critic.parameters()] if p.requires_grad]  # not the frozen body
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    learner = {"policy": own_weights(policy, args), "critic": critic, "optimizer": optimizer}
    episode_returns, episode_lengths = envs.return_queue, envs.length_queue  # of the last 100 episodes of this rank
    iteration, global_step, seconds = 0, 0, 0.0
    if args.resume:
        checkpoint = load(run_dir / "checkpoint.pt", **learner)
        iteration, global_step, seconds = checkpoint["progress"]
        episode_returns.extend(checkpoint["queues"][0])
        episode_lengths.extend(checkpoint["queues"][1])
    start_time = time.perf_counter() - seconds

    def save_run() -> None:
        state_dicts = {name: part.state_dict() for name, part in learner.items()}
        save(run_dir / "policy.pt", args=vars(args), spec=spec, policy=state_dicts["policy"])
        queues = [[*map(float, queue)] for queue in (episode_returns, episode_lengths)]
        save(run_dir / "checkpoint.pt", progress=(iteration, global_step, seconds), queues=queues, **state_dicts)

    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_run()  # before config.json, so that every run that has one can be resumed
        log = MetricsLog(run_dir, args, iteration, global_step)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=rank > 0)

    shape = (args.num_steps, num_envs)  # T, N of what is stored of a rollout
    states = np.zeros((args.num_steps + 1, num_envs, args.history, obs_dim), np.float32)  # before each step, and after
    actions = np.zeros(shape, np.int64) if is_discrete else np.zeros((*shape, num_outputs), np.float32)
    log_probs = np.zeros(shape, np.float32)
    rewards = np.zeros(shape, np.float32)
    terminated = np.zeros(shape, bool)
    truncated = np.zeros(shape, bool)
    is_reset = np.zeros(shape, bool)  # the step only reset: its action was ignored
    env_seed, torch_seed = np.random.SeedSequence((args.seed, iteration)).generate_state(2).tolist()
    torch.manual_seed(torch_seed + rank)  # other noise and episodes for each --seed, and after each resume
    next_states, _ = envs.reset(seed=env_seed // 2 + rank * num_envs)  # plus n for environment n of this rank
    next_is_reset = np.zeros(num_envs, bool)

    while global_step < args.total_timesteps:
        # 1. Rollout. Where an episode ends in step t, states[t + 1] is its last state, and step t + 1 only resets the
        # environment, so that states[t + 2] is the first one of the next episode.
        policy.eval()
        for t in range(args.num_steps):
            if not np.isfinite(next_states).all():
                raise FloatingPointError(f"an observation of iteration {iteration + 1} is not finite")
            states[t], is_reset[t] = next_states, next_is_reset
            action, log_prob = policy.get_action(torch.as_tensor(states[t], device=args.device))  # (N,) or (N, C), (N,)
            actions[t], log_probs[t] = action.numpy(force=True), log_prob.numpy(force=True)
            next_states, rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
            next_is_reset = terminated[t] | truncated[t]
        states[-1] = next_states

        # 2. Advantages, from the values of all states.
        all_states = torch.as_tensor(states, device=args.device)  # (T + 1, N, K, S)
        with torch.no_grad():
            values = critic(all_states.flatten(2)).squeeze(-1)  # (T + 1, N)
        gae = compute_gae(rewards, values.numpy(force=True), terminated, truncated, args.gamma, args.gae_lambda)
        advantages = torch.as_tensor(gae, device=args.device)  # (T, N)
        keep = torch.as_tensor(~is_reset, device=args.device)  # (T, N); indexing with it makes (B, ...) of (T, N, ...)
        batch = Batch(
            states=all_states[:-1][keep],
            actions=torch.as_tensor(actions, device=args.device)[keep],
            log_probs=torch.as_tensor(log_probs, device=args.device)[keep],
            advantages=normalise(advantages[keep]),
            returns=(advantages + values[:-1])[keep],
        )
        explained_variance = 1 - (advantages[keep].var() / batch.returns.var()).item()  # return - value = advantage

        # 3. Update: a step of the optimizer for each minibatch. REINFORCE makes a single one with all rows, since after
        # it these actions are no longer the policy's own.
        policy.train()  # for --lora-dropout alone
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        all_figures = []
        for minibatch in minibatches(batch, args) if args.algorithm == "ppo" else [batch]:
            loss, figures = ppo_loss(policy, critic, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            average_over_ranks([*(p.grad for p in parameters), *figures.values()], len(minibatch.states))
            if args.target_kl is not None and all_figures and figures["approx_kl"] > args.target_kl:
                break  # but the first minibatch is always learned from
            figures["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            all_figures.append(figures)

        # 4. Metrics, of which those of ppo_loss are means over the minibatches.
        num_rows = keep.sum().float()
        average_over_ranks([num_rows], weight=1)
        iteration += 1
        global_step += round(num_rows.item() * world_size)
        seconds = time.perf_counter() - start_time
        mean_return = np.mean(episode_returns) if episode_returns else math.nan
        metrics = {
            "global_step": global_step,
            "charts/episodic_return": mean_return,
            "charts/episodic_length": np.mean(episode_lengths) if episode_lengths else math.nan,
            "charts/SPS": global_step / seconds,
            "charts/learning_rate": learning_rate,
            "losses/explained_variance": explained_variance,
        }
        for name in all_figures[0]:
            metrics[f"losses/{name}"] = torch.stack([figures[name] for figures in all_figures]).mean().item()
        if not math.isfinite(metrics["losses/grad_norm"]):
            raise FloatingPointError(f"iteration {iteration}: a reward or the loss is not finite")
        bar.update(global_step - bar.n)
        bar.set_postfix_str(f"return {mean_return:.1f}")
        if rank == 0:
            log.write(metrics)
            if iteration % args.checkpoint_interval == 0:
                save_run()

    if rank == 0:
        save_run()
        if args.network == "llm" and args.lora_rank > 0:
            policy.network.body.save_pretrained(run_dir / "adapter", save_embedding_layers=False)  # for PEFT
        log.csv.close()
        log.writer.close()
    bar.close()
    envs.close()
    if world_size > 1:
        dist.destroy_process_group()
    summary = {"global_step": global_step, "seconds": seconds, "trained_parameters": sum(p.numel() for p in parameters)}
    return summary | ({"train_return": np.mean(episode_returns)} if episode_returns else {})


# -------------------------------------------------------------------------------- environments, files and evaluation


class UserError(Exception):
    """A mistake in what the user gave. It ends the program with one line."""


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """Environments whose observations are states (K, S): the last K flat observations, of which the first is repeated
    where an episode has had fewer. Discrete actions count from 0. A Box takes C numbers, in half-ranges around the
    centre of its bounds if both are within 1e15, else in its own unit. They record the returns of their episodes."""
    wrappers = [FlattenObservation, partial(FrameStackObservation, stack_size=args.history)]
    envs = gym.make_vec(args.env_id, num_envs, "sync", wrappers=wrappers)
    space = envs.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        return RecordEpisodeStatistics(TransformAction(envs, lambda actions: actions + space.start))
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"--env-id {args.env_id} has the action space {space}, which is neither Discrete nor a Box")
    low, high = space.low.astype(float), space.high.astype(float)
    bounded = (abs(low) < 1e15) & (abs(high) < 1e15)
    scale = np.where(bounded, (high - low) / 2, 1)
    centre = np.where(bounded, low + scale, np.clip(0, low, high))

    def to_env(actions: ndarray) -> ndarray:  # (N, C), perhaps beyond the bounds, to the shape and type of the Box
        actions = (centre + scale * actions.reshape(-1, *space.shape)).clip(low, high)
        return (actions.round() if "int" in str(space.dtype) else actions).astype(space.dtype)

    return RecordEpisodeStatistics(TransformAction(envs, to_env))


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


def own_weights(policy: StochasticPolicy, args: Args) -> nn.ParameterList:
    """The weights that are nowhere else, all but those of a pretrained body. Who loads into this list changes them."""
    return nn.ParameterList(p for p in policy.parameters() if p.requires_grad or args.llm_id == "tiny-random")


def load_policy(run_dir: str | Path, args: Args | None = None) -> StochasticPolicy:
    """The policy that a run saved, by these flags or its own, for the states of `make_envs`. Raises UserError."""
    path = Path(run_dir, "policy.pt")
    saved = load(path)
    args = args or Args(**saved["args"])
    policy = StochasticPolicy(NETWORKS[args.network](args, *saved["spec"]))
    load(path, policy=own_weights(policy, args))
    return policy.eval()


def evaluate(args: Args, run_dir: Path) -> dict[str, float]:
    """Mean returns of the saved policy, over an episode in each of --eval-episodes environments."""
    envs = make_envs(args, args.eval_episodes)
    policy, means = load_policy(run_dir, args).to(args.device), {}
    for mode in ("greedy", "sampled"):
        torch.manual_seed(args.seed)
        states, _ = envs.reset(seed=2**31 + 1000 * args.seed)
        total, alive = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        for _ in range(100_000):  # without a time limit, an episode may never end
            inputs = torch.as_tensor(states, dtype=torch.float32, device=args.device)
            actions, _ = policy.get_action(inputs, greedy=mode == "greedy")
            states, rewards, terminated, truncated, _ = envs.step(actions.numpy(force=True))
            total += rewards * alive
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
        means[f"eval_return_{mode}"] = total.mean()
        print(f"{mode} return {total.mean():.1f} ± {total.std():.1f}, {len(total)} episodes, {alive.sum()} unfinished")
    envs.close()
    return means


def main() -> None:
    """Trains and evaluates, or only evaluates, as the flags say. Raises UserError."""
    args = tyro.cli(Args)
    if (args.run_dir, args.resume, args.play).count(None) < 2:
        raise UserError("give only one of --run-dir, --resume and --play")
    earlier_run = args.resume or args.play
    if earlier_run:  # its flags, but for those that are given now
        config = Path(earlier_run, "config.json")
        try:
            args = tyro.cli(Args, default=Args(**json.loads(config.read_text())))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{config} is missing, damaged or of another script: {error}") from error

    above_0 = "history num_envs total_timesteps learning_rate update_epochs num_minibatches clip_coef max_grad_norm"
    above_0 += " target_kl checkpoint_interval eval_episodes lora_alpha"
    for name in above_0.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite")
    if args.num_steps < 2 or args.seed < 0 or not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        raise UserError("--num-steps must be above 1, --seed at least 0, --gamma and --gae-lambda between 0 and 1")
    if args.lora_rank < 0 or not 0 <= args.lora_dropout < 1 or not math.isfinite(args.ent_coef + args.vf_coef):
        raise UserError("--lora-rank and --lora-dropout must be at least 0, dropout below 1, the coefficients finite")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.num_envs % world_size:
        raise UserError(f"--num-envs must be a multiple of {world_size}, the number of processes")
    if args.algorithm == "ppo" and args.num_minibatches > args.num_envs // world_size * (args.num_steps // 2):
        raise UserError("--num-minibatches must be at most half of the steps in a process's rollout")  # others reset
    unused = "update_epochs num_minibatches clip_coef target_kl " if args.algorithm == "reinforce" else ""
    unused += "llm_id bfloat16 lora_rank lora_alpha lora_dropout " if args.network == "mlp" else ""
    unused += "lora_alpha lora_dropout" if not args.lora_rank else ""
    for name in unused.split():
        if getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with the other flags")
    if "cuda" in args.device and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU")
    run_name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(earlier_run or args.run_dir or f"runs/{run_name}")
    if not earlier_run and rank == 0 and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} holds a run: give another --run-dir, or --resume it")
    if args.play:
        evaluate(args, run_dir)
        return
    summary = train(args, run_dir, rank, world_size)
    if rank == 0:
        summary |= evaluate(args, run_dir)
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"saved in {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, FloatingPointError, ModuleNotFoundError, gym.error.Error) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
