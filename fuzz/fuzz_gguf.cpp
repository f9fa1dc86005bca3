// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "fuzz/fuzz_input.h"
#include "src/io/affine.h"
#include "src/io/gguf.h"

// Reads, asks every getter for every key, dequantises every tensor and converts what has an affine
// form.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace metal_lora;
  const auto file = io::read_gguf(fuzz::as_file(data, bytes));
  if (!file) {
    fuzz::require(!file.error().message().empty());
    return 0;
  }
  for (const io::GgufValue& value : file->values()) {
    fuzz::require(file->find_value(value.key) == &value);
    (void)file->get_u32(value.key).ok();
    (void)file->get_i32(value.key).ok();
    (void)file->get_u64(value.key).ok();
    (void)file->get_f32(value.key).ok();
    (void)file->get_bool(value.key).ok();
    (void)file->get_string(value.key).ok();
    (void)file->get_i32_array(value.key).ok();
    (void)file->get_f32_array(value.key).ok();
    if (const auto strings = file->get_string_array(value.key)) {
      size_t total = 0;
      for (const std::string_view text : *strings) {
        for (const char c : text) total += static_cast<unsigned char>(c);
      }
      fuzz::require(total <= bytes * 255);
    }
  }
  fuzz::use_tensors(file->tensors());
  for (const io::TensorInfo& tensor : file->tensors()) {
    const auto spec = io::affine_spec(tensor.type);
    if (!spec) continue;
    const uint64_t n = tensor.row_count();
    const uint64_t k = tensor.row_elements();
    std::vector<uint32_t> q(n * spec->packed_words_per_row(k));
    std::vector<std::byte> scales(n * spec->groups_per_row(k) * spec->scale_bytes());
    std::vector<std::byte> biases(scales.size());
    (void)io::to_affine(tensor.type, tensor.data, n, k, q.data(), scales.data(), biases.data())
        .ok();
  }
  return 0;
}
