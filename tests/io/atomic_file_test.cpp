// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/atomic_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include <cerrno>
#include <random>
#include <thread>

#include "src/io/safetensors.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::read_text;
using testing::TempFolder;
using testing::write_text;

// Counts the calls and lets the k-th fail.
class FaultyCalls : public FileCalls {
 public:
  enum class Fault { error, short_write, short_write_then_error };
  FaultyCalls(int failing_call, int error, Fault fault = Fault::error)
      : failing_call_(failing_call), error_(error), fault_(fault) {}

  int open(const char* path, int flags, mode_t mode) override {
    return fails("open") ? -1 : FileCalls::open(path, flags, mode);
  }
  ssize_t write(int fd, const void* data, size_t bytes) override {
    if (fault_ == Fault::error) {
      return fails("write") ? -1 : FileCalls::write(fd, data, bytes);
    }
    if (std::exchange(fail_next_write_, false)) return fail();
    if (++calls_ == failing_call_ && bytes > 1) {
      fired_ = true;
      fail_next_write_ = fault_ == Fault::short_write_then_error;
      return FileCalls::write(fd, data, bytes / 2);
    }
    return FileCalls::write(fd, data, bytes);
  }
  int fsync(int fd) override { return fails("fsync") ? -1 : FileCalls::fsync(fd); }
  int close(int fd) override {
    const bool failing = fails("close");
    const int result = FileCalls::close(fd);
    if (failing) return fail();
    return result;
  }
  int rename(const char* from, const char* to) override {
    if (fails("rename")) return -1;
    renamed_ = true;
    return FileCalls::rename(from, to);
  }
  int unlink(const char* path) override { return fails("unlink") ? -1 : FileCalls::unlink(path); }

  bool fired() const { return fired_; }
  bool renamed() const { return renamed_; }
  int calls() const { return calls_; }
  const std::string& log() const { return log_; }

 private:
  int fail() {
    errno = error_;
    return -1;
  }
  bool fails(const char* name) {
    log_ += std::string(name) + " ";
    if (++calls_ != failing_call_) return false;
    fired_ = true;
    errno = error_;
    return true;
  }

  int failing_call_;
  int error_;
  Fault fault_;
  int calls_ = 0;
  bool fired_ = false;
  bool renamed_ = false;
  bool fail_next_write_ = false;
  std::string log_;
};

Result<void> save(const std::string& path, FileCalls& calls) {
  auto file = AtomicFile::create(path, calls);
  if (!file) return std::move(file).error();
  for (const char* piece : {"new ", "content ", "here"}) {
    if (auto written = file->write(std::string_view(piece)); !written) return written;
  }
  return file->commit();
}

TEST(AtomicFile, MakesTheCallsInTheOrderThatSurvivesACrash) {
  TempFolder folder;
  FaultyCalls calls(0, 0);
  ASSERT_TRUE(save(folder / "x", calls).ok());
  EXPECT_EQ(calls.log(), "open write write write fsync close open rename fsync close ");
  EXPECT_EQ(read_text(folder / "x"), "new content here");
  EXPECT_EQ(folder.entry_count(), 1u);
}

TEST(AtomicFile, FailingAnyCallKeepsThePreviousFileAndRemovesTheTemporary) {
  for (const int error : {ENOSPC, EIO}) {
    int k = 1;
    for (;; ++k) {
      TempFolder folder;
      write_text(folder / "x", "previous");
      FaultyCalls calls(k, error);
      const auto saved = save(folder / "x", calls);
      if (!calls.fired()) {
        EXPECT_TRUE(saved.ok());
        break;
      }
      SCOPED_TRACE("call " + std::to_string(k) + " of " + calls.log());
      EXPECT_EQ(folder.entry_count(), 1u);
      if (calls.renamed()) {
        // Only flushing the folder's entry is left; closing it afterwards cannot lose anything.
        EXPECT_EQ(read_text(folder / "x"), "new content here");
        if (!saved) {
          EXPECT_NE(saved.error().hint.find("in place"), std::string::npos);
        }
        continue;
      }
      EXPECT_EQ(read_text(folder / "x"), "previous");
      ASSERT_FALSE(saved.ok());
      EXPECT_EQ(saved.error().code, ErrorCode::io);
      EXPECT_EQ(saved.error().path, folder / "x");
    }
    EXPECT_EQ(k, 11);
  }
}

TEST(AtomicFile, FlushFailureOfTheFolderIsReported) {
  TempFolder folder;
  FaultyCalls calls(9, EIO);
  EXPECT_FALSE(save(folder / "x", calls).ok());
  EXPECT_TRUE(calls.fired());
}

TEST(AtomicFile, InterruptedCallsAreMadeAgain) {
  for (int k = 1; k <= 10; ++k) {
    TempFolder folder;
    FaultyCalls calls(k, EINTR);
    const auto saved = save(folder / "x", calls);
    EXPECT_TRUE(calls.fired());
    ASSERT_TRUE(saved.ok()) << k << saved.error().message();
    EXPECT_EQ(read_text(folder / "x"), "new content here");
    EXPECT_EQ(folder.entry_count(), 1u);
  }
}

TEST(AtomicFile, ShortWritesAreContinuedOrReported) {
  for (int k = 2; k <= 4; ++k) {  // call 1 is open
    TempFolder folder;
    write_text(folder / "x", "previous");
    FaultyCalls continued(k, 0, FaultyCalls::Fault::short_write);
    ASSERT_TRUE(save(folder / "x", continued).ok());
    EXPECT_TRUE(continued.fired());
    EXPECT_EQ(read_text(folder / "x"), "new content here");
    write_text(folder / "x", "previous");
    FaultyCalls full(k, ENOSPC, FaultyCalls::Fault::short_write_then_error);
    EXPECT_FALSE(save(folder / "x", full).ok());
    EXPECT_EQ(read_text(folder / "x"), "previous");
    EXPECT_EQ(folder.entry_count(), 1u);
  }
}

TEST(AtomicFile, ARealFullDiskIsReported) {
  // /dev/full stands for a disk without room; its entry cannot be replaced, so write to it alone.
  const int fd = ::open("/dev/full", O_WRONLY);
  if (fd < 0) GTEST_SKIP() << "no /dev/full";
  EXPECT_EQ(system_file_calls().write(fd, "x", 1), -1);
  EXPECT_EQ(errno, ENOSPC);
  ::close(fd);
}

TEST(AtomicFile, RefusesPathsThatAreNoFile) {
  TempFolder folder;
  EXPECT_FALSE(write_file_atomic(folder / "none/x", "x").ok());
  EXPECT_EQ(write_file_atomic(folder / "none/x", "x").error().code, ErrorCode::not_found);
  EXPECT_FALSE(write_file_atomic(folder.path() + "/", "x").ok());
  EXPECT_FALSE(write_file_atomic(folder / "..", "x").ok());
  EXPECT_FALSE(write_file_atomic("", "x").ok());
  EXPECT_FALSE(write_file_atomic(folder / std::string("a\0b", 3), "x").ok());
  std::filesystem::create_directory(folder / "d");
  EXPECT_FALSE(write_file_atomic(folder / "d", "x").ok());
  EXPECT_EQ(folder.entry_count(), 1u);
}

TEST(AtomicFile, AbandonedAndStaleTemporariesGo) {
  TempFolder folder;
  {
    auto file = AtomicFile::create(folder / "x");
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->write(std::string_view("half")).ok());
    EXPECT_EQ(folder.entry_count(), 1u);
  }
  EXPECT_EQ(folder.entry_count(), 0u);
  for (const char* name : {".x.12-0.tmp", ".x.y.12-0.tmp", ".x.12.tmp", "x", ".x.-1.tmp"}) {
    write_text(folder / name, "");
  }
  ASSERT_TRUE(remove_stale_temporaries(folder / "x").ok());
  EXPECT_FALSE(std::filesystem::exists(folder / ".x.12-0.tmp"));
  EXPECT_EQ(folder.entry_count(), 4u);
}

// Every safetensors save goes through the same layer: the k-th call fails, the old adapter stays.
TEST(AtomicFile, SafetensorsSaveSurvivesEveryFault) {
  const std::vector<float> values(1000, 2.0f);
  const TensorInfo tensor{
      "a", TensorType::f32, {1000}, std::as_bytes(std::span(values)).data(), 4000, nullptr};
  for (int k = 1;; ++k) {
    TempFolder folder;
    const std::string path = folder / "adapters.safetensors";
    ASSERT_TRUE(write_safetensors(path, std::span(&tensor, 1)).ok());
    const std::string previous = read_text(path);
    FaultyCalls calls(k, EIO);
    const auto saved =
        write_safetensors(path, std::span(&tensor, 1), {{"step", "2"}}, {true, &calls});
    if (!calls.fired()) break;
    EXPECT_EQ(folder.entry_count(), 1u);
    ASSERT_TRUE(read_safetensors(path).ok());
    if (!calls.renamed()) {
      EXPECT_FALSE(saved.ok());
      EXPECT_EQ(read_text(path), previous);
    }
  }
}

// A child saves files of one repeated letter over and over and is killed at a random moment: the
// path must hold one whole save.
TEST(AtomicFile, KillAtAnyMomentLeavesAWholeFile) {
  constexpr int kKills = 200;
  constexpr size_t kBytes = 300000;
  TempFolder folder;
  const std::string path = folder / "state";
  ASSERT_TRUE(write_file_atomic(path, std::string(kBytes, 'a')).ok());
  std::mt19937 random(17);
  std::uniform_int_distribution<int> microseconds(0, 3000);
  for (int kill_number = 0; kill_number < kKills; ++kill_number) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int i = 0;; ++i) {
        const auto letter = static_cast<char>('a' + i % 26);
        if (!write_file_atomic(path, std::string(kBytes, letter)).ok()) ::_exit(1);
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds(random)));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    const std::string content = read_text(path);
    ASSERT_EQ(content.size(), kBytes);
    ASSERT_EQ(content.find_first_not_of(content[0]), std::string::npos);
  }
  ASSERT_TRUE(remove_stale_temporaries(path).ok());
  EXPECT_EQ(folder.entry_count(), 1u);
}

}  // namespace
}  // namespace metal_lora::io
