"""Rewards of SQL queries by a small database: what a query returns, and which names a plan uses.

The database is made by a script and lives in memory; only reading is allowed.
"""

import functools
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.rl.rewards import Episode

_READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_INSTRUCTIONS = 1000  # of the database's machine between looks at the limit


@dataclass(frozen=True)
class Result:
    """What a query returns.

    Attributes:
        ok: whether it ran.
        rows: in the order they came.
        error: why it did not run.
    """

    ok: bool
    rows: tuple[tuple[Any, ...], ...] = ()
    error: str = ""


class Database:
    """A database in memory that can only be read.

    Args:
        script: SQL that makes its tables and rows.
        instructions: most instructions of the database's machine for a query.
        rows: most rows of a result; a query with more fails.

    Raises:
        ConfigError: the script does not run.
    """

    def __init__(self, script: str, *, instructions: int = 5_000_000, rows: int = 10_000):
        self._limit, self._rows, self._spent = instructions, rows, 0
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._connection.executescript(script)
        except sqlite3.Error as error:
            raise ConfigError(f"the script of the database does not run: {error}") from None
        self.names = self._names()
        self._connection.set_authorizer(
            lambda action, *about: (
                sqlite3.SQLITE_OK
                if action in _READING and "load_extension" not in about
                else sqlite3.SQLITE_DENY
            )
        )
        self._connection.set_progress_handler(self._too_long, _INSTRUCTIONS)

    def __call__(self, query: str) -> Result:
        """Returns what a query returns; no query raises."""
        self._spent = 0
        try:
            cursor = self._connection.execute(query)
            rows = cursor.fetchmany(self._rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return Result(False, error=str(error))
        if cursor.description is None:
            return Result(False, error="there is no query")
        if len(rows) > self._rows:
            return Result(False, error=f"more than {self._rows} rows")
        return Result(True, tuple(map(tuple, rows)))

    def _too_long(self) -> int:
        self._spent += _INSTRUCTIONS
        return int(self._spent > self._limit)

    def _names(self) -> frozenset[str]:
        run = self._connection.execute
        tables = [name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'")]
        quoted = [table.replace('"', '""') for table in tables]
        columns = [row[1] for table in quoted for row in run(f'PRAGMA table_info("{table}")')]
        return frozenset(name.lower() for name in (*tables, *columns))

    def named(self, text: str) -> frozenset[str]:
        """Returns the tables and columns that a text names, in lower case."""
        return frozenset(re.findall(r"\w+", text.lower())) & self.names


def same_rows(found: Result, wanted: Result, ordered: bool) -> bool:
    """Returns whether two results are equal: rows as often, and in one order if that counts."""
    if not (found.ok and wanted.ok):
        return False
    if ordered:
        return found.rows == wanted.rows
    return Counter(found.rows) == Counter(wanted.rows)


def last_within(text: str, opening: str, closing: str) -> str | None:
    """Returns what the last pair of tags encloses; None where there is none.

    >>> last_within("<a>1</a> <a>2</a>", "<a>", "</a>")
    '2'
    """
    end = text.rfind(closing)
    start = text.rfind(opening, 0, max(end, 0))
    return None if start < 0 else text[start + len(opening) : end]


@functools.cache
def database(script: str) -> Database:
    """Returns the database of a script: a path of a file that holds it.

    Raises:
        ConfigError: there is no such file, or it does not run.
    """
    try:
        return Database(Path(script).read_text())
    except OSError as error:
        raise ConfigError(f"script={script!r} cannot be read: {error}") from None


@register("reward", "sql")
@dataclass(frozen=True)
class SQLExecution:
    """What a query is worth: something if it runs, more if it returns what the reference does.

    Rows may come in any order unless the reference has ORDER BY. The query is what the last pair of
    tags encloses, in the answer and in the reference; a reference without tags is one.
    """

    script: str = ""  # file of SQL that makes the database
    tags: tuple[str, str] = ("<sql>", "</sql>")  # before and behind a query
    runs: float = 1.0  # reward of a query that runs
    matches: float = 1.0  # reward of the right result, beside that
    weight: float = 1.0  # factor in the sum of all rewards

    def __call__(self, episode: Episode) -> float:
        """Returns the reward.

        Raises:
            ValueError: the reference's query does not run.
        """
        query = last_within(episode.answer, *self.tags)
        gold = last_within(episode.reference, *self.tags)
        gold = episode.reference if gold is None else gold
        run = database(self.script)
        wanted = run(gold)
        if not wanted.ok:
            raise ValueError(f"the reference {gold!r} does not run: {wanted.error}")
        if query is None:
            return 0.0
        found = run(query)
        ordered = re.search(r"\border\s+by\b", gold, re.IGNORECASE) is not None
        return self.runs * found.ok + self.matches * same_rows(found, wanted, ordered)


@register("reward", "schema_linking")
@dataclass(frozen=True)
class SchemaLinking:
    """F1 of the tables and columns that a plan names and those of the reference's query.

    An answer without a plan has 0. That it is F1 is a guess; the paper names an overlap.
    """

    script: str = ""  # file of SQL that makes the database
    plan: tuple[str, str] = ("<plan>", "</plan>")  # before and behind a plan
    tags: tuple[str, str] = ("<sql>", "</sql>")  # before and behind the reference's query
    weight: float = 1.0  # factor in the sum of all rewards

    def __call__(self, episode: Episode) -> float:
        """Returns 0 to 1."""
        plan = last_within(episode.answer, *self.plan)
        gold = last_within(episode.reference, *self.tags)
        named = database(self.script).named
        if plan is None:
            return 0.0
        found, wanted = named(plan), named(episode.reference if gold is None else gold)
        if not found or not wanted:
            return float(found == wanted)
        return 2 * len(found & wanted) / (len(found) + len(wanted))
