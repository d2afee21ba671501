// The hash of a block: SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, 2012), over 64-bit little-endian words.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string_view>

#include "quire/block_allocator.h"

namespace quire::block_allocator {

class SipHash {
 public:
  explicit SipHash(const BlockHash& key)
      : v0_(key.lo ^ 0x736f6d6570736575U),
        v1_(key.hi ^ 0x646f72616e646f6dU ^ 0xeeU),
        v2_(key.lo ^ 0x6c7967656e657261U),
        v3_(key.hi ^ 0x7465646279746573U) {}

  void absorb(std::uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }

  // `tail` holds the input's last num_bytes % 8 bytes.
  BlockHash finish(std::uint64_t tail, std::uint64_t num_bytes) {
    absorb(tail | num_bytes << 56);
    BlockHash hash;
    v2_ ^= 0xeeU;
    for (int i = 0; i < 4; ++i) round();
    hash.lo = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xddU;
    for (int i = 0; i < 4; ++i) round();
    hash.hi = v0_ ^ v1_ ^ v2_ ^ v3_;
    return hash;
  }

 private:
  void round() {
    v0_ += v1_;
    v2_ += v3_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v1_;
    v0_ += v3_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ = std::rotl(v2_, 32);
  }

  std::uint64_t v0_, v1_, v2_, v3_;
};

inline BlockHash hash_bytes(const BlockHash& key, std::string_view bytes) {
  SipHash sip(key);
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    word |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (i % 8 * 8);
    if (i % 8 == 7) {
      sip.absorb(word);
      word = 0;
    }
  }
  return sip.finish(word, bytes.size());
}

// block_size is constant in an allocator, so the length tells a block with a digest from one without.
inline BlockHash hash_block(const BlockHash& key, const BlockHash& parent, const BlockHash* extra_digest, std::span<const TokenId> tokens) {
  SipHash sip(key);
  sip.absorb(parent.lo);
  sip.absorb(parent.hi);
  if (extra_digest != nullptr) {
    sip.absorb(extra_digest->lo);
    sip.absorb(extra_digest->hi);
  }
  std::size_t i = 0;
  for (; i + 1 < tokens.size(); i += 2) {
    sip.absorb(static_cast<std::uint32_t>(tokens[i]) | static_cast<std::uint64_t>(static_cast<std::uint32_t>(tokens[i + 1])) << 32);
  }
  const std::uint64_t tail = i < tokens.size() ? static_cast<std::uint32_t>(tokens[i]) : 0;
  return sip.finish(tail, tokens.size() * 4 + (extra_digest != nullptr ? 32 : 16));
}

inline BlockHash random_key() {
  std::random_device device;
  const auto word = [&device] { return static_cast<std::uint64_t>(device()) << 32 | device(); };
  BlockHash key;
  key.lo = word();
  key.hi = word();
  return key;
}

}  // namespace quire::block_allocator
