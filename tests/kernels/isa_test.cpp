// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/isa.h"

#include <gtest/gtest.h>

#include "kernels/cpu/gemm_kernels.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

constexpr cpu::Isa kAll[] = {
    cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::avx512_bf16, cpu::Isa::neon};

TEST(Isa, NamesGoBothWays) {
  for (cpu::Isa isa : kAll) EXPECT_EQ(cpu::isa_from_name(cpu::isa_name(isa)), isa);
  EXPECT_FALSE(cpu::isa_from_name("sse9"));
  EXPECT_FALSE(cpu::isa_from_name(""));
}

TEST(Isa, ScalarAndTheDetectedOneRunHere) {
  EXPECT_TRUE(cpu::isa_supported(cpu::Isa::scalar));
  EXPECT_TRUE(cpu::isa_supported(cpu::detected_isa()));
  EXPECT_TRUE(cpu::isa_supported(cpu::active_isa()));
}

#if defined(__x86_64__) && defined(__GNUC__)
TEST(Isa, AgreesWithTheCompilersOwnDetection) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  EXPECT_EQ(cpu::isa_supported(cpu::Isa::avx2), avx2);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  EXPECT_EQ(cpu::isa_supported(cpu::Isa::avx512), avx2 && avx512);
}
#endif

TEST(Isa, PinsOnlyWhatTheMachineHas) {
  const KernelSettings restore;
  for (cpu::Isa isa : kAll) {
    const cpu::Isa before = cpu::active_isa();
    EXPECT_EQ(cpu::set_active_isa(isa), cpu::isa_supported(isa));
    EXPECT_EQ(cpu::active_isa(), cpu::isa_supported(isa) ? isa : before);
  }
}

TEST(Isa, EverySupportedSetHasItsOwnProductKernels) {
  const KernelSettings restore;
  std::vector<const cpu::GemmKernels*> seen;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    const cpu::Compute compute = cpu::has_bf16_multiply() ? cpu::Compute::bf16 : cpu::Compute::f32;
    const cpu::GemmKernels* kernels = &cpu::gemm_kernels(compute);
    EXPECT_EQ(std::count(seen.begin(), seen.end(), kernels), 0) << cpu::isa_name(isa);
    seen.push_back(kernels);
  }
}

}  // namespace
}  // namespace metal_lora::test
