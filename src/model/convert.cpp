// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/convert.h"

#include <cmath>
#include <cstring>
#include <memory>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "metal_lora/ops.h"
#include "src/io/atomic_file.h"
#include "src/io/json.h"
#include "src/io/safetensors.h"
#include "src/model/adapter_tensors.h"
#include "src/model/loader.h"

namespace fs = std::filesystem;
namespace mx = mlx::core;

namespace metal_lora {
namespace {

using nlohmann::ordered_json;

/// Files of a folder that go along unchanged, where they exist.
constexpr const char* kCarriedFiles[] = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json"};

io::TensorType tensor_type(mx::Dtype dtype) {
  switch (to_kernel(dtype)) {
    case DType::f32:
      return io::TensorType::f32;
    case DType::f16:
      return io::TensorType::f16;
    case DType::bf16:
      return io::TensorType::bf16;
  }
  throw Error(ErrorCode::internal, "[convert] unknown dtype");
}

/// A tensor to be written: its header entry now, its bytes when their turn comes.
struct Part {
  io::TensorInfo info;
  std::function<void(const std::function<void(const void*, size_t)>&)> write;
};

/// An array that may be read through data<>().
mx::array evaluated(mx::array a) {
  a = mx::contiguous(a);
  a.eval();
  return a;
}

io::TensorInfo info_of(std::string name, io::TensorType type, std::vector<uint64_t> shape) {
  io::TensorInfo info;
  info.name = std::move(name);
  info.type = type;
  info.shape = std::move(shape);
  info.nbytes = *io::count_bytes(type, info.shape).get();
  // The layout wants bytes behind every tensor, but reads none: these are made when their turn
  // comes.
  static constexpr std::byte kNotYet{};
  info.data = &kNotYet;
  return info;
}

class Exporter {
 public:
  Exporter(ModelConfig config, std::unique_ptr<TensorSource> source, const ExportOptions& options)
      : config_(std::move(config)), source_(std::move(source)), options_(options) {
    plan();
  }

  void write(const fs::path& folder) {
    uint64_t total = 0;
    std::vector<std::vector<Part*>> shards(1);
    uint64_t shard_bytes = 0;
    for (Part& part : parts_) {
      if (!shards.back().empty() && shard_bytes + part.info.nbytes > options_.max_shard_bytes) {
        shards.emplace_back();
        shard_bytes = 0;
      }
      shards.back().push_back(&part);
      shard_bytes += part.info.nbytes;
      total += part.info.nbytes;
    }
    ordered_json index = {
        {"metadata", {{"total_size", total}}}, {"weight_map", ordered_json::object()}};
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name =
          shards.size() == 1
              ? "model.safetensors"
              : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
      write_shard((folder / name).string(), shards[i], total);
      for (const Part* part : shards[i]) index["weight_map"][part->info.name] = name;
    }
    if (shards.size() > 1) {
      io::unwrap(io::write_file_atomic(
          (folder / "model.safetensors.index.json").string(), index.dump(2) + "\n"));
    }
  }

 private:
  void plan() {
    const ModelConfig& c = config_;
    add_weight("model.embed_tokens", c.vocab_size, c.hidden_size);
    size_t next = 0;
    const auto linears = adaptable_linears(c);
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
      const std::string prefix = fmt::format("model.layers.{}.", layer);
      for (int slot = 0; slot < kSlotsPerLayer; ++slot) {
        const LinearInfo& linear = linears[next++];
        add_weight(linear.path, linear.out_features, linear.in_features);
        if (source_->has(linear.path + ".bias"))
          add_vector(linear.path + ".bias", linear.out_features);
      }
      add_vector(prefix + "input_layernorm.weight", c.hidden_size);
      add_vector(prefix + "post_attention_layernorm.weight", c.hidden_size);
      for (const char* norm : {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}) {
        if (source_->has(prefix + norm)) add_vector(prefix + norm, c.head_dim);
      }
    }
    add_vector("model.norm.weight", c.hidden_size);
    if (!c.tie_word_embeddings) add_weight("lm_head", c.vocab_size, c.hidden_size);
  }

  void add_vector(const std::string& name, int size) {
    const auto write = [this, name, size](const auto& out) {
      const auto vector = source_->vector(name, size);
      if (!vector) {
        throw Error(
            ErrorCode::invalid_input, fmt::format("[convert] the model has no tensor {}", name));
      }
      const mx::array values = evaluated(mx::astype(*vector, options_.dtype));
      check_finite(values, name);
      out(values.data<char>(), values.nbytes());
    };
    parts_.push_back(
        {info_of(name, tensor_type(options_.dtype), {static_cast<uint64_t>(size)}), write});
  }

  void add_weight(const std::string& path, int out_features, int in_features) {
    const auto rows = static_cast<uint64_t>(out_features),
               columns = static_cast<uint64_t>(in_features);
    const int bits = options_.quantize_bits, group = options_.quantize_group;
    if (bits == 0 || in_features % group != 0) {
      const auto write = [this, path, out_features, in_features](const auto& out) {
        const mx::array values = dense(path, out_features, in_features);
        out(values.data<char>(), values.nbytes());
      };
      parts_.push_back(
          {info_of(path + ".weight", tensor_type(options_.dtype), {rows, columns}), write});
      return;
    }
    const auto groups = columns / static_cast<uint64_t>(group);
    const auto part = [&](const char* kind, io::TensorType type, uint64_t width, auto pick) {
      parts_.push_back(
          {info_of(path + kind, type, {rows, width}),
           [this, path, out_features, in_features, pick](const auto& out) {
             const Weight& weight = quantized(path, out_features, in_features);
             const auto [data, bytes] = pick(weight);
             out(data, bytes);
           }});
    };
    const size_t scale_bytes = rows * groups * 2;
    part(
        ".weight",
        io::TensorType::u32,
        columns * static_cast<uint64_t>(bits) / 32,
        [=](const Weight& w) {
          return std::pair<const void*, size_t>(
              w.data(), rows * columns * static_cast<uint64_t>(bits) / 8);
        });
    part(".scales", io::TensorType::f16, groups, [=](const Weight& w) {
      return std::pair<const void*, size_t>(w.scales(), scale_bytes);
    });
    part(".biases", io::TensorType::f16, groups, [=](const Weight& w) {
      return std::pair<const void*, size_t>(w.biases(), scale_bytes);
    });
  }

  static void check_finite(const mx::array& values, const std::string& name) {
    if (!find_non_finite(values)) return;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[convert] {} must be finite in the target dtype but is not", name),
        "float16 holds up to 65504: try bfloat16");
  }

  /// W in f32, and W + ΔW where the adapter has one.
  struct Merged {
    mx::array base;
    std::optional<mx::array> update;
    mx::array sum() const { return update ? mx::add(base, *update) : base; }
  };
  Merged merged(const std::string& path, int out_features, int in_features) {
    const Weight weight = source_->weight(path + ".weight", out_features, in_features, mx::float32);
    Merged result{weight.dequantized(), std::nullopt};
    for (const AdapterModule& module : options_.adapter.modules()) {
      if (module.path != path) continue;
      const Lora& lora = module.lora;
      // (B·A)ᵀ as a linear with the weight B over the rows of Aᵀ: our own GEMM instead of MLX's.
      const LoraLinear b{Weight::dense(evaluated(mx::astype(lora.b, mx::float32))), {}, {}};
      const mx::array a = evaluated(mx::transpose(mx::astype(lora.a, mx::float32)));
      mx::array product = mx::multiply(ops::lora_linear(a, b), mx::array(lora.scale));
      // The embedding's A is [rank, vocab] and B [dims, rank], its table [vocab, dims].
      if (path != "model.embed_tokens") product = mx::transpose(product);
      result.update = evaluated(product);
    }
    return result;
  }

  mx::array dense(const std::string& path, int out_features, int in_features) {
    const Merged m = merged(path, out_features, in_features);
    const mx::array values = evaluated(mx::astype(m.sum(), options_.dtype));
    check_finite(values, path);
    if (m.update)
      report(
          path,
          m,
          mx::astype(values, mx::float32),
          mx::astype(mx::astype(m.base, options_.dtype), mx::float32));
    return values;
  }

  /// The three parts of a quantised weight come one after another in a file only by chance: the
  /// last one made is kept, so that each is made at most three times.
  const Weight& quantized(const std::string& path, int out_features, int in_features) {
    if (path == cached_path_) return cached_;
    const Weight stored = source_->weight(path + ".weight", out_features, in_features, mx::float32);
    const WeightParams& p = stored.params();
    const int bits = options_.quantize_bits;
    const bool same = p.layout == WeightLayout::row_major && p.scales_dtype == DType::f16 &&
                      p.format == (bits == 4 ? WeightFormat::int4 : WeightFormat::int8) &&
                      p.group_size == static_cast<uint32_t>(options_.quantize_group);
    const Merged m = merged(path, out_features, in_features);
    const auto round = [&](const mx::array& values) {
      return Weight::dense(values).quantized(bits, options_.quantize_group);
    };
    cached_ = same && !m.update ? stored : round(m.sum());
    if (m.update && path != reported_path_)
      report(path, m, cached_.dequantized(), round(m.base).dequantized());
    cached_path_ = path;
    return cached_;
  }

  void report(
      const std::string& path, const Merged& m, mx::array rounded_sum, mx::array rounded_base) {
    reported_path_ = path;
    if (!options_.on_merged) return;
    const mx::array kept = evaluated(mx::subtract(rounded_sum, rounded_base));
    KeptUpdate result;
    result.path = path;
    const float* after = kept.data<float>();
    const float* wanted = m.update->data<float>();
    for (size_t i = 0; i < kept.size(); ++i) {
      const double x = after[i], y = wanted[i];
      result.update_norm_squared += y * y;
      result.inner_product += x * y;
      result.error_squared += (x - y) * (x - y);
    }
    options_.on_merged(result);
  }

  void write_shard(const std::string& path, const std::vector<Part*>& parts, uint64_t total) {
    std::vector<io::TensorInfo> infos;
    for (const Part* part : parts) infos.push_back(part->info);
    const auto layout = io::unwrap(io::lay_out_safetensors(path, infos, {{"format", "pt"}}));
    auto file = io::unwrap(io::AtomicFile::create(path));
    io::unwrap(file.write(layout.header));
    for (const uint32_t i : layout.order) {
      uint64_t bytes = 0;
      parts[i]->write([&](const void* data, size_t size) {
        io::unwrap(file.write({static_cast<const std::byte*>(data), size}));
        bytes += size;
      });
      if (bytes != parts[i]->info.nbytes) {
        throw Error(
            ErrorCode::internal,
            fmt::format(
                "[convert] {} must be {} bytes but is {}",
                parts[i]->info.name,
                parts[i]->info.nbytes,
                bytes));
      }
      written_bytes_ += bytes;
      if (options_.progress)
        options_.progress(static_cast<double>(written_bytes_) / static_cast<double>(total));
    }
    io::unwrap(file.commit());
  }

  ModelConfig config_;
  std::unique_ptr<TensorSource> source_;
  const ExportOptions& options_;
  std::vector<Part> parts_;
  Weight cached_;
  std::string cached_path_, reported_path_;
  uint64_t written_bytes_ = 0;
};

void write_json(const fs::path& path, const ordered_json& json) {
  io::unwrap(io::write_file_atomic(path.string(), json.dump(2) + "\n"));
}

void check_empty(const fs::path& folder) {
  std::error_code error;
  if (fs::exists(folder, error) &&
      (!fs::is_directory(folder, error) || !fs::is_empty(folder, error))) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}] must be a new or empty folder but is not", folder.string()),
        "choose another --output");
  }
  fs::create_directories(folder, error);
  if (error) {
    throw Error(
        ErrorCode::io, fmt::format("[{}] cannot be made: {}", folder.string(), error.message()));
  }
}

const char* dtype_name(mx::Dtype dtype) {
  return dtype == mx::float32 ? "float32" : dtype == mx::float16 ? "float16" : "bfloat16";
}

void finish_config(ordered_json& config, const ExportOptions& options) {
  config["dtype"] = config["torch_dtype"] = dtype_name(options.dtype);
  config.erase("quantization");
  config.erase("quantization_config");
  if (options.quantize_bits == 0) return;
  config["quantization"] = config["quantization_config"] =
      ordered_json{{"group_size", options.quantize_group}, {"bits", options.quantize_bits}};
}

void export_folder(const fs::path& model, const fs::path& folder, const ExportOptions& options) {
  const std::string config_path = (model / "config.json").string();
  const io::Json json = io::unwrap(io::read_json_file(config_path));
  Exporter exporter(
      parse_hf_config(json, config_path), open_hf_tensors(model.string(), json), options);
  check_empty(folder);
  exporter.write(folder);
  if (options.before_config) options.before_config();
  for (const char* name : kCarriedFiles) {
    std::error_code error;
    if (!fs::exists(model / name, error)) continue;
    const auto file = io::unwrap(io::MappedFile::open((model / name).string()));
    io::unwrap(io::write_file_atomic((folder / name).string(), file->bytes()));
  }
  ordered_json config = json;
  finish_config(config, options);
  write_json(folder / "config.json", config);
}

void export_gguf(const fs::path& model, const fs::path& folder, const ExportOptions& options) {
  const auto file = io::unwrap(io::read_gguf(model.string()));
  const ModelConfig parsed = parse_gguf_config(file);
  // Everything that may be refused comes first.
  ordered_json config = hf_config_of(file);
  const ordered_json tokenizer = hf_tokenizer_of(file);
  const ordered_json tokenizer_config = hf_tokenizer_config_of(file);
  check_empty(folder);
  // The tensors' source keeps a reference to the configuration it was opened with.
  const auto kept = std::make_unique<ModelConfig>(parsed);
  Exporter(parsed, open_gguf_tensors(file, *kept), options).write(folder);
  if (options.before_config) options.before_config();
  write_json(folder / "tokenizer.json", tokenizer);
  write_json(folder / "tokenizer_config.json", tokenizer_config);
  write_json(folder / "generation_config.json", hf_generation_config_of(file));
  finish_config(config, options);
  write_json(folder / "config.json", config);
}

}  // namespace

double KeptUpdate::kept() const {
  return update_norm_squared > 0 ? inner_product / update_norm_squared : 1.0;
}
double KeptUpdate::error() const {
  return update_norm_squared > 0 ? std::sqrt(error_squared / update_norm_squared) : 0.0;
}
KeptUpdate& KeptUpdate::operator+=(const KeptUpdate& other) {
  update_norm_squared += other.update_norm_squared;
  inner_product += other.inner_product;
  error_squared += other.error_squared;
  return *this;
}

void export_model(const fs::path& model, const fs::path& folder, const ExportOptions& options) {
  std::error_code error;
  if (!fs::exists(model, error)) {
    throw Error(ErrorCode::not_found, fmt::format("[model] {} does not exist", model.string()));
  }
  if (fs::is_directory(model, error)) return export_folder(model, folder, options);
  export_gguf(model, folder, options);
}

}  // namespace metal_lora
