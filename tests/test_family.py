"""What holds across the scripts: equal copies, agreeing dependencies, documented flags, README commands that exist."""

import ast
import dataclasses
import importlib
import io
import itertools
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import tyro
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("ppo_*.py"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
# How long the scripts may be: lines, and tokens of code as token_count counts them.
BUDGETS = {
    "ppo_mlp_discrete.py": (460, 3500),
    "ppo_mlp_continuous.py": (540, 4400),
    "ppo_char_lm_pizza.py": (560, 4600),
    "ppo_llm_policy.py": (610, 4800),
    "ppo_rlhf_token.py": (1050, 9600),
}
# What each script has in a form of its own, under one name, so that their diff is a lesson.
OWN = {"Args", "Batch", "Policy", "ppo_loss", "minibatches", "make_envs", "train", "evaluate", "play", "main"}
OWN |= {"load_policy", "Transformer"}
# Of these, the MLP scripts, whose policies give log-probs and entropies alike, have one text.
MLP_PAIR = {"ppo_loss"}


def drifted(texts, own=OWN):
    """Names of functions and classes that stand in several of these sources but differ, own ones aside."""
    versions = {}
    for text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in own:
                versions.setdefault(node.name, set()).add(ast.get_source_segment(text, node))
    return sorted(name for name, texts in versions.items() if len(texts) > 1)


def header(text):
    """The PEP 723 metadata of a script's text, read as the PEP's reference implementation does."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)["content"]
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(True)))


def requirements(path):
    """{name: Requirement} of a requirements file."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def readme_commands():
    """Commands of the shell blocks of both READMEs and docs/, without the environment's path before python."""
    documents = (ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md")))
    blocks = [block for path in documents for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.S)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def token_count(text):
    """Tokens of Python code: no comments, docstrings, line breaks and indents."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    count, starts_line = 0, True
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, after in itertools.zip_longest(tokens, tokens[1:]):
        is_docstring = token.type == tokenize.STRING and starts_line and after.type == tokenize.NEWLINE
        count += token.type not in layout and not is_docstring
        starts_line = token.type in layout
    return count


def test_same_name_means_same_code():
    assert drifted(path.read_text() for path in SCRIPTS) == []
    assert drifted((path.read_text() for path in SCRIPTS if "_mlp_" in path.name), OWN - MLP_PAIR) == []


def test_drift_is_noticed():
    a = "def f(x):\n    return x\n\nclass Args:\n    a = 1\n"
    assert drifted([a, a.replace("a = 1", "a = 2")]) == []
    assert drifted([a, a.replace("return x", "return -x")]) == ["f"]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Pythons count the parts of f-strings")
@every_script
def test_budgets(script):
    text = script.read_text()
    lines, tokens = BUDGETS[script.name]
    assert len(text.splitlines()) <= lines
    assert max(map(len, text.splitlines())) <= 120
    assert token_count(text) <= tokens


def test_tokens_by_hand():
    assert token_count('"""Docstring."""\n\n\ndef f(x):  # a comment\n    """Another."""\n    return x + 1\n') == 10


@every_script
def test_scripts_import_none_of_each_other(script):
    imported = set(re.findall(r"(?m)^\s*(?:from|import) (\w+)", script.read_text()))
    assert not imported & {path.stem for path in SCRIPTS}


@every_script
def test_metadata_agrees_with_requirements(script):
    metadata = header(script.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    pinned = requirements(ROOT / "requirements.txt")
    in_header = {requirement.name: requirement for requirement in map(Requirement, metadata["dependencies"])}
    for name, requirement in in_header.items():
        assert requirement.specifier == pinned[name].specifier
        assert requirement.extras <= pinned[name].extras
    imported = set(re.findall(r"(?m)^(?:from|import) (\w+)", script.read_text())) - sys.stdlib_module_names
    indirect = {"mujoco", "tensorboard"}  # which gymnasium and torch import
    assert imported == set(in_header) - indirect


def test_pyproject_agrees_with_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = requirements(ROOT / "requirements.txt")
    listed = project["dependencies"] + extras["mujoco"] + extras["test"]
    ranges = {requirement.name: requirement for requirement in map(Requirement, listed)}
    assert set(ranges) == set(pinned)
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert ranges[name].specifier.contains(pin.version)
    (wanted,) = map(Requirement, extras["ray"])
    (pin,) = requirements(ROOT / "benchmarks/requirements-ray.txt")[wanted.name].specifier
    assert wanted.specifier.contains(pin.version)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert listed == [path.stem for path in SCRIPTS]


@every_script
def test_help_shows_the_comment_of_every_flag(script, capsys):
    module = importlib.import_module(script.stem)
    text = script.read_text().split("class Args:")[1].split("\n\n\n")[0]
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(module.Args, args=["--help"])
    assert stopped.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(module.Args):
        (comment,) = re.findall(rf"(?m)^    {field.name}: .*?  # (.*)$", text)
        assert f"--{field.name.replace('_', '-')}" in shown
        assert comment in shown


def test_imports_have_no_effect(tmp_path):
    imports = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {imports}"
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@every_script
def test_functions_are_documented(script):
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_readme_commands_exist():
    ran = set()
    for command in readme_commands():
        for part in re.split("&&|;", command):
            words = shlex.split(part)
            script = next((word for word in words if re.fullmatch(r"(benchmarks/)?\w+\.py", word)), None)
            if script is None:
                continue
            assert (ROOT / script).exists(), command
            ran.add(script)
            flags = words[words.index(script) + 1 :]
            if script in ("benchmarks/run.py", "benchmarks/speed.py"):
                module = importlib.import_module(Path(script).stem)
                tyro.cli(module.Args, args=flags, config=(tyro.conf.PositionalRequiredArgs,))
            if (ROOT / script) in SCRIPTS:
                module = importlib.import_module(Path(script).stem)
                flags = [flag.replace("$seed", "1") for flag in flags]
                if "--help" in flags:
                    continue
                tyro.cli(module.Args, args=flags)
    assert {path.name for path in SCRIPTS} <= ran


def test_ci_runs_the_readmes_test_command():
    (tests,) = [command for command in readme_commands() if "pytest" in command]
    assert tests in (ROOT / ".ci/run").read_text()


def test_details_link_code_and_name_tests_that_exist():
    """Every row of docs/details.md names a source, links the code that does it and the tests that hold it."""
    tables = (ROOT / "docs/details.md").read_text().split("\n## ", 1)[1]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = re.findall(r"(?m)^\| (?!detail|---)(.*) \|$", tables)
    assert len(rows) > 50
    for row in rows:
        _, source, where, held_by = row.split(" | ")
        assert source, row
        for link in where.split(", ["):
            name, part, script, line = re.fullmatch(r"\[?`(\w+)`(, part \d)?\]\(\.\./(\w+\.py)#L(\d+)\)", link).groups()
            text = (ROOT / script).read_text().splitlines()[int(line) - 1]
            assert re.match(rf"\s+# {part[-1]}\. " if part else rf"\s*(def|class) {name}\b", text), link
        names = re.findall(r"`(\w+)`", held_by)
        assert names, row
        for name in names:
            assert f"def {name}(" in tests, name
