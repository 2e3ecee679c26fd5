"""Runs a suite: script x tasks x settings x seeds as processes of one thread each; results go to results/SUITE/.

    python benchmarks/run.py classic                     # all that is not there yet
    python benchmarks/run.py mujoco --seeds 1 --workers 4
    python benchmarks/run.py mujoco --ray auto           # spread over a Ray cluster; "local" starts one here
    python benchmarks/run.py pizza --check               # one run again: does it give the committed figures?

Complete runs are skipped, broken ones redone. A failed run is shown with its last lines while the others go on; then
the exit code is 1.
"""

import contextlib
import json
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tyro
from suite import (
    RESULTS,
    ROOT,
    BenchmarkError,
    Run,
    Suite,
    checksum,
    code_hash,
    differences,
    load_suite,
    on_grid,
    read_result,
)
from tqdm import tqdm


@dataclass
class Args:
    """Runs a suite and writes its results."""

    suite: tyro.conf.Positional[str]
    """which: a file of benchmarks/suites, without its ending"""
    seeds: int | None = None
    """run so many seeds; default: the suite's number"""
    workers: int = 2
    """runs at a time on this machine"""
    ray: str | None = None
    """address of a Ray cluster to run on instead; "auto" finds one, "local" starts one here with this many workers"""
    results: Path = RESULTS
    """folder for the results, each suite's in its own"""
    redo: bool = False
    """run again what is there with other flags, versions or code"""
    check: bool = False
    """run the suite's first run once more and compare it with its result; writes nothing"""


def machine() -> str:
    """Names of the processor, its cores and the GPU, if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpus = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    names = [cpu[1] if cpu else platform.processor(), f"{os.cpu_count()} cores", *gpus.splitlines()]
    return ", ".join(names)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of these packages, where they are installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):  # one that the script can do without
            versions[name] = version(name)
    return versions


def execute(command: list[str], root: str, timeout: float, started: Callable = lambda process: None) -> dict:
    """Runs a script to its end, at most timeout seconds, on one thread, since runs share the cores. Returns wall-clock
    seconds, the machine, versions of the packages in the script's head, and the texts of its metrics.csv, config.json
    and summary.json, or "error" with its last lines. Only plain values go in and out, for Ray.

    started: called with the process.
    """
    head = Path(root, command[1]).read_text().partition("\n# ///\n")[0]
    facts = {"machine": machine(), "versions": installed(re.findall(r'"([\w-]+)[^"]*=', head))}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = time.perf_counter()
        words = [sys.executable, *command[1:], "--run-dir", f"{folder}/run"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(words, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
        try:
            started(process)
            output, _ = process.communicate(timeout=timeout)
            ended = f"exit code {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            ended = f"no end within {timeout / 60:g} minutes"
        finally:
            process.kill()  # where Ctrl-C ends the wait
        seconds = time.perf_counter() - start
        files = [Path(folder, "run", name) for name in ("metrics.csv", "config.json", "summary.json")]
        if process.returncode or not all(file.exists() for file in files):
            return {"error": "\n    ".join([ended, *output.splitlines()[-10:]])}
        return facts | {"seconds": seconds} | {file.name: file.read_text() for file in files}


def run_here(runs: list[Run], timeout: float, workers: int) -> Iterator[tuple[Run, dict]]:
    """Runs and what execute returned for them, as they end, with so many at a time on this machine."""
    pool, processes, stopping = ThreadPoolExecutor(workers), [], threading.Event()

    def started(process: subprocess.Popen) -> None:
        processes.append(process)
        if stopping.is_set():
            process.kill()

    try:
        futures = {pool.submit(execute, run.command.split(), str(ROOT), timeout, started): run for run in runs}
        for future in as_completed(futures):
            error = future.exception()  # no space, no memory for a process ...
            yield futures[future], {"error": repr(error)} if error else future.result()
    finally:
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def run_on_ray(runs: list[Run], timeout: float, address: str, workers: int) -> Iterator[tuple[Run, dict]]:
    """The same on a Ray cluster, whose machines need the packages of requirements.txt; the scripts are sent to them."""
    try:
        import ray
    except ImportError:
        raise BenchmarkError("--ray needs a package: pip install -r benchmarks/requirements-ray.txt") from None
    os.environ.setdefault("RAY_worker_niceness", "0")  # a cluster started here has nothing to give way to
    where = {"address": "local", "num_cpus": workers} if address == "local" else {"address": address}
    excludes = [".git", ".venv", "runs", "benchmarks/results", "tests"]
    copy = {"working_dir": str(ROOT), "excludes": excludes}
    try:
        ray.init(**where, runtime_env=copy, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BenchmarkError(f"--ray {address}: {str(error).splitlines()[0]}") from error
    signal.signal(signal.SIGTERM, stop)  # instead of Ray's own
    task = ray.remote(num_cpus=1)(execute)
    waiting = {task.remote(run.command.split(), ".", timeout): run for run in runs}  # "." is the copy
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:  # its machine is gone
                outcome = {"error": str(error)}
            yield waiting.pop(done), outcome
    finally:
        ray.shutdown()  # ends its workers and their scripts


def identity(run: Run, versions: dict[str, str]) -> dict:
    """What a result of a run that starts here and now would have, of these packages the versions of those here."""
    return {"command": run.command, "code": code_hash(ROOT / run.script), "versions": installed(versions)}


def commit() -> str:
    """The commit that is checked out; "" where there is none."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def result_of(suite: Suite, run: Run, outcome: dict, git: str) -> tuple[dict, str]:
    """Record and CSV text of a run that ended well. Raises BenchmarkError where it lacks what the suite shows."""
    config, summary = json.loads(outcome["config.json"]), json.loads(outcome["summary.json"])
    text = on_grid(suite, outcome["metrics.csv"])
    for figure in suite.figures:
        if figure["name"] not in summary:
            raise BenchmarkError(f"summary.json has no {figure['name']}, which the suite shows")
    record = {
        "command": run.command,
        "flags": config.get("args", config) | {"run_dir": None},  # which was a temporary folder
        "versions": outcome["versions"],
        "git": git,
        "code": code_hash(ROOT / run.script),
        "machine": outcome["machine"],
        "seconds": round(outcome["seconds"], 1),
        "summary": summary,
    }
    return record, text


def save(folder: Path, name: str, record: dict, text: str) -> None:
    """Writes both files of a result, each at once; the record, which vouches for both, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    record = record | {"sha256": checksum(record, text)}
    for ending, content in ((".csv", text), (".json", json.dumps(record, indent=1) + "\n")):
        part = folder / f"{name}{ending}.part"
        part.write_text(content)
        part.replace(folder / f"{name}{ending}")


def missing(suite: Suite, runs: list[Run], args: Args, folder: Path) -> list[Run]:
    """Runs without a complete result. Raises BenchmarkError where one was made in another way, unless args.redo."""
    to_do = []
    for run in runs:
        try:
            result = read_result(suite, run, folder)
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            result = None
        other = result and differences(result[0], identity(run, result[0]["versions"]))
        if other and not args.redo:
            mend = "--redo runs it again, --results FOLDER leaves it alone"
            raise BenchmarkError(f"{folder / run.name}.json has {other}: {mend}")
        if other or not result:
            to_do.append(run)
    return to_do


def check(suite: Suite, folder: Path) -> bool:
    """Runs the suite's first run again; whether its result is the one in folder or, where machine, code or versions
    differ, within the range of the seeds there."""
    first, *_ = runs = suite.runs(suite.seeds)
    results = [
        read_result(suite, run, folder) for run in runs if (run.task, run.setting) == (first.task, first.setting)
    ]
    if None in results:
        raise BenchmarkError(f"{folder} lacks results: python benchmarks/run.py {suite.name} makes them")
    print(first.command)
    outcome = execute(first.command.split(), str(ROOT), 60 * suite.timeout_minutes)
    if "error" in outcome:
        print(f"failed: {outcome['error']}", file=sys.stderr)
        return False
    record, text = result_of(suite, first, outcome, commit())
    committed, _ = results[0]
    value = record["summary"][suite.headline]
    if text == (folder / f"{first.name}.csv").read_text() and value == committed["summary"][suite.headline]:
        print(f"bit for bit as in {folder / first.name}.csv, {suite.headline} {value:g} as well")
        return True
    other = differences(committed, record)
    if committed["machine"] != record["machine"]:
        other = ", ".join(filter(None, [f"machine {committed['machine']} (now {record['machine']})", other]))
    if not other:
        print(f"NOT as in {folder / first.name}.csv and .json, although machine, versions and code are the same")
        return False
    values = [r["summary"][suite.headline] for r, _ in results]
    low, high = min(values), max(values)
    within = low <= value <= high
    print(f"not bit for bit as in {folder / first.name}.csv, which has {other}")
    print(f"{suite.headline} {value:g} is {'within' if within else 'OUTSIDE'} the seeds' {low:g} to {high:g}")
    return within


def run_suite(suite: Suite, args: Args, folder: Path) -> bool:
    """Runs what is missing and saves it; whether all of it ended well."""
    runs = suite.runs(args.seeds or suite.seeds)
    to_do = missing(suite, runs, args, folder)
    code, git, timeout = code_hash(ROOT / suite.script), commit(), 60 * suite.timeout_minutes
    if args.ray:
        outcomes = run_on_ray(to_do, timeout, args.ray, args.workers)
    else:
        outcomes = run_here(to_do, timeout, args.workers)
    failed = 0
    with contextlib.closing(outcomes), tqdm(total=len(runs), initial=len(runs) - len(to_do), unit="run") as bar:
        for run, outcome in outcomes:
            if code_hash(ROOT / suite.script) != code:
                raise BenchmarkError(f"{suite.script} was changed while its runs were under way")
            try:
                if "error" in outcome:
                    raise BenchmarkError(outcome["error"])
                record, text = result_of(suite, run, outcome, git)
                if other := differences(record, identity(run, record["versions"])):  # on a machine of a Ray cluster
                    raise BenchmarkError(f"its machine has {other}: install requirements.txt there")
                save(folder, run.name, record, text)
            except (BenchmarkError, OSError) as error:
                failed += 1
                bar.write(f"FAILED {run.name}: {error}", file=sys.stderr)
                continue
            figure = f"{suite.headline} {record['summary'][suite.headline]:g}"
            bar.write(f"{run.name}: {figure} in {record['seconds']:.0f} s", file=sys.stderr)
            bar.update()
    done = f"{len(runs) - failed} of {len(runs)} runs are in {folder}"
    print(f"{done}; {failed} failed, the same command tries them again" if failed else done)
    return not failed


def stop(signum: int, frame: object) -> None:
    """SIGTERM ends the runner as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, stop)
    args = tyro.cli(Args)
    try:
        suite = load_suite(args.suite)
        if args.workers < 1 or (args.seeds is not None and not 1 <= args.seeds <= suite.seeds):
            raise BenchmarkError(f"--workers must be at least 1 and --seeds 1 to {suite.seeds}, the suite's")
        folder = args.results / suite.name
        good = check(suite, folder) if args.check else run_suite(suite, args, folder)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        after = "" if args.check else "; the same command goes on with the runs that are missing"
        print(f"stopped{after}", file=sys.stderr)
        sys.exit(130)
    sys.exit(not good)


if __name__ == "__main__":
    main()
