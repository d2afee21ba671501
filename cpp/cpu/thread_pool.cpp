// The CPU backend's thread pool: workers that spin briefly, then sleep on a futex.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace quire::cpu {
namespace {

using Body = FunctionRef<void(std::int64_t, std::int64_t)>;

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 2000;
// Ranges are claimed dynamically; several per thread keep a core that is late or shared from holding up the others.
constexpr std::int64_t kChunksPerThread = 4;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The control register of floating point: rounding, subnormals, traps.
std::uint64_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  std::uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode([[maybe_unused]] std::uint64_t mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

#if defined(__x86_64__)
constexpr std::uint64_t kDefaultFloatMode = 0x1f80, kFloatFlags = 0x3f;  // what an operation met is no part of the mode
#else
constexpr std::uint64_t kDefaultFloatMode = 0, kFloatFlags = 0;
#endif

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<std::uint32_t>& word, std::uint32_t num_waiters) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, num_waiters, nullptr, nullptr, 0);
}

// True on workers, and on a caller while its job runs: a nested call is serial.
thread_local bool inside_parallel_for = false;

class Pool {
 public:
  // False when another thread has the pool: the caller then does its work alone.
  bool try_run(std::int64_t count, std::int64_t chunk, std::uint32_t num_chunks, int num_threads, const Body& body) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    if (configured_threads_ != num_threads) restart(num_threads);
    body_ = &body;
    count_ = count;
    chunk_ = chunk;
    remaining_.store(num_chunks, std::memory_order_relaxed);
    ticket_.store(static_cast<std::uint64_t>(num_chunks) << 32, std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    const std::uint32_t sleepers = num_sleepers_.load(std::memory_order_seq_cst);
    if (sleepers > 0) futex_wake(epoch_, std::min(sleepers, num_chunks - 1));
    work();
    wait_for_completion();
    return true;
  }

 private:
  static bool has_chunk(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket) < static_cast<std::uint32_t>(ticket >> 32); }

  // Claims and runs chunks until none is left. The job's fields are read only after a claim: the job that the claim belongs to
  // cannot end before this chunk does, so a worker that comes late reads either nothing or the right job.
  void work() {
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (has_chunk(ticket)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const std::int64_t begin = static_cast<std::int64_t>(static_cast<std::uint32_t>(ticket)) * chunk_;
      (*body_)(begin, std::min(begin + chunk_, count_));
      if (remaining_.fetch_sub(1, std::memory_order_seq_cst) == 1 && caller_sleeps_.load(std::memory_order_seq_cst))
        futex_wake(remaining_, 1);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void wait_for_completion() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (remaining_.load(std::memory_order_acquire) == 0) return;
      pause_cpu();
    }
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    for (std::uint32_t left; (left = remaining_.load(std::memory_order_seq_cst)) != 0;) futex_wait(remaining_, left);
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }

  void run_worker() {
    set_float_mode(kDefaultFloatMode);  // a thread begins with its maker's
    inside_parallel_for = true;
    while (!stop_.load(std::memory_order_acquire)) {
      work();
      int spin = 0;
      while (spin < kSpins && !has_chunk(ticket_.load(std::memory_order_relaxed)) && !stop_.load(std::memory_order_relaxed)) {
        pause_cpu();
        ++spin;
      }
      if (spin < kSpins) continue;
      const std::uint32_t epoch = epoch_.load(std::memory_order_seq_cst);
      num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (!has_chunk(ticket_.load(std::memory_order_seq_cst)) && !stop_.load(std::memory_order_seq_cst)) futex_wait(epoch_, epoch);
      num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (num_workers_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake(num_workers_, 1);
  }

  // Called with the mutex held and no job open.
  void restart(int num_threads) {
    stop_.store(true, std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(epoch_, kMaxThreads);
    for (std::uint32_t left; (left = num_workers_.load(std::memory_order_acquire)) != 0;) futex_wait(num_workers_, left);
    stop_.store(false, std::memory_order_seq_cst);

    // Signals belong to the application's threads.
    sigset_t all_signals, old_signals;
    sigfillset(&all_signals);
    pthread_sigmask(SIG_SETMASK, &all_signals, &old_signals);
    for (int i = 1; i < num_threads; ++i) {
      num_workers_.fetch_add(1, std::memory_order_relaxed);
      try {
        // Detached: at exit the process ends under the workers, which touch nothing that a destructor frees.
        std::thread([this] { run_worker(); }).detach();
      } catch (const std::system_error&) {
        // The system has no more threads to give: the pool works with those it got.
        num_workers_.fetch_sub(1, std::memory_order_relaxed);
        break;
      }
    }
    pthread_sigmask(SIG_SETMASK, &old_signals, nullptr);
    configured_threads_ = num_threads;
  }

  std::mutex mutex_;
  int configured_threads_ = 1;
  const Body* body_ = nullptr;
  std::int64_t count_ = 0, chunk_ = 0;
  alignas(64) std::atomic<std::uint64_t> ticket_{0};  // number of chunks << 32 | next chunk
  alignas(64) std::atomic<std::uint32_t> remaining_{0};
  std::atomic<bool> caller_sleeps_{false};
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  std::atomic<std::uint32_t> num_sleepers_{0}, num_workers_{0};
  std::atomic<bool> stop_{false};
};

// Never deleted: workers outlive static destruction.
std::atomic<Pool*> global_pool{nullptr};
std::atomic<int> global_num_threads{0};

// A child of fork() has none of the workers, and perhaps a mutex that nobody will unlock: it drops the pool and builds its own.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { global_pool.store(nullptr, std::memory_order_relaxed); });

Pool& pool() {
  Pool* current = global_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  Pool* fresh = new Pool;
  if (global_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel, std::memory_order_acquire)) return *fresh;
  delete fresh;
  return *current;
}

int affinity_count() {
  // The kernel refuses masks smaller than its own; it supports at most 8192 CPUs by default, more when so configured.
  for (int num_cpus = 1024; num_cpus <= (1 << 20); num_cpus *= 2) {
    std::vector<unsigned char> mask(CPU_ALLOC_SIZE(num_cpus), 0);
    auto* set = reinterpret_cast<cpu_set_t*>(mask.data());
    if (sched_getaffinity(0, mask.size(), set) == 0) return std::clamp(CPU_COUNT_S(mask.size(), set), 1, kMaxThreads);
    if (errno != EINVAL) break;
  }
  return 1;
}

int default_num_threads() {
  if (const char* text = std::getenv("QUIRE_NUM_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && value >= 1) return static_cast<int>(std::min<long>(value, kMaxThreads));
  }
  return affinity_count();
}

}  // namespace

DefaultFloatMode::DefaultFloatMode() : callers_(float_mode()) {
  if ((callers_ & ~kFloatFlags) != kDefaultFloatMode) set_float_mode(kDefaultFloatMode);
}

DefaultFloatMode::~DefaultFloatMode() {
  if ((callers_ & ~kFloatFlags) != kDefaultFloatMode) set_float_mode(callers_);
}

int num_threads() {
  int value = global_num_threads.load(std::memory_order_relaxed);
  if (value == 0) {
    int unset = 0;
    value = default_num_threads();
    if (!global_num_threads.compare_exchange_strong(unset, value, std::memory_order_relaxed)) value = unset;
  }
  return value;
}

void set_num_threads(int num_threads) { global_num_threads.store(std::clamp(num_threads, 1, kMaxThreads), std::memory_order_relaxed); }

void parallel_for(std::int64_t count, std::int64_t grain, Body body) {
  if (count <= 0) return;
  const DefaultFloatMode mode;
  grain = std::max<std::int64_t>(grain, 1);
  // With less than two grains one thread does it all.
  const int threads = count / 2 < grain ? 1 : num_threads();
  if (threads == 1 || inside_parallel_for) {
    body(0, count);
    return;
  }
  const std::int64_t max_chunks = std::min(count / grain, threads * kChunksPerThread);
  const std::int64_t chunk = (count + max_chunks - 1) / max_chunks;
  const auto num_chunks = static_cast<std::uint32_t>((count + chunk - 1) / chunk);
  inside_parallel_for = true;
  const bool done = pool().try_run(count, chunk, num_chunks, threads, body);
  inside_parallel_for = false;
  if (!done) body(0, count);
}

}  // namespace quire::cpu
