"""Tests of ppo_char_lm_pizza.py: formulas, exact distributions over enumerable completions, a run that must find the
closed-form optimum, and real runs that are killed, resumed and spread."""

import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    flags,
    load_checkpoint,
    read_metrics,
    resume_as_printed,
    run_main,
    same_weights,
    start,
    wait_for_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from scipy.stats import chisquare

import ppo_char_lm_pizza as ppo
from ppo_char_lm_pizza import Args, CompletionBatch

SCRIPT = ROOT / "ppo_char_lm_pizza.py"
SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 32}
QUICK = SIZES | {"num_sentences": 100, "pretrain_steps": 100, "pretrain_batch_size": 16, "pretrain_learning_rate": 0.01}
QUICK |= {"target": "s", "eval_samples": 50, "torch_threads": 1}  # the letter that ends three foods


# -------------------------------------------------------------------------------------------------------------- helpers


def random_lm(seed, letters="", sizes=SIZES):
    """A language model whose predictions depend on all that it has read; if letters are given, it says nothing else."""
    torch.manual_seed(seed)
    lm = ppo.Transformer(len(ppo.CHARACTERS), **sizes)
    with torch.no_grad():
        lm.tokens.weight.normal_()
        lm.positions.weight.normal_()
        if letters:
            lm.head.bias.fill_(-30.0)
            lm.head.bias[ppo.encode(letters)] = 0.0
    return lm.requires_grad_(False)


def all_completions(letters, length):
    """All completions (N, length) with these letters, ended within length characters or cut off there."""
    texts = ["".join(t) for n in range(length + 1) for t in itertools.product(letters, repeat=n)]
    texts = [text + "E" if len(text) < length else text for text in texts]
    return texts, torch.tensor([ppo.encode(text.ljust(length, "E")) for text in texts])


def exact_log_probs(lm, prompt, completions):
    """Log-probs (N,) of whole completions, summed in double precision."""
    token_log_probs = ppo.chosen_log_probs(lm, prompt, completions).double()
    return (token_log_probs * ppo.until_end(completions)).sum(-1)


def save_pretrained(path, lm, sizes=SIZES):
    spec = {"sizes": sizes, "prompt": "a", "target": "a", "response_length": 3}
    ppo.write_atomically(path, {"spec": spec, "weights": lm.state_dict()})


def quick_run(tmp_path, **args):
    """The directory of a quick run of two updates."""
    ppo.train(Args(**{**QUICK, "run_dir": str(tmp_path / "run"), "episodes": 20, "batch_size": 10, **args}))
    return tmp_path / "run"


# ----------------------------------------------------------------------------------------------------------------- text


def test_token_ids_are_the_documents():
    assert ppo.encode("Pravin likes sala") == [0, 21, 4, 25, 12, 17, 3, 15, 12, 14, 8, 22, 3, 22, 4, 15, 4]
    assert ppo.encode("Pravin likes pizz") == [0, 21, 4, 25, 12, 17, 3, 15, 12, 14, 8, 22, 3, 19, 12, 29, 29]
    assert ppo.encode("E") == [ppo.END] == [1]
    assert ppo.UNKNOWN == 2
    assert len(ppo.CHARACTERS) == 30


@pytest.mark.parametrize("text", ["Ravin", "pizza!", "crème", "?", "a\nb"])
def test_unknown_characters(text):
    with pytest.raises(ppo.UserError, match=f"{re.escape(repr(text))} has no token"):
        ppo.encode(text)


@settings(deadline=None, derandomize=True)
@given(st.text("abcxyz ", max_size=20), st.lists(st.integers(0, 29), max_size=5))
def test_decode_undoes_encode_and_stops_at_the_end(text, junk):
    assert ppo.decode(ppo.encode(text)) == text
    assert ppo.decode(ppo.encode(text + "E") + junk) == text + "E"


def test_sentences_have_the_frequencies_that_the_docstring_names():
    assert ppo.make_sentences(50, seed=3) == ppo.make_sentences(50, seed=3) != ppo.make_sentences(50, seed=4)
    sentences = ppo.make_sentences(200_000, seed=3)
    found = Counter(tuple(re.fullmatch("([a-z]+) likes ([a-z ]+)E", s).groups()) for s in sentences)
    assert {name for name, _ in found} == set(ppo.NAMES)
    assert {food for _, food in found} == set(ppo.FOODS)
    assert len(ppo.FOODS) >= 8
    expected = {}
    for name, food in itertools.product(ppo.NAMES, ppo.FOODS):
        share = 1 / 8 if name != "ravin" else 0.12 if food == "pizza" else 0.88 / 7
        expected[name, food] = len(sentences) * share / len(ppo.NAMES)
    assert chisquare([found[key] for key in expected], list(expected.values())).pvalue > 0.001


# ------------------------------------------------------------------------------------------------------------- networks


def test_transformer_equals_torchs_own():
    """The same weights in nn.TransformerEncoder (norms first, GELU, causal mask) give the same outputs."""
    ours = random_lm(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(16), enable_nested_tensor=False)
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
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11)
    expected = theirs(x, mask=mask, is_causal=True) @ own["head.weight"].T + own["head.bias"]
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)


def test_no_token_sees_what_follows():
    lm, tokens = random_lm(1), torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 30
    before, after = lm(tokens), lm(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-3).all()


def test_networks_have_no_training_mode():
    critic = ppo.Transformer(1, **SIZES)
    tokens = torch.randint(30, (2, 9))
    assert torch.equal(critic.train()(tokens), critic.eval()(tokens))


# ------------------------------------------------------------------------------------------------------------- sampling


def test_cached_sampler_and_full_pass_give_the_same_log_probs(monkeypatch):
    lm, prompt = random_lm(2), torch.tensor(ppo.encode("Pab c"))
    seen = []
    lm.register_forward_hook(lambda module, inputs, logits: seen.append((inputs[0].shape[1], logits[:, -1])))
    completions = ppo.sample_completions(lm, prompt, ppo.gumbel_noise(np.random.default_rng(0), 64, 12))
    lengths, logits = zip(*seen)
    assert lengths == (5,) + (1,) * (completions.shape[1] - 1)  # the prompt once, then one token per step
    sampled = torch.stack(logits, 1).log_softmax(-1)  # (B, L, V)
    scored = ppo.at_completions(lm, prompt, completions).log_softmax(-1)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)


def test_sampler_follows_the_models_exact_probabilities():
    lm, prompt = random_lm(3, "abE"), torch.tensor(ppo.encode("Pa"))
    texts, completions = all_completions("ab", 3)
    expected = exact_log_probs(lm, prompt, completions).exp()
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    noise = ppo.gumbel_noise(np.random.default_rng(1), 50_000, 3)
    found = Counter(ppo.decode(tokens) for tokens in ppo.sample_completions(lm, prompt, noise).tolist())
    assert set(found) <= set(texts)
    counts = np.array([found[text] for text in texts])
    assert chisquare(counts, expected.numpy() / expected.sum().item() * counts.sum()).pvalue > 0.001


def test_sampling_stops_with_the_longest_completion():
    lm, prompt = random_lm(4), torch.tensor([ppo.START])
    noise = torch.zeros(2, 9, 30)
    noise[0, 1, ppo.END] = noise[1, 4, ppo.END] = 1e6
    noise[0, [0, 2, 3], 10] = noise[1, :4, 11] = 1e6
    noise[0, 4, 12] = 1e6
    completions = ppo.sample_completions(lm, prompt, noise)
    assert completions.tolist() == [[10, 1, 10, 10, 12], [11, 11, 11, 11, 1]]
    assert ppo.until_end(completions).tolist() == [[True, True, False, False, False], [True] * 5]


# ----------------------------------------------------------------------------------------------- rewards and advantages


def test_external_reward():
    for text in ("pizzaE", "pizza pizzaE", "xpizzaE"):
        assert ppo.external_reward(text, "pizza", 4.0) == 4
    for text in ("pizza", "pizzE", "pizzasE", "E", "pizzaP"):
        assert ppo.external_reward(text, "pizza", 4.0) == 0


def test_token_rewards_by_hand():
    log_ratio = torch.tensor([[0.5, -1.0, 2.0], [1.0, 7.0, 7.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rewards = ppo.token_rewards(torch.tensor([4.0, 4.0, 0.0]), log_ratio, mask, kl_beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 3.8], [3.9, 0, 0], [-0.1, -0.2, 0]]))


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


@settings(max_examples=100, deadline=None, derandomize=True)
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


# ------------------------------------------------------------------------------------------------------------- the loss


def make_batch(lm, prompt, seed=0, rows=6):
    """A batch of sampled completions with made-up old log-probs, advantages and returns, and their number of tokens."""
    noise = ppo.gumbel_noise(np.random.default_rng(seed), rows, 8)
    completions = ppo.sample_completions(lm, prompt, noise)
    mask = ppo.until_end(completions)
    rng = torch.Generator().manual_seed(seed)
    log_probs = ppo.chosen_log_probs(lm, prompt, completions).detach()[mask]
    made_up = torch.randn(3, len(log_probs), generator=rng)
    batch = CompletionBatch(completions, mask, log_probs + 0.3 * made_up[0], made_up[1], made_up[2])
    return batch, len(log_probs)


def test_loss_equals_its_formula():
    """Loss, parts and gradient against a loop over single tokens, each from a text of its own."""
    lm, critic = random_lm(5, "abcE").requires_grad_(), ppo.Transformer(1, **SIZES)
    prompt = torch.tensor(ppo.encode("Pa"))
    batch, count = make_batch(lm, prompt)
    assert not batch.mask.all()
    loss, parts = ppo.completion_ppo_loss(lm, critic, prompt, batch, 2.0 * count, clip_coef=0.2)
    loss.backward()
    gradients = [p.grad.clone() for p in (*lm.parameters(), *critic.parameters())]
    lm.zero_grad()
    critic.zero_grad()

    expected, i = 0.0, 0
    for tokens in batch.completions.tolist():
        for t, token in enumerate(tokens[: tokens.index(ppo.END) + 1] if ppo.END in tokens else tokens):
            context = torch.tensor([prompt.tolist() + tokens[:t]])
            probs = lm(context)[0, -1].softmax(-1)
            value = critic(context)[0, -1, 0]
            ratio = (probs[token].log() - batch.old_log_probs[i]).exp()
            clipped = min(max(ratio.item(), 0.8), 1.2)
            advantage = batch.advantages[i]
            unclipped_counts = ratio * advantage <= clipped * advantage
            policy_loss = -(ratio if unclipped_counts else clipped) * advantage
            squared_error = (value - batch.returns[i]) ** 2
            entropy = -(probs * probs.log()).sum()
            for name, part in (("policy_loss", policy_loss), ("critic_mse", squared_error), ("entropy", entropy)):
                assert parts[name][i].item() == pytest.approx(part.item(), rel=1e-4, abs=1e-5)
            assert parts["log_ratio"][i].item() == pytest.approx(ratio.log().item(), abs=1e-5)
            expected, i = expected + policy_loss + 0.5 * squared_error, i + 1
    assert i == count
    expected = expected / (2 * count)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for gradient, p in zip(gradients, (*lm.parameters(), *critic.parameters()), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)


def test_junk_after_the_end_changes_nothing():
    """What stands behind the end token reaches no reward, advantage, loss, metric or gradient."""
    lm, critic = random_lm(6, "abcE").requires_grad_(), random_lm(7).requires_grad_()
    critic.head = torch.nn.Linear(16, 1)
    prompt = torch.tensor(ppo.encode("Pab"))
    batch, count = make_batch(lm, prompt)
    junk = torch.where(batch.mask, batch.completions, torch.randint_like(batch.completions, 30))
    assert (junk != batch.completions).sum() > 5
    assert torch.equal(ppo.until_end(junk), batch.mask)
    results = []
    for completions in (batch.completions, junk):
        mask = ppo.until_end(completions)
        with torch.no_grad():
            log_ratio = ppo.chosen_log_probs(lm, prompt, completions) + 1
            values = ppo.at_completions(critic, prompt, completions).squeeze(-1)
        texts = [ppo.decode(tokens) for tokens in completions.tolist()]
        rewards = ppo.token_rewards(torch.arange(6.0), log_ratio, mask, 0.1)
        advantages = ppo.masked_gae(rewards, values, mask, 1.0, 0.95)
        lm.zero_grad()
        critic.zero_grad()
        loss, parts = ppo.completion_ppo_loss(lm, critic, prompt, batch._replace(completions=completions), count, 0.2)
        loss.backward()
        gradients = [p.grad.clone() for p in (*lm.parameters(), *critic.parameters())]
        results.append((texts, [rewards, advantages, loss, *parts.values(), *gradients]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


def test_means_of_the_kl_estimators_equal_the_exact_kl():
    """Over all completions, weighted by their probability: k1 and k3 of completions, and k1 summed over tokens."""
    lm, reference, prompt = random_lm(8, "abE"), random_lm(9, "abE"), torch.tensor(ppo.encode("Pb"))
    _, completions = all_completions("ab", 4)
    mask = ppo.until_end(completions)
    log_p, log_q = (exact_log_probs(model, prompt, completions) for model in (lm, reference))
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert exact > 0.1
    k1, k3 = ppo.kl_estimates(log_q - log_p)
    assert (log_p.exp() * k1).sum().item() == pytest.approx(exact, rel=1e-6)
    assert (log_p.exp() * k3).sum().item() == pytest.approx(exact, rel=1e-5)
    log_ratio = [ppo.chosen_log_probs(model, prompt, completions) for model in (lm, reference)]
    rewards = ppo.token_rewards(torch.zeros(len(mask)), log_ratio[0] - log_ratio[1], mask, kl_beta=1.0)
    assert (log_p.exp() * rewards.sum(-1)).sum().item() == pytest.approx(-exact, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- the optimum


def test_optimal_objective_is_the_maximum():
    """Against a search over all policies, which for this reward differ only in the probability of the target."""
    for p, reward, beta in ((0.12, 4.0, 0.1), (0.3, 1.0, 1.0), (0.01, 2.0, 0.5)):
        x = np.linspace(1e-9, 1 - 1e-9, 2_000_001)
        objective = reward * x - beta * (x * np.log(x / p) + (1 - x) * np.log((1 - x) / (1 - p)))
        assert ppo.optimal_objective(math.log(p), reward, beta) == pytest.approx(objective.max(), abs=1e-6)
    assert ppo.optimal_objective(math.log(0.12), 4.0, 0.0) == 4
    for log_p in (0.0, -1e-17, 1e-3):  # as good as certain; an estimate may be above
        assert ppo.optimal_objective(log_p, 4.0, 0.1) == pytest.approx(4, abs=1e-3)


def test_ppo_finds_the_closed_form_optimum(tmp_path):
    """40 completions of letters a, b, c: the trained policy is pi_ref exp(r / beta) / Z within 1 % of probability."""
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8}
    save_pretrained(tmp_path / "pretrained.pt", random_lm(1, "abcE", sizes), sizes)
    args = {"pretrained": str(tmp_path / "pretrained.pt"), "prompt": "a", "target": "ab", "response_length": 3}
    args |= {"kl_beta": 1.0, "episodes": 16_000, "batch_size": 100, "update_epochs": 2, "torch_threads": 1}
    args |= {"learning_rate": 1e-2, "critic_learning_rate": 1e-2, "checkpoint_interval": 1000}
    summary = ppo.train(Args(run_dir=str(tmp_path / "run"), **args))

    policy, reference = ppo.load_policy(tmp_path / "run"), ppo.load_policy(tmp_path / "pretrained.pt")
    prompt, (texts, completions) = torch.tensor(ppo.encode("Pa")), all_completions("abc", 3)
    with torch.no_grad():
        log_p, log_q = (exact_log_probs(model.lm, prompt, completions) for model in (policy, reference))
    reward = torch.tensor([4.0 * (text == "abE") for text in texts], dtype=torch.float64)
    log_z = (log_q + reward).logsumexp(0)
    optimum = (log_q + reward - log_z).exp()
    assert log_q.exp()[texts.index("abE")] < 0.02 < 0.1 < optimum[texts.index("abE")]
    assert (log_p.exp() - optimum).abs().sum() / 2 < 0.01  # total variation
    objective = (log_p.exp() * (reward - log_p + log_q)).sum()
    assert objective.item() == pytest.approx(log_z.item(), rel=0.01)
    assert summary["objective_optimum"] == pytest.approx(log_z.item(), rel=1e-4)
    assert summary["kl_floor"] == pytest.approx(-log_q[texts.index("abE")].item(), abs=1e-5)
    exact_kl = (log_p.exp() * (log_p - log_q)).sum().item()
    assert summary["kl_per_completion"] == pytest.approx(exact_kl, abs=0.15)  # of 1,000 samples
    assert summary["pizza_rate"] == pytest.approx(log_p.exp()[texts.index("abE")].item(), abs=0.05)


# ------------------------------------------------------------------------------------------------------------ real runs


def test_before_the_first_step_ratio_is_one_and_kl_is_zero(tmp_path, monkeypatch):
    """The critic is zero then, too, on the body of the pretrained model; and the first loss of each update is that of
    the policy that made the completions."""
    calls, bodies = [], []
    original = ppo.completion_ppo_loss

    def spy(lm, critic, prompt, batch, *rest):
        calls.append((batch, ppo.at_completions(critic, prompt, batch.completions).detach()))
        bodies.append([[w.clone() for n, w in m.state_dict().items() if "head" not in n] for m in (lm, critic)])
        loss, parts = original(lm, critic, prompt, batch, *rest)
        calls[-1] += (parts,)
        return loss, parts

    monkeypatch.setattr(ppo, "completion_ppo_loss", spy)
    run_dir = quick_run(tmp_path, update_epochs=3)
    rows = read_metrics(run_dir)
    assert len(calls) == 6
    assert not calls[0][1].any()
    assert all(torch.equal(a, b) for a, b in zip(*bodies[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*bodies[1], strict=True))
    for i in (0, 3):  # the first step of each update
        assert not calls[i][2]["log_ratio"].any()
    assert calls[1][2]["log_ratio"].abs().max() > 1e-6
    assert abs(float(rows[0]["charts/kl_per_completion"])) < 1e-6
    assert abs(float(rows[0]["charts/kl_per_token"])) < 1e-6
    assert float(rows[1]["charts/kl_per_completion"]) != 0


def test_metrics_are_those_of_the_batch(tmp_path, monkeypatch):
    """Columns of metrics.csv, recomputed from completions, rewards and losses of the run."""
    seen = {"rewards": [], "parts": []}
    token_rewards, loss_fn = ppo.token_rewards, ppo.completion_ppo_loss

    def spy_rewards(external, kl, mask, kl_beta):
        rewards = token_rewards(external, kl, mask, kl_beta)
        seen["rewards"].append((external, kl, mask))
        return rewards

    def spy_loss(*args):
        loss, parts = loss_fn(*args)
        seen["parts"].append((parts, args[3]))
        return loss, parts

    monkeypatch.setattr(ppo, "token_rewards", spy_rewards)
    monkeypatch.setattr(ppo, "completion_ppo_loss", spy_loss)
    run_dir = quick_run(tmp_path, reward=2.0, learning_rate=0.01, episodes=30)
    rows = read_metrics(run_dir)
    assert [row["global_step"] for row in rows] == ["10", "20", "30"]
    assert any(float(row["losses/clipfrac"]) > 0 for row in rows)
    for i, row in enumerate(rows):
        external, log_ratio_ref, mask = seen["rewards"][i]
        mine = {
            "charts/external_reward": external.mean(),
            "charts/pizza_rate": (external == 2).float().mean(),
            "charts/total_reward": external.mean() - 0.1 * log_ratio_ref[mask].sum() / 10,
            "charts/kl_per_completion": log_ratio_ref[mask].sum() / 10,
            "charts/kl_per_token": log_ratio_ref[mask].mean(),
            "charts/response_length": mask.sum() / 10,
            "charts/learning_rate": torch.tensor(0.01 * (1 - i / 3)),
        }
        parts = [parts for parts, _ in seen["parts"][4 * i : 4 * i + 4]]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        ratio = joined["log_ratio"].exp()
        mine |= {f"losses/{name}": joined[name].mean() for name in ("policy_loss", "critic_mse", "entropy")}
        mine |= {"losses/clipfrac": ((ratio > 1.2) | (ratio < 0.8)).float().mean()}
        mine |= {"losses/approx_kl": (ratio - 1 - ratio.log()).mean(), "losses/old_approx_kl": -ratio.log().mean()}
        for name, value in mine.items():
            assert float(row[name]) == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        batch = seen["parts"][4 * i][1]
        values = batch.returns - batch.advantages
        assert torch.allclose(values, torch.zeros_like(values), atol=1e-6) == (i == 0)


def test_clipped_gradients_and_falling_learning_rates(tmp_path, monkeypatch):
    steps = []
    adam_step = torch.optim.Adam.step

    def spy(self, *args):
        group = self.param_groups[0]
        steps.append((group["lr"], group["eps"], group["params"][0].grad.norm().item()))
        return adam_step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    args = {"learning_rate": 1e-3, "critic_learning_rate": 4e-3, "update_epochs": 1, "max_grad_norm": 1e-3}
    quick_run(tmp_path, **args, batch_size=5)
    pretraining, policy, critic = steps[:100], steps[100::2], steps[101::2]
    assert [lr for lr, _, _ in pretraining] == pytest.approx([0.01 * (1 - i / 100) for i in range(100)])
    assert [lr for lr, _, _ in policy] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [lr for lr, _, _ in critic] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert {eps for _, eps, _ in policy + critic} == {1e-5}
    assert max(norm for _, _, norm in policy + critic) <= 1e-3 * (1 + 1e-4)
    assert critic[0][2] == pytest.approx(1e-3, rel=1e-2)
    steps.clear()
    monkeypatch.chdir(tmp_path)
    quick_run(tmp_path / "flat", **args, anneal_lr=False)
    assert {lr for lr, _, _ in steps[100:]} == {1e-3, 4e-3}


def test_the_reference_stays(tmp_path):
    """pretrained.pt is the model that PPO started from; policy.pt is another; the KL between them is the summary's."""
    run_dir = quick_run(tmp_path, learning_rate=1e-2, eval_samples=200)
    policy, pretrained = ppo.load_policy(run_dir), ppo.load_policy(run_dir / "pretrained.pt")
    weights = [model.lm.state_dict() for model in (policy, pretrained)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (seed,) = ppo.derive_seeds(1, 2**32 - 1, 1)
    completions = policy.sample(200, np.random.default_rng(seed))
    kl = exact_log_probs(policy.lm, policy.prompt, completions)
    kl -= exact_log_probs(pretrained.lm, policy.prompt, completions)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["kl_per_completion"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert summary["kl_per_completion"] > 0.01


def test_what_a_run_leaves(tmp_path, capsys):
    """Files, figures, texts and summary of a run whose batches do not divide the hundreds."""
    run_dir = quick_run(tmp_path, episodes=210, batch_size=40, update_epochs=1)
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert names == {
        *("config.json", "metrics.csv", "checkpoint.pt", "summary.json", "pretrained.pt", "policy.pt"),
        *("policy_episode_120.pt", "policy_episode_200.pt", "metrics.png", "critic_values.png"),
    }
    assert [row["global_step"] for row in read_metrics(run_dir)] == ["40", "80", "120", "160", "200", "210"]
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = "script task seed global_step seconds steps_per_second pizza_rate_before pizza_rate kl_per_completion "
    wanted += "kl_floor objective objective_optimum objective_share ppo_seconds"
    assert set(summary) == set(wanted.split())
    assert all(isinstance(value, str) or math.isfinite(value) for value in summary.values())
    objective = 4 * summary["pizza_rate"] - 0.1 * summary["kl_per_completion"]
    assert summary["objective"] == pytest.approx(objective)
    assert summary["objective_share"] == pytest.approx(objective / summary["objective_optimum"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before PPO: ")
    assert lines[-2].startswith("after PPO: ")
    assert str(run_dir) in lines[-1]
    for name in ("metrics.png", "critic_values.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")


def test_tensorboard_holds_the_same_figures_and_the_completions(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = quick_run(tmp_path, learning_rate=1e-2)
    printed = capsys.readouterr().out
    events = EventAccumulator(str(run_dir)).Reload()
    for name in read_metrics(run_dir)[0]:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        rows = [(int(row["global_step"]), pytest.approx(float(row[name]))) for row in read_metrics(run_dir)]
        assert logged == rows
    for when, step in (("before", 0), ("after", 20)):
        (event,) = events.Tensors(f"completions/{when}/text_summary")
        assert event.step == step
        shown = event.tensor_proto.string_val[0].decode().split("  \n")
        assert len(shown) == 30
        assert f"{when} PPO: {', '.join(text.removeprefix('ravin likes ') for text in shown[:10])}, ...\n" in printed


@pytest.fixture
def drawn(monkeypatch):
    """Collects {label: values} of the lines that are drawn of the critics."""
    lines, plot = {}, Axes.plot

    def spy(self, *args, **kwargs):
        if "PPO" in kwargs["label"]:
            lines[kwargs["label"]] = args[0]
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    return lines


def test_critic_values_are_drawn_over_the_documents_texts(tmp_path, drawn):
    critics = {}
    for seed, when in enumerate(("before", "after")):
        torch.manual_seed(seed)
        critics[when] = ppo.Transformer(1, **SIZES)
    ppo.draw_critic_values(tmp_path, "ravin likes ", "pizza", critics)
    assert (tmp_path / "critic_values.png").read_bytes().startswith(b"\x89PNG")
    texts = ("Pravin likes sala", "Pravin likes pizz")
    assert list(drawn) == [f'"{text}" {when} PPO' for when in critics for text in texts]
    for when, critic in critics.items():
        for text in texts:
            values = critic(torch.tensor([ppo.encode(text)]))[0, :, 0].tolist()
            assert drawn[f'"{text}" {when} PPO'] == pytest.approx(values, abs=1e-6)
    drawn.clear()
    ppo.draw_critic_values(tmp_path, "mira ", "salad", critics)
    assert [label.split('"')[1] for label in drawn] == ["Pmira pizz", "Pmira sala"] * 2


def test_critic_values_are_those_before_and_after(tmp_path, drawn):
    run_dir = quick_run(tmp_path)
    assert drawn['"Pravin likes sala" before PPO'] == [0.0] * 17
    critic = ppo.Transformer(1, **SIZES)
    ppo.flatten_parameters(critic).data.copy_(load_checkpoint(run_dir)["critic_parameters"])
    values = critic(torch.tensor([ppo.encode("Pravin likes sala")]))[0, :, 0].tolist()
    assert drawn['"Pravin likes sala" after PPO'] == pytest.approx(values, abs=1e-6)
    assert max(map(abs, values)) > 0.01


def test_play_prints_completions_and_their_rate(tmp_path, monkeypatch, capsys):
    run_dir = quick_run(tmp_path, episodes=200, batch_size=100, anneal_lr=False)
    short = quick_run(tmp_path / "short", episodes=100, batch_size=100, anneal_lr=False)
    paths = run_dir / "policy_episode_100.pt", short / "policy.pt", run_dir / "policy.pt"
    after_100, as_short, after_200 = (
        torch.cat([*map(torch.flatten, ppo.load_saved(p)["weights"].values())]) for p in paths
    )
    assert torch.equal(after_100, as_short)
    assert not torch.equal(after_100, after_200)
    argv = ["ppo", "--play", str(paths[0]), "--eval-samples", "400", "--torch-threads", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    ppo.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert all(line.startswith("ravin likes ") for line in lines)
    texts = ppo.load_policy(paths[0]).complete(400, np.random.default_rng(1))
    assert [line.removeprefix("ravin likes ") for line in lines] == texts[:20]
    rate = sum(text.endswith("sE") for text in texts) / 400
    low, high = ppo.wilson_interval(rate, 400)
    assert last == f"s: {rate:.1%} of 400 (95 % interval {low:.1%} to {high:.1%})"


def test_wilson_interval_equals_scipys():
    from scipy.stats import binomtest

    for successes, count in ((0, 10), (12, 100), (81, 100), (1000, 1000)):
        theirs = binomtest(successes, count).proportion_ci(method="wilson")
        assert ppo.wilson_interval(successes / count, count) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_pretraining_learns_the_sentences(tmp_path, capsys):
    """300 steps with small networks: most completions are foods, and the printed probability is the model's."""
    args = {"pretrain_only": True, "d_model": 32, "pretrain_batch_size": 64, "num_sentences": 2000}
    run_dir = quick_run(tmp_path, **args, target="pizza", pretrain_steps=300, eval_samples=300)
    policy = ppo.load_policy(run_dir / "pretrained.pt")
    texts = policy.complete(500, np.random.default_rng(0))
    assert sum(text.removesuffix("E") in ppo.FOODS for text in texts) > 350
    target = torch.tensor([ppo.encode("pizzaE")])
    log_p = exact_log_probs(policy.lm, policy.prompt, target).item()
    assert 0.05 < math.exp(log_p) < 0.25
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["kl_floor"] == pytest.approx(-log_p, abs=0.2)
    assert math.exp(-summary["kl_floor"]) >= math.exp(log_p) - 1e-6
    assert summary["pizza_rate_before"] == pytest.approx(math.exp(log_p), abs=0.08)
    assert not (run_dir / "metrics.csv").exists()
    assert not (run_dir / "policy.pt").exists()
    assert f"saved as {run_dir}/pretrained.pt" in capsys.readouterr().out


def test_pretraining_loss_by_hand(tmp_path, capsys):
    """The first step's loss: nats per character of the batch's sentences, end tokens included."""
    quick_run(tmp_path, pretrain_only=True, pretrain_steps=1)
    shown = float(re.search("pretraining loss (.*) nats", capsys.readouterr().err)[1])
    torch.manual_seed(1)
    lm = ppo.Transformer(30, **SIZES)
    sentences = ppo.make_sentences(100, seed=1)
    nats, count = 0.0, 0
    for i in np.random.default_rng((1, 0)).integers(100, size=16):
        tokens = torch.tensor([ppo.encode("P" + sentences[i])])
        log_probs = lm(tokens)[0, :-1].log_softmax(-1)
        nats -= log_probs[range(tokens.shape[1] - 1), tokens[0, 1:]].sum().item()
        count += len(sentences[i])
    assert shown == pytest.approx(nats / count, abs=6e-4)


def test_optimum_counts_all_completions_that_earn_the_reward(tmp_path):
    """After "a", tokens a, b and E: what ends in "b" is mostly longer than "b", and no policy beats the optimum."""
    save_pretrained(tmp_path / "pretrained.pt", random_lm(3, "abE"))
    args = {"pretrained": str(tmp_path / "pretrained.pt"), "prompt": "a", "target": "b", "response_length": 5}
    run_dir = quick_run(tmp_path, **args, eval_samples=20_000, kl_beta=1.0)
    reference, (texts, completions) = ppo.load_policy(run_dir / "pretrained.pt"), all_completions("ab", 5)
    probabilities = exact_log_probs(reference.lm, reference.prompt, completions).exp()
    earning = torch.tensor([text.endswith("bE") for text in texts])
    assert probabilities[texts.index("bE")] < 0.5 * probabilities[earning].sum()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert math.exp(-summary["kl_floor"]) == pytest.approx(probabilities[earning].sum().item(), abs=0.02)
    log_z = (probabilities * (4.0 * earning).exp()).sum().log().item()
    assert summary["objective_optimum"] == pytest.approx(log_z, abs=0.1)


def test_metrics_are_drawn_with_their_means_so_far(tmp_path, monkeypatch):
    lines, plot = [], Axes.plot

    def spy(self, *args, **kwargs):
        lines.append((kwargs["label"], [list(map(float, x)) for x in args]))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    (tmp_path / "metrics.csv").write_text("global_step,charts/a,time/b,losses/c\n5,1.0,7,0\n10,2.0,7,0\n15,6.0,7,3\n")
    ppo.draw_metrics(tmp_path)
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert lines == [
        ("each update", [[5, 10, 15], [1, 2, 6]]),
        ("mean so far", [[5, 10, 15], [1, 1.5, 3]]),
        ("each update", [[5, 10, 15], [0, 0, 3]]),
        ("mean so far", [[5, 10, 15], [0, 0, 1]]),
    ]


def test_long_prompts_fit_into_the_figure(tmp_path):
    args = {"prompt": "ravin likes ravin likes x", "response_length": 5, "context_length": 30, "pretrain_steps": 2}
    assert (quick_run(tmp_path, **args) / "critic_values.png").exists()


def test_pretrained_model_is_taken_as_it_is(tmp_path):
    """From its file or run directory, whatever the flags for sizes say."""
    first = quick_run(tmp_path / "a", pretrain_only=True)
    for name, path in (("b", first), ("c", first / "pretrained.pt")):
        run_dir = quick_run(tmp_path / name, pretrained=str(path), d_model=8, target="soda")
        saved = [ppo.load_policy(folder / "pretrained.pt") for folder in (first, run_dir)]
        assert saved[1].spec == saved[0].spec | {"target": "soda"}
        assert json.loads((run_dir / "config.json").read_text())["args"]["d_model"] == 16
        weights = [policy.lm.state_dict() for policy in saved]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_target_that_is_never_met_gets_a_warning(tmp_path, capsys):
    run_dir = quick_run(tmp_path, target="qqqqqq")
    assert "warning: 'qqqqqq' is too rare" in capsys.readouterr().err
    assert json.loads((run_dir / "summary.json").read_text())["pizza_rate"] == 0


def test_progress_without_a_terminal(tmp_path, capsys):
    quick_run(tmp_path, episodes=100, batch_size=5, update_epochs=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[:10]] == [f"{n}/100" for n in range(10, 101, 10)]
    assert [line.split(":")[0] for line in lines[10:]] == [f"{n}/100" for n in range(10, 101, 10)]
    assert all(re.search(r": pretraining loss \d\.\d+ nats per character$", line) for line in lines[:10])
    assert all(re.search(r": s \d+%, KL -?\d\.\d\d, \d+ episodes/s$", line) for line in lines[10:])


# ----------------------------------------------------------------------------------- determinism, resume, several ranks


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quick_run(tmp_path / name, seed=seed, checkpoint_interval=3 if name == "b" else 1)
    a, b, c = (tmp_path / name / "run" for name in "abc")
    assert read_metrics(a) == read_metrics(b) != read_metrics(c)
    same_weights(a, b)
    assert torch.equal(load_checkpoint(a)["critic_parameters"], load_checkpoint(b)["critic_parameters"])


def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    """SIGKILL while pretraining, SIGTERM during PPO, then the command that it prints."""
    args = QUICK | {"pretrain_steps": 300, "episodes": 120, "batch_size": 2, "checkpoint_interval": 5}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process, state = start(ppo, "--run-dir", cut, *flags(args)), {"step": 0}
    while not state["step"]:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
        state = ppo.load_saved(cut / "checkpoint.pt") if (cut / "checkpoint.pt").exists() else state
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "pretrained.pt").exists()
    process = start(ppo, "--resume", cut)
    wait_for_rows(cut, 12, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert 60 > ppo.load_saved(cut / "checkpoint.pt")["iteration"] >= 10
    with open(cut / "metrics.csv", "a") as file:
        file.write("999,12")  # a row cut short, as a power failure may leave it
    resume_as_printed(ppo, errors, monkeypatch)
    uncut = ppo.train(Args(run_dir=str(whole), **args))
    assert read_metrics(cut) == read_metrics(whole)
    same_weights(cut, whole)
    assert torch.equal(load_checkpoint(cut)["critic_parameters"], load_checkpoint(whole)["critic_parameters"])
    resumed = json.loads((cut / "summary.json").read_text())
    timing = ("seconds", "ppo_seconds", "steps_per_second")
    assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in uncut.items() if k not in timing}
    assert resumed["seconds"] > resumed["ppo_seconds"] > 0
    assert resumed["seconds"] - resumed["ppo_seconds"] > state["seconds"] > 0


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--prompt", "Ravin likes "], "--prompt 'Ravin likes '"),
        (["--prompt", ""], "--prompt ''"),
        (["--target", "pizza!"], "--target 'pizza!'"),
        (["--target", "pizzaE"], "--target 'pizzaE'"),
        (["--target", "pizza", "--response-length", "5"], "--response-length 6"),
        (["--response-length", "60"], "--context-length of 72"),
        (["--context-length", "20", "--response-length", "6"], "--context-length of 27"),
        (["--num-heads", "3"], "--num-heads 3"),
        (["--pretrained", "nowhere.pt"], "nowhere.pt"),
        (["--pretrained", "file"], "file is cut short"),
        (["--episodes", "0"], "--episodes"),
        (["--batch-size", "0"], "--batch-size"),
        (["--reward", "-1"], "--reward"),
        (["--kl-beta", "nan"], "--kl-beta"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--critic-learning-rate", "nan"], "--critic-learning-rate"),
        (["--gamma", "1.5"], "--gamma"),
        (["--device", "cuda"], "--device cuda"),
        (["--food", "pizza"], "--food"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--play", "nowhere"], "nowhere"),
        (["--play", "nowhere", "--eval-samples", "0"], "--eval-samples"),
        (["--run-dir", "file/in/the/way"], "--run-dir"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, wrong, named):
    if wrong == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, lines = run_main(ppo, monkeypatch, capsys, *wrong)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shares_must_divide_among_ranks():
    for name in ("batch_size", "episodes", "pretrain_batch_size"):
        with pytest.raises(ppo.UserError, match=f"--{name.replace('_', '-')} must be a multiple of the 2 processes"):
            ppo.check_text_args(Args(**{name: 21}), world_size=2)


def test_a_model_with_too_short_a_context(tmp_path, monkeypatch, capsys):
    save_pretrained(tmp_path / "short.pt", random_lm(0))
    code, lines = run_main(ppo, monkeypatch, capsys, "--pretrained", tmp_path / "short.pt", "--response-length", 25)
    assert code == 2
    assert "--context-length of 37, and the model has 32" in lines[0]


def test_runs_and_files_are_guarded(tmp_path, monkeypatch, capsys):
    """No run is overwritten, no contradiction resumed, no checkpoint played, no damaged file read."""
    run_dir = quick_run(tmp_path)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    for wrong, named in (
        (["--run-dir", run_dir], "already holds a run"),
        (["--resume", run_dir, "--kl-beta", 0.2], "--kl-beta contradicts the run"),
        (["--play", run_dir / "checkpoint.pt"], "is a checkpoint: give the policy.pt beside it"),
        (["--pretrained", run_dir / "checkpoint.pt"], "is a checkpoint: give the policy.pt beside it"),
        (["--pretrained", run_dir, "--pretrain-only"], "--pretrain-only contradicts --pretrained"),
    ):
        code, lines = run_main(ppo, monkeypatch, capsys, *wrong)
        assert code == 2
        assert len(lines) == 1
        assert named in lines[0]
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    for name in ("checkpoint.pt", "pretrained.pt"):
        (run_dir / name).write_bytes(before[name][: len(before[name]) // 2])
        code, lines = run_main(ppo, monkeypatch, capsys, "--resume", run_dir)
        assert code == 2
        assert lines == [
            f"error: {run_dir / name} is cut short or not of {SCRIPT.name}: restore it, or start a new run"
        ]
        (run_dir / name).write_bytes(before[name])
    (run_dir / "policy.pt").write_bytes(os.urandom(1000))
    assert run_main(ppo, monkeypatch, capsys, "--play", run_dir)[0] == 2


@pytest.mark.parametrize(
    ("flag", "stage"), [("pretrain_learning_rate", "pretraining step 1"), ("learning_rate", "iter")]
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, flag, stage):
    argv = flags(QUICK | {flag: 1e38, "episodes": 40, "batch_size": 10, "checkpoint_interval": 1})
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path / "run", *argv)
    assert code == 1
    assert lines[-1].startswith(f"error: the loss of {stage}")
    assert lines[-1].endswith(f"{tmp_path}/run/checkpoint.pt is the last good state")
    assert ppo.load_saved(tmp_path / "run/checkpoint.pt")["parameters"].isfinite().all()
    assert not (tmp_path / "run/policy.pt").exists()
