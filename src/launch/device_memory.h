// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Device memory of the CUDA backend: one caching pool for outputs, scratch and weights. MLX's own
// allocator gives out managed memory, which pages through the host. Thread-safe. Without CUDA the
// statistics are zeros and the rest throws Error unsupported.
#pragma once

#include <cstddef>
#include <memory>

#include <mlx/array.h>

namespace metal_lora {

struct DeviceMemoryStats {
  size_t active_bytes = 0;  ///< handed out now: arrays, weights, scratch of unfinished launches
  size_t peak_bytes = 0;    ///< the largest active_bytes since the last reset
  size_t cached_bytes = 0;  ///< kept for reuse
  size_t total_bytes = 0;   ///< of the device
};
DeviceMemoryStats device_memory_stats();
void reset_device_memory_peak();
/// Gives what is cached back to the driver.
void release_cached_device_memory();

/// Uninitialised device memory, 256-byte aligned, for as long as a copy of the pointer lives. It is
/// handed out again at once after that: whatever a launch uses must be captured in Launch::cuda,
/// which MLX keeps until the device is done. Error does_not_fit where the device has no more.
std::shared_ptr<void> allocate_device(size_t bytes);

/// Copies host memory to allocated device memory, and waits.
void upload_to(void* device, const void* host, size_t bytes);

/// Gives an array that has no data yet uninitialised memory of the pool.
void allocate_data(mlx::core::array& a);
/// An evaluated array in device memory, copied there from the host. MLX may later move it to
/// managed memory (data<T>() on the host does), so ask device_pointer() at each launch.
mlx::core::array upload(const void* host, mlx::core::Shape shape, mlx::core::Dtype dtype);
/// Where an evaluated array's values lie, whichever memory that is. Moves nothing.
void* device_pointer(const mlx::core::array& a);
/// Whether the host reads an evaluated array without a copy from the device.
bool on_host(const mlx::core::array& a);
/// Copies an evaluated, row-contiguous array to the host and leaves it where it is (data<T>() would
/// move it). Waits for what was launched on `a`'s behalf: eval it first.
void download(const mlx::core::array& a, void* host);

}  // namespace metal_lora
