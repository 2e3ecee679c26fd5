"""Tests of ppo_mlp_discrete.py: formulas, probe environments, and real runs that are killed, resumed and spread."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs  # noqa: F401 (registers the probes)
import pytest
import ranks_gradient
import torch
from helpers import (
    ROOT,
    flags,
    read_metrics,
    resume_as_printed,
    run_main,
    run_two_ranks,
    same_metrics,
    same_weights,
    start,
    wait_for_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import ppo_mlp_discrete as ppo
from ppo_mlp_discrete import Args, CategoricalBatch

SCRIPT = ROOT / "ppo_mlp_discrete.py"
SMALL = {"num_envs": 4, "num_steps": 16, "eval_episodes": 0, "update_epochs": 4, "num_minibatches": 2}


# -------------------------------------------------------------------------------------------------------------- helpers


def load_networks(run_dir):
    """Actor and critic of a run's last checkpoint."""
    spec = ppo.load_policy(run_dir).spec
    actor, critic = ppo.mlp(spec["obs_dim"], sum(spec["nvec"]), 0.01), ppo.mlp(spec["obs_dim"], 1, 1.0)
    ppo.flatten_parameters(actor, critic).data.copy_(ppo.load_saved(Path(run_dir) / "checkpoint.pt")["parameters"])
    return actor, critic


# ------------------------------------------------------------------------------------- generalised advantage estimation


def gae_by_definition(rewards, values, terminated, truncated, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, ending with the first delta of a finished step: O(T^2)."""
    steps, envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    for n in range(envs):
        for t in range(steps):
            for later in range(t, steps):
                bootstrap = 0.0 if terminated[later, n] else gamma * values[later + 1, n]
                delta = rewards[later, n] + bootstrap - values[later, n]
                advantages[t, n] += (gamma * lam) ** (later - t) * delta
                if terminated[later, n] or truncated[later, n]:
                    break
    return advantages


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31), st.floats(0, 0.7))
def test_gae_equals_its_definition(steps, envs, gamma, lam, seed, density):
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(steps, envs, generator=rng, dtype=torch.float64)
    values = torch.randn(steps + 1, envs, generator=rng, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, envs, generator=rng) < density
    ours = ppo.compute_gae(rewards, values, terminated, truncated, gamma, lam)
    torch.testing.assert_close(ours, gae_by_definition(rewards, values, terminated, truncated, gamma, lam))


def one_env_gae(rewards, values, terminated=(), truncated=()):
    steps = range(len(rewards))
    ends = ([[t in where] for t in steps] for where in (terminated, truncated))
    columns = torch.tensor(rewards)[:, None], torch.tensor(values)[:, None], *map(torch.tensor, ends)
    return ppo.compute_gae(*columns, 0.5, 0.5).flatten().tolist()


def test_gae_by_hand():
    # gamma = lambda = 1/2: delta_0 = 1 + 2 - 2 = 1, delta_1 = 1 + 4 - 4 = 1, and A_0 = 1 + 1/4
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0]) == [1.25, 1.0]  # the segment's end bootstraps
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], terminated=[1]) == [0.25, -3.0]  # a terminated end does not
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], truncated=[1]) == [1.25, 1.0]  # a truncated one does
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], truncated=[0]) == [1.0, 1.0]  # and cuts what comes after it


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_reset_row_changes_nothing(end):
    """Whatever stands in the row after an episode (its reward, the value of the next episode's start) stays there."""
    before = one_env_gae([1.0, 1.0, 0.0, 1.0], [2.0, 4.0, 6.0, 7.0, 8.0], **{end: [1]})
    after = one_env_gae([1.0, 1.0, 99.0, 1.0], [2.0, 4.0, 6.0, 70.0, 8.0], **{end: [1]})
    assert before[:2] == after[:2]


# --------------------------------------------------------------------------------------------------------------- losses


def test_clipped_policy_loss_by_hand():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    losses = ppo.clipped_policy_loss(ratio.log(), advantages, 0.2)
    # Good actions gain nothing above 1.2; bad ones nothing below 0.8; what makes matters worse counts in full.
    torch.testing.assert_close(losses, -torch.tensor([2.4, 1.0, -3.0, -1.6, 2.2]))


def test_clipped_policy_loss_has_no_gradient_beyond_the_clip():
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    ppo.clipped_policy_loss(log_ratio, torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0]), 0.2).sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, -1.0, 3.0, 0.0, -2.2]))


def test_kl_penalty_policy_loss_by_hand():
    losses = ppo.kl_penalty_policy_loss(
        torch.tensor([2.0, 0.5]).log(), torch.tensor([3.0, -1.0]), torch.tensor([0.1, 0.2]), 4.0
    )
    torch.testing.assert_close(losses, torch.tensor([0.4 - 6.0, 0.8 + 0.5]))


def test_beta_follows_the_papers_rule():
    assert [ppo.adapt_beta(1.0, kl, target=0.3) for kl in (0.19, 0.21, 0.44, 0.46)] == [0.5, 1.0, 1.0, 2.0]


def test_value_loss_by_hand():
    values, old_values, returns = (
        torch.tensor([1.0, 1.0, 3.0]),
        torch.tensor([0.0, 2.0, 0.0]),
        torch.tensor([3.0, 3.0, 3.0]),
    )
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, None), torch.tensor([2.0, 2.0, 0.0]))
    # Clipped values 0.5, 1.5 and 0.5: the larger error counts.
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, 0.5), torch.tensor([3.125, 2.0, 3.125]))


def random_batch(nvec, rows=7, obs_dim=3, dtype=torch.float64):
    """A batch with log-probs of another policy, so that ratios lie on both sides of the clip."""
    logits = torch.randn(rows, sum(nvec), dtype=dtype)
    first = np.cumsum([0, *nvec[:-1]]).tolist()
    columns = torch.stack([torch.randint(c, c + n, (rows,)) for c, n in zip(first, nvec)], -1)
    vectors = torch.randn(3, rows, dtype=dtype)
    return CategoricalBatch(
        torch.randn(rows, obs_dim, dtype=dtype), columns, ppo.log_softmax_each(logits, nvec), *vectors
    )


def loss_with_distributions(actor, critic, batch, nvec, beta, args):
    """The mean loss, written with torch.distributions and without any function of the script."""
    loss = torch.zeros((), dtype=torch.float64)
    logits, values = actor(batch.obs), critic(batch.obs)[:, 0]
    first = np.cumsum([0, *nvec[:-1]]).tolist()
    for b in range(len(values)):
        log_ratio, entropy, kl = 0.0, 0.0, 0.0
        for c, (begin, n) in enumerate(zip(first, nvec)):
            new = torch.distributions.Categorical(logits=logits[b, begin : begin + n])
            old = torch.distributions.Categorical(logits=batch.old_log_probs[b, begin : begin + n])
            action = batch.columns[b, c] - begin
            log_ratio = log_ratio + new.log_prob(action) - old.log_prob(action)
            entropy = entropy + new.entropy()
            kl = kl + torch.distributions.kl_divergence(old, new)
        ratio, advantage = log_ratio.exp(), batch.advantages[b]
        if args.objective == "clip":
            low, high = 1 - args.clip_coef, 1 + args.clip_coef
            policy_loss = -min(ratio * advantage, max(low, min(high, ratio)) * advantage)
        else:
            policy_loss = -(ratio * advantage - beta * kl)
        error = (values[b] - batch.returns[b]) ** 2
        if args.clip_vloss:
            old = batch.old_values[b]
            near = old + max(-args.clip_coef, min(args.clip_coef, values[b] - old))
            error = max(error, (near - batch.returns[b]) ** 2)
        loss = loss + policy_loss + args.vf_coef * error / 2 - args.ent_coef * entropy
    return loss / len(values)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("nvec", [[4], [2, 3]])
def test_loss_and_gradient(objective, nvec):
    """The loss equals an independent formula, and its gradient the loss's finite differences."""
    torch.manual_seed(3)
    args = Args(objective=objective, ent_coef=0.03, clip_vloss=True)
    actor, critic = torch.nn.Linear(3, sum(nvec)).double(), torch.nn.Linear(3, 1).double()
    batch = random_batch(nvec)
    parameters = [*actor.parameters(), *critic.parameters()]

    def loss():
        return ppo.categorical_ppo_loss(actor, critic, batch, len(batch.obs), nvec, 0.7, args)[0]

    torch.testing.assert_close(loss(), loss_with_distributions(actor, critic, batch, nvec, 0.7, args))
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        for index in itertools.product(*map(range, parameter.shape)):
            with torch.no_grad():
                parameter[index] += 1e-6
                above = loss()
                parameter[index] -= 2e-6
                below = loss()
                parameter[index] += 1e-6
            assert gradient[index].item() == pytest.approx(((above - below) / 2e-6).item(), abs=1e-7)


def test_loss_reports_each_row():
    torch.manual_seed(0)
    batch, args = random_batch([3]), Args(ent_coef=0.1)
    actor, critic = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 1).double()
    loss, parts = ppo.categorical_ppo_loss(actor, critic, batch, 7, [3], 1.0, args)
    means = {name: part.mean() for name, part in parts.items()}
    total = means["policy_loss"] + args.vf_coef * means["value_loss"] - args.ent_coef * means["entropy"]
    torch.testing.assert_close(loss.detach(), total)
    new = torch.distributions.Categorical(logits=actor(batch.obs))
    expected = new.log_prob(batch.columns[:, 0]) - batch.old_log_probs.gather(1, batch.columns)[:, 0]
    torch.testing.assert_close(parts["log_ratio"], expected.detach())


@pytest.mark.parametrize("nvec", [[5], [2, 3]])
def test_means_of_the_kl_estimators_equal_the_exact_kl(nvec):
    torch.manual_seed(1)
    old, new = (ppo.log_softmax_each(torch.randn(1, sum(nvec), dtype=torch.float64), nvec) for _ in range(2))
    first = np.cumsum([0, *nvec[:-1]]).tolist()
    columns = torch.tensor(list(itertools.product(*(range(c, c + n) for c, n in zip(first, nvec)))))  # every action
    chance = old[0][columns].sum(-1).exp()
    k1, k3 = ppo.kl_estimates((new - old)[0][columns].sum(-1))
    exact = sum(
        torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(logits=x[0, c : c + n]) for x in (old, new))
        )
        for c, n in zip(first, nvec)
    )
    torch.testing.assert_close((chance * k1).sum(), exact)
    torch.testing.assert_close((chance * k3).sum(), exact)
    torch.testing.assert_close(ppo.categorical_kl(old, new)[0], exact)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


# ---------------------------------------------------------------------------------------------------- parts of the loop


def test_networks_are_initialised_as_ppo_wants_them():
    torch.manual_seed(0)
    for gain, network in ((0.01, ppo.mlp(4, 3, 0.01)), (1.0, ppo.mlp(4, 1, 1.0))):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers[:2]] == [(64, 4), (64, 64)]
        for layer, expected in zip(layers, (math.sqrt(2), math.sqrt(2), gain)):
            singular_values = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(
                singular_values, torch.full_like(singular_values, expected), rtol=1e-4, atol=1e-6
            )
            assert not layer.bias.any()


def test_tanh_is_tanh():
    x = torch.linspace(-30, 30, 2001, requires_grad=True)
    ours, theirs = ppo.Tanh()(x), torch.tanh(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=4e-7)


def test_the_policy_at_work_is_the_trained_network():
    torch.manual_seed(0)
    actor = ppo.mlp(5, 7, 1.0)
    policy = ppo.Policy({"nvec": [3, 4], "start": [0, 2], "action_shape": [2], "dtype": "int64"}, actor.state_dict())
    obs = torch.randn(9, 5)
    logits = actor(obs).detach()
    np.testing.assert_allclose(policy.logits(obs.numpy()), logits.numpy(), atol=1e-6)
    best = torch.stack([logits[:, :3].argmax(-1), 2 + logits[:, 3:].argmax(-1)], -1)
    np.testing.assert_array_equal(policy.act(obs.numpy()), best.numpy())
    np.testing.assert_array_equal(policy.act(obs.numpy()[0]), best.numpy()[0])


def test_sampled_actions_follow_the_policy():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.0], np.float32)
    spec = {"nvec": [3, 2], "start": [0, 0], "action_shape": [2], "dtype": "int64"}
    policy = ppo.Policy(spec, {"weight": torch.zeros(5, 1), "bias": torch.tensor(logits)})
    actions = policy.act(np.zeros((20_000, 1)), np.random.default_rng(0))
    for component, part in ((0, logits[:3]), (1, logits[3:])):
        chance = np.exp(part.astype(np.float64))
        expected = chance / chance.sum() * len(actions)
        assert chisquare(np.bincount(actions[:, component], minlength=len(part)), expected).pvalue > 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 7))
def test_every_row_once_per_epoch(rows, num_minibatches):
    column = torch.arange(rows, dtype=torch.float32)
    batch = CategoricalBatch(column[:, None], column[:, None], column[:, None], column, column, column)
    minibatches = list(ppo.shuffled_minibatches(batch, Args(num_minibatches=num_minibatches, norm_adv=False)))
    assert len(minibatches) == min(num_minibatches, rows)  # empty ones are skipped
    sizes = [len(m.obs) for m, _ in minibatches]
    assert sizes == [count for _, count in minibatches]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([m.returns for m, _ in minibatches]).tolist()) == column.tolist()
    assert all(torch.equal(m.obs[:, 0], m.advantages) for m, _ in minibatches)  # columns stay together


def test_epochs_are_shuffled_anew(tmp_path, monkeypatch):
    orders = []
    loss = ppo.categorical_ppo_loss
    monkeypatch.setattr(ppo, "categorical_ppo_loss", lambda *a: (orders.append(a[2].returns.tolist()), loss(*a))[1])
    args = {"num_envs": 4, "num_steps": 16, "num_minibatches": 1, "update_epochs": 3, "total_timesteps": 40}
    ppo.train(Args(run_dir=str(tmp_path / "run"), eval_episodes=0, **args))
    assert len(orders) == len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_advantages_are_normalised_within_each_minibatch():
    torch.manual_seed(0)
    batch = random_batch([2], rows=21, dtype=torch.float32)._replace(advantages=torch.randn(21) * 5 + 3)
    for minibatch, _ in ppo.shuffled_minibatches(batch, Args(num_minibatches=4)):
        assert minibatch.advantages.mean().item() == pytest.approx(0, abs=1e-6)
        assert minibatch.advantages.std().item() == pytest.approx(1, abs=1e-6)
    alone = ppo.shuffled_minibatches(batch, Args(num_minibatches=21))
    assert sorted(m.advantages.item() for m, _ in alone) == sorted(batch.advantages.tolist())


def test_global_moments_equal_numpys():
    torch.manual_seed(0)
    parts = [torch.randn(50) * 3 + 100, torch.tensor([7.0]), torch.rand(9) > 0.5]
    count, mean, std = ppo.global_moments(parts)
    assert count.tolist() == [50, 1, 9]
    np.testing.assert_allclose(mean, [part.double().mean() for part in parts])
    np.testing.assert_allclose(
        std, [np.std(parts[0].numpy().astype(float), ddof=1), 0, np.std(parts[2].numpy(), ddof=1)]
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_episode_statistics_equal_a_simulation(steps, envs, seed):
    """Over three rollouts in a row, against a loop over single steps."""
    rng = np.random.default_rng(seed)
    under_way = np.zeros((2, envs))
    resets = np.zeros((steps + 1, envs), bool)
    total, length = np.zeros(envs), np.zeros(envs)
    for _ in range(3):
        rewards = rng.normal(size=(steps, envs))
        resets[0] = resets[-1]
        for t in range(steps):
            resets[t + 1] = ~resets[t] & (rng.random(envs) < 0.3)
        finished = ppo.finished_episodes(rewards, resets, under_way)
        for t, n in itertools.product(range(steps), range(envs)):
            if not resets[t, n]:
                total[n] += rewards[t, n]
                length[n] += 1
            if resets[t + 1, n]:
                np.testing.assert_allclose(finished[:, t, n], (total[n], length[n]))
                total[n] = length[n] = 0
            else:
                assert np.isnan(finished[:, t, n]).all()


def test_flattened_parameters_share_memory():
    actor, critic = ppo.mlp(3, 2, 0.01), ppo.mlp(3, 1, 1.0)
    before = [p.detach().clone() for p in (*actor.parameters(), *critic.parameters())]
    flat = ppo.flatten_parameters(actor, critic)
    assert all(torch.equal(a, b) for a, b in zip(before, (*actor.parameters(), *critic.parameters())))
    (actor(torch.ones(1, 3)).sum() + critic(torch.ones(1, 3)).sum()).backward()
    assert flat.grad.norm() > 0
    assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for m in (actor, critic) for p in m.parameters()]))
    flat.data.zero_()
    assert not any(p.any() for m in (actor, critic) for p in m.parameters())


# ------------------------------------------------------------------------------------ probes: whole runs, known answers


def train_probe(tmp_path, name, **changes):
    """Trains on a probe and returns the run directory."""
    args = {**SMALL, "env_id": f"probe_envs:{name}-v0", "total_timesteps": 4_000, "learning_rate": 3e-3, "gamma": 0.9}
    ppo.train(Args(run_dir=str(tmp_path / name), **{"checkpoint_interval": 1000} | args | changes))
    return tmp_path / name


def values_of(run_dir, *observations):
    return load_networks(run_dir)[1](torch.tensor(observations, dtype=torch.float32)).flatten().tolist()


def test_probe_constant_reward(tmp_path):
    assert values_of(train_probe(tmp_path, "Constant"), [0]) == pytest.approx([1], abs=0.02)


def test_probe_reward_depends_on_observation(tmp_path):
    assert values_of(train_probe(tmp_path, "Coloured"), [-1], [1]) == pytest.approx([-1, 1], abs=0.05)


def test_probe_discounting_over_two_steps(tmp_path):
    assert values_of(train_probe(tmp_path, "Delayed"), [0], [1]) == pytest.approx([0.9, 1], abs=0.03)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
def test_probe_reward_depends_on_action(tmp_path, objective):
    policy = ppo.load_policy(train_probe(tmp_path, "Bandit", objective=objective))
    assert np.mean(policy.act(np.zeros((1000, 1)), np.random.default_rng(0)) == 8) > 0.95
    assert policy.act(np.zeros(1)) == 8


def test_probe_reward_depends_on_observation_and_action(tmp_path):
    run_dir = train_probe(tmp_path, "Mirror", eval_episodes=50)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_return_greedy"] == 1
    assert summary["eval_return_sampled"] > 0.9


def test_probe_endless_task_cut_by_truncation(tmp_path):
    """V = r / (1 - gamma) = 10 although every episode stops after 5 steps; 4.1 where that counts as termination."""
    run_dir = train_probe(tmp_path, "Endless", total_timesteps=10_000, gae_lambda=0.95)
    assert values_of(run_dir, [0]) == pytest.approx([10], abs=0.3)


def test_probe_composite_spaces(tmp_path):
    """Dict observations with an image and a shifted Discrete; MultiDiscrete actions with starts."""
    run_dir = train_probe(tmp_path, "Locks", eval_episodes=50, total_timesteps=6_000)
    assert json.loads((run_dir / "summary.json").read_text())["eval_return_greedy"] == 1


def test_environments_in_processes_of_their_own(tmp_path):
    """They give what those in this process give."""
    for mode in ("sync", "async"):
        args = SMALL | {"env_id": "probe_envs:Locks-v0", "total_timesteps": 500, "vectorization_mode": mode}
        ppo.train(Args(run_dir=str(tmp_path / mode), **args))
    assert read_metrics(tmp_path / "sync") == read_metrics(tmp_path / "async")
    same_weights(tmp_path / "sync", tmp_path / "async")


def test_probe_tuple_observation_and_table_of_actions(tmp_path):
    run_dir = train_probe(tmp_path, "Grid", eval_episodes=50)
    assert json.loads((run_dir / "summary.json").read_text())["eval_return_greedy"] == 1


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Acrobot-v1", "CartPole-v1"])
def test_gymnasiums_own_environments(tmp_path, env_id):
    """One-hot Discrete observations; an environment without, and one with a vectorised form."""
    summary = ppo.train(Args(env_id=env_id, total_timesteps=200, run_dir=str(tmp_path / "run"), **SMALL))
    assert summary["global_step"] >= 200


def test_reset_rows_are_left_out(tmp_path, monkeypatch):
    """Every step counts update_epochs times, reset rows (negative observations) never."""
    seen = []
    loss = ppo.categorical_ppo_loss
    monkeypatch.setattr(ppo, "categorical_ppo_loss", lambda *a: (seen.append(a[2].obs.flatten()), loss(*a))[1])
    run_dir = train_probe(tmp_path, "Numbered", total_timesteps=600, eval_episodes=0)
    rows = torch.cat(seen)
    assert (rows > 0).all()
    metrics = read_metrics(run_dir)
    assert len(rows) == SMALL["update_epochs"] * int(metrics[-1]["global_step"])
    assert int(metrics[-1]["global_step"]) < len(metrics) * SMALL["num_envs"] * SMALL["num_steps"]
    # Every episode has reward 1 per step: return and length agree, and lie within the lengths the probe makes.
    assert all(row["charts/episodic_return"] == row["charts/episodic_length"] for row in metrics)
    assert 4 < float(metrics[-1]["charts/episodic_return"]) < 5


def test_ratio_is_one_before_the_first_step(tmp_path, monkeypatch):
    first_of_rollout = []
    loss = ppo.categorical_ppo_loss

    def spy(*a):
        result = loss(*a)
        first_of_rollout.append(result[1]["log_ratio"].abs().max().item())
        return result

    monkeypatch.setattr(ppo, "categorical_ppo_loss", spy)
    train_probe(tmp_path, "Numbered", total_timesteps=300, update_epochs=2, num_minibatches=3, eval_episodes=0)
    assert max(first_of_rollout[::6]) < 1e-6
    assert max(first_of_rollout) > 1e-3


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    norms, rates = [], []
    step = torch.optim.Adam.step

    def spy(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=300, max_grad_norm=0.1, learning_rate=0.01)
    assert max(norms) == pytest.approx(0.1, rel=1e-4)
    assert {eps for _, eps in rates} == {1e-5}
    rows = read_metrics(run_dir)
    steps_before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    expected = [0.01 * (1 - steps / 300) for steps in steps_before]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx(expected)
    assert rates[:: SMALL["update_epochs"] * SMALL["num_minibatches"]] == [(pytest.approx(r), 1e-5) for r in expected]
    assert max(float(row["losses/grad_norm"]) for row in rows) > 0.1  # logged before clipping


def test_learning_rate_can_stay(tmp_path):
    rows = read_metrics(train_probe(tmp_path, "Constant", total_timesteps=300, anneal_lr=False))
    assert {float(row["charts/learning_rate"]) for row in rows} == {3e-3}


def test_metrics_are_means_over_all_minibatches(tmp_path, monkeypatch):
    """Each loss column, computed anew from what the loss saw; Adam's gradients give the norms before clipping."""
    seen, norms, explained = [], [], []
    loss, minibatches = ppo.categorical_ppo_loss, ppo.shuffled_minibatches

    def spy_loss(*a):
        result = loss(*a)
        seen.append({name: part.double().numpy() for name, part in result[1].items()})
        return result

    def spy_batch(batch, args):
        explained.append(1 - np.var((batch.returns - batch.old_values).numpy()) / np.var(batch.returns.numpy()))
        return minibatches(batch, args)

    monkeypatch.setattr(ppo, "categorical_ppo_loss", spy_loss)
    monkeypatch.setattr(ppo, "shuffled_minibatches", spy_batch)
    step = torch.optim.Adam.step

    def spy_step(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    run_dir = train_probe(tmp_path, "Coloured", total_timesteps=400, learning_rate=0.03, max_grad_norm=1e9)
    per_iteration = SMALL["update_epochs"] * SMALL["num_minibatches"]
    for i, row in enumerate(read_metrics(run_dir)):
        here = slice(i * per_iteration, (i + 1) * per_iteration)
        parts = {name: np.concatenate([x[name] for x in seen[here]]) for name in seen[0]}
        ratio = np.exp(parts.pop("log_ratio"))
        parts["old_approx_kl"], parts["approx_kl"] = -np.log(ratio), ratio - 1 - np.log(ratio)
        parts["clipfrac"] = (ratio < 0.8) | (ratio > 1.2)
        expected = {name: np.mean(part) for name, part in parts.items()}
        expected |= {"grad_norm": np.mean(norms[here]), "explained_variance": explained[i * SMALL["update_epochs"]]}
        columns = {name.removeprefix("losses/"): float(x) for name, x in row.items() if name.startswith("losses/")}
        assert columns == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert max(float(row["losses/clipfrac"]) for row in read_metrics(run_dir)) > 0


def test_episodes_that_end_at_a_checkpoint(tmp_path):
    """One-step episodes end in the last row before each checkpoint; after the reset the first row counts again."""
    args = SMALL | {"num_steps": 3, "checkpoint_interval": 1, "total_timesteps": 99}
    summary = ppo.train(Args(env_id="probe_envs:Constant-v0", run_dir=str(tmp_path / "x"), **args))
    steps = [int(row["global_step"]) for row in read_metrics(tmp_path / "x")]
    assert steps == [8 * (i + 1) for i in range(len(steps))]  # step, reset, step in each of 4 environments
    assert summary["train_return"] == 1


def test_an_environment_without_a_limit_is_evaluated(tmp_path, monkeypatch):
    """An episode of a policy that never gets anywhere is cut."""
    limit = gym.wrappers.TimeLimit
    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: limit(env, steps // 100))  # 10,000 take too long
    run_dir = train_probe(tmp_path, "Forever", total_timesteps=100, eval_episodes=2)
    assert json.loads((run_dir / "summary.json").read_text())["eval_return_greedy"] == 100


def test_progress_without_a_terminal(tmp_path, capsys):
    train_probe(tmp_path, "Constant", total_timesteps=3200)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("3,200/3,200: return 1.0")


def test_kl_stop_comes_before_the_step(tmp_path, monkeypatch):
    """With a target below what one step changes, each rollout makes exactly one step."""
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self))[1])
    run_dir = train_probe(tmp_path, "Mirror", total_timesteps=500, target_kl=1e-9, num_minibatches=1)
    assert len(steps) == len(read_metrics(run_dir))


def test_target_return_stops_the_run(tmp_path):
    run_dir = train_probe(tmp_path, "Constant", target_return=1.0)
    rows = read_metrics(run_dir)
    finished = [int(row["global_step"]) for row in rows]  # one episode per step
    assert finished[-2] < 100 <= finished[-1]


def test_play_and_load_policy_give_the_summarys_returns(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    summary = ppo.train(Args(total_timesteps=2000, eval_episodes=5, seed=3, run_dir=str(run_dir)))
    assert summary == json.loads((run_dir / "summary.json").read_text())
    config = json.loads((run_dir / "config.json").read_text())
    assert {"args", "world_size", "versions", "git", "machine"} == set(config)
    assert Args(**config["args"]) == Args(total_timesteps=2000, eval_episodes=5, seed=3)
    assert {"script", "task", "seed", "global_step", "seconds", "steps_per_second", "train_return"} <= set(summary)
    assert all(isinstance(x, str) or math.isfinite(x) for x in summary.values())
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", "--play", str(run_dir / "policy.pt"), "--eval-episodes", "5", "--seed", "3"])
    ppo.main()
    greedy, sampled = capsys.readouterr().out.splitlines()
    assert f"mean {summary['eval_return_greedy']:.1f}" in greedy
    assert f"mean {summary['eval_return_sampled']:.1f}" in sampled
    policy, env = ppo.load_policy(run_dir), gym.make("CartPole-v1")
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.act(obs))


def test_tensorboard_holds_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = train_probe(tmp_path, "Mirror", total_timesteps=300)
    events = EventAccumulator(str(run_dir)).Reload()
    rows = read_metrics(run_dir, with_time=True)
    assert set(events.Tags()["scalars"]) == set(rows[0])
    for name in rows[0]:
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [int(row["global_step"]) for row in rows]
        assert [s.value for s in scalars] == pytest.approx([float(row[name]) for row in rows], nan_ok=True)


# ------------------------------------------------------------------------------- same again, killed, resumed and spread


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(run_dir=str(tmp_path / name), total_timesteps=1500, seed=seed, checkpoint_interval=7, **SMALL))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    same_weights(tmp_path / "a", tmp_path / "b")


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    """SIGKILL, then SIGTERM in the resumed run, then the command that it prints."""
    args = SMALL | {"total_timesteps": 8_000, "checkpoint_interval": 25, "objective": "kl-penalty", "eval_episodes": 2}
    process = start(ppo, "--run-dir", tmp_path / "cut", *flags(args))
    wait_for_rows(tmp_path / "cut", 40, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(tmp_path / "cut/metrics.csv", "a") as file:
        file.write("999,12")  # a row cut short, as a power failure may leave it
    before = ppo.load_saved(tmp_path / "cut/checkpoint.pt")["iteration"]
    assert before % 25 == 0
    process = start(ppo, "--resume", tmp_path / "cut")
    wait_for_rows(tmp_path / "cut", before + 30, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert ppo.load_saved(tmp_path / "cut/checkpoint.pt")["iteration"] > before
    resume_as_printed(ppo, errors, monkeypatch)
    whole = ppo.train(Args(run_dir=str(tmp_path / "whole"), **args))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    same_weights(tmp_path / "cut", tmp_path / "whole")
    resumed = json.loads((tmp_path / "cut/summary.json").read_text())
    timing = ("seconds", "steps_per_second")
    assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}


def test_gradients_of_two_ranks(tmp_path):
    """Two ranks with 5 and 8 rows in 3 minibatches give the gradient of one process with the union of each."""
    run_two_ranks(ROOT / "tests/ranks_gradient.py", tmp_path, 5, 8)
    batches = [ranks_gradient.make_batch(rank, rows) for rank, rows in enumerate((5, 8))]
    records = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert sorted(row for part in records[1] for row in part["rows"]) == list(range(8))
    for mine, other in zip(*records):
        assert torch.equal(mine["gradient"], other["gradient"])
        parts = zip(batches[0], batches[1])
        union = CategoricalBatch(*(torch.cat([a[mine["rows"]], b[other["rows"]]]) for a, b in parts))
        normalized = (union.advantages - union.advantages.mean()) / (union.advantages.std() + 1e-8)
        actor, critic = ranks_gradient.make_networks()
        flat = ppo.flatten_parameters(actor, critic)
        args = Args(ent_coef=0.1)
        union = union._replace(advantages=normalized)
        ppo.categorical_ppo_loss(actor, critic, union, len(normalized), [3], 1.0, args)[0].backward()
        torch.testing.assert_close(mine["gradient"], flat.grad, rtol=1e-5, atol=1e-6)


def test_two_ranks_equal_one_process(tmp_path):
    """The same environments and noise on two ranks give the gradients, metrics and weights of one process."""
    args = {**SMALL, "num_minibatches": 1, "total_timesteps": 900, "vectorization_mode": "sync", "target_kl": 0.03}
    args |= {"ent_coef": 0.01, "env_id": "Acrobot-v1", "num_steps": 64, "learning_rate": 1e-3}
    run_two_ranks(SCRIPT, *flags(args), "--run-dir", tmp_path / "two")
    ppo.train(Args(run_dir=str(tmp_path / "one"), **args))
    same_metrics(tmp_path / "one", tmp_path / "two", rel=2e-3, abs=1e-5)
    parameters = [ppo.load_saved(tmp_path / run / "checkpoint.pt")["parameters"] for run in ("one", "two")]
    torch.testing.assert_close(*parameters, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "--env-id"),
        (["--env-id", "no_such_module:Thing-v0"], "--env-id"),
        (["--env-id", "not an id"], "--env-id"),
        (["--env-id", "probe_envs:Dial-v0"], "ppo_mlp_continuous.py"),
        (["--env-id", "probe_envs:Shapeless-v0"], "observations"),
        (["--env-id", "probe_envs:SameStep-v0"], "--vectorization-mode sync"),
        (["--env-id", "Acrobot-v1", "--vectorization-mode", "vector_entry_point"], "vector entry point"),
        (["--num-envs", "0"], "--num-envs"),
        (["--num-envs", "some"], "--num-envs"),
        (["--num-env", "4"], "--num-env, 4"),
        (["--num-steps", "1"], "--num-steps"),
        (["--seed", "9" * 20], "--seed"),
        (["--capture-video", "--eval-episodes", "0"], "--eval-episodes"),
        (["--objective", "clap"], "--objective"),
        (["--gamma", "1.5"], "--gamma"),
        (["--gamma", "nan"], "--gamma"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--clip-coef", "0"], "--clip-coef"),
        (["--target-kl", "0"], "--target-kl"),
        (["--seed", "-1"], "--seed"),
        (["--num-minibatches", "9", "--num-envs", "2", "--num-steps", "4"], "--num-minibatches"),
        (["--device", "cuda"], "--device cuda"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--resume", "nowhere", "--run-dir", "elsewhere"], "--run-dir"),
        (["--play", "nowhere/policy.pt"], "nowhere/policy.pt"),
        (["--play", "nowhere", "--eval-episodes", "0"], "--eval-episodes"),
        (["--run-dir", "file/in/the/way"], "--run-dir"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, wrong, named):
    if wrong == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, lines = run_main(ppo, monkeypatch, capsys, "--total-timesteps", 10, *wrong)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_from_python_takes_the_runs_flags(tmp_path):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    with pytest.raises(ppo.UserError, match="contradicts"):
        ppo.train(Args(resume=str(run_dir)))
    assert ppo.train(ppo.saved_args(str(run_dir)))["global_step"] >= 100


def test_resume_needs_the_metrics(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    (run_dir / "metrics.csv").write_text("iteration\n1\n")
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir)
    assert code == 2
    assert lines == [f"error: {run_dir}/metrics.csv has lost rows of the 4 up to the checkpoint: restore it"]


def test_other_files_are_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "policy.pt").write_text("mine")
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path)
    assert code == 2
    assert "--run-dir" in lines[0]
    assert (tmp_path / "policy.pt").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    args = {"learning_rate": 1e38, "checkpoint_interval": 1, "update_epochs": 1, "num_minibatches": 1}
    with pytest.raises(FloatingPointError):
        train_probe(tmp_path, "Mirror", **args)
    assert ppo.load_saved(tmp_path / "Mirror/checkpoint.pt")["parameters"].isfinite().all()


def test_a_mistake_in_a_real_process(tmp_path):
    command = [sys.executable, str(SCRIPT), "--env-id", "Pendulum-v1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --env-id Pendulum-v1")
    assert not list(tmp_path.iterdir())


def test_num_envs_must_divide_among_ranks(monkeypatch):
    with pytest.raises(ppo.UserError, match="--num-envs 3 must be a multiple of the 2 processes"):
        ppo.check_env_args(Args(num_envs=3), world_size=2)


def test_video_without_moviepy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    code, lines = run_main(ppo, monkeypatch, capsys, "--capture-video")
    assert code == 2
    assert len(lines) == 1
    assert "pip install moviepy" in lines[0]
    assert not list(tmp_path.iterdir())


def test_videos_are_recorded(tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    args = {**SMALL, "eval_episodes": 1, "total_timesteps": 100, "capture_video": True}
    ppo.train(Args(run_dir=str(tmp_path / "run"), **args))
    assert len(list((tmp_path / "run/videos").glob("*.mp4"))) == 2


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", run_dir)
    assert code == 2
    assert lines == [f"error: --run-dir {run_dir} already holds a run: choose another, or continue it with --resume"]
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_resume_refuses_other_flags(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir, "--gamma", "0.5")
    assert code == 2
    assert lines == [f"error: --gamma contradicts the run in {run_dir}: leave it out"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir)
    assert code == 2
    assert "1 processes" in lines[0]


@pytest.mark.parametrize("damage", ["cut short", "empty", "noise", "other format", "other script", "config"])
def test_damaged_files(tmp_path, monkeypatch, capsys, damage):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    state = ppo.load_saved(path)
    named = str(path)
    if damage == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(os.urandom(1000))
    elif damage == "other format":
        torch.save(state | {"format": 99}, path)
    elif damage == "other script":
        torch.save(state | {"script": "ppo_other"}, path)
    else:
        (run_dir / "config.json").write_text('{"args": {"no_such_flag": 1}}')
        named = f"--resume {run_dir}"
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir)
    assert code == 2
    assert len(lines) == 1
    assert named in lines[0]


def test_play_refuses_a_checkpoint(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "Constant", total_timesteps=100)
    code, lines = run_main(ppo, monkeypatch, capsys, "--play", run_dir / "checkpoint.pt")
    assert code == 2
    assert lines == [f"error: {run_dir}/checkpoint.pt is a checkpoint: give the policy.pt beside it"]


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"script": ppo.SCRIPT, "format": ppo.FORMAT, "spec": Trap(), "weights": {}}, tmp_path / "policy.pt")
    with pytest.raises(ppo.UserError):
        ppo.load_policy(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    argv = ["--env-id", "probe_envs:BrokenLater-v0", "--run-dir", tmp_path / "run", "--checkpoint-interval", 3]
    code, lines = run_main(ppo, monkeypatch, capsys, *argv, *flags(SMALL))
    assert code == 1
    assert "iteration 12" in lines[-1]
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 11
    state = ppo.load_saved(tmp_path / "run/checkpoint.pt")
    assert state["iteration"] == 9
    assert state["parameters"].isfinite().all()
    assert not (tmp_path / "run/policy.pt").exists()
