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
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tyro
from suite import RESULTS, ROOT, BenchmarkError, Run, Suite, checksum, code_hash, load_suite, on_grid, read_result
from tqdm import tqdm


@dataclass
class Args:
    """Runs a suite and writes its results."""

    suite: tyro.conf.Positional[str]
    """which: a file of benchmarks/suites, without its ending"""
    seeds: int | None = None
    """run seeds 1 to this; default: the suite's number"""
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


RUNNING: set[subprocess.Popen] = set()  # what to stop when the runner is stopped


def execute(command: list[str], root: str, timeout: float) -> dict:
    """Runs a script to its end, at most timeout seconds. Returns wall-clock seconds and the texts of its metrics.csv,
    config.json and summary.json, or "error" with its last lines. Only plain values go in and out, for Ray."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = time.perf_counter()
        words = [sys.executable, *command[1:], "--run-dir", f"{folder}/run"]
        process = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        RUNNING.add(process)
        try:
            output, _ = process.communicate(timeout=timeout)
            ended = f"exit code {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            ended = f"no end within {timeout / 60:g} minutes"
        RUNNING.discard(process)
        seconds = time.perf_counter() - start
        files = [Path(folder, "run", name) for name in ("metrics.csv", "config.json", "summary.json")]
        if process.returncode or not all(file.exists() for file in files):
            return {"error": "\n    ".join([ended, *output.splitlines()[-10:]])}
        return {"seconds": seconds} | {file.name: file.read_text() for file in files}


def run_here(runs: list[Run], timeout: float, workers: int) -> Iterator[tuple[Run, dict]]:
    """Runs and what execute returned for them, as they end, with so many at a time on this machine."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(execute, run.command.split(), str(ROOT), timeout): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.kill()


def run_on_ray(runs: list[Run], timeout: float, address: str, workers: int) -> Iterator[tuple[Run, dict]]:
    """The same on a Ray cluster, whose machines need the packages of requirements.txt; the scripts are sent to them."""
    try:
        import ray
    except ImportError:
        raise BenchmarkError("--ray needs a package: pip install -r benchmarks/requirements-ray.txt") from None
    excludes = [".git", ".venv", "runs", "benchmarks/results", "tests"]
    cluster = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    environment = {"working_dir": str(ROOT), "excludes": excludes}
    try:
        ray.init(
            **(cluster if address == "local" else {"address": address}),
            runtime_env=environment,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BenchmarkError(f"--ray {address}: {str(error).splitlines()[0]}") from error
    task = ray.remote(num_cpus=1)(execute)  # "." is the scripts' copy
    waiting = {task.remote(run.command.split(), ".", timeout): run for run in runs}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        try:
            outcome = ray.get(done)
        except ray.exceptions.RayError as error:  # its machine or worker is gone
            outcome = {"error": str(error)}
        yield waiting.pop(done), outcome


def differences(run: Run, record: dict) -> str:
    """What a record's run had other than a run that starts here and now: command, code or versions; "" for nothing."""
    now = {"command": run.command, "code": code_hash(ROOT / run.script)}
    now |= {name: platform.python_version() if name == "python" else installed(name) for name in record["versions"]}
    then = {"command": record["command"], "code": record["code"]} | record["versions"]
    return ", ".join(f"{name} {then[name]} (now {now[name]})" for name in now if then[name] != now[name])


def installed(package: str) -> str:
    """Its version here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def commit(script: str) -> str:
    """The commit that is checked out, "+" behind it where the script has been changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", script], check=False, capture_output=True)
    return head + "+" * (changed.returncode == 1)


def result_of(suite: Suite, run: Run, outcome: dict) -> tuple[dict, str]:
    """Record and CSV text of a run that ended well."""
    config = json.loads(outcome["config.json"])
    text = on_grid(suite, outcome["metrics.csv"])
    record = {
        "command": run.command,
        "flags": config["args"],
        "versions": config["versions"],
        "git": commit(run.script),
        "code": code_hash(ROOT / run.script),
        "machine": config["machine"],
        "seconds": round(outcome["seconds"], 1),
        "summary": json.loads(outcome["summary.json"]),
        "csv_sha256": checksum(text),
    }
    return record, text


def save(folder: Path, name: str, record: dict, text: str) -> None:
    """Writes both files of a result, each at once; the record, which vouches for the other, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (folder / f"{name}.csv", text),
        (folder / f"{name}.json", json.dumps(record, indent=1) + "\n"),
    ):
        part = path.with_name(path.name + ".part")
        part.write_text(content)
        part.replace(path)


def runs_to_do(suite: Suite, args: Args, folder: Path) -> list[Run]:
    """Runs without a complete result. Raises BenchmarkError where one was made in another way, unless args.redo."""
    to_do = []
    for run in suite.runs(args.seeds or suite.seeds):
        try:
            result = read_result(suite, run, folder)
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            result = None
        other = differences(run, result[0]) if result else ""
        if other and not args.redo:
            raise BenchmarkError(
                f"{folder / run.name}.json has {other}: --redo runs it again, --results FOLDER leaves it alone"
            )
        if other or not result:
            to_do.append(run)
    return to_do


def check(suite: Suite, folder: Path) -> bool:
    """Runs the suite's first run again and says how its result compares with the one in folder."""
    runs = suite.runs(suite.seeds)
    same_group = [run for run in runs if (run.task, run.setting) == (runs[0].task, runs[0].setting)]
    results = [read_result(suite, run, folder) for run in same_group]
    if None in results:
        raise BenchmarkError(f"{folder} lacks results: python benchmarks/run.py {suite.name} makes them")
    print(runs[0].command)
    outcome = execute(runs[0].command.split(), str(ROOT), 60 * suite.timeout_minutes)
    if "error" in outcome:
        print(f"failed: {outcome['error']}", file=sys.stderr)
        return False
    record, text = result_of(suite, runs[0], outcome)
    if checksum(text) == results[0][0]["csv_sha256"]:
        print(f"bit for bit as in {folder / runs[0].name}.csv")
        return True
    value, others = record["summary"][suite.headline], [r["summary"][suite.headline] for r, _ in results]
    low, high = min(others), max(others)
    within = low <= value <= high
    print(
        f"not bit for bit as in {folder / runs[0].name}.csv: {differences(runs[0], results[0][0]) or 'another machine'}"
    )
    print(f"{suite.headline} {value:g} is {'within' if within else 'OUTSIDE'} the seeds' {low:g} to {high:g}")
    return within


def run_suite(suite: Suite, args: Args, folder: Path) -> bool:
    """Runs what is to do and saves it; whether all of it ended well."""
    to_do = runs_to_do(suite, args, folder)
    total = len(suite.runs(args.seeds or suite.seeds))
    timeout = 60 * suite.timeout_minutes
    if args.ray:
        outcomes = run_on_ray(to_do, timeout, args.ray, args.workers)
    else:
        outcomes = run_here(to_do, timeout, args.workers)
    failed = 0
    with contextlib.closing(outcomes), tqdm(total=total, initial=total - len(to_do), unit="run") as bar:
        for run, outcome in outcomes:
            if "error" not in outcome:
                record, text = result_of(suite, run, outcome)
                if other := differences(run, record):  # on a machine of a Ray cluster
                    outcome = {"error": f"it ran with {other}: install requirements.txt there"}
            if "error" in outcome:
                failed += 1
                bar.write(f"FAILED {run.name}: {outcome['error']}", file=sys.stderr)
            else:
                save(folder, run.name, record, text)
                figure = f"{suite.headline} {record['summary'][suite.headline]:g}"
                bar.write(f"{run.name}: {figure} in {record['seconds']:.0f} s", file=sys.stderr)
                bar.update()
    print(
        f"{total - failed} of {total} runs are in {folder}" + f"; {failed} failed, run again for these" * (failed > 0)
    )
    return not failed


def stop(signum: int, frame: object) -> None:
    """SIGTERM ends the runner as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, stop)
    args = tyro.cli(Args)
    try:
        if args.workers < 1 or (args.seeds is not None and args.seeds < 1):
            raise BenchmarkError("--workers and --seeds must be at least 1")
        suite = load_suite(args.suite)
        folder = args.results / suite.name
        good = check(suite, folder) if args.check else run_suite(suite, args, folder)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        sys.exit(130)
    sys.exit(not good)


if __name__ == "__main__":
    main()
