// The C ABI of pocketfed_shim.h over executorch::extension::Module. See there for what each function promises.

#include "pocketfed_shim.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/platform.h>

// The wheel ships the thread pool's library but not its header. These are the two members used here.
namespace executorch::extension::threadpool {
class ThreadPool final {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

#ifndef POCKETFED_VERIFICATION  // another level is built only to measure what this one is worth
#define POCKETFED_VERIFICATION InternalConsistency
#endif

namespace {

// The layout that hosts in other languages write down for themselves.
static_assert(offsetof(pf_tensor, rank) == 4 && offsetof(pf_tensor, sizes) == 8 &&
              offsetof(pf_tensor, data) == 8 + sizeof(void*) && sizeof(pf_tensor) == 8 + 2 * sizeof(void*));

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::BufferDataLoader;
using executorch::extension::Module;
using executorch::extension::threadpool::NoThreadPoolGuard;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Program;
using executorch::runtime::Span;

// --- errors: the runtime's own log lines are the best explanation it has, so they become the error text ----------

// A hostile program may have much to complain about.
constexpr size_t kMostLogged = 4096;

thread_local std::string last_error;
thread_local std::string captured_log;
thread_local bool capturing = false;
std::atomic<pal_emit_log_message_method> forward_log{nullptr};

void emit_log(et_timestamp_t timestamp, et_pal_log_level_t level, const char* filename, const char* function,
              size_t line, const char* message, size_t length) {
  if (capturing && level == kError) {
    try {
      if (captured_log.size() + length <= kMostLogged) {
        captured_log.append(captured_log.empty() ? "" : "; ").append(message, length);
      }
    } catch (...) {  // Out of memory while explaining: the status alone must do.
    }
    return;
  }
  // Whatever is not ours (the official bindings share the runtime's library), and the last words before an abort.
  const auto forward = forward_log.load();
  if (forward != nullptr && (!capturing || level == kFatal)) {
    forward(timestamp, level, filename, function, line, message, length);
  }
}

// Before every call, because the official bindings put in their own hook whenever they are imported.
void install_log_hook() {
  static std::mutex mutex;
  if (executorch::runtime::get_pal_impl()->emit_log_message != &emit_log) {
    const std::lock_guard lock(mutex);
    const auto current = executorch::runtime::get_pal_impl()->emit_log_message;
    if (current != &emit_log) {
      forward_log = current;
      (void)executorch::runtime::register_pal(executorch::runtime::PalImpl::create(&emit_log, __FILE__));
    }
  }
}

pf_status fail(pf_status status, std::string text) {
  last_error = std::move(text);
  return status;
}

pf_status fail(pf_status status, const std::string& what, Error error) {
  std::string text = what + ": " + executorch::runtime::to_string(error);
  if (!captured_log.empty()) {
    text += " (" + captured_log + ")";
  }
  return fail(status, std::move(text));
}

// Runs the body of an ABI function: captures the runtime's log and lets no exception out.
template <typename Body>
int32_t guarded(Body&& body) noexcept {
  try {
    last_error.clear();
    captured_log.clear();
    capturing = true;
    install_log_hook();
    const pf_status status = body();
    capturing = false;
    return status;
  } catch (const std::bad_alloc&) {
    capturing = false;
    last_error = "out of memory";  // short enough for the string's inline buffer: no allocation
    return PF_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    capturing = false;
    try {
      last_error = e.what();
    } catch (...) {
      last_error.clear();
    }
    return PF_INTERNAL;
  } catch (...) {
    capturing = false;
    last_error = "unknown error";
    return PF_INTERNAL;
  }
}

pf_status status_of(Error error, pf_status otherwise) {
  switch (error) {
    case Error::OperatorMissing:
      return PF_MISSING_OPERATOR;
    case Error::MemoryAllocationFailed:
    case Error::DelegateMemoryAllocationFailed:
    case Error::OutOfResources:
      return PF_OUT_OF_MEMORY;
    case Error::InvalidProgram:
    case Error::InvalidExternalData:
    case Error::DelegateInvalidCompatibility:
      return PF_INVALID_PROGRAM;
    default:
      return otherwise;
  }
}

// --- tensors ---------------------------------------------------------------------------------------------------

bool scalar_type_of(int32_t dtype, ScalarType* out) {
  switch (dtype) {
    case PF_FLOAT32:
      *out = ScalarType::Float;
      return true;
    case PF_FLOAT64:
      *out = ScalarType::Double;
      return true;
    case PF_INT32:
      *out = ScalarType::Int;
      return true;
    case PF_INT64:
      *out = ScalarType::Long;
      return true;
    case PF_BOOL:
      *out = ScalarType::Bool;
      return true;
    case PF_UINT8:
      *out = ScalarType::Byte;
      return true;
    case PF_INT8:
      *out = ScalarType::Char;
      return true;
    default:
      return false;
  }
}

// A caller's tensor in the runtime's terms. TensorImpl keeps pointers into it, so it never moves once built.
struct TensorView {
  std::array<TensorImpl::SizesType, PF_MAX_RANK> sizes{};
  std::array<TensorImpl::StridesType, PF_MAX_RANK> strides{};
  std::array<TensorImpl::DimOrderType, PF_MAX_RANK> dim_order{};
  std::unique_ptr<TensorImpl> impl;

  pf_status bind(const pf_tensor& tensor, const std::string& name) {
    ScalarType type{};
    if (!scalar_type_of(tensor.dtype, &type)) {
      return fail(PF_INVALID_ARGUMENT, name + " has an unknown dtype code");
    }
    if (tensor.rank < 0 || tensor.rank > PF_MAX_RANK || (tensor.rank > 0 && tensor.sizes == nullptr)) {
      return fail(PF_INVALID_ARGUMENT, name + " has an impossible rank");
    }
    int64_t stride = 1;
    for (int32_t i = tensor.rank - 1; i >= 0; --i) {
      const int64_t size = tensor.sizes[i];
      if (size < 0 || size > INT32_MAX || stride > INT32_MAX) {
        return fail(PF_INVALID_ARGUMENT, name + " has a size out of range");
      }
      const auto at = static_cast<size_t>(i);
      sizes[at] = static_cast<int32_t>(size);
      strides[at] = static_cast<int32_t>(stride);
      dim_order[at] = static_cast<uint8_t>(i);
      stride *= std::max<int64_t>(size, 1);
    }
    if (stride > INT32_MAX) {
      return fail(PF_INVALID_ARGUMENT, name + " has a size out of range");
    }
    if (tensor.data == nullptr) {
      return fail(PF_INVALID_ARGUMENT, name + " has no data");
    }
    if (reinterpret_cast<uintptr_t>(tensor.data) % executorch::runtime::elementSize(type) != 0) {
      return fail(PF_INVALID_ARGUMENT, name + " is not aligned to its elements");
    }
    impl = std::make_unique<TensorImpl>(type, tensor.rank, sizes.data(), tensor.data, dim_order.data(),
                                        strides.data());
    return PF_OK;
  }
};

bool same_shape_and_type(const Tensor& tensor, const TensorImpl& expected) {
  return tensor.scalar_type() == expected.scalar_type() && tensor.dim() == expected.dim() &&
         std::equal(tensor.sizes().begin(), tensor.sizes().end(), expected.sizes().begin());
}

// --- process-wide state ----------------------------------------------------------------------------------------

// Runs hold `pool_mutex` shared; changing the pool needs it alone, because the runtime's reset is not safe otherwise.
std::shared_mutex pool_mutex;
std::atomic<uint32_t> pool_threads{0};  // 0: not set yet

void reset_pool(uint32_t threads) {
  // Also for one thread: kernels size their chunks by the pool, so the same count gives the same bits on any machine.
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool != nullptr && pool->get_thread_count() != threads) {
    (void)pool->_unsafe_reset_threadpool(threads);
  }
  pool_threads = threads;
}

// Enables the guard only where one thread is wanted: kernels then run inline and never take the pool's lock.
class InlineKernels {
 public:
  explicit InlineKernels(bool inline_kernels) : previous_(NoThreadPoolGuard::is_enabled()) {
    NoThreadPoolGuard::set_enabled(inline_kernels);
  }
  ~InlineKernels() { NoThreadPoolGuard::set_enabled(previous_); }
  InlineKernels(const InlineKernels&) = delete;
  InlineKernels& operator=(const InlineKernels&) = delete;

 private:
  bool previous_;
};

struct FreeDeleter {
  void operator()(uint8_t* p) const { std::free(p); }
};

// Segments inside a .pte are aligned to 128 bytes; a copy that starts on such a boundary keeps them aligned.
constexpr std::align_val_t kProgramAlignment{128};

struct AlignedDeleter {
  void operator()(uint8_t* p) const { ::operator delete[](p, kProgramAlignment); }
};

// What is known of a method before it is loaded.
struct Signature {
  size_t num_inputs = 0;
  size_t num_outputs = 0;
  uint64_t planned_bytes = 0;
};

// Members are destroyed bottom up: first the module with its methods, then what the methods point into.
struct OpenProgram {
  std::mutex in_use;  // held by the one call that is under way
  std::unique_ptr<uint8_t[], AlignedDeleter> bytes;
  std::vector<std::unique_ptr<uint8_t, FreeDeleter>> arenas;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> planned_memory;
  std::unordered_map<std::string, Signature> signatures;
  std::unique_ptr<Module> module;

  // One set of arenas for all methods, sized to the largest. calloc hands out untouched zero pages, so a device that
  // never runs the big evaluation method never pays for its memory.
  pf_status reserve_arenas() {
    std::vector<uint64_t> largest;
    for (auto& [name, signature] : signatures) {
      const auto meta = module->method_meta(name);
      if (!meta.ok()) {
        return fail(PF_INVALID_PROGRAM, "cannot read the plan of " + name, meta.error());
      }
      signature.num_inputs = meta->num_inputs();
      signature.num_outputs = meta->num_outputs();
      const size_t count = meta->num_memory_planned_buffers();
      largest.resize(std::max(largest.size(), count), 0);
      for (size_t i = 0; i < count; ++i) {
        const auto size = meta->memory_planned_buffer_size(i);
        const auto device = meta->memory_planned_buffer_device(i);
        if (!size.ok() || *size < 0 || !device.ok() || !device->is_cpu()) {
          return fail(PF_INVALID_PROGRAM, name + " plans memory that is not host memory");
        }
        const auto bytes_planned = static_cast<uint64_t>(*size);
        if (bytes_planned > PF_MAX_PLANNED_BYTES) {
          return fail(PF_OUT_OF_MEMORY, name + " plans " + std::to_string(bytes_planned) + " bytes at once");
        }
        signature.planned_bytes += bytes_planned;
        largest[i] = std::max(largest[i], bytes_planned);
      }
    }
    uint64_t total = 0;
    for (const uint64_t size : largest) {
      total += size;  // no overflow: fewer buffers than the program has bytes, and none beyond the limit
    }
    if (total > PF_MAX_PLANNED_BYTES) {
      return fail(PF_OUT_OF_MEMORY, "the program plans " + std::to_string(total) + " bytes");
    }
    for (const uint64_t planned : largest) {
      const auto size = static_cast<size_t>(planned);
      auto* arena = static_cast<uint8_t*>(std::calloc(std::max<size_t>(size, 1), 1));
      if (arena == nullptr) {
        return fail(PF_OUT_OF_MEMORY, "cannot reserve " + std::to_string(size) + " bytes of planned memory");
      }
      arenas.emplace_back(arena);
      spans.emplace_back(arena, size);
    }
    planned_memory = std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(spans.data(), spans.size()));
    return PF_OK;
  }

  pf_status open(const void* data, size_t size) {
    bytes.reset(static_cast<uint8_t*>(::operator new[](size, kProgramAlignment)));
    std::memcpy(bytes.get(), data, size);
    module = std::make_unique<Module>(std::make_unique<BufferDataLoader>(bytes.get(), size));
    // The whole flatbuffer is verified: a program comes from a server, and its hash only says that it came intact.
    const Error loaded = module->load(Program::Verification::POCKETFED_VERIFICATION);
    if (loaded != Error::Ok) {
      return fail(status_of(loaded, PF_INVALID_PROGRAM), "cannot load the program", loaded);
    }
    auto found = module->method_names();
    if (!found.ok()) {
      return fail(PF_INVALID_PROGRAM, "cannot list the program's methods", found.error());
    }
    for (const auto& name : *found) {
      signatures.try_emplace(name);
    }
    return reserve_arenas();
  }

  const Signature* signature_of(const std::string& method) const {
    const auto found = signatures.find(method);
    if (found == signatures.end()) {
      fail(PF_UNKNOWN_METHOD, "no method " + method);
      return nullptr;
    }
    return &found->second;
  }

  pf_status load_method(const std::string& method) {
    if (signature_of(method) == nullptr) {
      return PF_UNKNOWN_METHOD;
    }
    const Error error = module->load_method(method, planned_memory.get());
    if (error != Error::Ok) {
      return fail(status_of(error, PF_INVALID_PROGRAM), "cannot load " + method, error);
    }
    return PF_OK;
  }

  pf_status run(const std::string& method, const pf_tensor* in, uint64_t num_inputs, const pf_tensor* out,
                uint64_t num_outputs) {
    const Signature* signature = signature_of(method);
    if (signature == nullptr) {
      return PF_UNKNOWN_METHOD;
    }
    // Before a descriptor is read: a wrong count says that there are others than the host means.
    if (num_inputs != signature->num_inputs) {
      return fail(PF_SIGNATURE, method + " takes " + std::to_string(signature->num_inputs) + " inputs, " +
                                    std::to_string(num_inputs) + " are given");
    }
    if (num_outputs != signature->num_outputs) {
      return fail(PF_SIGNATURE, method + " returns " + std::to_string(signature->num_outputs) + " outputs, " +
                                    std::to_string(num_outputs) + " are expected");
    }
    const InlineKernels guard(pool_threads == 1);
    if (const pf_status status = load_method(method); status != PF_OK) {
      return status;
    }
    std::vector<TensorView> inputs(num_inputs);
    std::vector<EValue> values;
    values.reserve(num_inputs);
    for (size_t i = 0; i < num_inputs; ++i) {
      if (const pf_status status = inputs[i].bind(in[i], "input " + std::to_string(i)); status != PF_OK) {
        return status;
      }
      values.emplace_back(Tensor(inputs[i].impl.get()));
    }
    std::vector<TensorView> expected(num_outputs);
    for (size_t i = 0; i < num_outputs; ++i) {
      if (const pf_status status = expected[i].bind(out[i], "output " + std::to_string(i)); status != PF_OK) {
        return status;
      }
    }
    const Error bound = module->set_inputs(method, values);
    if (bound != Error::Ok) {
      return fail(PF_SIGNATURE, "inputs do not fit " + method, bound);
    }
    auto results = module->execute(method);  // with the inputs bound above
    if (!results.ok()) {
      return fail(status_of(results.error(), PF_EXECUTION_FAILED), method + " failed", results.error());
    }
    if (results->size() != num_outputs) {
      return fail(PF_INTERNAL, method + " returned another number of outputs than it declares");
    }
    for (size_t i = 0; i < num_outputs; ++i) {
      const EValue& value = (*results)[i];
      if (!value.isTensor() || !same_shape_and_type(value.toTensor(), *expected[i].impl)) {
        return fail(PF_SIGNATURE,
                    "output " + std::to_string(i) + " of " + method + " has another dtype or shape than expected");
      }
    }
    for (size_t i = 0; i < num_outputs; ++i) {
      const Tensor result = (*results)[i].toTensor();
      if (result.nbytes() > 0) {
        std::memcpy(out[i].data, result.const_data_ptr(), result.nbytes());
      }
    }
    return PF_OK;
  }
};

// --- handles ---------------------------------------------------------------------------------------------------

// A handle is a number in a pointer's clothes, given out once and never followed. So one that was closed, or that never
// was, is found out, whatever the host does.
class Registry {
 public:
  pf_program* add(std::shared_ptr<OpenProgram> program) {
    const std::lock_guard lock(mutex_);
    programs_.emplace(++last_, std::move(program));
    return reinterpret_cast<pf_program*>(last_);
  }

  // Null where there is none.
  std::shared_ptr<OpenProgram> find(const pf_program* handle) {
    const std::lock_guard lock(mutex_);
    const auto found = programs_.find(reinterpret_cast<uintptr_t>(handle));
    return found == programs_.end() ? nullptr : found->second;
  }

  std::shared_ptr<OpenProgram> remove(const pf_program* handle) {
    const std::lock_guard lock(mutex_);
    auto node = programs_.extract(reinterpret_cast<uintptr_t>(handle));
    return node.empty() ? nullptr : std::move(node.mapped());
  }

  size_t size() {
    const std::lock_guard lock(mutex_);
    return programs_.size();
  }

 private:
  std::mutex mutex_;
  uintptr_t last_ = 0;
  std::unordered_map<uintptr_t, std::shared_ptr<OpenProgram>> programs_;
};

// Never destroyed: a host may close its programs after the library's own objects have gone.
Registry& registry() {
  static auto* const programs = new Registry;
  return *programs;
}

// Runs the body with the program of a handle, which stays open and in no other call's use until it returns.
template <typename Body>
int32_t with_program(const pf_program* handle, bool complete, Body&& body) noexcept {
  return guarded([&]() -> pf_status {
    if (handle == nullptr || !complete) {
      return fail(PF_INVALID_ARGUMENT, "a required argument is null");
    }
    const auto program = registry().find(handle);
    if (program == nullptr) {
      return fail(PF_INVALID_ARGUMENT, "the handle is not that of an open program");
    }
    const std::shared_lock pool(pool_mutex);
    const std::lock_guard turn(program->in_use);
    return body(*program);
  });
}

}  // namespace

extern "C" {

int32_t pf_abi_version(void) { return PF_ABI_VERSION; }

const char* pf_executorch_version(void) { return POCKETFED_EXECUTORCH_VERSION; }

const char* pf_last_error(void) { return last_error.c_str(); }

int32_t pf_open(const void* data, uint64_t size, pf_program** out) {
  return guarded([&]() -> pf_status {
    if (out == nullptr) {
      return fail(PF_INVALID_ARGUMENT, "pf_open needs a place for the program");
    }
    *out = nullptr;
    if (data == nullptr || size == 0) {
      return fail(PF_INVALID_ARGUMENT, "pf_open needs bytes");
    }
    if (size > PF_MAX_PROGRAM_BYTES) {
      return fail(PF_INVALID_ARGUMENT, "a program has at most " + std::to_string(PF_MAX_PROGRAM_BYTES) + " bytes");
    }
    auto program = std::make_shared<OpenProgram>();
    if (const pf_status status = program->open(data, static_cast<size_t>(size)); status != PF_OK) {
      return status;
    }
    if (pool_threads == 0) {
      const std::unique_lock lock(pool_mutex);
      if (pool_threads == 0) {
        reset_pool(1);
      }
    }
    *out = registry().add(std::move(program));
    return PF_OK;
  });
}

void pf_close(pf_program* program) {
  guarded([&]() -> pf_status {
    if (const auto closed = registry().remove(program); closed != nullptr) {
      const std::lock_guard turn(closed->in_use);  // so that a call under way has ended when this returns
    }
    return PF_OK;
  });
}

int32_t pf_load_method(pf_program* program, const char* method) {
  return with_program(program, method != nullptr, [&](OpenProgram& open) -> pf_status {
    const InlineKernels guard(pool_threads == 1);
    return open.load_method(method);
  });
}

int32_t pf_planned_memory(pf_program* program, const char* method, uint64_t* bytes) {
  return with_program(program, method != nullptr && bytes != nullptr, [&](OpenProgram& open) -> pf_status {
    const Signature* signature = open.signature_of(method);
    if (signature == nullptr) {
      return PF_UNKNOWN_METHOD;
    }
    *bytes = signature->planned_bytes;
    return PF_OK;
  });
}

int32_t pf_run(pf_program* program, const char* method, uint64_t num_inputs, const pf_tensor* inputs,
               uint64_t num_outputs, const pf_tensor* outputs) {
  const bool complete = method != nullptr && (num_inputs == 0 || inputs != nullptr) &&
                        (num_outputs == 0 || outputs != nullptr);
  return with_program(program, complete, [&](OpenProgram& open) -> pf_status {
    return open.run(method, inputs, num_inputs, outputs, num_outputs);
  });
}

int32_t pf_set_threads(uint32_t threads) {
  return guarded([&]() -> pf_status {
    if (threads == 0 || threads > PF_MAX_THREADS) {
      return fail(PF_INVALID_ARGUMENT, "the thread count lies between 1 and " + std::to_string(PF_MAX_THREADS));
    }
    const std::unique_lock lock(pool_mutex);
    if (threads == pool_threads) {
      return PF_OK;
    }
    if (registry().size() > 0) {
      return fail(PF_BUSY, "open programs use a thread count of " + std::to_string(pool_threads) +
                              "; close them before changing it to " + std::to_string(threads));
    }
    reset_pool(threads);
    return PF_OK;
  });
}

uint64_t pf_registered_operators(char* buffer, uint64_t capacity) {
  const auto kernels = executorch::runtime::get_registered_kernels();
  uint64_t needed = 0;
  for (const auto& kernel : kernels) {
    needed += std::strlen(kernel.name_) + 1;
  }
  if (buffer != nullptr && needed <= capacity) {
    for (const auto& kernel : kernels) {
      const size_t length = std::strlen(kernel.name_);
      std::memcpy(buffer, kernel.name_, length);
      buffer[length] = '\n';
      buffer += length + 1;
    }
  }
  return needed;
}

}  // extern "C"
