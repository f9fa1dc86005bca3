// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/checkpoint.h"

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <vector>

#include "metal_lora/error.h"
#include "src/io/atomic_file.h"
#include "src/io/json.h"
#include "src/io/safetensors.h"
#include "src/io/sha256.h"

namespace metal_lora::train {
namespace {

namespace fs = std::filesystem;
namespace mx = mlx::core;

constexpr int kFormatVersion = 1;
constexpr const char* kTensorFile = "tensors.safetensors";
constexpr const char* kManifestFile = "manifest.json";
constexpr io::JsonLimits kManifestLimits{uint64_t{1} << 30, 64, true};
constexpr size_t kStatesKept = 2;

struct Entry {
  uint64_t sequence = 0;
  fs::path path;
};

/// Folders named by a number, newest first.
std::vector<Entry> list_states(const fs::path& folder) {
  std::vector<Entry> out;
  std::error_code error;
  for (const auto& item : fs::directory_iterator(folder, error)) {
    const std::string name = item.path().filename().string();
    uint64_t sequence = 0;
    const auto [end, code] = std::from_chars(name.data(), name.data() + name.size(), sequence);
    if (code == std::errc() && end == name.data() + name.size() && item.is_directory(error)) {
      out.push_back({sequence, item.path()});
    }
  }
  std::sort(out.begin(), out.end(), [](const Entry& a, const Entry& b) {
    return a.sequence > b.sequence;
  });
  return out;
}

io::TensorInfo tensor_of(const std::string& name, const mx::array& values) {
  io::TensorInfo info;
  info.name = name;
  info.type = io::TensorType::f32;
  info.shape = {values.size()};
  info.data = reinterpret_cast<const std::byte*>(values.data<float>());
  info.nbytes = values.nbytes();
  return info;
}

mx::array array_of(const io::SafetensorsFile& file, const std::string& name) {
  const io::TensorInfo* info = file.find(name);
  if (!info || info->type != io::TensorType::f32 || info->shape.size() != 1) {
    throw Error(
        ErrorCode::invalid_input, fmt::format("[{}, {}] must be F32 [count]", file.path(), name));
  }
  mx::array out = mx::zeros({static_cast<int>(info->element_count())}, mx::float32);
  out.eval();
  if (info->nbytes > 0) std::memcpy(out.data<float>(), info->data, info->nbytes);
  return out;
}

/// The manifest, if it is whole and its tensors are those it was written for.
std::optional<io::Json> verified_manifest(const fs::path& folder, std::string& problem) {
  const std::string manifest_path = (folder / kManifestFile).string();
  auto manifest = io::read_json_file(manifest_path, kManifestLimits);
  if (!manifest) {
    problem = manifest.error().summary();
    return std::nullopt;
  }
  const auto sha = io::sha256_file((folder / kTensorFile).string());
  if (!sha) {
    problem = sha.error().summary();
    return std::nullopt;
  }
  const auto& json = *manifest;
  if (!json.is_object() || json.value("format_version", 0) != kFormatVersion ||
      !json.contains("tensors_sha256") || json["tensors_sha256"] != *sha) {
    problem = fmt::format("[{}] does not match {}", manifest_path, kTensorFile);
    return std::nullopt;
  }
  return std::move(manifest).value();
}

std::string config_difference(const io::Json& saved, const nlohmann::ordered_json& now) {
  std::vector<std::string> out;
  for (const auto& [key, value] : now.items()) {
    const io::Json current = io::Json::parse(value.dump());
    const io::Json before = saved.contains(key) ? saved[key] : io::Json();
    if (before != current) {
      out.push_back(fmt::format("{} was {} and is {}", key, before.dump(), current.dump()));
    }
  }
  return fmt::format("{}", fmt::join(out, "; "));
}

void check_identity(const io::Json& saved, const Identity& now, const std::string& where) {
  const auto refuse = [&](const std::string& what, const std::string& hint) {
    throw Error(ErrorCode::invalid_input, fmt::format("[resume, {}] {}", where, what), hint);
  };
  const std::string fresh = "start without --resume, or with --resume-adapter-file for the weights";
  if (saved.at("base") != now.base) refuse("the base model differs from the saved run's", fresh);
  const std::string config = config_difference(saved.at("config"), now.config);
  if (!config.empty()) refuse("the configuration differs: " + config, fresh);
  if (saved.at("data") != now.data) {
    refuse("the training data (or its tokenisation) differs from the saved run's", fresh);
  }
  if (saved.at("adapter") != now.adapter) {
    refuse("the adapter's modules differ from the saved run's", fresh);
  }
}

void write_state(const fs::path& folder, const State& state, const Identity& identity) {
  const std::string tensors = (folder / kTensorFile).string();
  const io::TensorInfo infos[] = {
      tensor_of("param", state.param), tensor_of("m", state.m), tensor_of("v", state.v)};
  io::unwrap(io::write_safetensors(tensors, infos));

  nlohmann::ordered_json manifest;
  manifest["format_version"] = kFormatVersion;
  manifest["progress"] = to_json(state.progress);
  manifest["identity"] = {
      {"base", identity.base},
      {"data", identity.data},
      {"adapter", identity.adapter},
      {"config", identity.config}};
  manifest["tensors_sha256"] = io::unwrap(io::sha256_file(tensors));
  manifest["log"] = state.log;
  io::unwrap(io::write_file_atomic((folder / kManifestFile).string(), manifest.dump() + "\n"));
}

nlohmann::ordered_json optional_json(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

std::optional<double> optional_number(const io::JsonObject& object, const char* key) {
  if (!object.has(key)) return std::nullopt;
  return io::unwrap(object.get_number(key));
}

}  // namespace

nlohmann::ordered_json to_json(const Progress& p) {
  nlohmann::ordered_json out;
  out["iteration"] = p.iteration;
  out["updates"] = p.updates;
  out["skipped"] = p.skipped;
  out["skipped_in_a_row"] = p.skipped_in_a_row;
  out["epoch"] = p.epoch;
  out["cursor"] = p.cursor;
  out["trained_tokens"] = p.trained_tokens;
  out["loss_sum"] = p.loss_sum;
  out["loss_tokens"] = p.loss_tokens;
  out["seconds"] = p.seconds;
  out["first_val_loss"] = optional_json(p.first_val_loss);
  out["last_val_loss"] = optional_json(p.last_val_loss);
  out["best_val_loss"] = optional_json(p.best_val_loss);
  out["best_iteration"] = p.best_iteration;
  out["evaluations_without_gain"] = p.evaluations_without_gain;
  out["validation_pending"] = p.validation_pending;
  return out;
}

Progress progress_from_json(const nlohmann::json& json, const std::string& where) {
  const auto object = io::unwrap(io::JsonObject::of(json, where, "progress"));
  const auto count = [&](const char* key) { return io::unwrap(object.get_int(key, 0)); };
  Progress p;
  p.iteration = count("iteration");
  p.updates = count("updates");
  p.skipped = count("skipped");
  p.skipped_in_a_row = count("skipped_in_a_row");
  p.epoch = static_cast<uint64_t>(count("epoch"));
  p.cursor = static_cast<uint64_t>(count("cursor"));
  p.trained_tokens = count("trained_tokens");
  p.loss_sum = io::unwrap(object.get_number("loss_sum"));
  p.loss_tokens = count("loss_tokens");
  p.seconds = io::unwrap(object.get_number("seconds"));
  p.first_val_loss = optional_number(object, "first_val_loss");
  p.last_val_loss = optional_number(object, "last_val_loss");
  p.best_val_loss = optional_number(object, "best_val_loss");
  p.best_iteration = count("best_iteration");
  p.evaluations_without_gain = count("evaluations_without_gain");
  p.validation_pending = io::unwrap(object.get_bool("validation_pending"));
  return p;
}

std::string hash_model_files(const fs::path& model) {
  std::error_code error;
  if (!fs::is_directory(model, error)) return io::unwrap(io::sha256_file(model.string()));
  std::vector<fs::path> files;
  for (const auto& item : fs::directory_iterator(model, error)) {
    const std::string name = item.path().filename().string();
    if (name == "config.json" || item.path().extension() == ".safetensors") {
      files.push_back(item.path());
    }
  }
  std::sort(files.begin(), files.end());
  io::Sha256 all;
  for (const auto& file : files) {
    all.update(file.filename().string() + "\n");
    all.update(io::unwrap(io::sha256_file(file.string())) + "\n");
  }
  return all.finish_hex();
}

void save_state(const fs::path& state_folder, const State& state, const Identity& identity) {
  std::error_code error;
  fs::create_directories(state_folder, error);
  const auto before = list_states(state_folder);
  const uint64_t sequence = before.empty() ? 1 : before.front().sequence + 1;
  const fs::path folder = state_folder / fmt::format("{:06}", sequence);
  fs::create_directory(folder, error);
  if (error) {
    throw Error(
        ErrorCode::io,
        fmt::format("[{}] must be a new folder but: {}", folder.string(), error.message()));
  }
  try {
    write_state(folder, state, identity);
  } catch (...) {
    fs::remove_all(folder, error);
    throw;
  }
  // Of the older ones keep the newest that has a manifest; what lacks one was being written when a
  // run died.
  size_t kept = 1;
  for (const auto& entry : before) {
    if (kept < kStatesKept && fs::exists(entry.path / kManifestFile, error)) {
      ++kept;
      continue;
    }
    fs::remove_all(entry.path, error);
  }
}

State load_state(
    const fs::path& state_folder,
    const Identity& identity,
    const std::function<void(const std::string&)>& on_warning) {
  for (const auto& entry : list_states(state_folder)) {
    std::string problem;
    const auto manifest = verified_manifest(entry.path, problem);
    if (!manifest) {
      std::error_code error;
      const bool complete = fs::exists(entry.path / kManifestFile, error);
      if (complete && on_warning) on_warning("passing over a damaged state: " + problem);
      continue;
    }
    const std::string where = (entry.path / kManifestFile).string();
    const auto object = io::unwrap(io::JsonObject::of(*manifest, where));
    const auto saved = io::unwrap(object.get_object("identity"));
    for (const char* key : {"base", "data", "adapter"}) io::unwrap(saved.get_string(key));
    io::unwrap(saved.get_object("config"));
    check_identity(saved.json(), identity, entry.path.string());
    const auto file = io::unwrap(io::read_safetensors((entry.path / kTensorFile).string()));
    return {
        progress_from_json(io::unwrap(object.get_object("progress")).json(), where),
        array_of(file, "param"),
        array_of(file, "m"),
        array_of(file, "v"),
        nlohmann::ordered_json::parse(io::unwrap(object.get_object("log")).json().dump())};
  }
  throw Error(
      ErrorCode::not_found,
      fmt::format("[resume] {} holds no saved state", state_folder.string()),
      "leave --resume out to start a run");
}

}  // namespace metal_lora::train
