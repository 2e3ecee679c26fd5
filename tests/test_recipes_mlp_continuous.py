"""What each recipe for ppo_mlp_continuous.py claims, on small cases. test_recipes.py has what holds for all recipes."""

import numpy as np
import pytest
import ranks_mlp
import torch
from helpers import ROOT, Spy, gae_by_definition, mistake, patched, read_metrics, run_script, run_two_ranks, same_state
from scipy import stats


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------- torchrun


def test_two_ranks_equal_one_process(tmp_path):
    """After a few steps on rollouts whose rows the ranks share unequally: weights, statistics, steps and figures."""
    ppo = patched("ppo_mlp_continuous__torchrun", tmp_path)
    run_two_ranks(ROOT / "tests/ranks_mlp.py", tmp_path)
    alone = ranks_mlp.run(ppo, tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same_state(*ranks)
    torch.testing.assert_close(ranks[0], alone, rtol=0, atol=1e-6)
    files = [sorted(path.name.split(".out.")[0] for path in (tmp_path / f).iterdir()) for f in ("run", "alone/run")]
    assert files[0] == files[1]  # each is there once
    together, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone/run")
    assert len(together) == len(expected) == 3
    for row, other in zip(together, expected):
        for name in row:
            if name not in ("charts/episodic_return", "charts/episodic_length"):  # of the first rank's episodes
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-7)
    moments = [ppo.RunningMoments(1), ppo.RunningMoments(1)]
    for folder, one in zip(("run", "alone/run"), moments):
        ppo.load(tmp_path / folder / "checkpoint.pt", obs_moments=one)
    np.testing.assert_allclose(*(torch.stack([one.count, one.mean[0], one.var[0]]) for one in moments), rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------- beta_policy


@pytest.fixture(scope="module")
def beta(tmp_path_factory):
    return patched("ppo_mlp_continuous__beta_policy", tmp_path_factory.mktemp("beta"))


LOW, HIGH = [[3.0], [-6.0]], [[7.0], [2.0]]  # of a table of two numbers


def make_policy(beta):
    """A policy with distributions far from its first ones, observations, and scipy's distributions of their actions."""
    torch.manual_seed(0)
    policy = beta.Policy(3, LOW, HIGH, "float64", norm_obs=True).double()
    policy.actor[-1].weight.data *= 200
    policy.obs_mean.fill_(1.0)
    obs = np.random.default_rng(0).normal(1, 1, (6, 3))
    with torch.no_grad():
        outputs = policy.actor(torch.tensor(obs - 1)).numpy()
    alphas, betas = np.split(1 + np.logaddexp(0, outputs), 2, axis=-1)
    low, width = np.ravel(LOW), np.ravel(HIGH) - np.ravel(LOW)
    return policy, obs, stats.beta(alphas, betas, low, width), alphas, betas


def test_log_densities_and_entropies_are_of_scaled_beta_distributions(beta):
    """Those of the environment's actions are those of the policy's less the log of the range, as scipy and torch have
    them, which scale on their own."""
    policy, obs, scaled, alphas, betas = make_policy(beta)
    units = np.random.default_rng(1).uniform(0.05, 0.95, (6, 2))
    actions = policy.to_env(units).reshape(6, 2)
    np.testing.assert_allclose(actions, np.ravel(LOW) + units * [4, 8])
    log_densities, entropies = policy.evaluate_actions(policy.normalize(obs), torch.tensor(units))
    jacobian = np.log(4) + np.log(8)
    np.testing.assert_allclose(log_densities.detach() - jacobian, scaled.logpdf(actions).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(entropies.detach() + jacobian, scaled.entropy().sum(-1), rtol=1e-9)
    own = torch.distributions.Beta(torch.tensor(alphas), torch.tensor(betas))
    affine = torch.distributions.AffineTransform(torch.tensor(LOW)[:, 0], torch.tensor([4.0, 8.0]))
    transformed = torch.distributions.TransformedDistribution(own, affine)
    expected = transformed.log_prob(torch.tensor(actions)).sum(-1)
    torch.testing.assert_close(log_densities - jacobian, expected)
    assert log_densities.std() > 0.1


def test_samples_keep_to_the_bounds_and_greedy_actions_are_modes(beta):
    policy, obs, scaled, alphas, betas = make_policy(beta)
    modes = policy.act(obs, greedy=True)
    assert (modes.shape, modes.dtype) == ((6, 2, 1), np.float64)
    expected = np.ravel(LOW) + [4, 8] * (alphas - 1) / (alphas + betas - 2)
    np.testing.assert_allclose(modes[..., 0], expected, rtol=1e-6)
    assert (scaled.pdf(expected) >= scaled.pdf(expected + 1e-3)).all()
    assert (scaled.pdf(expected) >= scaled.pdf(expected - 1e-3)).all()
    samples = policy.act(np.tile(obs[:1], (5000, 1)))[..., 0]
    for k in range(2):
        law = stats.beta(alphas[0, k], betas[0, k], np.ravel(LOW)[k], [4, 8][k])
        assert stats.kstest(samples[:, k], law.cdf).pvalue > 1e-3
    policy.float().actor[-1].bias.data = torch.tensor([1e8, 1e8, -1e8, -1e8])  # torch rounds no sample to a bound
    units = policy.choose(np.tile(obs[:1], (100, 1)))
    assert ((units > 0) & (units < 1)).all()
    log_densities, _ = policy.evaluate_actions(policy.normalize(np.tile(obs[:1], (100, 1))), torch.tensor(units))
    assert log_densities.isfinite().all()


def test_it_learns_to_go_to_the_bound_and_evaluates_modes(beta, tmp_path, monkeypatch):
    flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 4, "learning_rate": 3e-3}
    args = beta.Args(env_id="probe_envs:Edge-v0", total_timesteps=1000, gamma=0.9, eval_episodes=3, **flags)
    beta.train(args, tmp_path)
    assert beta.evaluate(args, tmp_path)["eval_return_greedy"] > 1.5  # of -6 to 2
    seen, act = [], beta.Policy.act
    monkeypatch.setattr(
        beta.Policy, "act", lambda self, obs, greedy: seen.append((self, obs)) or act(self, obs, greedy)
    )
    returns = beta.evaluate(args, tmp_path)
    assert returns["eval_return_greedy"] == pytest.approx(act(*seen[0], greedy=True).mean())  # the reward is the action
    with pytest.raises(beta.UserError, match="without bounds"):
        beta.make_envs(beta.Args(env_id="probe_envs:Open-v0"), 1)


# -------------------------------------------------------------------------------------------------------------- envpool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pytest.importorskip("envpool")
    return patched("ppo_mlp_continuous__envpool", tmp_path_factory.mktemp("envpool"))


def test_ends_and_resets_of_envpool(pool, tmp_path, monkeypatch):
    """Of Hoppers that fall, and have 15 steps at most: the step after an end resets and is left out; advantages count
    what a truncated episode had ahead, and nothing after a fall."""
    make = pool.envpool.make_gymnasium
    monkeypatch.setattr(pool.envpool, "make_gymnasium", lambda **given: make(**given, max_episode_steps=15))
    spy = Spy(pool, monkeypatch)
    flags = {"num_envs": 5, "num_steps": 50, "num_minibatches": 1, "update_epochs": 1, "norm_obs": False}
    flags |= {"norm_reward": False, "total_timesteps": 300, "gamma": 0.95, "gae_lambda": 0.8}
    summary = pool.train(pool.Args(env_id="Hopper-v5", **flags), tmp_path)
    fallen, cut, total = 0, 0, 0
    assert len(spy.calls) == 2
    for i, (_, critic, batch) in enumerate(spy.calls):
        obs, _, rewards, terminated, truncated, rows = spy.rollout(i, 50)
        assert (rewards[~rows] == 0).all()
        assert not (terminated | truncated)[~rows].any()
        assert (abs(obs[1:, :, 0][~rows] - 1.25) < 0.01).all()  # it stands up again
        values = critic(torch.tensor(obs, dtype=torch.float32))[..., 0].detach().numpy()
        advantages = gae_by_definition(rewards, values, terminated, truncated, 0.95, 0.8)[rows]
        np.testing.assert_allclose(np.sort(batch.advantages), np.sort(advantages), atol=1e-3)
        fallen, cut, total = fallen + terminated.sum(), cut + truncated.sum(), total + rows.sum()
    assert fallen > 3
    assert cut > 3
    assert summary["global_step"] == total


def test_seeds_of_envpool(pool):
    envs = pool.make_envs(pool.Args(env_id="Hopper-v5"), 3)
    first, again, other = (envs.reset(seed=seed)[0] for seed in (2**31 + 1000, 2**31 + 1000, 4))
    assert (first == again).all()
    assert (first != other).any(-1).all()
    assert len({*first[:, 0]}) == 3


def test_envpool_trains_resumes_and_plays(pool, tmp_path, monkeypatch, capsys):
    flags = [
        "--num-envs",
        4,
        "--num-steps",
        32,
        "--num-minibatches",
        2,
        "--eval-episodes",
        3,
        "--checkpoint-interval",
        1,
    ]
    given = ["--env-id", "InvertedPendulum-v5", "--run-dir", tmp_path / "run"]
    run_script(pool, monkeypatch, *given, "--total-timesteps", 250, *flags)
    run_script(pool, monkeypatch, "--resume", tmp_path / "run", "--total-timesteps", 500)
    said = capsys.readouterr().out.splitlines()
    run_script(pool, monkeypatch, "--play", tmp_path / "run")
    assert capsys.readouterr().out.splitlines() == said[-3:-1]
    assert len(read_metrics(tmp_path / "run")) > 4
    line = mistake(pool, monkeypatch, "--env-id", "probe_envs:Dial-v0")
    assert line == "error: --env-id probe_envs:Dial-v0 is none of EnvPool's environments"
