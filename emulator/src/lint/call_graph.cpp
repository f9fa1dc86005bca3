// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <cstdlib>
#include <map>
#include <set>

#include "src/lint/rules.h"

namespace metal_emulator::linting {
namespace {

struct Function {
  std::string debug;  ///< number of its !DISubprogram
  std::set<std::string> calls;
  bool indirect = false;  ///< calls through a pointer
};

// The symbol after '@': name or "quoted name".
std::string symbol_at(std::string_view line, size_t at) {
  at++;
  if (at < line.size() && line[at] == '"') {
    const size_t end = line.find('"', at + 1);
    return std::string(line.substr(at + 1, end - at - 1));
  }
  size_t end = at;
  while (end < line.size() && (std::isalnum(static_cast<unsigned char>(line[end])) ||
                               line[end] == '_' || line[end] == '.' || line[end] == '$')) {
    end++;
  }
  return std::string(line.substr(at, end - at));
}

// The value of `key: ` in a metadata line, up to a comma or the closing parenthesis.
std::string field(std::string_view line, std::string_view key) {
  const size_t at = line.find(std::string(key) + ": ");
  if (at == std::string_view::npos) {
    return "";
  }
  const size_t begin = at + key.size() + 2;
  return std::string(line.substr(begin, line.find_first_of(",)", begin) - begin));
}

std::string unquote(const std::string& text) {
  return text.size() >= 2 && text[0] == '"' ? text.substr(1, text.size() - 2) : text;
}

class Assembly {
 public:
  explicit Assembly(const std::string& text) {
    std::string current;
    for (size_t begin = 0; begin < text.size();) {
      size_t end = text.find('\n', begin);
      end = end == std::string::npos ? text.size() : end;
      line(std::string_view(text).substr(begin, end - begin), current);
      begin = end + 1;
    }
  }

  void report(std::vector<Message>& messages) {
    for (const auto& [name, function] : functions_) {
      std::set<std::string> seen;
      if (reaches(name, name, seen)) {
        messages.push_back(recursion(function, name));
      }
      if (function.indirect) {
        Message m = place(function);
        m.text = "call through a function pointer in " + name_of(function, name) +
                 ": Metal kernels have none";
        messages.push_back(std::move(m));
      }
    }
  }

 private:
  void line(std::string_view text, std::string& current) {
    if (text.starts_with("define ")) {
      const size_t at = text.find('@');
      current = symbol_at(text, at);
      Function& function = functions_[current];
      const size_t debug = text.find("!dbg !");
      if (debug != std::string_view::npos) {
        function.debug = std::string(text.substr(debug + 5, text.find(' ', debug + 5) - debug - 5));
      }
    } else if (text.starts_with("}")) {
      current.clear();
    } else if (text.starts_with("!")) {
      const size_t space = text.find(' ');
      metadata_[std::string(text.substr(0, space))] = std::string(text);
    } else if (!current.empty()) {
      const size_t call = text.find("call ");
      const size_t at = call == std::string_view::npos ? call : text.find('@', call);
      const size_t arguments = call == std::string_view::npos ? call : text.find('(', call);
      const size_t local = call == std::string_view::npos ? call : text.find('%', call);
      if (local != std::string_view::npos && local < arguments &&
          !text.substr(local).starts_with("%\"struct") &&
          text.substr(call, arguments - call).find('@') == std::string_view::npos) {
        // The callee stands right before its arguments: a register is a pointer.
        size_t begin = arguments;
        while (begin > call && text[begin - 1] != ' ') {
          begin--;
        }
        functions_[current].indirect = functions_[current].indirect || text[begin] == '%';
      } else if (at != std::string_view::npos) {
        functions_[current].calls.insert(symbol_at(text, at));
      }
    }
  }

  bool reaches(const std::string& from, const std::string& target, std::set<std::string>& seen) {
    const auto found = functions_.find(from);
    if (found == functions_.end() || !seen.insert(from).second) {
      return false;
    }
    for (const std::string& callee : found->second.calls) {
      if (callee == target || reaches(callee, target, seen)) {
        return true;
      }
    }
    return false;
  }

  std::string name_of(const Function& function, const std::string& symbol) {
    const std::string name = unquote(field(metadata_[function.debug], "name"));
    return name.empty() ? symbol : name;
  }

  Message place(const Function& function) {
    const std::string& program = metadata_[function.debug];
    Message m;
    m.line = std::atoi(field(program, "line").c_str());
    m.file = unquote(field(metadata_[field(program, "file")], "filename"));
    return m;
  }

  Message recursion(const Function& function, const std::string& symbol) {
    Message m = place(function);
    m.text = "recursion: " + name_of(function, symbol) + " calls itself" +
             (function.calls.count(symbol) ? "" : " through other functions");
    return m;
  }

  std::map<std::string, Function> functions_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace

void check_calls(const std::string& assembly, std::vector<Message>& messages) {
  Assembly(assembly).report(messages);
}

}  // namespace metal_emulator::linting
