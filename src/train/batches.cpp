// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/batches.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "src/train/rng.h"

namespace metal_lora::train {
namespace {

/// Fisher-Yates; std::shuffle differs between standard libraries.
template <class T>
void shuffle(std::vector<T>& items, uint64_t key) {
  for (size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[random_below(key, i, i)]);
  }
}

/// Inputs that a sample adds to a stream.
size_t stream_tokens(const Dataset& dataset, uint32_t sample) {
  return dataset.sample(sample).tokens.size() - 1;
}

using Units = std::vector<std::vector<uint32_t>>;

/// Best fit: each sample goes to the fullest open stream that holds it. O(n log n).
Units pack_streams(const Dataset& dataset, const std::vector<uint32_t>& order, size_t max_tokens) {
  Units streams;
  std::multimap<size_t, size_t> by_room;  // room left -> stream
  for (const uint32_t sample : order) {
    const size_t need = stream_tokens(dataset, sample);
    auto at = by_room.lower_bound(need);
    size_t room = 0, stream = 0;
    if (at == by_room.end()) {
      stream = streams.size();
      streams.emplace_back();
      room = std::max(max_tokens, need);
    } else {
      room = at->first;
      stream = at->second;
      by_room.erase(at);
    }
    streams[stream].push_back(sample);
    if (room > need) by_room.emplace(room - need, stream);
  }
  return streams;
}

/// Cuts units into groups of `size`; the incomplete one, if any, stands at `partial`.
std::vector<Units> cut(Units units, size_t size, size_t partial) {
  std::vector<Units> groups;
  const size_t rest = units.size() % size;
  for (size_t begin = 0; begin < units.size();) {
    const size_t wanted = rest != 0 && groups.size() == partial ? rest : size;
    const size_t end = std::min(units.size(), begin + wanted);
    groups.emplace_back(
        std::make_move_iterator(units.begin() + static_cast<std::ptrdiff_t>(begin)),
        std::make_move_iterator(units.begin() + static_cast<std::ptrdiff_t>(end)));
    begin = end;
  }
  return groups;
}

}  // namespace

MicroBatch make_micro_batch(const Dataset& dataset, std::span<const uint32_t> samples) {
  MicroBatch out;
  for (const uint32_t index : samples) {
    const Sample sample = dataset.sample(index);
    const int32_t start = static_cast<int32_t>(out.tokens.size());
    const int32_t inputs = static_cast<int32_t>(sample.tokens.size()) - 1;
    for (int32_t i = 0; i < inputs; ++i) {
      out.tokens.push_back(sample.tokens[static_cast<size_t>(i)]);
      out.targets.push_back(sample.tokens[static_cast<size_t>(i) + 1]);
      out.positions.push_back(i);
      out.segment_start.push_back(start);
      out.weights.push_back(i + 1 >= sample.prompt_tokens ? 1.0f : 0.0f);
    }
    out.trained_tokens += sample.trained_tokens();
    out.sample_tokens += inputs + 1;
  }
  return out;
}

std::vector<StepSamples> plan_epoch(
    const Dataset& dataset, const BatchOptions& options, uint64_t epoch) {
  std::vector<uint32_t> order(dataset.size());
  std::iota(order.begin(), order.end(), 0u);
  shuffle(order, random_key(options.seed, "sample order", epoch));

  Units units;
  if (options.packing) {
    units = pack_streams(dataset, order, static_cast<size_t>(options.max_seq_length));
    shuffle(units, random_key(options.seed, "stream order", epoch));
  } else {
    // Stable: samples of equal length stay shuffled.
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return dataset.sample(a).tokens.size() < dataset.sample(b).tokens.size();
    });
    for (const uint32_t sample : order) units.push_back({sample});
  }

  const size_t batch = static_cast<size_t>(options.batch_size);
  const size_t step = batch * static_cast<size_t>(options.grad_accumulation_steps);
  const size_t count = (units.size() + step - 1) / step;
  const uint64_t key = random_key(options.seed, "step order", epoch);
  // Were it always the last, the longest samples would always train in the small step.
  auto groups = cut(std::move(units), step, random_below(key, 0, count));
  shuffle(groups, key);

  std::vector<StepSamples> steps(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    for (size_t j = 0; j < groups[i].size(); ++j) {
      if (j % batch == 0) steps[i].emplace_back();
      auto& micro = steps[i].back();
      micro.insert(micro.end(), groups[i][j].begin(), groups[i][j].end());
    }
  }
  return steps;
}

StepSamples plan_evaluation(const Dataset& dataset, int batch_size, int batches) {
  std::vector<uint32_t> order(dataset.size());
  std::iota(order.begin(), order.end(), 0u);
  const size_t batch = static_cast<size_t>(batch_size);
  if (batches >= 0 && batch * static_cast<size_t>(batches) < order.size()) {
    shuffle(order, random_key(0, "evaluation"));
    order.resize(batch * static_cast<size_t>(batches));
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return dataset.sample(a).tokens.size() < dataset.sample(b).tokens.size();
  });
  StepSamples out;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i % batch == 0) out.emplace_back();
    out.back().push_back(order[i]);
  }
  return out;
}

int64_t largest_micro_batch(const Dataset& dataset, const BatchOptions& options) {
  std::vector<int64_t> lengths(dataset.size());
  for (uint32_t i = 0; i < lengths.size(); ++i) {
    lengths[i] = static_cast<int64_t>(stream_tokens(dataset, i));
  }
  if (options.packing) {
    const int64_t all = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    return std::min(all, int64_t{options.batch_size} * options.max_seq_length);
  }
  const size_t count = std::min(lengths.size(), static_cast<size_t>(options.batch_size));
  std::partial_sort(
      lengths.begin(),
      lengths.begin() + static_cast<std::ptrdiff_t>(count),
      lengths.end(),
      std::greater<>());
  return std::accumulate(
      lengths.begin(), lengths.begin() + static_cast<std::ptrdiff_t>(count), int64_t{0});
}

}  // namespace metal_lora::train
