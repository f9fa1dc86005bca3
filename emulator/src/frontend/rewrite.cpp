// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/rewrite.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <set>

#include "metal_emulator/emulator.h"

namespace metal_emulator::frontend {
namespace {

using Kind = Declaration::Kind;

// clang has no conversion between half and bfloat, Metal has. value() is what an expression stands
// for: itself, or the vector of a swizzle.
constexpr std::string_view kPrelude = R"(#include <metal_stdlib>
namespace metal_emulator_rewrite {
template <class T, class U>
inline constexpr bool is_narrow_pair =
    (__is_same(T, half) && __is_same(U, bfloat)) || (__is_same(T, bfloat) && __is_same(U, half));
template <class T, class U>
__attribute__((always_inline, nodebug)) constexpr T cast(U&& value) {
  if constexpr (is_narrow_pair<T, __remove_cvref(U)>) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(static_cast<U&&>(value));
  }
}
// T(x) and (T)x. By value: the load of x is on the kernel's line, and x may be a bit-field.
template <class T, class... A>
__attribute__((always_inline, nodebug)) constexpr T make(A... values) {
  if constexpr (sizeof...(A) == 1 && (is_narrow_pair<T, A> || ...)) {
    return static_cast<T>(static_cast<float>((values, ...)));
  } else {
    return T(values...);
  }
}
template <class T>
__attribute__((always_inline, nodebug)) constexpr auto value(T&& expression) {
  using Stands = typename metal::_emulator::value<__remove_cvref(T)>::type;
  if constexpr (__is_same(Stands, __remove_cvref(T))) {
    return static_cast<T&&>(expression);
  } else {
    return static_cast<Stands>(expression);
  }
}
}  // namespace metal_emulator_rewrite
)";

struct Constant {
  std::string scope, name, index;
};
/// A program-scope constant whose initialiser depends on function constants.
struct Derived {
  std::string scope, name;
  size_t declaration_end, init_begin, init_end;
};

std::string unquote(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != '"' && text[i] != ' ') {
      out += text[i];
    }
  }
  return out;
}

class Rewriter {
 public:
  Rewriter(TokenStream stream, const std::vector<std::string>& wanted)
      : stream_(std::move(stream)), tokens_(stream_.tokens), wanted_(wanted) {}

  RewriteResult run() {
    const std::vector<Declaration> declarations = parse_declarations(stream_);
    collect(declarations);
    rewrite_literals(stream_);
    unroll_hints();
    defined_queries();
    rewrite_threadgroup_variables(stream_, declarations);
    rewrite_loops(stream_);
    rewrite_tokens(stream_, declarations);
    erase_duplicates(stream_, declarations);
    for (const Derived& d : derived_) {
      // Initialised by the update alone: a constructor of the library would run before the hooks.
      tokens_[d.declaration_end - 1].after +=
          " METAL_EMULATOR_RAW static void " + d.name + "__update() { " + d.name + " =" +
          edited_text(stream_, d.init_begin, d.init_end) + "; }";
      for (size_t i = d.init_begin - 1; i < d.init_end; i++) {
        tokens_[i].erased = true;
      }
    }
    check_wanted();
    RewriteResult result;
    result.text = std::string(kPrelude) + print(stream_) + table();
    for (const KernelEntry& entry : entries_) {
      result.kernels.push_back(entry.host_name);
    }
    return result;
  }

 private:
  [[noreturn]] void fail(size_t index, const std::string& message) const {
    throw CompileError(stream_.where(index) + ": error: " + message);
  }

  bool is_wanted(const std::string& host_name) const {
    return wanted_.empty() || std::find(wanted_.begin(), wanted_.end(), host_name) != wanted_.end();
  }

  void check_wanted() const {
    for (const std::string& name : wanted_) {
      const bool found = std::any_of(entries_.begin(), entries_.end(), [&](const KernelEntry& e) {
        return e.host_name == name;
      });
      if (!found) {
        fail(0, "no kernel is named " + name);
      }
    }
    std::set<std::string> names;
    for (const KernelEntry& e : entries_) {
      if (!names.insert(e.host_name).second) {
        fail(functions_[e.function].declaration_begin, "two kernels are named " + e.host_name);
      }
    }
  }

  void collect(const std::vector<Declaration>& declarations) {
    for (const Declaration& d : declarations) {
      refuse_graphics(d);
      if (d.kind == Kind::function && is_kernel(d, d.name)) {
        kernel(d);
      } else if (d.kind == Kind::instantiation) {
        instantiation(d);
      } else if (d.kind == Kind::variable) {
        variable(d);
      }
      collect(d.members);
    }
  }

  void refuse_graphics(const Declaration& d) const {
    static constexpr std::array<std::string_view, 7> kRefused = {
        "vertex", "fragment", "visible", "stitchable", "object", "mesh", "intersection"};
    for (const Attribute& a : d.attributes) {
      if (std::find(kRefused.begin(), kRefused.end(), a.name) != kRefused.end()) {
        fail(a.token, "[[" + a.name + "]] functions are not supported: compute kernels only");
      }
    }
    if (d.kind == Kind::function &&
        (tokens_[d.head].is("vertex") || tokens_[d.head].is("fragment"))) {
      fail(d.head, tokens_[d.head].text + " functions are not supported: compute kernels only");
    }
  }

  // Also erases the keyword.
  bool is_kernel(const Declaration& d, size_t end) {
    bool found = d.has_attribute("kernel");
    for (size_t i = d.head; i < std::min(end, d.end); i++) {
      if (tokens_[i].is("kernel") && tokens_[i].is_identifier() && !is_attribute_token(i)) {
        tokens_[i].erased = true;
        found = true;
      }
    }
    return found;
  }

  bool is_attribute_token(size_t i) const {
    return i > 0 && (tokens_[i - 1].is("[") || tokens_[i - 1].is(","));
  }

  std::string host_name_of(const Declaration& d) const {
    for (const Attribute& a : d.attributes) {
      if (a.name == "host_name") {
        return unquote(a.argument);
      }
    }
    return "";
  }

  void kernel(const Declaration& d) {
    if (d.in_class) {
      fail(d.begin, "a kernel cannot be a member of a class");
    }
    if (!d.is_template && d.head > d.begin) {
      return;  // template <>: a specialisation is instantiated by its template's name
    }
    if (!d.is_template) {
      // Kernels that nobody wants then cost no code.
      tokens_[d.head].before += "static ";
    }
    if (d.body_open == kNone) {
      return;
    }
    KernelFunction function;
    function.scope = d.scope;
    function.name = tokens_[d.name].text;
    function.is_template = d.is_template;
    function.declaration_begin = d.begin;
    function.arguments = parse_kernel_arguments(stream_, d);
    function.host_name = host_name_of(d);
    if (function.host_name.empty()) {
      function.host_name = d.scope + function.name;
    }
    const bool result_is_void = [&] {
      for (size_t i = d.head; i < d.name; i++) {
        if (tokens_[i].is("void")) {
          return true;
        }
      }
      return false;
    }();
    if (!result_is_void) {
      fail(d.begin, "kernel " + function.name + " must return void");
    }
    functions_.push_back(function);
    if (!d.is_template && is_wanted(function.host_name)) {
      entries_.push_back(
          {function.host_name, functions_.size() - 1, "&::" + function.scope + function.name});
    }
  }

  // template [[host_name("x")]] [[kernel]] decltype(f<int>) f<int>;   or   … void f<int>(…);
  void instantiation(const Declaration& d) {
    const std::string host_name = host_name_of(d);
    const bool kernel = is_kernel(d, d.end);
    if (host_name.empty()) {
      if (kernel) {
        fail(d.begin, "an instantiated kernel needs [[host_name(\"…\")]]");
      }
      return;
    }
    size_t last = d.end - 2;  // before the ;
    if (tokens_[last].is(")")) {
      last = open_of(last, d.begin) - 1;
    }
    if (!tokens_[last].is(">")) {
      fail(d.begin, "explicit instantiation that is not understood");
    }
    size_t name = open_of(last, d.begin) - 1;
    const std::string simple = tokens_[name].text;
    while (name > d.begin + 1 && tokens_[name - 1].is("::")) {
      name -= tokens_[name - 2].is_identifier() ? 2 : 1;
    }
    const size_t function = find_template(d, simple);
    const size_t number = entries_.size();
    erase(d);
    if (!is_wanted(host_name)) {
      return;
    }
    // The pointer is formed here, where the names mean what they say.
    const std::string pointer = "metal_emulator_kernel_" + std::to_string(number);
    pointers_.push_back({d.begin, name, last + 1, pointer});
    entries_.push_back({host_name, function, "::" + d.scope + pointer});
  }

  size_t open_of(size_t close, size_t begin) const {
    const std::string_view closing = tokens_[close].text;
    const std::string_view opening = closing == ")" ? "(" : "<";
    int depth = 0;
    for (size_t i = close; i > begin; i--) {
      if (closing == ">" && tokens_[i].is(")")) {
        i = open_of(i, begin);
        continue;
      }
      depth += tokens_[i].is(closing) - tokens_[i].is(opening);
      if (depth == 0) {
        return i;
      }
    }
    fail(close, "explicit instantiation that is not understood");
  }

  size_t find_template(const Declaration& d, const std::string& simple) const {
    size_t found = kNone;
    for (size_t i = 0; i < functions_.size(); i++) {
      if (functions_[i].name != simple || !functions_[i].is_template) {
        continue;
      }
      if (found != kNone && functions_[found].scope == functions_[i].scope) {
        fail(d.begin, "kernel template " + simple + " is overloaded");
      }
      if (found == kNone || functions_[i].scope == d.scope) {
        found = i;
      }
    }
    if (found == kNone) {
      fail(d.begin, "no kernel template is named " + simple);
    }
    return found;
  }

  void erase(const Declaration& d) {
    for (size_t i = d.begin; i < d.end; i++) {
      tokens_[i].erased = true;
    }
  }

  void variable(const Declaration& d) {
    bool constant = false, fixed = false;
    size_t equals = kNone;
    for (size_t i = d.head; i < d.end; i++) {
      if (tokens_[i].is("=") && equals == kNone) {
        equals = i;
      }
      if (equals == kNone) {
        constant = constant || tokens_[i].is("constant");
        fixed = fixed || tokens_[i].is("constexpr");
      }
    }
    if (d.has_attribute("function_constant")) {
      function_constant(d, constant, equals);
    } else if (constant && !fixed && d.in_class && equals != kNone) {
      static_member(d, equals);
    } else if (constant && !fixed && !d.in_class) {
      derived(d, equals);
    }
  }

  // `static const constant U max = limits<U>::max();`: C++17 wants it inline.
  void static_member(const Declaration& d, size_t equals) {
    for (size_t i = d.head; i < equals; i++) {
      if (tokens_[i].is("inline")) {
        return;
      }
    }
    tokens_[d.head].before += "inline ";
  }

  void function_constant(const Declaration& d, bool constant, size_t equals) {
    const std::string name = tokens_[d.name].text;
    if (!constant || equals != kNone || d.in_class) {
      fail(
          d.begin,
          "function constant " + name + " must be an uninitialised constant at program scope");
    }
    for (const Attribute& a : d.attributes) {
      if (a.name == "function_constant") {
        constants_.push_back({d.scope, name, a.argument});
      }
    }
    variable_specifiers(d);
    tokens_[d.end - 1].after += " static bool " + name + "__defined;";
    dependent_.insert(name);
  }

  // Mutable, so that every dispatch can set it.
  void variable_specifiers(const Declaration& d) {
    for (size_t i = d.head; i < d.name; i++) {
      if (tokens_[i].is("constant") || tokens_[i].is("const") || tokens_[i].is("static") ||
          tokens_[i].is("constexpr")) {
        tokens_[i].erased = true;
      }
    }
    tokens_[d.head].before += "static ";
  }

  void derived(const Declaration& d, size_t equals) {
    if (equals == kNone) {
      return;
    }
    bool depends = false;
    for (size_t i = equals; i < d.end; i++) {
      depends = depends || (tokens_[i].is_identifier() && dependent_.count(tokens_[i].text));
    }
    if (!depends) {
      return;
    }
    const std::string name = tokens_[d.name].text;
    if (d.name + 1 != equals || tokens_[equals + 1].is("{") ||
        split_commas(stream_, d.name, d.end - 1).size() != 1) {
      fail(d.begin, name + ": only scalars and vectors can be computed from function constants");
    }
    variable_specifiers(d);
    derived_.push_back({d.scope, name, d.end, equals + 1, d.end - 1});
    dependent_.insert(name);
  }

  // `#pragma unroll (MIN(a, b))`: the macro is not known any more, and the hint changes no result.
  void unroll_hints() {
    for (Token& token : tokens_) {
      const size_t open = token.text.find('(');
      if (token.kind == TokenKind::pragma && token.text.starts_with("#pragma unroll") &&
          open != std::string::npos &&
          std::any_of(token.text.begin() + open, token.text.end(), [](unsigned char c) {
            return std::isalpha(c);
          })) {
        token.erased = true;
      }
    }
  }

  // is_function_constant_defined(a::b)  →  (a::b__defined)
  void defined_queries() {
    for (size_t i = 0; i + 2 < tokens_.size(); i++) {
      if (!tokens_[i].is("is_function_constant_defined")) {
        continue;
      }
      const size_t close = match_bracket(stream_, i + 1);
      if (close < i + 3 || !dependent_.count(tokens_[close - 1].text)) {
        fail(i, "is_function_constant_defined() takes a function constant");
      }
      tokens_[i].erased = true;
      tokens_[close - 1].text += "__defined";
      if (i > 1 && tokens_[i - 1].is("::")) {
        tokens_[i - 1].erased = tokens_[i - 2].erased = true;  // metal::
      }
    }
    for (const PointerText& p : pointers_) {
      tokens_[p.at].before += "static constexpr auto " + p.name + " = &" + join_raw(p) + ";";
    }
  }

  struct PointerText {
    size_t at, begin, end;
    std::string name;
  };

  std::string join_raw(const PointerText& p) const {
    std::string out;
    for (size_t i = p.begin; i < p.end; i++) {
      if (!is_address_space(tokens_[i].text)) {
        out += (out.empty() ? "" : " ") + tokens_[i].text;
      }
    }
    return out;
  }

  std::string constant_name(const std::string& name, size_t declaration) const {
    for (const Constant& c : constants_) {
      if (c.name == name || c.scope + c.name == name) {
        return "::" + c.scope + c.name;
      }
    }
    for (const Derived& d : derived_) {
      if (d.name == name || d.scope + d.name == name) {
        return "::" + d.scope + d.name;
      }
    }
    fail(declaration, "[[function_constant(" + name + ")]] names no function constant");
  }

  std::string arguments_table(size_t number) const {
    const KernelFunction& f = functions_[number];
    if (f.arguments.empty()) {
      return "static const Arg* const args_" + std::to_string(number) + " = nullptr;\n";
    }
    std::string out = "static const Arg args_" + std::to_string(number) + "[] = {";
    for (const KernelArgument& a : f.arguments) {
      const std::string enable =
          a.enable.empty() ? "nullptr" : "&" + constant_name(a.enable, f.declaration_begin);
      out += "{ArgKind::" + a.kind + ", int32_t(" + a.index + "), " +
             (a.is_constant ? "true" : "false") + ", " + (a.read_only ? "true" : "false") + ", " +
             enable + ", \"" + a.name + "\"}, ";
    }
    return out + "};\n";
  }

  // The library's table, last in the unit.
  std::string table() const {
    std::string out =
        "\n#include <metal_emulator/library.h>\n#line 1 \"metal_emulator table\"\n"
        "namespace metal_emulator { namespace abi { namespace {\n";
    std::set<size_t> used;
    for (const KernelEntry& e : entries_) {
      if (used.insert(e.function).second) {
        out += arguments_table(e.function);
      }
    }
    std::string kernels, constants, updates;
    for (size_t i = 0; i < entries_.size(); i++) {
      const KernelEntry& e = entries_[i];
      const std::string id = std::to_string(i), args = "args_" + std::to_string(e.function);
      out += "METAL_EMULATOR_RAW void thunk_" + id + "(const Context& context) { glue::call(" +
             e.pointer + ", " + args + ", context); }\n";
      kernels += "{\"" + e.host_name + "\", thunk_" + id + ", " + args + ", " +
                 std::to_string(functions_[e.function].arguments.size()) + "}, ";
    }
    for (const Constant& c : constants_) {
      const std::string name = "::" + c.scope + c.name;
      constants += "{int32_t(" + c.index + "), \"" + c.name + "\", &" + name + ", sizeof(" + name +
                   "), &" + name + "__defined}, ";
    }
    for (const Derived& d : derived_) {
      updates += "::" + d.scope + d.name + "__update(); ";
    }
    // A sentinel keeps the arrays from being empty.
    out +=
        "const Kernel kernels[] = {" + kernels + "{nullptr, nullptr, nullptr, 0}};\n" +
        "const FunctionConstant constants[] = {" + constants +
        "{0, nullptr, nullptr, 0, nullptr}};\n" + "METAL_EMULATOR_RAW void constants_changed() { " +
        updates + "}\n" + "const Library library = {kVersion, kernels, " +
        std::to_string(entries_.size()) + ", constants, " + std::to_string(constants_.size()) +
        ", &set_hooks, &constants_changed, kShimDirectory};\n}}}\n" +
        "extern \"C\" __attribute__((visibility(\"default\"))) const metal_emulator::abi::Library* "
        "metal_emulator_library() { return &metal_emulator::abi::library; }\n";
    return out;
  }

  TokenStream stream_;
  std::vector<Token>& tokens_;
  const std::vector<std::string>& wanted_;
  std::vector<KernelFunction> functions_;
  std::vector<KernelEntry> entries_;
  std::vector<Constant> constants_;
  std::vector<Derived> derived_;
  std::vector<PointerText> pointers_;
  std::set<std::string> dependent_;  ///< names of function constants and what derives from them
};

}  // namespace

std::string edited_text(const TokenStream& stream, size_t begin, size_t end) {
  std::string out;
  for (size_t i = begin; i < end; i++) {
    const Token& token = stream.tokens[i];
    out += (token.space_before ? " " : "") + token.before + (token.erased ? "" : token.text) +
           token.after;
  }
  return out;
}

RewriteResult rewrite(TokenStream stream, const std::vector<std::string>& wanted) {
  return Rewriter(std::move(stream), wanted).run();
}

}  // namespace metal_emulator::frontend
