"""The documentation's code runs as it stands."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import tokjax

DOCS = Path(__file__).parent.parent / "docs"
PACKAGE = Path(tokjax.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize(
    "name",
    [
        *(
            "data_construction",
            "decoding",
            "finetuning",
            "gflownets",
            "guidance",
            "models",
            "search",
        ),
        *("pretraining", "quality_estimation", "recommendation", "selection", "signals"),
    ],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(name):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}.md", "exec"), scope)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_in_docstrings_give_what_they_show(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert result.attempted > 0
    assert result.failed == 0
