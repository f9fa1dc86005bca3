// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <mlx/array.h>

#include "metal_lora/ops.h"
#include "metal_lora/weight.h"

namespace metal_lora {

/// Geometry of a decoder-only transformer of the Llama kind, by config: no code per checkpoint.
struct ModelConfig {
  std::string architecture;  ///< model_type: llama, mistral, qwen2, qwen3
  int hidden_size = 0, num_hidden_layers = 0, intermediate_size = 0;
  int num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0;
  int vocab_size = 0, max_position_embeddings = 0;
  float rms_norm_eps = 1e-5f;
  bool tie_word_embeddings = false;
  int sliding_window = 0;               ///< tokens; 0 = none
  std::vector<bool> layer_uses_window;  ///< per layer (Qwen2's max_window_layers)
  std::vector<float> inv_freq;          ///< [head_dim/2], rope scaling applied
  float rope_factor = 1.0f;             ///< attention factor on cos and sin
  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id, pad_token_id;
};

/// The adaptable linears of a layer, in the order that adapters and files list them.
enum class Slot { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj };
inline constexpr int kSlotsPerLayer = 7;
/// "self_attn.q_proj" … "mlp.down_proj".
std::string_view slot_path(Slot slot);

struct AdapterModule {
  std::string path;  ///< "model.layers.3.self_attn.q_proj"; "model.embed_tokens"
  Lora lora;
};
/// A set of LoRA tensors fitted to a model: what forward applies. Value type, cheap to copy.
class AdapterWeights {
 public:
  /// No adapter.
  AdapterWeights() = default;
  /// Modules must have paths that `config` knows, each once, and shapes that fit; Error otherwise.
  AdapterWeights(const ModelConfig& config, std::vector<AdapterModule> modules);

  const std::vector<AdapterModule>& modules() const;
  const Lora* find(int layer, Slot slot) const;
  const Lora* find_embedding() const;
  bool empty() const { return state_ == nullptr; }

  /// A and B of every module in order (a0, b0, a1, b1, …) and a copy with others in their place:
  /// how a differentiated function gets its trainable arrays.
  std::vector<mlx::core::array> parameters() const;
  AdapterWeights with_parameters(std::span<const mlx::core::array> parameters) const;
  /// A copy with dropout masks of this seed (a different one for each module).
  AdapterWeights with_dropout(float dropout, uint64_t seed) const;
  AdapterWeights astype(mlx::core::Dtype dtype) const;
  /// Copies of one AdapterWeights are the same; anything newly made is not.
  bool same(const AdapterWeights& other) const { return state_ == other.state_; }

 private:
  struct State {
    std::vector<AdapterModule> modules;
    std::vector<int> index;  ///< layer·7 + slot -> module, −1 = none; last: the embedding
  };
  std::shared_ptr<const State> state_;
};

/// Paths of every linear of the model that can carry an adapter, with {out, in}.
struct LinearInfo {
  std::string path;
  int out_features, in_features;
};
std::vector<LinearInfo> adaptable_linears(const ModelConfig& config);

/// What a model's dense matrices (linears, embedding, head) become while it loads. Those that a
/// file stores quantised stay as they are.
enum class Quantization {
  none,
  int4,  ///< MLX's affine form: a scale and a bias for each group of weights
  int8,
  nf4,  ///< QLoRA's 4-bit NormalFloat (Dettmers et al. 2023), an absmax for each 64 weights
};
/// As users write it: "0", "4", "8", "nf4".
std::string_view quantization_name(Quantization quantization);
/// The reverse; nothing for other text.
std::optional<Quantization> parse_quantization(std::string_view name);

struct LoadOptions {
  mlx::core::Dtype dtype =
      mlx::core::bfloat16;  ///< of activations (and of dense weights that a file stores quantised
                            ///< in a form we do not multiply)
  Quantization quantize = Quantization::none;
  int quantize_group = 64;  ///< weights that share a scale: 32, 64 or 128; nf4: 64
  bool double_quant =
      true;                 ///< nf4: the absmax in 8 bits (bitsandbytes' bnb_4bit_use_double_quant)
  bool dequantize = false;  ///< make every weight dense in `dtype`
  std::function<void(double)> progress = {};  ///< 0 … 1

  /// Checks quantize, quantize_group and double_quant; Error invalid_input naming the option.
  /// Model::load does it first.
  void validate() const;
};

class Model;
namespace ops {
class DecodePlan;
class TrainPlan;
}

/// Keys and values of one sequence. Movable; one generation at a time.
class KVCache {
 public:
  explicit KVCache(const Model& model);
  ~KVCache();
  KVCache(KVCache&&) noexcept;
  KVCache& operator=(KVCache&&) noexcept;
  int length() const { return length_; }
  /// Forgets the tokens from `length` on (rejected drafts, prompt edits). O(1).
  void truncate(int length);
  /// Makes room for `tokens` in all, in steps of 256; keeps the contents.
  void reserve(int tokens);
  size_t nbytes() const;

 private:
  friend class Model;
  mlx::core::array data_;  ///< [layers, 2, capacity, kv_heads, head_dim]
  int length_ = 0;
  int max_length_ = 0;
  std::shared_ptr<const ops::DecodePlan> plan_;  ///< for the adapter last decoded with
  AdapterWeights plan_adapter_;
};

class Model {
 public:
  /// A GGUF file or a Hugging Face folder (config.json + *.safetensors). Weights are validated,
  /// then mapped or packed; nothing in the files is trusted. Errors: not_found, invalid_input
  /// naming file and field, unsupported naming what is.
  static std::shared_ptr<const Model> load(
      const std::filesystem::path& path, const LoadOptions& options = {});

  const ModelConfig& config() const { return config_; }
  mlx::core::Dtype dtype() const { return dtype_; }
  const std::filesystem::path& path() const { return path_; }
  size_t weight_bytes() const;
  /// Of a linear by path, for fuse and export; Error not_found.
  const LoraLinear& linear(std::string_view path) const;
  const Weight& head() const { return head_; }
  const Weight& embedding() const { return embedding_; }

  /// Final hidden states (after the last norm) [tokens, hidden] for a packed stream of tokens.
  /// Differentiable in the adapter's parameters. checkpoint: recompute each layer in the backward
  /// pass instead of keeping its activations (≈ 1/3 more work, memory of one layer).
  mlx::core::array hidden(
      const mlx::core::array& tokens,
      const ops::Segments& segments,
      const AdapterWeights& adapter,
      bool checkpoint = false) const;

  /// Runs tokens (int32) through the cache and returns the logits f32 [rows, vocab] of the last
  /// `rows` of them. One to eight tokens take the decode path. Evaluated on return.
  mlx::core::array decode(
      std::span<const int32_t> tokens,
      KVCache& cache,
      const AdapterWeights& adapter,
      int rows = 1) const;

  /// The same as a graph, unevaluated and for any number of tokens: {logits, cache}. tokens int32
  /// [n], position int32 scalar (tokens already in the cache), cache as KVCache keeps it.
  std::pair<mlx::core::array, mlx::core::array> cached_forward(
      const mlx::core::array& tokens,
      const mlx::core::array& position,
      mlx::core::array cache,
      const AdapterWeights& adapter,
      int rows) const;

  /// Σ weights·loss of a packed stream (f32 scalar); see ops::linear_cross_entropy.
  mlx::core::array loss(
      const mlx::core::array& tokens,
      const ops::Segments& segments,
      const mlx::core::array& targets,
      const mlx::core::array& weights,
      const AdapterWeights& adapter,
      bool needs_grad,
      bool checkpoint = false) const;

  /// Why a training step of this adapter cannot be one launch of the active backend (it is then a
  /// graph of single operations: the same results, slower); empty: it can.
  std::string train_step_refusal(const AdapterWeights& adapter) const;
  /// Ready for such steps (ops::train_step). Of the adapter only ranks and scales count; its
  /// parameters lie end to end in the order of AdapterWeights::parameters(). Activations that do
  /// not fit the budget are worked out again.
  std::shared_ptr<ops::TrainPlan> make_train_plan(
      const AdapterWeights& adapter, size_t memory_budget_bytes) const;

 private:
  friend class ModelLoader;
  struct Layer {
    std::array<LoraLinear, kSlotsPerLayer> linears;
    std::optional<mlx::core::array> input_norm, post_norm;  ///< f32; always set after load
    std::optional<mlx::core::array> q_norm, k_norm;         ///< f32; Qwen3
    int window = 0;
  };
  Model() = default;

  /// Attention of one layer over rotated q and k.
  using Attend = std::function<mlx::core::array(
      const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v)>;
  /// {h, update}: the residual stream and what is to be added to it next; `update` is null before
  /// the first layer.
  std::pair<mlx::core::array, mlx::core::array> layer_forward(
      int index,
      const mlx::core::array& residual,
      const mlx::core::array* update,
      const mlx::core::array& table,
      const AdapterWeights& adapter,
      const Attend& attend) const;
  mlx::core::array prefill(
      std::span<const int32_t> tokens,
      KVCache& cache,
      const AdapterWeights& adapter,
      int rows) const;
  std::shared_ptr<const ops::DecodePlan> make_plan(const AdapterWeights& adapter) const;
  LoraLinear with_adapter(int layer, Slot slot, const AdapterWeights& adapter) const;
  /// {layer, slot} of a linear by path; Error not_found.
  std::pair<size_t, size_t> linear_index(std::string_view path) const;
  float attention_scale() const;

  ModelConfig config_;
  mlx::core::Dtype dtype_ = mlx::core::bfloat16;
  std::filesystem::path path_;
  std::vector<Layer> layers_;
  Weight embedding_, head_;
  std::optional<mlx::core::array> final_norm_;
};

}  // namespace metal_lora
