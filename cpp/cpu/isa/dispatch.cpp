// Finds the instruction set of the machine, by cpuid and by what the operating system saves.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "quire/runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire::cpu {
namespace {

constexpr Isa kLevels[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Amx};

#if defined(__x86_64__)
std::uint64_t read_xcr0() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// Linux gives the tile registers' state only to processes that ask for it.
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

Isa detect() {
  unsigned a = 0, b1 = 0, c1 = 0, d1 = 0;
  if (!__get_cpuid(1, &a, &b1, &c1, &d1)) return Isa::kScalar;
  const bool has_xsave = c1 & bit_OSXSAVE;
  const std::uint64_t xcr0 = has_xsave ? read_xcr0() : 0;
  unsigned b7 = 0, c7 = 0, d7 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Isa::kScalar;
  unsigned a71 = 0, b71 = 0, c71 = 0, d71 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);

  constexpr std::uint64_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
  const auto saves = [xcr0](std::uint64_t state) { return (xcr0 & state) == state; };
  const auto all = [](unsigned word, unsigned wanted) { return (word & wanted) == wanted; };
  constexpr unsigned kAvx512VnniInC7 = 1u << 11, kAvx512Bf16InA71 = 1u << 5, kAmxBf16InD7 = 1u << 22, kAmxTileInD7 = 1u << 24, kAmxInt8InD7 = 1u << 25;

  if (!saves(kYmmState) || !all(c1, bit_FMA | bit_F16C | bit_AVX) || !all(b7, bit_AVX2)) return Isa::kScalar;
  if (!saves(kZmmState) || !all(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) || !all(c7, kAvx512VnniInC7) ||
      !all(a71, kAvx512Bf16InA71))
    return Isa::kAvx2;
  if (!saves(kTileState) || !all(d7, kAmxBf16InD7 | kAmxTileInD7 | kAmxInt8InD7) || !request_amx()) return Isa::kAvx512;
  return Isa::kAvx512Amx;
}
#else
Isa detect() { return Isa::kScalar; }
#endif

Isa requested() {
  const Isa highest = max_isa();
  if (const char* text = std::getenv("QUIRE_CPU_ISA"))
    for (Isa level : kLevels)
      if (std::strcmp(text, name(level)) == 0) return std::min(level, highest);
  return highest;
}

constexpr std::uint8_t kUnset = 255;
std::atomic<std::uint8_t> active_level{kUnset};

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Amx: return "avx512_amx";
  }
  return "unknown";
}

Isa max_isa() {
  static const Isa highest = detect();
  return highest;
}

Isa isa() {
  std::uint8_t level = active_level.load(std::memory_order_relaxed);
  if (level == kUnset) {
    // An override that came meanwhile wins.
    const auto fresh = static_cast<std::uint8_t>(requested());
    if (active_level.compare_exchange_strong(level, fresh, std::memory_order_relaxed)) level = fresh;
  }
  return static_cast<Isa>(level);
}

void set_isa(Isa isa) { active_level.store(static_cast<std::uint8_t>(std::min(isa, max_isa())), std::memory_order_relaxed); }

}  // namespace quire::cpu

namespace quire {

std::string cpu_isa() { return cpu::name(cpu::isa()); }

}  // namespace quire
