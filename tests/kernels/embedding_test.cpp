// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/gemv_convert.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_kernels.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr double kEps = 0x1p-24;
constexpr uint32_t kVocab = 64, kDims = 128;

double rounding(DType dtype) {
  return dtype == DType::f32 ? kEps : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

struct Adapter {
  std::vector<uint8_t> a, b;
  LoraView view;
};

Adapter random_adapter(uint32_t rank, DType dtype, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Adapter out;
  out.a.resize(size_t{rank} * kVocab * 4);
  out.b.resize(size_t{rank} * kDims * 4);
  for (size_t i = 0; i < size_t{rank} * kVocab; ++i)
    write_float(out.a.data(), dtype, i, normal(rng));
  for (size_t i = 0; i < size_t{rank} * kDims; ++i)
    write_float(out.b.data(), dtype, i, normal(rng));
  out.view.params.rank = rank;
  out.view.params.scale = 0.5f;
  out.view.params.dtype = dtype;
  return out;
}

/// A table of every format and layout, made from the same values.
struct Table {
  WeightView view;
  std::vector<uint8_t> data, scales, biases, packed;
};

Table make_table(WeightFormat format, WeightLayout layout, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(kVocab * kDims);
  for (float& v : values) v = normal(rng);
  Table t;
  WeightParams& p = t.view.params;
  p.n = kVocab;
  p.k = kDims;
  p.format = format;
  const bool nf4 = format == WeightFormat::nf4;
  p.group_size = nf4 ? 64 : 32;
  p.scales_dtype = nf4 ? DType::f32 : DType::f16;
  t.data.resize(values.size() * 4);
  if (format <= WeightFormat::bf16) {
    for (size_t i = 0; i < values.size(); ++i) {
      write_float(t.data.data(), static_cast<DType>(format), i, values[i]);
    }
    t.view.data = t.data.data();
    return t;
  }
  t.scales.resize(values.size() / 32 * 2);
  t.biases.resize(t.scales.size());
  if (nf4) {
    quantize_nf4(p, values.data(), t.data.data(), t.scales.data(), nullptr);
  } else {
    quantize_affine(p, values.data(), t.data.data(), t.scales.data(), t.biases.data());
  }
  t.view.data = t.data.data();
  t.view.scales = t.scales.data();
  t.view.biases = t.biases.data();
  if (layout == WeightLayout::cpu_packed) {
    t.packed.resize(packed_weight_bytes(p));
    pack_weight(t.view, t.packed.data());
    t.view = {p, t.packed.data(), nullptr, nullptr};
    t.view.params.layout = layout;
  }
  return t;
}

class Embedding : public testing::Test {
 protected:
  void TearDown() override { set_active_isa(detected_isa()); }
  std::mt19937 rng_{5};

  void check_forward(Table& table, DType dtype, uint32_t rank, DType lora_dtype) {
    const std::vector<int32_t> ids = {3, 0, 63, 3, 17, 40, 41, 5, 5, 5, 62, 1, 2, 9, 8, 7, 6, 30};
    Adapter adapter = random_adapter(rank, lora_dtype, rng_);
    adapter.view.a = adapter.a.data();
    adapter.view.b = adapter.b.data();
    std::vector<uint8_t> out(ids.size() * kDims * 4);
    std::vector<float> rows(kVocab * kDims);
    dequantize_rows(table.view, 0, kVocab, rows.data());
    lora_embedding_forward(
        static_cast<uint32_t>(ids.size()), dtype, ids.data(), table.view, adapter.view, out.data());
    for (size_t t = 0; t < ids.size(); ++t) {
      for (uint32_t d = 0; d < kDims; ++d) {
        double y = rows[ids[t] * kDims + d], size = std::fabs(y);
        for (uint32_t j = 0; j < rank; ++j) {
          const double term =
              0.5 * read_float(adapter.a.data(), lora_dtype, size_t{j} * kVocab + ids[t]) *
              read_float(adapter.b.data(), lora_dtype, size_t{d} * rank + j);
          y += term;
          size += std::fabs(term);
        }
        // A chain of rank + 2 products and sums, then one rounding to dtype.
        const double tolerance = (rank + 2) * 2 * kEps * size + rounding(dtype) * std::fabs(y);
        ASSERT_NEAR(read_float(out.data(), dtype, t * kDims + d), y, tolerance + 0x1p-25);
      }
    }
  }
};

TEST_F(Embedding, ForwardFromEveryFormatAndLayout) {
  for (uint32_t f = 0; f < 9; ++f) {
    const auto format = static_cast<WeightFormat>(f < 6 ? f : f - 3);
    const auto layout = f >= 6 ? WeightLayout::cpu_packed : WeightLayout::row_major;
    Table table = make_table(format, layout, rng_);
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
      if (!set_active_isa(isa)) continue;
      for (DType dtype : kDTypes) {
        check_forward(table, dtype, 0, DType::f32);
        for (DType lora : kDTypes) check_forward(table, dtype, 5 + f, lora);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Embedding, BackwardIsTheTransposeAndRepeatsAddUp) {
  const std::vector<int32_t> ids = {3, 0, 63, 3, 17, 3};
  const int threads = thread_count();
  WeightParams p;
  p.n = kVocab;
  p.k = kDims;
  std::normal_distribution<float> normal;
  for (DType dtype : kDTypes) {
    const uint32_t rank = 6;
    Adapter adapter = random_adapter(rank, DType::bf16, rng_);
    adapter.view.a = adapter.a.data();
    adapter.view.b = adapter.b.data();
    std::vector<uint8_t> dy(ids.size() * kDims * 4);
    for (size_t i = 0; i < ids.size() * kDims; ++i) write_float(dy.data(), dtype, i, normal(rng_));
    std::vector<float> da(rank * kVocab, 9.0f), db(kDims * rank, 9.0f);
    const auto run = [&] {
      lora_embedding_backward(
          static_cast<uint32_t>(ids.size()),
          dtype,
          ids.data(),
          p,
          adapter.view,
          dy.data(),
          da.data(),
          db.data());
    };
    run();
    const auto value = [&](const std::vector<uint8_t>& from, DType d, size_t i) {
      return double{read_float(from.data(), d, i)};
    };
    for (uint32_t j = 0; j < rank; ++j) {
      std::vector<double> want(kVocab), size(kVocab);
      for (size_t t = 0; t < ids.size(); ++t) {
        for (uint32_t d = 0; d < kDims; ++d) {
          const double term = 0.5 * value(adapter.b, DType::bf16, size_t{d} * rank + j) *
                              value(dy, dtype, t * kDims + d);
          want[ids[t]] += term;
          size[ids[t]] += std::fabs(term);
        }
      }
      for (uint32_t v = 0; v < kVocab; ++v) {
        const double tolerance = (kDims + ids.size() + 2) * 2 * kEps * size[v];
        ASSERT_NEAR(da[j * kVocab + v], want[v], tolerance);
      }
      for (uint32_t d = 0; d < kDims; ++d) {
        double sum = 0, all = 0;
        for (size_t t = 0; t < ids.size(); ++t) {
          const double term = 0.5 * value(dy, dtype, t * kDims + d) *
                              value(adapter.a, DType::bf16, size_t{j} * kVocab + ids[t]);
          sum += term;
          all += std::fabs(term);
        }
        ASSERT_NEAR(db[d * rank + j], sum, (ids.size() + 2) * 2 * kEps * all);
      }
    }
    const std::vector<float> first_da = da, first_db = db;
    for (int n : {1, 3}) {
      set_thread_count(n);
      run();
      EXPECT_EQ(da, first_da);
      EXPECT_EQ(db, first_db);
    }
    set_thread_count(threads);
  }
}

}  // namespace
}  // namespace metal_lora::cpu
