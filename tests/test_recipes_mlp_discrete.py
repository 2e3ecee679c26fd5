"""Proofs of the recipes for ppo_mlp_discrete.py, each on a small case."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from helpers import Spy, mistake, patched, read_metrics
from scipy.stats import chisquare

import ppo_mlp_discrete as plain

# --------------------------------------------------------------------------------------------------------- action_masks


class Doors(gym.Env):
    """One-step episodes: some of four actions, which start at 5, are allowed, and the last of these is the best."""

    action_space = Discrete(4, start=5)
    observation_space = Box(0, 1, (1,), np.float32)
    where = "info"

    def reset(self, *, seed=None, options=None):
        """An observation that tells nothing."""
        super().reset(seed=seed)
        self.mask = self.np_random.permutation([1, 1, 0, 0]).astype(np.int8)
        return self.show()

    def step(self, action):
        """Ends the episode, after which no action is allowed."""
        assert self.mask[action - 5]
        reward = float(action - 5 == self.mask.nonzero()[0][-1])
        self.mask = np.zeros(4, np.int8)
        obs, info = self.show()
        return obs, reward, True, False, info

    def show(self):
        """Observation and info, of which one has the mask."""
        return np.zeros(1, np.float32), {"action_mask": self.mask}


class DictDoors(Doors):
    """The same, with a Dict in which the mask comes before the observation."""

    observation_space = Dict(action_mask=Box(0, 1, (4,), np.int8), observation=Box(0, 1, (1,), np.float32))

    def show(self):
        """The mask is in the observation."""
        return {"observation": np.zeros(1, np.float32), "action_mask": self.mask}, {}


gym.register("Doors-v0", Doors)
gym.register("DictDoors-v0", DictDoors)


@pytest.fixture
def masks(tmp_path):
    return patched("ppo_mlp_discrete__action_masks", tmp_path)


def test_masked_log_probs_are_a_renormalised_softmax(masks):
    """And the entropy that of the allowed actions alone; masked logits have no part in the gradient."""
    torch.manual_seed(0)
    policy = masks.Policy(7, 4).double()
    torch.nn.init.normal_(policy.actor[-1].bias)
    obs = torch.randn(3, 7).double()
    obs[:, 3:] = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    chances = policy.actor(obs).softmax(-1) * obs[:, 3:]
    chances = chances / chances.sum(-1, keepdim=True)
    log_probs, entropies = policy.evaluate_actions(obs, torch.tensor([2, 1, 3]))
    torch.testing.assert_close(log_probs.exp(), chances[torch.arange(3), [2, 1, 3]])
    by_hand = [-sum(p * p.log() for p in row if p > 0) for row in chances]
    torch.testing.assert_close(entropies, torch.stack(by_hand))
    assert policy.evaluate_actions(obs[2], torch.tensor(0))[0].exp() == 0
    (log_probs.sum() + entropies.sum()).backward()
    assert policy.actor[-1].bias.grad.isfinite().all()
    policy.zero_grad()
    (log_probs := policy.evaluate_actions(obs[:1], torch.tensor([2])))[0].sum().backward()
    assert (policy.actor[-1].bias.grad != 0).tolist() == [True, False, True, False]


def test_masked_actions_are_never_chosen(masks, tmp_path, monkeypatch):
    """Not in Taxi's rollouts, its evaluation or where a policy prefers them."""
    spy = Spy(masks, monkeypatch)
    args = masks.Args(total_timesteps=1000, num_steps=32, eval_episodes=3)
    masks.train(args, tmp_path / "run")
    masks.evaluate(args, tmp_path / "run")
    assert len(spy.steps) > 400
    for obs, actions, *_ in spy.steps:
        assert obs.shape[1] == 500 + 6
        assert obs[np.arange(len(obs)), 500 + actions].all()
    policy = masks.Policy(5, 4)
    with torch.no_grad():
        policy.actor[-1].bias += torch.tensor([50.0, 0.0, 0.0, 50.0])
    obs = np.tile(np.array([0, 0, 1, 1, 0], np.float32), (500, 1))
    assert set(policy.act(obs)) == {1, 2}
    assert set(policy.act(obs, greedy=True)) <= {1, 2}


@pytest.mark.parametrize("env_id", ["Doors-v0", "DictDoors-v0"])
def test_masks_in_info_and_in_observations(masks, tmp_path, env_id):
    """Played actions are allowed, or the environment would fail, and from the mask the best one is learned."""
    args = masks.Args(env_id=env_id, total_timesteps=1500, num_envs=4, num_steps=32, learning_rate=5e-3)
    masks.train(args, tmp_path / "run")
    assert masks.evaluate(args, tmp_path / "run")["eval_return_greedy"] == 1.0


def test_without_masks_the_run_ends(masks, tmp_path, monkeypatch):
    said = mistake(masks, monkeypatch, "--env-id", "Acrobot-v1", "--run-dir", tmp_path / "run")
    assert "Acrobot-v1" in said
    assert "action_mask" in said
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- multidiscrete


class Code(gym.Env):
    """One-step episodes: the observation is a code of two numbers, the action has to repeat it. 3 and 2 choices that
    start at 1 and -1, as a matrix of one column."""

    observation_space = Box(0, 2, (2,), np.float32)
    action_space = MultiDiscrete([[3], [2]], start=[[1], [-1]])

    def reset(self, *, seed=None, options=None):
        """A new code."""
        super().reset(seed=seed)
        self.code = self.np_random.integers([3, 2])
        return self.code.astype(np.float32), {}

    def step(self, action):
        """Half a reward for each component."""
        assert self.action_space.contains(action)
        return self.code.astype(np.float32), np.mean(action[:, 0] - [1, -1] == self.code), True, False, {}


gym.register("Code-v0", Code)


@pytest.fixture
def multidiscrete(tmp_path):
    return patched("ppo_mlp_discrete__multidiscrete", tmp_path)


def test_log_probs_and_entropies_are_sums_over_components(multidiscrete):
    """The joint distribution over all six pairs of choices, by hand, is the product of the components'."""
    torch.manual_seed(0)
    policy = multidiscrete.Policy(4, [3, 2]).double()
    torch.nn.init.normal_(policy.actor[-1].bias)
    obs = torch.randn(2, 5, 4).double()
    logits = policy.actor(obs)
    first, second = logits[..., :3].exp(), logits[..., 3:].exp()
    chances = first[..., :, None] / first.sum(-1)[..., None, None] * (second / second.sum(-1)[..., None])[..., None, :]
    for i, j in np.ndindex(3, 2):
        log_probs, entropies = policy.evaluate_actions(obs, torch.tensor([i, j]).expand(2, 5, 2))
        torch.testing.assert_close(log_probs.exp(), chances[..., i, j])
        torch.testing.assert_close(entropies, -(chances * chances.log()).sum((-2, -1)))
    greedy = policy.act(obs.numpy(), greedy=True)
    assert (greedy[..., 0] * 2 + greedy[..., 1] == chances.flatten(-2).argmax(-1).numpy()).all()


def test_components_are_sampled_independently(multidiscrete):
    torch.manual_seed(0)
    policy = multidiscrete.Policy(1, [3, 2])
    torch.nn.init.normal_(policy.actor[-1].bias, std=0.5)
    log_probs = policy.actor(torch.zeros(1)).split([3, 2])
    chances = log_probs[0].softmax(-1)[:, None] * log_probs[1].softmax(-1)
    actions = policy.act(np.zeros((20_000, 1), np.float32))
    counts = np.bincount(actions[:, 0] * 2 + actions[:, 1], minlength=6)
    assert chisquare(counts, chances.flatten().double().detach().numpy() * len(actions), sum_check=False).pvalue > 1e-3


def test_each_component_is_learned(multidiscrete, tmp_path):
    """In an action space whose components start at other numbers than 0 and stand in a matrix."""
    args = multidiscrete.Args(env_id="Code-v0", total_timesteps=3000, num_envs=4, num_steps=32, learning_rate=5e-3)
    multidiscrete.train(args, tmp_path / "run")
    assert multidiscrete.evaluate(args, tmp_path / "run")["eval_return_greedy"] == 1.0


# ----------------------------------------------------------------------------------------------------------------- fast


@pytest.fixture
def fast(tmp_path):
    return patched("ppo_mlp_discrete__fast", tmp_path)


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
@pytest.mark.parametrize("switched_on", [True, False])
def test_numpy_gradient_is_that_of_the_plain_loss(fast, objective, switched_on):
    """Gradient and figures equal the plain script's, where ratios and values lie on both sides of their clips."""
    torch.manual_seed(1)
    args = fast.Args(objective=objective, ent_coef=0.03, clip_vloss=switched_on, norm_adv=switched_on)
    policy, critic = fast.Policy(3, 4).double(), fast.mlp(3, 1, 1.0).double()
    torch.nn.init.normal_(policy.actor[-1].weight, std=0.2)
    obs, actions, vectors = torch.randn(50, 3).double(), torch.randint(0, 4, (50,)), torch.randn(3, 50).double()
    log_probs = policy.evaluate_actions(obs, actions)[0].detach() + 0.3 * torch.randn(50)
    old_values = critic(obs).squeeze(-1).detach() + 0.3 * vectors[0]
    batch = plain.Batch(obs, actions, log_probs, old_values, *vectors[1:])
    loss, figures = plain.ppo_loss(policy, critic, batch, 0.7, args)
    parameters = [*policy.parameters(), *critic.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    ours = fast.ppo_gradient(fast.NumpyMLP(policy.actor), fast.NumpyMLP(critic), batch, 0.7, args)
    for parameter, gradient in zip(parameters, gradients):
        torch.testing.assert_close(parameter.grad, gradient)
    assert 0.2 < ours["clipfrac"] < 0.8
    assert {name: pytest.approx(figure.item(), abs=1e-6) for name, figure in figures.items()} == ours


def test_fast_acts_as_the_plain_policy_with_the_same_noise(fast, tmp_path, monkeypatch):
    """Each action of two rollouts is the likeliest one under PyTorch's logits and the noise that was drawn."""
    spy, noises = Spy(fast, monkeypatch), []
    exponential = torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: (noises.append(exponential(x).clone()), noises[-1])[1])
    policies = []
    init = fast.NumpyMLP.__init__
    monkeypatch.setattr(
        fast.NumpyMLP, "__init__", lambda self, network: (policies.append(network), init(self, network))[1]
    )
    rollout = []
    compute_gae = fast.compute_gae
    monkeypatch.setattr(
        fast, "compute_gae", lambda *a: (rollout.append(copy.deepcopy(policies[0])), compute_gae(*a))[1]
    )
    fast.train(fast.Args(total_timesteps=600, num_envs=4, num_steps=64), tmp_path / "run")
    assert len(rollout) == len(noises) == 3
    for i, (actor, noise) in enumerate(zip(rollout, noises)):
        obs, actions, *_ = spy.rollout(i, 64)
        scores = actor(torch.tensor(obs[:-1])).detach() - noise.log()
        gap = scores.topk(2).values.diff().abs().squeeze(-1).numpy()
        assert ((scores.argmax(-1).numpy() == actions) | (gap < 1e-5)).all()


def test_fast_learns_what_the_plain_script_learns(fast, tmp_path, monkeypatch):
    """From the same noise, minibatches and environments: the same metrics to rounding, after two updates."""
    gumbel = np.random.default_rng(0).gumbel(size=(2, 64, 4, 2)).astype(np.float32)
    steps, rollouts = iter(gumbel.reshape(128, 4, 2)), iter(gumbel)
    flags = {"total_timesteps": 300, "num_envs": 4, "num_steps": 64, "update_epochs": 2, "ent_coef": 0.01}

    def act(policy, obs):
        return (policy.actor(torch.from_numpy(obs)).detach().numpy() + next(steps)).argmax(-1)

    with monkeypatch.context() as patch:
        patch.setattr(plain.Policy, "act", act)
        patch.setattr(torch.Tensor, "exponential_", lambda x: torch.from_numpy(np.exp(-next(rollouts))))
        for name, script in (("plain", plain), ("fast", fast)):
            script.train(script.Args(**flags), tmp_path / name)
    rows = [read_metrics(tmp_path / name) for name in ("plain", "fast")]
    assert len(rows[0]) == len(rows[1]) == 2
    for ours, theirs in zip(*rows):
        for name in ours:
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("change", ["network", "loss"])
def test_fast_refuses_what_numpy_does_not_know(fast, tmp_path, monkeypatch, change):
    if change == "network":
        monkeypatch.setattr(torch.nn, "Tanh", torch.nn.ReLU)
    else:
        loss = fast.ppo_loss
        monkeypatch.setattr(fast, "ppo_loss", lambda p, c, b, *a: (loss(p, c, b, *a)[0] + p.actor(b.obs).mean(), {}))
    with pytest.raises(fast.UserError, match="ppo_gradient and NumpyMLP"):
        fast.train(fast.Args(total_timesteps=100), tmp_path / "run")
