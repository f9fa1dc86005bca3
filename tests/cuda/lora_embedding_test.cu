// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Embeddings on CUDA against the definition in f64. Forward: a chain of rank + 2 products and sums
// in f32, then one rounding. Backward: dA sums dims products, then tokens; a B of another type than
// dy is rounded to it, and u and v are split in two bf16 at 2^-16; matrix units may truncate each
// term of a sum at 2^-23.
#include <gtest/gtest.h>

#include "kernels/cuda/lora_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

struct Adapter {
  Adapter(std::mt19937& rng, DType dtype, uint32_t rank, uint32_t vocab, uint32_t dims)
      : a(random_array(rng, dtype, size_t{rank} * vocab)),
        b(random_array(rng, dtype, size_t{dims} * rank)),
        a_in(a.bytes),
        b_in(b.bytes) {
    view.params.rank = rank;
    view.params.scale = 0.5f;
    view.params.dtype = dtype;
    view.a = a_in.get();
    view.b = b_in.get();
  }
  Array a, b;
  DeviceBuffer a_in, b_in;
  cuda::LoraView view;
};

struct Table {
  WeightFormat format;
  DType scales = DType::f32;
  bool double_quant = false;
};

void check_forward(const Table& table, uint32_t dims, DType dtype, uint32_t rank, DType lora) {
  SCOPED_TRACE(
      "format " + std::to_string(static_cast<uint32_t>(table.format)) + " dims " +
      std::to_string(dims) + " rank " + std::to_string(rank) + " " + name_of(dtype));
  constexpr uint32_t kVocab = 64;
  std::mt19937 rng(dims + rank);
  std::vector<int32_t> ids = {3, 0, 63, 3, 17, 40, 41, 5, 5, 5, 62, 1, 2, 9, 8, 7, 6, 30};
  const Weight w = random_weight(
      rng,
      table.format,
      kVocab,
      dims,
      table.format == WeightFormat::nf4 ? 64 : 32,
      table.scales,
      WeightLayout::row_major,
      table.double_quant);
  const DeviceBuffer data(w.data.bytes), scales(w.scales.bytes), biases(w.biases.bytes);
  const Adapter adapter(rng, lora, rank, kVocab, dims);
  const DeviceBuffer ids_in(ids);
  TestDevice device;
  DeviceBuffer out(ids.size() * dims * (dtype == DType::f32 ? 4 : 2));
  cuda::lora_embedding_forward(
      device.context(),
      static_cast<uint32_t>(ids.size()),
      dtype,
      ids_in.get<int32_t>(),
      {w.params, data.get(), scales.get(), biases.get()},
      adapter.view,
      out.get());
  device.finish();
  const auto got = out.download<unsigned char>();
  for (size_t t = 0; t < ids.size(); ++t) {
    for (uint32_t d = 0; d < dims; ++d) {
      double y = w.values[size_t(ids[t]) * dims + d], size = std::fabs(y);
      for (uint32_t j = 0; j < rank; ++j) {
        const double term = 0.5 * adapter.a.values[size_t{j} * kVocab + ids[t]] *
                            adapter.b.values[size_t{d} * rank + j];
        y += term;
        size += std::fabs(term);
      }
      const double bound = (rank + 2) * 2 * 0x1p-24 * size + roundoff(dtype) * std::fabs(y);
      ASSERT_NEAR(stored_value(got.data(), dtype, t * dims + d), y, bound + 0x1p-25);
    }
  }
}

TEST(CudaLoraEmbedding, ForwardFromEveryFormat) {
  METAL_LORA_NEEDS_GPU();
  const Table tables[] = {
      {WeightFormat::f32},
      {WeightFormat::f16},
      {WeightFormat::bf16},
      {WeightFormat::int4, DType::f16},
      {WeightFormat::int8, DType::bf16},
      {WeightFormat::nf4},
      {WeightFormat::nf4, DType::f32, true}};
  for (const Table& table : tables) {
    for (DType dtype : kDTypes) {
      check_forward(table, 128, dtype, 0, DType::f32);
      for (DType lora : kDTypes) check_forward(table, 320, dtype, 5, lora);
      check_forward(table, 64, dtype, 17, dtype);
      if (HasFatalFailure()) return;
    }
  }
  for (uint32_t dims : {1u, 33u, 257u}) {
    check_forward({WeightFormat::f32}, dims, DType::bf16, 3, DType::f32);
    check_forward({WeightFormat::bf16}, dims, DType::bf16, 0, DType::f32);
  }
}

void check_backward(
    const std::vector<int32_t>& ids,
    uint32_t vocab,
    uint32_t dims,
    uint32_t rank,
    DType dtype,
    DType lora) {
  SCOPED_TRACE(
      std::to_string(ids.size()) + " tokens, dims " + std::to_string(dims) + " rank " +
      std::to_string(rank) + " " + name_of(dtype) + " adapter " + name_of(lora));
  std::mt19937 rng(dims + rank);
  const Adapter adapter(rng, lora, rank, vocab, dims);
  const size_t tokens = ids.size();
  const Array dy = random_array(rng, dtype, tokens * dims);
  const DeviceBuffer dy_in(dy.bytes), ids_in(ids);
  WeightParams p;
  p.n = vocab;
  p.k = dims;
  TestDevice device;
  DeviceBuffer da(size_t{rank} * vocab * 4), db(size_t{dims} * rank * 4);
  const auto run = [&] {
    da.poison();
    db.poison();
    cuda::lora_embedding_backward(
        device.context(),
        static_cast<uint32_t>(tokens),
        dtype,
        ids_in.get<int32_t>(),
        p,
        adapter.view,
        dy_in.get(),
        da.get<float>(),
        db.get<float>());
    device.finish();
    return std::make_pair(da.download<float>(), db.download<float>());
  };
  const auto first = run();
  const auto again = run();
  ASSERT_EQ(std::memcmp(first.first.data(), again.first.data(), da.bytes()), 0);
  ASSERT_EQ(std::memcmp(first.second.data(), again.second.data(), db.bytes()), 0);
  const double split = dtype == DType::f32 ? 0.0 : 0x1p-16;
  const double rounded = dtype != DType::f32 && lora != dtype ? roundoff(dtype) : 0.0;
  const double sum_e = (dims + static_cast<double>(tokens) + 8) * 0x1p-23;
  for (uint32_t j = 0; j < rank; ++j) {
    std::vector<double> want(vocab), size(vocab);
    for (size_t t = 0; t < tokens; ++t) {
      for (uint32_t d = 0; d < dims; ++d) {
        const double term = 0.5 * adapter.b.values[size_t{d} * rank + j] * dy.values[t * dims + d];
        want[ids[t]] += term;
        size[ids[t]] += std::fabs(term);
      }
    }
    for (uint32_t v = 0; v < vocab; ++v) {
      ASSERT_NEAR(first.first[size_t{j} * vocab + v], want[v], (sum_e + rounded) * size[v])
          << "dA " << j << ", " << v;
    }
    for (uint32_t d = 0; d < dims; ++d) {
      double sum = 0, all = 0;
      for (size_t t = 0; t < tokens; ++t) {
        const double term =
            0.5 * dy.values[t * dims + d] * adapter.a.values[size_t{j} * vocab + ids[t]];
        sum += term;
        all += std::fabs(term);
      }
      ASSERT_NEAR(first.second[size_t{d} * rank + j], sum, (sum_e + split) * all)
          << "dB " << d << ", " << j;
    }
  }
}

/// Small enough for compute-sanitizer's racecheck.
TEST(CudaLoraEmbedding, BackwardOfFewTokensAddsUp) {
  METAL_LORA_NEEDS_GPU();
  check_backward({3, 0, 20, 3, 17, 3}, 21, 72, 6, DType::bf16, DType::bf16);
}

TEST(CudaLoraEmbedding, BackwardIsTheTransposeAndRepeatsAddUp) {
  METAL_LORA_NEEDS_GPU();
  std::mt19937 rng(3);
  std::vector<int32_t> many(517);
  for (int32_t& id : many) id = static_cast<int32_t>(rng() % 97);
  for (DType dtype : kDTypes) {
    for (DType lora : kDTypes) {
      check_backward({3, 0, 63, 3, 17, 3}, 64, 128, 6, dtype, lora);
      check_backward(many, 101, 72, 16, dtype, lora);
    }
    check_backward(many, 97, 33, 200, dtype, dtype);
    check_backward({5}, 7, 1, 1, dtype, dtype);
    check_backward({}, 7, 8, 3, dtype, dtype);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace metal_lora::test
