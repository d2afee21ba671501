// Runtime state of the core that needs no CUDA: version, deferred errors, host memory.
// SPDX-License-Identifier: Apache-2.0
#include "core/runtime.h"

#include <charconv>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "cpu/thread_pool.h"
#include "cuda/runtime.h"
#include "quire/version.h"

namespace quire {
namespace {

std::mutex cpu_error_mutex;
ErrorWord cpu_error{};

constexpr std::size_t kHostAlignment = 64;

void* allocate_host(std::int64_t num_bytes) {
  const std::size_t bytes = (static_cast<std::size_t>(num_bytes) + kHostAlignment - 1) / kHostAlignment * kHostAlignment;
  return std::aligned_alloc(kHostAlignment, bytes == 0 ? kHostAlignment : bytes);
}

// A number from a file of the kernel's: behind `key`, or the file's first word. Nothing where there is none.
std::optional<std::int64_t> read_number(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  if (key.empty()) {
    file >> word;
  } else {
    while (file >> word && word != key) {
    }
    file >> word;
  }
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (!file || error != std::errc()) return std::nullopt;
  return value;
}

// False where the kernel would hand out more than it has and end the process later, when the memory is touched.
bool host_memory_suffices(std::int64_t num_bytes) {
  constexpr std::int64_t kWorthAsking = std::int64_t{1} << 28;
  if (num_bytes < kWorthAsking) return true;
  const std::optional<std::int64_t> available = read_number("/proc/meminfo", "MemAvailable:");
  if (available && num_bytes / 1024 > *available) return false;
  const std::optional<std::int64_t> limit = read_number("/sys/fs/cgroup/memory.max", "");
  const std::optional<std::int64_t> used = read_number("/sys/fs/cgroup/memory.current", "");
  return !limit || num_bytes <= *limit - used.value_or(0);
}

void check_size(std::int64_t num_bytes) {
  if (num_bytes < 0 || num_bytes > (std::int64_t{1} << 62))
    throw std::invalid_argument("[Buffer] num_bytes: expected 0 or more, got " + std::to_string(num_bytes));
}

}  // namespace

const char* version() { return QUIRE_VERSION; }

bool has_cuda() { return kHasCuda; }

void set_num_threads(int num_threads) {
  if (num_threads < 1 || num_threads > 1024)
    throw std::invalid_argument("[set_num_threads] num_threads: expected 1 to 1024, got " + std::to_string(num_threads));
  cpu::set_num_threads(num_threads);
}

int num_threads() { return cpu::num_threads(); }

void throw_cpu_only_build(const char* op, const char* what) {
  throw UnsupportedError(std::string("[") + op + "] " + what + ": this build of quire contains no CUDA kernels; " +
                         "reinstall with -C quire.cuda=on (or quire.cuda=pypi, where there is no CUDA toolkit)");
}

const char* name(OpId op) {
  switch (op) {
    case OpId::kNone: return "none";
    case OpId::kPagedAttention: return "paged_attention";
    case OpId::kAttention: return "attention";
    case OpId::kWriteKv: return "write_kv";
    case OpId::kGatherKv: return "gather_kv";
    case OpId::kCopyBlocks: return "copy_blocks";
    case OpId::kRotaryEmbedding: return "rotary_embedding";
    case OpId::kQkNormRope: return "qk_norm_rope";
    case OpId::kRopeAndWriteKv: return "rope_and_write_kv";
    case OpId::kSharedPrefixAttention: return "shared_prefix_attention";
  }
  return "unknown";
}

const char* name(ArgId arg) {
  switch (arg) {
    case ArgId::kNone: return "none";
    case ArgId::kBlockTables: return "block_tables";
    case ArgId::kSeqLens: return "seq_lens";
    case ArgId::kQueryStartLoc: return "query_start_loc";
    case ArgId::kKvStartLoc: return "kv_start_loc";
    case ArgId::kSlotMapping: return "slot_mapping";
    case ArgId::kPairs: return "pairs";
    case ArgId::kPositions: return "positions";
    case ArgId::kPrefixBlocks: return "prefix_blocks";
  }
  return "unknown";
}

void record_cpu_error(OpId op, ArgId arg, std::int64_t index, std::int64_t value) noexcept {
  const std::lock_guard lock(cpu_error_mutex);
  if (cpu_error.state == 0) cpu_error = ErrorWord{1, op, arg, 0, index, value};
}

ErrorWord take_cpu_error() {
  const std::lock_guard lock(cpu_error_mutex);
  return std::exchange(cpu_error, ErrorWord{});
}

void check_errors(Device device) {
  ErrorWord error{};
  if (device.type == DeviceType::kCPU) {
    error = take_cpu_error();
  } else if constexpr (kHasCuda) {
    error = cuda::take_error(device.index);
  } else {
    throw_cpu_only_build("check_errors");
  }
  if (error.state != 0)
    throw IndexError(std::string("[") + name(error.op) + "] " + name(error.arg) + ": expected a value in range (or -1 to skip), got " +
                     std::to_string(error.value) + " at index " + std::to_string(error.index) + " on " + describe(device) +
                     "; the entry was skipped");
}

std::shared_ptr<Buffer> Buffer::allocate(std::int64_t num_bytes, Device device) {
  check_size(num_bytes);
  void* data = nullptr;
  if (device.type == DeviceType::kCPU) {
    if (host_memory_suffices(num_bytes)) data = allocate_host(num_bytes);
    if (data == nullptr)
      throw OutOfMemoryError("[Buffer] num_bytes: expected memory on cpu, could not get " + std::to_string(num_bytes) + " bytes");
  } else if constexpr (kHasCuda) {
    data = cuda::allocate_device(num_bytes, device.index);
  } else {
    throw_cpu_only_build("Buffer");
  }
  return std::shared_ptr<Buffer>(new Buffer(data, num_bytes, device, false));
}

std::shared_ptr<Buffer> Buffer::allocate_pinned(std::int64_t num_bytes) {
  check_size(num_bytes);
  if constexpr (kHasCuda) {
    return std::shared_ptr<Buffer>(new Buffer(cuda::allocate_pinned(num_bytes), num_bytes, Device{}, true));
  } else {
    throw_cpu_only_build("Buffer", "pinned: expected pageable memory, got page-locked");
  }
}

Buffer::~Buffer() {
  if constexpr (kHasCuda) {
    if (device_.type == DeviceType::kCUDA) {
      cuda::free_device(data_, device_.index);
      return;
    }
    if (pinned_) {
      cuda::free_pinned(data_);
      return;
    }
  }
  std::free(data_);
}

#ifndef QUIRE_HAS_CUDA
int num_cuda_devices() { return 0; }
std::string cuda_architectures() { return {}; }
int cuda_runtime_version() { return 0; }
#endif

}  // namespace quire
