# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""MLX's CUDA backend and mlx-lm: LoRA linears (dense and 4-bit), a training step and decoding of the
1.07 B geometry."""

import statistics
import sys
import time

from common import BUFFER_BYTES, emit

try:
    import mlx.core as mx
except ImportError:
    emit(kind="skipped", engine="MLX", why="mlx is not installed")
    sys.exit(0)
if mx.default_device() != mx.gpu:
    emit(kind="skipped", engine="MLX", why="this mlx has no CUDA device")
    sys.exit(0)

TARGETS = ["self_attn." + n for n in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
    "mlp." + n for n in ("gate_proj", "up_proj", "down_proj")
]


def microseconds(function, calls=20, rounds=5):
    for _ in range(3):
        mx.eval(function())
    times = []
    for _ in range(rounds):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([function() for _ in range(calls)])
        mx.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def normal(*shape):
    return (mx.random.normal(shape) * 0.02).astype(mx.bfloat16)


def layers(k=4096, n=4096, rank=16):
    count = max(2, int(BUFFER_BYTES / (k * n * 2)))
    weights = [normal(n, k) for _ in range(count)]
    packed = [mx.quantize(w, group_size=64, bits=4) for w in weights]
    a, b = [normal(k, rank) for _ in range(count)], [normal(rank, n) for _ in range(count)]
    mx.eval(weights, packed, a, b)
    at = [0]

    def turn():
        at[0] = (at[0] + 1) % count
        return at[0]

    for tokens in (1, 8, 64, 512, 4096):
        x = mx.random.normal((tokens, k)).astype(mx.bfloat16)
        mx.eval(x)

        def dense(i):
            return x @ weights[i].T

        def four_bit(i):
            return mx.quantized_matmul(x, *packed[i], transpose=True, group_size=64, bits=4)

        def with_lora(base):
            i = turn()
            return base(i) + (2.0 * ((x @ a[i]) @ b[i])).astype(mx.bfloat16)

        row = {}
        for name, function in (
            ("base_us", lambda: dense(turn())),
            ("lora_us", lambda: with_lora(dense)),
            ("int4_us", lambda: four_bit(turn())),
            ("int4_lora_us", lambda: with_lora(four_bit)),
        ):
            try:
                row[name] = microseconds(function)
            except Exception as error:  # a form that MLX cannot compile here must not hide the others
                emit(kind="failed", engine="MLX", what=f"{name} of {tokens} tokens", why=repr(error)[:300])
        if "base_us" in row:
            emit(kind="layer", engine="MLX", k=k, n=n, rank=rank, tokens=tokens, **row)


def lora_model():
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers

    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=49152,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )
    model = llama.Model(arguments)
    model.set_dtype(mx.bfloat16)
    model.freeze()
    linear_to_lora_layers(model, 16, {"rank": 16, "scale": 2.0, "dropout": 0.0, "keys": TARGETS})
    mx.eval(model.parameters())
    return model


def train_step():
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import default_loss

    model = lora_model()
    optimizer = optimizers.AdamW(1e-4)
    value_and_grad = nn.value_and_grad(model, default_loss)
    batch = mx.random.randint(0, 49152, (4, 1025))
    lengths = mx.array([[0, 1024]] * 4)

    def step(batch, lengths):
        (loss, _), grads = value_and_grad(model, batch, lengths)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    mx.reset_peak_memory()
    for _ in range(3):
        mx.eval(state, compiled(batch, lengths))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        mx.eval(state, compiled(batch, lengths))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    emit(
        kind="train_step",
        engine="mlx-lm",
        ms=seconds * 1e3,
        tokens_per_s=4096 / seconds,
        memory_gb=mx.get_peak_memory() / 1e9,
    )


def decode(tokens=64):
    from mlx_lm.generate import generate_step

    model = lora_model()
    prompt = mx.array([i % 49152 for i in range(256)])
    rates = []
    for _ in range(3):
        steps = generate_step(prompt, model, max_tokens=tokens)
        next(steps)
        start, count = time.perf_counter(), 0
        for _ in steps:
            count += 1
        rates.append(count / (time.perf_counter() - start))
    emit(kind="decode_step", engine="mlx-lm, unmerged rank-16 adapter", tokens_per_s=statistics.median(rates))


def main():
    wanted = sys.argv[1:] or ["layers", "train", "decode"]
    mx.random.seed(0)
    for name, function in (("layers", layers), ("train", train_step), ("decode", decode)):
        if name not in wanted:
            continue
        try:
            function()
        except Exception as error:  # one peer that fails must not take the others' figures away
            emit(kind="failed", engine="MLX", what=name, why=repr(error)[:300])


if __name__ == "__main__":
    main()
