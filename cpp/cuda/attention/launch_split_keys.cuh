// launch_split_keys's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_cluster_keys.cuh"
#include "cuda/attention/mma_cluster_parts.cuh"
#include "cuda/attention/mma_split_keys.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/once_per_device.h"

namespace quire::cuda::attn {

/// Whether a kernel has attend_in_clusters, too.
template <Variant kVariant, bool kWide>
constexpr bool kHasClusters = kWide && kVariant == Variant::kMmaSplitKeys8;

/// Whether there is attend_to_parts for the same.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing>
constexpr bool kHasParts =
    !kWide && kVariant == Variant::kMmaSplitKeys8 && kPairing == Pairing::kNone && has_parts(itemsize(kKvDType), kHeadDim);

/// kHeadDim of a kv head that is not paired.
__host__ __device__ constexpr int head_dim_alone(int head_dim, Pairing pairing) {
  return pairing == Pairing::kColumns ? head_dim / 2 : head_dim;
}

/// Grid: as many CTAs as the device holds, or fewer; plan.cluster of them to a tile if there are clusters.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing>
__global__ void __launch_bounds__(SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>::kCtaThreads,
                                  SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>::kCtasPerSm)
    attention_mma_split_keys_kernel(const __grid_constant__ Plan plan) {
  device::wait_for_predecessor();
#if __CUDA_ARCH__ >= 900
  if constexpr (kHasClusters<kVariant, kWide>) {
    if (plan.in_clusters && attend_in_clusters<kKvDType, head_dim_alone(kHeadDim, kPairing), 2 * kWarps, kPairing != Pairing::kNone>(plan))
      return;
  }
#endif
  attend_to_stretches<kKvDType, kHeadDim, kVariant, kWide, kPairing>(plan);
}

/// The same for batch-invariant decode that may find lengths alike: plan.cluster CTAs to a tile, or whole tiles to CTAs.
template <DType kKvDType, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(Variant::kMmaSplitKeys8, kHeadDim))
    attention_mma_parts_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ == 900
  device::wait_for_predecessor();
  int in_parts = lengths_are_alike(plan) ? 1 : 0;
  int tile_idx = plan.cluster.quotient(static_cast<int>(blockIdx.x));
  do {
    int unfinished = kNothing;
    if (in_parts != 0 && (unfinished = attend_to_parts<kKvDType, kHeadDim>(plan, tile_idx)) == kNothing) return;
    attend_to_stretches<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, false, Pairing::kNone, true>(plan, unfinished);
    asm volatile("" : "+r"(in_parts));  // one copy of the code serves both
  } while (in_parts != 0);
#endif
}

/// The same for one sequence: clusters alone, whose CTAs have all of an SM's warps. Clusters of CTAs of which an SM could hold two do not leave SMs
/// evenly.
template <DType kKvDType, int kHeadDim, bool kInPairs>
__global__ void __launch_bounds__(ClusterKeysShape<kKvDType, kHeadDim, kLoneWarps>::kCtaThreads, 1)
    attention_mma_cluster_keys_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 900
  device::wait_for_predecessor();
  attend_in_clusters<kKvDType, kHeadDim, kLoneWarps, kInPairs>(plan);
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

/// Launches the kernel with up to `limit` CTAs to a tile, at least `min_size`; false if it cannot.
template <auto kKernel>
bool launch_clusters(Plan plan, int limit, int min_size, std::int64_t num_tiles, int num_threads, int shared_bytes, Stream stream) {
  if (limit > 8)
    known_of_device([] {
      QUIRE_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      return true;
    });
  const int size = limit == 1 ? 1 : largest_cluster<kKernel>(num_threads, shared_bytes, limit, num_tiles);
  if (size < min_size) return false;
  plan.cluster = Divisor::make(size);
  plan.in_clusters = true;
  plan.num_ctas = static_cast<int>(std::min<std::int64_t>(plan.num_ctas, num_tiles * size));
  plan.tiles_per_cta = 0;  // what was chosen for equal lengths was for another number of CTAs
  const LaunchShape shape{static_cast<unsigned>(num_tiles * size), static_cast<unsigned>(num_threads), shared_bytes, size};
  launch_waiting("attention_mma_split_keys_kernel in clusters", kKernel, shape, stream, plan);
  return true;
}

template <DType kKvDType>
void launch_split_keys(const Plan& plan, const Config& config, Stream stream) {
  const bool in_clusters = config.cluster > 0 && plan.chunk_strides_exist && plan.q_alignment == 16;
  const std::int64_t num_head_tiles = config.num_tiles * (plan.params.num_heads / plan.kv_group.divisor);
  const auto launch = [&]<int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing = Pairing::kNone>() {
    using Shape = SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>;
    if constexpr (kHasClusters<kVariant, kWide>) {
      constexpr int kAlone = head_dim_alone(kHeadDim, kPairing);
      if constexpr (kAlone <= 128) {
        using Lone = ClusterKeysShape<kKvDType, kAlone, kLoneWarps>;
        if (in_clusters && plan.params.num_seqs == 1 && num_head_tiles < kMaxCluster &&
            launch_clusters<attention_mma_cluster_keys_kernel<kKvDType, kAlone, kPairing != Pairing::kNone>>(
                plan, config.cluster, 8, num_head_tiles, Lone::kCtaThreads, Lone::kSharedBytes, stream))
          return;
      }
      constexpr int kSharedBytes = std::max(Shape::kSharedBytes, ClusterKeysShape<kKvDType, kAlone, 2 * kWarps>::kSharedBytes);
      static_assert(kSharedBytes <= kWideSharedBytes / Shape::kCtasPerSm);
      if (in_clusters && launch_clusters<attention_mma_split_keys_kernel<kKvDType, kHeadDim, kVariant, kWide, kPairing>>(
                             plan, config.cluster, 1, num_head_tiles, Shape::kCtaThreads, kSharedBytes, stream))
        return;
    }
    const LaunchShape shape{static_cast<unsigned>(config.num_ctas), Shape::kCtaThreads, Shape::kSharedBytes};
    if constexpr (kHasParts<kKvDType, kHeadDim, kVariant, kWide, kPairing>) {
      constexpr auto kOfParts = attention_mma_parts_kernel<kKvDType, kHeadDim>;
      if (in_clusters && num_head_tiles > config.num_ctas)
        return launch_waiting("attention_mma_parts_kernel", kOfParts, shape, stream, plan);
      if (in_clusters &&
          launch_clusters<kOfParts>(plan, config.cluster, 1, num_head_tiles, Shape::kCtaThreads, Shape::kSharedBytes, stream))
        return;
    }
    Plan of_stretches = plan;
    if (plan.params.batch_invariant) of_stretches.tiles_per_cta = 0;
    launch_waiting("attention_mma_split_keys_kernel", attention_mma_split_keys_kernel<kKvDType, kHeadDim, kVariant, kWide, kPairing>, shape,
                   stream, of_stretches);
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
    if constexpr (kHeadDim <= 128) {
      if (config.variant == Variant::kMmaSplitKeys32) {
        return config.wide ? launch.template operator()<kHeadDim, Variant::kMmaSplitKeys32, true>()
                           : launch.template operator()<kHeadDim, Variant::kMmaSplitKeys32, false>();
      }
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
