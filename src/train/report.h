// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "metal_lora/train.h"

namespace metal_lora::train {

/// The history of a run, as plain JSON: {"title", "config", "facts": {…}, "steps": [[iteration,
/// loss, learning rate, tokens/s, peak bytes, grad norm]…], "evals": [[iteration, split, loss]…],
/// "samples": […]}. It is saved with the state and beside the adapter as training_log.json.
using RunLog = nlohmann::ordered_json;

RunLog new_run_log(const TrainingConfig& config);
void log_step(RunLog& log, const TrainReport& report);
void log_eval(RunLog& log, const EvalReport& report);
void log_samples(RunLog& log, const std::vector<ReportSample>& samples);

/// One self-contained page: inline SVG and CSS, no script, nothing fetched, light and dark. Text of
/// the run is escaped. Long histories are thinned to what a plot can show.
std::string render_report(const RunLog& log);

/// Writes training_log.json and report.html into the folder, each atomically.
void write_report(const std::filesystem::path& folder, const RunLog& log);

}  // namespace metal_lora::train
