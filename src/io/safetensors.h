// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/mapped_file.h"
#include "src/io/result.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

/// Bounds on what a header may ask for. Anything beyond is refused before memory is spent on it.
inline constexpr uint64_t kSafetensorsMaxHeaderBytes = uint64_t{16} << 20;
inline constexpr uint64_t kSafetensorsMaxTensors = 131072;
inline constexpr uint64_t kSafetensorsMaxDims = 8;
/// Of `__metadata__`: one costs 112 bytes for as little as 7 of header; real files have a handful.
inline constexpr uint64_t kSafetensorsMaxMetadataEntries = 4096;

/// One validated safetensors file. Tensors are in the order of their data. Copies share the
/// mapping.
class SafetensorsFile {
 public:
  const std::string& path() const { return file_->path(); }
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Null when there is none. O(log n).
  const TensorInfo* find(std::string_view name) const { return index_.find(tensors_, name); }
  /// The `__metadata__` object.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  friend Result<SafetensorsFile> read_safetensors(std::shared_ptr<const MappedFile> file);

  std::shared_ptr<const MappedFile> file_;
  std::vector<TensorInfo> tensors_;
  TensorIndex index_;
  std::map<std::string, std::string> metadata_;
};

/// Reads the header and checks all of it: JSON without duplicate keys, known dtypes, sizes that
/// match shapes, data that covers the file exactly once (no overlap, hole or tail). What it accepts
/// the Rust reference accepts too; the reverse is not so (limits above, 8- and sub-8-bit floats and
/// complex numbers are refused). Format: https://github.com/huggingface/safetensors#format.
/// Cost: one pass over the header; no tensor data is touched. Needs at most 8x the header in
/// memory.
Result<SafetensorsFile> read_safetensors(const std::string& path);
Result<SafetensorsFile> read_safetensors(std::shared_ptr<const MappedFile> file);

/// A folder of safetensors as models are published: `model.safetensors.index.json` with its shards,
/// or a single `model.safetensors`.
class SafetensorsFolder {
 public:
  const std::string& path() const { return path_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  /// All tensors, in the order of the files' names and within a file in the order of their data.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find(std::string_view name) const { return index_.find(tensors_, name); }

 private:
  friend Result<SafetensorsFolder> read_safetensors_folder(const std::string& folder);

  std::string path_;
  std::vector<SafetensorsFile> files_;
  std::vector<TensorInfo> tensors_;
  TensorIndex index_;
};

/// The index must name plain files of the folder, each tensor must be in the file that it says, and
/// no name may be in two files. Tensors of a shard that the index does not list are there too, as
/// in transformers. not_found when the folder has neither file.
Result<SafetensorsFolder> read_safetensors_folder(const std::string& folder);

class FileCalls;

struct SafetensorsWriteOptions {
  /// Fail on NaN or ±Inf in a float tensor; reads all data once more.
  bool refuse_non_finite = true;
  /// The system calls to make; null for the system's own. Tests inject faults here.
  FileCalls* calls = nullptr;
};

/// Writes atomically (see AtomicFile): on failure the previous file is unchanged. The bytes depend
/// on names, types, shapes, values and metadata alone, not on the order of `tensors`; layout and
/// header are those of the Rust reference (widest dtype first, then by name). Block types, names
/// beyond the limits and duplicates are refused.
Result<void> write_safetensors(
    const std::string& path,
    std::span<const TensorInfo> tensors,
    const std::map<std::string, std::string>& metadata = {},
    const SafetensorsWriteOptions& options = {});

/// The header (length prefix included) that write_safetensors would write, and the tensors' order.
struct SafetensorsLayout {
  std::string header;
  std::vector<uint32_t> order;
};
Result<SafetensorsLayout> lay_out_safetensors(
    const std::string& path,
    std::span<const TensorInfo> tensors,
    const std::map<std::string, std::string>& metadata);

}  // namespace metal_lora::io
