// Products of float8 and int8 matrices with scales, on CUDA: which kernel, which tile.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/scaled_matmul.h"

#include <algorithm>
#include <limits>
#include <span>
#include <string>

#include "core/explain.h"
#include "cuda/device_code.h"
#include "cuda/launch.h"

namespace quire::cuda {
namespace scaled {
namespace {

// Times in microseconds, fitted to measurements on an H100: what counts is how they compare.
struct Tile {
  int rows, columns;
  bool token_rows;
  float step;   // 128 bytes of the inner dimension
  float store;  // the results
};
constexpr Tile kTiles[] = {{64, 16, false, 0.15f, 0.8f},  {64, 32, false, 0.20f, 0.9f},  {64, 64, false, 0.24f, 1.0f},
                           {64, 128, false, 0.34f, 1.3f}, {128, 64, false, 0.36f, 1.0f}, {128, 128, false, 0.47f, 1.5f},
                           {128, 256, false, 0.71f, 2.5f}};
constexpr Tile kBlockTiles[] = {
    {64, 16, false, 0.15f, 0.8f}, {64, 64, false, 0.30f, 1.0f}, {128, 128, true, 0.52f, 1.5f}, {128, 256, true, 1.0f, 2.5f}};
constexpr float kBytesPerMicrosecond = 2.1e6f;  // of device memory
constexpr float kReadOnce = 0.85f;              // of that time where the L2 cache need not keep the weight,
constexpr float kReadAtOnce = 0.95f;            // and where column tiles read it at one time
constexpr float kFewCtas = 0.12f;               // more of it, the fewer CTAs read

}  // namespace

const char* prevents_wgmma(const ScaledMatmulParams& p, int compute_capability) {
  const auto copies = [&](const void* data, std::int64_t num_rows, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && ((num_rows == 1 && !p.batch_invariant) || (stride > 0 && stride % 16 == 0));
  };
  // Coordinates and counts of tiles are 32-bit.
  constexpr std::int64_t kLargest = std::int64_t{1} << 30;
  if (compute_capability != 90) return "the device is no Hopper (compute capability 9.0)";
  if (!has_hopper_code()) return "this build has no code for sm_90a";
  if (p.dtype == DType::kInt8 && p.granularity_a == ScaleGranularity::kGroup) return "int8 with scales of blocks";
  if (!copies(p.a, p.m, p.a_stride)) return "rows of a do not begin at multiples of 16 bytes";
  if (!copies(p.b, p.n, p.b_stride)) return "rows of b do not begin at multiples of 16 bytes";
  if (p.m >= kLargest || p.n >= kLargest || p.k >= kLargest || ceil_div(p.m, 16) * ceil_div(p.n, 64) >= kLargest)
    return "extents are over 2^30";
  return nullptr;
}

WgmmaChoice choose_wgmma(const ScaledMatmulParams& p, int num_sms) {
  const bool blocks = p.granularity_a == ScaleGranularity::kGroup;
  const std::span<const Tile> tiles = blocks ? std::span<const Tile>(kBlockTiles) : std::span<const Tile>(kTiles);
  // Sums of int8 are exact in any order.
  const bool may_split = !p.batch_invariant || p.dtype == DType::kInt8;
  const std::int64_t num_steps = ceil_div(p.k, 128);
  const float memory_time = static_cast<float>((p.m + p.n) * p.k + p.m * p.n * itemsize(p.out_dtype)) / kBytesPerMicrosecond;
  WgmmaChoice best{};
  float best_time = std::numeric_limits<float>::infinity();
  for (const Tile& tile : tiles) {
    if (tile.columns < 64 && tile.columns < p.m) continue;  // reads the weight more than once
    const std::int64_t num_column_tiles = ceil_div(tile.token_rows ? p.n : p.m, tile.columns);
    const std::int64_t num_tiles = ceil_div(tile.token_rows ? p.m : p.n, tile.rows) * num_column_tiles;
    const bool is_half_tile = tile.rows == 64 && tile.columns == 128;  // for a single wave
    if (is_half_tile && num_tiles > num_sms) continue;
    for (const int splits : {1, 2, 4}) {
      // Clusters of four do not fill every part of the chip.
      const std::int64_t at_once = splits == 4 ? std::max(num_sms / 4 - 4, 1) : num_sms / splits;
      if (splits > 1 && (!may_split || (tile.columns == 256 && !blocks) || num_tiles > at_once || num_steps < 4 * splits)) break;
      // Where there are many large tiles, two CTAs share columns, and the last tiles may be halved.
      const bool is_large = tile.columns == 256 && num_tiles > num_sms;
      const bool shares = is_large || (is_half_tile && splits == 1 && p.n > tile.rows);
      const std::int64_t rest = num_tiles % at_once;
      const bool halves = is_large && !blocks && rest > 0 && 2 * rest <= at_once;
      const float waves = static_cast<float>(num_tiles / at_once) + (rest == 0 ? 0.0f : halves ? 0.65f : 1.0f);
      const float ctas = static_cast<float>(std::min(num_tiles * splits, std::int64_t{num_sms})) / static_cast<float>(num_sms);
      const float once = tile.token_rows || (num_column_tiles > 1 && num_tiles > at_once) ? 1.0f
                         : num_column_tiles == 1                                          ? kReadOnce
                                                                                          : kReadAtOnce;
      const float memory = memory_time * once * (1.0f + kFewCtas * (1.0f - ctas));
      // A step is faster while fewer CTAs load; with blocks it waits for sums instead.
      const float step = blocks ? tile.step : tile.step * (0.5f + 0.5f * ctas);
      const float exchange = splits > 1 ? (0.5f + 0.009f * static_cast<float>(tile.columns)) * static_cast<float>(splits) / 2.0f : 0.0f;
      // All but the last results are stored while memory may be busy.
      const float time = std::max(waves * static_cast<float>(ceil_div(num_steps, splits)) * step + (waves - 1.0f) * tile.store, memory) +
                         tile.store + exchange;
      if (time < best_time) {
        best_time = time;
        best = WgmmaChoice{tile.rows, tile.columns, tile.token_rows, shares ? 2 : 1, splits, halves};
      }
    }
  }
  return best;
}

namespace {

void explain(const ScaledMatmulParams& p, const char* obstacle, int num_sms, Explanation& explanation) {
  explanation.variant = obstacle == nullptr ? "wgmma" : "mma";
  if (obstacle != nullptr) {
    explanation.reasons.push_back(std::string("not wgmma: ") + obstacle);
    return;
  }
  const WgmmaChoice choice = choose_wgmma(p, num_sms);
  explanation.reasons.push_back("tiles of " + std::to_string(choice.rows) + (choice.token_rows ? " rows of a and " : " rows of b and ") +
                                std::to_string(choice.columns) + (choice.token_rows ? " of b" : " of a"));
  if (choice.splits > 1) explanation.reasons.push_back("each tile's k in " + std::to_string(choice.splits) + " parts, as tiles are few");
  if (choice.shared_columns > 1) explanation.reasons.emplace_back("two CTAs share what they read, as tiles are many");
}

}  // namespace

}  // namespace scaled

void scaled_matmul(const ScaledMatmulParams& p, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  const char* const obstacle = scaled::prevents_wgmma(p, device.compute_capability);
  if (Explanation* const explanation = explaining()) return scaled::explain(p, obstacle, device.num_sms, *explanation);
  if (obstacle != nullptr) return scaled::launch_mma(p, stream);
  const scaled::WgmmaChoice choice = scaled::choose_wgmma(p, device.num_sms);
  if (p.dtype == DType::kInt8) {
    scaled::launch_wgmma_int8(p, choice, stream);
  } else {
    scaled::launch_wgmma_float8(p, choice, stream);
  }
}

std::int64_t scaled_matmul_workspace_size(std::int64_t, std::int64_t, std::int64_t, DType, bool, bool) { return 0; }

}  // namespace quire::cuda
