"""Speed side by side with peers: all in turn, every run a fresh process of one thread, ratios pair by pair.

    pip install -r requirements.txt -r benchmarks/requirements-peers.txt
    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl
    python benchmarks/speed.py all --cleanrl ../cleanrl

Prints medians. With the default amount of work it also writes all figures, with the machine's name, to
benchmarks/results/speed/<suite>.json, of which benchmarks/plot.py makes the README's table.
"""

import importlib
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), "."]  # our scripts, and what a recipe makes of one
# CleanRL's default settings, as flags of our scripts and as arguments of stable-baselines3.
CARTPOLE = "--num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 --learning-rate 2.5e-4 --gamma 0.99"
CARTPOLE += " --gae-lambda 0.95 --ent-coef 0.01 --clip-vloss"
SB3_CARTPOLE = {"n_envs": 4, "n_steps": 128, "n_epochs": 4, "batch_size": 128, "learning_rate": 2.5e-4}
SB3_CARTPOLE |= {"gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.01}
SB3_ZOO = {"n_envs": 8, "n_steps": 32, "n_epochs": 20, "batch_size": 256, "learning_rate": 1e-3, "gamma": 0.98}
SB3_ZOO |= {"gae_lambda": 0.8, "clip_range": 0.2}  # rl-baselines3-zoo's tuned settings, from hyperparams/ppo.yml
MUJOCO = "--num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32 --learning-rate 3e-4 --gamma 0.99"
MUJOCO += " --gae-lambda 0.95 --vf-coef 0.5 --max-grad-norm 0.5 --clip-vloss --norm-adv --no-recompute-advantages"
MUJOCO += " --log-std-init 0"
SB3_MUJOCO = {"n_envs": 1, "learning_rate": 3e-4, "clip_range_vf": 0.2}  # and its defaults, which are CleanRL's
QWEN2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2 |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}  # Qwen2-0.5B
SMALL = QWEN2 | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 256}


@dataclass
class Args:
    """Speed of our scripts beside their peers."""

    suite: Literal["all", "discrete", "continuous", "llm", "rlhf", "rlhf_memory"]
    cleanrl: Path = Path("../cleanrl")  # discrete and continuous: a checkout of https://github.com/vwxyzjn/cleanrl
    device: Literal["cpu", "cuda"] = "cpu"  # of llm and rlhf
    pairs: int | None = None  # runs of each side, in turn; default 5, of llm and rlhf 3, of rlhf_memory 1
    steps: int | None = None  # of environments, in a run of discrete and continuous; default 100,000 and 20,480


# ------------------------------------------------------------------------------ the sides, each a process of its own


def summarise(ends: list[tuple[float, int, float]]) -> dict:
    """Of each iteration's end, steps so far and mean return: steps/s after the first, and seconds to a mean of 475."""
    (start, before, _), *_, (end, after, _) = ends
    solved = [moment - float(os.environ["STARTED"]) for moment, _, mean_return in ends if mean_return >= 475]
    return {"rate": (after - before) / (end - start), "s": solved[0] if solved else None}


def ours(script: str, flags: str, seed: int) -> dict:
    """A script of ours, or what a recipe makes of it."""
    if script.endswith(".patch"):
        subprocess.run(["patch", "-s", "-o", "patched.py", ROOT / "ppo_mlp_discrete.py", ROOT / script], check=True)
        script = "patched.py"
    ppo, ends = importlib.import_module(Path(script).stem), []
    write = ppo.MetricsLog.write

    def write_and_note(log: object, metrics: dict) -> None:
        write(log, metrics)
        ends.append((time.time(), metrics["global_step"], metrics.get("charts/episodic_return", 0.0)))

    ppo.MetricsLog.write = write_and_note
    sys.argv = [script, *flags.split(), "--seed", str(seed), "--run-dir", "run"]
    ppo.main()
    return summarise(ends)


def sb3(env_id: str, settings: dict, steps: int, seed: int) -> dict:
    """stable-baselines3. Its VecNormalize stands for the normalisation that is on in the others on MuJoCo."""
    from stable_baselines3 import PPO
    from stable_baselines3.common import env_util, utils, vec_env

    envs = env_util.make_vec_env(env_id, settings.pop("n_envs"), seed)
    if env_id == "HalfCheetah-v5":
        envs = vec_env.VecNormalize(envs)
    for name in settings.keys() & {"learning_rate", "clip_range"}:
        settings[name] = utils.LinearSchedule(settings[name], 0, 1)
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    train, ends = model.train, []

    def train_and_note() -> None:
        train()
        returns = [episode["r"] for episode in model.ep_info_buffer]  # of the last 100
        ends.append((time.time(), model.num_timesteps, sum(returns) / 100))

    model.train = train_and_note
    model.learn(steps)
    return summarise(ends)


def cleanrl(file: str, env_id: str, steps: int, seed: int) -> dict:
    """CleanRL's file as it is. It is for gymnasium 0.29, whose TransformObservation wants no observation space."""
    import gymnasium as gym

    transform, times = gym.wrappers.TransformObservation, []
    gym.wrappers.TransformObservation = lambda env, f: transform(env, f, env.observation_space)
    sys.argv = [file, "--env-id", env_id, "--total-timesteps", str(steps), "--seed", str(seed), "--no-cuda"]
    # It prints ("SPS:", 1234) at the end of each iteration.
    runpy.run_path(
        file, {"print": lambda *words: times.append(time.time()) if words[0] == "SPS:" else None}, "__main__"
    )
    return summarise([(moment, i * steps // len(times), 0.0) for i, moment in enumerate(times, 1)])


def llm_policy(is_ours: bool, device: str, rows: dict[str, int], seed: int) -> dict:
    """A policy of Qwen2-0.5B's size, as ppo_llm_policy.py makes it and as the document "From MLP to LLM" writes it: a
    whole causal LM, dropout in the adapters, all hidden states. Encoder, head, loss and optimiser are the same."""
    import ppo_llm_policy as ppo
    from ppo_llm_policy import transformers  # this very module, to change what the script takes from it

    class DocumentsNetwork(ppo.LLMNetwork):
        def forward(self, states: torch.Tensor) -> torch.distributions.Distribution:
            outputs = self.body(inputs_embeds=self.encoder(states).to(self.body.dtype), output_hidden_states=True)
            return self.distribution(self.head(outputs.hidden_states[-1][:, -1, :].float()))

    args = ppo.Args(device=device, bfloat16=device == "cuda")
    config = transformers.Qwen2Config(**QWEN2 | {"vocab_size": 1})
    transformers.Qwen2Config = lambda **_: config  # of which the script makes its body
    if not is_ours:
        args.lora_dropout, ppo.LLMNetwork = 0.05, DocumentsNetwork
        transformers.AutoModel, config.vocab_size = transformers.AutoModelForCausalLM, QWEN2["vocab_size"]
    torch.manual_seed(seed)
    policy = ppo.StochasticPolicy(ppo.LLMNetwork(args, 4, 2, True)).to(device)
    critic = ppo.mlp(4, 1, 1.0).to(device)
    parameters = [p for p in [*policy.parameters(), *critic.parameters()] if p.requires_grad]
    optimizer, figures = torch.optim.Adam(parameters, fused=True), {}
    for work, count in rows.items():
        policy.train(work == "update")
        states, times = torch.randn(count, 1, 4, device=device), []
        batch = ppo.Batch(states, torch.zeros_like(states[:, 0, 0]).long(), *torch.zeros(3, count, device=device))
        for _ in range(10):
            start = time.perf_counter()
            if work == "forward":
                policy.get_action(batch.states)
            else:
                loss, _ = ppo.ppo_loss(policy, critic, batch, args)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        figures[f"{work} of {count} states"] = statistics.median(times[2:])  # the first two warm up
    return figures


def trl(files: str, settings: dict, has_lora: bool, seed: int) -> dict:
    """TRL's trainer, whose critic is separate and trained whole, also where the policy has LoRA."""
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, ends = PreTrainedTokenizerFast.from_pretrained(files), []
    rows = [json.loads(line) for line in Path(files, "rows.jsonl").read_text().splitlines()]
    settings |= {"seed": seed, "num_sample_generations": 0, "bf16": False, "gradient_checkpointing": False}
    settings |= {"save_strategy": "no"}
    trainer = PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(files),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(files),
        value_model=AutoModelForSequenceClassification.from_pretrained(files),
        train_dataset=[{"input_ids": tokenizer.encode(row["prompt"])} for row in rows],
        peft_config=peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if has_lora else None,
    )
    trainer.log = lambda metrics: ends.append((time.time(), metrics["episode"], 0.0))  # once per iteration
    trainer.train()
    return summarise(ends)


# --------------------------------------------------------------------------------------------------------- comparisons


def compare(script: str, work: str, unit: str, peer: str, ours: list[float], theirs: list[float]) -> dict:
    """A comparison, printed. The ratio: how many times as fast ours is, or which share of their memory it takes."""
    ratios = [b / a if unit in ("s", "ms") else a / b for a, b in zip(ours, theirs)]
    a, b, ratio = (f"{statistics.median(values):,.4g}" if values else "never" for values in (ours, theirs, ratios))
    print(f"{work}, {unit}: {script} {a}, {peer} {b}, ratio {ratio}; pair by pair {[round(x, 2) for x in ratios]}")
    names = {"script": script, "work": work, "unit": unit, "peer": peer}
    return names | {"ours": ours, "theirs": theirs, "ratios": ratios}


def side_by_side(pairs: int, sides: dict[str, tuple[str, dict]], rows: list[tuple]) -> list[dict]:
    """Runs the sides in turn, each as a new process in an empty folder. A side: a function from above, and what it is
    given. A row to compare: script, work, unit, our side, the peer's, name of the figure."""
    figures = {name: [] for name in sides}
    for seed in range(1, pairs + 1):
        for name, (side, given) in sides.items():
            command = [sys.executable, __file__, "side", side, json.dumps(given | {"seed": seed})]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "STARTED": str(time.time())}
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
            figures[name].append(json.loads(done.stdout.splitlines()[-1]))
    comparisons = []
    for script, work, unit, mine, peer, figure in rows:
        by_seed = [(a[figure], b[figure]) for a, b in zip(figures[mine], figures[peer])]
        both = [pair for pair in by_seed if None not in pair]  # seeds with which both sides reach 475
        comparisons.append(compare(script, work, unit, peer, [a for a, _ in both], [b for _, b in both]))
    return comparisons


def control(args: Args, given: dict, work: str, scripts: dict, flags: str, settings: dict, file: str) -> list[dict]:
    """Steps/s of scripts of ours, each beside stable-baselines3 and CleanRL, at CleanRL's default settings."""
    given = given | {"steps": args.steps or given["steps"]}
    flags += f" --env-id {given['env_id']} --total-timesteps {given['steps']} --eval-episodes 1"
    sides = {script: ("ours", {"script": script, "flags": flags}) for script in scripts}
    sides["stable-baselines3"] = ("sb3", given | {"settings": settings})
    sides["CleanRL"] = ("cleanrl", given | {"file": f"{args.cleanrl.resolve()}/cleanrl/{file}"})
    pairs = [(script, peer) for script in scripts for peer in ("stable-baselines3", "CleanRL")]
    rows = [(script, work + scripts[script], "steps/s", script, peer, "rate") for script, peer in pairs]
    return side_by_side(args.pairs or 5, sides, rows)


def discrete(args: Args) -> list[dict]:
    """CartPole-v1: steps/s at equal work, and seconds to a mean return of 475."""
    script, work = "ppo_mlp_discrete.py", "CartPole-v1, 4 envs × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh"
    scripts = {script: "", "recipes/ppo_mlp_discrete__fast.patch": ", recipe fast"}
    given = {"env_id": "CartPole-v1", "steps": 100_000}
    comparisons = control(args, given, work, scripts, CARTPOLE, SB3_CARTPOLE, "ppo.py")
    work, peer = "CartPole-v1 from process start to a mean return of 475, own best settings", "stable-baselines3"
    sides = {"ours": ("ours", {"script": script, "flags": ""}), peer: ("sb3", given | {"settings": SB3_ZOO})}
    return comparisons + side_by_side(args.pairs or 5, sides, [(script, work, "s", "ours", peer, "s")])


def continuous(args: Args) -> list[dict]:
    """HalfCheetah-v5: steps/s at equal work."""
    work = "HalfCheetah-v5, 1 env × 2048 steps, 10 epochs × 32 minibatches, 64-64 tanh"
    given = {"env_id": "HalfCheetah-v5", "steps": 20_480}
    return control(args, given, work, {"ppo_mlp_continuous.py": ""}, MUJOCO, SB3_MUJOCO, "ppo_continuous_action.py")


def llm(args: Args) -> list[dict]:
    """A language model as policy: forward pass, update and peak memory of ours and of the document's construct."""
    script, work, peer = "ppo_llm_policy.py", "Qwen2-0.5B's size, LoRA", "the document's construct"
    given = {"device": args.device, "rows": {"forward": 8, "update": 64}}
    if args.device == "cuda":
        given["rows"] = {"forward": 256, "update": 512}
    sides = {name: ("llm_policy", given | {"is_ours": name == "ours"}) for name in ("ours", peer)}
    figures = [(f"{name} of {count} states", "ms") for name, count in given["rows"].items()]
    figures.append(("peak memory", "GB"))
    rows = [(script, f"{work}: {figure}", unit, "ours", peer, figure) for figure, unit in figures]
    return side_by_side(args.pairs or 3, sides, rows)


def rlhf(args: Args, is_large: bool = False) -> list[dict]:
    """Token-level PPO beside TRL's trainer: the same weights, prompts, response length, batch and epochs. is_large:
    memory instead of speed, with LoRA; the reward model of ours is an adapter, too, and trained for a step."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    import ppo_rlhf_token as ppo

    work, unit, figure, sizes = "4-layer, 128-wide Qwen2, 64 prompts × 24 tokens, 4 epochs", "episodes/s", "rate", SMALL
    batch, epochs, episodes = 64, 4, 7 * 64
    if is_large:
        work, unit, figure, sizes = "Qwen2-0.5B's size, LoRA", "GB", "peak memory", QWEN2
        batch, epochs, episodes = 8, 1, 2 * 8
    settings = {"per_device_train_batch_size": batch, "num_ppo_epochs": epochs, "total_episodes": episodes}
    settings |= {"response_length": 24, "temperature": 1.0, "learning_rate": 1e-5, "use_cpu": args.device == "cpu"}
    flags = f"--batch-size {batch} --micro-batch-size {batch} --num-minibatches 1 --update-epochs {epochs}"
    flags += f" --device {args.device}"
    flags += f" --total-episodes {episodes} --response-length 24 --learning-rate 1e-5 --sft-steps 0 --eval-samples 4"
    with tempfile.TemporaryDirectory() as files:
        words = [f"w{i}" for i in range(253)]
        ppo.make_tokenizer([" ".join(words)]).save_pretrained(files)
        config = Qwen2Config(**sizes, pad_token_id=0, eos_token_id=1, num_labels=1)
        Qwen2ForSequenceClassification(config).save_pretrained(files)  # whose body is also read as a language model
        data = [{"prompt": " ".join(words[i : i + 8]), "chosen": "w1", "rejected": "w2"} for i in range(245)]
        Path(files, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        flags += f" --model {files} --dataset {files}/rows.jsonl"
        flags += " --lora-rank 16 --reward-steps 1 --reward-batch-size 8" if is_large else f" --reward-model {files}"
        sides, rows = {}, []
        for critic in ("shared", "separate"):
            sides[critic] = ("ours", {"script": "ppo_rlhf_token.py", "flags": f"{flags} --critic {critic}"})
            rows.append(("ppo_rlhf_token.py", f"{work}, {critic} critic", unit, critic, "TRL", figure))
        sides["TRL"] = ("trl", {"files": files, "settings": settings, "has_lora": is_large})
        return side_by_side(args.pairs or (1 if is_large else 3), sides, rows)


def main() -> None:
    """Runs suites, prints them and writes them down; as a process of its own, a side of a pair."""
    if sys.argv[1:2] == ["side"]:
        figures = globals()[sys.argv[2]](**json.loads(sys.argv[3]))
        peak = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures["peak memory"] = peak / 1e9  # in GB
        print("\n" + json.dumps(figures))
        return
    from run import RESULTS, commit, installed, machine  # here, as sides start faster without

    args = tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,))
    suites = {"discrete": discrete, "continuous": continuous, "llm": llm, "rlhf": rlhf}
    suites["rlhf_memory"] = lambda args: rlhf(args, is_large=True)
    packages = ["torch", "transformers", "peft", "numpy", "gymnasium", "mujoco", "stable_baselines3", "trl"]
    for name in suites if args.suite == "all" else [args.suite]:
        start, record = time.perf_counter(), {"machine": machine(), "versions": installed(packages), "git": commit()}
        record |= {"comparisons": suites[name](args), "seconds": round(time.perf_counter() - start)}
        if args == Args(args.suite, args.cleanrl, args.device):  # other work would not be what the table says
            suffix = "_cuda" * (args.device == "cuda" and name in ("llm", "rlhf", "rlhf_memory"))
            (RESULTS / "speed" / f"{name}{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
