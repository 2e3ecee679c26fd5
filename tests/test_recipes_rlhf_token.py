"""What each recipe for ppo_rlhf_token.py claims, on small cases, and that it trains, resumes and plays."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import mistake, patched, read_metrics, run_script
from test_ppo_rlhf_token import LLAMA, SMALL, argv, make_folder, same_run
from torch import nn

import ppo_rlhf_token

NAMES = ("ppo_rlhf_token__grpo", "ppo_rlhf_token__ptx")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The scripts that the patches make."""
    return {name: patched(name, tmp_path_factory.mktemp("recipes")) for name in NAMES}


@pytest.fixture(autouse=True)
def small_model(monkeypatch, modules):
    """The embedded model, smaller still, and fewer reviews."""
    make_config = transformers.LlamaConfig
    monkeypatch.setattr(
        transformers, "LlamaConfig", lambda **given: make_config(**given | LLAMA | {"initializer_range": 0.15})
    )
    for script in (ppo_rlhf_token, *modules.values()):
        monkeypatch.setattr(script, "NUM_REVIEWS", 200)
    torch.set_num_threads(1)


@pytest.fixture
def grpo(modules):
    return modules[NAMES[0]]


@pytest.fixture
def ptx(modules):
    return modules[NAMES[1]]


def reward_file(folder, body="return [float(len(text.split())) for text in responses]"):
    """FILE.py:NAME of a reward function."""
    (folder / "reward.py").write_text(f"import ppo_rlhf_token\ndef reward(prompts, responses):\n    {body}\n")
    return f"{folder / 'reward.py'}:reward"


def small_batch(script, folder, **flags):
    """Two models of equal size, a micro-batch of three responses with figures by chance, and the flags."""
    args = script.Args(model=make_folder(folder / "qwen2", "qwen2"), device="cpu", **flags)
    torch.manual_seed(0)
    policy = script.load_model(args.model, args)
    nn.init.normal_(policy.head.weight)
    rows = [([5, 6, 7], [9, 4, 1]), ([8], [10, 1]), ([4, 4], [11, 12, 3])]
    examples = [script.Example("", "", *row, [], None, {}) for row in rows]
    with torch.no_grad():
        log_probs, values = policy.log_probs(examples, 1.0)
    _, mask = policy.pad(examples)
    noise = torch.randn(5, *mask.shape) * mask
    batch = {"examples": examples, "mask": mask, "log_probs": log_probs + 0.3 * noise[0]}
    batch |= {"values": values + noise[1], "advantages": noise[2], "returns": values + noise[3]}
    return policy, batch, log_probs + noise[4], args


def gradients(policy, loss):
    """Of all parameters, one after the other."""
    found = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, policy.parameters())])


@pytest.mark.parametrize("name", NAMES)
def test_trains_resumes_and_plays(modules, tmp_path, monkeypatch, capsys, name):
    """A run that is extended after its end becomes the same as one that was never stopped."""
    script, flags = modules[name], {"learning_rate": 1e-2, "num_feedback": 10, "reward_steps": 2, "eval_samples": 4}
    flags |= {"total_episodes": 32, "sft_steps": 3, "update_epochs": 1}
    run_script(script, monkeypatch, *argv(tmp_path / "whole", **flags), "--no-anneal-lr")
    run_script(script, monkeypatch, *argv(tmp_path / "run", **flags | {"total_episodes": 16}), "--no-anneal-lr")
    run_script(script, monkeypatch, "--resume", tmp_path / "run", "--total-episodes", 32)
    same_run(tmp_path / "run", tmp_path / "whole")
    capsys.readouterr()
    run_script(script, monkeypatch, "--play", tmp_path / "run", "--prompt", "the soup was")
    assert capsys.readouterr().out.startswith("the soup was")
    with pytest.raises(SystemExit) as stopped:
        run_script(script, monkeypatch, "--help")
    assert stopped.value.code == 0
    assert ("group-size" in capsys.readouterr().out) is (name == NAMES[0])


# ----------------------------------------------------------------------------------------------------------------- grpo


def test_group_advantages_by_hand(grpo):
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert grpo.group_advantages(scores).tolist() == [[-2, -1, 3], [0, 0, 0]]


def test_groups_are_of_one_prompt(grpo, tmp_path, monkeypatch):
    """In each iteration, every one of the next prompts has its responses, each of whose tokens has the advantage over
    the mean score of this group; whatever their order in micro-batches."""
    seen, rollout = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *given: seen.append((given, rollout(*given))) or seen[-1][1])
    args = grpo.Args(**SMALL | {"num_minibatches": 1, "group_size": 4, "reward_fn": reward_file(tmp_path)})
    grpo.train(args, tmp_path / "run")
    examples = grpo.hold_out(grpo.load_examples(args)[0], args.seed)[0]
    for iteration, (given, (batches, _)) in enumerate(seen):
        prompts = given[4]
        assert [x.tokens for x in prompts] == [x.tokens for x in grpo.in_order(examples, 4 * iteration, 4, args.seed)]
        groups = {id(x.tokens): [] for x in prompts}
        for batch in batches:
            for x, mask, advantages in zip(batch.examples, batch.mask, batch.advantages):
                score = len([token for token in x.response if token > 2]) - (x.response[-1] != 1)
                assert len(set(advantages[mask].tolist())) == 1
                groups[id(x.tokens)].append((score, advantages[0].item()))
        for group in groups.values():
            scores, advantages = np.array(group).T
            assert len(scores) == 4
            np.testing.assert_allclose(advantages, scores - scores.mean(), atol=1e-5)
    assert len(seen) == 3
    assert {len(x.response) for x in batches[0].examples} != {len(x.response) for x in batches[-1].examples}
    assert not (tmp_path / "run" / "critic").exists()


def test_loss_with_the_kl_divergence_by_hand(grpo, tmp_path):
    """The clipped surrogate of each token and, at a price, k3 = q / p - 1 - log(q / p), p of the policy, q of the
    reference. The head has no part in it."""
    policy, batch, ref_log_probs, args = small_batch(grpo, tmp_path)
    loss, figures = grpo.ppo_loss(policy, policy, grpo.Batch(**batch, ref_log_probs=ref_log_probs), 0.3, args)
    log_probs, _ = policy.log_probs(batch["examples"], 1.0)
    total, kl = 0.0, 0.0
    for i, t in batch["mask"].nonzero().tolist():
        advantage, log_p, log_q = batch["advantages"][i, t].item(), log_probs[i, t].item(), ref_log_probs[i, t].item()
        ratio = math.exp(log_p - batch["log_probs"][i, t].item())
        total -= min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        kl += math.exp(log_q - log_p) - 1 - (log_q - log_p)
    assert figures["loss/policy_avg"].item() == pytest.approx(total, rel=1e-4)
    assert figures["loss/kl_avg"].item() == pytest.approx(kl, rel=1e-4)
    assert loss.item() == pytest.approx(total + 0.3 * kl, rel=1e-4)
    assert "loss/value_avg" not in figures
    assert torch.autograd.grad(loss, policy.head.weight, allow_unused=True, retain_graph=True)[0] is None
    free = grpo.ppo_loss(policy, policy, grpo.Batch(**batch, ref_log_probs=ref_log_probs), 0.0, args)[0]
    difference = ref_log_probs - log_probs
    priced = 0.3 * (difference.exp() - 1 - difference).sum()  # both are equal in padding
    torch.testing.assert_close(gradients(policy, loss), gradients(policy, free) + gradients(policy, priced))


def test_with_a_critic_and_no_groups_it_is_the_script(grpo, tmp_path):
    """Whose metrics the flags --critic shared --group-size 1 reproduce."""
    flags = SMALL | {"learning_rate": 1e-2, "sft_steps": 3, "reward_fn": reward_file(tmp_path)}
    flags |= {"total_episodes": 32, "eval_samples": 4}
    ppo_rlhf_token.train(ppo_rlhf_token.Args(**flags), tmp_path / "plain")
    grpo.train(grpo.Args(**flags, critic="shared", group_size=1), tmp_path / "recipe")
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "recipe")


def test_it_learns(grpo, tmp_path):
    """The gold score as reward rises, and the policy wins over the reference."""
    body = "return [ppo_rlhf_token.gold_score(p + r) for p, r in zip(prompts, responses)]"
    flags = {"sft_steps": 40, "sft_learning_rate": 1e-2, "total_episodes": 256, "batch_size": 64, "kl_coef": 0.02}
    flags |= {"micro_batch_size": 32, "num_minibatches": 2, "learning_rate": 1e-2, "response_length": 12}
    flags |= {"missing_eos_penalty": 0.0, "reward_fn": reward_file(tmp_path, body), "checkpoint_interval": 100}
    summary = grpo.train(grpo.Args(**SMALL | flags | {"eval_samples": 40}), tmp_path / "run")
    assert summary["win_rate"] > 0.65


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--vf-coef", "1"], "--vf-coef has no effect"),
        (["--kl-estimator", "k3"], "--kl-estimator has no effect"),
        (["--group-size", "0"], "--group-size must be above 0"),
        (["--group-size", "1"], "--group-size must be above 1"),
        (["--group-size", "24"], "--batch-size must be a multiple of"),
    ],
)
def test_flags_of_groups(grpo, monkeypatch, given, said):
    assert said in mistake(grpo, monkeypatch, *given)


# ------------------------------------------------------------------------------------------------------------------ ptx


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_loss_is_the_sum_of_both(modules, ptx, tmp_path, critic):
    """Loss and gradient are those of PPO, and gamma times those of the negative log-probs of the data's responses, a
    mean over their tokens that counts as a sum over those of PPO."""
    policy, batch, _, args = small_batch(ptx, tmp_path, critic=critic, ptx_coef=0.6)
    models = policy, policy.branch("critic") if critic == "separate" else policy
    data = [ptx.Example("", "", *row, [], None, {}) for row in (([4], [5, 6, 7, 1]), ([9, 9], [1]), ([3], [12, 8, 1]))]
    log_probs, _ = policy.log_probs(data, 1.0)
    by_hand = [-log_probs[i, t] for i, x in enumerate(data) for t in range(len(x.response))]
    count = sum(len(x.response) for x in batch["examples"])
    ptx_loss = count * torch.stack(by_hand).mean()
    wanted = 0.6 * gradients(policy, ptx_loss)

    losses, found = [], []
    for script, more in ((ppo_rlhf_token, {}), (ptx, {"data": data})):
        loss, figures = script.ppo_loss(*models, script.Batch(**batch, **more), args)
        loss.backward()
        losses.append(loss.item())
        found.append(
            torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.parameters()])
        )
        for model in models:
            for parameter in model.parameters():
                parameter.grad = None
    assert losses[1] - losses[0] == pytest.approx(0.6 * ptx_loss.item(), rel=1e-4)
    assert figures["loss/ptx_avg"].item() == pytest.approx(ptx_loss.item(), rel=1e-5)
    assert wanted.norm() > 0.1
    torch.testing.assert_close(found[1], found[0] + wanted, rtol=1e-4, atol=1e-5)


def test_what_is_kept_and_what_is_logged(ptx, tmp_path):
    """A micro-batch has the rows of its iteration's prompts. The loss on held-out responses is that of the reference
    before the first step, and lower at the end where the data is held on to."""
    seen, rollout = [], ptx.rollout
    flags = SMALL | {"sft_steps": 30, "sft_learning_rate": 1e-2, "learning_rate": 1e-2, "kl_coef": 0.0}
    flags |= {"total_episodes": 48, "reward_fn": reward_file(tmp_path), "missing_eos_penalty": 0.0}
    flags |= {"micro_batch_size": 8, "eval_samples": 4, "checkpoint_interval": 100}
    summaries = []
    for coef in (0.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ptx, "rollout", lambda *given: seen.append((given, rollout(*given))) or seen[-1][1])
            summaries.append(ptx.train(ptx.Args(**flags, ptx_coef=coef), tmp_path / str(coef)))
        flags |= {"model": str(tmp_path / "0.0" / "sft"), "sft_steps": 0}
    for given, (batches, _) in seen:
        assert [x for batch in batches for x in batch.data] == given[4]
        assert all(len(batch.data) == len(batch.examples) for batch in batches)
    args = ptx.Args(**flags)
    examples, _ = ptx.load_examples(args)
    held_out = ptx.hold_out(examples, args.seed)[1]
    reference = ptx.load_model(tmp_path / "0.0" / "sft", args)
    with torch.no_grad():
        log_probs = [reference.log_probs([x], 1.0)[0].flatten() for x in held_out]
    loss = -torch.cat(log_probs[: args.batch_size]).mean().item()
    first = [float(read_metrics(tmp_path / name)[0]["objective/held_out_loss"]) for name in ("0.0", "1.0")]
    assert first == pytest.approx([loss, loss], rel=1e-4)
    loss = -torch.cat(log_probs[:4]).mean().item()
    assert [x["held_out_loss_before"] for x in summaries] == pytest.approx([loss, loss], rel=1e-4)
    assert summaries[1]["held_out_loss_after"] < summaries[0]["held_out_loss_after"] - 0.1


def test_flags_of_the_data(ptx, tmp_path, monkeypatch):
    assert "--ptx-coef must be at least 0" in mistake(ptx, monkeypatch, "--ptx-coef", -1)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the soup"}) + "\n")
    model = make_folder(tmp_path / "qwen2", "qwen2")
    given = ["--model", model, "--sft-steps", 0, "--dataset", tmp_path / "prompts.jsonl", "--reward-fn"]
    assert "lacks responses" in mistake(ptx, monkeypatch, *given, reward_file(tmp_path))
