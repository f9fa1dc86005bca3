// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Small line plots as inline SVG.
#pragma once

#include <string>
#include <vector>

namespace metal_lora::train {

struct Point {
  double x = 0.0, y = 0.0;
};
struct Series {
  std::vector<Point> points;
  std::string name;            ///< in the legend; empty: none
  std::string style = "main";  ///< CSS class: main, faint, accent
  bool dots = false;
};
struct Plot {
  std::string title, unit;
  std::vector<Series> series;
  bool large = false;
};

/// A <figure> with one <svg>. Series are thinned to the plot's width by keeping each column's
/// extremes, so that no spike is lost.
std::string draw(const Plot& plot);
/// For text inside HTML.
std::string escape(const std::string& text);
/// The page's style sheet.
const char* style();

/// Round values that cover [low, high], about `count` of them.
std::vector<double> ticks(double low, double high, int count);

}  // namespace metal_lora::train
