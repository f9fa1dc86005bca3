// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mlx/ops.h>

#include <cmath>
#include <limits>

#include "src/train/adapter_init.h"
#include "src/train/evaluate.h"
#include "src/train/rng.h"
#include "tests/train/run_fixture.h"

namespace metal_lora::train {
namespace {

namespace mx = mlx::core;
using testing::HasSubstr;

class TrainerTest : public RunFixture {};

/// ‖a − b‖ / ‖a − start‖: how far two runs are apart, in units of how far they went.
double relative_distance(
    const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& start) {
  double apart = 0.0, moved = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    apart += std::pow(static_cast<double>(a[i]) - b[i], 2);
    moved += std::pow(static_cast<double>(a[i]) - start[i], 2);
  }
  return std::sqrt(apart / moved);
}

TEST_F(TrainerTest, LearnsAndWritesWhatMlxLmWrites) {
  TrainingConfig config = make_config("out");
  config.iters = 60;
  config.save_every = 20;
  config.steps_per_eval = 20;
  config.learning_rate = 1e-2;
  std::vector<TrainReport> reports;
  std::vector<EvalReport> evals;
  TrainerCallbacks callbacks;
  callbacks.on_report = [&](const TrainReport& report) { reports.push_back(report); };
  callbacks.on_eval = [&](const EvalReport& report) { evals.push_back(report); };
  const TrainResult result = make_trainer(config, callbacks)->run();
  ASSERT_EQ(reports.size(), 6u);
  EXPECT_LT(reports.back().train_loss, 0.8 * reports.front().train_loss);
  EXPECT_EQ(reports.back().iteration, 60);
  EXPECT_GT(reports.back().tokens_per_second, 0.0);
  EXPECT_GT(reports.back().peak_memory_bytes, 0u);
  EXPECT_EQ(reports.back().skipped_steps, 0);
  ASSERT_EQ(evals.size(), 4u);
  EXPECT_EQ(evals[0].iteration, 0);
  EXPECT_EQ(evals[3].iteration, 60);
  EXPECT_EQ(result.iterations, 60);
  const std::filesystem::path out = config.adapter_path;
  for (const char* name :
       {"adapters.safetensors",
        "adapter_config.json",
        "0000020_adapters.safetensors",
        "0000040_adapters.safetensors",
        "0000060_adapters.safetensors",
        "report.html",
        "best/adapters.safetensors",
        "best/adapter_config.json"}) {
    EXPECT_TRUE(std::filesystem::exists(out / name)) << name;
  }
  EXPECT_EQ(
      read_bytes(out / "adapters.safetensors"), read_bytes(out / "0000060_adapters.safetensors"));
}

TEST_F(TrainerTest, FilesStartANewRunFromTheirWeights) {
  TrainingConfig config = make_config("first");
  auto first = make_trainer(config);
  first->run();
  const auto trained = parameters(first->adapter());

  TrainingConfig next = make_config("second");
  next.num_layers = 16;  // neither given: the file decides
  next.lora_rank = 8;
  next.resume_adapter_file = config.adapter_path + "/adapters.safetensors";
  auto second = make_trainer(next);
  EXPECT_EQ(parameters(second->adapter()), trained);
  EXPECT_EQ(second->adapter().modules()[0].lora.scale, 2.0f);

  AdapterInfo info;
  write_adapter(folder_ / "peft", AdapterFormat::peft, first->adapter(), info);
  next.resume_adapter_file = (folder_ / "peft").string();
  EXPECT_EQ(parameters(make_trainer(next)->adapter()), trained);

  next.given.insert("lora_parameters.rank");
  EXPECT_THROW(make_trainer(next), Error);
}

TEST_F(TrainerTest, AccumulationEqualsTheBigBatch) {
  std::vector<std::vector<float>> ends;
  std::vector<float> start;
  for (const auto& [batch, accumulation] : {std::pair{6, 1}, {3, 2}, {1, 6}}) {
    TrainingConfig config = make_config("accumulate" + std::to_string(batch));
    config.optimizer = "sgd";
    config.learning_rate = 0.05;
    config.iters = 6;
    config.batch_size = batch;
    config.grad_accumulation_steps = accumulation;
    auto trainer = make_trainer(config);
    start = parameters(trainer->adapter());
    trainer->run();
    ends.push_back(parameters(trainer->adapter()));
  }
  // Only the order of f32 sums differs: per step a relative error of a few hundred roundings (sums
  // over ~100 tokens and 64 … 259 terms, twice), over 6 steps.
  const double tolerance = 6 * 1000 * std::numeric_limits<float>::epsilon();
  EXPECT_LT(relative_distance(ends[0], ends[1], start), tolerance);
  EXPECT_LT(relative_distance(ends[0], ends[2], start), tolerance);
}

TEST_F(TrainerTest, PackedSamplesDoNotSeeEachOther) {
  const TrainingConfig config = make_config("unused");
  auto trainer = make_trainer(config);
  const auto tokenizer = text::Tokenizer::from_path(config.model);
  const Dataset data = Dataset::load(folder_ / "data" / "train.jsonl", tokenizer, std::nullopt, {});
  const auto alone =
      evaluate_batches(*trainer->model, trainer->adapter(), data, plan_evaluation(data, 1, -1), {});
  const auto together = evaluate_batches(
      *trainer->model, trainer->adapter(), data, plan_evaluation(data, 23, -1), {});
  EXPECT_EQ(alone.tokens, together.tokens);
  // Rounding of f32 sums over at most 259 terms per token; a leak would change the loss itself.
  EXPECT_NEAR(alone.loss, together.loss, alone.loss * 1000 * std::numeric_limits<float>::epsilon());
}

TEST_F(TrainerTest, NotANumberAtStep17EqualsARunWithoutThatBatch) {
  TrainingConfig config = make_config("nan");
  config.iters = 30;
  config.lora_dropout = 0.1;
  config.lr_schedule = ScheduleConfig{"cosine_decay", {1e-3, 30}, 3, 0.0, {}, {}};
  int warnings = 0;
  TrainerCallbacks callbacks;
  callbacks.on_warning = [&](const std::string& text) {
    warnings += text.find("fused one") == std::string::npos;  // dropout on CUDA
  };
  auto poisoned = make_trainer(config, callbacks);
  poisoned->hooks.after_backward = [](int64_t iteration, double&, mx::array& grad) {
    if (iteration == 17) grad = mx::multiply(grad, mx::array(std::nanf("")));
  };
  EXPECT_EQ(poisoned->run().skipped_steps, 1);
  EXPECT_EQ(warnings, 1);

  config.adapter_path = (folder_ / "without").string();
  auto without = make_trainer(config);
  without->hooks.drop_step = [](int64_t iteration) { return iteration == 17; };
  without->run();
  EXPECT_EQ(parameters(poisoned->adapter()), parameters(without->adapter()));

  config.adapter_path = (folder_ / "loss").string();
  auto bad_loss = make_trainer(config);
  bad_loss->hooks.after_backward = [](int64_t iteration, double& loss, mx::array&) {
    if (iteration == 17) loss = std::numeric_limits<double>::infinity();
  };
  bad_loss->run();
  EXPECT_EQ(parameters(bad_loss->adapter()), parameters(without->adapter()));
}

TEST_F(TrainerTest, TenBadStepsInARowStopWithTheLastGoodState) {
  TrainingConfig config = make_config("diverged");
  auto trainer = make_trainer(config);
  std::vector<float> good;
  trainer->hooks.after_backward = [&](int64_t iteration, double& loss, mx::array&) {
    if (iteration == 6) good = parameters(trainer->adapter());
    if (iteration >= 6) loss = std::nan("");
  };
  try {
    trainer->run();
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("10 steps in a row"));
    EXPECT_THAT(error.what(), HasSubstr("after iteration 15"));
  }
  TrainingConfig next = make_config("next");
  next.resume_adapter_file = config.adapter_path + "/adapters.safetensors";
  EXPECT_EQ(parameters(make_trainer(next)->adapter()), good);
}

TEST_F(TrainerTest, EarlyStopKeepsTheBest) {
  TrainingConfig config = make_config("early");
  config.steps_per_eval = 1;
  config.early_stop_patience = 3;
  config.learning_rate = 3.0;  // makes everything worse at once
  config.optimizer = "sgd";
  config.iters = 50;
  const TrainResult result = make_trainer(config)->run();
  EXPECT_TRUE(result.stopped_early);
  EXPECT_LT(result.iterations, 50);
  EXPECT_EQ(result.iterations, result.best_iteration + 3);
}

TEST_F(TrainerTest, GradientCheckpointingChangesNothing) {
  TrainingConfig config = make_config("plain");
  config.iters = 3;
  auto plain = make_trainer(config);
  plain->run();
  config.adapter_path = (folder_ / "checkpointed").string();
  config.grad_checkpoint = true;
  auto checkpointed = make_trainer(config);
  checkpointed->run();
  EXPECT_EQ(parameters(plain->adapter()), parameters(checkpointed->adapter()));
}

TEST_F(TrainerTest, RefusesWhatDoesNotFitAndNamesTheKnob) {
  TrainingConfig config = make_config("large");
  config.max_memory = 1;
  try {
    make_trainer(config);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::does_not_fit);
    EXPECT_THAT(error.what(), HasSubstr("max_memory"));
  }
  config.max_memory = 0;
  EXPECT_GT(make_trainer(config)->estimate.total(), 0u);
}

TEST_F(TrainerTest, LearnsOnAnNf4BaseAndResumesOnTheSameOne) {
  TrainingConfig config = make_config("nf4");
  config.quantize = Quantization::nf4;
  config.iters = 40;
  config.learning_rate = 1e-2;
  std::vector<TrainReport> reports;
  TrainerCallbacks callbacks;
  callbacks.on_report = [&](const TrainReport& report) { reports.push_back(report); };
  make_trainer(config, callbacks)->run();
  ASSERT_EQ(reports.size(), 4u);
  EXPECT_LT(reports.back().train_loss, 0.9 * reports.front().train_loss);
  config.resume = true;
  config.double_quant = false;
  config.iters = 50;
  try {
    make_trainer(config)->run();
    ADD_FAILURE() << "went on over another base";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("double_quant"));
  }
}

TEST_F(TrainerTest, ADenseModelForetellsTheMemoryOfAQuantisedOne) {
  const auto weights = [](const Model& model, const TrainingConfig& config) {
    return estimate_memory(model, config, 100, 1000).weights;
  };
  TrainingConfig config = make_config("estimate");
  const auto dense = Model::load(config.model, config.load_options());
  EXPECT_EQ(weights(*dense, config), dense->weight_bytes());
  for (const char* name : {"4", "8", "nf4"}) {
    config.set("quantize", name);
    const auto loaded = Model::load(config.model, config.load_options());
    EXPECT_LT(loaded->weight_bytes(), dense->weight_bytes() / 2) << name;
    EXPECT_EQ(weights(*dense, config), loaded->weight_bytes()) << name;
    EXPECT_EQ(weights(*loaded, config), loaded->weight_bytes()) << name;
  }
  config.double_quant = false;
  const auto plain = Model::load(config.model, config.load_options());
  EXPECT_EQ(weights(*dense, config), plain->weight_bytes());
}

TEST_F(TrainerTest, MissingDataIsNamed) {
  TrainingConfig config = make_config("none");
  config.data = (folder_ / "nowhere").string();
  try {
    make_trainer(config);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::not_found);
    EXPECT_THAT(error.what(), HasSubstr("train.jsonl"));
  }
}

TEST_F(TrainerTest, TargetsFollowKeysAndLayers) {
  TrainingConfig config = make_config("targets");
  const auto model = Model::load(config.model, config.load_options());
  EXPECT_EQ(target_linears(model->config(), config).size(), 14u);
  config.num_layers = 1;
  const auto last = target_linears(model->config(), config);
  ASSERT_EQ(last.size(), 7u);
  EXPECT_THAT(last[0].path, HasSubstr("layers.1."));
  config.lora_keys = {"self_attn.q_proj", "v_proj"};
  EXPECT_EQ(target_linears(model->config(), config).size(), 2u);
  config.lora_keys = {"q_prj"};
  try {
    target_linears(model->config(), config);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("\"q_prj\" must name a linear"));
  }
}

TEST_F(TrainerTest, FreshAdaptersDependOnSeedAndPathAlone) {
  TrainingConfig config = make_config("fresh");
  const auto model = Model::load(config.model, config.load_options());
  const auto all = initial_adapter(model->config(), config);
  config.num_layers = 1;
  const auto last = initial_adapter(model->config(), config);
  const Lora* a = all.find(1, Slot::up_proj);
  const Lora* b = last.find(1, Slot::up_proj);
  ASSERT_TRUE(a && b);
  EXPECT_TRUE(mx::array_equal(a->a, b->a).item<bool>());
  const float bound = 1.0f / std::sqrt(64.0f);
  EXPECT_LE(mx::max(mx::abs(a->a)).item<float>(), bound);
  EXPECT_GT(mx::max(mx::abs(a->a)).item<float>(), 0.9f * bound);
  EXPECT_EQ(mx::max(mx::abs(a->b)).item<float>(), 0.0f);
  config.seed = 4;
  EXPECT_FALSE(
      mx::array_equal(a->a, initial_adapter(model->config(), config).find(1, Slot::up_proj)->a)
          .item<bool>());
}

}  // namespace
}  // namespace metal_lora::train
