// launch_split_keys's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_cluster_keys.cuh"
#include "cuda/attention/mma_cluster_parts.cuh"
#include "cuda/attention/mma_split_keys.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/once_per_device.h"
#include "cuda/tensor_map.h"

namespace quire::cuda::attn {

/// Whether there is attention_mma_box_keys_kernel for the same calls.
template <DType kKvDType, int kHeadDim, Variant kVariant, Pairing kPairing>
constexpr bool kHasBoxes =
    kVariant == Variant::kMmaSplitKeys8 && kPairing == Pairing::kWarps && has_box_stretches(itemsize(kKvDType), kHeadDim);

/// Whether attention_mma_split_keys_kernel has attend_in_clusters, too.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing>
constexpr bool kHasClusters = kWide && kVariant == Variant::kMmaSplitKeys8 && !kHasBoxes<kKvDType, kHeadDim, kVariant, kPairing>;

/// Whether there is attend_to_parts for the same.
template <Variant kVariant, bool kWide, Pairing kPairing>
constexpr bool kHasParts = !kWide && kVariant == Variant::kMmaSplitKeys8 && kPairing == Pairing::kNone;

struct NoMaps {};
template <bool kHas>
using MapsOf = std::conditional_t<kHas, KeyMaps, NoMaps>;

/// kHeadDim of a kv head that is not paired.
__host__ __device__ constexpr int head_dim_alone(int head_dim, Pairing pairing) {
  return pairing == Pairing::kColumns ? head_dim / 2 : head_dim;
}

/// Kv heads to a tile of such a kernel's clusters.
template <DType kKvDType, int kHeadDim, Pairing kPairing>
constexpr int kTeamOf = heads_of_team(kPairing, head_dim_alone(kHeadDim, kPairing) * itemsize(kKvDType));

/// Grid: as many CTAs as the device holds, or fewer; plan.cluster of them to a tile if there are clusters.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing>
__global__ void __launch_bounds__(SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>::kCtaThreads,
                                  SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>::kCtasPerSm)
    attention_mma_split_keys_kernel(const __grid_constant__ Plan plan,
                                    const __grid_constant__ MapsOf<kHasClusters<kKvDType, kHeadDim, kVariant, kWide, kPairing>> maps) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kHasClusters<kKvDType, kHeadDim, kVariant, kWide, kPairing>) {
    constexpr int kAlone = head_dim_alone(kHeadDim, kPairing), kTeam = kTeamOf<kKvDType, kHeadDim, kPairing>;
    if (plan.in_clusters && attend_in_clusters<kKvDType, kAlone, 2 * kWarps, kPairing != Pairing::kNone, kTeam>(plan, maps)) return;
  }
#endif
  device::wait_for_predecessor();
  attend_to_stretches<kKvDType, kHeadDim, kVariant, kWide, kPairing>(plan);
}

template <DType kKvDType, int kHeadDim, bool kWide>
using BoxShapeOf = BoxKeysShape<SplitKeysShape<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, kWide, Pairing::kWarps>>;

/// The same for pairs of heads whose keys the copy engine brings; plan.cluster CTAs to a tile, if there are clusters, which kWide has.
template <DType kKvDType, int kHeadDim, bool kWide>
__global__ void __launch_bounds__(BoxShapeOf<kKvDType, kHeadDim, kWide>::kCtaThreads, BoxShapeOf<kKvDType, kHeadDim, kWide>::kCtasPerSm)
    attention_mma_box_keys_kernel(const __grid_constant__ Plan plan, const __grid_constant__ KeyMaps maps) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kWide) {
    if (plan.in_clusters && attend_in_clusters<kKvDType, kHeadDim, 2 * kWarps, true, 2>(plan, maps)) return;
  }
  extern __shared__ __align__(1024) char shared[];
  if (threadIdx.x % (32 * BoxShapeOf<kKvDType, kHeadDim, kWide>::kTeamHeads) == 0) {
    BoxStream<BoxShapeOf<kKvDType, kHeadDim, kWide>>(plan, maps, shared).init();
    device::barrier_init_fence();
  }
  if (threadIdx.x == 32) device::prefetch_tensor_map(&maps.k);
  if (threadIdx.x == 64) device::prefetch_tensor_map(&maps.v);
  device::wait_for_predecessor();
  attend_to_stretches<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, kWide, Pairing::kWarps, 0, true>(plan, -1, &maps);
#endif
}

/// The same for batch-invariant decode that may find lengths alike: plan.cluster CTAs to a tile, or whole tiles to CTAs.
template <DType kKvDType, int kHeadDim>
__global__ void __launch_bounds__(PartsShape<kKvDType, kHeadDim>::kCtaThreads, PartsShape<kKvDType, kHeadDim>::kCtasPerSm)
    attention_mma_parts_kernel(const __grid_constant__ Plan plan, const __grid_constant__ KeyMaps maps) {
#if __CUDA_ARCH__ == 900
  using Shape = PartsShape<kKvDType, kHeadDim>;
  constexpr int kHeads = Shape::kTeamHeads;
  device::wait_for_predecessor();
  prefetch_tables<Shape::kCtaThreads>(plan.params);
  const bool alike = lengths_are_alike(plan);
  int lone_tile = kNothing, heads_left = 0;
  for (bool resumes = false;; resumes = true) {
    if (alike && heads_left == 0) {
      const int unfinished = attend_to_parts<kKvDType, kHeadDim>(plan, maps, resumes);
      if (unfinished == kNothing) return;
      lone_tile = unfinished * kHeads;
      heads_left = kHeads;
    }
    // One copy of the code serves both: a tile alone is that of a CTA's first threads.
    if (!alike || threadIdx.x < kThreads)
      attend_to_stretches<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, false, Pairing::kNone, Shape::kTeam>(plan, lone_tile);
    if (!alike) return;
    ++lone_tile, --heads_left;
    __syncthreads();
  }
#endif
}

/// The same for one sequence: clusters alone, whose CTAs have all of an SM's warps. Clusters of CTAs of which an SM could hold two do not leave SMs
/// evenly.
template <DType kKvDType, int kHeadDim, bool kInPairs>
__global__ void __launch_bounds__(ClusterKeysShape<kKvDType, kHeadDim, kLoneWarps, 1>::kCtaThreads, 1)
    attention_mma_cluster_keys_kernel(const __grid_constant__ Plan plan, const __grid_constant__ KeyMaps maps) {
#if __CUDA_ARCH__ >= 900
  attend_in_clusters<kKvDType, kHeadDim, kLoneWarps, kInPairs, 1>(plan, maps);
#endif
}

/// The most CTAs, up to `limit`, of which `num_clusters` clusters run at once; 0 if there is no such size.
template <auto kKernel>
int largest_cluster(int num_threads, int shared_bytes, int limit, std::int64_t num_clusters) {
  for (int size = limit; size > 0; --size) {
    const LaunchShape shape{static_cast<unsigned>(size), static_cast<unsigned>(num_threads), shared_bytes, size};
    if (max_active_clusters<kKernel>(shape) >= num_clusters) return size;
  }
  return 0;
}

/// K or V as {head_dim, slot in its block, kv head, block}, in boxes of keys_per_box slots of heads_per_box kv heads.
/// The L2 is asked for no more than a box has: that made long calls 5 % slower on an H200.
inline CUtensorMap make_key_map(const AttentionParams& p, const void* base, std::int64_t block_stride, std::int64_t token_stride,
                                std::int64_t head_stride, std::int64_t num_kv_heads, int panel_bytes, int keys_per_box, int heads_per_box) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.block_size),
                               static_cast<cuuint64_t>(num_kv_heads), static_cast<cuuint64_t>(p.num_blocks)};
  const std::int64_t item = itemsize(p.kv_dtype);
  // Strides of dimensions of size 1 are not used, but must look well.
  const auto bytes = [&](cuuint64_t size, std::int64_t stride) { return size > 1 ? static_cast<cuuint64_t>(stride * item) : 16; };
  const cuuint64_t strides[3] = {bytes(sizes[1], token_stride), bytes(sizes[2], head_stride), bytes(sizes[3], block_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(panel_bytes / item), static_cast<cuuint32_t>(keys_per_box),
                             static_cast<cuuint32_t>(heads_per_box), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, item == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
                                       const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       panel_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

/// `in_pairs`: a kv head of p is two.
template <typename Shape>
KeyMaps make_key_maps(const AttentionParams& p, bool in_pairs) {
  const int heads = in_pairs ? 2 : 1;
  const int keys = static_cast<int>(std::min<std::int64_t>(p.block_size & -p.block_size, Shape::kMaxBoxKeys));
  const auto make = [&](const void* base, std::int64_t block_stride, std::int64_t token_stride, std::int64_t head_stride) {
    return make_key_map(p, base, block_stride, token_stride, head_stride / heads, p.num_kv_heads * heads, Shape::KvRows::kPanelRowBytes,
                        keys, Shape::kTeamHeads);
  };
  return KeyMaps{make(p.k, p.k_block_stride, p.k_token_stride, p.k_head_stride),
                 make(p.v, p.v_block_stride, p.v_token_stride, p.v_head_stride),
                 static_cast<int>(std::bit_width(static_cast<unsigned>(keys))) - 1};
}

/// Keys of so many bytes, a few times the L2 cache's size, leave it to what is there: dirty lines would be written back while they are read. Longer calls
/// are faster if memory sees no such reads.
constexpr std::int64_t kReadOnceBytes = 192 << 20;

/// The longest sequences of so much, if all are alike.
inline int read_once_keys(const Plan& plan) {
  const AttentionParams& p = plan.params;
  const std::int64_t bytes_of_key = p.num_seqs * (p.num_heads / plan.kv_group.divisor) * p.head_dim * itemsize(p.kv_dtype) * 2;
  return static_cast<int>(std::min<std::int64_t>(kReadOnceBytes / bytes_of_key, std::numeric_limits<int>::max()));
}

/// The longest stretches of so much, by steps of so many bytes of K.
inline int read_once_stretch(const Plan& plan, std::int64_t step_bytes) {
  return static_cast<int>(kReadOnceBytes / (plan.num_ctas * step_bytes * 2) >> plan.line_shift);
}

/// Launches the kernel with up to `limit` CTAs to a tile, at least `min_size`; false if it cannot.
template <typename Shape, auto kKernel>
bool launch_clusters(const char* name, Plan plan, const KeyMaps& maps, int limit, int min_size, std::int64_t num_tiles, int shared_bytes,
                     Stream stream) {
  if (limit > 8)
    known_of_device([] {
      QUIRE_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      return true;
    });
  const int size = limit == 1 ? 1 : largest_cluster<kKernel>(Shape::kCtaThreads, shared_bytes, limit, num_tiles);
  if (size < min_size) return false;
  plan.cluster = Divisor::make(size);
  plan.in_clusters = true;
  plan.num_ctas = static_cast<int>(std::min<std::int64_t>(plan.num_ctas, num_tiles * size));
  plan.tiles_per_cta = 0;  // what was chosen for equal lengths was for another number of CTAs
  plan.read_once_keys = read_once_keys(plan);
  const LaunchShape shape{static_cast<unsigned>(num_tiles * size), Shape::kCtaThreads, shared_bytes, size};
  launch_waiting(name, kKernel, shape, stream, plan, maps);
  return true;
}

/// Launches attention_mma_box_keys_kernel, in clusters or without.
template <DType kKvDType, int kHeadDim, bool kWide>
void launch_by_boxes(Plan plan, const Config& config, std::int64_t num_head_tiles, Stream stream) {
  using Shape = BoxShapeOf<kKvDType, kHeadDim, kWide>;
  static_assert(Shape::kSharedBytes <= kWideSharedBytes / Shape::kCtasPerSm);
  constexpr auto kKernel = attention_mma_box_keys_kernel<kKvDType, kHeadDim, kWide>;
  plan.read_once_stretch = read_once_stretch(plan, Shape::kTeamSlotBytes);
  if constexpr (kWide) {
    using Cluster = ClusterKeysShape<kKvDType, kHeadDim, 2 * kWarps, Shape::kTeamHeads>;
    constexpr int kSharedBytes = std::max(Shape::kSharedBytes, Cluster::kSharedBytes);
    static_assert(kSharedBytes <= kWideSharedBytes / Shape::kCtasPerSm);
    if (config.cluster > 0 && plan.q_alignment == 16 &&
        launch_clusters<Cluster, kKernel>("attention_mma_box_keys_kernel in clusters", plan, make_key_maps<Cluster>(plan.params, true),
                                          config.cluster, 1, num_head_tiles / Shape::kTeamHeads, kSharedBytes, stream))
      return;
  }
  const LaunchShape shape{static_cast<unsigned>(config.num_ctas), Shape::kCtaThreads, Shape::kSharedBytes};
  launch_waiting("attention_mma_box_keys_kernel", kKernel, shape, stream, plan, make_key_maps<Shape>(plan.params, true));
}

template <DType kKvDType>
void launch_split_keys(const Plan& plan, const Config& config, Stream stream) {
  const bool in_clusters = config.cluster > 0 && plan.q_alignment == 16;
  const std::int64_t num_head_tiles = config.num_tiles * (plan.params.num_heads / plan.kv_group.divisor);
  const auto launch = [&]<int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing = Pairing::kNone>() {
    using Shape = SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>;
    constexpr bool kInPairs = kPairing != Pairing::kNone;
    constexpr int kAlone = head_dim_alone(kHeadDim, kPairing);
    if constexpr (kWide && kVariant == Variant::kMmaSplitKeys8 && kAlone <= 128) {
      using Lone = ClusterKeysShape<kKvDType, kAlone, kLoneWarps, 1>;
      if (in_clusters && config.lone_cluster > 0 &&
          launch_clusters<Lone, attention_mma_cluster_keys_kernel<kKvDType, kAlone, kInPairs>>(
              "attention_mma_cluster_keys_kernel", plan, make_key_maps<Lone>(plan.params, kInPairs), config.lone_cluster, 8, num_head_tiles,
              Lone::kSharedBytes, stream))
        return;
    }
    if constexpr (kHasBoxes<kKvDType, kHeadDim, kVariant, kPairing>) {
      if (config.by_boxes) return launch_by_boxes<kKvDType, kHeadDim, kWide>(plan, config, num_head_tiles, stream);
    }
    if constexpr (kHasClusters<kKvDType, kHeadDim, kVariant, kWide, kPairing>) {
      constexpr int kTeam = kTeamOf<kKvDType, kHeadDim, kPairing>;
      using Cluster = ClusterKeysShape<kKvDType, kAlone, 2 * kWarps, kTeam>;
      constexpr int kSharedBytes = std::max(Shape::kSharedBytes, Cluster::kSharedBytes);
      static_assert(kSharedBytes <= kWideSharedBytes / Shape::kCtasPerSm);
      if (in_clusters && launch_clusters<Cluster, attention_mma_split_keys_kernel<kKvDType, kHeadDim, kVariant, kWide, kPairing>>(
                             "attention_mma_split_keys_kernel in clusters", plan, make_key_maps<Cluster>(plan.params, kInPairs),
                             config.cluster, 1, num_head_tiles / kTeam, kSharedBytes, stream))
        return;
    }
    const LaunchShape shape{static_cast<unsigned>(config.num_ctas), Shape::kCtaThreads, Shape::kSharedBytes};
    if constexpr (kHasParts<kVariant, kWide, kPairing>) {
      using Parts = PartsShape<kKvDType, kHeadDim>;
      constexpr auto kOfParts = attention_mma_parts_kernel<kKvDType, kHeadDim>;
      static_assert((Parts::kLaunchedBytes + 1024) * Parts::kCtasPerSm <= 228 * 1024);
      if (plan.params.batch_invariant && config.cluster > 0) {
        const KeyMaps maps = make_key_maps<Parts>(plan.params, false);
        const std::int64_t num_tiles = num_head_tiles / Parts::kTeamHeads, num_ctas = config.num_ctas / Parts::kTeam;
        Plan of_parts = plan;
        if (num_tiles > num_ctas) {
          of_parts.read_once_keys = read_once_keys(plan);
          const LaunchShape shape_of_parts{static_cast<unsigned>(num_ctas), Parts::kCtaThreads, Parts::kLaunchedBytes};
          return launch_waiting("attention_mma_parts_kernel", kOfParts, shape_of_parts, stream, of_parts, maps);
        }
        if (launch_clusters<Parts, kOfParts>("attention_mma_parts_kernel in clusters", plan, maps, config.cluster, 1, num_tiles,
                                             Parts::kLaunchedBytes, stream))
          return;
      }
    }
    Plan of_stretches = plan;
    if (plan.params.batch_invariant) of_stretches.tiles_per_cta = 0;
    launch_waiting("attention_mma_split_keys_kernel", attention_mma_split_keys_kernel<kKvDType, kHeadDim, kVariant, kWide, kPairing>, shape,
                   stream, of_stretches, MapsOf<kHasClusters<kKvDType, kHeadDim, kVariant, kWide, kPairing>>{});
  };
  const auto of_head_dim = [&]<int kHeadDim>() {
    if constexpr (kHeadDim == 128) {
      const auto paired = [&]<Pairing kPairing>() {
        return config.wide ? launch.template operator()<128, Variant::kMmaSplitKeys8, true, kPairing>()
                           : launch.template operator()<128, Variant::kMmaSplitKeys8, false, kPairing>();
      };
      if (config.pairing == Pairing::kColumns) return paired.template operator()<Pairing::kColumns>();
      if (config.pairing == Pairing::kWarps) return paired.template operator()<Pairing::kWarps>();
    }
    if constexpr (kHeadDim == 256) {
      // Pairs are many tiles, which have no wide CTAs; and their rows are of 8 bits.
      if constexpr (itemsize(kKvDType) == 1)
        if (config.pairing == Pairing::kWarps) return launch.template operator()<256, Variant::kMmaSplitKeys8, false, Pairing::kWarps>();
      if (config.variant == Variant::kMmaSplitKeys8Small) return launch.template operator()<256, Variant::kMmaSplitKeys8Small, false>();
    }
    if (config.variant == Variant::kMmaSplitKeys16) {
      return config.wide ? launch.template operator()<kHeadDim, Variant::kMmaSplitKeys16, true>()
                         : launch.template operator()<kHeadDim, Variant::kMmaSplitKeys16, false>();
    }
    return config.wide ? launch.template operator()<kHeadDim, Variant::kMmaSplitKeys8, true>()
                       : launch.template operator()<kHeadDim, Variant::kMmaSplitKeys8, false>();
  };
  switch (config.head_dim_bucket) {
    case 64: return of_head_dim.template operator()<64>();
    case 128: return of_head_dim.template operator()<128>();
    default: return of_head_dim.template operator()<256>();
  }
}

}  // namespace quire::cuda::attn
