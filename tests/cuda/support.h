// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Device buffers and a context for tests of CUDA kernels. Outputs start out poisoned.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/context.h"

namespace metal_lora::test {

/// First line of every test: the kernels need a device, and CI has none.
#define METAL_LORA_NEEDS_GPU()                                                   \
  if (!::metal_lora::test::has_gpu()) {                                          \
    GTEST_SKIP() << "no NVIDIA GPU here: CUDA kernels are compiled but not run"; \
  }

inline bool has_gpu() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!found) cudaGetLastError();
  return found;
}

class DeviceBuffer {
 public:
  /// Every byte 0xff: NaN in each storage type.
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    cuda::check(cudaMalloc(&data_, bytes), "cudaMalloc");
    cuda::check(cudaMemset(data_, 0xff, bytes), "cudaMemset");
  }
  DeviceBuffer(const void* host, size_t bytes) : DeviceBuffer(bytes) { upload(host, bytes); }
  template <typename T>
  explicit DeviceBuffer(const std::vector<T>& host)
      : DeviceBuffer(host.data(), host.size() * sizeof(T)) {}
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void upload(const void* host, size_t bytes) {
    if (bytes > 0) cuda::check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "upload");
  }
  void poison(int byte = 0xff) {
    if (bytes_ > 0) cuda::check(cudaMemset(data_, byte, bytes_), "cudaMemset");
  }
  template <typename T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    if (bytes_ > 0) {
      cuda::check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "download");
    }
    return host;
  }
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Poisoned memory for each call; kept until reset().
class TestScratch final : public cuda::Scratch {
 public:
  void* take(size_t bytes) override {
    buffers_.push_back(std::make_unique<DeviceBuffer>(bytes));
    return buffers_.back()->get();
  }
  void reset() { buffers_.clear(); }

 private:
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

/// A stream, scratch and what the device is. finish() waits and reports what went wrong.
class TestDevice {
 public:
  TestDevice() {
    cudaDeviceProp properties;
    cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    cuda::check(cudaStreamCreate(&context_.stream), "cudaStreamCreate");
    context_.scratch = &scratch_;
    context_.multiprocessors = properties.multiProcessorCount;
    context_.capability = 10 * properties.major + properties.minor;
    // What other cards would run, on this one: docs/cuda.md.
    if (const char* as = std::getenv("METAL_LORA_TEST_CAPABILITY")) {
      context_.capability = std::atoi(as);
    }
    counters_.poison(0);
    context_.counters = counters_.get<uint32_t>();
  }
  ~TestDevice() { cudaStreamDestroy(context_.stream); }
  TestDevice(const TestDevice&) = delete;
  TestDevice& operator=(const TestDevice&) = delete;

  const cuda::Context& context() const { return context_; }
  void finish() {
    cuda::check(cudaStreamSynchronize(context_.stream), "cudaStreamSynchronize");
    scratch_.reset();
  }

 private:
  TestScratch scratch_;
  DeviceBuffer counters_{METAL_LORA_CUDA_COUNTERS * 4};
  cuda::Context context_;
};

}  // namespace metal_lora::test
