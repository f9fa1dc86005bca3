// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/json.h"

#include "src/io/jsonl.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::file_of;

TEST(Json, RefusesEveryMalformedText) {
  const std::string texts[] = {
      "",
      " ",
      "{",
      "}",
      "[1,]",
      "{\"a\":1,}",
      "{'a':1}",
      "{a:1}",
      "nul",
      "NaN",
      "Infinity",
      "[1e999]",
      "[-1e999]",
      "01",
      "+1",
      ".5",
      "1.",
      "\"\n\"",
      "\"\xff\"",
      "\"\\ud800\"",
      "\"\\x\"",
      "[1] 2",
      "{}{}",
      "// x\n1",
      std::string("{}\0", 3),
      std::string("{}\0x", 4),
      R"({"a":1,"a":2})",
      R"({"a":1,"\u0061":2})",
      R"([{"b":{"a":1,"a":2}}])"};
  for (const std::string& text : texts) {
    const auto parsed = parse_json(text, "config.json", {}, 1000);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.error().path, "config.json");
    ASSERT_TRUE(parsed.error().offset.has_value()) << text;
    EXPECT_GE(*parsed.error().offset, 1000u);
    EXPECT_LE(*parsed.error().offset, 1000u + text.size());
  }
}

TEST(Json, BoundsDepthAndBytes) {
  const auto nested = [](int depth) {
    return std::string(static_cast<size_t>(depth), '[') +
           std::string(static_cast<size_t>(depth), ']');
  };
  EXPECT_TRUE(parse_json(nested(64), "x").ok());
  EXPECT_FALSE(parse_json(nested(65), "x").ok());
  EXPECT_FALSE(parse_json(std::string(1000000, '['), "x").ok());
  EXPECT_TRUE(parse_json("[123]", "x", {5, 1, true}).ok());
  EXPECT_FALSE(parse_json("[1234]", "x", {5, 1, true}).ok());
  EXPECT_EQ(*parse_json(R"({"a":1,"a":2})", "x", {100, 4, false}), Json::parse(R"({"a":2})"));
}

TEST(Json, BuildsTheSameValueAsTheLibrary) {
  const std::string text =
      R"({"a":[1,-2,3.5,true,false,null,"é\n",{"b":[],"c":{}}],"d":{"e":[[1],[2,[3]]]},"f":18446744073709551615})";
  EXPECT_EQ(*parse_json(text, "x"), Json::parse(text));
}

TEST(JsonObject, GettersNameFileAndField) {
  const auto json = parse_json(
      R"({"s":"x","i":3,"f":2.5,"b":true,"n":null,"o":{"k":1},"as":["a"],"ai":[1],"big":18446744073709551615})",
      "config.json");
  ASSERT_TRUE(json.ok());
  const auto root = JsonObject::of(*json, "config.json");
  ASSERT_TRUE(root.ok());
  EXPECT_EQ(*root->get_string("s"), "x");
  EXPECT_EQ(*root->get_int("i", 3, 3), 3);
  EXPECT_EQ(*root->get_number("f"), 2.5);
  EXPECT_EQ(*root->get_number("i"), 3.0);
  EXPECT_TRUE(*root->get_bool("b"));
  EXPECT_EQ(*root->get_strings("as"), std::vector<std::string>{"a"});
  EXPECT_EQ(*root->get_ints("ai"), std::vector<int64_t>{1});
  EXPECT_EQ(*root->get_numbers("ai"), std::vector<double>{1});
  EXPECT_EQ(*root->get_int_or("n", 9), 9);
  EXPECT_EQ(*root->get_string_or("absent", "y"), "y");
  EXPECT_FALSE(root->has("n"));
  for (const Failure& failure :
       {root->get_string("i").error(),
        root->get_int("f").error(),
        root->get_int("i", 4, 5).error(),
        root->get_int("big").error(),
        root->get_bool("i").error(),
        root->get_number("s").error(),
        root->get_number("f", 0, 1).error(),
        root->get_strings("ai").error(),
        root->get_ints("as").error(),
        root->get_numbers("as").error(),
        root->get_object("s").error(),
        root->get_int("absent").error(),
        root->get_int_or("s", 1).error(),
        root->get_int("n").error()}) {
    EXPECT_EQ(failure.path, "config.json");
    EXPECT_FALSE(failure.field.empty() || failure.got.empty());
  }
  EXPECT_EQ(
      root->get_object("o")->get_string("k").error().message(),
      "[config.json, o.k] must be a string but is the number 1");
  EXPECT_FALSE(JsonObject::of(Json::array(), "x").ok());
}

TEST(Jsonl, SplitsRowsAndNamesThem) {
  const auto file = JsonlFile::open(
      file_of("\xef\xbb\xbf{\"a\":1}\r\n\n  \t\r\n{\"a\":2}\n{\"a\":\"\xff\"}\n{\"a\":1,}\n[]"));
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(file->size(), 5u);
  EXPECT_EQ(file->row(0).text, "{\"a\":1}");
  EXPECT_EQ(file->row(0).offset, 3u);
  EXPECT_EQ(file->row(1).line_number, 4u);
  EXPECT_EQ((*file->parse(1))["a"], 2);
  for (const uint64_t bad : {2u, 3u}) {
    const auto parsed = file->parse(bad);
    ASSERT_FALSE(parsed.ok());
    EXPECT_EQ(parsed.error().field, "line " + std::to_string(bad + 3));
    EXPECT_GE(*parsed.error().offset, file->row(bad).offset);
  }
  EXPECT_TRUE(file->parse(4).ok());
  EXPECT_EQ(
      file->failure(1, "a", "text", "2").message(),
      "[test.bin at byte 18, line 4: a] must be text but is 2");
  EXPECT_EQ(JsonlFile::open(file_of(""))->size(), 0u);
  EXPECT_EQ(JsonlFile::open(file_of("\n\r\n"))->size(), 0u);
}

TEST(Jsonl, BoundsALine) {
  const std::string longest(kJsonlMaxLineBytes, ' ');
  EXPECT_TRUE(JsonlFile::open(file_of(longest + "\r\n1")).ok());
  const auto refused = JsonlFile::open(file_of("1\n" + longest + "2\n"));
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().field, "line 2");
  EXPECT_EQ(refused.error().offset, 2u);
}

}  // namespace
}  // namespace metal_lora::io
