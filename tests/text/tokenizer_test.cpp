// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "metal_lora/error.h"
#include "src/io/json.h"

namespace metal_lora::text {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// 256 byte tokens <0x00>…, then pieces: SentencePiece's shape in small.
std::string fallback_json() {
  nlohmann::json vocab = nlohmann::json::object();
  int id = 0;
  for (const char* token : {"<unk>", "<s>", "</s>"}) vocab[token] = id++;
  for (int b = 0; b < 256; ++b) {
    char token[8];
    std::snprintf(token, sizeof token, "<0x%02X>", b);
    vocab[token] = id++;
  }
  for (const char* token : {"▁", "h", "i", "▁h", "▁hi"}) vocab[token] = id++;
  nlohmann::json json = {
      {"added_tokens",
       {{{"id", 1}, {"content", "<s>"}, {"special", true}},
        {{"id", 2}, {"content", "</s>"}, {"special", true}}}},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers",
         {{{"type", "Prepend"}, {"prepend", "▁"}},
          {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
        {"special_tokens", {{"<s>", {{"ids", {1}}}}}}}},
      {"decoder",
       {{"type", "Sequence"},
        {"decoders",
         {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
          {{"type", "ByteFallback"}},
          {{"type", "Fuse"}},
          {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
      {"model",
       {{"type", "BPE"},
        {"byte_fallback", true},
        {"unk_token", "<unk>"},
        {"vocab", vocab},
        {"merges", {"▁ h", "▁h i"}}}}};
  return json.dump();
}

Tokenizer fallback() {
  return Tokenizer::from_json_text(
      fallback_json(), R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}})");
}

TEST(Tokenizer, SpeaksSentencePiece) {
  const Tokenizer t = fallback();
  EXPECT_THAT(t.encode("hi", true), ElementsAre(1, 263));
  EXPECT_THAT(t.encode("hi hi", false), ElementsAre(263, 263));
  EXPECT_EQ(t.decode(t.encode("hi hi é", true), true), "hi hi é");
  EXPECT_EQ(t.bos_id(), 1);
  EXPECT_EQ(t.eos_ids(), std::set<int32_t>{2});
  EXPECT_EQ(t.eos_token(), "</s>");
  EXPECT_TRUE(t.adds_bos());
  EXPECT_EQ(t.vocab_size(), 264);
  EXPECT_EQ(t.id_to_token(263), "▁hi");
  EXPECT_EQ(t.id_to_token(264), std::nullopt);
}

TEST(Tokenizer, LiteralTextHasNoSpecialTokens) {
  const Tokenizer t = fallback();
  EXPECT_THAT(t.encode("</s>", false), ElementsAre(2));
  for (const int32_t id : t.encode("hi</s>", false, SpecialText::literal)) {
    EXPECT_FALSE(t.is_special(id));
  }
  EXPECT_EQ(t.decode(t.encode("hi</s>", false, SpecialText::literal), true), "hi</s>");
}

TEST(Tokenizer, InvalidUtf8IsReplaced) {
  const Tokenizer t = fallback();
  EXPECT_EQ(t.decode(t.encode("a\xFFz\xE2\x82", false), true), "a\uFFFDz\uFFFD");
}

TEST(StreamingDecoder, HoldsBackIncompleteCharacters) {
  const Tokenizer t = fallback();
  StreamingDecoder stream(t);
  EXPECT_EQ(stream.push(263), "hi");
  const int32_t byte = 3;  // id of <0x00>
  EXPECT_EQ(stream.push(byte + 0xF0), "");
  EXPECT_EQ(stream.push(byte + 0x9F), "");
  EXPECT_EQ(stream.push(byte + 0x99), "");
  EXPECT_EQ(stream.push(byte + 0x82), "🙂");
  EXPECT_EQ(stream.push(263), " hi");
  EXPECT_EQ(stream.push(2), "");
  EXPECT_EQ(stream.push(byte + 0xF0), "");
  EXPECT_EQ(stream.flush(), "\uFFFD");
  EXPECT_EQ(stream.push(263), "hi");
}

TEST(Tokenizer, ManyThreadsAgree) {
  const Tokenizer t = fallback();
  const auto expected = t.encode("hi hi, hi", false);
  std::vector<int> wrong(8);
  std::vector<std::thread> threads;
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) count += t.encode("hi hi, hi", false) != expected;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(0));
}

std::string error_of(const nlohmann::json& json) {
  try {
    Tokenizer::from_json_text(json.dump()).encode("hi  hi", true);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Tokenizer, MalformedFilesNameTheField) {
  const auto good = nlohmann::json::parse(fallback_json());
  EXPECT_EQ(error_of(good), "");
  auto bad = good;
  bad["model"]["vocab"]["huge"] = 2000000000;
  EXPECT_THAT(error_of(bad), HasSubstr("model.vocab"));
  bad = good;
  bad["model"]["vocab"]["twice"] = 5;
  EXPECT_THAT(error_of(bad), HasSubstr("unique"));
  bad = good;
  bad["model"]["merges"].push_back("no such");
  EXPECT_THAT(error_of(bad), HasSubstr("merges[2]"));
  bad = good;
  bad["normalizer"] = {{"type", "Precompiled"}};
  EXPECT_THAT(error_of(bad), HasSubstr("\"Precompiled\""));
  bad = good;
  bad["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}};
  EXPECT_THAT(error_of(bad), HasSubstr("[regex]"));
  bad["pre_tokenizer"]["pattern"]["Regex"] = "(?:(?:▁|h|i)+)+$x";
  EXPECT_EQ(error_of(bad), "");
  bad = good;
  for (int i = 0; i < 20; ++i) {
    bad["normalizer"]["normalizers"].push_back(
        {{"type", "Replace"}, {"pattern", {{"String", "i"}}}, {"content", "iiiiiiii"}});
  }
  EXPECT_THAT(error_of(bad), HasSubstr("32 times"));
}

}  // namespace
}  // namespace metal_lora::text
