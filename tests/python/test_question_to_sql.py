# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""The question-to-SQL data set: the same from the same seed, split honestly, judged safely."""

import filecmp
import json
import random
import re
import sqlite3

import pytest
import question_to_sql as q
import sql_judge

NAMES = ("train", "valid", "test", "unseen")
SIZES = ["--train", "300", "--valid", "24", "--test", "48", "--unseen", "24"]


def generate(folder, seed=1, sizes=SIZES):
    assert q.main(["generate", "--out", str(folder), "--seed", str(seed), *sizes]) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def database(data):
    return sql_judge.Database(data / sql_judge.DATABASE_NAME)


def rows_of(data, name):
    return sql_judge.read_jsonl(data / f"{name}.jsonl", ("prompt", "completion"))


def tables_of(rows):
    return {t for row in rows for t in re.findall(r"^table (\w+)\(", row["prompt"], re.M)}


def write_answers(path, answers):
    path.write_text("".join(json.dumps({"text": a}) + "\n" for a in answers))
    return path


def test_same_seed_gives_the_same_bytes(data, tmp_path):
    again = generate(tmp_path / "again")
    names = [*(f"{n}.jsonl" for n in NAMES), sql_judge.DATABASE_NAME]
    assert filecmp.cmpfiles(data, again, names, shallow=False) == (names, [], [])


def test_other_seed_gives_other_questions(data, tmp_path):
    other = generate(tmp_path / "other", seed=2)
    assert rows_of(data, "test") != rows_of(other, "test")


def test_sizes_are_as_asked(data):
    assert [len(rows_of(data, n)) for n in NAMES] == [300, 24, 48, 24]


def test_rows_are_prompt_and_completion_alone(data):
    for name in NAMES:
        assert all(set(row) == {"prompt", "completion"} for row in rows_of(data, name))


def test_held_out_questions_share_neither_words_nor_sql_with_training(data):
    train = rows_of(data, "train")
    for name in ("valid", "test", "unseen"):
        held_out = rows_of(data, name)
        for field in ("prompt", "completion"):
            assert not {r[field] for r in train} & {r[field] for r in held_out}


def test_no_prompt_occurs_twice(data):
    prompts = [row["prompt"] for name in NAMES for row in rows_of(data, name)]
    assert len(prompts) == len(set(prompts))


def test_ten_tables_are_trained_on_and_two_are_not(data):
    trained = tables_of(rows_of(data, "train"))
    assert len(trained) == 10
    assert tables_of(rows_of(data, "test")) <= trained
    unseen = tables_of(rows_of(data, "unseen"))
    assert len(unseen) == 2 and not unseen & trained
    columns = lambda names, pairs: {  # noqa: E731
        c for p in pairs for t in (p.many, p.one) if t.name in names for c in t.columns()
    }
    assert not columns(unseen, q.UNSEEN) & columns(trained, q.TRAINED)


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_category_is_asked(data, name):
    found = {sql_judge.category_of(row["completion"]) for row in rows_of(data, name)}
    assert found == set(sql_judge.CATEGORIES)


def test_joins_are_asked_of_unseen_tables_too(data):
    assert "join" in {sql_judge.category_of(row["completion"]) for row in rows_of(data, "unseen")}


def test_prompts_show_the_tables_that_the_answer_needs(data):
    for name in NAMES:
        for row in rows_of(data, name):
            needed = set(re.findall(r"(?:FROM|JOIN) (\w+)", row["completion"]))
            assert needed <= tables_of([row])


def test_reference_answers_are_right_and_not_empty(data, database):
    for name in NAMES:
        for row in rows_of(data, name):
            assert database.run(row["completion"])
            assert sql_judge.judge(database, row, row["completion"]).is_right


def test_dropping_any_condition_makes_an_answer_wrong(data, database):
    checked = 0
    for row in rows_of(data, "test"):
        sql = row["completion"].strip()
        match = re.search(r" WHERE (.*?)(?= GROUP BY| ORDER BY|$)", sql)
        if not match:
            continue
        parts = re.split(r" (?:AND|OR) ", match[1])
        word = " AND " if " AND " in match[1] else " OR "
        for dropped in range(len(parts)):
            kept = word.join(p for i, p in enumerate(parts) if i != dropped)
            weaker = sql.replace(match[0], f" WHERE {kept}" if kept else "")
            assert not sql_judge.judge(database, row, weaker).is_right, (sql, weaker)
            checked += 1
    assert checked >= 20


def test_number_columns_have_no_ties(data):
    connection = sqlite3.connect(data / sql_judge.DATABASE_NAME)
    for pair in q.TRAINED + q.UNSEEN:
        for table in (pair.many, pair.one):
            for column in table.numbers:
                count, distinct = connection.execute(
                    f"SELECT COUNT(*), COUNT(DISTINCT {column}) FROM {table.name}"
                ).fetchone()
                assert count == distinct > 0
    connection.close()


def test_exhausted_tables_are_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(q, "MAX_MISSES_IN_A_ROW", 30)
    key = ("a", "b")
    pair = q.make_pair("k", ("t", {"k": key, "x": ("u", "v")}, {"n": (1, 3), "l": (1, 3)}),
                       ("o", {"y": ("w", "z")}, {"m": (1, 3), "h": (1, 3)}))
    connection = sqlite3.connect(tmp_path / "db")
    for table, rows in ((pair.many, 3), (pair.one, 2)):
        connection.execute(f"CREATE TABLE {table.name} ({', '.join(table.columns())})")
        marks = ", ".join("?" * len(table.columns()))
        connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})",
                               q.fill(table, random.Random(0), rows))
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="ask for fewer"):
        q.draw_questions(random.Random(0), sql_judge.Database(tmp_path / "db"), [pair], 100_000, set(), set())


@pytest.mark.parametrize("count", ["-1", "100001", "many"])
def test_sizes_out_of_range_are_refused(tmp_path, count):
    with pytest.raises(SystemExit) as exit_info:
        q.main(["generate", "--out", str(tmp_path), "--train", count])
    assert exit_info.value.code == q.EXIT_BAD_INPUT


# --- judging --------------------------------------------------------------------------------

COUNT_ROW = {"prompt": "", "completion": "SELECT COUNT(*) FROM orders"}
ORDER_ROW = {"prompt": "", "completion": "SELECT customer FROM orders ORDER BY total DESC LIMIT 3"}
LIST_ROW = {"prompt": "", "completion": "SELECT customer, total FROM orders WHERE total > 300"}


@pytest.mark.parametrize(
    ("row", "answer", "is_right"),
    [
        (COUNT_ROW, "SELECT COUNT(*) FROM orders", True),
        (COUNT_ROW, " select count(customer) from orders ;", True),
        (COUNT_ROW, "SELECT 48", True),
        (COUNT_ROW, "SELECT 48.0", True),
        (COUNT_ROW, "SELECT '48'", False),
        (COUNT_ROW, "SELECT COUNT(*) FROM products", False),
        (COUNT_ROW, "SELECT COUNT(*) FROM nowhere", False),
        (COUNT_ROW, "", False),
        (COUNT_ROW, "The answer is SELECT COUNT(*) FROM orders", False),
        (COUNT_ROW, "SELECT COUNT(*) FROM orders; SELECT 1", False),
        (COUNT_ROW, "SELECT COUNT(*) FROM orders\n\nThis counts the orders.", False),
        (COUNT_ROW, "SELECT COUNT(*), 1 FROM orders", False),
        (LIST_ROW, "SELECT customer, total FROM orders WHERE total > 300 ORDER BY total", True),
        (LIST_ROW, "SELECT total, customer FROM orders WHERE total > 300", False),
        (LIST_ROW, "SELECT DISTINCT customer, 1 FROM orders", False),
        (ORDER_ROW, "SELECT customer FROM (SELECT * FROM orders ORDER BY total DESC) LIMIT 3", True),
        (ORDER_ROW, "SELECT customer FROM orders ORDER BY total ASC LIMIT 3", False),
    ],
)
def test_execution_decides(database, row, answer, is_right):
    assert sql_judge.judge(database, row, answer).is_right == is_right


@pytest.mark.parametrize(
    "answer",
    [
        "DELETE FROM orders",
        "DROP TABLE orders",
        "INSERT INTO orders DEFAULT VALUES",
        "UPDATE orders SET total = 0",
        "ATTACH DATABASE '/tmp/x' AS y",
        "PRAGMA writable_schema = 1",
        "VACUUM INTO '/tmp/copy.sqlite'",
        "CREATE TEMP TABLE t (x)",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT length(randomblob(1000000000))",
        "SELECT length(zeroblob(1000000000))",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r",
        "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d, orders e, orders f",
        "SELECT a.total FROM orders a, orders b, orders c",
        "SELECT 1\0",
        "SELECT '" + "x" * 200_000 + "'",
        "SELECT " + "(" * 2000 + "1" + ")" * 2000,
    ],
)
def test_hostile_answers_are_wrong_and_harmless(data, database, answer):
    before = (data / sql_judge.DATABASE_NAME).read_bytes()
    verdict = sql_judge.judge(database, COUNT_ROW, answer)
    assert not verdict.is_right and verdict.reason
    assert (data / sql_judge.DATABASE_NAME).read_bytes() == before
    # The connection still serves the next answer.
    assert sql_judge.judge(database, COUNT_ROW, "SELECT COUNT(*) FROM orders").is_right


def test_score_counts_by_category(data, tmp_path, capsys):
    rows = rows_of(data, "test")
    answers = [r["completion"] if i % 3 else "nonsense" for i, r in enumerate(rows)]
    path = write_answers(tmp_path / "answers.jsonl", answers)
    assert q.main(["score", "--data", str(data / "test.jsonl"), "--answers", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["questions"], result["right"]) == (48, 32)
    assert result["execution_accuracy"] == pytest.approx(32 / 48)
    assert sum(c["questions"] for n, c in result["categories"].items() if n != "all") == 48


def test_score_shows_before_and_after(data, tmp_path, capsys):
    rows = rows_of(data, "test")
    before = write_answers(tmp_path / "before.jsonl", ["?"] * len(rows))
    after = write_answers(tmp_path / "after.jsonl", [r["completion"] for r in rows])
    assert q.main(["score", "--data", str(data / "test.jsonl"),
                   "--answers", str(before), "--answers", str(after)]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["all", "48", "0.0", "%", "100.0", "%"]


def test_show_takes_one_question_of_each_category(data, tmp_path, capsys):
    rows = rows_of(data, "test")
    path = write_answers(tmp_path / "answers.jsonl", [r["completion"] for r in rows])
    assert q.main(["show", "--data", str(data / "test.jsonl"), "--answers", str(path),
                   "--limit", "8"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "  right  " in line]
    assert {sql_judge.category_of(line) for line in shown} == set(sql_judge.CATEGORIES)


def test_prompts_hold_no_answers(data, capsys):
    assert q.main(["prompts", "--data", str(data / "test.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"prompt": row["prompt"]} for row in rows_of(data, "test")]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"text": "SELECT 1"}\n', 2, "must have 48 answers but has 1"),
        ("not json\n", 2, "answers.jsonl:1"),
        ('{"text": 5}\n', 2, "must be text"),
        ('{"other": "x"}\n', 2, "answers.jsonl:1"),
        (None, 3, "answers.jsonl"),
    ],
)
def test_bad_answer_files_are_errors(data, tmp_path, capsys, text, code, message):
    path = tmp_path / "answers.jsonl"
    if text is not None:
        path.write_text(text)
    assert q.main(["score", "--data", str(data / "test.jsonl"), "--answers", str(path)]) == code
    assert message in capsys.readouterr().err
