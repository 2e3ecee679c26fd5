"""Draws the results of all suites, writes the tables of benchmarks/README.md and renews all documents' line numbers.

    python benchmarks/plot.py                           # writes them
    python benchmarks/plot.py --check                   # says what would change; exit code 1 if anything does
    python benchmarks/plot.py --results mine            # of a folder of your own: prints its tables, draws its figures

Reads results/ and suites/ alone. A curve is the mean over the seeds with its 95 % bootstrap interval, each seed thin
beneath it. The interquartile mean (IQM) over tasks, of normalised scores, follows Agarwal et al. 2021
(https://arxiv.org/abs/2108.13264).
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from suite import RESULTS, ROOT, SUITES, BenchmarkError, Suite, code_hash, differences, load_suite, read_result

FIGURES = Path(__file__).parent / "figures"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md")))
# Suites in the order of tables.
ORDER = ("classic", "mujoco", "llm", "llm_memory", "llm_reinforce", "llm_body", "pizza", "rlhf")
SPEED = ("discrete", "continuous", "llm", "rlhf", "rlhf_memory")  # suites of speed.py
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


@dataclass
class Group:
    """All results of a task with a setting."""

    task: str
    setting: str
    records: list[dict]  # of each seed
    curves: dict[str, np.ndarray]  # metric: (S, P), seeds x points of the grid

    def figure(self, name: str) -> np.ndarray:
        """A figure of all seeds' summary.json, (S,)."""
        return np.array([record["summary"][name] for record in self.records])


def load_results(suite: Suite, folder: Path) -> list[Group]:
    """The suite's groups with the seeds that are there. Raises BenchmarkError for broken results, and for some that do
    not belong together: another command than the suite's, or code or versions that differ among them."""
    results = {(group["task"], group["setting"]): [] for group in suite.groups}
    first = None
    for run in suite.runs(suite.seeds):
        result = read_result(suite, run, folder)
        if result is None:
            continue
        record, _ = result
        first = first or record
        if other := differences(record, first | {"command": run.command}):
            mend = f"python benchmarks/run.py {suite.name} --redo"
            raise BenchmarkError(f"{folder / run.name}.json does not belong to the others, it has {other}: {mend}")
        results[run.task, run.setting].append(result)
    if not all(results.values()):
        raise BenchmarkError(f"{folder} lacks results: python benchmarks/run.py {suite.name} makes them")
    return [
        Group(
            *key,
            [record for record, _ in found],
            {name: np.array([columns[name] for _, columns in found]) for name in suite.metrics},
        )
        for key, found in results.items()
    ]


# ----------------------------------------------------------------------------------------------------------- statistics


def bootstrap_interval(values: np.ndarray, resamples: int = 2_000) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean over seeds.

    values: (S, ...), a row per seed. Returns low and high, (...): the 2.5 and 97.5 % quantiles of the means of
    resamples with replacement (Efron & Tibshirani 1993, §13.3).
    """
    seeds = len(values)
    drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # (R, S)
    means = np.tensordot(drawn / seeds, values, 1)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter (rounded down) of all scores."""
    cut = scores.size // 4
    return float(np.sort(scores, axis=None)[cut : scores.size - cut].mean())


def iqm_interval(scores: list[np.ndarray], resamples: int = 2_000) -> tuple[float, float]:
    """95 % percentile interval of the IQM, seeds resampled within each task. scores: (S,) of each task."""
    rng = np.random.default_rng(0)
    values = [iqm(np.concatenate([rng.choice(x, len(x)) for x in scores])) for _ in range(resamples)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------------------- figures


def draw_curve(axes: Axes, x: np.ndarray, curves: np.ndarray, colour: str, label: str) -> None:
    """Each seed thin, the mean thick, its interval as a band. x: (P,), curves: (S, P). Points at which not all seeds
    have a figure are left out of mean and band."""
    axes.plot(x, curves.T, color=colour, alpha=0.35, linewidth=0.6)
    whole = ~np.isnan(curves).any(0)
    low, high = bootstrap_interval(curves[:, whole])
    axes.fill_between(x[whole], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x[whole], curves[:, whole].mean(0), color=colour, linewidth=2, label=label)


def draw_frontier(axes: Axes, group: Group, kl: str, frontier: list[dict[str, str]], title: str) -> None:
    """Scores over the root of the KL divergence (Gao et al. 2022, fig. 1): each seed thin, the mean over seeds of both
    thick. kl: its metric, frontier: those of the scores."""
    root = np.sqrt(np.maximum(group.curves[kl], 0))  # (S, P); an estimate, which can be below 0
    for colour, line in zip(("tab:purple", "tab:green"), frontier):
        scores = group.curves[line["metric"]]
        axes.plot(root.T, scores.T, color=colour, alpha=0.35, linewidth=0.6)
        axes.plot(root.mean(0), scores.mean(0), color=colour, linewidth=2, label=line["label"])
    axes.set(xlabel="square root of the KL divergence in nats", ylabel="score", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def draw(suite: Suite, groups: list[Group]) -> Figure:
    """All panels of a suite, two in a row: each metric of each task, then the frontiers."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    panels = [(task, panel) for task in tasks for panel in suite.panels]
    frontiers = groups if suite.frontier else []
    count = len(panels) + len(frontiers)
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.5 * columns, 2.6 * rows), layout="constrained")
    figure.suptitle(suite.title, fontsize=11)
    all_axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    x = np.arange(suite.grid, suite.until + 1, suite.grid)
    for (task, panel), axes in zip(panels, all_axes):
        for colour, (setting, label) in zip(COLOURS, suite.settings.items()):
            for group in groups:
                if (group.task, group.setting) == (task, setting):
                    draw_curve(axes, x, group.curves[panel["metric"]], colour, label)
        axes.set(xlabel=suite.xlabel, ylabel=panel["label"], title=task if len(tasks) > 1 else "")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for group, axes in zip(frontiers, all_axes[len(panels) :]):
        draw_frontier(axes, group, suite.kl, suite.frontier, suite.settings[group.setting])
    return figure


def draw_overview(loaded: dict[str, tuple[Suite, list[Group]]]) -> Figure:
    """A panel for each script: the first task with our own setting, of 40 points at most. For any background."""
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    firsts = {}
    for suite, groups in loaded.values():
        firsts.setdefault(suite.script, (suite, groups[0]))
    for i, (script, (suite, group)) in enumerate(firsts.items(), 1):
        axes = figure.add_subplot(1, len(firsts), i)
        step = -(-(suite.until // suite.grid) // 40)
        x = np.arange(suite.grid, suite.until + 1, suite.grid)[::step]
        draw_curve(axes, x, group.curves[suite.panels[0]["metric"]][:, ::step], COLOURS[0], suite.panels[0]["label"])
        axes.set_title(f"{script}\n{group.task}", fontsize=7, color="gray")
        axes.set_xlabel(suite.xlabel, fontsize=7, color="gray")
        axes.set_ylabel(suite.panels[0]["label"], fontsize=7, color="gray")
        axes.tick_params(colors="gray", labelsize=6)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_facecolor("none")
        axes.spines[:].set_color("gray")
        axes.grid(alpha=0.3)
    figure.set_facecolor("none")
    return figure


def fingerprint(suite: Suite, groups: list[Group]) -> str:
    """Which results a figure was drawn from, as what, and by which code."""
    sums = sorted(record["sha256"] for group in groups for record in group.records)
    sources = [*sums, (SUITES / f"{suite.name}.toml").read_text(), code_hash(Path(__file__))]
    return "drawn from " + hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def fingerprints(loaded: dict[str, tuple[Suite, list[Group]]]) -> dict[str, str]:
    """Which results each figure was drawn from; the overview from all."""
    each = {name: fingerprint(suite, groups) for name, (suite, groups) in loaded.items()}
    return each | {"overview": " ".join(each.values())}


# --------------------------------------------------------------------------------------------------------------- tables


def number(value: float, digits: int = 1) -> str:
    """With thousands' commas and a proper minus."""
    return f"{value:,.{digits}f}".replace("-", "−")


def interval(middle: float, low: float, high: float, digits: int = 1) -> str:
    """middle (low to high), or the one number where they are the same"""
    middle, low, high = (number(x, digits) for x in (middle, low, high))
    return middle if low == high else f"{middle} ({low} to {high})"


def figure_cell(group: Group, figure: dict) -> str:
    """The mean of a figure over a group's seeds and its 95 % interval, as the suite wants it shown."""
    values = figure.get("scale", 1) * group.figure(figure["name"])
    return interval(values.mean(), *bootstrap_interval(values), figure.get("digits", 1))


def published_cell(source: dict, task: str) -> str:
    """What a source published for a task."""
    values = source["values"].get(task)
    if not values:
        return ""
    digits = 0 if abs(values[0]) >= 1000 or all(float(x).is_integer() for x in values) else 1
    return " ± ".join(number(value, digits) for value in values)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machines(groups: list[Group]) -> str:
    """On what the runs were made."""
    return " and ".join(sorted({record["machine"] for group in groups for record in group.records}))


def results_table(suite: Suite, groups: list[Group]) -> str:
    """Figures of each task and setting beside the published ones, with seeds, time and what the columns are."""
    head = ["task", "setting", "seeds", *[figure["label"] for figure in suite.figures]]
    head += [source["source"] for source in suite.published] + ["seconds"]
    rows = []
    for group in groups:
        seconds = [record["seconds"] for record in group.records]
        rows.append(
            [group.task, suite.settings[group.setting], str(len(group.records))]
            + [figure_cell(group, figure) for figure in suite.figures]
            + [published_cell(source, group.task) for source in suite.published]
            + [number(statistics.median(seconds), 0)]
        )
    main = suite.figures[0]
    notes = ["Mean over seeds (95 % bootstrap interval of it); seconds: median from process start to end."]
    for source in suite.published:
        name = f"[{source['source']}]({source['url']})" if "url" in source else source["source"]
        seeds = f"{source['seeds']} seed" + "s" * (source["seeds"] > 1)
        notes.append(f"{name}: {source['metric']}; {seeds}; {source['version']}.")
    versions = groups[0].records[0]["versions"]
    notes.append(", ".join(f"{name} {text}" for name, text in versions.items()) + f"; {machines(groups)}.")
    each = [
        f"- {group.task}, {suite.settings[group.setting]}: "
        + ", ".join(number(main.get("scale", 1) * x, main.get("digits", 1)) for x in group.figure(main["name"]))
        for group in groups
    ]
    seeds = f"Each seed's {main['label']}:\n\n" + "\n".join(each)
    return "\n\n".join([table(head, rows), " ".join(notes), seeds, *iqm_table(suite, groups)])


def iqm_table(suite: Suite, groups: list[Group]) -> list[str]:
    """The suite's IQM for each setting; nothing where scores are not normalised."""
    if not suite.normalise:
        return []
    rows = []
    for setting, label in suite.settings.items():
        scores = [
            (group.figure(suite.headline) - suite.normalise[group.task][0]) / np.ptp(suite.normalise[group.task])
            for group in groups
            if group.setting == setting
        ]
        rows.append([label, interval(iqm(np.concatenate(scores)), *iqm_interval(scores), 2)])
    limits = "; ".join(
        f"{task} {number(a, 0)} and {number(b, 0 if b == int(b) else 1)}" for task, (a, b) in suite.normalise.items()
    )
    note = f"Scores are linear in the {suite.figures[0]['label']}; 0 and 1 are, for {limits} ({suite.normalised_by})."
    return [
        table(["setting", "interquartile mean of the normalised scores of all tasks and seeds (95 % interval)"], rows),
        note,
    ]


def overview_table(loaded: dict[str, tuple[Suite, list[Group]]]) -> str:
    """One line for each task with our own setting: what it reaches, beside the most comparable published figure."""
    head = ["script", "task", "figure", "seeds", "our settings' mean (95 % interval)", "published", "minutes"]
    rows = []
    for suite, groups in loaded.values():
        main = suite.figures[0]
        for group in groups:
            if group.setting == "ours":
                published = published_cell(suite.published[0], group.task) if suite.published else ""
                source = f" ({suite.published[0]['source']})" if published else ""
                minutes = statistics.median(record["seconds"] for record in group.records) / 60
                cells = [f"`{suite.script}`", group.task, main["label"], str(len(group.records))]
                rows.append([*cells, figure_cell(group, main), published + source, number(minutes)])
    return table(head, rows)


# ---------------------------------------------------------------------------------------------------------------- speed


def spread(values: list[float], digits: int = 0) -> str:
    """median (minimum to maximum)"""
    return interval(statistics.median(values), min(values), max(values), digits)


def speed_table(measured: dict[str, dict]) -> str:
    """All comparisons of speed.py: ours, the peer, the ratio pair by pair, the machine."""
    rows = []
    for result in measured.values():
        for c in result["comparisons"]:
            if not c["ratios"]:
                continue
            ours, theirs = (spread(c[side], 0 if min(c["ours"]) >= 100 else 1) for side in ("ours", "theirs"))
            if c["unit"] == "GB":
                ratio = spread([100 * x for x in c["ratios"]], 0) + " % of it"
            else:
                ratio = spread(c["ratios"], 2) + " times as fast"
            pairs = f"{len(c['ratios'])} pair" + "s" * (len(c["ratios"]) > 1)
            work = f"{c['work']}: {c['unit']}"
            rows.append(
                [f"`{c['script']}`", work, ours, f"{theirs}, {c['peer']}", f"{ratio}; {pairs}", result["machine"]]
            )
    return table(["script", "work", "this", "peer", "this is", "machine"], rows)


def duration(seconds: float) -> str:
    """In minutes, or in hours."""
    return f"{number(seconds / 3600)} hours" if seconds >= 3600 else f"{number(seconds / 60, 0)} minutes"


def times_table(loaded: dict[str, tuple[Suite, list[Group]]], measured: dict[str, dict]) -> str:
    """How long each suite takes on two cores, half the time that its runs took, two side by side; and the comparisons,
    one run after the other."""
    rows = []
    for name, (suite, groups) in loaded.items():
        seconds = [record["seconds"] for group in groups for record in group.records]
        runs = len(suite.runs(suite.seeds))
        command = f"`python benchmarks/run.py {name} --results mine`"
        rows.append([command, suite.script, str(runs), duration(statistics.mean(seconds) * runs / 2), machines(groups)])
    on_cpu = [measured[name] for name in SPEED]
    time = duration(sum(result["seconds"] for result in on_cpu))
    machine = " and ".join(sorted({result["machine"] for result in on_cpu}))
    rows.append(["`python benchmarks/speed.py all --cleanrl DIR`", "all but ppo_char_lm_pizza.py", "", time, machine])
    return table(["command", "script", "runs", "on 2 cores", "measured on"], rows)


# ------------------------------------------------------------------------------------------------------------ documents


def fill(text: str, tables: dict[str, str]) -> str:
    """A document with its tables replaced: what stands between <!-- plot.py: NAME --> and <!-- end -->."""

    def block(match: re.Match) -> str:
        if match[1] not in tables:
            raise BenchmarkError(f"plot.py makes no table {match[1]}, only {', '.join(tables)}")
        return f"<!-- plot.py: {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- plot\.py: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def relink(text: str) -> str:
    """A document with the line numbers of its links into scripts: [`compute_gae`](ppo_mlp_discrete.py#L1) to where the
    function, method or class is defined, [`train`, part 2](...) to where that part of it begins."""

    def link(match: re.Match) -> str:
        label, name, part, up, script = match.groups()
        wanted = rf"\s+# {part}\. " if part else rf"\s*(def|class) {name}\b"
        for count, line in enumerate((ROOT / script).read_text().splitlines(), 1):
            if re.match(wanted, line):
                return f"[{label}]({up}{script}#L{count})"
        raise BenchmarkError(f"{script} has no {label}, to which a document links")

    return re.sub(r"\[(`(\w+)`(?:, part (\d))?)\]\((\.\./|)(ppo_\w+\.py)#L\d+\)", link, text)


def load_all(folder: Path) -> dict[str, tuple[Suite, list[Group]]]:
    """All suites with their results in a folder."""
    suites = map(load_suite, ORDER)
    return {suite.name: (suite, load_results(suite, folder / suite.name)) for suite in suites}


def load_speed(folder: Path) -> dict[str, dict]:
    """What speed.py measured."""
    measured = {}
    for name in SPEED:
        path = folder / f"{name}.json"
        try:
            measured[name] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{path} is missing or cut short: benchmarks/speed.py {name} makes it") from error
    on_gpu = [path for name in SPEED if (path := folder / f"{name}_cuda.json").exists()]
    return measured | {path.stem: json.loads(path.read_text()) for path in on_gpu}


def documents_now(loaded: dict[str, tuple[Suite, list[Group]]]) -> dict[Path, str]:
    """What the documents should be."""
    measured = load_speed(RESULTS / "speed")
    tables = {name: results_table(suite, groups) for name, (suite, groups) in loaded.items()} | {
        "overview": overview_table(loaded),
        "times": times_table(loaded, measured),
        "speed": speed_table(measured),
    }
    texts = {path: path.read_text() for path in DOCUMENTS}
    for name in tables:
        if f"<!-- plot.py: {name} -->" not in "".join(texts.values()):
            raise BenchmarkError(f"no document has a place for the table {name}: <!-- plot.py: {name} -->")
    return {path: relink(fill(text, tables)) for path, text in texts.items()}


def stale() -> list[Path]:
    """Documents and figures that do not show the results that are there."""
    loaded = load_all(RESULTS)
    wrong = [path for path, text in documents_now(loaded).items() if path.read_text() != text]
    for name, source in fingerprints(loaded).items():
        path = FIGURES / f"{name}.svg"
        if not path.exists() or source not in path.read_text():
            wrong.append(path)
    return wrong


def save_figure(suite: Suite, groups: list[Group], folder: Path) -> None:
    """Writes a suite's figure. Equal results give an equal file."""
    matplotlib.rcParams["svg.hashsalt"] = "ppo"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": fingerprint(suite, groups)}
    draw(suite, groups).savefig(folder / f"{suite.name}.svg", metadata=metadata)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything would change")
    parser.add_argument("--results", type=Path, help="folder of results of your own; its tables are printed")
    args = parser.parse_args()
    try:
        if args.results:
            names = [name for name in ORDER if (args.results / name).exists()]
            if not names:
                raise BenchmarkError(f"{args.results} holds results of no suite: benchmarks/run.py makes them")
            for name in names:
                suite = load_suite(name)
                groups = load_results(suite, args.results / name)
                save_figure(suite, groups, args.results)
                print(results_table(suite, groups), f"\n{args.results / name}.svg has the figure\n", sep="\n")
            return
        if args.check:
            wrong = stale()
            for path in wrong:
                print(f"{path.relative_to(ROOT)} does not show the results: python benchmarks/plot.py")
            sys.exit(bool(wrong))
        loaded = load_all(RESULTS)
        documents = documents_now(loaded)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path, text in documents.items():
        path.write_text(text)
    for suite, groups in loaded.values():
        save_figure(suite, groups, FIGURES)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as outlines would double its size
        metadata = {"Date": None, "Description": fingerprints(loaded)["overview"]}
        draw_overview(loaded).savefig(FIGURES / "overview.svg", metadata=metadata)
    print(f"wrote {len(documents)} documents and {len(loaded) + 1} figures")


if __name__ == "__main__":
    main()
