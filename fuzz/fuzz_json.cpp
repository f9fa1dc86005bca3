// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <string>

#include "fuzz/fuzz_input.h"
#include "src/io/json.h"

// Parses as a model or adapter config and asks every getter for every key.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace metal_lora;
  const std::string_view text(reinterpret_cast<const char*>(data), bytes);
  const auto json = io::parse_json(text, "config.json");
  if (!json) {
    fuzz::require(!json.error().message().empty());
    return 0;
  }
  // What was accepted survives being written and read again.
  const std::string dumped = json->dump();
  const auto again = io::parse_json(dumped, "config.json", {dumped.size(), 64, true});
  fuzz::require(again.ok() && *again == *json);
  const auto root = io::JsonObject::of(*json, "config.json");
  if (!root) return 0;
  for (const auto& [key, value] : json->items()) {
    (void)root->get_string(key).ok();
    (void)root->get_bool(key).ok();
    (void)root->get_int(key, 0, 1024).ok();
    (void)root->get_number(key).ok();
    (void)root->get_strings(key).ok();
    (void)root->get_ints(key).ok();
    (void)root->get_numbers(key).ok();
    (void)root->get_object(key).ok();
    fuzz::require(!root->failure(key, "x", io::describe_json(&value)).message().empty());
  }
  return 0;
}
