# /// script
# requires-python = ">=3.11"
# dependencies = ["gymnasium[mujoco]==1.4.0", "mujoco==3.15.0", "numpy==2.4.6", "tensorboard==2.21.0", "torch==2.13.0",
#                 "tqdm==4.70.1", "tyro==1.0.16"]
# ///
"""PPO for continuous actions: an MLP policy, in any gymnasium environment whose action space is a Box.

    python ppo_mlp_continuous.py                        # HalfCheetah-v5: return about 4500 after 1M steps, in 5 minutes
    python ppo_mlp_continuous.py --env-id Hopper-v5 --run-dir runs/hopper
    python ppo_mlp_continuous.py --play runs/hopper     # returns of the policy that this run saved
    python ppo_mlp_continuous.py --resume runs/hopper   # goes on from the last checkpoint of a run that was stopped

PPO repeats these four steps, numbered likewise in `train`:
1. Rollout: the policy takes T steps in each of N environments.
2. Advantages: how much better than the critic expected did each action turn out? (`compute_gae`)
3. Update: in several passes over these steps, good actions become likelier and bad ones less likely; beyond a factor of
   1 ± epsilon there is nothing to gain (`ppo_loss`). The critic learns what to expect. Then the data is thrown away.
4. Metrics, and now and then a checkpoint.
Observations and rewards are scaled by running statistics (`RunningMoments`).
To change the networks edit `mlp` (flat input), the loss `ppo_loss`, the environments `make_envs`. The rest is files.

Shapes: T steps, N environments, B rows of a batch or minibatch, D numbers in an observation, C in an action.
Sources: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, "The 37 Implementation Details of
PPO" https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

Where this differs from CleanRL's ppo_continuous_action.py, apart from its defaults, which are for MuJoCo:
- An episode that a time limit cuts off (truncated) counts with the value of its last observation, not with 0.
- The step after an episode, which gymnasium 1.x spends on the reset whatever the action, is left out.
- Statistics are over all environments, change once per rollout, not in each step, and are saved with the policy.
- Actions are in half-ranges (`Policy`), the first std is e^-0.5, advantages are estimated anew before each pass.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics, RecordVideo
from numpy import ndarray
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO with an MLP policy for continuous actions. The defaults are for MuJoCo."""

    env_id: str = "HalfCheetah-v5"  # id of a gymnasium environment; "module:Name-v0" imports the module first
    seed: int = 1  # of weights, environments, actions and shuffling
    total_timesteps: int = 1_000_000  # length of the training in steps, over all environments
    num_envs: int = 8  # parallel environments, N
    num_steps: int = 256  # steps of each environment in a rollout, T; at least 2, as one may only reset
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None  # None leaves it to gymnasium
    learning_rate: float = 3e-4  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    update_epochs: int = 10  # passes over each rollout
    num_minibatches: int = 32  # per pass, at most
    norm_obs: bool = True  # normalise observations by their running mean and std, and clip them to ±10
    norm_reward: bool = True  # divide rewards by the running std of the discounted return, and clip them to ±10
    log_std_init: float = -0.5  # log of a new run's first std; a std of 1 is half the range between an action's bounds
    recompute_advantages: bool = True  # before each pass, with the critic of then; arXiv:2006.05990, section 3.5
    norm_adv: bool = False  # normalise advantages within each minibatch
    objective: Literal["clip", "kl-penalty"] = "clip"  # the PPO paper's eq. 7, or its alternative, eq. 8
    clip_coef: float = 0.2  # epsilon of the clipped objective, and of the clipped value loss
    clip_vloss: bool = False  # clip the value loss; arXiv:2006.05990 found that it hurts
    kl_penalty_target: float = 0.01  # KL(old || new) after an update, in nats, that kl-penalty aims at
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.25  # coefficient of the value loss
    max_grad_norm: float = 10.0  # the gradient of policy and critic together is clipped to this norm
    target_kl: float | None = None  # end an update before a minibatch with a larger KL(old || new), in nats
    run_dir: str | None = None  # folder for all that the run leaves; default: runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on from, with its flags unless given anew; episodes start afresh
    checkpoint_interval: int = 20  # iterations between checkpoints
    eval_episodes: int = 20  # episodes of the evaluation, with greedy and again with sampled actions
    capture_video: bool = False  # film a greedy and a sampled episode; needs moviepy; without a screen MUJOCO_GL=egl
    play: str | None = None  # evaluate the policy of this run folder, with its flags unless given anew; train nothing
    device: str = "cpu"  # for networks this small a CPU is faster than a GPU


# ---------------------------------------------------------------------------------------------------------- networks


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    """Two tanh layers of 64 units and a linear one, with orthogonal weights and zero biases (37 details, no. 2)."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """A Gaussian over actions of C numbers. Its means depend on the observation, its standard deviations do not.

    The policy's unit of action is half the range between the bounds, around their centre, if both are within 1e15; else
    it is the environment's. Actions are stored and scored in this unit and unclipped; `to_env` converts and clips them.
    """

    def __init__(self, obs_dim: int, low: list, high: list, dtype: str, norm_obs: bool, log_std_init: float):
        super().__init__()
        self.low, self.high, self.dtype, self.norm_obs = np.array(low), np.array(high), dtype, norm_obs
        bounded = (abs(self.low) < 1e15) & (abs(self.high) < 1e15)
        self.scale = np.where(bounded, (self.high - self.low) / 2, 1)
        self.centre = np.where(bounded, self.low + self.scale, np.clip(0, self.low, self.high))
        self.actor = mlp(obs_dim, self.low.size, output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((self.low.size,), log_std_init))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))  # `train` sets these two before each rollout
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def normalize(self, obs: ndarray) -> Tensor:
        """Observations (..., D) as the networks take them, those of policy and critic."""
        obs = torch.from_numpy(obs).to(self.log_std)  # its dtype, on its device
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10) if self.norm_obs else obs

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities (...) of actions (..., C) for normalised observations (..., D), and entropies (...)."""
        distribution = Normal(self.actor(obs), self.log_std.exp(), validate_args=False)
        return distribution.log_prob(actions).sum(-1), distribution.entropy().sum(-1)

    @torch.no_grad()
    def choose(self, obs: ndarray, greedy: bool = False) -> ndarray:
        """Actions (..., C) in the policy's unit, for observations (..., D): the means, or samples."""
        actions = self.actor(self.normalize(obs))
        if not greedy:  # a sample of the Normal in `evaluate_actions`, found faster
            actions = actions + self.log_std.exp() * torch.randn_like(actions)
        return actions.numpy(force=True)

    def to_env(self, actions: ndarray) -> ndarray:
        """What the environment takes for actions (..., C) in the policy's unit: its unit, shape and dtype, clipped."""
        actions = actions.reshape(*actions.shape[:-1], *self.low.shape)
        actions = (self.centre + self.scale * actions).clip(self.low, self.high)
        if "int" in self.dtype:  # such as int64, uint8
            actions = actions.round()
        return actions.astype(self.dtype)

    def act(self, obs: ndarray, greedy: bool = False) -> ndarray:
        """Actions as the environment takes them, one for each of the observations (..., D): the means, or samples."""
        return self.to_env(self.choose(obs, greedy))


# --------------------------------------------------------------------------------------------------------- algorithm


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen so far. They are buffers, so that they are saved along with weights."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()).double())
        self.register_buffer("mean", torch.zeros(shape).double())
        self.register_buffer("var", torch.ones(shape).double())

    def update(self, rows: ndarray) -> None:
        """Takes in rows (B, *shape) (Chan et al. 1979, eq. 2.1)."""
        rows = torch.from_numpy(rows).to(self.mean)  # its dtype, on its device
        self.count += len(rows)
        weight = len(rows) / self.count  # of the new rows among all
        delta = rows.mean(0) - self.mean
        self.mean += weight * delta
        self.var = (1 - weight) * self.var + weight * rows.var(0, correction=0) + weight * (1 - weight) * delta.square()


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


@torch.no_grad()
def estimate(
    critic: nn.Module, obs: Tensor, rewards: ndarray, terminated: ndarray, truncated: ndarray, args: Args
) -> tuple[Tensor, Tensor]:
    """Values and advantages (T, N) of a rollout by the critic as it is now. obs: (T + 1, N, D), normalised."""
    values = critic(obs).squeeze(-1)  # (T + 1, N)
    advantages = compute_gae(rewards, values.numpy(force=True), terminated, truncated, args.gamma, args.gae_lambda)
    return values[:-1], torch.from_numpy(advantages).to(obs.device)


class Batch(NamedTuple):
    """Steps of a rollout. All is from before the update, but advantages and returns may be estimated anew."""

    obs: Tensor  # (B, D), normalised
    actions: Tensor  # (B, C), in the policy's unit, not clipped
    log_probs: Tensor  # (B,), of the actions
    values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,), the targets of the critic


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new), in nats, estimated from log(new / old probability) (B,) of actions that the old policy took: the
    mean of r - 1 - log r, which is unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    return (log_ratio.expm1() - log_ratio).mean()


def ppo_loss(policy: Policy, critic: nn.Module, batch: Batch, kl_coef: float, args: Args) -> tuple[Tensor, dict]:
    """Loss of a minibatch, and figures about it for the log. kl_coef: beta of eq. 8, for kl-penalty alone."""
    log_probs, entropies = policy.evaluate_actions(batch.obs, batch.actions)  # (B,) each
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()  # new / old probability of the action
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    approx_kl = approximate_kl(log_ratio)

    advantages = batch.advantages
    if args.norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    if args.objective == "clip":  # the lesser: changes beyond the clip gain nothing, but may cost
        policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    else:
        policy_loss = -(ratio * advantages).mean() + kl_coef * approx_kl

    values = critic(batch.obs).squeeze(-1)  # (B,)
    squared_errors = (values - batch.returns).square()
    if args.clip_vloss:
        clipped_values = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        squared_errors = torch.max(squared_errors, (clipped_values - batch.returns).square())
    value_loss = 0.5 * squared_errors.mean()

    entropy = entropies.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    figures = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "approx_kl": approx_kl}
    figures["clipfrac"] = (ratio != clipped_ratio).float().mean()
    return loss, {name: figure.detach() for name, figure in figures.items()}


# ---------------------------------------------------------------------------------------------------------- training


def train(args: Args, run_dir: Path) -> dict[str, float]:
    """Trains a policy, and leaves all files but summary.json in run_dir. Raises UserError and FloatingPointError."""
    torch.set_num_threads(1)  # more only slow networks of this size down
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
    spec = {"obs_dim": obs_dim, "low": space.low.tolist(), "high": space.high.tolist(), "dtype": str(space.dtype)}
    spec |= {"norm_obs": args.norm_obs, "log_std_init": args.log_std_init}
    policy = Policy(**spec).to(args.device)
    critic = mlp(obs_dim, 1, output_gain=1.0).to(args.device)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    obs_moments, return_moments = RunningMoments(obs_dim), RunningMoments()
    learner = {"policy": policy, "critic": critic, "optimizer": optimizer}
    learner |= {"obs_moments": obs_moments, "return_moments": return_moments}
    episode_returns, episode_lengths = envs.return_queue, envs.length_queue  # of the last 100 episodes
    iteration, global_step, seconds, kl_coef = 0, 0, 0.0, 1.0
    if args.resume:
        checkpoint = load(run_dir / "checkpoint.pt", **learner)
        iteration, global_step, seconds, kl_coef = checkpoint["progress"]
        episode_returns.extend(checkpoint["queues"][0])
        episode_lengths.extend(checkpoint["queues"][1])
    start_time = time.perf_counter() - seconds

    def save_run() -> None:
        save(run_dir / "policy.pt", spec=spec, policy=policy.state_dict())
        states = {name: part.state_dict() for name, part in learner.items()}
        queues = [[*map(float, queue)] for queue in (episode_returns, episode_lengths)]
        save(run_dir / "checkpoint.pt", progress=(iteration, global_step, seconds, kl_coef), queues=queues, **states)

    run_dir.mkdir(parents=True, exist_ok=True)
    save_run()  # before config.json, so that every run that has one can be resumed
    log = MetricsLog(run_dir, args, iteration, global_step)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step")

    shape = (args.num_steps, args.num_envs)  # T, N of what is stored of a rollout
    obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), np.float32)  # before each step, and after the last
    actions = np.zeros((*shape, policy.low.size), np.float32)  # in the policy's unit
    rewards = np.zeros(shape, np.float32)
    discounted = np.zeros(shape, np.float32)  # discounted sum of past rewards; its std scales rewards
    terminated = np.zeros(shape, bool)
    truncated = np.zeros(shape, bool)
    is_reset = np.zeros(shape, bool)  # the step only reset: its action was ignored
    env_seed, torch_seed = np.random.SeedSequence((args.seed, iteration)).generate_state(2).tolist()
    torch.manual_seed(torch_seed)  # other noise and episodes for each --seed, and after each resume
    next_obs, _ = envs.reset(seed=env_seed // 2)  # plus n for environment n; evaluation has larger seeds
    next_is_reset = np.zeros(args.num_envs, bool)

    while global_step < args.total_timesteps:
        # 1. Rollout. Where an episode ends in step t, obs[t + 1] is its last observation, and step t + 1 only resets
        # the environment, so that obs[t + 2] is the first one of the next episode.
        # Observations are normalised by the statistics of all rollouts before this one (at first by mean 0, std 1), and
        # so to the end of the iteration: a saved policy comes with the statistics that it was trained with.
        policy.obs_mean.copy_(obs_moments.mean)
        policy.obs_std.copy_((obs_moments.var + 1e-8).sqrt())
        for t in range(args.num_steps):
            if not np.isfinite(next_obs).all():
                raise FloatingPointError(f"an observation of iteration {iteration + 1} is not finite")
            obs[t], is_reset[t] = next_obs, next_is_reset
            actions[t] = policy.choose(next_obs)
            next_obs, rewards[t], terminated[t], truncated[t], _ = envs.step(policy.to_env(actions[t]))
            next_is_reset = terminated[t] | truncated[t]
            # Step 0 goes on from step -1, which is the last one of the previous rollout.
            discounted[t] = np.where(is_reset[t], 0, rewards[t] + args.gamma * discounted[t - 1])
        obs[-1] = next_obs
        obs_moments.update(obs[:-1][~is_reset])
        return_moments.update(discounted[~is_reset])  # it counts already here, so that the first rewards are scaled too

        # 2. Advantages, and the log-probs of the policy that acted, which is still the same.
        scaled_rewards = (rewards / math.sqrt(return_moments.var + 1e-8)).clip(-10, 10) if args.norm_reward else rewards
        normed_obs = policy.normalize(obs)  # (T + 1, N, D)
        all_actions = torch.from_numpy(actions).to(args.device)  # (T, N, C)
        values, advantages = estimate(critic, normed_obs, scaled_rewards, terminated, truncated, args)  # (T, N) each
        with torch.no_grad():
            log_probs, _ = policy.evaluate_actions(normed_obs[:-1], all_actions)  # (T, N)
        keep = torch.from_numpy(~is_reset).to(args.device)  # (T, N); indexing with it makes (B, ...) of (T, N, ...)
        batch = Batch(
            obs=normed_obs[:-1][keep],
            actions=all_actions[keep],
            log_probs=log_probs[keep],
            values=values[keep],
            advantages=advantages[keep],
            returns=(advantages + values)[keep],
        )
        explained_variance = 1 - (batch.advantages.var() / batch.returns.var()).item()  # advantages are the errors

        # 3. Update: a step of the optimizer for each minibatch.
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        history, is_too_far = [], False
        for epoch in range(args.update_epochs):
            if epoch > 0 and args.recompute_advantages:
                values, advantages = estimate(critic, normed_obs, scaled_rewards, terminated, truncated, args)
                batch = batch._replace(advantages=advantages[keep], returns=(advantages + values)[keep])
            for rows in torch.randperm(len(batch.obs)).chunk(args.num_minibatches):
                minibatch = Batch(*(column[rows] for column in batch))
                loss, figures = ppo_loss(policy, critic, minibatch, kl_coef, args)
                if args.target_kl is not None and history and figures["approx_kl"] > args.target_kl:
                    is_too_far = True  # but the first minibatch is always learned from
                    break
                optimizer.zero_grad()
                loss.backward()
                figures["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                history.append(figures)
            if is_too_far:
                break
        with torch.no_grad():
            log_probs, _ = policy.evaluate_actions(batch.obs, batch.actions)  # (B,)
            kl = approximate_kl(log_probs - batch.log_probs).item()
        if args.objective == "kl-penalty":  # PPO paper, section 4
            if kl > 1.5 * args.kl_penalty_target:
                kl_coef *= 2
            elif kl < args.kl_penalty_target / 1.5:
                kl_coef /= 2

        # 4. Metrics, of which those of ppo_loss are means over the minibatches.
        iteration += 1
        global_step += len(batch.obs)
        seconds = time.perf_counter() - start_time
        mean_return = np.mean(episode_returns) if episode_returns else math.nan
        metrics = {
            "global_step": global_step,
            "charts/episodic_return": mean_return,
            "charts/episodic_length": np.mean(episode_lengths) if episode_lengths else math.nan,
            "charts/SPS": global_step / seconds,
            "charts/learning_rate": learning_rate,
            "losses/explained_variance": explained_variance,
            "losses/kl_after_update": kl,
            "losses/kl_coef": kl_coef,
        }
        for name in history[0]:
            metrics[f"losses/{name}"] = torch.stack([figures[name] for figures in history]).mean().item()
        if not math.isfinite(metrics["losses/grad_norm"]):
            raise FloatingPointError(f"iteration {iteration}: a reward or the loss is not finite")
        log.write(metrics)
        bar.update(len(batch.obs))
        bar.set_postfix_str(f"return {mean_return:.1f}")
        if iteration % args.checkpoint_interval == 0:
            save_run()

    save_run()
    for closable in (envs, log.csv, log.writer, bar):
        closable.close()
    summary = {"global_step": global_step, "seconds": seconds}
    return summary | ({"train_return": np.mean(episode_returns)} if episode_returns else {})


# -------------------------------------------------------------------------------- environments, files and evaluation


class UserError(Exception):
    """A mistake in what the user gave. It ends the program with one line."""


def make_envs(args: Args, num_envs: int, **options) -> gym.vector.VectorEnv:
    """Environments with flat observations. They record the returns of their episodes."""
    envs = gym.make_vec(args.env_id, num_envs, args.vectorization_mode, **options)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(action_space, gym.spaces.Box) or not obs_space.is_np_flattenable:
        raise UserError(f"--env-id {args.env_id}: {action_space} is not Box, or {obs_space} cannot be flattened")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {args.env_id} does not reset in the step after the end of an episode")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
    return RecordEpisodeStatistics(envs)


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


def load_policy(run_dir: str | Path) -> Policy:
    """The policy that a run saved. Raises UserError."""
    path = Path(run_dir, "policy.pt")
    policy = Policy(**load(path)["spec"])
    load(path, policy=policy)
    return policy


def evaluate(args: Args, run_dir: Path, video: bool = False) -> dict[str, float]:
    """Mean returns of the saved policy: of an episode in each of --eval-episodes environments, or of one on video."""
    if video:
        envs = RecordVideo(make_envs(args, 1, render_mode="rgb_array"), run_dir / "videos")
    else:
        envs = make_envs(args, args.eval_episodes)
    policy, means = load_policy(run_dir).to(args.device), {}
    for mode in ("greedy", "sampled"):
        torch.manual_seed(args.seed)
        obs, _ = envs.reset(seed=2**31 + 1000 * args.seed)
        total, alive = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        for _ in range(100_000):  # without a time limit, an episode may never end
            obs, rewards, terminated, truncated, _ = envs.step(policy.act(obs, greedy=mode == "greedy"))
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

    above_0 = "num_envs total_timesteps learning_rate update_epochs num_minibatches clip_coef kl_penalty_target"
    above_0 += " max_grad_norm target_kl checkpoint_interval eval_episodes"
    for name in above_0.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite")
    if args.num_steps < 2 or args.seed < 0 or not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        raise UserError("--num-steps must be above 1, --seed at least 0, --gamma and --gae-lambda between 0 and 1")
    if args.num_minibatches > args.num_steps * args.num_envs or not math.isfinite(
        args.ent_coef + args.vf_coef + args.log_std_init
    ):
        raise UserError(
            "--num-minibatches must be at most the rows of a rollout, --ent-coef, --vf-coef and --log-std-init finite"
        )
    if "cuda" in args.device and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU")
    if args.capture_video:
        import moviepy  # noqa: F401 (where it is not there, the error comes before the training)
    run_name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(earlier_run or args.run_dir or f"runs/{run_name}")
    if not earlier_run and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} holds a run: give another --run-dir, or --resume it")
    if args.play:
        evaluate(args, run_dir)
    else:
        summary = train(args, run_dir) | evaluate(args, run_dir)
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"saved in {run_dir}")
    if args.capture_video:
        evaluate(args, run_dir, video=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, FloatingPointError, ModuleNotFoundError, gym.error.Error) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
