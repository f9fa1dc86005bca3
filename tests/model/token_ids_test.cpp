// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Ids of special tokens come from files and end generation or index the embedding: outside the
// vocabulary they are refused by file, field, expected and got.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "metal_lora/error.h"
#include "src/io/result.h"
#include "src/model/loader.h"
#include "tests/io/gguf_builder.h"
#include "tests/support/tiny_model.h"

namespace metal_lora {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint32_t kVocab = 8;

/// A Llama's metadata and its embedding [kVocab, 4] f32; `key` = `id` is added.
ModelConfig gguf_config(const test::TemporaryFolder& folder, const char* key, uint32_t id) {
  using Builder = io::testing::GgufBuilder;
  Builder builder;
  builder.string("general.architecture", "llama")
      .u32("llama.embedding_length", 4)
      .u32("llama.block_count", 1)
      .u32("llama.feed_forward_length", 4)
      .u32("llama.attention.head_count", 1)
      .u32("llama.context_length", 16)
      .value("llama.attention.layer_norm_rms_epsilon", 6, Builder::raw(1e-5f))
      .u32(key, id)
      .tensor("token_embd.weight", {4, kVocab}, 0, 0)
      .data(std::string(4 * kVocab * sizeof(float), '\0'));
  test::write_text(folder / "model.gguf", builder.build());
  return parse_gguf_config(io::unwrap(io::read_gguf((folder / "model.gguf").string())));
}

template <class Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_input) << error.what();
    return error.what();
  }
  return "no error";
}

TEST(TokenIds, OfAGgufLieInTheVocabulary) {
  const test::TemporaryFolder folder;
  EXPECT_THAT(
      gguf_config(folder, "tokenizer.ggml.eos_token_id", kVocab - 1).eos_token_ids, ElementsAre(7));
  for (const char* name : {"eos", "bos", "padding"}) {
    const std::string key = std::string("tokenizer.ggml.") + name + "_token_id";
    // 0x80000002 with its top bit masked would be 2, an id that there is.
    for (const uint32_t id : {kVocab, 0x80000002u, 0xffffffffu}) {
      EXPECT_THAT(
          error_of([&] { gguf_config(folder, key.c_str(), id); }),
          AllOf(
              HasSubstr((folder / "model.gguf").string() + ", " + key + "]"),
              HasSubstr("must be below 8 but is " + std::to_string(id))));
    }
  }
}

ModelConfig folder_config(const test::TemporaryFolder& folder) {
  return Model::load(folder.path())->config();
}

TEST(TokenIds, OfAGenerationConfigLieInTheVocabulary) {
  const test::TemporaryFolder folder;
  test::write_tiny_model(folder.path());
  const auto file = folder / "generation_config.json";
  test::write_text(file, R"({"eos_token_id": [257, 258]})");
  EXPECT_THAT(folder_config(folder).eos_token_ids, ElementsAre(257, 258));
  // 4294967298 cast to 32 bits would be 2.
  for (const std::string id : {"259", "-1", "4294967298"}) {
    for (const std::string& value : {id, "[257, " + id + "]"}) {
      test::write_text(file, "{\"eos_token_id\": " + value + "}");
      EXPECT_THAT(
          error_of([&] { folder_config(folder); }),
          AllOf(
              HasSubstr(file.string() + ", eos_token_id]"),
              HasSubstr("from 0 to 258"),
              HasSubstr(id)));
    }
  }
  test::write_text(file, R"({"eos_token_id": [257, "end"]})");
  EXPECT_THAT(error_of([&] { folder_config(folder); }), HasSubstr("eos_token_id"));
}

TEST(TokenIds, OfAConfigLieInTheVocabulary) {
  const test::TemporaryFolder folder;
  test::write_tiny_model(folder.path());
  const auto file = (folder / "config.json").string();
  const auto config = io::unwrap(io::read_json_file(file));
  for (const char* key : {"eos_token_id", "bos_token_id", "pad_token_id"}) {
    for (const io::Json& value : {io::Json(259), io::Json({257, 259})}) {
      auto changed = config;
      changed[key] = value;
      EXPECT_THAT(
          error_of([&] { parse_hf_config(changed, file); }),
          AllOf(HasSubstr(file + ", " + key + "]"), HasSubstr("from 0 to 258"), HasSubstr("259")));
    }
  }
}

}  // namespace
}  // namespace metal_lora
