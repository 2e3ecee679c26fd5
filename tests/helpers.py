"""What the tests of several scripts use: reading runs, and starting, killing and spreading real processes."""

import ast
import copy
import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def patched(recipe, folder):
    """The module that recipes/RECIPE.patch makes of its script, in folder; asserts that the patch applies exactly."""
    script, _ = recipe.split("__")
    path = Path(folder) / f"{recipe}.py"
    patch = ["patch", "--fuzz=0", "-o", path, ROOT / f"{script}.py", ROOT / "recipes" / f"{recipe}.patch"]
    said = subprocess.run(patch, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout
    assert "offset" not in said.stdout, said.stdout  # the lines of a patch are those of today's script
    spec = importlib.util.spec_from_file_location(recipe, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


def read_metrics(run_dir, with_time=False):
    """Rows of metrics.csv as dicts of text, without the columns that depend on time."""
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if with_time or not k.startswith(("time/", "charts/SPS"))} for row in rows]


def load_checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def same_weights(run_a, run_b):
    """Asserts equal weights and Adam moments, bit for bit."""
    a, b = load_checkpoint(run_a), load_checkpoint(run_b)
    assert torch.equal(a["parameters"], b["parameters"])
    moments_a, moments_b = (x["optimizer"]["state"][0] for x in (a, b))
    assert all(torch.equal(moments_a[name], moments_b[name]) for name in moments_a)


def flags(args):
    """Command-line flags of a dict."""
    return [text for name, value in args.items() for text in ("--" + name.replace("_", "-"), str(value))]


def run_main(script, monkeypatch, capsys, *argv):
    """Exit code and stderr lines of a script's command line, called in this process. script: the imported module."""
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main()
    return stopped.value.code, capsys.readouterr().err.splitlines()


def run_script(script, monkeypatch, *argv):
    """Calls a script's command line in this process. script: the imported module."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    script.main()


def mistake(script, monkeypatch, *argv):
    """The line with which a script's command line ends, run as its own `if __name__ == "__main__"` does."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    *_, main_guard = ast.parse(Path(script.__file__).read_text()).body
    code = compile(ast.Module(main_guard.body, []), script.__file__, "exec")
    with pytest.raises(SystemExit) as stopped:
        exec(code, vars(script))
    line = stopped.value.code
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def same_state(a, b):
    """Asserts that two nested states (of networks, optimisers, checkpoints) are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same_state(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same_state(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def tensorboard_rows(run_dir, tag="losses/value_loss"):
    """(step, value) of a metric as TensorBoard shows it."""
    return [(scalar.step, scalar.value) for scalar in EventAccumulator(str(run_dir)).Reload().Scalars(tag)]


class Spy:
    """From here to the end of the test it keeps what a script's `train` does: each step of its environments as [obs
    before, action, reward, terminated, truncated, obs after], and each call of `ppo_loss` as (policy, critic, batch),
    the networks as they were then."""

    def __init__(self, script, monkeypatch):
        self.steps, self.calls = [], []
        make_envs, ppo_loss = script.make_envs, script.ppo_loss

        def spied_envs(*args, **options):
            envs = make_envs(*args, **options)
            reset, step = envs.reset, envs.step

            def spied_reset(**options):
                self.now, info = reset(**options)
                return self.now, info

            def spied_step(actions):
                result = step(actions)
                self.steps.append([np.array(x) for x in (self.now, actions, *result[1:4], result[0])])
                self.now = result[0].copy()
                return result

            envs.reset, envs.step = spied_reset, spied_step
            return envs

        def spied_loss(policy, critic, batch, *rest):
            self.calls.append(copy.deepcopy((policy, critic, batch)))
            return ppo_loss(policy, critic, batch, *rest)

        monkeypatch.setattr(script, "make_envs", spied_envs)
        monkeypatch.setattr(script, "ppo_loss", spied_loss)

    def rollout(self, iteration, num_steps):
        """obs (T + 1, N, D); actions, rewards, terminated, truncated (T, N, ...); rows (T, N): steps that do not only
        reset, which are those that follow no end."""
        steps = self.steps[iteration * num_steps :][:num_steps]
        columns = [np.stack([step[k] for step in steps]) for k in range(5)]
        done = columns[3] | columns[4]
        before = np.zeros_like(done[:1])
        if iteration:
            before |= self.steps[iteration * num_steps - 1][3] | self.steps[iteration * num_steps - 1][4]
        return np.concatenate([columns[0], steps[-1][5][None]]), *columns[1:], ~np.concatenate([before, done[:-1]])


def gae_by_definition(rewards, values, terminated, truncated, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, ending with the first delta of a finished step: O(T^2)."""
    advantages = np.zeros(rewards.shape)
    for t, n in np.ndindex(rewards.shape):
        for later in range(t, len(rewards)):
            bootstrap = 0.0 if terminated[later, n] else gamma * values[later + 1, n]
            advantages[t, n] += (gamma * lam) ** (later - t) * (rewards[later, n] + bootstrap - values[later, n])
            if terminated[later, n] or truncated[later, n]:
                break
    return advantages


def start(script, *argv):
    """A running process of a script's command line."""
    command = [sys.executable, script.__file__, *map(str, argv)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def resume_as_printed(script, errors, monkeypatch):
    """Runs the command that a stopped run printed, in this process: starting another would take longer than the run."""
    interpreter, file, *argv = re.search(r"resume with: (.*)", errors)[1].split()
    assert (interpreter, file) == (sys.executable, script.__file__)
    monkeypatch.setattr(sys, "argv", [file, *argv])
    script.main()


def run_two_ranks(file, *argv):
    """Runs a Python file under torchrun with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    done = subprocess.run([*command, *map(str, argv)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def wait_for_rows(run_dir, count, process):
    """Waits until metrics.csv of a run that is under way has count rows."""
    for _ in range(4500):
        assert process.poll() is None, process.stderr.read()
        path = run_dir / "metrics.csv"
        if path.exists() and path.read_text().count("\n") > count:
            return
        time.sleep(0.02)
    raise AssertionError("no rows after 90 s")
