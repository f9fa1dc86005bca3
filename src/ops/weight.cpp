// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/weight.h"

#include <cstdlib>
#include <mutex>

#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <mlx/utils.h>

#include "kernels/cpu/lora_quantized.h"
#include "kernels/nf4.h"
#include "src/launch/backend.h"
#include "src/launch/device_memory.h"
#include "src/ops/checks.h"
#include "src/ops/weight_view.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

size_t dtype_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

std::shared_ptr<std::byte[]> allocate(size_t bytes) {
  constexpr size_t kAlignment = 64;
  auto* p = static_cast<std::byte*>(
      std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
  if (p == nullptr && bytes > 0) {
    throw Error(ErrorCode::does_not_fit, fmt::format("[weight] cannot allocate {} bytes", bytes));
  }
  return {p, [](std::byte* q) { std::free(q); }};
}

bool quantized_format(const WeightParams& p) {
  return p.format >= WeightFormat::int4;
}
int bits_of(const WeightParams& p) {
  return p.format == WeightFormat::int8 ? 8 : 4;
}

/// Shape of an NF4 weight of n rows of k.
WeightParams nf4_params(const char* op, uint32_t n, uint32_t k, bool double_quant) {
  if (k % kNf4Block != 0) ops::refuse(op, "in", "a multiple of 64", std::to_string(k));
  WeightParams p;
  p.n = n;
  p.k = k;
  p.format = WeightFormat::nf4;
  p.group_size = kNf4Block;
  p.double_quant = double_quant;
  return p;
}

size_t row_major_data_bytes(const WeightParams& p) {
  const size_t count = static_cast<size_t>(p.n) * p.k;
  if (quantized_format(p)) return count * bits_of(p) / 8;
  return count * (p.format == WeightFormat::f32 ? 4 : 2);
}

size_t scales_bytes(const WeightParams& p) {
  if (!quantized_format(p)) return 0;
  const size_t groups = static_cast<size_t>(p.n) * (p.k / p.group_size);
  return p.double_quant ? groups : groups * dtype_bytes(p.scales_dtype);
}

/// f32 values behind a double-quantised NF4 weight's biases.
size_t nested_values(const WeightParams& p) {
  const size_t groups = static_cast<size_t>(p.n) * (p.k / kNf4Block);
  return kNf4NestedHead + (groups + kNf4NestedBlock - 1) / kNf4NestedBlock;
}

size_t biases_bytes(const WeightParams& p) {
  if (p.format == WeightFormat::nf4) return p.double_quant ? nested_values(p) * sizeof(float) : 0;
  return scales_bytes(p);
}

WeightFormat dense_format(mx::Dtype dtype) {
  switch (to_kernel(dtype)) {
    case DType::f32:
      return WeightFormat::f32;
    case DType::f16:
      return WeightFormat::f16;
    case DType::bf16:
      return WeightFormat::bf16;
  }
  return WeightFormat::f32;
}

}  // namespace

mx::Dtype to_mlx(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return mx::float32;
    case DType::f16:
      return mx::float16;
    case DType::bf16:
      return mx::bfloat16;
  }
  throw Error(ErrorCode::internal, "[to_mlx] unknown dtype");
}

DType to_kernel(mx::Dtype dtype) {
  if (dtype == mx::float32) return DType::f32;
  if (dtype == mx::float16) return DType::f16;
  if (dtype == mx::bfloat16) return DType::bf16;
  throw Error(
      ErrorCode::invalid_input,
      std::string("[dtype] must be float32, float16 or bfloat16 but is ") + ops::dtype_name(dtype));
}

struct Weight::ArrayCache {
  std::once_flag once, once_on_device, once_downloaded;
  std::vector<mx::array> arrays;
  std::vector<mx::array> on_device;
  std::vector<std::shared_ptr<std::byte[]>> downloaded;
};

namespace {

struct Part {
  mx::Shape shape;
  mx::Dtype dtype;
};

/// Data, scales and biases, those that there are.
std::vector<Part> parts_of(const WeightParams& p) {
  const int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  if (!quantized_format(p)) {
    const auto dtype = p.format == WeightFormat::f32   ? mx::float32
                       : p.format == WeightFormat::f16 ? mx::float16
                                                       : mx::bfloat16;
    return {{{n, k}, dtype}};
  }
  const int groups = k / static_cast<int>(p.group_size);
  std::vector<Part> parts{
      {{n, k * bits_of(p) / 32}, mx::uint32},
      {{n, groups}, p.double_quant ? mx::uint8 : to_mlx(p.scales_dtype)}};
  if (p.double_quant) {
    parts.push_back({{static_cast<int>(nested_values(p))}, mx::float32});
  } else if (p.format != WeightFormat::nf4) {
    parts.push_back({{n, groups}, to_mlx(p.scales_dtype)});
  }
  return parts;
}

/// Evaluated and row-contiguous, where the active backend's kernels read.
std::vector<mx::array> settled(std::vector<mx::array> arrays) {
  const bool cuda = active_backend() == Backend::cuda;
  for (auto& a : arrays) a = cuda ? mx::contiguous(a, false, ops::stream()) : mx::contiguous(a);
  mx::eval(arrays);
  if (!cuda) return arrays;
  for (auto& a : arrays) {
    if (on_host(a)) a = upload(a.data<void>(), a.shape(), a.dtype());
  }
  return arrays;
}

}  // namespace

Weight Weight::dense(const mx::array& w) {
  ops::check_shape("Weight::dense", "w", w, {-1, -1});
  WeightParams p;
  p.n = static_cast<uint32_t>(w.shape(0));
  p.k = static_cast<uint32_t>(w.shape(1));
  p.format = dense_format(w.dtype());
  return of_arrays(p, {w});
}

Weight Weight::affine(
    const mx::array& q,
    const mx::array& scales,
    const mx::array& biases,
    int group_size,
    int bits) {
  constexpr const char* kOp = "Weight::affine";
  if (bits != 4 && bits != 8) ops::refuse(kOp, "bits", "4 or 8", std::to_string(bits));
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    ops::refuse(kOp, "group_size", "32, 64 or 128", std::to_string(group_size));
  }
  ops::check_shape(kOp, "q", q, {-1, -1});
  ops::check_dtype(kOp, "q", q, mx::uint32);
  const int n = q.shape(0), k = q.shape(1) * (32 / bits);
  if (k % group_size != 0) ops::refuse(kOp, "in", "a multiple of group_size", std::to_string(k));
  ops::check_shape(kOp, "scales", scales, {n, k / group_size});
  ops::check_shape(kOp, "biases", biases, {n, k / group_size});
  ops::check_dtype(kOp, "biases", biases, scales.dtype());
  WeightParams p;
  p.n = static_cast<uint32_t>(n);
  p.k = static_cast<uint32_t>(k);
  p.format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
  p.group_size = static_cast<uint32_t>(group_size);
  p.scales_dtype = to_kernel(scales.dtype());
  return of_arrays(p, {q, scales, biases});
}

Weight Weight::nf4(const mx::array& q, const mx::array& absmax) {
  constexpr const char* kOp = "Weight::nf4";
  ops::check_shape(kOp, "q", q, {-1, -1});
  ops::check_dtype(kOp, "q", q, mx::uint32);
  const int n = q.shape(0), k = q.shape(1) * 8;
  const WeightParams p = nf4_params(kOp, static_cast<uint32_t>(n), static_cast<uint32_t>(k), false);
  ops::check_shape(kOp, "absmax", absmax, {n, k / static_cast<int>(kNf4Block)});
  ops::check_dtype(kOp, "absmax", absmax, mx::float32);
  return of_arrays(p, {q, absmax});
}

Weight Weight::nf4(const mx::array& q, const mx::array& codes, const mx::array& table) {
  constexpr const char* kOp = "Weight::nf4";
  ops::check_shape(kOp, "q", q, {-1, -1});
  ops::check_dtype(kOp, "q", q, mx::uint32);
  const int n = q.shape(0), k = q.shape(1) * 8;
  const WeightParams p = nf4_params(kOp, static_cast<uint32_t>(n), static_cast<uint32_t>(k), true);
  ops::check_shape(kOp, "codes", codes, {n, k / static_cast<int>(kNf4Block)});
  ops::check_dtype(kOp, "codes", codes, mx::uint8);
  ops::check_shape(kOp, "table", table, {static_cast<int>(nested_values(p))});
  ops::check_dtype(kOp, "table", table, mx::float32);
  return of_arrays(p, {q, codes, table});
}

Weight Weight::view(
    const WeightParams& params,
    std::shared_ptr<const void> owner,
    const void* data,
    const void* scales,
    const void* biases) {
  Weight w;
  w.params_ = params;
  w.owner_ = std::move(owner);
  w.data_ = data;
  w.scales_ = scales;
  w.biases_ = biases;
  w.array_cache_ = std::make_shared<ArrayCache>();
  return w;
}

Weight Weight::of_arrays(const WeightParams& params, std::vector<mx::array> arrays) {
  auto kept = std::make_shared<std::vector<mx::array>>(settled(std::move(arrays)));
  if (active_backend() == Backend::cuda) return of_device_arrays(params, std::move(*kept));
  const auto part = [&](size_t i) -> const void* {
    return i < kept->size() ? (*kept)[i].data<void>() : nullptr;
  };
  auto weight = view(params, kept, part(0), part(1), part(2));
  weight.array_cache_->arrays = *kept;
  return weight;
}

Weight Weight::of_device_arrays(const WeightParams& params, std::vector<mx::array> arrays) {
  auto weight = view(params, nullptr, nullptr);
  weight.device_only_ = true;
  weight.array_cache_->on_device = std::move(arrays);
  return weight;
}

std::vector<mx::array> Weight::arrays() const {
  if (!*this || params_.layout != WeightLayout::row_major) {
    throw Error(ErrorCode::internal, "[Weight::arrays] the weight must be row-major but is packed");
  }
  if (active_backend() == Backend::cuda) return device_arrays();
  std::call_once(array_cache_->once, [&] {
    auto& out = array_cache_->arrays;
    if (!out.empty()) return;
    const void* const bytes[] = {data(), scales(), biases()};
    for (const auto& [shape, dtype] : parts_of(params_)) {
      // The owner alone, not this handle: it holds the cache, which would then hold itself.
      std::shared_ptr<const void> owner = owner_;
      if (device_only_) owner = array_cache_->downloaded[out.size()];
      out.push_back(mx::array(
          const_cast<void*>(bytes[out.size()]), shape, dtype, [owner = std::move(owner)](void*) {
          }));
    }
  });
  return array_cache_->arrays;
}

const std::vector<mx::array>& Weight::device_arrays() const {
  if (!*this || params_.layout != WeightLayout::row_major) {
    throw Error(ErrorCode::internal, "[Weight] a CUDA kernel's weight must be row-major");
  }
  std::call_once(array_cache_->once_on_device, [&] {
    auto& out = array_cache_->on_device;
    if (!out.empty()) return;
    const void* const bytes[] = {data_, scales_, biases_};
    for (const auto& [shape, dtype] : parts_of(params_)) {
      out.push_back(upload(bytes[out.size()], shape, dtype));
    }
  });
  return array_cache_->on_device;
}

const void* Weight::downloaded(size_t part) const {
  auto& cache = *array_cache_;
  std::call_once(cache.once_downloaded, [&] {
    for (const auto& a : cache.on_device) {
      cache.downloaded.push_back(allocate(a.nbytes()));
      download(a, cache.downloaded.back().get());
    }
  });
  return part < cache.downloaded.size() ? cache.downloaded[part].get() : nullptr;
}

WeightParams Weight::prepared_params(const WeightParams& params) {
  if (active_backend() != Backend::cpu) return params;  // Metal kernels read rows as they are
  if (params.layout == WeightLayout::cpu_packed || !cpu::can_pack(params)) return params;
  WeightParams packed = params;
  packed.layout = WeightLayout::cpu_packed;
  packed.double_quant = false;
  return packed;
}

Weight Weight::prepared() const {
  if (active_backend() == Backend::cuda) {
    return device_only_ ? *this : of_device_arrays(params_, device_arrays());
  }
  const WeightParams packed = prepared_params(params_);
  if (packed.layout == params_.layout) return *this;
  auto bytes = allocate(cpu::packed_weight_bytes(params_));
  cpu::pack_weight(ops::weight_view(*this), bytes.get());
  const void* data = bytes.get();
  return view(packed, std::move(bytes), data);
}

Weight Weight::quantized(int bits, int group_size) const {
  if (is_quantized()) return *this;
  WeightParams p = params_;
  p.format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
  p.group_size = static_cast<uint32_t>(group_size);
  p.scales_dtype = DType::f16;
  if (p.k % p.group_size != 0) return *this;
  const size_t data_bytes = row_major_data_bytes(p), scale_bytes = scales_bytes(p);
  auto bytes = allocate(data_bytes + 2 * scale_bytes);
  auto* data = bytes.get();
  auto dense = rows(0, p.n);
  cpu::quantize_affine(
      p, dense.data<float>(), data, data + data_bytes, data + data_bytes + scale_bytes);
  return view(p, bytes, data, data + data_bytes, data + data_bytes + scale_bytes);
}

Weight Weight::quantized_nf4(bool double_quant) const {
  if (is_quantized()) return *this;
  const WeightParams p = nf4_params("Weight::quantized_nf4", params_.n, params_.k, double_quant);
  const auto aligned = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t data_bytes = aligned(row_major_data_bytes(p)),
               scale_bytes = aligned(scales_bytes(p));
  auto bytes = allocate(data_bytes + scale_bytes + biases_bytes(p));
  auto* data = bytes.get();
  auto* scales = data + data_bytes;
  auto* biases = double_quant ? scales + scale_bytes : nullptr;
  auto dense = rows(0, p.n);
  cpu::quantize_nf4(p, dense.data<float>(), data, scales, biases);
  return view(p, std::move(bytes), data, scales, biases);
}

mx::array Weight::rows(uint32_t begin, uint32_t end) const {
  if (begin > end || end > params_.n) {
    ops::refuse(
        "Weight::rows",
        "range",
        fmt::format("within 0 … {}", params_.n),
        fmt::format("{} … {}", begin, end));
  }
  const mx::Shape shape{static_cast<int>(end - begin), in_features()};
  auto buffer = mx::allocator::malloc(static_cast<size_t>(end - begin) * params_.k * sizeof(float));
  cpu::dequantize_rows(
      ops::weight_view(*this), begin, end - begin, static_cast<float*>(buffer.buffer().raw_ptr()));
  return mx::array(std::move(buffer), shape, mx::float32);
}

mx::array Weight::dequantized() const {
  return rows(0, params_.n);
}

size_t Weight::nbytes() const {
  if (params_.layout == WeightLayout::cpu_packed) return cpu::packed_weight_bytes(params_);
  return row_major_data_bytes(params_) + scales_bytes(params_) + biases_bytes(params_);
}

}  // namespace metal_lora
