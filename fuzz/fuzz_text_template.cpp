// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A chat template: parsed and rendered with a conversation, within small limits.
#include <cstddef>
#include <cstdint>
#include <string>

#include "metal_lora/error.h"
#include "src/text/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using metal_lora::text::ChatOptions;
  using metal_lora::text::ChatTemplate;
  static const auto kMessages = nlohmann::ordered_json::parse(
      R"([{"role":"system","content":"s"},{"role":"user","content":"ä <|x|>"},)"
      R"({"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":{"a":1.5}}}]}])");
  ChatOptions options;
  options.tools = nlohmann::ordered_json::parse(R"([{"type":"function","function":{"name":"f"}}])");
  options.add_generation_prompt = true;
  options.date.emplace();
  options.limits.steps = 100'000;
  options.limits.output_bytes = 1 << 20;
  options.limits.memory_bytes = 8 << 20;
  try {
    const ChatTemplate chat(std::string(reinterpret_cast<const char*>(data), size));
    chat.render(kMessages, options);
  } catch (const metal_lora::Error&) {
  }
  return 0;
}
