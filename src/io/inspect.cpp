// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/inspect.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "src/io/gguf.h"
#include "src/io/json.h"
#include "src/io/jsonl.h"
#include "src/io/safetensors.h"
#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

constexpr const char* kDatasetFiles[] = {"train.jsonl", "valid.jsonl", "test.jsonl"};

bool has_file(const std::string& folder, std::string_view name) {
  struct stat status {};
  return ::stat(join_path(folder, name).c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

void take_tensors(FileSummary& summary, const std::vector<TensorInfo>& tensors) {
  summary.tensors = tensors;
  // Ranges of mapped files that do not overlap: the sums fit.
  for (const TensorInfo& tensor : tensors) {
    summary.tensor_bytes += tensor.nbytes;
    summary.element_count += tensor.element_count();
  }
}

// The magic decides; the extension speaks for files too broken to tell.
FileKind kind_of_file(const MappedFile& file) {
  const auto bytes = file.bytes();
  if (bytes.size() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0) return FileKind::gguf;
  if (file.path().ends_with(".gguf")) return FileKind::gguf;
  if (file.path().ends_with(".safetensors")) return FileKind::safetensors;
  if (bytes.size() < 10 || bytes[8] != std::byte{'{'}) return FileKind::unknown;
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  return header_bytes <= kSafetensorsMaxHeaderBytes ? FileKind::safetensors : FileKind::unknown;
}

FileKind kind_of_folder(const std::string& folder) {
  if (has_file(folder, "adapter_config.json")) {
    if (has_file(folder, "adapters.safetensors")) return FileKind::mlx_adapter;
    if (has_file(folder, "adapter_model.safetensors")) return FileKind::peft_adapter;
  }
  if (has_file(folder, "config.json") &&
      (has_file(folder, "model.safetensors") || has_file(folder, "model.safetensors.index.json"))) {
    return FileKind::model_folder;
  }
  for (const char* name : kDatasetFiles) {
    if (has_file(folder, name)) return FileKind::dataset_folder;
  }
  return FileKind::unknown;
}

Result<void> inspect_safetensors(FileSummary& summary, const std::string& path) {
  const auto file = read_safetensors(path);
  if (!file) return file.error();
  take_tensors(summary, file->tensors());
  return {};
}

Result<void> inspect_gguf(FileSummary& summary, std::shared_ptr<const MappedFile> mapped) {
  const auto file = read_gguf(std::move(mapped));
  if (!file) return file.error();
  const auto architecture = file->get_string_or("general.architecture", "");
  if (!architecture) return architecture.error();
  summary.architecture = *architecture;
  take_tensors(summary, file->tensors());
  return {};
}

Result<void> inspect_model_folder(FileSummary& summary) {
  const std::string config_path = join_path(summary.path, "config.json");
  const auto config = read_json_file(config_path);
  if (!config) return config.error();
  const auto root = JsonObject::of(*config, config_path);
  if (!root) return root.error();
  auto model_type = root->get_string_or("model_type", "");
  if (!model_type) return std::move(model_type).error();
  summary.architecture = std::move(*model_type);
  const auto folder = read_safetensors_folder(summary.path);
  if (!folder) return folder.error();
  take_tensors(summary, folder->tensors());
  return {};
}

Result<void> inspect_dataset(FileSummary& summary) {
  for (const char* name : kDatasetFiles) {
    if (!has_file(summary.path, name)) continue;
    const auto rows = JsonlFile::open(join_path(summary.path, name));
    if (!rows) return rows.error();
    summary.dataset.push_back({name, rows->size()});
  }
  return {};
}

Result<void> inspect_folder(FileSummary& summary) {
  summary.kind = kind_of_folder(summary.path);
  switch (summary.kind) {
    case FileKind::mlx_adapter:
      return inspect_safetensors(summary, join_path(summary.path, "adapters.safetensors"));
    case FileKind::peft_adapter:
      return inspect_safetensors(summary, join_path(summary.path, "adapter_model.safetensors"));
    case FileKind::model_folder:
      return inspect_model_folder(summary);
    case FileKind::dataset_folder:
      return inspect_dataset(summary);
    default:
      return {};
  }
}

Result<void> inspect_file(FileSummary& summary) {
  auto file = MappedFile::open(summary.path);
  if (!file) return std::move(file).error();
  summary.kind = kind_of_file(**file);
  if (summary.kind == FileKind::gguf) return inspect_gguf(summary, std::move(*file));
  if (summary.kind == FileKind::safetensors) return inspect_safetensors(summary, summary.path);
  return {};
}

}  // namespace

std::string_view file_kind_name(FileKind kind) {
  switch (kind) {
    case FileKind::safetensors:
      return "safetensors file";
    case FileKind::gguf:
      return "GGUF file";
    case FileKind::model_folder:
      return "model folder";
    case FileKind::mlx_adapter:
      return "mlx-lm adapter";
    case FileKind::peft_adapter:
      return "PEFT adapter";
    case FileKind::dataset_folder:
      return "dataset folder";
    case FileKind::unknown:
      break;
  }
  return "unknown";
}

Result<FileSummary> inspect_path(const std::string& path) {
  FileSummary summary;
  summary.path = path;
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    return system_failure(path, "a file or folder", errno);
  }
  auto inspected = S_ISDIR(status.st_mode) ? inspect_folder(summary) : inspect_file(summary);
  if (!inspected) return std::move(inspected).error();
  return summary;
}

}  // namespace metal_lora::io
