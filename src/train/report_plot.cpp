// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/report_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace metal_lora::train {
namespace {

struct Frame {
  double width, height, left, right, top, bottom;
  double x0, x1, y0, y1;

  double px(double x) const { return left + (x - x0) / (x1 - x0) * (width - left - right); }
  double py(double y) const {
    return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
  }
};

std::string label(double value) {
  const double size = std::abs(value);
  if (value == 0.0) return "0";
  if (size >= 1e6 || size < 1e-4) return fmt::format("{:.1e}", value);
  if (size >= 10000) return fmt::format("{:.0f}k", value / 1000);
  return fmt::format("{:.4g}", value);
}

/// At most two points (lowest, highest) for each pixel column.
std::vector<Point> thinned(const std::vector<Point>& points, size_t columns) {
  if (points.size() <= 2 * columns) return points;
  std::vector<Point> out;
  for (size_t column = 0; column < columns; ++column) {
    const size_t begin = points.size() * column / columns;
    const size_t end = points.size() * (column + 1) / columns;
    const auto [low, high] = std::minmax_element(
        points.begin() + static_cast<std::ptrdiff_t>(begin),
        points.begin() + static_cast<std::ptrdiff_t>(end),
        [](const Point& a, const Point& b) { return a.y < b.y; });
    out.push_back(std::min(*low, *high, [](const Point& a, const Point& b) { return a.x < b.x; }));
    if (low != high) {
      out.push_back(
          std::max(*low, *high, [](const Point& a, const Point& b) { return a.x < b.x; }));
    }
  }
  return out;
}

bool set_range(Frame& frame, const Plot& plot) {
  double x0 = std::numeric_limits<double>::infinity(), x1 = -x0, y0 = x0, y1 = -x0;
  for (const auto& series : plot.series) {
    for (const Point& p : series.points) {
      x0 = std::min(x0, p.x);
      x1 = std::max(x1, p.x);
      y0 = std::min(y0, p.y);
      y1 = std::max(y1, p.y);
    }
  }
  if (x0 > x1) return false;
  if (x0 == x1) x0 -= 1, x1 += 1;
  // Loss, rates and bytes are read against zero unless that would flatten the curve.
  if (y0 > 0 && y0 < 0.6 * y1) y0 = 0;
  const double pad = y1 > y0 ? (y1 - y0) * 0.06 : std::max(std::abs(y1) * 0.1, 1e-12);
  frame.x0 = x0;
  frame.x1 = x1;
  frame.y0 = y0 == 0 ? 0 : y0 - pad;
  frame.y1 = y1 + pad;
  return true;
}

std::string axes(const Frame& f, int x_ticks, int y_ticks) {
  std::string out;
  for (const double y : ticks(f.y0, f.y1, y_ticks)) {
    out += fmt::format(
        "<line class=\"gridline\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>"
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
        f.left,
        f.width - f.right,
        f.py(y),
        f.py(y),
        f.left - 8,
        f.py(y) + 4,
        label(y));
  }
  for (const double x : ticks(f.x0, f.x1, x_ticks)) {
    if (x != std::floor(x)) continue;
    out += fmt::format(
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
        f.px(x),
        f.height - f.bottom + 18,
        label(x));
  }
  return out;
}

std::string curve(const Frame& f, const Series& series) {
  if (series.points.empty()) return "";
  const auto points = thinned(series.points, static_cast<size_t>(f.width));
  std::string out = fmt::format("<polyline class=\"curve {}\" points=\"", series.style);
  for (const Point& p : points) out += fmt::format("{:.1f},{:.1f} ", f.px(p.x), f.py(p.y));
  out += "\"/>\n";
  if (series.dots || points.size() == 1) {
    for (const Point& p : points) {
      out += fmt::format(
          "<circle class=\"dot {}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\"><title>{}: "
          "{}</title></circle>\n",
          series.style,
          f.px(p.x),
          f.py(p.y),
          label(p.x),
          fmt::format("{:.4f}", p.y));
    }
  }
  return out;
}

std::string legend(const Frame& f, const Plot& plot) {
  std::string out;
  double x = f.left + 4;
  for (const auto& series : plot.series) {
    if (series.name.empty() || series.points.empty()) continue;
    out += fmt::format(
        "<line class=\"curve {}\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"14\" y2=\"14\"/>"
        "<text class=\"tick\" x=\"{:.1f}\" y=\"18\">{}</text>\n",
        series.style,
        x,
        x + 22,
        x + 28,
        escape(series.name));
    x += 52 + 7.2 * static_cast<double>(series.name.size());
  }
  return out;
}

}  // namespace

std::vector<double> ticks(double low, double high, int count) {
  std::vector<double> out;
  if (!(high > low) || count < 1) return {low};
  const double rough = (high - low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  }
  const double first = std::ceil(low / step - 1e-9);
  for (double i = first; i * step <= high + step * 1e-9 && out.size() < 100; ++i) {
    out.push_back(i == 0 ? 0.0 : i * step);
  }
  return out;
}

std::string draw(const Plot& plot) {
  Frame f{
      plot.large ? 1040.0 : 500.0,
      plot.large ? 340.0 : 190.0,
      62,
      14,
      plot.large ? 30.0 : 10.0,
      28,
      0,
      1,
      0,
      1};
  std::string unit = plot.unit.empty() ? "" : fmt::format(" <span>{}</span>", escape(plot.unit));
  std::string out =
      fmt::format("<figure><figcaption>{}{}</figcaption>\n", escape(plot.title), unit);
  if (!set_range(f, plot)) return out + "<p class=\"note\">nothing recorded yet</p></figure>\n";
  out += fmt::format(
      "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n",
      f.width,
      f.height,
      escape(plot.title));
  out += axes(f, plot.large ? 10 : 5, plot.large ? 6 : 4);
  for (const auto& series : plot.series) out += curve(f, series);
  return out + legend(f, plot) + "</svg></figure>\n";
}

std::string escape(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

const char* style() {
  return R"css(:root { color-scheme: light dark; --bg: #f6f7f9; --panel: #ffffff; --text: #1b1f27;
  --muted: #68707d; --line: #e3e6ec; --main: #2f6fed; --faint: #a9c3f7; --accent: #e0662b; --ok: #12805c; }
@media (prefers-color-scheme: dark) { :root { --bg: #12151b; --panel: #1a1f27; --text: #e8eaf0;
  --muted: #98a1b0; --line: #2b323d; --main: #6d9eff; --faint: #4a68a0; --accent: #ff9a5c; --ok: #4cc79a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 36px 0 12px; }
.sub { color: var(--muted); margin: 4px 0 24px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; margin-bottom: 20px; }
.card, figure, table { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 16px; }
.label, .note, figcaption span { color: var(--muted); font-size: 13px; font-weight: 400; }
.value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 16px; padding: 14px 16px 8px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 16px; }
svg { width: 100%; height: auto; display: block; }
.gridline { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.curve.main { stroke: var(--main); } .curve.faint { stroke: var(--faint); stroke-width: 1.2; }
.curve.accent { stroke: var(--accent); } .dot.accent { fill: var(--accent); } .dot.main { fill: var(--main); }
.dot.faint { fill: var(--faint); }
table { width: 100%; border-collapse: separate; border-spacing: 0; overflow: hidden; }
th, td { text-align: left; padding: 8px 14px; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; font-size: 13px; } tr:last-child td { border-bottom: 0; }
.config td:first-child { color: var(--muted); width: 40%; }
.config td, pre { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; } .samples td { width: 25%; } .right pre { color: var(--ok); }
@media (max-width: 640px) { .grid { grid-template-columns: 1fr; } }
)css";
}

}  // namespace metal_lora::train
