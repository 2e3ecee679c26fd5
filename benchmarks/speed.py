"""Speed side by side with peers: all in turn, every run a fresh process of one thread, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl
    python benchmarks/speed.py all --cleanrl ../cleanrl
    python benchmarks/speed.py discrete --cleanrl ../cleanrl

Prints medians and ranges. With the default amount of work it also writes them, with the machine's name, to
benchmarks/results/speed/<suite>.json, of which benchmarks/plot.py makes the README's table.
"""

import json
import math
import os
import re
import signal
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

from run import machine  # noqa: E402

EARLIER = "f4f37a2"  # the commit before the scripts were made minimal, the yardstick for their speed
# CleanRL's settings for CartPole-v1 in the flags of its ppo.py and of ours, and as stable-baselines3 calls them.
CARTPOLE = "--num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 --learning-rate 2.5e-4 --gamma 0.99"
CARTPOLE += " --gae-lambda 0.95 --ent-coef 0.01"
SB3_CARTPOLE = """
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
# CleanRL's settings for MuJoCo, likewise. SB3's VecNormalize stands for the normalisation that is on in the others.
MUJOCO = "--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32"
MUJOCO += " --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95 --vf-coef 0.5 --clip-vloss"
MUJOCO_OURS = " --norm-adv --no-recompute-advantages --log-std-init 0"  # which its script does without being told
SB3_MUJOCO = """
from stable_baselines3.common.vec_env import VecNormalize
env = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=1, seed={seed}), gamma=0.99)
model = PPO("MlpPolicy", env, n_steps=2048, batch_size=64, n_epochs=10, learning_rate=lambda left: 3e-4 * left,
            gamma=0.99, gae_lambda=0.95, clip_range_vf=0.2, ent_coef=0.0, vf_coef=0.5, seed={seed}, device="cpu")
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
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        if len(returns) == 100 and sum(returns) >= 47_500:
            print("solved", flush=True)
start = time.perf_counter()
model.learn({steps}, callback=Solved())
print("steps/s", model.num_timesteps / (time.perf_counter() - start))
"""
# CleanRL's file as it is. It is written for gymnasium 0.29, whose TransformObservation asked for no observation space.
CLEANRL_PROGRAM = """
import runpy, sys
import gymnasium as gym, torch
torch.set_num_threads(1)
transform = gym.wrappers.TransformObservation
gym.wrappers.TransformObservation = lambda env, f, space=None: transform(env, f, space or env.observation_space)
sys.argv = [{file!r}, *{flags!r}.split()]
runpy.run_path({file!r}, run_name="__main__")
"""
# Our script's defaults, which says when the mean of the last hundred returns is 475.
OURS_TO_475 = """
import sys, tempfile
import numpy as np
import ppo_mlp_discrete as ppo
write = ppo.MetricsLog.write
def spied_write(log, metrics):
    write(log, metrics)
    if metrics["charts/episodic_return"] >= 475:
        print("solved", flush=True)
ppo.MetricsLog.write = spied_write
sys.argv = ["ppo_mlp_discrete.py", "--seed", "{seed}", "--run-dir", tempfile.mkdtemp() + "/run"]
ppo.main()
"""
# A policy of Qwen2-0.5B's size, as ppo_llm_policy.py makes it and as document 000 writes it: a whole causal LM, dropout
# in the adapters, all hidden states. Encoder, head, loss and optimiser are the same. Prints seconds of forward passes
# and of updates, the peak memory, and the steps/s of a training run where there is a GPU.
LLM_PROGRAM = """
import json, resource, tempfile, time, warnings
from pathlib import Path
import peft, torch, transformers
import ppo_llm_policy as ppo

device = "cuda" if torch.cuda.is_available() else "cpu"
args = ppo.Args(seed={seed}, bfloat16=device == "cuda", device=device)
Config, sizes = transformers.Qwen2Config, {{}}
if "{llm_id}" == "qwen2-0.5b-random":
    sizes = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, rope_theta=1e6, initializer_range=0.02)
transformers.Qwen2Config = lambda **tiny: Config(**tiny | sizes)  # of which the script makes its random body

class DocumentsNetwork(ppo.LLMNetwork):
    def forward(self, states):
        embeddings = self.encoder(states).to(self.body.dtype)
        llm_outputs = self.body(inputs_embeds=embeddings, output_hidden_states=True)
        return self.distribution(self.head(llm_outputs.hidden_states[-1][:, -1, :].float()))

def documents_body(args):
    tiny = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.125)
    config = transformers.Qwen2Config(**tiny, vocab_size=151_936, tie_word_embeddings=True)
    llm = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if args.bfloat16 else torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings(action="ignore"):
        return peft.get_peft_model(llm, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.05))

if "{side}" == "document":
    ppo.NETWORKS["llm"], ppo.load_body = DocumentsNetwork, documents_body
torch.set_num_threads(1)
torch.manual_seed(args.seed)
policy = ppo.StochasticPolicy(ppo.NETWORKS["llm"](args, 4, 2, True)).to(device)
critic = ppo.mlp(4, 1, 1.0).to(device)
parameters = [p for p in [*policy.parameters(), *critic.parameters()] if p.requires_grad]
optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

def batch_of(rows):
    actions = torch.zeros(rows, dtype=torch.long, device=device)
    return ppo.Batch(torch.randn(rows, 1, 4, device=device), actions, *torch.zeros(3, rows, device=device))

def forward(batch):
    policy.eval()
    policy.get_action(batch.states)

def update(batch):
    policy.train()
    loss, _ = ppo.ppo_loss(policy, critic, batch, args)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
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
    del policy, parameters, optimizer
    args = ppo.Args(seed={seed}, bfloat16=True, device=device, num_envs=256, num_steps=16, num_minibatches=8,
                    update_epochs=4, total_timesteps=20_000)
    ppo.save = lambda *path, **content: None
    summary = ppo.train(args, Path(tempfile.mkdtemp(), "run"))
    figures["steps_per_second"] = summary["global_step"] / summary["seconds"]
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
    words = ppo.make_tokenizer([" ".join(f"w{{i}}" for i in range(253))])
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
    args = ppo.Args(
        model=str(folder / "model"), dataset=str(folder / "rows.jsonl"), sft_steps=0, reward_batch_size=8,
        total_episodes=batch * updates, batch_size=batch, num_minibatches=1, update_epochs=epochs,
        micro_batch_size=64 if work == "gpu" else batch, bf16=work == "gpu",
        critic="separate" if side == "separate" else "shared", missing_eos_penalty=0.0, eval_samples=4, device=device,
        **settings, **sources,
    )
    seconds = dict.fromkeys(("generate", "rollout", "update"), 0.0)

    def timed(owner, name):
        function = getattr(owner, name)

        def wrapped(*given, **options):
            start = time.perf_counter()
            result = function(*given, **options)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
            return result

        setattr(owner, name, wrapped)

    for owner, name in ((ppo, "rollout"), (ppo, "update"), (ppo.Model, "generate")):
        timed(owner, name)
    rollout = ppo.rollout

    def first_rollout(*given):
        seconds["generate"] = 0.0  # what came before does not count
        ppo.rollout = rollout
        return rollout(*given)

    ppo.rollout = first_rollout
    evaluate = ppo.evaluate
    ppo.evaluate = lambda *given: dict(generate=seconds["generate"]) | evaluate(*given)
    run_dir = folder / f"run{{time.time_ns()}}"
    figures = ppo.train(args, run_dir)
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    tokens = batch * sum(float(row[rows[0].index("objective/response_length")]) for row in rows[1:])
    figures["episodes_per_second"] = batch * updates / (seconds["rollout"] + seconds["update"])
    figures["generation_tokens_per_second"] = tokens / figures["generate"]
    figures["update_tokens_per_second"] = epochs * tokens / seconds["update"]
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


def run(command: list[str], folder: Path = ROOT, until: Callable[[str], bool] = lambda line: False) -> dict:
    """Runs a process to its end, or to a line of output that until accepts. Returns "output", "seconds" from the start
    to there, and "peak_memory" in bytes. Ends with the reason where it fails."""
    start, lines = time.perf_counter(), []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        for line in process.stdout:
            lines.append(line)
            if until(line):
                process.kill()
                break
        seconds = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
            errors.seek(0)
            sys.exit(f"error: {' '.join(command)[:300]}\n{errors.read()[-2000:]}")
    return {"output": "".join(lines), "seconds": seconds, "peak_memory": usage.ru_maxrss * 1024}


def run_ours(script: str, flags: str, seed: int, earlier: bool = False) -> dict[str, float]:
    """Steps/s of training and peak memory of a run of our script, or of the one at the commit EARLIER."""
    with tempfile.TemporaryDirectory() as name:
        folder, evaluation = Path(name), "--eval-episodes 1"
        path = ROOT / script
        if earlier:
            git = ["git", "-C", str(ROOT), "show", f"{EARLIER}:{script}"]
            path = folder / script
            path.write_text(subprocess.run(git, capture_output=True, text=True, check=True).stdout)
            evaluation = "--eval-episodes 0 --torch-threads 1"
        words = f"--seed {seed} {flags} {evaluation} --run-dir run".split()
        peak_memory = run([sys.executable, str(path), *words], folder)["peak_memory"]
        summary = json.loads((folder / "run/summary.json").read_text())
    return {"steps_per_second": summary["global_step"] / summary["seconds"], "peak_memory": peak_memory}


def run_sb3(model: str, seed: int, steps: int) -> float:
    """Steps/s of stable-baselines3."""
    program = SB3_PROGRAM.format(model=model.format(seed=seed), steps=steps)
    return float(run([sys.executable, "-c", program])["output"].split()[-1])


def run_cleanrl(cleanrl: Path, script: str, flags: str, seed: int) -> float:
    """Steps/s of CleanRL, which it prints after each iteration."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"file": str((cleanrl / "cleanrl" / script).resolve()), "flags": f"--seed {seed} {flags}"}
        done = run([sys.executable, "-c", CLEANRL_PROGRAM.format(**given)], Path(folder))
        return float(re.findall(r"SPS: (\d+)", done["output"])[-1])


def seconds_to_475(program: list[str]) -> float:
    """Seconds from the start of a process to the line "solved" in its output."""
    done = run(program, until=lambda line: line == "solved\n")
    return done["seconds"] if done["output"].endswith("solved\n") else math.inf


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


def side_by_side(args: Args, script: str, theirs: str, work: str, flags: str, more: str, sb3: str) -> list[dict]:
    """Comparisons of steps/s with stable-baselines3, CleanRL and our earlier script, and of memory with the latter.

    theirs: CleanRL's script; flags: what both it and ours are given; more: what ours alone is given."""
    steps = args.steps or {"ppo_mlp_discrete.py": 100_000, "ppo_mlp_continuous.py": 20_480}[script]
    flags = f"{flags} --total-timesteps {steps}"
    ours, earlier, cleanrl, baselines = [], [], [], []
    for seed in tqdm(range(1, args.pairs + 1), unit="pair", desc=script):
        ours.append(run_ours(script, flags + more, seed))
        baselines.append(run_sb3(sb3, seed, steps))
        cleanrl.append(run_cleanrl(args.cleanrl, theirs, flags, seed))
        earlier.append(run_ours(script, flags + more, seed, earlier=True))
    rates, earlier_rates = ([result["steps_per_second"] for result in side] for side in (ours, earlier))
    memory, earlier_memory = ([result["peak_memory"] / 1e9 for result in side] for side in (ours, earlier))
    before = f"commit {EARLIER}"
    return [
        compare(script, work, "steps/s", "stable-baselines3", rates, baselines),
        compare(script, work, "steps/s", "CleanRL", rates, cleanrl),
        compare(script, work, "steps/s", before, rates, earlier_rates),
        compare(script, f"{work}, peak memory", "GB", before, memory, earlier_memory),
    ]


def discrete(args: Args) -> dict:
    """CartPole-v1: steps/s at equal work, and seconds to a mean return of 475."""
    work = "CartPole-v1, 4 envs × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh"
    comparisons = side_by_side(args, "ppo_mlp_discrete.py", "ppo.py", work, CARTPOLE, " --clip-vloss", SB3_CARTPOLE)
    ours, theirs = [], []
    for seed in tqdm(range(1, args.pairs + 1), unit="pair", desc="to 475"):
        ours.append(seconds_to_475([sys.executable, "-c", OURS_TO_475.format(seed=seed)]))
        program = SB3_PROGRAM.format(model=SB3_ZOO.format(seed=seed), steps=100_000)
        theirs.append(seconds_to_475([sys.executable, "-c", program]))
    reached = [(a, b) for a, b in zip(ours, theirs) if a + b < math.inf]
    work = f"CartPole-v1 from process start to a mean return of 475, own best settings ({len(reached)} seeds reach it)"
    sides = [[a for a, _ in reached], [b for _, b in reached]]
    return {"comparisons": [*comparisons, compare("ppo_mlp_discrete.py", work, "s", "stable-baselines3", *sides)]}


def continuous(args: Args) -> dict:
    """HalfCheetah-v5: steps/s at equal work, and at our defaults."""
    script, work = "ppo_mlp_continuous.py", "HalfCheetah-v5, 1 env × 2048 steps, 10 epochs × 32 minibatches, 64-64 tanh"
    comparisons = side_by_side(args, script, "ppo_continuous_action.py", work, MUJOCO, MUJOCO_OURS, SB3_MUJOCO)
    flags, sides = f"--total-timesteps {2 * (args.steps or 20_480)}", ([], [])
    for seed in tqdm(range(1, args.pairs + 1), unit="pair", desc="defaults"):
        for side, earlier in zip(sides, (False, True)):
            side.append(run_ours(script, flags, seed, earlier)["steps_per_second"])
    work = "HalfCheetah-v5, defaults (8 envs × 256 steps)"
    return {"comparisons": [*comparisons, compare(script, work, "steps/s", f"commit {EARLIER}", *sides)]}


def llm(args: Args) -> dict:
    """A language model as policy: forward pass, update and peak memory of ours and of the document's construct."""
    bar = tqdm(total=2 * args.pairs, unit="run", desc="llm")
    sides = {"ours": [], "document": []}
    for seed in range(1, args.pairs + 1):
        for side, results in sides.items():
            program = LLM_PROGRAM.format(side=side, llm_id=args.llm_id, seed=seed)
            results.append(json.loads(run([sys.executable, "-c", program])["output"].splitlines()[-1]))
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
    at Qwen2-0.5B's size. Where there is a GPU, tokens/s at that size in bfloat16, by critic."""
    has_gpu = torch.cuda.is_available()
    work = "gpu" if has_gpu else "memory" if memory else "speed"
    names = ("shared", "separate") if has_gpu else ("shared", "separate", "trl")
    bar = tqdm(total=args.pairs * len(names), unit="run", desc="rlhf_memory" if memory else "rlhf")
    sides: dict[str, list[dict]] = {side: [] for side in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.pairs):
            for side in names:
                given = {"folder": folder, "side": side, "work": work, "device": "cuda" if has_gpu else "cpu"}
                program = RLHF_PROGRAM.format(**given, updates=args.updates)
                sides[side].append(json.loads(run([sys.executable, "-c", program])["output"].splitlines()[-1]))
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
        "continuous": (continuous, 5, ["stable_baselines3"]),
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
        if name in ("discrete", "continuous") and not (args.cleanrl and (args.cleanrl / "cleanrl/ppo.py").exists()):
            print("error: --cleanrl wants a checkout of https://github.com/vwxyzjn/cleanrl", file=sys.stderr)
            sys.exit(2)
        for package in suites[name][2]:
            if find_spec(package) is None:
                mend = "pip install -r benchmarks/requirements-peers.txt"
                print(f"error: {name} needs {package}: {mend}", file=sys.stderr)
                sys.exit(2)
    packages = ("torch", "transformers", "peft", "numpy", "gymnasium", "mujoco", "stable_baselines3", "trl")
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
        if args == Args(args.suite, args.cleanrl):  # other work would not be what the table says
            device = "_cuda" if has_gpu and name in ("llm", "rlhf") else ""
            path = ROOT / "benchmarks/results/speed" / f"{name}{device}.json"
            seconds = {"seconds": round(time.perf_counter() - start)}
            path.write_text(json.dumps(facts | seconds | figures, indent=1) + "\n")
            print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
