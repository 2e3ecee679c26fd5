"""Tests of ppo_mlp_continuous.py: formulas, probe environments, and real runs that are killed, resumed and played."""

import itertools
import json
import math
import signal
import sys

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from helpers import (
    Spy,
    gae_by_definition,
    mistake,
    read_metrics,
    run_script,
    same_state,
    start,
    tensorboard_rows,
    wait_for_rows,
)
from scipy import stats

import ppo_mlp_continuous as ppo
from ppo_mlp_continuous import Args, Batch

SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 4, "learning_rate": 3e-3, "gamma": 0.9}
BIG = {"num_steps": 64, "update_epochs": 10, "num_minibatches": 4}


def make_policy(low=(-1.0, -1.0), high=(1.0, 1.0), dtype="float64", norm_obs=True, log_std_init=-0.5, obs_dim=3):
    return ppo.Policy(obs_dim, list(low), list(high), dtype, norm_obs, log_std_init)


def train_probe(run_dir, probe, total_timesteps=4000, **flags):
    return ppo.train(Args(env_id=f"probe_envs:{probe}-v0", total_timesteps=total_timesteps, **SMALL | flags), run_dir)


# ------------------------------------------------------------------------------------------------------------- formulas


def test_log_densities_and_entropies_equal_scipys():
    torch.manual_seed(0)
    policy = make_policy().double()
    policy.log_std.data = torch.tensor([-1.0, 0.5]).double()
    obs, actions = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 2).double()
    log_densities, entropies = policy.evaluate_actions(obs, actions)
    normals = stats.norm(policy.actor(obs).detach().numpy(), np.exp([-1.0, 0.5]))
    np.testing.assert_allclose(log_densities.detach(), normals.logpdf(actions).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(entropies.detach(), normals.entropy().sum(-1), rtol=1e-10)


def small_learner(rows=6):
    """A linear policy over 2 numbers, a critic and a batch in float64, whose ratios lie on both sides of the clip."""
    torch.manual_seed(3)
    policy, critic = make_policy().double(), torch.nn.Linear(3, 1).double()
    policy.actor = torch.nn.Linear(3, 2).double()
    actions, vectors, obs = torch.randn(rows, 2), torch.randn(4, rows), torch.randn(rows, 3)
    log_probs = policy.evaluate_actions(obs.double(), actions.double())[0].detach() + 0.4 * vectors[0]
    return policy, critic, Batch(*(x.double() for x in (obs, actions, log_probs, *vectors[1:])))


def loss_with_scipy(policy, critic, batch, beta, args):
    """The loss row by row, as numbers, without any function of the script."""
    advantages, values = batch.advantages.tolist(), critic(batch.obs)[:, 0].tolist()
    normals = stats.norm(policy.actor(batch.obs).detach().numpy(), np.exp(policy.log_std.detach().numpy()))
    log_ratios = (normals.logpdf(batch.actions).sum(-1) - batch.log_probs.numpy()).tolist()
    if args.norm_adv:
        center, spread = np.mean(advantages), np.std(advantages, ddof=1)
        advantages = [(a - center) / (spread + 1e-8) for a in advantages]
    total = 0.0
    for advantage, value, log_ratio, old, target in zip(advantages, values, log_ratios, batch.values, batch.returns):
        ratio = math.exp(log_ratio)
        policy_loss = -min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        if args.objective == "kl-penalty":
            policy_loss = -ratio * advantage + beta * (ratio - 1 - log_ratio)
        error = (value - target) ** 2
        if args.clip_vloss:
            error = max(error, (old + max(-0.2, min(0.2, value - old)) - target) ** 2)
        total += policy_loss + args.vf_coef * error / 2
    return total / len(values) - args.ent_coef * normals.entropy().sum(-1).mean()


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("switched_on", [True, False])
def test_loss_and_gradient(objective, switched_on):
    """The loss equals an independent formula, and its gradient the loss's finite differences."""
    args = Args(objective=objective, ent_coef=0.03, clip_vloss=switched_on, norm_adv=switched_on)
    policy, critic, batch = small_learner()
    parameters = [policy.log_std, *policy.actor.parameters(), *critic.parameters()]

    def loss():
        return ppo.ppo_loss(policy, critic, batch, 0.7, args)[0]

    assert loss().item() == pytest.approx(float(loss_with_scipy(policy, critic, batch, 0.7, args)), rel=1e-9)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters)):
        for index in itertools.product(*map(range, parameter.shape)):
            with torch.no_grad():
                parameter[index] += 1e-6
                above = loss()
                parameter[index] -= 2e-6
                below = loss()
                parameter[index] += 1e-6
            assert gradient[index].item() == pytest.approx(((above - below) / 2e-6).item(), abs=1e-7)


def test_figures_of_the_loss():
    args = Args(ent_coef=0.1, norm_adv=True)
    policy, critic, batch = small_learner()
    loss, figures = ppo.ppo_loss(policy, critic, batch, 1.0, args)
    total = figures["policy_loss"] + args.vf_coef * figures["value_loss"] - args.ent_coef * figures["entropy"]
    torch.testing.assert_close(loss.detach(), total)
    ratios = (policy.evaluate_actions(batch.obs, batch.actions)[0] - batch.log_probs).exp().detach().numpy()
    assert figures["clipfrac"].item() == pytest.approx(np.mean(abs(ratios - 1) > 0.2))
    assert 0 < figures["clipfrac"] < 1
    assert figures["approx_kl"].item() == pytest.approx(np.mean(ratios - 1 - np.log(ratios)))
    assert not any(figure.requires_grad for figure in figures.values())
    one_row = Batch(*(column[:1] for column in batch))
    assert ppo.ppo_loss(policy, critic, one_row, 1.0, args)[0].isfinite()


def test_mean_and_mean_gradient_of_the_kl_estimate_are_exact():
    """Over actions of the old policy, by quadrature; the mean of k1 would have a gradient of 0."""
    torch.manual_seed(1)
    policy = make_policy([-1.0], [1.0]).double()
    policy.actor = torch.nn.Linear(3, 1).double()
    obs, old = torch.randn(1, 3).double(), torch.distributions.Normal(torch.tensor(0.3).double(), 0.8)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    chances = torch.tensor(weights / weights.sum())
    actions = old.mean + old.stddev * torch.tensor(nodes)[:, None]
    log_probs = policy.evaluate_actions(obs.expand(60, 3), actions)[0]
    estimate = sum(c * ppo.approximate_kl(x) for c, x in zip(chances, log_probs - old.log_prob(actions)[:, 0]))
    new = torch.distributions.Normal(policy.actor(obs)[0, 0], policy.log_std[0].exp())
    exact = torch.distributions.kl_divergence(old, new)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-8)
    parameters = [policy.log_std, *policy.actor.parameters()]
    gradients = [torch.autograd.grad(kl, parameters, retain_graph=True) for kl in (estimate, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_running_moments_equal_numpys():
    moments, rng, seen = ppo.RunningMoments(2, 3), np.random.default_rng(0), []
    assert (moments.mean.abs().max(), moments.var.min(), moments.var.max()) == (0, 1, 1)  # before all data
    for rows in (1, 5, 300):
        seen.append(rng.normal(1000, 0.1, (rows, 2, 3)).astype(np.float32))
        moments.update(seen[-1])
        everything = np.concatenate(seen).astype(np.float64)
        np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.var, everything.var(0), rtol=1e-6, atol=1e-12)
        assert moments.count == len(everything)


# --------------------------------------------------------------------------------------------------------------- policy


def test_networks_are_initialised_as_ppo_wants_them():
    torch.manual_seed(0)
    policy = make_policy(log_std_init=-0.7)
    assert policy.log_std.tolist() == pytest.approx([-0.7, -0.7])
    for network, gain in ((policy.actor, 0.01), (ppo.mlp(4, 1, 1.0), 1.0)):
        layers = network[::2]
        assert [type(layer).__name__ for layer in network] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
        assert [layer.weight.shape[0] for layer in layers[:2]] == [64, 64]
        for layer, expected in zip(layers, (math.sqrt(2), math.sqrt(2), gain)):
            singular_values = torch.linalg.svdvals(layer.weight)
            expected = torch.full_like(singular_values, expected)
            torch.testing.assert_close(singular_values, expected, rtol=1e-4, atol=1e-6)
            assert not layer.bias.any()


def test_observations_are_normalised_and_clipped():
    policy = make_policy()
    policy.obs_mean.copy_(torch.tensor([3.0, 0.0, -1.0]))
    policy.obs_std.copy_(torch.tensor([2.0, 1.0, 0.5]))
    obs = np.array([[5.0, 0.5, -0.5], [99.0, -99.0, 0.0]])
    assert policy.normalize(obs).tolist() == [[1, 0.5, 1], [10, -10, 2]]
    policy.norm_obs = False
    assert policy.normalize(obs).tolist() == obs.tolist()


@pytest.mark.parametrize(
    ("low", "high", "dtype", "actions", "executed"),
    [  # -1, 0 and 1 are the lowest, the middle and the highest action; what lies beyond is clipped
        ([3.0, -6.0], [7.0, 2.0], "float64", [[-1, 0], [0, 1], [-1.5, 99]], [[3, -2], [5, 2], [3, 2]]),
        ([[0.0, 1.0]], [[4.0, 3.0]], "float32", [[0.5, -0.5]], [[[3, 1.5]]]),  # a table
        (-2.0, 2.0, "float32", [[0.25], [9]], [0.5, 2]),  # a single number
        (
            [-np.inf, -3e38, 5.0],
            [np.inf, 3e38, np.inf],
            "float64",
            [[1.5, -40, 1], [0, 0, -1]],
            [[1.5, -40, 6], [0, 0, 5]],
        ),
        ([-np.inf], [-5.0], "float64", [[0], [-1]], [[-5], [-6]]),
        ([0], [9], "int32", [[-2], [0.1], [0.23], [1]], [[0], [5], [6], [9]]),
        ([0], [255], "uint8", [[-1], [1]], [[0], [255]]),
        ([2e6], [3e6], "float64", [[-1], [0], [1]], [[2e6], [2.5e6], [3e6]]),
    ],
)
def test_actions_in_the_environments_unit(low, high, dtype, actions, executed):
    policy = ppo.Policy(3, low, high, dtype, True, 0.0)
    ours = policy.to_env(np.array(actions, np.float32))
    assert ours.dtype == dtype
    assert ours.tolist() == executed
    assert policy.act(np.zeros((1, 3)), greedy=True).shape == (1, *np.shape(low))


def test_sampled_and_greedy_actions_follow_the_policy():
    policy = make_policy([-np.inf] * 2, [np.inf] * 2)
    policy.log_std.data = torch.tensor([-1.0, 0.5])
    policy.obs_mean.fill_(1.0)
    obs = np.tile(np.array([[1.5, 0.0, 2.0]]), (20_000, 1))
    means = policy.actor(torch.tensor(obs[:1] - 1, dtype=torch.float32))[0].detach()
    torch.manual_seed(0)
    actions = policy.act(obs)
    for component, std in ((0, math.exp(-1)), (1, math.exp(0.5))):
        assert stats.kstest(actions[:, component], stats.norm(means[component], std).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.03
    np.testing.assert_allclose(policy.act(obs[:2], greedy=True), means.expand(2, 2), atol=1e-6)


# ----------------------------------------------------------------------------------------------- what a run learns from


@pytest.mark.parametrize("normalised", [True, False])
def test_batches_are_what_happened(tmp_path, monkeypatch, normalised):
    """Of three rollouts of episodes that end in either way, each pass has the steps that are no resets, normalised by
    the statistics of the rollouts before, with advantages of rewards scaled by a statistic that counts theirs in, from
    the critic as it is before the pass; all by independent sums."""
    spy = Spy(ppo, monkeypatch)
    flags = {"num_envs": 3, "num_steps": 40, "num_minibatches": 1, "update_epochs": 2, "gamma": 0.95, "gae_lambda": 0.8}
    flags |= {"norm_obs": normalised, "norm_reward": normalised, "total_timesteps": 240, "learning_rate": 1e-2}
    summary = ppo.train(Args(env_id="probe_envs:NumberedBox-v0", **flags), tmp_path)
    metrics = read_metrics(tmp_path)
    assert len(spy.steps) / 40 == len(spy.calls) / 2 == len(metrics) == 3
    seen, discounted, running, total = [], [], np.zeros(3), 0
    for call, (policy, critic, batch) in enumerate(spy.calls):
        i = call // 2
        obs, executed, rewards, terminated, truncated, rows = spy.rollout(i, 40)
        assert (rows == (obs[:-1, :, 0] > 0)).all()
        inputs = obs
        if normalised and i > 0:
            past = np.concatenate(seen[:i]).astype(np.float64)
            inputs = (obs - past.mean(0)) / past.std(0)
        if normalised:
            inputs = inputs.clip(-10, 10)
        if call % 2 == 0:  # once per rollout
            seen.append(obs[:-1][rows])
            for t in range(40):
                running = np.where(rows[t], 0.95 * running + rewards[t], 0)
                discounted.append(running[rows[t]])
            total += rows.sum()
            assert int(metrics[i]["global_step"]) == total
            old_policy = policy
        if normalised:
            rewards = (rewards / np.concatenate(discounted).std()).clip(-10, 10)
        inputs = torch.tensor(inputs, dtype=torch.float32)
        values = critic(inputs)[..., 0].detach().numpy()
        advantages = gae_by_definition(rewards, values, terminated, truncated, 0.95, 0.8)
        returns = advantages + values[:-1]
        kept = inputs[:-1].numpy()[rows]
        log_probs, _ = old_policy.evaluate_actions(batch.obs, batch.actions)  # of the unclipped actions
        torch.testing.assert_close(batch.log_probs, log_probs.detach(), rtol=0, atol=1e-5)
        for ours, theirs in (
            (batch.obs[:, 0], kept[:, 0]),
            (batch.advantages, advantages[rows]),
            (batch.returns, returns[rows]),
        ):
            np.testing.assert_allclose(np.sort(ours), np.sort(theirs), atol=1e-4, rtol=1e-4)
        if call % 2 == 0:
            np.testing.assert_allclose(np.sort(batch.values), np.sort(values[:-1][rows]), atol=1e-5)
            explained = 1 - np.var(advantages[rows]) / np.var(returns[rows])
            assert float(metrics[i]["losses/explained_variance"]) == pytest.approx(explained, rel=1e-3)
        pairs = np.stack([np.repeat(kept[:, 0], 2), executed[rows].ravel()])  # what was seen and done belong together
        ours = np.stack([batch.obs[:, 0].repeat_interleave(2), old_policy.to_env(batch.actions.numpy()).ravel()])
        np.testing.assert_allclose(*(x[:, np.lexsort(x.round(4))] for x in (ours, pairs)), atol=1e-4)
    assert summary["global_step"] == total
    assert (abs(spy.calls[0][2].actions) > 1).any()
    assert all((abs(step[1]) <= 1).all() for step in spy.steps)


def test_statistics_of_a_saved_policy_are_those_it_was_trained_with(tmp_path, monkeypatch):
    spy = Spy(ppo, monkeypatch)
    train_probe(tmp_path, "Far", total_timesteps=400)
    same_state(ppo.load_policy(tmp_path).obs_mean, spy.calls[-1][0].obs_mean)
    same_state(ppo.load_policy(tmp_path).obs_std, spy.calls[-1][0].obs_std)
    moments = ppo.RunningMoments(2)
    ppo.load(tmp_path / "checkpoint.pt", obs_moments=moments)
    assert moments.count == 64 / 2 * 13  # a probe's episodes are one step and a reset
    assert not torch.allclose(moments.mean.float(), spy.calls[-1][0].obs_mean, rtol=1e-7, atol=0)
    before = ppo.load_policy(tmp_path).state_dict()
    ppo.evaluate(Args(env_id="probe_envs:Far-v0"), tmp_path)
    same_state(before, ppo.load_policy(tmp_path).state_dict())


def test_advantages_stay_without_recomputation(tmp_path, monkeypatch):
    for recompute in (True, False):
        spy = Spy(ppo, monkeypatch)
        flags = {"num_minibatches": 1, "update_epochs": 2, "total_timesteps": 32, "recompute_advantages": recompute}
        train_probe(tmp_path / str(recompute), "NumberedBox", **flags)
        (_, _, first), (_, _, second) = spy.calls
        assert torch.equal(first.returns.sort()[0], second.returns.sort()[0]) is not recompute
        assert torch.equal(first.log_probs.sort()[0], second.log_probs.sort()[0])
        assert torch.equal(first.values.sort()[0], second.values.sort()[0])
        monkeypatch.undo()


def test_the_ratio_is_one_with_the_default_batch(tmp_path, monkeypatch):
    """To the last bit where rounding does not depend on the number of rows, which not every processor grants."""
    spy = Spy(ppo, monkeypatch)
    ppo.train(Args(env_id="Pendulum-v1", total_timesteps=4000, update_epochs=1), tmp_path)
    for policy, _, batch in spy.calls[::32]:  # the first ones of both updates
        assert (policy.evaluate_actions(batch.obs, batch.actions)[0] - batch.log_probs).abs().max() < 2e-6


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    rates, norms = [], []
    step = torch.optim.Adam.step

    def spied_step(optimizer):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        assert (group["eps"], group["betas"], len(group["params"])) == (1e-5, (0.9, 0.999), 13)
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    flags = {"num_minibatches": 1, "update_epochs": 1, "total_timesteps": 200, "norm_reward": False}
    train_probe(tmp_path / "a", "Dial", max_grad_norm=0.1, **flags)
    rows = read_metrics(tmp_path / "a")
    before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    assert rates == [float(row["charts/learning_rate"]) for row in rows]
    assert rates == pytest.approx([3e-3 * (1 - b / 200) for b in before])
    assert norms == pytest.approx([0.1] * len(rows), rel=1e-4)
    assert all(float(row["losses/grad_norm"]) > 0.2 for row in rows)
    rates.clear()
    train_probe(tmp_path / "b", "Dial", anneal_lr=False, **flags)
    assert set(rates) == {3e-3}


def test_kl_stop_ends_the_update_before_the_step(tmp_path, monkeypatch):
    """With a target below what one step changes, each update makes exactly one step; without one, all of them."""
    counts = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (counts.append(1), step(self))[1])
    for target, steps in ((1e-9, 1), (None, 8)):
        counts.clear()
        train_probe(tmp_path / str(target), "Dial", total_timesteps=300, target_kl=target)
        assert len(counts) == steps * len(read_metrics(tmp_path / str(target)))


def test_beta_follows_the_papers_rule(tmp_path):
    """KL-penalty, section 4 of the paper: doubled above 1.5 times the target, halved below it / 1.5, by the KL that is
    measured after the update, when a single step has moved the policy."""
    flags = {"objective": "kl-penalty", "num_minibatches": 1, "update_epochs": 1, "kl_penalty_target": 5e-3}
    flags |= {"max_grad_norm": 0.5, "anneal_lr": False}  # with which beta rises, stays and falls
    train_probe(tmp_path, "Dial", total_timesteps=8000, **flags)
    beta, factors = 1.0, set()
    for row in read_metrics(tmp_path):
        kl = float(row["losses/kl_after_update"])
        factor = 2 if kl > 1.5 * 5e-3 else 0.5 if kl < 5e-3 / 1.5 else 1
        beta *= factor
        factors.add(factor)
        assert float(row["losses/kl_coef"]) == beta
        assert abs(float(row["losses/approx_kl"])) < 1e-8  # before the step
        assert kl > 0  # after it
    assert factors == {0.5, 1, 2}


def greedy_action(run_dir, obs=(0.0,)):
    return ppo.load_policy(run_dir).act(np.array([obs]), greedy=True)[0]


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
def test_probe_between_asymmetric_bounds(tmp_path, objective):
    train_probe(tmp_path, "Dial", **BIG, objective=objective)
    assert greedy_action(tmp_path) == pytest.approx([5.5], abs=0.15)


def test_probes_at_a_bound_and_of_whole_numbers(tmp_path):
    train_probe(tmp_path / "edge", "Edge")
    assert greedy_action(tmp_path / "edge") == [2]
    train_probe(tmp_path / "whole", "Whole", **BIG)
    assert greedy_action(tmp_path / "whole").tolist() == [7]


def test_probe_of_observations_far_from_zero(tmp_path):
    train_probe(tmp_path, "Far", total_timesteps=9000, **BIG, log_std_init=-1.0)
    probe = probe_envs.Far()
    for signs in itertools.product([1, -1], repeat=2):
        obs = np.array([500, -200]) + 3.0 * np.array(signs)
        error = (greedy_action(tmp_path, obs) - probe.best(obs)) / [[1, 4], [4, 200]]
        assert np.abs(error).max() < 0.15


def test_probe_of_an_endless_task_cut_by_truncation(tmp_path):
    """V = r / (1 - gamma) = 5 although every episode stops after 5 steps; 3.4 at most where that is a termination."""
    train_probe(tmp_path, "EndlessBox", gamma=0.8, norm_reward=False, learning_rate=5e-3)
    critic = ppo.mlp(1, 1, 1.0)
    ppo.load(tmp_path / "checkpoint.pt", critic=critic)
    assert critic(torch.zeros(1)).item() == pytest.approx(5, abs=0.25)


def test_vectorization_modes_give_the_same_run(tmp_path):
    for mode in ("sync", "async"):
        flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 100}
        ppo.train(Args(env_id="Pendulum-v1", vectorization_mode=mode, **flags), tmp_path / mode)
    assert read_metrics(tmp_path / "sync") == read_metrics(tmp_path / "async")


# ---------------------------------------------------------------------------------- same again, killed, resumed, played


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_probe(tmp_path / name, "Far", total_timesteps=400, seed=seed)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    states = [ppo.load(tmp_path / name / "checkpoint.pt") for name in ("a", "b")]
    for part in ("policy", "critic", "optimizer", "obs_moments", "return_moments", "queues"):
        same_state(*(state[part] for state in states))


def test_seeds_and_resumed_runs_have_other_episodes_and_noise(tmp_path, monkeypatch):
    spy = Spy(ppo, monkeypatch)
    flags = {"env_id": "Pendulum-v1", "num_steps": 16, "num_minibatches": 2, "total_timesteps": 1}
    ppo.train(Args(seed=1, **flags), tmp_path / "1")
    ppo.train(Args(seed=2, **flags), tmp_path / "2")
    ppo.train(Args(seed=1, **flags | {"resume": "it", "total_timesteps": 200}), tmp_path / "1")
    starts = np.concatenate([spy.steps[t][0] for t in (0, 16, 32)])
    assert len({*map(tuple, starts)}) == 24
    assert len({tuple(spy.steps[t][1].ravel()) for t in (0, 16, 32)}) == 3


def test_killed_and_resumed(tmp_path, monkeypatch):
    """A run that was killed goes on with the learner as it was, and each iteration has one row."""
    run_dir, flags = tmp_path / "run", ["--env-id", "Pendulum-v1", "--num-steps", 32, "--update-epochs", 2]
    process = start(ppo, "--run-dir", run_dir, *flags, "--checkpoint-interval", 10, "--eval-episodes", 2)
    wait_for_rows(run_dir, 15, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = ppo.load(run_dir / "checkpoint.pt")
    iteration, global_step, seconds, _ = state["progress"]
    assert iteration % 10 == 0 < seconds
    config = (run_dir / "config.json").read_text()
    same_run = Args(**json.loads(config) | {"resume": str(run_dir), "total_timesteps": global_step})
    ppo.train(same_run, run_dir)  # nothing is left to do
    same_state(state, ppo.load(run_dir / "checkpoint.pt"))
    whole = read_metrics(run_dir)
    assert len(whole) == iteration
    (run_dir / "config.json").write_text(config)

    steps = global_step + 1000
    run_script(ppo, monkeypatch, "--resume", run_dir, "--total-timesteps", steps, "--learning-rate", 1e-4)
    rows = read_metrics(run_dir, with_time=True)
    assert read_metrics(run_dir)[:iteration] == whole
    assert len(rows) == iteration + 4
    assert float(rows[iteration]["charts/learning_rate"]) == pytest.approx(1e-4 * (1 - global_step / steps))
    assert float(rows[iteration]["charts/episodic_return"]) < -100  # the last hundred episodes are remembered
    assert [step for step, _ in tensorboard_rows(run_dir)] == [int(row["global_step"]) for row in rows]
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["update_epochs"], config["eval_episodes"], config["learning_rate"]) == (2, 2, 1e-4)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["seconds"] > seconds
    run_script(ppo, monkeypatch, "--resume", run_dir)  # a finished run is evaluated again, no more
    assert json.loads((run_dir / "summary.json").read_text()) == summary


def test_play_and_load_policy_give_the_summarys_returns(tmp_path, monkeypatch, capsys):
    run_dir, flags = tmp_path / "run", [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    argv = ["--env-id", "probe_envs:Far-v0", "--total-timesteps", 1000, "--eval-episodes", 5, "--seed", 3]
    run_script(ppo, monkeypatch, *argv, *flags, "--run-dir", run_dir)
    trained = capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {*summary} == {"global_step", "seconds", "train_return", "eval_return_greedy", "eval_return_sampled"}
    assert f"greedy return {summary['eval_return_greedy']:.1f}" in trained
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    run_script(ppo, monkeypatch, "--play", run_dir)
    assert trained.startswith(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    policy, trained = ppo.load_policy(run_dir), ppo.Policy(**ppo.load(run_dir / "policy.pt")["spec"])
    ppo.load(run_dir / "checkpoint.pt", policy=trained)
    same_state(policy.state_dict(), trained.state_dict())
    env = gym.make("probe_envs:Far-v0")
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.act(obs))
    assert (policy.act(obs, greedy=True) == policy.act(obs[None], greedy=True)[0]).all()


def test_the_first_checkpoint_comes_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train_probe(tmp_path, "Dial")
    assert (tmp_path / "config.json").exists()
    order, replace = [], ppo.os.replace
    monkeypatch.undo()
    monkeypatch.setattr(ppo.os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    train_probe(tmp_path, "Dial", total_timesteps=4 * 64 // 2, checkpoint_interval=2, resume=str(tmp_path))
    assert order == ["policy.pt", "checkpoint.pt"] * 4  # at first, after iterations 2 and 4, and in the end
    assert len(read_metrics(tmp_path)) == 4


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "NoSuchThing"),
        (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
        (["--env-id", "CartPole-v1"], "--env-id CartPole-v1"),
        (["--num-envs", "0"], "--num-envs"),
        (["--num-steps", "1"], "--num-steps"),
        (["--gamma", "1.5"], "--gamma"),
        (["--gae-lambda", "nan"], "--gae-lambda"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--clip-coef", "-0.2"], "--clip-coef"),
        (["--max-grad-norm", "-1"], "--max-grad-norm"),
        (["--target-kl", "inf"], "--target-kl"),
        (["--seed", "-1"], "--seed"),
        (["--log-std-init", "inf"], "--log-std-init"),
        (["--num-minibatches", "9", "--num-envs", "2", "--num-steps", "4"], "--num-minibatches"),
        (["--device", "cuda"], "--device cuda"),
        (["--resume", "nowhere"], "nowhere"),
        (["--play", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--run-dir", "elsewhere"], "--run-dir"),
        (["--capture-video"], "moviepy"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert named in mistake(ppo, monkeypatch, "--env-id", "Pendulum-v1", "--total-timesteps", 10, *wrong)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_a_run_leaves_it_alone(tmp_path, monkeypatch):
    train_probe(tmp_path, "Dial", total_timesteps=64)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "holds a run" in mistake(ppo, monkeypatch, "--run-dir", tmp_path)
    assert "checkpoint.pt" in mistake(ppo, monkeypatch, "--resume", tmp_path, "--env-id", "Pendulum-v1")
    assert "--num-envs" in mistake(ppo, monkeypatch, "--resume", tmp_path, "--num-envs", 0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for name, flag in (("config.json", "--resume"), ("checkpoint.pt", "--resume"), ("policy.pt", "--play")):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert name in mistake(ppo, monkeypatch, flag, tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize("probe", ["BrokenLaterBox", "BlindLater"])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, probe):
    argv = ["--env-id", f"probe_envs:{probe}-v0", "--run-dir", tmp_path / "run", "--checkpoint-interval", 3]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert "iteration 12" in mistake(ppo, monkeypatch, *argv)
    assert len(read_metrics(tmp_path / "run")) == 11
    state = ppo.load(tmp_path / "run/checkpoint.pt")
    assert state["progress"][0] == 9
    for part in ("policy", "critic", "obs_moments", "return_moments"):
        assert all(numbers.isfinite().all() for numbers in state[part].values())
