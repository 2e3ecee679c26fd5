"""Tests of ppo_llm_policy.py: its networks beside the document's construct, formulas, probe environments, and real runs
that are killed, resumed, played and spread. GAE, the approximate KL and the files of a run are the same text as in
ppo_mlp_discrete.py, and are tested there."""

import json
import os
import re
import signal
import sys

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
    Spy,
    gae_by_definition,
    mistake,
    read_metrics,
    run_script,
    run_two_ranks,
    same_state,
    start,
    tensorboard_rows,
    wait_for_rows,
)
from safetensors.torch import save_file
from scipy import stats

import ppo_llm_policy as ppo
from ppo_llm_policy import Args, Batch

SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "device": "cpu"}
QWEN2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN2 |= {"num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.3}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**QWEN2),
    "gpt2": transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=32, n_layer=2, n_head=4),
}
every_architecture = pytest.mark.parametrize("kind", CONFIGS)
both_spaces = pytest.mark.parametrize("is_discrete", [True, False], ids=["discrete", "box"])
both_networks = pytest.mark.parametrize("network", ["llm", "mlp"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of small causal LMs, as a user would have them. GPT-2's configuration has dropout."""
    made = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        made[kind] = str(tmp_path_factory.mktemp(kind))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
    return made


def make_policy(is_discrete=True, obs_dim=4, **flags):
    """A policy over 3 actions or 3 numbers whose adapters and last layer are not near zero, as after some training."""
    args = Args(**flags)
    torch.manual_seed(0)
    policy = ppo.StochasticPolicy(ppo.NETWORKS[args.network](args, obs_dim, 3, is_discrete)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name.startswith(("network.head.2", "network.mlp.4")):
            torch.nn.init.normal_(parameter, std=0.2)
    if not is_discrete:
        policy.network.log_std.data = torch.tensor([-0.7, 0.2, 0.0])
    return policy


def some_rows(policy, rows=6, history=1, obs_dim=4):
    """States, and actions of whatever policy in them."""
    rng = torch.Generator().manual_seed(1)
    states = torch.randn(rows, history, obs_dim, generator=rng)
    is_discrete = policy.network.is_discrete
    shape = (rows,) if is_discrete else (rows, 3)
    return states, torch.randint(3, shape, generator=rng) if is_discrete else torch.randn(shape, generator=rng)


def outputs_of(network, states):
    """Logits or means."""
    distribution = network(states)
    return distribution.logits if network.is_discrete else distribution.mean


# ------------------------------------------------------------------------------------------------------------- networks


def documents_logits(folder, network, states):
    """The forward pass as "From MLP to LLM" writes it, on the weights of our network. states: (B, K, S)."""
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
    policy = make_policy(history=history, llm_id=folders[kind])
    states, _ = some_rows(policy, history=history)
    with torch.no_grad():
        expected = documents_logits(folders[kind], policy.network, states).log_softmax(-1)
        ours = policy.network(states).logits
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not any("lm_head" in name for name, _ in policy.named_modules())


def test_layers_and_adapters_are_the_documents():
    """Encoder S-256-hidden, head hidden-128-outputs, rank 16 and scale 32 / 16 on the seven projections."""
    network = make_policy().network
    adapters = {name: m for name, m in network.body.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in adapters} == names
    assert len(adapters) == 2 * len(names)  # in each of two layers
    assert {(m.r["default"], m.scaling["default"]) for m in adapters.values()} == {(16, 2.0)}
    for part, sizes in ((network.encoder, [(4, 256), (256, 64)]), (network.head, [(64, 128), (128, 3)])):
        assert [type(layer).__name__ for layer in part] == ["Linear", "ReLU", "Linear"]
        assert [(part[i].in_features, part[i].out_features) for i in (0, 2)] == sizes


def test_the_first_policy_is_nearly_uniform():
    torch.manual_seed(0)
    logits = ppo.LLMNetwork(Args(), 4, 3, True)(torch.randn(50, 1, 4)).logits
    assert 0 < (logits - np.log(1 / 3)).abs().max() < 0.15


@every_architecture
@pytest.mark.parametrize("rank", [16, 0])
def test_gradient_reaches_encoder_adapters_and_head_alone(folders, kind, rank):
    policy = make_policy(history=4, llm_id=folders[kind], lora_rank=rank)
    policy.evaluate_actions(*some_rows(policy, history=4))[0].sum().backward()
    reached = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    wanted = re.compile(r"network\.(encoder|head)\.|.*\.lora_[AB]\.")
    assert reached == {name for name, _ in policy.named_parameters() if wanted.match(name)}
    assert reached == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert (rank > 0) == any("lora_" in name for name in reached)


@pytest.mark.parametrize("history", [1, 4])
def test_queries_and_keys_learn_only_from_several_observations(history):
    policy = make_policy(history=history)
    policy.evaluate_actions(*some_rows(policy, 8, history))[0].sum().backward()
    largest = {}
    for name, p in policy.named_parameters():
        if "lora_" in name:
            layer = re.search(r"(\w+)_proj", name)[1]
            largest[layer] = max(largest.get(layer, 0), p.grad.abs().max().item())
    assert largest["v"] > 1e-4  # not a point where nothing is learned
    for layer in "qk":
        assert largest[layer] < 1e-6 * largest["v"] if history == 1 else largest[layer] > 1e-3 * largest["v"]


def test_no_dropout_unless_it_is_asked_for_and_said(folders, tmp_path, monkeypatch, capsys):
    """GPT-2's configuration has dropout 0.1. What --lora-dropout drops, it drops in the update alone."""
    policy = make_policy(history=3, llm_id=folders["gpt2"]).train()
    states, _ = some_rows(policy, history=3)
    assert torch.equal(policy.network(states).logits, policy.network(states).logits)
    modes = {"get_action": set(), "evaluate_actions": set()}
    for name, seen in modes.items():
        method = getattr(ppo.StochasticPolicy, name)

        def spy(policy, *args, seen=seen, method=method):
            seen |= {m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.3}
            return method(policy, *args)

        monkeypatch.setattr(ppo.StochasticPolicy, name, spy)
    ppo.train(Args(total_timesteps=100, lora_dropout=0.3, **SMALL), tmp_path / "a")
    assert modes == {"get_action": {False}, "evaluate_actions": {True}}
    assert "--lora-dropout" in capsys.readouterr().out
    ppo.train(Args(total_timesteps=1, **SMALL), tmp_path / "b")
    assert "dropout" not in capsys.readouterr().out


def test_bfloat16_is_the_frozen_bodys_alone():
    whole, half = make_policy(history=3), make_policy(history=3, bfloat16=True)
    half.load_state_dict(whole.state_dict())
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    states, actions = some_rows(whole, history=3)
    log_probs, exact = (policy.evaluate_actions(states, actions)[0] for policy in (half, whole))
    assert log_probs.dtype == torch.float32
    assert 0 < (log_probs - exact).abs().max() < 0.1


@both_spaces
@both_networks
def test_policy_samples_and_scores_its_distribution(network, is_discrete):
    """Log-probs and entropies against SciPy, samples against probabilities, the greedy action against the largest."""
    policy = make_policy(is_discrete, network=network, history=2)
    states, actions = some_rows(policy, history=2)
    with torch.no_grad():
        outputs = outputs_of(policy.network, states).double()
        log_probs, entropies = policy.evaluate_actions(states, actions)
        torch.manual_seed(0)
        sampled, scores = policy.get_action(states[:1].expand(20_000, -1, -1))
    greedy, greedy_scores = policy.get_action(states, greedy=True)
    torch.testing.assert_close(scores, policy.evaluate_actions(states[:1].expand(20_000, -1, -1), sampled)[0])
    torch.testing.assert_close(greedy_scores, policy.evaluate_actions(states, greedy)[0])
    if is_discrete:
        chances = outputs.softmax(-1).numpy()
        expected, expected_entropies = np.log(chances[range(6), actions]), stats.entropy(chances, axis=1)
        assert greedy.tolist() == chances.argmax(1).tolist()
        assert stats.chisquare(torch.bincount(sampled, minlength=3), 20_000 * chances[0]).pvalue > 1e-3
    else:
        normals = stats.norm(outputs.numpy(), np.exp([-0.7, 0.2, 0]))
        expected, expected_entropies = normals.logpdf(actions).sum(-1), normals.entropy().sum(-1)
        torch.testing.assert_close(greedy.double(), outputs)
        np.testing.assert_allclose(sampled.mean(0), outputs[0], atol=0.05)
        np.testing.assert_allclose(sampled.std(0), np.exp([-0.7, 0.2, 0]), rtol=0.03)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies, expected_entropies, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- loss and batches


def loss_by_hand(policy, critic, batch, args):
    """The loss row by row, without any function of the script but the network."""
    total = 0.0
    for b, advantage in enumerate(batch.advantages):
        outputs = outputs_of(policy.network, batch.states[b : b + 1])[0]
        if policy.network.is_discrete:
            new = torch.distributions.Categorical(logits=outputs)
        else:
            new = torch.distributions.MultivariateNormal(outputs, torch.diag((2 * policy.network.log_std).exp()))
        log_prob = new.log_prob(batch.actions[b])
        ratio = (log_prob - batch.log_probs[b]).exp()
        if args.algorithm == "ppo":
            low, high = 1 - args.clip_coef, 1 + args.clip_coef
            total = total - min(ratio * advantage, max(low, min(high, ratio)) * advantage)
        else:
            total = total - log_prob * advantage
        error = (critic(batch.states[b].reshape(1, -1))[0, 0] - batch.returns[b]) ** 2
        total = total + args.vf_coef * error / 2 - args.ent_coef * new.entropy()
    return total / len(batch.states)


@both_spaces
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_loss_and_gradient(algorithm, is_discrete):
    """Both equal those of an independent formula, with ratios on both sides of the clip."""
    args = Args(algorithm=algorithm, ent_coef=0.03, network="mlp", history=2)
    policy, critic = make_policy(is_discrete, network="mlp", history=2).double(), torch.nn.Linear(8, 1).double()
    states, actions = some_rows(policy, history=2)
    states, vectors = states.double(), torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double()
    log_probs = policy.evaluate_actions(states, actions)[0].detach() + 0.4 * vectors[0]
    batch = Batch(states, actions if is_discrete else actions.double(), log_probs, *vectors[1:])
    ours, figures = ppo.ppo_loss(policy, critic, batch, args)
    expected = loss_by_hand(policy, critic, batch, args)
    torch.testing.assert_close(ours, expected)
    parameters = [*policy.parameters(), *critic.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, expected)))
    total = figures["policy_loss"] + args.vf_coef * figures["value_loss"] - args.ent_coef * figures["entropy"]
    torch.testing.assert_close(ours.detach(), total)
    ratios = (policy.evaluate_actions(states, batch.actions)[0] - log_probs).exp()
    assert figures["clipfrac"] == ((ratios < 0.8) | (ratios > 1.2)).double().mean() > 0
    assert figures["approx_kl"].item() == pytest.approx((ratios - 1 - ratios.log()).mean().item())


def test_minibatches():
    """Every row once per pass, in orders that differ; as many minibatches as asked for, which ranks with fewer rows
    depend on."""
    column = torch.arange(10.0)
    batch = Batch(column[:, None, None], column, column, column, column)
    each = list(ppo.minibatches(batch, Args(num_minibatches=4, update_epochs=3)))
    assert [len(m.states) for m in each] == [3, 3, 2, 2] * 3
    orders = [torch.cat([m.returns for m in each[i : i + 4]]).tolist() for i in (0, 4, 8)]
    assert all(sorted(order) == column.tolist() for order in orders)
    assert len({*map(tuple, orders)}) == 3
    assert all(torch.equal(m.states[:, 0, 0], m.advantages) for m in each)  # columns stay together


def test_reinforce_makes_one_step_with_all_rows_of_a_rollout(tmp_path, monkeypatch):
    spy = Spy(ppo, monkeypatch)
    flags = {"algorithm": "reinforce", "network": "mlp", "num_envs": 4, "num_steps": 16, "total_timesteps": 150}
    ppo.train(Args(**flags), tmp_path)
    sizes = [len(batch.states) for _, _, batch in spy.calls]
    assert len(sizes) == 3
    assert [int(row["global_step"]) for row in read_metrics(tmp_path)] == np.cumsum(sizes).tolist()


@pytest.mark.parametrize("probe", ["Numbered", "NumberedBox"])
def test_batches_are_what_happened(tmp_path, monkeypatch, probe):
    """Of three rollouts of episodes that end in either way, each batch holds the steps that are no resets, with their
    windows, log-probs, advantages and returns by independent sums. The probe's observations count the steps of an
    episode from 1, so that a window is known from its last number."""
    spy, batches, minibatches = Spy(ppo, monkeypatch), [], ppo.minibatches
    monkeypatch.setattr(ppo, "minibatches", lambda batch, args: (batches.append(batch), minibatches(batch, args))[1])
    flags = SMALL | {"num_envs": 3, "num_steps": 20, "total_timesteps": 120, "history": 3, "learning_rate": 1e-2}
    ppo.train(Args(env_id=f"probe_envs:{probe}-v0", **flags), tmp_path)
    metrics, total = read_metrics(tmp_path), 0
    assert len(batches) == len(spy.steps) / 20 == len(metrics) == 3
    for i, batch in enumerate(batches):
        policy, critic, _ = spy.calls[4 * i]
        states, actions, rewards, terminated, truncated, rows = spy.rollout(i, 20)
        assert (rows == (states[:-1, :, -1, 0] > 0)).all()  # negative after the last step of an episode
        for window in batch.states[..., 0].tolist():
            newest = int(window[-1])
            assert window == [1, 1, 1, *range(2, newest + 1)][-3:]
        with torch.no_grad():
            values = critic(torch.tensor(states).flatten(2))[..., 0].numpy()
            log_probs, _ = policy.evaluate_actions(batch.states, batch.actions)
        advantages = gae_by_definition(rewards, values, terminated, truncated, 0.98, 0.9)
        normalised = (advantages - advantages[rows].mean()) / advantages[rows].std()
        expected = Batch(states[:-1], actions, None, normalised, advantages + values[:-1])
        for name, ours, theirs in zip(Batch._fields, batch, expected):
            if name != "log_probs":
                np.testing.assert_allclose(ours, theirs[rows], atol=1e-4, rtol=1e-4, err_msg=name)
        torch.testing.assert_close(batch.log_probs, log_probs, rtol=0, atol=1e-5)  # the ratio is 1 at first
        total += rows.sum()
        assert int(metrics[i]["global_step"]) == total
        explained = 1 - np.var(advantages[rows]) / np.var((advantages + values[:-1])[rows])
        assert float(metrics[i]["losses/explained_variance"]) == pytest.approx(explained, rel=1e-3)
    assert (spy.calls[1][0].evaluate_actions(*spy.calls[1][2][:2])[0] - spy.calls[1][2].log_probs).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("probe", "policys", "envs"),
    [
        ("Bandit", [0, 3], [5, 8]),
        ("Dial", [[0], [0.5], [-9]], [[5], [6], [3]]),
        ("Edge", [[0.25], [2]], [[-1], [2]]),
        ("Far", [[0, 0, 0, 0], [1, -1, 0.5, 3]], [[[0.5, 12], [-6, 200]], [[1, 10], [-5, 300]]]),
        ("Open", [[0, 0, 0], [2, -7, 1.5]], [[0, 0, 5], [2, -7, 6.5]]),
        ("Whole", [[0.5], [0.6], [3]], [[7], [7], [9]]),
    ],
)
def test_actions_as_environments_take_them(probe, policys, envs):
    """Discrete ones that start at 5; halves of ranges around a centre, clipped; boxes of two axes, open, or integer."""
    env, taken = ppo.make_envs(Args(env_id=f"probe_envs:{probe}-v0"), len(policys)), []
    space = env.single_action_space
    for one in env.unwrapped.envs:
        inner = one.unwrapped
        inner.step = lambda action, step=inner.step: (taken.append(action), step(action))[1]
    env.reset(seed=0)
    env.step(np.array(policys, np.int64 if probe == "Bandit" else np.float32))
    np.testing.assert_allclose(taken, envs)
    assert all(space.contains(action) for action in taken)


# ------------------------------------------------------------------------------------------------------ what is learned


def test_gradient_is_clipped_and_learning_rate_falls(tmp_path, monkeypatch):
    rates, norms = [], []
    step = torch.optim.Adam.step

    def spied_step(optimizer):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        assert (group["eps"], group["betas"]) == (1e-5, (0.9, 0.999))
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    flags = SMALL | {"num_minibatches": 1, "update_epochs": 1, "network": "mlp", "env_id": "probe_envs:Endless-v0"}
    ppo.train(Args(total_timesteps=200, max_grad_norm=0.1, **flags), tmp_path / "a")
    rows = read_metrics(tmp_path / "a")
    before = [0, *(int(row["global_step"]) for row in rows[:-1])]
    assert rates == [float(row["charts/learning_rate"]) for row in rows]
    assert rates == pytest.approx([2e-3 * (1 - b / 200) for b in before])
    assert norms == pytest.approx([0.1] * len(rows), rel=1e-4)
    assert all(float(row["losses/grad_norm"]) > 0.2 for row in rows)
    rates.clear()
    ppo.train(Args(total_timesteps=200, anneal_lr=False, **flags), tmp_path / "b")
    assert {*rates} == {2e-3}


def test_kl_stop_comes_before_the_step(tmp_path, monkeypatch):
    """With a target below what one step changes, each update makes exactly one step; without one, all of them."""
    counts = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (counts.append(1), step(self))[1])
    for target, steps in ((1e-9, 1), (None, 4)):
        counts.clear()
        ppo.train(Args(total_timesteps=200, target_kl=target, network="mlp", **SMALL), tmp_path / str(target))
        assert len(counts) == steps * len(read_metrics(tmp_path / str(target)))


def train_probe(run_dir, probe, total_timesteps=4000, **flags):
    """A run that is long enough to learn what the probe is about, and its policy's greedy return."""
    flags = SMALL | {"num_envs": 16, "update_epochs": 8, "num_minibatches": 4, "learning_rate": 5e-3} | flags
    args = Args(env_id=f"probe_envs:{probe}-v0", total_timesteps=total_timesteps, eval_episodes=50, **flags)
    ppo.train(args, run_dir)
    return ppo.evaluate(args, run_dir)["eval_return_greedy"]


def test_a_cut_episode_counts_with_the_value_of_its_last_observation(tmp_path):
    """V = 1 / (1 - gamma) = 5; as a termination, a truncation would give 3.4 at most."""
    train_probe(tmp_path, "Endless", network="mlp", gamma=0.8)
    critic = ppo.mlp(1, 1, 1.0)
    ppo.load(tmp_path / "checkpoint.pt", critic=critic)
    assert critic(torch.zeros(1, 1)).item() == pytest.approx(5.0, abs=0.25)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
@both_networks
def test_actions_depend_on_observations(tmp_path, network, algorithm):
    steps = 1500 if algorithm == "ppo" else 5000
    assert train_probe(tmp_path, "Mirror", steps, network=network, algorithm=algorithm) == 1.0


@pytest.mark.parametrize("history", [1, 2])
def test_memory(tmp_path, history):
    """What was seen one step before decides: the language model needs two observations for it, and then can."""
    reached = train_probe(tmp_path, "Memory", 2000 * history, history=history, num_steps=32, update_epochs=4)
    assert reached == 1.0 if history == 2 else reached < 0.8


@both_networks
def test_box_actions(tmp_path, network):
    """The best one is 5.5, where 3 to 7 are allowed."""
    assert train_probe(tmp_path, "Dial", 2500 if network == "llm" else 4000, network=network) > -0.05


# ------------------------------------------------------------------------- the policy alone, killed, resumed and spread


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(total_timesteps=150, seed=seed, history=2, **SMALL), tmp_path / name)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    states = [ppo.load(tmp_path / name / "checkpoint.pt") for name in ("a", "b")]
    for part in ("policy", "critic", "optimizer", "queues"):
        same_state(*(state[part] for state in states))


def test_killed_and_resumed(tmp_path, monkeypatch):
    """A run that was killed goes on with the learner as it was, and each iteration has one row."""
    run_dir, flags = tmp_path / "run", ["--history", "2", "--device", "cpu", "--num-steps", "16"]
    process = start(ppo, "--run-dir", run_dir, "--checkpoint-interval", 5, "--eval-episodes", 2, *flags)
    wait_for_rows(run_dir, 7, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = ppo.load(run_dir / "checkpoint.pt")
    iteration, global_step, seconds = state["progress"]
    assert iteration % 5 == 0 < seconds
    args = Args(**json.loads((run_dir / "config.json").read_text()))
    ppo.train(Args(resume=str(run_dir), total_timesteps=global_step, history=2, device="cpu"), run_dir)  # nothing to do
    same_state(state, ppo.load(run_dir / "checkpoint.pt"))
    max(
        run_dir.glob("events*"), key=os.path.getmtime
    ).unlink()  # of the same second as the next: TensorBoard mixes them up
    whole = read_metrics(run_dir)
    assert len(whole) == iteration
    (run_dir / "config.json").write_text(json.dumps(vars(args)))

    steps = str(global_step + 600)
    spy = Spy(ppo, monkeypatch)
    run_script(ppo, monkeypatch, "--resume", run_dir, "--total-timesteps", steps, "--learning-rate", 1e-4)
    same_state(ppo.own_weights(spy.calls[0][0], args).state_dict(), state["policy"])
    rows = read_metrics(run_dir, with_time=True)
    assert read_metrics(run_dir)[:iteration] == whole
    assert iteration + 2 <= len(rows) <= iteration + 4
    assert float(rows[iteration]["charts/learning_rate"]) == pytest.approx(1e-4 * (1 - global_step / float(steps)))
    assert 0 < float(rows[iteration]["charts/episodic_return"]) < 500  # the last hundred episodes are remembered
    assert [step for step, _ in tensorboard_rows(run_dir)] == [int(row["global_step"]) for row in rows]
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["checkpoint_interval"], config["history"], config["learning_rate"]) == (5, 2, 1e-4)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["seconds"] > seconds
    run_script(ppo, monkeypatch, "--resume", run_dir)  # a finished run is evaluated again, no more
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert len(read_metrics(run_dir)) == len(rows)


def test_two_ranks_equal_one_process(tmp_path, monkeypatch):
    """After a few steps on rollouts whose rows the ranks share unequally: weights, steps and the loss's figures."""
    run_two_ranks(ROOT / "tests/ranks_llm.py", tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    alone = ranks_llm.run(tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same_state(*ranks)
    torch.testing.assert_close(ranks[0], alone, rtol=0, atol=2e-5)
    files = [sorted(path.name.split(".out.")[0] for path in (tmp_path / f).iterdir()) for f in ("run", "alone/run")]
    assert files[0] == files[1]  # each is there once
    together, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone/run")
    assert len(together) == len(expected) >= 3
    for row, other in zip(together, expected):
        assert row["global_step"] == other["global_step"]
        for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm"):
            assert float(row[f"losses/{name}"]) == pytest.approx(float(other[f"losses/{name}"]), rel=1e-3, abs=1e-5)


@every_architecture
def test_the_policy_stands_alone(folders, tmp_path, monkeypatch, capsys, kind):
    """--play and load_policy give the summary's returns; a pretrained body is not saved; peft loads the adapter."""
    run_dir, flags = tmp_path / "run", ["--llm-id", folders[kind], "--history", 2, "--seed", 3, "--device", "cpu"]
    run_script(ppo, monkeypatch, "--run-dir", run_dir, "--total-timesteps", 600, "--eval-episodes", 3, *flags)
    said = capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    returns = {"train_return", "eval_return_greedy", "eval_return_sampled"}
    assert {*summary} == {"global_step", "seconds", "trained_parameters"} | returns
    assert f"greedy return {summary['eval_return_greedy']:.1f}" in said
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    run_script(ppo, monkeypatch, "--play", run_dir)
    assert said.startswith(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
    run_script(ppo, monkeypatch, "--resume", run_dir)
    assert json.loads((run_dir / "summary.json").read_text()) == summary

    policy, env, returns = ppo.load_policy(run_dir), gym.make("CartPole-v1"), []
    for episode in range(3):
        obs, _ = env.reset(seed=2**31 + 3000 + episode)
        state, over, total = np.stack([obs, obs]), False, 0.0
        while not over:
            action, _ = policy.get_action(torch.tensor(state)[None], greedy=True)
            obs, reward, terminated, truncated, _ = env.step(action.item())
            state, over, total = np.stack([state[1], obs]), terminated or truncated, total + reward
        returns.append(total)
    assert np.mean(returns) == summary["eval_return_greedy"]

    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    saved = ppo.load(run_dir / "policy.pt")["policy"]
    assert sum(weight.numel() for weight in saved.values()) == trained
    assert summary["trained_parameters"] == trained + 64 * (8 + 1) + 64 * 65 + 65  # and the critic's
    body = transformers.AutoModel.from_pretrained(folders[kind], dtype=torch.float32)
    body = peft.PeftModel.from_pretrained(body, run_dir / "adapter")
    embeddings = torch.randn(3, 2, 32)
    with torch.no_grad():
        ours, theirs = (x(inputs_embeds=embeddings).last_hidden_state for x in (policy.network.body, body))
        torch.testing.assert_close(ours, theirs)
        with body.disable_adapter():
            assert not torch.allclose(body(inputs_embeds=embeddings).last_hidden_state, theirs, atol=1e-5)


def test_evaluation_of_what_never_ends_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "range", lambda n: range(50) if n == 100_000 else range(n), raising=False)
    assert train_probe(tmp_path, "Forever", total_timesteps=100, network="mlp") == 50
    assert "50 episodes, 50 unfinished" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--env-id", "NoSuchThing-v3"], "NoSuchThing"),
        (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
        (["--env-id", "probe_envs:Many-v0"], "--env-id probe_envs:Many-v0"),
        (["--history", "0"], "--history"),
        (["--num-envs", "0"], "--num-envs"),
        (["--num-steps", "1"], "--num-steps"),
        (["--gae-lambda", "-0.1"], "--gae-lambda"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--seed", "-1"], "--seed"),
        (["--lora-rank", "-1"], "--lora-rank"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--num-minibatches", "9", "--num-envs", "2", "--num-steps", "9"], "--num-minibatches"),
        (["--device", "cuda"], "--device cuda"),
        (["--llm-id", "nowhere/to-be-found"], "--llm-id nowhere/to-be-found"),
        (["--llm-id", "file"], "--llm-id file"),
        (["--llm-id", "foreign"], "--llm-id foreign cannot be loaded: its files lack"),
        (["--llm-id", "pickled"], "--llm-id pickled"),
        (["--algorithm", "reinforce", "--update-epochs", "4"], "--update-epochs has no effect"),
        (["--algorithm", "reinforce", "--clip-coef", "0.1"], "--clip-coef has no effect"),
        (["--network", "mlp", "--lora-rank", "8"], "--lora-rank has no effect"),
        (["--lora-rank", "0", "--lora-alpha", "8"], "--lora-alpha has no effect"),
        (["--resume", "nowhere"], "nowhere"),
        (["--play", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--run-dir", "elsewhere"], "--run-dir"),
        (["--run-dir", "file/in/the/way"], "file/in/the/way"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for the network
    (tmp_path / "file").write_text("")
    for name in ("foreign", "pickled"):
        CONFIGS["qwen2"].save_pretrained(tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign/model.safetensors", metadata={"format": "pt"})
    torch.save({"x": torch.zeros(2)}, tmp_path / "pickled/pytorch_model.bin")
    before = sorted(tmp_path.iterdir())
    assert named in mistake(ppo, monkeypatch, "--total-timesteps", 10, *wrong)
    assert sorted(tmp_path.iterdir()) == before


def test_ranks_share_the_environments(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--num-envs must be a multiple of 3" in mistake(ppo, monkeypatch)


def test_what_does_not_fit_a_run_leaves_it_alone(tmp_path, monkeypatch):
    ppo.train(Args(total_timesteps=1, **SMALL), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "holds a run" in mistake(ppo, monkeypatch, "--run-dir", tmp_path)
    assert "checkpoint.pt" in mistake(ppo, monkeypatch, "--resume", tmp_path, "--env-id", "Acrobot-v1")
    for flags in (["--network", "mlp"], ["--lora-rank", 4]):
        assert "checkpoint.pt" in mistake(ppo, monkeypatch, "--resume", tmp_path, *flags)
        assert "policy.pt" in mistake(ppo, monkeypatch, "--play", tmp_path, *flags)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    for name in ("policy.pt", "checkpoint.pt", "config.json"):
        (tmp_path / name).write_bytes(before[tmp_path / name][:99])
        assert name in mistake(ppo, monkeypatch, "--play" if name == "policy.pt" else "--resume", tmp_path)


@pytest.mark.parametrize("probe", ["BrokenLaterDiscrete", "BlindLater"])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, probe):
    argv = ["--env-id", f"probe_envs:{probe}-v0", "--run-dir", tmp_path / "run", "--checkpoint-interval", 3]
    assert "iteration 12" in mistake(ppo, monkeypatch, *argv, "--num-envs", 4, "--num-steps", 16, "--device", "cpu")
    assert len(read_metrics(tmp_path / "run")) == 11
    state = ppo.load(tmp_path / "run/checkpoint.pt")
    assert state["progress"][0] == 9
    assert all(weight.isfinite().all() for part in ("policy", "critic") for weight in state[part].values())
