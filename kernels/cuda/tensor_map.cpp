// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT

#include "kernels/cuda/tensor_map.h"

#include <cudaTypedefs.h>

namespace metal_lora::cuda {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check(
      cudaGetDriverEntryPointByVersion(
          "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
      "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) {
    throw CudaError("[cuda] the driver has no cuTensorMapEncodeTiled; it must be 12.0 or newer");
  }
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapRequest& request) {
  static const Encode encode = find_encode();
  CUtensorMap map;
  const bool blocks = request.box_blocks > 0;
  const cuuint64_t size[3] = {
      blocks ? 64 : request.columns, request.rows, blocks ? request.columns / 64 : 1};
  const cuuint64_t stride_bytes[2] = {request.stride * 2, 128};
  const cuuint32_t box[3] = {
      request.box_columns, request.box_rows, blocks ? request.box_blocks : 1};
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult status = encode(
      &map,
      request.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      blocks ? 3 : 2,
      const_cast<void*>(request.data),
      size,
      stride_bytes,
      box,
      step,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      request.box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
      : request.box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(
        "[cuda] cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)) +
        " for " + std::to_string(request.rows) + " x " + std::to_string(request.columns) +
        ", stride " + std::to_string(request.stride));
  }
  return map;
}

}  // namespace metal_lora::cuda
