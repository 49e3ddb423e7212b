// Calls the native libraries as no sane host would, for sanitizers to watch. See sanitize.py, which builds and runs it.
//
//   native_driver abi PROGRAM SIGNATURES             right and wrong calls, threads, handles that were closed
//   native_driver sharing                            every kernel in every variant, at sizes around the blocks; wrong calls
//   native_driver open PROGRAM                       the least time that opening took, in microseconds
//   native_driver mutate PROGRAM SIGNATURES SEED N   opens and runs N damaged copies, each in a process of its own

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "pocketfed_shim.h"
#include "sharing.h"

#define CHECK(CONDITION)                                                                        \
  do {                                                                                          \
    if (!(CONDITION)) {                                                                         \
      std::fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, #CONDITION, pf_last_error()); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (false)

namespace {

using Bytes = std::vector<char>;

Bytes read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// --- methods, as SIGNATURES has them: "method NAME", then a line "in|out DTYPE RANK SIZE.." for each tensor ------------

struct Tensor {
  int32_t dtype = 0;
  std::vector<int64_t> sizes;
  std::vector<uint64_t> storage;  // zeros, aligned to 8

  size_t bytes() const {
    constexpr std::array<size_t, 7> kWidths{4, 8, 4, 8, 1, 1, 1};
    size_t total = kWidths[static_cast<size_t>(dtype)];
    for (const int64_t size : sizes) {
      total *= static_cast<size_t>(size);
    }
    return total;
  }

  pf_tensor descriptor() {
    storage.assign((bytes() + 7) / 8 + 1, 0);
    return {dtype, static_cast<int32_t>(sizes.size()), sizes.data(), storage.data()};
  }
};

struct Method {
  std::string name;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
};

// Descriptors of one call, and what they point to.
struct Call {
  explicit Call(const Method& what) : method(what) {
    for (auto& tensor : method.inputs) {
      inputs.push_back(tensor.descriptor());
    }
    for (auto& tensor : method.outputs) {
      outputs.push_back(tensor.descriptor());
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int32_t run(pf_program* program) const {
    return pf_run(program, method.name.c_str(), inputs.size(), inputs.data(), outputs.size(), outputs.data());
  }

  Method method;
  std::vector<pf_tensor> inputs;
  std::vector<pf_tensor> outputs;
};

std::vector<Method> read_signatures(const char* path) {
  std::ifstream file(path);
  std::vector<Method> methods;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "method") {
      words >> methods.emplace_back().name;
      continue;
    }
    Tensor tensor;
    size_t rank = 0;
    words >> tensor.dtype >> rank;
    tensor.sizes.resize(rank);
    for (auto& size : tensor.sizes) {
      words >> size;
    }
    (kind == "in" ? methods.back().inputs : methods.back().outputs).push_back(tensor);
  }
  CHECK(!methods.empty());
  return methods;
}

// --- the shim ----------------------------------------------------------------------------------------------------

pf_program* opened(const Bytes& program) {
  pf_program* handle = nullptr;
  CHECK(pf_open(program.data(), program.size(), &handle) == PF_OK && handle != nullptr);
  return handle;
}

void run_everything(pf_program* program, const std::vector<Method>& methods) {
  for (const auto& method : methods) {
    const Call call(method);
    CHECK(call.run(program) == PF_OK);
  }
}

// Any bits as inputs: computed with, or refused (a label that is no class), and forgotten.
void run_garbage(pf_program* program, const std::vector<Method>& methods) {
  std::mt19937_64 random(2);
  for (int turn = 0; turn < 50; ++turn) {
    for (const auto& method : methods) {
      Call call(method);
      for (auto& tensor : call.method.inputs) {
        if (tensor.dtype != PF_INT64 || turn % 2 == 0) {
          std::generate(tensor.storage.begin(), tensor.storage.end(), std::ref(random));
        }
      }
      const int32_t status = call.run(program);
      CHECK(status == PF_OK || status == PF_EXECUTION_FAILED);
    }
  }
}

// Each spoils one descriptor, or the call, in one way.
void spoil_calls(pf_program* program, const Method& method) {
  std::array<int64_t, 17> sizes{};
  for (const bool output : {false, true}) {
    const size_t count = output ? method.outputs.size() : method.inputs.size();
    for (size_t at = 0; at < count; ++at) {
      for (int spoilt = 0; spoilt < 12; ++spoilt) {
        Call call(method);
        pf_tensor& tensor = (output ? call.outputs : call.inputs)[at];
        switch (spoilt) {
          case 0: tensor.dtype = -1; break;
          case 1: tensor.dtype = std::numeric_limits<int32_t>::max(); break;
          case 2: tensor.dtype = tensor.dtype == PF_INT8 ? PF_FLOAT32 : PF_INT8; break;
          case 3: tensor.rank = -1; break;
          case 4: tensor.rank = PF_MAX_RANK + 1; break;
          case 5: tensor.rank = PF_MAX_RANK; tensor.sizes = sizes.data(); break;
          case 6: tensor.rank = 0; break;
          case 7: tensor.rank = 1; tensor.sizes = nullptr; break;
          case 8: tensor.data = nullptr; break;
          case 9: tensor.data = static_cast<char*>(tensor.data) + 1; tensor.dtype = PF_FLOAT32; break;
          case 10: sizes.fill(std::numeric_limits<int64_t>::max()); tensor.sizes = sizes.data(); break;
          default: sizes.fill(std::numeric_limits<int32_t>::max()); tensor.sizes = sizes.data(); break;
        }
        CHECK(call.run(program) != PF_OK);
        CHECK(std::strlen(pf_last_error()) > 0);
        sizes.fill(1);
      }
    }
  }
  const Call call(method);
  const char* name = method.name.c_str();
  const auto inputs = call.inputs.size();
  const auto outputs = call.outputs.size();
  constexpr auto kMost = std::numeric_limits<uint64_t>::max();
  for (const uint64_t wrong : {uint64_t{0}, uint64_t{inputs + 1}, uint64_t{1} << 60, kMost}) {
    CHECK(pf_run(program, name, wrong, call.inputs.data(), outputs, call.outputs.data()) != PF_OK);
    CHECK(pf_run(program, name, inputs, call.inputs.data(), wrong, call.outputs.data()) != PF_OK || wrong == outputs);
  }
  CHECK(pf_run(program, name, inputs, nullptr, outputs, call.outputs.data()) == PF_INVALID_ARGUMENT);
  CHECK(pf_run(program, name, inputs, call.inputs.data(), outputs, nullptr) == PF_INVALID_ARGUMENT);
  CHECK(pf_run(program, nullptr, inputs, call.inputs.data(), outputs, call.outputs.data()) == PF_INVALID_ARGUMENT);
  CHECK(pf_run(program, "", inputs, call.inputs.data(), outputs, call.outputs.data()) == PF_UNKNOWN_METHOD);
  CHECK(call.run(program) == PF_OK);  // a refusal leaves the program as it was
}

void wrong_handles(const Bytes& program, const std::vector<Method>& methods) {
  const Call call(methods.front());
  const char* name = methods.front().name.c_str();
  pf_program* const closed = opened(program);
  pf_close(closed);
  uint64_t bytes = 0;
  for (pf_program* handle : {closed, static_cast<pf_program*>(nullptr), reinterpret_cast<pf_program*>(uintptr_t{1} << 40)}) {
    CHECK(call.run(handle) == PF_INVALID_ARGUMENT);
    CHECK(pf_load_method(handle, name) == PF_INVALID_ARGUMENT);
    CHECK(pf_planned_memory(handle, name, &bytes) == PF_INVALID_ARGUMENT);
    pf_close(handle);
  }
  pf_program* never = closed;
  CHECK(pf_open(nullptr, 4, &never) == PF_INVALID_ARGUMENT && never == nullptr);
  CHECK(pf_open(program.data(), 0, &never) == PF_INVALID_ARGUMENT);
  CHECK(pf_open(program.data(), std::numeric_limits<uint64_t>::max(), &never) == PF_INVALID_ARGUMENT);
  CHECK(pf_open(program.data(), program.size(), nullptr) == PF_INVALID_ARGUMENT);
  for (size_t size = 1; size < 256; size += 3) {  // every one ends in the header or soon after
    CHECK(pf_open(program.data(), size, &never) != PF_OK && never == nullptr);
  }
}

// A program wanders through threads, one is closed under running calls, and each thread has its own error text.
void threads(const Bytes& program, const std::vector<Method>& methods) {
  pf_program* const shared = opened(program);
  pf_program* const closing = opened(program);
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back([&, i] {
      pf_program* const own = opened(program);
      for (int turn = 0; turn < 20; ++turn) {
        const Call call(methods[static_cast<size_t>(turn) % methods.size()]);
        CHECK(call.run(own) == PF_OK);
        CHECK(call.run(shared) == PF_OK);
        const int32_t status = call.run(closing);
        CHECK(status == PF_OK || status == PF_INVALID_ARGUMENT);
        if (i == 0 && turn == 10) {
          pf_close(closing);
        }
        const std::string unknown = "thread " + std::to_string(i);
        CHECK(pf_load_method(own, unknown.c_str()) == PF_UNKNOWN_METHOD);
        CHECK(pf_last_error() == "no method " + unknown);
        CHECK(pf_set_threads(2) == PF_BUSY);
      }
      pf_close(own);
    });
  }
  for (auto& worker : workers) {
    worker.join();
  }
  run_everything(shared, methods);
  pf_close(shared);
}

int abi(const Bytes& program, const std::vector<Method>& methods) {
  CHECK(pf_abi_version() == PF_ABI_VERSION);
  CHECK(pf_set_threads(0) == PF_INVALID_ARGUMENT && pf_set_threads(PF_MAX_THREADS + 1) == PF_INVALID_ARGUMENT);
  const uint64_t size = pf_registered_operators(nullptr, 0);
  Bytes names(size);
  CHECK(pf_registered_operators(names.data(), size - 1) == size && names.front() == 0);
  CHECK(pf_registered_operators(names.data(), size) == size && names.back() == '\n');
  for (int turn = 0; turn < 3; ++turn) {
    pf_program* const handle = opened(program);
    run_everything(handle, methods);
    for (const auto& method : methods) {
      spoil_calls(handle, method);
    }
    run_garbage(handle, methods);
    run_everything(handle, methods);
    pf_close(handle);
  }
  wrong_handles(program, methods);
  threads(program, methods);
  std::puts("abi: ok");
  return 0;
}

// --- the sharing kernels -----------------------------------------------------------------------------------------

using Words = std::vector<uint64_t>;

Words random_words(std::mt19937_64& random, uint64_t size) {
  Words words(size);
  std::generate(words.begin(), words.end(), std::ref(random));
  return words;
}

std::vector<const uint64_t*> addresses(const std::vector<Words>& vectors) {
  std::vector<const uint64_t*> out;
  std::transform(vectors.begin(), vectors.end(), std::back_inserter(out), [](const Words& v) { return v.data(); });
  return out;
}

std::vector<uint64_t*> addresses(std::vector<Words>& vectors) {
  std::vector<uint64_t*> out;
  std::transform(vectors.begin(), vectors.end(), std::back_inserter(out), [](Words& v) { return v.data(); });
  return out;
}

// Buffers are of exactly the size that the header asks for, so that one element too many is seen.
void kernels_at(std::mt19937_64& random, int32_t field, uint64_t n, uint64_t packing, uint64_t num_words,
                uint64_t num_outputs) {
  const uint64_t limbs = field == PFS_M61 ? 1 : 2;
  std::vector<float> x(n * packing);
  for (auto& value : x) {
    value = static_cast<float>(static_cast<int64_t>(random() >> 40) - (1 << 23)) / 1e6F;
  }
  std::array<uint64_t, 3> norm{};
  std::vector<int64_t> codes(n * packing);
  CHECK(pfs_encode(x.data(), x.size(), 0.5, 1024.0, codes.data(), norm.data()) == PFS_OK);
  Words secret(limbs * n * packing);
  CHECK(pfs_lift(field, codes.data(), codes.size(), secret.data()) == PFS_OK);
  std::vector<int64_t> back(codes.size());
  CHECK(pfs_lower(field, secret.data(), back.size(), back.data()) == PFS_OK && back == codes);

  std::vector<Words> words;
  for (uint64_t i = 0; i < num_words; ++i) {
    words.push_back(random_words(random, limbs * n));
    CHECK(pfs_mask(field, words.back().data(), n, words.back().data()) == PFS_OK);
  }
  std::vector<Words> split(num_outputs, Words(limbs * n));
  std::vector<Words> direct(num_outputs, Words(limbs * n));
  const auto in = addresses(static_cast<const std::vector<Words>&>(words));
  const auto out = addresses(split);
  const auto out_direct = addresses(direct);
  CHECK(pfs_split(field, packing, secret.data(), num_words, in.data(), num_outputs, out.data(), n) == PFS_OK);
  std::array<uint64_t, 3> again{};
  CHECK(pfs_encode_split(field, packing, x.data(), 0.5, 1024.0, num_words, in.data(), num_outputs, out_direct.data(), n,
                         again.data()) == PFS_OK);
  CHECK(split == direct && norm == again);

  Words weights(limbs * num_words, 1);
  Words sum(limbs * n);
  CHECK(pfs_interpolate(field, num_words, in.data(), weights.data(), n, sum.data()) == PFS_OK);
  Words added(limbs * n, 0);
  for (const auto& vector : words) {
    CHECK(pfs_accumulate(field, vector.data(), n, weights.data(), added.data()) == PFS_OK);
  }
  CHECK(sum == added);

  // Garbage in: refused or computed, but within the buffers.
  const Words garbage = random_words(random, limbs * n * packing);
  Words anything(limbs * n * packing);
  std::vector<int64_t> integers(n * packing);
  (void)pfs_lower(field, garbage.data(), n * packing, integers.data());
  (void)pfs_lift(field, reinterpret_cast<const int64_t*>(garbage.data()), n * packing, anything.data());
  (void)pfs_split(field, packing, garbage.data(), num_words, in.data(), num_outputs, out.data(), n);
  std::vector<float> wild(n * packing);
  std::transform(wild.begin(), wild.end(), garbage.begin(), wild.begin(), [](float, uint64_t word) {
    const auto bits = static_cast<uint32_t>(word);
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
  for (const double factor : {0.0, 1.0, -1e300, std::numeric_limits<double>::infinity(), std::nan("")}) {
    (void)pfs_encode(wild.data(), wild.size(), factor, 1e300, integers.data(), norm.data());
  }
}

void wrong_sharing_calls() {
  Words words(8, 1);
  std::array<int64_t, 8> codes{};
  std::array<float, 8> x{};
  uint64_t* w = words.data();
  const uint64_t* in[] = {w, w};
  uint64_t* out[] = {w + 4, w + 5};
  const uint64_t* hole[] = {w, nullptr};
  uint64_t* hole_out[] = {w + 4, nullptr};
  auto* const crooked = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(w) + 4);
  constexpr auto kMost = std::numeric_limits<uint64_t>::max();
  CHECK(pfs_use_variant(nullptr) == PFS_INVALID_ARGUMENT && pfs_use_variant("") == PFS_INVALID_ARGUMENT);
  CHECK(pfs_encode(nullptr, 1, 1, 1, codes.data(), w) == PFS_INVALID_ARGUMENT);
  CHECK(pfs_encode(x.data(), 1, 1, 1, nullptr, w) == PFS_INVALID_ARGUMENT);
  CHECK(pfs_encode(x.data(), 1, 1, 1, codes.data(), nullptr) == PFS_INVALID_ARGUMENT);
  CHECK(pfs_encode(x.data(), kMost, 1, 1, codes.data(), w) == PFS_INVALID_ARGUMENT);
  for (const int32_t field : {0, 1}) {
    for (const uint64_t n : {uint64_t{1}, PFS_MAX_ELEMENTS + 1, kMost}) {
      uint64_t* const bad = n == 1 ? nullptr : w;
      CHECK(pfs_lift(field, codes.data(), n, bad) == PFS_INVALID_ARGUMENT);
      CHECK(pfs_lower(field, bad, n, codes.data()) == PFS_INVALID_ARGUMENT);
      CHECK(pfs_mask(field, bad, n, w) == PFS_INVALID_ARGUMENT);
      CHECK(pfs_split(field, 1, bad, 2, in, 2, out, n) == PFS_INVALID_ARGUMENT);
      CHECK(pfs_interpolate(field, 2, in, w, n, bad) == PFS_INVALID_ARGUMENT);
      CHECK(pfs_accumulate(field, w, n, w, bad) == PFS_INVALID_ARGUMENT);
    }
    CHECK(pfs_mask(field, crooked, 1, w) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_accumulate(field, w, 1, nullptr, w) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_split(field, 1, w, 2, hole, 2, out, 1) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_split(field, 1, w, 2, in, 2, hole_out, 1) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_split(field, 1, w, 2, nullptr, 2, out, 1) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_split(field, 1, w, 2, in, kMost, out, 1) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_split(field, kMost, w, kMost, in, 2, out, 1) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_interpolate(field, kMost, in, w, 1, w) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_interpolate(field, 2, hole, w, 1, w) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_encode_split(field, 1, nullptr, 1, 1, 2, in, 2, out, 1, w) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_encode_split(field, 1, x.data(), 1, 1, 2, in, 2, out, 1, nullptr) == PFS_INVALID_ARGUMENT);
    CHECK(pfs_mask(field, nullptr, 0, nullptr) == PFS_OK);  // nothing needs no place
  }
}

int sharing() {
  std::mt19937_64 random(1);
  const std::string best = pfs_variant();
  for (const char* variant : {"avx512", "avx2", "portable"}) {
    if (pfs_use_variant(variant) != PFS_OK) {
      continue;  // not on this processor
    }
    for (const int32_t field : {PFS_M61, PFS_M127}) {
      for (const uint64_t n : {0, 1, 7, 511, 512, 513, 1030}) {
        kernels_at(random, field, n, 1, 2, 3);
        kernels_at(random, field, n, 2, 2, 2);
        kernels_at(random, field, n, 1, 1, 1);
      }
      kernels_at(random, field, 19, 5, 9, 20);
      kernels_at(random, field, 3, 1, PFS_MAX_VALUES - 1, 2);
    }
    std::printf("sharing (%s): ok\n", variant);
  }
  CHECK(pfs_use_variant(best.c_str()) == PFS_OK);
  wrong_sharing_calls();
  return 0;
}

int open_time(const Bytes& program) {
  using Microseconds = std::chrono::duration<double, std::micro>;
  auto least = Microseconds::max();
  for (int turn = 0; turn < 300; ++turn) {
    const auto began = std::chrono::steady_clock::now();
    pf_program* const handle = opened(program);
    least = std::min<Microseconds>(least, std::chrono::steady_clock::now() - began);
    pf_close(handle);
  }
  std::printf("%zu bytes are opened in %.0f us\n", program.size(), least.count());
  return 0;
}

// --- damaged programs --------------------------------------------------------------------------------------------

Bytes damaged(const Bytes& program, std::mt19937_64& random) {
  Bytes copy = program;
  const auto below = [&](size_t bound) { return static_cast<size_t>(random() % bound); };
  constexpr std::array<uint32_t, 6> kEdges{0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0x10000};
  switch (random() % 6) {
    case 0:  // cut off
      copy.resize(below(copy.size()));
      break;
    case 1:  // one bit
      copy[below(copy.size())] ^= static_cast<char>(1 << below(8));
      break;
    case 2:  // many bits
      for (size_t i = 0, count = 1 + below(64); i < count; ++i) {
        copy[below(copy.size())] ^= static_cast<char>(1 << below(8));
      }
      break;
    case 3: {  // a word at the edge of its range
      const uint32_t edge = kEdges[below(kEdges.size())];
      std::memcpy(&copy[below(copy.size() / 4 - 1) * 4], &edge, sizeof edge);
      break;
    }
    case 4: {  // a part in another's place
      const size_t size = 1 + below(256);
      std::memmove(&copy[below(copy.size() - size)], &program[below(program.size() - size)], size);
      break;
    }
    default: {  // a word a little off, as offsets and counts would be
      uint32_t word = 0;
      char* at = &copy[below(copy.size() / 4 - 1) * 4];
      std::memcpy(&word, at, sizeof word);
      word += static_cast<uint32_t>(below(17)) - 8;
      std::memcpy(at, &word, sizeof word);
    }
  }
  return copy;
}

enum Outcome { kRefused = 40, kNotLoaded, kRan, kWrong, kReported = 99 };  // the last one is sanitize.py's choice

[[noreturn]] void try_program(const Bytes& program, const std::vector<Method>& methods, const std::string& log) {
  const rlimit cpu{10, 10};
  (void)setrlimit(RLIMIT_CPU, &cpu);
  if (std::freopen(log.c_str(), "w", stderr) == nullptr) {
    _exit(kWrong);
  }
  pf_program* handle = nullptr;
  if (pf_open(program.data(), program.size(), &handle) != PF_OK) {
    _exit(std::strlen(pf_last_error()) > 0 ? kRefused : kWrong);
  }
  Outcome outcome = kNotLoaded;
  for (const auto& method : methods) {
    const Call call(method);
    if (call.run(handle) == PF_OK) {
      outcome = kRan;
    }
  }
  pf_close(handle);
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  _exit(used.ru_maxrss > 1024 * 1024 ? kWrong : outcome);  // 1 GiB, of which a sanitizer takes much
}

// Whether a sanitizer's report has one of our own functions, or a library function that it called, on top of the stack.
bool blames_us(const std::string& log) {
  std::ifstream report(log);
  std::string line;
  while (std::getline(report, line)) {
    const bool top = line.find("    #0 ") == 0 || line.find("    #1 ") == 0;
    if (line.find("runtime error:") != std::string::npos || (top && line.find("pocketfed_shim") != std::string::npos)) {
      return true;
    }
    if (line.find("    #2 ") == 0) {
      return false;
    }
  }
  return false;
}

int mutate(const Bytes& program, const std::vector<Method>& methods, uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  const std::string log = "/tmp/pocketfed-mutate-" + std::to_string(getpid());
  int refused = 0;
  int not_loaded = 0;
  int ran = 0;
  int died = 0;
  int reported = 0;
  int hung = 0;
  int ours = 0;
  for (int i = 0; i < count; ++i) {
    const Bytes copy = damaged(program, random);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      try_program(copy, methods, log);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFSIGNALED(status)) {
      ++(WTERMSIG(status) == SIGXCPU || WTERMSIG(status) == SIGKILL ? hung : died);
      continue;
    }
    switch (WEXITSTATUS(status)) {
      case kRefused: ++refused; break;
      case kNotLoaded: ++not_loaded; break;
      case kRan: ++ran; break;
      case kReported: ++(blames_us(log) ? ours : reported); break;
      default: ++ours;
    }
  }
  (void)std::remove(log.c_str());
  std::printf("{\"programs\": %d, \"refused\": %d, \"not_loaded\": %d, \"ran\": %d, \"died_in_runtime\": %d, "
              "\"reported_in_runtime\": %d, \"hung\": %d, \"ours\": %d}\n",
              count, refused, not_loaded, ran, died, reported, hung, ours);
  return hung == 0 && ours == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "sharing" && argc == 2) {
    return sharing();
  }
  if (mode == "open" && argc == 3) {
    return open_time(read_file(argv[2]));
  }
  if (mode == "abi" && argc == 4) {
    return abi(read_file(argv[2]), read_signatures(argv[3]));
  }
  if (mode == "mutate" && argc == 6) {
    return mutate(read_file(argv[2]), read_signatures(argv[3]), std::strtoull(argv[4], nullptr, 10), std::atoi(argv[5]));
  }
  std::fputs("usage: native_driver abi PROGRAM SIGNATURES | sharing | open PROGRAM | mutate PROGRAM SIGNATURES SEED N\n", stderr);
  return 2;
}
