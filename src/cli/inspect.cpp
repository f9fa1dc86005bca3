// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/inspect.h"

#include <filesystem>
#include <map>
#include <memory>

#include <fmt/format.h>
#include <mlx/backend/metal/metal.h>
#include <mlx/version.h>

#include "kernels/cpu/isa.h"
#include "metal_lora/adapter.h"
#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/version.h"
#include "src/launch/backend.h"
#include "src/launch/mlx_cuda.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kInspectFooter = R"(Examples:
  metal-lora inspect model.gguf
  metal-lora inspect adapters/ --json
  metal-lora inspect model.gguf --tensors
  metal-lora inspect --devices

PATH is a model (file or folder), an adapter, a .safetensors file or a data set. All that its headers
say is checked; no tensor data is read, except an adapter's.)";

struct InspectFlags {
  std::string path;
  bool devices = false, tensors = false;
};

std::map<std::string, uint64_t> count_types(const io::FileSummary& summary) {
  std::map<std::string, uint64_t> types;
  for (const io::TensorInfo& tensor : summary.tensors)
    ++types[std::string(io::tensor_type_name(tensor.type))];
  return types;
}

nlohmann::ordered_json describe_adapter(const std::string& path) {
  const AdapterFile adapter = read_adapter(path);
  std::map<int, int> ranks;
  std::map<float, int> scales;
  for (const AdapterModule& module : adapter.modules) {
    ++ranks[module.lora.a.shape(0)];
    ++scales[module.lora.scale];
  }
  nlohmann::ordered_json json = {
      {"format", adapter_format_name(adapter.info.format)}, {"modules", adapter.modules.size()}};
  for (const auto& [rank, count] : ranks) json["ranks"].push_back(rank);
  for (const auto& [scale, count] : scales) json["scales"].push_back(scale);
  json["dropout"] = adapter.info.dropout;
  json["base_model"] = adapter.info.base_model;
  return json;
}

nlohmann::ordered_json summary_json(const io::FileSummary& summary, const InspectFlags& options) {
  nlohmann::ordered_json json = {
      {"path", summary.path},
      {"kind", io::file_kind_name(summary.kind)},
      {"architecture", summary.architecture},
      {"tensors", summary.tensors.size()},
      {"elements", summary.element_count},
      {"types", count_types(summary)},
      {"bytes", summary.tensor_bytes}};
  if (summary.kind == io::FileKind::mlx_adapter || summary.kind == io::FileKind::peft_adapter) {
    json["adapter"] = describe_adapter(options.path);
  }
  for (const io::DatasetPart& part : summary.dataset) json["rows"][part.file] = part.rows;
  if (options.tensors) {
    for (const io::TensorInfo& tensor : summary.tensors) {
      json["tensor_list"].push_back(
          {{"name", tensor.name},
           {"type", io::tensor_type_name(tensor.type)},
           {"shape", tensor.shape},
           {"bytes", tensor.nbytes}});
    }
  }
  return json;
}

void print_summary(Console& console, const nlohmann::ordered_json& json) {
  for (const auto& item : json.items()) {
    if (item.key() == "tensor_list") continue;
    const auto& value = item.value();
    if ((value.is_string() || value.is_object()) && value.empty()) continue;
    std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    if (item.key() == "bytes") text += fmt::format(" ({})", format_bytes(value.get<double>()));
    console.line(fmt::format("{:<18} {}", item.key(), text));
  }
  if (!json.contains("tensor_list")) return;
  for (const auto& tensor : json["tensor_list"]) {
    console.line(fmt::format(
        "{:<8} {:<16} {}",
        tensor["type"].get<std::string>(),
        tensor["shape"].dump(),
        tensor["name"].get<std::string>()));
  }
}

nlohmann::ordered_json cpu_device() {
  nlohmann::ordered_json device = {{"kind", "cpu"}};
  device.update(build_and_machine());
  auto sets = nlohmann::ordered_json::array();
  for (const cpu::Isa isa :
       {cpu::Isa::scalar,
        cpu::Isa::avx2,
        cpu::Isa::avx512,
        cpu::Isa::avx512_bf16,
        cpu::Isa::neon}) {
    if (cpu::isa_supported(isa)) sets.push_back(cpu::isa_name(isa));
  }
  device["isa_supported"] = sets;
  return device;
}

nlohmann::ordered_json gpu_device(const mlx_cuda::Gpu& gpu) {
  return {
      {"kind", "cuda"},
      {"name", gpu.name},
      {"compute_capability", fmt::format("{}.{}", gpu.capability / 10, gpu.capability % 10)},
      {"multiprocessors", gpu.multiprocessors},
      {"memory_bytes", gpu.memory_bytes}};
}

/// What runs the kernels here, and what else this build could use.
nlohmann::ordered_json backends() {
  const auto& cuda = mlx_cuda::availability();
  const auto architectures = mlx_cuda::kernel_architectures();
  const char* flavour = mlx_cuda::mlx_has_cuda()           ? "cuda"
                        : mlx::core::metal::is_available() ? "metal"
                                                           : "cpu";
  return {
      {"backend", backend_name(active_backend())},
      {"mlx_version", mlx::core::version()},
      {"mlx_flavour", flavour},
      {"cuda_kernels", architectures.empty() ? "none in this build" : architectures},
      {"cuda", cuda.available ? "available" : cuda.why},
      {"cuda_hint", cuda.hint}};
}

void inspect_devices(Console& console) {
  auto json = backends();
  json["devices"] = {cpu_device()};
  for (const auto& gpu : mlx_cuda::gpus()) json["devices"].push_back(gpu_device(gpu));
  console.emit(json);
  if (console.json) return;
  for (const auto& device : json["devices"]) {
    print_summary(console, device);
    console.line("");
  }
  json.erase("devices");
  print_summary(console, json);
}

void run_inspect(Console& console, const InspectFlags& options) {
  if (options.devices == !options.path.empty()) {
    throw Error(
        ErrorCode::invalid_input, "[inspect] exactly one of PATH and --devices must be given");
  }
  if (options.devices) return inspect_devices(console);
  const io::FileSummary summary = io::unwrap(io::inspect_path(options.path));
  if (summary.kind == io::FileKind::unknown) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be a model, an adapter or a data set but is none of these", options.path),
        "known are .gguf and .safetensors files, Hugging Face folders, adapter folders and folders "
        "with train.jsonl, valid.jsonl or test.jsonl");
  }
  const auto json = summary_json(summary, options);
  console.emit(json);
  if (!console.json) print_summary(console, json);
}

}  // namespace

Command add_inspect(CLI::App& parent) {
  auto options = std::make_shared<InspectFlags>();
  CLI::App* app =
      parent.add_subcommand("inspect", "What a file or folder is, or what this machine has");
  app->add_option("path", options->path, "Model, adapter, .safetensors file or data set");
  app->add_flag("--devices", options->devices, "The devices of this machine instead");
  app->add_flag("--tensors", options->tensors, "List every tensor");
  app->footer(kInspectFooter);
  return {app, [options](Console& console) { run_inspect(console, *options); }};
}

}  // namespace metal_lora::cli
