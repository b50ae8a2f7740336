"""Questions on a small database, each with a plan and a query; many of the examples are wrong.

A question names a table, what is wanted and a value: "name of pets : oslo ?". Which column the
value belongs to has to be known. A plan names the table and its columns, a query follows.
"""

from collections.abc import Iterator

import numpy as np

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "pets": {
        "name": ("rex", "tom", "mia", "kim"),
        "kind": ("dog", "cat", "hen", "fox"),
        "city": ("oslo", "rome", "bonn", "bern"),
        "food": ("fish", "corn", "milk", "meat"),
    },
    "shops": {
        "title": ("ace", "bay", "cub", "dot"),
        "city": ("oslo", "rome", "bonn", "bern"),
        "goods": ("shoes", "books", "lamps", "tea"),
        "owner": ("ann", "bob", "cy", "dee"),
    },
    "trips": {
        "guide": ("ann", "bob", "cy", "dee"),
        "month": ("may", "june", "july", "march"),
        "place": ("lake", "hill", "cave", "dune"),
        "food": ("fish", "corn", "milk", "meat"),
    },
}
ROWS = 24  # of each table
WRONG_PLAN, WRONG_QUERY = 0.35, 0.2  # share of examples
VALUES = tuple(dict.fromkeys(v for c in TABLES.values() for vs in c.values() for v in vs))
COLUMNS = tuple(dict.fromkeys(c for columns in TABLES.values() for c in columns))
WORDS = (
    *("<plan>", "</plan>", "<sql>", "</sql>", "SELECT", "FROM", "WHERE", "=", "COUNT(*)"),
    *("of", ":", "?", "count", *TABLES, *COLUMNS, *VALUES, *(f"'{v}'" for v in VALUES)),
)
LENGTH = 18  # words of a longest answer, with its end


def script(seed: int) -> str:
    """Returns SQL that makes the database."""
    rng = np.random.default_rng([seed, 1])
    lines = []
    for table, columns in TABLES.items():
        lines.append(f"CREATE TABLE {table} ({', '.join(f'{c} TEXT' for c in columns)});")
        for _ in range(ROWS):
            row = [str(rng.choice(values)) for values in columns.values()]
            lines.append(f"INSERT INTO {table} VALUES ({', '.join(map(repr, row))});")
    return "\n".join(lines)


def questions() -> list[tuple[str, str, str, str]]:
    """Returns table, wanted column (or "count"), column and value of all questions."""
    return [
        (table, wanted, column, value)
        for table, columns in TABLES.items()
        for wanted in ("count", *columns)
        for column, values in columns.items()
        for value in values
        if wanted != column
    ]


def prompt(table: str, wanted: str, value: str) -> str:
    """Returns the text of a question."""
    return f"{wanted} of {table} : {value} ?"


def answer(table: str, wanted: str, column: str, value: str, named: str | None = None) -> str:
    """Returns plan and query of a question.

    Args:
        table: of the question.
        wanted: column, or "count".
        column: that the query asks for the value.
        value: of the question.
        named: column of the plan; default that of the query.
    """
    columns = [named or column] if wanted == "count" else [wanted, named or column]
    shown = "COUNT(*)" if wanted == "count" else wanted
    plan = " ".join([table, *columns])
    query = f"SELECT {shown} FROM {table} WHERE {column} = '{value}'"
    return f" <plan> {plan} </plan> <sql> {query} </sql>"


def examples(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields examples, many of whose plans or queries name a wrong column."""
    rng = np.random.default_rng([seed, 2])
    asked = questions()
    for i in rng.integers(0, len(asked), count):
        table, wanted, column, value = asked[i]
        others = [c for c in TABLES[table] if c != column]
        named = column
        if rng.random() < WRONG_PLAN:
            named = str(rng.choice(others))
        used = named
        if rng.random() < WRONG_QUERY:
            used = str(rng.choice([c for c in TABLES[table] if c != named]))
        yield {
            "prompt": prompt(table, wanted, value),
            "response": answer(table, wanted, used, value, named),
        }


def right(seed: int) -> Iterator[dict[str, str]]:
    """Yields every question with its right answer, in an order of its own."""
    asked = questions()
    for i in np.random.default_rng([seed, 3]).permutation(len(asked)):
        table, wanted, column, value = asked[i]
        yield {
            "prompt": prompt(table, wanted, value),
            "response": answer(table, wanted, column, value),
        }
