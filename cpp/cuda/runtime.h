// The CUDA runtime services that the core asks for, without a CUDA header.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/error_word.h"
#include "quire/stream.h"

namespace quire::cuda {

/// Makes a device current for a scope, and restores the previous one on every path. Throws CudaError for a device that is not there.
class DeviceScope {
 public:
  explicit DeviceScope(int device_index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_;  // -1: it already was current
  int outer_;     // of the scope around this one, or -1
};

/// The innermost scope's device, for which the driver is not asked again, or else the current one.
int current_device();

/// Waits for the device's work so far, then takes and clears its error word.
ErrorWord take_error(int device_index);

void* allocate_device(std::int64_t num_bytes, int device_index);
void free_device(void* data, int device_index) noexcept;
void* allocate_pinned(std::int64_t num_bytes);
void free_pinned(void* data) noexcept;

/// True if `stream` is being captured into a graph. Touches nothing.
bool is_capturing(Stream stream);
/// A number that is the capture's own while `stream` is being captured, else 0.
unsigned long long capture_id(Stream stream);

/// Enqueues "stream `later` waits for what stream `earlier` holds now". Nothing happens if they are one stream of one device.
void order_streams(Stream earlier, int earlier_device, Stream later, int later_device);

/// Waits for what `stream` of the device holds now.
void synchronize(Stream stream, int device_index);

/// A marker in a stream's work.
class Marker {
 public:
  /// Records the marker behind what `stream` holds now.
  Marker(Stream stream, int device_index);
  ~Marker();
  Marker(Marker&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  Marker(const Marker&) = delete;
  Marker& operator=(const Marker&) = delete;
  Marker& operator=(Marker&&) = delete;

  /// True once the work before the marker is done. Never blocks.
  bool done() const;
  /// Enqueues "stream waits for the work before the marker".
  void make_wait(Stream stream, int device_index) const;

 private:
  void* event_;
};

/// Copies index tensors to the host and waits for them: only validate="full" and check_errors() may.
void copy_to_host(void* host, const void* device, std::int64_t num_bytes, Stream stream);

}  // namespace quire::cuda
