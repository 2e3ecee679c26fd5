# /// script
# requires-python = ">=3.11"
# dependencies = ["gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
#                 "tyro==1.0.16"]
# ///
"""PPO for discrete actions: an MLP policy, in any gymnasium environment whose action space is Discrete.

    python ppo_mlp_discrete.py                          # CartPole-v1: return 500 after 100k steps, in 13 s on a CPU
    python ppo_mlp_discrete.py --env-id Acrobot-v1 --run-dir runs/acrobot
    python ppo_mlp_discrete.py --play runs/acrobot      # returns of the policy that this run saved
    python ppo_mlp_discrete.py --resume runs/acrobot    # goes on from the last checkpoint of a run that was stopped

PPO repeats these four steps, numbered likewise in `train`:
1. Rollout: the policy takes T steps in each of N environments.
2. Advantages: how much better than the critic expected did each action turn out? (`compute_gae`)
3. Update: in several passes over these steps, good actions become likelier and bad ones less likely; beyond a factor of
   1 ± epsilon there is nothing to gain (`ppo_loss`). The critic learns what to expect. Then the data is thrown away.
4. Metrics, and now and then a checkpoint.
To change the networks edit `mlp` (flat input), the loss `ppo_loss`, the environments `make_envs`. The rest is files.

Shapes: T steps, N environments, B rows of a batch or minibatch, D numbers in an observation, A actions.
Sources: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, "The 37 Implementation Details of
PPO" https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

Where this differs from CleanRL's ppo.py, apart from its defaults, which are for CartPole-v1:
- An episode that a time limit cuts off (truncated) counts with the value of its last observation, not with 0.
- The step after an episode, which gymnasium 1.x spends on the reset whatever the action, is left out.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics, RecordVideo, TransformAction
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """PPO with an MLP policy for discrete actions. The defaults solve CartPole-v1."""

    env_id: str = "CartPole-v1"  # id of a gymnasium environment; "module:Name-v0" imports the module first
    seed: int = 1  # of weights, environments, actions and shuffling
    total_timesteps: int = 100_000  # length of the training in steps, over all environments
    num_envs: int = 8  # parallel environments, N
    num_steps: int = 64  # steps of each environment in a rollout, T; at least 2, as one may only reset
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None  # None leaves it to gymnasium
    learning_rate: float = 2e-3  # Adam's step size at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount factor per step
    gae_lambda: float = 0.9  # lambda of generalised advantage estimation
    update_epochs: int = 8  # passes over each rollout
    num_minibatches: int = 4  # per pass, at most
    norm_adv: bool = True  # normalise advantages within each minibatch
    objective: Literal["clip", "kl-penalty"] = "clip"  # the PPO paper's eq. 7, or its alternative, eq. 8
    clip_coef: float = 0.2  # epsilon of the clipped objective, and of the clipped value loss
    clip_vloss: bool = False  # clip the value loss; arXiv:2006.05990 found that it hurts
    kl_penalty_target: float = 0.01  # KL(old || new) after an update, in nats, that kl-penalty aims at
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # the gradient of policy and critic together is clipped to this norm
    target_kl: float | None = None  # end an update before a minibatch with a larger KL(old || new), in nats
    run_dir: str | None = None  # folder for all that the run leaves; default: runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on from, with its flags unless given anew; episodes start afresh
    checkpoint_interval: int = 20  # iterations between checkpoints
    eval_episodes: int = 20  # episodes of the evaluation, with greedy and again with sampled actions
    capture_video: bool = False  # film a greedy and a sampled episode; needs moviepy, and pygame for classic control
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
    """A categorical distribution over A actions, given an observation."""

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()
        self.actor = mlp(obs_dim, num_actions, output_gain=0.01)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs (...) of actions (...) for observations (..., D), and entropies (...) of the distributions."""
        log_probs = self.actor(obs).log_softmax(-1)  # (..., A), of all actions
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, actions[..., None]).squeeze(-1), entropies

    @torch.no_grad()
    def act(self, obs: ndarray, greedy: bool = False) -> ndarray:
        """Actions (...), counted from 0, for observations (..., D): the likeliest ones, or samples."""
        logits = self.actor(torch.from_numpy(obs).to(self.actor[-1].weight))  # (..., A)
        if not greedy:  # the largest of logits + Gumbel noise is a sample, found faster than by torch.multinomial
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.argmax(-1).numpy(force=True)[()]


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


class Batch(NamedTuple):
    """Steps of a rollout, and what policy and critic said of them before the update."""

    obs: Tensor  # (B, D)
    actions: Tensor  # (B,)
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


def minibatches(batch: Batch, args: Args) -> Iterator[Batch]:
    """The minibatches of all passes. In each pass every row comes once, in a random order."""
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.obs)).chunk(args.num_minibatches):
            yield Batch(*(column[rows] for column in batch))


# ---------------------------------------------------------------------------------------------------------- training


def train(args: Args, run_dir: Path) -> dict[str, float]:
    """Trains a policy, and leaves all files but summary.json in run_dir. Raises UserError and FloatingPointError."""
    torch.set_num_threads(1)  # more only slow networks of this size down
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    obs_dim, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    policy = Policy(obs_dim, num_actions).to(args.device)
    critic = mlp(obs_dim, 1, output_gain=1.0).to(args.device)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    learner = {"policy": policy, "critic": critic, "optimizer": optimizer}
    episode_returns, episode_lengths = envs.return_queue, envs.length_queue  # of the last 100 episodes
    iteration, global_step, seconds, kl_coef = 0, 0, 0.0, 1.0
    if args.resume:
        checkpoint = load(run_dir / "checkpoint.pt", **learner)
        iteration, global_step, seconds, kl_coef = checkpoint["progress"]
        episode_returns.extend(checkpoint["queues"][0])
        episode_lengths.extend(checkpoint["queues"][1])
    start_time = time.perf_counter() - seconds

    def save_run() -> None:
        save(run_dir / "policy.pt", spec=(obs_dim, num_actions), policy=policy.state_dict())
        states = {name: part.state_dict() for name, part in learner.items()}
        queues = [[*map(float, queue)] for queue in (episode_returns, episode_lengths)]
        save(run_dir / "checkpoint.pt", progress=(iteration, global_step, seconds, kl_coef), queues=queues, **states)

    run_dir.mkdir(parents=True, exist_ok=True)
    save_run()  # before config.json, so that every run that has one can be resumed
    log = MetricsLog(run_dir, args, iteration, global_step)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step")

    shape = (args.num_steps, args.num_envs)  # T, N of what is stored of a rollout
    obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), np.float32)  # before each step, and after the last
    actions = np.zeros(shape, np.int64)
    rewards = np.zeros(shape, np.float32)
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
        for t in range(args.num_steps):
            obs[t], is_reset[t] = next_obs, next_is_reset
            actions[t] = policy.act(next_obs)
            next_obs, rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
            next_is_reset = terminated[t] | truncated[t]
        obs[-1] = next_obs

        # 2. Advantages, and the log-probs of the policy that acted, which is still the same.
        all_obs = torch.from_numpy(obs).to(args.device)  # (T + 1, N, D)
        all_actions = torch.from_numpy(actions).to(args.device)  # (T, N)
        with torch.no_grad():
            values = critic(all_obs).squeeze(-1)  # (T + 1, N)
            log_probs, _ = policy.evaluate_actions(all_obs[:-1], all_actions)  # (T, N)
        gae = compute_gae(rewards, values.numpy(force=True), terminated, truncated, args.gamma, args.gae_lambda)
        advantages = torch.from_numpy(gae).to(args.device)  # (T, N)
        keep = torch.from_numpy(~is_reset).to(args.device)  # (T, N); indexing with it makes (B, ...) of (T, N, ...)
        batch = Batch(
            obs=all_obs[:-1][keep],
            actions=all_actions[keep],
            log_probs=log_probs[keep],
            values=values[:-1][keep],
            advantages=advantages[keep],
            returns=(advantages + values[:-1])[keep],
        )
        explained_variance = 1 - (batch.advantages.var() / batch.returns.var()).item()  # advantages are the errors

        # 3. Update: a step of the optimizer for each minibatch.
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        history = []
        for minibatch in minibatches(batch, args):
            loss, figures = ppo_loss(policy, critic, minibatch, kl_coef, args)
            if args.target_kl is not None and history and figures["approx_kl"] > args.target_kl:
                break  # but the first minibatch is always learned from
            optimizer.zero_grad()
            loss.backward()
            figures["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            history.append(figures)
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
            raise FloatingPointError(f"iteration {iteration}: an observation, a reward or the loss is not finite")
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
    """Environments with flat observations and actions that count from 0. They record the returns of their episodes."""
    envs = gym.make_vec(args.env_id, num_envs, args.vectorization_mode, **options)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(action_space, gym.spaces.Discrete) or not obs_space.is_np_flattenable:
        raise UserError(f"--env-id {args.env_id}: {action_space} is not Discrete, or {obs_space} cannot be flattened")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {args.env_id} does not reset in the step after the end of an episode")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
    if action_space.start:
        envs = TransformAction(envs, lambda actions: actions + action_space.start)
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
    policy = Policy(*load(path)["spec"])
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
    if args.num_minibatches > args.num_steps * args.num_envs or not math.isfinite(args.ent_coef + args.vf_coef):
        raise UserError("--num-minibatches must be at most the rows of a rollout, --ent-coef and --vf-coef finite")
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
