// Which instruction set the CPU kernels use, and the tables of kernels to choose from.
// SPDX-License-Identifier: Apache-2.0
//
// How a family adds its kernels: a header of templates in QUIRE_ISA_NAMESPACE over cpu/isa/vec.h, one plain struct of function
// pointers, and in each per-ISA unit (file name and compile flags by level: scalar*.cpp, avx2*.cpp, avx512*.cpp, avx512_amx*.cpp) one
// constant of that struct. The orchestration finds them in cpu/isa/tables.h.
#pragma once

#include <cstdint>

namespace quire::cpu {

/// Each level contains those before it. kAvx2: AVX2, FMA, F16C. kAvx512: F, BW, DQ, VL, VNNI, BF16. kAvx512Amx: AMX tiles with bf16 and int8.
enum class Isa : std::uint8_t { kScalar, kAvx2, kAvx512, kAvx512Amx };

const char* name(Isa isa);

/// The highest level of this machine and operating system.
Isa max_isa();

/// The level in use: max_isa(), or less by the environment variable QUIRE_CPU_ISA.
Isa isa();

/// Changes the level in use for the whole process, at most to max_isa(). For tests.
void set_isa(Isa isa);

/// A family's kernel tables by level. A null level uses the next lower one; the scalar one must be there.
template <typename Kernels>
struct IsaTables {
  const Kernels* by_level[4];  // indexed by Isa

  const Kernels& at(Isa isa) const {
    auto level = static_cast<unsigned>(isa);
    while (by_level[level] == nullptr) --level;
    return *by_level[level];
  }
  const Kernels& active() const { return at(isa()); }
};

}  // namespace quire::cpu

/// In namespace quire::cpu: declares each level's constant `table` and the choice between them, of the same name.
#if defined(__x86_64__)
#define QUIRE_ISA_TABLES(Kernels, table) \
  namespace scalar {                     \
  extern const Kernels table;            \
  }                                      \
  namespace avx2 {                       \
  extern const Kernels table;            \
  }                                      \
  namespace avx512 {                     \
  extern const Kernels table;            \
  }                                      \
  constexpr IsaTables<Kernels> table = {{&scalar::table, &avx2::table, &avx512::table, nullptr}}
#else
#define QUIRE_ISA_TABLES(Kernels, table) \
  namespace scalar {                     \
  extern const Kernels table;            \
  }                                      \
  constexpr IsaTables<Kernels> table = {{&scalar::table, nullptr, nullptr, nullptr}}
#endif
