"""Tests of ppo_mlp_discrete.py: formulas, probe environments, and real runs that are killed, resumed and played."""

import itertools
import json
import math
import signal
import sys

import gymnasium as gym
import numpy as np
import probe_envs  # noqa: F401 (registers the probes)
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
from scipy.stats import chisquare
from torch.distributions import Categorical, kl_divergence

import ppo_mlp_discrete as ppo
from ppo_mlp_discrete import Args, Batch

# ------------------------------------------------------------------------------------------------------------- formulas


def one_env_gae(rewards, values, terminated=(), truncated=()):
    ends = (np.array([[t in where] for t in range(len(rewards))]) for where in (terminated, truncated))
    return ppo.compute_gae(np.array(rewards)[:, None], np.array(values)[:, None], *ends, 0.5, 0.5).flatten().tolist()


def test_gae_by_hand():
    # gamma = lambda = 1/2: delta_0 = 1 + 2 - 2 = 1, delta_1 = 1 + 4 - 4 = 1, and A_0 = 1 + 1/4
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0]) == [1.25, 1.0]  # the segment's end bootstraps
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], terminated=[1]) == [0.25, -3.0]  # a terminated end does not
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], truncated=[1]) == [1.25, 1.0]  # a truncated one does
    assert one_env_gae([1.0, 1.0], [2.0, 4.0, 8.0], truncated=[0]) == [1.0, 1.0]  # and cuts what comes after it
    assert one_env_gae([1.0, 1.0, 9.0], [2.0, 4.0, 8.0, 7.0], truncated=[1])[:2] == [1.25, 1.0]  # nor does the reset


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.5, 0.0), (0.0, 0.7)])
def test_gae_equals_its_definition(density, gamma, lam):
    rng = np.random.default_rng(int(100 * density))
    rewards, values = rng.normal(size=(9, 4)), rng.normal(size=(10, 4))
    terminated, truncated = rng.random((2, 9, 4)) < density
    ours = ppo.compute_gae(rewards, values, terminated, truncated, gamma, lam)
    np.testing.assert_allclose(ours, gae_by_definition(rewards, values, terminated, truncated, gamma, lam), atol=1e-12)


def small_learner(rows=6):
    """A policy over 4 actions, a critic and a batch in float64, whose ratios lie on both sides of the clip."""
    torch.manual_seed(3)
    policy, critic = ppo.Policy(3, 4).double(), torch.nn.Linear(3, 1).double()
    policy.actor = torch.nn.Linear(3, 4).double()
    old_log_probs = torch.randn(rows, 4).double().log_softmax(-1)
    actions, vectors = torch.randint(0, 4, (rows,)), torch.randn(3, rows).double()
    obs = torch.randn(rows, 3).double()
    return policy, critic, Batch(obs, actions, old_log_probs[torch.arange(rows), actions], *vectors), old_log_probs


def loss_with_distributions(policy, critic, batch, beta, args):
    """The loss row by row, with torch.distributions and without any function of the script."""
    advantages = batch.advantages.tolist()
    if args.norm_adv:
        center, spread = np.mean(advantages), np.std(advantages, ddof=1)
        advantages = [(a - center) / (spread + 1e-8) for a in advantages]
    total = 0.0
    for b, advantage in enumerate(advantages):
        new, value = Categorical(logits=policy.actor(batch.obs[b])), critic(batch.obs[b])[0]
        log_ratio = new.log_prob(batch.actions[b]) - batch.log_probs[b]
        ratio = log_ratio.exp()
        if args.objective == "clip":
            low, high = 1 - args.clip_coef, 1 + args.clip_coef
            policy_loss = -min(ratio * advantage, max(low, min(high, ratio)) * advantage)
        else:
            policy_loss = -ratio * advantage + beta * (ratio - 1 - log_ratio)
        error = (value - batch.returns[b]) ** 2
        if args.clip_vloss:
            old = batch.values[b]
            near = old + max(-args.clip_coef, min(args.clip_coef, value - old))
            error = max(error, (near - batch.returns[b]) ** 2)
        total = total + policy_loss + args.vf_coef * error / 2 - args.ent_coef * new.entropy()
    return total / len(advantages)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("switched_on", [True, False])
def test_loss_and_gradient(objective, switched_on):
    """The loss equals an independent formula, and its gradient the loss's finite differences."""
    args = Args(objective=objective, ent_coef=0.03, clip_vloss=switched_on, norm_adv=switched_on)
    policy, critic, batch, _ = small_learner()
    parameters = [*policy.parameters(), *critic.parameters()]

    def loss():
        return ppo.ppo_loss(policy, critic, batch, 0.7, args)[0]

    torch.testing.assert_close(loss(), loss_with_distributions(policy, critic, batch, 0.7, args))
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters)):
        for index in itertools.product(*map(range, parameter.shape)):
            with torch.no_grad():
                parameter[index] += 1e-6
                above = loss()
                parameter[index] -= 2e-6
                below = loss()
                parameter[index] += 1e-6
            assert gradient[index].item() == pytest.approx(((above - below) / 2e-6).item(), abs=1e-7)


class FixedRatios(ppo.Policy):
    """Its log-probs are the logs of given numbers."""

    def __init__(self, ratios):
        super().__init__(1, 2)
        self.log_ratios = torch.nn.Parameter(torch.tensor(ratios).log())

    def evaluate_actions(self, obs, actions):
        """Log-probs, and entropies 0."""
        return self.log_ratios, torch.zeros(len(obs))


def test_clip_by_hand():
    """Good actions gain nothing above 1.2; bad ones nothing below 0.8; what makes matters worse counts in full."""
    policy, zeros = FixedRatios([1.5, 0.5, 1.5, 0.5, 1.1]), torch.zeros(5)
    batch = Batch(zeros[:, None], zeros, zeros, zeros, torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0]), zeros)
    loss, figures = ppo.ppo_loss(policy, torch.nn.Linear(1, 1), batch, 1.0, Args(norm_adv=False, vf_coef=0.0))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(-(2.4 + 1.0 - 3.0 - 1.6 + 2.2) / 5))
    torch.testing.assert_close(policy.log_ratios.grad * 5, torch.tensor([0.0, -1.0, 3.0, 0.0, -2.2]))
    assert figures["clipfrac"].item() == pytest.approx(0.8)
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 0.5, 1.1)]
    assert figures["approx_kl"].item() == pytest.approx(np.mean(k3))


def test_figures_of_the_loss():
    args = Args(ent_coef=0.1)
    policy, critic, batch, _ = small_learner()
    loss, figures = ppo.ppo_loss(policy, critic, batch, 1.0, args)
    total = figures["policy_loss"] + args.vf_coef * figures["value_loss"] - args.ent_coef * figures["entropy"]
    torch.testing.assert_close(loss.detach(), total)
    assert not any(figure.requires_grad for figure in figures.values())
    entropy = Categorical(logits=policy.actor(batch.obs)).entropy().mean()
    torch.testing.assert_close(figures["entropy"], entropy.detach())


def test_a_minibatch_of_one_row_is_finite():
    policy, critic, batch, _ = small_learner(rows=1)
    assert ppo.ppo_loss(policy, critic, batch, 1.0, Args())[0].isfinite()


def test_mean_and_mean_gradient_of_the_kl_estimate_are_exact():
    """Over all actions, weighed by the old policy; the mean of k1 would have a gradient of 0."""
    policy, _, batch, old_log_probs = small_learner(rows=1)
    exact = kl_divergence(Categorical(logits=old_log_probs[0]), Categorical(logits=policy.actor(batch.obs[0])))
    every, chances = torch.arange(4), old_log_probs[0].exp()
    log_ratio = policy.evaluate_actions(batch.obs.expand(4, 3), every)[0] - old_log_probs[0]
    estimate = sum(chance * ppo.approximate_kl(x) for chance, x in zip(chances, log_ratio))
    torch.testing.assert_close(estimate, exact)
    gradients = [torch.autograd.grad(kl, [*policy.parameters()], retain_graph=True) for kl in (estimate, exact)]
    torch.testing.assert_close(*gradients)
    assert all(ppo.approximate_kl(x) > 0 for x in log_ratio)


def test_networks_are_initialised_as_ppo_wants_them():
    torch.manual_seed(0)
    for network, gain in ((ppo.Policy(4, 3).actor, 0.01), (ppo.mlp(4, 1, 1.0), 1.0)):
        layers = network[::2]
        assert [type(layer).__name__ for layer in network] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
        assert [tuple(layer.weight.shape) for layer in layers[:2]] == [(64, 4), (64, 64)]
        for layer, expected in zip(layers, (math.sqrt(2), math.sqrt(2), gain)):
            singular_values = torch.linalg.svdvals(layer.weight)
            expected = torch.full_like(singular_values, expected)
            torch.testing.assert_close(singular_values, expected, rtol=1e-4, atol=1e-6)
            assert not layer.bias.any()


def test_sampled_and_greedy_actions_follow_the_policy():
    policy = ppo.Policy(2, 4)
    torch.nn.init.normal_(policy.actor[-1].weight, std=0.5, generator=torch.Generator().manual_seed(1))
    obs = np.tile(np.array([[1.0, -0.5]], np.float64), (20_000, 1))
    chances = policy.actor(torch.tensor(obs[0], dtype=torch.float32)).softmax(-1).detach().double()
    torch.manual_seed(0)
    counts = np.bincount(policy.act(obs), minlength=4)
    assert chisquare(counts, (chances / chances.sum() * len(obs)).numpy()).pvalue > 1e-3
    assert (policy.act(obs[:3], greedy=True) == chances.argmax().item()).all()
    assert policy.act(obs[0], greedy=True) == chances.argmax().item()


def test_every_row_once_per_pass_in_an_order_of_its_own():
    for rows, num_minibatches in itertools.product((1, 5, 12), (1, 3, 4)):
        column = torch.arange(rows, dtype=torch.float32)
        batch = Batch(column[:, None], column, column, column, column, column)
        each = list(ppo.minibatches(batch, Args(num_minibatches=num_minibatches, update_epochs=3)))
        per_pass = len(each) // 3
        assert per_pass <= num_minibatches
        orders = [torch.cat([m.returns for m in each[i * per_pass :][:per_pass]]).tolist() for i in range(3)]
        assert all(sorted(order) == column.tolist() for order in orders)
        assert all(len(m.obs) > 0 and torch.equal(m.obs[:, 0], m.advantages) for m in each)  # columns stay together
        assert rows < 12 or len({*map(tuple, orders)}) == 3


# ----------------------------------------------------------------------------------------------- what a run learns from


def test_batches_are_what_happened(tmp_path, monkeypatch):
    """Of three rollouts of episodes that end in either way, each batch holds the steps that are no resets, with values,
    log-probs, advantages and returns by independent sums."""
    spy, batches, minibatches = Spy(ppo, monkeypatch), [], ppo.minibatches
    monkeypatch.setattr(ppo, "minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1])
    flags = {"num_envs": 3, "num_steps": 20, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 120}
    summary = ppo.train(Args(env_id="probe_envs:Numbered-v0", **flags), tmp_path)
    metrics, total = read_metrics(tmp_path), 0
    assert len(batches) == len(spy.steps) / 20 == len(metrics) == 3
    for i, batch in enumerate(batches):
        policy, critic, _ = spy.calls[4 * i]
        obs, actions, rewards, terminated, truncated, rows = spy.rollout(i, 20)
        # After the last step of an episode the probe shows a negative number.
        assert (rows == (obs[:-1, :, 0] > 0)).all()
        values = critic(torch.tensor(obs))[..., 0].detach().numpy()
        advantages = gae_by_definition(rewards, values, terminated, truncated, 0.98, 0.9)
        log_probs = Categorical(logits=policy.actor(torch.tensor(obs[:-1]))).log_prob(torch.tensor(actions)).detach()
        returns = advantages + values[:-1]
        expected = Batch(obs[:-1], actions, log_probs.numpy(), values[:-1], advantages, returns)
        for name, ours, theirs in zip(Batch._fields, batch, expected):
            np.testing.assert_allclose(ours, theirs[rows], atol=1e-5, rtol=1e-4, err_msg=name)
        total += rows.sum()
        assert int(metrics[i]["global_step"]) == total
        explained = 1 - np.var(advantages[rows]) / np.var(returns[rows])
        assert float(metrics[i]["losses/explained_variance"]) == pytest.approx(explained, rel=1e-3)
    assert summary["global_step"] == total


def test_the_ratio_is_one_with_the_default_batch(tmp_path, monkeypatch):
    """To the last bit where rounding does not depend on the number of rows, which not every processor grants."""
    spy = Spy(ppo, monkeypatch)
    ppo.train(Args(total_timesteps=1200), tmp_path)
    for policy, _, batch in spy.calls[::32]:  # the first ones of three updates
        assert (policy.evaluate_actions(batch.obs, batch.actions)[0] - batch.log_probs).abs().max() < 1e-6


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    rates, norms = [], []
    step = torch.optim.Adam.step

    def spied_step(optimizer):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        assert (group["eps"], group["betas"], len(group["params"])) == (1e-5, (0.9, 0.999), 12)
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    flags = {
        "num_envs": 4,
        "num_steps": 16,
        "num_minibatches": 1,
        "update_epochs": 1,
        "env_id": "probe_envs:Endless-v0",
    }
    ppo.train(Args(total_timesteps=200, max_grad_norm=0.1, **flags), tmp_path / "a")
    rows = read_metrics(tmp_path / "a")
    before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    assert rates == [float(row["charts/learning_rate"]) for row in rows]
    assert rates == pytest.approx([2e-3 * (1 - b / 200) for b in before])
    assert norms == pytest.approx([0.1] * len(rows), rel=1e-4)
    assert all(float(row["losses/grad_norm"]) > 0.2 for row in rows)
    rates.clear()
    ppo.train(Args(total_timesteps=200, anneal_lr=False, **flags), tmp_path / "b")
    assert set(rates) == {2e-3}


def test_kl_stop_comes_before_the_step(tmp_path, monkeypatch):
    """With a target below what one step changes, each update makes exactly one step; without one, all of them."""
    counts = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (counts.append(1), step(self))[1])
    for target, steps in ((1e-9, 1), (None, 32)):
        counts.clear()
        ppo.train(Args(total_timesteps=1000, target_kl=target), tmp_path / str(target))
        assert len(counts) == steps * len(read_metrics(tmp_path / str(target)))


def test_beta_follows_the_papers_rule(tmp_path):
    """KL-penalty, section 4 of the paper: doubled above 1.5 times the target, halved below it / 1.5, by the KL that is
    measured after the update, when a single step has moved the policy."""
    flags = {"objective": "kl-penalty", "num_minibatches": 1, "update_epochs": 1, "learning_rate": 3e-3}
    ppo.train(Args(total_timesteps=30_000, anneal_lr=False, kl_penalty_target=6e-4, **flags), tmp_path)
    rows = [{name: float(value) for name, value in row.items()} for row in read_metrics(tmp_path)]
    beta, factors = 1.0, set()
    for row in rows:
        kl = row["losses/kl_after_update"]
        factor = 2 if kl > 1.5 * 6e-4 else 0.5 if kl < 6e-4 / 1.5 else 1
        beta *= factor
        factors.add(factor)
        assert row["losses/kl_coef"] == beta
        assert abs(row["losses/approx_kl"]) < 1e-8  # before the step
        assert kl > 0  # after it
    assert factors == {0.5, 1, 2}


def values_of(run_dir, *observations):
    critic = ppo.mlp(len(observations[0]), 1, 1.0)
    ppo.load(run_dir / "checkpoint.pt", critic=critic)
    return critic(torch.tensor(observations)).flatten().tolist()


def train_probe(run_dir, probe, total_timesteps=4000, **flags):
    flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "learning_rate": 5e-3} | flags
    return ppo.train(Args(env_id=f"probe_envs:{probe}-v0", total_timesteps=total_timesteps, **flags), run_dir)


def test_probes_of_the_critic(tmp_path):
    train_probe(tmp_path / "a", "Constant", total_timesteps=1500)
    assert values_of(tmp_path / "a", [0.0]) == pytest.approx([1.0], abs=0.05)
    train_probe(tmp_path / "b", "Coloured", total_timesteps=2500)
    assert values_of(tmp_path / "b", [-1.0], [1.0]) == pytest.approx([-1.0, 1.0], abs=0.1)
    train_probe(tmp_path / "c", "Delayed", gamma=0.5)
    assert values_of(tmp_path / "c", [0.0], [1.0]) == pytest.approx([0.5, 1.0], abs=0.05)
    train_probe(tmp_path / "d", "Endless", gamma=0.8)  # as a termination, a truncation would give 3.4 at most
    assert values_of(tmp_path / "d", [0.0]) == pytest.approx([5.0], abs=0.25)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("probe", ["Bandit", "Mirror", "Locks"])
def test_probes_of_the_policy(tmp_path, probe, objective):
    """Actions that start at 5, a sign to be matched, and a Dict to be read are learned, and played back."""
    train_probe(tmp_path, probe, objective=objective, learning_rate=2e-3)
    args = Args(env_id=f"probe_envs:{probe}-v0", eval_episodes=50)
    assert ppo.evaluate(args, tmp_path)["eval_return_greedy"] == 1.0


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Acrobot-v1", "probe_envs:Grid-v0"])
def test_vectorization_modes_give_the_same_run(tmp_path, env_id):
    for mode in ("sync", "async"):
        flags = {"num_envs": 2, "num_steps": 16, "total_timesteps": 100, "vectorization_mode": mode}
        ppo.train(Args(env_id=env_id, **flags), tmp_path / mode)
    assert read_metrics(tmp_path / "sync") == read_metrics(tmp_path / "async")


# --------------------------------------------------------------------------------------- same again, killed and resumed


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(total_timesteps=1500, seed=seed), tmp_path / name)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    states = [ppo.load(tmp_path / name / "checkpoint.pt") for name in ("a", "b")]
    for part in ("policy", "critic", "optimizer", "queues"):
        same_state(*(state[part] for state in states))


def test_seeds_share_no_starting_states(tmp_path, monkeypatch):
    spy = Spy(ppo, monkeypatch)
    for seed in (1, 2):
        ppo.train(Args(seed=seed, total_timesteps=1), tmp_path / str(seed))
    assert len({tuple(start) for start in np.concatenate([spy.steps[0][0], spy.steps[64][0]])}) == 16


def test_killed_and_resumed(tmp_path, monkeypatch):
    """A run that was killed goes on with the learner as it was, and each iteration has one row."""
    run_dir = tmp_path / "run"
    process = start(ppo, "--run-dir", run_dir, "--checkpoint-interval", 20, "--eval-episodes", 2)
    wait_for_rows(run_dir, 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    *written, _ = [int(row["global_step"]) for row in read_metrics(run_dir)]
    assert set(written) <= {step for step, _ in tensorboard_rows(run_dir)}
    state = ppo.load(run_dir / "checkpoint.pt")
    iteration, global_step, seconds, _ = state["progress"]
    assert iteration % 20 == 0 < seconds
    args = Args(**json.loads((run_dir / "config.json").read_text()))
    ppo.train(Args(resume=str(run_dir), total_timesteps=global_step), run_dir)  # nothing is left to do
    same_state(state, ppo.load(run_dir / "checkpoint.pt"))
    whole = read_metrics(run_dir)
    assert len(whole) == iteration
    (run_dir / "config.json").write_text(json.dumps(vars(args) | {"device": "cuda", "num_steps": 0}))

    steps, mended = str(global_step + 2000), ["--device", "cpu", "--num-steps", 64]  # flags are checked once, together
    run_script(ppo, monkeypatch, "--resume", run_dir, "--total-timesteps", steps, "--learning-rate", 1e-4, *mended)
    rows = read_metrics(run_dir, with_time=True)
    assert read_metrics(run_dir)[:iteration] == whole
    assert iteration + 4 <= len(rows) <= iteration + 5
    assert float(rows[iteration]["charts/learning_rate"]) == pytest.approx(1e-4 * (1 - global_step / float(steps)))
    assert 0 < float(rows[iteration]["charts/episodic_return"]) < 500  # the last hundred episodes are remembered
    assert [step for step, _ in tensorboard_rows(run_dir)] == [int(row["global_step"]) for row in rows]
    assert [x for _, x in tensorboard_rows(run_dir)] == pytest.approx([float(r["losses/value_loss"]) for r in rows])
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["checkpoint_interval"], config["eval_episodes"], config["learning_rate"]) == (20, 2, 1e-4)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["seconds"] > seconds
    assert summary["train_return"] == float(rows[-1]["charts/episodic_return"])
    run_script(ppo, monkeypatch, "--resume", run_dir)  # a finished run is evaluated again, no more
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert len(read_metrics(run_dir)) == len(rows)


def test_a_resumed_run_has_other_episodes_and_noise(tmp_path, monkeypatch):
    spy = Spy(ppo, monkeypatch)
    for run in ({"total_timesteps": 1}, {"total_timesteps": 900, "resume": "it"}):
        ppo.train(Args(**run), tmp_path)
    assert len({tuple(start) for start in np.concatenate([spy.steps[0][0], spy.steps[64][0]])}) == 16
    assert (spy.steps[0][1] != spy.steps[64][1]).any()


def test_the_first_checkpoint_comes_before_the_first_step(tmp_path, monkeypatch):
    """So that a run which is stopped at once can be resumed, and never stands in the way of one that cannot."""
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: sys.exit("killed"))
    with pytest.raises(SystemExit):
        ppo.train(Args(), tmp_path)
    monkeypatch.undo()
    run_script(ppo, monkeypatch, "--resume", tmp_path, "--total-timesteps", 900, "--eval-episodes", 2)
    assert len(read_metrics(tmp_path)) == 2
    order = []
    replace = ppo.os.replace
    monkeypatch.setattr(ppo.os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    ppo.train(Args(total_timesteps=2000, checkpoint_interval=2), tmp_path / "b")
    assert order == ["policy.pt", "checkpoint.pt"] * 4  # at first, after iterations 2 and 4, and in the end


def test_play_and_load_policy_give_the_summarys_returns(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    run_script(ppo, monkeypatch, "--total-timesteps", 4000, "--eval-episodes", 5, "--seed", 3, "--run-dir", run_dir)
    trained = capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {*summary} == {"global_step", "seconds", "train_return", "eval_return_greedy", "eval_return_sampled"}
    assert f"greedy return {summary['eval_return_greedy']:.1f}" in trained
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    run_script(ppo, monkeypatch, "--play", run_dir)
    assert trained.startswith(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    policy, trained = ppo.load_policy(run_dir), ppo.Policy(4, 2)
    ppo.load(run_dir / "checkpoint.pt", policy=trained)
    same_state(policy.state_dict(), trained.state_dict())
    env = gym.make("CartPole-v1")
    assert env.action_space.contains(policy.act(env.reset(seed=0)[0]))
    assert isinstance(policy.act(env.reset(seed=0)[0]), np.integer)  # a number, as FrozenLake's table wants it


def test_evaluation_of_what_never_ends_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "range", lambda n: range(50) if n == 100_000 else range(n), raising=False)
    train_probe(tmp_path, "Forever", total_timesteps=100)
    means = ppo.evaluate(Args(env_id="probe_envs:Forever-v0", eval_episodes=3), tmp_path)
    assert means == {"eval_return_greedy": 50, "eval_return_sampled": 50}
    assert "3 episodes, 3 unfinished" in capsys.readouterr().out


def test_evaluation_counts_one_episode_per_environment(tmp_path):
    train_probe(tmp_path, "Numbered", total_timesteps=100)
    args = Args(env_id="probe_envs:Numbered-v0", eval_episodes=40)
    env, lengths = gym.make("probe_envs:Numbered-v0").unwrapped, []
    for n in range(40):
        env.reset(seed=2**31 + 1000 + n)
        lengths.append(env.length)
    assert ppo.evaluate(args, tmp_path)["eval_return_sampled"] == np.mean(lengths)


def test_videos_are_recorded(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    run_script(ppo, monkeypatch, "--run-dir", tmp_path, "--total-timesteps", 100, "--capture-video")
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "NoSuchThing"),
        (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
        (["--env-id", "not an id"], "not an id"),
        (["--env-id", "probe_envs:Dial-v0"], "--env-id probe_envs:Dial-v0"),
        (["--env-id", "probe_envs:Many-v0"], "--env-id probe_envs:Many-v0"),
        (["--env-id", "probe_envs:Shapeless-v0"], "--env-id probe_envs:Shapeless-v0"),
        (["--env-id", "probe_envs:SameStep-v0"], "--env-id probe_envs:SameStep-v0"),
        (["--env-id", "Acrobot-v1", "--vectorization-mode", "vector_entry_point"], "vector entry point"),
        (["--num-envs", "0"], "--num-envs"),
        (["--num-steps", "1"], "--num-steps"),
        (["--total-timesteps", "-5"], "--total-timesteps"),
        (["--eval-episodes", "0"], "--eval-episodes"),
        (["--gamma", "1.5"], "--gamma"),
        (["--gamma", "nan"], "--gamma"),
        (["--gae-lambda", "-0.1"], "--gae-lambda"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--clip-coef", "-0.2"], "--clip-coef"),
        (["--max-grad-norm", "-1"], "--max-grad-norm"),
        (["--target-kl", "inf"], "--target-kl"),
        (["--seed", "-1"], "--seed"),
        (["--ent-coef", "inf"], "--ent-coef"),
        (["--vf-coef", "nan"], "--vf-coef"),
        (["--num-minibatches", "9", "--num-envs", "2", "--num-steps", "4"], "--num-minibatches"),
        (["--device", "cuda"], "--device cuda"),
        (["--resume", "nowhere"], "nowhere"),
        (["--play", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--run-dir", "elsewhere"], "--run-dir"),
        (["--run-dir", "file/in/the/way"], "file/in/the/way"),
        (["--capture-video"], "moviepy"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    (tmp_path / "file").write_text("")
    assert named in mistake(ppo, monkeypatch, "--total-timesteps", 10, *wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_does_not_fit_a_run_leaves_it_alone(tmp_path, monkeypatch):
    ppo.train(Args(total_timesteps=600), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "holds a run" in mistake(ppo, monkeypatch, "--run-dir", tmp_path)
    assert "checkpoint.pt" in mistake(ppo, monkeypatch, "--resume", tmp_path, "--env-id", "Acrobot-v1")
    assert "--num-envs" in mistake(ppo, monkeypatch, "--resume", tmp_path, "--num-envs", 0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [b"", b"noise", None])
@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "policy.pt"])
def test_damaged_files(tmp_path, monkeypatch, name, damage):
    ppo.train(Args(total_timesteps=600), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert name in mistake(ppo, monkeypatch, "--play" if name == "policy.pt" else "--resume", tmp_path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"spec": Trap(), "weights": {}}, tmp_path / "policy.pt")
    with pytest.raises(ppo.UserError):
        ppo.load_policy(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("probe", ["BrokenLater", "BlindLater"])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, probe):
    argv = ["--env-id", f"probe_envs:{probe}Discrete-v0", "--run-dir", tmp_path / "run", "--checkpoint-interval", 3]
    assert "iteration 12" in mistake(ppo, monkeypatch, *argv, "--num-envs", 4, "--num-steps", 16)
    assert len(read_metrics(tmp_path / "run")) == 11
    state = ppo.load(tmp_path / "run/checkpoint.pt")
    assert state["progress"][0] == 9
    assert all(weight.isfinite().all() for part in ("policy", "critic") for weight in state[part].values())
