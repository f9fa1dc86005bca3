// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/safetensors.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "src/io/atomic_file.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::bytes_of;
using testing::file_of;
using testing::read_text;
using testing::TempFolder;
using testing::use_tensors;
using testing::write_text;

std::string with_header(const std::string& header, const std::string& data = {}) {
  return bytes_of(uint64_t{header.size()}) + header + data;
}

std::string entry(
    const std::string& dtype,
    const std::string& shape,
    const std::string& begin,
    const std::string& end) {
  return fmt::format(
      R"({{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", dtype, shape, begin, end);
}

// A file of one tensor "a" with `data_bytes` bytes.
std::string one(
    const std::string& dtype,
    const std::string& shape,
    const std::string& begin,
    const std::string& end,
    size_t data_bytes) {
  return with_header(
      "{\"a\":" + entry(dtype, shape, begin, end) + "}", std::string(data_bytes, '\1'));
}

struct Malformed {
  std::string name;
  std::string content;
};

// Wrong numbers in an otherwise good file: the sizes at which arithmetic of 31, 32, 63 and 64 bits
// breaks, as dimension, as offset and as header length.
void add_sizes(std::vector<Malformed>& cases) {
  const std::pair<const char*, uint64_t> sizes[] = {
      {"2^31-1", (uint64_t{1} << 31) - 1},
      {"2^31", uint64_t{1} << 31},
      {"2^31+1", (uint64_t{1} << 31) + 1},
      {"2^32-1", (uint64_t{1} << 32) - 1},
      {"2^32", uint64_t{1} << 32},
      {"2^32+1", (uint64_t{1} << 32) + 1},
      {"2^63-1", (uint64_t{1} << 63) - 1},
      {"2^63", uint64_t{1} << 63},
      {"2^63+1", (uint64_t{1} << 63) + 1},
      {"2^64-1", UINT64_MAX}};
  for (const auto& [label, size] : sizes) {
    const std::string text = std::to_string(size);
    const std::string name = label;
    cases.push_back({"dim " + name, one("U8", "[" + text + "]", "0", "4", 4)});
    cases.push_back({"dim " + name + " of F32", one("F32", "[" + text + "]", "0", "4", 4)});
    cases.push_back(
        {"dims " + name + " squared", one("U8", fmt::format("[{0},{0}]", text), "0", "1", 1)});
    cases.push_back({"end " + name, one("U8", "[" + text + "]", "0", text, 4)});
    cases.push_back({"begin " + name, one("U8", "[4]", text, std::to_string(size + 4), 4)});
    cases.push_back({"header length " + name, bytes_of(size) + "{}"});
  }
}

void add_json(std::vector<Malformed>& cases) {
  const std::string good = "\"a\":" + entry("U8", "[1]", "0", "1");
  const std::string texts[][2] = {
      {"no brace", good},
      {"leading space", " {" + good + "}"},
      {"byte order mark", "\xef\xbb\xbf{" + good + "}"},
      {"unclosed", "{" + good},
      {"trailing comma", "{" + good + ",}"},
      {"trailing text", "{" + good + "}x"},
      {"two objects", "{" + good + "}{}"},
      {"NUL after", "{" + good + "}" + std::string(1, '\0')},
      {"NUL and text after", "{" + good + "}" + std::string(1, '\0') + "xyz"},
      {"comment", "{/**/" + good + "}"},
      {"single quotes", "{'a':1}"},
      {"invalid UTF-8", "{\"\xff\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"overlong UTF-8", "{\"\xc0\xaf\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"lone surrogate", "{\"\\ud800\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"NUL in a name", "{\"a\\u0000\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"empty name", "{\"\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"long name", "{\"" + std::string(257, 'n') + "\":" + entry("U8", "[1]", "0", "1") + "}"},
      {"array at the root", "[" + entry("U8", "[1]", "0", "1") + "]"},
      {"tensor is null", "{\"a\":null}"},
      {"tensor is a number", "{\"a\":1}"},
      {"tensor is a string", "{\"a\":\"U8\"}"},
      {"tensor is an array", "{\"a\":[]}"},
      {"tensor is empty", "{\"a\":{}}"},
      {"no dtype", R"({"a":{"shape":[1],"data_offsets":[0,1]}})"},
      {"no shape", R"({"a":{"dtype":"U8","data_offsets":[0,1]}})"},
      {"no offsets", R"({"a":{"dtype":"U8","shape":[1]}})"},
      {"unknown member", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})"},
      {"dtype twice", R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})"},
      {"shape twice", R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})"},
      {"offsets twice",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"data_offsets":[0,1]}})"},
      {"dtype null", R"({"a":{"dtype":null,"shape":[1],"data_offsets":[0,1]}})"},
      {"dtype number", R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,1]}})"},
      {"dtype object", R"({"a":{"dtype":{},"shape":[1],"data_offsets":[0,1]}})"},
      {"shape a number", R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})"},
      {"shape of strings", R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})"},
      {"shape nested", R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})"},
      {"shape of null", R"({"a":{"dtype":"U8","shape":[null],"data_offsets":[0,1]}})"},
      {"shape of true", R"({"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}})"},
      {"offsets a number", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":1}})"},
      {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}," + good + "}"},
      {"metadata key twice", R"({"__metadata__":{"k":"1","k":"2"},)" + good + "}"},
      {"metadata number", R"({"__metadata__":{"k":1},)" + good + "}"},
      {"metadata nested", R"({"__metadata__":{"k":{}},)" + good + "}"},
      {"metadata object for a value", R"({"__metadata__":{"":{"x":"y"}},)" + good + "}"},
      {"metadata array", R"({"__metadata__":[],)" + good + "}"},
      {"metadata null", R"({"__metadata__":null,)" + good + "}"},
      {"metadata string", R"({"__metadata__":"x",)" + good + "}"},
      {"deep nesting", "{\"a\":" + std::string(100000, '[')},
  };
  for (const auto& [name, header] : texts) cases.push_back({name, with_header(header, "\1")});
}

void add_layout(std::vector<Malformed>& cases) {
  const auto two = [](const std::string& a, const std::string& b, size_t bytes) {
    return with_header("{\"a\":" + a + ",\"b\":" + b + "}", std::string(bytes, '\1'));
  };
  const auto u8 = [](int begin, int end) {
    return entry(
        "U8", fmt::format("[{}]", end - begin), std::to_string(begin), std::to_string(end));
  };
  cases.insert(
      cases.end(),
      {{"empty file", ""},
       {"seven bytes", "\2\0\0\0\0\0\0"},
       {"header length 0", std::string(8, '\0')},
       {"header beyond the end", bytes_of(uint64_t{3}) + "{}"},
       {"header above 16 MiB", with_header("{}" + std::string((16u << 20) - 1, ' '))},
       {"overlap", two(u8(0, 4), u8(2, 6), 6)},
       {"same range", two(u8(0, 4), u8(0, 4), 4)},
       {"inside another", two(u8(0, 8), u8(2, 4), 8)},
       {"hole", two(u8(0, 4), u8(5, 9), 9)},
       {"hole at the start", one("U8", "[4]", "1", "5", 5)},
       {"tail", one("U8", "[4]", "0", "4", 5)},
       {"tail without tensors", with_header("{}", "x")},
       {"cut data", one("U8", "[4]", "0", "4", 3)},
       {"no data", one("U8", "[4]", "0", "4", 0)},
       {"descending offsets", one("U8", "[4]", "4", "0", 4)},
       {"empty tensor beyond the end", one("U8", "[0]", "9", "9", 4)},
       {"empty tensor inside another", two(u8(0, 4), u8(2, 2), 4)},
       {"duplicate name", with_header(R"({"a":)" + u8(0, 1) + R"(,"a":)" + u8(1, 2) + "}", "12")},
       {"duplicate empty name",
        with_header(R"({"a":)" + u8(0, 0) + R"(,"a":)" + u8(0, 0) + "}", "")},
       {"duplicate by escape",
        with_header(R"({"a":)" + u8(0, 1) + R"(,"\u0061":)" + u8(1, 2) + "}", "12")},
       {"negative dim", one("U8", "[-4]", "0", "4", 4)},
       {"two negative dims", one("U8", "[-2,-2]", "0", "4", 4)},
       {"minus zero", one("U8", "[-0]", "0", "0", 0)},
       {"fractional dim", one("U8", "[1.9]", "0", "1", 1)},
       {"whole float dim", one("U8", "[4.0]", "0", "4", 4)},
       {"exponent dim", one("U8", "[4e0]", "0", "4", 4)},
       {"dim 2^64", one("U8", "[18446744073709551616]", "0", "0", 0)},
       {"dim 2^64+4", one("U8", "[18446744073709551620]", "0", "4", 4)},
       {"product wraps to 0", one("F32", "[1073741824,1073741824,4]", "0", "0", 0)},
       {"product wraps to 4", one("U8", "[4294967297,4294967297]", "0", "4", 4)},
       {"bytes wrap", one("F64", "[2305843009213693953]", "0", "8", 8)},
       {"nine dims", one("U8", "[1,1,1,1,1,1,1,1,1]", "0", "1", 1)},
       {"too few bytes", one("F32", "[2]", "0", "4", 4)},
       {"too many bytes", one("F32", "[1]", "0", "8", 8)},
       {"bytes for a scalar", one("F32", "[]", "0", "8", 8)},
       {"one offset", with_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1]}})", "1")},
       {"three offsets",
        with_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}})", "1")},
       {"no offsets in the array",
        with_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[]}})", "1")},
       {"negative offset", one("U8", "[1]", "-1", "0", 1)},
       {"fractional offset", one("U8", "[1]", "0", "1.5", 1)},
       {"offset 2^64", one("U8", "[1]", "0", "18446744073709551617", 1)},
       {"lower-case dtype", one("f32", "[1]", "0", "4", 4)},
       {"empty dtype", one("", "[1]", "0", "4", 4)},
       {"unknown dtype", one("F33", "[1]", "0", "4", 4)},
       {"block dtype", one("Q4_0", "[32]", "0", "18", 18)},
       {"8-bit float", one("F8_E4M3", "[1]", "0", "1", 1)},
       {"complex", one("C64", "[1]", "0", "8", 8)}});
}

std::vector<Malformed> malformed_files() {
  std::vector<Malformed> cases;
  add_layout(cases);
  add_json(cases);
  add_sizes(cases);
  return cases;
}

TEST(SafetensorsMalformed, EveryClassIsRefusedWithTheFileNamed) {
  const auto cases = malformed_files();
  ASSERT_GE(cases.size(), 60u);
  for (const Malformed& malformed : cases) {
    const auto file = read_safetensors(file_of(malformed.content));
    ASSERT_FALSE(file.ok()) << malformed.name;
    const Failure& failure = file.error();
    EXPECT_EQ(failure.path, "test.bin") << malformed.name;
    EXPECT_TRUE(failure.offset.has_value()) << malformed.name;
    EXPECT_FALSE(failure.field.empty()) << malformed.name;
    EXPECT_FALSE(failure.expected.empty() || failure.got.empty()) << malformed.name;
    EXPECT_LT(failure.message().size(), 800u) << malformed.name;
  }
}

// Whatever a cut or a changed byte makes of a good file: refused, or all of it usable.
TEST(SafetensorsMalformed, EveryCutIsRefusedAndEveryChangedByteIsSafe) {
  const std::string good = with_header(
      R"({"__metadata__":{"k":"v"},"a":)" + entry("F32", "[2,2]", "0", "16") + R"(,"b":)" +
          entry("BF16", "[3]", "16", "22") + "}",
      std::string(22, '\1'));
  ASSERT_TRUE(read_safetensors(file_of(good)).ok());
  for (size_t bytes = 0; bytes < good.size(); ++bytes) {
    EXPECT_FALSE(read_safetensors(file_of(good.substr(0, bytes))).ok()) << bytes;
  }
  const size_t header_end = good.size() - 22;
  for (size_t at = 0; at < header_end; ++at) {
    for (const char flip : {'\x01', '\x02', '\x10', '\x40', '\x80'}) {
      std::string changed = good;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      if (const auto file = read_safetensors(file_of(changed))) {
        use_tensors(file->tensors());
      }
    }
  }
}

TEST(Safetensors, TensorCountIsBounded) {
  std::string header = "{";
  for (uint64_t i = 0; i <= kSafetensorsMaxTensors; ++i) {
    header += fmt::format("{}\"{}\":{}", i == 0 ? "" : ",", i, entry("U8", "[0]", "0", "0"));
  }
  const auto file = read_safetensors(file_of(with_header(header + "}")));
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.error().expected, "at most 131072 tensors");
}

TEST(Safetensors, ReadsWhatTheFormatAllows) {
  const std::string names[] = {
      "BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"};
  for (const std::string& name : names) {
    const size_t bytes =
        name == "BOOL" ? 1 : std::stoul(name.substr(name.find_first_of("0123456789"))) / 8;
    const std::string end = std::to_string(6 * bytes);
    const auto file = read_safetensors(file_of(one(name, "[2,3]", "0", end, 6 * bytes)));
    ASSERT_TRUE(file.ok()) << name << file.error().message();
    EXPECT_EQ(tensor_type_name(file->tensors()[0].type), name);
    EXPECT_EQ(file->tensors()[0].shape, (std::vector<uint64_t>{2, 3}));
    EXPECT_EQ(use_tensors(file->tensors()), 6u);
  }
  // Misordered entries, padding, escapes, an empty key, scalars and empty tensors.
  const auto file = read_safetensors(file_of(with_header(
      R"({"b\u002fc":)" + entry("U8", "[2]", "4", "6") +
          R"(,"__metadata__":{"":"x","k":"\n"},"a":)" + entry("F32", "[]", "0", "4") + R"(,"e":)" +
          entry("F32", "[0,7]", "4", "4") + "}   ",
      std::string(6, '\1'))));
  ASSERT_TRUE(file.ok()) << file.error().message();
  ASSERT_EQ(file->tensors().size(), 3u);
  EXPECT_EQ(file->tensors()[0].name, "a");
  EXPECT_EQ(file->tensors()[1].name, "e");
  EXPECT_EQ(file->tensors()[2].name, "b/c");
  EXPECT_EQ(file->find("b/c"), &file->tensors()[2]);
  EXPECT_EQ(file->find("c"), nullptr);
  EXPECT_EQ(file->metadata().at(""), "x");
  EXPECT_EQ(file->metadata().at("k"), "\n");
  EXPECT_EQ(use_tensors(file->tensors()), 3u);
  EXPECT_TRUE(read_safetensors(file_of(with_header("{}"))).ok());
}

TEST(Safetensors, TensorsKeepTheMappingAlive) {
  TempFolder folder;
  write_text(folder / "x.safetensors", one("U8", "[4]", "0", "4", 4));
  TensorInfo tensor;
  {
    const auto file = read_safetensors(folder / "x.safetensors");
    ASSERT_TRUE(file.ok());
    tensor = file->tensors()[0];
  }
  EXPECT_EQ(tensor.data[3], std::byte{1});
}

TensorInfo tensor_of(
    const std::string& name,
    TensorType type,
    std::vector<uint64_t> shape,
    std::span<const std::byte> data) {
  return {name, type, std::move(shape), data.data(), data.size(), nullptr};
}

TEST(SafetensorsWrite, RoundTripsInADeterministicLayout) {
  TempFolder folder;
  const std::vector<float> floats{1, 2, 3, 4, 5, 6};
  const std::vector<uint8_t> small{7, 8, 9};
  const auto a = tensor_of("a\"quoted", TensorType::f32, {2, 3}, std::as_bytes(std::span(floats)));
  const auto b = tensor_of("b", TensorType::u8, {3}, std::as_bytes(std::span(small)));
  const auto c = tensor_of("c", TensorType::f16, {0, 4}, {});
  const std::map<std::string, std::string> metadata{{"format", "mlx"}, {"é", "\t"}};
  const TensorInfo one_order[] = {a, b, c};
  const TensorInfo other_order[] = {c, b, a};
  ASSERT_TRUE(write_safetensors(folder / "1.safetensors", one_order, metadata).ok());
  ASSERT_TRUE(write_safetensors(folder / "2.safetensors", other_order, metadata).ok());
  EXPECT_EQ(read_text(folder / "1.safetensors"), read_text(folder / "2.safetensors"));
  const auto file = read_safetensors(folder / "1.safetensors");
  ASSERT_TRUE(file.ok()) << file.error().message();
  EXPECT_EQ(file->metadata(), metadata);
  const TensorInfo* read = file->find("a\"quoted");
  ASSERT_NE(read, nullptr);
  EXPECT_EQ(read->shape, a.shape);
  EXPECT_TRUE(read->is_aligned());
  EXPECT_EQ(std::memcmp(read->data, floats.data(), read->nbytes), 0);
  EXPECT_EQ(file->find("c")->nbytes, 0u);
}

TEST(SafetensorsWrite, RefusesWhatMustNotBeSavedAndKeepsThePreviousFile) {
  TempFolder folder;
  const std::string path = folder / "adapters.safetensors";
  write_text(path, "previous");
  const auto refuses = [&](std::vector<TensorInfo> tensors) {
    const auto written = write_safetensors(path, tensors);
    EXPECT_EQ(read_text(path), "previous");
    EXPECT_EQ(folder.entry_count(), 1u);
    return !written.ok();
  };
  const std::vector<float> fine{1, 2};
  const auto good = tensor_of("a", TensorType::f32, {2}, std::as_bytes(std::span(fine)));
  EXPECT_TRUE(refuses({good, good}));
  const auto changed = [&](auto change) {
    TensorInfo tensor = good;
    change(tensor);
    return refuses({tensor});
  };
  EXPECT_TRUE(changed([](TensorInfo& t) { t.name = ""; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.name = "__metadata__"; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.name = "\xff"; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.name = std::string(257, 'x'); }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.name = std::string("a\0b", 3); }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.shape = {3}; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.shape = {1, 1, 1, 1, 1, 1, 1, 1, 2}; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.data = nullptr; }));
  EXPECT_TRUE(changed([](TensorInfo& t) { t.type = TensorType::q4_0; }));
  const double bad[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
  for (const double value : bad) {
    const std::vector<float> f32{1, static_cast<float>(value)};
    EXPECT_TRUE(refuses({tensor_of("x", TensorType::f32, {2}, std::as_bytes(std::span(f32)))}));
    const std::vector<double> f64{1, value};
    EXPECT_TRUE(refuses({tensor_of("x", TensorType::f64, {2}, std::as_bytes(std::span(f64)))}));
  }
  for (const uint16_t bits : {0x7c00, 0xfc00, 0x7e01}) {
    const std::vector<uint16_t> f16{bits};
    EXPECT_TRUE(refuses({tensor_of("x", TensorType::f16, {1}, std::as_bytes(std::span(f16)))}));
  }
  for (const uint16_t bits : {0x7f80, 0xff80, 0x7fc1}) {
    const std::vector<uint16_t> bf16{bits};
    const auto tensor = tensor_of("x", TensorType::bf16, {1}, std::as_bytes(std::span(bf16)));
    EXPECT_TRUE(refuses({tensor}));
    // On request they are written.
    EXPECT_TRUE(
        write_safetensors(folder / "other", std::vector{tensor}, {}, {false, nullptr}).ok());
    std::filesystem::remove(folder / "other");
  }
}

class SafetensorsFolderTest : public ::testing::Test {
 protected:
  SafetensorsFolderTest() {
    write_text(folder_ / "m-1.safetensors", one("U8", "[4]", "0", "4", 4));
    write_text(
        folder_ / "m-2.safetensors",
        with_header("{\"b\":" + entry("U8", "[1]", "0", "1") + "}", "x"));
  }
  Result<SafetensorsFolder> with_index(const std::string& index) {
    write_text(folder_ / "model.safetensors.index.json", index);
    return read_safetensors_folder(folder_.path());
  }
  TempFolder folder_;
};

TEST_F(SafetensorsFolderTest, ReadsShards) {
  const auto read =
      with_index(R"({"metadata":{},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  ASSERT_TRUE(read.ok()) << read.error().message();
  EXPECT_EQ(read->files().size(), 2u);
  ASSERT_NE(read->find("b"), nullptr);
  EXPECT_EQ(read->find("b")->file->path(), folder_ / "m-2.safetensors");
  EXPECT_EQ(use_tensors(read->tensors()), 5u);
}

TEST_F(SafetensorsFolderTest, ReadsASingleFile) {
  EXPECT_EQ(read_safetensors_folder(folder_.path()).error().code, ErrorCode::not_found);
  EXPECT_EQ(read_safetensors_folder(folder_ / "none").error().code, ErrorCode::not_found);
  write_text(folder_ / "model.safetensors", one("U8", "[4]", "0", "4", 4));
  const auto read = read_safetensors_folder(folder_.path());
  ASSERT_TRUE(read.ok());
  EXPECT_NE(read->find("a"), nullptr);
}

TEST_F(SafetensorsFolderTest, RefusesAWrongIndex) {
  write_text(folder_ / "m-3.safetensors", one("U8", "[4]", "0", "4", 4));
  const std::string outside = folder_ / "sub";
  std::filesystem::create_directory(outside);
  write_text(outside + "/m-1.safetensors", one("U8", "[4]", "0", "4", 4));
  for (const char* index :
       {"",
        "[]",
        "{}",
        "{\"weight_map\":[]}",
        "{\"weight_map\":{}}",
        "{\"weight_map\":null}",
        R"({"weight_map":{"a":1}})",
        R"({"weight_map":{"a":null}})",
        R"({"weight_map":{"a":"none.safetensors"}})",
        R"({"weight_map":{"b":"m-1.safetensors"}})",
        R"({"weight_map":{"a":"m-1.safetensors","b":"m-1.safetensors"}})",
        R"({"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors"}})",
        R"({"weight_map":{"a":"m-1.safetensors","c":"m-3.safetensors"}})",
        R"({"weight_map":{"a":"m-1.safetensors","a":"m-1.safetensors"}})",
        R"({"weight_map":{"a":"sub/m-1.safetensors"}})",
        R"({"weight_map":{"a":"./m-1.safetensors"}})",
        R"({"weight_map":{"a":"../m-1.safetensors"}})",
        R"({"weight_map":{"a":"/etc/passwd"}})",
        R"({"weight_map":{"a":"m-1.safetensors\u0000"}})",
        R"({"weight_map":{"a":"m-1.bin"}})",
        R"({"weight_map":{"a":""}})"}) {
    EXPECT_FALSE(with_index(index).ok()) << index;
  }
}

}  // namespace
}  // namespace metal_lora::io
