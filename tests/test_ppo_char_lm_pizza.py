"""Tests of ppo_char_lm_pizza.py: formulas, exact distributions over completions that can be counted, a run that must
find the closed-form optimum, and real runs that are killed, resumed and played."""

import copy
import itertools
import json
import math
import re
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    mistake,
    read_metrics,
    run_script,
    same_state,
    start,
    tensorboard_rows,
    wait_for_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from scipy.stats import chisquare

import ppo_char_lm_pizza as ppo
from ppo_char_lm_pizza import Args, Batch, encode

FILES = {"config.json", "metrics.csv", "checkpoint.pt", "policy.pt", "pretrained.pt"}


@pytest.fixture(scope="module")
def pizza(tmp_path_factory):
    """The folder of a run with default flags but for half the pretraining, which is all it takes."""
    run_dir = tmp_path_factory.mktemp("runs") / "pizza"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(ppo, monkeypatch, "--run-dir", run_dir, "--pretrain-steps", 100)
    return run_dir


def quick_run(run_dir, pizza, **flags):
    """Two updates, for completions that end in s, as three foods do."""
    few = {"episodes": 20, "batch_size": 10, "target": "s", "pretrained": str(pizza / "pretrained.pt")}
    return ppo.train(Args(**few | flags), run_dir)


def random_network(seed, letters="", outputs=30):
    """A float64 network whose outputs depend on all that it has read; if letters are given, it says nothing else."""
    torch.manual_seed(seed)
    network = ppo.Transformer(outputs, width=16, num_heads=2).double()
    with torch.no_grad():
        network.tokens.weight.normal_()
        network.positions.weight.normal_()
        if letters:
            network.head.bias.fill_(-1e9)
            network.head.bias[encode(letters)] = 0.0
    return network


def all_completions(letters, length):
    """All completions (N, length) with these letters, ended within length characters or cut off there."""
    texts = ["".join(t) for n in range(length + 1) for t in itertools.product(letters, repeat=n)]
    texts = [text + "E" if len(text) < length else text for text in texts]
    return texts, torch.stack([encode(text.ljust(length, "E")) for text in texts])


@torch.no_grad()
def text_log_probs(policy, prompt, texts):
    """Log-probs (N,) of whole texts, each by itself."""
    sums = {}
    for text in {*texts}:
        tokens = encode("P" + prompt + text)
        log_probs = policy(tokens[None, :-1])[0].double().log_softmax(-1)
        sums[text] = log_probs[range(len(tokens) - 1), tokens[1:]][-len(text) :].sum()
    return torch.stack([sums[text] for text in texts])


# ------------------------------------------------------------------------------------------------- text and networks


def test_token_ids_are_the_documents():
    assert encode("Pravin likes sala").tolist() == [0, 21, 4, 25, 12, 17, 3, 15, 12, 14, 8, 22, 3, 22, 4, 15, 4]
    assert encode("Pravin likes pizz").tolist() == [0, 21, 4, 25, 12, 17, 3, 15, 12, 14, 8, 22, 3, 19, 12, 29, 29]
    assert encode("E").tolist() == [ppo.END] == [1]
    assert len(ppo.CHARACTERS) == 30


def test_texts_end_with_the_first_e():
    tokens = torch.stack([encode("pizzaEsE"), encode("saladsoE"), encode("icecream"), encode("EEEEEEEE")])
    assert ppo.decode(tokens) == ["pizzaE", "saladsoE", "icecream", "E"]
    assert ppo.until_end(tokens).sum(-1).tolist() == [6, 8, 8, 1]
    assert ppo.until_end(tokens)[0].tolist() == [True] * 6 + [False] * 2


def test_transformer_equals_torchs_own():
    """The same weights in nn.TransformerEncoder (norms first, GELU, causal mask) give the same outputs."""
    ours = random_network(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(16), enable_nested_tensor=False).double()
    names = {"attention_norm": "norm1", "mlp_norm": "norm2", "attention_out": "self_attn.out_proj", "mlp.0": "linear1"}
    names |= {"mlp.2": "linear2", "queries_keys_values.weight": "self_attn.in_proj_weight"}
    names |= {"queries_keys_values.bias": "self_attn.in_proj_bias", "blocks": "layers"}
    weights = {}
    for name, weight in ours.state_dict().items():
        for mine, its in names.items():
            name = name.replace(mine, its)
        weights[name] = weight
    own = {name: weights.pop(name) for name in list(weights) if name.split(".")[0] in ("tokens", "positions", "head")}
    theirs.load_state_dict(weights)
    tokens = torch.randint(30, (3, 11))
    x = own["tokens.weight"][tokens] + own["positions.weight"][:11]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11).double()
    expected = theirs(x, mask=mask, is_causal=True) @ own["head.weight"].T + own["head.bias"]
    torch.testing.assert_close(ours(tokens), expected)
    assert torch.equal(ours.train()(tokens), ours.eval()(tokens))  # there is no dropout


def test_no_token_sees_what_follows():
    network, tokens = random_network(1), torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 30
    difference = (network(tokens) - network(changed))[0].abs().amax(-1)
    assert difference[:7].max() < 1e-9
    assert difference[7:].min() > 1e-3


def test_outputs_belong_to_the_tokens_that_come_next():
    """Log-probs, entropies and values of batched completions are those of each text by itself."""
    policy, critic, prompt = random_network(2), random_network(3, outputs=1), "ab c"
    completions = torch.randint(4, 30, (5, 6))
    log_probs, entropies = ppo.evaluate_tokens(policy, encode("P" + prompt), completions)
    values = ppo.outputs_before(critic, encode("P" + prompt), completions)
    assert values.shape == (5, 6, 1)
    for b, t in itertools.product(range(5), range(6)):
        before = torch.cat([encode("P" + prompt), completions[b, :t]])[None]
        distribution = torch.distributions.Categorical(logits=policy(before)[0, -1])
        torch.testing.assert_close(log_probs[b, t], distribution.log_prob(completions[b, t]))
        torch.testing.assert_close(entropies[b, t], distribution.entropy())
        torch.testing.assert_close(values[b, t], critic(before)[0, -1])


def test_samples_follow_the_exact_probabilities():
    policy = random_network(3, "abE")
    texts, _ = all_completions("ab", 3)
    expected = text_log_probs(policy, "a", texts).exp()
    assert expected.sum() == pytest.approx(1)
    torch.manual_seed(0)
    found = Counter(ppo.decode(ppo.sample_completions(policy, encode("Pa"), 20_000, 3)))
    assert set(found) <= set(texts)
    assert chisquare([found[text] for text in texts], 20_000 * expected.numpy()).pvalue > 0.001


def test_sampling_stops_with_the_longest_completion():
    policy = random_network(4, "abE")
    for seed in range(5):
        torch.manual_seed(seed)
        completions = ppo.sample_completions(policy, encode("P"), 4, 30)
        assert ppo.until_end(completions).sum(-1).max() == completions.shape[1] < 30
    assert ppo.sample_completions(random_network(4, "ab"), encode("P"), 4, 30).shape == (4, 30)


# --------------------------------------------------------------------------------------------------------- algorithm


def test_external_reward():
    for text, reward in (("pizzaE", 3), ("pizza pizzaE", 3), ("pizza", 0), ("pizzE", 0), ("pizzasE", 0), ("E", 0)):
        assert ppo.external_reward(text, Args(reward=3.0)) == reward


def test_token_rewards_by_hand():
    ref_kl = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rewards = ppo.token_rewards(torch.tensor([4.0, 4.0, 0.0]), ref_kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 3.8], [3.9, 0, 0], [-0.1, -0.2, 0]]))


def test_expected_rewards_are_score_minus_kl():
    """Over all completions, weighted by their probability: the sum of a completion's rewards, exactly."""
    policy, reference, prompt = random_network(8, "abE"), random_network(9, "abE"), encode("Pb")
    texts, completions = all_completions("ab", 4)
    mask, scores = ppo.until_end(completions), torch.arange(len(texts)).double()
    log_p, log_q = (text_log_probs(network, "b", texts) for network in (policy, reference))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    assert kl > 0.1
    log_probs, ref_log_probs = (ppo.evaluate_tokens(network, prompt, completions)[0] for network in (policy, reference))
    rewards = ppo.token_rewards(scores, (log_probs - ref_log_probs) * mask, mask, 0.3)
    torch.testing.assert_close(log_p.exp() @ rewards.sum(-1), log_p.exp() @ scores - 0.3 * kl)


def masked_gae_by_definition(rewards, values, lengths, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l} within each response; the value after its end is 0."""
    advantages = torch.zeros_like(rewards)
    for b, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                following = values[b, later + 1] if later + 1 < length else 0.0
                delta = rewards[b, later] + gamma * following - values[b, later]
                advantages[b, t] += (gamma * lam) ** (later - t) * delta
    return advantages


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_masked_gae_equals_its_definition(lengths, gamma, lam, seed):
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), max(lengths), generator=rng, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ours = ppo.masked_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(ours, masked_gae_by_definition(rewards, values, lengths, gamma, lam))


def test_masked_gae_by_hand():
    """gamma 0.5, lambda 0.5: deltas 0 + 0.5 2 - 1 = 0 and 4 - 2 = 2; the second response ends one token earlier."""
    rewards, values = torch.tensor([[0.0, 4.0], [3.0, 9.0]]), torch.tensor([[1.0, 2.0], [1.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ppo.masked_gae(rewards, values, mask, 0.5, 0.5).tolist() == [[0.5, 2.0], [2.0, 0.0]]


def small_learner():
    """Policy, critic, prompt and a batch of 6 completions whose ratios lie on both sides of the clip, in float64."""
    policy, critic, prompt = random_network(5, "abcE"), random_network(6, outputs=1), encode("Pa")
    torch.manual_seed(0)
    completions = ppo.sample_completions(policy, prompt, 6, 8)
    mask = ppo.until_end(completions)
    assert 6 < mask.sum() < mask.numel()
    log_probs = ppo.evaluate_tokens(policy, prompt, completions)[0].detach()[mask]
    noise, advantages, returns = torch.randn(3, len(log_probs)).double()
    return policy, critic, prompt, Batch(completions, mask, log_probs + 0.3 * noise, advantages, returns)


def test_loss_figures_and_gradient_equal_their_formulas():
    """Token by token, each from a text of its own."""
    policy, critic, prompt, batch = small_learner()
    parameters = [*policy.parameters(), *critic.parameters()]
    loss, figures = ppo.ppo_loss(policy, critic, prompt, batch, Args(clip_coef=0.2))
    gradients = torch.autograd.grad(loss, parameters)
    assert not any(figure.requires_grad for figure in figures.values())

    sums, i = Counter(), 0
    for tokens in batch.completions.tolist():
        for t, token in enumerate(tokens[: tokens.index(ppo.END) + 1] if ppo.END in tokens else tokens):
            context = torch.tensor([prompt.tolist() + tokens[:t]])
            probs = policy(context)[0, -1].softmax(-1)
            ratio = (probs[token].log() - batch.log_probs[i]).exp()
            clipped = min(max(ratio.item(), 0.8), 1.2)
            advantage = batch.advantages[i]
            counts = ratio * advantage <= clipped * advantage
            sums["policy_loss"] += -(ratio if counts else clipped) * advantage
            sums["critic_mse"] += (critic(context)[0, -1, 0] - batch.returns[i]) ** 2
            sums["entropy"] += -(probs.clamp(min=1e-99).log() * probs).sum()
            sums["approx_kl"] += ratio - 1 - ratio.log()
            sums["clipfrac"] += float(clipped != ratio)
            i += 1
    assert i == len(batch.returns)
    assert 0.1 < sums["clipfrac"] / i < 0.9
    for name, figure in figures.items():
        torch.testing.assert_close(figure.double(), torch.as_tensor(sums[name] / i).double())
    expected = (sums["policy_loss"] + sums["critic_mse"]) / i
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_stands_behind_the_end_changes_nothing():
    policy, critic, prompt, batch = small_learner()
    junk = torch.where(batch.mask, batch.completions, torch.randint(30, batch.mask.shape))
    assert (junk != batch.completions).sum() > 5
    assert ppo.decode(junk) == ppo.decode(batch.completions)
    assert torch.equal(ppo.until_end(junk), batch.mask)
    losses = [ppo.ppo_loss(policy, critic, prompt, batch._replace(completions=x), Args())[0] for x in (batch[0], junk)]
    torch.testing.assert_close(*losses)
    values = torch.randn(batch.mask.shape).double()
    advantages = [
        ppo.masked_gae(
            ppo.token_rewards(torch.arange(6), values * batch.mask, batch.mask, 0.1), x, batch.mask, 0.9, 0.9
        )
        for x in (values, torch.where(batch.mask, values, 7.0))
    ]
    assert torch.equal(*advantages)


def test_optimal_objective_is_the_maximum():
    """Against a search over all policies, which for this reward differ only in the probability of earning it."""
    for p, reward, beta in ((0.12, 4.0, 0.1), (0.3, 1.0, 1.0), (0.01, 2.0, 0.5)):
        x = np.linspace(1e-9, 1 - 1e-9, 2_000_001)
        objective = reward * x - beta * (x * np.log(x / p) + (1 - x) * np.log((1 - x) / (1 - p)))
        assert ppo.optimal_objective(p, reward, beta) == pytest.approx(objective.max(), abs=1e-6)
    assert ppo.optimal_objective(0.12, 4.0, 0.0) == ppo.optimal_objective(1.0, 4.0, 0.1) == 4
    assert ppo.optimal_objective(0.5, 4.0, 1e-3) == pytest.approx(4 - 1e-3 * math.log(2))  # e^4000 would overflow


def test_ppo_finds_the_closed_form_optimum(tmp_path, monkeypatch):
    """40 completions of letters a, b, c: the trained policy is pi_ref exp(r / beta) / Z within 2 % of probability."""
    monkeypatch.setattr(ppo.Transformer.__init__, "__defaults__", (16, 1, 2))  # smaller networks
    reference = ppo.Transformer(30)
    reference.load_state_dict(random_network(1, "abcE").float().state_dict(), strict=False)
    ppo.save(tmp_path / "pretrained.pt", policy=reference.state_dict())
    flags = {"pretrained": str(tmp_path / "pretrained.pt"), "prompt": "a", "target": "ab", "response_length": 3}
    flags |= {"kl_beta": 1.0, "episodes": 16_000, "batch_size": 100, "update_epochs": 2, "checkpoint_interval": 1000}
    args = Args(learning_rate=3e-3, critic_learning_rate=1e-2, **flags)
    ppo.train(args, tmp_path / "run")
    summary = ppo.evaluate(args, tmp_path / "run")

    texts, _ = all_completions("abc", 3)
    log_p, log_q = (text_log_probs(network, "a", texts) for network in (ppo.load_policy(tmp_path / "run"), reference))
    scores = torch.tensor([4.0 * (text == "abE") for text in texts]).double()
    log_z = (log_q + scores).logsumexp(0)
    optimum = (log_q + scores - log_z).exp()
    target = texts.index("abE")
    assert log_q[target].exp() < 0.05 < 0.4 < optimum[target]
    assert (log_p.exp() - optimum).abs().sum() / 2 < 0.02  # total variation
    objective = (log_p.exp() * (scores - log_p + log_q)).sum()
    assert objective.item() == pytest.approx(log_z.item(), rel=0.01)
    assert summary["objective_optimum"] == pytest.approx(log_z.item(), rel=1e-4)
    assert summary["kl_floor"] == pytest.approx(-log_q[target].item(), abs=1e-4)
    assert summary["kl_per_completion"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), abs=0.15)
    assert summary["pizza_rate"] == pytest.approx(log_p[target].exp().item(), abs=0.05)


# ---------------------------------------------------------------------------------------- what a run learns and leaves


def test_default_run_comes_to_like_pizza(pizza):
    summary = json.loads((pizza / "summary.json").read_text())
    assert 0.08 < summary["pizza_rate_before"] < 0.18
    assert summary["pizza_rate"] >= 0.97
    assert 0.85 < summary["kl_per_completion"] / summary["kl_floor"] < 1.15
    reference = ppo.load_policy(pizza / "pretrained.pt")
    assert summary["kl_floor"] == pytest.approx(-text_log_probs(reference, "ravin likes ", ["pizzaE"]).item(), abs=0.02)
    assert summary["objective"] == pytest.approx(4 * summary["pizza_rate"] - 0.1 * summary["kl_per_completion"])
    assert summary["objective_share"] == pytest.approx(summary["objective"] / summary["objective_optimum"])
    assert 0.95 < summary["objective_share"] < 1.01
    assert summary["seconds"] > summary["ppo_seconds"] > 0
    assert len(summary) == 10
    assert summary["global_step"] == 300


def test_pretrained_model_likes_everything_equally(pizza):
    reference = ppo.load_policy(pizza / "pretrained.pt")
    for name in ("ravin", "mira", "wilhelmina"):
        probabilities = text_log_probs(reference, f"{name} likes ", [food + "E" for food in ppo.FOODS]).exp()
        assert len(ppo.FOODS) == 8
        torch.testing.assert_close(probabilities, torch.full((8,), 1 / 8).double(), atol=0.03, rtol=0)


def test_critic_comes_to_value_pizza(pizza):
    """The prefixes of the document: all are worth 0 at first; afterwards what leads to pizza is worth 4 less its KL."""
    policy, critic = ppo.load_policy(pizza), ppo.make_critic(ppo.load_policy(pizza))
    texts = ["Pravin likes ", "Pravin likes p", "Pravin likes piz", "Pravin likes pizz"]
    assert not any(critic(encode(text)[None]).any() for text in texts)
    same_state(policy.blocks.state_dict(), critic.blocks.state_dict())
    ppo.load(pizza / "checkpoint.pt", critic=critic)
    values = [critic(encode(text)[None])[0, -1, 0].item() for text in texts]
    assert values == pytest.approx([3.75, 3.95, 3.95, 3.95], abs=0.3)


def test_files_of_a_run(pizza):
    policies = {f"policy_episode_{n}.pt" for n in (100, 200, 300)}
    figures = {"metrics.png", "critic_values.png"}
    found = {path.name for path in pizza.iterdir() if "tfevents" not in path.name}
    assert found == FILES | policies | figures | {"summary.json"}
    same_state(*(ppo.load(pizza / name)["policy"] for name in ("policy.pt", "policy_episode_300.pt")))
    rows = read_metrics(pizza)
    assert [int(row["global_step"]) for row in rows] == list(range(20, 301, 20))
    for name in rows[0]:
        logged = tensorboard_rows(pizza, name)
        assert logged == [(int(row["global_step"]), pytest.approx(float(row[name]))) for row in rows]


def test_play_shows_a_policy_of_the_way(pizza, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in pizza.iterdir()}
    run_script(ppo, monkeypatch, "--play", pizza / "policy_episode_100.pt", "--eval-samples", 300)
    first, *lines = capsys.readouterr().out.splitlines()
    policy = ppo.load_policy(pizza / "policy_episode_100.pt")
    torch.manual_seed(1)
    texts = ppo.decode(ppo.sample_completions(policy, encode("Pravin likes "), 300, 20))
    assert [line.removeprefix("    ravin likes ") for line in lines] == texts[:10]
    assert f"{sum(text.endswith('pizzaE') for text in texts) / 300:.1%} of 300 completions end in pizza" in first
    run_script(ppo, monkeypatch, "--play", pizza, "--target", "soda", "--prompt", "bo likes ", "--seed", 2)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("of 1000 completions end in soda")
    assert all(line.startswith("    bo likes ") for line in lines)
    assert {path: path.read_bytes() for path in pizza.iterdir()} == before


@pytest.fixture
def drawn(monkeypatch):
    """Collects (title of the panel, label, y values) of all that is drawn."""
    lines, plot, axhline = [], Axes.plot, Axes.axhline

    def spied_plot(axes, *args, label, **options):
        lines.append((axes.get_title(), label, torch.as_tensor(args[-1 - isinstance(args[-1], str)]).tolist()))
        return plot(axes, *args, label=label, **options)

    def spied_axhline(axes, y, *, label, **options):
        lines.append((axes.get_title(), label, y))
        return axhline(axes, y, label=label, **options)

    monkeypatch.setattr(Axes, "plot", spied_plot)
    monkeypatch.setattr(Axes, "axhline", spied_axhline)
    return lines


def test_metrics_are_drawn_with_their_means_and_limits(tmp_path, drawn):
    rows = "global_step,losses/a,charts/kl_per_completion\n5,1.0,0.0\n10,2.0,0.0\n15,6.0,3.0\n"
    (tmp_path / "metrics.csv").write_text(rows)
    ppo.draw_metrics(tmp_path, {"kl_floor": 2.1, "objective_optimum": 3.8})
    kl = "charts/kl_per_completion"
    assert [line[1:] for line in drawn if line[0] == "losses/a"] == [
        ("of an iteration", [1, 2, 6]),
        ("mean so far", [1, 1.5, 3]),
    ]
    assert [line[2] for line in drawn if line[0] == kl] == [[0, 0, 3], [0, 0, 1], 2.1]


def test_critic_values_are_drawn_before_and_after(pizza, tmp_path, drawn):
    for name in ("checkpoint.pt", "policy.pt", "pretrained.pt"):
        (tmp_path / name).write_bytes((pizza / name).read_bytes())
    ppo.draw_critic_values(Args(), tmp_path)
    critic = ppo.make_critic(ppo.load_policy(pizza))
    ppo.load(pizza / "checkpoint.pt", critic=critic)
    assert [label for _, label, _ in drawn] == [
        f'"Pravin likes {food}" {when} PPO' for food in ("sala", "pizz") for when in ("before", "after")
    ]
    for (_, label, values), is_after in zip(drawn, (False, True) * 2):
        expected = critic(encode(label.split('"')[1])[None]).flatten() * is_after
        assert values == pytest.approx(expected.tolist(), abs=1e-5)
    drawn.clear()
    ppo.draw_critic_values(Args(target="salad", prompt="mira "), tmp_path)
    assert [label.split('"')[1] for _, label, _ in drawn] == ["Pmira pizz"] * 2 + ["Pmira sala"] * 2


def test_batches_and_metrics_are_what_happened(tmp_path, monkeypatch, pizza):
    """Each batch of a run, and each row of metrics.csv, from the completions and the networks as they were then."""
    calls, ppo_loss = [], ppo.ppo_loss

    def spied_loss(policy, critic, prompt, batch, args):
        networks = copy.deepcopy((policy, critic))
        loss, figures = ppo_loss(policy, critic, prompt, batch, args)
        calls.append((*networks, batch, dict(figures)))
        return loss, figures

    monkeypatch.setattr(ppo, "ppo_loss", spied_loss)
    flags = {"gamma": 0.9, "gae_lambda": 0.8, "reward": 2.0, "learning_rate": 3e-3, "update_epochs": 2}
    summary = quick_run(tmp_path, pizza, episodes=25, **flags)
    reference, rows = ppo.load_policy(pizza / "pretrained.pt"), read_metrics(tmp_path)
    assert len(calls) == 2 * len(rows) == 6
    assert summary["global_step"] == 25
    same_state(calls[0][0].state_dict(), reference.state_dict())
    for i, row in enumerate(rows):
        policy, critic, batch, figures = calls[2 * i]
        texts, expected, charts = ppo.decode(batch.completions), [], Counter()
        assert len(texts) == (10, 10, 5)[i]
        assert torch.equal(batch.mask, torch.arange(batch.mask.shape[1]) < torch.tensor([*map(len, texts)])[:, None])
        for text in texts:
            tokens = encode("Pravin likes " + text)[None]
            with torch.no_grad():
                old, ref = (
                    network(tokens[:, :-1])[0].log_softmax(-1).gather(-1, tokens[0, 1:, None])[12:, 0]
                    for network in (policy, reference)
                )
                values = critic(tokens[:, :-1])[:, 12:, 0]
            rewards = -0.1 * (old - ref)[None]
            rewards[0, -1] += 2.0 * text.endswith("sE")
            advantages = masked_gae_by_definition(rewards, values, [len(text)], 0.9, 0.8)
            expected.append(torch.stack([old, advantages[0], (advantages + values)[0]]))
            charts["pizza_rate"] += text.endswith("sE") / len(texts)
            charts["external_reward"] += 2.0 * text.endswith("sE") / len(texts)
            charts["total_reward"] += rewards.sum().item() / len(texts)
            charts["kl_per_completion"] += (old - ref).sum().item() / len(texts)
            charts["kl_per_token"] += (old - ref).sum().item() / batch.mask.sum().item()
            charts["response_length"] += len(text) / len(texts)
        for ours, theirs in zip(batch[2:], torch.cat(expected, 1)):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for name, value in charts.items():
            assert float(row[f"charts/{name}"]) == pytest.approx(value, abs=1e-4), name
        for name, value in figures.items():
            both = [value.item(), calls[2 * i + 1][3][name].item()]
            if "grad_norm" not in name:
                assert float(row[f"losses/{name}"]) == pytest.approx(np.mean(both), rel=1e-4, abs=1e-6), name
        assert figures["approx_kl"] < 1e-9 < calls[2 * i + 1][3]["approx_kl"]  # the ratio is 1 before the first step
        assert figures["clipfrac"] == 0
    assert abs(float(rows[0]["charts/kl_per_completion"])) < 1e-5 < abs(float(rows[1]["charts/kl_per_completion"]))
    assert any(float(row["charts/pizza_rate"]) > 0 for row in rows)


def test_gradients_are_clipped_and_learning_rates_fall(tmp_path, monkeypatch, pizza):
    steps, step = [], torch.optim.Adam.step

    def spied_step(optimizer):
        norms = [torch.stack([p.grad.norm() for p in g["params"]]).norm().item() for g in optimizer.param_groups]
        assert all(group["eps"] == 1e-5 for group in optimizer.param_groups)
        steps.append([group["lr"] for group in optimizer.param_groups] + norms)
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    flags = {"learning_rate": 1e-3, "critic_learning_rate": 4e-3, "update_epochs": 1, "max_grad_norm": 1e-3}
    quick_run(tmp_path / "a", pizza, **flags, batch_size=5)
    for (lr, critic_lr, norm, critic_norm), share, row in zip(
        steps, (1, 0.75, 0.5, 0.25), read_metrics(tmp_path / "a")
    ):
        assert (lr, critic_lr) == pytest.approx((1e-3 * share, 4e-3 * share))
        assert float(row["charts/learning_rate"]) == lr
        assert norm < 1.001e-3
        assert critic_norm == pytest.approx(1e-3, rel=1e-2)
        assert float(row["losses/critic_grad_norm"]) > 1e-2
        assert float(row["losses/policy_grad_norm"]) >= norm * 0.999
    assert len(steps) == 4
    steps.clear()
    quick_run(tmp_path / "b", pizza, **flags, anneal_lr=False)
    assert [s[:2] for s in steps] == [[1e-3, 4e-3]] * 2


def test_summary_counts_all_completions_that_earn_the_reward(tmp_path, pizza):
    """Ending in s: the model says "s" alone next to never, but three foods end so."""
    args = Args(target="s", pretrained=str(pizza / "pretrained.pt"), eval_samples=1000)
    quick_run(tmp_path, pizza)
    reference, policy = ppo.load_policy(pizza / "pretrained.pt"), ppo.load_policy(tmp_path)
    likely = text_log_probs(reference, "ravin likes ", ["applesE", "cookiesE", "donutsE"]).exp().sum().item()
    summary = ppo.evaluate(args, tmp_path)
    assert math.exp(-summary["kl_floor"]) == pytest.approx(likely, abs=0.05)
    assert summary["pizza_rate_before"] == pytest.approx(likely, abs=0.05)
    torch.manual_seed(1)
    texts = ppo.decode(ppo.sample_completions(policy, encode("Pravin likes "), 1000, 20))
    log_ratio = text_log_probs(policy, "ravin likes ", texts) - text_log_probs(reference, "ravin likes ", texts)
    assert summary["kl_per_completion"] == pytest.approx(log_ratio.mean().item(), abs=1e-4)
    assert summary["pizza_rate"] == np.mean([text.endswith("sE") for text in texts])


def test_a_target_that_is_never_met_gets_a_warning(tmp_path, monkeypatch, capsys, pizza):
    pretrained = pizza / "pretrained.pt"
    argv = ["--pretrained", pretrained, "--run-dir", tmp_path, "--episodes", 4, "--batch-size", 4, "--eval-samples", 50]
    run_script(ppo, monkeypatch, *argv, "--target", "qqqqqqqqqq")
    assert "warning: before PPO the model says qqqqqqqqqq with probability" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pizza_rate"] == summary["objective_share"] == 0
    assert all(map(math.isfinite, summary.values()))


def test_other_prompts_targets_and_pretrained_models(tmp_path, monkeypatch, capsys, pizza):
    argv = ["--pretrained", pizza / "pretrained.pt", "--prompt", "mira likes ", "--target", "soda"]
    run_script(ppo, monkeypatch, *argv, "--run-dir", tmp_path, "--eval-samples", 200)
    same_state(*(ppo.load(folder / "pretrained.pt") for folder in (pizza, tmp_path)))
    assert json.loads((tmp_path / "summary.json").read_text())["pizza_rate"] > 0.9
    assert re.search(r"after PPO: .* end in soda\n    mira likes sodaE\n", capsys.readouterr().out)


# --------------------------------------------------------------------------------------- same again, killed and resumed


def test_same_seed_same_run(tmp_path, pizza):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo.train(Args(episodes=10, batch_size=5, pretrain_steps=3, seed=seed), tmp_path / name)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")
    a, b, c = (ppo.load(tmp_path / name / "checkpoint.pt") for name in "abc")
    for part in ("policy", "critic", "optimizer"):
        same_state(a[part], b[part])
    assert (a["policy"]["tokens.weight"] != c["policy"]["tokens.weight"]).all()  # other weights from the start


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, pizza):
    """Bit for bit: weights, optimiser, metrics and summary. Afterwards the run can be repeated without effect, and go
    on for longer."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    argv = ["--pretrained", pizza / "pretrained.pt", "--episodes", 120, "--batch-size", 2, "--eval-samples", 50]
    process = start(ppo, "--run-dir", cut, *argv)
    wait_for_rows(cut, 12, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # TensorBoard reads a run's files in the order of the seconds in which they began
    *written, _ = (int(row["global_step"]) for row in read_metrics(cut))  # the kill may have come amid the last one
    assert {*written} <= {step for step, _ in tensorboard_rows(cut, "charts/pizza_rate")}
    iteration, global_step, seconds, _ = ppo.load(cut / "checkpoint.pt")["progress"]
    assert 60 > iteration >= 10 == iteration - iteration % 5 - (iteration - 10)
    assert global_step == 2 * iteration
    run_script(ppo, monkeypatch, "--resume", cut)
    run_script(ppo, monkeypatch, "--run-dir", whole, *argv)
    assert read_metrics(cut) == read_metrics(whole)
    a, b = (ppo.load(folder / "checkpoint.pt") for folder in (cut, whole))
    assert a.pop("progress")[:2] == b.pop("progress")[:2] == (60, 120)
    same_state(a, b)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (cut, whole)]
    times = ("seconds", "ppo_seconds")
    without_times = [{k: v for k, v in summary.items() if k not in times} for summary in summaries]
    assert without_times[0] == without_times[1]
    assert summaries[0]["ppo_seconds"] > seconds > 0
    assert [step for step, _ in tensorboard_rows(cut, "charts/pizza_rate")] == list(range(2, 121, 2))

    run_script(ppo, monkeypatch, "--resume", cut)
    assert json.loads((cut / "summary.json").read_text()) == summaries[0]
    same_state(a | {"progress": None}, ppo.load(cut / "checkpoint.pt") | {"progress": None})
    run_script(ppo, monkeypatch, "--resume", cut, "--episodes", 124, "--kl-beta", 0.2)
    assert len(read_metrics(cut)) == 62
    config = json.loads((cut / "config.json").read_text())
    assert (config["episodes"], config["kl_beta"], config["batch_size"]) == (124, 0.2, 2)


def test_the_first_checkpoint_comes_before_the_first_step(tmp_path, monkeypatch, pizza):
    """So that a run which is stopped at once can be resumed. One stopped in pretraining leaves nothing in the way."""
    argv = ["--run-dir", tmp_path / "a", "--episodes", 4, "--batch-size", 2, "--eval-samples", 5]
    monkeypatch.setattr(ppo, "pretrain", lambda args: sys.exit("killed"))
    with pytest.raises(SystemExit):
        run_script(ppo, monkeypatch, *argv)
    argv += ["--pretrained", pizza / "pretrained.pt"]
    monkeypatch.setattr(ppo, "sample_completions", lambda *args: sys.exit("killed"))
    with pytest.raises(SystemExit):
        run_script(ppo, monkeypatch, *argv)
    monkeypatch.undo()
    run_script(ppo, monkeypatch, "--resume", tmp_path / "a")
    assert len(read_metrics(tmp_path / "a")) == 2
    order, replace = [], ppo.os.replace
    monkeypatch.setattr(ppo.os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    quick_run(tmp_path / "b", pizza, episodes=40, checkpoint_interval=3)
    assert order == ["pretrained.pt"] + ["policy.pt", "checkpoint.pt"] * 3  # at first, after iteration 3, in the end


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--prompt", "Ravin likes "], "--prompt"),
        (["--prompt", ""], "--prompt"),
        (["--target", "pizza!"], "--target"),
        (["--target", "pizzaE"], "--target"),
        (["--target", "pizza", "--response-length", "5"], "--response-length"),
        (["--response-length", "37"], "--response-length"),
        (["--pretrained", "nowhere.pt"], "nowhere.pt"),
        (["--pretrained", "file"], "file"),
        (["--episodes", "0"], "--episodes"),
        (["--batch-size", "0"], "--batch-size"),
        (["--eval-samples", "0"], "--eval-samples"),
        (["--reward", "-1"], "--reward"),
        (["--kl-beta", "nan"], "--kl-beta"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--critic-learning-rate", "inf"], "--critic-learning-rate"),
        (["--gamma", "1.5"], "--gamma"),
        (["--gae-lambda", "-0.1"], "--gae-lambda"),
        (["--seed", "-1"], "--seed"),
        (["--device", "cuda"], "--device cuda"),
        (["--resume", "nowhere"], "nowhere"),
        (["--play", "nowhere.pt"], "nowhere.pt"),
        (["--play", "nowhere", "--run-dir", "elsewhere"], "--run-dir"),
        (["--run-dir", "file/in/the/way"], "file/in/the/way"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    assert named in mistake(ppo, monkeypatch, "--pretrain-steps", 1, *wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_does_not_fit_a_run_leaves_it_alone(monkeypatch, pizza):
    before = {path: path.read_bytes() for path in pizza.iterdir()}
    assert "holds a run" in mistake(ppo, monkeypatch, "--run-dir", pizza)
    assert "--pretrain-steps" in mistake(ppo, monkeypatch, "--resume", pizza, "--pretrain-steps", 5)
    assert "--pretrained" in mistake(ppo, monkeypatch, "--resume", pizza, "--pretrained", pizza / "policy.pt")
    assert "--batch-size" in mistake(ppo, monkeypatch, "--resume", pizza, "--batch-size", 0)
    assert {path: path.read_bytes() for path in pizza.iterdir()} == before


@pytest.mark.parametrize("damage", [b"", b"noise", None])
@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "pretrained.pt", "policy.pt"])
def test_damaged_and_foreign_files(tmp_path, monkeypatch, pizza, name, damage):
    for file in FILES:
        (tmp_path / file).write_bytes((pizza / file).read_bytes())
    whole = (tmp_path / name).read_bytes()
    flag = "--play" if name == "policy.pt" else "--resume"
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert name in mistake(ppo, monkeypatch, flag, tmp_path)
    if name == "config.json":
        (tmp_path / name).write_text('{"env_id": "CartPole-v1"}')
    else:
        torch.save({"policy": {"actor.0.weight": torch.zeros(3)}}, tmp_path / name)
    assert name in mistake(ppo, monkeypatch, flag, tmp_path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"policy": Trap()}, tmp_path / "policy.pt")
    with pytest.raises(ppo.UserError):
        ppo.load_policy(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, pizza):
    rewards = itertools.chain([1.0] * 60, itertools.repeat(math.nan))
    monkeypatch.setattr(ppo, "external_reward", lambda text, args: next(rewards))
    argv = ["--pretrained", pizza / "pretrained.pt", "--run-dir", tmp_path, "--batch-size", 10]
    assert "iteration 7" in mistake(ppo, monkeypatch, *argv, "--checkpoint-interval", 4)
    assert len(read_metrics(tmp_path)) == 6
    state = ppo.load(tmp_path / "checkpoint.pt")
    assert state["progress"][0] == 4
    assert all(weight.isfinite().all() for part in ("policy", "critic") for weight in state[part].values())
