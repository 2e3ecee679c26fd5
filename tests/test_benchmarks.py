"""The runner with runs that fail, hang and die; results that are cut, changed or foreign; tables and figures."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import plot
import pytest
import run as runner
import scipy.stats
import speed
from run import BenchmarkError, Suite, code_hash, load_suite, on_grid

ROOT = Path(__file__).parent.parent
# A script that behaves like ours as far as the runner can see: it leaves a run of three iterations, or it does not.
TOY = '''# /// script
# dependencies = ["numpy>=2"]
# ///
"""A toy."""
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name, kind in {"how": str, "seed": int, "run-dir": Path}.items():
    parser.add_argument(f"--{name}", type=kind)
args = parser.parse_args()
log = Path(os.environ["TOYS"])
with open(log / "started", "a") as file:
    file.write(f"{args.how} {args.seed} {os.getpid()}\\n")
if not (log / "mended").exists():
    if args.how == "fail":
        os.write(1, b"\\xff\\n")
        sys.exit("error: there is no such task")
    if args.how == "hang":
        print("waiting", flush=True)
        time.sleep(1000)
    if args.how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
args.run_dir.mkdir()
luck, late_luck = (float(os.environ.get(name, "0")) for name in ("LUCK", "LATE_LUCK"))
rows = [(step, args.seed + step / 10 + luck) for step in (9, 19, 31)][: 2 if args.how == "short" else 3]
(args.run_dir / "metrics.csv").write_text("global_step,return\\n" + "".join(f"{a},{b}\\n" for a, b in rows))
(args.run_dir / "config.json").write_text(json.dumps({"seed": args.seed}))
(args.run_dir / "summary.json").write_text(json.dumps({"final": args.seed + late_luck}))
'''
SUITE = """
title = "Toys"
script = "toy.py"
seeds = 2
timeout_minutes = 0.1
grid = 10
until = 30
metrics = ["return"]
xlabel = "steps"
figures = [{name = "final", label = "final figure"}]
panels = [{metric = "return", label = "return"}]
settings = {ours = "as it is"}
"""


class Project:
    """A folder with the runner, the toy, and a suite with a task for each given way to end."""

    def __init__(self, folder, *ways):
        self.folder, self.results = folder, folder / "benchmarks/results/toys"
        (folder / "benchmarks/suites").mkdir(parents=True)
        shutil.copy(ROOT / "benchmarks/run.py", folder / "benchmarks")
        (folder / "toy.py").write_text(TOY)
        groups = [f'[[groups]]\ntask = "{way}"\nsetting = "ours"\nflags = "--how {way}"\n' for way in ways]
        (folder / "benchmarks/suites/toys.toml").write_text(SUITE + "\n".join(groups))

    def edit(self, name, old, new):
        path = self.folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def start(self, *argv):
        command = [sys.executable, "benchmarks/run.py", "toys", *argv]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *argv):
        """Exit code, stdout and stderr of the runner, and what it started, in order of names."""
        (self.folder / "started").write_text("")
        process = self.start(*argv)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err, [" ".join(words[:2]) for words in self.started()]

    def started(self):
        return sorted(line.split() for line in (self.folder / "started").read_text().splitlines())

    def texts(self, pattern="*"):
        return {path.name: path.read_text() for path in self.results.glob(pattern)}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("TOYS", str(tmp_path))  # where they leave traces, on Ray too, which runs a copy
    return lambda *ways: Project(tmp_path, *ways)


def rewrite(path, **changes):
    """Gives a record other facts."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- the runner


@pytest.mark.parametrize("where", [["--workers", "5"], ["--ray", "local", "--workers", "5"]])
def test_failing_hanging_and_dying_runs(project, where):
    """They are shown with their last lines while the others go on; the next call does what is missing, no more."""
    if "--ray" in where:
        pytest.importorskip("ray", reason="Ray is not installed: pip install -r benchmarks/requirements-ray.txt")
    toys = project("well", "fail", "hang", "die", "short")
    code, out, err, _ = toys.run("--seeds", "1", *where)
    assert code == 1
    assert "1 of 5 runs are in" in out
    assert re.search(r"fail__ours__1: FAILED, exit code 1\n\s+\ufffd\n\s+error: there is no such task", err)
    assert "short__ours__1: FAILED, metrics.csv ends before step 30" in err
    assert re.search(r"hang__ours__1: FAILED, no end within 0.1 minutes\n\s+waiting", err)
    assert "die__ours__1: FAILED, exit code -9" in err
    before = toys.texts()
    assert sorted(before) == ["well__ours__1.csv", "well__ours__1.json"]
    assert before["well__ours__1.csv"] == "global_step,return\n10,1.9\n20,2.9\n30,4.1\n"
    (toys.folder / "mended").touch()
    toys.edit("benchmarks/suites/toys.toml", "--how short", "--how fine")
    code, out, _, started = toys.run()
    assert code == 0
    assert "10 of 10 runs are in" in out
    assert started == ["die 1", "die 2", "fail 1", "fail 2", "fine 1", "fine 2", "hang 1", "hang 2", "well 2"]
    assert before.items() <= toys.texts().items()
    assert len(toys.texts()) == 20


def test_broken_results_are_redone_and_foreign_ones_are_not_mixed_in(project):
    toys = project("well")
    assert toys.run()[0] == 0
    whole = toys.texts("*.csv")
    paths = [toys.results / name for name in ("well__ours__1.csv", "well__ours__2.json")]
    for path in paths:  # cut short, as a full disk leaves them
        path.write_bytes(path.read_bytes()[:-20])
    code, _, _, started = toys.run()
    assert (code, started) == (0, ["well 1", "well 2"])
    assert toys.texts("*.csv") == whole

    rewrite(paths[1], versions={"numpy": "1.0", "not-installed": "1"})
    code, _, err, started = toys.run()
    assert (code, started) == (1, [])
    assert f"has numpy 1.0 (not {np.__version__}): --redo" in err
    assert toys.run("--redo")[3] == ["well 2"]
    assert json.loads(paths[1].read_text())["versions"]["numpy"] == np.__version__

    toys.edit("toy.py", '"""A toy."""', '"""The same toy."""  # a comment')
    assert toys.run()[3] == []  # comments change nothing
    toys.edit("toy.py", "step / 10", "step / 11")
    assert "has code " in toys.run()[2]
    toys.edit("benchmarks/suites/toys.toml", "--how well", "--how fine")
    assert "has command python toy.py --how well --seed" in toys.run()[2]


@pytest.mark.parametrize("argv", [["--workers", "2"], ["--ray", "local"], ["--check"]])
def test_a_stopped_runner_stops_its_runs_and_goes_on_later(project, argv):
    if "--ray" in argv:
        pytest.importorskip("ray", reason="Ray is not installed: pip install -r benchmarks/requirements-ray.txt")
    toys = project("hang")
    toys.edit("benchmarks/suites/toys.toml", "0.1", "5")
    if argv == ["--check"]:
        (toys.folder / "mended").touch()
        assert toys.run()[0] == 0
        (toys.folder / "mended").unlink()
    (toys.folder / "started").write_text("")
    process = toys.start(*argv)
    while len(toys.started()) < (1 if argv == ["--check"] else 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    until = time.monotonic() + 30 * ("--ray" in argv)  # whose workers end after it
    for *_, number in toys.started():
        status = Path(f"/proc/{number}/status")
        while (is_alive := status.exists() and "State:\tZ" not in status.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        assert not is_alive


def test_check_compares_with_the_committed_result(project, monkeypatch):
    toys = project("well")
    assert "lacks results: python benchmarks/run.py toys makes them" in toys.run("--check")[2]
    assert toys.run()[0] == 0
    before = toys.texts()
    code, out, *_ = toys.run("--check")
    assert code == 0
    assert "bit for bit" in out
    for name in ("LUCK", "LATE_LUCK"):  # on the same machine curve and final figure should be the same
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.5")
            code, out, *_ = toys.run("--check")
        assert code == 1
        assert "NOT as in" in out
    assert toys.texts() == before
    for path in toys.results.glob("*.json"):
        rewrite(path, machine="another")
    for luck, code, place in (("0.5", 0, "1.5 is within the seeds' 1 to 2"), ("1.5", 1, "2.5 is OUTSIDE the seeds'")):
        monkeypatch.setenv("LATE_LUCK", luck)
        got, out, *_ = toys.run("--check")
        assert got == code
        assert f"which has machine another (not {runner.machine()})" in out
        assert place in out


def test_a_recipe_runs_as_the_file_that_it_makes(project):
    toys = project("well")
    patched = toys.folder / "patched.py"
    patched.write_text(TOY.replace("step / 10", "step / 20"))
    with open(toys.folder / "toy__half.patch", "w") as file:
        subprocess.run(["diff", "-u", "toy.py", "patched.py"], cwd=toys.folder, stdout=file, check=False)
    toys.edit("benchmarks/suites/toys.toml", 'flags = "', 'script = "toy__half.patch"\nuntil = 20\nflags = "')
    assert toys.run("--seeds", "1")[0] == 0
    record = json.loads((toys.results / "well__ours__1.json").read_text())
    assert record["code"] == code_hash(patched.read_text())
    assert record["command"] == "python toy__half.patch --how well --seed 1"
    assert record["flags"] == {"seed": 1, "run_dir": None}
    assert record["versions"]["numpy"] == np.__version__
    assert toys.texts("*.csv") == {"well__ours__1.csv": "global_step,return\n10,1.45\n20,2.25\n"}


def test_unknown_suite():
    with pytest.raises(BenchmarkError, match="there is no suite classics: choose one of cheerful, classic, llm, llm_"):
        load_suite("classics")


# -------------------------------------------------------------------------------------------------- results and figures


@pytest.fixture
def toys(tmp_path):
    """A suite and a folder with its results: returns of seed s are s², 2 s², 3 s², final figures 2 s and -s; with the
    other setting they are 5 more and 5."""
    groups = [{"task": task, "setting": setting, "flags": task + setting} for task in "AB" for setting in "xy"]
    published = {"source": "Them", "seeds": 3, "metric": "a mean", "version": "v4", "values": {"A": [7.25, 1]}}
    suite = Suite(
        **{"name": "toys", "title": "Toys", "script": "ppo_mlp_discrete.py", "seeds": 4, "timeout_minutes": 1},
        **{"grid": 10, "until": 30, "metrics": ["return"], "xlabel": "steps", "settings": {"x": "ours", "y": "theirs"}},
        figures=[
            {"name": "final", "label": "final figure", "digits": 2},
            {"name": "share", "label": "%", "scale": 100},
            {"name": "return", "label": "best"},
        ],
        **{"panels": [{"metric": "return", "label": "return"}], "groups": groups, "published": [published]},
        **{"normalise": {"A": (0, 10), "B": (-10, 0)}, "normalised_by": "two limits"},
    )
    for run in suite.runs(suite.seeds):
        more = 5 * (run.setting == "y")
        metrics = "global_step,return\n" + "".join(f"{10 * i},{i * run.seed**2 + more}\n" for i in (1, 2, 3))
        summary = {"final": more or (2 * run.seed if run.task == "A" else -run.seed), "share": 0.25}
        outcome = {"metrics.csv": metrics, "config.json": "{}", "summary.json": json.dumps(summary)}
        outcome |= {"seconds": 60.0 + run.seed, "versions": {"torch": "2"}, "machine": "a toy's"}
        runner.save(tmp_path, run.name, *runner.result_of(suite, run, outcome, "x = 1\n", "commit"))
    return suite, tmp_path


def test_grid_by_hand():
    columns, steps = ["return"], range(10, 31, 10)
    metrics = "iteration,global_step,return\n" + "1,4,nan\n2,10,1\n3,11,2\n4,20,4\n5,29,5\n6,33,7\n"
    assert on_grid(metrics, columns, steps) == "global_step,return\n10,1.0\n20,3.0\n30,6.0\n"
    metrics = "global_step,return\n4,nan\n20,2\n40,3\n"
    assert on_grid(metrics, columns, steps) == "global_step,return\n10,nan\n20,2.0\n30,3.0\n"
    for metrics in ("global_step,return\n20,1\n", "global_step,reward\n30,1\n"):
        with pytest.raises(BenchmarkError, match="ends before step 30 or lacks one of return"):
            on_grid(metrics, columns, steps)


def test_code_hash_sees_code_alone():
    first = code_hash('"""A."""\n\n\ndef f(x):\n    """B.\n\n    C."""\n    return x + "#1"  # more\n')
    assert code_hash('"""D."""\ndef f(x):  # E\n    # F\n    return x + "#1"\n') == first
    for other in ('def f(x):\n    return x + "#2"\n', 'def f(x):\n    x\n    return x + "#1"\n'):
        assert code_hash(other) != first


def test_intervals_are_scipys():
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    for statistic, samples in ((plot.mean, [x]), (plot.iqm, [x, y]), (plot.improvement, [x, y])):
        got = plot.interval(statistic, samples, 10_000)
        want = scipy.stats.bootstrap(
            samples, lambda *z, f=statistic: f(z), vectorized=False, n_resamples=10_000, method="percentile", rng=2
        ).confidence_interval
        assert got == pytest.approx([want.low, want.high], abs=0.03)
    assert [*plot.interval(plot.iqm, [np.full(5, 1.0), np.full(5, 3.0)])] == [2, 2]  # within tasks nothing to resample


def test_improvement_by_hand():
    assert plot.improvement([np.array([1, 2]), np.array([5]), np.array([1, 3]), np.array([4])]) == (1.5 / 4 + 1) / 2


def test_tables_by_hand(toys):
    results = plot.load_results(*toys)
    text = plot.results_table(results)
    low, high = plot.interval(plot.mean, [np.array([2.0, 4, 6, 8])])
    assert "| task | setting | final figure | % | best | Them | seconds |" in text
    ours = f"| A | ours | 5.00 ({low:.2f} to {high:.2f}) | 25.0 | 22.5 | 7.2 ± 1.0 | 62 |"
    assert f"{ours}\n|  | theirs | 5.00 | 25.0 | 27.5 |" in text
    assert re.search(r"\| B \| ours \| −2\.50 \(−3\.\d\d to −1\.\d\d\) \| 25\.0 \| 22\.5 \|  \| 62 \|", text)
    assert "Seeds: 4; minutes: 8. Them: a mean, seeds: 3, v4." in text  # sixteen runs of 62.5 s, two at a time
    # scores .2 .4 .6 .8 and .9 .8 .7 .6: without two at each end .6 .6 .7 .8; .5 and 1.5 four times each
    assert re.search(r"\(0 and 1: two limits\): ours \*\*0\.68 \(.*\)\*\*, theirs \*\*1\.00\*\*", text)
    assert re.search(r"has the higher score: \*\*0\.25 \(0\.\d\d to 0\.\d\d\)", text)  # half in A, never in B
    results.runs = results.runs[(results.runs["task"] == "A") | (results.runs["setting"] == "x")]
    assert "has the higher score" not in plot.results_table(results)  # where one setting lacks a task
    comparisons = [
        speed.compare("x.py", "a run", "steps/s", "them", [3000.0, 2000, 4000], [1000, 1000, 1000]),
        speed.compare("x.py", "a run, peak memory", "GB", "them", [2.0], [5.0]),
        speed.compare("x.py", "another", "s", "them", [2.0], [5.0]),
        speed.compare("x.py", "never reached", "s", "them", [], []),
    ]
    (toys[1] / "speed").mkdir()
    (toys[1] / "speed/x.json").write_text(json.dumps({"seconds": 90, "comparisons": comparisons}))
    assert plot.speed_table(toys[1] / "speed").splitlines()[2:4] == [
        "| a run | 3,000 steps/s; 2.0 GB | them 1,000, × 3.00 (2.00 to 4.00); them 5.0 GB, 40 % |",
        "| another | 2.0 s | them 5.0, × 2.50 |",
    ]


def test_figure_shows_each_seed_the_mean_and_its_interval(toys):
    figure = plot.draw(plot.load_results(*toys))
    assert [axes.get_title() for axes in figure.axes] == ["A", "B"]
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == {"ours", "theirs"}
        thin, mean, *_ = axes.lines
        seeds = [value for s in (1, 4, 9, 16) for value in (s, 2 * s, 3 * s, np.nan)]
        np.testing.assert_array_equal(thin.get_ydata(), seeds)
        assert [*mean.get_xydata().flat] == [10, 7.5, 20, 15, 30, 22.5]
        edge = axes.collections[0].get_paths()[0].vertices
        at_end = edge[edge[:, 0] == 30, 1]
        want = plot.interval(plot.mean, [np.array([3.0, 12, 27, 48])])
        assert [at_end.min(), at_end.max()] == pytest.approx(want)


def test_figure_of_scores(toys):
    """Their means, intervals and what others published on one scale; a task without a scale is left out."""
    suite, folder = toys
    results = plot.load_results(dataclasses.replace(suite, normalise={"A": (0, 10)}), folder)
    (axes,) = plot.draw_scores(results).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "interquartile mean"]
    (ours, _, (bars,)), (theirs, *_) = axes.containers
    assert [*ours.get_xdata()] == pytest.approx([0.5, 0.5])  # scores .2 .4 .6 .8
    assert [*theirs.get_xdata()] == [0.5, 0.5]
    assert bars.get_segments()[0][:, 0] == pytest.approx(plot.interval(plot.mean, [np.array([0.2, 0.4, 0.6, 0.8])]))
    assert axes.lines[-1].get_xydata().tolist() == [[0.725, 0]]
    assert "ours **0.50 (" in plot.results_table(results)


def test_broken_and_foreign_results_are_not_drawn(toys):
    suite, folder = toys
    path, other = folder / "A__x__2.json", folder / "A__x__3.json"
    rewrite(path, versions={"torch": "2", "jax": "1"})  # a package that only some machines have makes no difference
    assert len(plot.load_results(suite, folder).runs) == 16
    path.with_suffix(".csv").unlink()
    other.with_suffix(".csv").write_text(other.with_suffix(".csv").read_text()[:-20])
    assert len(plot.load_results(suite, folder).runs) == 14
    path, text = folder / "A__x__4.json", (folder / "A__x__4.json").read_text()
    for name, fact in (("torch", "3"), ("code", "0"), ("command", "python x.py")):
        rewrite(path, **{"versions": {name: fact}} if name == "torch" else {name: fact})
        with pytest.raises(BenchmarkError, match=f"does not belong to the others, it has {name} "):
            plot.load_results(suite, folder)
        path.write_text(text)


def test_tables_and_links_are_put_where_they_belong():
    text = "a\n<!-- plot.py: one -->\nold\n<!-- end -->\nb\n<!-- plot.py: two -->\n<!-- end -->\n"
    filled = plot.fill(text, {"one": "| 1 |", "two": "| 2 |", "three": ""})
    assert filled == text.replace("old", "| 1 |").replace("two -->\n", "two -->\n| 2 |\n")
    lines = (ROOT / "ppo_mlp_discrete.py").read_text().splitlines()
    for link, start in (
        ("`compute_gae`](", "def compute_gae("),
        ("`train`, part 2](", "        # 2."),
        ("`act`](../", "    def act("),
    ):
        linked = plot.relink(f"[{link}ppo_mlp_discrete.py#L1)")
        assert lines[int(re.search(r"#L(\d+)", linked)[1]) - 1].startswith(start)
    with pytest.raises(BenchmarkError, match="no `nothing`"):
        plot.relink("[`nothing`](ppo_mlp_discrete.py#L1)")


# ------------------------------------------------------------------------------------------------- what is committed


def test_documents_and_figures_show_the_committed_results(tmp_path, monkeypatch):
    """And a number changed by hand, a figure that is missing, one drawn from other results are noticed."""
    assert plot.renew(write=False) == []
    readme = tmp_path / "README.md"
    text = "".join(path.read_text() for path in plot.DOCUMENTS)
    readme.write_text(text.replace("| 500.0 |", "| 501.0 |", 1))
    for name in ("figures", "results"):
        shutil.copytree(ROOT / "benchmarks" / name, tmp_path / name)
        monkeypatch.setattr(plot, name.upper(), tmp_path / name)
    monkeypatch.setattr(plot, "DOCUMENTS", [readme])
    (tmp_path / "figures/llm.svg").unlink()
    assert plot.renew(write=False) == [readme, tmp_path / "figures/llm.svg"]
    rewrite(tmp_path / "results/pizza/pizza__ours__1.json", seconds=1.5)
    assert {path.name for path in plot.renew(write=False)} == {"README.md", "llm.svg", "pizza.svg", "overview.svg"}
    readme.write_text(text.replace("<!-- plot.py: speed -->", ""))
    with pytest.raises(BenchmarkError, match="no document has a place for the table speed"):
        plot.renew(write=False)


def test_results_of_ones_own(tmp_path, monkeypatch, capsys):
    """Their tables are printed and their figures drawn beside them."""
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds results of no suite"):
        plot.main()
    shutil.copytree(plot.RESULTS / "llm_memory", tmp_path / "llm_memory")
    plot.main()
    assert "| CartPole-positions | four observations | 490.3 (" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "llm_memory.svg").read_text()


@pytest.mark.parametrize("name", sorted(folder.name for folder in plot.RESULTS.iterdir() if folder.name != "speed"))
def test_committed_results_are_complete(name):
    """Every seed of every group, whole, made by the suite's command, with one version of the code."""
    suite = load_suite(name)
    groups = plot.load_results(suite, ROOT / "benchmarks/results" / name).groups()
    assert [(*key, len(runs)) for *key, runs in groups] == [
        (g["task"], g["setting"], suite.seeds) for g in suite.groups
    ]
