// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "findings.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

extern char** environ;

namespace metal_emulator {

std::string_view finding_name(FindingKind kind) {
  switch (kind) {
    case FindingKind::race_threadgroup:
      return "race_threadgroup";
    case FindingKind::race_device:
      return "race_device";
    case FindingKind::out_of_bounds:
      return "out_of_bounds";
    case FindingKind::uninitialized_read:
      return "uninitialized_read";
    case FindingKind::divergent_barrier:
      return "divergent_barrier";
    case FindingKind::divergent_matrix_operation:
      return "divergent_matrix_operation";
    case FindingKind::misaligned_access:
      return "misaligned_access";
    case FindingKind::write_to_read_only:
      return "write_to_read_only";
    case FindingKind::deadlock:
      return "deadlock";
    case FindingKind::undefined_behavior:
      return "undefined_behavior";
  }
  return "unknown";
}

namespace {

/// Standard output of a child found on PATH; false where it cannot be started or fails.
bool run_child(const std::vector<std::string>& arguments, std::string& output) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", 1 /* O_WRONLY */, 0);
  posix_spawn_file_actions_addclose(&actions, ends[0]);
  posix_spawn_file_actions_addclose(&actions, ends[1]);
  std::vector<char*> argv;
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  pid_t child = 0;
  const int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (error == 0) {
    char chunk[4096];
    ssize_t n;
    while ((n = read(ends[0], chunk, sizeof chunk)) > 0) output.append(chunk, size_t(n));
  }
  close(ends[0]);
  if (error != 0) return false;
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

SourceLine parse_line(std::string text) {
  const size_t note = text.find(" (discriminator");
  if (note != std::string::npos) text.resize(note);
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || text.compare(0, 2, "??") == 0) return {};
  SourceLine result{text.substr(0, colon), std::atoi(text.c_str() + colon + 1)};
  while (result.file.compare(0, 2, "./") == 0) result.file.erase(0, 2);
  return result;
}

}  // namespace

std::vector<SourceLine> symbolize(
    const std::filesystem::path& library,
    const std::vector<uintptr_t>& offsets,
    const std::string& skipped_directory) {
  std::vector<SourceLine> result(offsets.size());
  if (offsets.empty()) return result;
  std::string output;
  for (const char* tool :
       {"addr2line",
        "llvm-addr2line-19",
        "llvm-addr2line",
        "/usr/lib/llvm-19/bin/llvm-addr2line"}) {
    std::vector<std::string> arguments{tool, "-a", "-i", "-e", library.string()};
    for (const uintptr_t offset : offsets) {
      char text[32];
      std::snprintf(text, sizeof text, "0x%zx", size_t(offset));
      arguments.push_back(text);
    }
    output.clear();
    if (run_child(arguments, output)) break;
    output.clear();
  }
  // One "0x…" line per address, then a line per frame, innermost first.
  size_t current = SIZE_MAX;
  for (size_t at = 0; at < output.size();) {
    const size_t end = std::min(output.find('\n', at), output.size());
    const std::string line = output.substr(at, end - at);
    at = end + 1;
    if (line.compare(0, 2, "0x") == 0) {
      current++;
      continue;
    }
    if (current >= result.size() || result[current].line != 0) continue;
    const SourceLine frame = parse_line(line);
    const bool skipped = !skipped_directory.empty() &&
                         frame.file.compare(0, skipped_directory.size(), skipped_directory) == 0;
    if (!skipped) result[current] = frame;
  }
  return result;
}

void Findings::clear() {
  entries_.clear();
  index_.clear();
  last_ = nullptr;
  count_ = 0;
}

bool Findings::add(FindingKind kind, const void* site) {
  count_++;
  const auto [it, inserted] = index_.try_emplace({kind, site}, entries_.size());
  if (inserted) entries_.push_back({kind, site, {}, 0});
  last_ = &entries_[it->second];
  last_->count++;
  return inserted;
}

std::vector<Finding> Findings::report(
    const std::string& kernel,
    const std::filesystem::path& library,
    const void* library_base,
    const std::string& skipped_directory,
    size_t limit) const {
  // A return address points behind the call: one byte back lies on the call's line.
  std::vector<uintptr_t> offsets;
  for (const Entry& e : entries_)
    offsets.push_back(
        reinterpret_cast<uintptr_t>(e.site) - 1 - reinterpret_cast<uintptr_t>(library_base));
  const std::vector<SourceLine> lines = symbolize(library, offsets, skipped_directory);
  std::vector<Finding> result;
  for (size_t i = 0; i < entries_.size(); i++) {
    const auto same = std::find_if(result.begin(), result.end(), [&](const Finding& f) {
      return f.kind == entries_[i].kind && f.file == lines[i].file && f.line == lines[i].line;
    });
    if (same != result.end())
      same->count += entries_[i].count;
    else if (result.size() < limit)
      result.push_back(
          {entries_[i].kind,
           kernel,
           lines[i].file,
           lines[i].line,
           entries_[i].text,
           entries_[i].count});
  }
  return result;
}

}  // namespace metal_emulator
