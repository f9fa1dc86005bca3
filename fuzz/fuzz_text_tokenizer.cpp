// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A tokenizer.json: loaded and used, both ways and as a stream.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "metal_lora/error.h"
#include "src/text/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using metal_lora::text::SpecialText;
  using metal_lora::text::StreamingDecoder;
  using metal_lora::text::Tokenizer;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const Tokenizer tokenizer = Tokenizer::from_json_text(bytes);
    // The file is its own text: it holds its tokens' spellings, and often invalid UTF-8.
    for (const auto special : {SpecialText::parse, SpecialText::literal}) {
      const auto ids = tokenizer.encode(bytes.substr(0, 4096), true, special);
      tokenizer.decode(ids, false);
      StreamingDecoder stream(tokenizer);
      for (const int32_t id : ids) stream.push(id);
      stream.flush();
    }
    tokenizer.decode(std::vector<int32_t>{-1, 0, 1, INT32_MAX}, true);
  } catch (const metal_lora::Error&) {
  }
  return 0;
}
