# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Judges SQL that a model wrote by running it: execution accuracy.

The SQL is untrusted. It runs read-only, as one SELECT, bounded in steps, rows and sizes; whatever it
does, the database stays as it was and the next answer is judged as if it were the first.
"""

import collections
import dataclasses
import json
import os
import pathlib
import sqlite3

DATABASE_NAME = "questions.sqlite"
# Bounds on one answer: far above what any question needs (under 1e4 steps and 50 rows).
MAX_STEPS, STEPS_PER_CHECK, MAX_ROWS, MAX_TEXT = 2_000_000, 10_000, 10_000, 100_000

def category_of(sql):
    """The row of the accuracy table that a reference answer belongs to."""
    marks = (("JOIN", "join"), ("GROUP BY", "grouping"), ("ORDER BY", "ordering"),
             (" AND ", "two conditions"), (" OR ", "two conditions"), ("COUNT(", "counts"),
             ("AVG(", "averages"), ("MAX(", "extremes"), ("MIN(", "extremes"))
    return next((category for mark, category in marks if mark in sql), "lists")


CATEGORIES = ("counts", "averages", "extremes", "lists", "two conditions", "grouping", "ordering", "join")


class AnswerError(Exception):
    """An answer that is not one SELECT that runs within the bounds."""


class Database:
    """Runs untrusted SQL: read-only, SELECT alone, bounded in steps, rows and sizes."""

    FUNCTIONS = frozenset(
        "abs avg coalesce count ifnull length like lower max min round substr sum total upper".split()
    )

    def __init__(self, path):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no database at {path}")
        uri = pathlib.Path(path).absolute().as_uri() + "?mode=ro"
        self.connection_ = sqlite3.connect(uri, uri=True, isolation_level=None)
        self.connection_.set_authorizer(self.authorize_)
        self.connection_.set_progress_handler(self.count_steps_, STEPS_PER_CHECK)
        if hasattr(self.connection_, "setlimit"):  # Python 3.11
            self.connection_.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
            self.connection_.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_TEXT)
        self.steps_ = 0

    def authorize_(self, action, _first, second, *_rest):
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second.lower() in self.FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def count_steps_(self):
        self.steps_ += STEPS_PER_CHECK
        return self.steps_ > MAX_STEPS

    def run(self, sql):
        """Rows of one SELECT statement; anything else raises AnswerError."""
        self.steps_ = 0
        try:
            cursor = self.connection_.execute(sql)
            rows = cursor.fetchmany(MAX_ROWS + 1)
            cursor.close()
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise AnswerError(str(error)) from error
        if cursor.description is None:
            raise AnswerError("not a SELECT")
        if len(rows) > MAX_ROWS:
            raise AnswerError("too many rows")
        return rows


def normalise(row):
    # SQLite adds in f64: 9 digits separate any two averages here and forgive the order of adding.
    return tuple(f"{v:.9g}" if isinstance(v, (int, float)) else repr(v) for v in row)


def same_result(expected, actual, sql):
    """Equal rows, as a multiset; in the same order where the question asks for one."""
    expected, actual = [normalise(r) for r in expected], [normalise(r) for r in actual]
    if "ORDER BY" in sql:
        return expected == actual
    return collections.Counter(expected) == collections.Counter(actual)


@dataclasses.dataclass(frozen=True)
class Verdict:
    prompt: str
    expected: str
    answer: str
    is_right: bool
    reason: str


def judge(database, row, answer):
    expected_sql, answer = row["completion"].strip(), answer.strip()
    expected = database.run(expected_sql)
    try:
        is_right = same_result(expected, database.run(answer), expected_sql)
        reason = "" if is_right else "other result"
    except AnswerError as error:
        is_right, reason = False, str(error)
    return Verdict(row["prompt"], expected_sql, answer, is_right, reason)


def read_jsonl(path, fields):
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                missing = [f for f in fields if not isinstance(row[f], str)]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: needs {fields} as text: {error!r}") from error
            if missing:
                raise ValueError(f"{path}:{number}: {missing} must be text")
            rows.append(row)
    return rows


def judge_files(data_path, answers_path, database_path=None):
    data = read_jsonl(data_path, ("prompt", "completion"))
    answers = read_jsonl(answers_path, ("text",))
    if len(data) != len(answers):
        raise ValueError(f"{answers_path} must have {len(data)} answers but has {len(answers)}")
    database = Database(database_path or pathlib.Path(data_path).parent / DATABASE_NAME)
    return [judge(database, row, answer["text"]) for row, answer in zip(data, answers)]


def accuracy_by_category(verdicts):
    """{category: (right, asked)} in the order of CATEGORIES, then "all"."""
    totals = {}
    for category in CATEGORIES:
        group = [v for v in verdicts if category_of(v.expected) == category]
        if group:
            totals[category] = (sum(v.is_right for v in group), len(group))
    totals["all"] = (sum(v.is_right for v in verdicts), len(verdicts))
    return totals
