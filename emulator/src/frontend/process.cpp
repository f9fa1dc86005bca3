// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/process.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

extern char** environ;

namespace metal_emulator::frontend {
namespace {

[[noreturn]] void fail(int code, const std::string& what) {
  throw std::system_error(code, std::generic_category(), what);
}

/// Both ends close on exec: a process spawned by another thread meanwhile inherits neither.
struct Pipe {
  int read_end = -1, write_end = -1;
  Pipe() {
    std::array<int, 2> ends{};
    if (pipe2(ends.data(), O_CLOEXEC) != 0) {
      fail(errno, "pipe");
    }
    read_end = ends[0];
    write_end = ends[1];
  }
  ~Pipe() {
    close_end(read_end);
    close_end(write_end);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  static void close_end(int& end) {
    if (end >= 0) {
      ::close(end);
      end = -1;
    }
  }
};

struct FileActions {
  posix_spawn_file_actions_t actions;
  FileActions() { posix_spawn_file_actions_init(&actions); }
  ~FileActions() { posix_spawn_file_actions_destroy(&actions); }
  FileActions(const FileActions&) = delete;
  FileActions& operator=(const FileActions&) = delete;
};

// Appends what can be read; false at the end.
bool drain(int end, std::string& to) {
  std::array<char, 65536> buffer;
  const ssize_t n = ::read(end, buffer.data(), buffer.size());
  if (n > 0) {
    to.append(buffer.data(), static_cast<size_t>(n));
  }
  return n > 0 || (n < 0 && errno == EINTR);
}

}  // namespace

ProcessResult run_process(const std::vector<std::string>& arguments) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) {
    argv.push_back(const_cast<char*>(argument.c_str()));
  }
  argv.push_back(nullptr);
  Pipe out, err;
  FileActions files;
  posix_spawn_file_actions_addopen(&files.actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files.actions, out.write_end, 1);
  posix_spawn_file_actions_adddup2(&files.actions, err.write_end, 2);
  pid_t child = 0;
  const int code = posix_spawnp(&child, argv[0], &files.actions, nullptr, argv.data(), environ);
  if (code != 0) {
    fail(code, arguments[0]);
  }
  Pipe::close_end(out.write_end);
  Pipe::close_end(err.write_end);
  ProcessResult result;
  std::array<pollfd, 2> ends{{{out.read_end, POLLIN, 0}, {err.read_end, POLLIN, 0}}};
  while (ends[0].fd >= 0 || ends[1].fd >= 0) {
    if (poll(ends.data(), ends.size(), -1) < 0 && errno != EINTR) {
      break;
    }
    for (size_t i = 0; i < ends.size(); i++) {
      if (ends[i].fd >= 0 && ends[i].revents != 0 &&
          !drain(ends[i].fd, i == 0 ? result.out : result.err)) {
        ends[i].fd = -1;
      }
    }
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

}  // namespace metal_emulator::frontend
