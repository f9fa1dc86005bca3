# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Measurements with peers: how runs become ratios, and ratios the README's table."""

import importlib.machinery
import importlib.util
import json
import pathlib
import sys

import pytest
import results_table

RUN = pathlib.Path(__file__).resolve().parents[2] / "bench" / "peers" / "run"


@pytest.fixture(scope="module")
def peers():
    loader = importlib.machinery.SourceFileLoader("peers_run", str(RUN))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("peers_run", loader))
    sys.modules["peers_run"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def script(text):
    return (sys.executable, "-c", text)


def make_bench(peers, more_is_better=True):
    engines = (peers.Engine("ours", script("print('{\"m\": 30, \"peak_memory_bytes\": 5e8}')"), True),
               peers.Engine("slow", script("print('{\"m\": 10}')")),
               peers.Engine("fast", script("print('{\"m\": 20}')")))
    return peers.Bench("a bench", engines, {"m": more_is_better}, lambda limits: {"m": 60.0})


def test_ratios_pair_rounds_of_the_same_window(peers):
    bench = make_bench(peers)
    runs = {"ours": [{"m": 30}, {"m": 60}, None, {"m": 90}],
            "slow": [{"m": 10}, {"m": 20}, {"m": 1}, None],
            "fast": [{"m": 20}, {"m": 20}, {"m": 1}, {"m": 20}]}
    assert peers.ratios(bench, runs) == {"m": {"ours": {"slow": 3.0, "fast": 3.0}}}


def test_ratios_turn_round_where_less_is_better(peers):
    runs = {"ours": [{"m": 10}], "slow": [{"m": 40}], "fast": [{"m": 5}]}
    assert peers.ratios(make_bench(peers, False), runs)["m"]["ours"] == {"slow": 4.0, "fast": 0.5}


def test_percentiles_are_nearest_rank(peers):
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert peers.summary(values) == {"median": 3.0, "p10": 1.0, "p90": 5.0, "runs": values}


def test_failing_engine_leaves_the_others(peers, capsys):
    broken = peers.Engine("broken", script("raise SystemExit('no luck')"))
    assert peers.measure(broken, 1, 60) is None
    assert "no luck" in capsys.readouterr().err
    missing = peers.Engine("missing", ("/no/such/program",))
    assert peers.measure(missing, 1, 60) is None
    assert "bench/peers/setup" in capsys.readouterr().err


def test_settings_of_the_shell_do_not_reach_engines(peers, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    environment = peers.clean_environment(peers.Engine("e", (), preload="lib.so"), 3)
    assert "OPENBLAS_CORETYPE" not in environment
    assert environment["OMP_NUM_THREADS"] == "3" and environment["LD_PRELOAD"].endswith("lib.so")


def test_every_benchmark_has_ours_and_peers(peers):
    for bench in (peers.train_bench("data", 2), peers.generation_bench("decode", "data", 2),
                  peers.generation_bench("prefill", "data", 2), peers.layer_bench(2)):
        assert {engine.ours for engine in bench.engines} == {True, False}
        assert len({engine.name for engine in bench.engines}) == len(bench.engines)


@pytest.fixture
def results(peers, tmp_path, monkeypatch):
    """A results file made by the runner itself, from engines that print fixed figures."""
    bench = make_bench(peers)
    runs = peers.run_rounds(bench, 3, 1, 60)
    options = type("Options", (), {"threads": 1, "rounds": 3})
    result = peers.report("train", bench, runs, {"read_gbps": 1.0}, options)
    monkeypatch.setattr(results_table, "ROWS", (("train", "m", "tokens/s"),))
    (tmp_path / "train.json").write_text(json.dumps(result))
    return tmp_path


def test_table_shows_ours_beside_the_best_peer_and_the_limit(results):
    table = results_table.render(results)
    assert "| **ours** | 30 [30–30] | **1.50** | 50 % | 0.50 GB |" in table
    assert "| fast | 20 [20–20] | – | 33 % | – |" in table
    assert "× fast" in table


def test_check_fails_until_the_table_is_written(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results_table.BEGIN}\nold\n{results_table.END}\nafter\n")
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert results_table.main([*arguments, "--check"]) == 1
    assert results_table.main(arguments) == 0
    assert results_table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


def test_readme_without_its_markers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="once each"):
        results_table.with_table("no markers", "table")
