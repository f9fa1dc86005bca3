// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Faults planted in the project's kernels, each of which the emulator must find: what makes
// "0 findings" of the other tests worth something. All faults of a kernel are planted in one text,
// behind a function constant that chooses one at dispatch (0: none): one compilation for all.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "tests/metal/direct.h"

namespace metal_lora::test {

using metal_emulator::FindingKind;

/// What `planted` chooses; none: no finding, only the numbers show it.
struct Fault {
  std::string name;
  std::optional<FindingKind> finding;
};

/// `before` must occur exactly once; `after` asks `planted` for the fault's number, from 1 on.
struct Edit {
  std::string before, after;
};

using Oracle = std::function<bool(const ops::metal_ops::NamedArrays& outputs)>;

/// A dispatch with its faults.
struct FaultyKernel {
  std::string file;  ///< of the kernel, for messages
  std::shared_ptr<DirectDispatch> dispatch;
  Oracle is_right;
  std::vector<Edit> edits;

  struct Outcome {
    metal_emulator::Report report;
    bool right;
  };
  Outcome run(int planted) const {
    metal_emulator::CompileOptions options;
    options.file_name = file;
    options.lint = false;  // faults only: the lint of the clean text is the other tests'
    const auto result =
        dispatch->run(metal_emulator::compile(text(), options), [&](metal_emulator::Dispatch& d) {
          std::vector<std::byte> value(sizeof planted);
          std::memcpy(value.data(), &planted, sizeof planted);
          d.function_constants.push_back({0, std::move(value)});
          d.max_findings = 64;
        });
    return {result.report, is_right(result.outputs)};
  }

 private:
  std::string text() const {
    std::string text = "constant int planted [[function_constant(0)]];\n" + dispatch->text();
    for (const auto& edit : edits) {
      const size_t at = text.find(edit.before);
      if (at == std::string::npos) throw std::logic_error("not in the text: " + edit.before);
      if (text.find(edit.before, at + 1) != std::string::npos) {
        throw std::logic_error("in the text twice: " + edit.before);
      }
      text.replace(at, edit.before.size(), edit.after);
    }
    return text;
  }
};

/// The bits of the kernel as it is, by the launch layer: the tests beside these hold them against
/// f64 and the CPU.
inline Oracle equals_clean_kernel(
    const metal::Plan& plan,
    const ops::metal_ops::NamedArrays& arrays,
    const ops::metal_ops::NamedOutputs& outputs) {
  const auto want = run({plan}, arrays, outputs);
  return [want, names = plan.entry->outputs](const ops::metal_ops::NamedArrays& got) {
    return std::all_of(names.begin(), names.end(), [&](const std::string& name) {
      namespace mx = mlx::core;
      return mx::array_equal(mx::view(got.at(name), mx::uint8), mx::view(want.at(name), mx::uint8))
          .item<bool>();
    });
  };
}

inline FaultyKernel faulty_kernel(
    const char* file,
    const metal::Plan& plan,
    const ops::metal_ops::NamedArrays& arrays,
    const ops::metal_ops::NamedOutputs& outputs,
    std::vector<Edit> edits) {
  return {
      file,
      std::make_shared<DirectDispatch>(plan, arrays, outputs),
      equals_clean_kernel(plan, arrays, outputs),
      std::move(edits)};
}

inline std::string describe(const metal_emulator::Report& report) {
  std::string text = std::to_string(report.finding_count) + " findings\n";
  for (const auto& f : report.findings) {
    text += "  " + std::string(finding_name(f.kind)) + " " + f.file + ":" + std::to_string(f.line) +
            " " + f.text + "\n";
  }
  return text;
}

/// Fault number 0: nothing is found and the numbers are right; i: fault i - 1 of the list is found,
/// as a finding of its kind in the kernel's file, or as wrong numbers without a finding.
inline void expect_found(
    const FaultyKernel& kernel, const std::vector<Fault>& faults, size_t number) {
  const auto outcome = kernel.run(static_cast<int>(number));
  const auto& report = outcome.report;
  if (number == 0) {
    EXPECT_EQ(report.finding_count, 0u) << describe(report);
    EXPECT_TRUE(outcome.right) << "the clean kernel computes something else";
    return;
  }
  const Fault& fault = faults[number - 1];
  if (!fault.finding) {
    EXPECT_FALSE(outcome.right) << fault.name << " does not show in the numbers";
    EXPECT_EQ(report.finding_count, 0u) << describe(report);
    return;
  }
  const auto found = std::find_if(
      report.findings.begin(), report.findings.end(), [&](const metal_emulator::Finding& f) {
        return f.kind == *fault.finding;
      });
  ASSERT_NE(found, report.findings.end())
      << fault.name << ": " << finding_name(*fault.finding) << " expected; " << describe(report);
  // The file of the fault, or of what it calls.
  EXPECT_NE(kernel.dispatch->text().find("\"" + found->file + "\""), std::string::npos)
      << found->file;
  EXPECT_GE(found->line, 1);
  EXPECT_FALSE(found->text.empty());
}

/// "None" and the faults' names, letters and digits kept.
inline std::string fault_name(const std::vector<Fault>& faults, size_t number) {
  if (number == 0) return "None";
  std::string name;
  for (const char c : faults[number - 1].name) {
    if (std::isalnum(static_cast<unsigned char>(c))) {
      name += c;
    } else if (!name.empty() && name.back() != '_') {
      name += '_';
    }
  }
  return name;
}

/// One test for the clean kernel and one for each fault. `make` is a function that returns the
/// FaultyKernel, called once.
#define METAL_LORA_FAULTS(suite, make, faults)                                             \
  class suite : public testing::TestWithParam<size_t> {};                                  \
  TEST_P(suite, IsFound) {                                                                 \
    static const FaultyKernel kernel = make();                                             \
    expect_found(kernel, faults, GetParam());                                              \
  }                                                                                        \
  INSTANTIATE_TEST_SUITE_P(                                                                \
      Planted, suite, testing::Range(size_t{0}, faults.size() + 1), [](const auto& info) { \
        return fault_name(faults, info.param);                                             \
      })

}  // namespace metal_lora::test
