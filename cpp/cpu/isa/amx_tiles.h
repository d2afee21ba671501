// The AMX tiles of a thread, as the kernels of all families use them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

/// Eight tiles of 16 rows of 64 bytes, until _tile_release(), without which every switch of the thread would save them.
QUIRE_INLINE void load_tile_config() {
  struct alignas(64) {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t num_rows[16];
  } config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.num_rows[tile] = 16;
  }
  // GCC 12 declares 8 of the 64 bytes as read, and could drop the other stores.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
