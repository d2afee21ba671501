// CUDA runtime services: error checks, device scopes, properties, the error word, memory, stream order.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/runtime.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/device_code.h"
#include "cuda/launch.h"
#include "cuda/once_per_device.h"
#include "quire/error.h"
#include "quire/runtime.h"

namespace quire {
namespace cuda {
namespace {

// Of the innermost DeviceScope; -1: none. Each question to the driver costs some 30 ns, and an op would ask up to eight times.
thread_local int scoped_device = -1;

// Caches are leaked on purpose: nothing of CUDA may be torn down after the driver at exit.
struct DeviceState {
  std::once_flag properties_once, word_once;
  std::atomic<bool> has_properties = false;
  DeviceProperties properties{};
  std::atomic<ErrorWord*> word = nullptr;
  std::mutex attribute_mutex;
  std::map<const void*, int> shared_bytes;
};

DeviceState& device_state(int device_index) {
  static DeviceState* const states = new DeviceState[kMaxRememberedDevices];
  if (device_index < 0 || device_index >= kMaxRememberedDevices)
    throw UnsupportedError("[cuda] device: expected 0 to 63, got " + std::to_string(device_index));
  return states[device_index];
}

// Lets allocation calls through while the thread captures a stream: they are no part of the graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A stream of our own, so that no call here touches the legacy stream (which would break a capture elsewhere).
class SideStream {
 public:
  SideStream() { QUIRE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~SideStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

bool sync_after_launch() {
  static const bool value = [] {
    const char* text = std::getenv("QUIRE_SYNC");
    return text != nullptr && std::string(text) == "1";
  }();
  return value;
}

}  // namespace

void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  const std::string text = std::string("[cuda] ") + call + " failed: " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status) +
                           " (" + file + ":" + std::to_string(line) + ")";
  if (status == cudaErrorMemoryAllocation) throw OutOfMemoryError(text);
  throw CudaError(text, static_cast<int>(status));
}

namespace {

void finish_launch(cudaError_t status, const char* kernel, Stream stream, const char* file, int line) {
  if (status != cudaSuccess) check(status, kernel, file, line);
  if (sync_after_launch() && !is_capturing(stream)) check(cudaStreamSynchronize(cuda_stream(stream)), kernel, file, line);
}

}  // namespace

void check_launch(const char* kernel, Stream stream, const char* file, int line) {
  finish_launch(cudaPeekAtLastError(), kernel, stream, file, line);
}

DeviceScope::DeviceScope(int device_index) : previous_(-1), outer_(scoped_device) {
  if (outer_ == device_index) return;
  const int current = current_device();
  if (current != device_index) {
    QUIRE_CUDA_CHECK(cudaSetDevice(device_index));
    previous_ = current;
  }
  scoped_device = device_index;
}

DeviceScope::~DeviceScope() {
  scoped_device = outer_;
  if (previous_ >= 0) static_cast<void>(cudaSetDevice(previous_));
}

namespace {

struct LaunchConfig {
  cudaLaunchConfig_t value{};
  cudaLaunchAttribute attributes[2];

  explicit LaunchConfig(const LaunchShape& shape) {
    value.gridDim = shape.grid;
    value.blockDim = shape.block;
    value.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    value.attrs = attributes;
    if (shape.cluster_ctas > 0) {
      cudaLaunchAttribute& cluster = attributes[value.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster_ctas);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

}  // namespace

int ask_max_active_clusters(const void* kernel, const LaunchShape& shape) {
  set_max_shared_bytes(kernel, shape.shared_bytes);
  const LaunchConfig config(shape);
  int clusters = 0;
  QUIRE_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.value));
  return clusters;
}

void launch_waiting(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** arguments) {
  set_max_shared_bytes(kernel, shape.shared_bytes);
  LaunchConfig config(shape);
  config.value.stream = cuda_stream(stream);
  if (has_dependent_launch_code()) {
    cudaLaunchAttribute& dependent = config.attributes[config.value.numAttrs++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  finish_launch(cudaLaunchKernelExC(&config.value, kernel, arguments), name, stream, __FILE__, __LINE__);
}

int current_device() {
  if (scoped_device >= 0) return scoped_device;
  int device = 0;
  QUIRE_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

const DeviceProperties& device_properties(int device_index) {
  DeviceState& state = device_state(device_index);
  if (state.has_properties.load(std::memory_order_acquire)) return state.properties;
  std::call_once(state.properties_once, [&] {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      QUIRE_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_index));
      return value;
    };
    state.properties = DeviceProperties{
        attribute(cudaDevAttrMultiProcessorCount),
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        attribute(cudaDevAttrL2CacheSize),
    };
    state.has_properties.store(true, std::memory_order_release);
  });
  return state.properties;
}

const DeviceProperties& current_device_properties() { return device_properties(current_device()); }

void* allocate_zeroed(std::size_t num_bytes) {
  const RelaxedCapture relaxed;
  const SideStream side;
  void* memory = nullptr;
  QUIRE_CUDA_CHECK(cudaMalloc(&memory, num_bytes));
  QUIRE_CUDA_CHECK(cudaMemsetAsync(memory, 0, num_bytes, side.get()));
  QUIRE_CUDA_CHECK(cudaStreamSynchronize(side.get()));
  return memory;
}

ErrorWord* error_word() {
  DeviceState& state = device_state(current_device());
  if (ErrorWord* const known = state.word.load(std::memory_order_acquire)) return known;
  std::call_once(state.word_once, [&] { state.word = static_cast<ErrorWord*>(allocate_zeroed(sizeof(ErrorWord))); });
  return state.word;
}

ErrorWord take_error(int device_index) {
  if (device_state(device_index).word.load() == nullptr) return ErrorWord{};  // no guarded op has run there
  const DeviceScope guard(device_index);
  QUIRE_CUDA_CHECK(cudaDeviceSynchronize());
  ErrorWord host{};
  ErrorWord* const word = error_word();
  const SideStream side;
  QUIRE_CUDA_CHECK(cudaMemcpyAsync(&host, word, sizeof(host), cudaMemcpyDeviceToHost, side.get()));
  QUIRE_CUDA_CHECK(cudaStreamSynchronize(side.get()));
  if (host.state != 0) {
    QUIRE_CUDA_CHECK(cudaMemsetAsync(word, 0, sizeof(ErrorWord), side.get()));
    QUIRE_CUDA_CHECK(cudaStreamSynchronize(side.get()));
  }
  return host;
}

void set_max_shared_bytes(const void* kernel, int shared_bytes) {
  constexpr int kDefaultLimit = 48 * 1024;
  if (shared_bytes <= kDefaultLimit) return;
  // What this thread launched lately needs no lock.
  struct Recent {
    const void* kernel = nullptr;
    int device = -1, shared_bytes = 0;
  };
  constexpr std::size_t kNumRecent = 16;
  thread_local Recent recents[kNumRecent];
  const int device = current_device();
  Recent& recent = recents[(reinterpret_cast<std::uintptr_t>(kernel) >> 4) % kNumRecent];
  if (recent.kernel == kernel && recent.device == device && recent.shared_bytes >= shared_bytes) return;
  DeviceState& state = device_state(device);
  const std::lock_guard lock(state.attribute_mutex);
  int& known = state.shared_bytes[kernel];
  if (known < shared_bytes) {
    QUIRE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    known = shared_bytes;
  }
  recent = {kernel, device, known};
}

void* allocate_device(std::int64_t num_bytes, int device_index) {
  const DeviceScope guard(device_index);
  const RelaxedCapture relaxed;
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, static_cast<std::size_t>(num_bytes == 0 ? 1 : num_bytes));
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw OutOfMemoryError("[Buffer] num_bytes: expected memory on cuda:" + std::to_string(device_index) + ", could not get " +
                           std::to_string(num_bytes) + " bytes");
  }
  check(status, "cudaMalloc", __FILE__, __LINE__);
  return data;
}

void free_device(void* data, int device_index) noexcept {
  int previous = -1;
  if (cudaGetDevice(&previous) != cudaSuccess) return;
  const RelaxedCapture relaxed;
  if (previous != device_index) static_cast<void>(cudaSetDevice(device_index));
  static_cast<void>(cudaFree(data));
  if (previous != device_index) static_cast<void>(cudaSetDevice(previous));
  static_cast<void>(cudaGetLastError());
}

void* allocate_pinned(std::int64_t num_bytes) {
  const RelaxedCapture relaxed;
  void* data = nullptr;
  const cudaError_t status = cudaHostAlloc(&data, static_cast<std::size_t>(num_bytes == 0 ? 1 : num_bytes), cudaHostAllocPortable);
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw OutOfMemoryError("[Buffer] num_bytes: expected page-locked memory, could not get " + std::to_string(num_bytes) + " bytes");
  }
  check(status, "cudaHostAlloc", __FILE__, __LINE__);
  return data;
}

void free_pinned(void* data) noexcept {
  const RelaxedCapture relaxed;
  static_cast<void>(cudaFreeHost(data));
  static_cast<void>(cudaGetLastError());
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The legacy stream answers with an error while another stream is captured; that is not a capture of this stream.
  if (cudaStreamIsCapturing(cuda_stream(stream), &status) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

unsigned long long capture_id(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(cuda_stream(stream), &status, &id) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void synchronize(Stream stream, int device_index) {
  const DeviceScope guard(device_index);
  QUIRE_CUDA_CHECK(cudaStreamSynchronize(cuda_stream(stream)));
}

void order_streams(Stream earlier, int earlier_device, Stream later, int later_device) {
  if (earlier.handle() == later.handle() && earlier_device == later_device) return;
  const DeviceScope guard(earlier_device);
  cudaEvent_t event = nullptr;
  QUIRE_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  const cudaError_t recorded = cudaEventRecord(event, cuda_stream(earlier));
  cudaError_t waited = recorded;
  if (recorded == cudaSuccess) {
    const DeviceScope later_guard(later_device);  // names the device where `later` is a default stream
    waited = cudaStreamWaitEvent(cuda_stream(later), event, 0);
  }
  static_cast<void>(cudaEventDestroy(event));
  check(waited, "cudaStreamWaitEvent", __FILE__, __LINE__);
}

Marker::Marker(Stream stream, int device_index) : event_(nullptr) {
  const DeviceScope guard(device_index);
  cudaEvent_t event = nullptr;
  QUIRE_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  const cudaError_t status = cudaEventRecord(event, cuda_stream(stream));
  if (status != cudaSuccess) static_cast<void>(cudaEventDestroy(event));
  check(status, "cudaEventRecord", __FILE__, __LINE__);
  event_ = event;
}

Marker::~Marker() {
  if (event_ != nullptr) static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(event_)));
}

bool Marker::done() const {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status != cudaErrorNotReady;
}

void Marker::make_wait(Stream stream, int device_index) const {
  const DeviceScope guard(device_index);
  QUIRE_CUDA_CHECK(cudaStreamWaitEvent(cuda_stream(stream), static_cast<cudaEvent_t>(event_), 0));
}

void copy_to_host(void* host, const void* device, std::int64_t num_bytes, Stream stream) {
  QUIRE_CUDA_CHECK(cudaMemcpyAsync(host, device, static_cast<std::size_t>(num_bytes), cudaMemcpyDeviceToHost, cuda_stream(stream)));
  QUIRE_CUDA_CHECK(cudaStreamSynchronize(cuda_stream(stream)));
}

}  // namespace cuda

int num_cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return count;
}

std::string cuda_architectures() { return QUIRE_CUDA_ARCHITECTURES; }

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace quire
