// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What to dispatch for an operation: which entry of kernels/metal/*.metal, with which template
// arguments, parameters and grid. Plain C++, no MLX: the launch layer turns a Plan into
// mx::fast::metal_kernel, tests run it on the emulator, `bench --explain` prints why.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/params.h"

namespace metal_lora::metal {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  bool operator==(const Dim3&) const = default;
};

/// An argument of the entry's template. A DType becomes float, float16_t or bfloat16_t.
using TemplateArg = std::variant<int, bool, DType>;

/// One kernel as MLX wants it: the text of `regions` (with those they depend on) is the header,
/// `body` the body, inputs and outputs are named in it. The last input is always `p`, the Plan's
/// parameters as uint32 (fewer than 8 words, so MLX hands them over in the constant space).
/// Entries live as long as the program.
struct Entry {
  const char* name;
  std::vector<std::string> regions;
  std::vector<std::string> inputs, outputs;
  std::string body;
};

/// One dispatch. Inputs must begin at addresses that are multiples of their element's size only.
struct Plan {
  const Entry* entry = nullptr;
  std::vector<std::pair<std::string, TemplateArg>> template_args;
  std::vector<uint32_t> p;
  Dim3 threads_per_grid, threads_per_threadgroup;
  std::string why;  ///< the form chosen, its bytes and the rule that chose it
};

/// automatic: by the table in plans_forward.cpp. fused: one dispatch, each output tile recomputes
/// u = x·Aᵀ (rank <= 256 in the matrix-vector form, <= 64 in the tiled one). split: u by
/// lora_shrink first, then the base product with u given.
enum class Form : uint32_t { automatic, fused, split };

/// y [m, n] = x [m, k]·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ.
struct LoraShape {
  uint32_t m = 0, n = 0, k = 0;
  WeightFormat format = WeightFormat::f32;
  uint32_t group_size = 0;          ///< affine formats: 32, 64 or 128; divides k
  DType scales_dtype = DType::f32;  ///< affine formats: of scales and biases
  bool double_quant = false;        ///< NF4 only: uint8 absmax, see WeightFormat
  uint32_t rank = 0;                ///< 0: no adapter; at most 256
  float scale = 0.0f;
  DType dtype = DType::f32;       ///< of x, y, dy, dx
  DType lora_dtype = DType::f32;  ///< of A and B
  bool has_bias = false;          ///< f32 [n]; forward only
  float dropout = 0.0f;           ///< on the adapter's input, in [0, 1)
  uint64_t dropout_seed = 0;
  bool wants_u = false;  ///< forward: also u [m, rank] f32 = drop(x)·Aᵀ; dx: v [m, rank] f32 = dy·B
  Form form = Form::automatic;
};

/// Dispatches, in order. All arrays row-contiguous; bounds-safe for every m, n, k.
///
/// Inputs by name, in the order of Entry::inputs:
///   x [m, k] (forward) or dy [m, n] (dx);
///   w: dense [n, k], or uint32 [n, k·bits/32]; scales, biases: affine [n, k/group]; NF4: scales =
///   absmax f32 [n, k/64]; double-quantised: scales = uint8 [n·k/64], biases = f32 {offset,
///   code[256], absmax2[⌈n·k/64/256⌉]};
///   a [rank, k], b [n, rank] (lora_dtype); bias [n] f32; p.
/// Outputs: y [m, n] or dx [m, k] in `dtype`; u or v f32 [m, rank] where named.
///
/// One Plan: the fused form. Two: the first one's output u (forward) or v (dx) is the second one's
/// input of that name, and is what wants_u asked for.
///
/// Throws std::invalid_argument, naming the argument, for what no kernel does: rank > 256, a group
/// size or k that the format does not allow, more than 2^32 - 1 elements in an array.
std::vector<Plan> plan_lora_forward(const LoraShape& shape);
std::vector<Plan> plan_lora_dx(const LoraShape& shape);

/// u [m, rank] f32 = drop(x)·Aᵀ: inputs x, a, p; output u.
Plan plan_lora_shrink(const LoraShape& shape);
/// v [m, rank] f32 = dy·B: inputs dy, b, p; output v.
Plan plan_lora_shrink_dx(const LoraShape& shape);

}  // namespace metal_lora::metal
