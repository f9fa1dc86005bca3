// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/result.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

enum class FileKind {
  unknown,
  safetensors,     ///< one .safetensors file
  gguf,            ///< one .gguf file, model or adapter
  model_folder,    ///< Hugging Face or MLX: config.json + *.safetensors
  mlx_adapter,     ///< adapter_config.json + adapters.safetensors
  peft_adapter,    ///< adapter_config.json + adapter_model.safetensors
  dataset_folder,  ///< train.jsonl, valid.jsonl or test.jsonl
};
std::string_view file_kind_name(FileKind kind);

struct DatasetPart {
  std::string file;  ///< "train.jsonl"
  uint64_t rows = 0;
};

struct FileSummary {
  FileKind kind = FileKind::unknown;
  std::string path;
  /// GGUF's general.architecture or config.json's model_type; empty when there is none.
  std::string architecture;
  std::vector<TensorInfo> tensors;  ///< name, type, shape, nbytes; data stays mapped
  uint64_t tensor_bytes = 0;        ///< sum of the tensors' bytes
  uint64_t element_count = 0;       ///< as stored: a packed uint32 counts as one
  std::vector<DatasetPart> dataset;
};

/// What a path holds, by content for files and by the names of its files for folders, with all its
/// tensors validated. not_found when it does not exist; a readable path of no known kind is
/// `unknown`, not a failure; a file of a known kind that is malformed is the reader's failure.
Result<FileSummary> inspect_path(const std::string& path);

}  // namespace metal_lora::io
