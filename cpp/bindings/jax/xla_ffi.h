// The part of XLA's foreign-function ABI that a handler needs, as published with API version 0.1.
// SPDX-License-Identifier: Apache-2.0
//
// Layouts and numbers are XLA's; the declarations are ours, so that no jaxlib is needed to build. Every struct begins with its size, and
// later versions of the ABI only append, which is why handlers of version 0.1 are accepted by every jaxlib since 0.4.38.
// tests/python/test_jax.py compares this file with the header that the installed jaxlib ships.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quire::xla {

inline constexpr int kApiMajor = 0;
inline constexpr int kApiMinor = 1;

enum ExtensionType : std::int32_t { kExtensionMetadata = 1 };
enum Stage : std::int32_t { kStageExecute = 3 };
enum ArgType : std::int32_t { kArgBuffer = 1 };
enum AttrType : std::int32_t { kAttrScalar = 3, kAttrString = 4 };
enum HandlerTraits : std::uint32_t { kCommandBufferCompatible = 1 };

enum ErrorCode : std::int32_t { kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13 };

enum DataType : std::int32_t {
  kPred = 1,
  kS8 = 2,
  kS32 = 4,
  kS64 = 5,
  kU8 = 6,
  kF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kBF16 = 16,
  kF8E5M2 = 19,
  kF8E4M3FN = 20,
};

struct Error;
struct ExecutionContext;
struct InternalApi;

struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct ApiVersion {
  std::size_t struct_size;
  Extension* extension_start;
  int major_version;
  int minor_version;
};

struct Buffer {
  std::size_t struct_size;
  Extension* extension_start;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct ByteSpan {
  const char* ptr;
  std::size_t len;
};

struct Scalar {
  DataType dtype;
  void* value;
};

/// Arguments and, in the same form, results.
struct Buffers {
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  ArgType* types;
  void** buffers;
};

struct Attributes {
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  AttrType* types;
  ByteSpan** names;
  void** attrs;
};

struct ErrorCreateArgs {
  std::size_t struct_size;
  Extension* extension_start;
  const char* message;
  ErrorCode errc;
};

struct StreamGetArgs {
  std::size_t struct_size;
  Extension* extension_start;
  ExecutionContext* ctx;
  void* stream;
};

/// The functions up to the last one that we call.
struct Api {
  std::size_t struct_size;
  Extension* extension_start;
  ApiVersion api_version;
  const InternalApi* internal_api;
  Error* (*error_create)(ErrorCreateArgs*);
  void (*error_get_message)(void*);
  void (*error_destroy)(void*);
  Error* (*handler_register)(void*);
  Error* (*stream_get)(StreamGetArgs*);
};

struct CallFrame {
  std::size_t struct_size;
  Extension* extension_start;
  const Api* api;
  ExecutionContext* ctx;
  Stage stage;
  Buffers args;
  Buffers rets;
  Attributes attrs;
};

struct Metadata {
  std::size_t struct_size;
  ApiVersion api_version;
  std::uint32_t traits;
};

/// How XLA asks a handler for its version and traits: a call with this extension, in which nothing else counts.
struct MetadataExtension {
  Extension extension_base;
  Metadata* metadata;
};

}  // namespace quire::xla
