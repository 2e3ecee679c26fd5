"""ppo_rlhf_token.py: the 22 details of token-level RLHF, each by number, known optima, data, models, and real runs."""

import copy
import itertools
import json
import math
import random
import signal
import sys

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from helpers import (
    flags,
    load_checkpoint,
    read_metrics,
    run_main,
    run_two_ranks,
    same_weights,
    start,
    wait_for_rows,
)
from torch import nn
from torch.nn import functional

import ppo_rlhf_token as ppo

CPU = torch.device("cpu")
PAD, END = 0, 1
SMALL = {
    "sft_steps": 12,
    "sft_batch_size": 16,
    "num_feedback": 40,
    "reward_steps": 6,
    "reward_batch_size": 8,
    "total_episodes": 48,
    "batch_size": 16,
    "num_minibatches": 2,
    "micro_batch_size": 4,
    "response_length": 10,
    "eval_samples": 20,
    "checkpoint_interval": 1,
    "torch_threads": 1,
}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """The embedded model, smaller still."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(ppo, "EMBEDDED_SIZES", ppo.EMBEDDED_SIZES | sizes | {"initializer_range": 0.15})
    monkeypatch.setattr(ppo, "NUM_REVIEWS", 200)


def make_folder(folder, kind):
    """A random model of one of three architectures, with a tokenizer of its kind: of words, of bytes without a padding
    token, of characters with a start token."""
    text = ["the soup was great . the tea was cold . we loved it ."]
    if kind == "qwen2":
        tokenizer = ppo.make_tokenizer([ppo.Row(text[0])])
        sizes = ppo.EMBEDDED_SIZES
    elif kind == "gpt2":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(text, trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        special = ["<unk>", "<s>", "</s>", "<pad>"]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
        model.train_from_iterator(text, trainer)
        model.decoder = tokenizers.decoders.Fuse()
        model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    config.update({"initializer_range": 0.15} | {name: 0.3 for name in config.to_dict() if name.endswith("dropout")})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


KINDS = ("qwen2", "gpt2", "llama")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_policy(tmp_path, kind="qwen2", **args):
    """A policy with a random model of this kind, its tokenizer, and the flags."""
    folder = make_folder(tmp_path / kind, kind)
    args = ppo.Args(model=folder, max_prompt_length=20, response_length=12, **args)
    tokenizer = ppo.load_tokenizer(folder, "--model")
    ppo.set_padding(tokenizer)
    lm = ppo.load_lm(folder, tokenizer, args, CPU)
    return ppo.Model(ppo.Body(lm, args), lm.get_output_embeddings()), tokenizer, args


def random_texts(policy, count=6, seed=0):
    """Prompts and responses of different lengths; every other response ends."""
    rng = np.random.default_rng(seed)
    end_id = policy.body.lm.config.eos_token_id
    words = [i for i in range(policy.head.weight.shape[0]) if i not in (end_id, policy.body.lm.config.pad_token_id)]
    prompts = [rng.choice(words, rng.integers(1, 8)).tolist() for _ in range(count)]
    responses = [rng.choice(words, rng.integers(1, 9)).tolist() + [end_id] * (i % 2) for i in range(count)]
    return prompts, responses


def naive_log_probs(policy, prompt, response, temperature):
    """Log-probs of one response's tokens by the model's own forward pass of the bare text: no padding, no slicing."""
    lm = policy.body.lm
    logits = lm(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double()
    logits[:, lm.config.pad_token_id] = -math.inf
    logits = logits / temperature
    return torch.stack(
        [
            logits[len(prompt) + t - 1, token] - logits[len(prompt) + t - 1].logsumexp(0)
            for t, token in enumerate(response)
        ]
    )


# ---------------------------------------------------------------------------------- the 22 details, one after the other


@every_kind
def test_01_02_03_04_padding_positions_slices_and_temperature(tmp_path, kind):
    """Points 1 to 4: whatever is padded, a token's log-prob is that of the bare text, read one position before it."""
    policy, tokenizer, _ = make_policy(tmp_path, kind)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    prompts, responses = random_texts(policy)
    with torch.no_grad():
        expected = torch.cat([naive_log_probs(policy, *pair, 0.7) for pair in zip(prompts, responses)])
        for extra in (0, 5):
            longest = max(map(len, prompts)), max(map(len, responses))
            more_prompts = [*prompts, [2] * (longest[0] + extra)]
            more_responses = [*responses, [2] * (longest[1] + extra)]
            texts = ppo.to_texts(policy, more_prompts, more_responses)
            log_probs = ppo.of_chosen(policy.log_probs(policy.hidden_states(texts)[texts.before], 0.7), texts.chosen)
            assert (log_probs[: len(expected)] - expected).abs().max() < 1e-5


def test_01_padding_is_a_token_of_its_own():
    """Point 1: a token that ends texts is no padding, or it would be masked."""
    tokenizer = ppo.make_tokenizer([ppo.Row("a b")])
    tokenizer.pad_token = tokenizer.eos_token
    ppo.set_padding(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_02_positions():
    """Point 2: cumsum(mask) - mask."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert ppo.position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_03_texts():
    """Point 3: prompts end and responses begin in one column; `before` is one to the left of each response token."""
    texts = ppo.pad([[5, 6, 7], [8]], [[9], [10, 11, 1]], PAD, CPU)
    assert texts.tokens.tolist() == [[5, 6, 7, 9, 0, 0], [0, 0, 8, 10, 11, 1]]
    assert texts.mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert texts.chosen.tolist() == [9, 10, 11, 1]
    assert texts.before.tolist() == [2, 6 + 2, 6 + 3, 6 + 4]
    assert texts.last.tolist() == [3, 6 + 5]


def test_04_sampling_divides_by_the_temperature(tmp_path):
    """Point 4: sampled first tokens follow softmax(logits / temperature), with the cache as without."""
    policy, _, _ = make_policy(tmp_path)
    torch.manual_seed(0)
    first = [r[:2] for r in ppo.generate(policy, [[4, 5, 6], [5]] * 4000, 2, temperature=0.5)]
    for prompt, samples in (([4, 5, 6], first[::2]), ([5], first[1::2])):
        probs = torch.stack([naive_log_probs(policy, prompt, [token], 0.5)[0] for token in range(1, 13)]).exp()
        counts = np.bincount([sample[0] for sample in samples], minlength=13)[1:]
        assert np.abs(counts / 4000 - probs.numpy(force=True)).max() < 0.03
        likely = probs.argmax().item() + 1
        follow = [sample[1] for sample in samples if sample[0] == likely and len(sample) == 2]
        probs = [naive_log_probs(policy, [*prompt, likely], [token], 0.5)[0].exp().item() for token in range(1, 13)]
        assert np.abs(np.bincount(follow, minlength=13)[1:] / len(follow) - probs).max() < 0.06


def test_05_a_ratio_that_is_not_one_stops_the_run(tmp_path, monkeypatch, capsys):
    """Point 5: the run says |ratio - 1| = 0 where all is well, and stops where a model has noise."""
    ppo.train(ppo.Args(run_dir=str(tmp_path / "good"), **SMALL, temperature=0.8))
    assert "|ratio - 1| <= 0.0e+00, |log pi - log pi_ref| <= 0.0e+00" in capsys.readouterr().out
    forward = ppo.Model.hidden_states
    monkeypatch.setattr(ppo.Model, "hidden_states", lambda self, texts: functional.dropout(forward(self, texts), 1e-3))
    code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path / "bad", *flags(SMALL))
    assert code == 1
    assert "before the first step, |ratio - 1| <= " in lines[-1]


@every_kind
def test_06_no_dropout_is_left(tmp_path, kind):
    """Point 6: the model's own dropout, written as 0.3 into its folder, is off, and LoRA has none."""
    policy, _, args = make_policy(tmp_path, kind, lora_rank=2)
    policy.body.add_adapter("policy", args)
    rates = [layer.p for layer in policy.body.lm.modules() if isinstance(layer, nn.Dropout)]
    config = policy.body.lm.config.to_dict()
    assert not any(rates)
    assert not any(value for name, value in config.items() if "drop" in name)


def test_07_nothing_follows_the_first_end_token(tmp_path):
    """Point 7: a response stops at its end token, which is learned from; what the batch sampled after it is gone."""
    policy, _, _ = make_policy(tmp_path)
    torch.manual_seed(0)
    prompts = [[4, 5]] * 300
    responses = ppo.generate(policy, prompts, 12, 1.0)
    assert all(END not in response[:-1] for response in responses)
    assert any(response[-1] == END and len(response) < 12 for response in responses)
    assert any(response[-1] != END and len(response) == 12 for response in responses)
    texts = ppo.to_texts(policy, prompts, responses)
    assert len(texts.chosen) == sum(map(len, responses))
    assert (texts.chosen == END).sum() == sum(response[-1] == END for response in responses)


def spied_run(tmp_path, monkeypatch, **args):
    """Runs PPO and returns what its functions were given and gave, call by call."""
    calls = {"score_tokens": [], "token_rewards": [], "masked_gae": [], "add_gradient": []}

    def spy(name):
        function = getattr(ppo, name)

        def wrapped(*given):
            result = function(*given)
            calls[name].append((given, result))
            return result

        monkeypatch.setattr(ppo, name, wrapped)

    for name in calls:
        spy(name)
    run_dir = tmp_path / "run"
    ppo.train(ppo.Args(**(SMALL | {"run_dir": str(run_dir), "reward_fn": reward_file(tmp_path)} | args)))
    return run_dir, calls


def reward_file(folder, body="return [float(len(text.split())) for text in responses]"):
    """FILE.py:NAME of a reward function."""
    (folder / "reward.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    return f"{folder / 'reward.py'}:reward"


def test_08_a_response_without_an_end_costs(tmp_path, monkeypatch):
    """Point 8: the score of a response that was cut off is its score less missing_eos_penalty."""
    _, calls = spied_run(tmp_path, monkeypatch, missing_eos_penalty=3.5, response_length=4)
    scores, _, mask, _ = calls["token_rewards"][0][0]
    tokens = torch.cat([given[3].chosen for given, _ in calls["score_tokens"][:4]]).split(mask.sum(-1).tolist())
    cut = [END not in row.tolist() for row in tokens]
    words = [len(row) - (not is_cut) for row, is_cut in zip(tokens, cut)]
    assert 0 < sum(cut) < len(cut)
    assert scores.tolist() == [count - 3.5 * is_cut for count, is_cut in zip(words, cut)]


def test_09_kl_estimates_mean_the_exact_kl():
    """Point 9: over all tokens of a policy, k1 and k3 have the mean KL(pi || pi_ref), and beta k1 is taken off."""
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    k1, k3 = ppo.kl_estimates(log_q - log_p)
    assert (log_p.exp() * k1).sum() == pytest.approx(exact.item())
    assert (log_p.exp() * k3).sum() == pytest.approx(exact.item())
    assert (k3 >= 0).all()
    rewards = ppo.token_rewards(torch.zeros(1).double(), k1[None], torch.ones(1, 7, dtype=torch.bool), 0.3)
    assert torch.allclose(rewards[0], -0.3 * (log_p - log_q))


def test_10_the_score_is_at_the_last_token():
    """Point 10: on the end token, or on the last one of a response that was cut off; nothing outside the mask."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    kl = torch.tensor([[0.5, 1.0, 9.0], [0.0, 1.0, 2.0], [2.0, 9.0, 9.0]])
    rewards = ppo.token_rewards(torch.tensor([4.0, 2.0, -1.0]), kl, mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 3.9, 0.0], [0.0, -0.1, 1.8], [-1.2, 0.0, 0.0]]))


def test_11_gae():
    """Point 11: by hand, with a value of 0 after the end, whatever stands there."""
    assert (ppo.Args().gamma, ppo.Args().gae_lambda) == (1.0, 0.95)
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    last = 1.0 - 0.25
    first = 0.0 + 0.25 - 0.5 + 0.95 * last
    assert torch.allclose(ppo.masked_gae(rewards, values, mask, 1.0, 0.95), torch.tensor([[first, last, 0.0]]))


def test_12_13_returns_are_from_advantages_before_whitening(tmp_path, monkeypatch):
    """Points 12 and 13: returns = advantages + values; advantages are whitened over all tokens after that."""
    _, calls = spied_run(tmp_path, monkeypatch, update_epochs=1)
    (_, values, mask, *_), advantages = calls["masked_gae"][0]
    parts = [given[2] for given, _ in calls["add_gradient"][:4]]
    returns = torch.cat([part.returns for part in parts])
    expected = (advantages + values)[mask]
    assert torch.allclose(returns.sort().values, expected.sort().values)
    whitened = torch.cat([part.advantages for part in parts])
    assert whitened.mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened.std().item() == pytest.approx(1, abs=1e-4)
    raw = advantages[mask]
    assert torch.allclose(whitened.sort().values, ((raw - raw.mean()) / raw.std()).sort().values, atol=1e-5)


def test_13_whitening_of_rewards_keeps_their_mean():
    """Point 13: without a shift the std becomes 1 and the mean stays."""
    x = torch.tensor([1.0, 2.0, 6.0])
    assert ppo.whiten(x).tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    assert ppo.whiten(x, shift_mean=False).tolist() == pytest.approx([3 - 2 / 7**0.5, 3 - 1 / 7**0.5, 3 + 3 / 7**0.5])


def make_part(policy, critic, args, seed=0, count=8):
    """Experience with random advantages, returns and old log-probs near those of the policy, and its texts."""
    prompts, responses = random_texts(policy, count, seed)
    texts = ppo.to_texts(policy, prompts, responses)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        log_probs, values, _, _ = ppo.score_tokens(policy, critic, policy, texts, args)
    noise = torch.randn(4, len(log_probs), generator=rng)
    columns = log_probs + 0.3 * noise[0], values + 0.3 * noise[1], noise[2], values + noise[3]
    return prompts, responses, columns


@pytest.mark.parametrize("critic_kind", ["shared", "separate"])
def test_14_loss_and_its_gradient(tmp_path, critic_kind):
    """Point 14: -min(r A, clip(r) A) + 0.1 / 2 max((V - R)^2, (clip(V) - R)^2), summed over tokens; the gradient equals
    that of the same formula on each bare text."""
    policy, _, args = make_policy(tmp_path, critic=critic_kind, temperature=0.8)
    assert (args.vf_coef, args.clip_coef, args.clip_vloss) == (0.1, 0.2, True)
    critic = ppo.scalar_model(policy, "critic" if critic_kind == "separate" else None, args)
    nn.init.normal_(critic.head.weight)
    prompts, responses, columns = make_part(policy, critic, args)
    part = ppo.Part(ppo.to_texts(policy, prompts, responses), *columns)
    module = nn.ModuleList([policy.body.lm, critic.body.lm, critic.head])
    flat = ppo.flatten_parameters(module)
    ppo.add_gradient(policy, critic, part, args)
    gradient = flat.grad.clone()
    flat.grad.zero_()
    lengths = [len(response) for response in responses]
    total = 0
    for prompt, response, old, old_value, advantage, ret in zip(
        prompts, responses, *(x.split(lengths) for x in columns)
    ):
        ratio = (naive_log_probs(policy, prompt, response, 0.8) - old).exp()
        hidden = critic.body.lm.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        value = critic.head(hidden)[len(prompt) - 1 : -1, 0]
        clipped = old_value + (value - old_value).clamp(-0.2, 0.2)
        total = total - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        total = total + 0.1 * 0.5 * torch.max((value - ret) ** 2, (clipped - ret) ** 2).sum()
    total.backward()
    assert gradient.norm() > 1
    assert torch.allclose(gradient, flat.grad, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("critic_kind", ["shared", "separate"])
def test_15_micro_batches_do_not_change_the_gradient(tmp_path, critic_kind):
    """Point 15: one micro-batch of 8 and 8 of one, of different lengths, give equal gradients."""
    policy, _, args = make_policy(tmp_path, critic=critic_kind)
    critic = ppo.scalar_model(policy, "critic" if critic_kind == "separate" else None, args)
    prompts, responses, columns = make_part(policy, critic, args)
    flat = ppo.flatten_parameters(nn.ModuleList([policy.body.lm, critic.body.lm, critic.head]))
    gradients = []
    for size in (8, 1):
        flat.grad.zero_()
        start = 0
        for i in range(0, 8, size):
            texts = ppo.to_texts(policy, prompts[i : i + size], responses[i : i + size])
            rows = slice(start, start + len(texts.chosen))
            ppo.add_gradient(policy, critic, ppo.Part(texts, *(x[rows] for x in columns)), args)
            start = rows.stop
        gradients.append(flat.grad.clone())
    assert gradients[0].norm() > 0.1
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item())


def test_15_micro_batches_of_a_run(tmp_path):
    """Point 15, in the loop: the first gradient is the same whatever the micro-batches, and so is what comes of it."""
    args = {"reward_fn": reward_file(tmp_path), "update_epochs": 1}
    runs = [quick_run(tmp_path, f"{size}", micro_batch_size=size, **args)[0] for size in (1, 8)]
    rows = [[float(x) for x in read_metrics(run_dir)[0].values()] for run_dir in runs]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)


def test_16_optimiser(tmp_path, monkeypatch):
    """Point 16: Adam with eps 1e-5, a learning rate that falls linearly to 0, the gradient norm clipped at 1."""
    seen, step = [], torch.optim.Adam.step

    def spy(self):
        (group,) = self.param_groups
        (parameters,) = group["params"]
        seen.append((len(parameters), group["lr"], group["eps"], parameters.grad.norm().item()))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    args = {"max_grad_norm": 0.01, "update_epochs": 1, "sft_steps": 4, "sft_learning_rate": 0.4, "learning_rate": 3e-4}
    assert ppo.Args().max_grad_norm == 1
    run_dir, _ = spied_run(tmp_path, monkeypatch, **args)
    assert [lr for _, lr, _, _ in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1, *[3e-4] * 2, *[2e-4] * 2, *[1e-4] * 2])
    assert {eps for _, _, eps, _ in seen} == {1e-5}
    assert [norm for *_, norm in seen] == pytest.approx([0.01] * 10, rel=1e-3)
    assert [float(row["lr"]) for row in read_metrics(run_dir)] == pytest.approx([3e-4, 2e-4, 1e-4])


def test_17_adaptive_kl(tmp_path, monkeypatch):
    """Point 17: beta * (1 + clip(KL / target - 1, +-0.2) * n / horizon), and the next iteration uses it."""
    args = ppo.Args(kl_target=4.0, kl_horizon=1000, batch_size=100)
    assert ppo.adapted_kl_coef(0.5, 4.4, args) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert ppo.adapted_kl_coef(0.5, 40.0, args) == pytest.approx(0.5 * (1 + 0.2 * 0.1))
    assert ppo.adapted_kl_coef(0.5, 0.0, args) == pytest.approx(0.5 * (1 - 0.2 * 0.1))
    run_dir, calls = spied_run(tmp_path, monkeypatch, kl_target=1e-6, kl_horizon=160, kl_coef=0.5, learning_rate=0.01)
    used = [given[3] for given, _ in calls["token_rewards"]]
    assert used == [float(row["objective/kl_coef"]) for row in read_metrics(run_dir)]
    assert used == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98 * 1.02])


def test_18_heads(tmp_path):
    """Point 18: the value head says 0, the reward head is drawn from N(0, 1 / (d + 1)), a separate critic starts as
    the reward model."""
    policy, _, args = make_policy(tmp_path, critic="separate")
    shared = ppo.scalar_model(policy, None, args)
    assert shared.body is policy.body
    assert not shared.head.weight.any()
    stds = []
    for seed in range(20):
        torch.manual_seed(seed)
        quick = ppo.replace(args, reward_steps=0)
        stds.append(ppo.train_reward_model(policy, [], quick, {}, lambda content: None).head.weight.std().item())
    assert np.mean(stds) == pytest.approx(1 / math.sqrt(33), rel=0.05)
    for rank in (0, 2):
        lora = ppo.replace(args, lora_rank=rank)
        reward, critic = (ppo.scalar_model(policy, name, lora) for name in ("reward", "critic"))
        with torch.no_grad():
            for weight in (reward.head.weight, *(p for n, p in reward.body.lm.named_parameters() if "critic" not in n)):
                weight.add_(torch.randn_like(weight) * 0.1)
        texts = ppo.to_texts(policy, *random_texts(policy))
        assert not torch.allclose(reward.scores(texts), critic.scores(texts), atol=0.01)
        assert ppo.copy_weights(reward, critic)
        assert torch.allclose(reward.scores(texts), critic.scores(texts), atol=1e-6)


def test_19_reward_losses(tmp_path):
    """Point 19: -log sigma(chosen - rejected), or half the squared error of standardised ratings, read at the last
    token of each response."""
    policy, _, args = make_policy(tmp_path)
    model = ppo.scalar_model(policy, "reward", args)
    nn.init.normal_(model.head.weight)
    prompts, responses = random_texts(policy, 8)

    def bare(prompt, response):
        hidden = model.body.lm.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state
        return model.head(hidden[0, -1]).item()

    pairs = [ppo.Example("", prompts[i], [responses[i], responses[i + 4]], None) for i in range(4)]
    differences = [bare(x.prompt, x.responses[0]) - bare(x.prompt, x.responses[1]) for x in pairs]
    expected = [math.log(1 + math.exp(-difference)) for difference in differences]
    assert ppo.reward_losses(model, pairs).tolist() == pytest.approx(expected, abs=1e-5)
    rated = [ppo.Example("", prompts[i], [responses[i]], rating) for i, rating in enumerate((10.0, 7.0, 4.0, 7.0))]
    rated = ppo.standardised(rated)
    assert [x.rating for x in rated] == pytest.approx([3 / 4.5**0.5, 0, -3 / 4.5**0.5, 0])
    expected = [0.5 * (bare(x.prompt, x.responses[0]) - x.rating) ** 2 for x in rated]
    assert ppo.reward_losses(model, rated).tolist() == pytest.approx(expected, abs=1e-5)


def test_19_scores_are_normalised_on_the_reference(tmp_path, monkeypatch):
    """Point 19: where PPO starts, the reference's scores have mean 0 and std 1, whatever the reward model's are."""
    args = {"reward_fn": None, "learning_rate": 1e-9, "missing_eos_penalty": 0.0, "eval_samples": 200}
    run_dir, calls = spied_run(tmp_path, monkeypatch, **args)
    scores = torch.cat([given[0] for given, _ in calls["token_rewards"]])
    assert scores.mean().item() == pytest.approx(0, abs=0.5)
    assert scores.std().item() == pytest.approx(1, abs=0.5)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["score_before"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("critic_kind", ["shared", "separate"])
def test_20_lora_reference_is_a_real_copy(tmp_path, critic_kind):
    """Point 20: with adapters off the model is what it was, bit for bit, before and after steps; KL is 0 at first."""
    policy, _, args = make_policy(tmp_path, lora_rank=4, critic=critic_kind)
    kept = ppo.Model(ppo.Body(copy.deepcopy(policy.body.lm), args), None)
    reference, texts = policy, ppo.to_texts(policy, *random_texts(policy))
    expected = kept.hidden_states(texts)
    policy.body.add_adapter("policy", args)
    policy = policy._replace(adapter="policy")
    critic = ppo.scalar_model(policy, "critic" if critic_kind == "separate" else None, args)
    log_probs, _, ref_log_probs, _ = ppo.score_tokens(policy, critic, reference, texts, args)
    assert torch.equal(log_probs, ref_log_probs)
    nn.init.ones_(critic.head.weight)
    ppo.require_gradients(policy, critic)
    flat = ppo.flatten_parameters(nn.ModuleList([policy.body.lm, critic.head]))
    assert len(flat) == sum(p.numel() for n, p in policy.body.lm.named_parameters() if "lora_" in n) + 32
    for _ in range(2):
        _, _, columns = make_part(policy, critic, args)
        ppo.add_gradient(policy, critic, ppo.Part(ppo.to_texts(policy, *random_texts(policy, 8)), *columns), args)
        flat.data -= 0.1 * flat.grad
    assert torch.equal(reference.hidden_states(texts), expected)
    assert not torch.allclose(policy.hidden_states(texts), expected, atol=0.01)
    if critic_kind == "separate":
        assert not torch.allclose(critic.hidden_states(texts), expected, atol=1e-3)
        assert not torch.allclose(critic.hidden_states(texts), policy.hidden_states(texts), atol=1e-3)


def test_21_scores_of_the_vocabulary(tmp_path):
    """Point 21: the LM head sees one row per response token and no other; log-probs are float32 though the model
    computes in bfloat16."""
    policy, _, args = make_policy(tmp_path, bf16=True)
    critic = ppo.scalar_model(policy, None, args)
    rows = []
    policy.head.register_forward_hook(lambda _, inputs, output: rows.append((len(inputs[0]), output.dtype)))
    prompts, responses, columns = make_part(policy, critic, args)
    texts = ppo.to_texts(policy, prompts, responses)
    rows.clear()
    ppo.add_gradient(policy, critic, ppo.Part(texts, *columns), args)
    assert rows == [(sum(map(len, responses)), torch.bfloat16)]
    log_probs = policy.log_probs(policy.hidden_states(texts)[texts.before], 1.0)
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(len(log_probs)), atol=1e-6)


def test_22_gold_score():
    """Point 22: the gold score by hand: praise and blame, endings, repetition, contradiction, rambling."""
    assert ppo.gold_score("the soup was great and the tea was ordinary . that is all .") == 1
    assert ppo.gold_score("the soup was great but the tea was cold . never again .") == 1 - 1 - 1
    assert ppo.gold_score("the soup was great . the soup was superb . we loved it .") == 2 + 1 - 1
    assert ppo.gold_score("the soup was great . the soup was awful . that is all .") == 0 - 1 - 1
    assert ppo.gold_score("the soup was great " + "and so " * 18 + ".") == pytest.approx(1 - 0.2 * 11)
    assert ppo.gold_score("the soup was great . we") == 1 - 3
    assert ppo.gold_score("") == -3


# -------------------------------------------------------------------------------------- what training is known to reach


def test_closed_form_optimum(tmp_path):
    """On responses of up to 3 of 5 tokens, all of which can be counted, PPO comes within 1 % of the best objective
    E[r] - beta KL that any policy has: beta ln E_ref[exp(r / beta)], reached by pi_ref exp(r / beta) / Z."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "go"}\n' * 10)
    tokenizer = ppo.make_tokenizer([ppo.Row("go a b c")])  # and [UNK]: with [EOS] five tokens and the prompt
    words = ["[UNK]", "a", "b", "c"]
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    args = ppo.Args(max_prompt_length=4, response_length=3, torch_threads=1)
    lm = ppo.load_lm("embedded", tokenizer, args, CPU)
    with torch.no_grad():
        lm.save_pretrained(tmp_path / "model")
    body = """table = {"a": 1.0, "b": -0.5, "c": 0.3, "[UNK]": 0.0, "go": 0.0}
    return [sum(table[w] * (1 + i) for i, w in enumerate(x.split())) - 2 * ("a b" in x) for x in responses]"""
    reward = reward_file(tmp_path, body)
    ppo_args = {"total_episodes": 15_360, "batch_size": 256, "num_minibatches": 2, "micro_batch_size": 128}
    ppo_args |= {"learning_rate": 3e-3, "kl_coef": 0.5, "missing_eos_penalty": 0.0, "eval_samples": 10}
    run_dir = tmp_path / "run"
    given = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "rows.jsonl"), "reward_fn": reward}
    args = ppo.replace(args, **given, **ppo_args, sft_steps=0, run_dir=str(run_dir))
    ppo.train(args)
    policy, reference = ppo.load_policy(run_dir).model, ppo.load_policy(tmp_path / "model").model
    tokens = [i for i in range(len(tokenizer)) if i != PAD]
    endless = [i for i in tokens if i != END]
    responses = [[*row, END] for n in range(3) for row in itertools.product(endless, repeat=n)]
    responses += [list(row) for row in itertools.product(endless, repeat=3)]
    texts = ppo.to_texts(policy, [tokenizer.encode("go")] * len(responses), responses)
    lengths = [len(response) for response in responses]
    log_probs = []
    for model in (policy, reference):
        with torch.no_grad():
            flat = ppo.of_chosen(model.log_probs(model.hidden_states(texts)[texts.before], 1.0), texts.chosen)
        log_probs.append(torch.stack([x.sum() for x in flat.split(lengths)]).double())
    log_p, log_ref = log_probs
    rewards = ppo.load_reward_fn(reward)(
        [""] * len(responses), tokenizer.batch_decode(responses, skip_special_tokens=True)
    )
    rewards = torch.tensor(rewards, dtype=torch.float64)
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-5)
    reached = (log_p.exp() * (rewards - 0.5 * (log_p - log_ref))).sum().item()
    start = (log_ref.exp() * rewards).sum().item()
    optimum = 0.5 * (log_ref + rewards / 0.5).logsumexp(0).item()
    print(start, reached, optimum, len(responses), words)
    assert optimum - start > 1
    assert optimum >= reached > 0.99 * optimum


def test_reward_model_recovers_a_ranking_from_noisy_ratings(tmp_path):
    """Ratings are the number of "tea" plus noise of the same size; the model ranks unseen texts by that number. So it
    does after comparisons that are wrong in a fifth of the cases."""
    policy, tokenizer, args = make_policy(tmp_path)
    rng = np.random.default_rng(0)
    (tea,) = tokenizer.encode("tea")
    others = [i for i in range(3, len(tokenizer)) if i != tea]

    def text():
        count = rng.integers(0, 5)
        return [*rng.permutation([tea] * count + rng.choice(others, 6 - count).tolist()).tolist(), END], count

    rated, compared = [], []
    for _ in range(1000):
        (first, a), (second, b) = text(), text()
        rated.append(ppo.Example("", [4], [first], a + rng.normal(0, 1)))
        if a != b:
            likes_first = (a > b) == (rng.random() > 0.2)
            compared.append(ppo.Example("", [4], [first, second] if likes_first else [second, first], None))
    unseen = [text() for _ in range(200)]
    args = ppo.replace(args, reward_steps=120, reward_batch_size=32, reward_learning_rate=1e-2, micro_batch_size=None)
    for examples in (rated, compared):
        torch.manual_seed(0)
        model = ppo.train_reward_model(policy, ppo.standardised(examples), args, {}, lambda content: None)
        with torch.no_grad():
            scores = model.scores(ppo.to_texts(model, [[4]] * 200, [response for response, _ in unseen])).numpy()
        assert np.corrcoef(scores, [count for _, count in unseen])[0, 1] > 0.9
        assert ppo.ranking_accuracy(model, examples)["reward_accuracy"] > 0.7


def test_over_optimisation_is_visible(tmp_path):
    """Point 22, and the whole loop: a reward for each "soup", at no cost of KL, rises while the gold score of the same
    reviews falls."""
    reward = reward_file(tmp_path, "return [float(text.split().count('soup')) for text in responses]")
    args = SMALL | {"sft_steps": 60, "sft_batch_size": 32, "sft_learning_rate": 5e-3, "total_episodes": 1920}
    args |= {"batch_size": 64, "micro_batch_size": 32, "learning_rate": 5e-3, "update_epochs": 4, "response_length": 16}
    run_dir = tmp_path / "run"
    ppo.train(ppo.Args(run_dir=str(run_dir), reward_fn=reward, kl_coef=0.0, **args, missing_eos_penalty=0.0))
    rows = read_metrics(run_dir)
    names = ("objective/scores", "objective/gold", "objective/kl")
    (score, gold, kl), (last_score, last_gold, last_kl) = (
        np.mean([[float(row[name]) for name in names] for row in some], axis=0) for some in (rows[:3], rows[-3:])
    )
    print(score, gold, kl, last_score, last_gold, last_kl)
    assert last_score > score + 2
    assert last_gold < gold - 2
    assert last_kl > kl + 3
    assert (run_dir / "frontier.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------ data, rewards, models


class ChatTokenizer:
    """What parse_row asks of a tokenizer with a chat template."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):  # noqa: D102
        assert (add_generation_prompt, tokenize) == (True, False)
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "id": 7}, ppo.Row("a")),
        ({"prompt": "a", "response": "b"}, ppo.Row("a", ("b",))),
        ({"prompt": "a", "response": "b", "rating": 7}, ppo.Row("a", ("b",), 7)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ppo.Row("a", ("b", "c"))),
        ({"prompt": [user("a")]}, ppo.Row("<user>a<assistant>")),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            ppo.Row("<user>a<assistant>", ("b", "c")),
        ),
        ({"messages": [user("a"), assistant("b")]}, ppo.Row("<user>a<assistant>", ("b",))),
        (
            {"messages": [user("a"), assistant("b"), user("c")]},
            ppo.Row("<user>a<assistant>b<user>c<assistant>"),
        ),
    ],
)
def test_forms_of_rows(row, expected):
    assert ppo.parse_row(row, ChatTokenizer()) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting"),
        ("[1]", "line 2: it is no object"),
        ('{"response": "b"}', 'line 2: it needs "prompt"'),
        ('{"prompt": "a", "chosen": "b"}', 'line 2: it needs "prompt"'),
        ('{"prompt": "a", "response": 5, "rating": 1}', "line 2: prompt and response must be texts"),
        ('{"prompt": "a", "response": "b", "rating": "good"}', "line 2: its rating 'good' is no number"),
        ('{"prompt": "a", "response": "b", "rating": NaN}', "line 2: its rating nan is no number"),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "line 2: its prompt is a list of messages"),
        ('{"messages": [{"content": "a"}]}', 'line 2: its messages need "role" and "content"'),
        ('{"prompt": "a", "response": "b"}', "line 2: it has not the form of the rows before"),
    ],
)
def test_broken_rows(tmp_path, monkeypatch, capsys, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "rating": 1}\n' + line + "\n")
    code, lines = run_main(ppo, monkeypatch, capsys, "--dataset", path, "--run-dir", tmp_path / "run")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path}, {said}")
    assert not (tmp_path / "run").exists()


def write_rows(path, form, count=24):
    """Rows of one form."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        review = [ppo.write_review(random.Random(i * 2 + k)) for k in range(2)]
        row = {"prompt": "we say :"}
        if form == "comparisons":
            row |= {"chosen": review[0], "rejected": review[1]}
        elif form != "prompts":
            row |= {"response": review[0]} | ({"rating": int(rng.integers(1, 11))} if form == "ratings" else {})
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def quick_run(tmp_path, name="run", **args):
    """A short run; returns its directory and summary."""
    run_dir = tmp_path / name
    return run_dir, ppo.train(ppo.Args(run_dir=str(run_dir), **SMALL | args))


@pytest.mark.parametrize("form", ["ratings", "comparisons", "responses", "prompts"])
def test_data_sets(tmp_path, form):
    """Every form of rows trains, with the stages that it can serve."""
    args = {"dataset": write_rows(tmp_path / "rows.jsonl", form)}
    if form in ("responses", "prompts"):
        args["reward_fn"] = reward_file(tmp_path)
    if form == "prompts":
        args |= {"sft_steps": 0, "model": make_folder(tmp_path / "model", "llama")}
    run_dir, summary = quick_run(tmp_path, **args)
    assert (run_dir / "sft").exists() == (form != "prompts")
    assert (run_dir / "reward_model").exists() == (form in ("ratings", "comparisons")) == ("reward_accuracy" in summary)
    assert summary["task"] == "rows"
    assert "gold_after" not in summary


def test_the_example_file(tmp_path):
    """The five rated rows of the documentation train as they are."""
    path = ppo.Path(ppo.__file__).parent / "examples" / "ratings.jsonl"
    assert [json.loads(line)["rating"] for line in path.read_text().splitlines()] == [10, 7, 4, 9, 6]
    _, summary = quick_run(tmp_path, dataset=str(path))
    assert math.isfinite(summary["kl"])


def test_simulated_people_follow_the_gold_score_and_err():
    """Of a review 2 better, 98 % like it more (1 / (1 + e^-4)); ratings rise by 0.7 per point of gold, with noise."""
    good, bad = "was great . that is all .", "was cold . that is all ."
    tokenizer = ppo.make_tokenizer([ppo.Row(f"the soup {good} {bad}")])
    prompts = [ppo.Example("the soup", tokenizer.encode("the soup"), [], None)] * 2000
    pair = [[tokenizer.encode(text)] * 2000 for text in (good, bad)]

    def read(prompts, responses):
        return ppo.decode_responses([x.prompt for x in prompts], responses, tokenizer)

    compared = ppo.ask_people(prompts, *pair, read, ppo.Args())
    assert np.mean([x.responses[0] == pair[0][0] for x in compared]) == pytest.approx(0.982, abs=0.01)
    rated = ppo.ask_people(prompts, *pair, read, ppo.Args(feedback="ratings"))
    means = [np.mean([x.rating for x in rated if x.responses == [y[0]]]) for y in pair]
    assert means == pytest.approx([7.7, 6.3], abs=0.1)
    assert len({x.rating for x in rated}) > 5


def test_ratings_of_reviews(tmp_path):
    run_dir, summary = quick_run(tmp_path, feedback="ratings")
    assert 0 <= summary["reward_accuracy"] <= 1
    assert (run_dir / "reward_model").exists()


def test_hub_data_set(tmp_path, monkeypatch):
    """A name that is no .jsonl file is a hub data set, which the package datasets loads."""

    class Fake:
        @staticmethod
        def load_dataset(name, split):
            assert (name, split) == ("some/name", "test")
            return [{"prompt": f"word{i} x", "response": "a b"} for i in range(12)]

    monkeypatch.setattr(ppo, "find_spec", lambda name: True)
    monkeypatch.setattr(ppo, "import_module", lambda name: Fake)
    rows = ppo.load_rows(ppo.Args(dataset="some/name", dataset_split="test"), None)
    assert len(rows) == 12
    assert rows[3] == ppo.Row("word3 x", ("a b",))


@every_kind
@pytest.mark.parametrize("rank", [0, 2])
def test_architectures(tmp_path, kind, rank):
    """Qwen2, GPT-2 (learned positions, no padding token) and Llama train, with LoRA and without; what is exported is
    what was trained, for transformers and PEFT alike."""
    model = make_folder(tmp_path / kind, kind)
    args = {"model": model, "lora_rank": rank, "critic": "separate", "max_prompt_length": 20, "learning_rate": 1e-2}
    args |= {"gradient_checkpointing": rank > 0, "dataset": write_rows(tmp_path / "rows.jsonl", "comparisons")}
    made, add_gradient = [], ppo.add_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "add_gradient", lambda *given: (made.append(given), add_gradient(*given))[1])
        run_dir, _ = quick_run(tmp_path, **args)
    policy, critic, part, _ = made[-1]
    texts = part.texts
    inputs = {"input_ids": texts.tokens, "attention_mask": texts.mask, "position_ids": ppo.position_ids(texts.mask)}
    with torch.no_grad():
        for model, name, auto in (
            (policy, "policy", (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM)),
            (
                critic,
                "critic",
                (transformers.AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
            ),
        ):
            loaded = auto[rank > 0].from_pretrained(run_dir / name, **{"num_labels": 1} if name == "critic" else {})
            loaded.config.pad_token_id = policy.body.lm.config.pad_token_id
            logits = loaded(**inputs).logits
            hidden = model.hidden_states(texts)
            own = model.head(hidden)
            if name == "critic":
                assert torch.allclose(logits[:, 0], own[texts.last, 0], atol=1e-5)
            else:
                assert torch.allclose(logits.flatten(0, 1)[texts.before], own[texts.before], atol=1e-4)
        loaded = ppo.load_policy(run_dir)
        own = policy.log_probs(policy.hidden_states(texts)[texts.before], 1.0)
        again = loaded.model.log_probs(loaded.model.hidden_states(texts)[texts.before], 1.0)
    assert torch.allclose(own, again, atol=1e-4)
    assert loaded.respond(["the soup was", "we"])[0] is not None


def test_reward_sources(tmp_path):
    """A function, a folder of this script (with and without LoRA), and a classifier with other tokens give the scores
    that they should."""
    policy, tokenizer, args = make_policy(tmp_path)
    prompts = [ppo.Example("the tea", tokenizer.encode("the tea"), [], None)] * 3
    responses = [[*tokenizer.encode(text), END] for text in ("was great .", "was cold . we", "we")]
    texts = ppo.to_texts(policy, [x.prompt for x in prompts], responses)
    reward = ppo.scalar_model(policy, "reward", args)
    nn.init.normal_(reward.head.weight)
    ppo.save_model(tmp_path / "own", reward, tokenizer)
    loaded = ppo.load_reward(ppo.replace(args, reward_model=str(tmp_path / "own")), tokenizer, CPU)
    assert torch.allclose(loaded.scores(texts), reward.scores(texts), atol=1e-6)

    lora = ppo.replace(args, lora_rank=2)
    adapted = ppo.scalar_model(policy, "reward", lora)
    for name, weight in policy.body.lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    nn.init.normal_(adapted.head.weight)
    ppo.save_model(tmp_path / "adapted", adapted, tokenizer)
    loaded = ppo.load_reward(ppo.replace(args, reward_model=str(tmp_path / "adapted")), tokenizer, CPU)
    assert torch.allclose(loaded.scores(texts), adapted.scores(texts), atol=1e-6)

    other, other_tokenizer, _ = make_policy(tmp_path, "llama")
    classifier = ppo.scalar_model(other, "reward", args)
    nn.init.normal_(classifier.head.weight)
    ppo.save_model(tmp_path / "other", classifier, other_tokenizer)
    score = ppo.load_reward(ppo.replace(args, reward_model=str(tmp_path / "other")), tokenizer, CPU)
    written = ["the tea was great .", "the tea was cold . we", "the tea we"]
    expected = []
    for text in written:
        ids = torch.tensor([other_tokenizer.encode(text)])
        expected.append(classifier.head(classifier.body.lm(input_ids=ids).last_hidden_state[0, -1]).item())
    given = ["the tea"] * 3, [" was great .", " was cold . we", " we"]
    assert score(*given) == pytest.approx(expected, abs=1e-5)


def test_bfloat16_and_adapters_as_models(tmp_path):
    """--bf16 trains all weights of a model, too; the folder of a LoRA policy is a --model like any other."""
    run_dir, _ = quick_run(tmp_path, "lora", lora_rank=4, learning_rate=0.05, bf16=True)
    policy = ppo.load_policy(run_dir)
    args = ppo.Args(model=str(run_dir / "policy"), max_prompt_length=10, response_length=10, lora_rank=4)
    lm = ppo.load_lm(args.model, policy.tokenizer, args, CPU)
    base = ppo.load_lm(str(run_dir / "sft"), policy.tokenizer, args, CPU)
    reference = ppo.Model(ppo.Body(lm, args), lm.get_output_embeddings())
    texts = ppo.to_texts(reference, *random_texts(reference))
    with torch.no_grad():
        hidden, before = reference.hidden_states(texts), ppo.Model(ppo.Body(base, args), None).hidden_states(texts)
        reference.body.add_adapter("policy", args)
        again = reference.hidden_states(texts)
    assert torch.equal(hidden, again)
    assert (hidden - before).abs().max() > 0.01
    _, summary = quick_run(tmp_path, "full", bf16=True, model=str(run_dir / "policy"), sft_steps=0)
    assert math.isfinite(summary["kl"])


def test_reward_function_gets_texts(tmp_path):
    """A reward function sees the prompts and the responses as texts, without special tokens."""
    body = """assert all(isinstance(x, str) and "[" not in x for x in prompts + responses)
    assert all(not x or x[0] == " " for x in responses)  # so that prompt + response is the whole text
    return [len(p) - len(r) for p, r in zip(prompts, responses)]"""
    _, summary = quick_run(tmp_path, reward_fn=reward_file(tmp_path, body))
    assert "reward_accuracy" not in summary


# ----------------------------------------------------------------------------------------------------------------- runs


def test_same_seed_same_run(tmp_path):
    runs = [quick_run(tmp_path, name, seed=seed)[0] for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert read_metrics(runs[0]) == read_metrics(runs[1]) != read_metrics(runs[2])
    same_weights(runs[0], runs[1])


@pytest.mark.parametrize(("stage", "lora_rank"), [("sft", 0), ("reward", 0), ("reward", 2), ("ppo", 2)])
def test_resumed_in_each_stage(tmp_path, monkeypatch, stage, lora_rank):
    """A run that stops right after a checkpoint of any stage goes on as if it had never stopped."""
    monkeypatch.setattr(ppo, "FIT_CHECKPOINT_INTERVAL", 4)
    args = {"lora_rank": lora_rank, "critic": "separate", "kl_target": 1.0, "learning_rate": 1e-2}
    whole, summary = quick_run(tmp_path, "whole", **args)
    write = ppo.write_atomically

    def write_then_stop(path, content):
        write(path, content)
        if path.name == "checkpoint.pt" and content["stage"] == stage and content.get("step", content.get("iteration")):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "write_atomically", write_then_stop)
        with pytest.raises(KeyboardInterrupt):
            quick_run(tmp_path, "stopped", **args)
    stopped = tmp_path / "stopped"
    assert load_checkpoint(stopped)["stage"] == stage
    again = ppo.train(ppo.saved_args(str(stopped)))
    assert read_metrics(stopped) == read_metrics(whole)
    same_weights(stopped, whole)
    timeless = [name for name in summary if "second" not in name]
    assert {name: again[name] for name in timeless} == {name: summary[name] for name in timeless}


def test_killed_and_resumed(tmp_path, monkeypatch):
    """SIGKILL in the middle of PPO, then --resume, give the rows of a run never stopped."""
    args = flags(SMALL | {"total_episodes": 320, "eval_samples": 4, "sft_steps": 4})
    process = start(ppo, "--run-dir", tmp_path / "killed", *args)
    wait_for_rows(tmp_path / "killed", 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(sys, "argv", [ppo.__file__, "--resume", str(tmp_path / "killed")])
    ppo.main()
    rows = read_metrics(tmp_path / "killed")
    assert [int(row["global_step"]) for row in rows] == list(range(16, 321, 16))
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["global_step"] == 320


def test_two_ranks(tmp_path):
    """Two ranks of half the batch give the gradient of one with all of it, and end with the same weights."""
    run_two_ranks(ppo.Path(__file__).parent / "ranks_rlhf.py", tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["gradient"], two["gradient"])
    assert torch.allclose(one["gradient"], one["alone"], atol=1e-5 * one["alone"].abs().max().item())
    assert torch.equal(one["trained"], two["trained"])
    assert [int(row["global_step"]) for row in read_metrics(tmp_path / "run")] == [16, 32, 48]


def test_summary_and_files(tmp_path):
    run_dir, summary = quick_run(tmp_path)
    wanted = "win_rate gold_before gold_after score_before score_after kl eos_rate_before eos_rate_after"
    wanted += " episodes_per_second script task seed global_step seconds steps_per_second reward_accuracy"
    assert set(wanted.split()) <= set(summary)
    assert all(isinstance(x, str) or math.isfinite(x) for x in summary.values())
    assert summary == json.loads((run_dir / "summary.json").read_text())
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "frontier.png", "samples.md"):
        assert (run_dir / name).stat().st_size
    for name in ("sft", "reward_model", "policy", "critic"):
        assert (run_dir / name / "config.json").exists()
    table = (run_dir / "samples.md").read_text().splitlines()
    assert len(table) == 2 + SMALL["eval_samples"]
    assert all(line.count(" | ") == 4 for line in table[2:])
    columns = read_metrics(run_dir)[0]
    trl = "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores"
    trl += " policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg policy/entropy_avg"
    trl += " val/ratio val/ratio_var val/num_eos_tokens lr"
    assert set(trl.split()) <= set(columns)


def test_play(tmp_path, monkeypatch, capsys):
    run_dir, _ = quick_run(tmp_path, response_length=5)
    monkeypatch.setattr("sys.argv", ["x", "--play", str(run_dir), "--prompt", "the soup was"])
    ppo.main()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("the soup was ")
    assert 4 <= len(said.split()) <= 8
    lm = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    assert lm.generation_config.suppress_tokens == [PAD]
    assert lm.generation_config.max_new_tokens == 5


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    for stage in ("sft", "reward", "ppo"):
        function = {"sft": "sft_losses", "reward": "reward_losses", "ppo": "masked_gae"}[stage]
        with pytest.MonkeyPatch.context() as patch:
            original = getattr(ppo, function)
            patch.setattr(ppo, function, lambda *given, original=original: original(*given) * math.nan)
            code, lines = run_main(ppo, monkeypatch, capsys, "--run-dir", tmp_path / stage, *flags(SMALL))
        assert code == 1
        assert "is not finite" in lines[-1]
        assert "checkpoint.pt is the last good state" in lines[-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch-size", "10", "--num-minibatches", "4"], "--batch-size 10 must be a multiple of"),
        (["--total-episodes", "100"], "--total-episodes 100 must be a multiple of --batch-size 64"),
        (["--sft-steps", "0"], "--sft-steps 0 is for a --model that has learned to write"),
        (["--kl-target", "3", "--kl-coef", "0"], "--kl-target adapts --kl-coef by factors"),
        (["--eval-samples", "1"], "--eval-samples must be at least 2"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--reward-model", "x", "--reward-fn", "y"], "--reward-model contradicts --reward-fn"),
        (["--reward-fn", "nothing.py:f"], "--reward-fn nothing.py:f (give FILE.py:NAME)"),
        (["--reward-model", "nothing/here"], "--reward-model nothing/here cannot be loaded"),
        (["--model", "nothing/here"], "--model nothing/here has no tokenizer that can be loaded"),
        (["--dataset", "nothing.jsonl"], "--dataset nothing.jsonl: "),
        (["--dataset", "nothing"], "--dataset nothing: give a .jsonl file"),
        (
            ["--lora-rank", "2", "--lora-target-modules", "q_proj", "nope"],
            "--lora-target-modules nope: the body's linear",
        ),
        (["--prompt", "hello"], "--prompt is for --play"),
        (["--play", "nothing"], "--play needs a text"),
        (["--play", "nothing", "--prompt", "a"], "nothing holds no policy"),
        (["--critic", "none"], "invalid choice"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, lines = run_main(ppo, monkeypatch, capsys, *given)
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert lines[0].startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "said"), [("return [1.0]", "gave 1 scores for"), ("return [float('nan')] * len(prompts)", "not finite")]
)
def test_a_bad_reward_function(tmp_path, monkeypatch, capsys, body, said):
    reward = reward_file(tmp_path, body)
    argv = flags(SMALL | {"reward_fn": reward, "run_dir": tmp_path / "run"})
    code, lines = run_main(ppo, monkeypatch, capsys, *argv)
    assert code == 2
    assert said in lines[-1]
