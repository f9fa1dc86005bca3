// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/dataset.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "metal_lora/error.h"
#include "src/io/jsonl.h"
#include "src/io/sha256.h"

namespace metal_lora::train {
namespace {

using OrderedJson = nlohmann::ordered_json;

struct Encoded {
  std::vector<int32_t> tokens;
  int32_t prompt_tokens = 0;
  int32_t full_length = 0;  ///< before truncation
};

bool has(const io::Json& row, const char* key) {
  return row.is_object() && row.contains(key);
}

DatasetKind kind_of(const io::Json& first, const io::JsonlFile& file) {
  if (has(first, "prompt") && has(first, "completion")) return DatasetKind::completions;
  if (has(first, "messages")) return DatasetKind::chat;
  if (has(first, "text")) return DatasetKind::text;
  io::Failure failure = file.failure(
      0,
      "row",
      "an object with prompt and completion, with messages, or with text",
      io::describe_json(&first));
  failure.hint = "docs/training.md shows the three kinds of rows";
  io::throw_failure(failure);
}

class RowEncoder {
 public:
  RowEncoder(
      const io::JsonlFile& file,
      DatasetKind kind,
      const text::Tokenizer& tokenizer,
      const std::optional<text::ChatTemplate>& chat_template,
      const DatasetOptions& options)
      : file_(file),
        kind_(kind),
        tokenizer_(tokenizer),
        template_(chat_template),
        options_(options) {}

  Encoded encode(uint64_t index) const {
    const io::Json row = io::unwrap(file_.parse(index));
    const auto object = io::unwrap(io::JsonObject::of(row, place(index)));
    Encoded out;
    switch (kind_) {
      case DatasetKind::text:
        out = text_row(object);
        break;
      case DatasetKind::chat:
        out = chat_row(index, object);
        break;
      case DatasetKind::completions:
        out = completion_row(index, object);
        break;
    }
    finish(index, out);
    return out;
  }

 private:
  std::string place(uint64_t index) const {
    return fmt::format("{}:{}", file_.path(), file_.row(index).line_number);
  }

  Encoded text_row(const io::JsonObject& row) const {
    Encoded out;
    out.tokens = tokenizer_.encode(io::unwrap(row.get_string("text")), true);
    add_eos(out);
    return out;
  }

  Encoded chat_row(uint64_t index, const io::JsonObject& row) const {
    if (!row.has("messages") || !row.json().at("messages").is_array() ||
        row.json().at("messages").empty()) {
      io::throw_failure(row.failure("messages", "a list of messages, not empty", "something else"));
    }
    for (const auto& message : row.json().at("messages")) {
      if (!has(message, "role") || !message.at("role").is_string()) {
        io::throw_failure(
            row.failure("messages", "objects with a role", io::describe_json(&message)));
      }
    }
    // Templates print tool schemas in the order of their keys, which plain Json does not keep.
    const OrderedJson ordered = OrderedJson::parse(file_.row(index).text);
    return render(index, ordered.at("messages"), tools_of(ordered));
  }

  Encoded completion_row(uint64_t index, const io::JsonObject& row) const {
    const std::string prompt = io::unwrap(row.get_string("prompt"));
    const std::string completion = io::unwrap(row.get_string("completion"));
    if (template_) {
      OrderedJson tools;
      if (row.has("tools")) tools = tools_of(OrderedJson::parse(file_.row(index).text));
      return render(
          index,
          OrderedJson::array(
              {{{"role", "user"}, {"content", prompt}},
               {{"role", "assistant"}, {"content", completion}}}),
          tools);
    }
    // A base model without a template: the two texts in a row, cut exactly between them.
    Encoded out;
    out.tokens = tokenizer_.encode(prompt, true);
    out.prompt_tokens = options_.mask_prompt ? static_cast<int32_t>(out.tokens.size()) : 0;
    const auto rest = tokenizer_.encode(completion, false);
    out.tokens.insert(out.tokens.end(), rest.begin(), rest.end());
    add_eos(out);
    return out;
  }

  static OrderedJson tools_of(const OrderedJson& row) {
    return row.contains("tools") ? row.at("tools") : OrderedJson();
  }

  Encoded render(uint64_t index, const OrderedJson& messages, const OrderedJson& tools) const {
    if (!template_) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}] has messages, but the model has no chat template", place(index)),
          "use rows of {\"text\"} or {\"prompt\", \"completion\"} with a base model");
    }
    text::ChatOptions chat;
    chat.tools = tools;
    chat.bos_token = tokenizer_.bos_token();
    chat.eos_token = tokenizer_.eos_token();
    Encoded out;
    try {
      out.tokens = tokenizer_.encode(template_->render(messages, chat), false);
      if (options_.mask_prompt) {
        OrderedJson prompt = messages;
        prompt.erase(prompt.size() - 1);
        chat.add_generation_prompt = messages.back().value("role", "") == "assistant";
        const auto head = tokenizer_.encode(template_->render(prompt, chat), false);
        out.prompt_tokens = static_cast<int32_t>(std::min(head.size(), out.tokens.size()));
      }
    } catch (const Error& error) {
      throw Error(error.code(), fmt::format("[{}] {}", place(index), error.what()));
    }
    cut_after_last_eos(out);
    add_eos(out);
    return out;
  }

  /// Drops white space that a template writes behind its last end of turn.
  void cut_after_last_eos(Encoded& out) const {
    const auto& ends = tokenizer_.eos_ids();
    const auto last = std::find_if(
        out.tokens.rbegin(), out.tokens.rend(), [&](int32_t id) { return ends.contains(id); });
    if (last == out.tokens.rend()) return;
    const std::vector<int32_t> tail(last.base(), out.tokens.end());
    const std::string text = tokenizer_.decode(tail, false);
    if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
      out.tokens.erase(last.base(), out.tokens.end());
    }
  }

  void add_eos(Encoded& out) const {
    const auto eos = tokenizer_.eos_id();
    if (!eos) return;
    if (!out.tokens.empty() &&
        (out.tokens.back() == *eos || tokenizer_.eos_ids().contains(out.tokens.back()))) {
      return;
    }
    out.tokens.push_back(*eos);
  }

  void finish(uint64_t index, Encoded& out) const {
    out.full_length = static_cast<int32_t>(out.tokens.size());
    if (out.full_length > options_.max_seq_length) {
      out.tokens.resize(static_cast<size_t>(options_.max_seq_length));
    }
    for (const int32_t id : out.tokens) {
      if (options_.vocab_size > 0 && (id < 0 || id >= options_.vocab_size)) {
        throw Error(
            ErrorCode::invalid_input,
            fmt::format(
                "[{}] token id {} must be below the model's vocabulary of {}",
                place(index),
                id,
                options_.vocab_size),
            "tokenizer and model do not belong together");
      }
    }
  }

  const io::JsonlFile& file_;
  DatasetKind kind_;
  const text::Tokenizer& tokenizer_;
  const std::optional<text::ChatTemplate>& template_;
  const DatasetOptions& options_;
};

/// Rows in blocks, taken by whoever is free; the first error (by row) is the one thrown.
void encode_all(
    const RowEncoder& encoder, std::vector<Encoded>& rows, const DatasetOptions& options) {
  constexpr uint64_t kBlock = 64;
  const uint64_t count = rows.size();
  std::atomic<uint64_t> next{0}, done{0};
  std::mutex mutex;
  std::exception_ptr error;
  uint64_t error_row = count;
  const auto work = [&](bool reports) {
    for (uint64_t begin; (begin = next.fetch_add(kBlock)) < count;) {
      uint64_t row = begin;
      try {
        for (; row < std::min(begin + kBlock, count); ++row) rows[row] = encoder.encode(row);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (row < error_row) {
          error_row = row;
          error = std::current_exception();
        }
        next = count;
      }
      const uint64_t finished = done.fetch_add(kBlock) + kBlock;
      if (reports && options.progress) {
        options.progress(std::min(1.0, static_cast<double>(finished) / static_cast<double>(count)));
      }
    }
  };
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t wanted = options.threads > 0 ? static_cast<uint64_t>(options.threads) : cores;
  std::vector<std::jthread> helpers;
  for (uint64_t i = 1; i < std::min(wanted, (count + kBlock - 1) / kBlock); ++i) {
    helpers.emplace_back(work, false);
  }
  work(true);
  helpers.clear();
  if (error) std::rethrow_exception(error);
}

void warn_about(
    const std::filesystem::path& path,
    const std::vector<Encoded>& rows,
    size_t dropped,
    const DatasetOptions& options) {
  if (!options.on_warning) return;
  size_t truncated = 0;
  int32_t longest = 0;
  for (const auto& row : rows) {
    if (row.full_length > options.max_seq_length) ++truncated;
    longest = std::max(longest, row.full_length);
  }
  if (truncated > 0) {
    options.on_warning(fmt::format(
        "{}: {} of {} rows are longer than max_seq_length {} (the longest has {} tokens) and were "
        "truncated",
        path.string(),
        truncated,
        rows.size(),
        options.max_seq_length,
        longest));
  }
  if (dropped > 0) {
    options.on_warning(fmt::format(
        "{}: {} of {} rows leave no token to learn and were dropped",
        path.string(),
        dropped,
        rows.size()));
  }
}

}  // namespace

Dataset Dataset::load(
    const std::filesystem::path& jsonl,
    const text::Tokenizer& tokenizer,
    const std::optional<text::ChatTemplate>& chat_template,
    const DatasetOptions& options) {
  const io::JsonlFile file = io::unwrap(io::JsonlFile::open(jsonl.string()));
  if (file.size() == 0) {
    throw Error(
        ErrorCode::invalid_input, fmt::format("[{}] must have rows but is empty", jsonl.string()));
  }
  Dataset out;
  out.kind_ = kind_of(io::unwrap(file.parse(0)), file);
  if (out.kind_ == DatasetKind::text && options.mask_prompt) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[mask_prompt] must be false for rows of text, as in {}", jsonl.string()),
        "use rows with prompt and completion, or with messages");
  }
  std::vector<Encoded> rows(file.size());
  encode_all(RowEncoder(file, out.kind_, tokenizer, chat_template, options), rows, options);

  size_t total = 0, dropped = 0;
  for (const auto& row : rows) total += row.tokens.size();
  out.tokens_.reserve(total);
  for (auto& row : rows) {
    const Sample sample{row.tokens, row.prompt_tokens};
    if (sample.trained_tokens() > 0) {
      out.append(row.tokens, row.prompt_tokens);
    } else {
      ++dropped;
    }
    row.tokens = {};
  }
  warn_about(jsonl, rows, dropped, options);
  if (out.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}] must have a row with a token to learn", jsonl.string()),
        "raise max_seq_length: every row was cut to its prompt");
  }
  return out;
}

Dataset Dataset::from_samples(
    const std::vector<std::vector<int32_t>>& tokens, std::vector<int32_t> prompt_tokens) {
  Dataset out;
  prompt_tokens.resize(tokens.size(), 0);
  for (size_t i = 0; i < tokens.size(); ++i) out.append(tokens[i], prompt_tokens[i]);
  return out;
}

void Dataset::append(std::span<const int32_t> tokens, int32_t prompt_tokens) {
  if (starts_.empty()) starts_.push_back(0);
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  starts_.push_back(tokens_.size());
  prompt_tokens_.push_back(prompt_tokens);
}

Sample Dataset::sample(size_t index) const {
  const auto all = std::span(tokens_);
  return {all.subspan(starts_[index], starts_[index + 1] - starts_[index]), prompt_tokens_[index]};
}

int32_t Dataset::longest() const {
  size_t longest = 0;
  for (size_t i = 0; i < size(); ++i) longest = std::max(longest, sample(i).tokens.size());
  return static_cast<int32_t>(longest);
}

uint64_t Dataset::nbytes() const {
  return tokens_.capacity() * sizeof(int32_t) + starts_.capacity() * sizeof(uint64_t) +
         prompt_tokens_.capacity() * sizeof(int32_t);
}

std::string Dataset::hash() const {
  io::Sha256 sha;
  sha.update(std::as_bytes(std::span(starts_)));
  sha.update(std::as_bytes(std::span(prompt_tokens_)));
  sha.update(std::as_bytes(std::span(tokens_)));
  return sha.finish_hex();
}

}  // namespace metal_lora::train
