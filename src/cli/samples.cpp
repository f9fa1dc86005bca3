// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/samples.h"

#include <algorithm>

#include <fmt/format.h>

#include "metal_lora/generate.h"
#include "src/io/jsonl.h"

namespace metal_lora::cli {
namespace {

constexpr uint64_t kMaxSamples = 6;
constexpr int kMaxSampleTokens = 64;

}  // namespace

std::vector<ReportSample> read_samples(const std::string& path) {
  const auto file = io::unwrap(io::JsonlFile::open(path));
  std::vector<ReportSample> samples;
  for (uint64_t i = 0; i < std::min(file.size(), kMaxSamples); ++i) {
    const io::Json json = io::unwrap(file.parse(i));
    const auto row = io::unwrap(io::JsonObject::of(json, path));
    samples.push_back(
        {io::unwrap(row.get_string("prompt")),
         io::unwrap(row.get_string_or("completion", "")),
         "",
         ""});
  }
  return samples;
}

void answer_samples(
    Console& console,
    const Session& session,
    const Interruptible& interrupt,
    std::string ReportSample::*member,
    std::vector<ReportSample>& samples) {
  if (samples.empty()) return;
  Generator generator(session.model, session.tokenizer, session.adapter);
  GenerateOptions options;
  options.max_tokens = kMaxSampleTokens;
  for (size_t i = 0; i < samples.size(); ++i) {
    console.progress(fmt::format("answering sample {}/{}", i + 1, samples.size()));
    const auto& prompt = samples[i].prompt;
    const auto tokens = session.chat_template ? session.encode_chat(nlohmann::ordered_json::array(
                                                    {{{"role", "user"}, {"content", prompt}}}))
                                              : session.encode(prompt);
    samples[i].*member = generator.generate(tokens, options, {}, interrupt.flag()).text;
  }
  console.clear_progress();
}

}  // namespace metal_lora::cli
