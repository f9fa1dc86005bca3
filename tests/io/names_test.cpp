// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <sys/stat.h>

#include "src/io/inspect.h"
#include "src/io/result.h"
#include "src/io/safe_name.h"
#include "src/io/safetensors.h"
#include "src/io/sha256.h"
#include "tests/io/gguf_builder.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::TempFolder;
using testing::write_text;

TEST(SafeName, EveryByteInEveryPosition) {
  const std::string allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
  for (int byte = 0; byte < 256; ++byte) {
    const auto c = static_cast<char>(byte);
    const bool alphanumeric = c != '\0' && allowed.find(c) != std::string::npos;
    const bool inner = alphanumeric || c == '.' || c == '_' || c == '-';
    EXPECT_EQ(is_safe_name(std::string(1, c)), alphanumeric) << byte;
    EXPECT_EQ(is_safe_name(std::string("a") + c), inner) << byte;
    EXPECT_EQ(is_safe_name(std::string("a") + c + "b"), inner) << byte;
  }
  EXPECT_FALSE(is_safe_name(""));
  EXPECT_TRUE(is_safe_name(std::string(128, 'a')));
  EXPECT_FALSE(is_safe_name(std::string(129, 'a')));
  for (const char* name : {"..", ".", "../x", "/etc", "a/b", "a\\b", "%2e%2e", "a b", "ａ", "-x"}) {
    EXPECT_FALSE(check_safe_name(name, "adapter").ok()) << name;
  }
}

TEST(SafeName, OpensOnlyWhatLiesBeneathTheRoot) {
  TempFolder root;
  std::filesystem::create_directory(root / "good");
  write_text(root / "good/file", "content");
  std::filesystem::create_directory_symlink(root / "good", root / "link");
  std::filesystem::create_symlink("file", root / "good/link");
  std::filesystem::create_directory(root / "good/folder");
  ASSERT_EQ(::mkfifo((root / "good/fifo").c_str(), 0600), 0);
  const auto folder = open_folder_beneath(root.path(), "good");
  ASSERT_TRUE(folder.ok());
  const auto file = map_file_beneath(*folder, "file", root / "good");
  ASSERT_TRUE(file.ok());
  EXPECT_EQ((*file)->size(), 7u);
  EXPECT_EQ((*file)->path(), root / "good/file");
  for (const char* name : {"link", "..", "none", "good/folder", ""}) {
    EXPECT_FALSE(open_folder_beneath(root.path(), name).ok()) << name;
  }
  EXPECT_EQ(open_folder_beneath(root.path(), "none").error().code, ErrorCode::not_found);
  for (const char* name : {"link", "folder", "fifo", "..", "none", "../good/file"}) {
    EXPECT_FALSE(map_file_beneath(*folder, name, root / "good").ok()) << name;
  }
}

TEST(MappedFile, TakesRegularFilesAlone) {
  TempFolder folder;
  write_text(folder / "empty", "");
  const auto empty = MappedFile::open(folder / "empty");
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ((*empty)->size(), 0u);
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  for (const std::string& path : {folder / "fifo", folder.path(), std::string("/dev/null")}) {
    EXPECT_EQ(MappedFile::open(path).error().code, ErrorCode::invalid_input) << path;
  }
  EXPECT_EQ(MappedFile::open(folder / "none").error().code, ErrorCode::not_found);
  EXPECT_FALSE(MappedFile::open(std::string("/dev/null\0x", 11)).ok());
}

TEST(Failure, MessageAndException) {
  const Failure failure{ErrorCode::io, "f", 8, "x", "a", "b", "c"};
  EXPECT_EQ(failure.message(), "[f at byte 8, x] must be a but is b\nhint: c");
  try {
    unwrap(Result<int>(failure));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::io);
    EXPECT_EQ(error.what(), failure.message());
  }
  EXPECT_EQ(unwrap(Result<int>(5)), 5);
  EXPECT_THROW(unwrap(Result<void>(failure)), Error);
}

TEST(Sha256, KnownDigestsInPieces) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  Sha256 sha;
  sha.update("a");
  sha.update("bc");
  EXPECT_EQ(sha.finish_hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  TempFolder folder;
  write_text(folder / "x", "abc");
  EXPECT_EQ(*sha256_file(folder / "x"), sha256_hex("abc"));
}

TEST(Inspect, TellsTheKindsApart) {
  TempFolder folder;
  const std::vector<float> values(4, 1.0f);
  const TensorInfo tensor{
      "a", TensorType::f32, {4}, std::as_bytes(std::span(values)).data(), 16, nullptr};
  const auto kind_of = [](const std::string& path) { return inspect_path(path)->kind; };
  const auto save = [&](const std::string& path) {
    ASSERT_TRUE(write_safetensors(path, std::span(&tensor, 1)).ok());
  };
  EXPECT_EQ(inspect_path(folder / "none").error().code, ErrorCode::not_found);
  EXPECT_EQ(kind_of(folder.path()), FileKind::unknown);
  write_text(folder / "train.jsonl", "{}\n{}\n");
  const auto data = inspect_path(folder.path());
  ASSERT_TRUE(data.ok());
  EXPECT_EQ(data->kind, FileKind::dataset_folder);
  EXPECT_EQ(data->dataset.at(0).rows, 2u);
  write_text(folder / "config.json", R"({"model_type":"qwen2"})");
  save(folder / "model.safetensors");
  const auto model = inspect_path(folder.path());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->kind, FileKind::model_folder);
  EXPECT_EQ(model->architecture, "qwen2");
  EXPECT_EQ(model->tensor_bytes, 16u);
  EXPECT_EQ(model->element_count, 4u);
  write_text(folder / "adapter_config.json", "{}");
  save(folder / "adapter_model.safetensors");
  EXPECT_EQ(kind_of(folder.path()), FileKind::peft_adapter);
  save(folder / "adapters.safetensors");
  EXPECT_EQ(kind_of(folder.path()), FileKind::mlx_adapter);
  std::filesystem::rename(folder / "model.safetensors", folder / "renamed");
  EXPECT_EQ(kind_of(folder / "renamed"), FileKind::safetensors);
  write_text(folder / "g", testing::GgufBuilder().string("general.architecture", "llama").build());
  EXPECT_EQ(inspect_path(folder / "g")->architecture, "llama");
  write_text(folder / "text", "hello, world");
  EXPECT_EQ(kind_of(folder / "text"), FileKind::unknown);
  write_text(folder / "broken.gguf", "GG");
  EXPECT_FALSE(inspect_path(folder / "broken.gguf").ok());
}

}  // namespace
}  // namespace metal_lora::io
