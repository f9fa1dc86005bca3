// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tensor-core product of gemm.h on Hopper: persistent blocks of one warp that feeds a ring of
// swizzled shared-memory stages through the copy engine, and two warpgroups that each hold a
// 64-row half of a tile in registers and multiply straight from the ring (wgmma). The ring does
// not stop between tiles or between the pairs of a tile: the low-rank pair is a few more
// instructions on the same sums, not another kernel.
//
// Ladder, one H100 of 700 W, bf16, random operands; TFLOP/s at M = K = N = 4096 and at M = 512,
// K = 8192, N = 2048 (the best of cuBLASLt's four suggestions in the same runs: 680 to 790, 560 to
// 620; both swing with the heat, so the benchmark replays them in turns):
//   v1  445, 150  TMA ring, two consumers, 128x256; arrivals at release.cluster put a membar.gpu
//                 into the main loop, and branches between wgmma spilled its sums
//   v2  675, 481  arrivals of the default scope; straight groups of wgmma
//   v3  720, 530  a warp stores its rows alone, without a barrier of the warpgroup; k in two
//   v4  740, 520  one fence for all boxes of a tile, no wait for the copy engine's reads
//   v5  a kernel for each of the common ends, u's end a loop, k in parts apart: 30 to 62 KB of
//       instructions instead of 65 to 168. What counts is a chain: a launch whose instructions lie
//       in no cache waits for them. µs of two products in turns (y, then dx; cuBLAS's the same
//       way), no adapter: 512 x 4096 x 4096 63.0 -> 56.1 (54.0); 4096 x 2048 x 2048 119 -> 104.6
//       (105.8); one of them alone 29.1 -> 28.2 and 55.8 -> 53.0. Rank 16, y with u and dx with v,
//       1.33 -> 1.03 of cuBLAS's. Tiles of 128x176, two waves of 126 clusters at 512 x 4096 x
//       11008: 81.7 -> 75.4 alone.
// Tried and left: three stages of 128x256 and room for all results (-2 %: loads come late); a lead
// of one or two steps for the first consumer (nothing: four stages do not hold it); results without
// shared memory (-2 %); clusters of four for 128x128 with k in two (-45 %: too few fit at once); no
// programmatic launch (-2 % to -15 % at M = 512).
// A rank-16 pair costs 1 to 2 % of the base, 1 to 7 % before v5 (a whole stage of loads). Where
// gemm_hides_shrinks, u made in the same launch costs up to 3 % more (q, k, v of 3072 columns: 7 %
// at rank 16, 17 % at rank 64), and a shrink ahead 3 to 18 %: 1.02 of the base instead of 1.12 at
// M = K = N = 4096 and rank 16. At M = 512, K = N = 4096, four multiprocessors without a tile make
// u: 1.03 of the base at rank 16, 1.05 at rank 64.
// Rows of x beyond m are not asked for: zeros cost the copy engine more than rows (M = 64,
// N = 11008: 36.6 instead of 43.8 µs). Asking L2 for W's first steps before the wait: -3 %; filling
// the first stages with it: -3 %, too (27.1 to 27.9 µs at M = 512), x comes behind it then.
// The main loop takes 1025 cycles a step of 128x256x64, and the matrix unit needs 1024: long
// products run at the clock that the power allows (1.1 to 1.4 GHz seen under load, 1.98 without).
// The next 10 % at M = 512: the ends' and starts' 3 µs of a launch (a stage comes 1 µs after the
// wait, the end takes 1, the next kernel's wait 0.7), two tiles of which each would hide the
// other's end, and waves that fit (k in more parts: 512 x 8192 x 2048 takes 33.0 µs where cuBLAS
// takes 28.7); narrow tiles are at the limit of shared memory (128x64: 56 KB a step of 256 cycles).
#include <algorithm>
#include <array>

#include "kernels/cuda/gemm_sm90_launch.h"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda {
namespace sm90 {
namespace {

/// A tile width and cluster, and what a step of 64 along k costs a block (measured at M = 4096 and
/// 512).
struct Form {
  const char* name;
  int tile_n;
  uint32_t cluster_m, cluster_n, cluster_k;
  float step_ns;
  float tile_ns;  ///< fill, drain and epilogue of a tile
};
constexpr Form kForms[] = {
    {"128x256, cluster 2x1", 256, 2, 1, 1, 705, 700},
    {"128x256", 256, 1, 1, 1, 720, 700},
    {"128x192, cluster 2x1", 192, 2, 1, 1, 555, 500},
    {"128x192", 192, 1, 1, 1, 560, 500},
    {"128x176, cluster 2x1", 176, 2, 1, 1, 512, 500},
    {"128x128, cluster 2x1", 128, 2, 1, 1, 365, 700},
    {"128x128, cluster 1x2", 128, 1, 2, 1, 390, 700},
    {"128x128", 128, 1, 1, 1, 390, 700},
    {"128x64, cluster 1x2", 64, 1, 2, 1, 240, 700},
    {"128x64", 64, 1, 1, 1, 236, 600},
    {"128x256, k in two", 256, 1, 1, 2, 800, 2500},
    {"128x128, k in two", 128, 1, 1, 2, 423, 3300},
};

/// A step of a narrow tile, and what a shrink of its own costs when the product begins meanwhile.
constexpr float kNarrowStepNs = 235;
constexpr float kShrinkNs = 3000;
/// A column of a tile whose residual comes from memory at its end.
constexpr float kResidualNs = 10;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

uint32_t tiles_of(const GemmGroup& group, const Form& form) {
  uint32_t columns = 0;
  for (int i = 0; i < group.problems; ++i) {
    columns += ceil_div(group.problem[i].n, form.tile_n * form.cluster_n);
  }
  if (group.end == GemmEnd::swiglu) columns = ceil_div(group.problem[0].n, kGateColumns);
  return columns * ceil_div(group.m, kTileM * form.cluster_m);
}

/// The end of the same results in the fewest instructions. A residual comes through shared memory
/// where there is room.
GemmEnd end_of(const GemmGroup& group, const Form& form) {
  if (group.end != GemmEnd::plain || group.out_dtype == DType::f32) return group.end;
  bool terms = false;
  int residuals = 0, others = 0;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    if (problem.n % 8 != 0) return GemmEnd::plain;
    terms = terms || problem.bias || problem.rope || problem.row_factors;
    residuals += problem.residual != nullptr;
    others += problem.rope || problem.row_factors;
  }
  if (residuals == 0 && !terms) return GemmEnd::store;
  if (form.cluster_k > 1) return GemmEnd::plain;
  if (residuals == 0) return GemmEnd::terms;
  const bool fits = form.tile_n == 128 && residuals == group.problems && others == 0;
  return fits ? GemmEnd::residual : GemmEnd::plain;
}

/// Blocks that split k have one tile each; shrinks want rows of their own.
bool fits(const Context& context, const GemmGroup& group, const Form& form) {
  if (group.end != GemmEnd::plain &&
      (form.tile_n != end_width(group.end) || form.cluster_n > 1 || form.cluster_k > 1)) {
    return false;
  }
  for (int i = 0; i < group.problems; ++i) {  // whole heads a tile
    if (group.problem[i].rope && form.tile_n % group.problem[i].head_dim != 0) return false;
  }
  if (form.tile_n % 64 != 0 && end_of(group, form) != GemmEnd::store) return false;
  if (group.shrinks > 0 && (form.cluster_k > 1 || form.cluster_n > 1)) return false;
  return form.cluster_k == 1 ||
         tiles_of(group, form) * form.cluster_m * form.cluster_n * form.cluster_k <=
             static_cast<uint32_t>(context.multiprocessors);
}

uint32_t slots_of(const Context& context, const Form& form) {
  return context.multiprocessors / (form.cluster_m * form.cluster_n * form.cluster_k);
}
uint32_t narrow_tiles(const GemmGroup& group, const Form& form) {
  return group.shrinks * ceil_div(group.m, kTileM * form.cluster_m);
}
/// Clusters that have a run of tiles fewer than the others, or none.
uint32_t spare_clusters(
    const Context& context, const GemmGroup& group, const Form& form, uint32_t run_log2) {
  const uint32_t slots = slots_of(context, form);
  return slots - (tiles_of(group, form) >> run_log2) % slots;
}
/// Whether the spare clusters make u within the time of a tile, when the first of them ask for it.
bool shrinks_hide(
    const Context& context, const GemmGroup& group, const Form& form, uint32_t run_log2) {
  const uint32_t spare = spare_clusters(context, group, form, run_log2);
  return kNarrowStepNs * ceil_div(narrow_tiles(group, form), spare) <= form.step_ns;
}
/// Tiles side by side that a cluster takes one after another, so that their shares of act·shrinkᵀ
/// are one part: as many as cost no wave and leave the clusters that make u.
uint32_t run_log2_of(const Context& context, const GemmGroup& group, const Form& form) {
  if (group.end != GemmEnd::swiglu || group.swiglu.parts == nullptr) return 0;
  const uint32_t slots = slots_of(context, form), tiles = tiles_of(group, form);
  const uint32_t columns = ceil_div(group.problem[0].n, kGateColumns);
  uint32_t best = 0;
  for (uint32_t log2 = 1; columns % (1u << log2) == 0; ++log2) {
    if (ceil_div(tiles >> log2, slots) << log2 > ceil_div(tiles, slots)) break;
    if (shrinks_hide(context, group, form, 0) && !shrinks_hide(context, group, form, log2)) break;
    best = log2;
  }
  return best;
}

struct Choice {
  const Form* form = nullptr;
  float ns = 0.0f;
};
/// The form with the least waves · (steps · cost + fixed cost). With shrinks: of those that hide
/// them; none where none does.
Choice choose_form(const Context& context, const GemmGroup& group) {
  float steps = 0.0f;  // of a tile, weighted by n
  float columns = 0.0f;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    float k = 0.0f;
    for (int p = 0; p < problem.pairs; ++p) k += problem.pair[p].k;
    steps += k / kStepK * problem.n;
    columns += problem.n;
  }
  steps /= columns;
  const bool residual = group.problem[0].residual != nullptr;
  Choice best;
  for (const Form& form : kForms) {
    if (!fits(context, group, form)) continue;
    const uint32_t run_log2 = run_log2_of(context, group, form);
    if (group.shrinks > 0 && !shrinks_hide(context, group, form, run_log2)) continue;
    const float waves = ceil_div(tiles_of(group, form), slots_of(context, form));
    float tile_ns = form.tile_ns;
    if (residual && end_of(group, form) == GemmEnd::plain) tile_ns += kResidualNs * form.tile_n;
    const float ns = waves * (steps / form.cluster_k * form.step_ns + tile_ns);
    if (best.form == nullptr || ns < best.ns) best = {&form, ns};
  }
  return best;
}
/// The same, or the first form that fits where none hides the shrinks.
const Form& some_form(const Context& context, const GemmGroup& group) {
  const Choice choice = choose_form(context, group);
  if (choice.form) return *choice.form;
  return *std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& form) {
    return fits(context, group, form);
  });
}

/// Puts maps into the arguments; an operand that several problems share has one.
class Maps {
 public:
  Maps(Args& args, DType dtype) : args_(args), dtype_(dtype) {}
  uint16_t add(const void* data, uint32_t rows, uint32_t columns, size_t stride, uint32_t box) {
    const TensorMapRequest request{data, dtype_, rows, columns, stride, box};
    for (uint16_t i = 0; i < count_; ++i) {
      const TensorMapRequest& other = requests_[i];
      if (other.data == data && other.rows == rows && other.columns == columns &&
          other.stride == stride && other.box_rows == box) {
        return i;
      }
    }
    requests_[count_] = request;
    args_.maps[count_] = make_tensor_map(request);
    args_.map_count = ++count_;
    return count_ - 1;
  }

 private:
  Args& args_;
  DType dtype_;
  uint16_t count_ = 0;
  std::array<TensorMapRequest, kMaxMaps> requests_;
};

/// Gate and up as one problem of tiles that hold 128 columns of each; low-rank pairs of one have
/// zeros for the other.
void fill_gate_up(Args& args, Maps& maps, const GemmGroup& group, uint32_t left_box) {
  const GemmProblem& gate = group.problem[0];
  const GemmProblem& up = group.problem[1];
  ProblemArgs& to = args.problem[0];
  to.n = gate.n;
  to.tiles_n = args.tiles_n = ceil_div(gate.n, kGateColumns);
  to.bias = gate.bias;
  to.up_bias = up.bias;
  const auto add = [&](const GemmPair& left, const GemmPair* of_gate, const GemmPair* of_up) {
    if (left.k == 0) return;
    const auto right = [&](const GemmPair* pair) {
      const GemmPair& some = pair ? *pair : left;
      return maps.add(some.right, gate.n, some.k, some.right_stride, kGateColumns);
    };
    PairArgs& pair = args.pair[to.end_pair++];
    pair.k = left.k;
    pair.left_map = maps.add(left.left, group.m, left.k, left.left_stride, left_box);
    pair.right_map = right(of_gate);
    pair.up_map = right(of_up);
    pair.has_gate = of_gate != nullptr;
    pair.has_up = of_up != nullptr;
    to.steps += ceil_div(left.k, kStepK);
  };
  add(gate.pair[0], &gate.pair[0], &up.pair[0]);
  for (int p = 1; p < gate.pairs; ++p) add(gate.pair[p], &gate.pair[p], nullptr);
  for (int p = 1; p < up.pairs; ++p) add(up.pair[p], nullptr, &up.pair[p]);
  args.swiglu = group.swiglu;
  const GemmSwiglu& s = args.swiglu;
  if (s.gate) args.gate_map = maps.add(s.gate, group.m, gate.n, s.stride, 16);
  args.act_map = maps.add(s.act, group.m, gate.n, s.act_stride, 16);
  if (!s.parts) return;
  args.shrink_map = maps.add(s.shrink, s.shrink_rank, gate.n, s.shrink_stride, s.shrink_rank);
}

void fill_problems(
    Args& args, Maps& maps, const GemmGroup& group, const Form& form, uint32_t left_box) {
  const uint32_t right_box = (group.right_is_kn ? kStepK : form.tile_n) / form.cluster_m;
  int problems = 0;
  uint32_t pairs = 0;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& from = group.problem[i];
    if (from.n == 0) continue;
    ProblemArgs& to = args.problem[problems++];
    to.n = from.n;
    to.tiles_n = ceil_div(from.n, form.tile_n * form.cluster_n);
    args.tiles_n += to.tiles_n;
    to.first_pair = pairs;
    for (int p = 0; p < from.pairs; ++p) {
      const GemmPair& pair = from.pair[p];
      if (pair.k == 0) continue;
      PairArgs& pair_args = args.pair[pairs++];
      pair_args.k = pair.k;
      to.steps += ceil_div(pair.k, kStepK);
      pair_args.left_map = maps.add(pair.left, group.m, pair.k, pair.left_stride, left_box);
      pair_args.right_map =
          group.right_is_kn ? maps.add(pair.right, pair.k, from.n, pair.right_stride, right_box)
                            : maps.add(pair.right, from.n, pair.k, pair.right_stride, right_box);
    }
    if (pairs == to.first_pair) {  // no products: one slice of zeros
      const uint16_t nowhere = maps.add(from.out, 1, 8, 8, left_box);
      const uint16_t right_nowhere = maps.add(from.out, 1, 8, 8, right_box);
      args.pair[pairs++] = {kStepK, 1, nowhere, right_nowhere};
      to.steps = 1;
    }
    to.end_pair = pairs;
    to.out = from.out;
    to.out_stride = from.out_stride;
    to.bias = from.bias;
    to.residual = from.residual;
    to.residual_stride = from.residual_stride;
    to.rope = from.rope;
    to.head_dim = from.head_dim;
    to.row_factors = from.row_factors;
    if (group.end == GemmEnd::swiglu_backward) {
      const GemmSwiglu& s = args.swiglu = group.swiglu;
      args.gate_map = maps.add(s.gate, group.m, from.n, s.stride, 16);
      args.up_map = maps.add(s.up, group.m, from.n, s.stride, 16);
      continue;
    }
    args.softmax = group.softmax;
    if (args.out_f32 || from.out == nullptr) continue;
    to.out_map = maps.add(from.out, group.m, from.n, from.out_stride, 16);
    if (!from.residual) continue;
    to.reads_ahead = end_of(group, form) == GemmEnd::plain;
    const uint32_t rows = to.reads_ahead ? kTileM : 16;
    to.residual_map = maps.add(from.residual, group.m, from.n, from.residual_stride, rows);
  }
}

void fill_args(
    const Context& context, Args& args, Maps& maps, const GemmGroup& group, const Form& form) {
  args.m = group.m;
  args.cluster_m = form.cluster_m;
  args.cluster_n = form.cluster_n;
  args.cluster_k = form.cluster_k;
  args.tiles_m = ceil_div(group.m, kTileM * form.cluster_m);
  args.pair0_ready = group.pair0_ready;
  args.late_dependents = group.late_dependents;
  args.out_f32 = group.out_dtype == DType::f32;
  if (group.m < kTileM && form.cluster_m == 1) args.tile_rows = ceil_div(group.m, 16) * 16;
  const uint32_t left_box = args.tile_rows / form.cluster_n;
  if (group.end == GemmEnd::swiglu) {
    fill_gate_up(args, maps, group, left_box);
  } else {
    fill_problems(args, maps, group, form, left_box);
  }
  args.run_log2 = run_log2_of(context, group, form);
  args.clusters = std::min(slots_of(context, form), args.tiles_m * args.tiles_n >> args.run_log2);
  // About as many rows as columns of tiles are in flight: each operand is read from memory once.
  args.band = std::min(args.tiles_m, 8u);
}

void fill_shrinks(
    const Context& context, Args& args, Maps& maps, const GemmGroup& group, const Form& form) {
  if (group.shrinks == 0) return;
  for (int i = 0; i < group.shrinks; ++i) {
    const GemmShrink& from = group.shrink[i];
    ShrinkArgs& to = args.shrink[args.shrinks++];
    to.k = from.k;
    to.left_map = maps.add(from.left, group.m, from.k, from.left_stride, args.tile_rows);
    to.bytes = args.tile_rows * kStepK * 2;
    std::fill(std::begin(to.part_of_block), std::end(to.part_of_block), kMaxParts);
    uint32_t block = 0;
    for (int p = 0; p < from.parts; ++p) {
      const GemmShrink::Part& part = from.part[p];
      if (part.rank == 0) continue;
      const uint32_t blocks = ceil_div(part.rank, 8);
      to.part[to.parts] = part;
      to.first_block[to.parts] = block;
      to.right_map[to.parts] =
          group.right_is_kn
              ? maps.add(part.right, from.k, part.rank, part.right_stride, kStepK)
              : maps.add(part.right, part.rank, from.k, part.right_stride, 8 * blocks);
      if (group.right_is_kn && part.rank == 8 && part.right_stride == 8 && from.k % 128 == 0) {
        to.rows = part.right;
      }
      to.bytes += to.rows ? kRowsBytes : group.right_is_kn ? kBoxBytes : blocks * 1024;
      for (uint32_t b = 0; b < blocks; ++b) to.part_of_block[block + b] = to.parts;
      block += blocks;
      ++to.parts;
    }
  }
  args.flag_count = gemm_flag_count(group.m) / 2;
  args.flags = group.flags;
  if (args.flags == nullptr) {
    const size_t bytes = gemm_flag_count(group.m) * sizeof(uint32_t);
    args.flags = static_cast<uint32_t*>(context.scratch->take(bytes));
    check(cudaMemsetAsync(args.flags, 0, bytes, context.stream), "gemm_sm90 flags");
  }
  const uint32_t slots = slots_of(context, form), narrow = narrow_tiles(group, form);
  const bool hide = shrinks_hide(context, group, form, args.run_log2);
  const uint32_t spare = spare_clusters(context, group, form, args.run_log2);
  args.shrink_clusters = std::min(hide ? spare : slots, narrow);
  args.clusters = std::min(slots, args.clusters + args.shrink_clusters);
}

}  // namespace

/// Whether a group has nothing to write.
bool is_empty(const GemmGroup& group) {
  uint32_t columns = 0;
  for (int i = 0; i < group.problems; ++i) columns += group.problem[i].n;
  return group.m == 0 || columns == 0;
}

/// For the bench and the tests: takes form `form` of the table (-1: the cheapest).
int form_count() {
  return static_cast<int>(std::size(kForms));
}
const char* form_name(int form) {
  return kForms[form].name;
}
bool form_fits(const Context& context, const GemmGroup& group, int form) {
  return fits(context, group, kForms[form]);
}
int chosen_form(const Context& context, const GemmGroup& group) {
  return static_cast<int>(&some_form(context, group) - kForms);
}
uint32_t act_parts_with_form(const Context& context, const GemmGroup& group, int form_index) {
  const Form& form = form_index < 0 ? some_form(context, group) : kForms[form_index];
  return ceil_div(group.problem[0].n, kGateColumns) >> run_log2_of(context, group, form);
}
void gemm_with_form(const Context& context, const GemmGroup& group, int form_index) {
  if (is_empty(group)) return;
  const Form& form = form_index < 0 ? some_form(context, group) : kForms[form_index];
  Args args;
  Maps maps(args, group.dtype);
  fill_args(context, args, maps, group, form);
  fill_shrinks(context, args, maps, group, form);
  const GemmEnd end = end_of(group, form);
  const Kernel kernel = {form.tile_n, group.right_is_kn, end};
  group.dtype == DType::bf16 ? launch_bf16(context, kernel, args)
                             : launch_f16(context, kernel, args);
}
}  // namespace sm90

namespace {

bool can_shrink(const GemmGroup& group, const GemmShrink& shrink) {
  uint32_t columns = 0;
  if (shrink.k == 0 || !is_aligned(shrink.left) || shrink.left_stride % 8 != 0) return false;
  if (group.right_is_kn && shrink.parts > 1) return false;
  for (int p = 0; p < shrink.parts; ++p) {
    const GemmShrink::Part& part = shrink.part[p];
    if (!is_aligned(part.right) || part.right_stride % 8 != 0 || !is_aligned(part.out) ||
        part.out_stride % 8 != 0) {
      return false;
    }
    columns += (part.rank + 7) / 8 * 8;
  }
  return columns > 0 && columns <= 64;
}

/// For the pairs and for a tensor map of each operand.
bool has_room(const GemmGroup& group) {
  int pairs = 0, others = 2 * group.problems + group.shrinks + (group.swiglu.parts != nullptr);
  for (int i = 0; i < group.problems; ++i) pairs += std::max(group.problem[i].pairs, 1);
  for (int i = 0; i < group.shrinks; ++i) others += group.shrink[i].parts;
  return pairs <= sm90::kMaxPairs && 2 * pairs + others <= sm90::kMaxMaps;
}

bool can_swiglu(const GemmGroup& group) {
  const GemmSwiglu& s = group.swiglu;
  const GemmProblem& first = group.problem[0];
  if (group.out_dtype != group.dtype || first.n % 8 != 0 || s.stride % 8 != 0 ||
      s.act_stride % 8 != 0 || !is_aligned(s.gate) || !is_aligned(s.up) || !is_aligned(s.act)) {
    return false;
  }
  if (group.end == GemmEnd::swiglu_backward) {
    return group.right_is_kn && group.problems == 1 && s.gate && s.up && !first.bias &&
           !first.residual;
  }
  const GemmProblem& second = group.problem[1];
  if (s.parts &&
      (!s.shrink || !is_aligned(s.shrink) || !is_aligned(s.parts) || s.shrink_stride % 8 != 0 ||
       s.shrink_rank == 0 || s.shrink_rank % 8 != 0 || s.shrink_rank > 64)) {
    return false;
  }
  return !group.right_is_kn && group.problems == 2 && s.act && !s.gate == !s.up &&
         first.n == second.n && first.pairs > 0 && second.pairs > 0 &&
         first.pair[0].left == second.pair[0].left && first.pair[0].k == second.pair[0].k &&
         first.pair[0].k > 0 && !first.residual && !second.residual;
}
bool can_softmax(const GemmGroup& group) {
  const GemmProblem& p = group.problem[0];
  if (group.end == GemmEnd::exponential &&
      (group.dtype != DType::bf16 || !group.softmax.references)) {
    return false;
  }
  return group.out_dtype == group.dtype && !group.right_is_kn && group.problems == 1 &&
         p.pairs > 0 && p.pair[0].k > 0 && p.n % 8 == 0 && !p.bias && !p.residual && !p.rope &&
         group.softmax.tiles && group.softmax.targets && group.softmax.target_logits;
}
bool can_end(const GemmGroup& group) {
  switch (group.end) {
    case GemmEnd::plain:
      return true;
    case GemmEnd::store:  // its own choices
    case GemmEnd::terms:
    case GemmEnd::residual:
      return false;
    case GemmEnd::softmax:
    case GemmEnd::exponential:
      return can_softmax(group);
    default:
      return can_swiglu(group);
  }
}
bool can_rotate(const GemmGroup& group, const GemmProblem& problem) {
  if (!problem.rope) return true;
  return group.end == GemmEnd::plain && group.out_dtype == group.dtype &&
         is_aligned(problem.rope) && (problem.head_dim == 64 || problem.head_dim == 128) &&
         problem.n % problem.head_dim == 0;
}
}  // namespace

bool can_gemm_sm90(const Context& context, const GemmGroup& group) {
  if (context.capability != 90 || group.dtype == DType::f32) return false;
  if (group.out_dtype != group.dtype && group.out_dtype != DType::f32) return false;
  if (!can_end(group) || !has_room(group)) return false;
  for (int i = 0; i < group.shrinks; ++i) {
    if (!can_shrink(group, group.shrink[i])) return false;
  }
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    if (!can_rotate(group, problem)) return false;
    if (problem.row_factors && group.end != GemmEnd::plain) return false;
    if (!is_aligned(problem.out) || !is_aligned(problem.bias) || !is_aligned(problem.residual) ||
        problem.out_stride % 8 != 0 || problem.residual_stride % 8 != 0) {
      return false;
    }
    for (int p = 0; p < problem.pairs; ++p) {
      const GemmPair& pair = problem.pair[p];
      if (!is_aligned(pair.left) || !is_aligned(pair.right) || pair.left_stride % 8 != 0 ||
          pair.right_stride % 8 != 0) {
        return false;
      }
    }
  }
  return true;
}

uint32_t gemm_act_parts(const Context& context, const GemmGroup& group) {
  return sm90::act_parts_with_form(context, group, -1);
}

bool gemm_hides_shrinks(const Context& context, const GemmGroup& group) {
  if (!can_gemm_sm90(context, group) || sm90::is_empty(group)) return false;
  GemmGroup base = group;
  base.shrinks = 0;
  const sm90::Choice inside = sm90::choose_form(context, group);
  // A launch of its own finds room beside few tiles, and is over before a narrow tile is.
  if (inside.form &&
      2 * sm90::tiles_of(group, *inside.form) <= sm90::slots_of(context, *inside.form) &&
      inside.form->step_ns < 1.5f * sm90::kNarrowStepNs) {
    return false;
  }
  return inside.form && inside.ns <= sm90::choose_form(context, base).ns + sm90::kShrinkNs;
}

void gemm_sm90(const Context& context, const GemmGroup& group) {
  if (!can_gemm_sm90(context, group)) {
    throw std::invalid_argument(
        "[gemm] group must be 16-bit on compute capability 9.0 with pointers aligned to 16 bytes "
        "and strides that are multiples of 8, but is not");
  }
  sm90::gemm_with_form(context, group, -1);
}

}  // namespace metal_lora::cuda
