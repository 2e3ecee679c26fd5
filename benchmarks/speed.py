"""Speed side by side with peers: the same work in turn, every run a fresh process, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    python benchmarks/speed.py discrete
    python benchmarks/speed.py continuous

Prints medians and ranges, and writes them with the machine's name to benchmarks/results/speed/<suite>.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent

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


@dataclass
class Args:
    """Speed of our scripts beside their peers."""

    suite: tyro.conf.Positional[Literal["discrete", "continuous"]]
    """what to measure"""
    pairs: int = 5
    """runs of each side, in turn"""
    steps: int | None = None
    """environment steps per run of the throughput comparison; default 100,000 (discrete), 20,480 (continuous)"""


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


def spread(values: list[float], digits: int = 0) -> str:
    """median (minimum to maximum)"""
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def discrete(args: Args) -> dict:
    """CartPole-v1: steps/s at equal work, seconds to a mean return of 475, and steps/s by number of environments."""
    total_steps = args.steps or 100_000
    shapes = {4: 128, 64: 128, 1024: 16}  # environments: steps per rollout
    bar = tqdm(total=4 * args.pairs + len(shapes) * 3, unit="run")

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
    ratios = [a / b for a, b in zip(*rates)]
    print("\nsame work: 4 envs x 128 steps, 4 epochs x 4 minibatches, 64-64 tanh, one thread each")
    print("(environments as each makes them by default: CartPoleVectorEnv of gymnasium here, DummyVecEnv there)")
    print(f"  ppo_mlp_discrete.py    {spread(rates[0])} steps/s")
    print(f"  stable-baselines3      {spread(rates[1])} steps/s")
    pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"  ratio pair by pair     {pairs}; median {statistics.median(ratios):.2f}")
    print("seconds from process start to a mean return of 475 over 100 training episodes, own best settings")
    reached = [r["wall"] for r in solved_ours if r["train_return"] >= 475]
    reached_theirs = [r["wall"] for r in solved_theirs if r["mean_return"] >= 475]
    for name, walls in (("ppo_mlp_discrete.py", reached), ("stable-baselines3", reached_theirs)):
        seconds = f"{spread(walls, 1)} s, " if walls else ""
        print(f"  {name:22} {seconds}{len(walls)} of {args.pairs} seeds reached it")
    print("steps/s by number of environments, one thread")
    for envs, values in throughput.items():
        print(f"  {envs:>5} envs x {shapes[envs]:>3} steps  {spread(values)}")
    return {
        "same_work": {"ours": rates[0], "stable_baselines3": rates[1], "ratios": ratios},
        "seconds_to_475": {"ours": reached, "stable_baselines3": reached_theirs, "seeds": args.pairs},
        "steps_per_second_by_envs": throughput,
    }


def continuous(args: Args) -> dict:
    """HalfCheetah-v5: steps/s at equal work, the simulator's share of the time, and steps/s by number and kind of
    environments."""
    total_steps = args.steps or 20_480
    shapes = {1: 2048, 8: 256, 64: 32}  # environments: steps per rollout
    modes = ["sync"] + (["envpool"] if find_spec("envpool") else [])
    bar = tqdm(total=3 * args.pairs + 2 * len(modes) * len(shapes), unit="run")

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

    same_work = {"ours": [], "stable_baselines3": [], "simulator": []}
    for seed in range(1, args.pairs + 1):
        same_work["ours"].append(ours(1, "sync", seed))
        same_work["stable_baselines3"].append(step(run_sb3(SB3_MUJOCO, seed, total_steps)))
        same_work["simulator"].append(simulator(1, "sync"))
    throughput = {
        mode: {envs: {"training": ours(envs, mode, 1), "simulator": simulator(envs, mode)} for envs in shapes}
        for mode in modes
    }
    bar.close()

    same_work["ratios"] = [a / b for a, b in zip(same_work["ours"], same_work["stable_baselines3"])]
    same_work["simulator_share"] = [a / b for a, b in zip(same_work["ours"], same_work["simulator"])]
    print("\nsame work: HalfCheetah-v5, 1 env x 2048 steps, 10 epochs x 32 minibatches, 64-64 tanh, one thread each")
    print(f"  ppo_mlp_continuous.py  {spread(same_work['ours'])} steps/s")
    print(f"  stable-baselines3      {spread(same_work['stable_baselines3'])} steps/s")
    pairs = ", ".join(f"{ratio:.2f}" for ratio in same_work["ratios"])
    print(f"  ratio pair by pair     {pairs}; median {statistics.median(same_work['ratios']):.2f}")
    print(f"  the simulator alone    {spread(same_work['simulator'])} steps/s")
    print(f"  its share of our time  {spread([100 * share for share in same_work['simulator_share']])} %")
    print("training steps/s (simulator alone) by number of environments, 2048 rows per iteration, one run each")
    print(f"(networks in one thread; sync steps in it too, EnvPool in threads of its own on {os.cpu_count()} cores)")
    for mode, by_envs in throughput.items():
        cells = [f"{n:>3} envs {r['training']:>6,.0f} ({r['simulator']:>6,.0f})" for n, r in by_envs.items()]
        print(f"  {mode:8} {'   '.join(cells)}")
    return {"same_work": same_work, "steps_per_second_by_envs": throughput}


def main() -> None:
    """Runs a suite, prints it and writes it down."""
    args = tyro.cli(Args)
    if args.pairs < 1 or (args.steps or 2048) < 2048:
        print("error: --pairs must be at least 1 and --steps at least 2048", file=sys.stderr)
        sys.exit(2)
    if find_spec("stable_baselines3") is None:
        print("error: stable-baselines3 is missing: pip install -r benchmarks/requirements-peers.txt", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(ROOT))
    from ppo_mlp_discrete import machine

    figures = {"discrete": discrete, "continuous": continuous}[args.suite](args)
    packages = ("torch", "numpy", "gymnasium", "mujoco", "envpool", "stable_baselines3")
    versions = {name: version(name) for name in packages if find_spec(name)}
    path = ROOT / "benchmarks/results/speed" / f"{args.suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "versions": versions} | figures, indent=2) + "\n")
    print(f"on {machine()}; written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
