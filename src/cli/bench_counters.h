// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// `bench --counters`: what the Metal kernels move and compute, counted by the emulator, against the
// same linear as four plain dispatches. Counts, not times: no GPU takes part.
#pragma once

#include "src/cli/console.h"

namespace metal_lora::cli {

void bench_counters(Console& console);

}  // namespace metal_lora::cli
