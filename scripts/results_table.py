#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes README.md's table of results from bench/results/*.json; --check fails if it is out of date."""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin (scripts/results_table.py) -->", "<!-- results: end -->"
# What the README shows, in this order: benchmark, metric, its words.
ROWS = (
    ("train", "tokens_per_second", "tokens/s"),
    ("decode", "decode_tps", "tokens/s"),
    ("prefill", "prefill_tps", "tokens/s"),
    ("layer", "M512_lora_ms", "ms, M = 512, with LoRA"),
    ("layer", "M1_lora_ms", "ms, M = 1, with LoRA"),
)


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(metric):
    return f"{number(metric['median'])} [{number(metric['p10'])}–{number(metric['p90'])}]"


def best(engines, metric, more_is_better):
    """The engine with the best median of `metric`, or None if none has it."""
    found = [e for e in engines if metric in e["metrics"]]
    choose = max if more_is_better else min
    return choose(found, key=lambda e: e["metrics"][metric]["median"]) if found else None


def memory(engine):
    peak = engine["metrics"].get("peak_memory_bytes")
    return f"{peak['median'] / 1e9:.2f} GB" if peak else "–"


def table_of(result, metric, words):
    """Lines of one table: ours and the peers for one metric, fastest first within each group."""
    more_is_better = result["more_is_better"][metric]
    sign = -1 if more_is_better else 1
    engines = [e for e in result["engines"] if metric in e["metrics"]]
    engines.sort(key=lambda e: (not e["ours"], sign * e["metrics"][metric]["median"]))
    peer = best([e for e in engines if not e["ours"]], metric, more_is_better)
    limit = result["limit"].get(metric)
    lines = [f"**{result['about']}**", ""]
    heading = f"× {peer['name']}" if peer else "× peer"
    lines += [f"| | {words} | {heading} | of the limit | peak memory |", "| --- | --- | --- | --- | --- |"]
    for engine in engines:
        median = engine["metrics"][metric]["median"]
        of_rounds = result["ratios"].get(metric, {}).get(engine["name"], {})
        ratio = f"**{of_rounds[peer['name']]:.2f}**" if peer and peer["name"] in of_rounds else "–"
        share = "–"
        if limit:
            share = f"{100 * (median / limit if more_is_better else limit / median):.0f} %"
        name = f"**{engine['name']}**" if engine["ours"] else engine["name"]
        lines.append(f"| {name} | {spread(engine['metrics'][metric])} | {ratio} | {share} | {memory(engine)} |")
    return lines


def machine_line(result):
    machine = result["machine"]
    sets = ", ".join(machine["instruction_sets"])
    return (
        f"{result['rounds']} rounds on {result['threads']} cores of {machine['cpu']} ({sets}), {result['date']}, "
        f"commit {result['commit'][:10]}."
    )


def render(folder):
    lines = []
    for kind, metric, words in ROWS:
        path = folder / f"{kind}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            lines += [*table_of(result, metric, words), "", machine_line(result), ""]
    if not lines:
        lines = ["No results are committed yet; `bench/peers/run` measures them.", ""]
    return "\n".join(lines)


def with_table(text, table):
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must contain '{BEGIN}' and '{END}' once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md would change")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    updated = with_table(text, render(options.results))
    if options.check:
        return 0 if updated == text else 1
    options.readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
