// The form of messages about arguments.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace quire {

inline std::string message(const char* op, const char* arg, const std::string& expected, const std::string& got) {
  return std::string("[") + op + "] " + arg + ": expected " + expected + ", got " + got;
}

}  // namespace quire
