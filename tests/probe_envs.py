"""Tiny environments with known answers, each made to expose one class of bug. Ids: `probe_envs:<Name>-v0`."""

import copy

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Tuple


class Probe(gym.Env):
    """One-step episodes of a random scene with reward(scene, action); subclasses change what they are about."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def scene(self):
        """The observation of a new episode."""
        return np.zeros(1, np.float32)

    def reward(self, scene, action):
        """The reward of the only step."""
        return 1.0

    def reset(self, *, seed=None, options=None):
        """Starts an episode."""
        super().reset(seed=seed)
        self.now = self.scene()
        return self.now, {}

    def step(self, action):
        """Ends it."""
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return copy.deepcopy(self.now), self.reward(self.now, action), True, False, {}


class Constant(Probe):
    """Reward 1 whatever happens: V = 1. Catches a broken value loss or optimiser."""


class Coloured(Probe):
    """Reward equals the observation, -1 or 1. Catches a critic that does not see it."""

    def scene(self):
        """-1 or 1."""
        return np.array([self.np_random.choice([-1, 1])], np.float32)

    def reward(self, scene, action):
        """The scene."""
        return float(scene[0])


class Delayed(Probe):
    """Two steps, reward 1 at the second: V(0) = gamma, V(1) = 1. Catches broken discounting."""

    def step(self, action):
        """0 -> 1 -> end."""
        last = bool(self.now[0])
        self.now = np.ones(1, np.float32)
        return self.now, float(last), last, False, {}


class Bandit(Probe):
    """Reward 1 for the last action, of four that start at 5. Catches a wrong sign or a shifted action."""

    action_space = Discrete(4, start=5)

    def reward(self, scene, action):
        """1 for action 8."""
        return float(action == 8)


class Mirror(Coloured):
    """Reward 1 where the action tells the sign of the observation. Catches observations and actions out of step."""

    def reward(self, scene, action):
        """1 for a match."""
        return float(action == (scene[0] > 0))


class Memory(Coloured):
    """Two steps: the first shows -1 or 1, the second nothing, and there the action must tell what it was. Catches a
    history that is lost on its way to the policy."""

    def step(self, action):
        """Sign -> nothing -> end."""
        last = not self.now[0]
        reward = float(last and action == (self.seen > 0))
        self.seen, self.now = self.now[0], np.zeros(1, np.float32)
        return self.now.copy(), reward, last, False, {}


class Locks(Probe):
    """A lock that opens by what a Dict shows: reward 1 for the level, or for 9 where all is black. Catches observations
    whose parts are mixed up."""

    observation_space = Dict(level=Discrete(3, start=4), colour=Box(0, 255, (2, 2), np.uint8))
    action_space = Discrete(4, start=6)

    def scene(self):
        """A level, and black or not."""
        level = 4 + int(self.np_random.integers(3))
        return {"level": level, "colour": np.full((2, 2), self.np_random.choice([0, 3]), np.uint8)}

    def reward(self, scene, action):
        """1 for the right one of 6, 7, 8 and 9."""
        return float(action == (scene["level"] + 2 if scene["colour"][0, 0] else 9))


class Grid(Locks):
    """The same kind of task with a Tuple observation."""

    observation_space = Tuple((MultiBinary(2), Box(0, 1, (3,), np.float64)))

    def scene(self):
        """Two bits and noise."""
        return self.np_random.integers(2, size=2, dtype=np.int8), self.np_random.random(3)

    def reward(self, scene, action):
        """1 for the number that the bits make."""
        return float(action == 6 + 2 * scene[0][0] + scene[0][1])


class Many(Probe):
    """Actions of several components."""

    action_space = MultiDiscrete([3, 2])


class Numbered(Probe):
    """Episodes of 3 to 6 steps that end alternately by termination and by truncation. The observation is the number of
    the step, negative in the last of an episode: where it is negative, the step that follows is the reset."""

    observation_space = Box(-1e6, 1e6, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """The first observation of an episode is 1."""
        super().reset(seed=seed)
        self.length, self.steps = int(self.np_random.integers(3, 7)), 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        """Counts."""
        self.steps += 1
        over = self.steps == self.length
        now = np.array([-self.steps if over else self.steps + 1], np.float32)
        return now, 1.0, over and self.length % 2 == 0, over and self.length % 2 == 1, {}


class Endless(Probe):
    """Reward 1 for ever, cut every 5 steps by the time limit alone: V = 1 / (1 - gamma). Catches a truncation that is
    treated as a termination."""

    def step(self, action):
        """Nothing changes."""
        return self.now.copy(), 1.0, False, False, {}


class Forever(Endless):
    """The same without a time limit."""


class BrokenLaterDiscrete(Endless):
    """The reward becomes NaN after 150 steps in one environment."""

    lived = 0

    def step(self, action):
        """Counts its steps over all episodes."""
        self.lived += 1
        return self.now.copy(), float("nan") if self.lived > 150 else 1.0, False, False, {}


class Shapeless(Probe):
    """An observation space without a flat size."""

    observation_space = Graph(Box(-1, 1, (2,)), None)


class Dial(Probe):
    """One number, best at 5.5, where 3 to 7 are allowed. Catches bounds that are taken for -1 and 1."""

    action_space = Box(3, 7, (1,), np.float32)

    def reward(self, scene, action):
        """0 at the best action."""
        return -float(np.mean((action - self.best(scene)) ** 2))

    def best(self, scene):
        """The best action."""
        return 5.5


class Edge(Dial):
    """The more the better, up to the bound at 2. Catches actions that leave the bounds, and a lost clip."""

    action_space = Box(-6, 2, (1,), np.float64)

    def reward(self, scene, action):
        """The action."""
        return float(action[0])


class Far(Dial):
    """Observations far from 0 that differ little; the best action is a table with a sign in each cell. Bounds differ by
    cell and lie on one side of 0. Catches lost normalisation, and mixed-up cells."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(np.array([[0, 10], [-8, 100]]), np.array([[1, 14], [-4, 300]]), dtype=np.float64)

    def scene(self):
        """Two signs in the noise of large numbers."""
        return np.array([500, -200]) + 3.0 * self.np_random.choice([-1, 1], 2)

    def best(self, scene):
        """A quarter of the range away from the middle, to the side that the signs tell."""
        low, high = self.action_space.low, self.action_space.high
        first, second = np.sign(scene - [500, -200])
        return (low + high) / 2 + (high - low) / 4 * np.array([[first, second], [-first, 1]])

    def reward(self, scene, action):
        """0 at the best action, in units of the ranges."""
        low, high = self.action_space.low, self.action_space.high
        return -float(np.mean(((action - self.best(scene)) / (high - low) * 4) ** 2))


class Open(Dial):
    """No bounds on the first and second action; above 5 on the third, which is best at 6."""

    action_space = Box(np.array([-np.inf, -3e38, 5], np.float32), np.array([np.inf, 3e38, np.inf], np.float32))

    def best(self, scene):
        """One for each."""
        return np.array([1.5, -0.5, 6])


class Whole(Dial):
    """Whole numbers from 0 to 9, best at 7."""

    action_space = Box(0, 9, (1,), np.int32)

    def best(self, scene):
        """One of the bounds' integers."""
        return 7


class NumberedBox(Numbered):
    """Numbered with Box actions: nothing to learn, but rewards with a spread."""

    action_space = Box(-1, 1, (2,))

    def step(self, action):
        """The reward is the number of the step."""
        now, _, *rest = super().step(action)
        return now, float(self.steps), *rest


class EndlessBox(Endless):
    """Endless with Box actions."""

    action_space = Box(-1, 1, (1,))


class BlindLaterDiscrete(Endless):
    """The observation becomes NaN after 150 steps in one environment."""

    lived = 0

    def step(self, action):
        """Counts its steps over all episodes."""
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.lived += 1
        return np.full(1, np.nan if self.lived > 150 else 0, np.float32), 1.0, False, False, {}


class BlindLater(BlindLaterDiscrete):
    """The same with Box actions."""

    action_space = Box(-1, 1, (1,))


class BrokenLaterBox(BrokenLaterDiscrete):
    """The same with Box actions."""

    action_space = Box(-1, 1, (1,))


def same_step(num_envs, **kwargs):
    """A vector environment that resets in the step in which an episode ends."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([Constant] * num_envs, autoreset_mode=mode)


LIMITS = dict.fromkeys((Endless, EndlessBox, BrokenLaterDiscrete, BrokenLaterBox, BlindLaterDiscrete, BlindLater), 5)
for probe in [thing for thing in globals().values() if isinstance(thing, type) and issubclass(thing, Probe)]:
    gym.register(f"{probe.__name__}-v0", entry_point=probe, max_episode_steps=LIMITS.get(probe))
gym.register("SameStep-v0", entry_point=Constant, vector_entry_point=same_step)


def positions(**options):
    """CartPole without its velocities, which two observations tell."""
    env = gym.make("CartPole-v1", **options).unwrapped
    space = Box(env.observation_space.low[::2], env.observation_space.high[::2])
    return gym.wrappers.TransformObservation(env, lambda obs: obs[::2], space)


gym.register("Positions-v0", entry_point=positions, max_episode_steps=500)
