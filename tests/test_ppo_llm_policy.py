"""Tests of ppo_llm_policy.py: the policy and its networks beside the document's construct and an independent formula,
the window of observations, the saved folder, probe environments, and real runs that are killed, resumed and spread.
What this script has in common with its siblings word for word (test_family.py keeps it so) is tested there: GAE,
clipped and value loss, minibatches, episode statistics, the files of a run."""

import copy
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import peft
import probe_envs  # noqa: F401 (registers the probes)
import pytest
import ranks_llm
import torch
import transformers
from helpers import (
    ROOT,
    flags,
    load_checkpoint,
    read_metrics,
    resume_as_printed,
    run_main,
    run_two_ranks,
    same_weights,
    start,
    wait_for_rows,
)
from safetensors.torch import load_file, save_file
from scipy import stats

import ppo_llm_policy as ppo
from ppo_llm_policy import Args, Batch

SMALL = {"num_envs": 4, "num_steps": 16, "eval_episodes": 0, "update_epochs": 2, "num_minibatches": 2}
SMALL |= {"torch_threads": 1}
DTYPES = {"auto": torch.float32, "bfloat16": torch.bfloat16}
DISCRETE = {"n": 3, "start": 0, "action_shape": [], "dtype": "int64"}
BOX = {"low": [-2.0, 0.0], "high": [2.0, 1.0], "action_shape": [2], "dtype": "float32"}
QWEN2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN2 |= {"num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.3}
ARCHITECTURES = {
    "qwen2": transformers.Qwen2Config(**QWEN2),
    "llama": transformers.LlamaConfig(**QWEN2),
    "gpt2": transformers.GPT2Config(
        vocab_size=40, n_positions=12, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
}
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of small causal LMs, as a user would have them. GPT-2's configuration has dropout."""
    made = {}
    for kind, config in ARCHITECTURES.items():
        torch.manual_seed(0)
        made[kind] = str(tmp_path_factory.mktemp(kind))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
    return made


def spec_of(history, actions=DISCRETE, obs_dim=4):
    return {"env_id": "x", "obs_dim": obs_dim, "observe": list(range(obs_dim)), "history": history} | actions


def make_policy(history=1, actions=DISCRETE, seed=0, **args):
    """A policy whose adapters are not zero, as after some training."""
    args = Args(history=history, **args)
    torch.manual_seed(seed)
    network = ppo.make_network(args, spec_of(history, actions), DTYPES[args.dtype])
    for name, parameter in network.named_parameters():
        if "lora_B" in name or name.startswith("head.2"):
            torch.nn.init.normal_(parameter, std=0.2)
    return ppo.StochasticPolicy(network).eval()


def random_batch(policy, rows=6, history=1, seed=0):
    """Windows of different lengths, with actions of another policy, so that ratios lie on both sides of the clip."""
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, history, 4, generator=rng)
    mask = torch.arange(history).flip(0) < 1 + torch.arange(rows)[:, None] % history
    if policy.network.is_discrete:
        actions = torch.randint(3, (rows,), generator=rng)
    else:
        actions = torch.randn(rows, 2, generator=rng)
    with torch.no_grad():
        log_probs, _ = policy.evaluate_actions(states * mask[..., None], actions, mask)
    vectors = torch.randn(4, rows, generator=rng)
    return Batch(states * mask[..., None], mask, actions, log_probs + 0.3 * vectors[0], *vectors[1:])


def train_probe(tmp_path, name, **changes):
    """The run directory of a short run of the MLP on a probe environment; enough to learn what it is about."""
    args = {"network": "mlp", "env_id": f"probe_envs:{name}-v0", "total_timesteps": 4000, "gamma": 0.9}
    args |= SMALL | {"num_envs": 16, "update_epochs": 8, "num_minibatches": 4, "learning_rate": 1e-2}
    ppo.train(Args(run_dir=str(tmp_path / name), **args | changes))
    return tmp_path / name


# ---------------------------------------------------------------------------------------------- policy and its networks


def documents_logits(folder, network, states):
    """The forward pass as document 000 writes it, on the weights of our network. states: (B, K, S)."""
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = set(network.body.peft_config["default"].target_modules)
    llm = peft.get_peft_model(llm, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.05))

    def place(name):  # of an adapter, from its layer's number on
        return re.search(r"\.(\d+\..*lora_.*)", name)[1]

    ours = {place(name): x for name, x in network.body.named_parameters() if "lora_" in name}
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = ours.pop(place(name)).data
    assert not ours
    llm.eval()
    outputs = llm(inputs_embeds=network.encoder(states), output_hidden_states=True)
    return network.head(outputs.hidden_states[-1][:, -1, :])


@every_architecture
@pytest.mark.parametrize("history", [1, 4])
def test_logits_equal_the_documents_construct(folders, kind, history):
    network = make_policy(history, llm_id=folders[kind]).network
    states = torch.randn(5, history, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = network.outputs(states, torch.ones(5, history, dtype=torch.bool))
        expected = documents_logits(folders[kind], network, states)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not hasattr(network.body, "lm_head")


def test_adapters_are_where_the_document_puts_them():
    """q, k, v, o, gate, up and down, rank 16, scale 32 / 16; other layers by flag."""
    network = make_policy().network
    config = network.body.peft_config["default"]
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {target.rsplit(".")[-1] for target in config.target_modules} == names
    assert len(config.target_modules) == 2 * len(names)  # in each of two layers
    assert (config.r, config.lora_alpha) == (16, 32)
    chosen = make_policy(lora_target_modules=["v_proj"], lora_rank=3).network
    adapted = [name for name, _ in chosen.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2
    assert all("v_proj" in name for name in adapted)
    assert all(p.shape[0] == 3 for name, p in chosen.named_parameters() if "lora_A" in name)
    assert [type(layer).__name__ for layer in network.encoder] == ["Linear", "ReLU", "Linear"]
    assert [layer.out_features for layer in (network.encoder[0], network.encoder[2])] == [256, 64]
    assert [layer.out_features for layer in (network.head[0], network.head[2])] == [128, 3]


@every_architecture
@pytest.mark.parametrize("rank", [16, 0])
def test_gradient_reaches_encoder_adapters_and_head_alone(folders, kind, rank):
    policy = make_policy(4, llm_id=folders[kind], lora_rank=rank)
    batch = random_batch(policy, history=4)
    policy.evaluate_actions(batch.states, batch.actions, batch.mask)[0].sum().backward()
    reached = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    wanted = re.compile(r"network\.(encoder|head)\.|.*\.lora_[AB]\.")
    assert reached == {name for name, _ in policy.named_parameters() if wanted.match(name)}
    assert reached == {name for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("history", [1, 4])
def test_queries_and_keys_learn_only_from_several_observations(history):
    policy = make_policy(history, llm_id="tiny-random")
    torch.manual_seed(1)
    policy.evaluate_actions(torch.randn(8, history, 4), torch.randint(3, (8,)))[0].sum().backward()
    largest = {}
    for name, p in policy.named_parameters():
        if "lora_" in name:
            layer = re.search(r"(\w)_proj", name)[1]
            largest[layer] = max(largest.get(layer, 0), p.grad.abs().max().item())
    assert largest["v"] > 1e-4  # not the point where nothing is learned
    for layer in "qk":
        assert largest[layer] < 1e-6 * largest["v"] if history == 1 else largest[layer] > 1e-3 * largest["v"]


@every_architecture
@pytest.mark.parametrize("network", ["llm", "mlp"])
def test_what_is_masked_is_not_seen(folders, kind, network):
    """A window with two observations behind two masked ones is a state of two observations, whatever stands there."""
    policy = make_policy(4, llm_id=folders[kind], network=network)
    torch.manual_seed(2)
    states, mask = torch.randn(3, 4, 4), torch.tensor([[False, False, True, True]] * 3)
    if network == "llm":
        with torch.no_grad():
            outputs = policy.network.outputs(states, mask)
            torch.testing.assert_close(outputs, policy.network.outputs(states[:, 2:], None), rtol=0, atol=1e-5)
            assert torch.equal(outputs, policy.network.outputs(states * mask[..., None], mask))
            assert not torch.allclose(outputs, policy.network.outputs(states, torch.ones_like(mask)), atol=1e-2)
    env_states, env_mask = np.full((3, 4, 4), 7.0, np.float32), np.ones((3, 4), bool)
    for t in (2, 3):  # the first of them begins an episode
        env_states, env_mask = ppo.remember(env_states, env_mask, states[:, t].numpy(), np.full(3, t == 2))
    assert np.array_equal(env_mask, mask)
    assert np.array_equal(env_states, states * mask[..., None])


def test_windows_are_the_last_observations_of_their_episode():
    """Against a list per environment, with random resets."""
    rng = np.random.default_rng(0)
    states, mask = np.zeros((3, 4, 2)), np.zeros((3, 4), bool)
    episodes = [[] for _ in range(3)]
    for t in range(60):
        obs, is_first = rng.normal(size=(3, 2)), np.full(3, True) if t == 0 else rng.random(3) < 0.2
        states, mask = ppo.remember(states, mask, obs, is_first)
        for n in range(3):
            episodes[n] = [*([] if is_first[n] else episodes[n]), obs[n]]
            last = episodes[n][-4:]
            assert mask[n].tolist() == [False] * (4 - len(last)) + [True] * len(last)
            np.testing.assert_array_equal(states[n], [np.zeros(2)] * (4 - len(last)) + last)


def test_histories_of_a_run_stop_at_episode_starts(tmp_path, monkeypatch):
    """The probe's observations count the steps of an episode from 1, so each window is known from its last number."""
    batches = []
    minibatches = ppo.shuffled_minibatches
    monkeypatch.setattr(
        ppo, "shuffled_minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1]
    )
    train_probe(tmp_path, "Numbered", history=4, total_timesteps=900, update_epochs=1, checkpoint_interval=2)
    states, mask = torch.cat([b.states for b in batches])[..., 0], torch.cat([b.mask for b in batches])
    assert set(states[:, -1].tolist()) == {1, 2, 3, 4, 5, 6}  # negative where the next row is the reset
    for window, present in zip(states.tolist(), mask.tolist()):
        newest = int(window[-1])
        expected = [0, 0, 0, *range(1, newest + 1)][-4:]
        assert window == expected
        assert present == [x > 0 for x in expected]


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("network", ["llm", "mlp"])
def test_policy_samples_and_scores_its_distribution(network, history):
    """Log-probs and entropies against SciPy, frequencies of samples against probabilities, and the greedy action."""
    policy = make_policy(history, network=network)
    batch = random_batch(policy, history=history)
    with torch.no_grad():
        logits = policy.network.outputs(batch.states, batch.mask)
        log_probs, entropies = policy.evaluate_actions(batch.states, batch.actions, batch.mask)
        greedy, scores = policy.get_action(batch.states, batch.mask, greedy=True)
        torch.manual_seed(0)
        many, _ = policy.get_action(batch.states[:1].expand(20_000, -1, -1), batch.mask[:1].expand(20_000, -1))
    probabilities = logits.softmax(-1).numpy()
    np.testing.assert_allclose(log_probs.exp(), probabilities[range(6), batch.actions], rtol=1e-5)
    np.testing.assert_allclose(entropies, stats.entropy(probabilities, axis=1), rtol=1e-5)
    assert greedy.tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(scores.exp(), probabilities.max(1), rtol=1e-5)
    counts = torch.bincount(many, minlength=3)
    assert stats.chisquare(counts, 20_000 * logits[0].double().softmax(-1).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("network", ["llm", "mlp"])
def test_gaussian_policy_samples_and_scores_its_distribution(network):
    policy = make_policy(actions=BOX, network=network)
    policy.network.log_std.data = torch.tensor([-0.7, 0.2])
    batch = random_batch(policy)
    with torch.no_grad():
        means = policy.network.outputs(batch.states, batch.mask)
        log_probs, entropies = policy.evaluate_actions(batch.states, batch.actions, batch.mask)
        greedy, _ = policy.get_action(batch.states, batch.mask, greedy=True)
        torch.manual_seed(0)
        many, scores = policy.get_action(batch.states[:1].expand(20_000, -1, -1))
    std = np.exp([-0.7, 0.2])
    expected = stats.norm.logpdf(batch.actions, means, std).sum(1)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropies, [stats.norm.entropy(0, std).sum()] * 6, rtol=1e-5)
    assert torch.equal(greedy, means)
    np.testing.assert_allclose(many.mean(0), means[0], atol=0.05)
    np.testing.assert_allclose(many.std(0), std, rtol=0.03)
    np.testing.assert_allclose(scores, stats.norm.logpdf(many, means[0], std).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", ["llm", "mlp"])
@pytest.mark.parametrize("actions", [DISCRETE, BOX], ids=["discrete", "box"])
def test_reinforce_trains_the_same_policy(network, actions):
    """The policy needs nothing of PPO: twenty lines of another algorithm teach it to answer the sign of its state."""
    torch.manual_seed(0)
    policy = ppo.StochasticPolicy(ppo.make_network(Args(network=network), spec_of(1, actions), torch.float32))
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=3e-3)

    def reward_of(states, chosen):
        sign = states[:, 0, 0].sign()
        if policy.network.is_discrete:
            return (chosen == 1 + sign).float()  # action 0 or 2
        return -(chosen - 0.5 * sign[:, None]).square().mean(-1)

    for _ in range(80):
        states = torch.randn(64, 1, 4)
        chosen, _ = policy.get_action(states)
        rewards = reward_of(states, chosen)
        log_probs, _ = policy.evaluate_actions(states, chosen)
        loss = -(log_probs * (rewards - rewards.mean()) / (rewards.std() + 1e-8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    states = torch.randn(500, 1, 4)
    reached = reward_of(states, policy.get_action(states, greedy=True)[0]).mean().item()
    assert reached > (0.9 if policy.network.is_discrete else -0.06)


def test_no_dropout_is_left(folders):
    """GPT-2's configuration has dropout 0.1 and LoRA's default is 0.05: in training mode, nothing is random."""
    policy = make_policy(3, llm_id=folders["gpt2"]).train()
    states = torch.randn(4, 3, 4)
    assert torch.equal(policy.network.outputs(states, None), policy.network.outputs(states, None))
    noisy = make_policy(3, llm_id=folders["gpt2"], lora_dropout_in_update=True)
    assert torch.equal(noisy.network.outputs(states, None), noisy.network.outputs(states, None))
    noisy.train()
    assert not torch.equal(noisy.network.outputs(states, None), noisy.network.outputs(states, None))


def test_checkpointing_and_bfloat16():
    """Activations computed again give the same gradient; a bfloat16 body has float32 log-probs near those of float32,
    and what is trained stays float32."""
    plain, again = make_policy(3).train(), make_policy(3, gradient_checkpointing=True).train()
    batch = random_batch(plain, history=3)
    for policy in (plain, again):
        policy.evaluate_actions(batch.states, batch.actions, batch.mask)[0].sum().backward()
    assert again.network.body.is_gradient_checkpointing
    for p, q in zip(plain.parameters(), again.parameters()):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
    half = make_policy(3, dtype="bfloat16")
    half.load_state_dict(plain.state_dict())
    dtypes = {p.dtype for p in half.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    log_probs, _ = half.evaluate_actions(batch.states, batch.actions, batch.mask)
    assert log_probs.dtype == torch.float32
    exact, _ = plain.evaluate_actions(batch.states, batch.actions, batch.mask)
    torch.testing.assert_close(log_probs, exact, rtol=0, atol=0.1)
    assert not torch.equal(log_probs, exact)


# --------------------------------------------------------------------------------------------------------------- update


def loss_by_hand(policy, critic, batch, args):
    """The mean loss, row by row, without any function of the script but the network."""
    loss = 0.0
    for b in range(len(batch.states)):
        outputs = policy.network.outputs(batch.states[b : b + 1], batch.mask[b : b + 1])[0]
        if policy.network.is_discrete:
            new = torch.distributions.Categorical(logits=outputs)
        else:
            covariance = torch.diag((2 * policy.network.log_std).exp())
            new = torch.distributions.MultivariateNormal(outputs, covariance)
        ratio = (new.log_prob(batch.actions[b]) - batch.old_log_probs[b]).exp()
        advantage, value = batch.advantages[b], critic(batch.states[b].reshape(1, -1))[0, 0]
        low, high = 1 - args.clip_coef, 1 + args.clip_coef
        error = (value - batch.returns[b]) ** 2
        if args.clip_vloss:
            near = batch.old_values[b] + (value - batch.old_values[b]).clamp(-args.clip_coef, args.clip_coef)
            error = max(error, (near - batch.returns[b]) ** 2)
        loss = loss - min(ratio * advantage, max(low, min(high, ratio)) * advantage)
        loss = loss + args.vf_coef * error / 2 - args.ent_coef * new.entropy()
    return loss / len(batch.states)


@pytest.mark.parametrize("actions", [DISCRETE, BOX], ids=["discrete", "box"])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_loss_and_gradient(actions, clip_vloss):
    """Both equal those of an independent formula, and the gradients of parts of a minibatch add up to the whole's."""
    args = Args(ent_coef=0.03, clip_vloss=clip_vloss)
    policy = make_policy(2, actions, llm_id="tiny-random")
    critic, batch = torch.nn.Linear(8, 1), random_batch(policy, history=2)
    parameters = [p for p in (*policy.parameters(), *critic.parameters()) if p.requires_grad]
    ours, parts = ppo.policy_ppo_loss(policy, critic, batch, 6, args)
    expected = loss_by_hand(policy, critic, batch, args)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (ours, expected)]
    for mine, independent in zip(*gradients):
        torch.testing.assert_close(mine, independent, rtol=1e-3, atol=1e-5)
    means = {name: part.mean() for name, part in parts.items()}
    total = means["policy_loss"] + args.vf_coef * means["value_loss"] - args.ent_coef * means["entropy"]
    torch.testing.assert_close(ours.detach(), total)
    pieces = ppo.split_rows(batch, 4)
    assert [len(piece.states) for piece in pieces] == [4, 2]
    summed = [torch.zeros_like(p) for p in parameters]
    for piece in pieces:
        loss, _ = ppo.policy_ppo_loss(policy, critic, piece, 6, args)
        for total, gradient in zip(summed, torch.autograd.grad(loss, parameters)):
            total += gradient
    for whole, gradient in zip(gradients[0], summed):
        torch.testing.assert_close(whole, gradient, rtol=1e-3, atol=1e-5)


def test_micro_batches_change_nothing_but_memory(tmp_path, monkeypatch):
    """A run whose minibatches go through the networks three rows at a time has the metrics and weights of the run that
    takes them whole, and never more than three rows at once."""
    rows = []
    loss = ppo.policy_ppo_loss
    monkeypatch.setattr(
        ppo, "policy_ppo_loss", lambda p, c, batch, *a: (rows.append(len(batch.states)), loss(p, c, batch, *a))[1]
    )
    args = SMALL | {"total_timesteps": 150, "norm_adv": True}
    for name, size in (("whole", None), ("parts", 3)):
        rows.clear()
        ppo.train(Args(run_dir=str(tmp_path / name), micro_batch_size=size, **args))
        assert max(rows) == (size or 32)
    for whole, parts in zip(*(read_metrics(tmp_path / name) for name in ("whole", "parts"))):
        figures = [[float(x) for x in row.values()] for row in (whole, parts)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5, nan_ok=True)
    whole, parts = (load_checkpoint(tmp_path / name)["parameters"] for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)


@pytest.mark.parametrize("history", [1, 3])
def test_ratio_is_one_before_the_first_step(tmp_path, monkeypatch, capsys, history):
    """In each iteration, with minibatches of other sizes than the scoring pass had; and the run says so."""
    seen = []
    loss = ppo.policy_ppo_loss

    def spy(*a):
        total, parts = loss(*a)
        seen.append(parts["log_ratio"])
        return total, parts

    monkeypatch.setattr(ppo, "policy_ppo_loss", spy)
    args = SMALL | {"history": history, "checkpoint_interval": 2, "learning_rate": 1e-2}
    ppo.train(Args(run_dir=str(tmp_path / "run"), total_timesteps=300, **args))
    steps_per_iteration = 4
    for first in seen[::steps_per_iteration]:
        assert first.abs().max() < 1e-5
    assert any(later.abs().max() > 1e-3 for later in seen)
    said = re.search(r"before the first step, \|ratio - 1\| <= (\S+)", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx((seen[0].exp() - 1).abs().max().item(), rel=0.06, abs=1e-9)


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path, monkeypatch, capsys):
    """A body that is random in the update where it was not in the rollout, which the check must find."""
    evaluate = ppo.StochasticPolicy.evaluate_actions

    def unsteady(self, *a):
        log_probs, entropy = evaluate(self, *a)
        return log_probs + 0.01 * self.training, entropy

    monkeypatch.setattr(ppo.StochasticPolicy, "evaluate_actions", unsteady)
    argv = ["--run-dir", tmp_path / "run", "--total-timesteps", 64, *flags(SMALL)]
    code, lines = run_main(ppo, monkeypatch, capsys, *argv)
    assert code == 1
    assert re.match(r"error: ratio - 1 before the first step is up to 1.0e-02.*checkpoint.pt", lines[-1])
    args = Args(run_dir=str(tmp_path / "b"), total_timesteps=64, lora_dropout_in_update=True, **SMALL)
    ppo.train(args)  # who asks for it gets it


def test_dropout_in_the_update_alone(tmp_path, monkeypatch):
    """The document's literal reading: adapters drop in the update, and neither in the rollout nor in scoring."""
    modes = {"get_action": set(), "score": set(), "update": set()}
    evaluate, get_action = ppo.StochasticPolicy.evaluate_actions, ppo.StochasticPolicy.get_action

    def spy_evaluate(self, *a):
        dropping = {module.training for module in self.modules() if isinstance(module, torch.nn.Dropout)}
        modes["update" if torch.is_grad_enabled() else "score"] |= dropping
        return evaluate(self, *a)

    def spy_act(self, *a):
        modes["get_action"] |= {module.training for module in self.modules() if isinstance(module, torch.nn.Dropout)}
        return get_action(self, *a)

    monkeypatch.setattr(ppo.StochasticPolicy, "evaluate_actions", spy_evaluate)
    monkeypatch.setattr(ppo.StochasticPolicy, "get_action", spy_act)
    ppo.train(Args(run_dir=str(tmp_path / "a"), total_timesteps=100, lora_dropout_in_update=True, **SMALL))
    assert modes == {"get_action": {False}, "score": {False}, "update": {True}}


def test_reset_rows_are_left_out(tmp_path, monkeypatch):
    batches = []
    minibatches = ppo.shuffled_minibatches
    monkeypatch.setattr(
        ppo, "shuffled_minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1]
    )
    run_dir = train_probe(tmp_path, "Numbered", total_timesteps=500, update_epochs=1)
    assert all((batch.states[:, -1] > 0).all() for batch in batches)  # negative in rows of resets
    assert int(read_metrics(run_dir)[-1]["global_step"]) == sum(len(batch.states) for batch in batches)


def test_kl_stop_comes_before_the_step(tmp_path, monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self))[1])
    run_dir = train_probe(tmp_path, "Mirror", total_timesteps=500, target_kl=1e-9, num_minibatches=1)
    assert len(steps) == len(read_metrics(run_dir))


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    norms, rates = [], []
    step = torch.optim.Adam.step

    def spy(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    rows = read_metrics(train_probe(tmp_path, "Coloured", total_timesteps=900, max_grad_norm=0.1, learning_rate=0.01))
    assert max(norms) == pytest.approx(0.1, rel=1e-4)
    steps_before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    expected = [0.01 * (1 - steps / 900) for steps in steps_before]
    assert rates[:: 8 * 4] == [(pytest.approx(rate), 1e-5) for rate in expected]


# ------------------------------------------------------------------------------------------------ probes and real tasks


def greedy_return(run_dir, episodes=20):
    return np.mean(ppo.evaluate_together(ppo.load_policy(run_dir), episodes, "greedy", seed=5))


def test_probe_reward_depends_on_observation_and_action(tmp_path):
    """The language model learns it too."""
    run_dir = train_probe(tmp_path, "Mirror", network="llm", total_timesteps=2500, learning_rate=5e-3, update_epochs=4)
    assert greedy_return(run_dir) == 1


@pytest.mark.parametrize("history", [1, 2])
def test_probe_memory(tmp_path, history):
    """What was seen one step before decides: the language model needs two observations for it, and then can."""
    changes = {
        "network": "llm",
        "history": history,
        "num_steps": 32,
        "total_timesteps": 2000 * history,
        "learning_rate": 5e-3,
    }
    reached = greedy_return(train_probe(tmp_path, "Memory", update_epochs=4, **changes), 40)
    assert reached == 1 if history == 2 else reached < 0.8


def test_probe_discrete_actions_with_a_start(tmp_path):
    assert greedy_return(train_probe(tmp_path, "Bandit")) == 1


@pytest.mark.parametrize("network", ["llm", "mlp"])
def test_probe_best_action_between_asymmetric_bounds(tmp_path, network):
    changes = {"network": network, "total_timesteps": 3000 if network == "llm" else 6000}
    run_dir = train_probe(tmp_path, "Dial", learning_rate=5e-3, update_epochs=4, **changes)
    assert greedy_return(run_dir) > -0.05


def test_probe_without_bounds(tmp_path):
    """The probe checks that the actions are in its space."""
    assert greedy_return(train_probe(tmp_path, "Open", total_timesteps=6000, update_epochs=4)) > -0.35


def test_probe_endless_task_cut_by_truncation(tmp_path):
    """V = 1 / (1 - gamma) = 10 if a cut episode bootstraps, and about 3 if not."""
    run_dir = train_probe(tmp_path, "Endless", total_timesteps=12_000, learning_rate=2e-2)
    critic = ppo.mlp(1, 1, 1.0)
    spec = ppo.load_policy(run_dir).spec
    policy = ppo.StochasticPolicy(ppo.MLPNetwork(spec))
    ppo.flatten_parameters(policy, critic).data.copy_(load_checkpoint(run_dir)["parameters"])
    assert critic(torch.zeros(1, 1)).item() == pytest.approx(10, rel=0.1)


def test_actions_as_the_environment_takes_them():
    """In units of half the range around the centre, within the bounds, of the space's type; and what is scored stays
    as it is."""
    raw = np.array([[0.5, -0.5], [3.0, -9.0]], np.float32)
    np.testing.assert_allclose(ppo.to_env(raw, spec_of(1, BOX)), [[1, 0.25], [2, 0]])
    assert raw[1].tolist() == [3, -9]

    def executed(name, *numbers):
        env = gym.make(f"probe_envs:{name}-v0")
        envs = gym.make_vec(f"probe_envs:{name}-v0", 1)
        actions = ppo.to_env(np.array([numbers]), ppo.task_spec(Args(), envs))
        assert env.action_space.contains(actions[0])
        return actions[0].ravel().tolist()

    assert executed("Edge", 1.5) == [2]
    assert executed("Edge", 0.5) == [0]
    assert executed("Whole", 0.0) == [4]  # half way between 4 and 5, to even
    assert executed("Whole", 0.56) == [7]
    assert executed("Open", 1.5, -70, -3) == [1.5, -70, 5]
    assert executed("Far", 0, 0, 0, 9) == [0.5, 12, -6, 300]
    bandit = gym.make_vec("probe_envs:Bandit-v0", 1)
    assert ppo.to_env(np.array([0, 3]), ppo.task_spec(Args(), bandit)).tolist() == [5, 8]


def test_observed_components_are_all_that_is_seen(tmp_path):
    """The policy takes whole observations and sees those that it was trained on."""
    args = SMALL | {"total_timesteps": 100, "observe": [2, 0], "history": 3, "eval_episodes": 2}
    ppo.train(Args(run_dir=str(tmp_path / "run"), **args))
    policy = ppo.load_policy(tmp_path / "run")
    assert policy.policy.network.encoder[0].in_features == 2
    obs = np.arange(4, dtype=np.float32)
    policy.act(obs)
    policy.act(obs + 10)
    assert policy.states[0].tolist() == [[0, 0], [2, 0], [12, 10]]
    with pytest.raises(ppo.UserError, match="3 observations after 1: call reset"):
        policy.act(np.stack([obs] * 3))
    policy.reset()
    policy.act(obs)
    assert policy.mask[0].tolist() == [False, False, True]


@every_architecture
def test_architectures_train(folders, tmp_path, kind):
    """Two iterations each on local folders, with histories; the body stays as it was in the folder."""
    args = SMALL | {"llm_id": folders[kind], "history": 3, "total_timesteps": 100, "eval_episodes": 2}
    summary = ppo.train(Args(run_dir=str(tmp_path / "run"), **args))
    assert len(read_metrics(tmp_path / "run")) == 2
    assert all(isinstance(x, str) or math.isfinite(x) for x in summary.values())
    policy = ppo.load_policy(tmp_path / "run/policy")
    before = load_file(Path(folders[kind], "model.safetensors"))
    for name, x in policy.policy.network.body.state_dict().items():
        name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if "lora_" not in name and "embed_tokens" not in name and not name.startswith("wte"):
            assert torch.equal(x, before.get(f"model.{name}", before.get(f"transformer.{name}"))), name
    adapter = load_file(tmp_path / "run/policy/adapter_model.safetensors")
    assert any(x.abs().max() > 0 for name, x in adapter.items() if "lora_B" in name)
    assert (
        json.loads((tmp_path / "run/policy/adapter_config.json").read_text())["base_model_name_or_path"]
        == folders[kind]
    )


@pytest.mark.parametrize("network", ["llm", "mlp"])
def test_pendulum_runs(tmp_path, network):
    args = SMALL | {"network": network, "env_id": "Pendulum-v1", "total_timesteps": 100, "eval_episodes": 1}
    summary = ppo.train(Args(run_dir=str(tmp_path / "run"), **args))
    assert -2000 < summary["eval_return_greedy"] < 0


# ----------------------------------------------------------------------------------------------------- the saved folder


VARIANTS = {
    "random body": {},
    "without adapters": {"lora_rank": 0},
    "box": {"actions": BOX},
    "bfloat16": {"dtype": "bfloat16"},
    "mlp": {"network": "mlp"},
    "qwen2": {"llm_id": "qwen2"},
    "gpt2": {"llm_id": "gpt2"},
    "llama": {"llm_id": "llama"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_policy_is_the_same(folders, tmp_path, variant):
    args = dict(VARIANTS[variant])
    actions = args.pop("actions", DISCRETE)
    args["llm_id"] = folders.get(args.get("llm_id"), "tiny-random")
    policy = make_policy(3, actions, **args)
    ppo.save_policy(tmp_path / "policy", policy, spec_of(3, actions), Args(history=3, **args))
    batch = random_batch(policy, history=3)
    loaded = ppo.load_policy(tmp_path / "policy")
    with torch.no_grad():
        expected = policy.network(batch.states, batch.mask)
        ours = loaded.policy.network(batch.states, batch.mask)
    assert torch.equal(ours.log_prob(batch.actions), expected.log_prob(batch.actions))
    assert torch.equal(ours.mode, expected.mode)
    assert (tmp_path / "policy/body").exists() == (args["llm_id"] == "tiny-random" and variant != "mlp")


@pytest.mark.parametrize("kind", ["tiny-random", "llama", "gpt2"])
def test_the_adapter_loads_with_peft_alone(folders, tmp_path, kind):
    args = Args(llm_id=folders.get(kind, kind), history=2)
    policy = make_policy(2, llm_id=args.llm_id)
    ppo.save_policy(tmp_path / "policy", policy, spec_of(2), args)
    source = tmp_path / "policy/body" if kind == "tiny-random" else args.llm_id
    body = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(body, tmp_path / "policy").eval()
    tokens = torch.randn(3, 2, body.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = policy.network.body(inputs_embeds=tokens).last_hidden_state
        assert torch.equal(model(inputs_embeds=tokens).last_hidden_state, expected)
        with model.disable_adapter():
            assert not torch.allclose(model(inputs_embeds=tokens).last_hidden_state, expected, atol=1e-3)


@pytest.mark.parametrize(
    "missing",
    [
        "policy.json",
        "weights.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "body",
        "body/config.json",
    ],
)
def test_a_folder_with_a_missing_file(tmp_path, monkeypatch, capsys, missing):
    folder = tmp_path / "policy"
    ppo.save_policy(folder, make_policy(), spec_of(1), Args())
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, lines = run_main(ppo, monkeypatch, capsys, "--play", folder)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert str(folder) in lines[0]


def test_a_folder_that_does_not_fit(tmp_path, monkeypatch, capsys):
    """Another state size in policy.json, another version, damaged weights, an environment that has changed."""
    folder = tmp_path / "policy"
    ppo.save_policy(folder, make_policy(), spec_of(1) | {"env_id": "Pendulum-v1"}, Args())
    description = json.loads((folder / "policy.json").read_text())
    weights = (folder / "weights.safetensors").read_bytes()

    def play(words, **changes):
        (folder / "policy.json").write_text(json.dumps(description | changes))
        code, lines = run_main(ppo, monkeypatch, capsys, "--play", folder)
        assert code == 2
        assert len(lines) == 1, lines
        assert re.search(words, lines[0]), lines

    play("observation of shape .*takes observations of 4 numbers, as Pendulum-v1")
    play("weights.safetensors and policy.json", spec=description["spec"] | {"observe": [0, 1, 2]})
    play("format 9 of ppo_llm_policy.py", format=9)
    save_file({"head.0.bias": torch.zeros(3)}, folder / "weights.safetensors")
    play("weights.safetensors and policy.json")
    (folder / "weights.safetensors").write_bytes(weights[:100])
    play("is not whole")
    play("is not whole", dtype="float33")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "body/model.safetensors"])
def test_weights_that_are_missing_are_not_made_up(tmp_path, file):
    """PEFT and transformers would only warn, and go on with others."""
    ppo.save_policy(tmp_path / "policy", make_policy(), spec_of(1), Args())
    path = tmp_path / "policy" / file
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ppo.UserError, match="policy is not whole, copy all of it"):
        ppo.load_policy(tmp_path / "policy")


def test_a_local_body_is_found_from_elsewhere(folders, tmp_path, monkeypatch):
    """Also where the folder's name is that of another body, and not where it has gone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["llama"], "body")
    ppo.save_policy(Path("policy"), make_policy(llm_id="body"), spec_of(1), Args(llm_id="body"))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert ppo.load_policy("../policy").policy.network.body.config.model_type == "llama"
    shutil.rmtree("../body")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ppo.UserError, match=f"{tmp_path}/body cannot be loaded"):
        ppo.load_policy("../policy")


def test_bodies_that_are_no_causal_language_models(tmp_path, monkeypatch, capsys):
    """BERT looks ahead; a folder with foreign weights would get random ones."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=8, initializer_range=0.5, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    tiny.save_pretrained(tmp_path / "foreign")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign/model.safetensors", metadata={"format": "pt"})
    for name, words in (("bert", "not causal"), ("foreign", "lack 1. weights of the body")):
        argv = ["--llm-id", tmp_path / name, "--run-dir", tmp_path / "run"]
        code, lines = run_main(ppo, monkeypatch, capsys, *argv)
        assert code == 2
        assert len(lines) == 1
        assert re.search(words, lines[0]), lines
        assert not (tmp_path / "run").exists()


def test_an_interrupted_export_leaves_no_policy(tmp_path, monkeypatch):
    """The folder appears whole, and replaces an older one."""
    folder = tmp_path / "policy"
    ppo.save_policy(folder, make_policy(seed=1), spec_of(1), Args())
    old = (folder / "weights.safetensors").read_bytes()
    (tmp_path / "policy.part").mkdir()  # of an export that was killed
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            ppo.save_policy(folder, make_policy(seed=2), spec_of(1), Args())
    assert (folder / "weights.safetensors").read_bytes() == old
    ppo.save_policy(folder, make_policy(seed=2), spec_of(1), Args())
    assert (folder / "weights.safetensors").read_bytes() != old
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_play_and_load_policy_give_the_summarys_returns(tmp_path, monkeypatch, capsys):
    args = SMALL | {"total_timesteps": 400, "eval_episodes": 3, "seed": 3, "history": 2}
    ppo.train(Args(run_dir=str(tmp_path / "run"), **args))
    said = capsys.readouterr().out
    assert "random" in said.splitlines()[0]  # the body is not trained
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    wanted = {"script", "task", "seed", "global_step", "seconds", "steps_per_second", "train_return"}
    assert wanted <= set(summary)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert {"torch", "transformers", "peft", "numpy", "gymnasium", "python"} <= set(config["versions"])
    monkeypatch.setattr(sys, "argv", ["x", "--play", str(tmp_path / "run"), "--eval-episodes", "3", "--seed", "3"])
    ppo.main()
    greedy, sampled = capsys.readouterr().out.splitlines()
    assert f"mean {summary['eval_return_greedy']:.1f}" in greedy
    assert f"mean {summary['eval_return_sampled']:.1f}" in sampled
    # An application that steps one environment reaches what the episodes reached side by side.
    policy, env = ppo.load_policy(tmp_path / "run"), gym.make("CartPole-v1")
    (seed,) = ppo.derive_seeds(3, 2**32 - 1, 1)
    returns = []
    for episode in range(3):
        policy.reset()
        obs, _ = env.reset(seed=seed + episode)
        over, total = False, 0.0
        while not over:
            action = policy.act(obs)
            assert env.action_space.contains(action)
            obs, reward, terminated, truncated, _ = env.step(action)
            over, total = terminated or truncated, total + reward
        returns.append(total)
    assert f"{' '.join(f'{r:g}' for r in returns)}" in greedy


# ------------------------------------------------------------------------------- same again, killed, resumed and spread


def test_same_seed_same_run(tmp_path):
    args = SMALL | {"total_timesteps": 300, "checkpoint_interval": 2, "history": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(run_dir=str(tmp_path / name), seed=seed, **args))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    same_weights(tmp_path / "a", tmp_path / "b")
    for name in ("weights.safetensors", "adapter_model.safetensors", "body/model.safetensors"):
        a, b, c = ((tmp_path / run / "policy" / name).read_bytes() for run in "abc")
        assert a == b != c


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    """SIGKILL, then SIGTERM in the resumed run, then the command that it prints."""
    args = SMALL | {"total_timesteps": 1400, "checkpoint_interval": 4, "history": 2}
    process = start(ppo, "--run-dir", tmp_path / "cut", *flags(args))
    wait_for_rows(tmp_path / "cut", 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = load_checkpoint(tmp_path / "cut")["iteration"]
    assert before % 4 == 0
    process = start(ppo, "--resume", tmp_path / "cut")
    wait_for_rows(tmp_path / "cut", before + 5, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "cut")["iteration"] > before
    resume_as_printed(ppo, errors, monkeypatch)
    ppo.train(Args(run_dir=str(tmp_path / "whole"), **args))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    same_weights(tmp_path / "cut", tmp_path / "whole")
    for name in ("weights.safetensors", "adapter_model.safetensors", "body/model.safetensors"):
        assert (tmp_path / "cut/policy" / name).read_bytes() == (tmp_path / "whole/policy" / name).read_bytes()


def test_two_ranks(tmp_path):
    """The gradient of two ranks is that of one process with all rows, in parts of different size; and a run on two
    ranks ends with the same weights on both and writes each file once."""
    run_two_ranks(ROOT / "tests/ranks_llm.py", tmp_path)
    records = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    policy, critic = ranks_llm.make_networks()
    parameters = ppo.flatten_parameters(policy, critic)
    batches = [ranks_llm.make_batch(rank) for rank in (0, 1)]
    for i in range(2):
        rows = [record["minibatches"][i] for record in records]
        whole = Batch(*(torch.cat([x[r["rows"]] for x, r in zip(pair, rows)]) for pair in zip(*batches)))
        advantages = (whole.advantages - whole.advantages.mean()) / (whole.advantages.std() + 1e-8)
        loss, _ = ppo.policy_ppo_loss(
            policy, critic, whole._replace(advantages=advantages), len(advantages), ranks_llm.ARGS
        )
        parameters.grad.zero_()
        loss.backward()
        for r in rows:
            torch.testing.assert_close(r["gradient"], parameters.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(records[0]["trained"], records[1]["trained"])
    assert torch.equal(records[0]["trained"], load_checkpoint(tmp_path / "run")["parameters"])
    assert (tmp_path / "run/policy/adapter_model.safetensors").exists()
    assert len(read_metrics(tmp_path / "run")) == 2


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "--env-id"),
        (["--env-id", "probe_envs:Many-v0"], "--env-id probe_envs:Many-v0"),
        (["--env-id", "probe_envs:Shapeless-v0"], "--env-id probe_envs:Shapeless-v0"),
        (["--observe", "0", "4"], "--observe 0 4: CartPole-v1 has components 0 to 3"),
        (["--observe", "-1"], "--observe"),
        (["--history", "0"], "--history"),
        (["--llm-id", "nowhere/to-be-found"], "tiny-random, qwen2-0.5b-random"),
        (["--llm-id", "file"], "--llm-id file"),
        (["--lora-target-modules", "no_such_layer"], "--lora-target-modules no_such_layer"),
        (["--lora-target-modules", "q_proj", "vproj"], "--lora-target-modules vproj"),
        (["--lora-rank", "-1"], "--lora-rank"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--lora-alpha", "0"], "--lora-alpha"),
        (["--micro-batch-size", "0"], "--micro-batch-size"),
        (["--log-std-init", "99"], "--log-std-init"),
        (["--dtype", "float16"], "float16"),
        (["--network", "cnn"], "cnn"),
        (["--num-envs", "0"], "--num-envs"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--play", "nowhere/policy"], "nowhere/policy"),
        (["--run-dir", "file/in/the/way"], "--run-dir"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, wrong, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for the network
    (tmp_path / "file").write_text("")
    code, lines = run_main(ppo, monkeypatch, capsys, "--total-timesteps", 10, *wrong)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_history_longer_than_the_positions(folders, tmp_path, monkeypatch, capsys):
    argv = ["--llm-id", folders["gpt2"], "--history", 13, "--run-dir", tmp_path / "run"]
    code, lines = run_main(ppo, monkeypatch, capsys, *argv)
    assert code == 2
    assert lines == [f"error: --history 13 is more than the 12 positions of {folders['gpt2']}"]
    assert not (tmp_path / "run").exists()


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
    assert state["parameters"].isfinite().all()
    assert not (tmp_path / "run/policy").exists()


def test_a_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    """Nor a folder that happens to be called policy. And a resumed run keeps its flags, lists among them."""
    (tmp_path / "project/policy").mkdir(parents=True)
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path / "project")
    assert code == 2
    assert "already holds a run" in lines[0]
    assert (tmp_path / "project/policy").exists()
    argv = ["--run-dir", tmp_path / "run", "--observe", "0", "2", *flags(SMALL | {"total_timesteps": 64})]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, argv)])
    ppo.main()
    before = copy.deepcopy({path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()})
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "already holds a run" in lines[0]
    code, lines = run_main(ppo, monkeypatch, capsys, "--resume", tmp_path / "run", "--observe", "1")
    assert code == 2
    assert lines == [f"error: --observe contradicts the run in {tmp_path / 'run'}: leave it out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(tmp_path / "run")])
    ppo.main()  # a complete run is evaluated again, and changed in nothing
    assert (tmp_path / "run/metrics.csv").read_bytes() == before["metrics.csv"]
