// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/model.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <mlx/mlx.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>

#include "metal_lora/error.h"
#include "src/io/json.h"
#include "src/io/result.h"
#include "src/io/safetensors.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

namespace fs = std::filesystem;

const fs::path kModels = fs::path(METAL_LORA_SOURCE_DIR) / "tests/golden/models";

/// f32 against f32: a dozen operations a layer, each with a relative error of about √K·u, K ≤ 64;
/// two layers, logits of size ~1.
constexpr double kF32Tolerance = 24 * 8.0 * 0x1p-24 * 4;
/// bf16 storage between operations: a dozen roundings of 2^-9 a layer add as a random walk.
constexpr double kBf16Tolerance = 6 * 0x1p-8 * 3;

mx::array ints(const std::vector<int32_t>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::int32);
}

ops::Segments segments_of(const std::vector<int>& lengths) {
  std::vector<int32_t> positions, starts;
  for (int length : lengths) {
    const auto start = static_cast<int32_t>(positions.size());
    for (int i = 0; i < length; ++i) {
      positions.push_back(i);
      starts.push_back(start);
    }
  }
  return {ints(positions), ints(starts)};
}

struct Golden {
  std::vector<int32_t> tokens;
  mx::array logits;
};

Golden read_golden(const fs::path& folder) {
  auto file = io::unwrap(io::read_safetensors((folder / "expected.safetensors").string()));
  const auto* tokens = file.find("tokens");
  const auto* logits = file.find("logits");
  const auto* ids = reinterpret_cast<const int32_t*>(tokens->data);
  return {
      {ids, ids + tokens->element_count()},
      mx::array(
          reinterpret_cast<const float*>(logits->data),
          {static_cast<int>(logits->shape[0]), static_cast<int>(logits->shape[1])},
          mx::float32)};
}

mx::array all_logits(
    const Model& model, const std::vector<int32_t>& tokens, const AdapterWeights& adapter = {}) {
  auto hidden = model.hidden(ints(tokens), segments_of({static_cast<int>(tokens.size())}), adapter);
  return ops::reference::lora_linear(
      mx::astype(hidden, mx::float32), LoraLinear{model.head(), std::nullopt, std::nullopt});
}

/// Random adapters on all linears, B not zero.
AdapterWeights random_adapter(const ModelConfig& config, int rank) {
  std::vector<AdapterModule> modules;
  uint64_t seed = 1;
  for (const auto& linear : adaptable_linears(config)) {
    auto a = mx::multiply(normal({rank, linear.in_features}, seed++), mx::array(0.1f));
    auto b = mx::multiply(normal({linear.out_features, rank}, seed++), mx::array(0.3f));
    mx::eval(a, b);
    modules.push_back({linear.path, Lora{a, b, 1.5f}});
  }
  return AdapterWeights(config, std::move(modules));
}

class Family : public ::testing::TestWithParam<const char*> {
 protected:
  fs::path folder() const { return kModels / GetParam(); }
};

TEST_P(Family, LogitsEqualTransformers) {
  const auto golden = read_golden(folder());
  const auto model = Model::load(folder(), {.dtype = mx::float32});
  expect_close(all_logits(*model, golden.tokens), golden.logits, kF32Tolerance, "f32");
  const auto bf16 = Model::load(folder(), {.dtype = mx::bfloat16});
  expect_close(all_logits(*bf16, golden.tokens), golden.logits, kBf16Tolerance, "bf16");
}

TEST_P(Family, DecodingTokenByTokenEqualsTheWholeSequence) {
  const auto golden = read_golden(folder());
  const auto model = Model::load(folder(), {.dtype = mx::float32});
  for (const auto& adapter : {AdapterWeights(), random_adapter(model->config(), 3)}) {
    const auto whole = all_logits(*model, golden.tokens, adapter);
    // 1, 3 and 9 tokens at a time: decode steps of one and of several, and prefill.
    for (int step : {1, 3, 9}) {
      KVCache cache(*model);
      std::vector<mx::array> parts;
      for (size_t at = 0; at < golden.tokens.size(); at += step) {
        const auto count = std::min<size_t>(step, golden.tokens.size() - at);
        parts.push_back(model->decode(
            std::span(golden.tokens).subspan(at, count), cache, adapter, static_cast<int>(count)));
      }
      expect_close(mx::concatenate(parts, 0), whole, kF32Tolerance, "decode");
      EXPECT_EQ(cache.length(), static_cast<int>(golden.tokens.size()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models,
    Family,
    ::testing::Values(
        "llama",
        "llama3-scaled-tied",
        "llama-biases",
        "llama-linear",
        "mistral-window",
        "qwen2",
        "qwen2-yarn",
        "qwen2-window",
        "qwen3"),
    [](const auto& info) {
      std::string name = info.param;
      std::replace(name.begin(), name.end(), '-', '_');
      return name;
    });

TEST(Model, PackedSegmentsDoNotSeeEachOther) {
  const auto model = Model::load(kModels / "llama", {.dtype = mx::float32});
  const std::vector<int32_t> first{1, 5, 9, 13}, second{2, 4, 8, 16, 32}, changed{1, 5, 9, 14};
  const auto pack = [](std::vector<int32_t> a, const std::vector<int32_t>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  const auto run = [&](const std::vector<int32_t>& tokens) {
    auto hidden = model->hidden(ints(tokens), segments_of({4, 5}), {});
    return mx::slice(hidden, {4, 0}, {9, hidden.shape(1)});
  };
  const auto packed = run(pack(first, second));
  EXPECT_TRUE(mx::array_equal(packed, run(pack(changed, second))).item<bool>());
  auto alone = model->hidden(ints(second), segments_of({5}), {});
  expect_close(packed, alone, kF32Tolerance, "alone");
}

TEST(Model, CheckpointingChangesNoGradient) {
  const auto model = Model::load(kModels / "qwen3", {.dtype = mx::float32});
  const auto adapter = random_adapter(model->config(), 4);
  const std::vector<int32_t> tokens{1, 17, 60, 3, 3, 42, 8}, targets{17, 60, 3, 3, 42, 8, 2};
  const auto gradients = [&](bool checkpoint) {
    auto loss = [&](const std::vector<mx::array>& p) {
      return model->loss(
          ints(tokens),
          segments_of({7}),
          ints(targets),
          mx::ones({7}),
          adapter.with_parameters(p),
          true,
          checkpoint);
    };
    const auto parameters = adapter.parameters();
    std::vector<int> argnums(parameters.size());
    std::iota(argnums.begin(), argnums.end(), 0);
    auto result = mx::value_and_grad(loss, argnums)(parameters).second;
    mx::eval(result);
    return result;
  };
  auto kept = gradients(false), recomputed = gradients(true);
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_TRUE(mx::array_equal(kept[i], recomputed[i]).item<bool>()) << i;
    EXPECT_GT(mx::max(mx::abs(kept[i])).item<float>(), 0.0f) << i;
  }
}

TEST(Model, GradientsMatchCentralDifferences) {
  const auto model = Model::load(kModels / "qwen2", {.dtype = mx::float32});
  const auto adapter = random_adapter(model->config(), 2);
  const std::vector<int32_t> tokens{1, 17, 60, 3, 3, 42, 8}, targets{17, 60, 3, 3, 42, 8, 2};
  auto loss = [&](const std::vector<mx::array>& p) {
    return model->loss(
        ints(tokens),
        segments_of({7}),
        ints(targets),
        mx::ones({7}),
        adapter.with_parameters(p),
        true);
  };
  auto parameters = adapter.parameters();
  std::vector<int> argnums(parameters.size());
  std::iota(argnums.begin(), argnums.end(), 0);
  auto gradients = mx::value_and_grad(loss, argnums)(parameters).second;
  // Along a random direction of every tensor. f32 losses of size ~30 carry an error of ~1e-5, which
  // 2h = 0.02 divides; the third derivative adds h² = 1e-4.
  const float h = 0.01f;
  for (size_t i = 0; i < parameters.size(); i += 3) {
    auto direction = normal(parameters[i].shape(), 500 + i);
    direction = mx::divide(direction, mx::sqrt(mx::sum(mx::square(direction))));
    auto shifted = [&](float by) {
      auto p = parameters;
      p[i] = mx::add(p[i], mx::multiply(direction, mx::array(by)));
      return static_cast<double>(loss(p).item<float>());
    };
    const double difference = (shifted(h) - shifted(-h)) / (2.0 * h);
    const double analytic = mx::sum(mx::multiply(gradients[i], direction)).item<float>();
    EXPECT_NEAR(difference, analytic, 2e-3 * std::max(1.0, std::abs(analytic))) << i;
  }
}

TEST(Model, TruncatedCacheGoesOnAsIfTheRestHadNotBeen) {
  const auto model = Model::load(kModels / "llama", {.dtype = mx::float32});
  KVCache cache(*model), clean(*model);
  const std::vector<int32_t> prompt{1, 2, 3, 4, 5}, wrong{50, 51}, right{6};
  model->decode(prompt, cache, {});
  model->decode(wrong, cache, {});
  cache.truncate(5);
  model->decode(prompt, clean, {});
  EXPECT_TRUE(mx::array_equal(model->decode(right, cache, {}), model->decode(right, clean, {}))
                  .item<bool>());
}

TEST(Model, ContextLengthIsALimit) {
  const auto model = Model::load(kModels / "llama", {.dtype = mx::float32});
  KVCache cache(*model);
  const std::vector<int32_t> tokens(65, 3);
  EXPECT_THROW(model->decode(tokens, cache, {}), Error);
}

TEST(Model, QuantisedOnLoadStaysClose) {
  // hidden 32: groups of 32. INT8 rounds weights of range ~6σ to 1/255 of it.
  const auto golden = read_golden(kModels / "llama");
  const auto model = Model::load(
      kModels / "llama",
      {.dtype = mx::float32, .quantize = Quantization::int8, .quantize_group = 32});
  ASSERT_TRUE(model->linear("model.layers.0.self_attn.q_proj").weight.is_quantized());
  expect_close(all_logits(*model, golden.tokens), golden.logits, 0.05, "int8");
}

TEST(AdapterWeights, RefusesWhatDoesNotFit) {
  const auto model = Model::load(kModels / "llama", {.dtype = mx::float32});
  const auto& config = model->config();
  const auto module = [&](const std::string& path, int in, int out) {
    return AdapterModule{path, Lora{mx::zeros({2, in}), mx::zeros({out, 2}), 1.0f}};
  };
  const std::string q = "model.layers.0.self_attn.q_proj";
  EXPECT_NO_THROW(AdapterWeights(config, {module(q, 32, 32)}));
  EXPECT_THROW(AdapterWeights(config, {module(q, 31, 32)}), Error);
  EXPECT_THROW(AdapterWeights(config, {module(q, 32, 33)}), Error);
  EXPECT_THROW(AdapterWeights(config, {module(q, 32, 32), module(q, 32, 32)}), Error);
  EXPECT_THROW(AdapterWeights(config, {module("model.layers.2.self_attn.q_proj", 32, 32)}), Error);
  EXPECT_THROW(AdapterWeights(config, {module("model.layers.0.self_attn.qq_proj", 32, 32)}), Error);
  EXPECT_THROW(AdapterWeights(config, {module("../q_proj", 32, 32)}), Error);
}

/// A copy of a golden model with one field of its config.json changed (or removed by null).
fs::path changed_model(const std::string& field, const io::Json& value) {
  const auto to = fs::path(::testing::TempDir()) / fmt::format("model_{}_{}", ::getpid(), field);
  fs::remove_all(to);
  fs::create_directories(to);
  fs::copy(kModels / "llama" / "model.safetensors", to / "model.safetensors");
  auto json = io::unwrap(io::read_json_file((kModels / "llama" / "config.json").string()));
  if (value.is_null()) {
    json.erase(field);
  } else {
    json[field] = value;
  }
  std::ofstream(to / "config.json") << json.dump();
  return to;
}

TEST(ModelConfig, WrongFieldsAreNamed) {
  const std::pair<const char*, io::Json> cases[] = {
      {"model_type", "gpt_neox"},
      {"hidden_size", 33},
      {"hidden_size", -1},
      {"hidden_size", 1.5},
      {"num_hidden_layers", 0},
      {"num_hidden_layers", 3},
      {"num_hidden_layers", 1},
      {"num_hidden_layers", 4294967297},
      {"num_attention_heads", 3},
      {"num_key_value_heads", 3},
      {"intermediate_size", 47},
      {"vocab_size", 60},
      {"vocab_size", nullptr},
      {"max_position_embeddings", 0},
      {"rms_norm_eps", 0.0},
      {"rms_norm_eps", "small"},
      {"hidden_act", "gelu"},
      {"head_dim", 7},
      {"rope_theta", -1.0},
      {"rope_parameters", {{"rope_type", "longrope"}}},
      {"rope_parameters", {{"rope_type", "llama3"}}},
      {"rope_parameters", {{"rope_type", "linear"}, {"factor", 0.0}}},
      {"quantization_config", {{"quant_method", "gptq"}}},
      {"quantization", {{"bits", 3}, {"group_size", 64}}},
      {"eos_token_id", "end"},
      {"partial_rotary_factor", 0.5}};
  for (const auto& [field, value] : cases) {
    try {
      Model::load(changed_model(field, value), {.dtype = mx::float32});
      ADD_FAILURE() << field << " = " << value << " was accepted";
    } catch (const Error& e) {
      EXPECT_NE(e.code(), ErrorCode::internal) << e.what();
    }
  }
}

TEST(Model, MissingFilesAreNotFound) {
  try {
    Model::load("/nonexistent/model.gguf");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::not_found);
  }
}

}  // namespace
}  // namespace metal_lora::testing
