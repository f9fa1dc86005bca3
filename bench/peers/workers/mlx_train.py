# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""LoRA steps with mlx-lm's own layers, loss and compiled step, on the CPU."""

import functools
import statistics

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from common import arguments, emit, seconds_of, token_rows
from mlx_lm import load
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

KEYS = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}

a = arguments()
mx.set_default_device(mx.cpu)
mx.random.seed(0)
model, tokenizer = load(a["model"])
model.freeze()
lora = {"rank": a["rank"], "scale": 2.0, "dropout": 0.0, "keys": KEYS}
linear_to_lora_layers(model, len(model.layers), lora)
model.train()
optimizer = optim.AdamW(learning_rate=1e-4)
rows = mx.array(token_rows(tokenizer, a["data"], a["length"] + 1))
lengths = mx.array([[0, a["length"]]] * a["batch"])
loss_and_gradient = nn.value_and_grad(model, default_loss)
state = [model.state, optimizer.state, mx.random.state]
mx.eval(state)


@functools.partial(mx.compile, inputs=state, outputs=state)
def compiled_step(batch):
    (loss, _), gradient = loss_and_gradient(model, batch, lengths)
    optimizer.update(model, gradient)
    return loss


def step(index):
    first = index * a["batch"] % (len(rows) - a["batch"] + 1)
    mx.eval(compiled_step(rows[first : first + a["batch"]]), state)


times = [seconds_of(lambda i=i: step(i)) for i in range(a["steps"])][2:]
emit(tokens_per_second=a["batch"] * a["length"] / statistics.median(times))
