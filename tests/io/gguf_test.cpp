// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/gguf.h"

#include <cmath>
#include <functional>

#include "tests/io/gguf_builder.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::file_of;
using testing::GgufBuilder;
using testing::use_tensors;

constexpr uint32_t kF32 = 0;
constexpr uint32_t kQ40 = 2;

std::string raw8(uint64_t value) {
  return GgufBuilder::raw(value);
}

GgufBuilder good_file() {
  GgufBuilder builder;
  builder.string("general.architecture", "llama")
      .u32("llama.block_count", 2)
      .value("llama.rope.freq_base", 6, GgufBuilder::raw(1e5f))
      .value("flag", 7, std::string(1, '\1'))
      .array("tokens", 8, 2, GgufBuilder::text("a") + GgufBuilder::text(""))
      .array("types", 5, 2, GgufBuilder::raw(int32_t{-1}) + GgufBuilder::raw(int32_t{3}))
      .array("scores", 6, 1, GgufBuilder::raw(0.5f))
      .tensor("x", {3, 2}, kF32, 0)
      .tensor("y", {32, 2}, kQ40, 32)
      .data(std::string(32 + 36, '\1'));
  return builder;
}

TEST(Gguf, ReadsMetadataAndTensors) {
  const auto file = read_gguf(file_of(good_file().build()));
  ASSERT_TRUE(file.ok()) << file.error().message();
  EXPECT_EQ(file->version(), 3u);
  EXPECT_EQ(*file->get_string("general.architecture"), "llama");
  EXPECT_EQ(*file->get_u32("llama.block_count"), 2u);
  EXPECT_EQ(*file->get_u64("llama.block_count"), 2u);
  EXPECT_EQ(*file->get_i32("llama.block_count"), 2);
  EXPECT_EQ(*file->get_f32("llama.rope.freq_base"), 1e5f);
  EXPECT_TRUE(*file->get_bool("flag"));
  EXPECT_EQ(*file->get_string_array("tokens"), (std::vector<std::string_view>{"a", ""}));
  EXPECT_EQ(*file->get_i32_array("types"), (std::vector<int32_t>{-1, 3}));
  EXPECT_EQ(*file->get_f32_array("scores"), (std::vector<float>{0.5f}));
  EXPECT_EQ(*file->get_u32_or("absent", 7), 7u);
  EXPECT_EQ(*file->get_string_or("absent", "z"), "z");
  ASSERT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->find("x")->shape, (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(file->find("y")->nbytes, 36u);
  EXPECT_EQ(file->find("z"), nullptr);
  EXPECT_EQ(use_tensors(file->tensors()), 6u + 64u);
  auto older = good_file();
  older.version = 2;
  EXPECT_TRUE(read_gguf(file_of(older.build())).ok());
}

TEST(Gguf, GettersNameTheKeyAndWhatIsThere) {
  GgufBuilder builder;
  builder.value("i8", 1, GgufBuilder::raw(int8_t{-5}))
      .value("i64", 11, GgufBuilder::raw(INT64_MIN))
      .value("u64", 10, GgufBuilder::raw(UINT64_MAX))
      .value("nan", 6, GgufBuilder::raw(std::nanf("")))
      .value("huge", 12, GgufBuilder::raw(1e300))
      .string("text", "t")
      .array("mixed", 9, 1, GgufBuilder::raw(uint32_t{4}) + raw8(1) + GgufBuilder::raw(1u))
      .array("wide", 10, 1, raw8(uint64_t{1} << 31))
      .array("nans", 6, 1, GgufBuilder::raw(HUGE_VALF))
      .array("none", 8, 0, "");
  const auto read = read_gguf(file_of(builder.build()));
  ASSERT_TRUE(read.ok()) << read.error().message();
  const GgufFile& file = *read;
  EXPECT_EQ(*file.get_i32("i8"), -5);
  EXPECT_EQ(*file.get_u64("u64"), UINT64_MAX);
  EXPECT_TRUE(file.get_string_array("none")->empty());
  const Failure failures[] = {
      file.get_u32("i8").error(),
      file.get_u64("i64").error(),
      file.get_i32("i64").error(),
      file.get_u32("u64").error(),
      file.get_f32("nan").error(),
      file.get_f32("huge").error(),
      file.get_f32("i8").error(),
      file.get_u32("text").error(),
      file.get_bool("i8").error(),
      file.get_string("i8").error(),
      file.get_string("mixed").error(),
      file.get_string_array("text").error(),
      file.get_string_array("wide").error(),
      file.get_i32_array("mixed").error(),
      file.get_i32_array("wide").error(),
      file.get_f32_array("nans").error(),
      file.get_u32("absent").error(),
      file.get_string_array("absent").error(),
      file.get_u32_or("text", 1).error(),
      file.get_bool_or("text", true).error()};
  for (const Failure& failure : failures) {
    EXPECT_EQ(failure.path, "test.bin");
    EXPECT_FALSE(failure.field.empty());
    EXPECT_FALSE(failure.got.empty());
  }
  EXPECT_EQ(
      file.get_u32("i8").error().message(),
      "[test.bin at byte 38, i8] must be an integer from 0 to 4294967295 but is -5 (i8)");
}

using Change = std::function<void(GgufBuilder&)>;

struct Malformed {
  std::string name;
  std::string content;
};

void add(std::vector<Malformed>& cases, const std::string& name, const Change& change) {
  GgufBuilder builder = good_file();
  change(builder);
  cases.push_back({name, builder.build()});
}

void add_values(std::vector<Malformed>& cases) {
  const auto value = [&](const std::string& name, uint32_t type, const std::string& payload) {
    GgufBuilder builder;
    cases.push_back({name, builder.value("k", type, payload).build()});
  };
  value("unknown value type", 13, std::string(16, '\0'));
  value("value type 2^32-1", UINT32_MAX, std::string(16, '\0'));
  value("bool 2", 7, "\2");
  value("cut u64", 10, "1234");
  value("cut string length", 8, "123");
  value("cut array head", 9, std::string(11, '\0'));
  value("array of unknown type", 9, GgufBuilder::raw(13u) + raw8(0));
  value("cut array", 9, GgufBuilder::raw(4u) + raw8(3) + std::string(11, '\0'));
  value("cut string array", 9, GgufBuilder::raw(8u) + raw8(2) + GgufBuilder::text("a"));
  std::string deep;
  for (int i = 0; i < 1000; ++i) deep += GgufBuilder::raw(9u) + raw8(1);
  value("deep arrays", 9, deep);
  value("arrays of arrays cut", 9, GgufBuilder::raw(9u) + raw8(1u << 20) + std::string(64, '\0'));
  for (const uint64_t size :
       {(uint64_t{1} << 31) - 1,
        uint64_t{1} << 31,
        (uint64_t{1} << 31) + 1,
        (uint64_t{1} << 32) - 1,
        uint64_t{1} << 32,
        (uint64_t{1} << 32) + 1,
        (uint64_t{1} << 61),
        (uint64_t{1} << 63) - 1,
        uint64_t{1} << 63,
        (uint64_t{1} << 63) + 1,
        UINT64_MAX - 7,
        UINT64_MAX}) {
    const std::string text = std::to_string(size);
    value("string of " + text, 8, raw8(size) + "abc");
    value("u8 array of " + text, 9, GgufBuilder::raw(0u) + raw8(size) + "abc");
    value("f64 array of " + text, 9, GgufBuilder::raw(12u) + raw8(size) + "abcdefgh");
    value("string array of " + text, 9, GgufBuilder::raw(8u) + raw8(size));
    value("string in array of " + text, 9, GgufBuilder::raw(8u) + raw8(1) + raw8(size) + "abc");
    cases.push_back(
        {"key of " + text,
         GgufBuilder::raw(0x46554747u) + GgufBuilder::raw(3u) + raw8(0) + raw8(1) + raw8(size) +
             std::string(32, 'k')});
    for (const bool tensors : {true, false}) {
      cases.push_back(
          {"count " + text,
           GgufBuilder::raw(0x46554747u) + GgufBuilder::raw(3u) + raw8(tensors ? size : 0) +
               raw8(tensors ? 0 : size) + std::string(64, '\0')});
    }
    const auto tensor =
        [&](const std::string& name, std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
          GgufBuilder builder;
          builder.tensor("t", dims, type, offset).data(std::string(64, '\0'));
          cases.push_back({name + " " + text, builder.build()});
        };
    tensor("dim", {size}, kF32, 0);
    tensor("dims", {size, size}, kF32, 0);
    tensor("outer dim", {32, size}, kQ40, 0);
    tensor("offset", {1}, kF32, size / 32 * 32);
    tensor("unaligned offset", {1}, kF32, size | 1);
  }
}

std::vector<Malformed> malformed_files() {
  std::vector<Malformed> cases{
      {"empty", ""}, {"magic alone", "GGUF"}, {"version 0", std::string("GGUF\0\0\0\0", 8)}};
  add(cases, "wrong magic", [](auto& b) { b.magic = 0x46554746; });
  for (const uint32_t version : {0u, 1u, 4u, 0x03000000u, UINT32_MAX}) {
    add(cases, "version " + std::to_string(version), [&](auto& b) { b.version = version; });
  }
  add(cases, "one tensor too many", [](auto& b) { b.tensor_count_change = 1; });
  add(cases, "one value too few", [](auto& b) { b.value_count_change = -1; });
  add(cases, "one value too many", [](auto& b) { b.value_count_change = 1; });
  add(cases, "key twice", [](auto& b) { b.u32("llama.block_count", 2); });
  add(cases, "empty key", [](auto& b) { b.u32("", 2); });
  add(cases, "key with NUL", [](auto& b) { b.u32(std::string("a\0b", 3), 2); });
  add(cases, "key with newline", [](auto& b) { b.u32("a\nb", 2); });
  add(cases, "tensor twice", [](auto& b) { b.tensor("x", {1}, kF32, 64); });
  add(cases, "empty tensor name", [](auto& b) { b.tensor("", {1}, kF32, 64); });
  add(cases, "tensor name with NUL", [](auto& b) {
    b.tensor(std::string("a\0b", 3), {1}, kF32, 64);
  });
  add(cases, "long tensor name", [](auto& b) { b.tensor(std::string(257, 'n'), {1}, kF32, 64); });
  add(cases, "five dims", [](auto& b) { b.tensor("z", {1, 1, 1, 1, 1}, kF32, 64); });
  add(cases, "dim 0", [](auto& b) { b.tensor("z", {0}, kF32, 64); });
  add(cases, "partial block", [](auto& b) { b.tensor("z", {33}, kQ40, 64); });
  add(cases, "block of 1", [](auto& b) { b.tensor("z", {1}, kQ40, 64); });
  add(cases, "scalar of blocks", [](auto& b) { b.tensor("z", {}, kQ40, 64); });
  add(cases, "overlap", [](auto& b) { b.tensor("z", {1}, kF32, 32); });
  add(cases, "same place", [](auto& b) { b.tensor("z", {1}, kF32, 0); });
  add(cases, "unaligned", [](auto& b) { b.tensor("z", {1}, kF32, 4); });
  add(cases, "beyond the end", [](auto& b) { b.tensor("z", {1}, kF32, 96); });
  add(cases, "across the end", [](auto& b) { b.tensor("z", {2}, kF32, 64); });
  for (const uint32_t type : {4u, 5u, 9u, 10u, 11u, 15u, 16u, 29u, 31u, 34u, 40u, UINT32_MAX}) {
    add(cases, "tensor type " + std::to_string(type), [&](auto& b) {
      b.tensor("z", {256}, type, 64);
    });
  }
  for (const uint32_t alignment : {0u, 3u, 24u, 48u, 1u << 21, 1u << 31, UINT32_MAX}) {
    add(cases, "alignment " + std::to_string(alignment), [&](auto& b) {
      b.u32("general.alignment", alignment);
    });
  }
  add(cases, "alignment as text", [](auto& b) { b.string("general.alignment", "32"); });
  add_values(cases);
  return cases;
}

TEST(GgufMalformed, EveryClassIsRefusedWithThePlaceNamed) {
  const auto cases = malformed_files();
  ASSERT_GE(cases.size(), 60u);
  for (const Malformed& malformed : cases) {
    const auto file = read_gguf(file_of(malformed.content));
    ASSERT_FALSE(file.ok()) << malformed.name;
    EXPECT_EQ(file.error().path, "test.bin") << malformed.name;
    EXPECT_TRUE(file.error().offset.has_value()) << malformed.name;
    EXPECT_FALSE(file.error().field.empty()) << malformed.name;
    EXPECT_LT(file.error().message().size(), 800u) << malformed.name;
  }
}

void use_values(const GgufFile& file) {
  for (const GgufValue& value : file.values()) {
    (void)file.get_u32(value.key).ok();
    (void)file.get_f32(value.key).ok();
    (void)file.get_bool(value.key).ok();
    (void)file.get_string(value.key).ok();
    (void)file.get_string_array(value.key).ok();
    (void)file.get_i32_array(value.key).ok();
    (void)file.get_f32_array(value.key).ok();
  }
}

TEST(GgufMalformed, EveryCutIsRefusedAndEveryChangedByteIsSafe) {
  const std::string good = good_file().build();
  for (size_t bytes = 0; bytes < good.size(); ++bytes) {
    EXPECT_FALSE(read_gguf(file_of(good.substr(0, bytes))).ok()) << bytes;
  }
  for (size_t at = 0; at < good.size(); ++at) {
    for (const char flip : {'\x01', '\x04', '\x20', '\x80', '\xff'}) {
      std::string changed = good;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      const auto file = read_gguf(file_of(changed));
      if (!file) continue;
      use_tensors(file->tensors());
      use_values(*file);
    }
  }
}

TEST(Gguf, AlignmentOfTheFileIsUsed) {
  GgufBuilder builder;
  builder.alignment = 256;
  builder.u32("general.alignment", 256)
      .tensor("a", {1}, kF32, 0)
      .tensor("b", {}, kF32, 256)
      .data(std::string(256, '\0') + GgufBuilder::raw(2.0f));
  const auto file = read_gguf(file_of(builder.build()));
  ASSERT_TRUE(file.ok()) << file.error().message();
  float value = 0;
  ASSERT_TRUE(dequantize_rows(*file->find("b"), 0, 1, &value).ok());
  EXPECT_EQ(value, 2.0f);
}

}  // namespace
}  // namespace metal_lora::io
