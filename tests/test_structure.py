"""The tree holds what it promises: imports go one way, commands in the README exist."""

import ast
import re
from pathlib import Path

import pytest

import tokjax
from tokjax.config import load, resolve
from tokjax.training.config import TrainConfig

PACKAGE = Path(tokjax.__file__).parent
ROOT = PACKAGE.parent
# Lower layers first. A module imports from its own layer's package and from lower layers only.
LAYERS = (
    ("errors", "config", "files", "gguf_file", "struct"),
    ("parallel",),
    ("models",),
    ("signals", "data", "verifiers"),
    ("training", "decoding"),
    ("steering",),
)
FAMILIES = (
    *("pretraining", "finetuning", "preference", "rl", "gflownet", "tokenization", "analysis"),
    *("retrieval", "recsys"),
)


def imports_of(path: Path) -> set[str]:
    """The tokjax packages that a module imports, wherever in the module it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("tokjax.")}
    return found


@pytest.mark.parametrize(
    "package", [p for layer in LAYERS for p in layer if (PACKAGE / p).is_dir()]
)
def test_imports_go_one_way(package):
    level = next(i for i, layer in enumerate(LAYERS) if package in layer)
    allowed = {name for layer in LAYERS[: level + 1] for name in layer}
    for path in (PACKAGE / package).rglob("*.py"):
        # The run's configuration names the objectives it offers.
        families = {"pretraining", "finetuning", "preference", "rl", "gflownet", "retrieval"}
        families |= {"tokenization"}
        extra = families if package == "training" else set()
        assert imports_of(path) <= allowed | extra | {package}, path


@pytest.mark.parametrize("family", [f for f in FAMILIES if (PACKAGE / f).is_dir()])
def test_a_method_imports_no_other_family(family):
    for path in (PACKAGE / family).rglob("*.py"):
        assert not imports_of(path) & (set(FAMILIES) - {family}), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_resolves_and_says_how_to_run_it(path):
    config = resolve(TrainConfig, load(str(path), schema=TrainConfig))
    assert config.stage_list
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"--config=configs/{path.name}" in doc


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m (tokjax\.\w+)", text)):
        assert (PACKAGE / f"{module.split('.')[1]}.py").exists(), module
    for name in set(re.findall(r"configs/[\w/]+\.py", text)):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
