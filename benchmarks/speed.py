"""Speed side by side with peers: the same work in turn, every run a fresh process, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    python benchmarks/speed.py discrete

Prints medians and ranges, and writes them with the machine's name to benchmarks/results/speed/<suite>.json.
"""

import json
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

    suite: tyro.conf.Positional[Literal["discrete"]]
    """what to measure"""
    pairs: int = 5
    """runs of each side, in turn"""
    steps: int = 100_000
    """environment steps per run of the throughput comparison"""


def run(command: list[str]) -> tuple[float, str]:
    """Wall-clock seconds of a process from its start to its end, and its output. Shows why it failed where it did."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)[:300]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def run_ours(flags: str) -> dict[str, float]:
    """summary.json of a run of ppo_mlp_discrete.py, with the process's wall-clock seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "ppo_mlp_discrete.py", "--run-dir", f"{folder}/run", *flags.split()]
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
    shapes = {4: 128, 64: 128, 1024: 16}  # environments: steps per rollout
    bar = tqdm(total=4 * args.pairs + len(shapes) * 3, unit="run")

    def step(result: dict) -> dict:
        bar.update()
        return result

    ours, theirs, solved_ours, solved_theirs = [], [], [], []
    for seed in range(1, args.pairs + 1):
        ours.append(
            step(run_ours(f"{CLEANRL} --num-envs 4 --num-steps 128 --total-timesteps {args.steps} --seed {seed}"))
        )
        theirs.append(step(run_sb3(SB3_SAME_WORK, seed, args.steps)))
    for seed in range(1, args.pairs + 1):
        solved_ours.append(step(run_ours(f"--target-return 475 --eval-episodes 0 --seed {seed}")))
        solved_theirs.append(step(run_sb3(SB3_ZOO, seed, 100_000, 475)))
    throughput = {}
    for envs, steps in shapes.items():
        flags = f"{CLEANRL} --num-envs {envs} --num-steps {steps} --total-timesteps {max(args.steps, 1000 * envs)}"
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


def main() -> None:
    """Runs a suite, prints it and writes it down."""
    args = tyro.cli(Args)
    if find_spec("stable_baselines3") is None:
        print("error: stable-baselines3 is missing: pip install -r benchmarks/requirements-peers.txt", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(ROOT))
    from ppo_mlp_discrete import machine

    figures = {"discrete": discrete}[args.suite](args)
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "stable_baselines3")}
    path = ROOT / "benchmarks/results/speed" / f"{args.suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "versions": versions} | figures, indent=2) + "\n")
    print(f"on {machine()}; written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
