// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/fuse.h"

#include <memory>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/session.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kFuseFooter = R"(Examples:
  metal-lora fuse -m MODEL -a adapters --output fused
  metal-lora fuse -m MODEL -a adapters --output fused --dtype float32 --json

Writes a Hugging Face folder with W + scale*B*A, and proves it: for each linear the share of the
update that the target's rounding kept, and the KL divergence of the merged model's logits from
those of base + adapter on a fixed prompt, beside the KL that the adapter makes at all. A merge that
loses the adapter (a 4-bit target usually does) is refused.)";

struct FuseFlags {
  std::string model, adapter_path, output, dtype;
  TargetQuantization quantize;
  bool allow_loss = false;
};

void print_report(Console& console, const FuseFlags& options, const FuseReport& report) {
  for (const KeptUpdate& linear : report.linears) {
    console.line(
        fmt::format("kept {:7.4f}  noise {:7.4f}  {}", linear.kept(), linear.error(), linear.path));
  }
  console.line(fmt::format(
      "kept {:7.4f}  noise {:7.4f}  all {} linears",
      report.total.kept(),
      report.total.error(),
      report.linears.size()));
  console.line(fmt::format(
      "KL of the merged model from base + adapter {:.3g} nats; the adapter's own {:.3g} nats ({} "
      "tokens)",
      report.kl_merged,
      report.kl_adapter,
      report.prompt_tokens));
  console.line("merged model: " + console.bold(options.output));
}

void run_fuse(Console& console, const FuseFlags& options) {
  FuseOptions fuse;
  fuse.target.quantize_bits = options.quantize.bits();
  fuse.target.quantize_group = options.quantize.group_size;
  fuse.target.dtype = target_dtype(options.dtype, fuse.target.quantize_bits);
  fuse.target.progress = [&](double fraction) {
    console.progress(fmt::format("fuse {} {:.0f} %", progress_bar(fraction, 30), 100 * fraction));
  };
  fuse.allow_loss = options.allow_loss;
  const FuseReport report = fuse_adapter(options.model, options.adapter_path, options.output, fuse);
  console.clear_progress();
  nlohmann::ordered_json json = {
      {"output", options.output},
      {"kept", report.total.kept()},
      {"noise", report.total.error()},
      {"kl_merged", report.kl_merged},
      {"kl_adapter", report.kl_adapter},
      {"prompt_tokens", report.prompt_tokens},
      {"linears", nlohmann::ordered_json::array()}};
  for (const KeptUpdate& linear : report.linears) {
    json["linears"].push_back(
        {{"path", linear.path}, {"kept", linear.kept()}, {"noise", linear.error()}});
  }
  console.emit(json);
  if (!console.json) print_report(console, options, report);
  if (report.total.error() > kWarnUpdateError) {
    console.warn(fmt::format(
        "rounding to {} adds noise of {:.0f} % of the update; --dtype float32 adds none",
        options.quantize.bits() > 0 ? fmt::format("{} bits", options.quantize.bits())
                                    : (options.dtype.empty() ? "bfloat16" : options.dtype),
        100 * report.total.error()));
  }
}

}  // namespace

Command add_fuse(CLI::App& parent) {
  auto options = std::make_shared<FuseFlags>();
  CLI::App* app = parent.add_subcommand("fuse", "Merge an adapter into its base, and prove it");
  app->add_option("--model,-m", options->model, "The base: a .gguf file or a Hugging Face folder")
      ->required();
  app->add_option("--adapter-path,-a", options->adapter_path, "The adapter's folder")->required();
  app->add_option("--output,-o,--save-path", options->output, "The new folder")->required();
  app->add_option(
      "--dtype", options->dtype, "Of the merged weights: float32, bfloat16 (default) or float16");
  options->quantize.add_to(
      *app, "Quantise the merged weights to 4 or 8 bits", "--quantize-group-size");
  app->add_flag(
      "--allow-loss", options->allow_loss, "Write a merge that loses the adapter all the same");
  app->footer(kFuseFooter);
  return {app, [options](Console& console) { run_fuse(console, *options); }};
}

}  // namespace metal_lora::cli
