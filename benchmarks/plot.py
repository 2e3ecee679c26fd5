"""Draws the results of all suites, writes the tables of the documents and renews the line numbers of their links.

    python benchmarks/plot.py                           # writes them
    python benchmarks/plot.py --results mine            # of a folder of your own: prints its tables, draws its figures

A curve is the mean over the seeds with its 95 % bootstrap interval, each seed thin beneath it. Interquartile mean and
probability of improvement over tasks follow Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264).
"""

import argparse
import hashlib
import io
import itertools
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from run import RESULTS, ROOT, SUITES, BenchmarkError, Suite, code_hash, differences, load_suite, read_result

FIGURES = Path(__file__).parent / "figures"
DOCUMENTS = (ROOT / "README.md", *sorted(ROOT.glob("*/*.md")))
ORDER = ("classic", "mujoco", "llm", "pizza", "rlhf")  # of suites in the overview; others come after them
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
# Gray on nothing, for light and dark pages; text as text, and equal results as an equal file.
STYLE = {"font.size": 8, "font.sans-serif": ["DejaVu Sans", "Arial"], "axes.titlesize": 8}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "gray")
STYLE |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none")
STYLE |= {"axes.grid": True, "grid.color": "gray", "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": "ppo"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


@dataclass
class Results:
    """All results of a suite."""

    suite: Suite
    runs: pd.DataFrame  # a row per run: task, setting, the summary's figures, and what else its record has
    curves: dict[tuple[str, str], pd.DataFrame]  # of task and setting: a row per step, columns (seed, metric)

    def groups(self) -> list[tuple[str, str, pd.DataFrame]]:
        """Task, setting and runs of each pair of both."""
        return [(*key, runs) for key, runs in self.runs.groupby(["task", "setting"], sort=False)]

    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each setting and each task that has a scale the seeds' figures on it, of those that matter most."""
        scores, scales = {}, self.suite.normalise
        for task, setting, runs in self.groups():
            if task in scales:
                zero, one = scales[task]
                scores.setdefault(setting, {})[task] = (runs[self.suite.headline].to_numpy() - zero) / (one - zero)
        return scores

    def curve(self, task: str, setting: str, metric: str) -> pd.DataFrame:
        """A row per step, a column per seed; some thirty steps, the last one among them."""
        curve = self.curves[task, setting].xs(metric, axis=1, level=1)
        return curve[:: -max(1, len(curve) // 30)][::-1]


def load_results(suite: Suite, folder: Path) -> Results:
    """The suite's results in folder, as far as they are there. Raises BenchmarkError for some that do not belong
    together: another command than the suite's, or code or versions that differ among those of a script."""
    rows, curves, firsts = [], {}, {}
    for run in suite.runs(suite.seeds):
        if result := read_result(suite, run, folder):
            record, curve = result
            rows.append(record["summary"] | record | {"task": run.task, "setting": run.setting})
            curves.setdefault(run[:2], {})[run.seed] = curve
            first = firsts.setdefault(run.command.split()[1], record)
            if other := differences(record, first | {"command": run.command}):
                mend = f"python benchmarks/run.py {suite.name} --redo"
                raise BenchmarkError(f"{folder / run.name}.json does not belong to the others, it has {other}: {mend}")
    if not rows:
        raise BenchmarkError(f"{folder} lacks results: python benchmarks/run.py {suite.name} makes them")
    return Results(suite, pd.DataFrame(rows), {key: pd.concat(seeds, axis=1) for key, seeds in curves.items()})


# ----------------------------------------------------------------------------------------------------------- statistics


def interval(statistic: Callable, samples: list[np.ndarray], resamples: int = 2_000) -> np.ndarray:
    """95 % percentile interval of a statistic of samples, of which each is resampled with replacement along its first
    axis, the seeds (Efron & Tibshirani 1993, §13.3). Returns low and high, (2, ...)."""
    rng = np.random.default_rng(0)
    draws = [statistic([rng.choice(sample, len(sample)) for sample in samples]) for _ in range(resamples)]
    return np.quantile(draws, (0.025, 0.975), axis=0)


def mean(samples: list[np.ndarray]) -> np.ndarray:
    """Of one sample, over its seeds."""
    return samples[0].mean(0)


def iqm(samples: list[np.ndarray]) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter (rounded down) of all scores."""
    return scipy.stats.trim_mean(np.concatenate(samples), 0.25)


def improvement(samples: list[np.ndarray]) -> float:
    """Probability that a run of the first half of samples has more than one of the second; ties half, mean of tasks."""
    pairs = zip(samples, samples[len(samples) // 2 :])
    return np.mean([(np.sign(np.subtract.outer(x, y)).mean() + 1) / 2 for x, y in pairs])


# -------------------------------------------------------------------------------------------------------------- figures


def draw_curves(axes: Axes, curves: dict[str, tuple]) -> None:
    """Each seed thin, the mean thick and labelled at its end, an interval of it as a band.

    curves: of each label x (P, S), y (P, S), and whether to draw the band. Points at which not all seeds have a
    figure are left out of mean and band."""
    ends = []
    for colour, (label, (x, y, has_band)) in zip(itertools.cycle(COLOURS), curves.items()):
        seeds = [np.pad(z.astype(float), ((0, 1), (0, 0)), constant_values=np.nan).ravel("F") for z in (x, y)]
        axes.plot(*seeds, color=colour, alpha=0.35, linewidth=0.5)  # one line with gaps, a smaller file than many
        whole = ~np.isnan(y).any(1)
        middle = x[whole].mean(1)
        if has_band:
            axes.fill_between(middle, *interval(mean, [y[whole].T]), color=colour, alpha=0.2, linewidth=0)
        axes.plot(middle, y[whole].mean(1), color=colour, linewidth=2)
        ends.append((y[whole][-1].mean(), textwrap.fill(label, 17), colour))
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    places, top = [], -1.0  # in heights of the axes; a label that would overlap the one below it moves up
    for value, label, colour in sorted(ends):
        half = 0.04 * label.count("\n") + 0.06
        places.append((max((value - low) / (high - low), top + half), label, colour))
        top = places[-1][0] + half
    for place, label, colour in places:
        axes.text(1.02, place - max(0, top - 1.05), label, color=colour, transform=axes.transAxes, va="center")


def draw_panel(axes: Axes, results: Results, task: str, panel: dict, settings: dict[str, str]) -> None:
    """A metric of a task, by settings."""
    curves = {}
    for setting, label in settings.items():
        if (task, setting) in results.curves and setting in panel.get("settings", settings):
            curve = results.curve(task, setting, panel["metric"]).loc[: panel.get("until")]
            if panel.get("log10"):
                curve = np.log10(curve.clip(lower=1e-6))
            curves[label] = (np.repeat(curve.index.to_numpy()[:, None], curve.shape[1], 1), curve.to_numpy(), True)
    draw_curves(axes, curves)
    axes.set(xlabel=results.suite.xlabel, ylabel=panel["label"])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_frontier(axes: Axes, results: Results, task: str, setting: str) -> None:
    """Scores over the root of the KL divergence (Gao et al. 2022, fig. 1)."""
    suite = results.suite
    root = np.sqrt(results.curve(task, setting, suite.kl).clip(lower=0)).to_numpy()  # estimates, which can be below 0
    scores = {line["label"]: results.curve(task, setting, line["metric"]).to_numpy() for line in suite.frontier}
    draw_curves(axes, {label: (root, score, False) for label, score in scores.items()})
    axes.set(xlabel="square root of the KL divergence in nats", ylabel="score", title=suite.settings[setting])


def draw(results: Results) -> Figure:
    """All panels of a suite, two in a row: each metric of each task, then the frontiers."""
    suite, tasks = results.suite, [*results.runs["task"].unique()]
    panels = [(task, panel) for task in tasks for panel in suite.panels]
    frontiers = [*results.curves] if suite.frontier else []
    count = len(panels) + len(frontiers)
    rows, columns = -(-count // 2), min(count, 2)
    figure = Figure(figsize=(4.5 * columns, 2.4 * rows), layout="constrained")
    all_axes = [figure.add_subplot(rows, columns, i) for i in range(1, count + 1)]
    for axes, (task, panel) in zip(all_axes, panels):
        draw_panel(axes, results, task, panel, suite.settings)
        axes.set_title(task if len(tasks) > 1 else "")
    for axes, key in zip(all_axes[len(panels) :], frontiers):
        draw_frontier(axes, results, *key)
    return figure


def draw_scores(results: Results) -> Figure:
    """Mean scores of each task with their 95 % intervals and what others published; last the mean over tasks."""
    suite = results.suite
    tasks = [*suite.normalise]
    figure = Figure(figsize=(7, 0.35 * len(tasks) + 1), layout="constrained")
    axes = figure.add_subplot(xlabel=f"score (0 and 1: {suite.normalised_by})")
    axes.set_yticks(range(len(tasks) + 1), [*tasks, "interquartile mean"])
    axes.invert_yaxis()
    for i, (setting, of_tasks) in enumerate(results.scores().items()):
        samples = [(mean, [of_tasks[task]]) for task in tasks] + [(iqm, [*of_tasks.values()])]
        middle = np.array([statistic(sample) for statistic, sample in samples])
        low, high = np.transpose([interval(statistic, sample) for statistic, sample in samples])
        style = {"fmt": "o", "markersize": 4, "color": COLOURS[i], "label": suite.settings[setting]}
        axes.errorbar(middle, np.arange(len(samples)) + 0.2 * i, xerr=[middle - low, high - middle], **style)
    for marker, source in zip("x+1^*", suite.published):
        values = [source["values"].get(task, [np.nan])[0] for task in tasks]
        zero, one = np.transpose([suite.normalise[task] for task in tasks])
        axes.plot((values - zero) / (one - zero), range(len(tasks)), marker, color="gray", label=source["source"])
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def overview(loaded: dict[str, Results]) -> list[tuple[str, str, Results]]:
    """Script, task and results of the first suite of each script."""
    firsts = {}
    for results in loaded.values():
        if results.suite.script.endswith(".py"):
            firsts.setdefault(results.suite.script, (results.suite.groups[0]["task"], results))
    return [(script, *first) for script, first in firsts.items()]


def draw_overview(loaded: dict[str, Results]) -> Figure:
    """A panel for each script: the first task with our own setting."""
    figure, firsts = Figure(figsize=(10, 2.2), layout="constrained"), overview(loaded)
    for i, (script, task, results) in enumerate(firsts, 1):
        axes = figure.add_subplot(1, len(firsts), i, title=f"{script}\n{task}")
        draw_panel(axes, results, task, results.suite.panels[0], {"ours": ""})
    return figure


def fingerprint(suite: Suite, folder: Path) -> str:
    """Which results a figure was drawn from, as what, and by which code."""
    texts = [path.read_text() for path in (SUITES / f"{suite.name}.toml", *sorted(folder.iterdir()))]
    return hashlib.sha256("".join([*texts, code_hash(Path(__file__).read_text())]).encode()).hexdigest()[:16]


def save_figure(path: Path, draw: Callable[[], Figure], mark: str) -> None:
    """Writes a figure with the mark of what it was drawn from."""
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        metadata = {"Date": None, "Creator": None, "Description": f"drawn from {mark}"}
        draw().savefig(file, format="svg", metadata=metadata)
        text = re.sub(r" *\n *(L )?", "\n", file.getvalue())  # pairs of numbers after an M are lines, too
        path.write_text(re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.1f}", text))  # tenths of a point


# --------------------------------------------------------------------------------------------------------------- tables


def number(value: float, digits: int = 1) -> str:
    """With thousands' commas and a proper minus; "" for nan, where a setting has no such figure."""
    if np.isnan(value):
        return ""
    return f"{value:,.{digits}f}".replace("-", "−")


def span(middle: float, low: float, high: float, digits: int = 1) -> str:
    """middle (low to high), or the one number where they are the same"""
    middle, low, high = (number(x, digits) for x in (middle, low, high))
    return middle if low == high else f"{middle} ({low} to {high})"


def spread(values: list[float], digits: int = 0) -> str:
    """median (minimum to maximum)"""
    return span(statistics.median(values), min(values), max(values), digits)


def estimate(statistic: Callable, samples: list[np.ndarray], digits: int) -> str:
    """A statistic and its 95 % interval."""
    return span(statistic(samples), *interval(statistic, samples), digits)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def figure_cells(results: Results, task: str, setting: str) -> list[str]:
    """The means of the suite's figures over the seeds, of the first one with its 95 % interval; of a metric the largest
    mean at any step."""
    runs, cells = results.runs[(results.runs["task"] == task) & (results.runs["setting"] == setting)], []
    for figure in results.suite.figures:
        name, digits = figure["name"], figure.get("digits", 1)
        if name in results.suite.metrics:
            curve = results.curves[task, setting].xs(name, axis=1, level=1)
            cells.append(number(curve.mean(axis=1, skipna=False).max(), digits))
            continue
        values = figure.get("scale", 1) * runs[name].to_numpy()
        cells.append(number(values.mean(), digits) if cells else estimate(mean, [values], digits))
    return cells


def published_cell(source: dict, task: str) -> str:
    """What a source published for a task."""
    values = source["values"].get(task, [])
    digits = 0 if max(values, default=0) >= 1000 or all(float(x).is_integer() for x in values) else 1
    return " ± ".join(number(value, digits) for value in values)


def results_table(results: Results) -> str:
    """Figures of each task and setting beside the published ones, and what they are."""
    suite, runs = results.suite, results.runs
    head = ["task", "setting", *(x["label"] for x in suite.figures), *(x["source"] for x in suite.published), "seconds"]
    rows, scores, seen = [], results.scores(), set()
    for task, setting, group in results.groups():
        facts = [task, *(published_cell(source, task) for source in suite.published)]
        if task in seen:  # what holds for a task is said once
            facts = [""] * len(facts)
        seen.add(task)
        seconds = number(group["seconds"].median(), 0)
        rows.append([facts[0], suite.settings[setting], *figure_cells(results, task, setting), *facts[1:], seconds])
    counts = "/".join(sorted({str(len(group)) for *_, group in results.groups()}))
    minutes = number(runs["seconds"].sum() / 120, 0)
    notes = [f"Seeds: {counts}; minutes: {minutes}."]
    for source in suite.published:
        name = f"[{source['source']}]({source['url']})" if "url" in source else source["source"]
        notes.append(f"{name}: {source['metric']}, seeds: {source['seeds']}, {source['version']}.")
    if scores:
        means = (
            f"{suite.settings[name]} **{estimate(iqm, [*of_tasks.values()], 2)}**" for name, of_tasks in scores.items()
        )
        notes.append(f"Interquartile mean of scores (0 and 1: {suite.normalised_by}): {', '.join(means)}.")
    if [len(of_tasks) for of_tasks in scores.values()] == 2 * [len(suite.normalise)]:  # task by task
        chance = estimate(improvement, [x for of_tasks in scores.values() for x in of_tasks.values()], 2)
        notes.append(f"Probability that a run of the first has the higher score: **{chance}**.")
    return table(head, rows) + "\n\n" + " ".join(notes)


def overview_table(loaded: dict[str, Results]) -> str:
    """One line for each script: what our own setting reaches, beside the most comparable published figure."""
    rows = []
    for script, task, results in overview(loaded):
        runs = results.runs[(results.runs["task"] == task) & (results.runs["setting"] == "ours")]
        cells = [f"`{script}`", task, figure_cells(results, task, "ours")[0], ""]
        for source in results.suite.published[:1]:
            cells[-1] = f"{published_cell(source, task)} ({source['source']})"
        rows.append([*cells, number(runs["seconds"].median() / 60)])
    machines = {machine for results in loaded.values() for machine in results.runs["machine"]}
    head = ["script", "task", "our mean (95 % interval)", "published", "minutes"]
    return f"{table(head, rows)}\n\nMeasured on: {'; '.join(sorted(machines))}."


def speed_table(folder: Path) -> str:
    """All comparisons of speed.py: the medians of ours and each peer, and the ratio pair by pair."""
    measured = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = {}
    for comparison in (c for result in measured.values() for c in result["comparisons"] if c["ratios"]):
        unit, ratios = comparison["unit"], comparison["ratios"]
        digits = 0 if min(comparison["ours"]) >= 100 else 1
        ours, theirs = (number(statistics.median(comparison[side]), digits) for side in ("ours", "theirs"))
        ratio = f"{spread([100 * x for x in ratios])} %" if unit == "GB" else f"× {spread(ratios, 2)}"
        row = rows.setdefault(re.sub("[,:]? peak memory", "", comparison["work"]), [[], []])
        row[0] += [f"{ours} {unit}"] * (f"{ours} {unit}" not in row[0])
        row[1].append(f"{comparison['peer']} {theirs}{' GB' * (unit == 'GB')}, {ratio}")
    minutes = number(sum(result["seconds"] for result in measured.values()) / 60, 0)
    lines = [[work, "; ".join(ours), "; ".join(peers)] for work, (ours, peers) in rows.items()]
    return table(["work", "this", "peer, this is"], lines) + f"\n\nMinutes: {minutes}."


# ------------------------------------------------------------------------------------------------------------ documents


def fill(text: str, tables: dict[str, str]) -> str:
    """A document with its tables replaced: what stands between <!-- plot.py: NAME --> and <!-- end -->."""
    mark = "<!-- plot.py: {} -->\n{}\n<!-- end -->"
    block = r"<!-- plot\.py: (\w+) -->\n.*?<!-- end -->"
    if lacking := {*re.findall(block, text, re.S)} - {*tables}:
        raise BenchmarkError(f"a document shows {', '.join(lacking)}, of which there are no results")
    return re.sub(block, lambda match: mark.format(match[1], tables[match[1]]), text, flags=re.S)


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


def load_all(folder: Path) -> dict[str, Results]:
    """All suites that have results in a folder."""
    names = dict.fromkeys([*ORDER, *sorted(path.stem for path in SUITES.glob("*.toml"))])
    return {name: load_results(load_suite(name), folder / name) for name in names if (folder / name).exists()}


def renew(write: bool) -> list[Path]:
    """Documents and figures that do not show the results that are there; writes them if write."""
    loaded, wrong = load_all(RESULTS), []
    tables = {name: results_table(results) for name, results in loaded.items()}
    tables |= {"overview": overview_table(loaded), "speed": speed_table(RESULTS / "speed")}
    texts = {path: path.read_text() for path in DOCUMENTS}
    for name in tables:
        if f"<!-- plot.py: {name} -->" not in "".join(texts.values()):
            raise BenchmarkError(f"no document has a place for the table {name}: <!-- plot.py: {name} -->")
    for path, text in texts.items():
        new = relink(fill(text, tables))
        if new != text:
            wrong.append(path)
            if write:
                path.write_text(new)
    marks = {name: fingerprint(results.suite, RESULTS / name) for name, results in loaded.items()}
    figures = {name: (marks[name], partial(draw, results)) for name, results in loaded.items()}
    figures |= {
        f"{name}_scores": (marks[name], partial(draw_scores, x)) for name, x in loaded.items() if x.suite.normalise
    }
    figures["overview"] = (" ".join(marks.values()), partial(draw_overview, loaded))
    for name, (mark, draw_it) in figures.items():
        path = FIGURES / f"{name}.svg"
        if not path.exists() or mark not in path.read_text():
            wrong.append(path)
            if write:
                save_figure(path, draw_it, mark)
    return wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder of results of your own; its tables are printed")
    args = parser.parse_args()
    try:
        if not args.results:
            print(*renew(write=True), sep="\n")
            return
        loaded = load_all(args.results)
        if not loaded:
            raise BenchmarkError(f"{args.results} holds results of no suite: benchmarks/run.py makes them")
        for name, results in loaded.items():
            path = args.results / f"{name}.svg"
            save_figure(path, partial(draw, results), "results of one's own")
            print(results_table(results), f"\n{path} has the figure\n", sep="\n")
    except BenchmarkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
