// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "metal_lora/error.h"
#include "src/text/jinja_ast.h"
#include "src/text/jinja_lexer.h"

namespace metal_lora::text::jinja {

namespace {

constexpr size_t kMaxArguments = 256;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  std::shared_ptr<const Program> run() {
    auto program = std::make_shared<Program>();
    program->body = body({});
    return program;
  }

 private:
  // Recursion of the parser itself, which runs ahead of the tree's height.
  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kMaxHeight) {
        parser_.fail("nesting must be at most " + std::to_string(kMaxHeight) + " but is deeper");
      }
    }
    ~Nested() { --parser_.nesting_; }

   private:
    Parser& parser_;
  };

  [[noreturn]] void fail(const std::string& what) const { fail_at(peek().line, what); }

  [[noreturn]] static void fail_at(uint32_t line, const std::string& what) {
    throw Error(
        ErrorCode::invalid_input, "[chat template, line " + std::to_string(line) + "] " + what);
  }

  [[noreturn]] void refuse(const std::string& kind, const std::string& name) const {
    throw Error(
        ErrorCode::unsupported,
        "[chat template, line " + std::to_string(peek().line) + "] " + kind +
            " must be one this program knows but is \"" + name.substr(0, 100) + "\"");
  }

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }

  bool is_op(std::string_view op, size_t ahead = 0) const {
    return peek(ahead).kind == TokenKind::op && peek(ahead).text == op;
  }

  bool is_name(std::string_view name, size_t ahead = 0) const {
    return peek(ahead).kind == TokenKind::name && peek(ahead).text == name;
  }

  Token next() {
    Token token = peek();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }

  bool take_op(std::string_view op) {
    if (!is_op(op)) return false;
    next();
    return true;
  }

  bool take_name(std::string_view name) {
    if (!is_name(name)) return false;
    next();
    return true;
  }

  std::string describe() const {
    switch (peek().kind) {
      case TokenKind::end:
        return "the end";
      case TokenKind::block_end:
        return "%}";
      case TokenKind::output_end:
        return "}}";
      case TokenKind::text:
        return "text";
      default:
        return "\"" + peek().text.substr(0, 60) + "\"";
    }
  }

  void expect_op(std::string_view op) {
    if (!take_op(op))
      fail("\"" + std::string(op) + "\" must come here but " + describe() + " does");
  }

  std::string expect_name() {
    if (peek().kind != TokenKind::name) fail("a name must come here but " + describe() + " does");
    return next().text;
  }

  void expect_block_end() {
    if (peek().kind != TokenKind::block_end) fail("%} must come here but " + describe() + " does");
    next();
  }

  // Statements up to one of `ends`, whose name is left as the current token.
  Body body(std::initializer_list<std::string_view> ends) {
    const Nested nested(*this);
    Body out;
    while (true) {
      const Token token = peek();
      if (token.kind == TokenKind::end) {
        if (ends.size() > 0) fail(std::string(*(ends.end() - 1)) + " must come but the end does");
        return out;
      }
      next();
      if (token.kind == TokenKind::text) {
        auto stmt = make_stmt(StmtKind::text);
        stmt->text = token.text;
        out.push_back(std::move(stmt));
      } else if (token.kind == TokenKind::output_begin) {
        auto stmt = make_stmt(StmtKind::output);
        stmt->expr = tuple_or_expression();
        if (peek().kind != TokenKind::output_end)
          fail("}} must come here but " + describe() + " does");
        next();
        out.push_back(std::move(stmt));
      } else {
        if (std::find(ends.begin(), ends.end(), peek().text) != ends.end()) return out;
        out.push_back(statement());
      }
    }
  }

  std::unique_ptr<Stmt> make_stmt(StmtKind kind) const {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = peek().line;
    return stmt;
  }

  std::unique_ptr<Stmt> statement() {
    const std::string name = expect_name();
    if (name == "if") return branch();
    if (name == "for") return loop();
    if (name == "set") return set();
    if (name == "macro") return macro();
    if (name == "filter") return filter_block();
    if (name == "generation") {
      auto stmt = make_stmt(StmtKind::group);
      expect_block_end();
      stmt->body = body({"endgeneration"});
      next();
      expect_block_end();
      return stmt;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) fail(name + " must be inside a for but is not");
      auto stmt = make_stmt(name == "break" ? StmtKind::break_loop : StmtKind::continue_loop);
      expect_block_end();
      return stmt;
    }
    refuse("a statement", name);
  }

  std::unique_ptr<Stmt> branch() {
    auto stmt = make_stmt(StmtKind::branch);
    while (true) {
      ExprPtr condition = tuple_or_expression(false);
      expect_block_end();
      Body then = body({"elif", "else", "endif"});
      stmt->branches.emplace_back(std::move(condition), std::move(then));
      const std::string name = next().text;
      if (name == "elif") continue;
      if (name == "else") {
        expect_block_end();
        stmt->branches.emplace_back(nullptr, body({"endif"}));
        next();
      }
      expect_block_end();
      return stmt;
    }
  }

  // Names, or ns.x for set.
  void targets(Stmt& stmt, bool attributes) {
    const bool bracket = take_op("(");
    do {
      if (is_op(")") || is_name("in") || is_op("=")) break;
      auto target = make(ExprKind::name);
      target->name = expect_name();
      if (attributes && is_op(".")) {
        next();
        auto member = make(ExprKind::attribute);
        member->name = expect_name();
        adopt(*member, std::move(target));
        target = std::move(member);
      }
      stmt.targets.push_back(std::move(target));
      if (is_op(",")) stmt.unpacks = true;
    } while (take_op(","));
    if (bracket) expect_op(")");
    if (stmt.targets.empty()) fail("a name must come here but " + describe() + " does");
  }

  std::unique_ptr<Stmt> loop() {
    auto stmt = make_stmt(StmtKind::loop);
    targets(*stmt, false);
    if (!take_name("in")) fail("\"in\" must come here but " + describe() + " does");
    stmt->expr = tuple_or_expression(false);
    if (take_name("if")) stmt->condition = expression();
    if (is_name("recursive")) refuse("a loop", "recursive");
    expect_block_end();
    ++loops_;
    stmt->body = body({"else", "endfor"});
    --loops_;
    if (next().text == "else") {
      expect_block_end();
      stmt->otherwise = body({"endfor"});
      next();
    }
    expect_block_end();
    return stmt;
  }

  std::unique_ptr<Stmt> set() {
    auto stmt = make_stmt(StmtKind::set);
    targets(*stmt, true);
    if (take_op("=")) {
      stmt->expr = tuple_or_expression();
      expect_block_end();
      return stmt;
    }
    stmt->kind = StmtKind::set_block;
    if (is_op("|")) stmt->expr = filters(block_content());
    expect_block_end();
    stmt->body = body({"endset"});
    next();
    expect_block_end();
    return stmt;
  }

  std::unique_ptr<Stmt> macro() {
    auto stmt = make_stmt(StmtKind::macro);
    stmt->macro = std::make_unique<MacroNode>();
    MacroNode& macro = *stmt->macro;
    macro.name = expect_name();
    expect_op("(");
    while (!is_op(")")) {
      if (!macro.parameters.empty()) expect_op(",");
      if (is_op(")")) break;
      macro.parameters.push_back(expect_name());
      if (macro.parameters.size() > kMaxArguments) fail("parameters must be few but are many");
      if (take_op("=")) {
        macro.defaults.push_back(expression());
      } else if (!macro.defaults.empty()) {
        fail("a parameter after one with a default must have a default but has none");
      }
    }
    expect_op(")");
    expect_block_end();
    const int loops = std::exchange(loops_, 0);
    macro.body = body({"endmacro"});
    loops_ = loops;
    next();
    expect_block_end();
    return stmt;
  }

  std::unique_ptr<Stmt> filter_block() {
    auto stmt = make_stmt(StmtKind::filter_block);
    ExprPtr content = block_content();
    stmt->expr = filters(one_filter(std::move(content)));
    expect_block_end();
    stmt->body = body({"endfilter"});
    next();
    expect_block_end();
    return stmt;
  }

  // Stands for the text of a block in the filters applied to it; no template can spell this name.
  ExprPtr block_content() {
    auto content = make(ExprKind::name);
    content->name = "{block}";
    return content;
  }

  ExprPtr make(ExprKind kind) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = peek().line;
    return expr;
  }

  void grow(Expr& parent, const ExprPtr& child) const {
    if (!child) return;
    parent.height = std::max(parent.height, child->height + 1);
    if (parent.height > kMaxHeight) {
      fail(
          "an expression must be at most " + std::to_string(kMaxHeight) +
          " levels deep but is deeper");
    }
  }

  void adopt(Expr& parent, ExprPtr child) const {
    grow(parent, child);
    parent.items.push_back(std::move(child));
  }

  ExprPtr binary(ExprKind kind, ExprPtr left, ExprPtr right) const {
    auto expr = make(kind);
    adopt(*expr, std::move(left));
    adopt(*expr, std::move(right));
    return expr;
  }

  // a, b, c without brackets is a tuple where a value may stand alone.
  ExprPtr tuple_or_expression(bool conditional = true) {
    const auto element = [&] { return conditional ? expression() : logical_or(); };
    ExprPtr first = element();
    if (!is_op(",")) return first;
    auto tuple = make(ExprKind::tuple);
    adopt(*tuple, std::move(first));
    while (take_op(",")) {
      const auto kind = peek().kind;
      if (kind == TokenKind::block_end || kind == TokenKind::output_end) break;
      adopt(*tuple, element());
    }
    return tuple;
  }

  ExprPtr expression() {
    const Nested nested(*this);
    ExprPtr expr = logical_or();
    while (take_name("if")) {
      auto choice = make(ExprKind::conditional);
      adopt(*choice, std::move(expr));
      adopt(*choice, logical_or());
      adopt(*choice, take_name("else") ? expression() : nullptr);
      expr = std::move(choice);
    }
    return expr;
  }

  ExprPtr logical_or() {
    ExprPtr left = logical_and();
    while (take_name("or")) left = binary(ExprKind::logical_or, std::move(left), logical_and());
    return left;
  }

  ExprPtr logical_and() {
    ExprPtr left = logical_not();
    while (take_name("and")) left = binary(ExprKind::logical_and, std::move(left), logical_not());
    return left;
  }

  ExprPtr logical_not() {
    const Nested nested(*this);
    if (!take_name("not")) return comparison();
    auto expr = make(ExprKind::logical_not);
    adopt(*expr, logical_not());
    return expr;
  }

  ExprPtr comparison() {
    ExprPtr left = sum();
    ExprPtr chain;
    while (true) {
      std::string op;
      if (peek().kind == TokenKind::op) {
        for (const std::string_view known : {"==", "!=", "<", "<=", ">", ">="}) {
          if (is_op(known)) op = known;
        }
        if (!op.empty()) next();
      } else if (take_name("in")) {
        op = "in";
      } else if (is_name("not") && is_name("in", 1)) {
        next();
        next();
        op = "not in";
      }
      if (op.empty()) return chain ? std::move(chain) : std::move(left);
      if (!chain) {
        chain = make(ExprKind::compare);
        adopt(*chain, std::move(left));
      }
      chain->ops.push_back(op);
      adopt(*chain, sum());
    }
  }

  ExprPtr sum() {
    ExprPtr left = concat();
    while (is_op("+") || is_op("-")) {
      const auto kind = next().text == "+" ? ExprKind::add : ExprKind::subtract;
      left = binary(kind, std::move(left), concat());
    }
    return left;
  }

  ExprPtr concat() {
    ExprPtr left = product();
    if (!is_op("~")) return left;
    auto expr = make(ExprKind::concat);
    adopt(*expr, std::move(left));
    while (take_op("~")) adopt(*expr, product());
    return expr;
  }

  ExprPtr product() {
    ExprPtr left = power();
    while (true) {
      ExprKind kind;
      if (is_op("*")) {
        kind = ExprKind::multiply;
      } else if (is_op("/")) {
        kind = ExprKind::divide;
      } else if (is_op("//")) {
        kind = ExprKind::floor_divide;
      } else if (is_op("%")) {
        kind = ExprKind::modulo;
      } else {
        return left;
      }
      next();
      left = binary(kind, std::move(left), power());
    }
  }

  ExprPtr power() {
    ExprPtr left = unary(true);
    while (take_op("**")) left = binary(ExprKind::power, std::move(left), unary(true));
    return left;
  }

  ExprPtr unary(bool with_filters) {
    const Nested nested(*this);
    ExprPtr expr;
    if (is_op("-") || is_op("+")) {
      expr = make(is_op("-") ? ExprKind::negate : ExprKind::plus);
      next();
      adopt(*expr, unary(false));
    } else {
      expr = primary();
    }
    expr = postfix(std::move(expr));
    return with_filters ? filters_and_tests(std::move(expr)) : std::move(expr);
  }

  ExprPtr primary() {
    const Token token = peek();
    auto expr = make(ExprKind::constant);
    switch (token.kind) {
      case TokenKind::name:
        next();
        return name(token.text, std::move(expr));
      case TokenKind::string: {
        std::string text;
        while (peek().kind == TokenKind::string) text += next().text;
        expr->value = Value(std::move(text));
        return expr;
      }
      case TokenKind::integer: {
        next();
        int64_t value = 0;
        const auto end = token.text.data() + token.text.size();
        if (std::from_chars(token.text.data(), end, value).ec != std::errc()) {
          fail("an integer must fit 64 bits but " + token.text.substr(0, 40) + " does not");
        }
        expr->value = Value(value);
        return expr;
      }
      case TokenKind::real: {
        next();
        double value = 0;
        const auto end = token.text.data() + token.text.size();
        if (std::from_chars(token.text.data(), end, value).ec != std::errc()) {
          fail("a number must fit 64 bits but " + token.text.substr(0, 40) + " does not");
        }
        expr->value = Value(value);
        return expr;
      }
      default:
        break;
    }
    if (is_op("(")) return bracketed();
    if (is_op("[")) return list();
    if (is_op("{")) return dict();
    fail("a value must come here but " + describe() + " does");
  }

  static ExprPtr name(const std::string& name, ExprPtr expr) {
    if (name == "true" || name == "True") {
      expr->value = Value(true);
    } else if (name == "false" || name == "False") {
      expr->value = Value(false);
    } else if (name == "none" || name == "None") {
      expr->value = Value(None{});
    } else {
      expr->kind = ExprKind::name;
      expr->name = name;
    }
    return expr;
  }

  ExprPtr bracketed() {
    expect_op("(");
    auto tuple = make(ExprKind::tuple);
    if (take_op(")")) return tuple;
    ExprPtr first = expression();
    if (take_op(")")) return first;
    adopt(*tuple, std::move(first));
    while (take_op(",")) {
      if (is_op(")")) break;
      adopt(*tuple, expression());
    }
    expect_op(")");
    return tuple;
  }

  ExprPtr list() {
    auto expr = make(ExprKind::list);
    expect_op("[");
    while (!is_op("]")) {
      if (!expr->items.empty()) expect_op(",");
      if (is_op("]")) break;
      adopt(*expr, expression());
    }
    expect_op("]");
    return expr;
  }

  ExprPtr dict() {
    auto expr = make(ExprKind::dict);
    expect_op("{");
    while (!is_op("}")) {
      if (!expr->items.empty()) expect_op(",");
      if (is_op("}")) break;
      adopt(*expr, expression());
      expect_op(":");
      adopt(*expr, expression());
    }
    expect_op("}");
    return expr;
  }

  ExprPtr postfix(ExprPtr expr) {
    while (true) {
      if (take_op(".")) {
        auto member = make(ExprKind::attribute);
        if (peek().kind == TokenKind::integer) {
          member->kind = ExprKind::subscript;
          adopt(*member, std::move(expr));
          adopt(*member, primary());
        } else {
          member->name = expect_name();
          adopt(*member, std::move(expr));
        }
        expr = std::move(member);
      } else if (is_op("[")) {
        expr = subscript(std::move(expr));
      } else if (is_op("(")) {
        expr = call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr subscript(ExprPtr object) {
    expect_op("[");
    auto expr = make(ExprKind::subscript);
    adopt(*expr, std::move(object));
    const auto part = [&] { return is_op(":") || is_op("]") ? nullptr : expression(); };
    adopt(*expr, part());
    if (is_op(":")) {
      expr->kind = ExprKind::slice;
      next();
      adopt(*expr, part());
      adopt(*expr, take_op(":") ? part() : nullptr);
    } else if (!expr->items[1]) {
      fail("a subscript must come here but " + describe() + " does");
    }
    expect_op("]");
    return expr;
  }

  void arguments(Expr& expr) {
    expect_op("(");
    bool first = true;
    while (!is_op(")")) {
      if (!first) expect_op(",");
      first = false;
      if (is_op(")")) break;
      if (is_op("*") || is_op("**")) refuse("an argument", peek().text);
      if (peek().kind == TokenKind::name && is_op("=", 1)) {
        std::string name = next().text;
        next();
        ExprPtr value = expression();
        grow(expr, value);
        expr.named.emplace_back(std::move(name), std::move(value));
      } else {
        if (!expr.named.empty()) fail("a positional argument must come before named ones");
        adopt(expr, expression());
      }
      if (expr.items.size() + expr.named.size() > kMaxArguments) {
        fail("arguments must be few but are many");
      }
    }
    expect_op(")");
  }

  ExprPtr call(ExprPtr callee) {
    auto expr = make(ExprKind::call);
    adopt(*expr, std::move(callee));
    arguments(*expr);
    return expr;
  }

  ExprPtr one_filter(ExprPtr object) {
    auto expr = make(ExprKind::filter);
    expr->name = expect_name();
    if (!is_filter(expr->name)) refuse("a filter", expr->name);
    adopt(*expr, std::move(object));
    if (is_op("(")) arguments(*expr);
    return expr;
  }

  ExprPtr filters(ExprPtr expr) {
    while (take_op("|")) expr = one_filter(std::move(expr));
    return expr;
  }

  ExprPtr filters_and_tests(ExprPtr expr) {
    while (true) {
      if (take_op("|")) {
        expr = one_filter(std::move(expr));
      } else if (take_name("is")) {
        expr = test(std::move(expr));
      } else if (is_op("(")) {
        expr = call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr test(ExprPtr object) {
    auto expr = make(take_name("not") ? ExprKind::test_not : ExprKind::test);
    expr->name = expect_name();
    if (!is_test(expr->name)) refuse("a test", expr->name);
    adopt(*expr, std::move(object));
    const auto kind = peek().kind;
    const bool value = kind == TokenKind::string || kind == TokenKind::integer ||
                       kind == TokenKind::real || is_op("[") || is_op("{");
    const bool name = kind == TokenKind::name && !is_name("else") && !is_name("or") &&
                      !is_name("and") && !is_name("if") && !is_name("is") && !is_name("not") &&
                      !is_name("in");
    if (is_op("(")) {
      arguments(*expr);
    } else if (value || name) {
      adopt(*expr, postfix(primary()));
    }
    return expr;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  uint32_t nesting_ = 0;
  int loops_ = 0;
};

}  // namespace

std::shared_ptr<const Program> parse(const std::string& source) {
  return Parser(tokenize(source)).run();
}

}  // namespace metal_lora::text::jinja
