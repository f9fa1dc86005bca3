// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// text_oracle tokenize MODEL    {"text", "add_special", "literal"} -> {"ids", "decoded",
// "streamed"} text_oracle render            {"template", "variables"} -> {"text"} or {"error"}
// text_oracle speed MODEL FILE  one line of JSON: bytes, tokens, load seconds, MB/s (CPU time)
// MODEL: a folder, a .gguf file or a tokenizer.json.
#include <time.h>

#include <algorithm>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "metal_lora/error.h"
#include "src/text/chat_template.h"
#include "src/text/tokenizer.h"

namespace {

using metal_lora::text::SpecialText;
using metal_lora::text::Tokenizer;
using Json = nlohmann::ordered_json;

std::string dump(const Json& json) {
  return json.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

Tokenizer open(const std::filesystem::path& model) {
  return model.extension() == ".json" ? Tokenizer::from_json(model) : Tokenizer::from_path(model);
}

Json tokenize(const Tokenizer& tokenizer, const Json& request) {
  const auto special = request.value("literal", false) ? SpecialText::literal : SpecialText::parse;
  const bool skip = request.value("skip_special", false);
  const auto ids = tokenizer.encode(
      request.at("text").get<std::string>(), request.value("add_special", false), special);
  const std::vector<int32_t> to_decode =
      request.contains("ids") ? request.at("ids").get<std::vector<int32_t>>() : ids;
  metal_lora::text::StreamingDecoder stream(tokenizer, skip);
  std::string streamed;
  for (const int32_t id : to_decode) streamed += stream.push(id);
  streamed += stream.flush();
  return {{"ids", ids}, {"decoded", tokenizer.decode(to_decode, skip)}, {"streamed", streamed}};
}

Json render(const Json& request) {
  try {
    const metal_lora::text::ChatTemplate chat(request.at("template").get<std::string>());
    const metal_lora::text::CalendarTime date{2026, 11, 23, 4, 5, 6};
    return {{"text", chat.render_variables(request.at("variables"), {}, date)}};
  } catch (const metal_lora::Error& error) {
    return {{"error", error.what()}};
  }
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

Json speed(const std::string& model, const std::string& path) {
  const double start = cpu_seconds();
  const Tokenizer tokenizer = open(model);
  const double load_s = cpu_seconds() - start;
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  std::vector<double> cold, warm;
  size_t tokens = 0;
  for (int run = 0; run < 5; ++run) {
    const Tokenizer fresh = open(model);
    for (auto* times : {&cold, &warm}) {
      const double before = cpu_seconds();
      tokens = fresh.encode(text, false).size();
      times->push_back(cpu_seconds() - before);
    }
  }
  std::sort(cold.begin(), cold.end());
  std::sort(warm.begin(), warm.end());
  const double megabytes = static_cast<double>(text.size()) * 1e-6;
  return {
      {"bytes", text.size()},
      {"tokens", tokens},
      {"load_s", load_s},
      {"cold_mb_s", megabytes / cold[2]},
      {"warm_mb_s", megabytes / warm[2]}};
}

int run(const std::vector<std::string>& args) {
  if (args.size() == 3 && args[0] == "speed") {
    std::cout << dump(speed(args[1], args[2])) << "\n";
    return 0;
  }
  if (args.size() == 2 && args[0] == "tokenize") {
    const Tokenizer tokenizer = open(args[1]);
    for (std::string line; std::getline(std::cin, line);) {
      std::cout << dump(tokenize(tokenizer, Json::parse(line))) << "\n";
    }
    return 0;
  }
  if (args.size() == 1 && args[0] == "render") {
    for (std::string line; std::getline(std::cin, line);) {
      std::cout << dump(render(Json::parse(line))) << "\n";
    }
    return 0;
  }
  std::cerr << "usage: text_oracle tokenize MODEL | render | speed MODEL FILE\n";
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
