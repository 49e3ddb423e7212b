// The kernels of sharing.h. See there for what each function promises.
//
// Elements modulo 2^61 - 1 leave three bits of a word free, and 2^61 = 1: a number is reduced by adding what lies above
// bit 61 to what lies below. Sums are reduced late, and made canonical once. Products are made of 32-bit halves, because
// vector units multiply those. Loops are plain, so that the compiler vectorises them; they are compiled once for each
// variant of the processor, from the same source, and give the same bits.

#include "sharing.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace {

using u128 = unsigned __int128;

#define POCKETFED_INLINE inline __attribute__((always_inline))

constexpr uint64_t kP61 = (uint64_t{1} << 61) - 1;
constexpr u128 kP127 = (u128{1} << 127) - 1;
constexpr uint64_t kLow32 = 0xffffffff;
constexpr uint64_t kLow29 = (uint64_t{1} << 29) - 1;
constexpr double kLargestCode = 4611686018427387904.0;  // 2^62

// Elements that are worked on at a time: three or four vectors of them stay in the first cache level.
constexpr uint64_t kBlock = 512;

// --- elements modulo 2^61 - 1 ------------------------------------------------------------------------------------

// Any word to one below 2^61 + 8 of the same residue.
POCKETFED_INLINE uint64_t fold(uint64_t x) { return (x & kP61) + (x >> 61); }

// A word up to 2 * kP61 - 1 to the canonical one.
POCKETFED_INLINE uint64_t canonical(uint64_t x) {
  const uint64_t y = x - kP61;
  return y + (kP61 & (uint64_t{0} - (y >> 63)));
}

// Has a bit from 61 upwards exactly if x is not canonical.
POCKETFED_INLINE uint64_t excess(uint64_t x) { return x | (x + 1); }

// The residue of a signed integer, up to kP61 (which stands for 0).
POCKETFED_INLINE uint64_t residue(int64_t code) {
  const uint64_t sign = static_cast<uint64_t>(code >> 63);
  const uint64_t magnitude = canonical(fold((static_cast<uint64_t>(code) ^ sign) - sign));
  return (magnitude ^ sign) + (sign & (kP61 + 1));
}

// x * c, below 2^63; c is given as its lower 32 and its upper 29 bits.
POCKETFED_INLINE uint64_t product(uint64_t x, uint64_t c_low, uint64_t c_high) {
  const uint64_t low = x & kLow32;
  const uint64_t high = x >> 32;
  const uint64_t middle = low * c_high + high * c_low;  // times 2^32
  return fold(low * c_low) + (middle >> 29) + ((middle & kLow29) << 32) + ((high * c_high) << 3);
}

// --- the loops; each returns the bits that say whether its input was admissible -----------------------------------

POCKETFED_INLINE uint64_t encode_loop(const float* __restrict x, uint64_t n, double factor, double scale,
                                      int64_t* __restrict codes) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const float clipped = static_cast<float>(static_cast<double>(x[j]) * factor);
    const double code = std::nearbyint(static_cast<double>(clipped) * scale);
    const bool fits = std::fabs(code) <= kLargestCode;  // false for NaN
    bad |= static_cast<uint64_t>(!fits);
    codes[j] = static_cast<int64_t>(fits ? code : 0.0);
  }
  return bad;
}

POCKETFED_INLINE void add_squares(const int64_t* codes, uint64_t n, uint64_t* norm_squared) {
  u128 sum = (u128{norm_squared[1]} << 64) | norm_squared[0];
  for (uint64_t j = 0; j < n; ++j) {
    const u128 square = static_cast<u128>(static_cast<__int128>(codes[j]) * codes[j]);
    sum += square;
    norm_squared[2] += sum < square;
  }
  norm_squared[0] = static_cast<uint64_t>(sum);
  norm_squared[1] = static_cast<uint64_t>(sum >> 64);
}

POCKETFED_INLINE uint64_t lift_loop(const int64_t* codes, uint64_t n, uint64_t* __restrict out) {
  for (uint64_t j = 0; j < n; ++j) {
    out[j] = canonical(residue(codes[j]));
  }
  return 0;
}

POCKETFED_INLINE uint64_t mask_loop(const uint64_t* words, uint64_t n, uint64_t* out) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    out[j] = words[j] & kP61;
    bad |= out[j] + 1;
  }
  return bad >> 61;
}

// f(3), f(4), f(5) of the quadratic polynomial through (0, s), (1, x), (2, y): its second difference is constant.
POCKETFED_INLINE uint64_t split_loop(const int64_t* __restrict codes, const uint64_t* __restrict words1,
                                     const uint64_t* __restrict words2, uint64_t n, uint64_t* __restrict share3,
                                     uint64_t* __restrict share4, uint64_t* __restrict share5) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const uint64_t s = residue(codes[j]);
    const uint64_t x = words1[j] & kP61;
    const uint64_t y = words2[j] & kP61;
    bad |= (x + 1) | (y + 1);
    const uint64_t first = x + kP61 - s;
    const uint64_t second = y + kP61 - x;
    const uint64_t curvature = fold(second + 2 * kP61 - first);
    const uint64_t third = second + curvature;
    const uint64_t at3 = fold(y + third);
    const uint64_t fourth = fold(third + curvature);
    const uint64_t at4 = fold(at3 + fourth);
    const uint64_t at5 = fold(at4 + fold(fourth + curvature));
    share3[j] = canonical(at3);
    share4[j] = canonical(at4);
    share5[j] = canonical(at5);
  }
  return bad >> 61;
}

POCKETFED_INLINE uint64_t accumulate_loop(const uint64_t* __restrict vector, uint64_t n, uint64_t weight,
                                          uint64_t* __restrict sums) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const uint64_t x = vector[j];
    bad |= excess(x);
    const uint64_t high = (x >> 32) * (weight & kLow32);
    const uint64_t low = (x & kLow32) * (weight & kLow32);
    sums[j] = canonical(fold(sums[j] + fold(low) + (high >> 29) + ((high & kLow29) << 32)));
  }
  return bad >> 61;
}

// Adds one term to a block of sums that are below 2^61 + 8.
POCKETFED_INLINE uint64_t term_loop(const uint64_t* __restrict x, uint64_t n, uint64_t factor,
                                    uint64_t* __restrict sums) {
  const uint64_t c_low = factor & kLow32;
  const uint64_t c_high = factor >> 32;
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    bad |= excess(x[j]);
    sums[j] = fold(sums[j] + product(x[j], c_low, c_high));
  }
  return bad >> 61;
}

POCKETFED_INLINE void finish_loop(const uint64_t* __restrict sums, uint64_t n, uint64_t* __restrict out) {
  for (uint64_t j = 0; j < n; ++j) {
    out[j] = canonical(sums[j]);
  }
}

// --- the kernels, block by block ---------------------------------------------------------------------------------

POCKETFED_INLINE uint64_t encode_blocks(const float* x, uint64_t n, double factor, double scale, int64_t* codes,
                                        uint64_t* norm_squared) {
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += kBlock) {
    const uint64_t size = std::min(kBlock, n - start);
    bad |= encode_loop(x + start, size, factor, scale, codes + start);
    add_squares(codes + start, size, norm_squared);
  }
  return bad;
}

// Bit 0: a value out of range; bit 1: a rejected word.
POCKETFED_INLINE uint64_t encode_split_blocks(const float* x, uint64_t n, double factor, double scale,
                                              const uint64_t* words1, const uint64_t* words2, uint64_t* share3,
                                              uint64_t* share4, uint64_t* share5, uint64_t* norm_squared) {
  int64_t codes[kBlock];
  uint64_t out_of_range = 0;
  uint64_t rejected = 0;
  for (uint64_t start = 0; start < n; start += kBlock) {
    const uint64_t size = std::min(kBlock, n - start);
    out_of_range |= encode_loop(x + start, size, factor, scale, codes);
    add_squares(codes, size, norm_squared);
    rejected |= split_loop(codes, words1 + start, words2 + start, size, share3 + start, share4 + start, share5 + start);
  }
  return out_of_range | (rejected << 1);
}

POCKETFED_INLINE uint64_t combine_blocks(uint64_t num_inputs, const uint64_t* const* inputs, uint64_t num_outputs,
                                         uint64_t* const* outputs, const uint64_t* matrix, uint64_t n) {
  uint64_t sums[kBlock];
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += kBlock) {
    const uint64_t size = std::min(kBlock, n - start);
    for (uint64_t k = 0; k < num_outputs; ++k) {
      std::fill_n(sums, size, uint64_t{0});
      for (uint64_t i = 0; i < num_inputs; ++i) {
        bad |= term_loop(inputs[i] + start, size, matrix[k * num_inputs + i], sums);
      }
      finish_loop(sums, size, outputs[k] + start);
    }
  }
  return bad;
}

struct Variant {
  const char* name;
  bool (*runs_here)();
  uint64_t (*encode)(const float*, uint64_t, double, double, int64_t*, uint64_t*);
  uint64_t (*lift)(const int64_t*, uint64_t, uint64_t*);
  uint64_t (*mask)(const uint64_t*, uint64_t, uint64_t*);
  uint64_t (*split)(const int64_t*, const uint64_t*, const uint64_t*, uint64_t, uint64_t*, uint64_t*, uint64_t*);
  uint64_t (*encode_split)(const float*, uint64_t, double, double, const uint64_t*, const uint64_t*, uint64_t*,
                           uint64_t*, uint64_t*, uint64_t*);
  uint64_t (*combine)(uint64_t, const uint64_t* const*, uint64_t, uint64_t* const*, const uint64_t*, uint64_t);
  uint64_t (*accumulate)(const uint64_t*, uint64_t, uint64_t, uint64_t*);
};

// The same code for another instruction set: what is inlined is compiled for the function that it is inlined into.
#define POCKETFED_VARIANT(NAME, TARGET, RUNS_HERE)                                                                     \
  namespace NAME {                                                                                                     \
  bool runs_here() { return RUNS_HERE; }                                                                               \
  TARGET uint64_t encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes, uint64_t* norm) {    \
    return encode_blocks(x, n, factor, scale, codes, norm);                                                            \
  }                                                                                                                    \
  TARGET uint64_t lift(const int64_t* codes, uint64_t n, uint64_t* out) { return lift_loop(codes, n, out); }           \
  TARGET uint64_t mask(const uint64_t* words, uint64_t n, uint64_t* out) { return mask_loop(words, n, out); }          \
  TARGET uint64_t split(const int64_t* codes, const uint64_t* words1, const uint64_t* words2, uint64_t n,              \
                        uint64_t* share3, uint64_t* share4, uint64_t* share5) {                                        \
    return split_loop(codes, words1, words2, n, share3, share4, share5);                                               \
  }                                                                                                                    \
  TARGET uint64_t encode_split(const float* x, uint64_t n, double factor, double scale, const uint64_t* words1,        \
                               const uint64_t* words2, uint64_t* share3, uint64_t* share4, uint64_t* share5,           \
                               uint64_t* norm) {                                                                       \
    return encode_split_blocks(x, n, factor, scale, words1, words2, share3, share4, share5, norm);                     \
  }                                                                                                                    \
  TARGET uint64_t combine(uint64_t num_inputs, const uint64_t* const* inputs, uint64_t num_outputs,                    \
                          uint64_t* const* outputs, const uint64_t* matrix, uint64_t n) {                              \
    return combine_blocks(num_inputs, inputs, num_outputs, outputs, matrix, n);                                        \
  }                                                                                                                    \
  TARGET uint64_t accumulate(const uint64_t* vector, uint64_t n, uint64_t weight, uint64_t* sums) {                    \
    return accumulate_loop(vector, n, weight, sums);                                                                   \
  }                                                                                                                    \
  constexpr Variant kTable = {#NAME, runs_here, encode, lift, mask, split, encode_split, combine, accumulate};         \
  }

#if defined(__x86_64__)
POCKETFED_VARIANT(avx512, __attribute__((target("avx512f,avx512dq,avx512vl"))),
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl"))
POCKETFED_VARIANT(avx2, __attribute__((target("avx2"))), __builtin_cpu_supports("avx2"))
#endif
POCKETFED_VARIANT(portable, , true)

constexpr const Variant* kVariants[] = {
#if defined(__x86_64__)
    &avx512::kTable, &avx2::kTable,
#endif
    &portable::kTable};

const Variant* best_variant() {
  for (const Variant* variant : kVariants) {
    if (variant->runs_here()) {
      return variant;
    }
  }
  return &portable::kTable;
}

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> variant{best_variant()};
  return variant;
}

const Variant& kernels() { return *chosen().load(std::memory_order_relaxed); }

// --- elements modulo 2^127 - 1: no vector unit multiplies them, so these loops have one variant ---------------------

POCKETFED_INLINE u128 load127(const uint64_t* limbs) { return (u128{limbs[1]} << 64) | limbs[0]; }

POCKETFED_INLINE void store127(u128 x, uint64_t* limbs) {
  limbs[0] = static_cast<uint64_t>(x);
  limbs[1] = static_cast<uint64_t>(x >> 64);
}

// Any number to one up to 2^127 of the same residue.
POCKETFED_INLINE u128 fold127(u128 x) { return (x & kP127) + (x >> 127); }

// A number up to 2 * kP127 - 1 to the canonical one.
POCKETFED_INLINE u128 canonical127(u128 x) {
  const u128 y = x - kP127;
  return y + (kP127 & (u128{0} - (y >> 127)));
}

POCKETFED_INLINE uint64_t excess127(u128 x) { return static_cast<uint64_t>((x | (x + 1)) >> 127); }

POCKETFED_INLINE u128 add127(u128 a, u128 b) { return canonical127(fold127(a + b)); }

POCKETFED_INLINE u128 subtract127(u128 a, u128 b) { return add127(a, kP127 - b); }

POCKETFED_INLINE u128 residue127(int64_t code) {
  const u128 sign = static_cast<u128>(static_cast<__int128>(code) >> 127);
  return canonical127(static_cast<u128>(static_cast<__int128>(code)) + (sign & kP127));
}

POCKETFED_INLINE u128 product127(u128 a, u128 b) {
  const uint64_t a0 = static_cast<uint64_t>(a);
  const uint64_t a1 = static_cast<uint64_t>(a >> 64);
  const uint64_t b0 = static_cast<uint64_t>(b);
  const uint64_t b1 = static_cast<uint64_t>(b >> 64);
  const u128 lowest = u128{a0} * b0;
  const u128 middle = u128{a0} * b1 + u128{a1} * b0 + (lowest >> 64);  // times 2^64; below 2^128, as a1, b1 < 2^63
  const u128 low = (middle << 64) | static_cast<uint64_t>(lowest);
  const u128 high = u128{a1} * b1 + (middle >> 64);  // times 2^128, which is 2
  return canonical127(fold127(fold127(low) + (high << 1)));
}

POCKETFED_INLINE u128 times_small127(u128 x, uint64_t weight) {
  const u128 low = u128{static_cast<uint64_t>(x)} * weight;
  const u128 high = u128{static_cast<uint64_t>(x >> 64)} * weight;  // times 2^64
  const u128 below = high & ((u128{1} << 63) - 1);
  return canonical127(fold127((below << 64) + low + (high >> 63)));
}

uint64_t lift127(const int64_t* codes, uint64_t n, uint64_t* out) {
  for (uint64_t j = 0; j < n; ++j) {
    store127(residue127(codes[j]), out + 2 * j);
  }
  return 0;
}

uint64_t mask127(const uint64_t* words, uint64_t n, uint64_t* out) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const u128 x = load127(words + 2 * j) & kP127;
    bad |= excess127(x);
    store127(x, out + 2 * j);
  }
  return bad;
}

uint64_t split127(const int64_t* codes, const uint64_t* words1, const uint64_t* words2, uint64_t n, uint64_t* share3,
                  uint64_t* share4, uint64_t* share5) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const u128 x = load127(words1 + 2 * j) & kP127;
    const u128 y = load127(words2 + 2 * j) & kP127;
    bad |= excess127(x) | excess127(y);
    const u128 second = subtract127(y, x);
    const u128 curvature = subtract127(second, subtract127(x, residue127(codes[j])));
    const u128 third = add127(second, curvature);
    const u128 at3 = add127(y, third);
    const u128 fourth = add127(third, curvature);
    const u128 at4 = add127(at3, fourth);
    store127(at3, share3 + 2 * j);
    store127(at4, share4 + 2 * j);
    store127(add127(at4, add127(fourth, curvature)), share5 + 2 * j);
  }
  return bad;
}

uint64_t combine127(uint64_t num_inputs, const uint64_t* const* inputs, uint64_t num_outputs, uint64_t* const* outputs,
                    const uint64_t* matrix, uint64_t n) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    for (uint64_t k = 0; k < num_outputs; ++k) {
      u128 sum = 0;
      for (uint64_t i = 0; i < num_inputs; ++i) {
        const u128 x = load127(inputs[i] + 2 * j);
        bad |= excess127(x);
        sum = add127(sum, product127(x, load127(matrix + 2 * (k * num_inputs + i))));
      }
      store127(sum, outputs[k] + 2 * j);
    }
  }
  return bad;
}

uint64_t accumulate127(const uint64_t* vector, uint64_t n, uint64_t weight, uint64_t* sums) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const u128 x = load127(vector + 2 * j);
    bad |= excess127(x);
    store127(add127(load127(sums + 2 * j), times_small127(x, weight)), sums + 2 * j);
  }
  return bad;
}

// --- statuses ----------------------------------------------------------------------------------------------------

bool known(int32_t field) { return field == PFS_M61 || field == PFS_M127; }

int32_t status_of(uint64_t bad, pfs_status otherwise) { return bad == 0 ? PFS_OK : otherwise; }

bool canonical_matrix(int32_t field, const uint64_t* matrix, uint64_t entries) {
  for (uint64_t i = 0; i < entries; ++i) {
    if (field == PFS_M61 ? excess(matrix[i]) >> 61 != 0 : excess127(load127(matrix + 2 * i)) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

extern "C" {

int32_t pfs_abi_version(void) { return PFS_ABI_VERSION; }

const char* pfs_variant(void) { return kernels().name; }

int32_t pfs_use_variant(const char* name) {
  for (const Variant* variant : kVariants) {
    if (std::strcmp(variant->name, name) == 0 && variant->runs_here()) {
      chosen().store(variant, std::memory_order_relaxed);
      return PFS_OK;
    }
  }
  return PFS_INVALID_ARGUMENT;
}

int32_t pfs_encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes, uint64_t norm_squared[3]) {
  return status_of(kernels().encode(x, n, factor, scale, codes, norm_squared), PFS_OUT_OF_RANGE);
}

int32_t pfs_lift(int32_t field, const int64_t* codes, uint64_t n, uint64_t* out) {
  if (!known(field)) {
    return PFS_INVALID_ARGUMENT;
  }
  return status_of(field == PFS_M61 ? kernels().lift(codes, n, out) : lift127(codes, n, out), PFS_OK);
}

int32_t pfs_mask(int32_t field, const uint64_t* words, uint64_t n, uint64_t* out) {
  if (!known(field)) {
    return PFS_INVALID_ARGUMENT;
  }
  return status_of(field == PFS_M61 ? kernels().mask(words, n, out) : mask127(words, n, out), PFS_REJECTED);
}

int32_t pfs_split_3_of_5(int32_t field, const int64_t* codes, const uint64_t* words1, const uint64_t* words2,
                         uint64_t n, uint64_t* share3, uint64_t* share4, uint64_t* share5) {
  if (!known(field)) {
    return PFS_INVALID_ARGUMENT;
  }
  return status_of(field == PFS_M61 ? kernels().split(codes, words1, words2, n, share3, share4, share5)
                                    : split127(codes, words1, words2, n, share3, share4, share5),
                   PFS_REJECTED);
}

int32_t pfs_encode_split_3_of_5(const float* x, uint64_t n, double factor, double scale, const uint64_t* words1,
                                const uint64_t* words2, uint64_t* share3, uint64_t* share4, uint64_t* share5,
                                uint64_t norm_squared[3]) {
  const uint64_t bad =
      kernels().encode_split(x, n, factor, scale, words1, words2, share3, share4, share5, norm_squared);
  return status_of(bad, (bad & 1) != 0 ? PFS_OUT_OF_RANGE : PFS_REJECTED);
}

int32_t pfs_combine(int32_t field, uint64_t num_inputs, const uint64_t* const* inputs, uint64_t num_outputs,
                    uint64_t* const* outputs, const uint64_t* matrix, uint64_t n) {
  if (!known(field)) {
    return PFS_INVALID_ARGUMENT;
  }
  if (!canonical_matrix(field, matrix, num_inputs * num_outputs)) {
    return PFS_NOT_CANONICAL;
  }
  const auto combine = field == PFS_M61 ? kernels().combine : combine127;
  return status_of(combine(num_inputs, inputs, num_outputs, outputs, matrix, n), PFS_NOT_CANONICAL);
}

int32_t pfs_accumulate(int32_t field, const uint64_t* vector, uint64_t n, uint64_t weight, uint64_t* sums) {
  if (!known(field) || weight >> 32 != 0) {
    return PFS_INVALID_ARGUMENT;
  }
  const auto accumulate = field == PFS_M61 ? kernels().accumulate : accumulate127;
  return status_of(accumulate(vector, n, weight, sums), PFS_NOT_CANONICAL);
}

}  // extern "C"
