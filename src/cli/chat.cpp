// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/interrupt.h"
#include "src/cli/session.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kChatFooter = R"(In the chat:
  /reset         forget the conversation
  /system TEXT   start over with this system message
  /help          these lines
  /exit          leave (or Ctrl-D)
Ctrl-C stops an answer, not the program.

Examples:
  metal-lora chat -m MODEL
  metal-lora chat -m MODEL -a adapters --system "Answer with one SQL query." --temp 0
  printf 'Hello\nAnd who are you?\n' | metal-lora chat -m MODEL --json)";

struct ChatFlags {
  ModelOptions model;
  SamplingFlags sampling;
  std::string system;
};

/// Lines of stdin. std::getline would swallow Ctrl-C at the prompt: it goes on reading after EINTR.
class LineReader {
 public:
  enum class Outcome { line, interrupted, end };

  Outcome read(std::string& line) {
    for (;;) {
      if (const size_t end = buffer_.find('\n'); end != std::string::npos) {
        line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        if (line.ends_with('\r')) line.pop_back();
        return Outcome::line;
      }
      char chunk[4096];
      const ssize_t count = ::read(STDIN_FILENO, chunk, sizeof(chunk));
      if (count < 0 && errno == EINTR) return Outcome::interrupted;
      if (count <= 0) {
        line = std::exchange(buffer_, {});
        return line.empty() ? Outcome::end : Outcome::line;
      }
      buffer_.append(chunk, static_cast<size_t>(count));
    }
  }

 private:
  std::string buffer_;
};

class Chat {
 public:
  Chat(Console& console, const ChatFlags& options)
      : console_(console),
        options_(options.sampling.resolve()),
        session_(Session::load(console, options.model)),
        generator_(session_.model, session_.tokenizer, session_.adapter) {
    reset(options.system);
  }

  void run() {
    const bool terminal = isatty(STDIN_FILENO) == 1;
    if (terminal) console_.note("/help lists the commands, /exit or Ctrl-D ends");
    bool interrupted_before = false;
    for (;;) {
      if (terminal) console_.print(console_.bold("> "));
      std::string line;
      const auto outcome = reader_.read(line);
      if (outcome == LineReader::Outcome::end) {
        if (terminal) console_.print("\n");
        return;
      }
      if (outcome == LineReader::Outcome::interrupted) {
        if (interrupted_before) throw Error(ErrorCode::interrupted, "[chat] interrupted");
        interrupt_.clear();
        interrupted_before = true;
        console_.note("\nCtrl-C again, /exit or Ctrl-D ends");
        continue;
      }
      interrupted_before = false;
      if (line.empty()) continue;
      if (line.starts_with("/")) {
        if (!command(line)) return;
      } else {
        answer(line);
      }
    }
  }

 private:
  void reset(const std::string& system) {
    system_ = system;
    messages_ = nlohmann::ordered_json::array();
    if (!system.empty()) messages_.push_back({{"role", "system"}, {"content", system}});
  }

  /// False ends the program.
  bool command(const std::string& line) {
    const std::string name = line.substr(0, line.find(' '));
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/reset") {
      reset(system_);
      console_.note("the conversation starts over");
    } else if (name == "/system") {
      reset(line.size() > name.size() ? line.substr(name.size() + 1) : "");
      console_.note(system_.empty() ? "no system message" : "system: " + system_);
    } else if (name == "/help") {
      console_.note(std::string(kChatFooter).substr(0, std::string(kChatFooter).find("\n\n")));
    } else {
      console_.note(name + " is not a command; /help lists them");
    }
    return true;
  }

  /// Ids of the conversation; the oldest turns go when they no longer fit.
  std::vector<int32_t> encode() {
    const auto context = static_cast<size_t>(session_.model->config().max_position_embeddings);
    const size_t first = system_.empty() ? 0 : 1;
    for (;;) {
      auto tokens = session_.encode_chat(messages_);
      if (tokens.size() + 1 < context || messages_.size() < first + 3) return tokens;
      const auto begin = messages_.begin() + static_cast<std::ptrdiff_t>(first);
      messages_.erase(begin, begin + 2);
      console_.note(
          "the conversation is longer than the model's context: the oldest turn is forgotten");
    }
  }

  void answer(const std::string& line) {
    messages_.push_back({{"role", "user"}, {"content", line}});
    interrupt_.clear();
    const bool stream = !console_.json || console_.stderr_is_terminal();
    const GenerationResult result = generator_.generate(
        encode(),
        options_,
        [&](std::string_view text) {
          if (stream) console_.print(text);
          return true;
        },
        interrupt_.flag());
    if (stream) console_.print("\n");
    interrupt_.clear();
    messages_.push_back({{"role", "assistant"}, {"content", result.text}});
    auto row = to_json(result);
    row["reused_tokens"] = result.reused_tokens;
    console_.emit(row);
    if (console_.stderr_is_terminal()) {
      console_.note(fmt::format(
          "[{} new prompt tokens, {} answered, {:.1f} tokens/s]",
          result.prompt_tokens - result.reused_tokens,
          result.tokens.size(),
          result.generation_tps));
    }
  }

  Console& console_;
  GenerateOptions options_;
  Session session_;
  Generator generator_;
  Interruptible interrupt_;
  LineReader reader_;
  std::string system_;
  nlohmann::ordered_json messages_;
};

}  // namespace

Command add_chat(CLI::App& parent) {
  auto options = std::make_shared<ChatFlags>();
  CLI::App* app = parent.add_subcommand("chat", "Talk to a model in the terminal");
  options->model.add_to(*app, "bfloat16");
  app->add_option("--system", options->system, "The system message");
  options->sampling.options.max_tokens = 512;
  options->sampling.add_to(*app);
  app->footer(kChatFooter);
  return {app, [options](Console& console) { Chat(console, *options).run(); }};
}

}  // namespace metal_lora::cli
