// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "metal_lora/train.h"

namespace metal_lora {
namespace {

using testing::HasSubstr;

/// The message of the Error that reading `text` (and validating it) throws.
std::string error_of(const std::string& text) {
  try {
    TrainingConfig::from_yaml_text(text, "lora.yaml").validate();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(TrainingConfig, ReadsMlxLmsExample) {
  const auto config = TrainingConfig::from_yaml_text(R"(
model: "some/model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
  sgd: {momentum: 0.9}
  muon: {}
data: "data"
seed: 7
num_layers: -1
batch_size: 2
iters: 300
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 4
resume_adapter_file: null
adapter_path: "out"
save_every: 100
test: false
test_batches: 100
max_seq_length: 512
grad_checkpoint: false
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 16
  scale: 10.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
)");
  config.validate();
  EXPECT_EQ(config.model, "some/model");
  EXPECT_EQ(config.seed, 7);
  EXPECT_EQ(config.num_layers, -1);
  EXPECT_EQ(config.learning_rate, 1e-5);
  EXPECT_EQ(config.grad_accumulation_steps, 4);
  EXPECT_TRUE(config.mask_prompt);
  EXPECT_EQ(config.lora_rank, 16);
  EXPECT_EQ(config.effective_scale(), 10.0);
  EXPECT_THAT(config.lora_keys, testing::ElementsAre("self_attn.q_proj", "self_attn.v_proj"));
  EXPECT_EQ(config.optimizer_settings().beta2, 0.98);
  EXPECT_EQ(config.optimizer_settings().weight_decay, 0.05);
  ASSERT_TRUE(config.lr_schedule);
  EXPECT_EQ(config.lr_schedule->warmup, 100);
  EXPECT_THAT(config.lr_schedule->arguments, testing::ElementsAre(1e-5, 1000, 1e-7));
}

TEST(TrainingConfig, DefaultsAreMlxLms) {
  const TrainingConfig c = TrainingConfig::from_yaml_text("");
  EXPECT_EQ(c.num_layers, 16);
  EXPECT_EQ(c.batch_size, 4);
  EXPECT_EQ(c.iters, 1000);
  EXPECT_EQ(c.val_batches, 25);
  EXPECT_EQ(c.learning_rate, 1e-5);
  EXPECT_EQ(c.steps_per_eval, 200);
  EXPECT_EQ(c.save_every, 100);
  EXPECT_EQ(c.max_seq_length, 2048);
  EXPECT_EQ(c.lora_rank, 8);
  EXPECT_EQ(c.effective_scale(), 20.0);
  EXPECT_EQ(c.adapter_path, "adapters");
  EXPECT_EQ(c.grad_clip, 0.0);
}

TEST(TrainingConfig, UnknownKeyNamesLineAndNearestKey) {
  const std::string error = error_of("model: m\nbatchsize: 4\n");
  EXPECT_THAT(error, HasSubstr("lora.yaml:2, batchsize"));
  EXPECT_THAT(error, HasSubstr("did you mean batch_size?"));
  EXPECT_THAT(error_of("lora_parameters: {rnak: 3}"), HasSubstr("lora_parameters.rank"));
  EXPECT_THAT(error_of("optimizer_config: {adamw: {epsilon: 1}}"), HasSubstr("adamw.epsilon"));
  EXPECT_THAT(error_of("lr_schedule: {nmae: x}"), HasSubstr("did you mean lr_schedule.name?"));
}

TEST(TrainingConfig, WrongTypesNameFileLineAndValue) {
  EXPECT_THAT(error_of("iters: many"), HasSubstr("[lora.yaml:1, iters] must be a whole number"));
  EXPECT_THAT(error_of("iters: 1.5"), HasSubstr("\"1.5\""));
  EXPECT_THAT(error_of("iters: 99999999999"), HasSubstr("32-bit"));
  EXPECT_THAT(error_of("learning_rate: .nan"), HasSubstr("finite number"));
  EXPECT_THAT(error_of("mask_prompt: maybe"), HasSubstr("true or false"));
  EXPECT_THAT(error_of("batch_size: [1, 2]"), HasSubstr("[1, 2]"));
  EXPECT_THAT(error_of("batch_size: {a: 1}"), HasSubstr("mapping"));
  EXPECT_THAT(error_of("seed: 1\nseed: 2"), HasSubstr("given twice"));
  EXPECT_THAT(error_of("a: [1"), HasSubstr("is not YAML"));
  EXPECT_THAT(error_of("- 1"), HasSubstr("mapping of keys"));
  EXPECT_THAT(error_of("max_memory: lots"), HasSubstr("a size such as"));
  EXPECT_THAT(
      error_of("lr_schedule: &a {name: join_schedules, schedules: [*a]}"), HasSubstr("deep"));
}

TEST(TrainingConfig, QuantisesAsTheFileOrTheFlagSays) {
  EXPECT_EQ(TrainingConfig{}.to_json()["quantize"], 0);
  EXPECT_EQ(TrainingConfig{}.to_json()["double_quant"], true);
  TrainingConfig config =
      TrainingConfig::from_yaml_text("quantize: nf4\ndouble_quant: false", "lora.yaml");
  config.validate();
  EXPECT_EQ(config.load_options().quantize, Quantization::nf4);
  EXPECT_FALSE(config.load_options().double_quant);
  EXPECT_EQ(config.to_json()["quantize"], "nf4");
  config.set("double_quant", "true");
  EXPECT_TRUE(config.load_options().double_quant);
  config.set("quantize", "8");
  config.validate();
  EXPECT_EQ(config.load_options().quantize, Quantization::int8);
  EXPECT_EQ(config.to_json()["quantize"], 8);
  EXPECT_THAT(
      error_of("quantize: 5"),
      HasSubstr("[lora.yaml:1, quantize] must be 0, 4, 8 or nf4 but is \"5\""));
}

TEST(TrainingConfig, QlorasWordsAreAnsweredWithOurs) {
  EXPECT_THAT(error_of("bnb_4bit_quant_type: nf4"), HasSubstr("quantize: nf4"));
  EXPECT_THAT(error_of("bnb_4bit_use_double_quant: true"), HasSubstr("double_quant: true"));
  EXPECT_THAT(error_of("load_in_4bit: true"), HasSubstr("quantize: nf4"));
  EXPECT_THAT(error_of("load_in_8bit: true"), HasSubstr("quantize: 8"));
}

TEST(TrainingConfig, ImpossibleValuesAreRefused) {
  for (const char* text :
       {"batch_size: 0",
        "iters: 0",
        "num_layers: 0",
        "num_layers: -2",
        "val_batches: 0",
        "max_seq_length: 1",
        "grad_accumulation_steps: 0",
        "steps_per_report: 0",
        "save_every: -1",
        "learning_rate: -1",
        "grad_clip: -0.5",
        "quantize: 3",
        "quantize: NF4",
        "quantize: [nf4]",
        "quantize_group_size: 48",
        "quantize: nf4\nquantize_group_size: 32",
        "quantize: 4\ndouble_quant: false",
        "double_quant: maybe",
        "dtype: int8",
        "optimizer: lion",
        "lora_parameters: {rank: 0}",
        "lora_parameters: {rank: 1025}",
        "lora_parameters: {dropout: 1.0}",
        "lora_parameters: {alpha: 16, scale: 2}",
        "lora_parameters: {rslora: true}",
        "optimizer_config: {adam: {betas: [1.0, 0.9]}}",
        "adapter_path: ''",
        "optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}",
        "weight_decay: -1",
        "lr_schedule: {name: cosine_decay, arguments: [1e-3, 0]}",
        "lr_schedule: {name: cosine_decay, arguments: [1, 2, 3, 4]}",
        "lr_schedule: {name: cosine, arguments: [1e-3, 10]}",
        "lr_schedule: {name: linear_schedule, arguments: [1, 2, 3], warmup: -1}",
        "resume: true\nresume_adapter_file: a.safetensors"}) {
    EXPECT_NE(error_of(text), "no error") << text;
  }
}

TEST(TrainingConfig, WhatIsNotSupportedIsRefusedByName) {
  for (const char* text :
       {"fine_tune_type: dora",
        "optimizer: muon",
        "report_to: wandb",
        "trust_remote_code: true",
        "hf_dataset: {path: a/b}"}) {
    try {
      TrainingConfig::from_yaml_text(text).validate();
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported) << text;
    }
  }
}

TEST(TrainingConfig, FlagsWinOverTheFile) {
  auto config = TrainingConfig::from_yaml_text("iters: 10\nlora_parameters: {rank: 4}");
  config.set("iters", "20");
  config.set("lora_parameters.rank", "32");
  config.set("lora_parameters.keys", "q_proj, v_proj");
  config.set("max_memory", "1.5GB");
  config.set("lr_schedule.name", "cosine_decay");
  config.set("lr_schedule.warmup", "3");
  config.validate();
  EXPECT_EQ(config.iters, 20);
  EXPECT_EQ(config.lora_rank, 32);
  EXPECT_THAT(config.lora_keys, testing::ElementsAre("q_proj", "v_proj"));
  EXPECT_EQ(config.max_memory, 1'500'000'000u);
  EXPECT_EQ(config.lr_schedule->name, "cosine_decay");
  EXPECT_EQ(config.lr_schedule->warmup, 3);
  try {
    config.set("batch_size", "four");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("[--batch-size] must be a whole number but is \"four\""));
  }
}

TEST(TrainingConfig, EveryOptionCanBeSetAndHasItsOwnFlag) {
  std::set<std::string> flags;
  for (const auto& option : training_options()) {
    EXPECT_FALSE(option.help.empty()) << option.key;
    EXPECT_TRUE(flags.insert(std::string(option.flags)).second) << option.flags;
    TrainingConfig config;
    const bool flag_like = option.type == OptionType::boolean;
    const bool number_like = option.type == OptionType::integer ||
                             option.type == OptionType::number || option.type == OptionType::size;
    const bool numbers = option.key == "lr_schedule.arguments";
    const bool named = option.key == "quantize";
    config.set(
        option.key,
        flag_like                ? "true"
        : number_like || numbers ? "3"
        : named                  ? "nf4"
                                 : "word");
    EXPECT_FALSE(config.given.empty()) << option.key;
  }
}

TEST(TrainingConfig, AlphaGivesTheScale) {
  auto config = TrainingConfig::from_yaml_text("lora_parameters: {rank: 16, alpha: 32}");
  config.validate();
  EXPECT_EQ(config.effective_scale(), 2.0);
  config.lora_rslora = true;
  EXPECT_EQ(config.effective_scale(), 8.0);
}

TEST(TrainingConfig, JsonReadsBackAsYaml) {
  const auto config = TrainingConfig::from_yaml_text(
      "iters: 5\noptimizer: sgd\noptimizer_config: {sgd: {momentum: 0.9}}\n"
      "lora_parameters: {rank: 4, keys: [q_proj]}\n"
      "lr_schedule: {name: step_decay, arguments: [0.1, 0.5, 10], warmup: 2}");
  const auto again = TrainingConfig::from_yaml_text(config.to_json().dump());
  EXPECT_EQ(config.to_json(), again.to_json());
}

}  // namespace
}  // namespace metal_lora
