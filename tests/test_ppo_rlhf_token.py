"""Tests of ppo_rlhf_token.py: the 22 details of token-level RLHF, by number, known optima, data, rewards and runs."""

import copy
import gc
import itertools
import json
import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from helpers import mistake, read_metrics, run_script, run_two_ranks, same_state, start, tensorboard_rows, wait_for_rows
from torch import nn
from torch.nn import functional

import ppo_rlhf_token as ppo
from ppo_rlhf_token import Args, Example, Model

PAD, END = 0, 1  # of the tokenizers that make_tokenizer makes
SMALL = {"sft_steps": 6, "sft_batch_size": 16, "num_feedback": 40, "reward_steps": 4, "reward_batch_size": 8}
SMALL |= {"total_episodes": 48, "batch_size": 16, "micro_batch_size": 4, "response_length": 10, "eval_samples": 20}
SMALL |= {"device": "cpu"}
TEXT = "the soup was great . the tea was cold . we loved it ."
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("qwen2", "gpt2", "llama")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_critics = pytest.mark.parametrize("critic_kind", ["shared", "separate"])
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """The embedded model, smaller still, and fewer reviews."""
    make_config = transformers.LlamaConfig
    monkeypatch.setattr(
        transformers, "LlamaConfig", lambda **given: make_config(**given | LLAMA | {"initializer_range": 0.15})
    )
    monkeypatch.setattr(ppo, "NUM_REVIEWS", 200)
    torch.set_num_threads(1)


def make_folder(folder, kind):
    """A random model of one of three architectures, with a tokenizer of its kind: of words, of bytes without a padding
    token, of characters with a start token. Its configuration has dropout."""
    if kind == "qwen2":
        tokenizer = ppo.make_tokenizer([TEXT])
        sizes = LLAMA | {"num_key_value_heads": 2}
    elif kind == "gpt2":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator([TEXT], trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        special = ["<unk>", "<s>", "</s>", "<pad>"]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
        model.train_from_iterator([TEXT], trainer)
        model.decoder = tokenizers.decoders.Fuse()
        model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
        sizes = LLAMA
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    config.update({"initializer_range": 0.15} | {name: 0.3 for name in config.to_dict() if name.endswith("dropout")})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_policy(tmp_path, kind="qwen2", **flags):
    """A policy with a random model of this kind."""
    folder = tmp_path / kind
    if not folder.exists():
        make_folder(folder, kind)
    torch.manual_seed(0)
    given = {"max_prompt_length": 20, "response_length": 12, "device": "cpu"} | flags
    return ppo.load_model(str(folder), Args(model=str(folder), **given))


def example(tokens, response=(), rejected=(), rating=None, **columns):
    return Example("", "", list(tokens), list(response), list(rejected), rating, columns)


def random_examples(policy, count=6, seed=0):
    """Prompts and responses of different lengths; every other response ends."""
    rng = np.random.default_rng(seed)
    words = [i for i in range(len(policy.tokenizer)) if i not in (policy.end_id, policy.pad_id)]

    def sample(longest):
        return rng.choice(words, rng.integers(1, longest)).tolist()

    return [example(sample(8), sample(9) + [policy.end_id] * (i % 2)) for i in range(count)]


def naive(model, x, temperature=1.0, response=None):
    """Log-probs of one response's tokens, and what the head says before and after them, by the model's own forward pass
    of the bare text: no padding, no slicing."""
    response = x.response if response is None else response
    tokens, start = torch.tensor([x.tokens + response]), len(x.tokens)
    hidden = model.lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    logits = model.lm.get_output_embeddings()(hidden).double() if model.lm.get_output_embeddings() else hidden
    logits[:, model.pad_id] = -math.inf
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs[range(start - 1, start - 1 + len(response)), response], model.head(hidden)[start - 1 :, 0]


def randomise(model):
    """Gives the adapter of a model something to add, and its head something to say."""
    for weight in model.parameters() if model.adapter else [model.head.weight]:
        nn.init.normal_(weight, std=0.2)


def quick_run(run_dir, **flags):
    """A short run; returns its directory and summary."""
    return run_dir, ppo.train(Args(**SMALL | flags), run_dir)


def spied_run(tmp_path, monkeypatch, **flags):
    """Runs PPO, by default with a reward for words, and returns what its functions were given and gave."""
    calls = {"token_rewards": [], "masked_gae": [], "ppo_loss": [], "rollout": []}
    for name, seen in calls.items():
        function = getattr(ppo, name)

        def spied(*given, function=function, seen=seen):
            result = function(*given)
            seen.append((given, result))
            return result

        monkeypatch.setattr(ppo, name, spied)
    if "reward_fn" not in flags:
        flags["reward_fn"] = reward_file(tmp_path)
    quick_run(tmp_path / "run", **flags)
    monkeypatch.undo()
    return tmp_path / "run", calls


def reward_file(folder, body="return [float(len(text.split())) for text in responses]", more=""):
    """FILE.py:NAME of a reward function."""
    (folder / "reward.py").write_text(f"def reward(prompts, responses{more}):\n    {body}\n")
    return f"{folder / 'reward.py'}:reward"


# ---------------------------------------------------------------------------------- the 22 details, one after the other


@every_kind
def test_01_02_03_04_padding_positions_slices_and_temperature(tmp_path, kind):
    """Points 1 to 4: whatever is padded, log-probs and values are those of the bare text, one position before."""
    policy = make_policy(tmp_path, kind)
    nn.init.normal_(policy.head.weight)
    assert policy.pad_id not in (policy.end_id, policy.tokenizer.bos_token_id)
    examples = random_examples(policy)
    with torch.no_grad():
        for extra in (0, 5):
            longest = [max(len(x.tokens) for x in examples) + extra, max(len(x.response) for x in examples) + extra]
            more = [*examples, example([2] * longest[0], [2] * longest[1])]
            log_probs, values = policy.log_probs(more, 0.7)
            for x, own, value, after in zip(examples, log_probs, values, policy.values(more)):
                expected, expected_values = naive(policy, x, 0.7)
                count = len(x.response)
                torch.testing.assert_close(own[:count], expected.float(), rtol=0, atol=1e-5)
                assert not own[count:].any()
                torch.testing.assert_close(value[:count], expected_values[:-1], rtol=0, atol=1e-5)
                torch.testing.assert_close(after[: count + 1], expected_values, rtol=0, atol=1e-5)


def test_01_padding_is_a_token_of_its_own(tmp_path):
    """Point 1: a token that ends texts, or stands for unknown words, is no padding, or it would be masked."""
    for taken in ("eos_token", "unk_token"):
        tokenizer = ppo.make_tokenizer(["a b"])
        tokenizer.pad_token = getattr(tokenizer, taken)
        tokenizer.save_pretrained(tmp_path)
        tokenizer = ppo.load_tokenizer(tmp_path)
        assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.unk_token_id)


def test_02_03_positions_and_padding(tmp_path):
    """Points 2 and 3: positions are cumsum(mask) - mask; prompts end and responses begin in one column."""
    policy = make_policy(tmp_path)
    tokens, mask = policy.pad([example([5, 6, 7], [9]), example([8], [10, 11, 1])])
    assert tokens.tolist() == [[5, 6, 7, 9, 0, 0], [0, 0, 8, 10, 11, 1]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    seen = policy.run(lambda tokens, **given: given, tokens)
    assert seen["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]]
    assert seen["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


def test_04_07_samples(tmp_path):
    """Points 4 and 7: sampled tokens follow softmax(logits / temperature), after prompts of any length, and nothing
    follows the first end token."""
    policy = make_policy(tmp_path, temperature=0.5, response_length=3, batch_size=4000)
    torch.manual_seed(0)
    prompts = [example([4, 5, 6]), example([5])]
    samples = policy.generate(prompts * 2000)
    for i, x in enumerate(prompts):
        tokens = range(1, 13)
        probs = torch.stack([naive(policy, x, 0.5, [token])[0][0] for token in tokens]).exp().numpy(force=True)
        responses = [sample.response for sample in samples[i::2]]
        counts = np.bincount([response[0] for response in responses], minlength=13)
        assert counts[PAD] == 0
        assert np.abs(counts[1:] / 2000 - probs).max() < 0.04
        likely = next(token for token in np.argsort(-counts) if token != END)
        probs = [naive(policy, x, 0.5, [likely, token])[0][1].exp().item() for token in tokens]
        follow = [response[1] for response in responses if response[0] == likely]
        assert np.abs(np.bincount(follow, minlength=13)[1:] / len(follow) - probs).max() < 0.08
    responses = [sample.response for sample in samples]
    assert not any(END in response[:-1] for response in responses)
    assert any(response[-1] == END and len(response) < 3 for response in responses)
    assert any(response[-1] != END and len(response) == 3 for response in responses)
    assert all(len(response) == 3 or response[-1] == END for response in responses)


@pytest.mark.parametrize("iteration", [0, 2])
def test_05_a_ratio_that_is_not_one_stops_the_run(tmp_path, monkeypatch, iteration):
    """Point 5: it is 1 to the last bit before the first step of each iteration, and noise in any is noticed."""
    run_dir, calls = spied_run(tmp_path, monkeypatch, temperature=0.8)
    for i in range(3):  # of 2 passes with 4 micro-batches, of which the first 2 come before a step
        for _, (_, figures) in calls["ppo_loss"][8 * i :][:2]:
            assert figures["val/ratio_var"] == 0
    rollout, rollouts = ppo.rollout, itertools.count()

    def then_noise(policy, *given):
        result = rollout(policy, *given)
        if next(rollouts) == iteration:
            log_probs = policy.log_probs
            policy.log_probs = lambda *given: [functional.dropout(x, 1e-2) for x in log_probs(*given)]
        return result

    monkeypatch.setattr(ppo, "rollout", then_noise)
    with pytest.raises(FloatingPointError, match="ratio is not 1 before the first step"):
        quick_run(tmp_path / "bad", model=str(run_dir / "sft"), sft_steps=0, reward_fn=reward_file(tmp_path))
    assert len(read_metrics(tmp_path / "bad")) == iteration


@every_kind
@pytest.mark.parametrize("rank", [0, 2])
def test_06_no_dropout_is_left(tmp_path, kind, rank):
    """Point 6: the model's own dropout, 0.3 in its folder, is off in all stages, and LoRA has none."""
    policy = make_policy(tmp_path, kind, lora_rank=rank)
    for model in (policy, policy.branch("policy"), policy.branch("reward")):
        nn.init.normal_(model.head.weight)
        examples = random_examples(model)
        assert not any(layer.p for layer in model.lm.modules() if isinstance(layer, nn.Dropout))
        assert model.lm.training
        assert torch.equal(model.values(examples), model.values(examples))
        assert torch.equal(model.log_probs(examples, 1.0)[0], model.log_probs(examples, 1.0)[0])


def test_08_a_response_without_an_end_costs(tmp_path, monkeypatch):
    """Point 8: the score of a response that was cut off is its score less missing_eos_penalty."""
    _, calls = spied_run(tmp_path, monkeypatch, missing_eos_penalty=3.5, response_length=4)
    scores, batches = calls["token_rewards"][0][0][0], calls["rollout"][0][1][0]
    responses = [x.response for batch in batches for x in batch.examples]
    is_cut = [END not in response for response in responses]
    assert 0 < sum(is_cut) < len(is_cut)
    words = [len([token for token in response if token > 2]) for response in responses]  # without [UNK]
    assert scores.tolist() == [count - 3.5 * cut for count, cut in zip(words, is_cut)]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_09_kl_estimates_mean_the_exact_kl(tmp_path, estimator):
    """Point 9: over all first tokens of a policy, either estimate has the mean KL(pi || pi_ref), and beta times it is
    taken off the reward; k1 is log pi - log pi_ref, k3 is never negative."""
    policy, reference = make_policy(tmp_path), make_policy(tmp_path)
    with torch.no_grad():
        reference.lm.get_input_embeddings().weight.add_(0.1 * torch.randn(13, 32))
    args = policy.args
    args.kl_estimator, args.response_length, args.micro_batch_size = estimator, 1, 4
    responses = [example([4], [token]) for token in range(1, 13)]
    policy.generate = lambda prompts: responses
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "token_rewards", lambda *given: seen.append(given) or torch.zeros(12, 1))
        args.dataset = "none"
        _, metrics = ppo.rollout(policy, policy, reference, lambda x: torch.zeros(12), responses, 0.3, args)
    _, ref_kl, _, kl_coef = seen[0]
    assert kl_coef == 0.3
    (log_p, _), (log_q, _) = policy.log_probs(responses, 1.0), reference.log_probs(responses, 1.0)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert exact > 0.001
    assert (log_p.exp() * ref_kl).sum().item() == pytest.approx(exact, rel=1e-3)
    assert metrics["objective/kl"].item() == pytest.approx((log_p - log_q).mean().item(), abs=1e-6)
    assert (ref_kl >= 0).all() == (estimator == "k3")


def test_10_the_score_is_at_the_last_token():
    """Point 10: on the end token, or on the last one of a response that was cut off; each token pays beta KL."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    kl = torch.tensor([[0.5, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 0.0, 0.0]])
    rewards = ppo.token_rewards(torch.tensor([4.0, 2.0, -1.0]), kl, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 3.9, 0.0], [0.0, -0.1, 1.8], [-1.2, 0.0, 0.0]]))


def test_11_gae():
    """Point 11: by hand, with a value of 0 after the end, whatever stands there."""
    assert (Args().gamma, Args().gae_lambda) == (1.0, 0.95)
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    last = 1.0 - 0.25
    first = 0.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.95 * last
    torch.testing.assert_close(ppo.masked_gae(rewards, values, mask, 0.9, 0.95), torch.tensor([[first, last, 0.0]]))


@pytest.mark.parametrize("whiten", [False, True])
def test_12_13_returns_are_from_advantages_before_whitening(tmp_path, monkeypatch, whiten):
    """Points 12 and 13: returns = advantages + values; then advantages are whitened over all tokens. Rewards are
    scaled to a standard deviation of 1 if asked to, and keep their mean."""
    _, calls = spied_run(tmp_path, monkeypatch, whiten_rewards=whiten)
    (rewards, values, mask, *_), gae = calls["masked_gae"][1]
    batches, metrics = calls["rollout"][1][1]
    raw = calls["token_rewards"][1][1][mask]
    expected = (raw - raw.mean()) / raw.std(correction=0) + raw.mean() if whiten else raw
    torch.testing.assert_close(rewards[mask], expected)
    assert not rewards[~mask].any()
    for name, expected in (("returns", gae + values), ("advantages", (gae - gae[mask].mean()) / gae[mask].std())):
        seen = torch.cat([getattr(batch, name)[batch.mask] for batch in batches])
        torch.testing.assert_close(seen, expected[mask], rtol=0.01, atol=1e-4)
    returns = (gae + values)[mask]
    explained = 1 - (gae[mask].var() / returns.var()).item()
    assert metrics["val/explained_variance"].item() == pytest.approx(explained, abs=1e-4)
    assert metrics["objective/entropy"].item() == pytest.approx(
        -sum(batch.log_probs.sum().item() for batch in batches) / 16, rel=1e-4
    )


def make_batch(policy, critic, examples, seed=0):
    """Experience with random advantages and returns, and old log-probs and values near those of the policy."""
    with torch.no_grad():
        log_probs, values = policy.log_probs(examples, policy.args.temperature)
        if policy.args.critic == "separate":
            values = critic.values(examples)[:, :-1]
    _, mask = policy.pad(examples)
    rng = torch.Generator().manual_seed(seed)
    noise = [torch.randn(mask.shape, generator=rng) for _ in range(4)]
    return ppo.Batch(examples, mask, log_probs + 0.3 * noise[0], values + 0.3 * noise[1], noise[2], values + noise[3])


def gradients(*models):
    weights = {id(p): p for model in models for p in model.parameters()}.values()
    result = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
    for p in weights:
        p.grad = None
    return result


@both_critics
@pytest.mark.parametrize("clips", [True, False])
def test_14_15_loss_and_its_gradient(tmp_path, critic_kind, clips):
    """Points 14 and 15: -min(r A, clip(r) A) + 0.1 / 2 max((V - R)^2, (clip(V) - R)^2), summed over tokens; the
    gradient equals that of the same formula on each bare text, and one micro-batch of 8 gives that of 8 of 1."""
    policy = make_policy(tmp_path, critic=critic_kind, temperature=0.8, clip_vloss=clips)
    args = policy.args
    assert (args.vf_coef, args.clip_coef, Args().clip_vloss) == (0.1, 0.2, True)
    critic = policy.branch("critic") if critic_kind == "separate" else policy
    nn.init.normal_(critic.head.weight)
    batch = make_batch(policy, critic, random_examples(policy, 8))
    loss, figures = ppo.ppo_loss(policy, critic, batch, args)
    loss.backward()
    assert not any(figure.requires_grad for figure in figures.values())  # or the log would keep all activations
    gradient = gradients(policy, critic)
    total, ratios, value_losses = 0, [], 0
    for i, x in enumerate(batch.examples):
        count = len(x.response)
        _, _, old, old_values, advantages, returns = (column[i][:count] if k else [] for k, column in enumerate(batch))
        values = naive(critic, x)[1][:-1]
        ratio = (naive(policy, x, 0.8)[0] - old).exp()
        clipped = old_values + (values - old_values).clamp(-0.2, 0.2) if clips else values
        value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum()
        total = total - torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() + 0.1 * value_loss
        ratios.append(ratio.detach())
        value_losses += value_loss.item()
    total.backward()
    expected = gradients(policy, critic)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert gradient.norm() > 1
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    ratio = torch.cat(ratios)
    kl = (ratio - 1 - ratio.log()).sum().item()
    seen = {name: figure.item() for name, figure in figures.items()}
    assert seen["loss/value_avg"] == pytest.approx(value_losses, rel=1e-3)
    assert seen["policy/approxkl_avg"] == pytest.approx(kl, rel=1e-3)
    assert seen["policy/clipfrac_avg"] == ((ratio - 1).abs() > 0.2).sum().item()
    assert [seen["val/ratio"], seen["val/ratio_var"]] == pytest.approx(
        [ratio.sum().item(), (ratio - 1).square().sum().item()], rel=1e-3
    )

    for i, x in enumerate(batch.examples):
        one = ppo.Batch([x], *(column[i : i + 1, : len(x.response)] for column in batch[1:]))
        ppo.ppo_loss(policy, critic, one, args)[0].backward()
    torch.testing.assert_close(gradients(policy, critic), gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_15_micro_batches_of_a_run(tmp_path):
    """Point 15, in the loop: the first step is the same whatever the micro-batches, and so is what comes of it. Each
    pass meets every micro-batch once, in minibatches of its own."""
    flags = {"reward_fn": reward_file(tmp_path), "update_epochs": 1, "num_minibatches": 1, "total_episodes": 16}
    runs = [quick_run(tmp_path / str(size), micro_batch_size=size, **flags)[0] for size in (1, 16)]
    rows = [[float(x) for x in read_metrics(run_dir)[0].values()] for run_dir in runs]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)


def test_16_optimiser(tmp_path, monkeypatch):
    """Point 16: Adam with eps 1e-5, a learning rate that falls linearly to 0, the gradient norm clipped at 1. Each pass
    meets every micro-batch once, in other minibatches than the one before."""
    seen, step = [], torch.optim.Adam.step

    def spy(self):
        (group,) = self.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
        seen.append((group["lr"], group["eps"], norm))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    flags = {"max_grad_norm": 0.01, "update_epochs": 4, "sft_steps": 4, "sft_learning_rate": 0.4, "learning_rate": 3e-4}
    assert Args().max_grad_norm == 1
    run_dir, calls = spied_run(tmp_path, monkeypatch, **flags)
    assert [lr for lr, _, _ in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1, *[3e-4] * 8, *[2e-4] * 8, *[1e-4] * 8])
    assert {eps for _, eps, _ in seen} == {1e-5}
    assert [norm for *_, norm in seen] == pytest.approx([0.01] * 28, rel=1e-3)
    assert [float(row["lr"]) for row in read_metrics(run_dir)] == pytest.approx([3e-4, 2e-4, 1e-4])
    order = [id(given[2]) for given, _ in calls["ppo_loss"]]
    passes = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(len(set(a)) == 4 for a in passes)
    assert len({frozenset(a[:2]) for a in passes[:4]}) > 1
    assert set(passes[0]) == set(passes[3]) != set(passes[4])


def test_17_adaptive_kl(tmp_path, monkeypatch):
    """Point 17: beta * (1 + clip(KL / target - 1, +-0.2) * n / horizon), which the next iteration uses."""
    flags = {"kl_target": 0.05, "kl_horizon": 160, "kl_coef": 0.5, "learning_rate": 0.003, "total_episodes": 96}
    run_dir, calls = spied_run(tmp_path, monkeypatch, **flags)
    used = [given[3] for given, _ in calls["token_rewards"]]
    rows, expected = read_metrics(run_dir), [0.5]
    for row in rows:
        error = float(row["objective/kl"]) / 0.05 - 1
        expected.append(expected[-1] * (1 + min(max(error, -0.2), 0.2) * 16 / 160))
    assert used == [float(row["objective/kl_coef"]) for row in rows] == pytest.approx(expected[:-1])
    assert used[1] == 0.5 * 0.98  # since KL is 0 at first
    assert max(used[-1], used[-2]) > used[1]


@pytest.mark.parametrize("rank", [0, 2])
def test_18_heads_and_what_models_start_from(tmp_path, monkeypatch, rank):
    """Point 18: the value head says 0, the reward head is drawn from N(0, 1 / (d + 1)), a separate critic starts as the
    body of the reward model."""
    policy = make_policy(tmp_path, lora_rank=rank)
    assert not policy.branch("one").head.weight.any()
    reward, examples = policy.branch("two"), random_examples(policy)
    for weight in reward.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    ppo.save_model(tmp_path / "reward_model", reward, is_scalar=True)
    critic = policy.branch("three", tmp_path / "reward_model")
    torch.testing.assert_close(critic.values(examples), reward.values(examples), rtol=0, atol=1e-6)
    assert critic.values(examples).abs().max() > 0.01
    stds, fit = [], ppo.fit
    monkeypatch.setattr(ppo, "fit", lambda model, *rest: stds.append(model.head.weight.std().item()))
    for seed in range(20):
        ppo.train_reward_model(
            tmp_path / "qwen2", [example([4], [5], [6])] * 2, tmp_path / "r", Args(seed=seed, dataset="x")
        )
    assert np.mean(stds) == pytest.approx(1 / math.sqrt(33), rel=0.05)
    monkeypatch.setattr(ppo, "fit", fit)
    flags = {"critic": "separate", "lora_rank": rank, "total_episodes": 16, "reward_learning_rate": 0.05}
    monkeypatch.setattr(ppo, "update", lambda *given: {})
    _, calls = spied_run(tmp_path, monkeypatch, reward_fn=None, **flags)
    policy, critic, _, reward, prompts, *_ = calls["rollout"][0][0]
    assert not critic.values(prompts).any()
    critic.head = reward.model.head
    torch.testing.assert_close(critic.values(prompts), reward.model.values(prompts))
    assert not torch.allclose(policy.log_probs(prompts, 1.0)[1], critic.values(prompts)[:, :-1], atol=1e-3)


def test_19_reward_losses(tmp_path, monkeypatch):
    """Point 19: -log sigma(chosen - rejected), or half the squared error of standardised ratings, read at the last
    token of each response."""
    model = make_policy(tmp_path)
    nn.init.normal_(model.head.weight)
    examples = random_examples(model, 8)

    def bare(x, response):
        return naive(model, x, response=response)[1][-1].item()

    pairs = [x._replace(rejected=y.response) for x, y in zip(examples, examples[4:])]
    differences = [bare(x, x.response) - bare(x, x.rejected) for x in pairs]
    expected = [math.log(1 + math.exp(-difference)) for difference in differences]
    assert ppo.reward_losses(model, pairs).tolist() == pytest.approx(expected, abs=1e-5)
    rated = [x._replace(rating=rating) for x, rating in zip(examples, (1.0, 0.0, -2.0))]
    expected = [0.5 * (bare(x, x.response) - x.rating) ** 2 for x in rated]
    assert ppo.reward_losses(model, rated).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    seen = []
    monkeypatch.setattr(ppo, "fit", lambda model, losses, examples, stage: seen.extend(examples))
    rated = [example([4], [5], rating=rating) for rating in (10.0, 7.0, 4.0, 7.0)]
    ppo.train_reward_model(tmp_path / "qwen2", rated, tmp_path / "r", Args(dataset="x"))
    assert [x.rating for x in seen] == pytest.approx([3 / 4.5**0.5, 0, -3 / 4.5**0.5, 0])


def test_19_scores_are_normalised_on_the_reference(tmp_path, monkeypatch):
    """Point 19: the reference's scores have mean 0 and std 1, whatever the reward model's are."""
    rewards, call = [], ppo.Reward.__call__
    monkeypatch.setattr(ppo.Reward, "__call__", lambda *given: rewards.append(call(*given)) or rewards[-1])
    _, summary = quick_run(tmp_path / "run", total_episodes=16, response_length=4)
    raw = rewards[0]
    assert abs(raw.mean()) > 1e-3
    torch.testing.assert_close(rewards[2], (raw - raw.mean()) / raw.std())  # in evaluate, of the same responses
    assert summary["score_before"] == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(ppo.Model, "scores", lambda model, examples: 1 + 0 * model.values(examples)[:, 0])
    _, summary = quick_run(tmp_path / "constant", total_episodes=16, response_length=4)
    assert summary["score_before"] == summary["score_after"] == 0  # not NaN


@both_critics
def test_20_lora_models_share_a_body(tmp_path, critic_kind):
    """Point 20: with adapters off the model is what it was, bit for bit, before and after steps of policy and critic,
    which are learned at once; KL is 0 at first."""
    reference = make_policy(tmp_path, lora_rank=4, critic=critic_kind)
    args, examples = reference.args, random_examples(reference)
    kept = copy.deepcopy(reference)
    expected = kept.log_probs(examples, 1.0)[0]
    policy = reference.branch("policy")
    critic = reference.branch("critic") if critic_kind == "separate" else policy
    assert policy.lm is reference.lm is critic.lm
    assert torch.equal(policy.log_probs(examples, 1.0)[0], expected)
    nn.init.ones_(critic.head.weight)
    parameters = list(dict.fromkeys([*policy.parameters(), *critic.parameters()]))
    assert all("lora" in name for name, p in policy.lm.named_parameters() if id(p) in set(map(id, parameters)))
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for seed in range(2):
        batch = make_batch(policy, critic, random_examples(policy, 8, seed))
        ppo.ppo_loss(policy, critic, batch, args)[0].backward()
        ppo.optimizer_step(optimizer, 10, args)
    assert torch.equal(reference.log_probs(examples, 1.0)[0], expected)
    assert not torch.allclose(policy.log_probs(examples, 1.0)[0], expected, atol=0.01)
    values = [Model.values(model, examples) for model in (critic, policy, reference)]
    for other in values[1 + (critic is policy) :]:
        assert not torch.allclose(values[0], other, atol=0.01)


def test_21_logits(tmp_path):
    """Point 21: the LM head sees no prompt; log-probs are float32 though the model computes in bfloat16."""
    policy = make_policy(tmp_path, bf16=True)
    seen = []
    policy.lm.get_output_embeddings().register_forward_hook(
        lambda *given: seen.append((given[2].shape, given[2].dtype))
    )
    examples = [example([4] * 9, [5, 6, 7]), example([4] * 3, [5])]
    log_probs, values = policy.log_probs(examples, 1.0)
    assert seen == [((2, 4, 13), torch.bfloat16)]  # of the prompt's last token, and of the response
    assert log_probs.dtype == values.dtype == torch.float32
    all_tokens = torch.cat([policy.log_probs([example([4, 5], [token])], 1.0)[0] for token in range(1, 13)])
    assert all_tokens.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_22_gold_score():
    """Point 22: the gold score by hand: praise and blame, endings, repetition, rambling, no end."""
    assert ppo.gold_score("the soup was great and the tea was ordinary . that is all .") == 1
    assert ppo.gold_score("the soup was great but the tea was cold . never again .") == 1 - 1 - 1
    assert ppo.gold_score("the soup was great . the soup was great . we loved it .") == 2 + 1 - 2
    assert ppo.gold_score("the soup was great " + "and so " * 18 + ".") == pytest.approx(1 - 0.2 * 11)
    assert ppo.gold_score("the soup was great . we") == 1 - 3
    assert ppo.gold_score("") == -3


def test_22_over_optimisation_is_visible(tmp_path):
    """Point 22, and the whole loop: a reward for each "soup", at no cost of KL, rises while the gold score falls."""
    reward = reward_file(tmp_path, "return [float(text.split().count('soup')) for text in responses]")
    flags = {"sft_steps": 60, "sft_learning_rate": 5e-3, "total_episodes": 1280, "batch_size": 64}
    flags |= {"micro_batch_size": 32, "learning_rate": 7e-3, "update_epochs": 4, "response_length": 16}
    flags |= {"missing_eos_penalty": 0.0, "kl_coef": 0.0, "reward_fn": reward, "checkpoint_interval": 100}
    run_dir, summary = quick_run(tmp_path / "run", **flags)
    rows, names = read_metrics(run_dir), ("objective/scores", "objective/gold", "objective/kl")
    first, last = (np.mean([[float(row[x]) for x in names] for row in part], 0) for part in (rows[:2], rows[-2:]))
    print(first, last)
    assert last[0] > first[0] + 2
    assert last[1] < first[1] - 2
    assert last[2] > first[2] + 3
    assert summary["win_rate"] < 0.4


# ------------------------------------------------------------------------------------------ what is known to be reached


def test_closed_form_optimum(tmp_path):
    """On responses of up to 3 of 5 tokens, all of which can be counted, PPO comes within 2 % of the best objective
    E[r] - beta KL that any policy has: beta ln E_ref[exp(r / beta)]. The evaluation's KL is the exact one."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "go"}\n' * 10)
    tokenizer = ppo.make_tokenizer(["go a b c"])  # and [UNK]: with [EOS] six tokens
    torch.manual_seed(0)
    model = ppo.load_model("embedded", Args(device="cpu"), tokenizer)
    ppo.save_model(tmp_path / "model", model)
    body = """table = {"a": 1.0, "b": -0.5, "c": 0.3, "go": 0.0}
    return [sum(table[w] * (1 + i) for i, w in enumerate(x.split())) - 2 * ("a b" in x) for x in responses]"""
    flags = {"total_episodes": 10_240, "batch_size": 256, "micro_batch_size": 128, "learning_rate": 4e-3}
    flags |= {"kl_coef": 0.5, "missing_eos_penalty": 0.0, "checkpoint_interval": 1000, "response_length": 3}
    flags |= {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "rows.jsonl"), "sft_steps": 0}
    _, summary = quick_run(tmp_path / "run", **flags, reward_fn=reward_file(tmp_path, body))
    args = Args(device="cpu", response_length=3, reward_fn=reward_file(tmp_path, body))
    policy, reference = (ppo.load_model(tmp_path / name, args) for name in ("run/policy", "model"))
    endless = [i for i in range(len(tokenizer)) if i not in (PAD, END)]
    responses = [[*row, END] for n in range(3) for row in itertools.product(endless, repeat=n)]
    responses += [list(row) for row in itertools.product(endless, repeat=3)]
    examples = [example(tokenizer.encode("go"), response) for response in responses]
    with torch.no_grad():
        log_p, log_ref = (model.log_probs(examples, 1.0)[0].double().sum(-1) for model in (policy, reference))
    rewards = ppo.Reward(tokenizer, args)(examples).double()
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-5)
    kl = (log_p.exp() * (log_p - log_ref)).sum().item()
    reached = (log_p.exp() * rewards).sum().item() - 0.5 * kl
    start = (log_ref.exp() * rewards).sum().item()
    optimum = 0.5 * (log_ref + rewards / 0.5).logsumexp(0).item()
    print(start, reached, optimum, kl, summary)
    assert optimum - start > 1
    assert optimum >= reached > 0.98 * optimum


def test_reward_model_recovers_a_ranking_from_noisy_judgements(tmp_path):
    """Ratings are the number of "tea" plus noise of the same size; the model ranks unseen texts by that number. So it
    does after comparisons that are wrong in a fifth of the cases."""
    policy = make_policy(tmp_path)
    rng = np.random.default_rng(0)
    (tea,) = policy.tokenizer.encode("tea")
    others = [i for i in range(3, 13) if i != tea]

    def text():
        count = rng.integers(0, 5)
        return [*rng.permutation([tea] * count + rng.choice(others, 6 - count).tolist()).tolist(), END], count

    rated, compared = [], []
    for _ in range(1000):
        (first, a), (second, b) = text(), text()
        rated.append(example([4], first, rating=a + rng.normal(0, 1)))
        if a != b:
            likes_first = (a > b) == (rng.random() > 0.2)
            compared.append(example([4], first, second) if likes_first else example([4], second, first))
    unseen = [text() for _ in range(200)]
    args = Args(reward_steps=60, reward_learning_rate=1e-2, micro_batch_size=32, dataset="x", device="cpu")
    for examples in (rated, compared):
        ppo.train_reward_model(tmp_path / "qwen2", examples, tmp_path / "reward", args)
        model = ppo.load_model(tmp_path / "reward", args, is_scalar=True)
        with torch.no_grad():
            scores = model.scores([example([4], response) for response, _ in unseen]).numpy()
        assert np.corrcoef(scores, [count for _, count in unseen])[0, 1] > 0.9


# ----------------------------------------------------------------------------------------------------------------- data


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "id": 7, "tags": ["x"], "response": None}, ("a", [], None)),
        ({"prompt": "a", "response": "b", "messages": None}, ("a", ["b"], None)),
        ({"prompt": "a", "completion": "b"}, ("a", ["b"], None)),
        ({"prompt": "a", "response": "b", "rating": 0}, ("a", ["b"], 0)),
        ({"prompt": "a", "chosen": "b", "rejected": "", "rating": 7}, ("a", ["b", ""], None)),
        ({"prompt": [user("a")]}, ([user("a")], [], None)),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, ([user("a")], ["b"], None)),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            ([user("a")], ["b", "c"], None),
        ),
        (  # UltraFeedback-binarized
            {
                "prompt": "a",
                "prompt_id": "7",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
                "messages": [user("a"), assistant("b")],
                "score_chosen": 8.5,
                "score_rejected": 8,
            },
            ([user("a")], ["b", "c"], None),
        ),
        (  # the edition for TRL
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "score_chosen": 8.5},
            ([user("a")], ["b", "c"], None),
        ),
        (  # further turns follow the prompt, which may be repeated
            {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
            ([user("a"), assistant("b"), user("c")], ["d"], None),
        ),
        ({"prompt": [user("a")], "messages": [user("a"), assistant("b")]}, ([user("a")], ["b"], None)),
        ({"chosen": HH + " I see", "rejected": HH + " I think"}, (HH, [" I see", " I think"], None)),
        ({"chosen": "I have a cat", "rejected": "I have a car"}, ("I have a", [" cat", " car"], None)),
        ({"messages": [user("a"), assistant("b")]}, ([user("a")], ["b"], None)),
        ({"messages": [user("a"), assistant("b"), user("c")]}, ([user("a"), assistant("b"), user("c")], [], None)),
    ],
)
def test_forms_of_rows(row, expected):
    assert ppo.parse_row(row) == expected


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"response": "b", "rating": 1}',
        '{"prompt": "a", "chosen": "b"}',
        '{"prompt": "a", "response": 5, "rating": 1}',
        '{"prompt": "a", "response": "b", "rating": "good"}',
        '{"prompt": "a", "response": "b"}',
        '{"prompt": 7, "response": "b", "rating": 1}',
        '{"prompt": "a", "response": [{"role": "user", "content": "b"}, {"role": "tool", "content": "c"}]}',
        '{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "rating": 2}',
    ],
)
def test_a_broken_row_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "rating": 1}\n' + line + "\n")
    with pytest.raises(ppo.UserError, match=r"row 1\b"):
        ppo.load_examples(Args(dataset=str(path)))


def test_files_and_columns(tmp_path, capsys):
    """.jsonl, .json and .parquet files give the same examples; long prompts are left out, and that is said."""
    import datasets

    rows = [
        {"prompt": f"w{i} " * (1 + 70 * (i == 3)), "response": "a b", "answer": i, "tags": ["x"]} for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    loaded = []
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        examples, tokenizer = ppo.load_examples(Args(dataset=str(tmp_path / name), reward_fn="x", response_length=2))
        assert "1 of 12 rows are left out" in capsys.readouterr().out
        loaded.append(examples)
    assert loaded[0] == loaded[1] == loaded[2]
    assert len(loaded[0]) == 11
    assert loaded[0][3].columns == {"response": "a b", "answer": 4, "tags": ["x"]}
    assert tokenizer.decode(loaded[0][3].tokens) == "w4"
    assert tokenizer.decode(loaded[0][3].response) == "a b"  # cut off before the end token
    examples, _ = ppo.load_examples(
        Args(dataset=str(tmp_path / "rows.json"), reward_fn="x", dataset_split="train[4:6]")
    )
    assert [x.response[-1] for x in examples] == [END, END]


def test_in_order_and_hold_out(monkeypatch):
    """Every epoch has all examples once; processes share each batch; no prompt is in both parts."""
    examples = list(range(10))
    order = [x for start in range(0, 30, 6) for x in ppo.in_order(examples, start, 6, 1)]
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [examples] * 3
    assert order[:10] != order[10:20]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ppo, "process", lambda rank=rank: (rank, 2))
        shares.append(ppo.in_order(examples, 12, 6, 1))
    assert [x for pair in zip(*shares) for x in pair] == order[12:18]
    texts = [Example("", f"p{i % 40}", [], [], [], None, {}) for i in range(80)]
    rest, held_out = ppo.hold_out(texts, 1)
    assert len({x.text for x in held_out}) == 4
    assert len(rest) == 72
    assert not {x.text for x in rest} & {x.text for x in held_out}
    assert ppo.hold_out(texts[:9], 1) == (texts[:9], texts[:9])


def test_simulated_people_follow_the_gold_score_and_err(tmp_path):
    """Of a review 1 better, 88 % like it more (1 / (1 + e^-2))."""
    tokenizer = ppo.make_tokenizer([TEXT + " plain"])
    model = ppo.load_model("embedded", Args(device="cpu"), tokenizer)
    good, bad = ([*tokenizer.encode(text), END] for text in ("was great .", "was plain ."))
    model.generate = lambda prompts, heat=1.0: [x._replace(response=good if heat > 1 else bad) for x in prompts]
    prompt = Example("the soup", "the soup", tokenizer.encode("the soup"), [], [], None, {})
    judged = ppo.ask_people(model, [prompt], Args(num_feedback=2000))
    assert {(*x.response, *x.rejected) for x in judged} == {(*good, *bad), (*bad, *good)}
    assert np.mean([x.response == good for x in judged]) == pytest.approx(0.88, abs=0.025)


# -------------------------------------------------------------------------------------------------------------- rewards


def test_reward_functions_get_the_row(tmp_path, monkeypatch):
    """They see prompts as they are in the data, responses as texts that follow them, and all other columns. Their file
    may import what is beside it."""
    rows = [{"prompt": f"the soup {i}", "response": "was great .", "answer": i, "tags": ["x"] * i} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    body = """assert set(columns) == {"response", "tags"} and len(columns["tags"]) == len(answer)
    assert all(p == f"the soup {a}" and t == ["x"] * a for p, a, t in zip(prompts, answer, columns["tags"]))
    assert not any("[" in r for r in responses)
    from length_of_a_response import length
    return [a - length(r) for a, r in zip(answer, responses)]"""
    (tmp_path / "length_of_a_response.py").write_text("length = len")
    flags = {"dataset": str(tmp_path / "rows.jsonl")}
    flags["reward_fn"] = reward_file(tmp_path, body, ", answer, **columns")
    _, calls = spied_run(tmp_path, monkeypatch, **flags, missing_eos_penalty=0.0)
    (scores, *_), _ = calls["token_rewards"][0]
    batches, _ = calls["rollout"][0][1]
    assert len({x.columns["answer"] for batch in batches for x in batch.examples}) > 5
    answers = [x.columns["answer"] for batch in batches for x in batch.examples]
    assert (scores <= torch.tensor(answers)).all()


@pytest.mark.parametrize(
    "body", ["return [1.0]", "return [float('nan')] * len(prompts)", "return [None]", "return None"]
)
def test_a_bad_reward_function(tmp_path, body):
    with pytest.raises(ppo.UserError, match=r"--reward-fn \S+:\w+ returned"):
        quick_run(tmp_path / "run", reward_fn=reward_file(tmp_path, body))


def test_reward_models(tmp_path):
    """A folder of this script, with and without LoRA, reads tokens; a classifier with other tokens reads the text."""
    policy = make_policy(tmp_path)
    tokens = policy.tokenizer.encode
    examples = [
        Example("the tea", "the tea", tokens("the tea"), tokens(x), [], None, {}) for x in ("was great .", "we", "was")
    ]
    for rank in (0, 2):
        model = make_policy(tmp_path, lora_rank=rank).branch("reward")
        randomise(model)
        ppo.save_model(tmp_path / f"own{rank}", model, is_scalar=True)
        args = Args(reward_model=str(tmp_path / f"own{rank}"), device="cpu", response_length=12)
        reward = ppo.Reward(policy.tokenizer, args)
        assert not reward.reads_text
        torch.testing.assert_close(reward(examples), model.scores(examples))

    other = make_policy(tmp_path, "llama")
    randomise(other)
    ppo.save_model(tmp_path / "other", other, is_scalar=True)
    reward = ppo.Reward(policy.tokenizer, ppo.Args(reward_model=str(tmp_path / "other"), device="cpu"))

    def expected(text, special=True):
        ids = torch.tensor([other.tokenizer.encode(text, add_special_tokens=special)])
        return other.head(other.lm.base_model(input_ids=ids).last_hidden_state[0, -1])

    for x, text in zip(examples, ("the tea was great .", "the tea we", "the tea was")):
        torch.testing.assert_close(reward([x]), expected(text))
    chat = examples[0]._replace(prompt=[user("the tea")])
    torch.testing.assert_close(reward([chat]), expected("the tea .  was great . . ", special=False))
    reward.model.tokenizer.model_max_length = 12
    torch.testing.assert_close(reward(examples[:1]), expected("<s>s great .", special=False)[:1], rtol=1, atol=1e9)
    kept = reward.model.tokenizer("the tea was great .", truncation=True).input_ids
    assert other.tokenizer.decode(kept, skip_special_tokens=True) == "a was great ."[-11:]
    reward.mean, reward.std = torch.tensor(2.0), torch.tensor(4.0)
    before = reward.score_texts(examples)
    torch.testing.assert_close(reward(examples), (before - 2) / 4)


def test_a_reward_model_with_few_positions_never_loses_the_response(tmp_path):
    """A prompt that is too long for the reward model is cut on the left, though it has the policy's tokens."""
    model = make_policy(tmp_path)
    randomise(model)
    model.lm.config.max_position_embeddings = 8
    ppo.save_model(tmp_path / "short", model, is_scalar=True)
    args = Args(reward_model=str(tmp_path / "short"), device="cpu", max_prompt_length=20, response_length=4)
    reward = ppo.Reward(make_policy(tmp_path).tokenizer, args)
    assert reward.reads_text
    x = Example("", "the " * 20, [3], model.tokenizer.encode("was great ."), [], None, {})
    reward.tokenizer.decode = lambda tokens, **given: "x" if len(tokens) == 1 else "x was great ."
    (the,) = model.tokenizer.encode("the")
    expected = model.scores([example([the] * 5, x.response)])
    torch.testing.assert_close(reward([x]), expected)


# ----------------------------------------------------------------------------------------------------- models and runs


@every_kind
@pytest.mark.parametrize("rank", [0, 2])
def test_architectures_and_what_they_leave(tmp_path, monkeypatch, rank, kind):
    """Qwen2, GPT-2 (learned positions, no padding token) and Llama train, with LoRA and without, in bfloat16, with
    gradient checkpointing, messages; what is saved is what was trained, for transformers and PEFT alike."""
    rows = []
    for i in range(16):
        rng = random.Random(i)
        prompt = [user("the soup")] if kind == "llama" else "the soup was"
        rows.append({"prompt": prompt, "chosen": ppo.write_review(rng)["response"], "rejected": "the tea was cold ."})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"model": make_folder(tmp_path / kind, kind), "dataset": str(tmp_path / "rows.jsonl"), "reward_fn": None}
    flags |= {"lora_rank": rank, "critic": "separate", "max_prompt_length": 30, "learning_rate": 1e-2}
    flags |= {"gradient_checkpointing": rank > 0, "bf16": kind == "gpt2", "kl_estimator": "k3"}
    run_dir, calls = spied_run(tmp_path, monkeypatch, **flags)
    policy, critic, batch, _ = calls["ppo_loss"][-1][0]
    tokens, mask = policy.pad(batch.examples)
    inputs = {"input_ids": tokens, "attention_mask": tokens != policy.pad_id}
    if kind == "gpt2":
        for model in (policy, critic):
            assert all(weight.dtype == torch.float32 for weight in model.parameters())
        assert policy.lm.dtype == (torch.bfloat16 if rank else torch.float32)
        return
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(0)
    lasts = mask.shape[1] - tokens.shape[1] - 1 + mask.sum(-1)
    loaders = [transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification]
    if rank:
        loaders = [peft.AutoPeftModelForCausalLM, peft.AutoPeftModelForSequenceClassification]
    with torch.no_grad():
        causal = loaders[0].from_pretrained(run_dir / "policy", dtype=torch.float32)
        logits = causal(**inputs).logits[:, -mask.shape[1] - 1 : -1]
        logits[..., policy.pad_id] = -math.inf
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, -mask.shape[1] :, None]).squeeze(-1)
        torch.testing.assert_close(log_probs[mask], policy.log_probs(batch.examples, 1.0)[0][mask], atol=1e-4, rtol=0)
        classifier = loaders[1].from_pretrained(run_dir / "critic", num_labels=1, dtype=torch.float32)
        classifier.config.pad_token_id = policy.pad_id
        assert lasts.shape == (4,)
        torch.testing.assert_close(classifier(**inputs).logits[:, 0], critic.scores(batch.examples), atol=1e-4, rtol=0)
    assert critic.scores(batch.examples).abs().max() > 1e-3
    own = ppo.load_model(run_dir / "policy", Args(device="cpu", max_prompt_length=20, lora_rank=rank))
    assert own.lm.generation_config.suppress_tokens == [policy.pad_id]
    torch.testing.assert_close(own.log_probs(batch.examples, 1.0)[0], policy.log_probs(batch.examples, 1.0)[0])


def test_one_copy_of_the_weights_and_nothing_else_alive(tmp_path, monkeypatch):
    """With LoRA, PPO's four models are one body; first base, classifier and earlier optimisers are gone."""
    rollout, seen = ppo.rollout, []

    def counting(*given):
        gc.collect()
        alive = [x for x in gc.get_objects() if isinstance(x, transformers.PreTrainedModel | torch.optim.Optimizer)]
        seen.append({type(x).__name__ for x in alive} | {len(alive)})
        return rollout(*given)

    gc.collect()
    monkeypatch.setattr(ppo, "rollout", counting)
    before = [x for x in gc.get_objects() if isinstance(x, transformers.PreTrainedModel)]
    assert not before
    base = make_folder(tmp_path / "base", "llama")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the tea", "chosen": "was great", "rejected": "was cold"}\n' * 16)
    flags = {"model": base, "dataset": str(tmp_path / "rows.jsonl"), "max_prompt_length": 20}
    gc.collect()
    quick_run(tmp_path / "run", **flags, lora_rank=2, critic="separate", total_episodes=16)
    assert seen == [{"LlamaForCausalLM", "LlamaModel", "Adam", 3}]


def test_an_adapter_is_a_model_like_any_other(tmp_path):
    """--model takes the folder of a LoRA policy; new adapters sit on a body into which it is merged, in sft/."""
    first, _ = quick_run(tmp_path / "first", lora_rank=4, learning_rate=0.05)
    examples = [example([4, 5], [6, 7]), example([8], [9])]
    with torch.no_grad():
        adapted = ppo.load_model(first / "policy", Args(device="cpu")).log_probs(examples, 1.0)[0]
        base = ppo.load_model(first / "sft", Args(device="cpu")).log_probs(examples, 1.0)[0]
        assert not torch.allclose(adapted, base, atol=0.01)
        flags = {"model": str(first / "policy"), "sft_steps": 0, "lora_rank": 2, "total_episodes": 16}
        shutil.move(first, tmp_path / "moved")  # an adapter's base is what lies beside it
        flags["model"] = str(tmp_path / "moved/policy")
    second, _ = quick_run(tmp_path / "second", **flags, reward_fn=reward_file(tmp_path), learning_rate=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(
            ppo.load_model(second / "sft", Args(device="cpu")).log_probs(examples, 1.0)[0], adapted
        )
        again = ppo.load_model(second / "policy", Args(device="cpu")).log_probs(examples, 1.0)[0]
        torch.testing.assert_close(again, adapted, atol=1e-5, rtol=0)


def test_the_example_file_of_rated_rows(tmp_path):
    """The five rated rows of the documentation go through all stages as they are."""
    path = Path(__file__).parent / "ratings.jsonl"
    assert [json.loads(line)["rating"] for line in path.read_text().splitlines()] == [10, 7, 4, 9, 6]
    run_dir, summary = quick_run(tmp_path / "run", dataset=str(path), critic="separate")
    assert (run_dir / "reward_model" / "model.safetensors").exists()
    assert math.isfinite(summary["kl"])
    assert "gold_after" not in summary


def same_run(a, b):
    """Asserts equal metrics, weights, optimiser states and samples of two runs, bit for bit."""
    assert read_metrics(a) == read_metrics(b)
    states = [torch.load(run_dir / "checkpoint.pt", weights_only=True) for run_dir in (a, b)]
    for state in states:
        *progress, _seconds = state.pop("progress")
        state["progress"] = progress
    same_state(*states)
    assert (a / "samples.json").read_text() == (b / "samples.json").read_text()
    summaries = [json.loads((run_dir / "summary.json").read_text()) for run_dir in (a, b)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}


def argv(run_dir, **flags):
    """Command-line flags of a short run."""
    given = SMALL | {"run_dir": run_dir} | flags
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_runs_equal_unbroken_ones(tmp_path, monkeypatch, capsys, rank):
    """Extended after its end, stopped in PPO, and stopped in either stage before: each time the run becomes the same as
    one that was never stopped; stages that were finished are not done again."""
    few = {"lora_rank": rank, "critic": "separate", "kl_target": 1.0, "learning_rate": 1e-2, "checkpoint_interval": 2}
    whole = tmp_path / "whole"
    run_script(ppo, monkeypatch, *argv(whole, **few), "--no-anneal-lr")
    extended = tmp_path / "extended"
    run_script(ppo, monkeypatch, *argv(extended, **few | {"total_episodes": 16}), "--no-anneal-lr")
    capsys.readouterr()
    run_script(ppo, monkeypatch, "--resume", extended, "--total-episodes", "48")
    assert "starts from its beginning" not in capsys.readouterr().out
    same_run(extended, whole)
    assert tensorboard_rows(extended, "objective/kl") == tensorboard_rows(whole, "objective/kl")

    stopped = tmp_path / "stopped"
    first = ["--run-dir", stopped, *argv(stopped, **few)[2:], "--no-anneal-lr"]
    first = [*argv(stopped, **few), "--no-anneal-lr"]
    for function, said in (("sft_losses", ""), ("reward_losses", "the sft stage"), ("update", "the reward stage")):
        original, calls = getattr(ppo, function), itertools.count()

        def stops(*given, original=original, calls=calls):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return original(*given)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, function, stops)
            with pytest.raises(KeyboardInterrupt):
                run_script(ppo, patch, *(["--resume", stopped] if said else first))
        assert said in capsys.readouterr().out
    run_script(ppo, monkeypatch, "--resume", stopped)
    assert "starts from its beginning" not in capsys.readouterr().out
    same_run(stopped, whole)


def test_killed_and_resumed_and_played(tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle of PPO, then --resume, give the rows of a run never stopped. --play takes the flags of the
    run, or those that it is given."""
    flags = {"total_episodes": 160, "eval_samples": 4, "checkpoint_interval": 2}
    process = start(ppo, *argv(tmp_path / "killed", **flags))
    wait_for_rows(tmp_path / "killed", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run_script(ppo, monkeypatch, "--resume", tmp_path / "killed")
    rows = read_metrics(tmp_path / "killed")
    assert [int(row["global_step"]) for row in rows] == list(range(16, 161, 16))
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["global_step"] == 160

    seen, generate = [], Model.generate
    monkeypatch.setattr(Model, "generate", lambda self, *given: seen.append(self) or generate(self, *given))
    said = []
    for more in ([], ["--response-length", 3, "--temperature", 0.01], ["--seed", 5]):
        capsys.readouterr()
        run_script(ppo, monkeypatch, "--play", tmp_path / "killed", "--prompt", "the soup was", *more)
        said.append(capsys.readouterr().out.strip())
        assert said[-1].startswith("the soup was")
    limits = [(x.lm.generation_config.max_new_tokens, x.args.temperature) for x in seen]
    assert limits == [(10, 1.0), (3, 0.01), (10, 1.0)]
    assert said[0] != said[2]
    line = mistake(ppo, monkeypatch, "--play", tmp_path / "killed", "--learning-rate", 1)
    assert "--learning-rate has no effect" in line
    for flag in ("--sft-steps", "--eval-samples", "--batch-size"):  # the last two would change the scores' scale
        assert f"{flag} has no effect" in mistake(ppo, monkeypatch, "--resume", tmp_path / "killed", flag, 5)
    line = mistake(ppo, monkeypatch, "--play", tmp_path / "killed", "--prompt", '[{"role": "user", "content": "a"}]')
    assert "chat" in line


def test_two_ranks_equal_one_process(tmp_path):
    """Two processes that share prompts, whose responses are a function of the prompt here, have the metrics, statistics
    and weights of one process with all of them, after the steps of all three stages."""
    import ranks_rlhf

    model = make_folder(tmp_path / "model", "qwen2")
    run_two_ranks(ranks_rlhf.__file__, model, tmp_path / "two")
    with pytest.MonkeyPatch.context() as patch:
        ranks_rlhf.run(model, tmp_path / "one", patch.setattr)
    rows = [[[float(x) for x in row.values()] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert len(rows[0]) == 3
    np.testing.assert_allclose(rows[0], rows[1], rtol=2e-3, atol=1e-4)
    assert abs(rows[0][2][3]) > 1e-3
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parameters"] for name in ("one", "two")]
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=0, atol=2e-3)


def test_files_of_a_run(tmp_path):
    run_dir, summary = quick_run(tmp_path / "run")
    wanted = "win_rate gold_before gold_after score_before score_after kl eos_rate_before eos_rate_after global_step"
    assert set(summary) == {*wanted.split(), "seconds"}
    assert all(math.isfinite(x) for x in summary.values())
    samples = json.loads((run_dir / "samples.json").read_text())
    assert {len(column) for column in samples.values()} == {len(samples["prompt"])}
    gains = np.sign(np.subtract(samples["gold_after"], samples["gold_before"]))
    assert summary["win_rate"] == pytest.approx(np.mean(gains > 0) + np.mean(gains == 0) / 2)
    trl = "objective/kl objective/entropy objective/rlhf_reward objective/scores policy/approxkl_avg lr val/ratio_var"
    trl += " policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio"
    assert set(trl.split()) <= set(read_metrics(run_dir)[0])
    row = {name: float(x) for name, x in read_metrics(run_dir)[1].items()}
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] - 0.07 * row["objective/kl"], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    for name in ("sft_losses", "reward_losses", "masked_gae"):
        with monkeypatch.context() as patch:
            original = getattr(ppo, name)
            patch.setattr(ppo, name, lambda *given, original=original: original(*given) * math.nan)
            with pytest.raises(FloatingPointError, match="not finite"):
                quick_run(tmp_path / name)
    state = torch.load(tmp_path / "masked_gae" / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["parameters"].values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch-size", "10"], "--batch-size must be a multiple of minibatches"),
        (["--total-episodes", "100"], "--total-episodes must be a multiple of --batch-size"),
        (["--sft-steps", "0"], "--sft-steps 0 is for a --model that can write"),
        (["--kl-target", "3", "--kl-coef", "0"], "--kl-target adapts --kl-coef"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--reward-steps", "0"], "--reward-steps must be above 0"),
        (["--kl-target", "-3"], "--kl-target must be above 0"),
        (["--seed", "-1"], "--seed, --lora-rank, --sft-steps must be at least 0"),
        (["--reward-model", "x", "--reward-fn", "y"], "--reward-fn excludes --reward-model"),
        (["--reward-fn", "nothing.py:f"], "--reward-fn nothing.py:f is no FILE.py:NAME of a function"),
        (["--reward-model", "nothing/here"], "nothing/here cannot be loaded"),
        (["--model", "nothing/here"], "the tokenizer of nothing/here cannot be loaded"),
        (["--dataset", "nothing.jsonl"], "--dataset nothing.jsonl cannot be loaded"),
        (["--dataset", "empty.jsonl"], "--dataset empty.jsonl cannot be loaded"),
        (["--dataset", "prompts.jsonl"], "lacks responses (--sft-steps 0)"),
        (["--dataset", "prompts.jsonl", "--model", "llama", "--sft-steps", "0"], "or judgements"),
        (["--dataset", "prompts.jsonl", "--max-prompt-length", "1"], "has no row with a prompt of 1 to"),
        (["--model", "gpt2"], "exceed the 64 positions of gpt2"),
        (["--model", "endless"], "its tokenizer has no end token"),
        (["--prompt", "hello"], "--prompt has no effect"),
        (["--lora-alpha", "3"], "--lora-alpha has no effect"),
        (["--kl-horizon", "3"], "--kl-horizon has no effect"),
        (["--dataset-split", "test"], "--dataset-split has no effect"),
        (["--reward-fn", "y", "--reward-steps", "3"], "--reward-steps has no effect"),
        (["--reward-fn", "y", "--num-feedback", "3"], "--num-feedback has no effect"),
        (["--model", "llama", "--sft-steps", "0", "--sft-batch-size", "3"], "--sft-batch-size has no effect"),
        (["--play", "nothing"], "nothing/config.json is missing"),
        (["--resume", "nothing"], "nothing/config.json is missing"),
        (["--resume", "a", "--run-dir", "b"], "give only one of --run-dir, --resume and --play"),
        (["--run-dir", "taken"], "taken holds a run"),
        (["--resume", "taken"], "taken/config.json is missing, damaged or of another script"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in {"llama", "gpt2"} & {*given}:
        make_folder(tmp_path / kind, kind)
    if "endless" in given:
        tokenizer = ppo.make_tokenizer(["a"])
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "endless")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the soup"}\n' * 3)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{")
    assert said in mistake(ppo, monkeypatch, *given)
    assert not list(tmp_path.glob("runs/*/sft"))
