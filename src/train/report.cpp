// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "src/io/atomic_file.h"
#include "src/io/json.h"
#include "src/train/report_plot.h"

namespace metal_lora::train {
namespace {

constexpr const char* kLogFile = "training_log.json";
constexpr const char* kReportFile = "report.html";

// Columns of a row of log["steps"].
enum Column { kIteration, kLoss, kRate, kTokensPerSecond, kPeakBytes, kGradNorm };

std::optional<double> number(const RunLog& value) {
  return value.is_number() ? std::optional<double>(value.get<double>()) : std::nullopt;
}

Series column(const RunLog& log, Column index, double scale = 1.0) {
  Series series;
  for (const auto& row : log.at("steps")) {
    const auto x = number(row.at(kIteration)), y = number(row.at(index));
    if (x && y && std::isfinite(*y)) series.points.push_back({*x, *y * scale});
  }
  return series;
}

/// Exponential moving average with the start corrected, as Adam does.
Series smoothed(const Series& raw) {
  Series out;
  const double keep =
      1.0 - 1.0 / std::clamp(static_cast<double>(raw.points.size()) / 20.0, 1.0, 50.0);
  double mean = 0.0, weight = 0.0;
  for (const Point& p : raw.points) {
    mean = keep * mean + (1.0 - keep) * p.y;
    weight = keep * weight + (1.0 - keep);
    out.points.push_back({p.x, mean / weight});
  }
  return out;
}

Series validation(const RunLog& log) {
  Series series;
  for (const auto& row : log.at("evals")) {
    const auto loss = number(row.at(2));
    if (row.at(1) == "val" && loss) series.points.push_back({row.at(0).get<double>(), *loss});
  }
  return series;
}

std::string card(const std::string& label, const std::string& value, const std::string& note = {}) {
  return fmt::format(
      "<div class=\"card\"><div class=\"label\">{}</div><div class=\"value\">{}</div>"
      "<div class=\"note\">{}</div></div>\n",
      escape(label),
      escape(value),
      escape(note));
}

std::string human_bytes(double bytes) {
  return bytes >= 1e9 ? fmt::format("{:.2f} GB", bytes * 1e-9)
                      : fmt::format("{:.0f} MB", bytes * 1e-6);
}

std::string human_count(double count) {
  if (count >= 1e6) return fmt::format("{:.2f} M", count * 1e-6);
  if (count >= 1e4) return fmt::format("{:.1f} k", count * 1e-3);
  return fmt::format("{:.0f}", count);
}

std::string human_seconds(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<int64_t>(seconds);
  if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
}

double fact(const RunLog& log, const char* key) {
  const auto facts = log.find("facts");
  if (facts == log.end() || !facts->contains(key)) return 0.0;
  return number((*facts)[key]).value_or(0.0);
}

std::string change_note(const Series& series) {
  if (series.points.size() < 2) return "";
  return fmt::format("from {:.4f}", series.points.front().y);
}

std::string cards(const RunLog& log) {
  const Series loss = smoothed(column(log, kLoss)), val = validation(log);
  const Series speed = column(log, kTokensPerSecond);
  std::string out;
  if (!loss.points.empty()) {
    out += card("Training loss", fmt::format("{:.4f}", loss.points.back().y), change_note(loss));
  }
  if (!val.points.empty()) {
    const auto best =
        std::min_element(val.points.begin(), val.points.end(), [](const Point& a, const Point& b) {
          return a.y < b.y;
        });
    out += card("Validation loss", fmt::format("{:.4f}", val.points.back().y), change_note(val));
    out += card(
        "Best validation",
        fmt::format("{:.4f}", best->y),
        fmt::format("at iteration {:.0f}", best->x));
  }
  for (const auto& row : log.at("evals")) {
    if (row.at(1) == "test" && row.at(2).is_number()) {
      const double test = row.at(2).get<double>();
      out += card(
          "Test loss",
          fmt::format("{:.4f}", test),
          fmt::format("perplexity {:.2f}", std::exp(test)));
    }
  }
  out +=
      card("Iterations", human_count(fact(log, "iterations")), human_seconds(fact(log, "seconds")));
  out += card(
      "Trained tokens",
      human_count(fact(log, "trained_tokens")),
      fmt::format("{} samples in the data", human_count(fact(log, "samples"))));
  if (!speed.points.empty()) {
    std::vector<double> sorted;
    for (const Point& p : speed.points) sorted.push_back(p.y);
    std::nth_element(
        sorted.begin(),
        sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2),
        sorted.end());
    out += card(
        "Throughput", fmt::format("{:.0f} tok/s", sorted[sorted.size() / 2]), "median of reports");
  }
  out += card(
      "Peak memory",
      human_bytes(fact(log, "peak_memory_bytes")),
      fmt::format("estimated {}", human_bytes(fact(log, "estimated_bytes"))));
  out += card(
      "Adapter",
      human_count(fact(log, "parameters")),
      fmt::format("parameters in {:.0f} modules", fact(log, "modules")));
  if (fact(log, "skipped_steps") > 0) {
    out += card("Skipped steps", human_count(fact(log, "skipped_steps")), "loss was not finite");
  }
  return out;
}

std::string plots(const RunLog& log) {
  const Series raw = column(log, kLoss);
  Plot loss{"Loss per token", "", {}, true};
  loss.series.push_back({raw.points, "each report", "faint"});
  loss.series.push_back({smoothed(raw).points, "smoothed", "main"});
  loss.series.push_back({validation(log).points, "validation", "accent", true});
  const auto small = [&](const char* title, const char* unit, Column index, double scale) {
    Plot plot{title, unit, {}, false};
    plot.series.push_back({column(log, index, scale).points, "", "main"});
    return draw(plot);
  };
  return draw(loss) + "<div class=\"grid\">" + small("Learning rate", "", kRate, 1.0) +
         small("Throughput", "tokens/s", kTokensPerSecond, 1.0) +
         small("Peak memory", "GB", kPeakBytes, 1e-9) +
         small("Gradient norm", "before clipping", kGradNorm, 1.0) + "</div>\n";
}

std::string samples(const RunLog& log) {
  const auto at = log.find("samples");
  if (at == log.end() || at->empty()) return "";
  std::string out =
      "<h2>Samples</h2>\n<table class=\"samples\"><thead><tr><th>Prompt</th><th>Expected</th>"
      "<th>Before</th><th>After</th></tr></thead><tbody>\n";
  for (const auto& row : *at) {
    const std::string expected = row.value("expected", ""), after = row.value("after", "");
    const bool right = !expected.empty() && expected == after;
    out += fmt::format(
        "<tr><td>{}</td><td><pre>{}</pre></td><td><pre>{}</pre></td><td class=\"{}\"><pre>{}</pre>"
        "</td></tr>\n",
        escape(row.value("prompt", "")),
        escape(expected),
        escape(row.value("before", "")),
        right ? "right" : "",
        escape(after));
  }
  return out + "</tbody></table>\n";
}

void flatten_config(const RunLog& node, const std::string& prefix, std::string& out) {
  for (const auto& [key, value] : node.items()) {
    const std::string name = prefix.empty() ? key : prefix + "." + key;
    if (value.is_object()) {
      flatten_config(value, name, out);
    } else if (!value.is_null()) {
      out += fmt::format(
          "<tr><td>{}</td><td>{}</td></tr>\n",
          escape(name),
          escape(value.is_string() ? value.get<std::string>() : value.dump()));
    }
  }
}

std::string configuration(const RunLog& log) {
  std::string rows;
  flatten_config(log.at("config"), "", rows);
  return "<h2>Configuration</h2>\n<table class=\"config\"><tbody>\n" + rows + "</tbody></table>\n";
}

RunLog finite(double value) {
  return std::isfinite(value) ? RunLog(value) : RunLog(nullptr);
}

}  // namespace

RunLog new_run_log(const TrainingConfig& config) {
  RunLog log;
  log["title"] = config.project_name.empty() ? "LoRA training" : config.project_name;
  log["config"] = config.to_json();
  log["facts"] = RunLog::object();
  log["steps"] = RunLog::array();
  log["evals"] = RunLog::array();
  log["samples"] = RunLog::array();
  return log;
}

void log_step(RunLog& log, const TrainReport& r) {
  log["steps"].push_back(RunLog::array(
      {r.iteration,
       finite(r.train_loss),
       r.learning_rate,
       r.tokens_per_second,
       r.peak_memory_bytes,
       finite(r.grad_norm)}));
}

void log_eval(RunLog& log, const EvalReport& report) {
  log["evals"].push_back(RunLog::array({report.iteration, report.split, finite(report.loss)}));
}

void log_samples(RunLog& log, const std::vector<ReportSample>& samples) {
  log["samples"] = RunLog::array();
  for (const auto& s : samples) {
    log["samples"].push_back(
        {{"prompt", s.prompt}, {"expected", s.expected}, {"before", s.before}, {"after", s.after}});
  }
}

std::string render_report(const RunLog& log) {
  const std::string title = escape(log.value("title", "LoRA training"));
  const auto& config = log.at("config");
  const std::string model = config.contains("model") && config["model"].is_string()
                                ? config["model"].get<std::string>()
                                : "";
  std::string out = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n";
  out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
  out +=
      fmt::format("<title>{}</title>\n<style>\n{}</style></head>\n<body><main>\n", title, style());
  out += fmt::format("<h1>{}</h1>\n<p class=\"sub\">{}</p>\n", title, escape(model));
  out += "<div class=\"cards\">\n" + cards(log) + "</div>\n";
  out += plots(log) + samples(log) + configuration(log);
  return out + "</main></body></html>\n";
}

void write_report(const std::filesystem::path& folder, const RunLog& log) {
  io::unwrap(io::write_file_atomic((folder / kLogFile).string(), log.dump() + "\n"));
  io::unwrap(io::write_file_atomic((folder / kReportFile).string(), render_report(log)));
}

}  // namespace metal_lora::train

namespace metal_lora {

void update_report(const std::filesystem::path& adapter_path, std::vector<ReportSample> samples) {
  const std::string path = (adapter_path / train::kLogFile).string();
  constexpr io::JsonLimits kLimits{uint64_t{1} << 30, 64, true};
  const auto json = io::unwrap(io::read_json_file(path, kLimits));
  const auto object = io::unwrap(io::JsonObject::of(json, path));
  io::unwrap(object.get_object("config"));
  train::RunLog log = train::RunLog::parse(json.dump());
  train::log_samples(log, samples);
  try {
    train::write_report(adapter_path, log);
  } catch (const nlohmann::json::exception& error) {
    throw Error(
        ErrorCode::invalid_input, fmt::format("[{}] is no training log: {}", path, error.what()));
  }
}

}  // namespace metal_lora
