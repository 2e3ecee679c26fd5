"""Proofs of the recipes for ppo_mlp_discrete.py, each on a small case."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from helpers import Spy, mistake, patched

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
