// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Compiled by metal_emulate() when the tests are built.
#include <metal_stdlib>

#include "include/scaled.h"
#include "shared_tile.h"

using namespace metal;

kernel void scale(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  y[i] = scaled(x[i]) + kTileRows;
}

kernel void unused(device float* y [[buffer(0)]]) { y[0] = 1; }
