"""The documents: links lead somewhere, snippets run, every metric is explained, README is short and says what is so."""

import ast
import importlib.util
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
from test_family import BUDGETS

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted(ROOT.glob("*/*.md")))
README = (ROOT / "README.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()


def snippets(path):
    """Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)


def anchors(text):
    """What GitHub makes of the headings of a document, which links may name."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def metric_names(script):
    """Columns of metrics.csv: what a script puts into dicts with these names, or what looks like such a key."""
    text = (ROOT / script).read_text()
    names = set(re.findall(r'"((?:charts|losses|objective|policy|val|loss|time)/\w+)"', text))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign | ast.AugAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        where = target.value if isinstance(target, ast.Subscript) else target
        if getattr(where, "id", None) in ("metrics", "figures", "row"):
            keys = [target.slice] if where is not target else []
            keys += [key for part in ast.walk(node.value) if isinstance(part, ast.Dict) for key in part.keys]
            keys = [key.value for key in keys if isinstance(key, ast.Constant)]
            names |= {f"losses/{key}" if where.id == "figures" and "/" not in key else key for key in keys}
    return names


def documented_names(script):
    """Metrics that the part of docs/metrics.md about a script explains."""
    (part,) = [part for part in METRICS.split("\n## ")[1:] if script in part.split("| metric |")[0]]
    first_cells = re.findall(r"(?m)^\| (`.*?) \|", part)
    without = re.findall(r"`([\w/]+)`", " ".join(re.findall(r"has no (.*?)\.\s", part, re.S)))
    left_out = without if script == "ppo_llm_policy.py" else []
    return {name for cell in first_cells for name in re.findall(r"`([\w/]+)`", cell)} - set(left_out)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        text = path.read_text()
        links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", re.sub(r"```.*?```", "", text, flags=re.S))
        for link in map("".join, links):
            if link.startswith(("http://", "https://")):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path}: {link}"
            if target.suffix == ".md" and anchor:
                assert anchor in anchors(target.read_text()), f"{path}: {link}"


def test_tests_that_documents_name_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for path in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", path.read_text()):
            assert f"def {name}(" in tests, f"{path}: {name}"


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_readme_is_short(path):
    assert len((ROOT / path).read_bytes()) <= 12_000


@pytest.mark.parametrize("script", BUDGETS)
def test_readme_says_how_long_a_script_is(script):
    (row,) = re.findall(rf"(?m)^\| `python` \[`{script}`\].*$", README)
    assert row.split(" | ")[2] == f"{BUDGETS[script][0]:,}"


def test_readme_has_the_results():
    """What a script reaches and in how many minutes is what benchmarks/README.md, which plot.py fills, has of it."""
    overview = (ROOT / "benchmarks/README.md").read_text()
    rows = re.findall(r"(?m)^\| `python` \[`(\w+\.py)`\].* \| (\S+): (\S+) \| (\S+) \|$", README)
    assert len(rows) == 5
    table = overview.partition("<!-- plot.py: overview -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"(?m)^\| `(.*?)` \|", table) == [script for script, *_ in rows]
    for script, task, reached, minutes in rows:
        found = rf"(?m)^\| `{script}` \| {task} \| {reached}[ |].* {minutes} \|$"
        assert re.search(found, overview), (script, task, reached, minutes)


@pytest.mark.parametrize("script", BUDGETS)
def test_every_metric_is_explained(script):
    assert len(metric_names(script)) > 10
    assert metric_names(script) == documented_names(script)


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """A folder with a short run in runs/lake, as README has it."""
    import ppo_mlp_discrete as ppo

    folder = tmp_path_factory.mktemp("docs")
    ppo.train(ppo.Args(env_id="FrozenLake-v1", total_timesteps=1), folder / "runs/lake")
    return folder


def commands():
    """Of README, in their order: those of our scripts, without what comes after a |, && or #."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", "").splitlines()
    return [match[0] for line in lines for match in re.finditer(r"python (ppo_\w+\.py)[^|&#]*", line)]


def test_commands_of_the_readme(tmp_path, monkeypatch):
    """Each as it stands, with flags for small sizes after its own; a small model stands where the hub's would."""
    import transformers

    import ppo_rlhf_token

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0, eos_token_id=1)
    for folder in ("Qwen/Qwen2-0.5B-Instruct", "runs/smollm2"):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ppo_rlhf_token.make_tokenizer(["Thank you for"]).save_pretrained(folder)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Thank you {x}", "response": "for all"}) + "\n" for x in range(8))
    )
    Path("my_reward.py").write_text("def score(prompts, responses):\n    return [float(len(x)) for x in responses]\n")
    Path("benchmarks").symlink_to(ROOT / "benchmarks")
    small = {f"ppo_mlp_{kind}.py": {"num-steps": 8, "eval-episodes": 1} for kind in ("discrete", "continuous")}
    small["ppo_rlhf_token.py"] = {"batch-size": 4, "num-minibatches": 1, "micro-batch-size": 4}
    small["ppo_rlhf_token.py"] |= {"eval-samples": 2, "response-length": 4}
    assert len(commands()) == 10
    for command in commands():
        _, script, *flags = shlex.split(command)
        if "benchmarks/vader.py:score" in flags and not importlib.util.find_spec("vaderSentiment"):
            continue
        sizes = dict(small[script])
        if "--play" not in flags:
            length, count = ("total-timesteps", 100) if "mlp" in script else ("total-episodes", 8)
            sizes[length] = 2 * count if "--resume" in flags else count
        if "--dataset" in flags and "--model" not in flags:
            sizes["sft-steps"] = 2
        more = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [script, *flags, *more])
        importlib.import_module(script.removesuffix(".py")).main()
    ends = {path.parent.name: json.loads(path.read_text()) for path in Path(".").glob("runs/*/summary.json")}
    steps = {name: summary["global_step"] for name, summary in ends.items()}
    assert steps.pop("cheerful", 8) == 8
    assert (steps.pop("small"), steps.pop("mine")) == (8, 16)
    assert 200 <= steps.pop("lake") < 264
    assert [100 <= end < 164 for end in steps.values()] == [True, True]


def test_readme_has_the_speed_that_was_measured():
    ratios = {}
    for path in (ROOT / "benchmarks/results/speed").glob("*.json"):
        for row in json.loads(path.read_text())["comparisons"]:
            ratios.setdefault(row["peer"], {})[row["work"]] = f"{statistics.median(row['ratios']):.2f}"
    works = ("CartPole-v1, 4 envs × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh",)
    works += ("HalfCheetah-v5, 1 env × 2048 steps, 10 epochs × 32 minibatches, 64-64 tanh",)
    cells = [", ".join(ratios[peer][work] for work in works) for peer in ("CleanRL", "stable-baselines3")]
    work = "4-layer, 128-wide Qwen2, 64 prompts × 24 tokens, 4 epochs"
    cells.append(", ".join(ratios["TRL"][f"{work}, {critic} critic"] for critic in ("shared", "separate")))
    (row,) = re.findall(r"(?m)^\| our speed over theirs.* CPU thread \| 1 \| (.*) \|$", README)
    assert [cell for cell in row.split(" | ") if cell != "not measured"] == cells


def test_metrics_of_a_run_are_those_in_the_script(lake):
    header = (lake / "runs/lake/metrics.csv").read_text().splitlines()[0]
    assert set(header.split(",")) == metric_names("ppo_mlp_discrete.py")


@pytest.mark.parametrize("code", snippets("README.md"), ids=("load", "network", "loss", "environment"))
def test_snippets_of_the_readme(code, lake, monkeypatch):
    """Each as it stands but for the steps, with a script that nobody has changed before."""
    monkeypatch.chdir(lake)
    monkeypatch.delitem(sys.modules, "ppo_mlp_discrete", raising=False)
    names = {}
    exec(re.sub(r"total_timesteps=[\d_]+", "total_timesteps=1", code), names)
    if "ppo" in names:
        (run,) = re.findall(r'Path\("(.*)"\)', code)
        assert (lake / run / "policy.pt").exists()
        assert ("losses/logits" in (lake / run / "metrics.csv").read_text()) == ("logits" in code)
    if "Corridor" in names:
        env = names["gym"].make("Corridor-v0")
        env.reset(seed=1)
        steps = [env.step(1) for _ in range(9)]
        assert [(reward, terminated) for _, reward, terminated, _, _ in steps] == [(0, False)] * 8 + [(1, True)]
        import ppo_mlp_discrete as ppo

        ppo.train(ppo.Args(env_id="Corridor-v0", total_timesteps=1), lake / "runs/corridor")


def test_reward_function_of_the_docs():
    (code,) = [code for code in snippets("docs/using.md") if "def score" in code]
    names = {}
    exec(code, names)
    short, long = names["score"](["p", "p"], ["Thank you.", "x" * 400])
    assert short > long
