// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How a plan names a weight's policy (lora_kernels.metal, lora_quantized.metal) in an entry.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/metal/plan_parts.h"
#include "kernels/nf4.h"

namespace metal_lora::metal {

struct StoredWeight {
  uint32_t n = 0, k = 0;
  WeightFormat format = WeightFormat::f32;
  uint32_t group_size = 0;
  DType scales_dtype = DType::f32;
  bool double_quant = false;
};

inline bool is_affine(WeightFormat format) {
  return format == WeightFormat::int4 || format == WeightFormat::int8;
}
inline bool is_packed(WeightFormat format) {
  return is_affine(format) || format == WeightFormat::nf4;
}
inline DType dense_dtype(WeightFormat format) {
  return format == WeightFormat::f16    ? DType::f16
         : format == WeightFormat::bf16 ? DType::bf16
                                        : DType::f32;
}
inline int packed_bits(WeightFormat format) {
  return format == WeightFormat::int8 ? 8 : 4;
}
inline uint32_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

inline uint32_t group_of(const StoredWeight& w) {
  return w.format == WeightFormat::nf4 ? kNf4Block : w.group_size;
}

/// Bytes of all parts but a double-quantised weight's table.
inline double weight_bytes(const StoredWeight& w) {
  const double count = double(w.n) * w.k;
  if (!is_packed(w.format)) return count * bytes_of(dense_dtype(w.format));
  if (w.format == WeightFormat::nf4) return count * (0.5 + (w.double_quant ? 1.0 : 4.0) / 64);
  return count * (packed_bits(w.format) / 8.0 + 2.0 * bytes_of(w.scales_dtype) / w.group_size);
}

/// Refuses by name what the format does not allow.
inline void check_weight(const StoredWeight& w, const char* kernel) {
  require_size(uint64_t{w.n} * w.k, kernel, "W");
  if (!is_packed(w.format)) return;
  const uint32_t group = group_of(w);
  require(
      group == 32 || group == 64 || group == 128,
      kernel,
      "group size must be 32, 64 or 128 but is " + std::to_string(group));
  require(
      w.k % group == 0,
      kernel,
      "k must be a multiple of " + std::to_string(group) + " but is " + std::to_string(w.k));
  require(
      !w.double_quant || w.format == WeightFormat::nf4,
      kernel,
      "only NF4 weights are double-quantised");
}

/// "_affine" and so on, for an entry's name.
inline const char* weight_suffix(WeightFormat format, bool double_quant) {
  if (is_affine(format)) return "_affine";
  if (format == WeightFormat::nf4) return double_quant ? "_nf4_nested" : "_nf4";
  return "";
}

/// The weight's inputs and region.
inline void add_weight(WeightFormat format, bool double_quant, Entry& entry) {
  entry.inputs.push_back("w");
  if (!is_packed(format)) {
    entry.regions.push_back("weight_dense");
    return;
  }
  const bool nf4 = format == WeightFormat::nf4;
  entry.inputs.push_back("scales");
  if (!nf4 || double_quant) entry.inputs.push_back("biases");
  entry.regions.push_back(nf4 ? "weight_nf4" : "weight_affine");
}

/// Where a double-quantised weight's offset and codes are read: in the table, or in the copy that
/// the matrix-vector form's threadgroups make (stage_text).
enum class NestedHead { in_table, staged };

/// The policy as a body constructs it. Products are made in `compute`; template arguments as
/// add_weight_args names them.
inline std::string weight_policy(
    WeightFormat format,
    bool double_quant,
    const std::string& compute,
    const std::string& k,
    NestedHead head = NestedHead::in_table) {
  if (!is_packed(format)) return "metal_lora::dense_weight<WT>(w, " + k + ")";
  if (format != WeightFormat::nf4) {
    return "metal_lora::affine_weight<" + compute +
           ", BITS, GROUP, RUN, SHARE>(w, scales, biases, " + k + ")";
  }
  return "metal_lora::nf4_weight<" + compute + ", RUN, SHARE>(w, metal_lora::" +
         (!double_quant                  ? "plain_absmax(scales)"
          : head == NestedHead::in_table ? "double_quant_absmax(scales, biases)"
                                         : "staged_absmax(scales, biases, head)") +
         ", " + k + ")";
}

/// What a body of SIMDGROUPS simdgroups says before it uses a policy with NestedHead::staged, whose
/// first use must lie behind a threadgroup barrier.
inline const char* stage_text(WeightFormat format, bool double_quant) {
  if (format != WeightFormat::nf4 || !double_quant) return "";
  return "  threadgroup float head[metal_lora::kNestedHead];\n"
         "  metal_lora::stage_nested_head<SIMDGROUPS * 32>(\n"
         "      head, biases, simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup);\n";
}

/// The most threadgroups that may each copy a double-quantised weight's head (1028 bytes): their
/// copies stay below this part of the weight's bytes. No limit for the other formats.
inline uint32_t most_threadgroups(const StoredWeight& w) {
  constexpr double kMostCopied = 0.035;
  if (!w.double_quant) return UINT32_MAX;
  const double copies = kMostCopied * weight_bytes(w) / (kNf4NestedHead * sizeof(float));
  return std::max(1u, static_cast<uint32_t>(std::min(copies, 4294967295.0)));
}

/// WT, or BITS, GROUP, RUN and SHARE: `run` weights a lane, `span` of a row by neighbouring lanes.
inline void add_weight_args(
    const StoredWeight& w,
    int run,
    uint32_t span,
    std::vector<std::pair<std::string, TemplateArg>>& args) {
  if (!is_packed(w.format)) {
    args.emplace_back("WT", dense_dtype(w.format));
    return;
  }
  const uint32_t group = group_of(w);
  if (is_affine(w.format)) {
    args.emplace_back("BITS", packed_bits(w.format));
    args.emplace_back("GROUP", static_cast<int>(group));
  }
  args.emplace_back("RUN", run);
  args.emplace_back("SHARE", static_cast<int>(std::min(group, span)) / run);
}

}  // namespace metal_lora::metal
