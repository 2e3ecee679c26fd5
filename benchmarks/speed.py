"""Speed side by side with peers: all in turn, every run a fresh process of one thread, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl
    python benchmarks/speed.py all --cleanrl ../cleanrl
    python benchmarks/speed.py discrete --cleanrl ../cleanrl

Prints medians. With the default amount of work it also writes all figures, with the machine's name, to
benchmarks/results/speed/<suite>.json, of which benchmarks/plot.py makes the README's table.
"""

import csv
import importlib
import json
import os
import random
import re
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EARLIER = "f4f37a2"  # the commit before the scripts were made minimal, the yardstick for their speed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense FLOP/s, from their data sheets
# CleanRL's settings for CartPole-v1 and MuJoCo, in the flags of its scripts and ours and as stable-baselines3 calls
# them, and rl-baselines3-zoo's tuned ones for CartPole-v1 (hyperparams/ppo.yml).
CARTPOLE = "--num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 --learning-rate 2.5e-4 --gamma 0.99"
CARTPOLE += " --gae-lambda 0.95 --ent-coef 0.01"
SB3_CARTPOLE = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.01}
SB3_ZOO = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0}
MUJOCO = "--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32"
MUJOCO += " --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95 --vf-coef 0.5 --clip-vloss"
MUJOCO_OURS = " --norm-adv --no-recompute-advantages --log-std-init 0"  # which its script does without being told
SB3_MUJOCO = {
    "n_steps": 2048,
    "batch_size": 64,
    "n_epochs": 10,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range_vf": 0.2,
}
QWEN2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2 |= {"num_key_value_heads": 2}  # Qwen2-0.5B's sizes


@dataclass
class Args:
    """Speed of our scripts beside their peers."""

    suite: Literal["all", "discrete", "continuous", "llm", "rlhf", "rlhf_memory"]
    """what to measure"""
    cleanrl: Path | None = None
    """discrete and continuous: a checkout of https://github.com/vwxyzjn/cleanrl"""
    pairs: int | None = None
    """runs of each side, in turn; default 5, of llm and rlhf 3, of rlhf_memory, whose figures hardly vary, 1"""
    steps: int | None = None
    """environment steps per run of discrete and continuous; default 100,000 and 20,480"""
    llm_id: Literal["qwen2-0.5b-random", "tiny-random"] = "qwen2-0.5b-random"
    """llm: size of the body"""
    updates: int = 6
    """rlhf: PPO iterations of a run"""


# ------------------------------------------------------------------------------ the sides, each a process of its own


def timed(function: Callable, times: list[float]) -> Callable:
    """The function, which adds its seconds to times."""

    def wrapped(*given: object, **options: object) -> object:
        start = time.perf_counter()
        result = function(*given, **options)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        return result

    return wrapped


def solved() -> None:
    """Ends the process with the seconds since its start."""
    print(json.dumps({"seconds": time.time() - float(os.environ["STARTED"])}), flush=True)
    os._exit(0)


def ours(script: str, flags: str, seed: int, is_earlier: bool = False, until_475: bool = False) -> dict:
    """A script of ours as it is, or as it was at the commit EARLIER."""
    if is_earlier:
        git = ["git", "-C", str(ROOT), "show", f"{EARLIER}:{script}"]
        Path(script).write_bytes(subprocess.run(git, stdout=subprocess.PIPE, check=True).stdout)
        flags += " --torch-threads 1"
    sys.path.insert(0, "." if is_earlier else str(ROOT))
    ppo = importlib.import_module(script.removesuffix(".py"))
    write = ppo.MetricsLog.write

    def spied_write(log: object, metrics: dict) -> None:
        write(log, metrics)
        if metrics["charts/episodic_return"] >= 475:
            solved()

    if until_475:
        ppo.MetricsLog.write = spied_write
    sys.argv = [script, *flags.split(), "--seed", str(seed), "--run-dir", "run"]
    ppo.main()
    summary = json.loads(Path("run/summary.json").read_text())
    return {"steps_per_second": summary["global_step"] / summary["seconds"]}


def sb3(
    env_id: str, num_envs: int, rate: float, seed: int, steps: int, settings: dict, until_475: bool = False
) -> dict:
    """stable-baselines3. Its VecNormalize stands for the normalisation that is on in the others on MuJoCo."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class Solved(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            if until_475 and len(returns) == 100 and sum(returns) >= 47_500:
                solved()

    env = make_vec_env(env_id, n_envs=num_envs, seed=seed)
    if env_id == "HalfCheetah-v5":
        env = VecNormalize(env, gamma=settings["gamma"])
    if until_475:
        settings["clip_range"] = lambda left: 0.2 * left
    model = PPO("MlpPolicy", env, learning_rate=lambda left: rate * left, seed=seed, device="cpu", **settings)
    start = time.perf_counter()
    model.learn(steps, callback=Solved())
    return {"steps_per_second": model.num_timesteps / (time.perf_counter() - start)}


def cleanrl(file: str, flags: str, seed: int) -> dict:
    """CleanRL's file as it is, which prints its steps/s after each iteration. It is written for gymnasium 0.29, whose
    TransformObservation asked for no observation space."""
    import gymnasium as gym

    transform = gym.wrappers.TransformObservation
    gym.wrappers.TransformObservation = lambda env, f, space=None: transform(env, f, space or env.observation_space)
    sys.argv = [file, *flags.split(), "--seed", str(seed)]
    with redirect_stdout(StringIO()) as output:
        runpy.run_path(file, run_name="__main__")
    return {"steps_per_second": float(re.findall(r"SPS: (\d+)", output.getvalue())[-1])}


def llm_policy(side: str, llm_id: str, seed: int) -> dict:
    """A policy of Qwen2-0.5B's size, as ppo_llm_policy.py makes it and as document 000 writes it: a whole causal LM,
    dropout in the adapters, all hidden states. Encoder, head, loss and optimiser are the same."""
    import peft
    import transformers

    import ppo_llm_policy as ppo

    args = ppo.Args(seed=seed, bfloat16=DEVICE == "cuda", device=DEVICE)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = tiny | {"num_key_value_heads": 2, "initializer_range": 0.125}
    if llm_id == "qwen2-0.5b-random":
        sizes = QWEN2 | {"rope_theta": 1e6, "initializer_range": 0.02}
    make_config = transformers.Qwen2Config
    transformers.Qwen2Config = lambda **given: make_config(**given | sizes)  # of which the script makes its random body

    class DocumentsNetwork(ppo.LLMNetwork):
        def forward(self, states: torch.Tensor) -> torch.distributions.Distribution:
            outputs = self.body(inputs_embeds=self.encoder(states).to(self.body.dtype), output_hidden_states=True)
            return self.distribution(self.head(outputs.hidden_states[-1][:, -1, :].float()))

    def documents_body(args: ppo.Args) -> torch.nn.Module:
        config = make_config(**sizes, vocab_size=151_936, tie_word_embeddings=True)
        lm = transformers.AutoModelForCausalLM.from_config(config).to(
            torch.bfloat16 if args.bfloat16 else torch.float32
        )
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05)
        with warnings.catch_warnings(action="ignore"):
            return peft.get_peft_model(lm, lora)

    if side == "document":
        ppo.NETWORKS["llm"], ppo.load_body = DocumentsNetwork, documents_body
    torch.manual_seed(seed)
    policy = ppo.StochasticPolicy(ppo.NETWORKS["llm"](args, 4, 2, True)).to(DEVICE)
    critic = ppo.mlp(4, 1, 1.0).to(DEVICE)
    parameters = [p for p in [*policy.parameters(), *critic.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def forward(batch: ppo.Batch) -> None:
        policy.eval()
        policy.get_action(batch.states)

    def update(batch: ppo.Batch) -> None:
        policy.train()
        loss, _ = ppo.ppo_loss(policy, critic, batch, args)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    figures = {"states": 256, "rows": 512} if DEVICE == "cuda" else {"states": 8, "rows": 64}
    for work, rows, repeats in ((forward, figures["states"], 15), (update, figures["rows"], 6)):
        actions, times = torch.zeros(rows, dtype=torch.long, device=DEVICE), []
        batch = ppo.Batch(torch.randn(rows, 1, 4, device=DEVICE), actions, *torch.zeros(3, rows, device=DEVICE))
        for _ in range(repeats + 2):  # the first two warm up
            timed(work, times)(batch)
        figures[work.__name__] = statistics.median(times[2:])
    if DEVICE == "cpu":
        return figures
    layers = [p for n, p in policy.network.body.named_parameters() if ".layers." in n and "lora_" not in n]
    figures |= {"weights": sum(p.numel() for p in layers), "peak_memory": torch.cuda.max_memory_allocated()}
    work = {"num_envs": 256, "num_steps": 16, "num_minibatches": 8, "update_epochs": 4, "total_timesteps": 20_000}
    ppo.save = lambda *path, **content: None
    summary = ppo.train(ppo.Args(seed=seed, bfloat16=True, device=DEVICE, **work), Path("run"))
    return figures | {"steps_per_second": summary["global_step"] / summary["seconds"]}


def rlhf_files(work: str) -> None:
    """Models, tokenizer and data for the sides of rlhf: a small model, or for "memory" one of Qwen2-0.5B's size, both
    with random weights. "gpu" takes the data alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    import ppo_rlhf_token as ppo

    small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = QWEN2 | {"vocab_size": 151_936, "tie_word_embeddings": True}
    if work != "memory":
        sizes = small | {"num_key_value_heads": 4, "vocab_size": 256}
    config = AutoConfig.for_model("qwen2", pad_token_id=0, eos_token_id=1, num_labels=1, **sizes)
    words, rng = [f"w{i}" for i in range(253)], random.Random(0)
    for name, auto in (("model", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        auto.from_config(config).save_pretrained(name)
        ppo.make_tokenizer([" ".join(words)]).save_pretrained(name)
    names = ("prompt", "chosen", "rejected")
    rows = [{name: " ".join(rng.choices(words, k=8)) for name in names} for _ in range(512)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rlhf_side(side: str, work: str, updates: int, files: str, seed: int) -> dict:
    """Token-level PPO by ppo_rlhf_token.py and by TRL's trainer: the same prompts, response length, batch, epochs and
    thread. "speed": a reward model and, where the critic is separate (TRL knows no other), a critic of the policy's
    size, all weights trained. Else: LoRA, a reward model and a critic; ours trains its reward model, an adapter, for a
    step."""
    sizes = {"speed": (64, 4, 24, 64), "memory": (8, 1, 24, 8), "gpu": (256, 2, 128, 64)}
    batch, epochs, length, micro_batch = sizes[work]
    updates = {"speed": updates, "memory": 1, "gpu": 3}[work]
    settings = {
        "response_length": length,
        "temperature": 1.0,
        "kl_coef": 0.05,
        "learning_rate": 1e-5,
        "total_episodes": batch * updates,
    }
    if side == "trl":
        seconds = trl_seconds(Path(files), batch, epochs, work != "speed", settings)
        return {"episodes_per_second": batch * updates / seconds}
    import ppo_rlhf_token as ppo

    settings |= {"reward_model": f"{files}/reward"} if work == "speed" else {"lora_rank": 16, "reward_steps": 1}
    model = str(ROOT / "runs/smollm2") if work == "gpu" else f"{files}/model"
    settings |= {"model": model, "dataset": f"{files}/rows.jsonl", "sft_steps": 0, "reward_batch_size": 8}
    settings |= {"batch_size": batch, "num_minibatches": 1, "update_epochs": epochs, "micro_batch_size": micro_batch}
    settings |= {"critic": side, "missing_eos_penalty": 0.0, "eval_samples": 4, "bf16": work == "gpu", "device": DEVICE}
    rollouts, update_times, generations = [], [], []
    ppo.rollout, ppo.update = timed(ppo.rollout, rollouts), timed(ppo.update, update_times)
    ppo.Model.generate = timed(ppo.Model.generate, generations)
    ppo.train(ppo.Args(**settings), Path("run"))
    with open("run/metrics.csv") as file:
        tokens = batch * sum(float(row["objective/response_length"]) for row in csv.DictReader(file))
    return {
        "episodes_per_second": batch * updates / sum(rollouts + update_times),
        "generation_tokens_per_second": tokens / sum(generations[-1 - updates : -1]),  # the last one is evaluation
        "update_tokens_per_second": epochs * tokens / sum(update_times),
    }


def trl_seconds(files: Path, batch: int, epochs: int, has_lora: bool, settings: dict) -> float:
    """Seconds of TRL's training."""
    import datasets
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(files / "model")
    prompts = [json.loads(line)["prompt"] for line in (files / "rows.jsonl").read_text().splitlines()]
    data = datasets.Dataset.from_list([{"input_ids": tokenizer.encode(prompt)} for prompt in prompts])
    settings |= {
        "per_device_train_batch_size": batch,
        "local_rollout_forward_batch_size": batch,
        "num_ppo_epochs": epochs,
    }
    settings |= {"gradient_accumulation_steps": 1, "num_mini_batches": 1, "num_sample_generations": 0, "use_cpu": True}
    settings |= {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(files / "reward", dtype=torch.float32) for _ in range(2)
    )
    trainer = PPOTrainer(
        args=PPOConfig(output_dir="trl", disable_tqdm=True, **settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        peft_config=lora if has_lora else None,
    )
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------------- comparisons


def measure(function: Callable, folder: str | None = None, **given: object) -> dict:
    """The figures of a side in a new process, and "peak_memory" in bytes. Ends with the reason where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STARTED": str(time.time())}
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, __file__, "side", function.__name__, json.dumps(given)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=folder or empty, env=environment, check=False, **pipes)
    if done.returncode:
        sys.exit(f"error: {function.__name__} {given}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(pairs: int, sides: dict[str, tuple[Callable, dict]]) -> dict[str, list[dict]]:
    """Figures of each side, by seed."""
    results = {name: [] for name in sides}
    for seed in tqdm(range(1, pairs + 1), unit="pair", desc=", ".join(sides)):
        for name, (function, given) in sides.items():
            results[name].append(measure(function, **given, seed=seed))
    return results


def compare(script: str, work: str, unit: str, peer: str, ours: list[float], theirs: list[float]) -> dict:
    """A comparison, as it is written down, and printed. The ratio says how many times as fast ours is, of memory which
    share of theirs it takes."""
    ratios = [b / a if unit in ("s", "ms") else a / b for a, b in zip(ours, theirs)]
    a, b, ratio = (f"{statistics.median(values):,.4g}" if values else "never" for values in (ours, theirs, ratios))
    print(f"{work}, {unit}: {script} {a}, {peer} {b}, ratio {ratio}; pair by pair {[round(x, 2) for x in ratios]}")
    return {
        "script": script,
        "work": work,
        "unit": unit,
        "peer": peer,
        "ours": ours,
        "theirs": theirs,
        "ratios": ratios,
    }


def column(results: list[dict], name: str, scale: float = 1) -> list[float]:
    """A figure of each run."""
    return [result[name] / scale for result in results]


def side_by_side(args: Args, script: str, theirs: str, work: str, flags: str, more: str, baselines: dict) -> list[dict]:
    """Comparisons of steps/s with stable-baselines3, CleanRL and our earlier script, and of memory with the latter.

    theirs: CleanRL's script; flags: what both it and ours are given; more: what ours alone is given."""
    steps = args.steps or {"ppo_mlp_discrete.py": 100_000, "ppo_mlp_continuous.py": 20_480}[script]
    flags, before = f"{flags} --total-timesteps {steps}", f"commit {EARLIER}"
    given = {"script": script, "flags": f"{flags} {more} --eval-episodes 1"}
    sides = {"ours": (ours, given), "stable-baselines3": (sb3, baselines | {"steps": steps})}
    sides["CleanRL"] = (cleanrl, {"file": str(args.cleanrl.resolve() / "cleanrl" / theirs), "flags": flags})
    sides[before] = (ours, given | {"is_earlier": True})
    results = in_turn(args.pairs, sides)
    rates = {name: column(figures, "steps_per_second") for name, figures in results.items()}
    memory = [column(results[name], "peak_memory", 1e9) for name in ("ours", before)]
    comparisons = [compare(script, work, "steps/s", name, rates["ours"], rates[name]) for name in [*sides][1:]]
    return [*comparisons, compare(script, f"{work}, peak memory", "GB", before, *memory)]


def discrete(args: Args) -> dict:
    """CartPole-v1: steps/s at equal work, and seconds to a mean return of 475."""
    script, work = "ppo_mlp_discrete.py", "CartPole-v1, 4 envs × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh"
    baselines = {"env_id": "CartPole-v1", "num_envs": 4, "rate": 2.5e-4, "settings": SB3_CARTPOLE}
    comparisons = side_by_side(args, script, "ppo.py", work, CARTPOLE, "--clip-vloss", baselines)
    zoo = {"env_id": "CartPole-v1", "num_envs": 8, "rate": 1e-3, "settings": SB3_ZOO, "steps": 100_000}
    sides = {"ours": (ours, {"script": script, "flags": ""}), "stable-baselines3": (sb3, zoo)}
    sides = {name: (side, given | {"until_475": True}) for name, (side, given) in sides.items()}
    pairs = [pair for pair in zip(*in_turn(args.pairs, sides).values()) if all("seconds" in side for side in pair)]
    work = f"CartPole-v1 from process start to a mean return of 475, own best settings ({len(pairs)} seeds reach it)"
    times = [column([pair[i] for pair in pairs], "seconds") for i in range(2)]
    return {"comparisons": [*comparisons, compare(script, work, "s", "stable-baselines3", *times)]}


def continuous(args: Args) -> dict:
    """HalfCheetah-v5: steps/s at equal work, and at our defaults."""
    script, work = "ppo_mlp_continuous.py", "HalfCheetah-v5, 1 env × 2048 steps, 10 epochs × 32 minibatches, 64-64 tanh"
    baselines = {"env_id": "HalfCheetah-v5", "num_envs": 1, "rate": 3e-4, "settings": SB3_MUJOCO}
    comparisons = side_by_side(args, script, "ppo_continuous_action.py", work, MUJOCO, MUJOCO_OURS, baselines)
    given = {"script": script, "flags": f"--total-timesteps {2 * (args.steps or 20_480)} --eval-episodes 1"}
    results = in_turn(args.pairs, {"ours": (ours, given), "earlier": (ours, given | {"is_earlier": True})})
    rates = [column(figures, "steps_per_second") for figures in results.values()]
    work = "HalfCheetah-v5, defaults (8 envs × 256 steps)"
    return {"comparisons": [*comparisons, compare(script, work, "steps/s", f"commit {EARLIER}", *rates)]}


def llm(args: Args) -> dict:
    """A language model as policy: forward pass, update and peak memory of ours and of the document's construct."""
    sides = {side: (llm_policy, {"side": side, "llm_id": args.llm_id}) for side in ("ours", "document")}
    results = in_turn(args.pairs, sides)
    first, size = results["ours"][0], "Qwen2-0.5B's size" if args.llm_id == "qwen2-0.5b-random" else "tiny body"
    works = [(f"forward of {first['states']} states", "ms", "forward", 1e-3)]
    works += [(f"update of {first['rows']} states", "ms", "update", 1e-3), ("peak memory", "GB", "peak_memory", 1e9)]
    if "steps_per_second" in first:
        works.append(("training, 256 environments, bfloat16", "steps/s", "steps_per_second", 1))
    comparisons = [
        compare(
            "ppo_llm_policy.py",
            f"{size}, LoRA: {work}",
            unit,
            "the document's construct",
            *(column(figures, name, scale) for figures in results.values()),
        )
        for work, unit, name, scale in works
    ]
    if "steps_per_second" not in first:
        return {"comparisons": comparisons}
    # Of a state: one pass to act, one to score, and in each of four epochs one forward and one backward, which is as
    # much because the body is frozen; two operations per weight and pass.
    flops = 2 * first["weights"] * 10 * statistics.median(column(results["ours"], "steps_per_second"))
    peak = next((flops for name, flops in PEAK_BF16.items() if name in torch.cuda.get_device_name()), None)
    return {"comparisons": comparisons, "flops": flops, "peak_flops": peak}


def rlhf(args: Args, on_cpu: str = "speed") -> dict:
    """Token-level PPO beside TRL's trainer: episodes/s with a shared and a separate critic, or peak memory with LoRA
    at Qwen2-0.5B's size. Where there is a GPU, tokens/s of SmolLM2 (`python benchmarks/smollm2.py runs/smollm2`) in
    bfloat16, by critic."""
    work = "gpu" if DEVICE == "cuda" else on_cpu
    names = ("shared", "separate", "trl") if DEVICE == "cpu" else ("shared", "separate")
    with tempfile.TemporaryDirectory() as files:
        measure(rlhf_files, files, work=work)
        given = {"work": work, "updates": args.updates, "files": files}
        results = in_turn(args.pairs, {name: (rlhf_side, given | {"side": name}) for name in names})
    size = "4-layer, 128-wide Qwen2, 64 prompts × 24 tokens, 4 epochs" if work == "speed" else "Qwen2-0.5B's size, LoRA"
    if work == "gpu":
        size = "SmolLM2-135M in bfloat16, LoRA, 256 prompts × 128 tokens, 2 epochs"
    figures = [("episodes_per_second", "episodes/s", 1)] if work == "speed" else [("peak_memory", "GB", 1e9)]
    if work == "gpu":
        figures += [(f"{part}_tokens_per_second", f"{part} tokens/s", 1) for part in ("generation", "update")]
    *sides, peer = names
    return {
        "comparisons": [
            compare(
                "ppo_rlhf_token.py",
                f"{size}, {side} critic",
                unit,
                "TRL" if peer == "trl" else f"{peer} critic",
                *(column(results[name], figure, scale) for name in (side, peer)),
            )
            for figure, unit, scale in figures
            for side in sides
        ]
    }


def main() -> None:
    """Runs suites, prints them and writes them down; as a process of its own, a side of a pair."""
    if sys.argv[1:2] == ["side"]:
        torch.set_num_threads(1)
        figures = globals()[sys.argv[2]](**json.loads(sys.argv[3])) or {}
        peak = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print("\n" + json.dumps({"peak_memory": peak} | figures))
        return
    from run import RESULTS, commit, installed, machine

    args = tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,))
    suites = {"discrete": (discrete, 5), "continuous": (continuous, 5), "llm": (llm, 3), "rlhf": (rlhf, 3)}
    if DEVICE == "cpu":  # on a GPU, rlhf measures memory too
        suites["rlhf_memory"] = (partial(rlhf, on_cpu="memory"), 1)
    names = [name for name in suites if args.suite in ("all", name)] or ["rlhf"]
    if {"discrete", "continuous"} & {*names} and not args.cleanrl:
        sys.exit("error: --cleanrl wants a checkout of https://github.com/vwxyzjn/cleanrl")
    packages = ("torch", "transformers", "peft", "numpy", "gymnasium", "mujoco", "stable_baselines3", "trl")
    for name in names:
        suite, pairs = suites[name]
        start, facts = time.perf_counter(), {"machine": machine(), "versions": installed(packages), "git": commit()}
        figures = suite(replace(args, pairs=args.pairs or pairs))
        if args == Args(args.suite, args.cleanrl):  # other work would not be what the table says
            path = RESULTS / "speed" / f"{name}{'_cuda' * (DEVICE == 'cuda' and name in ('llm', 'rlhf'))}.json"
            facts |= {"seconds": round(time.perf_counter() - start)}
            path.write_text(json.dumps(facts | figures, indent=1) + "\n")
            print(f"written to {path}")


if __name__ == "__main__":
    main()
