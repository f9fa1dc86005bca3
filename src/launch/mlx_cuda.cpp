// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Launching through MLX costs what its own kernels cost: a capture, a child node, and a share of
// one graph launch every 100 nodes (not measured here).
#include "src/launch/mlx_cuda.h"

#include <dlfcn.h>

#include <mlx/backend/cuda/cuda.h>
#include <mlx/version.h>

#include "metal_lora/error.h"

namespace mx = mlx::core;

namespace metal_lora::mlx_cuda {
namespace {

constexpr const char* kGetCommandEncoder = "_ZN3mlx4core2cu19get_command_encoderENS0_6StreamE";

/// libmlx's handle: it may have been loaded for a Python module alone, where a search of the whole
/// process would not find it.
void* library() {
  static void* const handle = [] {
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(&mx::cu::is_available), &info) == 0) return RTLD_DEFAULT;
    void* found = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return found == nullptr ? RTLD_DEFAULT : found;
  }();
  return handle;
}

}  // namespace

bool mlx_has_cuda() {
  static const bool has = dlsym(library(), kGetCommandEncoder) != nullptr;
  return has;
}

}  // namespace metal_lora::mlx_cuda

#ifndef METAL_LORA_CUDA

namespace metal_lora::mlx_cuda {

const Availability& availability() {
  static const Availability none{
      false,
      "this build has no CUDA kernels",
      "build with -DMETAL_LORA_CUDA=ON: it needs nvcc, from NVIDIA's or Debian's packages or from "
      "`pip install nvidia-cuda-nvcc`"};
  return none;
}

std::vector<Gpu> gpus() {
  return {};
}

std::string kernel_architectures() {
  return "";
}

void evaluate(mx::Stream, std::shared_ptr<const Launch> launch, const Arrays&, Arrays&) {
  throw Error(
      ErrorCode::unsupported,
      std::string("[") + launch->kernel + "] has no GPU kernel in this build",
      "run on the CPU stream");
}

}  // namespace metal_lora::mlx_cuda

#else

#include <mutex>
#include <new>

#include <cuda_runtime.h>
#include <fmt/format.h>
#include <mlx/backend/cuda/device.h>

#include "kernels/cuda/context.h"
#include "kernels/cuda/strided_copy.h"
#include "src/launch/device_memory.h"
#include "src/launch/donation.h"

namespace metal_lora::mlx_cuda {
namespace {

using Encoder = mx::cu::CommandEncoder;

/// What only MLX's CUDA flavour exports, by mangled name. Complete object constructors and
/// destructors take `this` alone beside their arguments (Itanium ABI).
struct Symbols {
  Encoder& (*get_command_encoder)(mx::Stream) = nullptr;
  void (*set_input_array)(Encoder*, const mx::array&) = nullptr;
  void (*set_output_array)(Encoder*, const mx::array&) = nullptr;
  void (*begin_capture)(void* context, Encoder&) = nullptr;
  void (*end_capture)(void* context) = nullptr;
  void (*commit)(Encoder*) = nullptr;
  void (*synchronize)(Encoder*) = nullptr;
  void (*add_completed_handler)(Encoder*, std::function<void()>) = nullptr;
  std::string missing;

  Symbols() {
    find(get_command_encoder, kGetCommandEncoder);
    find(set_input_array, "_ZN3mlx4core2cu14CommandEncoder15set_input_arrayERKNS0_5arrayE");
    find(set_output_array, "_ZN3mlx4core2cu14CommandEncoder16set_output_arrayERKNS0_5arrayE");
    find(begin_capture, "_ZN3mlx4core2cu14CommandEncoder14CaptureContextC1ERS2_");
    find(end_capture, "_ZN3mlx4core2cu14CommandEncoder14CaptureContextD1Ev");
    find(commit, "_ZN3mlx4core2cu14CommandEncoder6commitEv");
    find(synchronize, "_ZN3mlx4core2cu14CommandEncoder11synchronizeEv");
    find(
        add_completed_handler,
        "_ZN3mlx4core2cu14CommandEncoder21add_completed_handlerESt8functionIFvvEE");
  }

 private:
  template <class Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library(), name));
    if (function == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
  }
};

const Symbols& mlx_symbols() {
  static const Symbols symbols;
  return symbols;
}

Availability find_out() {
  if (!mlx_has_cuda()) {
    return {
        false,
        "MLX is its CPU flavour",
        fmt::format("pip install 'mlx[cuda13]=={}'", METAL_LORA_MLX_VERSION)};
  }
  if (std::string_view(mx::version()) != METAL_LORA_MLX_VERSION) {
    return {
        false,
        fmt::format("MLX is {} but must be {}", mx::version(), METAL_LORA_MLX_VERSION),
        fmt::format("pip install 'mlx[cuda13]=={}'", METAL_LORA_MLX_VERSION)};
  }
  if (!mlx_symbols().missing.empty()) {
    return {
        false,
        "MLX's library does not export " + mlx_symbols().missing,
        "install MLX from its PyPI wheel"};
  }
  const auto found = gpus();
  if (found.empty()) {
    return {false, "CUDA finds no device", "`nvidia-smi` shows what the driver sees"};
  }
  constexpr int kLeastCapability = 80;
  if (found[0].capability < kLeastCapability) {
    return {
        false,
        fmt::format(
            "{} has compute capability {}.{}",
            found[0].name,
            found[0].capability / 10,
            found[0].capability % 10),
        "the kernels need 8.0 (Ampere) or later"};
  }
  return {true, "", ""};
}

using DeviceBytes = std::shared_ptr<void>;

/// Zeroed counters for kernels whose blocks hand out work. Nodes of one graph may run at the same
/// time, so each that is unfinished has its own; kernels leave them zero.
class Counters {
 public:
  DeviceBytes take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) free_.push_back(make());
    auto owner = std::move(free_.back());
    free_.pop_back();
    void* const words = owner.get();
    return {words, [this, owner = std::move(owner)](void*) mutable {
              std::lock_guard lock(mutex_);
              free_.push_back(std::move(owner));
            }};
  }

 private:
  static DeviceBytes make() {
    const std::vector<uint32_t> zeros(METAL_LORA_CUDA_COUNTERS, 0);
    auto words = allocate_device(zeros.size() * sizeof(uint32_t));
    upload_to(words.get(), zeros.data(), zeros.size() * sizeof(uint32_t));
    return words;
  }

  std::mutex mutex_;
  std::vector<DeviceBytes> free_;
};

/// Never destroyed: MLX's threads may finish nodes after main().
Counters& counter_pool() {
  static auto* pool = new Counters();
  return *pool;
}

/// Stays until the device is done with a node.
struct Node final : cuda::Scratch {
  std::shared_ptr<const Launch> launch;
  DeviceBytes counters = counter_pool().take();
  std::vector<DeviceBytes> taken;

  void* take(size_t bytes) override { return taken.emplace_back(allocate_device(bytes)).get(); }
};

/// MLX's CaptureContext: what is launched while it lives becomes a child graph, if finish() says
/// so. After an error the capture is ended here and thrown away: MLX's destructor would throw.
class Capture {
 public:
  explicit Capture(Encoder& encoder) : stream_(encoder.stream()) {
    mlx_symbols().begin_capture(storage_, encoder);
  }
  ~Capture() {
    if (finished_) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(stream_, &status);
    cudaGraph_t graph = nullptr;
    if (status != cudaStreamCaptureStatusNone) cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  void finish() {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
    if (status == cudaStreamCaptureStatusInvalidated) {
      throw cuda::CudaError("[cuda] a call that a capture does not allow");
    }
    finished_ = true;
    mlx_symbols().end_capture(storage_);
  }

 private:
  cudaStream_t stream_;
  bool finished_ = false;
  alignas(Encoder::CaptureContext) std::byte storage_[sizeof(Encoder::CaptureContext)];
};

bool can_take_buffer(
    const mx::array& input, const mx::array& output, const OutputSpec& spec, size_t outputs) {
  return is_held_by_node_alone(input, output, outputs) &&
         (spec.outlives_graph || input.data_shared_ptr().use_count() == 1);
}

/// The pointers of one launch and the copies that come before it.
class Arguments {
 public:
  Arguments(const Launch& launch, Node& node, const Arrays& inputs, Arrays& outputs)
      : inputs_(inputs) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      bind_output(outputs[i], launch.outputs[i], outputs.size());
    }
    for (const auto& input : inputs) {
      in_.push_back(device_pointer(input));
      if (input.flags().row_contiguous || input.size() == 0) continue;
      views_.push_back({in_.size() - 1, node.take(input.nbytes())});
    }
  }

  void run(const cuda::Context& context, const Launch& launch) {
    for (const auto& [input, to] : views_) {
      cuda::strided_copy(context, strides_of(inputs_[input]), in_[input], to);
      in_[input] = to;
    }
    for (const auto& [input, output, bytes] : copies_) {
      cuda::copy_bytes(context, bytes, in_[input], out_[output]);
    }
    launch.cuda(context, {in_, out_});
  }

 private:
  struct View {
    size_t input;
    void* to;
  };
  struct Copy {
    size_t input, output, bytes;
  };

  void bind_output(mx::array& output, const OutputSpec& spec, size_t outputs) {
    if (spec.in_place_of >= 0 &&
        can_take_buffer(inputs_[spec.in_place_of], output, spec, outputs)) {
      output.copy_shared_buffer(inputs_[spec.in_place_of]);
    } else {
      if (output.nbytes() <= kScalarBytes) {
        output.set_data(mx::allocator::malloc(output.nbytes()));
      } else {
        allocate_data(output);
      }
      if (spec.in_place_of >= 0) {
        copies_.push_back({static_cast<size_t>(spec.in_place_of), out_.size(), output.nbytes()});
      }
    }
    out_.push_back(device_pointer(output));
  }

  static cuda::StridedCopy strides_of(const mx::array& a) {
    cuda::StridedCopy p;
    if (a.ndim() > cuda::StridedCopy::kMaxDims) {
      throw Error(
          ErrorCode::unsupported,
          fmt::format(
              "[launch] a view must have at most {} dimensions but has {}",
              cuda::StridedCopy::kMaxDims,
              a.ndim()));
    }
    p.dims = static_cast<int>(a.ndim());
    p.item_bytes = static_cast<uint32_t>(a.itemsize());
    for (int d = 0; d < p.dims; ++d) {
      p.shape[d] = static_cast<uint32_t>(a.shape(d));
      p.strides[d] = a.strides()[d];
    }
    return p;
  }

  /// Up to here MLX has a pool of managed scalars, made for the host to read.
  static constexpr size_t kScalarBytes = 8;

  const Arrays& inputs_;
  std::vector<const void*> in_;
  std::vector<void*> out_;
  std::vector<View> views_;
  std::vector<Copy> copies_;
};

/// MLX counts only its own memory when it decides to wait for the device; what its unfinished
/// graphs hold of the pool would grow without bound.
void wait_where_memory_is_short(Encoder& encoder, const Arrays& outputs) {
  constexpr double kShare = 0.9;
  size_t wanted = 0;
  for (const auto& output : outputs) wanted += output.nbytes();
  const auto stats = device_memory_stats();
  if (static_cast<double>(stats.active_bytes + wanted) <
      kShare * static_cast<double>(stats.total_bytes)) {
    return;
  }
  mlx_symbols().commit(&encoder);
  mlx_symbols().synchronize(&encoder);
}

[[noreturn]] void rethrow(const char* kernel) {
  try {
    throw;
  } catch (const Error&) {
    throw;
  } catch (const std::invalid_argument& why) {
    throw Error(ErrorCode::unsupported, why.what(), "METAL_LORA_BACKEND=cpu takes all shapes");
  } catch (const std::exception& why) {
    throw Error(ErrorCode::internal, fmt::format("[{}] {}", kernel, why.what()));
  }
}

}  // namespace

const Availability& availability() {
  static const Availability found = find_out();
  return found;
}

std::vector<Gpu> gpus() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<Gpu> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    found.push_back(
        {properties.name,
         10 * properties.major + properties.minor,
         properties.multiProcessorCount,
         properties.totalGlobalMem});
  }
  return found;
}

std::string kernel_architectures() {
  return METAL_LORA_CUDA_ARCHITECTURES;
}

void evaluate(
    mx::Stream stream,
    std::shared_ptr<const Launch> launch,
    const Arrays& inputs,
    Arrays& outputs) {
  static const Gpu gpu = gpus().at(0);
  const auto& mlx = mlx_symbols();
  auto& encoder = mlx.get_command_encoder(stream);
  wait_where_memory_is_short(encoder, outputs);
  auto node = std::make_shared<Node>();
  node->launch = launch;
  try {
    Arguments arguments(*launch, *node, inputs, outputs);
    cuda::Context context;
    context.stream = encoder.stream();
    context.scratch = node.get();
    context.multiprocessors = gpu.multiprocessors;
    context.capability = gpu.capability;
    context.counters = static_cast<uint32_t*>(node->counters.get());
    if (launch->cuda_uncaptured) {
      mlx.commit(&encoder);
      arguments.run(context, *launch);
    } else {
      for (const auto& input : inputs) mlx.set_input_array(&encoder, input);
      for (const auto& output : outputs) mlx.set_output_array(&encoder, output);
      Capture capture(encoder);
      arguments.run(context, *launch);
      capture.finish();
    }
  } catch (...) {
    rethrow(launch->kernel);
  }
  mlx.add_completed_handler(&encoder, [node] {});
}

}  // namespace metal_lora::mlx_cuda

#endif
