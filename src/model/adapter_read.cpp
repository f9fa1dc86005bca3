// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <tuple>

#include <fmt/format.h>
#include <mlx/allocator.h>
#include <nlohmann/json.hpp>

#include "src/io/json.h"
#include "src/io/safetensors.h"
#include "src/io/text_format.h"
#include "src/model/adapter_files.h"
#include "src/model/adapter_tensors.h"

namespace fs = std::filesystem;
namespace mx = mlx::core;

namespace metal_lora {
namespace {

constexpr const char* kConfigName = "adapter_config.json";

[[noreturn]] void refuse(
    ErrorCode code,
    const std::string& where,
    const std::string& field,
    std::string expected,
    std::string got,
    std::string hint = {}) {
  io::Failure failure;
  failure.code = code;
  failure.path = where;
  failure.field = field;
  failure.expected = std::move(expected);
  failure.got = std::move(got);
  failure.hint = std::move(hint);
  io::throw_failure(failure);
}

struct Paths {
  fs::path tensors;
  std::optional<fs::path> config;
};

Paths find_files(const fs::path& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    const fs::path config = path / kConfigName;
    if (!fs::exists(config, ignored)) {
      refuse(
          ErrorCode::not_found,
          path.string(),
          "",
          "an adapter's folder",
          "without " + std::string(kConfigName),
          "an adapter is adapter_config.json with adapters.safetensors (mlx-lm) or "
          "adapter_model.safetensors (PEFT)");
    }
    return {{}, config};
  }
  if (!fs::exists(path, ignored)) {
    refuse(ErrorCode::not_found, path.string(), "", "an adapter's folder or file", "not there");
  }
  const fs::path config = path.parent_path() / kConfigName;
  if (fs::exists(config, ignored)) return {path, config};
  return {path, std::nullopt};
}

fs::path tensor_file_in(const fs::path& folder, AdapterFormat format) {
  std::error_code ignored;
  const fs::path file = folder / adapter_file_name(format);
  if (fs::exists(file, ignored)) return file;
  if (fs::exists(folder / "adapter_model.bin", ignored)) {
    refuse(
        ErrorCode::unsupported,
        folder.string(),
        "adapter_model.bin",
        "safetensors",
        "a pickle, which can run code",
        "save it again with PEFT's safe_serialization=True");
  }
  refuse(
      ErrorCode::not_found,
      folder.string(),
      std::string(adapter_file_name(format)),
      "the adapter's tensors",
      "not there");
}

mx::Dtype mlx_dtype(const io::TensorInfo& tensor, const std::string& where) {
  switch (tensor.type) {
    case io::TensorType::f32:
      return mx::float32;
    case io::TensorType::f16:
      return mx::float16;
    case io::TensorType::bf16:
      return mx::bfloat16;
    default:
      break;
  }
  refuse(
      ErrorCode::unsupported,
      where,
      tensor.name,
      "F32, F16 or BF16",
      std::string(io::tensor_type_name(tensor.type)));
}

/// The tensor as rows × columns, turned when the file keeps it the other way round.
mx::array copy_matrix(const io::TensorInfo& tensor, bool transposed, const std::string& where) {
  if (tensor.shape.size() != 2) {
    refuse(
        ErrorCode::invalid_input, where, tensor.name, "a matrix", io::format_shape(tensor.shape));
  }
  const mx::Dtype dtype = mlx_dtype(tensor, where);
  const uint64_t rows = tensor.shape[0], columns = tensor.shape[1];
  constexpr uint64_t kMaxExtent = INT32_MAX;
  if (rows == 0 || columns == 0 || rows > kMaxExtent || columns > kMaxExtent) {
    refuse(
        ErrorCode::invalid_input,
        where,
        tensor.name,
        "1 … 2^31 - 1 in each dimension",
        io::format_shape(tensor.shape));
  }
  auto buffer = mx::allocator::malloc(tensor.nbytes);
  auto* out = static_cast<std::byte*>(buffer.buffer().raw_ptr());
  if (transposed) {
    transpose_bytes(tensor.data, rows, columns, mx::size_of(dtype), out);
  } else {
    std::memcpy(out, tensor.data, tensor.nbytes);
  }
  mx::Shape shape{static_cast<int>(rows), static_cast<int>(columns)};
  if (transposed) std::swap(shape[0], shape[1]);
  mx::array matrix(std::move(buffer), shape, dtype);
  if (const auto index = find_non_finite(matrix)) {
    refuse(
        ErrorCode::invalid_input, where, tensor.name, "finite", "NaN or infinite in some element");
  }
  return matrix;
}

struct Halves {
  std::optional<mx::array> a, b;
};

std::map<std::string, Halves> collect(const io::SafetensorsFile& file) {
  std::map<std::string, Halves> modules;
  for (const io::TensorInfo& tensor : file.tensors()) {
    const AdapterTensorName name = parse_adapter_tensor_name(tensor.name, file.path());
    auto& half = name.is_a ? modules[name.module_path].a : modules[name.module_path].b;
    if (half) {
      refuse(
          ErrorCode::invalid_input,
          file.path(),
          tensor.name,
          "the only such factor of its module",
          "there under another spelling too");
    }
    half = copy_matrix(tensor, name.transposed, file.path());
  }
  return modules;
}

/// A and B with `rank` alone, when what is beyond is zero padding of ours.
Lora without_padding(const Lora& lora, int rank) {
  if (rank >= lora.a.shape(0)) return lora;
  const auto head_a = copy_block(lora.a, rank, lora.a.shape(1));
  const auto head_b = copy_block(lora.b, lora.b.shape(0), rank);
  if (count_nonzero_bytes(head_a) != count_nonzero_bytes(lora.a) ||
      count_nonzero_bytes(head_b) != count_nonzero_bytes(lora.b)) {
    return lora;  // trained further since: the padding is part of the adapter now
  }
  Lora out = lora;
  out.a = head_a;
  out.b = head_b;
  return out;
}

std::map<std::string, int> padded_ranks(const io::SafetensorsFile& file) {
  std::map<std::string, int> ranks;
  const auto it = file.metadata().find(std::string(kRanksMetadata));
  if (it == file.metadata().end()) return ranks;
  const std::string where = file.path() + ", __metadata__." + std::string(kRanksMetadata);
  const io::Json json = io::unwrap(io::parse_json(it->second, where));
  const auto object = io::unwrap(io::JsonObject::of(json, where));
  for (const auto& item : json.items()) {
    ranks[item.key()] =
        static_cast<int>(io::unwrap(object.get_int(item.key(), 1, kMaxAdapterRank)));
  }
  return ranks;
}

/// The configuration of the other format that the adapter was converted from.
void read_carried_config(const io::SafetensorsFile& file, AdapterInfo& info) {
  for (const AdapterFormat format : {AdapterFormat::mlx_lm, AdapterFormat::peft}) {
    const auto it = file.metadata().find(carried_config_key(format));
    if (it == file.metadata().end() || format == info.format) continue;
    const std::string where = file.path() + ", __metadata__." + carried_config_key(format);
    const io::Json json = io::unwrap(io::parse_json(it->second, where));
    io::unwrap(io::JsonObject::of(json, where));
    info.config_json[format] = it->second;
  }
}

Lora checked_lora(
    const std::string& path,
    const Halves& halves,
    const AdapterConfig* config,
    const std::string& where) {
  if (!halves.a || !halves.b) {
    refuse(
        ErrorCode::invalid_input,
        where,
        path,
        "a pair of factors A and B",
        halves.a ? "without B" : "without A");
  }
  const int rank = halves.a->shape(0);
  if (rank != halves.b->shape(1)) {
    refuse(
        ErrorCode::invalid_input,
        where,
        path,
        fmt::format("of one rank: B with {} columns", rank),
        fmt::format("{} columns", halves.b->shape(1)));
  }
  if (rank > kMaxAdapterRank) {
    refuse(
        ErrorCode::invalid_input,
        where,
        path,
        fmt::format("of rank 1 … {}", kMaxAdapterRank),
        std::to_string(rank));
  }
  if (halves.a->dtype() != halves.b->dtype()) {
    refuse(ErrorCode::invalid_input, where, path, "of one dtype", "A and B of different ones");
  }
  if (config == nullptr) return {*halves.a, *halves.b};
  if (const int expected = config->rank_of(path); expected != rank) {
    refuse(
        ErrorCode::invalid_input,
        where,
        path,
        fmt::format("of rank {} as {} says", expected, kConfigName),
        std::to_string(rank));
  }
  if (!config->targets(path)) {
    refuse(
        ErrorCode::invalid_input,
        where,
        path,
        fmt::format("a module that {} names", kConfigName),
        "not among them");
  }
  // The file's dropout is AdapterInfo's: it belongs to training, and a Lora that has it drops.
  return {*halves.a, *halves.b, config->scale_of(path, rank)};
}

std::string read_text(const fs::path& file) {
  const auto mapped = io::unwrap(io::MappedFile::open(file.string()));
  const auto bytes = mapped->bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

std::string_view adapter_format_name(AdapterFormat format) {
  return format == AdapterFormat::mlx_lm ? "mlx-lm" : "peft";
}

std::string_view adapter_file_name(AdapterFormat format) {
  return format == AdapterFormat::mlx_lm ? "adapters.safetensors" : "adapter_model.safetensors";
}

AdapterFile read_adapter(const fs::path& path, const ReadAdapterOptions& options) {
  Paths paths = find_files(path);
  std::optional<AdapterConfig> config;
  if (paths.config) {
    config = parse_adapter_config(read_text(*paths.config), paths.config->string());
    if (paths.tensors.empty()) paths.tensors = tensor_file_in(path, config->info.format);
  } else if (!options.scale) {
    refuse(
        ErrorCode::not_found,
        paths.tensors.parent_path().string(),
        kConfigName,
        "beside the tensor file",
        "not there",
        "it says the adapter's scale; give the scale yourself if you know it");
  }
  const auto file = io::unwrap(io::read_safetensors(paths.tensors.string()));
  AdapterFile adapter;
  if (config) adapter.info = config->info;
  read_carried_config(file, adapter.info);
  const auto ranks = padded_ranks(file);
  for (const auto& [module_path, halves] : collect(file)) {
    Lora lora = checked_lora(module_path, halves, config ? &*config : nullptr, file.path());
    if (!config) lora.scale = *options.scale;
    if (!std::isfinite(lora.scale)) {
      refuse(
          ErrorCode::invalid_input,
          paths.tensors.string(),
          module_path,
          "of finite scale",
          "scaled beyond the range of f32");
    }
    if (const auto it = ranks.find(module_path); it != ranks.end()) {
      lora = without_padding(lora, it->second);
    }
    adapter.modules.push_back({module_path, std::move(lora)});
  }
  if (adapter.modules.empty()) {
    refuse(ErrorCode::invalid_input, file.path(), "", "an adapter with tensors", "empty");
  }
  std::sort(adapter.modules.begin(), adapter.modules.end(), [](const auto& x, const auto& y) {
    return module_order(x.path) < module_order(y.path);
  });
  return adapter;
}

Adapter load_adapter(
    const fs::path& path, const ModelConfig& config, const ReadAdapterOptions& options) {
  AdapterFile file = read_adapter(path, options);
  for (const AdapterModule& module : file.modules) {
    if (module.path == "lm_head") {
      refuse(
          ErrorCode::unsupported,
          path.string(),
          "lm_head",
          "without an adapter on the head",
          "one with it",
          "train without lm_head among the keys");
    }
    // mlx-lm's embedding adapter also acts in a tied head; this library's, like PEFT's, does not.
    if (module.path == "model.embed_tokens" && config.tie_word_embeddings &&
        file.info.format == AdapterFormat::mlx_lm &&
        !file.info.config_json.contains(AdapterFormat::peft)) {
      refuse(
          ErrorCode::unsupported,
          path.string(),
          module.path,
          "without an adapter where the head is tied to the embedding",
          "one with it",
          "mlx-lm applies it in the head as well; PEFT's format, which does not, is read");
    }
  }
  try {
    return {std::move(file.info), AdapterWeights(config, std::move(file.modules))};
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("[{}] {}", path.string(), error.what()));
  }
}

}  // namespace metal_lora
