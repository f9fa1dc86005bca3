// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// One dispatch: arguments in, threadgroups one after another, results and counters out.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <mutex>
#include <set>

#include "../library_impl.h"
#include "machine.h"

namespace metal_emulator {

namespace {

std::mutex& machine_mutex() {
  static std::mutex mutex;
  return mutex;
}

/// Turns faults of kernels into findings while it lives; passes all others on.
class FaultHandler {
 public:
  FaultHandler() {
    stack_.resize(64 << 10);
    stack_t own{};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < kSignals.size(); i++) sigaction(kSignals[i], &action, &old_[i]);
    active() = this;
  }
  ~FaultHandler() {
    active() = nullptr;
    for (size_t i = 0; i < kSignals.size(); i++) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  static constexpr std::array<int, 4> kSignals{SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  static FaultHandler*& active() {
    static FaultHandler* handler = nullptr;
    return handler;
  }
  static const void* code_address(const void* context) {
#if defined(__x86_64__)
    return reinterpret_cast<const void*>(
        static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
    (void)context;
    return nullptr;
#endif
  }
  static void handle(int signal, siginfo_t* info, void* context) {
    // A lane's fault does not come back from here.
    Machine::instance().fault(signal, info->si_addr, code_address(context));
    // Not ours: as if this handler had not been there.
    for (size_t i = 0; i < kSignals.size(); i++)
      if (kSignals[i] == signal && active()) sigaction(signal, &active()->old_[i], nullptr);
  }
  std::vector<char> stack_;
  stack_t old_stack_{};
  std::array<struct sigaction, 4> old_{};
};

const abi::Kernel& find_kernel(const abi::Library& library, const std::string& name) {
  for (uint32_t i = 0; i < library.kernel_count; i++)
    if (name == library.kernels[i].name) return library.kernels[i];
  std::string names;
  constexpr uint32_t kNamed = 12;
  for (uint32_t i = 0; i < std::min(library.kernel_count, kNamed); i++)
    names += (i ? ", " : "") + std::string(library.kernels[i].name);
  if (library.kernel_count > kNamed)
    names += " and " + std::to_string(library.kernel_count - kNamed) + " more";
  throw DispatchError(
      "[run] no kernel named " + name + "; hint: the library has " +
      (names.empty() ? "none" : names));
}

void set_constants(const abi::Library& library, const Dispatch& dispatch) {
  const auto given = [&](int index) {
    return std::find_if(
        dispatch.function_constants.begin(),
        dispatch.function_constants.end(),
        [index](const FunctionConstant& c) { return c.index == index; });
  };
  for (const FunctionConstant& c : dispatch.function_constants) {
    bool known = false;
    for (uint32_t i = 0; i < library.constant_count; i++)
      known |= library.constants[i].index == c.index;
    if (!known)
      throw DispatchError(
          "[run] function constant " + std::to_string(c.index) + " is not declared");
  }
  for (uint32_t i = 0; i < library.constant_count; i++) {
    const abi::FunctionConstant& constant = library.constants[i];
    const auto value = given(constant.index);
    const bool defined = value != dispatch.function_constants.end();
    if (constant.defined) *constant.defined = defined;
    std::memset(constant.value, 0, constant.bytes);
    if (!defined) continue;
    if (value->value.size() != constant.bytes)
      throw DispatchError(
          "[run] function constant " + std::string(constant.name) + " has " +
          std::to_string(constant.bytes) + " bytes but " + std::to_string(value->value.size()) +
          " were given");
    std::memcpy(constant.value, value->value.data(), constant.bytes);
  }
  if (library.constants_changed) library.constants_changed();
}

uint64_t product(const std::array<uint32_t, 3>& a) {
  return uint64_t(a[0]) * a[1] * a[2];
}

void check_sizes(const Dispatch& dispatch) {
  if (product(dispatch.threads_per_threadgroup) == 0 || product(dispatch.threads_per_grid) == 0)
    throw DispatchError("[run] a grid and its threadgroups need at least one thread");
  if (product(dispatch.threads_per_threadgroup) > kMaxThreads)
    throw DispatchError(
        "[run] " + std::to_string(product(dispatch.threads_per_threadgroup)) +
        " threads per threadgroup, but Metal allows 1024");
  std::set<int> seen;
  for (const Buffer& b : dispatch.buffers) {
    if (b.index < 0 || b.index >= Memory::kBuffers)
      throw DispatchError(
          "[run] buffer index " + std::to_string(b.index) + ": Metal has buffers 0 to 30");
    if (!seen.insert(b.index).second)
      throw DispatchError("[run] buffer " + std::to_string(b.index) + " is bound twice");
    if (!b.data && b.bytes)
      throw DispatchError("[run] buffer " + std::to_string(b.index) + " is null");
  }
}

/// Buffers of equal address share their memory, as on a GPU; overlapping ones are refused.
const Buffer* shared_with(const Dispatch& dispatch, const Buffer& b) {
  if (b.bytes == 0) return nullptr;
  for (const Buffer& other : dispatch.buffers) {
    if (&other == &b) return nullptr;
    if (other.bytes == 0) continue;
    const char *x = static_cast<const char*>(b.data), *y = static_cast<const char*>(other.data);
    if (x == y && b.bytes == other.bytes) return &other;
    if (x < y + other.bytes && y < x + b.bytes)
      throw DispatchError(
          "[run] buffers " + std::to_string(b.index) + " and " + std::to_string(other.index) +
          " overlap in part");
  }
  return nullptr;
}

bool argument_enabled(const abi::Arg& arg) {
  return !arg.enable || *arg.enable;
}

bool writable(const abi::Kernel& kernel, const Dispatch& dispatch, const Buffer& b) {
  for (uint32_t i = 0; i < kernel.arg_count; i++) {
    const abi::Arg& arg = kernel.args[i];
    if (arg.kind != abi::ArgKind::buffer || arg.read_only) continue;
    for (const Buffer& other : dispatch.buffers)
      if (other.index == arg.index && (other.index == b.index || (other.data == b.data && b.bytes)))
        return true;
  }
  return false;
}

void bind_buffers(Machine& m, const Dispatch& dispatch) {
  std::fill(std::begin(m.buffers), std::end(m.buffers), nullptr);
  for (int i = 0; i < Memory::kBuffers; i++) m.memory.close(m.memory.buffer(i));
  for (const Buffer& b : dispatch.buffers) {
    if (const Buffer* other = shared_with(dispatch, b)) {
      m.buffers[b.index] = m.buffers[other->index];
      continue;
    }
    Region& region = m.memory.buffer(b.index);
    const bool may_write = writable(*m.kernel, dispatch, b);
    m.memory.open(region, b.bytes, Space::device, m.checks && may_write);
    region.index = b.index;
    region.read_only = !may_write;
    m.buffers[b.index] = region.data;
    if (b.initialized) {
      if (b.bytes) std::memcpy(region.data, b.data, b.bytes);
      std::fill(region.flags.begin(), region.flags.end(), uint8_t(kInitialized));
    } else {
      std::memset(region.data, 0xff, b.bytes);
    }
  }
  for (uint32_t i = 0; i < m.kernel->arg_count; i++) {
    const abi::Arg& arg = m.kernel->args[i];
    if (arg.kind == abi::ArgKind::buffer && argument_enabled(arg) && !m.buffers[arg.index])
      throw DispatchError(
          "[run] " + std::string(m.kernel->name) + ": buffer " + std::to_string(arg.index) + " (" +
          arg.name + ") is not bound");
  }
}

void bind_threadgroup_memory(Machine& m, const Dispatch& dispatch) {
  std::fill(std::begin(m.threadgroup_memory), std::end(m.threadgroup_memory), nullptr);
  m.threadgroup_variables = 0;
  m.threadgroup_bytes = 0;
  m.generation++;
  for (uint32_t i = 0; i < m.kernel->arg_count; i++) {
    const abi::Arg& arg = m.kernel->args[i];
    if (arg.kind != abi::ArgKind::threadgroup_memory || !argument_enabled(arg)) continue;
    const auto index = static_cast<size_t>(arg.index);
    if (index >= dispatch.threadgroup_memory_bytes.size() ||
        dispatch.threadgroup_memory_bytes[index] == 0)
      throw DispatchError(
          "[run] " + std::string(m.kernel->name) + ": threadgroup memory " + std::to_string(index) +
          " (" + arg.name + ") has no size");
    const size_t bytes = dispatch.threadgroup_memory_bytes[index];
    m.threadgroup_bytes = (m.threadgroup_bytes + 15) / 16 * 16 + bytes;
    if (m.threadgroup_bytes > kThreadgroupMemoryLimit)
      throw DispatchError(
          "[run] threadgroup memory: " + std::to_string(m.threadgroup_bytes) +
          " bytes, but Metal allows 32768");
    m.threadgroup_memory[index] = m.open_threadgroup_region(bytes).data;
  }
}

void reset_threadgroup_memory(Machine& m) {
  for (int i = 0; i < m.threadgroup_variables; i++) {
    Region& region = m.memory.threadgroup_variable(i);
    std::memset(region.data, 0xff, region.bytes);
    std::fill(region.flags.begin(), region.flags.end(), uint8_t(0));
  }
}

void run_grid(Machine& m, const Dispatch& dispatch) {
  const auto &threads = dispatch.threads_per_grid, &size = dispatch.threads_per_threadgroup;
  std::array<uint32_t, 3> groups;
  for (size_t i = 0; i < 3; i++) groups[i] = (threads[i] - 1) / size[i] + 1;
  m.grid.threads = {threads[0], threads[1], threads[2]};
  m.grid.threadgroups = {groups[0], groups[1], groups[2]};
  m.grid.nominal_threadgroup = {size[0], size[1], size[2]};
  const uint64_t total = product(groups);
  for (uint64_t k = 0; k < total && !m.ended; k++) {
    const uint64_t n = m.reverse ? total - 1 - k : k;
    const std::array<uint32_t, 3> at{
        uint32_t(n % groups[0]),
        uint32_t(n / groups[0] % groups[1]),
        uint32_t(n / groups[0] / groups[1])};
    const auto extent = [&](size_t i) { return std::min(size[i], threads[i] - at[i] * size[i]); };
    m.grid.threadgroup = {at[0], at[1], at[2]};
    m.grid.threads_per_threadgroup = {extent(0), extent(1), extent(2)};
    reset_threadgroup_memory(m);
    reset_access_budget();
    m.run_threadgroup();
    m.counters.threadgroups++;
    m.counters.threads += m.threads;
  }
}

void collect(Machine& m, const Dispatch& dispatch) {
  for (const Buffer& b : dispatch.buffers) {
    BufferCounters c;
    c.index = b.index;
    // Of buffers that share memory, the first carries the counts.
    if (!shared_with(dispatch, b)) {
      const Region& region = m.memory.buffer(b.index);
      c.read_bytes = region.read_bytes;
      c.written_bytes = region.written_bytes;
      for (const uint8_t f : region.flags) {
        c.unique_read_bytes += f & kRead;
        c.unique_written_bytes += f >> 1 & 1;
      }
      if (!region.read_only && b.bytes) std::memcpy(b.data, region.data, b.bytes);
    }
    m.counters.buffers.push_back(c);
  }
  for (int i = 0; i < m.threadgroup_variables; i++) {
    m.counters.threadgroup_read_bytes += m.memory.threadgroup_variable(i).read_bytes;
    m.counters.threadgroup_written_bytes += m.memory.threadgroup_variable(i).written_bytes;
  }
  m.counters.threadgroup_memory_bytes = m.threadgroup_bytes;
}

/// The address range of the loaded library that holds `inside`.
void find_library_range(Machine& m, const void* inside) {
  struct Search {
    const char* inside;
    const char *begin, *end;
  } search{static_cast<const char*>(inside), nullptr, nullptr};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& s = *static_cast<Search*>(data);
        const char *begin = nullptr, *end = nullptr;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const char* at =
              reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
          if (!begin || at < begin) begin = at;
          end = std::max(end, at + info->dlpi_phdr[i].p_memsz);
        }
        if (s.inside < begin || s.inside >= end) return 0;
        s.begin = begin;
        s.end = end;
        return 1;
      },
      &search);
  m.library_begin = search.begin;
  m.library_end = search.end;
}

}  // namespace

Report run(const Library& library, const Dispatch& dispatch) {
  const std::lock_guard<std::mutex> lock(machine_mutex());
  const abi::Library& table = *library.impl().table;
  if (table.version != abi::kVersion)
    throw DispatchError("[run] the library was compiled by another version of the emulator");
  check_sizes(dispatch);
  Machine& m = Machine::instance();
  m.library = &table;
  m.kernel = &find_kernel(table, dispatch.kernel);
  m.checks = dispatch.checks;
  m.reverse = dispatch.reverse_order;
  m.ended = false;
  m.refusal.clear();
  m.findings.clear();
  m.counters = {};
  for (Simdgroup& g : m.simdgroups) g.clock[0] = g.clock[1] = 0;
  table.set_hooks(nullptr);
  set_constants(table, dispatch);
  table.set_hooks(&hooks());
  find_library_range(m, table.kernels);
  bind_buffers(m, dispatch);
  bind_threadgroup_memory(m, dispatch);
  {
    const FaultHandler handler;
    run_grid(m, dispatch);
  }
  if (!m.refusal.empty()) throw DispatchError("[run] " + dispatch.kernel + ": " + m.refusal);
  collect(m, dispatch);
  Report report;
  report.counters = m.counters;
  report.finding_count = m.findings.count();
  if (report.finding_count)
    report.findings = m.findings.report(
        dispatch.kernel,
        library.impl().path,
        m.library_begin,
        table.shim_directory,
        dispatch.max_findings);
  return report;
}

}  // namespace metal_emulator
