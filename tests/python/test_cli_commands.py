# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Every command of metal-lora on a tiny random model and on SmolLM2: output, JSON, exit codes."""

import json
import signal
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

HIDDEN, FFN, LAYERS, HEADS, VOCAB = 32, 64, 2, 4, 259


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama as a Hugging Face folder; token id = byte, 256 to 258 are ChatML's."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(3)
    tensors = {"model.embed_tokens.weight": random.normal(size=(VOCAB, HIDDEN))}
    tensors["model.norm.weight"] = np.ones(HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            tensors[f"{prefix}{name}.weight"] = random.normal(size=shape) / np.sqrt(shape[1])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(HIDDEN)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    config = dict(
        model_type="llama", hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=FFN,
        num_attention_heads=HEADS, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=256,
        rms_norm_eps=1e-5, tie_word_embeddings=True, eos_token_id=257, bos_token_id=256)
    (folder / "config.json").write_text(json.dumps(config))
    # GPT-2's printable stand-ins of the 256 bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(extra)) for b in range(256)]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=level,
        post_processor=None, decoder=level,
        added_tokens=[dict(id=256 + i, content=s, single_word=False, lstrip=False, rstrip=False,
                           normalized=False, special=True) for i, s in enumerate(special)],
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                   vocab={t: i for i, t in enumerate(letters + special)}, merges=[]))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        dict(eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=template)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("valid", 3), ("test", 3)):
        rows = [{"prompt": f"say {i}", "completion": f"number {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def cli(metal_lora):
    """cli(*words) → CompletedProcess; cli.json(*words) → the parsed lines of a run that succeeds."""

    def run(*words, **options):
        return subprocess.run([str(metal_lora), *map(str, words)], capture_output=True, text=True,
                              timeout=120, **({"stdin": subprocess.DEVNULL} | options))

    def run_json(*words, **options):
        if "input" in options:
            options["stdin"] = None
        result = run(*words, "--json", **options)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    run.json = run_json
    return run


@pytest.fixture(scope="module")
def trained(cli, tiny, data, tmp_path_factory):
    """An adapter of the tiny model, and the lines that its training gave."""
    folder = tmp_path_factory.mktemp("run") / "adapters"
    lines = cli.json("train", "--model", tiny, "--data", data, "--adapter-path", folder, "--iters", 6,
                     "--steps-per-report", 1, "--steps-per-eval", 3, "--learning-rate", "1e-2", "--rank", 4,
                     "--num-layers", -1, "--batch-size", 2, "--dtype", "float32")
    return folder, lines


def error_of(result):
    return json.loads(result.stdout.splitlines()[-1])["error"]


# ---- train, eval ----


def test_train_reports_each_step_and_evaluation(trained):
    folder, lines = trained
    reports = [line for line in lines if "train_loss" in line]
    assert [line["iteration"] for line in reports] == [1, 2, 3, 4, 5, 6]
    for line in reports:
        assert set(line) == {"iteration", "train_loss", "learning_rate", "tokens_per_second",
                             "trained_tokens", "peak_memory_bytes"}
        assert line["learning_rate"] == pytest.approx(1e-2)
        assert line["peak_memory_bytes"] > 1e6
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    evaluations = [line for line in lines if "val_loss" in line]
    assert evaluations and all(set(line) == {"iteration", "val_loss"} for line in evaluations)
    assert (folder / "adapters.safetensors").is_file()
    assert "<svg" in (folder / "report.html").read_text()


def test_eval_agrees_with_score(cli, tiny, trained, tmp_path):
    text = "a short line of text"
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for adapter in ([], ["--adapter-path", trained[0]]):
        evaluated, = cli.json("eval", "--model", tiny, "--data", tmp_path, *adapter)
        scored, = cli.json("score", "--model", tiny, "--text", text + "<|im_end|>", *adapter)
        assert evaluated["tokens"] == len(text)  # the EOS counts, the first token does not
        mean = -sum(scored["logprobs"][1:]) / len(text)
        assert evaluated["loss"] == pytest.approx(mean, abs=1e-5)
        assert evaluated["perplexity"] == pytest.approx(np.exp(mean), rel=1e-4)


def test_ctrl_c_saves_and_resume_goes_on(cli, metal_lora, tiny, data, tmp_path):
    words = ["train", "--model", tiny, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 100000,
             "--steps-per-report", 1, "--num-layers", -1, "--json"]
    process = subprocess.Popen([str(metal_lora), *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "train_loss" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(rest.splitlines()[-1])["error"]["code"] == "interrupted"
    steps = [json.loads(line)["iteration"] for line in rest.splitlines() if "train_loss" in line] or [1]
    lines = cli.json("train", "--model", tiny, "--data", data, "--adapter-path", tmp_path / "a", "--resume",
                     "--iters", steps[-1] + 2, "--steps-per-report", 1, "--num-layers", -1)
    assert [line["iteration"] for line in lines if "train_loss" in line][0] >= steps[-1]


def test_flags_win_over_yaml(cli, tiny, data, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"model: {tiny}\ndata: {data}\niters: 50\nlora_parameters: {{rank: 2, scale: 4.0, dropout: 0.0}}\n")
    lines = cli.json("train", "--config", tmp_path / "c.yaml", "--iters", 1, "--steps-per-report", 1,
                     "--adapter-path", tmp_path / "a")
    assert [line["iteration"] for line in lines if "train_loss" in line] == [1]
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["lora_parameters"]["rank"] == 2


def test_will_not_fit_is_exit_code_5(cli, tiny, data, tmp_path):
    result = cli("train", "--model", tiny, "--data", data, "--adapter-path", tmp_path / "a",
                 "--max-memory", "1MB", "--json")
    assert result.returncode == 5
    assert error_of(result)["code"] == "does_not_fit"


# ---- generate, score, tokenize ----


def test_generate_json(cli, tiny):
    line, = cli.json("generate", "--model", tiny, "--prompt", "abc", "--max-tokens", 8, "--temp", 0, "--ignore-eos")
    assert {"text", "tokens", "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps",
            "peak_memory_bytes"} <= set(line)
    assert line["prompt_tokens"] == 3 and line["generation_tokens"] == len(line["tokens"]) == 8


def test_generate_is_greedy_by_the_scores(cli, tiny):
    words = ["--model", tiny, "--dtype", "float32"]
    line, = cli.json("generate", *words, "--prompt", "abc", "--max-tokens", 1, "--ignore-eos")
    best = line["tokens"][0]
    if best < 128:  # a token whose text is itself
        scored, = cli.json("score", *words, "--text", "abc" + chr(best))
        others, = cli.json("score", *words, "--text", "abc" + ("z" if chr(best) != "z" else "y"))
        assert scored["logprobs"][-1] >= others["logprobs"][-1]


def test_the_seed_decides_and_stop_strings_end(cli, tiny):
    words = ["generate", "--model", tiny, "--prompt", "abc", "--max-tokens", 24, "--ignore-eos", "--temp", 1.5]
    first, = cli.json(*words, "--seed", 1)
    again, = cli.json(*words, "--seed", 1)
    other, = cli.json(*words, "--seed", 2)
    assert first["tokens"] == again["tokens"] != other["tokens"]
    text = first["text"]
    stop = next((c for c in text[2:] if c.isascii() and c.isprintable()), None)
    if stop:
        cut, = cli.json(*words, "--seed", 1, "--stop", stop)
        assert cut["text"] == text[:text.index(stop)]
        assert cut["finish_reason"] == "stop_string"


def test_prompts_file_answers_in_order(cli, tiny, tmp_path):
    prompts = ["first", "second prompt", "third"]
    rows = [{"prompt": p} for p in prompts] + [{"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["generate", "--model", tiny, "--max-tokens", 5, "--ignore-eos", "--dtype", "float32"]
    lines = cli.json(*words, "--prompts-file", tmp_path / "p.jsonl")
    assert len(lines) == 4
    for prompt, line in zip(prompts, lines):
        alone, = cli.json(*words, "--prompt", prompt)
        assert alone["tokens"] == line["tokens"] and line["prompt_tokens"] == len(prompt)
    chatted, = cli.json(*words, "--prompt", "hi", "--chat")
    assert chatted["tokens"] == lines[3]["tokens"]


def test_a_bad_row_is_named(cli, tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    result = cli("generate", "--model", tiny, "--prompts-file", tmp_path / "p.jsonl", "--json")
    assert result.returncode == 2 and "line 2" in error_of(result)["message"]


def test_plain_output_is_the_text_alone(cli, tiny):
    words = ["generate", "--model", tiny, "--prompt", "abc", "--max-tokens", 6, "--ignore-eos"]
    plain = cli(*words, encoding="utf-8", errors="replace")
    line, = cli.json(*words)
    assert plain.stdout == line["text"] + "\n"
    assert "tokens/s" in plain.stderr


def test_tokenize_and_score_shapes(cli, tiny):
    line, = cli.json("tokenize", "--model", tiny, "--text", "a<|im_end|>")
    assert line == {"tokens": [97, 257]}
    line, = cli.json("score", "--model", tiny, "--text", "abcd")
    assert line["tokens"] == [97, 98, 99, 100]
    assert line["logprobs"][0] is None and all(x < 0 for x in line["logprobs"][1:])
    line, = cli.json("score", "--model", tiny, "--text", "")
    assert line == {"tokens": [], "logprobs": []}


def test_closed_pipe_is_no_error(metal_lora, tiny):
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{metal_lora}' inspect '{tiny}' --tensors | head -1"],
        capture_output=True, text=True)
    assert result.returncode == 0 and "error" not in result.stderr


# ---- chat ----


def test_chat_over_a_pipe_remembers_and_reuses(cli, tiny):
    lines = cli.json("chat", "--model", tiny, "--max-tokens", 4, "--ignore-eos", "--dtype", "float32",
                     input="hello\nagain\n/reset\nhello\n/exit\nnever\n")
    assert len(lines) == 3
    assert lines[1]["prompt_tokens"] > lines[0]["prompt_tokens"]
    assert lines[1]["reused_tokens"] > 0
    assert lines[2]["tokens"] == lines[0]["tokens"]


def test_ctrl_c_stops_the_answer_not_the_chat(metal_lora, model_path):
    process = subprocess.Popen(
        [str(metal_lora), "chat", "--model", str(model_path), "--max-tokens", "4000", "--ignore-eos"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write("Tell me a long story.\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate("/exit\n", timeout=60)
    assert process.returncode == 0 and rest.endswith("\n")


def test_ctrl_c_ends_generate_with_130(metal_lora, model_path):
    process = subprocess.Popen(
        [str(metal_lora), "generate", "--model", str(model_path), "--prompt", "Once", "--max-tokens", "4000",
         "--ignore-eos"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


# ---- adapters: convert, fuse ----


def test_adapter_formats_round_trip(cli, trained, tmp_path):
    cli.json("convert", trained[0], "--to", "peft", "--output", tmp_path / "peft")
    cli.json("convert", tmp_path / "peft", "--to", "mlx-lm", "--output", tmp_path / "mlx")
    before = load_file(trained[0] / "adapters.safetensors")
    after = load_file(tmp_path / "mlx/adapters.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes()
    peft = load_file(tmp_path / "peft/adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert np.array_equal(peft[f"base_model.model.{name}.lora_A.weight"], before[f"{name}.lora_a"].T)


def test_fuse_equals_the_unmerged_adapter(cli, tiny, trained, tmp_path):
    line, = cli.json("fuse", "--model", tiny, "--adapter-path", trained[0], "--output", tmp_path / "f",
                     "--dtype", "float32")
    # f32: the sum W + ΔW is rounded to 2^-24 of W, far below ΔW.
    assert line["kept"] == pytest.approx(1, abs=1e-3) and line["noise"] < 1e-3
    assert line["kl_merged"] < 1e-6 < line["kl_adapter"]
    assert len(line["linears"]) == 7 * LAYERS
    text = "a text to compare"
    unmerged, = cli.json("score", "--model", tiny, "--adapter-path", trained[0], "--text", text)
    merged, = cli.json("score", "--model", tmp_path / "f", "--text", text)
    assert merged["logprobs"][1:] == pytest.approx(unmerged["logprobs"][1:], abs=1e-4)


def test_fuse_refuses_to_lose_the_adapter(cli, tiny, trained, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    tensors = load_file(trained[0] / "adapters.safetensors")
    save_file({k: (v * 1e-3 if k.endswith("lora_b") else v) for k, v in tensors.items()}, small / "adapters.safetensors")
    (small / "adapter_config.json").write_text((trained[0] / "adapter_config.json").read_text())
    words = ["fuse", "--model", tiny, "--adapter-path", small, "--quantize", 4, "--quantize-group-size", 32]
    result = cli(*words, "--output", tmp_path / "lost", "--json")
    assert result.returncode == 2 and "loses" in error_of(result)["message"]
    assert not (tmp_path / "lost/config.json").exists()
    line, = cli.json(*words, "--output", tmp_path / "forced", "--allow-loss")
    assert line["noise"] > 0.5


def test_convert_quantizes_to_an_mlx_checkpoint(cli, tiny, tmp_path):
    cli.json("convert", tiny, "--output", tmp_path / "q", "--quantize", 8, "--group-size", 32)
    config = json.loads((tmp_path / "q/config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8}
    tensors = load_file(tmp_path / "q/model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == np.uint32
    full, = cli.json("score", "--model", tiny, "--text", "some words")
    small, = cli.json("score", "--model", tmp_path / "q", "--text", "some words")
    assert small["logprobs"][1:] == pytest.approx(full["logprobs"][1:], abs=0.2)


def test_convert_needs_an_empty_folder(cli, tiny):
    result = cli("convert", tiny, "--output", tiny, "--json")
    assert result.returncode == 2 and "empty" in error_of(result)["message"]


# ---- inspect, bench, the command line itself ----


def test_inspect_kinds(cli, tiny, data, trained):
    line, = cli.json("inspect", tiny)
    assert line["kind"] and line["architecture"] == "llama" and line["types"] == {"F32": 20}
    assert line["bytes"] == 4 * line["elements"]
    line, = cli.json("inspect", trained[0])
    assert line["adapter"]["format"] == "mlx-lm" and line["adapter"]["ranks"] == [4]
    line, = cli.json("inspect", data)
    assert line["rows"] == {"train.jsonl": 12, "valid.jsonl": 3, "test.jsonl": 3}
    line, = cli.json("inspect", "--devices")
    assert line["devices"][0]["kind"] == "cpu" and line["devices"][0]["threads"] >= 1


def test_bench_explains_and_measures(cli, tiny):
    line, = cli.json("bench", "ops", "--explain")
    assert {row["tokens"] for row in line["forms"]} == {1, 8, 64, 512}
    assert {row["weight"] for row in line["forms"]} == {"f32", "bf16", "int4", "int8", "nf4"}
    for what in ("decode", "prefill"):
        line, = cli.json("bench", what, "--model", tiny, "--rank", 4, "--rounds", 2, "--tokens", 8,
                         "--prompt-tokens", 16)
        assert line["tokens_per_second"] > 0 and line["machine"]["isa"]
    line, = cli.json("bench", "train", "--model", tiny, "--iters", 2, "--batch-size", 2, "--seq-length", 16)
    assert line["tokens_per_second"] > 0 and len(line["losses"]) == 4


@pytest.mark.parametrize("command", [
    "", "train", "generate", "chat", "eval", "score", "tokenize", "inspect", "convert", "fuse", "bench"])
def test_help_teaches(cli, command):
    result = cli(*([command] if command else []), "--help")
    assert result.returncode == 0 and "Examples:" in result.stdout
    assert f"metal-lora {command}".strip() in result.stdout


def test_version(cli):
    assert cli("--version").stdout.startswith("metal-lora ")


@pytest.mark.parametrize("words, code, says", [
    (["generate", "--modle", "x"], 2, "--model"),
    (["generat"], 2, "generate"),
    (["generate"], 2, "--model"),
    (["generate", "--model", "{tiny}", "--prompt", "x", "--top-p", "0"], 2, "top_p"),
    (["generate", "--model", "{tiny}", "--prompt", "x", "--dtype", "int3"], 2, "--dtype"),
    (["generate", "--model", "{tiny}"], 2, "--prompt"),
    (["generate", "--model", "/nowhere/model", "--prompt", "x"], 3, "/nowhere/model"),
    (["score", "--model", "{tiny}", "--file", "/nowhere/text"], 3, "/nowhere/text"),
    (["score", "--model", "{tiny}", "--text", "x", "--adapter-path", "/nowhere"], 3, "/nowhere"),
    (["eval", "--model", "{tiny}", "--data", "/nowhere"], 3, "/nowhere"),
    (["train", "--model", "{tiny}", "--data", "/nowhere"], 3, "/nowhere"),
    (["train", "--data", "/nowhere"], 2, "--model"),
    (["train", "--model", "{tiny}", "--data", "x", "--iters", "many"], 2, "iters"),
    (["inspect", "/nowhere"], 3, "/nowhere"),
    (["inspect", "/etc/hostname"], 2, "/etc/hostname"),
    (["convert", "/nowhere", "--output", "/tmp/x"], 3, "/nowhere"),
    (["convert", "{tiny}", "--output", "/tmp/x", "--quantize", "nf4"], 2, "nf4 cannot be written"),
    (["convert", "{tiny}", "--output", "/tmp/x", "--quantize", "5"], 2, "4 or 8"),
    (["fuse", "--model", "{tiny}", "--adapter-path", "/nowhere", "--output", "/tmp/x", "--quantize", "nf4"],
     2, "nf4 cannot be written"),
    (["generate", "--model", "{tiny}", "--prompt", "x", "--quantize", "fp4"], 2, "fp4"),
    (["generate", "--model", "{tiny}", "--prompt", "x", "--quantize", "nf4"], 2, "multiple of 64"),
    (["generate", "--model", "{tiny}", "--prompt", "x", "--no-double-quant"], 2, "double_quant"),
    (["train", "--model", "{tiny}", "--data", "x", "--quantize", "nf4", "--quantize-group-size", "32"],
     2, "quantize_group_size"),
    (["bench", "nothing"], 2, "nothing"),
])
def test_errors_have_a_code_and_name_the_culprit(cli, tiny, words, code, says):
    result = cli(*[w.format(tiny=tiny) for w in words], "--json")
    assert result.returncode == code, result.stderr
    error = error_of(result)
    assert says in error["message"] and error["code"] in {"invalid_input", "not_found", "unsupported"}
    assert says in result.stderr


# ---- the real model ----


def test_smollm2_answers(cli, model_path):
    line, = cli.json("generate", "--model", model_path, "--chat", "--prompt", "What is the capital of France?",
                     "--max-tokens", 24, "--temp", 0)
    assert "Paris" in line["text"] and line["finish_reason"] in {"eos", "max_tokens"}


def test_smollm2_as_nf4(cli, model_path, tmp_path):
    """A base as QLoRA has it: generate, and which kernels its weights take."""
    cli.json("convert", model_path, "--output", tmp_path / "hf")  # the file may be quantised: dense
    words = ["--model", tmp_path / "hf", "--quantize", "nf4"]
    for more in ([], ["--no-double-quant"]):
        line, = cli.json("generate", *words, *more, "--chat", "--prompt", "What is the capital of France?",
                         "--max-tokens", 24)
        assert "Paris" in line["text"]
    line, = cli.json("bench", "ops", "--explain", *words)
    assert {row["weight"] for row in line["forms"]} == {"nf4"}


def test_smollm2_converted_gives_the_same_scores(cli, model_path, tmp_path):
    """GGUF → Hugging Face in f32 keeps every weight and the tokenizer."""
    cli.json("convert", model_path, "--output", tmp_path / "hf", "--dtype", "float32")
    text = "In 2026, the naïve café owner paid 1,234.50 euros — twice!\n\tSELECT * FROM t;"
    gguf, = cli.json("score", "--model", model_path, "--text", text)
    folder, = cli.json("score", "--model", tmp_path / "hf", "--text", text)
    assert gguf["tokens"] == folder["tokens"]
    # Quantised and dense kernels sum in another order: 30 layers of sums over up to 1536 terms.
    assert folder["logprobs"][1:] == pytest.approx(gguf["logprobs"][1:], abs=2e-3)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert theirs.encode(text).ids == gguf["tokens"]
