"""What a suite is, and how its committed results are read: used by run.py, which writes them, and plot.py.

A suite is a file suites/NAME.toml: one script, groups of runs (a task with a setting, as flags of the script) and a
number of seeds. Each run leaves two files in results/NAME/: TASK__SETTING__SEED.csv with its metrics on a fixed grid of
steps, and a .json beside it with its final figures, all that they depend on, and a checksum of both files.
"""

import ast
import csv
import hashlib
import io
import json
import tokenize
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUITES = Path(__file__).parent / "suites"
RESULTS = Path(__file__).parent / "results"


class BenchmarkError(Exception):
    """What is wrong with a suite or a result, in one line, and the mend."""


@dataclass(frozen=True)
class Run:
    """One run of a suite."""

    script: str
    task: str
    setting: str
    flags: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}__{self.setting}__{self.seed}"

    @property
    def command(self) -> str:
        """What starts it."""
        return " ".join(["python", self.script, *self.flags.split(), "--seed", str(self.seed)])


@dataclass(frozen=True)
class Suite:
    """suites/NAME.toml."""

    name: str
    title: str  # of its figure
    script: str
    seeds: int  # how many
    timeout_minutes: float  # a run that takes longer is stopped
    grid: int  # steps between two rows of a result
    until: int  # step of its last row
    metrics: list[str]  # columns of metrics.csv that a result keeps
    xlabel: str  # what a step is
    figures: list[dict]  # figures of summary.json for the table: name, label, digits, scale; the first one matters most
    panels: list[dict[str, str]]  # metrics to draw for each task: metric, label
    settings: dict[str, str]  # what they are called
    groups: list[dict[str, str]]  # task, setting, flags
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
        numbers = range(self.first_seed, self.first_seed + seeds)
        return [Run(self.script, seed=seed, **group) for seed in numbers for group in self.groups]


def load_suite(name: str) -> Suite:
    """The suite of that name. Raises BenchmarkError."""
    path = SUITES / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in SUITES.glob("*.toml")))
        raise BenchmarkError(f"there is no suite {name}: choose one of {names}")
    return Suite(name, **tomllib.loads(path.read_text()))


def code_hash(script: Path) -> str:
    """Hash of a script without its comments, docstrings and empty lines, which change no figure. Raises BenchmarkError
    for one that is not Python."""
    source = script.read_text()
    try:
        tree, tokens = ast.parse(source), list(tokenize.generate_tokens(io.StringIO(source).readline))
    except SyntaxError as error:
        raise BenchmarkError(f"{script} is not Python: {error}") from error
    lines = source.splitlines()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def on_grid(suite: Suite, metrics: str) -> str:
    """A run's metrics.csv, as text, on the suite's grid: each row the mean of the iterations that ended since the row
    before, the last one with all that come after. Iterations of before the first figure (nan) do not count. Raises
    BenchmarkError where the metrics end early or lack a column."""
    rows = list(csv.DictReader(io.StringIO(metrics)))
    lacking = {"global_step", *suite.metrics} - set(rows[0] if rows else ())
    if lacking or int(rows[-1]["global_step"]) < suite.until:
        what = f"lacks {', '.join(sorted(lacking))}" if lacking else f"ends before step {suite.until}"
        raise BenchmarkError(f"metrics.csv {what}, which the suite wants")
    lines = [",".join(["global_step", *suite.metrics])]
    for step in range(suite.grid, suite.until + 1, suite.grid):
        end = step if step < suite.until else float("inf")
        within = [row for row in rows if step - suite.grid < int(row["global_step"]) <= end]
        cells = []
        for name in suite.metrics:
            values = [x for x in (float(row[name]) for row in within) if x == x]
            cells.append(repr(sum(values) / len(values)) if values else "nan")
        lines.append(",".join([str(step), *cells]))
    return "\n".join(lines) + "\n"


def checksum(record: dict, text: str) -> str:
    """SHA-256 of a result: its record without the checksum, and its CSV text."""
    whole = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256((json.dumps(whole, sort_keys=True) + text).encode()).hexdigest()


def differences(record: dict, other: dict) -> str:
    """In what a result's record differs from another, or from what it would have now, of what decides its figures:
    command, code, and the versions of packages that both know; "" for nothing."""
    then, now = (
        # The MuJoCo results are those of an earlier script, which had to be told to use one thread.
        {"command": r["command"].replace(" --torch-threads 1", ""), "code": r["code"]} | r["versions"]
        for r in (record, other)
    )
    return ", ".join(
        f"{name} {then[name]} (not {now[name]})" for name in then if now.get(name, then[name]) != then[name]
    )


def read_result(suite: Suite, run: Run, folder: Path) -> tuple[dict, dict[str, list[float]]] | None:
    """Record and columns of a run's files in folder; None where there are none. Raises BenchmarkError for files that
    are cut short, changed, or of another form than the suite's."""
    json_path, csv_path = (folder / f"{run.name}{ending}" for ending in (".json", ".csv"))
    if not json_path.exists() and not csv_path.exists():
        return None
    mend = f"python benchmarks/run.py {suite.name} runs it again"
    try:
        record, text = json.loads(json_path.read_text()), csv_path.read_text()
        whole = record["sha256"] == checksum(record, text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{json_path} or its .csv is missing or cut short: {mend}") from error
    if not whole:
        raise BenchmarkError(f"{json_path} and its .csv are not what the run wrote (cut short or changed): {mend}")
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
    steps = [float(step) for step in range(suite.grid, suite.until + 1, suite.grid)]
    if [*columns] != ["global_step", *suite.metrics] or columns["global_step"] != steps:
        raise BenchmarkError(f"{csv_path} has other columns or steps than the suite: {mend}")
    return record, columns
