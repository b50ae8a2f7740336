"""The command line: flags, configs with overrides, help, exit codes."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from tokjax import cli
from tokjax.cli import FlagSpec
from tokjax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError

FLAGS = {
    "workdir": FlagSpec("folder of checkpoints and logs", required=True),
    "strict": FlagSpec("whether a damaged checkpoint is fatal", bool, False),
    "steps": FlagSpec("how many steps", int, 10),
    "mode": FlagSpec("what to do", Literal["run", "plan"], "run"),
    "seed": FlagSpec("of the samples", int | None, None),
}


@dataclass(frozen=True)
class Settings:
    seed: int = 0  # of everything random
    rate: float = 0.5  # learning rate, per step


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def get_config(k=1): return {'seed': k}\n")
    return str(path)


def parse(*argv, **options):
    return cli.parse_args(argv, flags=FLAGS, **options)


def refused(*argv, **options):
    with pytest.raises(ConfigError) as caught:
        parse(*argv, **options)
    return str(caught.value)


def test_flags_config_and_overrides_are_told_apart():
    args = parse(
        "--config=configs/a.py:k=4",
        "--workdir",
        "/tmp/w",
        "--config.optimizer.peak_lr=3e-4",
        "--strict",
        "--config.seed",
        "-3",
        "--steps=7",
    )
    assert args.config == "configs/a.py:k=4"
    assert args.overrides == ("optimizer.peak_lr=3e-4", "seed=-3")
    assert dict(args.flags) == {
        "workdir": "/tmp/w",
        "strict": True,
        "steps": 7,
        "mode": "run",
        "seed": None,
    }
    assert args["steps"] == 7


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--no-strict", "strict", False),
        ("--strict=false", "strict", False),
        ("--strict=true", "strict", True),
        ("--mode=plan", "mode", "plan"),
        ("--seed=none", "seed", None),
        ("--seed=3", "seed", 3),
    ],
)
def test_flag_values_are_read_by_type(word, name, value):
    assert parse("--config=a.py", "--workdir=1", word)[name] == value
    assert type(parse("--config=a.py", "--workdir=1", word)[name]) is type(value)


def test_text_that_looks_like_a_number_stays_text_where_text_is_wanted():
    assert parse("--config=a.py", "--workdir=2024")["workdir"] == "2024"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--wrkdir=x", "unknown flag --wrkdir. Did you mean '--workdir'?"),
        ("--work=x", "unknown flag --work."),
        ("--confg=x", "Did you mean '--config'?"),
        ("--confg.seed=3", "Did you mean '--config.seed'?"),
        ("--optimizer.lr=3", "written '--config.optimizer.lr'"),
        ("--no-steps", "unknown flag --no-steps"),
        ("--no-strict=1", "unknown flag --no-strict"),
        ("--steps=many", "--steps: expected int, got 'many' (str)"),
        ("--steps=1.5", "--steps: expected int, got 1.5"),
        ("--steps", "--steps has no value"),
        ("--mode=pln", "--mode: expected 'run' | 'plan', got 'pln' (str). Did you mean 'plan'?"),
        ("--strict=maybe", "--strict: expected bool"),
        ("--workdir=y", "--workdir is given twice: 'x' and 'y'"),
        ("--config=b.py", "--config is given twice"),
        ("--config.seed", "--config.seed has no value"),
        ("stray", "unexpected argument 'stray'"),
        ("-workdir=x", "unexpected argument '-workdir=x'. Did you mean '--workdir=x'?"),
        ("config.seed=3", "Did you mean '--config.seed=3'?"),
        ("--", "unexpected argument '--'"),
    ],
)
def test_wrong_words_are_refused_with_the_right_one(word, message):
    assert message in refused("--config=a.py", "--workdir=x", word)


def test_flags_are_never_abbreviated():
    for length in range(1, len("workdir")):
        assert "unknown flag" in refused("--config=a.py", f"--{'workdir'[:length]}=x")


def test_a_required_flag_says_what_it_is():
    assert refused("--config=a.py") == "--workdir is missing: folder of checkpoints and logs"


def test_a_missing_config_lists_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Name a Python file" in refused("--workdir=x")
    (tmp_path / "configs" / "repro").mkdir(parents=True)
    (tmp_path / "configs" / "patch.py").write_text("")
    (tmp_path / "configs" / "repro" / "one.py").write_text("")
    message = refused("--workdir=x")
    assert message.startswith("--config is missing.")
    assert "--config=configs/patch.py" in message
    assert "--config=configs/repro/one.py" in message


def test_programs_without_config_and_with_positionals():
    args = parse("patch_training", "--workdir=x", needs_config=False, positionals=1)
    assert (args.config, args.positional) == (None, ("patch_training",))
    assert "'b'" in refused("a", "b", "--workdir=x", needs_config=False, positionals=1)


def test_load_config_resolves_file_and_overrides(config_path):
    args = parse(f"--config={config_path}:k=5", "--workdir=x", "--config.rate=1")
    assert cli.load_config(Settings, args) == Settings(5, 1.0)
    wrong = parse(f"--config={config_path}", "--workdir=x", "--config.sed=1")
    with pytest.raises(ConfigError, match=r"config\.sed: unknown key\. Did you mean 'seed'"):
        cli.load_config(Settings, wrong)
    with pytest.raises(ConfigError, match="--config is missing"):
        cli.load_config(Settings, parse("--workdir=x", needs_config=False))


def test_help_needs_nothing_and_names_every_flag():
    args = parse("--help")
    assert args.help
    text = cli.help_text("tokjax.train", "Trains.\n\nMore.", FLAGS, schema=Settings, args=args)
    assert text.startswith("usage: python -m tokjax.train --config=FILE")
    assert "Trains." in text
    assert "More." not in text
    for name, flag in FLAGS.items():
        assert f"--{name}" in text
        assert flag.help in text
    assert "(str, required)" in text


def test_help_with_config_explains_every_key(config_path):
    args = parse("-h", f"--config={config_path}", "--config.rate=0.25")
    text = cli.help_text("tokjax.train", None, FLAGS, schema=Settings, args=args, width=80)
    assert "--config.rate=0.25\n      (float, default 0.5) learning rate, per step" in text
    assert "--config.seed=1\n      (int, default 0) of everything random" in text


def test_help_shows_a_config_that_does_not_fit(config_path):
    args = parse("--help", f"--config={config_path}", "--config.rate=fast")
    text = cli.help_text("tokjax.train", None, FLAGS, schema=Settings, args=args)
    assert "--config.rate=fast" in text
    assert "cannot be used as it is: config.rate: expected float, got 'fast'" in text


def outcome(main, capsys, argv=()):
    with pytest.raises(SystemExit) as caught:
        cli.run(main, argv)
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad"), 2),
        (DataError("bad"), 3),
        (CheckpointError("bad"), 4),
        (NonFiniteError("bad"), 5),
        (StorageError("bad"), 6),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(error, code, capsys):
    assert outcome(raising(error), capsys) == (code, "error: bad\n")


def test_return_values_become_exit_codes(capsys):
    assert outcome(lambda argv: None, capsys) == (0, "")
    assert outcome(lambda argv: 75, capsys) == (75, "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_storage_failures_name_the_path(number, capsys):
    code, text = outcome(raising(OSError(number, "x", "/data/run")), capsys)
    assert code == 6
    assert text.startswith("error: /data/run: ")


class JaxRuntimeError(RuntimeError):
    __module__ = "jax.errors"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 24 GiB"),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 853335 bytes.\n  a buffer"),
        JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 8 bytes"),
    ],
)
def test_used_up_memory_is_told_in_a_line_with_what_helps(error, capsys):
    code, text = outcome(raising(error), capsys)
    assert code == 7
    assert text.startswith(f"error: out of memory: {str(error).splitlines()[0]}")
    assert "data.batch_size" in text
    assert len(text.splitlines()) == 2


def test_a_required_text_that_is_empty_is_refused():
    # `--workdir=$UNSET` would otherwise train in the current directory.
    with pytest.raises(ConfigError, match="--workdir is empty: folder of checkpoints"):
        parse("--config=a.py", "--workdir=")


def test_a_program_without_config_does_not_suggest_it(capsys):
    with pytest.raises(ConfigError) as caught:
        cli.parse_args(["--unheard=1"], flags=FLAGS, needs_config=False)
    assert "--config" not in str(caught.value)


def test_other_exceptions_stay_bugs():
    with pytest.raises(FileNotFoundError):
        cli.run(raising(FileNotFoundError(errno.ENOENT, "x")), ())
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), ())
    with pytest.raises(RuntimeError, match="out of memory"):  # not JAX's: somebody else's bug
        cli.run(raising(RuntimeError("out of memory")), ())


def test_interrupt_ends_with_130(capsys):
    assert outcome(raising(KeyboardInterrupt()), capsys) == (130, "error: interrupted\n")


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys):
    seen = []

    def main(argv):
        seen.append(argv)
        raise ConfigError("bad")

    code, text = outcome(main, capsys, ["--debug", "--steps=1"])
    assert (code, seen) == (2, [["--steps=1"]])
    assert "Traceback" in text
    assert text.endswith("error: bad\n")


def test_notes_are_shown(capsys):
    error = ConfigError("bad")
    error.add_note("in configs/a.py")
    assert outcome(raising(error), capsys) == (2, "error: bad\nin configs/a.py\n")


def test_label_is_red_only_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert outcome(raising(ConfigError("bad")), capsys)[1] == "\033[1;31merror:\033[0m bad\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert outcome(raising(ConfigError("bad")), capsys)[1] == "error: bad\n"


def test_a_reader_that_leaves_is_no_error():
    program = (
        "from tokjax import cli\n"
        "def main(argv):\n"
        "  for i in range(100000): print(i)\n"
        "cli.run(main, [])\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE_EXIT_CODE
    assert done.stderr == b""
