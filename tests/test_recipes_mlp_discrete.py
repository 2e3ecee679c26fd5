"""Proofs of the recipes for ppo_mlp_discrete.py, each on a small case."""

import copy

import numpy as np
import pytest
import torch
from helpers import Spy, mistake, patched, read_metrics
from scipy.stats import chisquare

import ppo_mlp_discrete as plain

# --------------------------------------------------------------------------------------------------------- action_masks


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


@pytest.mark.parametrize("doors", ["Doors", "DictDoors"])
def test_masks_in_info_and_in_observations(masks, tmp_path, doors):
    """Played actions are allowed, or the environment would fail, and from the mask the best one is learned."""
    args = masks.Args(
        env_id=f"recipe_envs:{doors}-v0", total_timesteps=1500, num_envs=4, num_steps=32, learning_rate=5e-3
    )
    masks.train(args, tmp_path / "run")
    assert masks.evaluate(args, tmp_path / "run")["eval_return_greedy"] == 1.0


def test_without_masks_the_run_ends(masks, tmp_path, monkeypatch):
    said = mistake(masks, monkeypatch, "--env-id", "Acrobot-v1", "--run-dir", tmp_path / "run")
    assert "Acrobot-v1" in said
    assert "action_mask" in said
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- multidiscrete


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
    args = multidiscrete.Args(
        env_id="recipe_envs:Code-v0", total_timesteps=3000, num_envs=4, num_steps=32, learning_rate=5e-3
    )
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


# --------------------------------------------------------------------------------------------------------------- pixels


@pytest.fixture
def pixels(tmp_path):
    return patched("ppo_mlp_discrete__pixels", tmp_path)


@pytest.mark.parametrize("shape", [(10, 10, 4), (12, 14, 3), (4, 84, 84), (210, 160, 3)])
def test_a_network_for_images_of_any_size(pixels, shape):
    """MinAtar's, our own, frames of an Atari game as usual and as they are. Each pixel has a part in the outputs."""
    network = pixels.CNN(shape, 255, 6, output_gain=1.0)
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    outputs = network(images)
    assert outputs.shape == (2, 3, 6)
    torch.testing.assert_close(network(images[1, 2]), outputs[1, 2], rtol=1e-3, atol=1e-5)
    pixel = images.float().requires_grad_()
    (gradient,) = torch.autograd.grad(network(pixel).square().sum(), pixel)
    assert (gradient != 0).float().mean() > 0.5  # of the rest, the units are at 0
    assert sum(parameter.numel() for parameter in network.parameters()) < 300_000


def test_pixels_are_scaled_to_1(pixels):
    """Bytes and bools that show the same give the same."""
    torch.manual_seed(0)
    first = pixels.CNN((10, 10, 4), 255, 3, 1.0)
    torch.manual_seed(0)
    second = pixels.CNN((10, 10, 4), 1, 3, 1.0)
    image = torch.rand(5, 10, 10, 4) < 0.2
    torch.testing.assert_close(first(255 * image.to(torch.uint8)), second(image))


def test_images_are_kept_as_bytes(pixels, tmp_path, monkeypatch):
    spy, batches, minibatches = Spy(pixels, monkeypatch), [], pixels.minibatches
    monkeypatch.setattr(pixels, "minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1])
    pixels.train(pixels.Args(env_id="recipe_envs:Spot-v0", num_envs=2, num_steps=8, total_timesteps=10), tmp_path / "a")
    obs, *_, rows = spy.rollout(0, 8)
    assert batches[0].obs.dtype == torch.uint8
    assert (batches[0].obs.numpy() == obs[:-1][rows]).all()
    assert obs.max() == 255


def test_the_bright_half_is_learned(pixels, tmp_path):
    flags = {"total_timesteps": 4000, "num_envs": 8, "num_steps": 32, "update_epochs": 4, "learning_rate": 2e-3}
    args = pixels.Args(env_id="recipe_envs:Spot-v0", **flags)
    pixels.train(args, tmp_path / "run")
    assert pixels.evaluate(args, tmp_path / "run")["eval_return_greedy"] > 1.8


@pytest.mark.parametrize(
    ("package", "env_id", "mode", "shape"),
    [
        ("minatar.gym", "MinAtar/Breakout-v1", None, (10, 10, 4)),
        ("ale_py", "ale_py:ALE/Pong-v5", "sync", (210, 160, 3)),
        ("ale_py", "ale_py:ALE/Pong-v5", None, (4, 84, 84)),
    ],
)
def test_images_of_minatar_and_ale(pixels, tmp_path, package, env_id, mode, shape):
    """Screens as they are, and the stacks of frames that ALE's own vector environments make."""
    module = pytest.importorskip(package)
    if package == "minatar.gym":
        module.register_envs()
    flags = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 8}
    args = pixels.Args(env_id=env_id, vectorization_mode=mode, **flags)
    assert pixels.train(args, tmp_path / "run")["global_step"] == 8
    assert pixels.load(tmp_path / "run/policy.pt")["spec"][0] == shape
    assert 0 <= pixels.load_policy(tmp_path / "run").act(np.zeros(shape, np.uint8), greedy=True) < 6


def test_what_shows_no_images_ends_with_a_line(pixels, tmp_path, monkeypatch):
    for env_id in ("CartPole-v1", "recipe_envs:Code-v0", "FrozenLake-v1", "recipe_envs:DictDoors-v0"):
        assert env_id in mistake(pixels, monkeypatch, "--env-id", env_id, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ recurrent


@pytest.fixture
def recurrent(tmp_path):
    return patched("ppo_mlp_discrete__recurrent", tmp_path)


def test_the_hidden_state_is_reset_exactly_at_episode_starts(recurrent, tmp_path, monkeypatch):
    """Over three rollouts, log-probs and values are those of a GRU cell that is stepped by hand through each episode,
    from zeros where it starts, and from the state of the rollout before where it does not."""
    spy, batches, minibatches = Spy(recurrent, monkeypatch), [], recurrent.minibatches
    monkeypatch.setattr(
        recurrent, "minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1]
    )
    flags = {"num_envs": 3, "num_steps": 10, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 60}
    recurrent.train(recurrent.Args(env_id="recipe_envs:Echo-v0", **flags), tmp_path / "run")
    assert len(batches) == 3
    hidden, is_first = torch.zeros(3, 64), np.ones(3, bool)
    for i, batch in enumerate(batches):
        policy, critic, _ = spy.calls[2 * i]
        cell = torch.nn.GRUCell(1, 64)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in policy.memory.state_dict().items()})
        obs, actions, *_, rows = spy.rollout(i, 10)
        expected = {n: [] for n in range(3)}
        for t, n in np.ndindex(10, 3):
            if is_first[n]:
                hidden[n] = 0
                assert obs[t, n, 0] in (-1, 1)
            starts, before = bool(is_first[n] or t == 0), hidden[n].clone()
            hidden[n] = cell(torch.tensor(obs[t, n]), before).detach()
            is_first[n] = not rows[t, n]  # a step that only resets leads to a first observation
            if rows[t, n]:
                log_prob = policy.actor(hidden[n]).log_softmax(-1)[actions[t, n]].item()
                expected[n].append((starts, log_prob, critic(hidden[n]).item(), before if starts else None))
        for (starts, log_prob, value, before), *ours in zip(
            [row for rows_of_env in expected.values() for row in rows_of_env],
            batch.starts,
            batch.log_probs,
            batch.values,
            batch.hidden,
        ):
            assert ours[0].item() == starts
            assert [ours[1].item(), ours[2].item()] == pytest.approx([log_prob, value], abs=1e-5)
            if starts:
                torch.testing.assert_close(ours[3], before, rtol=1e-4, atol=1e-5)
        assert len(batch.starts) == rows.sum()


def test_the_ratio_is_one_before_the_first_step(recurrent, tmp_path, monkeypatch):
    """Sequences run at once say what the policy said step by step."""
    spy = Spy(recurrent, monkeypatch)
    recurrent.train(recurrent.Args(total_timesteps=900, num_minibatches=1, update_epochs=1), tmp_path / "run")
    for policy, _, batch in spy.calls:
        log_probs, _ = policy.evaluate_actions(policy.remember(batch), batch.actions)
        torch.testing.assert_close(log_probs, batch.log_probs, rtol=1e-4, atol=1e-5)


def test_every_sequence_once_per_pass_and_whole(recurrent):
    starts = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    column = torch.arange(10)
    batch = recurrent.Batch(*[starts if name == "starts" else column for name in recurrent.Batch._fields])
    parts = list(recurrent.minibatches(batch, recurrent.Args(num_minibatches=3, update_epochs=8)))
    wholes = [{0, 1, 2}, {3}, {4, 5}, {6, 7, 8, 9}]
    for first in range(0, len(parts), 2):  # of four sequences, three minibatches are two of two
        rows = [part.actions.tolist() for part in parts[first : first + 2]]
        assert sorted(rows[0] + rows[1]) == column.tolist()
        for part in rows:
            assert part == sorted(part)
            assert all(whole <= set(part) or not whole & set(part) for whole in wholes)
    assert len({tuple(part.actions.tolist()) for part in parts}) > 4


def test_what_was_seen_is_remembered(recurrent, tmp_path):
    """Without a memory, a return of 2.75 is the most that Echo gives on average; 4.5 is all."""
    flags = {"total_timesteps": 4000, "num_steps": 32, "update_epochs": 4, "learning_rate": 3e-3, "gamma": 0.5}
    args = recurrent.Args(env_id="recipe_envs:Echo-v0", eval_episodes=50, **flags)
    recurrent.train(args, tmp_path / "run")
    assert recurrent.evaluate(args, tmp_path / "run")["eval_return_greedy"] > 4
