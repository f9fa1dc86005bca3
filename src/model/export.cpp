// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/export.h"

#include <numeric>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "src/ops/export.h"

namespace metal_lora {

namespace mx = mlx::core;

namespace {

std::vector<ExportedArray> describe(
    const std::vector<std::string>& names, const std::vector<mx::array>& arrays) {
  std::vector<ExportedArray> out;
  for (size_t i = 0; i < arrays.size(); ++i) {
    out.push_back({names[i], arrays[i].shape(), arrays[i].dtype()});
  }
  return out;
}

/// The flat buffer cut into tensors of the shapes of `like`.
std::vector<mx::array> unflatten(
    const mx::array& flat, const std::vector<mx::array>& like, mx::StreamOrDevice s) {
  std::vector<mx::array> parts;
  int begin = 0;
  for (const auto& tensor : like) {
    const int end = begin + static_cast<int>(tensor.size());
    parts.push_back(
        mx::reshape(mx::slice(flat, mx::Shape{begin}, mx::Shape{end}, s), tensor.shape(), s));
    begin = end;
  }
  return parts;
}

}  // namespace

StepFunction train_step_function(const Model& model, const AdapterWeights& adapter) {
  return [&model, adapter](const std::vector<mx::array>& in) {
    const auto s = ops::stream();
    const ops::Segments segments{in[1], in[2]};
    const auto loss = [&](const std::vector<mx::array>& values) {
      return std::vector<mx::array>{
          model.loss(in[0], segments, in[3], in[4], adapter.with_parameters(values), true)};
    };
    const auto values = unflatten(in[5], adapter.parameters(), s);
    auto [losses, grads] = mx::vjp(loss, values, {mx::array(1.0f)});
    for (auto& g : grads) g = mx::reshape(mx::astype(g, mx::float32, s), {-1}, s);
    auto outputs = ops::adamw_metal({in[5], mx::concatenate(grads, 0, s), in[6], in[7]}, in[8]);
    outputs.insert(outputs.begin(), losses[0]);
    return outputs;
  };
}

ExportedFunction export_train_step(
    const Model& model,
    const AdapterWeights& adapter,
    int tokens,
    const std::filesystem::path& file) {
  const auto tensors = adapter.parameters();
  const int count =
      std::accumulate(tensors.begin(), tensors.end(), 0, [](int sum, const mx::array& t) {
        return sum + static_cast<int>(t.size());
      });
  if (count == 0) {
    throw Error(ErrorCode::invalid_input, "[export] the adapter must have tensors but has none");
  }
  std::vector<mx::array> outputs;
  const auto step = [&, graph = train_step_function(model, adapter)](const auto& in) {
    outputs = graph(in);
    return outputs;
  };
  const auto ints = [&] { return mx::zeros({tokens}, mx::int32); };
  const auto flat = [&] { return mx::zeros({count}, mx::float32); };
  const std::vector<mx::array> arguments{
      ints(), ints(), ints(), ints(), mx::zeros({tokens}), flat(), flat(), flat(), mx::zeros({8})};
  ops::export_for_metal(file, step, arguments);
  return {
      file,
      describe(
          {"tokens",
           "positions",
           "segment_start",
           "targets",
           "weights",
           "param",
           "m",
           "v",
           "factors"},
          arguments),
      describe({"loss", "param", "m", "v", "grad_norm", "skipped"}, outputs)};
}

ExportedFunction export_decode_step(
    const Model& model,
    const AdapterWeights& adapter,
    int capacity,
    const std::filesystem::path& file) {
  const auto& config = model.config();
  std::vector<mx::array> outputs;
  const auto step = [&](const std::vector<mx::array>& in) {
    auto [logits, cache] = model.cached_forward(in[0], in[1], in[2], adapter, 1);
    outputs = {logits, cache};
    return outputs;
  };
  const mx::Shape cache_shape{
      config.num_hidden_layers, 2, capacity, config.num_key_value_heads, config.head_dim};
  const std::vector<mx::array> arguments{
      mx::zeros({1}, mx::int32), mx::array(0), mx::zeros(cache_shape, model.dtype())};
  ops::export_for_metal(file, step, arguments);
  return {
      file,
      describe({"token", "position", "cache"}, arguments),
      describe({"logits", "cache"}, outputs)};
}

}  // namespace metal_lora
