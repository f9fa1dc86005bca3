// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <unistd.h>

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/lora_kernels.h"
#endif
#include "kernels/metal/plans.h"
#include "metal_lora/error.h"
#include "metal_lora/train.h"
#include "src/cli/bench_counters.h"
#include "src/cli/bench_ops.h"
#include "src/cli/bench_timing.h"
#include "src/cli/commands.h"
#include "src/cli/interrupt.h"
#include "src/cli/session.h"
#include "src/cli/version.h"

namespace fs = std::filesystem;
namespace mx = mlx::core;

namespace metal_lora::cli {
namespace {

constexpr const char* kBenchFooter = R"(Examples:
  metal-lora bench ops --json > ops.json
  metal-lora bench decode  -m MODEL --rank 16
  metal-lora bench prefill -m MODEL --prompt-tokens 256
  metal-lora bench train   -m MODEL --rank 8 --batch-size 4 --seq-length 256
  metal-lora bench ops --explain
  metal-lora bench --counters

ops gives ms, GFLOP/s, GB/s and the share of this machine's limit (register multiply-adds, streaming
read), measured in the same run. decode, prefill and train run the whole program's path; --rank N uses
a random unmerged adapter on every linear. Machines are shared: compare figures of one run only.)";

struct BenchFlags {
  std::string what;
  ModelOptions model;
  int rank = 0;
  int prompt_tokens = 0, generate_tokens = 128, rounds = 5;
  int batch_size = 4, seq_length = 256, iters = 6;
  bool explain = false, counters = false;
};

/// An adapter with small values everywhere, as after training.
AdapterWeights random_adapter(const ModelConfig& config, int rank, mx::Dtype dtype) {
  std::vector<AdapterModule> modules;
  uint64_t state = 1;
  const auto matrix = [&](int rows, int columns) {
    std::vector<float> values(static_cast<size_t>(rows) * static_cast<size_t>(columns));
    for (float& value : values) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      value = (static_cast<float>(state >> 40) / (1 << 24) - 0.5f) * 0.01f;
    }
    mx::array a = mx::astype(mx::array(values.data(), {rows, columns}, mx::float32), dtype);
    a.eval();
    return a;
  };
  for (const LinearInfo& linear : adaptable_linears(config)) {
    modules.push_back(
        {linear.path,
         Lora{matrix(rank, linear.in_features), matrix(linear.out_features, rank), 1.0f}});
  }
  return AdapterWeights(config, std::move(modules));
}

nlohmann::ordered_json timing_json(const Timing& timing) {
  return {
      {"ms_median", timing.median_ms},
      {"ms_p10", timing.p10_ms},
      {"ms_p90", timing.p90_ms},
      {"runs", timing.runs}};
}

/// Neighbours slow a limit down, never up: the larger of two measurements.
MachineLimits larger(const MachineLimits& x, const MachineLimits& y) {
  return {
      std::max(x.f32_gflops, y.f32_gflops),
      std::max(x.bf16_gflops, y.bf16_gflops),
      std::max(x.read_gbps, y.read_gbps)};
}

void report_ops(Console& console) {
  MachineLimits limits = measure_limits();
  std::vector<OpResult> results;
  bench_ops([&](const OpResult& result) {
    results.push_back(result);
    console.progress(fmt::format("{} {} {}", result.name, result.dtype, result.shape));
  });
  limits = larger(limits, measure_limits());
  console.line(fmt::format(
      "limits: f32 {:.0f} GFLOP/s, bf16 {:.0f} GFLOP/s, read {:.1f} GB/s",
      limits.f32_gflops,
      limits.bf16_gflops,
      limits.read_gbps));
  console.line(fmt::format(
      "{:<21} {:<10} {:<32} {:>9} {:>9} {:>9} {:>8} {:>7} {:>6}",
      "op",
      "dtype",
      "shape",
      "median ms",
      "p10",
      "p90",
      "GFLOP/s",
      "GB/s",
      "limit"));
  auto rows = nlohmann::ordered_json::array();
  for (const OpResult& r : results) {
    console.line(fmt::format(
        "{:<21} {:<10} {:<32} {:>9.4f} {:>9.4f} {:>9.4f} {:>8.1f} {:>7.1f} {:>5.0f}%",
        r.name,
        r.dtype,
        r.shape,
        r.timing.median_ms,
        r.timing.p10_ms,
        r.timing.p90_ms,
        r.gflops(),
        r.gbps(),
        100 * r.share_of_limit(limits)));
    nlohmann::ordered_json row = {
        {"op", r.name}, {"dtype", r.dtype}, {"shape", r.shape}, {"form", r.form}};
    row.update(timing_json(r.timing));
    row["gflops"] = r.gflops();
    row["gbps"] = r.gbps();
    row["share_of_limit"] = r.share_of_limit(limits);
    rows.push_back(row);
  }
  console.emit(
      {{"bench", "ops"},
       {"machine", build_and_machine()},
       {"limits", to_json(limits)},
       {"results", rows}});
}

/// The Metal plans of a LoRA linear in bf16, and the rule that chose them. Affine formats in groups
/// of 64 with f16 scales.
std::vector<std::string> metal_forms(
    uint32_t tokens, WeightFormat format, uint32_t n, uint32_t k, int rank) {
  metal::LoraShape shape;
  shape.m = tokens;
  shape.n = n;
  shape.k = k;
  shape.format = format;
  shape.group_size = 64;
  shape.scales_dtype = DType::f16;
  shape.rank = static_cast<uint32_t>(rank);
  shape.dtype = shape.lora_dtype = DType::bf16;
  try {
    std::vector<std::string> forms;
    for (const auto& plan : metal::plan_lora_forward(shape)) {
      forms.push_back(fmt::format("{}: {}", plan.entry->name, plan.why));
    }
    return forms;
  } catch (const std::invalid_argument& why) {
    return {fmt::format("none: {}", why.what())};
  }
}

/// The same on an H100, by the CUDA kernels; empty in a build without them.
std::string cuda_form(uint32_t tokens, WeightFormat format, uint32_t n, uint32_t k, int rank) {
#ifdef METAL_LORA_CUDA
  cuda::LoraBranch branch;
  branch.weight.params.n = n;
  branch.weight.params.k = k;
  branch.weight.params.format = format;
  branch.weight.params.group_size = 64;
  branch.weight.params.scales_dtype = DType::f16;
  branch.lora.params.rank = static_cast<uint32_t>(rank);
  branch.lora.params.dtype = DType::bf16;
  const auto plan = cuda::plan_linear(cuda::Context{}, tokens, DType::bf16, branch);
  constexpr const char* kForms[] = {"vector", "skinny", "tiled", "generic"};
  return fmt::format(
      "{}{}, {} dispatch{}: {}",
      kForms[static_cast<size_t>(plan.form)],
      plan.dequantize_first ? " over a 16-bit copy of W" : "",
      plan.dispatches,
      plan.dispatches == 1 ? "" : "es",
      plan.why);
#else
  static_cast<void>(tokens), static_cast<void>(format), static_cast<void>(n);
  static_cast<void>(k), static_cast<void>(rank);
  return "";
#endif
}

void explain_forms(Console& console, const BenchFlags& options) {
  auto rows = nlohmann::ordered_json::array();
  static constexpr const char* kFormats[] = {"f32", "f16", "bf16", "int4", "int8", "nf4"};
  const int rank = options.rank > 0 ? options.rank : 8;
  const auto add = [&](uint32_t tokens, const std::string& format, uint32_t n, uint32_t k) {
    const std::string form = kernel_form(tokens, format, n, k);
    const auto at = std::find(std::begin(kFormats), std::end(kFormats), format);
    const auto weight_format = static_cast<WeightFormat>(at - std::begin(kFormats));
    const auto metal = metal_forms(tokens, weight_format, n, k, rank);
    const auto cuda = cuda_form(tokens, weight_format, n, k, rank);
    rows.push_back(
        {{"tokens", tokens},
         {"out", n},
         {"in", k},
         {"weight", format},
         {"form", form},
         {"metal_rank", rank},
         {"metal", metal},
         {"cuda", cuda}});
    console.line(fmt::format("M={:<5} {:>6} x {:<6} {}", tokens, n, k, form));
    for (const auto& text : metal)
      console.line(fmt::format("{:24}Metal, rank {}: {}", "", rank, text));
    if (!cuda.empty()) console.line(fmt::format("{:24}CUDA, rank {}: {}", "", rank, cuda));
  };
  if (options.model.model.empty()) {
    for (const char* format : {"f32", "bf16", "int4", "int8", "nf4"}) {
      for (const uint32_t tokens : {1u, 8u, 64u, 512u}) add(tokens, format, 2048, 2048);
    }
  } else {
    const auto model = Model::load(options.model.model, options.model.load_options());
    for (int slot = 0; slot < kSlotsPerLayer; ++slot) {
      const auto path = fmt::format("model.layers.0.{}", slot_path(static_cast<Slot>(slot)));
      const WeightParams& p = model->linear(path).weight.params();
      for (const uint32_t tokens : {1u, 256u})
        add(tokens, kFormats[static_cast<size_t>(p.format)], p.n, p.k);
    }
  }
  console.emit({{"bench", "explain"}, {"machine", build_and_machine()}, {"forms", rows}});
}

/// `count` ids that differ from one another, in the vocabulary's middle.
std::vector<int32_t> some_tokens(const ModelConfig& config, int count) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i)
    tokens.push_back((config.vocab_size / 2 + 37 * i) % config.vocab_size);
  return tokens;
}

void bench_generation(Console& console, const BenchFlags& options) {
  Session session = Session::load(console, options.model);
  if (options.rank > 0) {
    session.adapter = random_adapter(session.model->config(), options.rank, session.model->dtype());
  }
  const bool decode = options.what == "decode";
  const int prompt_tokens = options.prompt_tokens > 0 ? options.prompt_tokens : (decode ? 16 : 256);
  Generator generator(session.model, session.tokenizer, session.adapter);
  GenerateOptions generate;
  generate.ignore_eos = true;
  generate.max_tokens = decode ? options.generate_tokens : 1;
  const auto prompt = some_tokens(session.model->config(), prompt_tokens);
  const Interruptible interrupt;
  std::vector<double> tokens_per_second;
  GenerationResult last;
  for (int round = -1; round < options.rounds; ++round) {  // the first one warms up
    generator.reset();
    last = generator.generate(prompt, generate, {}, interrupt.flag());
    if (interrupt.requested()) throw Error(ErrorCode::interrupted, "[bench] interrupted");
    if (round >= 0) tokens_per_second.push_back(decode ? last.generation_tps : last.prompt_tps);
    console.progress(fmt::format("{} round {}/{}", options.what, round + 1, options.rounds));
  }
  const Timing summary = summarize(tokens_per_second);  // of tokens per second, not of ms
  nlohmann::ordered_json json = {
      {"bench", options.what},
      {"model", options.model.model},
      {"adapter",
       options.rank > 0 ? fmt::format("random, rank {}", options.rank)
                        : options.model.adapter_path},
      {"dtype", options.model.dtype},
      {"quantize", quantization_name(options.model.quantize)},
      {"prompt_tokens", prompt_tokens},
      {"generated_tokens", decode ? options.generate_tokens : 0},
      {"tokens_per_second", summary.median_ms},
      {"tokens_per_second_p10", summary.p10_ms},
      {"tokens_per_second_p90", summary.p90_ms},
      {"rounds", summary.runs},
      {"peak_memory_bytes", last.peak_memory_bytes},
      {"machine", build_and_machine()}};
  console.emit(json);
  if (!console.json) {
    console.line(fmt::format(
        "{}: {:.1f} tokens/s (p10 {:.1f}, p90 {:.1f}, {} rounds); peak memory {}",
        options.what,
        summary.median_ms,
        summary.p10_ms,
        summary.p90_ms,
        summary.runs,
        format_bytes(static_cast<double>(last.peak_memory_bytes))));
  }
}

/// A folder that goes away with the object.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (fs::temp_directory_path() / "metal-lora-bench-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) {
      throw Error(ErrorCode::io, fmt::format("[bench] {} cannot be made", name));
    }
    path_ = name;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// Samples longer than any sequence length asked for: each is cut to exactly that many tokens.
void write_training_data(const fs::path& folder, int samples, int tokens) {
  static constexpr const char* kWords[] = {
      "river", "stone", "seven", "green", "walk", "letter", "over", "night"};
  for (const char* name : {"train.jsonl", "valid.jsonl"}) {
    std::ofstream file(folder / name);
    uint64_t state = 7;
    for (int s = 0; s < samples; ++s) {
      std::string text;
      for (int i = 0; i < tokens + 8; ++i) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        text += std::string(" ") + kWords[(state >> 33) % std::size(kWords)];
      }
      file << nlohmann::json{{"text", text}}.dump() << "\n";
    }
  }
}

void bench_train(Console& console, const BenchFlags& options) {
  const ScratchFolder scratch;
  TrainingConfig config;
  config.model = options.model.model;
  config.data = scratch.path().string();
  config.adapter_path = (scratch.path() / "adapter").string();
  config.lora_rank = options.rank > 0 ? options.rank : 8;
  config.num_layers = -1;
  config.batch_size = options.batch_size;
  config.max_seq_length = options.seq_length;
  config.iters = options.iters + 2;  // two warm up
  config.steps_per_report = 1;
  config.steps_per_eval = config.save_every = config.iters + 1;
  config.val_batches = 1;
  config.report_to = "none";
  config.dtype = options.model.dtype;
  config.quantize = options.model.quantize;
  config.quantize_group_size = options.model.quantize_group_size;
  config.double_quant = options.model.double_quant;
  config.validate();
  write_training_data(scratch.path(), options.batch_size * (config.iters + 1), options.seq_length);

  const auto model = Model::load(config.model, config.load_options());
  const Interruptible interrupt;
  std::vector<double> tokens_per_second, losses;
  TrainerCallbacks callbacks;
  callbacks.on_report = [&](const TrainReport& report) {
    losses.push_back(report.train_loss);
    if (report.iteration > 2) tokens_per_second.push_back(report.tokens_per_second);
    console.progress(fmt::format("train step {}/{}", report.iteration, report.iterations));
  };
  callbacks.should_stop = [&] { return interrupt.requested(); };
  Trainer trainer(
      model, text::Tokenizer::from_path(config.model), std::nullopt, config, std::move(callbacks));
  trainer.run();
  const Timing summary = summarize(tokens_per_second);
  console.emit(
      {{"bench", "train"},
       {"model", config.model},
       {"rank", config.lora_rank},
       {"dtype", config.dtype},
       {"quantize", quantization_name(config.quantize)},
       {"batch_size", config.batch_size},
       {"seq_length", config.max_seq_length},
       {"tokens_per_second", summary.median_ms},
       {"tokens_per_second_p10", summary.p10_ms},
       {"tokens_per_second_p90", summary.p90_ms},
       {"steps", summary.runs},
       {"losses", losses},
       {"peak_memory_bytes", peak_memory_bytes()},
       {"machine", build_and_machine()}});
  if (!console.json) {
    console.line(fmt::format(
        "train {} x {}: {:.0f} tokens/s (p10 {:.0f}, p90 {:.0f}, {} steps); peak memory {}",
        config.batch_size,
        config.max_seq_length,
        summary.median_ms,
        summary.p10_ms,
        summary.p90_ms,
        summary.runs,
        format_bytes(static_cast<double>(peak_memory_bytes()))));
  }
}

void run_bench(Console& console, const BenchFlags& options) {
  if (options.counters) return bench_counters(console);
  if (options.what.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        "[bench] what to measure must be ops, train, decode or prefill but is missing",
        "metal-lora bench --help has examples");
  }
  if (options.explain) return explain_forms(console, options);
  if (options.what == "ops") return report_ops(console);
  if (options.model.model.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[bench {}] --model must be given but is not", options.what));
  }
  if (options.what == "train") return bench_train(console, options);
  bench_generation(console, options);
}

}  // namespace

Command add_bench(CLI::App& parent) {
  auto options = std::make_shared<BenchFlags>();
  CLI::App* app =
      parent.add_subcommand("bench", "Measure operations, training, decoding and prefill");
  app->add_option("what", options->what, "ops, train, decode or prefill")
      ->check(CLI::IsMember({"ops", "train", "decode", "prefill"}));
  options->model.add_to(*app, "bfloat16");
  app->get_option("--model")->required(false);
  app->add_option(
         "--rank",
         options->rank,
         "A random adapter of this rank on every linear; 0: none (train: 8)")
      ->check(CLI::Range(0, kMaxAdapterRank))
      ->capture_default_str();
  app->add_option(
         "--prompt-tokens", options->prompt_tokens, "Default: 16 for decode, 256 for prefill")
      ->check(CLI::NonNegativeNumber);
  app->add_option("--tokens", options->generate_tokens, "Tokens to decode")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app->add_option("--rounds", options->rounds, "Rounds of decode and prefill")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--batch-size", options->batch_size, "Of train")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--seq-length", options->seq_length, "Tokens of a sample of train")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app->add_option("--iters", options->iters, "Measured steps of train")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag(
      "--explain", options->explain, "Print which kernel each shape takes, and measure nothing");
  app->add_flag(
      "--counters",
      options->counters,
      "Count what the Metal kernels read, write and multiply, on the emulator (minutes)");
  app->footer(kBenchFooter);
  return {app, [options](Console& console) { run_bench(console, *options); }};
}

}  // namespace metal_lora::cli
