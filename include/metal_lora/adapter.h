// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "metal_lora/model.h"

namespace metal_lora {

/// Folders as mlx-lm (`adapters.safetensors`) and PEFT (`adapter_model.safetensors`) write them,
/// each with an `adapter_config.json`.
enum class AdapterFormat { mlx_lm, peft };
/// "mlx-lm", "peft".
std::string_view adapter_format_name(AdapterFormat format);
/// The name of its tensor file.
std::string_view adapter_file_name(AdapterFormat format);

/// Ranks beyond this are refused: no file may ask for a factor as large as the base.
inline constexpr int kMaxAdapterRank = 1024;

/// What an adapter's files say beside its tensors.
struct AdapterInfo {
  AdapterFormat format = AdapterFormat::mlx_lm;
  std::string base_model;   ///< as the file names it; may be empty
  float dropout = 0.0f;     ///< of training
  bool use_rslora = false;  ///< PEFT: scale = alpha/√rank; kept so that the file comes back alike
  std::optional<int> num_layers;  ///< mlx-lm: the last N layers; −1 or absent: all
  /// The rest of the configuration that the adapter came with, one JSON object per format: what the
  /// writer of that format carries along (task_type, revision, the training options …).
  std::map<AdapterFormat, std::string> config_json;
};

/// An adapter as it lies on disk, checked by itself but not yet against a model. Each module has
/// its own rank and scale; A [rank, in], B [out, rank] in the file's dtype (f32, f16 or bf16).
struct AdapterFile {
  AdapterInfo info;
  std::vector<AdapterModule> modules;  ///< in order of layer, then of Slot
};

struct ReadAdapterOptions {
  /// Of a bare tensor file, with no adapter_config.json beside it: mlx-lm's `scale`, a direct
  /// multiplier. Without it such a file is refused, since nothing says how strong the adapter is.
  std::optional<float> scale;
};

/// Reads either format from a folder or from a tensor file in one (an earlier save such as
/// 0000100_adapters.safetensors; its tensors may have the names of either format). What the file
/// asks for and this library lacks (DoRA, aLoRA, bias, fan_in_fan_out, modules_to_save, …) is
/// refused by name with `unsupported`; a malformed one with `invalid_input`; values that are not
/// finite too. Cost: one pass over the tensors, which are copied.
AdapterFile read_adapter(const std::filesystem::path& path, const ReadAdapterOptions& options = {});

struct Adapter {
  AdapterInfo info;
  AdapterWeights weights;
};
/// read_adapter, and every name and shape fits the model.
Adapter load_adapter(
    const std::filesystem::path& path,
    const ModelConfig& config,
    const ReadAdapterOptions& options = {});

struct WriteAdapterOptions {
  /// mlx-lm has one scale for all modules. Where they differ, fold the difference into B (exact for
  /// powers of two, else rounded to B's dtype) instead of refusing.
  bool fold_scale = false;
  /// Another name for the tensor file: "0000100_adapters.safetensors".
  std::string file_name;
};

/// Writes the folder (made when missing): the tensor file, then adapter_config.json, each by
/// AtomicFile. The bytes depend on the arguments alone. mlx-lm has one rank for all modules:
/// smaller ones are padded with zeros, and restored when this library reads the file. Refuses
/// values that are not finite and an adapter without modules. Returns the path of the tensor file.
std::filesystem::path write_adapter(
    const std::filesystem::path& folder,
    AdapterFormat format,
    const AdapterFile& adapter,
    const WriteAdapterOptions& options = {});
std::filesystem::path write_adapter(
    const std::filesystem::path& folder,
    AdapterFormat format,
    const AdapterWeights& weights,
    const AdapterInfo& info,
    const WriteAdapterOptions& options = {});

}  // namespace metal_lora
