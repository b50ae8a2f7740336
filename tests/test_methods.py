"""The table of methods and its page."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokjax import methods
from tokjax.errors import ConfigError
from tokjax.methods_table import FAMILIES, METHODS, STATES, Method

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_page_equals_the_generated_text():
    assert PAGE.read_text() == methods.markdown(), (
        "run: python -m tokjax.methods --markdown > docs/methods.md"
    )


def test_there_are_119_methods_in_order_with_unique_slugs_papers_and_summaries():
    assert len(METHODS) == 119
    assert list(METHODS) == sorted(METHODS, key=lambda m: (m.family, m.slug))
    for name in ("slug", "title", "arxiv", "summary"):
        assert len({getattr(method, name) for method in METHODS}) == 119


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_rows_are_well_formed(method):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", method.slug)
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert method.year == 2000 + int(method.arxiv[:2])
    assert method.family in FAMILIES
    assert method.state in STATES
    assert method.summary.endswith(".")
    assert 40 <= len(method.summary) <= 125
    assert "\n" not in method.summary + method.title
    assert (method.entry == "") == (method.state == "planned")


def test_every_family_has_a_method():
    assert {method.family for method in METHODS} == set(FAMILIES)


def resolve_entry(entry):
    """Returns the module, or the attribute of a module, that a dotted path names."""
    if importlib.util.find_spec(entry.rpartition(".")[0]) is None:
        raise ImportError(entry)
    try:
        return importlib.import_module(entry)
    except ModuleNotFoundError as error:
        if error.name != entry:
            raise
        module, _, attribute = entry.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("method", [m for m in METHODS if m.entry], ids=lambda method: method.slug)
def test_entries_can_be_imported(method):
    assert resolve_entry(method.entry) is not None


def test_methods_are_selected_by_family_state_and_text():
    assert {m.family for m in methods.select(family="rl")} == {"rl"}
    state = methods.find("patch_training").state
    assert {m.state for m in methods.select(state=state)} == {state}
    assert {m.slug for m in methods.select(search="LAYERCAKE")} == {"layercake"}
    assert [m.slug for m in methods.select(search="2405.05417")] == ["magikarp"]
    assert methods.select(family="rl", search="layercake") == ()
    assert methods.select() == METHODS


def test_find_suggests_the_nearest_slug():
    assert methods.find("tvm").family == "rl"
    with pytest.raises(ConfigError, match="Did you mean 'layercake'"):
        methods.find("layercak")


def test_markdown_escapes_what_tables_and_links_would_read():
    row = Method("a", "x | y [z]", "2501.00001", 2025, "rl", "s | t.", "m.f", "reproduced")
    text = methods.markdown([row])
    assert "[x \\| y \\[z\\]](https://arxiv.org/abs/2501.00001), 2025 | s \\| t. |" in text
    assert "reproduced: `m.f`" in text


def test_json_holds_the_rows(capsys):
    assert methods.main(["--json", "--family=gflownet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["slug"] for row in rows] == ["flower", "lacot"]
    assert Method(**rows[0]) == methods.find("flower")


def test_table_shows_slugs_and_counts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert methods.main(["--family=prompts"]) == 0
    out = capsys.readouterr().out
    assert "pmpo" in out
    assert "uniapo" in out
    assert "tvm" not in out
    assert "2 methods: 2 planned" in out
    assert "what it does" in out


def test_a_narrow_table_leaves_the_summaries_out_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert methods.main([]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("│")]) == len(METHODS)
    assert "by --json" in out


def test_wrong_family_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'decoding'"):
        methods.main(["--family=decodng"])
    with pytest.raises(ConfigError, match="exclude each other"):
        methods.main(["--json", "--markdown"])


def test_the_module_runs_and_imports_nothing_heavy():
    program = (
        "import sys, runpy\n"
        "sys.argv = ['tokjax.methods', '--markdown']\n"
        "try: runpy.run_module('tokjax.methods', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'tensorflow', 'matplotlib', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == methods.markdown()
