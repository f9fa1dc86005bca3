// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <mlx/array.h>

#include "kernels/params.h"

namespace metal_lora {

/// A frozen base weight W [out, in]: an immutable handle, cheap to copy, thread-safe. It never
/// takes part in differentiation, so it rides beside the graph instead of being an input of each
/// node; its bytes may lie in a mapped file.
class Weight {
 public:
  Weight() = default;

  /// Dense f32, f16 or bf16 array [out, in]; evaluates it.
  static Weight dense(const mlx::core::array& w);
  /// MLX affine triple: q uint32 [out, in·bits/32], scales and biases [out, in/group_size].
  static Weight affine(
      const mlx::core::array& q,
      const mlx::core::array& scales,
      const mlx::core::array& biases,
      int group_size,
      int bits);
  /// NF4 (QLoRA's 4-bit NormalFloat): q uint32 [out, in/8], packed as Weight::affine's 4 bits, and
  /// the blocks' absmax f32 [out, in/64].
  static Weight nf4(const mlx::core::array& q, const mlx::core::array& absmax);
  /// The same with the absmax in 8 bits ("double quantisation"): codes uint8 [out, in/64], table
  /// f32 [1 + 256 + ⌈out·in/64/256⌉] = {offset, the map of the codes, absmax of 256 absmax each};
  /// bitsandbytes' scheme.
  static Weight nf4(
      const mlx::core::array& q, const mlx::core::array& codes, const mlx::core::array& table);
  /// Bytes owned by `owner` (a mapping, a buffer), laid out as params say.
  static Weight view(
      const WeightParams& params,
      std::shared_ptr<const void> owner,
      const void* data,
      const void* scales = nullptr,
      const void* biases = nullptr);

  /// The layout that the active backend multiplies fastest (CPU: packed INT4/INT8/NF4; CUDA: the
  /// same in device memory), or *this where there is none. Costs one pass over the bytes; the
  /// original's memory goes with its last handle. On the CPU a double-quantised absmax becomes f32
  /// (0.5625 bytes a weight instead of 0.516).
  Weight prepared() const;
  /// The parameters that prepared() gives a weight of `params`; for estimates.
  static WeightParams prepared_params(const WeightParams& params);
  /// As an affine weight of `bits` (4 or 8) in groups of `group_size`; *this if it already is
  /// quantised.
  Weight quantized(int bits, int group_size) const;
  /// As an NF4 weight, its absmax in 8 bits if `double_quant`; *this if it already is quantised.
  /// Throws where `in` is no multiple of 64.
  Weight quantized_nf4(bool double_quant) const;
  /// Dense f32 [out, in].
  mlx::core::array dequantized() const;
  /// Rows [begin, end) as f32 [end - begin, in].
  mlx::core::array rows(uint32_t begin, uint32_t end) const;

  const WeightParams& params() const { return params_; }
  int out_features() const { return static_cast<int>(params_.n); }
  int in_features() const { return static_cast<int>(params_.k); }
  bool is_quantized() const { return params_.format >= WeightFormat::int4; }
  explicit operator bool() const { return data_ != nullptr || device_only_; }
  /// Bytes of data, scales and biases.
  size_t nbytes() const;

  /// Data, scales and biases, those that there are, as arrays: those that the weight was made
  /// of, else over its bytes (copied once where MLX cannot take memory that it did not allocate).
  /// uint32 [out, in·bits/32] and the scales' type for quantised weights. Row-major weights only
  /// (Error internal otherwise). Made once for all copies of this handle.
  std::vector<mlx::core::array> arrays() const;
  /// The same in device memory of the CUDA backend, copied there at the first call for all copies
  /// of this handle.
  const std::vector<mlx::core::array>& device_arrays() const;

  /// In host memory. Of a weight that lies on a device a copy is made at the first call.
  const void* data() const { return device_only_ ? downloaded(0) : data_; }
  const void* scales() const { return device_only_ ? downloaded(1) : scales_; }
  const void* biases() const { return device_only_ ? downloaded(2) : biases_; }

 private:
  static Weight of_arrays(const WeightParams& params, std::vector<mlx::core::array> arrays);
  static Weight of_device_arrays(const WeightParams& params, std::vector<mlx::core::array> arrays);
  const void* downloaded(size_t part) const;

  WeightParams params_;
  std::shared_ptr<const void> owner_;
  const void* data_ = nullptr;
  const void* scales_ = nullptr;
  const void* biases_ = nullptr;
  bool device_only_ = false;  ///< the bytes are array_cache_'s device arrays
  struct ArrayCache;
  std::shared_ptr<ArrayCache> array_cache_;
};

/// MLX's type of a kernel's, and back (throws Error for others).
mlx::core::Dtype to_mlx(DType dtype);
DType to_kernel(mlx::core::Dtype dtype);

}  // namespace metal_lora
