// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The exact state of a run, in adapter_path/state/<sequence>/: tensors.safetensors, then
// manifest.json with its SHA-256. A folder without a manifest that verifies does not exist for us,
// so a kill at any moment leaves the previous state. Two are kept.
#pragma once

#include <mlx/array.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace metal_lora::train {

/// Everything but arrays that a step boundary is made of. Random numbers are counter-based: seed
/// (in the configuration), epoch, cursor and updates are their whole state.
struct Progress {
  int64_t iteration = 0;  ///< steps taken, skipped ones included
  int64_t updates = 0;    ///< steps that changed the weights: position of schedule and dropout
  int64_t skipped = 0, skipped_in_a_row = 0;
  uint64_t epoch = 0, cursor = 0;  ///< next step of the data plan
  int64_t trained_tokens = 0;
  // Since the last report.
  double loss_sum = 0.0;
  int64_t loss_tokens = 0;
  double seconds = 0.0;  ///< of training, all sittings together
  // Validation.
  std::optional<double> first_val_loss, last_val_loss, best_val_loss;
  int64_t best_iteration = 0, evaluations_without_gain = 0;
  bool validation_pending = false;  ///< due at this step boundary, not done yet
};
nlohmann::ordered_json to_json(const Progress& progress);
Progress progress_from_json(const nlohmann::json& json, const std::string& where);

/// What a state belongs to. Resuming demands equality.
struct Identity {
  std::string base;               ///< SHA-256 over the model's files
  std::string data;               ///< Dataset::hash of the training split
  std::string adapter;            ///< SHA-256 over module names, shapes and scales
  nlohmann::ordered_json config;  ///< keys that change what is computed
};

struct State {
  Progress progress;
  mlx::core::array param, m, v;
  nlohmann::ordered_json log;  ///< history for the report
};

/// SHA-256 over names and contents of the model's file or, of a folder, its configuration and
/// weights. Reads them once.
std::string hash_model_files(const std::filesystem::path& model);

/// Saves; arrays must be evaluated. Then removes all but the two newest states. Error io keeps the
/// previous ones.
void save_state(
    const std::filesystem::path& state_folder, const State& state, const Identity& identity);

/// The newest state that verifies. Error: not_found when there is none, invalid_input naming what
/// differs between the saved run and `identity`.
State load_state(
    const std::filesystem::path& state_folder,
    const Identity& identity,
    const std::function<void(const std::string&)>& on_warning);

}  // namespace metal_lora::train
