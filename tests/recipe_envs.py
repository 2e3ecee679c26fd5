"""Tiny environments for the recipes. Ids: `recipe_envs:<Name>-v0`."""

import contextlib

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.wrappers import DiscretizeAction


class Doors(gym.Env):
    """One-step episodes: some of four actions, which start at 5, are allowed, and the last of these is the best."""

    action_space = Discrete(4, start=5)
    observation_space = Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """An observation that tells nothing."""
        super().reset(seed=seed)
        self.mask = self.np_random.permutation([1, 1, 0, 0]).astype(np.int8)
        return self.show()

    def step(self, action):
        """Ends the episode, after which no action is allowed."""
        assert self.mask[action - 5], "this action is masked"
        reward = float(action - 5 == self.mask.nonzero()[0][-1])
        self.mask = np.zeros(4, np.int8)
        obs, info = self.show()
        return obs, reward, True, False, info

    def show(self):
        """Observation and info, of which the second has the mask."""
        return np.zeros(1, np.float32), {"action_mask": self.mask}


class DictDoors(Doors):
    """The same, with a Dict in which the mask comes before the observation."""

    observation_space = Dict(action_mask=Box(0, 1, (4,), np.int8), observation=Box(0, 1, (1,), np.float32))

    def show(self):
        """The mask is in the observation."""
        return {"observation": np.zeros(1, np.float32), "action_mask": self.mask}, {}


class Code(gym.Env):
    """One-step episodes: the observation is a code of two numbers, the action has to repeat it, with 3 and 2 choices
    that start at 1 and -1 and stand in a matrix of one column."""

    observation_space = Box(0, 2, (2,), np.float32)
    action_space = MultiDiscrete([[3], [2]], start=[[1], [-1]])

    def reset(self, *, seed=None, options=None):
        """A new code."""
        super().reset(seed=seed)
        self.code = self.np_random.integers([3, 2])
        return self.code.astype(np.float32), {}

    def step(self, action):
        """Half a reward for each component."""
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.code.astype(np.float32), np.mean(action[:, 0] - [1, -1] == self.code), True, False, {}


class Spot(gym.Env):
    """Two-step episodes: the action has to tell whether the bright spot of an image is in its left or right half."""

    observation_space = Box(0, 255, (12, 14, 3), np.uint8)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        """The first image."""
        super().reset(seed=seed)
        self.steps = 0
        return self.image(), {}

    def step(self, action):
        """A reward for the right half, and the next image."""
        reward = float(action == (self.column >= 7))
        self.steps += 1
        return self.image(), reward, self.steps == 2, False, {}

    def image(self):
        """Noise, and a spot."""
        image = self.np_random.integers(0, 20, (12, 14, 3), np.uint8)
        row, self.column = self.np_random.integers([12, 14])
        image[row, self.column] = 255
        return image


class Echo(gym.Env):
    """Episodes of 3 to 6 steps that show a sign in the first and nothing after it; each action has to tell the sign. Of
    a history that is lost, or carried over from the episode before, rewards would tell."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        """A sign."""
        super().reset(seed=seed)
        self.sign, self.left = self.np_random.choice([-1, 1]), self.np_random.integers(3, 7)
        return np.array([self.sign], np.float32), {}

    def step(self, action):
        """Nothing more is shown; every second length ends by truncation."""
        self.left -= 1
        over, obs = self.left == 0, np.zeros(1, np.float32)
        return obs, float(action == (self.sign > 0)), over and self.sign > 0, over and self.sign < 0, {}


for env in (Doors, DictDoors, Code, Spot, Echo):
    gym.register(f"{env.__name__}-v0", env)
gym.register("Torques-v0", lambda: DiscretizeAction(gym.make("Reacher-v5"), 5, multidiscrete=True))
with contextlib.suppress(ModuleNotFoundError):  # which the suite of the recipes needs, but no test
    import minatar.gym

    minatar.gym.register_envs()
