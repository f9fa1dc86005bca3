// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How CUDA launches live inside MLX's graphs. Skips itself on other backends.
#include <gtest/gtest.h>

#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "src/launch/device_memory.h"
#include "src/launch/launch.h"
#include "src/launch/mlx_cuda.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

class CudaLaunch : public ::testing::Test {
 protected:
  void SetUp() override {
    if (active_backend() != Backend::cuda) {
      const auto& cuda = mlx_cuda::availability();
      GTEST_SKIP() << "the backend is " << backend_name(active_backend())
                   << (cuda.available ? "" : ": cuda cannot run here: " + cuda.why);
    }
  }
};

mx::array sums_of_squares(const mx::array& a) {
  return mx::sum(mx::square(mx::astype(a, mx::float32)));
}

TEST_F(CudaLaunch, UploadedBytesComeBack) {
  std::vector<int32_t> values(4097);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i * 2654435761u);
  const auto a = upload(values.data(), {4097}, mx::int32);
  EXPECT_FALSE(on_host(a));
  std::vector<int32_t> back(values.size());
  download(a, back.data());
  EXPECT_EQ(back, values);
  // MLX reads it as any other array, and moves it when the host asks.
  EXPECT_EQ(mx::sum(mx::equal(a, mx::add(a, mx::array(0)))).item<int>(), 4097);
  EXPECT_EQ(a.data<int32_t>()[4096], values[4096]);
  EXPECT_TRUE(on_host(a));
}

TEST_F(CudaLaunch, MemoryComesBackToThePool) {
  const auto weight = mx::ones({1024});
  const auto run = [&] {
    auto y = normal({512, 1024}, 1);
    for (int i = 0; i < 300; ++i) y = ops::rms_norm(y, weight, 1e-5f);
    return sums_of_squares(y).item<float>();
  };
  const float first = run();
  mx::synchronize(backend_stream(Backend::cuda));
  const size_t active = device_memory_stats().active_bytes;
  for (int i = 0; i < 5; ++i) EXPECT_EQ(run(), first);
  mx::synchronize(backend_stream(Backend::cuda));
  const auto stats = device_memory_stats();
  // Counters of unfinished launches stay (16 KiB each, at most some hundreds); arrays do not: one
  // run that kept its own would add 600 MiB.
  EXPECT_LE(stats.active_bytes, active + (16 << 20));
  EXPECT_GE(stats.peak_bytes, 2u * 512 * 1024 * 4);
  release_cached_device_memory();
  EXPECT_EQ(device_memory_stats().cached_bytes, 0u);
  EXPECT_EQ(run(), first);
}

TEST_F(CudaLaunch, AWeightThatIsDroppedStaysUntilTheDeviceIsDone) {
  const auto x = normal({64, 256}, 1);
  const auto w = normal({512, 256}, 2);
  const auto expected = mx::matmul(x, mx::transpose(w));
  for (int i = 0; i < 20; ++i) {
    auto weight = std::make_optional(Weight::dense(w));
    auto y = ops::lora_linear(x, LoraLinear{*weight, std::nullopt, std::nullopt});
    weight.reset();
    mx::async_eval({y});
    // Would be given the weight's block, had it been returned.
    auto other = Weight::dense(mx::full({512, 256}, static_cast<float>(i)));
    expect_close(y, expected, 1e-4, "y");
  }
}

TEST_F(CudaLaunch, AnErrorLeavesTheStreamUsable) {
  Launch bad{.kernel = "bad", .inputs = {mx::ones({4})}, .outputs = {{{1024}, mx::float32}}};
  bad.cuda = [](const cuda::Context&, const KernelArgs&) {
    throw std::invalid_argument("[bad] x must be good but is bad");
  };
  auto failed = launch(bad)[0];
  EXPECT_THROW(failed.eval(), Error);
  const auto y = ops::rms_norm(mx::ones({2, 64}), mx::ones({64}), 0.0f);
  EXPECT_EQ(mx::sum(y).item<float>(), 128.0f);
}

TEST_F(CudaLaunch, ACacheThatTheCallerLetsGoOfIsWrittenInPlace) {
  const auto q = normal({1, 4, 64}, 1), k = normal({1, 2, 64}, 2);
  auto cache = mx::zeros({3, 2, 128, 2, 64});
  cache.eval();
  std::vector<const void*> buffers;
  for (int step = 0; step < 4; ++step) {
    auto out = q;
    for (int layer = 0; layer < 3; ++layer) {
      auto [y, next] = ops::cached_attention(out, k, k, cache, layer, mx::array(step), 0.1f);
      cache = next;
      out = y;
    }
    mx::eval(out, cache);
    buffers.push_back(device_pointer(cache));
  }
  EXPECT_EQ(buffers[0], buffers[3]);
  // Every layer holds its four rows twice (k as v).
  const float row = sums_of_squares(k).item<float>();
  EXPECT_NEAR(sums_of_squares(cache).item<float>(), 3 * 2 * 4 * row, 1e-3f * row);
}

TEST_F(CudaLaunch, ViewsAreReadByTheirStrides) {
  const auto wide = normal({65, 130}, 3);
  const auto weight = mx::ones({65});
  for (const auto& view :
       {mx::transpose(wide), mx::slice(mx::transpose(wide), {0, 0}, {130, 65}, {3, 1})}) {
    expect_close(
        ops::rms_norm(view, weight, 1e-5f),
        ops::reference::rms_norm(view, weight, 1e-5f),
        1e-6,
        "y");
  }
}

}  // namespace
}  // namespace metal_lora::testing
