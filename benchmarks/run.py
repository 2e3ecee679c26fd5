"""Runs a suite: scripts x tasks x settings x seeds as processes of one thread each; results go to results/SUITE/.

    python benchmarks/run.py classic                     # all that is not there yet
    python benchmarks/run.py mujoco --seeds 1 --workers 4
    python benchmarks/run.py mujoco --ray auto           # spread over a Ray cluster; "local" starts one here
    python benchmarks/run.py pizza --check               # one run again: does it give the committed figures?

A failed run is shown with its last lines while the others go on; then the exit code is 1. Each run leaves two files,
TASK__SETTING__SEED.csv with its metrics on a fixed grid of steps, and a .json beside it with its final figures and all
that they depend on.
"""

import ast
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import tyro

ROOT = Path(__file__).parent.parent
SUITES = Path(__file__).parent / "suites"
RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    """Runs a suite and writes its results."""

    suite: tyro.conf.Positional[str]  # which: a file of benchmarks/suites, without its ending
    seeds: int | None = None  # run so many seeds; default: the suite's number
    workers: int = 2  # runs at a time on this machine
    ray: str | None = None  # a Ray cluster's address; "auto" finds one, "local" starts one here with --workers
    results: Path = RESULTS  # folder for the results, each suite's in its own
    redo: bool = False  # run again what is there with other flags, versions or code
    check: bool = False  # run the suite's first run once more and compare it with its result; writes nothing


class BenchmarkError(Exception):
    """What is wrong with a suite or a result, in one line, and the mend."""


# --------------------------------------------------------------------------------------------------- suites and results


class Run(NamedTuple):
    """One run of a suite."""

    task: str
    setting: str
    seed: int
    command: str
    steps: range  # the grid

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}__{self.setting}__{self.seed}"


@dataclass(frozen=True)
class Suite:
    """suites/NAME.toml."""

    name: str
    title: str  # of its figure
    seeds: int  # how many
    timeout_minutes: float  # a run that takes longer is stopped
    metrics: list[str]  # columns of metrics.csv that a result keeps
    xlabel: str  # what a step is
    # Figures for the table: name, label, digits, scale. Names are those of summary.json, the first one matters most, or
    # of a metric, of which the table has the largest mean at any step.
    figures: list[dict]
    panels: list[dict]  # metrics to draw for each task: metric, label; of these settings, until a step, log10 of it
    settings: dict[str, str]  # what they are called
    groups: list[dict]  # task, setting, flags; and where they are not the suite's script, grid, until
    script: str = ""  # or a patch of one: recipes/SCRIPT__NAME.patch
    grid: int = 0  # steps between two rows of a result
    until: int = 0  # step of its last row
    normalise: dict[str, tuple[float, float]] = field(default_factory=dict)  # task: returns that score 0 and 1
    normalised_by: str = ""  # where these two are from
    first_seed: int = 1  # another where some seeds were used to choose the settings
    published: list[dict] = field(default_factory=list)  # others' figures, the most comparable first
    kl: str = ""  # the metric over whose root to draw the frontier's
    frontier: list[dict[str, str]] = field(default_factory=list)  # metric, label

    @property
    def headline(self) -> str:
        """The figure of summary.json that matters most."""
        return self.figures[0]["name"]

    def runs(self, seeds: int) -> list[Run]:
        """All runs, seed by seed, so that a part of them covers all groups."""
        runs = []
        for seed in range(self.first_seed, self.first_seed + seeds):
            for group in self.groups:
                own = vars(self) | group  # the suite's script, grid and until where the group has none
                command = " ".join(["python", own["script"], *own["flags"].split(), "--seed", str(seed)])
                steps = range(own["grid"], own["until"] + 1, own["grid"])
                runs.append(Run(own["task"], own["setting"], seed, command, steps))
        return runs


def load_suite(name: str) -> Suite:
    """The suite of that name. Raises BenchmarkError."""
    path = SUITES / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in SUITES.glob("*.toml")))
        raise BenchmarkError(f"there is no suite {name}: choose one of {names}")
    return Suite(name, **tomllib.loads(path.read_text()))


def code_of(run: Run) -> str:
    """Text of the script that a run runs; of a patch, what it makes of its script."""
    script = run.command.split()[1]
    if not script.endswith(".patch"):
        return (ROOT / script).read_text()
    with tempfile.TemporaryDirectory() as folder:
        original, patched = Path(script).name.partition("__")[0] + ".py", Path(folder, "patched.py")
        subprocess.run(["patch", "-s", "-o", patched, original, script], cwd=ROOT, check=True)
        return patched.read_text()


def code_hash(text: str) -> str:
    """Hash of a Python source without its comments, docstrings and empty lines, which change no figure."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def on_grid(metrics: str, columns: list[str], steps: range) -> str:
    """Columns of a run's metrics.csv, as text, on a grid: each row the mean of the iterations that ended since the row
    before, the last one with all that come after. Iterations of before the first figure (nan) do not count. Raises
    BenchmarkError where the metrics end early or lack a column."""

    def mean(values: pd.Series) -> float:  # pandas' own sums in another order, which can change the last digit
        return float(sum(values.dropna())) / values.count() if values.count() else math.nan

    table = pd.read_csv(io.StringIO(metrics))
    if {"global_step", *columns} - {*table} or table["global_step"].max() < steps[-1]:
        raise BenchmarkError(f"metrics.csv ends before step {steps[-1]} or lacks one of {', '.join(columns)}")
    table["global_step"] = (-(-table["global_step"] // steps.step) * steps.step).clip(upper=steps[-1])
    return table.groupby("global_step")[columns].agg(mean).reindex(steps).to_csv(na_rep="nan")


def read_result(suite: Suite, run: Run, folder: Path) -> tuple[dict, pd.DataFrame] | None:
    """Record and metrics of a run in folder; None where they are not there, not whole or not on the suite's grid."""
    path = folder / f"{run.name}.json"
    try:
        record, metrics = json.loads(path.read_text()), pd.read_csv(path.with_suffix(".csv"), index_col="global_step")
        return (record, metrics[suite.metrics]) if [*metrics.index] == [*run.steps] else None
    except (OSError, ValueError, KeyError):
        return None


def differences(record: dict, other: dict) -> str:
    """In what a result's record differs from another, or from what it would have now, of what decides its figures:
    command, code, and the versions of packages that both know; "" for nothing."""
    then, now = ({"command": r["command"], "code": r["code"]} | r["versions"] for r in (record, other))
    return ", ".join(f"{name} {x} (not {now[name]})" for name, x in then.items() if now.get(name, x) != x)


# -------------------------------------------------------------------------------------------------------------- running


def machine() -> str:
    """Names of the processor, its cores and the GPU, if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpus = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ", ".join([cpu[1] if cpu else platform.processor(), f"{os.cpu_count()} cores", *gpus.splitlines()])


def commit() -> str:
    """The commit that is checked out; "" where there is none."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def installed(names: list[str]) -> dict[str, str]:
    """Versions of Python and of these packages, where they are installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):  # one that the script can do without
            versions[name] = version(name)
    return versions


def execute(text: str, command: str, root: str, timeout: float, is_stopped: Callable = lambda: False) -> dict:
    """Runs a script's text with a command's flags to its end, at most timeout seconds, on one thread, since runs share
    the cores. Returns wall-clock seconds, the machine, versions of the packages in the script's head, and the texts of
    its metrics.csv, config.json and summary.json, or "error" with its last lines. Plain values alone, for Ray."""
    _, script, *flags = command.split()
    packages = re.findall(r'"([\w-]+)[^"]*=', text.partition("\n# ///\n")[0])
    modules = os.pathsep.join([os.path.abspath(root), os.environ.get("PYTHONPATH", "")])  # of environments
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(f"{folder}/output", "w+b") as output:
        path = Path(folder, Path(script).stem + ".py")
        path.write_text(text)
        words, start = [sys.executable, path, *flags, "--run-dir", f"{folder}/run"], time.perf_counter()
        process = subprocess.Popen(words, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.perf_counter() < start + timeout and not is_stopped():
                time.sleep(0.05)
            code = process.poll()
        finally:
            process.kill()
            process.wait()
        facts = {"seconds": time.perf_counter() - start, "machine": machine(), "versions": installed(packages)}
        files = [Path(folder, "run", name) for name in ("metrics.csv", "config.json", "summary.json")]
        if code == 0 and all(file.exists() for file in files):
            return facts | {file.name: file.read_text() for file in files}
        ended = f"exit code {code}" if code is not None else f"no end within {timeout / 60:g} minutes"
        output.seek(0)
        return {"error": "\n    ".join([ended, *output.read().decode(errors="replace").splitlines()[-10:]])}


def run_all(runs: list[Run], texts: dict[Run, str], timeout: float, args: Args) -> Iterator[tuple[Run, dict]]:
    """Runs and what execute returned for them, as they end: so many at a time on this machine, or on a Ray cluster,
    whose machines need the packages of requirements.txt; this folder is sent to them."""
    if args.ray:
        import ray

        os.environ.setdefault("RAY_worker_niceness", "0")  # a cluster started here has nothing to give way to
        where = {"address": "local", "num_cpus": args.workers} if args.ray == "local" else {"address": args.ray}
        copy = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs", "benchmarks/results"]}
        ray.init(**where, runtime_env=copy, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # instead of Ray's own
        task = ray.remote(num_cpus=1)(execute)
        futures = {task.remote(texts[run], run.command, ".", timeout).future(): run for run in runs}
    else:
        pool, stopping = ThreadPoolExecutor(args.workers), threading.Event()
        given = (str(ROOT), timeout, stopping.is_set)
        futures = {pool.submit(execute, texts[run], run.command, *given): run for run in runs}
    try:
        for future in as_completed(futures):
            error = future.exception()  # its machine is gone, no space, no memory for a process ...
            yield futures[future], {"error": repr(error)} if error else future.result()
    finally:
        if args.ray:
            ray.shutdown()  # ends its workers and their scripts
        else:
            stopping.set()
            pool.shutdown(cancel_futures=True)


def result_of(suite: Suite, run: Run, outcome: dict, text: str, git: str) -> tuple[dict, str]:
    """Record and CSV text of a run. Raises BenchmarkError where it failed or lacks what the suite shows."""
    if "error" in outcome:
        raise BenchmarkError(outcome["error"])
    config, summary = json.loads(outcome["config.json"]), json.loads(outcome["summary.json"])
    if suite.headline not in summary:
        raise BenchmarkError(f"summary.json has no {suite.headline}, which the suite shows")
    record = {"command": run.command, "flags": config.get("args", config) | {"run_dir": None}}  # a temporary folder
    record |= {"versions": outcome["versions"], "git": git, "code": code_hash(text)}
    record |= {"machine": outcome["machine"], "seconds": round(outcome["seconds"], 1), "summary": summary}
    return record, on_grid(outcome["metrics.csv"], suite.metrics, run.steps)


def save(folder: Path, name: str, record: dict, text: str) -> None:
    """Writes both files of a result, each at once, the record last."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in ((".csv", text), (".json", json.dumps(record, indent=1) + "\n")):
        part = folder / f"{name}{ending}.part"
        part.write_text(content)
        part.replace(folder / f"{name}{ending}")


def run_suite(suite: Suite, args: Args, folder: Path) -> bool:
    """Runs what is missing or broken and saves it; whether all of it ended well. Raises BenchmarkError where a result
    was made in another way, unless args.redo."""
    runs = suite.runs(suite.seeds if args.seeds is None else args.seeds)
    texts, git, to_do, failed = {run: code_of(run) for run in runs}, commit(), [], 0

    def changes(run: Run, record: dict) -> str:  # from that of the same run if it started here and now
        now = {"command": run.command, "code": code_hash(texts[run]), "versions": installed(record["versions"])}
        return differences(record, now)

    for run in runs:
        result = read_result(suite, run, folder)
        other = result and changes(run, result[0])
        if other and not args.redo:
            mend = "--redo runs it again, --results FOLDER leaves it alone"
            raise BenchmarkError(f"{folder / run.name}.json has {other}: {mend}")
        if other or not result:
            to_do.append(run)
    with contextlib.closing(run_all(to_do, texts, 60 * suite.timeout_minutes, args)) as outcomes:
        for count, (run, outcome) in enumerate(outcomes, 1):
            try:
                record, metrics = result_of(suite, run, outcome, texts[run], git)
                if other := changes(run, record):  # on a machine of a Ray cluster
                    raise BenchmarkError(f"its machine has {other}: install requirements.txt there")
                save(folder, run.name, record, metrics)
                end = f"{suite.headline} {record['summary'][suite.headline]:g} in {record['seconds']:.0f} s"
            except (BenchmarkError, OSError) as error:
                failed += 1
                end = f"FAILED, {error}"
            print(f"{count} of {len(to_do)}: {run.name}: {end}", file=sys.stderr)
    again = "; the same command tries the others again" if failed else ""
    print(f"{len(runs) - failed} of {len(runs)} runs are in {folder}{again}")
    return not failed


def check(suite: Suite, folder: Path) -> bool:
    """Runs the suite's first run again; whether its result is the one in folder or, where machine, code or versions
    differ, within the range of the seeds there."""
    first, name = suite.runs(1)[0], suite.headline
    results = [read_result(suite, run, folder) for run in suite.runs(suite.seeds) if run[:2] == first[:2]]
    if None in results:
        raise BenchmarkError(f"{folder} lacks results: python benchmarks/run.py {suite.name} makes them")
    print(first.command)
    text = code_of(first)
    outcome = execute(text, first.command, str(ROOT), 60 * suite.timeout_minutes)
    record, metrics = result_of(suite, first, outcome, text, commit())
    committed, values = results[0][0], [old["summary"][name] for old, _ in results]
    value = record["summary"][name]
    if metrics == (folder / f"{first.name}.csv").read_text() and value == values[0]:
        print(f"bit for bit as in {folder / first.name}.csv, {name} {value:g} as well")
        return True
    other, is_within = differences(committed, record), min(values) <= value <= max(values)
    if committed["machine"] != record["machine"]:
        other = f"machine {committed['machine']} (not {record['machine']}) {other}"
    print(f"NOT as in {folder / first.name}.csv, which has {other or 'the same machine, versions and code'}")
    print(f"{name} {value:g} is {'within' if is_within else 'OUTSIDE'} the seeds' {min(values):g} to {max(values):g}")
    return bool(other) and is_within


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runner as Ctrl-C does
    args = tyro.cli(Args)
    try:
        suite = load_suite(args.suite)
        folder = args.results / suite.name
        sys.exit(not (check(suite, folder) if args.check else run_suite(suite, args, folder)))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
