// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <future>
#include <map>
#include <mutex>

#include "src/frontend/compiler.h"
#include "src/frontend/hash.h"
#include "src/library_impl.h"
#include "src/lint/lint.h"

namespace metal_emulator {
namespace {

namespace fs = std::filesystem;
using frontend::Hash;

fs::path cache_folder(const CompileOptions& options) {
  if (!options.cache_dir.empty()) {
    return options.cache_dir;
  }
  if (const char* set = std::getenv("METAL_EMULATOR_CACHE"); set && *set) {
    return set;
  }
  if (const char* home = std::getenv("HOME"); home && *home) {
    return fs::path(home) / ".cache" / "metal-emulator";
  }
  return fs::temp_directory_path() / "metal-emulator-cache";
}

// Changes when the headers, the compiler or this machine's flags do.
Hash toolchain_hash() {
  Hash hash;
  for (const fs::path& folder : {frontend::shim_folder(), frontend::lint_shim_folder()}) {
    hash.add_folder(folder);
  }
  hash.add(frontend::compiler());
  hash.add_program(frontend::compiler());
  for (const std::string& flag : frontend::code_flags()) {
    hash.add(flag);
  }
  return hash;
}

// By content; read again when a header's size or time changes, as under an editor.
std::string toolchain() {
  static std::mutex mutex;
  static std::map<std::string, std::string> known;
  Hash state;
  for (const fs::path& folder : {frontend::shim_folder(), frontend::lint_shim_folder()}) {
    state.add(folder.string());
    state.add_folder_state(folder);
  }
  state.add(frontend::compiler());
  state.add_program(frontend::compiler());
  const std::string key = state.hexadecimal();
  std::lock_guard lock(mutex);
  auto [found, fresh] = known.try_emplace(key);
  if (fresh) {
    found->second = toolchain_hash().hexadecimal();
  }
  return found->second;
}

// Text that includes no file of the user is known by itself, without preprocessing it.
bool self_contained(std::string_view text, const CompileOptions& options) {
  return options.include_dirs.empty() && text.find("#include \"") == std::string_view::npos &&
         text.find("__has_include") == std::string_view::npos &&
         std::all_of(options.defines.begin(), options.defines.end(), [](const std::string& d) {
           return d.find('"') == std::string::npos && d.find('<') == std::string::npos;
         });
}

Hash options_hash(const CompileOptions& options) {
  Hash hash;
  hash.add(toolchain());
  hash.add(options.file_name);
  hash.add(uint64_t{options.lint});
  for (const std::string& define : options.defines) {
    hash.add("-D" + define);
  }
  for (const std::string& kernel : options.kernels) {
    hash.add("-k" + kernel);
  }
  return hash;
}

void refuse(const std::vector<std::string>& messages) {
  if (messages.empty()) {
    return;
  }
  std::string all;
  for (const std::string& message : messages) {
    all += (all.empty() ? "" : "\n") + message;
  }
  throw CompileError(all);
}

// The file that holds this code: another build of the emulator may translate otherwise.
std::string own_module() {
  Dl_info info{};
  return dladdr(reinterpret_cast<const void*>(&own_module), &info) && info.dli_fname
             ? fs::absolute(info.dli_fname).string()
             : "/proc/self/exe";
}

// Names the text and everything that its translation depends on; only for self-contained text.
Hash text_hash(std::string_view text, const CompileOptions& options) {
  static const uint64_t module = [] {
    Hash hash;
    hash.add_program(own_module());
    return hash.value();
  }();
  Hash hash = options_hash(options);
  hash.add(module);
  hash.add(text);
  return hash;
}

// "<text hash>.name" holds the file name of the text's library: unchanged text needs no
// translation.
fs::path known_library(const fs::path& folder, const Hash& hash) {
  std::ifstream in(folder / (hash.hexadecimal() + ".name"));
  std::string name;
  std::error_code code;
  if (!std::getline(in, name) || !fs::exists(folder / name, code)) {
    return {};
  }
  return folder / name;
}

void remember(const fs::path& folder, const Hash& hash, const fs::path& library) {
  const fs::path file = folder / (hash.hexadecimal() + ".name");
  const frontend::TemporaryFolder temporary(folder);
  const fs::path fresh = temporary.path() / "name";
  std::ofstream(fresh) << library.filename().string() << "\n";
  std::error_code code;
  fs::rename(fresh, file, code);  // atomic; a lost race leaves an equal file
}

// The lint runs beside the compiler: it is a fifth of the work. What it refuses is said first.
void lint_and_build(
    std::string_view text, const CompileOptions& options, const std::function<void()>& build) {
  std::future<std::vector<std::string>> findings = std::async(
      options.lint ? std::launch::async : std::launch::deferred,
      [&] { return options.lint ? lint(text, options) : std::vector<std::string>{}; });
  try {
    build();
  } catch (const CompileError&) {
    refuse(findings.get());
    throw;
  }
  refuse(findings.get());
}

// The text's library in the cache; built when it is not there.
fs::path translated(std::string_view text, const CompileOptions& options, const fs::path& folder) {
  const frontend::Translation translation = frontend::translate(text, options);
  Hash hash = options_hash(options);
  hash.add(translation.text);
  fs::path library = folder / (hash.hexadecimal() + ".so");
  lint_and_build(text, options, [&] {
    if (!fs::exists(library)) {
      frontend::build(translation, library, folder, toolchain());
    }
  });
  return library;
}

ArgumentInfo argument_info(const abi::Arg& arg) {
  ArgumentInfo info{};
  info.kind = arg.kind == abi::ArgKind::buffer ? ArgumentInfo::Kind::buffer
              : arg.kind == abi::ArgKind::threadgroup_memory
                  ? ArgumentInfo::Kind::threadgroup_memory
                  : ArgumentInfo::Kind::built_in;
  info.index = arg.index;
  info.read_only = arg.read_only;
  info.name = arg.name;
  return info;
}

void describe(Library::Impl& impl) {
  const abi::Library& table = *impl.table;
  for (uint32_t i = 0; i < table.kernel_count; i++) {
    KernelInfo info;
    info.name = table.kernels[i].name;
    for (uint32_t a = 0; a < table.kernels[i].arg_count; a++) {
      info.arguments.push_back(argument_info(table.kernels[i].args[a]));
    }
    impl.kernels.push_back(std::move(info));
  }
  for (uint32_t i = 0; i < table.constant_count; i++) {
    const abi::FunctionConstant& c = table.constants[i];
    impl.function_constants.push_back({c.index, c.name, c.bytes});
  }
}

}  // namespace

Library::Impl::~Impl() {
  if (handle) {
    dlclose(handle);
  }
}

Library::Library(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

const std::vector<KernelInfo>& Library::kernels() const {
  return impl_->kernels;
}

const std::vector<FunctionConstantInfo>& Library::function_constants() const {
  return impl_->function_constants;
}

const KernelInfo* Library::find(std::string_view kernel) const {
  for (const KernelInfo& info : impl_->kernels) {
    if (info.name == kernel) {
      return &info;
    }
  }
  return nullptr;
}

namespace {

std::shared_ptr<const Library::Impl> load_impl(const fs::path& library) {
  auto impl = std::make_shared<Library::Impl>();
  impl->path = fs::absolute(library);
  impl->handle = dlopen(impl->path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!impl->handle) {
    const char* why = dlerror();
    throw CompileError("cannot load " + impl->path.string() + ": " + (why ? why : "unknown"));
  }
  using Entry = const abi::Library* (*)();
  const Entry entry = reinterpret_cast<Entry>(dlsym(impl->handle, "metal_emulator_library"));
  if (!entry) {
    throw CompileError(impl->path.string() + " is not a library of the emulator");
  }
  impl->table = entry();
  if (impl->table->version != abi::kVersion) {
    throw CompileError(
        impl->path.string() + " was built for version " + std::to_string(impl->table->version) +
        " of the emulator's interface, this is version " + std::to_string(abi::kVersion) +
        "; hint: build it again");
  }
  describe(*impl);
  return impl;
}

}  // namespace

Library load(const fs::path& library) {
  return Library(load_impl(library));
}

Library compile(std::string_view text, const CompileOptions& options) {
  // One handle per process for equal text; libraries close when their last user goes.
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<const Library::Impl>> by_text, by_path;
  const fs::path folder = cache_folder(options);
  const bool alone = self_contained(text, options);
  const Hash hash = alone ? text_hash(text, options) : Hash();
  const std::string key = folder.string() + "/" + hash.hexadecimal();
  std::lock_guard lock(mutex);
  if (alone) {
    if (std::shared_ptr<const Library::Impl> known = by_text[key].lock()) {
      return Library(std::move(known));
    }
  }
  fs::path library = alone ? known_library(folder, hash) : fs::path();
  if (library.empty()) {
    library = translated(text, options, folder);
    if (alone) {
      remember(folder, hash, library);
    }
  }
  std::shared_ptr<const Library::Impl> impl = by_path[library.string()].lock();
  if (!impl) {
    impl = load_impl(library);
    by_path[library.string()] = impl;
  }
  if (alone) {
    by_text[key] = impl;
  }
  return Library(std::move(impl));
}

void compile_to(std::string_view text, const fs::path& library, const CompileOptions& options) {
  const frontend::Translation translation = frontend::translate(text, options);
  const frontend::TemporaryFolder folder(fs::temp_directory_path());
  const fs::path built = folder.path() / "library.so";
  lint_and_build(text, options, [&] {
    frontend::build(translation, built, cache_folder(options), toolchain());
  });
  frontend::publish(built, library);  // not what the lint refuses
}

std::vector<std::string> lint(std::string_view text, const CompileOptions& options) {
  return linting::check(text, options);
}

}  // namespace metal_emulator
