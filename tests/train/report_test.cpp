// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "src/train/report_plot.h"
#include "tests/train/run_fixture.h"

namespace metal_lora::train {
namespace {

using testing::HasSubstr;
using testing::Not;

RunLog sample_log(int steps) {
  TrainingConfig config;
  config.model = "<model> & co";
  RunLog log = new_run_log(config);
  for (int i = 1; i <= steps; ++i) {
    TrainReport report;
    report.iteration = i;
    report.train_loss = i == 3 ? std::nan("") : 2.0 / i;
    report.learning_rate = 1e-3;
    report.tokens_per_second = 500;
    report.peak_memory_bytes = 1 << 30;
    log_step(log, report);
  }
  EvalReport eval;
  eval.split = "val";
  eval.loss = 1.25;
  log_eval(log, eval);
  return log;
}

size_t count(const std::string& text, const std::string& part) {
  size_t out = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++out;
  return out;
}

TEST(Report, IsOneSelfContainedPage) {
  const std::string page = render_report(sample_log(20));
  for (const char* outside : {"<script", "http://", "https://", "src=", "@import", "url("}) {
    EXPECT_THAT(page, Not(HasSubstr(outside)));
  }
  EXPECT_EQ(count(page, "<svg"), 5u);
  EXPECT_EQ(count(page, "</svg>"), 5u);
  EXPECT_THAT(page, HasSubstr("1.2500"));
  EXPECT_THAT(page, HasSubstr("prefers-color-scheme: dark"));
  EXPECT_THAT(page, Not(HasSubstr("nan")));
}

TEST(Report, EscapesWhatTheRunSays) {
  RunLog log = sample_log(2);
  log_samples(log, {{"<b>p</b>", "1", "\"0\"", "1"}});
  const std::string page = render_report(log);
  EXPECT_THAT(page, HasSubstr("&lt;model&gt; &amp; co"));
  EXPECT_THAT(page, HasSubstr("&lt;b&gt;p&lt;/b&gt;"));
  EXPECT_THAT(page, HasSubstr("&quot;0&quot;"));
  EXPECT_THAT(page, HasSubstr("class=\"right\""));
  EXPECT_THAT(page, Not(HasSubstr("<b>p")));
}

TEST(Report, EmptyAndLongHistoriesDraw) {
  EXPECT_THAT(render_report(sample_log(0)), HasSubstr("nothing recorded yet"));
  // A plot keeps two points a column at most, whatever the run's length.
  EXPECT_LT(render_report(sample_log(100000)).size(), size_t{400000});
}

TEST(Report, ThinningKeepsSpikes) {
  Plot plot{"t", "", {}, false};
  Series series;
  for (int i = 0; i < 50000; ++i) series.points.push_back({double(i), i == 31234 ? 100.0 : 1.0});
  plot.series.push_back(series);
  // The highest point decides the top of the axis: 100 is on it, and the curve reaches it.
  const std::string svg = draw(plot);
  EXPECT_THAT(svg, HasSubstr(">100<"));
  EXPECT_NE(svg.find(",18.6 "), std::string::npos);
}

TEST(Report, SamplesCanBeAddedAfterTheRun) {
  test::TemporaryFolder folder;
  write_report(folder.path(), sample_log(5));
  const std::string before = read_bytes(folder / "report.html");
  EXPECT_THAT(before, Not(HasSubstr("Samples</h2>")));
  update_report(folder.path(), {{"How many?", "SELECT 1", "no idea", "SELECT 1"}});
  EXPECT_THAT(read_bytes(folder / "report.html"), HasSubstr("no idea"));
  EXPECT_THROW(update_report(folder / "nowhere", {}), Error);
}

TEST(Ticks, AreRoundAndInside) {
  EXPECT_THAT(ticks(0, 10, 5), testing::ElementsAre(0, 2, 4, 6, 8, 10));
  for (const double tick : ticks(0.31, 0.74, 4)) {
    EXPECT_GE(tick, 0.31 - 1e-9);
    EXPECT_LE(tick, 0.74 + 1e-9);
  }
}

}  // namespace
}  // namespace metal_lora::train
