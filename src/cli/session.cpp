// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/session.h"

#include <charconv>

#include <fmt/format.h>

#include "metal_lora/error.h"

namespace mx = mlx::core;

namespace metal_lora::cli {

mx::Dtype parse_dtype(const std::string& name) {
  if (name == "float32" || name == "f32") return mx::float32;
  if (name == "bfloat16" || name == "bf16") return mx::bfloat16;
  if (name == "float16" || name == "f16") return mx::float16;
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[--dtype] must be float32, bfloat16 or float16 but is {}", name));
}

mx::Dtype target_dtype(const std::string& name, int quantize_bits) {
  if (!name.empty()) return parse_dtype(name);
  return quantize_bits > 0 ? mx::float16 : mx::bfloat16;
}

void ModelOptions::add_to(CLI::App& app, const std::string& default_dtype) {
  dtype = default_dtype;
  app.add_option("--model,-m", model, "A .gguf file or a Hugging Face folder")->required();
  app.add_option(
      "--adapter-path,-a",
      adapter_path,
      "An adapter's folder, mlx-lm's or PEFT's; it is applied without merging");
  app.add_option("--dtype", dtype, "Of activations: float32, bfloat16 or float16")
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--quantize",
         [this](const std::string& name) { quantize = *parse_quantization(name); },
         "Quantise dense weights while loading: 4 or 8 bits, or nf4 (QLoRA's 4 bits)")
      ->check(CLI::IsMember({"4", "8", "nf4"}));
  app.add_option("--quantize-group-size", quantize_group_size, "Weights that share a scale")
      ->check(CLI::IsMember({32, 64, 128}))
      ->capture_default_str();
  app.add_flag(
      "--double-quant,!--no-double-quant",
      double_quant,
      "Of nf4: its scales in 8 bits too, as QLoRA has them (the default)");
}

LoadOptions ModelOptions::load_options() const {
  LoadOptions options;
  options.dtype = parse_dtype(dtype);
  options.quantize = quantize;
  options.quantize_group = quantize_group_size;
  options.double_quant = double_quant;
  return options;
}

void TargetQuantization::add_to(
    CLI::App& app, const std::string& help, const std::string& group_flags) {
  app.add_option("--quantize", format, help)->type_name("4|8");
  app.add_option(group_flags, group_size, "Weights that share a scale")
      ->check(CLI::IsMember({32, 64, 128}))
      ->capture_default_str();
}

int TargetQuantization::bits() const {
  if (format.empty()) return 0;
  if (format == "4") return 4;
  if (format == "8") return 8;
  if (format == "nf4") {
    throw Error(
        ErrorCode::unsupported,
        "[--quantize] nf4 cannot be written: model folders hold MLX's affine 4 or 8 bits",
        "write the model dense and give --quantize nf4 where it is loaded (train, generate, chat, "
        "…), or write --quantize 4");
  }
  throw Error(
      ErrorCode::invalid_input, fmt::format("[--quantize] must be 4 or 8 but is {}", format));
}

Session Session::load(Console& console, const ModelOptions& options) {
  LoadOptions load = options.load_options();
  load.progress = [&](double fraction) {
    console.progress(fmt::format("loading {} {:.0f} %", options.model, 100 * fraction));
  };
  auto model = Model::load(options.model, load);
  auto tokenizer = text::Tokenizer::from_path(options.model);
  auto chat_template = text::ChatTemplate::from_path(options.model);
  console.clear_progress();
  Session session{std::move(model), std::move(tokenizer), std::move(chat_template), {}, {}};
  if (!options.adapter_path.empty()) {
    Adapter adapter = load_adapter(options.adapter_path, session.model->config());
    session.adapter = std::move(adapter.weights);
    session.adapter_info = std::move(adapter.info);
  }
  return session;
}

std::vector<int32_t> Session::encode(const std::string& prompt) const {
  return tokenizer.encode(prompt, /*add_special_tokens=*/true);
}

std::vector<int32_t> Session::encode_chat(const nlohmann::ordered_json& messages) const {
  if (!chat_template) {
    throw Error(
        ErrorCode::invalid_input,
        "[chat] the model must have a chat template but has none",
        "give the prompt without --chat, in the form that the model was trained on");
  }
  text::ChatOptions options;
  options.add_generation_prompt = true;
  options.bos_token = tokenizer.bos_token();
  options.eos_token = tokenizer.eos_token();
  // The template spells out its special tokens; the post-processor would add BOS a second time.
  return tokenizer.encode(chat_template->render(messages, options), /*add_special_tokens=*/false);
}

void SamplingFlags::add_to(CLI::App& app) {
  SamplingOptions& s = options.sampling;
  app.add_option("--max-tokens,-n", options.max_tokens, "Tokens of the answer at most")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option(
         "--temp,--temperature",
         s.temperature,
         "0: always the likeliest token; 1: as the model says")
      ->capture_default_str();
  app.add_option("--top-k", s.top_k, "Only the k likeliest tokens; 0: all")->capture_default_str();
  app.add_option(
         "--top-p", s.top_p, "Only the likeliest tokens that reach this probability together")
      ->capture_default_str();
  app.add_option(
         "--min-p", s.min_p, "Only tokens at least this probable, relative to the likeliest")
      ->capture_default_str();
  app.add_option(
         "--repetition-penalty", s.repetition_penalty, "Above 1 disfavours tokens already there")
      ->capture_default_str();
  app.add_option("--repetition-context", s.repetition_context, "Tokens it looks back; 0: all")
      ->capture_default_str();
  app.add_option("--presence-penalty", s.presence_penalty, "Subtracted from tokens of the answer")
      ->capture_default_str();
  app.add_option(
         "--frequency-penalty", s.frequency_penalty, "The same, for each time they occurred")
      ->capture_default_str();
  app.add_option("--logit-bias", logit_bias, "ID:BIAS, added to a token's logit; may be repeated");
  app.add_option("--seed", s.seed, "Of the random draw")->capture_default_str();
  app.add_option(
      "--stop", options.stop, "Text that ends the answer and is not part of it; may be repeated");
  app.add_flag("--ignore-eos", options.ignore_eos, "Go on after the end-of-sequence token");
}

GenerateOptions SamplingFlags::resolve() const {
  GenerateOptions resolved = options;
  for (const std::string& text : logit_bias) {
    const size_t colon = text.find(':');
    int32_t id = 0;
    float bias = 0;
    const char* end = text.data() + text.size();
    const char* middle = text.data() + std::min(colon, text.size());
    const bool id_ok = std::from_chars(text.data(), middle, id).ptr == middle && colon != 0;
    if (colon == std::string::npos || !id_ok || std::from_chars(middle + 1, end, bias).ptr != end) {
      throw Error(
          ErrorCode::invalid_input, fmt::format("[--logit-bias] must be ID:BIAS but is {}", text));
    }
    resolved.sampling.logit_bias[id] = bias;
  }
  const Sampler checked(resolved.sampling);  // a wrong option is refused before the model loads
  return resolved;
}

nlohmann::ordered_json to_json(const GenerationResult& result) {
  return {
      {"text", result.text},
      {"tokens", result.tokens},
      {"prompt_tokens", result.prompt_tokens},
      {"prompt_tps", result.prompt_tps},
      {"generation_tokens", result.tokens.size()},
      {"generation_tps", result.generation_tps},
      {"peak_memory_bytes", result.peak_memory_bytes},
      {"finish_reason", finish_reason_name(result.finish_reason)}};
}

}  // namespace metal_lora::cli
