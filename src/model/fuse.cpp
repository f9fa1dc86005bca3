// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/fuse.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/text/tokenizer.h"

namespace fs = std::filesystem;
namespace mx = mlx::core;

namespace metal_lora {
namespace {

struct Logits {
  std::vector<float> values;  ///< [tokens, vocab]
  size_t vocab = 0;
};

Logits logits_of(
    const Model& model, const AdapterWeights& adapter, const std::vector<int32_t>& tokens) {
  KVCache cache(model);
  const mx::array logits = model.decode(tokens, cache, adapter, static_cast<int>(tokens.size()));
  return {
      {logits.data<float>(), logits.data<float>() + logits.size()},
      static_cast<size_t>(logits.shape(1))};
}

double log_sum_exp(std::span<const float> row) {
  const double largest = *std::max_element(row.begin(), row.end());
  double sum = 0.0;
  for (const float x : row) sum += std::exp(x - largest);
  return largest + std::log(sum);
}

/// Mean over tokens of Σ p·(log p − log q), nats.
double mean_kl(const Logits& p, const Logits& q) {
  const size_t rows = p.values.size() / p.vocab;
  double total = 0.0;
  for (size_t r = 0; r < rows; ++r) {
    const std::span<const float> x(p.values.data() + r * p.vocab, p.vocab);
    const std::span<const float> y(q.values.data() + r * q.vocab, q.vocab);
    const double zx = log_sum_exp(x), zy = log_sum_exp(y);
    for (size_t i = 0; i < p.vocab; ++i) {
      const double log_p = x[i] - zx;
      total += std::exp(log_p) * (log_p - (y[i] - zy));
    }
  }
  return std::max(0.0, total / static_cast<double>(rows));  // rounding may leave −1e-17
}

}  // namespace

FuseReport fuse_adapter(
    const fs::path& model,
    const fs::path& adapter_path,
    const fs::path& folder,
    FuseOptions options) {
  FuseReport report;
  LoadOptions load;
  load.dtype = mx::float32;
  Logits base, adapted;
  std::vector<int32_t> tokens;
  {
    const auto loaded = Model::load(model, load);
    options.target.adapter = load_adapter(adapter_path, loaded->config()).weights;
    if (!options.prompt.empty()) {
      tokens = text::Tokenizer::from_path(model).encode(options.prompt, true);
      const auto context = static_cast<size_t>(loaded->config().max_position_embeddings);
      tokens.resize(std::min(tokens.size(), context));
      base = logits_of(*loaded, {}, tokens);
      adapted = logits_of(*loaded, options.target.adapter, tokens);
      report.prompt_tokens = static_cast<int>(tokens.size());
    }
  }
  options.target.on_merged = [&](const KeptUpdate& linear) {
    report.linears.push_back(linear);
    report.total += linear;
  };
  options.target.before_config = [&] {
    if (report.total.error() <= kRefuseUpdateError || options.allow_loss) return;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[fuse] the merged weights must keep the adapter but the rounding of the target loses "
            "it: "
            "{:.0f} % of the update's norm is noise, {:.0f} % of the update is left",
            100 * report.total.error(),
            100 * report.total.kept()),
        "choose --dtype float32 or bfloat16 without --quantize, or --allow-loss; or keep the "
        "adapter "
        "beside the base, unmerged");
  };
  export_model(model, folder, options.target);
  if (!tokens.empty()) {
    const auto merged = Model::load(folder, load);
    report.kl_merged = mean_kl(adapted, logits_of(*merged, {}, tokens));
    report.kl_adapter = mean_kl(adapted, base);
  }
  return report;
}

}  // namespace metal_lora
