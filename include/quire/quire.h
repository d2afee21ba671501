// Everything that quire's C++ API offers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quire/activation.h"
#include "quire/attention.h"
#include "quire/block_allocator.h"
#include "quire/dtype.h"
#include "quire/error.h"
#include "quire/explain.h"
#include "quire/export.h"
#include "quire/kv_cache.h"
#include "quire/norm.h"
#include "quire/position_encoding.h"
#include "quire/quantization.h"
#include "quire/runtime.h"
#include "quire/stream.h"
#include "quire/tensor.h"
#include "quire/version.h"
