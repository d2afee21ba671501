// The CPU thread pool: coverage of ranges, nesting, callers from several threads, resizing, and fork.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

namespace quire::cpu {
namespace {

class ThreadPool : public ::testing::Test {
 protected:
  void SetUp() override { before_ = num_threads(); }
  void TearDown() override { set_num_threads(before_); }

 private:
  int before_ = 1;
};

// True if [0, count) is covered exactly once by ranges of at least the grain, but for a shorter last one.
bool covers_once(std::int64_t count, std::int64_t grain) {
  std::vector<int> hits(static_cast<std::size_t>(count), 0);
  std::atomic<bool> ranges_ok{true};
  parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
    if (begin < 0 || begin >= end || end > count || (end - begin < grain && end != count)) ranges_ok = false;
    for (std::int64_t i = begin; i < end; ++i) ++hits[static_cast<std::size_t>(i)];
  });
  return ranges_ok && std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; });
}

TEST_F(ThreadPool, CoversEveryRangeOnce) {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    ASSERT_EQ(num_threads(), threads);
    for (std::int64_t count : {1, 2, 3, 7, 8, 9, 31, 64, 100, 1000, 4097})
      for (std::int64_t grain : {1, 2, 3, 16, 100, 5000}) EXPECT_TRUE(covers_once(count, grain)) << threads << " " << count << " " << grain;
  }
}

bool rounds_to_nearest() {
  volatile const float one = 1.0f, tiny = 1e-10f;
  volatile const float sum = one + tiny;
  return sum == one;
}

TEST_F(ThreadPool, FloatModeOfTheCallerStaysWithTheCaller) {
  std::fesetround(FE_UPWARD);
  for (int threads : {1, 4}) {
    set_num_threads(threads);  // the next job's workers are made by this thread
    std::atomic<int> num_nearest{0};
    parallel_for(64, 1, [&](std::int64_t begin, std::int64_t end) {
      if (rounds_to_nearest()) num_nearest += static_cast<int>(end - begin);
    });
    EXPECT_EQ(num_nearest, 64) << threads;
    EXPECT_FALSE(rounds_to_nearest());
  }
  std::fesetround(FE_TONEAREST);
}

TEST_F(ThreadPool, EmptyRangeCallsNothing) {
  bool called = false;
  parallel_for(0, 1, [&](std::int64_t, std::int64_t) { called = true; });
  parallel_for(-3, 1, [&](std::int64_t, std::int64_t) { called = true; });
  EXPECT_FALSE(called);
}

TEST_F(ThreadPool, SmallWorkStaysOnTheCaller) {
  set_num_threads(4);
  const std::thread::id caller = std::this_thread::get_id();
  int calls = 0;
  parallel_for(199, 100, [&](std::int64_t begin, std::int64_t end) {
    ++calls;
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 199);
  });
  EXPECT_EQ(calls, 1);
}

TEST_F(ThreadPool, SeveralThreadsTakePart) {
  set_num_threads(4);
  // Every chunk waits until a second thread has come, so that the caller cannot finish alone.
  std::atomic<int> arrived{0};
  parallel_for(4, 1, [&](std::int64_t, std::int64_t) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 4);
}

TEST_F(ThreadPool, SleepingWorkersWakeUp) {
  set_num_threads(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> arrived{0};
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
  }
}

TEST_F(ThreadPool, NestedCallsAreSerial) {
  set_num_threads(4);
  std::atomic<int> total{0}, outer{0};
  parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      ++outer;
      const std::thread::id here = std::this_thread::get_id();
      int calls = 0;
      parallel_for(1000, 1, [&](std::int64_t inner_begin, std::int64_t inner_end) {
        ++calls;
        EXPECT_EQ(std::this_thread::get_id(), here);
        total += static_cast<int>(inner_end - inner_begin);
      });
      EXPECT_EQ(calls, 1);
    }
  });
  EXPECT_EQ(outer, 8);
  EXPECT_EQ(total, 8000);
}

TEST_F(ThreadPool, ConcurrentCallers) {
  set_num_threads(3);
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round)
        if (!covers_once(50 + 13 * caller + round % 7, 1 + round % 5)) ++failures;
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failures, 0);
}

TEST_F(ThreadPool, ResizingWhileInUse) {
  std::atomic<bool> done{false};
  std::atomic<int> failures{0};
  std::thread resizer([&] {
    for (int round = 0; !done; ++round) set_num_threads(1 + round % 5);
  });
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round)
        if (!covers_once(64, 1)) ++failures;
    });
  for (std::thread& caller : callers) caller.join();
  done = true;
  resizer.join();
  EXPECT_EQ(failures, 0);
}

TEST_F(ThreadPool, ResizingFromInsideABody) {
  set_num_threads(4);
  std::atomic<int> total{0};
  parallel_for(16, 1, [&](std::int64_t begin, std::int64_t end) {
    set_num_threads(2);
    total += static_cast<int>(end - begin);
  });
  EXPECT_EQ(total, 16);
  EXPECT_EQ(num_threads(), 2);
  EXPECT_TRUE(covers_once(100, 1));
}

TEST_F(ThreadPool, SizesAreClamped) {
  set_num_threads(0);
  EXPECT_EQ(num_threads(), 1);
  set_num_threads(1 << 20);
  EXPECT_EQ(num_threads(), 1024);
}

TEST_F(ThreadPool, ManySmallJobs) {
  set_num_threads(2);
  std::int64_t sum = 0;
  std::vector<std::int64_t> parts(8);
  for (int round = 0; round < 20000; ++round) {
    parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) parts[static_cast<std::size_t>(i)] = i + round;
    });
    sum += std::accumulate(parts.begin(), parts.end(), std::int64_t{0}) - 28 - 8 * round;
  }
  EXPECT_EQ(sum, 0);
}

#if !defined(__SANITIZE_THREAD__)
// Runs body in a forked child; true when it came back true.
template <typename F>
bool in_child(F body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(body() ? 0 : 1);
  }
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_F(ThreadPool, WorksInAForkedChild) {
  set_num_threads(3);
  ASSERT_TRUE(covers_once(1000, 1));
  EXPECT_TRUE(in_child([] {
    std::atomic<int> arrived{0};
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
    return num_threads() == 3 && covers_once(1000, 1);
  }));
  EXPECT_TRUE(covers_once(1000, 1));
}

TEST_F(ThreadPool, ForkWhileAnotherThreadHasThePool) {
  set_num_threads(2);
  std::atomic<bool> started{false}, release{false};
  std::thread holder([&] {
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      started = true;
      while (!release) std::this_thread::yield();
    });
  });
  while (!started) std::this_thread::yield();
  EXPECT_TRUE(in_child([] { return covers_once(1000, 1); }));
  release = true;
  holder.join();
}

TEST_F(ThreadPool, ProcessExitsWithWorkersAlive) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    set_num_threads(4);
    covers_once(1000, 1);
    std::exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

}  // namespace
}  // namespace quire::cpu
