// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <set>

#include <fmt/format.h>
#include <mlx/ops.h>

#include "metal_lora/error.h"
#include "src/io/result.h"
#include "src/io/safetensors.h"
#include "src/model/loader.h"
#include "src/model/tensor_weight.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

/// MLX's `quantization` block: {group_size, bits} for every linear that has `.scales`.
struct MlxQuantization {
  int group_size = 0, bits = 0;
};

MlxQuantization read_quantization(const io::Json& json, const std::string& path) {
  const auto config = io::unwrap(io::JsonObject::of(json, path));
  if (!config.has("quantization")) return {};
  const auto q = io::unwrap(config.get_object("quantization"));
  MlxQuantization result;
  result.group_size = static_cast<int>(io::unwrap(q.get_int("group_size", 1, 1024)));
  result.bits = static_cast<int>(io::unwrap(q.get_int("bits", 1, 16)));
  const auto mode = io::unwrap(q.get_string_or("mode", "affine"));
  const bool known_group =
      result.group_size == 32 || result.group_size == 64 || result.group_size == 128;
  if ((result.bits != 4 && result.bits != 8) || !known_group || mode != "affine") {
    throw Error(
        ErrorCode::unsupported,
        fmt::format(
            "[{}: quantization] must be affine, 4 or 8 bits in groups of 32, 64 or 128 but is {}, "
            "{} bits, {}",
            path,
            mode,
            result.bits,
            result.group_size));
  }
  return result;
}

class HfTensors : public TensorSource {
 public:
  HfTensors(io::SafetensorsFolder folder, MlxQuantization quantization)
      : folder_(std::move(folder)), quantization_(quantization) {}

  bool has(const std::string& name) const override { return folder_.find(name) != nullptr; }

  Weight weight(const std::string& name, int out, int in, mx::Dtype dense_dtype) override {
    const auto& tensor = require(name);
    if (tensor.type == io::TensorType::u32 && quantization_.bits != 0)
      return affine(name, tensor, out, in);
    return tensor_weight(tensor, label(tensor), out, in, dense_dtype);
  }

  std::optional<mx::array> vector(const std::string& name, int size) override {
    const auto* tensor = find(name);
    if (tensor == nullptr) return std::nullopt;
    return tensor_vector(*tensor, label(*tensor), size);
  }

  std::vector<std::string> unused() const override {
    std::vector<std::string> names;
    for (const auto& tensor : folder_.tensors()) {
      // Old checkpoints store the rope table; it follows from the configuration.
      if (!used_.contains(tensor.name) && !tensor.name.ends_with("rotary_emb.inv_freq"))
        names.push_back(tensor.name);
    }
    return names;
  }

 private:
  std::string label(const io::TensorInfo& t) const { return folder_.path() + ": " + t.name; }

  const io::TensorInfo* find(const std::string& name) {
    const auto* tensor = folder_.find(name);
    if (tensor != nullptr) used_.insert(name);
    return tensor;
  }

  const io::TensorInfo& require(const std::string& name) {
    const auto* tensor = find(name);
    if (tensor == nullptr) {
      throw Error(
          ErrorCode::invalid_input, fmt::format("[{}] has no tensor {}", folder_.path(), name));
    }
    return *tensor;
  }

  /// weight, scales and biases of one linear, copied together so that they are aligned and alive.
  Weight affine(const std::string& name, const io::TensorInfo& q, int out, int in) {
    const auto stem = name.substr(0, name.rfind('.'));
    const auto& scales = require(stem + ".scales");
    const auto& biases = require(stem + ".biases");
    WeightParams p;
    p.n = static_cast<uint32_t>(out);
    p.k = static_cast<uint32_t>(in);
    p.format = quantization_.bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
    p.group_size = static_cast<uint32_t>(quantization_.group_size);
    const auto rows = static_cast<uint64_t>(out), columns = static_cast<uint64_t>(in);
    check(q, {rows, columns * quantization_.bits / 32});
    check(scales, {rows, columns / p.group_size});
    check(biases, scales.shape);
    if (columns % p.group_size != 0 || biases.type != scales.type) {
      throw Error(
          ErrorCode::invalid_input, fmt::format("[{}] scales and biases do not match", label(q)));
    }
    switch (scales.type) {
      case io::TensorType::f32:
        p.scales_dtype = DType::f32;
        break;
      case io::TensorType::f16:
        p.scales_dtype = DType::f16;
        break;
      case io::TensorType::bf16:
        p.scales_dtype = DType::bf16;
        break;
      default:
        throw Error(
            ErrorCode::unsupported,
            fmt::format(
                "[{}] of type {} is not supported",
                label(scales),
                io::tensor_type_name(scales.type)));
    }
    auto bytes = std::make_shared<std::vector<std::byte>>();
    bytes->reserve(q.nbytes + scales.nbytes + biases.nbytes);
    for (const auto* t : {&q, &scales, &biases})
      bytes->insert(bytes->end(), t->data, t->data + t->nbytes);
    const auto* data = bytes->data();
    return Weight::view(p, bytes, data, data + q.nbytes, data + q.nbytes + scales.nbytes);
  }

  void check(const io::TensorInfo& t, const std::vector<uint64_t>& expected) const {
    if (t.shape == expected) return;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be {} but is {}",
            label(t),
            io::format_shape(expected),
            io::format_shape(t.shape)));
  }

  io::SafetensorsFolder folder_;
  MlxQuantization quantization_;
  std::set<std::string> used_;
};

}  // namespace

std::unique_ptr<TensorSource> open_hf_tensors(const std::string& folder, const io::Json& config) {
  return std::make_unique<HfTensors>(
      io::unwrap(io::read_safetensors_folder(folder)),
      read_quantization(config, folder + "/config.json"));
}

}  // namespace metal_lora
