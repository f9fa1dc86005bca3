// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Proves that the emulator finds faults: a kernel that is right, a list of small changes that make
// it wrong, and what must be found for each. Used with any kernel: describe how to run it and
// whether its result is right (Subject), list faults, call expect_clean() and expect_found().
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "metal_emulator/emulator.h"

namespace metal_emulator::faults {

/// Of one dispatch, or several: everything found, and whether the numbers are right.
struct Outcome {
  Report report;
  bool right = false;
};

struct Subject {
  std::string text;        ///< the kernel file
  CompileOptions options;  ///< file_name is what findings must name
  std::function<Outcome(const Library&)> run;
};

struct Fault {
  std::string name;
  std::string before, after;           ///< `before` must occur exactly once
  std::optional<FindingKind> finding;  ///< none: only the result shows it
};

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw std::runtime_error("cannot read " + path);
  return text.str();
}

/// The text with the fault; throws unless `before` occurs exactly once and the text changes.
inline std::string plant(const std::string& text, const Fault& fault) {
  const size_t at = text.find(fault.before);
  if (at == std::string::npos || fault.before.empty())
    throw std::runtime_error(fault.name + ": the text to change is not there");
  if (text.find(fault.before, at + 1) != std::string::npos)
    throw std::runtime_error(fault.name + ": the text to change is there twice");
  if (fault.before == fault.after) throw std::runtime_error(fault.name + ": changes nothing");
  return text.substr(0, at) + fault.after + text.substr(at + fault.before.size());
}

inline std::string describe(const Report& report) {
  std::ostringstream out;
  out << report.finding_count << " findings\n";
  for (const Finding& f : report.findings)
    out << "  " << finding_name(f.kind) << " " << f.kernel << " " << f.file << ":" << f.line << " ("
        << f.count << "x) " << f.text << "\n";
  return out.str();
}

/// Merges the findings of a further dispatch.
inline void append(Report& all, const Report& more) {
  all.finding_count += more.finding_count;
  all.findings.insert(all.findings.end(), more.findings.begin(), more.findings.end());
}

inline void expect_clean(const Subject& subject) {
  const Outcome outcome = subject.run(compile(subject.text, subject.options));
  EXPECT_EQ(outcome.report.finding_count, 0u) << describe(outcome.report);
  EXPECT_TRUE(outcome.right) << "the clean kernel computes something else";
}

/// The fault is found: as a finding of its kind with the kernel, the file and a line of it; or, for
/// a fault of the numbers alone, as a wrong result without findings.
inline void expect_found(const Subject& subject, const Fault& fault) {
  SCOPED_TRACE(fault.name);
  const std::string text = plant(subject.text, fault);
  CompileOptions options = subject.options;
  options.lint = false;  // what runs is in question, not what Apple's compiler refuses
  const Outcome outcome = subject.run(compile(text, options));
  if (!fault.finding) {
    EXPECT_FALSE(outcome.right) << "the fault does not show in the result";
    EXPECT_EQ(outcome.report.finding_count, 0u) << describe(outcome.report);
    return;
  }
  const auto found = std::find_if(
      outcome.report.findings.begin(), outcome.report.findings.end(), [&](const Finding& f) {
        return f.kind == *fault.finding;
      });
  ASSERT_NE(found, outcome.report.findings.end())
      << finding_name(*fault.finding) << " expected; " << describe(outcome.report);
  EXPECT_EQ(found->file, subject.options.file_name);
  EXPECT_GE(found->line, 1);
  EXPECT_LE(found->line, std::count(text.begin(), text.end(), '\n') + 1);
  EXPECT_FALSE(found->kernel.empty());
  EXPECT_FALSE(found->text.empty());
}

inline void PrintTo(const Fault& fault, std::ostream* out) {
  *out << fault.name;
}

/// Test names from fault names: letters and digits stay.
inline std::string test_name(const testing::TestParamInfo<Fault>& info) {
  std::string name;
  for (const char c : info.param.name)
    if (std::isalnum(static_cast<unsigned char>(c)))
      name += c;
    else if (!name.empty() && name.back() != '_')
      name += '_';
  return name;
}

}  // namespace metal_emulator::faults
