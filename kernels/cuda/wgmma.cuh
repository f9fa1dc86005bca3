// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Hopper's matrix unit, barriers and copy engine, one PTX instruction a function: wgmma with its
// shared-memory descriptors, mbarrier, cp.async.bulk.tensor with multicast, setmaxnreg and
// programmatic dependent launch. Every function needs sm_90a.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device.cuh"

// A file that CMake compiles for other architectures, too, would hold empty kernels for Hopper.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma.cuh needs sm_90a: name the file that includes it *_sm90.cu"
#endif

namespace metal_lora::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// After the inits: the copy engine and the other blocks of the cluster see them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives at the barrier at the same address of block `rank` of the cluster. Orders no ordinary
/// accesses between blocks (release.cluster would: a membar.gpu in the main loop, half the speed).
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
/// True for one lane of a whole warp. Unlike a comparison of threadIdx it tells the compiler that
/// only one lane goes on, so that what the copy engine wants in uniform registers gets there without
/// a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected != 0;
}
/// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait_again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra wait_over;\n"
      "bra wait_again;\n"
      "wait_over:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Threads of one warpgroup; id 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters, registers, dependent launches ----

/// All threads of the cluster. Orders what they wrote to each other's shared memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/// The same without the order, which costs a membar.gpu.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
/// Until the kernels before this one are over and their writes are visible.
__device__ __forceinline__ void dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
/// The next kernel may take the multiprocessors that this one leaves.
__device__ __forceinline__ void dependents_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- the copy engine ----

__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// A box whose first element is (column, row) to shared memory; elements outside come as zeros.
__device__ __forceinline__ void tensor_load(
    uint32_t shared, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map),
      "r"(barrier),
      "r"(column),
      "r"(row)
      : "memory");
}
/// The same of a map of blocks of 64 columns (TensorMapRequest::box_blocks).
__device__ __forceinline__ void tensor_load_blocks(
    uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint32_t row, uint32_t block) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(map),
      "r"(barrier),
      "r"(0),
      "r"(row),
      "r"(block)
      : "memory");
}
/// `bytes` (a multiple of 16) that lie in one piece, both addresses aligned to 16.
__device__ __forceinline__ void bulk_load(
    uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(from),
      "r"(bytes),
      "r"(barrier)
      : "memory");
}
/// The same to L2 only.
__device__ __forceinline__ void bulk_prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
/// A box of a matrix to the same place in each block of the cluster whose bit is set.
__device__ __forceinline__ void tensor_load_multicast(
    uint32_t shared,
    const CUtensorMap* map,
    uint32_t barrier,
    int column,
    int row,
    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map),
      "r"(barrier),
      "r"(column),
      "r"(row),
      "h"(blocks)
      : "memory");
}
/// The same to L2 only: harmless whoever still writes it, since L2 is what all see.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map),
               "r"(column),
               "r"(row)
               : "memory");
}
/// A box from shared memory; elements outside the tensor are not written.
__device__ __forceinline__ void tensor_store(
    const CUtensorMap* map, uint32_t shared, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(shared),
      "r"(column),
      "r"(row)
      : "memory");
}
/// Until all but kPending of this thread's stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Between ordinary writes of shared memory and the copy engine's reads of them.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Between ordinary accesses of device memory and the copy engine's, on both sides of a flag.
__device__ __forceinline__ void async_proxy_fence_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void flag_add_release(uint32_t* flag, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t flag_load_acquire(const uint32_t* flag) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}

/// Four 8x8 matrices of 16-bit elements; lanes 8i … 8i+7 hold the row addresses of matrix i.
__device__ __forceinline__ void store_matrix_x4(
    uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(a),
               "r"(b),
               "r"(c),
               "r"(d)
               : "memory");
}

/// The same, from shared memory.
__device__ __forceinline__ void load_matrix_x4(uint32_t shared, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared)
               : "memory");
}

/// 16 bytes to the same address of block `rank` of the cluster.
__device__ __forceinline__ void store_remote(uint32_t shared, uint32_t rank, const float* v) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n}" ::"r"(shared),
      "r"(rank),
      "f"(v[0]),
      "f"(v[1]),
      "f"(v[2]),
      "f"(v[3])
      : "memory");
}
/// 16 bytes from the same address of block `rank` of the cluster.
__device__ __forceinline__ float4 load_remote(uint32_t shared, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared), "r"(rank)
      : "memory");
  return v;
}
__device__ __forceinline__ void store_shared2(uint32_t shared, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ float load_shared(uint32_t shared) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared) : "memory");
  return v;
}
__device__ __forceinline__ void add_shared(float* v, uint32_t shared) {
  float a, b, c, d;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
               : "r"(shared)
               : "memory");
  v[0] += a;
  v[1] += b;
  v[2] += c;
  v[3] += d;
}

// ---- wgmma ----

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps reads of the sums behind the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_sums_fence(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// An operand in shared memory with the 128-byte swizzle, its base aligned to 1024 bytes (plus
/// the offset along k). K-major rows of 64 elements: groups of 8 rows lie 1024 bytes apart
/// (stride); `leading` is not used. MN-major rows of 64 elements along n: groups of 8 along k lie
/// 1024 bytes apart (stride), blocks of 64 along n `leading` bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading) {
  constexpr uint64_t kStride = 1024 >> 4;
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return (uint64_t{(shared & 0x3ffff) >> 4}) | (uint64_t{leading >> 4} << 16) | (kStride << 32) |
         kSwizzle128;
}

/// An MN-major operand of 8 columns, rows of 16 bytes one after the other, not swizzled. Columns 8
/// and on are the same again.
__device__ __forceinline__ uint64_t wgmma_rows_descriptor(uint32_t shared) {
  return (uint64_t{(shared & 0x3ffff) >> 4}) | (uint64_t{128 >> 4} << 16);
}
/// An MN-major operand of one box of kColumns (16, 32 or 64) that is swizzled over its rows' bytes.
template <uint32_t kColumns>
__device__ __forceinline__ uint64_t wgmma_box_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle = kColumns == 64 ? 1 : kColumns == 32 ? 2 : 3;
  return (uint64_t{(shared & 0x3ffff) >> 4}) | (uint64_t{kColumns} << 32) | (kSwizzle << 62);
}

#define METAL_LORA_F8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define METAL_LORA_F32(i) \
  METAL_LORA_F8(i), METAL_LORA_F8(i + 8), METAL_LORA_F8(i + 16), METAL_LORA_F8(i + 24)
#define METAL_LORA_F24(i) METAL_LORA_F8(i), METAL_LORA_F8(i + 8), METAL_LORA_F8(i + 16)
#define METAL_LORA_F16(i) METAL_LORA_F8(i), METAL_LORA_F8(i + 8)
#define METAL_LORA_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define METAL_LORA_D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define METAL_LORA_D32                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define METAL_LORA_D64                                                                    \
  METAL_LORA_D32                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define METAL_LORA_D88                                                        \
  METAL_LORA_D64                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81," \
  "%82,%83,%84,%85,%86,%87"
#define METAL_LORA_D96                                                        \
  METAL_LORA_D64                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81," \
  "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define METAL_LORA_D128                                                                   \
  METAL_LORA_D64                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84," \
  "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
  "%122,%123,%124,%125,%126,%127"
// a, b, accumulate, transposed a, transposed b are operands first … first + 4.
#define METAL_LORA_WGMMA(n, type, list, a, b, p, s, t, ...)                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p                                         \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list "}, %" #a \
               ", %" #b ", add, 1, 1, %" #s ", %" #t ";\n}"                                        \
               : __VA_ARGS__                                                                       \
               : "l"(left), "l"(right), "r"(accumulate), "n"(kLeftMajorM), "n"(kRightMajorN))

/// d [64, 2·kCount] (+)= left [64, 16] · right, one instruction for the four warps: d's
/// fragment is rows lane/4 and lane/4 + 8 of each warp's 16, columns 8j + 2·(lane%4) + {0, 1}.
/// kLeftMajorM, kRightMajorN: 1 where the operand's rows run along m or n instead of k.
template <typename T, int kRightMajorN, int kLeftMajorM = 0, int kCount>
__device__ __forceinline__ void wgmma(
    float (&d)[kCount], uint64_t left, uint64_t right, int accumulate) {
  static_assert(
      kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64 || kCount == 88 || kCount == 96 ||
      kCount == 128);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kCount == 8) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(16, "bf16", METAL_LORA_D8, 8, 9, 10, 11, 12, METAL_LORA_F8(0));
    } else {
      METAL_LORA_WGMMA(16, "f16", METAL_LORA_D8, 8, 9, 10, 11, 12, METAL_LORA_F8(0));
    }
  } else if constexpr (kCount == 16) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(32, "bf16", METAL_LORA_D16, 16, 17, 18, 19, 20, METAL_LORA_F16(0));
    } else {
      METAL_LORA_WGMMA(32, "f16", METAL_LORA_D16, 16, 17, 18, 19, 20, METAL_LORA_F16(0));
    }
  } else if constexpr (kCount == 32) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(64, "bf16", METAL_LORA_D32, 32, 33, 34, 35, 36, METAL_LORA_F32(0));
    } else {
      METAL_LORA_WGMMA(64, "f16", METAL_LORA_D32, 32, 33, 34, 35, 36, METAL_LORA_F32(0));
    }
  } else if constexpr (kCount == 64) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(
          128, "bf16", METAL_LORA_D64, 64, 65, 66, 67, 68, METAL_LORA_F32(0), METAL_LORA_F32(32));
    } else {
      METAL_LORA_WGMMA(
          128, "f16", METAL_LORA_D64, 64, 65, 66, 67, 68, METAL_LORA_F32(0), METAL_LORA_F32(32));
    }
  } else if constexpr (kCount == 88) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(
          176,
          "bf16",
          METAL_LORA_D88,
          88,
          89,
          90,
          91,
          92,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F24(64));
    } else {
      METAL_LORA_WGMMA(
          176,
          "f16",
          METAL_LORA_D88,
          88,
          89,
          90,
          91,
          92,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F24(64));
    }
  } else if constexpr (kCount == 96) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(
          192,
          "bf16",
          METAL_LORA_D96,
          96,
          97,
          98,
          99,
          100,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F32(64));
    } else {
      METAL_LORA_WGMMA(
          192,
          "f16",
          METAL_LORA_D96,
          96,
          97,
          98,
          99,
          100,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F32(64));
    }
  } else {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA(
          256,
          "bf16",
          METAL_LORA_D128,
          128,
          129,
          130,
          131,
          132,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F32(64),
          METAL_LORA_F32(96));
    } else {
      METAL_LORA_WGMMA(
          256,
          "f16",
          METAL_LORA_D128,
          128,
          129,
          130,
          131,
          132,
          METAL_LORA_F32(0),
          METAL_LORA_F32(32),
          METAL_LORA_F32(64),
          METAL_LORA_F32(96));
    }
  }
}

#undef METAL_LORA_WGMMA
#undef METAL_LORA_D128
#undef METAL_LORA_D96
#undef METAL_LORA_D88
#undef METAL_LORA_D64
#undef METAL_LORA_D32
#undef METAL_LORA_D16
#undef METAL_LORA_D8
#undef METAL_LORA_F32
#undef METAL_LORA_F24
#undef METAL_LORA_F16
#undef METAL_LORA_F8

}  // namespace metal_lora::cuda::sm90
