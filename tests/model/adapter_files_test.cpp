// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/adapter_files.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mlx/mlx.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "metal_lora/error.h"
#include "src/io/safetensors.h"
#include "src/io/sha256.h"

namespace metal_lora {
namespace {

namespace fs = std::filesystem;
namespace mx = mlx::core;
using nlohmann::ordered_json;
using ::testing::HasSubstr;

constexpr int kHidden = 12, kFfn = 20, kLayers = 3, kVocab = 30;

ModelConfig tiny_config() {
  ModelConfig config;
  config.architecture = "llama";
  config.hidden_size = kHidden;
  config.intermediate_size = kFfn;
  config.num_hidden_layers = kLayers;
  config.num_attention_heads = 3;
  config.num_key_value_heads = 1;
  config.head_dim = 4;
  config.vocab_size = kVocab;
  config.max_position_embeddings = 64;
  return config;
}

mx::array values(int rows, int columns, mx::Dtype dtype, float start) {
  std::vector<float> data(static_cast<size_t>(rows) * static_cast<size_t>(columns));
  for (size_t i = 0; i < data.size(); ++i)
    data[i] = start + 0.37f * static_cast<float>(i % 23) - 1.0f / static_cast<float>(i + 3);
  mx::array a = mx::astype(mx::array(data.data(), {rows, columns}, mx::float32), dtype);
  a.eval();
  return a;
}

AdapterModule module(
    const std::string& path,
    int out,
    int in,
    int rank,
    float scale,
    mx::Dtype dtype = mx::float32) {
  return {path, Lora{values(rank, in, dtype, 0.1f), values(out, rank, dtype, -0.2f), scale}};
}

std::vector<AdapterModule> plain_modules(mx::Dtype dtype = mx::float32) {
  return {
      module("model.layers.1.self_attn.q_proj", kHidden, kHidden, 4, 2.0f, dtype),
      module("model.layers.1.mlp.down_proj", kHidden, kFfn, 4, 2.0f, dtype),
      module("model.layers.2.self_attn.q_proj", kHidden, kHidden, 4, 2.0f, dtype),
      module("model.layers.2.mlp.down_proj", kHidden, kFfn, 4, 2.0f, dtype)};
}

void expect_equal(const std::vector<AdapterModule>& x, const std::vector<AdapterModule>& y) {
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(x[i].path, y[i].path);
    EXPECT_EQ(x[i].lora.scale, y[i].lora.scale) << x[i].path;
    for (const auto& [a, b] :
         {std::pair(x[i].lora.a, y[i].lora.a), std::pair(x[i].lora.b, y[i].lora.b)}) {
      ASSERT_EQ(a.shape(), b.shape()) << x[i].path;
      ASSERT_EQ(a.dtype(), b.dtype()) << x[i].path;
      EXPECT_EQ(std::memcmp(a.data<char>(), b.data<char>(), a.nbytes()), 0) << x[i].path;
    }
  }
}

class AdapterFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "adapter-files-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { fs::remove_all(root_); }

  ordered_json read_json(const fs::path& path) {
    std::ifstream file(path);
    return ordered_json::parse(file);
  }
  void write_text(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
  }
  std::string bytes_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  fs::path root_;
};

TEST_F(AdapterFiles, RoundTripsInBothFormatsAndEveryDtype) {
  for (const mx::Dtype dtype : {mx::float32, mx::float16, mx::bfloat16}) {
    for (const AdapterFormat format : {AdapterFormat::mlx_lm, AdapterFormat::peft}) {
      const fs::path folder = root_ / fmt::format("{}-{}", int(dtype.val()), int(format));
      AdapterInfo info;
      info.dropout = 0.05f;
      info.num_layers = 2;
      info.base_model = "base";
      write_adapter(folder, format, AdapterFile{info, plain_modules(dtype)});
      const AdapterFile back = read_adapter(folder);
      expect_equal(back.modules, plain_modules(dtype));
      EXPECT_EQ(back.info.format, format);
      EXPECT_EQ(back.info.dropout, 0.05f);
      EXPECT_EQ(back.modules[0].lora.dropout, 0.0f);  // of training alone
      EXPECT_EQ(back.info.base_model, "base");
      EXPECT_EQ(load_adapter(folder, tiny_config()).weights.modules().size(), 4u);
    }
  }
}

TEST_F(AdapterFiles, SameInputGivesSameBytes) {
  for (const AdapterFormat format : {AdapterFormat::mlx_lm, AdapterFormat::peft}) {
    for (const char* name : {"x", "y"})
      write_adapter(root_ / name, format, AdapterFile{{}, plain_modules()});
    for (const std::string& file :
         std::vector<std::string>{"adapter_config.json", std::string(adapter_file_name(format))}) {
      EXPECT_EQ(bytes_of(root_ / "x" / file), bytes_of(root_ / "y" / file)) << file;
    }
  }
}

TEST_F(AdapterFiles, MlxLmLayout) {
  AdapterInfo info;
  info.num_layers = 2;
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{info, plain_modules()});
  const auto config = read_json(root_ / "m/adapter_config.json");
  EXPECT_EQ(config["fine_tune_type"], "lora");
  EXPECT_EQ(config["num_layers"], 2);
  EXPECT_EQ(config["lora_parameters"]["rank"], 4);
  EXPECT_EQ(config["lora_parameters"]["scale"], 2.0);
  EXPECT_EQ(config["lora_parameters"]["keys"], (ordered_json{"mlp.down_proj", "self_attn.q_proj"}));
  const auto file = io::unwrap(io::read_safetensors((root_ / "m/adapters.safetensors").string()));
  const auto* a = file.find("model.layers.1.mlp.down_proj.lora_a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->shape, (std::vector<uint64_t>{kFfn, 4}));
  const Lora lora = plain_modules()[1].lora;
  // Element [i, r] of the file is A[r, i].
  EXPECT_EQ(reinterpret_cast<const float*>(a->data)[3 * 4 + 1], lora.a.data<float>()[1 * kFfn + 3]);
}

TEST_F(AdapterFiles, PeftLayout) {
  AdapterInfo info;
  info.num_layers = 2;
  write_adapter(root_ / "p", AdapterFormat::peft, AdapterFile{info, plain_modules()});
  const auto config = read_json(root_ / "p/adapter_config.json");
  EXPECT_EQ(config["peft_type"], "LORA");
  EXPECT_EQ(config["r"], 4);
  EXPECT_EQ(config["lora_alpha"], 8);
  EXPECT_EQ(config["target_modules"], (ordered_json{"down_proj", "q_proj"}));
  EXPECT_EQ(config["layers_to_transform"], (ordered_json{1, 2}));
  const auto file =
      io::unwrap(io::read_safetensors((root_ / "p/adapter_model.safetensors").string()));
  const auto* b = file.find("base_model.model.model.layers.2.mlp.down_proj.lora_B.weight");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->shape, (std::vector<uint64_t>{kHidden, 4}));
}

TEST_F(AdapterFiles, ConvertsBothWaysWithoutLoss) {
  AdapterInfo info;
  info.config_json[AdapterFormat::peft] =
      R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj","down_proj"],"revision":"abc","task_type":"CAUSAL_LM"})";
  write_adapter(root_ / "p1", AdapterFormat::peft, AdapterFile{info, plain_modules()});
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, read_adapter(root_ / "p1"));
  write_adapter(root_ / "p2", AdapterFormat::peft, read_adapter(root_ / "m"));
  expect_equal(read_adapter(root_ / "m").modules, plain_modules());
  expect_equal(read_adapter(root_ / "p2").modules, plain_modules());
  EXPECT_EQ(
      read_json(root_ / "p1/adapter_config.json"), read_json(root_ / "p2/adapter_config.json"));
  EXPECT_EQ(read_json(root_ / "p2/adapter_config.json")["revision"], "abc");
}

TEST_F(AdapterFiles, DifferentRanksSurviveMlxLm) {
  auto modules = plain_modules();
  modules[1] = module("model.layers.1.mlp.down_proj", kHidden, kFfn, 2, 2.0f);
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, modules});
  const auto file = io::unwrap(io::read_safetensors((root_ / "m/adapters.safetensors").string()));
  EXPECT_EQ(
      file.find("model.layers.1.mlp.down_proj.lora_a")->shape, (std::vector<uint64_t>{kFfn, 4}));
  expect_equal(read_adapter(root_ / "m").modules, modules);
}

TEST_F(AdapterFiles, PatternsOfPeft) {
  auto modules = plain_modules();
  modules[1] = module("model.layers.1.mlp.down_proj", kHidden, kFfn, 2, 3.5f);
  write_adapter(root_ / "p", AdapterFormat::peft, AdapterFile{{}, modules});
  const auto config = read_json(root_ / "p/adapter_config.json");
  EXPECT_EQ(config["rank_pattern"]["model.layers.1.mlp.down_proj"], 2);
  EXPECT_EQ(config["alpha_pattern"]["model.layers.1.mlp.down_proj"], 7);
  expect_equal(read_adapter(root_ / "p").modules, modules);
}

TEST_F(AdapterFiles, ScalesThatDifferAreRefusedOrFolded) {
  auto modules = plain_modules();
  modules[3].lora.scale = 3.0f;
  EXPECT_THROW(write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, modules}), Error);
  WriteAdapterOptions fold;
  fold.fold_scale = true;
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, modules}, fold);
  const auto back = read_adapter(root_ / "m").modules;
  EXPECT_EQ(back[3].lora.scale, 2.0f);
  for (size_t i = 0; i < back[3].lora.b.size(); ++i) {
    // One product, rounded once.
    EXPECT_FLOAT_EQ(back[3].lora.b.data<float>()[i], modules[3].lora.b.data<float>()[i] * 1.5f);
  }
}

TEST_F(AdapterFiles, RsLoraScale) {
  AdapterInfo info;
  info.use_rslora = true;
  auto modules = plain_modules();
  for (auto& m : modules) m.lora.scale = static_cast<float>(16 / std::sqrt(4.0));
  write_adapter(root_ / "p", AdapterFormat::peft, AdapterFile{info, modules});
  EXPECT_EQ(read_json(root_ / "p/adapter_config.json")["lora_alpha"], 16);
  EXPECT_EQ(read_adapter(root_ / "p").modules[0].lora.scale, 8.0f);
}

TEST_F(AdapterFiles, BareTensorFileNeedsAScale) {
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, plain_modules()});
  fs::create_directories(root_ / "bare");
  fs::rename(root_ / "m/adapters.safetensors", root_ / "bare/0000100_adapters.safetensors");
  const fs::path file = root_ / "bare/0000100_adapters.safetensors";
  EXPECT_THROW(read_adapter(file), Error);
  ReadAdapterOptions options;
  options.scale = 5.0f;
  EXPECT_EQ(read_adapter(file, options).modules[0].lora.scale, 5.0f);
}

TEST_F(AdapterFiles, EmbeddingAdapter) {
  const std::vector<AdapterModule> modules = {
      module("model.embed_tokens", kHidden, kVocab, 4, 1.0f)};
  for (const AdapterFormat format : {AdapterFormat::mlx_lm, AdapterFormat::peft}) {
    write_adapter(root_ / "e", format, AdapterFile{{}, modules});
    EXPECT_NE(load_adapter(root_ / "e", tiny_config()).weights.find_embedding(), nullptr);
    fs::remove_all(root_ / "e");
  }
}

TEST(AlphaForScale, GivesTheScaleBack) {
  EXPECT_EQ(alpha_for_scale(2.0f, 8), 16);
  EXPECT_EQ(alpha_for_scale(static_cast<float>(16 / 12.0), 12), 16);
  for (const float scale : {0.1f, 20.0f, 1.3333334f, 0.7071068f, 1e-20f, 3.4e30f}) {
    for (const double divisor : {1.0, 3.0, 8.0, std::sqrt(12.0), 1024.0}) {
      EXPECT_EQ(static_cast<float>(alpha_for_scale(scale, divisor) / divisor), scale);
    }
  }
}

// ---- wrong adapters ----

constexpr const char* kMlx =
    R"({"fine_tune_type":"lora","num_layers":-1,"lora_parameters":{"rank":4,"scale":2.0,"dropout":0.0,"keys":["self_attn.q_proj"]}})";
constexpr const char* kPeft =
    R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"]})";

/// A tensor to put into the file: zeros of that shape, or a value in the first element.
struct Tensor {
  std::string name;
  std::vector<uint64_t> shape;
  float first = 0.5f;
  io::TensorType type = io::TensorType::f32;
};

const std::vector<Tensor> kMlxTensors = {
    {"model.layers.0.self_attn.q_proj.lora_a", {kHidden, 4}},
    {"model.layers.0.self_attn.q_proj.lora_b", {4, kHidden}}};
const std::vector<Tensor> kPeftTensors = {
    {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", {4, kHidden}},
    {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", {kHidden, 4}}};

std::vector<Tensor> with(std::vector<Tensor> tensors, const Tensor& more) {
  tensors.push_back(more);
  return tensors;
}
std::vector<Tensor> instead(std::vector<Tensor> tensors, size_t at, const Tensor& other) {
  tensors[at] = other;
  return tensors;
}

struct WrongAdapter {
  std::string what;
  std::string config;
  std::vector<Tensor> tensors;
  ErrorCode code;
  std::string says;  ///< part of the message
};

std::string peft_with(const std::string& entry) {
  std::string text = kPeft;
  return text.insert(1, entry + ",");
}

std::vector<WrongAdapter> wrong_adapters() {
  const auto bad = ErrorCode::invalid_input, lacks = ErrorCode::unsupported;
  const auto& mlx = kMlxTensors;
  const auto& peft = kPeftTensors;
  std::string big = kMlx, no_scale = kMlx, dora = kMlx, full = kMlx, rank = kMlx, keys = kMlx,
              text_rank = kMlx;
  big.replace(big.find("\"rank\":4"), 8, "\"rank\":1025");
  no_scale.replace(no_scale.find("\"scale\""), 7, "\"alpha\"");
  dora.replace(dora.find("\"lora\""), 6, "\"dora\"");
  full.replace(full.find("\"lora\""), 6, "\"full\"");
  rank.replace(rank.find("\"rank\":4"), 8, "\"rank\":3");
  text_rank.replace(text_rank.find("\"rank\":4"), 8, "\"rank\":\"4\"");
  keys.replace(keys.find("q_proj"), 6, "v_proj");
  return {
      {"not JSON", "{", mlx, bad, "JSON"},
      {"not an object", "[]", mlx, bad, "object"},
      {"neither format", "{}", mlx, bad, "neither"},
      {"DoRA (mlx-lm)", dora, mlx, lacks, "fine_tune_type"},
      {"full fine-tuning", full, mlx, lacks, "fine_tune_type"},
      {"rank over the limit", big, mlx, bad, "rank"},
      {"rank of the wrong type", text_rank, mlx, bad, "rank"},
      {"alpha in place of scale", no_scale, mlx, bad, "scale"},
      {"rank unlike the tensors", rank, mlx, bad, "rank 3"},
      {"a module outside keys", keys, mlx, bad, "names"},
      {"no tensors", kMlx, {}, bad, "empty"},
      {"A without B", kMlx, {mlx[0]}, bad, "without B"},
      {"B without A", kMlx, {mlx[1]}, bad, "without A"},
      {"A and B of different ranks",
       kMlx,
       instead(mlx, 1, {mlx[1].name, {3, kHidden}}),
       bad,
       "rank"},
      {"a vector", kMlx, instead(mlx, 0, {mlx[0].name, {kHidden}}), bad, "matrix"},
      {"an empty matrix", kMlx, instead(mlx, 0, {mlx[0].name, {0, 4}}), bad, "dimension"},
      {"in unlike the model's", kMlx, instead(mlx, 0, {mlx[0].name, {kHidden + 1, 4}}), bad, "12"},
      {"out unlike the model's", kMlx, instead(mlx, 1, {mlx[1].name, {4, kHidden - 1}}), bad, "12"},
      {"NaN", kMlx, instead(mlx, 0, {mlx[0].name, {kHidden, 4}, NAN}), bad, "finite"},
      {"infinity", kMlx, instead(mlx, 1, {mlx[1].name, {4, kHidden}, INFINITY}), bad, "finite"},
      {"integers",
       kMlx,
       instead(mlx, 0, {mlx[0].name, {kHidden, 4}, 0.0f, io::TensorType::i32}),
       lacks,
       "I32"},
      {"DoRA's magnitude (mlx-lm)",
       kMlx,
       with(mlx, {"model.layers.0.self_attn.q_proj.m", {kHidden}}),
       lacks,
       "DoRA"},
      {"a name of nothing", kMlx, with(mlx, {"hello", {2, 2}}), bad, "hello"},
      {"a whole weight",
       kMlx,
       with(mlx, {"model.layers.0.self_attn.q_proj.weight", {2, 2}}),
       lacks,
       "whole weight"},
      {"names of both formats for one module", kMlx, with(mlx, peft[0]), bad, "another spelling"},
      {"a layer that the model lacks",
       kMlx,
       {{"model.layers.3.self_attn.q_proj.lora_a", {kHidden, 4}},
        {"model.layers.3.self_attn.q_proj.lora_b", {4, kHidden}}},
       bad,
       "model.layers.3"},
      {"another kind of PEFT", R"({"peft_type":"IA3"})", peft, lacks, "peft_type"},
      {"bias", peft_with(R"("bias":"all")"), peft, lacks, "bias"},
      {"fan_in_fan_out", peft_with(R"("fan_in_fan_out":true)"), peft, lacks, "fan_in_fan_out"},
      {"DoRA (PEFT)", peft_with(R"("use_dora":true)"), peft, lacks, "use_dora"},
      {"aLoRA",
       peft_with(R"("alora_invocation_tokens":[1,2])"),
       peft,
       lacks,
       "alora_invocation_tokens"},
      {"modules_to_save",
       peft_with(R"("modules_to_save":["lm_head"])"),
       peft,
       lacks,
       "modules_to_save"},
      {"lora_bias", peft_with(R"("lora_bias":true)"), peft, lacks, "lora_bias"},
      {"QALoRA", peft_with(R"("use_qalora":true)"), peft, lacks, "use_qalora"},
      {"trainable tokens",
       peft_with(R"("trainable_token_indices":[5])"),
       peft,
       lacks,
       "trainable_token_indices"},
      {"layer_replication",
       peft_with(R"("layer_replication":[[0,2]])"),
       peft,
       lacks,
       "layer_replication"},
      {"PiSSA's changed base",
       peft_with(R"("init_lora_weights":"pissa")"),
       peft,
       lacks,
       "init_lora_weights"},
      {"an option of the future",
       peft_with(R"("use_something_new":true)"),
       peft,
       lacks,
       "use_something_new"},
      {"a pattern that is no expression",
       peft_with(R"("rank_pattern":{"(":4})"),
       peft,
       bad,
       "expression"},
      {"a pattern that never ends",
       peft_with(R"("rank_pattern":{"((a|_|.)*)*[!?]":4})"),
       peft,
       bad,
       "steps"},
      {"alpha that is no number",
       peft_with(R"("alpha_pattern":{"q_proj":"8"})"),
       peft,
       bad,
       "alpha_pattern"},
      {"a layer outside layers_to_transform",
       peft_with(R"("layers_to_transform":[1,2])"),
       peft,
       bad,
       "names"},
      {"DoRA's magnitude (PEFT)",
       kPeft,
       with(
           peft,
           {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", {kHidden}}),
       lacks,
       "DoRA"},
      {"an adapter on the head",
       R"({"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["lm_head"]})",
       {{"base_model.model.lm_head.lora_A.weight", {4, kHidden}},
        {"base_model.model.lm_head.lora_B.weight", {kVocab, 4}}},
       lacks,
       "lm_head"},
      {"a scale beyond f32",
       R"({"peft_type":"LORA","r":4,"lora_alpha":1e300,"target_modules":["q_proj"]})",
       peft,
       bad,
       "scale"},
      {"dropout out of range", peft_with(R"("lora_dropout":1.5)"), peft, bad, "lora_dropout"},
  };
}

class WrongAdapters : public AdapterFiles, public ::testing::WithParamInterface<WrongAdapter> {};

TEST_P(WrongAdapters, IsRefusedByName) {
  const WrongAdapter& wrong = GetParam();
  const bool is_peft = wrong.config.find("peft_type") != std::string::npos;
  write_text(root_ / "a/adapter_config.json", wrong.config);
  std::vector<std::vector<float>> kept;
  std::vector<io::TensorInfo> infos;
  for (const Tensor& tensor : wrong.tensors) {
    io::TensorInfo info;
    info.name = tensor.name;
    info.type = tensor.type;
    info.shape = tensor.shape;
    kept.emplace_back(info.element_count() + 1, 0.25f);
    kept.back()[0] = tensor.first;
    info.data = reinterpret_cast<const std::byte*>(kept.back().data());
    info.nbytes = info.element_count() * 4;
    infos.push_back(info);
  }
  io::SafetensorsWriteOptions options;
  options.refuse_non_finite = false;
  const auto name = adapter_file_name(is_peft ? AdapterFormat::peft : AdapterFormat::mlx_lm);
  io::unwrap(io::write_safetensors((root_ / "a" / name).string(), infos, {}, options));
  try {
    load_adapter(root_ / "a", tiny_config());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), wrong.code) << error.what();
    EXPECT_THAT(error.what(), HasSubstr(wrong.says));
    EXPECT_THAT(error.what(), HasSubstr(root_.string())) << "names the file";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Each, WrongAdapters, ::testing::ValuesIn(wrong_adapters()), [](const auto& info) {
      std::string name;
      for (const char c : info.param.what)
        name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
      return name;
    });

TEST_F(AdapterFiles, MissingPathsAreNotFound) {
  fs::create_directories(root_ / "empty");
  write_text(root_ / "no-tensors/adapter_config.json", kMlx);
  for (const char* name : {"nothing", "empty", "no-tensors"}) {
    try {
      read_adapter(root_ / name);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::not_found) << name;
    }
  }
}

TEST_F(AdapterFiles, APickleIsRefused) {
  write_text(root_ / "p/adapter_config.json", kPeft);
  write_text(root_ / "p/adapter_model.bin", "PK");
  try {
    read_adapter(root_ / "p");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_THAT(error.what(), HasSubstr("pickle"));
  }
}

TEST_F(AdapterFiles, ASaveRefusesNonFiniteValuesAndKeepsTheOldFile) {
  write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, plain_modules()});
  const std::string before = bytes_of(root_ / "m/adapters.safetensors");
  auto modules = plain_modules();
  modules[0].lora.b = mx::full({kHidden, 4}, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(write_adapter(root_ / "m", AdapterFormat::mlx_lm, AdapterFile{{}, modules}), Error);
  EXPECT_EQ(bytes_of(root_ / "m/adapters.safetensors"), before);
}

}  // namespace
}  // namespace metal_lora
