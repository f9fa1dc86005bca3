// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What a training step needs, counted from what the ops keep, and what the machine has.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include "kernels/nf4.h"
#include "metal_lora/ops.h"
#include "metal_lora/train.h"

namespace metal_lora {
namespace {

/// "Name:   123 kB" of a /proc file, in bytes; 0 when absent.
uint64_t proc_field(const char* file, std::string_view name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(name) || line.size() <= name.size() || line[name.size()] != ':') continue;
    return std::strtoull(line.c_str() + name.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

/// A number in a file; `absent` when there is none or it is "max".
uint64_t number_in(const std::filesystem::path& file, uint64_t absent) {
  std::ifstream in(file);
  uint64_t value = 0;
  return in >> value ? value : absent;
}

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

uint64_t stat_field(const std::filesystem::path& file, std::string_view name) {
  std::ifstream in(file);
  std::string key;
  for (uint64_t value; in >> key >> value;) {
    if (key == name) return value;
  }
  return 0;
}

/// What one control group leaves: its limit less what is used and cannot be reclaimed.
uint64_t group_room(const std::filesystem::path& group, bool v2) {
  const uint64_t limit = number_in(group / (v2 ? "memory.max" : "memory.limit_in_bytes"), kNoLimit);
  // Version 1 writes a huge number for "no limit".
  if (limit >= uint64_t{1} << 60) return kNoLimit;
  const uint64_t used = number_in(group / (v2 ? "memory.current" : "memory.usage_in_bytes"), 0);
  const uint64_t cached =
      stat_field(group / "memory.stat", v2 ? "inactive_file" : "total_inactive_file");
  const uint64_t held = used > cached ? used - cached : 0;
  return limit > held ? limit - held : 0;
}

uint64_t control_group_room() {
  std::ifstream in("/proc/self/cgroup");
  uint64_t room = kNoLimit;
  for (std::string line; std::getline(in, line);) {
    const bool v2 = line.starts_with("0::");
    const size_t memory = line.find(":memory:");
    if (!v2 && memory == std::string::npos) continue;
    const std::filesystem::path root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    std::filesystem::path own = line.substr(v2 ? 3 : memory + 8);
    // A limit of any ancestor binds; inside a container the root itself is the group.
    for (own = own.relative_path(); !own.empty(); own = own.parent_path()) {
      room = std::min(room, group_room(root / own, v2));
    }
    room = std::min(room, group_room(root, v2));
  }
  return room;
}

// Beside what is counted below: program, libraries, thread stacks and the allocator's slack.
constexpr uint64_t kRuntimeBytes = uint64_t{120} << 20;
// Scratch of the fused loss: a block of logits for each thread.
constexpr uint64_t kLossBlockTokens = 128;

/// Elements per token that one layer keeps for its backward pass: the inputs of the two norms and
/// of the seven linears, rotated q and k, v, and the attention's output.
uint64_t kept_per_token(const ModelConfig& c) {
  const auto q = static_cast<uint64_t>(c.num_attention_heads) * c.head_dim;
  const auto kv = static_cast<uint64_t>(c.num_key_value_heads) * c.head_dim;
  return 5 * static_cast<uint64_t>(c.hidden_size) + 2 * q + 3 * kv +
         3 * static_cast<uint64_t>(c.intermediate_size);
}

/// Bytes of `w` once loaded as `options` say; `multiplied`: prepared for the backend.
uint64_t quantized_bytes(const Weight& w, const LoadOptions& options, bool multiplied) {
  WeightParams p = w.params();
  const bool nf4 = options.quantize == Quantization::nf4;
  p.group_size = nf4 ? kNf4Block : static_cast<uint32_t>(options.quantize_group);
  if (options.quantize == Quantization::none || w.is_quantized() || p.k % p.group_size != 0) {
    return w.nbytes();
  }
  p.format = nf4                                      ? WeightFormat::nf4
             : options.quantize == Quantization::int4 ? WeightFormat::int4
                                                      : WeightFormat::int8;
  p.scales_dtype = nf4 ? DType::f32 : DType::f16;
  p.double_quant = nf4 && options.double_quant;
  if (multiplied) p = Weight::prepared_params(p);
  // A handle without bytes: their number follows from the parameters.
  return Weight::view(p, nullptr, nullptr).nbytes();
}

/// Bytes of the base as training holds it: `model` may be loaded as the configuration says, or may
/// be dense where that would quantise it.
uint64_t base_bytes(const Model& model, const TrainingConfig& config) {
  const LoadOptions options = config.load_options();
  const bool tied = model.config().tie_word_embeddings;
  uint64_t bytes = quantized_bytes(model.embedding(), options, tied);
  if (!tied) bytes += quantized_bytes(model.head(), options, true);
  for (const auto& info : adaptable_linears(model.config())) {
    bytes += quantized_bytes(model.linear(info.path).weight, options, true);
  }
  return bytes;
}

}  // namespace

MemoryEstimate estimate_memory(
    const Model& model,
    const TrainingConfig& config,
    int64_t tokens,
    int64_t adapter_parameters,
    uint64_t data_bytes) {
  const ModelConfig& c = model.config();
  const uint64_t width = model.dtype().size();
  const auto count = static_cast<uint64_t>(tokens);
  const auto layers = static_cast<uint64_t>(c.num_hidden_layers);
  const auto hidden = static_cast<uint64_t>(c.hidden_size);
  const uint64_t layer = count * width * kept_per_token(c);
  MemoryEstimate out;
  out.micro_batch_tokens = tokens;
  out.weights = base_bytes(model, config);
  // A checkpointed layer keeps its two inputs; one layer at a time is whole, twice while its
  // gradients are made.
  out.activations = config.grad_checkpoint ? count * width * 2 * hidden * layers + 2 * layer
                                           : layers * layer + layer;
  out.loss = 2 * count * width * hidden +
             std::min(count, kLossBlockTokens) * static_cast<uint64_t>(c.vocab_size) * 4;
  // Parameters and two moments, the gradient by module and flat, and its sum over micro-batches.
  const uint64_t copies = config.grad_accumulation_steps > 1 ? 6 : 5;
  out.adapter = static_cast<uint64_t>(adapter_parameters) * 4 * copies;
  out.data = data_bytes;
  out.runtime = kRuntimeBytes;
  return out;
}

uint64_t peak_memory_bytes() {
  if (const auto device = ops::device_memory()) return device->peak_bytes;
  return proc_field("/proc/self/status", "VmHWM");
}

uint64_t memory_limit_bytes() {
  // The driver, MLX's own kernels and their libraries take the rest.
  if (const auto device = ops::device_memory()) return device->total_bytes / 100 * 94;
  const uint64_t available = proc_field("/proc/meminfo", "MemAvailable");
  const uint64_t room = std::min(available == 0 ? kNoLimit : available, control_group_room());
  if (room == kNoLimit) return 0;
  return room + proc_field("/proc/self/status", "VmRSS");
}

}  // namespace metal_lora
