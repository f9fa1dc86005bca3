// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <memory>

#include <mlx/ops.h>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/metal/plans_quantize.h"
#include "kernels/nf4.h"
#include "metal_lora/error.h"
#include "metal_lora/ops.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/metal_ops.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/lora_quantized.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

/// Rows go through f32 in pieces of about 4 MB: enough for every core, little beside w.
constexpr size_t kPieceValues = size_t{1} << 20;

/// Calls piece(row, rows, f32 buffer of rows·k) until all rows are done.
template <class Piece>
void in_pieces(const WeightParams& p, Piece piece) {
  if (p.n == 0 || p.k == 0) return;
  const auto most = static_cast<uint32_t>(std::clamp<size_t>(kPieceValues / p.k, 1, p.n));
  const auto values = std::make_unique_for_overwrite<float[]>(size_t{most} * p.k);
  for (uint32_t row = 0; row < p.n; row += most) {
    piece(row, std::min(most, p.n - row), values.get());
  }
}

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

WeightFormat dense_format(DType dtype) {
  return dtype == DType::f16    ? WeightFormat::f16
         : dtype == DType::bf16 ? WeightFormat::bf16
                                : WeightFormat::f32;
}

/// Rows of a dense w as f32.
void widen_rows(
    const WeightParams& p, DType dtype, const void* w, uint32_t row, uint32_t rows, float* to) {
  WeightParams dense;
  dense.n = p.n;
  dense.k = p.k;
  dense.format = dense_format(dtype);
  cpu::dequantize_rows({dense, w, nullptr, nullptr}, row, rows, to);
}

/// `p` is the quantised weight's.
void quantize_cpu(const WeightParams& p, DType dtype, const KernelArgs& args) {
  const size_t groups = p.k / p.group_size,
               words = p.k * (p.format == WeightFormat::int8 ? 8 : 4) / 32;
  const auto at = [&](size_t output, size_t bytes) {
    return static_cast<std::byte*>(args.out[output]) + bytes;
  };
  in_pieces(p, [&](uint32_t row, uint32_t rows, float* values) {
    widen_rows(p, dtype, args.in[0], row, rows, values);
    WeightParams piece = p;
    piece.n = rows;
    void* q = at(0, row * words * sizeof(uint32_t));
    const size_t first_group = row * groups;
    if (p.format == WeightFormat::nf4) {
      cpu::quantize_nf4(piece, values, q, at(1, first_group * sizeof(float)), nullptr);
      return;
    }
    const size_t bytes = first_group * size_of(p.scales_dtype);
    cpu::quantize_affine(piece, values, q, at(1, bytes), at(2, bytes));
  });
}

#ifdef METAL_LORA_CUDA
CudaFunction quantize_cuda(const WeightParams& p, DType dtype) {
  return [p, dtype](const cuda::Context& context, const KernelArgs& args) {
    if (p.format == WeightFormat::nf4) {
      auto* absmax = static_cast<float*>(args.out[1]);
      cuda::quantize_nf4(context, p, dtype, args.in[0], args.out[0], absmax);
    } else {
      cuda::quantize_affine(context, p, dtype, args.in[0], args.out[0], args.out[1], args.out[2]);
    }
  };
}
#else
CudaFunction quantize_cuda(const WeightParams&, DType) {
  return {};
}
#endif

WeightParams quantized_params(
    const char* op, const mx::array& w, WeightFormat format, int group_size) {
  check_shape(op, "w", w, {-1, -1});
  WeightParams p;
  p.n = static_cast<uint32_t>(w.shape(0));
  p.k = static_cast<uint32_t>(w.shape(1));
  p.format = format;
  p.group_size = static_cast<uint32_t>(group_size);
  p.scales_dtype = format == WeightFormat::nf4 ? DType::f32 : to_kernel(w.dtype());
  if (w.shape(1) % group_size != 0) {
    refuse(op, "in", "a multiple of " + std::to_string(group_size), std::to_string(w.shape(1)));
  }
  return p;
}

/// {q, scales, biases} or {q, absmax}.
Arrays launch_quantize(const char* op, const mx::array& w, const WeightParams& p) {
  const DType dtype = to_kernel(w.dtype());
  const int n = w.shape(0), bits = p.format == WeightFormat::int8 ? 8 : 4;
  const OutputSpec q{{n, w.shape(1) / (32 / bits)}, mx::uint32};
  const OutputSpec groups{{n, w.shape(1) / static_cast<int>(p.group_size)}, to_mlx(p.scales_dtype)};
  Launch quantize{.kernel = op, .inputs = {w}, .outputs = {q, groups}};
  if (p.format != WeightFormat::nf4) quantize.outputs.push_back(groups);
  quantize.cpu = [p, dtype](const KernelArgs& args) { quantize_cpu(p, dtype, args); };
  quantize.cuda = quantize_cuda(p, dtype);
  quantize.metal = [=](const Arrays& in, mx::StreamOrDevice) {
    metal::QuantizeShape shape;
    shape.n = p.n;
    shape.k = p.k;
    shape.format = p.format;
    shape.group_size = p.group_size;
    shape.dtype = dtype;
    metal_ops::NamedArrays arrays{{"w", in[0]}};
    metal_ops::run_plans(
        {metal_ops::planned(op, metal::plan_quantize, shape)},
        arrays,
        {{"q", q}, {"scales", groups}, {"biases", groups}});
    Arrays out{arrays.at("q"), arrays.at("scales")};
    if (p.format != WeightFormat::nf4) out.push_back(arrays.at("biases"));
    return out;
  };
  return launch(std::move(quantize));
}

void dequantize_cpu(const Weight& weight, DType dtype, const KernelArgs& args) {
  const auto& p = weight.params();
  const auto view = weight_view(weight);
  if (dtype == DType::f32) {
    cpu::dequantize_rows(view, 0, p.n, static_cast<float*>(args.out[0]));
    return;
  }
  in_pieces(p, [&](uint32_t row, uint32_t rows, float* values) {
    cpu::dequantize_rows(view, row, rows, values);
    cpu::elementwise().convert(
        size_t{rows} * p.k,
        DType::f32,
        values,
        dtype,
        static_cast<std::byte*>(args.out[0]) + size_t{row} * p.k * size_of(dtype));
  });
}

Arrays dequantize_metal(const char* op, const Weight& weight, DType dtype, mx::StreamOrDevice s) {
  const auto& p = weight.params();
  if (p.layout != WeightLayout::row_major) {
    throw Error(
        ErrorCode::unsupported,
        std::string("[") + op +
            "] the weight is packed for the CPU, which Metal kernels do not read");
  }
  if (!weight.is_quantized()) return {mx::astype(weight.arrays()[0], to_mlx(dtype), s)};
  metal::QuantizeShape shape;
  shape.n = p.n;
  shape.k = p.k;
  shape.format = p.format;
  shape.group_size = p.group_size;
  shape.scales_dtype = p.scales_dtype;
  shape.double_quant = p.double_quant;
  shape.dtype = dtype;
  metal_ops::NamedArrays arrays;
  metal_ops::bind_weight(arrays, weight);
  metal_ops::run_plans(
      {metal_ops::planned(op, metal::plan_dequantize, shape)},
      arrays,
      {{"dense", {{weight.out_features(), weight.in_features()}, to_mlx(dtype)}}});
  return {arrays.at("dense")};
}

}  // namespace

QuantizedAffine quantize(const mx::array& w, int bits, int group_size) {
  constexpr const char* kOp = "quantize";
  if (bits != 4 && bits != 8) refuse(kOp, "bits", "4 or 8", std::to_string(bits));
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse(kOp, "group_size", "32, 64 or 128", std::to_string(group_size));
  }
  const auto format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
  const auto out = launch_quantize(kOp, w, quantized_params(kOp, w, format, group_size));
  return {out[0], out[1], out[2]};
}

QuantizedNf4 quantize_nf4(const mx::array& w) {
  constexpr const char* kOp = "quantize_nf4";
  const auto p = quantized_params(kOp, w, WeightFormat::nf4, static_cast<int>(kNf4Block));
  const auto out = launch_quantize(kOp, w, p);
  return {out[0], out[1]};
}

mx::array dequantize(const Weight& weight, mx::Dtype dtype) {
  constexpr const char* kOp = "dequantize";
  if (!weight) refuse(kOp, "the weight", "one with bytes", "empty");
  const DType to = to_kernel(dtype);
  Launch dense{.kernel = kOp, .outputs = {{{weight.out_features(), weight.in_features()}, dtype}}};
  dense.cpu = [weight, to](const KernelArgs& args) { dequantize_cpu(weight, to, args); };
  const auto call = [weight, to](auto views, auto entry, const KernelArgs& args) {
    entry(views.weight(weight), to, args.out[0]);
  };
  dense.cuda = METAL_LORA_ON_CUDA(call, dequantize);
  dense.metal = [weight, to](const Arrays&, mx::StreamOrDevice s) {
    return dequantize_metal(kOp, weight, to, s);
  };
  return launch(std::move(dense))[0];
}

}  // namespace metal_lora::ops
