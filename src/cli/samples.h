// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A few prompts answered before and after training, so that report.html shows what changed.
#pragma once

#include <string>
#include <vector>

#include "metal_lora/train.h"
#include "src/cli/console.h"
#include "src/cli/interrupt.h"
#include "src/cli/session.h"

namespace metal_lora::cli {

/// The first rows of a JSONL file of {"prompt", "completion"?}, at most six.
std::vector<ReportSample> read_samples(const std::string& path);

/// Answers every sample greedily into `member`, in the model's chat template (where it has one) as
/// training sees it.
void answer_samples(
    Console& console,
    const Session& session,
    const Interruptible& interrupt,
    std::string ReportSample::*member,
    std::vector<ReportSample>& samples);

}  // namespace metal_lora::cli
