// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "metal_lora/error.h"
#include "tests/support/tiny_model.h"

namespace metal_lora::train {
namespace {

using test::kTinyEos;
using testing::HasSubstr;

class DatasetTest : public testing::Test {
 protected:
  void SetUp() override { test::write_tiny_tokenizer(folder_.path()); }

  Dataset load(const std::string& lines, bool with_template = true) {
    test::write_text(folder_ / "train.jsonl", lines);
    const auto tokenizer = text::Tokenizer::from_path(folder_.path());
    const auto chat = with_template ? text::ChatTemplate::from_path(folder_.path()) : std::nullopt;
    return Dataset::load(folder_ / "train.jsonl", tokenizer, chat, options_);
  }

  std::string error_of(const std::string& lines, bool with_template = true) {
    try {
      load(lines, with_template);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  void keep_warnings() {
    options_.on_warning = [this](const std::string& text) { warnings_.push_back(text); };
  }

  test::TemporaryFolder folder_;
  DatasetOptions options_;
  std::vector<std::string> warnings_;
};

std::vector<int32_t> tokens_of(const Dataset& data, size_t index) {
  const auto span = data.sample(index).tokens;
  return {span.begin(), span.end()};
}

std::vector<int32_t> bytes(const std::string& text, bool eos) {
  std::vector<int32_t> out;
  for (const unsigned char c : text) out.push_back(c);
  if (eos) out.push_back(kTinyEos);
  return out;
}

TEST_F(DatasetTest, TokensAreMlxLms) {
  std::ifstream file(METAL_LORA_SOURCE_DIR "/tests/golden/datasets.json");
  for (const auto& golden : nlohmann::json::parse(file)) {
    options_.mask_prompt = golden.at("mask_prompt");
    std::string lines;
    for (const auto& row : golden.at("rows")) lines += row.dump() + "\n";
    const Dataset data = load(lines);
    ASSERT_EQ(data.size(), golden.at("rows").size());
    for (size_t i = 0; i < data.size(); ++i) {
      // The one difference: what a template writes behind the last EOS is left out.
      auto expected = golden.at("tokens")[i].get<std::vector<int32_t>>();
      while (!expected.empty() && expected.back() != kTinyEos) expected.pop_back();
      EXPECT_EQ(tokens_of(data, i), expected) << golden.at("kind") << " row " << i;
      EXPECT_EQ(data.sample(i).prompt_tokens, golden.at("offsets")[i].get<int32_t>())
          << golden.at("kind") << " row " << i;
    }
  }
}

TEST_F(DatasetTest, KindIsThatOfTheFirstRow) {
  EXPECT_EQ(
      load(R"({"text": "a", "prompt": "b", "completion": "c"})").kind(), DatasetKind::completions);
  EXPECT_EQ(
      load(R"({"text": "a", "messages": [{"role": "user", "content": "x"}]})").kind(),
      DatasetKind::chat);
  EXPECT_EQ(load(R"({"text": "abc"})").kind(), DatasetKind::text);
  EXPECT_THAT(error_of(R"({"question": "a"})"), HasSubstr("line 1"));
}

TEST_F(DatasetTest, CompletionsWithoutATemplateAreJoinedExactly) {
  options_.mask_prompt = true;
  const Dataset data = load(R"({"prompt": "ab", "completion": " cd"})", false);
  EXPECT_EQ(tokens_of(data, 0), bytes("ab cd", true));
  EXPECT_EQ(data.sample(0).prompt_tokens, 2);
  EXPECT_EQ(data.sample(0).trained_tokens(), 4);
}

TEST_F(DatasetTest, LongRowsAreCutWithAWarning) {
  keep_warnings();
  options_.max_seq_length = 4;
  const Dataset data = load("{\"text\": \"abcdefgh\"}\n{\"text\": \"xyz\"}\n");
  EXPECT_EQ(tokens_of(data, 0), bytes("abcd", false));
  EXPECT_EQ(tokens_of(data, 1), bytes("xyz", true));
  ASSERT_EQ(warnings_.size(), 1u);
  EXPECT_THAT(warnings_[0], HasSubstr("1 of 2 rows are longer than max_seq_length 4"));
}

TEST_F(DatasetTest, RowsWithNothingToLearnAreDroppedWithAWarning) {
  keep_warnings();
  options_.mask_prompt = true;
  options_.max_seq_length = 6;
  const Dataset data = load(
      "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"long prompt\", \"completion\": "
      "\"b\"}",
      false);
  EXPECT_EQ(data.size(), 1u);
  ASSERT_EQ(warnings_.size(), 2u);
  EXPECT_THAT(warnings_[1], HasSubstr("1 of 2 rows leave no token to learn"));
  options_.max_seq_length = 2;
  EXPECT_THAT(
      error_of(R"({"prompt": "abc", "completion": "b"})", false), HasSubstr("token to learn"));
}

TEST_F(DatasetTest, BadRowsNameTheirLine) {
  EXPECT_THAT(error_of("{\"text\": \"a b\"}\n\n{\"text\": 3}\n"), HasSubstr("train.jsonl:3"));
  EXPECT_THAT(error_of("{\"text\": \"a b\"}\n{\"text\": \n"), HasSubstr("line 2"));
  EXPECT_THAT(error_of("{\"text\": \"a b\"}\n[1]\n"), HasSubstr("train.jsonl:2"));
  EXPECT_THAT(error_of("{\"messages\": []}\n"), HasSubstr("messages"));
  EXPECT_THAT(error_of("{\"messages\": [{\"content\": \"x\"}]}\n"), HasSubstr("role"));
  EXPECT_THAT(error_of(""), HasSubstr("empty"));
  EXPECT_THAT(
      error_of(R"({"messages": [{"role": "user", "content": "x"}]})", false),
      HasSubstr("no chat template"));
  options_.mask_prompt = true;
  EXPECT_THAT(error_of(R"({"text": "a"})"), HasSubstr("mask_prompt"));
  options_.mask_prompt = false;
  options_.vocab_size = 100;
  EXPECT_THAT(error_of(R"({"text": "é"})"), HasSubstr("vocabulary of 100"));
}

TEST_F(DatasetTest, ThreadsDoNotChangeTheResult) {
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += R"({"text": "row number )" + std::to_string(i) + "\"}\n";
  options_.threads = 1;
  const std::string one = load(lines).hash();
  options_.threads = 5;
  EXPECT_EQ(load(lines).hash(), one);
  lines += R"({"text": "one more"})";
  EXPECT_NE(load(lines).hash(), one);
  // The first bad row is the one reported, however many threads read.
  EXPECT_THAT(
      error_of(lines + "\n{\"text\": 1}\n" + lines + "\n{\"text\": 2}\n"),
      HasSubstr("train.jsonl:1002"));
}

}  // namespace
}  // namespace metal_lora::train
