"""Speed side by side with peers: both in turn, every run a fresh process, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    python benchmarks/speed.py all
    python benchmarks/speed.py discrete

Prints medians and ranges. Without further flags it also writes them, with the machine's name, to
benchmarks/results/speed/<suite>.json, of which benchmarks/plot.py makes the README's table.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ppo_mlp_discrete import machine  # noqa: E402

# CleanRL's settings for CartPole-v1, in the flags of ppo_mlp_discrete.py and as stable-baselines3 calls them.
CLEANRL = "--update-epochs 4 --num-minibatches 4 --learning-rate 2.5e-4 --gamma 0.99"
CLEANRL += " --gae-lambda 0.95 --ent-coef 0.01 --eval-episodes 0"
SB3_SAME_WORK = """
env = make_vec_env("CartPole-v1", n_envs=4, seed={seed})
model = PPO("MlpPolicy", env, n_steps=128, batch_size=128, n_epochs=4, learning_rate=lambda left: 2.5e-4 * left,
            gamma=0.99, gae_lambda=0.95, ent_coef=0.01, seed={seed}, device="cpu")
"""
# rl-baselines3-zoo's tuned settings for CartPole-v1 (hyperparams/ppo.yml).
SB3_ZOO = """
env = make_vec_env("CartPole-v1", n_envs=8, seed={seed})
model = PPO("MlpPolicy", env, n_steps=32, batch_size=256, n_epochs=20, learning_rate=lambda left: 1e-3 * left,
            clip_range=lambda left: 0.2 * left, gamma=0.98, gae_lambda=0.8, ent_coef=0.0, seed={seed}, device="cpu")
"""
# CleanRL's settings for MuJoCo, likewise. SB3's VecNormalize stands for the normalisation that is on in our script.
CLEANRL_MUJOCO = "--update-epochs 10 --num-minibatches 32 --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95"
CLEANRL_MUJOCO += " --clip-vloss --vf-coef 0.5 --norm-adv --no-recompute-advantages --log-std-init 0 --eval-episodes 0"
SB3_MUJOCO = """
from stable_baselines3.common.vec_env import VecNormalize
env = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=1, seed={seed}), gamma=0.99)
model = PPO("MlpPolicy", env, n_steps=2048, batch_size=64, n_epochs=10, learning_rate=lambda left: 3e-4 * left,
            gamma=0.99, gae_lambda=0.95, clip_range_vf=0.2, ent_coef=0.0, vf_coef=0.5, seed={seed}, device="cpu")
"""
# The environments of our script alone, with random actions: steps/s.
SIMULATOR_PROGRAM = """
import json, time
import numpy as np
from ppo_mlp_continuous import make_envs
envs = make_envs("HalfCheetah-v5", {envs}, "{mode}")
envs.reset(seed=1)
shape = ({steps} // {envs}, {envs}, *envs.single_action_space.shape)
actions = np.random.default_rng(1).uniform(-1, 1, shape).astype(envs.single_action_space.dtype)
start = time.perf_counter()
for action in actions:
    envs.step(action)
print(json.dumps({{"steps_per_second": len(actions) * {envs} / (time.perf_counter() - start)}}))
"""
SB3_PROGRAM = """
import json, time, torch
torch.set_num_threads(1)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
{model}
class Solved(BaseCallback):
    def _on_step(self):
        return True
    def _on_rollout_end(self):
        self.returns = [episode["r"] for episode in self.model.ep_info_buffer]
        full = len(self.returns) == 100
        self.mean = sum(self.returns) / 100 if full else 0.0
        if {target} is not None and self.mean >= {target}:
            raise StopIteration
solved = Solved()
start = time.perf_counter()
try:
    model.learn({steps}, callback=solved)
except StopIteration:
    pass
seconds = time.perf_counter() - start
print(json.dumps({{"global_step": model.num_timesteps, "seconds": seconds, "mean_return": solved.mean,
                   "steps_per_second": model.num_timesteps / seconds}}))
"""
# A policy of Qwen2-0.5B's size, as ppo_llm_policy.py makes it and as document 000 writes it: a whole causal LM, dropout
# in the adapters, all hidden states. Encoder, head, loss and optimiser are the same. Prints seconds of forward passes
# and of updates, the peak memory, and the steps/s of a training run where there is a GPU.
LLM_PROGRAM = """
import json, resource, tempfile, time, warnings
import peft, torch, transformers
import ppo_llm_policy as ppo

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

class DocumentsNetwork(ppo.LLMNetwork):
    def outputs(self, states, mask):
        tokens = self.encoder(states).to(self.body.dtype)
        llm_outputs = self.body(inputs_embeds=tokens, output_hidden_states=True)
        return self.head(llm_outputs.hidden_states[-1][:, -1, :].float())

def documents_network(args, spec, dtype):
    config = transformers.AutoConfig.for_model("qwen2", **ppo.RANDOM_BODIES[args.llm_id], vocab_size=151_936,
                                                 tie_word_embeddings=True)
    llm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings(action="ignore"):
        llm = peft.get_peft_model(llm, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.05))
    return DocumentsNetwork(spec, llm)

if "{side}" == "document":
    ppo.make_network = documents_network
    ppo.check_ratio = lambda log_ratio, dtype: "dropout is on in the update"
    ppo.save_policy = ppo.draw_returns = lambda *a: None
args = ppo.Args(llm_id="{llm_id}", seed={seed}, eval_episodes=0)
spec = {{"env_id": "CartPole-v1", "obs_dim": 4, "observe": [0, 1, 2, 3], "history": 1, "n": 2}}
ppo.start_device(args, 1, device)
torch.manual_seed(args.seed)
policy = ppo.StochasticPolicy(ppo.make_network(args, spec, dtype)).to(device)
critic = ppo.mlp(4, 1, 1.0).to(device)
parameters = ppo.flatten_parameters(policy, critic)
optimizer = torch.optim.Adam([parameters], lr=1e-4, fused=True)

def batch_of(rows):
    states, mask = torch.randn(rows, 1, 4, device=device), torch.ones(rows, 1, dtype=torch.bool, device=device)
    vectors = torch.zeros(4, rows, device=device)
    return ppo.Batch(states, mask, torch.zeros(rows, dtype=torch.long, device=device), *vectors)

def forward(batch):
    policy.eval()
    with torch.no_grad():
        policy.get_action(batch.states)

def update(batch):
    policy.train()
    parameters.grad.zero_()
    loss, _ = ppo.policy_ppo_loss(policy, critic, batch, len(batch.states), args)
    loss.backward()
    parameters.grad.mul_((0.5 / (parameters.grad.norm() + 1e-6)).clamp(max=1))
    optimizer.step()

def seconds(work, rows, repeats):
    batch, times = batch_of(rows), []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        work(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[2:]

states, rows = (256, 512) if device == "cuda" else (8, 64)
figures = {{"states": states, "rows": rows}}
figures |= {{"forward": seconds(forward, states, 15), "update": seconds(update, rows, 6)}}
layers = [p for n, p in policy.network.body.named_parameters() if ".layers." in n and "lora_" not in n]
figures["body_parameters"] = sum(p.numel() for p in layers)
if device == "cuda":
    figures["peak_memory"] = torch.cuda.max_memory_allocated()
    args = ppo.Args(llm_id="{llm_id}", seed={seed}, eval_episodes=0, num_envs=256, num_steps=16, num_minibatches=8,
                    update_epochs=4, total_timesteps=20_000, run_dir=tempfile.mkdtemp() + "/run")
    del policy, parameters, optimizer
    figures["steps_per_second"] = ppo.train(args)["steps_per_second"]
    figures["update_epochs"] = args.update_epochs
else:
    figures["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print()
print(json.dumps(figures))
"""
# Token-level PPO on random models, by ppo_rlhf_token.py and by TRL's trainer: the same prompts, response length, batch,
# epochs and thread. "speed": a small model with a reward model and, where the critic is separate (TRL knows no other),
# a critic of its size, all weights trained. "memory": Qwen2-0.5B's size with LoRA, a reward model and a critic; ours
# trains its reward model, an adapter, for a step. Prints the episodes/s of the PPO loop and the process's peak memory.
RLHF_PROGRAM = """
import json, random, resource, sys, time
from pathlib import Path
import torch, transformers
import ppo_rlhf_token as ppo

folder, side, work, device = Path({folder!r}), {side!r}, {work!r}, {device!r}
torch.set_num_threads(1)
sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
vocabulary, batch, updates, epochs, length = 256, 64, {updates}, 4, 24
if work != "speed":
    sizes = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, tie_word_embeddings=True)
    vocabulary = 151_936
if work == "memory":
    batch, updates, epochs = 8, 1, 1
if work == "gpu":
    batch, updates, epochs, length = 256, 3, 2, 128
if not (folder / "reward").exists():
    torch.manual_seed(0)
    words = ppo.make_tokenizer([ppo.Row(" ".join(f"w{{i}}" for i in range(253)))])
    config = transformers.AutoConfig.for_model("qwen2", vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **sizes)
    config.num_labels = 1
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    if work == "speed" or side == "trl":
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
        words.save_pretrained(folder / "reward")
    words.save_pretrained(folder / "model")
rng = random.Random(0)
text = lambda: " ".join(f"w{{rng.randrange(253)}}" for _ in range(8))
rows = [dict(prompt=text(), chosen=text(), rejected=text()) for _ in range(512)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
settings = dict(response_length=length, temperature=1.0, kl_coef=0.05, learning_rate=1e-5)
if side == "trl":
    import datasets, peft
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "model")
    load = lambda auto, name: auto.from_pretrained(folder / name, dtype=torch.float32)
    lm = load(transformers.AutoModelForCausalLM, "model")
    reward, value = (load(transformers.AutoModelForSequenceClassification, "reward") for _ in range(2))
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=epochs, total_episodes=batch * updates, report_to="none", save_strategy="no",
        num_sample_generations=0, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        local_rollout_forward_batch_size=batch, **settings,
    )
    data = datasets.Dataset.from_list([dict(input_ids=words.encode(row["prompt"])) for row in rows])
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        args=config, processing_class=words, model=lm, ref_model=None,
        reward_model=reward, value_model=value, train_dataset=data, eval_dataset=data.select(range(8)),
        peft_config=None if work == "speed" else lora,
    )
    start = time.perf_counter()
    trainer.train()
    figures = dict(episodes_per_second=batch * updates / (time.perf_counter() - start))
else:
    sources = dict(reward_model=str(folder / "reward")) if work == "speed" else dict(lora_rank=16, reward_steps=1)
    gpu = dict(bf16=True, compile=side == "compiled") if work == "gpu" else dict()
    args = ppo.Args(
        model=str(folder / "model"), dataset=str(folder / "rows.jsonl"), sft_steps=0, reward_batch_size=8,
        total_episodes=batch * updates, batch_size=batch, num_minibatches=1, update_epochs=epochs,
        micro_batch_size=64 if work == "gpu" else None,
        critic="separate" if side == "separate" else "shared", missing_eos_penalty=0.0, eval_samples=4,
        torch_threads=1, device=device, run_dir=str(folder / f"run{{time.time_ns()}}"),
        **settings, **sources, **gpu,
    )
    figures = ppo.train(args)
    rows = (Path(args.run_dir) / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(",")))
    names = [f"{{x}}_tokens_per_second" for x in ("generation", "update")]
    figures |= {{name: float(last[f"time/{{name}}"]) for name in names}}
figures["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if device == "cuda":
    figures["peak_memory"] = torch.cuda.max_memory_allocated()
print()
print(json.dumps(figures))
"""
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense FLOP/s, from their data sheets


@dataclass
class Args:
    """Speed of our scripts beside their peers."""

    suite: tyro.conf.Positional[Literal["all", "discrete", "continuous", "llm", "rlhf", "rlhf_memory"]]
    """what to measure"""
    pairs: int | None = None
    """runs of each side, in turn; default 5, of llm and rlhf 3, of rlhf_memory, whose figures hardly vary, 1"""
    steps: int | None = None
    """environment steps per run of the throughput comparison, not of llm; default 100,000, continuous 20,480"""
    llm_id: Literal["qwen2-0.5b-random", "tiny-random"] = "qwen2-0.5b-random"
    """llm: size of the body"""
    updates: int = 6
    """rlhf: PPO iterations of a run"""


def run(command: list[str]) -> tuple[float, str]:
    """Wall-clock seconds of a process from its start to its end, and its output. Shows why it failed where it did."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)[:300]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def run_ours(flags: str, script: str = "ppo_mlp_discrete.py") -> dict[str, float]:
    """summary.json of a run of a script, with the process's wall-clock seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--run-dir", f"{folder}/run", *flags.split()]
        wall, _ = run(command)
        return json.loads(Path(folder, "run/summary.json").read_text()) | {"wall": wall}


def run_sb3(model: str, seed: int, steps: int, target: float | None = None) -> dict[str, float]:
    """The same of a run of stable-baselines3."""
    program = SB3_PROGRAM.format(model=model.format(seed=seed), steps=steps, target=target)
    wall, output = run([sys.executable, "-c", program])
    return json.loads(output) | {"wall": wall}


def compare(script: str, work: str, unit: str, peer: str, ours: list[float], theirs: list[float]) -> dict:
    """A comparison, as it is written down and printed. The ratio says how many times as fast ours is, of memory which
    share of theirs it takes."""
    is_time = unit in ("s", "ms")
    ratios = [b / a if is_time else a / b for a, b in zip(ours, theirs)]
    return {"script": script, "work": work, "unit": unit, "peer": peer} | {
        "ours": ours,
        "theirs": theirs,
        "ratios": ratios,
    }


def spread(values: list[float]) -> str:
    """median (minimum to maximum)"""
    digits = 0 if statistics.median(values) >= 100 else 2
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def show(comparison: dict) -> None:
    """Prints a comparison."""
    print(f"{comparison['work']}, {comparison['unit']}: median (range)")
    for name, side in ((comparison["script"], "ours"), (comparison["peer"], "theirs")):
        print(f"  {name:28} {spread(comparison[side]) if comparison[side] else 'never'}")
    if comparison["ratios"]:
        pairs = ", ".join(f"{ratio:.2f}" for ratio in comparison["ratios"])
        print(f"  {'ratio pair by pair':28} {pairs}; median {statistics.median(comparison['ratios']):.2f}")


def discrete(args: Args) -> dict:
    """CartPole-v1: steps/s at equal work, seconds to a mean return of 475, and steps/s by number of environments."""
    total_steps = args.steps or 100_000
    shapes = {4: 128, 64: 128, 1024: 16}  # environments: steps per rollout
    bar = tqdm(total=4 * args.pairs + len(shapes) * 3, unit="run", desc="discrete")

    def step(result: dict) -> dict:
        bar.update()
        return result

    ours, theirs, solved_ours, solved_theirs = [], [], [], []
    for seed in range(1, args.pairs + 1):
        ours.append(
            step(run_ours(f"{CLEANRL} --num-envs 4 --num-steps 128 --total-timesteps {total_steps} --seed {seed}"))
        )
        theirs.append(step(run_sb3(SB3_SAME_WORK, seed, total_steps)))
    for seed in range(1, args.pairs + 1):
        solved_ours.append(step(run_ours(f"--target-return 475 --eval-episodes 0 --seed {seed}")))
        solved_theirs.append(step(run_sb3(SB3_ZOO, seed, 100_000, 475)))
    throughput = {}
    for envs, steps in shapes.items():
        flags = f"{CLEANRL} --num-envs {envs} --num-steps {steps} --total-timesteps {max(total_steps, 1000 * envs)}"
        throughput[envs] = [step(run_ours(f"{flags} --seed {seed}"))["steps_per_second"] for seed in (1, 2, 3)]
    bar.close()

    rates = [[result["steps_per_second"] for result in side] for side in (ours, theirs)]
    reached = [
        (a["wall"], b["wall"])
        for a, b in zip(solved_ours, solved_theirs)
        if a["train_return"] >= 475 and b["mean_return"] >= 475
    ]
    # Environments are what each side makes by default: gymnasium's CartPoleVectorEnv here, DummyVecEnv there.
    work = "CartPole-v1, 4 envs × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh"
    solve = f"CartPole-v1 from process start to a mean return of 475, own best settings ({len(reached)} seeds reach it)"
    peer, script = "stable-baselines3", "ppo_mlp_discrete.py"
    return {
        "comparisons": [
            compare(script, work, "steps/s", peer, *rates),
            compare(script, solve, "s", peer, [ours for ours, _ in reached], [theirs for _, theirs in reached]),
        ],
        "steps_per_second_by_envs": {f"{envs} × {shapes[envs]}": values for envs, values in throughput.items()},
    }


def continuous(args: Args) -> dict:
    """HalfCheetah-v5: steps/s at equal work, and steps/s of training and of the simulator alone by number and kind of
    environments."""
    total_steps = args.steps or 20_480
    shapes = {1: 2048, 8: 256, 64: 32}  # environments: steps per rollout
    modes = ["sync", "envpool"]
    bar = tqdm(total=2 * args.pairs + 2 * len(modes) * len(shapes), unit="run", desc="continuous")

    def step(result: dict) -> float:
        bar.update()
        return result["steps_per_second"]

    def ours(envs: int, mode: str, seed: int) -> float:
        flags = f"{CLEANRL_MUJOCO} --num-envs {envs} --num-steps {shapes[envs]} --vectorization-mode {mode}"
        flags += f" --total-timesteps {total_steps} --seed {seed}"
        return step(run_ours(flags, "ppo_mlp_continuous.py"))

    def simulator(envs: int, mode: str) -> float:
        program = SIMULATOR_PROGRAM.format(envs=envs, mode=mode, steps=total_steps)
        return step(json.loads(run([sys.executable, "-c", program])[1]))

    rates, theirs = [], []
    for seed in range(1, args.pairs + 1):
        rates.append(ours(1, "sync", seed))
        theirs.append(step(run_sb3(SB3_MUJOCO, seed, total_steps)))
    throughput = {
        f"{mode}, {envs} × {shapes[envs]}": {"training": ours(envs, mode, 1), "simulator": simulator(envs, mode)}
        for mode in modes
        for envs in shapes
    }
    bar.close()
    work = "HalfCheetah-v5, 1 env × 2048 steps, 10 epochs × 32 minibatches, 64-64 tanh"
    return {
        "comparisons": [compare("ppo_mlp_continuous.py", work, "steps/s", "stable-baselines3", rates, theirs)],
        # Networks have one thread, EnvPool has its own.
        "steps_per_second_by_envs": throughput,
    }


def llm(args: Args) -> dict:
    """A language model as policy: forward pass, update and peak memory of ours and of the document's construct."""
    bar = tqdm(total=2 * args.pairs, unit="run", desc="llm")
    sides = {"ours": [], "document": []}
    for seed in range(1, args.pairs + 1):
        for side, results in sides.items():
            _, output = run([sys.executable, "-c", LLM_PROGRAM.format(side=side, llm_id=args.llm_id, seed=seed)])
            results.append(json.loads(output.splitlines()[-1]))
            bar.update()
    bar.close()

    def both(work: str, unit: str, figure: Callable[[dict], float]) -> dict:
        values = [[figure(result) for result in results] for results in sides.values()]
        name = {"qwen2-0.5b-random": "Qwen2-0.5B's size", "tiny-random": "tiny body"}[args.llm_id]
        return compare("ppo_llm_policy.py", f"{name}, LoRA: {work}", unit, "the document's construct", *values)

    first = sides["ours"][0]
    comparisons = [
        both(f"forward of {first['states']} states", "ms", lambda r: 1000 * statistics.median(r["forward"])),
        both(f"update of {first['rows']} states", "ms", lambda r: 1000 * statistics.median(r["update"])),
        both("peak memory", "GB", lambda r: r["peak_memory"] / 1e9),
    ]
    if "steps_per_second" not in first:
        return {"comparisons": comparisons}
    comparisons.append(both("training, 256 environments, bfloat16", "steps/s", lambda r: r["steps_per_second"]))
    # Of a state: one pass to act, one to score, and in each epoch one forward and one backward, which is as much
    # because the body is frozen; two operations per weight and pass.
    passes = 2 + 2 * first["update_epochs"]
    flops = 2 * first["body_parameters"] * passes * statistics.median(r["steps_per_second"] for r in sides["ours"])
    peak = next((value for name, value in PEAK_BF16.items() if name in machine()), None)
    share = f", {100 * flops / peak:.1f} % of the GPU's peak" if peak else ""
    print(f"the body's arithmetic in our training: {flops / 1e12:.1f} TFLOP/s{share}")
    return {"comparisons": comparisons, "flops": flops, "peak_flops": peak}


def rlhf(args: Args, memory: bool = False) -> dict:
    """Token-level PPO beside TRL's trainer: episodes/s with a shared and a separate critic, or peak memory with LoRA
    at Qwen2-0.5B's size. Where there is a GPU, tokens/s at that size in bfloat16, plain and compiled."""
    has_gpu = torch.cuda.is_available()
    work = "gpu" if has_gpu else "memory" if memory else "speed"
    names = ("compiled", "plain") if has_gpu else ("shared", "separate", "trl")
    bar = tqdm(total=args.pairs * len(names), unit="run", desc="rlhf_memory" if memory else "rlhf")
    sides: dict[str, list[dict]] = {side: [] for side in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.pairs):
            for side in names:
                given = {"folder": folder, "side": side, "work": work, "device": "cuda" if has_gpu else "cpu"}
                _, output = run([sys.executable, "-c", RLHF_PROGRAM.format(**given, updates=args.updates)])
                sides[side].append(json.loads(output.splitlines()[-1]))
                bar.update()
    bar.close()
    *ours, peer = names
    size = "4-layer, 128-wide Qwen2, 64 prompts × 24 tokens, 4 epochs" if work == "speed" else "Qwen2-0.5B's size, LoRA"
    figures = [("episodes_per_second", "episodes/s", 1)] if work == "speed" else [("peak_memory", "GB", 1e9)]
    if has_gpu:
        figures += [(f"{part}_tokens_per_second", f"{part} tokens/s", 1) for part in ("generation", "update")]
    return {
        "comparisons": [
            compare(
                "ppo_rlhf_token.py",
                f"{size}, {side}" + " critic" * (peer == "trl"),
                unit,
                "TRL" if peer == "trl" else peer,
                *([result[figure] / scale for result in sides[x]] for x in (side, peer)),
            )
            for figure, unit, scale in figures
            for side in ours
        ]
    }


def main() -> None:
    """Runs suites, prints them and writes them down."""
    args = tyro.cli(Args)
    if (args.pairs is not None and args.pairs < 1) or (args.steps is not None and args.steps < 2048):
        print("error: --pairs must be at least 1 and --steps at least 2048", file=sys.stderr)
        sys.exit(2)
    suites = {
        "discrete": (discrete, 5, ["stable_baselines3"]),
        "continuous": (continuous, 5, ["stable_baselines3", "envpool"]),
        "llm": (llm, 3, []),
        "rlhf": (rlhf, 3, ["trl"]),
        "rlhf_memory": (partial(rlhf, memory=True), 1, ["trl"]),
    }
    chosen = list(suites) if args.suite == "all" else [args.suite]
    has_gpu = torch.cuda.is_available()
    if has_gpu:  # there, rlhf measures memory too, without a peer
        suites["rlhf"] = (rlhf, 3, [])
        chosen = list(dict.fromkeys("rlhf" if name == "rlhf_memory" else name for name in chosen))
    for name in chosen:
        for package in suites[name][2]:
            if find_spec(package) is None:
                mend = "pip install -r benchmarks/requirements-peers.txt"
                print(f"error: {name} needs {package}: {mend}", file=sys.stderr)
                sys.exit(2)
    packages = ("torch", "transformers", "peft", "numpy", "gymnasium", "mujoco", "envpool", "stable_baselines3", "trl")
    versions = {name: version(name) for name in packages if find_spec(name)}
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    facts = {"machine": machine(), "versions": versions, "git": git.stdout.strip()}
    for name in chosen:
        measure, pairs, _ = suites[name]
        start = time.perf_counter()
        figures = measure(replace(args, pairs=args.pairs or pairs))
        for comparison in figures["comparisons"]:
            show(comparison)
        print(f"on {machine()}")
        if args == Args(args.suite):  # other work would not be what the table says
            device = "_cuda" if has_gpu and name in ("llm", "rlhf") else ""
            path = ROOT / "benchmarks/results/speed" / f"{name}{device}.json"
            seconds = {"seconds": round(time.perf_counter() - start)}
            path.write_text(json.dumps(facts | seconds | figures, indent=1) + "\n")
            print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
