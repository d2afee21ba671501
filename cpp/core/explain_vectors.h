// How launchers that have no other choice answer quire::explain: the part of core/explain.h that needs no standard header.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quire {

/// The answer of a backend that reads and writes 16 bytes at once where it can. `obstacle` is null, or the argument that keeps it from that.
/// True if it was asked: then nothing is to be run.
bool explain_vectors(const char* obstacle);

}  // namespace quire
