"""What holds for every recipe: its patch applies to today's script, is short and explained, and what it makes runs."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tyro
from helpers import ROOT, patched, read_metrics, run_script, same_state

ALL = sorted(path.stem for path in (ROOT / "recipes").glob("*.patch"))
RECIPES = [recipe for recipe in ALL if find_spec("envpool") or not recipe.endswith("__envpool")]  # which imports it
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
# Where the generic run takes place: a recipe's own environment, else its script's.
ENV_IDS = {
    "ppo_mlp_discrete": "CartPole-v1",
    "ppo_mlp_continuous": "Pendulum-v1",
    "ppo_mlp_discrete__action_masks": "Taxi-v4",
    "ppo_mlp_discrete__pixels": "recipe_envs:Spot-v0",
}
# Whose runs are others: test_recipes_rlhf_token.py has them.
RUN_ELSEWHERE = "ppo_rlhf_token__"


def head_and_diff(recipe):
    """The text before the diff, and the diff."""
    text = (ROOT / "recipes" / f"{recipe}.patch").read_text()
    head, line, diff = text.partition("--- ppo_")
    return head, line + diff


def changed_lines(recipe):
    _, diff = head_and_diff(recipe)
    return len(re.findall(r"(?m)^[-+]", diff)) - 2  # without the names of the files


@every_recipe
def test_applies_exactly_and_is_short_and_explained(recipe, tmp_path, monkeypatch, capsys):
    """The patch has at most 80 changed lines, a head whose command is one that the patched script takes, and --help."""
    module = patched(recipe, tmp_path)
    assert changed_lines(recipe) <= 80
    head, _ = head_and_diff(recipe)
    script = recipe.split("__")[0]
    assert f"patch -o my_ppo.py {script}.py recipes/{recipe}.patch\n" in head
    assert re.search(r"(?m)^Source: .*|^Convention: .*", head)
    assert re.search(r"(?m)^Reached: .*", head)
    assert max(map(len, head.splitlines())) <= 120
    (command,) = re.findall(r" my_ppo\.py( --.*|)$", head.replace(" \\\n", " "), re.M)
    tyro.cli(module.Args, args=shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        run_script(module, monkeypatch, "--help")
    assert stopped.value.code == 0
    assert "--total" in capsys.readouterr().out


def test_patched_scripts_are_formatted_and_linted(tmp_path):
    for recipe in RECIPES:
        patched(recipe, tmp_path)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", ROOT / "pyproject.toml", tmp_path]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.startswith(RUN_ELSEWHERE)])
def test_trains_resumes_and_plays(recipe, tmp_path, monkeypatch, capsys):
    script, run = patched(recipe, tmp_path), tmp_path / "run"
    sizes = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 2, "--eval-episodes", 2]
    env_id = ENV_IDS.get(recipe) or ENV_IDS[recipe.split("__")[0]]
    run_script(script, monkeypatch, "--env-id", env_id, "--total-timesteps", 60, *sizes, "--run-dir", run)
    rows, state = read_metrics(run), script.load(run / "checkpoint.pt")
    run_script(script, monkeypatch, "--resume", run)
    same_state(script.load(run / "checkpoint.pt"), state)  # nothing was left to do
    run_script(script, monkeypatch, "--resume", run, "--total-timesteps", 120)
    assert read_metrics(run)[: len(rows)] == rows
    assert len(read_metrics(run)) > len(rows)
    evaluated = capsys.readouterr().out.splitlines()[-3:-1]
    run_script(script, monkeypatch, "--play", run)
    assert capsys.readouterr().out.splitlines() == evaluated
    assert "greedy return" in evaluated[0]


def test_the_readmes_table_has_every_recipe():
    """With the number of its changed lines."""
    table = (ROOT / "recipes/README.md").read_text()
    rows = re.findall(r"(?m)^\| .* \| \[`(\w+)`\]\((\w+)\.patch\) \| (\d+) \|", table)
    assert sorted(rows) == [(recipe, recipe, str(changed_lines(recipe))) for recipe in ALL]
