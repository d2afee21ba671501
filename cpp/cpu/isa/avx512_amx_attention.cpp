// Prefill attention of bfloat16 queries on AMX tiles.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx512_amx
#define QUIRE_ISA_LEVEL 3

#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_bf16.h"

namespace quire::cpu::avx512_amx {
namespace {

/// Tiles 0 to 3 hold sums of 2 x 2 tiles of 16 x 16, 4 and 5 rows of the left operand, 6 and 7 columns of the right one.
struct AmxEngine : Bf16Operands {
  static constexpr int kRowStep = 16;
  static constexpr int kWordStep = 16;

  static QUIRE_INLINE void begin() { load_tile_config(); }
  static QUIRE_INLINE void end() { _tile_release(); }

  template <bool kAdd>
  static void multiply(const std::uint32_t* a, std::int64_t a_stride, int num_rows, const std::uint32_t* b, std::int64_t panel_stride,
                       int num_panels, int num_words, float* c, std::int64_t c_stride) {
    const auto a_bytes = static_cast<std::size_t>(a_stride) * 4, c_bytes = static_cast<std::size_t>(c_stride) * 4;
    for (int panel = 0; panel < num_panels; ++panel) {
      const std::uint32_t* b_panel = b + panel * panel_stride;
      float* c_panel = c + panel * kPanel;
      int row = 0;
      for (; row + 32 <= num_rows; row += 32) {
        const std::uint32_t* a0 = a + row * a_stride;
        const std::uint32_t* a1 = a0 + 16 * a_stride;
        float* c0 = c_panel + row * c_stride;
        float* c1 = c0 + 16 * c_stride;
        if constexpr (kAdd) {
          _tile_loadd(0, c0, c_bytes);
          _tile_loadd(1, c0 + 16, c_bytes);
          _tile_loadd(2, c1, c_bytes);
          _tile_loadd(3, c1 + 16, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int word = 0; word < num_words; word += 16) {
          _tile_loadd(4, a0 + word, a_bytes);
          _tile_loadd(6, b_panel + word * kPanel, kPanel * 4);
          _tile_loadd(7, b_panel + word * kPanel + 16, kPanel * 4);
          _tile_loadd(5, a1 + word, a_bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c0, c_bytes);
        _tile_stored(1, c0 + 16, c_bytes);
        _tile_stored(2, c1, c_bytes);
        _tile_stored(3, c1 + 16, c_bytes);
      }
      if (row < num_rows) {
        const std::uint32_t* a0 = a + row * a_stride;
        float* c0 = c_panel + row * c_stride;
        if constexpr (kAdd) {
          _tile_loadd(0, c0, c_bytes);
          _tile_loadd(1, c0 + 16, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
        }
        for (int word = 0; word < num_words; word += 16) {
          _tile_loadd(4, a0 + word, a_bytes);
          _tile_loadd(6, b_panel + word * kPanel, kPanel * 4);
          _tile_loadd(7, b_panel + word * kPanel + 16, kPanel * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, c0, c_bytes);
        _tile_stored(1, c0 + 16, c_bytes);
      }
    }
  }
};

}  // namespace

extern const AttentionBf16Kernels attention_bf16_kernels;
const AttentionBf16Kernels attention_bf16_kernels = kBf16Kernels<AmxEngine>;

}  // namespace quire::cpu::avx512_amx
#endif
