// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <set>

#include "src/io/json.h"
#include "src/io/safe_name.h"
#include "src/io/safetensors.h"
#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr char kSingleName[] = "model.safetensors";
constexpr JsonLimits kIndexLimits{uint64_t{32} << 20, 8, true};

bool exists(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0;
}

// The shards that the index names, sorted, each once.
Result<std::set<std::string>> shard_names(const JsonObject& weight_map) {
  std::set<std::string> names;
  for (const auto& [tensor, file] : weight_map.json().items()) {
    if (!file.is_string()) {
      return weight_map.failure(quote_text(tensor), "the name of a file", describe_json(&file));
    }
    const auto& name = file.get_ref<const std::string&>();
    if (!is_safe_name(name) || !name.ends_with(".safetensors")) {
      return weight_map.failure(
          quote_text(tensor), "a plain .safetensors file name of the folder", quote_text(name));
    }
    names.insert(name);
  }
  if (names.empty()) return weight_map.failure("", "an object with tensors", "empty");
  return names;
}

}  // namespace

Result<SafetensorsFolder> read_safetensors_folder(const std::string& folder) {
  SafetensorsFolder result;
  result.path_ = folder;
  const std::string index_path = join_path(folder, kIndexName);
  const std::string single_path = join_path(folder, kSingleName);
  if (!exists(index_path)) {
    if (!exists(single_path)) {
      Failure failure = system_failure(folder, "", ENOENT);
      failure.expected = std::string("a folder with ") + kSingleName + " or " + kIndexName;
      failure.got = exists(folder) ? "one without" : "missing";
      return failure;
    }
    auto file = read_safetensors(single_path);
    if (!file) return std::move(file).error();
    result.tensors_ = file->tensors();
    result.files_.push_back(std::move(*file));
    result.index_ = TensorIndex(result.tensors_);
    return result;
  }

  const auto index = read_json_file(index_path, kIndexLimits);
  if (!index) return index.error();
  const auto root = JsonObject::of(*index, index_path);
  if (!root) return root.error();
  const auto weight_map = root->get_object("weight_map");
  if (!weight_map) return weight_map.error();
  const auto names = shard_names(*weight_map);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    auto file = read_safetensors(join_path(folder, name));
    if (!file) return std::move(file).error();
    for (const TensorInfo& tensor : file->tensors()) result.tensors_.push_back(tensor);
    if (result.tensors_.size() > kSafetensorsMaxTensors) {
      return root->failure("weight_map", "at most 131072 tensors in all", "more");
    }
    result.files_.push_back(std::move(*file));
  }
  result.index_ = TensorIndex(result.tensors_);
  if (const auto duplicate = result.index_.duplicate(result.tensors_)) {
    return weight_map->failure(quote_text(*duplicate), "in one shard", "in two");
  }
  for (const auto& [tensor, file] : weight_map->json().items()) {
    const TensorInfo* found = result.find(tensor);
    const std::string path = join_path(folder, file.get_ref<const std::string&>());
    if (found == nullptr || found->file->path() != path) {
      return weight_map->failure(
          quote_text(tensor),
          "in the shard that the index names",
          found ? "in another" : "missing");
    }
  }
  return result;
}

}  // namespace metal_lora::io
