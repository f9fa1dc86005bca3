// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/convert.h"

#include <memory>

#include <fmt/format.h>

#include "metal_lora/adapter.h"
#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/session.h"
#include "src/io/inspect.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kConvertFooter = R"(Examples:
  metal-lora convert model.gguf --output model-hf --dtype float32
  metal-lora convert model-hf --output model-4bit --quantize 4 --quantize-group-size 64
  metal-lora convert adapters --to peft --output adapters-peft
  metal-lora convert adapters-peft --to mlx-lm --output adapters

A model becomes a Hugging Face folder that transformers and mlx-lm load; with --quantize an MLX
checkpoint. An adapter changes its format; its tensors keep every bit.)";

struct ConvertFlags {
  std::string input, output, to, dtype;
  TargetQuantization quantize;
  bool fold_scale = false;
};

void convert_adapter(Console& console, const ConvertFlags& options) {
  AdapterFile adapter = read_adapter(options.input);
  const AdapterFormat from = adapter.info.format;
  AdapterFormat to = from == AdapterFormat::peft ? AdapterFormat::mlx_lm : AdapterFormat::peft;
  if (!options.to.empty()) to = options.to == "peft" ? AdapterFormat::peft : AdapterFormat::mlx_lm;
  WriteAdapterOptions write;
  write.fold_scale = options.fold_scale;
  const auto file = write_adapter(options.output, to, adapter, write);
  console.emit(
      {{"output", file.string()},
       {"from", adapter_format_name(from)},
       {"to", adapter_format_name(to)},
       {"modules", adapter.modules.size()}});
  if (!console.json) {
    console.line(fmt::format(
        "{} modules, {} -> {}: {}",
        adapter.modules.size(),
        adapter_format_name(from),
        adapter_format_name(to),
        file.string()));
  }
}

void convert_model(Console& console, const ConvertFlags& options) {
  if (options.to == "peft" || options.to == "mlx-lm") {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[--to] must be hf for a model but is {}", options.to));
  }
  ExportOptions target;
  target.quantize_bits = options.quantize.bits();
  target.quantize_group = options.quantize.group_size;
  target.dtype = target_dtype(options.dtype, target.quantize_bits);
  target.progress = [&](double fraction) {
    console.progress(
        fmt::format("convert {} {:.0f} %", progress_bar(fraction, 30), 100 * fraction));
  };
  export_model(options.input, options.output, target);
  console.clear_progress();
  const auto summary = io::unwrap(io::inspect_path(options.output));
  console.emit(
      {{"output", options.output},
       {"architecture", summary.architecture},
       {"tensors", summary.tensors.size()},
       {"bytes", summary.tensor_bytes}});
  if (!console.json) {
    console.line(fmt::format(
        "{}: {} tensors, {}",
        options.output,
        summary.tensors.size(),
        format_bytes(static_cast<double>(summary.tensor_bytes))));
  }
}

void run_convert(Console& console, const ConvertFlags& options) {
  const auto summary = io::unwrap(io::inspect_path(options.input));
  const bool is_adapter =
      summary.kind == io::FileKind::mlx_adapter || summary.kind == io::FileKind::peft_adapter;
  if (is_adapter) return convert_adapter(console, options);
  if (summary.kind != io::FileKind::gguf && summary.kind != io::FileKind::model_folder) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be a model or an adapter but is: {}",
            options.input,
            io::file_kind_name(summary.kind)));
  }
  convert_model(console, options);
}

}  // namespace

Command add_convert(CLI::App& parent) {
  auto options = std::make_shared<ConvertFlags>();
  CLI::App* app =
      parent.add_subcommand("convert", "GGUF to Hugging Face; adapters between formats");
  app->add_option("input", options->input, "A model or an adapter")->required();
  app->add_option("--output,-o", options->output, "The new folder")->required();
  app->add_option(
         "--to", options->to, "hf for models; peft or mlx-lm for adapters (default: the other one)")
      ->check(CLI::IsMember({"hf", "peft", "mlx-lm"}));
  app->add_option(
      "--dtype",
      options->dtype,
      "Of dense tensors: float32, bfloat16 (default) or float16 (default with --quantize)");
  options->quantize.add_to(
      *app, "4 or 8 bits, as MLX checkpoints have them", "--quantize-group-size,--group-size");
  app->add_flag(
      "--fold-scale",
      options->fold_scale,
      "For mlx-lm, which has one scale: fold differences between modules into B");
  app->footer(kConvertFooter);
  return {app, [options](Console& console) { run_convert(console, *options); }};
}

}  // namespace metal_lora::cli
