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


def gpu_layers(rows):
    """One table of linears at 4096 x 4096, rank 16: what the adapter and the storage cost over cuBLAS's base."""
    shape = {"kind": "layer", "k": 4096, "n": 4096, "rank": 16}
    found = [row for row in rows if all(row.get(key) == value for key, value in shape.items())]
    ours = {row["tokens"]: row for row in found if row["ours"]}
    torch = {row["tokens"]: row for row in found if row.get("engine") == "PyTorch"}
    mlx = {row["tokens"]: row for row in found if row.get("engine") == "MLX"}
    if not ours:
        return []
    ratio = lambda table, tokens, metric, base: (
        f"{table[tokens][metric] / table[tokens][base]:.2f}" if metric in table.get(tokens, {}) else "–"
    )
    lines = [
        "**LoRA linear on a GPU, bf16, K = N = 4096, rank 16: time over the base product alone**",
        "",
        "| tokens | cuBLAS, base alone | **ours, with LoRA** | **ours, INT4 + LoRA** | **ours, NF4 + LoRA** "
        "| PyTorch graph | MLX | **ours, forward + backward** |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, row in sorted(ours.items()):
        both = f"**{row['both_over_cublas']:.2f}**" if "both_over_cublas" in row else "–"
        lines.append(
            f"| {tokens:,} | {row['cublas_us']:.1f} µs | **{row['lora_over_cublas']:.2f}** "
            f"| **{row['int4_over_cublas']:.2f}** | **{row['nf4_over_cublas']:.2f}** "
            f"| {ratio(torch, tokens, 'lora_graph_us', 'base_us')} | {ratio(mlx, tokens, 'lora_us', 'base_us')} "
            f"| {both} |"
        )
    lines += ["", "Ours up to 64 tokens with weights that are promised ready, as a decode step (up to 16 tokens) does ([docs/cuda.md](docs/cuda.md))."]
    return lines + [""]


def rounded_down(ratio):
    """Two decimals: 1.996 times as fast must not read as twice."""
    return f"{int(ratio * 100) / 100:.2f}"


def gpu_steps(rows, kind, about, ours_name):
    """Ours and the peers by tokens a second."""
    engines = [row for row in rows if row.get("kind") == kind]
    peers = [row for row in engines if not row["ours"]]
    best_peer = max(peers, key=lambda row: row["tokens_per_s"]) if peers else None
    if not any(row["ours"] for row in engines):
        return []
    heading = f"× {best_peer['engine']}" if best_peer else "× peer"
    lines = [f"**{about}**", "", f"| | tokens/s | {heading} | memory |", "| --- | --- | --- | --- |"]
    for row in sorted(engines, key=lambda row: (not row["ours"], -row["tokens_per_s"])):
        name = f"**{ours_name(row)}**" if row["ours"] else row["engine"]
        times = f"**{rounded_down(row['tokens_per_s'] / best_peer['tokens_per_s'])}**" if best_peer and row["ours"] else "–"
        held = f"{row['memory_gb']:.1f} GB" if "memory_gb" in row else "–"
        lines.append(f"| {name} | {row['tokens_per_s']:,.0f} | {times} | {held} |")
    return lines + [""]


def gpu_failures(rows):
    """The peers that gave no figure, and why: their absence must not read as a result."""
    failed = [row for row in rows if row.get("kind") == "failed" and not row["ours"]]
    if not failed:
        return []
    reason = lambda why: "timed out" if "timed out" in why else why.removeprefix("RuntimeError('")[:80].split(":")[0]
    said = ", ".join(f"{row['program']} ({reason(row['why'])})" for row in failed)
    return [f"Without a figure in this run: {said}.", ""]


def gpu(folder):
    path = folder / "gpu.json"
    if not path.is_file():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    lines = gpu_layers(rows)
    lines += gpu_steps(
        rows, "train_step", f"LoRA training step on a GPU ({result['about']})", lambda row: f"ours, {row['base']} base"
    )
    lines += gpu_steps(
        rows,
        "decode_step",
        "Decode on a GPU, batch 1, the same model with an unmerged rank-16 adapter",
        lambda row: f"ours, {row['base']} base",
    )
    lines += gpu_failures(rows)
    machine = f"{result['machine']['gpu']}, {result['date']}, commit {result['commit'][:10]}."
    return [*lines, f"{machine} {result['note']}" if "note" in result else machine, ""]


def render(folder):
    lines = []
    for kind, metric, words in ROWS:
        path = folder / f"{kind}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            lines += [*table_of(result, metric, words), "", machine_line(result), ""]
    lines += gpu(folder)
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
