// What an op would run, and why.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "quire/export.h"

namespace quire {

struct Explanation {
  std::string op;                    ///< Empty if there is nothing to run.
  std::string device;                ///< "cpu" or "cuda:0"; empty likewise.
  std::string variant;               ///< The kernel; empty likewise. Python's quire.Explanation lists what there is.
  std::vector<std::string> reasons;  ///< Why that one, and why not a faster one; a clause each.
};

/// Calls `call` on this thread. Ops in it validate, throw as ever, and choose their kernels, but run nothing and write nothing. Returns what the
/// last of them chose; one that has nothing to do (a zero size) leaves no trace.
QUIRE_API Explanation explain(const std::function<void()>& call);

}  // namespace quire
