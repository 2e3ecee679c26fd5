"""What the tests of several scripts use: reading runs, and starting, killing and spreading real processes."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def read_metrics(run_dir, with_time=False):
    """Rows of metrics.csv as dicts of text, without the time columns."""
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if with_time or not k.startswith("time/")} for row in rows]


def same_metrics(run_a, run_b, rel, abs):
    """Whether all figures of two runs but the times agree within a tolerance."""
    a, b = read_metrics(run_a), read_metrics(run_b)
    assert len(a) == len(b) >= 3
    for row, other in zip(a, b):
        figures = [[float(x) for x in r.values()] for r in (row, other)]
        assert figures[0] == pytest.approx(figures[1], rel=rel, abs=abs, nan_ok=True)


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
    for _ in range(1500):
        assert process.poll() is None, process.stderr.read()
        path = run_dir / "metrics.csv"
        if path.exists() and path.read_text().count("\n") > count:
            return
        time.sleep(0.02)
    raise AssertionError("no rows after 30 s")
