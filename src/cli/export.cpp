// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/export.h"

#include <filesystem>
#include <memory>

#include <fmt/format.h>
#include <mlx/transforms.h>

#include "metal_lora/adapter.h"
#include "metal_lora/train.h"
#include "src/cli/commands.h"
#include "src/cli/session.h"
#include "src/io/atomic_file.h"
#include "src/launch/backend.h"
#include "src/ops/checks.h"
#include "src/train/adapter_init.h"

namespace metal_lora::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kExportFooter = R"(Examples:
  metal-lora export -m MODEL --output steps
  metal-lora export -m MODEL -a adapters --output steps --tokens 1024 --capacity 2048

Writes whole steps as graphs of MLX with this project's Metal kernels in them, made on any machine:
  train_step.mlxfn    loss, gradients and AdamW of a packed stream of --tokens tokens
  decode_step.mlxfn   one token through a cache of --capacity tokens
  steps.json          names, shapes and types of what goes in and out
On a Mac: step = mlx.core.import_function("steps/decode_step.mlxfn"). Weights are in the graphs.
No step has run on a GPU yet: the kernels in them are tested by the emulator.)";

struct ExportFlags {
  ModelOptions model;
  std::string output;
  int rank = 8, tokens = 512, capacity = 512;
};

nlohmann::ordered_json step_json(const ExportedFunction& step) {
  const auto arrays = [](const std::vector<ExportedArray>& list) {
    auto out = nlohmann::ordered_json::array();
    for (const auto& a : list) {
      out.push_back(
          {{"name", a.name},
           {"shape", std::vector<int>(a.shape.begin(), a.shape.end())},
           {"dtype", ops::dtype_name(a.dtype)}});
    }
    return out;
  };
  return {
      {"file", step.file.filename().string()},
      {"inputs", arrays(step.inputs)},
      {"outputs", arrays(step.outputs)}};
}

void run_export(Console& console, const ExportFlags& flags) {
  BackendScope scope(Backend::metal);  // from the start: weights stay in rows
  Session session = Session::load(console, flags.model);
  const fs::path folder = flags.output;
  fs::create_directories(folder);
  if (session.adapter.modules().empty()) {
    TrainingConfig config;
    config.lora_rank = flags.rank;
    config.num_layers = -1;
    session.adapter = train::initial_adapter(session.model->config(), config);
    write_adapter(folder / "adapter", AdapterFormat::mlx_lm, session.adapter, AdapterInfo{});
  }
  console.progress("export train_step");
  const auto train =
      export_train_step(*session.model, session.adapter, flags.tokens, folder / "train_step.mlxfn");
  console.progress("export decode_step");
  // Cast now: a cast inside the graph would run for each token.
  const auto narrow = session.adapter.astype(session.model->dtype());
  mlx::core::eval(narrow.parameters());
  const auto decode =
      export_decode_step(*session.model, narrow, flags.capacity, folder / "decode_step.mlxfn");
  console.clear_progress();
  auto tensors = nlohmann::ordered_json::array();
  for (const auto& module : session.adapter.modules()) {
    for (const auto* part : {"lora_a", "lora_b"}) tensors.push_back(module.path + "." + part);
  }
  nlohmann::ordered_json json = {
      {"output", flags.output},
      {"train_step", step_json(train)},
      {"decode_step", step_json(decode)},
      {"param_tensors", tensors}};
  io::unwrap(io::write_file_atomic((folder / "steps.json").string(), json.dump(1) + "\n"));
  console.emit(json);
  if (!console.json) {
    for (const auto& step : {train, decode}) {
      console.line(fmt::format(
          "{}  {}",
          step.file.string(),
          format_bytes(static_cast<double>(fs::file_size(step.file)))));
    }
  }
}

}  // namespace

Command add_export(CLI::App& parent) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* app =
      parent.add_subcommand("export", "Write a training and a decode step for MLX on a Mac");
  flags->model.add_to(*app, "bfloat16");
  app->add_option("--output,-o", flags->output, "The folder")->required();
  app->add_option("--rank", flags->rank, "Of the new adapter, when none is given")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app->add_option("--tokens", flags->tokens, "Of the training step's packed stream")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--capacity", flags->capacity, "Of the decode step's cache, in tokens")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->footer(kExportFooter);
  return {app, [flags](Console& console) { run_export(console, *flags); }};
}

}  // namespace metal_lora::cli
