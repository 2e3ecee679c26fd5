"""Tests of ppo_mlp_continuous.py: formulas, running statistics, probe environments, and real runs that are killed,
resumed and spread. What this script has in common with ppo_mlp_discrete.py word for word (test_family.py keeps it so)
is tested there: GAE, clipped and value loss, minibatches, episode statistics, the files of a run."""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import ranks_moments
import torch
from helpers import (
    ROOT,
    flags,
    load_checkpoint,
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
from scipy import stats

import ppo_mlp_continuous as ppo
from ppo_mlp_continuous import Args, GaussianBatch

SCRIPT = ROOT / "ppo_mlp_continuous.py"
SMALL = {"num_envs": 4, "num_steps": 16, "eval_episodes": 0, "update_epochs": 4, "num_minibatches": 2}
BIG = {"num_envs": 16, "num_steps": 16, "num_minibatches": 4, "update_epochs": 8}


# ------------------------------------------------------------------------------------------------ distribution and loss


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_log_prob_and_entropy_equal_scipys(components, seed):
    rng = np.random.default_rng(seed)
    actions, means = rng.normal(size=(2, 6, components)) * 3
    log_std = rng.normal(size=components)
    ours = ppo.gaussian_log_prob(*map(torch.tensor, (actions, means, log_std)))
    joint = [stats.multivariate_normal(mean, np.diag(np.exp(2 * log_std))) for mean in means]
    np.testing.assert_allclose(ours, [normal.logpdf(action) for normal, action in zip(joint, actions)])
    np.testing.assert_allclose(ppo.gaussian_entropy(torch.tensor(log_std)), joint[0].entropy())


def test_kl_equals_its_closed_form():
    torch.manual_seed(0)
    old_means, means = torch.randn(2, 6, 3, dtype=torch.float64)
    old_log_std, log_std = torch.randn(2, 3, dtype=torch.float64)
    old, new = (
        torch.distributions.Normal(m, s.exp().expand(6, 3)) for m, s in ((old_means, old_log_std), (means, log_std))
    )
    expected = torch.distributions.kl_divergence(old, new).sum(-1)
    torch.testing.assert_close(ppo.gaussian_kl(old_means, old_log_std, means, log_std), expected)
    torch.testing.assert_close(ppo.gaussian_kl(old_means, old_log_std.expand(6, 3), means, log_std), expected)
    np.testing.assert_allclose(ppo.gaussian_kl(means, log_std, means, log_std), 0, atol=1e-15)


def test_means_of_the_kl_estimators_equal_the_exact_kl():
    torch.manual_seed(0)
    old = torch.tensor([0.3, -0.2]), torch.tensor([0.1, -0.4])
    new = torch.tensor([0.1, 0.1]), torch.tensor([0.0, -0.3])
    actions = old[0] + old[1].exp() * torch.randn(400_000, 2)
    k1, k3 = ppo.kl_estimates(ppo.gaussian_log_prob(actions, *new) - ppo.gaussian_log_prob(actions, *old))
    exact = ppo.gaussian_kl(*old, *new).item()
    assert k1.mean().item() == pytest.approx(exact, abs=5 * k1.std().item() / math.sqrt(len(k1)))
    assert k3.mean().item() == pytest.approx(exact, abs=5 * k3.std().item() / math.sqrt(len(k3)))


def make_networks(obs_dim=3, action_dim=2):
    """Actor and critic in float64, with a log-std of its own for each component."""
    actor = ppo.GaussianActor(obs_dim, action_dim, -0.3).double()
    actor.log_std.data += 0.1 * torch.arange(action_dim)
    actor.means = torch.nn.Linear(obs_dim, action_dim).double()
    return actor, torch.nn.Linear(obs_dim, 1).double()


def random_batch(rows=7, obs_dim=3, action_dim=2):
    """Actions of another policy than that of make_networks, so that ratios lie on both sides of the clip."""
    means, actions = torch.randn(2, rows, action_dim, dtype=torch.float64)
    log_std = torch.linspace(-0.4, 0.2, action_dim, dtype=torch.float64)
    log_probs = ppo.gaussian_log_prob(actions, means, log_std)
    obs, vectors = torch.randn(rows, obs_dim, dtype=torch.float64), torch.randn(3, rows, dtype=torch.float64)
    return GaussianBatch(obs, actions, log_probs, means, log_std.expand_as(means), *vectors)


def loss_with_distributions(actor, critic, batch, beta, args):
    """The mean loss, written with torch.distributions and without any function of the script."""
    loss = torch.zeros((), dtype=torch.float64)
    means, values = actor.means(batch.obs), critic(batch.obs)[:, 0]
    for b in range(len(values)):
        new = torch.distributions.MultivariateNormal(means[b], torch.diag((2 * actor.log_std).exp()))
        old = torch.distributions.MultivariateNormal(batch.old_means[b], torch.diag((2 * batch.old_log_std[b]).exp()))
        ratio = (new.log_prob(batch.actions[b]) - old.log_prob(batch.actions[b])).exp()
        advantage = batch.advantages[b]
        if args.objective == "clip":
            low, high = 1 - args.clip_coef, 1 + args.clip_coef
            policy_loss = -min(ratio * advantage, max(low, min(high, ratio)) * advantage)
        else:
            policy_loss = -(ratio * advantage - beta * torch.distributions.kl_divergence(old, new))
        error = (values[b] - batch.returns[b]) ** 2
        if args.clip_vloss:
            old_value = batch.old_values[b]
            near = old_value + max(-args.clip_coef, min(args.clip_coef, values[b] - old_value))
            error = max(error, (near - batch.returns[b]) ** 2)
        loss = loss + policy_loss + args.vf_coef * error / 2 - args.ent_coef * new.entropy()
    return loss / len(values)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_loss_and_gradient(objective, clip_vloss):
    """The loss and its gradient, log-std included, equal those of an independent formula."""
    torch.manual_seed(3)
    args = Args(objective=objective, ent_coef=0.03, clip_vloss=clip_vloss)
    (actor, critic), batch = make_networks(), random_batch()
    parameters = [*actor.parameters(), *critic.parameters()]
    ours, parts = ppo.gaussian_ppo_loss(actor, critic, batch, len(batch.obs), 0.7, args)
    expected = loss_with_distributions(actor, critic, batch, 0.7, args)
    torch.testing.assert_close(ours, expected)
    for mine, independent in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(mine, independent)
    means = {name: part.mean() for name, part in parts.items()}
    total = means["policy_loss"] + args.vf_coef * means["value_loss"] - args.ent_coef * means["entropy"]
    torch.testing.assert_close(ours.detach(), total)


def test_networks_are_initialised_as_ppo_wants_them():
    torch.manual_seed(0)
    actor = ppo.GaussianActor(5, 3, -0.5)
    assert actor.log_std.tolist() == [-0.5] * 3
    layers = [layer for layer in actor.means if isinstance(layer, torch.nn.Linear)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), 0.01)):
        singular_values = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain), rtol=1e-4, atol=1e-6)
    means, log_std = actor(torch.randn(4, 2, 5))
    assert means.shape == (4, 2, 3)
    assert log_std.shape == (3,)  # no observation in it


# --------------------------------------------------------------------------------------------------- running statistics


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(-1e6, 1e6), st.integers(0, 2**31))
def test_running_moments_equal_numpys(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    chunks = [offset + rng.normal(size=3) + rng.normal(size=(size, 3)) * [1, 10, 0] for size in sizes]
    moments = ppo.RunningMoments(3)
    for chunk in chunks:
        moments.update(chunk)
    everything = np.concatenate(chunks)
    assert moments.count.item() == len(everything)
    np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.var, everything.var(0), rtol=1e-6, atol=1e-8)


def test_running_moments_before_the_first_update_change_nothing():
    moments = ppo.RunningMoments(2)
    assert (moments.mean == 0).all()
    assert (moments.var == 1).all()
    assert set(moments.state_dict()) == {"count", "mean", "var"}


def test_running_moments_of_two_ranks(tmp_path):
    run_two_ranks(ROOT / "tests/ranks_moments.py", tmp_path, 5, 8)
    everything = np.concatenate([ranks_moments.make_rows(r, u, n) for u in range(3) for r, n in ((0, 5), (1, 8))])
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["count"].item() == 39
    np.testing.assert_allclose(states[0]["mean"], everything.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(states[0]["var"], everything.astype(np.float64).var(0), rtol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_discounted_returns_equal_their_definition(steps, envs, gamma, seed):
    """Over three rollouts in a row: the sum over the steps of the episode so far, each discounted by its age."""
    rng = np.random.default_rng(seed)
    under_way = np.zeros(envs)
    resets = np.zeros((steps + 1, envs), bool)
    episodes = [[] for _ in range(envs)]
    for _ in range(3):
        rewards = rng.normal(size=(steps, envs))
        resets[0] = resets[-1]
        for t in range(steps):
            resets[t + 1] = ~resets[t] & (rng.random(envs) < 0.3)
        ours = ppo.discounted_returns(rewards, resets, gamma, under_way)
        for t in range(steps):
            for n in range(envs):
                episodes[n] = [] if resets[t, n] else [*episodes[n], rewards[t, n]]
                expected = sum(gamma**k * reward for k, reward in enumerate(reversed(episodes[n])))
                assert ours[t, n] == pytest.approx(expected)


def watch(monkeypatch):
    """Lists of what RunningMoments took in (observations, discounted returns), and of batches that were learned from,
    filled while train runs."""
    taken, batches = {}, []
    update, minibatches = ppo.RunningMoments.update, ppo.shuffled_minibatches

    def spy_update(self, rows):
        taken.setdefault(id(self), (self, []))[1].append(rows.copy())
        update(self, rows)

    def spy_batch(batch, args):
        if not batches or batch.obs is not batches[-1].obs:  # the first epoch
            batches.append(batch)
        return minibatches(batch, args)

    monkeypatch.setattr(ppo.RunningMoments, "update", spy_update)
    monkeypatch.setattr(ppo, "shuffled_minibatches", spy_batch)
    return taken, batches


def test_statistics_of_a_run(tmp_path, monkeypatch):
    """The probe tells what they must be: step t has observation t and reward t, and reset rows do not count."""
    taken, batches = watch(monkeypatch)
    run_dir = train_probe(tmp_path, "NumberedBox", total_timesteps=600)
    state, steps = load_checkpoint(run_dir), int(read_metrics(run_dir)[-1]["global_step"])
    (_, returns), (_, seen) = taken.values()
    assert len(returns) == len(seen) == len(batches) == len(read_metrics(run_dir))
    seen, returns = np.concatenate(seen)[:, 0].astype(np.float64), np.concatenate(returns)
    assert (seen > 0).all()  # negative in rows of resets
    assert state["obs_moments"]["count"].item() == state["return_moments"]["count"].item() == len(seen) == steps
    assert state["obs_moments"]["mean"].item() == pytest.approx(seen.mean())
    assert state["obs_moments"]["var"].item() == pytest.approx(seen.var())
    # Rewards 1, 2, 3 ... with gamma 0.9: the discounted return of step t follows from t alone.
    sums = [sum(0.9 ** (t - k) * k for k in range(1, t + 1)) for t in seen.astype(int)]
    np.testing.assert_allclose(np.sort(returns[:, 0]), np.sort(sums), rtol=1e-6)
    assert state["return_moments"]["var"].item() == pytest.approx(np.var(sums), rel=1e-6)


def test_statistics_are_constant_within_a_rollout(tmp_path, monkeypatch):
    """Each batch is normalised by what the rollouts before it held, and by nothing of its own; then clipped."""
    taken, batches = watch(monkeypatch)
    train_probe(tmp_path, "NumberedBox", total_timesteps=400)
    (_, _), (_, seen) = taken.values()
    np.testing.assert_allclose(batches[0].obs, seen[0].clip(-10, 10))
    for i in range(1, len(seen)):
        before = np.concatenate(seen[:i]).astype(np.float64)
        expected = ((seen[i] - before.mean(0)) / before.std(0)).clip(-10, 10)
        np.testing.assert_allclose(batches[i].obs, expected, rtol=1e-5, atol=1e-5)


def test_rewards_are_scaled_not_shifted(tmp_path, monkeypatch):
    """GAE sees the rewards over the standard deviation that counts their own rollout in, clipped to 10."""
    seen = []
    gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda rewards, *a: (seen.append(rewards), gae(rewards, *a))[1])
    taken, _ = watch(monkeypatch)
    run_dir = train_probe(tmp_path, "NumberedBox", total_timesteps=400, recompute_advantages=False)
    (_, returns), _ = taken.values()
    for i, rewards in enumerate(seen):
        std = np.concatenate(returns[: i + 1]).std()
        steps = rewards.numpy() * std
        np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
        assert steps.min() > -1e-4
    assert float(read_metrics(run_dir)[-1]["charts/episodic_return"]) > 6  # what a person reads is not scaled
    seen.clear()
    train_probe(tmp_path, "ConstantBox", total_timesteps=64)  # the only discounted return is 1: no spread at all
    assert {value for rewards in seen for value in rewards.flatten().tolist()} == {0, 10}
    seen.clear()
    train_probe(tmp_path / "plain", "NumberedBox", total_timesteps=64, norm_reward=False)
    np.testing.assert_array_equal(seen[0], seen[0].round())
    assert seen[0].max() > 2


def test_without_normalisation_observations_stay_as_they_are(tmp_path, monkeypatch):
    taken, batches = watch(monkeypatch)
    run_dir = train_probe(tmp_path, "Far", norm_obs=False, norm_reward=False, total_timesteps=100)
    assert not taken
    assert batches[0].obs.max() > 400
    assert ppo.load_policy(run_dir).normalize(np.array([500.0, -200.0])).tolist() == [500, -200]


# ------------------------------------------------------------------------------------------------------ policy at work


def spec_of(low, high, dtype="float64", limit=10.0):
    low, high = np.array(low), np.array(high)
    shape = list(low.shape)
    spec = {"env_id": "x", "obs_dim": 5, "low": low.ravel().tolist(), "high": high.ravel().tolist()}
    return spec | {"action_shape": shape, "dtype": dtype, "obs_limit": limit}


def weights_of(actor, mean=0.0, std=1.0):
    return {"obs_mean": torch.full((5,), mean), "obs_std": torch.full((5,), std)} | actor.state_dict()


def test_the_policy_at_work_is_the_trained_network():
    torch.manual_seed(0)
    actor = ppo.GaussianActor(5, 4, -1.0)
    actor.means[-1].weight.data *= 20
    policy = ppo.Policy(spec_of(-np.ones((2, 2)), np.ones((2, 2))), weights_of(actor, mean=3, std=2))
    obs = 3 + 12 * torch.randn(9, 5)
    inputs = ((obs - 3) / 2).clamp(-10, 10)
    assert inputs.abs().max() == 10
    means, _ = actor(inputs)
    np.testing.assert_allclose(policy.means(obs.numpy()), means.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(policy.act(obs.numpy()), means.detach().clamp(-1, 1).reshape(9, 2, 2), atol=1e-6)
    np.testing.assert_allclose(policy.act(obs.numpy()[0]), means.detach()[0].clamp(-1, 1).reshape(2, 2), atol=1e-6)


def test_actions_span_the_bounds():
    """-1, 0 and 1 are the lowest, the middle and the highest action; what lies beyond is clipped."""
    policy = ppo.Policy(spec_of([3.0, -6.0], [7.0, 2.0]), weights_of(ppo.GaussianActor(5, 2, 0.0)))
    actions = policy.to_env(np.array([[-1, 0], [0, 1], [1, -1], [-1.5, 99], [0.5, -0.5]]))
    assert actions.tolist() == [[3, -2], [5, 2], [7, -6], [3, 2], [6, -4]]


def test_actions_without_bounds_are_the_policys_own():
    low, high = [-np.inf, -3e38, 5.0, -np.inf, 0.0], [np.inf, 3e38, np.inf, -5.0, np.inf]
    policy = ppo.Policy(spec_of(low, high), weights_of(ppo.GaussianActor(5, 5, 0.0)))
    assert policy.to_env(np.array([[1.5, -40, 1, -1, 2.0]])).tolist() == [[1.5, -40, 6, -6, 2]]
    assert policy.to_env(np.full((1, 5), -1.0)).tolist() == [[-1, -1, 5, -6, 0]]


def test_whole_numbers_are_rounded():
    policy = ppo.Policy(spec_of([0], [9], "int32"), weights_of(ppo.GaussianActor(5, 1, 0.0)))
    actions = policy.to_env(np.array([[-2.0], [0.1], [0.23], [1.0]]))
    assert actions.dtype == np.int32
    assert actions.tolist() == [[0], [5], [6], [9]]


def test_sampled_actions_follow_the_policy():
    actor = ppo.GaussianActor(5, 2, 0.0)
    actor.log_std.data = torch.tensor([-1.0, 0.5])
    policy = ppo.Policy(spec_of([-np.inf] * 2, [np.inf] * 2), weights_of(actor))
    obs = np.ones((20_000, 5))
    actions, means = policy.act(obs, np.random.default_rng(0)), policy.means(obs[:1])[0]
    for component, std in ((0, math.exp(-1)), (1, math.exp(0.5))):
        assert stats.kstest(actions[:, component], stats.norm(means[component], std).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.03


# ------------------------------------------------------------------------------------ probes: whole runs, known answers


def train_probe(tmp_path, name, **changes):
    """Trains on a probe and returns the run directory."""
    args = {**SMALL, "env_id": f"probe_envs:{name}-v0", "total_timesteps": 4_000, "learning_rate": 3e-3, "gamma": 0.9}
    ppo.train(Args(run_dir=str(tmp_path / name), **{"checkpoint_interval": 1000} | args | changes))
    return tmp_path / name


def summary_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def value_of(run_dir, obs):
    critic, actor = ppo.mlp(1, 1, 1.0), ppo.GaussianActor(1, 1, 0.0)
    ppo.flatten_parameters(actor, critic).data.copy_(load_checkpoint(run_dir)["parameters"])
    return critic(torch.tensor([[float(obs)]])).item()


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
def test_probe_best_action_between_asymmetric_bounds(tmp_path, objective):
    run_dir = train_probe(tmp_path, "Dial", objective=objective, total_timesteps=6_000)
    assert ppo.load_policy(run_dir).act(np.zeros(1)).item() == pytest.approx(5.5, abs=0.1)


def test_probe_best_action_at_a_bound(tmp_path):
    run_dir = train_probe(tmp_path, "Edge", eval_episodes=20)
    assert ppo.load_policy(run_dir).act(np.zeros(1)).item() == 2
    assert summary_of(run_dir)["eval_return_greedy"] == 2
    assert summary_of(run_dir)["train_return"] > 0


@pytest.fixture(scope="module")
def far_run(tmp_path_factory):
    """A run on Far that several tests look at."""
    return train_probe(tmp_path_factory.mktemp("far"), "Far", total_timesteps=12_000, log_std_init=-1.0, **BIG)


def test_probe_observations_far_from_zero(far_run):
    policy, probe = ppo.load_policy(far_run), probe_envs.Far()
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
        obs = np.array([500, -200]) + 3 * np.array(signs)
        error = (policy.act(obs) - probe.best(obs)) / [[1, 4], [4, 200]]
        assert np.abs(error).max() < 0.15


def test_probe_without_bounds(tmp_path):
    run_dir = train_probe(tmp_path, "Open", total_timesteps=6_000, **BIG)
    np.testing.assert_allclose(ppo.load_policy(run_dir).act(np.zeros(1)), [1.5, -0.5, 6], atol=0.2)


def test_probe_of_whole_numbers(tmp_path):
    run_dir = train_probe(tmp_path, "Whole", total_timesteps=6_000)
    assert ppo.load_policy(run_dir).act(np.zeros(1)).tolist() == [7]


def test_probe_endless_task_cut_by_truncation(tmp_path):
    """V = r / (1 - gamma) = 10 although every episode stops after 5 steps; 4.1 where that counts as termination."""
    run_dir = train_probe(tmp_path, "EndlessBox", total_timesteps=10_000, gae_lambda=0.95, norm_reward=False)
    assert value_of(run_dir, 0) == pytest.approx(10, abs=0.3)


def test_saved_policy_evaluates_like_the_run_it_came_from(far_run):
    """At the learning rate's end the policy stands still: the last training episodes and episodes of the saved,
    re-loaded policy have one distribution. Without its statistics, the same policy is far off."""
    train_return = summary_of(far_run)["train_return"]
    policy = ppo.load_policy(far_run)
    returns = ppo.evaluate(policy, 400, "sampled", seed=5)
    error = np.std(returns) * math.sqrt(1 / 100 + 1 / 400)
    assert train_return > -1
    assert np.mean(returns) == pytest.approx(train_return, abs=3.5 * error)
    assert np.mean(ppo.evaluate(policy, 50, "greedy", seed=5)) > max(-0.05, train_return)
    policy.obs_mean, policy.obs_std = np.zeros(2), np.ones(2)
    assert np.mean(ppo.evaluate(policy, 50, "sampled", seed=5)) < train_return - 10 * error


def test_evaluation_leaves_the_statistics_alone(far_run):
    before = (far_run / "policy.pt").read_bytes()
    policy = ppo.load_policy(far_run)
    statistics = policy.obs_mean.copy(), policy.obs_std.copy()
    ppo.evaluate(policy, 20, "sampled", seed=1)
    assert (policy.obs_mean, policy.obs_std) == (pytest.approx(statistics[0]), pytest.approx(statistics[1]))
    assert (far_run / "policy.pt").read_bytes() == before
    moments = load_checkpoint(far_run)["obs_moments"]
    np.testing.assert_allclose(policy.obs_mean, moments["mean"], rtol=1e-6)
    np.testing.assert_allclose(policy.obs_std, moments["var"].sqrt(), rtol=1e-6)


def test_the_unclipped_action_is_scored_and_the_clipped_one_executed(tmp_path, monkeypatch):
    _, batches = watch(monkeypatch)
    train_probe(tmp_path, "Edge", total_timesteps=200)  # the probe asserts that actions are in its space
    assert batches[0].actions.abs().max() > 1
    batch = batches[0]
    expected = (
        stats.norm(batch.old_means.numpy(), batch.old_log_std.exp().numpy()).logpdf(batch.actions.numpy()).sum(-1)
    )
    np.testing.assert_allclose(batch.old_log_probs, expected, rtol=1e-5)


def test_reset_rows_are_left_out(tmp_path, monkeypatch):
    """Every step counts update_epochs times, reset rows never."""
    seen = []
    loss = ppo.gaussian_ppo_loss
    monkeypatch.setattr(ppo, "gaussian_ppo_loss", lambda *a: (seen.append(a[2].obs.flatten()), loss(*a))[1])
    run_dir = train_probe(tmp_path, "NumberedBox", total_timesteps=600, norm_obs=False)
    rows = torch.cat(seen)
    assert (rows > 0).all()
    metrics = read_metrics(run_dir)
    assert len(rows) == SMALL["update_epochs"] * int(metrics[-1]["global_step"])
    assert int(metrics[-1]["global_step"]) < len(metrics) * SMALL["num_envs"] * SMALL["num_steps"]


def test_ratio_is_one_before_the_first_step(tmp_path, monkeypatch):
    first_of_rollout = []
    loss = ppo.gaussian_ppo_loss

    def spy(*a):
        result = loss(*a)
        first_of_rollout.append(result[1]["log_ratio"].abs().max().item())
        return result

    monkeypatch.setattr(ppo, "gaussian_ppo_loss", spy)
    train_probe(tmp_path, "NumberedBox", total_timesteps=600, update_epochs=2, num_minibatches=3)
    assert max(first_of_rollout[::6]) < 1e-5
    assert max(first_of_rollout) > 1e-3


def test_old_policy_is_the_acting_policy(tmp_path, monkeypatch):
    """Row by row, the means with which actions are scored are those from which they were drawn: no row stands beside
    another's observation, and none was normalised with statistics that the acting policy did not have."""
    acted = []
    means = ppo.Policy.means

    def spy(self, obs):
        acted.append((obs.copy(), means(self, obs)))
        return acted[-1][1]

    monkeypatch.setattr(ppo.Policy, "means", spy)
    _, batches = watch(monkeypatch)
    train_probe(tmp_path, "NumberedBox", total_timesteps=600)
    for i, batch in enumerate(batches):
        there, drawn_from = (np.stack(column) for column in zip(*acted[16 * i : 16 * (i + 1)]))  # (T, N, ...)
        np.testing.assert_allclose(batch.old_means, drawn_from[there[..., 0] > 0], atol=1e-6)  # negative: reset rows
    assert len(acted) == 16 * len(batches)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
def test_metrics_of_the_update(tmp_path, monkeypatch, objective):
    """Each loss column, computed anew from what the loss saw; beta follows the KL that the row before tells."""
    seen, batches = [], watch(monkeypatch)[1]
    loss = ppo.gaussian_ppo_loss

    def spy(*a):
        result = loss(*a)
        seen.append({name: part.double().numpy() for name, part in result[1].items()} | {"beta": a[4]})
        return result

    monkeypatch.setattr(ppo, "gaussian_ppo_loss", spy)
    divergences = []
    kl = ppo.gaussian_kl

    def spy_kl(*a):
        result = kl(*a)
        if not result.requires_grad:  # after the update
            divergences.append(result)
        return result

    monkeypatch.setattr(ppo, "gaussian_kl", spy_kl)
    args = {"total_timesteps": 500, "learning_rate": 0.02, "objective": objective, "ent_coef": 0.01}
    rows = read_metrics(train_probe(tmp_path, "Dial", **args))
    per_iteration = SMALL["update_epochs"] * SMALL["num_minibatches"]
    for i, row in enumerate(rows):
        here = seen[i * per_iteration : (i + 1) * per_iteration]
        parts = {name: np.concatenate([x[name] for x in here]) for name in here[0] if name != "beta"}
        ratio = np.exp(parts.pop("log_ratio"))
        parts["old_approx_kl"], parts["approx_kl"] = -np.log(ratio), ratio - 1 - np.log(ratio)
        parts["clipfrac"] = (ratio < 0.8) | (ratio > 1.2)
        expected = {name: np.mean(part) for name, part in parts.items()}
        batch = batches[i]
        expected["explained_variance"] = 1 - np.var((batch.returns - batch.old_values).numpy()) / np.var(
            batch.returns.numpy()
        )
        if objective == "kl-penalty":
            expected |= {"kl": divergences[i].mean().item(), "kl_penalty": here[0]["beta"]}
        columns = {name.removeprefix("losses/"): float(x) for name, x in row.items() if name.startswith("losses/")}
        assert columns.pop("grad_norm") > 0
        assert columns == pytest.approx(expected, rel=1e-3, abs=1e-5)
    if objective == "kl-penalty":
        figures = [(float(row["losses/kl_penalty"]), float(row["losses/kl"])) for row in rows]
        assert len({beta for beta, _ in figures}) > 1
        for (beta, divergence), (following, _) in itertools.pairwise(figures):
            assert following == ppo.adapt_beta(beta, divergence, 0.01)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Pendulum-v1"])
def test_gymnasiums_own_environments(tmp_path, env_id):
    args = SMALL | {"eval_episodes": 1, "total_timesteps": 128}
    summary = ppo.train(Args(env_id=env_id, run_dir=str(tmp_path / "run"), **args))
    assert summary["global_step"] >= 128
    assert all(isinstance(x, str) or math.isfinite(x) for x in summary.values())


@pytest.mark.parametrize("recompute", [True, False])
def test_advantages_are_recomputed_before_each_epoch(tmp_path, monkeypatch, recompute):
    """From the critic as it is by then; the old values, and with them the value clip, stay those of the rollout."""
    epochs, estimates = [], []
    gae, minibatches = ppo.compute_gae, ppo.shuffled_minibatches

    def spy_gae(rewards, values, *a):
        estimates.append((values, gae(rewards, values, *a)))
        return estimates[-1][1]

    monkeypatch.setattr(ppo, "compute_gae", spy_gae)
    monkeypatch.setattr(
        ppo, "shuffled_minibatches", lambda batch, args: (epochs.append(batch), minibatches(batch, args))[1]
    )
    run_dir = train_probe(tmp_path, "EndlessBox", total_timesteps=64, update_epochs=3, recompute_advantages=recompute)
    assert len(read_metrics(run_dir)) == 2
    assert len(epochs) == 6
    assert len(estimates) == (6 if recompute else 2)
    critic_moved = [values for values, _ in estimates[: 3 if recompute else 1]]
    for i, batch in enumerate(epochs[:3]):
        values, advantages = estimates[i if recompute else 0]
        assert torch.isin(batch.advantages, advantages).all()
        assert torch.isin(batch.returns, advantages + values[:-1]).all()
        assert torch.equal(batch.old_values, epochs[0].old_values)
    if recompute:
        assert not torch.equal(critic_moved[0], critic_moved[1])
        assert not torch.equal(critic_moved[1], critic_moved[2])


def test_target_return_stops_the_run(tmp_path):
    rows = read_metrics(train_probe(tmp_path, "ConstantBox", target_return=1.0))
    finished = [int(row["global_step"]) for row in rows]  # one episode per step
    assert finished[-2] < 100 <= finished[-1]


def test_kl_stop_comes_before_the_step(tmp_path, monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self))[1])
    run_dir = train_probe(tmp_path, "Dial", total_timesteps=500, target_kl=1e-9, num_minibatches=1)
    assert len(steps) == len(read_metrics(run_dir))


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    norms, rates = [], []
    step = torch.optim.Adam.step

    def spy(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    rows = read_metrics(train_probe(tmp_path, "Dial", total_timesteps=300, max_grad_norm=0.1, learning_rate=0.01))
    assert max(norms) == pytest.approx(0.1, rel=1e-4)
    steps_before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    expected = [0.01 * (1 - steps / 300) for steps in steps_before]
    assert rates[:: SMALL["update_epochs"] * SMALL["num_minibatches"]] == [(pytest.approx(r), 1e-5) for r in expected]


def test_play_and_load_policy_give_the_summarys_returns(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "Far", total_timesteps=500, eval_episodes=5, seed=3)
    summary = summary_of(run_dir)
    assert {"script", "task", "seed", "global_step", "seconds", "steps_per_second", "train_return"} <= set(summary)
    config = json.loads((run_dir / "config.json").read_text())
    assert {"torch", "numpy", "gymnasium", "mujoco", "python"} <= set(config["versions"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", "--play", str(run_dir / "policy.pt"), "--eval-episodes", "5", "--seed", "3"])
    ppo.main()
    greedy, sampled = capsys.readouterr().out.splitlines()
    assert f"mean {summary['eval_return_greedy']:.1f}" in greedy
    assert f"mean {summary['eval_return_sampled']:.1f}" in sampled
    policy, env = ppo.load_policy(run_dir), gym.make("probe_envs:Far-v0")
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.act(obs))


# ------------------------------------------------------------------------------- same again, killed, resumed and spread


def test_same_seed_same_run(tmp_path):
    args = SMALL | {"env_id": "Pendulum-v1", "total_timesteps": 1500, "checkpoint_interval": 7}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(run_dir=str(tmp_path / name), seed=seed, **args))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    same_weights(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/policy.pt").read_bytes() == (tmp_path / "b/policy.pt").read_bytes()


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    """SIGKILL, then SIGTERM in the resumed run, then the command that it prints: metrics, weights and running
    statistics are those of a run that was never stopped, and the statistics are numpy's over all it saw."""
    args = SMALL | {"env_id": "probe_envs:NumberedBox-v0", "total_timesteps": 5_000, "checkpoint_interval": 15}
    args |= {"objective": "kl-penalty", "eval_episodes": 2}
    process = start(ppo, "--run-dir", tmp_path / "cut", *flags(args))
    wait_for_rows(tmp_path / "cut", 20, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = load_checkpoint(tmp_path / "cut")["iteration"]
    assert before % 15 == 0
    process = start(ppo, "--resume", tmp_path / "cut")
    wait_for_rows(tmp_path / "cut", before + 18, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "cut")["iteration"] > before
    resume_as_printed(ppo, errors, monkeypatch)
    taken, _ = watch(monkeypatch)
    ppo.train(Args(run_dir=str(tmp_path / "whole"), **args))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    same_weights(tmp_path / "cut", tmp_path / "whole")
    cut = load_checkpoint(tmp_path / "cut")
    for name, (moments, rows) in zip(("return_moments", "obs_moments"), taken.values()):
        rows = np.concatenate(rows).astype(np.float64)
        assert all(torch.equal(cut[name][key], value) for key, value in moments.state_dict().items())
        assert cut[name]["count"].item() == len(rows)
        np.testing.assert_allclose(cut[name]["mean"], rows.mean(0))
        np.testing.assert_allclose(cut[name]["var"], rows.var(0))


def test_two_ranks_equal_one_process(tmp_path):
    """The same environments and noise on two ranks give the statistics, metrics and weights of one process."""
    args = {**SMALL, "num_minibatches": 1, "total_timesteps": 1600, "env_id": "probe_envs:NumberedBox-v0"}
    args |= {"ent_coef": 0.01, "num_steps": 64, "learning_rate": 1e-3}
    run_two_ranks(SCRIPT, *flags(args), "--run-dir", tmp_path / "two")
    ppo.train(Args(run_dir=str(tmp_path / "one"), **args))
    same_metrics(tmp_path / "one", tmp_path / "two", rel=2e-3, abs=1e-5)
    one, two = (load_checkpoint(tmp_path / run) for run in ("one", "two"))
    torch.testing.assert_close(one["parameters"], two["parameters"], rtol=0, atol=2e-4)
    for name in ("obs_moments", "return_moments"):
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "--env-id"),
        (["--env-id", "CartPole-v1"], "ppo_mlp_discrete.py"),
        (["--env-id", "probe_envs:Shapeless-v0"], "--env-id probe_envs:Shapeless-v0"),
        (["--num-envs", "0"], "--num-envs"),
        (["--num-steps", "1"], "--num-steps"),
        (["--log-std-init", "nan"], "--log-std-init"),
        (["--log-std-init", "99"], "--log-std-init"),
        (["--norm-obs", "yes"], "yes"),
        (["--target-return", "nan"], "--target-return"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--play", "nowhere", "--seed", "-1"], "--seed"),
        (["--num-minibatches", "9", "--num-envs", "2", "--num-steps", "4"], "--num-minibatches"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--play", "nowhere/policy.pt"], "nowhere/policy.pt"),
        (["--run-dir", "file/in/the/way"], "--run-dir"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, wrong, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, lines = run_main(ppo, monkeypatch, capsys, "--total-timesteps", 10, *wrong)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("probe", "message"),
    [("BlindLater", "an observation of iteration 12"), ("BrokenLaterBox", "a reward of iteration 12")],
)
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, probe, message):
    argv = ["--env-id", f"probe_envs:{probe}-v0", "--run-dir", tmp_path / "run", "--checkpoint-interval", 3]
    code, lines = run_main(ppo, monkeypatch, capsys, *argv, *flags(SMALL))
    assert code == 1
    assert message in lines[-1]
    assert len(read_metrics(tmp_path / "run")) == 11
    state = load_checkpoint(tmp_path / "run")
    assert state["iteration"] == 9
    tensors = [state["parameters"], *state["obs_moments"].values(), *state["return_moments"].values()]
    assert all(x.isfinite().all() for x in tensors)
    assert not (tmp_path / "run/policy.pt").exists()


@pytest.mark.parametrize("damage", ["cut short", "empty", "noise", "other format", "other script"])
def test_damaged_files(tmp_path, monkeypatch, capsys, damage):
    run_dir = train_probe(tmp_path, "ConstantBox", total_timesteps=100)
    path = run_dir / "checkpoint.pt"
    whole, state = path.read_bytes(), ppo.load_saved(path)
    if damage == "other format":
        torch.save(state | {"format": 99}, path)
    elif damage == "other script":
        torch.save(state | {"script": "ppo_mlp_discrete"}, path)
    else:
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256))}[damage])
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir)
    assert code == 2
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_envpool_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "envpool", None)
    code, lines = run_main(ppo, monkeypatch, capsys, "--vectorization-mode", "envpool")
    assert code == 2
    assert len(lines) == 1
    assert lines[0] == "error: --vectorization-mode envpool needs a package: pip install envpool"
    assert not list(tmp_path.iterdir())


def test_envpool_is_made_anew_with_each_seed(monkeypatch):
    """With a stand-in for the package, since seeds are all that its wrapper adds."""
    made = []

    def make_gymnasium(env_id, num_envs, seed=None):
        made.append(seed)
        return gym.make_vec(env_id, num_envs)

    monkeypatch.setitem(sys.modules, "envpool", type("envpool", (), {"make_gymnasium": staticmethod(make_gymnasium)}))
    envs = ppo.make_envs("Pendulum-v1", 3, "envpool")
    for seed, expected in ((7, [7, 8, 9]), (None, None), (2**31 - 1, [2**31 - 1, 0, 1])):
        obs, _ = envs.reset(seed=seed)
        assert obs.shape == (3, 3)
        if seed is not None:
            assert made[-1] == expected
    assert len(made) == 3


def test_envpool(tmp_path):
    """Seeded anew at each checkpoint: the same seed gives the same run, another one another."""
    pytest.importorskip("envpool")
    args = SMALL | {"vectorization_mode": "envpool", "total_timesteps": 400, "checkpoint_interval": 3}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(run_dir=str(tmp_path / name), seed=seed, env_id="HalfCheetah-v5", **args))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    run_dir = train_probe(tmp_path, "ConstantBox", total_timesteps=100)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", run_dir)
    assert code == 2
    assert "already holds a run" in lines[0]
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir, "--no-norm-obs")
    assert code == 2
    assert lines == [f"error: --norm-obs contradicts the run in {run_dir}: leave it out"]
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_the_file_alone_is_enough(tmp_path):
    """A copy in an empty folder trains, evaluates and leaves its files."""
    shutil.copy(SCRIPT, tmp_path)
    common = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    args = SMALL | {"env_id": "Pendulum-v1", "total_timesteps": 64, "eval_episodes": 1}
    done = subprocess.run([sys.executable, SCRIPT.name, "--run-dir", "run", *flags(args)], **common)
    assert done.returncode == 0, done.stderr
    assert "saved in run" in done.stdout
    assert {"policy.pt", "summary.json", "returns.png"} <= {path.name for path in Path(tmp_path, "run").iterdir()}
