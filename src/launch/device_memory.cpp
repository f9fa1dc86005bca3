// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/device_memory.h"

#include "metal_lora/error.h"

#ifndef METAL_LORA_CUDA

namespace metal_lora {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::unsupported, "[device memory] this build has no CUDA kernels");
}

}  // namespace

DeviceMemoryStats device_memory_stats() {
  return {};
}
void reset_device_memory_peak() {}
void release_cached_device_memory() {}
std::shared_ptr<void> allocate_device(size_t) {
  refuse();
}
void upload_to(void*, const void*, size_t) {
  refuse();
}
void allocate_data(mlx::core::array&) {
  refuse();
}
mlx::core::array upload(const void*, mlx::core::Shape, mlx::core::Dtype) {
  refuse();
}
void* device_pointer(const mlx::core::array&) {
  refuse();
}
bool on_host(const mlx::core::array&) {
  return true;
}
void download(const mlx::core::array&, void*) {
  refuse();
}

}  // namespace metal_lora

#else

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include <cuda_runtime.h>
#include <fmt/format.h>
#include <mlx/backend/cuda/allocator.h>
#include <mlx/backend/cuda/utils.h>

#include "kernels/cuda/context.h"
#include "src/launch/mlx_cuda.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

/// What MLX takes for one of its own buffers, and the memory that it came with. MLX moves a
/// buffer that the host reads to managed memory, frees ours (cudaFreeAsync) and sets data and
/// device.
struct Block : mx::cu::CudaBuffer {
  void* memory = nullptr;
  size_t capacity = 0;
};

/// Lets this thread allocate while it captures a stream.
class WhileCapturing {
 public:
  WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  WhileCapturing(const WhileCapturing&) = delete;
  WhileCapturing& operator=(const WhileCapturing&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Sizes are rounded up so that a step of another length finds the last one's blocks: to a quarter
/// of the power of two below for small ones, to an eighth (12.5 % at most) from 1 MiB.
size_t capacity_for(size_t bytes) {
  constexpr size_t kLeast = 512, kLarge = 1 << 20;
  if (bytes <= kLeast) return kLeast;
  const size_t step = std::bit_floor(bytes) / (bytes < kLarge ? 4 : 8);
  return (bytes + step - 1) / step * step;
}

/// Blocks come from the device's stream-ordered pool, because MLX frees what it moves with
/// cudaFreeAsync. A freed block is ready for any stream: it comes back when the device is done.
class Pool {
 public:
  Block* take(size_t bytes) {
    auto* block = new Block();
    block->size = bytes;
    block->device = -1;
    if (bytes == 0) return block;
    try {
      std::lock_guard lock(mutex_);
      block->capacity = capacity_for(bytes);
      block->memory = reuse(block->capacity);
      if (block->memory == nullptr) block->memory = allocate(block->capacity);
      active_ += block->capacity;
      peak_ = std::max(peak_, active_);
    } catch (...) {
      delete block;
      throw;
    }
    block->data = block->memory;
    block->device = kDevice;
    return block;
  }

  void give(Block* block) noexcept {
    if (block->capacity > 0) {
      const bool moved = block->device != kDevice;
      if (moved) cudaFree(block->data);
      std::lock_guard lock(mutex_);
      active_ -= block->capacity;
      if (!moved) {
        free_[block->capacity].push_back(block->memory);
        cached_ += block->capacity;
      }
    }
    delete block;
  }

  DeviceMemoryStats stats() {
    std::lock_guard lock(mutex_);
    start();
    return {active_, peak_, cached_, total_};
  }
  void reset_peak() {
    std::lock_guard lock(mutex_);
    peak_ = active_;
  }
  void release() {
    std::lock_guard lock(mutex_);
    release_cached();
  }

  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    {
      std::lock_guard lock(mutex_);
      start();
    }
    WhileCapturing allowed;  // a launch may be the first to need its weight
    cuda::check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
    cuda::check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

 private:
  static constexpr int kDevice = 0;

  void start() {
    if (stream_ != nullptr) return;
    cuda::check(cudaSetDevice(kDevice), "cudaSetDevice");
    WhileCapturing allowed;
    size_t free = 0;
    cuda::check(cudaMemGetInfo(&free, &total_), "cudaMemGetInfo");
    cuda::check(cudaDeviceGetDefaultMemPool(&pool_, kDevice), "cudaDeviceGetDefaultMemPool");
    uint64_t keep = ~uint64_t{0};
    cuda::check(
        cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep),
        "cudaMemPoolSetAttribute");
    cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }

  void* reuse(size_t capacity) {
    const auto found = free_.find(capacity);
    if (found == free_.end() || found->second.empty()) return nullptr;
    void* memory = found->second.back();
    found->second.pop_back();
    cached_ -= capacity;
    return memory;
  }

  void* allocate(size_t capacity) {
    start();
    WhileCapturing allowed;
    void* memory = nullptr;
    auto status = cudaMallocAsync(&memory, capacity, stream_);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      release_cached();
      status = cudaMallocAsync(&memory, capacity, stream_);
    }
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw Error(
          ErrorCode::does_not_fit,
          fmt::format(
              "[device memory] {} bytes do not fit: {} of {} are in use",
              capacity,
              active_,
              total_),
          "fewer tokens a step, gradient checkpointing or a quantised base need less");
    }
    cuda::check(status, "cudaMallocAsync");
    // From here on the memory is any stream's.
    cuda::check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return memory;
  }

  void release_cached() {
    if (stream_ == nullptr) return;
    WhileCapturing allowed;
    for (auto& [capacity, blocks] : free_) {
      for (void* memory : blocks) cudaFreeAsync(memory, stream_);
    }
    free_.clear();
    cached_ = 0;
    cudaStreamSynchronize(stream_);
    cudaMemPoolTrimTo(pool_, 0);
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<void*> > free_;
  size_t active_ = 0, peak_ = 0, cached_ = 0, total_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
};

/// Never destroyed: arrays of static lifetime give their memory back after main().
Pool& pool() {
  static auto* pool = new Pool();
  return *pool;
}

const mx::cu::CudaBuffer& buffer_of(const mx::array& a) {
  return *static_cast<const mx::cu::CudaBuffer*>(const_cast<mx::array&>(a).buffer().ptr());
}

}  // namespace

DeviceMemoryStats device_memory_stats() {
  return mlx_cuda::availability().available ? pool().stats() : DeviceMemoryStats{};
}

void reset_device_memory_peak() {
  pool().reset_peak();
}

void release_cached_device_memory() {
  pool().release();
}

std::shared_ptr<void> allocate_device(size_t bytes) {
  auto* block = pool().take(bytes);
  return {block->memory, [block](void*) { pool().give(block); }};
}

void upload_to(void* device, const void* host, size_t bytes) {
  pool().copy(device, host, bytes, cudaMemcpyHostToDevice);
}

void allocate_data(mx::array& a) {
  mx::cu::CudaBuffer* block = pool().take(a.nbytes());
  const auto give_back = [](mx::allocator::Buffer buffer) {
    pool().give(static_cast<Block*>(static_cast<mx::cu::CudaBuffer*>(buffer.ptr())));
  };
  a.set_data(mx::allocator::Data(mx::allocator::Buffer(block), give_back));
}

mx::array upload(const void* host, mx::Shape shape, mx::Dtype dtype) {
  mx::array a(std::move(shape), dtype, nullptr, {});
  allocate_data(a);
  a.set_status(mx::array::Status::available);
  upload_to(device_pointer(a), host, a.nbytes());
  return a;
}

void* device_pointer(const mx::array& a) {
  return mx::gpu_ptr<void>(a);
}

bool on_host(const mx::array& a) {
  return !mlx_cuda::mlx_has_cuda() || buffer_of(a).device < 0;
}

void download(const mx::array& a, void* host) {
  if (on_host(a)) {
    std::memcpy(host, a.data<void>(), a.nbytes());
    return;
  }
  pool().copy(host, device_pointer(a), a.nbytes(), cudaMemcpyDeviceToHost);
}

}  // namespace metal_lora

#endif
