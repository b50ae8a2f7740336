import pytest

from tokjax.errors import ConfigError
from tokjax.verifiers import ExactMatch, Function, Math, Numeric, Regex, last_number


def contains(answer, reference):
    return reference in answer


@pytest.mark.parametrize(
    ("verifier", "answer", "reference", "expected"),
    [
        (ExactMatch(), " Tokyo \n", "Tokyo", 1),
        (ExactMatch(), "tokyo", "Tokyo", 0),
        (ExactMatch(ignore_case=True), "tokyo", "Tokyo", 1),
        (ExactMatch(), "New  York", "New York", 1),
        (ExactMatch(extract=r"#### (.*)"), "6 x 7\n#### 42", "so\n#### 42", 1),
        (ExactMatch(extract=r"#### (.*)"), "42", "#### 42", 0),
        (Numeric(), "It costs $1,234.50.", "1234.5", 1),
        (Numeric(), "about 3.14", "3.14159", 0),
        (Numeric(relative_tolerance=0.01), "about 3.14", "3.14159", 1),
        (Numeric(), "-5", "5", 0),
        (Numeric(), "none", "5", 0),
        (Numeric(), "1e3", "1000", 1),
        (Regex(), "it is 7 (seven)", "7", 1),
        (Regex(), "it is 77", "7", 0),
        (Regex(), "a.b", "axb", 0),
        (Function(f"{__name__}:contains"), "abc", "b", 1),
    ],
)
def test_verdicts(verifier, answer, reference, expected):
    assert verifier(answer, reference) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,000,000", 1e6), ("x=.5", 0.5), ("2 - 3", 3.0), ("2 -3", -3.0), ("", None), ("4.", 4.0)],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExactMatch(extract="("), "no regular expression"),
        (lambda: Regex(pattern="["), "no regular expression"),
        (lambda: Function("nowhere"), "module:function"),
        (lambda: Function("json:nothing"), "names no function"),
    ],
)
def test_what_cannot_work_is_said_at_once(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_mathematics_needs_its_library():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install math-verify"):
            Math()
    else:
        assert Math()("$\\frac{2}{4}$", "$0.5$") == 1
