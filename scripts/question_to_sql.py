#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Questions in English, their SQL, and the database in which answers are judged.

`generate` writes train, valid, test and unseen .jsonl ({"prompt", "completion"} rows) and the SQLite
database that all of them ask about. The same seed gives the same bytes.
`prompts` prints the questions alone; `score` runs answers in that database and prints execution
accuracy; `show` prints some of them.

What makes the figure mean something:
- every question of the test set differs from the training set in its words *and* in its SQL;
- the tables of `unseen` appear nowhere in training;
- each condition of a question changes the result and no result is empty, so that an answer that
  ignores part of its question cannot be right by luck;
- the whole answer must be one SELECT: text around it counts as wrong.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import sqlite3
import sys

from sql_judge import (
    CATEGORIES, DATABASE_NAME, Database, accuracy_by_category, category_of, judge_files,
    read_jsonl, same_result,
)

FACT_ROWS = 48
MAX_MISSES_IN_A_ROW = 2000  # then the tables have no more questions to give
MAX_QUESTIONS = 100_000
EXIT_BAD_INPUT, EXIT_NOT_FOUND = 2, 3


# --- tables ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """Text columns map to their values, number columns to an inclusive range."""

    name: str
    texts: dict
    numbers: dict
    unique: str = ""

    def columns(self):
        return [*self.texts, *self.numbers]

    def groupings(self):
        return [column for column in self.texts if column != self.unique]

    def schema(self):
        return f"table {self.name}({', '.join(self.columns())})"


@dataclasses.dataclass(frozen=True)
class Pair:
    """`many` refers to `one` through the column `key`, which is unique in `one`."""

    many: Table
    one: Table
    key: str


def make_pair(key, many, one):
    key_values = many[1][key]
    return Pair(Table(*many), Table(one[0], {key: key_values, **one[1]}, one[2], unique=key), key)


# Number ranges span more values than a table has rows: no ties, so that every order is the only one.
TRAINED = (
    make_pair(
        "product",
        ("orders",
         {"customer": ("Ada", "Bruno", "Chen", "Dora", "Emil", "Fatima"),
          "product": ("lamp", "desk", "chair", "kettle", "tent", "rug", "mirror", "bicycle"),
          "status": ("open", "paid", "shipped", "returned")},
         {"quantity": (1, 90), "total": (10, 900)}),
        ("products", {"category": ("kitchen", "garden", "office")},
         {"price": (5, 400), "stock": (10, 99)}),
    ),
    make_pair(
        "department",
        ("employees",
         {"name": ("Ivan", "Mia", "Noor", "Olga", "Pavel", "Rosa"),
          "department": ("Sales", "Legal", "Support", "Research", "Finance", "Design"),
          "city": ("Vienna", "Oslo", "Lima", "Kyoto")},
         {"salary": (2000, 9000), "age": (18, 77)}),
        ("departments", {"building": ("Tower", "Annex", "North Wing")},
         {"budget": (100, 990), "desks": (10, 99)}),
    ),
    make_pair(
        "author",
        ("books",
         {"title": ("Dune", "Emma", "Ulysses", "Middlemarch", "Beloved", "Solaris"),
          "author": ("Eco", "Woolf", "Borges", "Lem", "Austen", "Proust", "Morrison"),
          "genre": ("crime", "poetry", "science", "travel")},
         {"pages": (80, 900), "year": (1900, 2024)}),
        ("authors", {"country": ("Italy", "France", "Chile")},
         {"works": (1, 60), "prizes": (1, 60)}),
    ),
    make_pair(
        "airline",
        ("flights",
         {"pilot": ("Hana", "Igor", "Jorge", "Karin", "Liam"),
          "origin": ("Rome", "Cairo", "Delhi", "Quito", "Seoul"),
          "airline": ("Aero", "Nimbus", "Polar", "Comet", "Falcon", "Zephyr")},
         {"distance": (200, 9000), "fare": (40, 990)}),
        ("airlines", {"region": ("Europe", "Asia", "Africa")},
         {"planes": (5, 300), "crew": (100, 990)}),
    ),
    make_pair(
        "team",
        ("players",
         {"player": ("Boris", "Cleo", "Dani", "Enzo", "Gus", "Hugo"),
          "team": ("Reds", "Blues", "Hawks", "Lions", "Storm", "Comets"),
          "position": ("keeper", "winger", "striker", "captain")},
         {"goals": (0, 80), "matches": (1, 120)}),
        ("teams", {"stadium": ("Arena", "Old Park", "Dome")},
         {"points": (10, 99), "fans": (500, 9900)}),
    ),
)
UNSEEN = (
    make_pair(
        "district",
        ("houses",
         {"owner": ("Pia", "Quinn", "Ruben", "Sofia", "Tomas"),
          "district": ("Harbor", "Old Town", "Hillside", "Riverside", "Station", "Meadow"),
          "style": ("modern", "baroque", "brick", "timber")},
         {"area": (30, 400), "rent": (300, 3000)}),
        ("districts", {"mayor": ("Novak", "Okafor", "Sato")},
         {"shops": (1, 60), "residents": (500, 9900)}),
    ),
)


def fill(table, rng, rows):
    """Rows in which every text value occurs about equally often and no number twice."""
    columns = [
        rng.sample([values[i % len(values)] for i in range(rows)], rows)
        for values in table.texts.values()
    ]
    columns += [rng.sample(range(low, high + 1), rows) for low, high in table.numbers.values()]
    return list(zip(*columns))


def build_database(path, seed):
    rng = random.Random(f"database-{seed}")
    connection = sqlite3.connect(path)
    with connection:
        for pair in TRAINED + UNSEEN:
            for table in (pair.many, pair.one):
                types = [f"{c} TEXT" for c in table.texts] + [f"{c} INTEGER" for c in table.numbers]
                rows = FACT_ROWS if table is pair.many else len(table.texts[pair.key])
                connection.execute(f"CREATE TABLE {table.name} ({', '.join(types)})")
                marks = ", ".join("?" * len(types))
                connection.executemany(
                    f"INSERT INTO {table.name} VALUES ({marks})", fill(table, rng, rows)
                )
    connection.close()


# --- questions ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: str
    sql: str


@dataclasses.dataclass(frozen=True)
class Condition:
    words: str
    sql: str


TEXT_WORDS = ("with {c} {v}", "whose {c} is {v}")
NUMBER_WORDS = {
    ">": ("with {c} over {v}", "whose {c} is over {v}"),
    "<": ("with {c} under {v}", "whose {c} is under {v}"),
    ">=": ("with {c} of at least {v}", "whose {c} is at least {v}"),
    "<=": ("with {c} of at most {v}", "whose {c} is at most {v}"),
}
JOINED_TEXT_WORDS = ("whose {k} has {c} {v}", "where the {k} has {c} {v}")
JOINED_NUMBER_WORDS = {
    ">": ("whose {k} has {c} over {v}", "where the {k} has {c} over {v}"),
    "<": ("whose {k} has {c} under {v}", "where the {k} has {c} under {v}"),
}


def pick_condition(rng, table, key, text_words, number_words, skip=()):
    """A condition on a column of `table`; `key` is how a joined table is spoken of."""
    texts = [c for c in table.texts if c not in skip]
    numbers = [c for c in table.numbers if c not in skip]
    if texts and (not numbers or rng.random() < 0.5):
        column = rng.choice(texts)
        value = rng.choice(table.texts[column])
        words, sql = rng.choice(text_words), f"{column} = '{value}'"
    else:
        column = rng.choice(numbers)
        value = rng.randint(*table.numbers[column])
        operator = rng.choice(list(number_words))
        words, sql = rng.choice(number_words[operator]), f"{column} {operator} {value}"
    return column, Condition(words.format(c=column, v=value, k=key), sql)


def pick_conditions(rng, table, weights, skip):
    """None, one or two conditions on different columns, joined by "and" or by "or"."""
    count = rng.choices(range(len(weights)), weights)[0]
    conditions, used = [], list(skip)
    for _ in range(count):
        column, condition = pick_condition(rng, table, "", TEXT_WORDS, NUMBER_WORDS, used)
        used.append(column)
        conditions.append(condition)
    word = rng.choice(("and", "and", "and", "or"))
    return conditions, word


def select(target, table, conditions, word="and", tail="", join=""):
    where = f" {word.upper()} ".join(c.sql for c in conditions)
    return f"SELECT {target} FROM {table}{join}{' WHERE ' + where if where else ''}{tail}"


def describe(conditions, word):
    return "".join((f" {word} " if i else " ") + c.words for i, c in enumerate(conditions))


def ask_count(rng, table):
    words = ("How many {t} are there{w}?", "Count the {t}{w}.", "What is the number of {t}{w}?")
    return rng.choice(words), "COUNT(*)", ""


def ask_average(rng, table):
    column = rng.choice(list(table.numbers))
    words = (f"What is the average {column} of {{t}}{{w}}?", f"Give the mean {column} of {{t}}{{w}}.")
    return rng.choice(words), f"AVG({column})", ""


def ask_extreme(rng, table):
    column = rng.choice(list(table.numbers))
    function, adjectives = rng.choice(
        (("MAX", ("highest", "maximum")), ("MIN", ("lowest", "minimum")))
    )
    words = rng.choice(("What is the {a} {c} of {{t}}{{w}}?", "Find the {a} {c} of {{t}}{{w}}."))
    return words.format(a=rng.choice(adjectives), c=column), f"{function}({column})", ""


def ask_list(rng, table):
    chosen = rng.sample(table.columns(), rng.choice((1, 1, 2)))
    words = rng.choice(("List the {x} of all {{t}}{{w}}.", "Show the {x} of {{t}}{{w}}."))
    return words.format(x=" and ".join(chosen)), ", ".join(chosen), ""


def ask_group(rng, table):
    group, column = rng.choice(table.groupings()), rng.choice(list(table.numbers))
    words, target = rng.choice((
        (f"How many {{t}} are there per {group}{{w}}?", "COUNT(*)"),
        (f"Count the {{t}} per {group}{{w}}.", "COUNT(*)"),
        (f"What is the average {column} of {{t}} per {group}{{w}}?", f"AVG({column})"),
        (f"Show the highest {column} of {{t}} per {group}{{w}}.", f"MAX({column})"),
    ))
    return words, f"{group}, {target}", f" GROUP BY {group}"


def ask_order(rng, table):
    target, column = rng.choice(list(table.texts)), rng.choice(list(table.numbers))
    word, direction = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    words, limit = rng.choice((
        (f"List the {target} of {{t}}{{w}} sorted by {column}, {word} first.", ""),
        (f"Show the {target} of {{t}}{{w}} ordered by {column}, {word} first.", ""),
        (f"Which {target} has the {word} {column} among {{t}}{{w}}?", " LIMIT 1"),
        (f"Name the {target} with the {word} {column} among {{t}}{{w}}.", " LIMIT 1"),
    ))
    return words, target, f" ORDER BY {column} {direction}{limit}"


# kind: how often, and the odds of 0, 1, 2 conditions
SINGLE_TABLE_KINDS = {
    ask_count: (3, (1, 6, 5)),
    ask_average: (2, (2, 5, 4)),
    ask_extreme: (3, (2, 5, 4)),
    ask_list: (3, (2, 5, 4)),
    ask_group: (3, (3, 2)),
    ask_order: (4, (3, 2)),
}
JOINED_KINDS = {ask_count: 2, ask_average: 1, ask_extreme: 1, ask_list: 2}
JOIN_SHARE, DISTRACTOR_SHARE = 0.2, 0.25


def make_prompt(rng, tables, question):
    schemas = [table.schema() for table in tables]
    rng.shuffle(schemas)
    return "\n".join([*schemas, question])


def draw_join(rng, pair):
    """A question about `many` with a condition that only `one` can answer."""
    ask = rng.choices(list(JOINED_KINDS), list(JOINED_KINDS.values()))[0]
    words, target, tail = ask(rng, pair.many)
    _, condition = pick_condition(
        rng, pair.one, pair.key, JOINED_TEXT_WORDS, JOINED_NUMBER_WORDS, (pair.key,)
    )
    join = f" JOIN {pair.one.name} USING ({pair.key})"
    question = words.format(t=pair.many.name, w=describe([condition], "and"))
    sql = select(target, pair.many.name, [condition], tail=tail, join=join)
    weaker = [select(target, pair.many.name, [], tail=tail, join=join)]
    return Question(make_prompt(rng, (pair.many, pair.one), question), sql), weaker


def draw_single(rng, pair):
    table, other = rng.choice(((pair.many, pair.one), (pair.many, pair.one), (pair.one, pair.many)))
    kinds = list(SINGLE_TABLE_KINDS)
    ask = rng.choices(kinds, [SINGLE_TABLE_KINDS[k][0] for k in kinds])[0]
    words, target, tail = ask(rng, table)
    asked_for = re.findall(r"\w+", target)  # "the author of books with author Lem" asks nothing
    conditions, word = pick_conditions(rng, table, SINGLE_TABLE_KINDS[ask][1], asked_for)
    shown = (table, other) if rng.random() < DISTRACTOR_SHARE else (table,)
    question = words.format(t=table.name, w=describe(conditions, word))
    sql = select(target, table.name, conditions, word, tail)
    weaker = [
        select(target, table.name, conditions[:i] + conditions[i + 1 :], word, tail)
        for i in range(len(conditions))
    ]
    return Question(make_prompt(rng, shown, question), sql), weaker


def is_telling(database, question, weaker):
    """Whether the result is not empty and each condition matters for it."""
    result = database.run(question.sql)
    is_count_of_none = "GROUP" not in question.sql and result in ([(0,)], [(None,)])
    if not result or is_count_of_none:
        return False
    return all(not same_result(result, database.run(sql), question.sql) for sql in weaker)


def draw_questions(rng, database, pairs, count, taken_prompts, taken_sql):
    """`count` telling questions that differ from everything taken; takes their prompts."""
    questions, misses = [], 0
    while len(questions) < count:
        pair = rng.choice(pairs)
        question, weaker = (draw_join if rng.random() < JOIN_SHARE else draw_single)(rng, pair)
        is_new = question.prompt not in taken_prompts and question.sql not in taken_sql
        if is_new and is_telling(database, question, weaker):
            taken_prompts.add(question.prompt)
            questions.append(question)
            misses = 0
        else:
            misses += 1
            if misses > MAX_MISSES_IN_A_ROW:
                raise ValueError(f"cannot draw {count} different questions: ask for fewer")
    return questions


# --- command line ---------------------------------------------------------------------------


def write_jsonl(path, questions):
    """Appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", encoding="utf-8") as file:
        for question in questions:
            row = {"prompt": question.prompt, "completion": question.sql}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def generate(options):
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    database_path = folder / DATABASE_NAME
    partial = folder / (DATABASE_NAME + ".part")
    partial.unlink(missing_ok=True)
    build_database(partial, options.seed)
    os.replace(partial, database_path)
    database = Database(database_path)
    prompts, held_out_sql = set(), set()
    # The held-out sets draw first: training then avoids their SQL, not only their wording.
    for name, pairs, count in (
        ("test", TRAINED, options.test),
        ("unseen", UNSEEN, options.unseen),
        ("valid", TRAINED, options.valid),
        ("train", TRAINED, options.train),
    ):
        rng = random.Random(f"{name}-{options.seed}")
        questions = draw_questions(rng, database, pairs, count, prompts, held_out_sql)
        if name != "train":
            held_out_sql.update(q.sql for q in questions)
        write_jsonl(folder / f"{name}.jsonl", questions)
        print(f"{folder / name}.jsonl: {count} questions", file=sys.stderr)


def prompts(options):
    """The questions alone: what a model is given to answer."""
    for row in read_jsonl(options.data, ("prompt",)):
        print(json.dumps({"prompt": row["prompt"]}, ensure_ascii=False))


def score(options):
    labels = options.label or [pathlib.Path(a).stem for a in options.answers]
    if len(labels) != len(options.answers):
        raise ValueError("give one --label for each --answers, or none")
    columns = [
        accuracy_by_category(judge_files(options.data, answers, options.db))
        for answers in options.answers
    ]
    if options.json:
        for label, totals in zip(labels, columns):
            right, asked = totals["all"]
            print(json.dumps({
                "label": label, "questions": asked, "right": right,
                "execution_accuracy": right / asked if asked else 0.0,
                "categories": {c: {"right": r, "questions": n} for c, (r, n) in totals.items()},
            }))
        return
    width = max(10, *(len(label) + 2 for label in labels))
    print(f"{'':16}{'questions':>10}" + "".join(f"{label:>{width}}" for label in labels))
    for category, (_, asked) in columns[0].items():
        cells = "".join(f"{100 * c[category][0] / max(asked, 1):>{width - 2}.1f} %" for c in columns)
        print(f"{category:16}{asked:>10}{cells}")


def show(options):
    """One question of each category in turn, with each file's answer and whether it is right."""
    columns = [judge_files(options.data, answers, options.db) for answers in options.answers]
    labels = options.label or [pathlib.Path(a).stem for a in options.answers]
    by_category = collections.defaultdict(list)
    for index, verdict in enumerate(columns[0]):
        by_category[category_of(verdict.expected)].append(index)
    turns = [by_category[c][i] for i in range(len(columns[0])) for c in reversed(CATEGORIES)
             if i < len(by_category[c])]
    width = max(map(len, labels), default=0)
    for index in turns[: options.limit]:
        print(f"  {columns[0][index].prompt.splitlines()[-1]}")
        for label, verdicts in zip(labels, columns):
            verdict = verdicts[index]
            mark = "right" if verdict.is_right else "wrong"
            answer = " ".join(verdict.answer.split())
            shortened = answer if len(answer) <= 88 else answer[:87] + "…"
            print(f"    {label:{width}}  {mark}  {shortened or '(empty)'}")


def size(text):
    count = int(text)
    if not 0 <= count <= MAX_QUESTIONS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MAX_QUESTIONS} but is {count}")
    return count


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("generate", help="write the data set and its database")
    command.add_argument("--out", required=True, help="folder to write to")
    command.add_argument("--seed", type=int, default=1)
    for name, count in (("train", 800), ("valid", 48), ("test", 80), ("unseen", 40)):
        command.add_argument(f"--{name}", type=size, default=count, help=f"questions (default {count})")
    command.set_defaults(run=generate)
    command = commands.add_parser("prompts", help="the questions without their answers, as JSONL")
    command.add_argument("--data", required=True, help="questions, a .jsonl that generate wrote")
    command.set_defaults(run=prompts)
    for name, run, help_text in (
        ("score", score, "execution accuracy of answers, by category"),
        ("show", show, "some questions with their answers"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--data", required=True, help="questions, a .jsonl that generate wrote")
        command.add_argument("--answers", required=True, action="append",
                             help='.jsonl with one {"text": …} per question, in order; repeatable')
        command.add_argument("--label", action="append", help="heading for each --answers")
        command.add_argument("--db", help=f"default: {DATABASE_NAME} beside --data")
        command.set_defaults(run=run)
    commands.choices["score"].add_argument("--json", action="store_true", help="one JSON object a line")
    commands.choices["show"].add_argument("--limit", type=int, default=6)
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except (FileNotFoundError, ValueError) as error:
        print(f"[question_to_sql] {error}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
