// The kernels of sharing.h. See there for what each function promises.
//
// A kernel walks through its vectors in blocks that stay in the first cache level. Loops are plain, so that the
// compiler vectorises them, and are compiled once for each variant of the processor, from the same source.

#include "sharing.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>

namespace {

__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 i128;

#define POCKETFED_INLINE inline __attribute__((always_inline))

constexpr double kLargestCode = 4611686018427387904.0;  // 2^62

// Values that are worked on at a time.
constexpr uint64_t kBlock = 512;

// Words of the table of differences; with many values to a polynomial the blocks are smaller.
constexpr uint64_t kTable = 8 * kBlock;

// What a kernel says of its input, as bits.
constexpr uint64_t kOutOfRange = 1;
constexpr uint64_t kRejected = 2;
constexpr uint64_t kNotCanonical = 4;

POCKETFED_INLINE uint64_t flag(uint64_t condition, uint64_t name) { return condition != 0 ? name : 0; }

// All ones for a negative integer.
POCKETFED_INLINE uint64_t sign_of(int64_t code) { return static_cast<uint64_t>(code >> 63); }

// Non-zero if the magnitude of an integer exceeds a limit up to 2^62, which is given as 2^63 - 1 - limit.
POCKETFED_INLINE uint64_t beyond(int64_t code, uint64_t slack) {
  return (((static_cast<uint64_t>(code) ^ sign_of(code)) - sign_of(code)) + slack) >> 63;
}

// --- the fields --------------------------------------------------------------------------------------------------

// Integers modulo 2^61 - 1. Three bits of a word are free, and 2^61 = 1: what lies above bit 61 is added to what lies
// below, late, and a result is made canonical once. Products are made of halves of words, because vector units multiply
// those.
struct M61 {
  using Element = uint64_t;
  struct Constant {
    uint64_t low;   // 32 bits
    uint64_t high;  // 29 bits
  };

  static constexpr uint64_t kLimbs = 1;
  static constexpr Element kP = (uint64_t{1} << 61) - 1;
  static constexpr uint64_t kSlack = (uint64_t{1} << 63) - (uint64_t{1} << 60);  // integers up to 2^60 - 1

  static POCKETFED_INLINE Element load(const uint64_t* limbs) { return *limbs; }
  static POCKETFED_INLINE void store(Element x, uint64_t* limbs) { *limbs = x; }

  // Non-zero if x is not canonical.
  static POCKETFED_INLINE uint64_t excess(Element x) { return (x | (x + 1)) >> 61; }

  // Any word to one below 2^61 + 8 of the same residue.
  static POCKETFED_INLINE Element fold(Element x) { return (x & kP) + (x >> 61); }

  // A word up to 2 * kP - 1 to the canonical one.
  static POCKETFED_INLINE Element canonical(Element x) {
    const Element y = x - kP;
    return y + (kP & (uint64_t{0} - (y >> 63)));
  }

  // Of elements from 0 to kP, both included, and so is the result.
  static POCKETFED_INLINE Element add(Element x, Element y) { return fold(x + y); }
  static POCKETFED_INLINE Element subtract(Element x, Element y) { return fold(x + kP - y); }

  static POCKETFED_INLINE Constant constant(const uint64_t* limbs) { return {*limbs & 0xffffffff, *limbs >> 32}; }

  // sum + x * c, folded; the sum is at most folded, too.
  static POCKETFED_INLINE Element add_product(Element sum, Element x, Constant c) {
    const uint64_t low = x & 0xffffffff;
    const uint64_t high = x >> 32;
    const uint64_t middle = low * c.high + high * c.low;  // times 2^32: its bits from 29 upwards are above bit 61
    const uint64_t around = (middle >> 29) + ((middle & ((uint64_t{1} << 29) - 1)) << 32);
    return fold(sum + fold(low * c.low) + around + ((high * c.high) << 3));  // 2^64 = 2^3
  }

  static POCKETFED_INLINE Element lift(int64_t code) { return static_cast<uint64_t>(code) + (kP & sign_of(code)); }

  static POCKETFED_INLINE int64_t lower(Element x, uint64_t&) {
    const uint64_t negative = uint64_t{0} - ((kP / 2 - x) >> 63);
    return static_cast<int64_t>(x - (kP & negative));
  }
};

// Integers modulo 2^127 - 1.
struct M127 {
  using Element = u128;
  using Constant = u128;

  static constexpr uint64_t kLimbs = 2;
  static constexpr Element kP = (u128{1} << 127) - 1;
  static constexpr uint64_t kSlack = (uint64_t{1} << 62) - 1;  // integers up to 2^62

  static POCKETFED_INLINE Element load(const uint64_t* limbs) { return (u128{limbs[1]} << 64) | limbs[0]; }

  static POCKETFED_INLINE void store(Element x, uint64_t* limbs) {
    limbs[0] = static_cast<uint64_t>(x);
    limbs[1] = static_cast<uint64_t>(x >> 64);
  }

  static POCKETFED_INLINE uint64_t excess(Element x) { return static_cast<uint64_t>((x | (x + 1)) >> 127); }

  // Any number to one up to 2^127 of the same residue.
  static POCKETFED_INLINE Element fold(Element x) { return (x & kP) + (x >> 127); }

  // A number up to 2 * kP - 1 to the canonical one.
  static POCKETFED_INLINE Element canonical(Element x) {
    const Element y = x - kP;
    return y + (kP & (u128{0} - (y >> 127)));
  }

  // Of elements from 0 to kP, both included, and so is the result.
  static POCKETFED_INLINE Element add(Element x, Element y) { return fold(x + y); }
  static POCKETFED_INLINE Element subtract(Element x, Element y) { return fold(x + kP - y); }

  static POCKETFED_INLINE Constant constant(const uint64_t* limbs) { return load(limbs); }

  static POCKETFED_INLINE Element add_product(Element sum, Element x, Constant c) {
    const uint64_t x0 = static_cast<uint64_t>(x);
    const uint64_t x1 = static_cast<uint64_t>(x >> 64);
    const uint64_t c0 = static_cast<uint64_t>(c);
    const uint64_t c1 = static_cast<uint64_t>(c >> 64);
    const u128 lowest = u128{x0} * c0;
    const u128 middle = u128{x0} * c1 + u128{x1} * c0 + (lowest >> 64);  // times 2^64; no carry, as x1, c1 < 2^63
    const u128 low = (middle << 64) | static_cast<uint64_t>(lowest);
    const u128 high = u128{x1} * c1 + (middle >> 64);  // times 2^128 = 2; below 2^126
    return fold(sum + fold(fold(low) + (high << 1)));
  }

  static POCKETFED_INLINE Element lift(int64_t code) {
    return static_cast<u128>(static_cast<i128>(code)) + (kP & static_cast<u128>(static_cast<i128>(code) >> 127));
  }

  static POCKETFED_INLINE int64_t lower(Element x, uint64_t& bad) {
    const u128 negative = u128{0} - ((kP / 2 - x) >> 127);
    const u128 wide = x - (kP & negative);
    const int64_t code = static_cast<int64_t>(static_cast<uint64_t>(wide));
    bad |= static_cast<uint64_t>(wide != static_cast<u128>(static_cast<i128>(code))) | beyond(code, kSlack);
    return code;
  }
};

// --- loops over at most a block; each returns what its input has against it -----------------------------------------

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
  return flag(bad, kOutOfRange);
}

POCKETFED_INLINE void add_squares(const int64_t* codes, uint64_t n, uint64_t* norm_squared) {
  u128 sum = (u128{norm_squared[1]} << 64) | norm_squared[0];
  for (uint64_t j = 0; j < n; ++j) {
    const u128 square = static_cast<u128>(i128{codes[j]} * codes[j]);
    sum += square;
    norm_squared[2] += sum < square;
  }
  norm_squared[0] = static_cast<uint64_t>(sum);
  norm_squared[1] = static_cast<uint64_t>(sum >> 64);
}

template <class Field>
POCKETFED_INLINE uint64_t lift_loop(const int64_t* codes, uint64_t n, uint64_t* __restrict out) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    bad |= beyond(codes[j], Field::kSlack);
    Field::store(Field::lift(codes[j]), out + Field::kLimbs * j);
  }
  return flag(bad, kOutOfRange);
}

template <class Field>
POCKETFED_INLINE uint64_t lower_loop(const uint64_t* vector, uint64_t n, int64_t* __restrict codes) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    codes[j] = Field::lower(Field::load(vector + Field::kLimbs * j), bad);
  }
  return flag(bad, kOutOfRange);
}

template <class Field>
POCKETFED_INLINE uint64_t mask_loop(const uint64_t* words, uint64_t n, uint64_t* out) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const auto x = Field::load(words + Field::kLimbs * j) & Field::kP;
    bad |= Field::excess(x);
    Field::store(x, out + Field::kLimbs * j);
  }
  return flag(bad, kRejected);
}

template <class Field>
POCKETFED_INLINE void add_loop(const uint64_t* __restrict x, uint64_t n, uint64_t* __restrict sums) {
  for (uint64_t j = 0; j < Field::kLimbs * n; j += Field::kLimbs) {
    Field::store(Field::add(Field::load(sums + j), Field::load(x + j)), sums + j);
  }
}

template <class Field>
POCKETFED_INLINE void subtract_from_loop(const uint64_t* __restrict x, uint64_t n, uint64_t* __restrict differences) {
  for (uint64_t j = 0; j < Field::kLimbs * n; j += Field::kLimbs) {
    Field::store(Field::subtract(Field::load(x + j), Field::load(differences + j)), differences + j);
  }
}

template <class Field>
POCKETFED_INLINE void canonical_loop(const uint64_t* __restrict x, uint64_t n, uint64_t* __restrict out) {
  for (uint64_t j = 0; j < Field::kLimbs * n; j += Field::kLimbs) {
    Field::store(Field::canonical(Field::load(x + j)), out + j);
  }
}

template <class Field>
POCKETFED_INLINE uint64_t accumulate_loop(const uint64_t* __restrict vector, uint64_t n,
                                          typename Field::Constant weight, uint64_t* __restrict sums) {
  uint64_t bad = 0;
  for (uint64_t j = 0; j < Field::kLimbs * n; j += Field::kLimbs) {
    const auto x = Field::load(vector + j);
    bad |= Field::excess(x);
    Field::store(Field::canonical(Field::add_product(Field::load(sums + j), x, weight)), sums + j);
  }
  return flag(bad, kNotCanonical);
}

// The values at 3, 4 and 5 of a quadratic polynomial whose values at 0, 1 and 2 are given, the latter as random words:
// s - 3 x + 3 y, 3 s - 8 x + 6 y, 6 s - 15 x + 10 y. This is extrapolate() for the usual scheme, without a table.
POCKETFED_INLINE uint64_t quadratic_loop(M61, const uint64_t* __restrict secret, const uint64_t* __restrict words1,
                                         const uint64_t* __restrict words2, uint64_t n, uint64_t* __restrict share3,
                                         uint64_t* __restrict share4, uint64_t* __restrict share5) {
  uint64_t rejected = 0;
  for (uint64_t j = 0; j < n; ++j) {
    const uint64_t x = words1[j] & M61::kP;
    const uint64_t y = words2[j] & M61::kP;
    rejected |= M61::excess(x) | M61::excess(y);
    const uint64_t second = M61::subtract(y, x);
    const uint64_t curvature = M61::subtract(second, M61::subtract(x, secret[j]));
    const uint64_t third = M61::add(second, curvature);
    const uint64_t at3 = M61::add(y, third);
    const uint64_t fourth = M61::add(third, curvature);
    const uint64_t at4 = M61::add(at3, fourth);
    share3[j] = M61::canonical(at3);
    share4[j] = M61::canonical(at4);
    share5[j] = M61::canonical(M61::add(at4, M61::add(fourth, curvature)));
  }
  return flag(rejected, kRejected);
}

// Elements modulo 2^127 - 1 in limbs of 43, 43 and 41 bits: small multiples add up without carries, in vector units.
struct Thirds {
  static constexpr uint64_t kMask = (uint64_t{1} << 43) - 1;
  static constexpr uint64_t kTopMask = (uint64_t{1} << 41) - 1;

  uint64_t low;
  uint64_t middle;
  uint64_t high;

  static POCKETFED_INLINE Thirds of(uint64_t limb0, uint64_t limb1) {
    return {limb0 & kMask, ((limb0 >> 43) | (limb1 << 21)) & kMask, (limb1 >> 22) & kTopMask};
  }

  POCKETFED_INLINE bool is_modulus() const { return (low & middle) == kMask && high == kTopMask; }

  // Adds to the number, and returns what is above bit 127.
  POCKETFED_INLINE uint64_t carry(uint64_t addend) {
    low += addend;
    middle += low >> 43;
    low &= kMask;
    high += middle >> 43;
    middle &= kMask;
    const uint64_t above = high >> 41;
    high &= kTopMask;
    return above;
  }

  // a * s + b * y - c * x, canonical, for c up to 16.
  static POCKETFED_INLINE void store(uint64_t a, Thirds s, uint64_t b, Thirds y, uint64_t c, Thirds x,
                                     uint64_t* limbs) {
    Thirds t{a * s.low + b * y.low + (16 * kMask - c * x.low), a * s.middle + b * y.middle + (16 * kMask - c * x.middle),
             a * s.high + b * y.high + (16 * kTopMask - c * x.high)};
    t.low += t.carry(0);  // 2^127 = 1; what is left is less than twice the modulus
    Thirds next = t;
    t.carry(next.carry(1));  // it reaches the modulus exactly if the next number reaches 2^127
    limbs[0] = t.low | (t.middle << 43);
    limbs[1] = (t.middle >> 21) | (t.high << 22);
  }
};

POCKETFED_INLINE uint64_t quadratic_loop(M127, const uint64_t* __restrict secret, const uint64_t* __restrict words1,
                                         const uint64_t* __restrict words2, uint64_t n, uint64_t* __restrict share3,
                                         uint64_t* __restrict share4, uint64_t* __restrict share5) {
  uint64_t rejected = 0;
  for (uint64_t j = 0; j < 2 * n; j += 2) {
    const Thirds s = Thirds::of(secret[j], secret[j + 1]);
    const Thirds x = Thirds::of(words1[j], words1[j + 1]);
    const Thirds y = Thirds::of(words2[j], words2[j + 1]);
    rejected |= static_cast<uint64_t>(x.is_modulus()) | static_cast<uint64_t>(y.is_modulus());
    Thirds::store(1, s, 3, y, 3, x, share3 + j);
    Thirds::store(3, s, 6, y, 8, x, share4 + j);
    Thirds::store(6, s, 10, y, 15, x, share5 + j);
  }
  return flag(rejected, kRejected);
}

// --- splitting ---------------------------------------------------------------------------------------------------

// A secret's polynomials, as pfs_split describes them.
struct Polynomials {
  uint64_t packing;
  uint64_t num_words;
  const uint64_t* const* words;
  uint64_t num_outputs;
  uint64_t* const* outputs;

  uint64_t values() const { return packing + num_words; }
};

// Polynomials start .. start + n: by finite differences, that is by additions. Row i of the table becomes the difference
// of order values - 1 - i that ends at the last value, and then at each next one.
template <class Field>
POCKETFED_INLINE uint64_t extrapolate(const Polynomials& p, const uint64_t* secret, uint64_t start, uint64_t n) {
  uint64_t table[kTable];
  const uint64_t row = Field::kLimbs * n;
  const uint64_t last = p.values() - 1;
  uint64_t bad = 0;
  for (uint64_t i = 0; i < p.packing; ++i) {
    const uint64_t* from = secret + Field::kLimbs * (p.packing - 1 - i);
    for (uint64_t j = 0; j < n; ++j) {
      Field::store(Field::load(from + Field::kLimbs * p.packing * j), table + row * i + Field::kLimbs * j);
    }
  }
  for (uint64_t i = 0; i < p.num_words; ++i) {
    bad |= mask_loop<Field>(p.words[i] + Field::kLimbs * start, n, table + row * (p.packing + i));
  }
  for (uint64_t order = 1; order <= last; ++order) {
    for (uint64_t i = 0; i + order <= last; ++i) {
      subtract_from_loop<Field>(table + row * (i + 1), n, table + row * i);
    }
  }
  for (uint64_t k = 0; k < p.num_outputs; ++k) {
    for (uint64_t i = 1; i <= last; ++i) {
      add_loop<Field>(table + row * (i - 1), n, table + row * i);
    }
    canonical_loop<Field>(table + row * last, n, p.outputs[k] + Field::kLimbs * start);
  }
  return bad;
}

template <class Field>
POCKETFED_INLINE uint64_t split_block(const Polynomials& p, const uint64_t* secret, uint64_t start, uint64_t n) {
  if (p.packing == 1 && p.num_words == 2 && p.num_outputs == 3) {
    const uint64_t at = Field::kLimbs * start;
    return quadratic_loop(Field{}, secret, p.words[0] + at, p.words[1] + at, n, p.outputs[0] + at, p.outputs[1] + at,
                          p.outputs[2] + at);
  }
  return extrapolate<Field>(p, secret, start, n);
}

// Polynomials in a block: their values and secrets fit the buffers.
template <class Field>
POCKETFED_INLINE uint64_t block_of(const Polynomials& p) {
  return std::max(uint64_t{1}, std::min(kBlock / p.packing, kTable / (Field::kLimbs * p.values())));
}

// --- the kernels -------------------------------------------------------------------------------------------------

POCKETFED_INLINE uint64_t encode_all(const float* x, uint64_t n, double factor, double scale, int64_t* codes,
                                     uint64_t* norm_squared) {
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += kBlock) {
    const uint64_t size = std::min(kBlock, n - start);
    bad |= encode_loop(x + start, size, factor, scale, codes + start);
    add_squares(codes + start, size, norm_squared);
  }
  return bad;
}

template <class Field>
POCKETFED_INLINE uint64_t split_all(const Polynomials& p, const uint64_t* secret, uint64_t n) {
  const uint64_t block = block_of<Field>(p);
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += block) {
    const uint64_t size = std::min(block, n - start);
    bad |= split_block<Field>(p, secret + Field::kLimbs * p.packing * start, start, size);
  }
  return bad;
}

template <class Field>
POCKETFED_INLINE uint64_t encode_split_all(const Polynomials& p, const float* x, double factor, double scale,
                                           uint64_t n, uint64_t* norm_squared) {
  int64_t codes[kBlock];
  uint64_t secret[Field::kLimbs * kBlock];
  const uint64_t block = block_of<Field>(p);
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += block) {
    const uint64_t size = std::min(block, n - start);
    bad |= encode_loop(x + p.packing * start, p.packing * size, factor, scale, codes);
    add_squares(codes, p.packing * size, norm_squared);
    bad |= lift_loop<Field>(codes, p.packing * size, secret);
    bad |= split_block<Field>(p, secret, start, size);
  }
  return bad;
}

template <class Field>
POCKETFED_INLINE uint64_t interpolate_all(uint64_t num_vectors, const uint64_t* const* vectors, const uint64_t* weights,
                                          uint64_t n, uint64_t* out) {
  uint64_t bad = 0;
  for (uint64_t start = 0; start < n; start += kBlock) {
    const uint64_t size = std::min(kBlock, n - start);
    uint64_t* sums = out + Field::kLimbs * start;
    std::fill_n(sums, Field::kLimbs * size, uint64_t{0});
    for (uint64_t i = 0; i < num_vectors; ++i) {
      const auto weight = Field::constant(weights + Field::kLimbs * i);
      bad |= accumulate_loop<Field>(vectors[i] + Field::kLimbs * start, size, weight, sums);
    }
  }
  return bad;
}

// --- variants ----------------------------------------------------------------------------------------------------

struct FieldKernels {
  uint64_t (*lift)(const int64_t*, uint64_t, uint64_t*);
  uint64_t (*lower)(const uint64_t*, uint64_t, int64_t*);
  uint64_t (*mask)(const uint64_t*, uint64_t, uint64_t*);
  uint64_t (*split)(const Polynomials&, const uint64_t*, uint64_t);
  uint64_t (*encode_split)(const Polynomials&, const float*, double, double, uint64_t, uint64_t*);
  uint64_t (*interpolate)(uint64_t, const uint64_t* const*, const uint64_t*, uint64_t, uint64_t*);
  uint64_t (*accumulate)(const uint64_t*, uint64_t, const uint64_t*, uint64_t*);
};

struct Variant {
  const char* name;
  bool (*runs_here)();
  uint64_t (*encode)(const float*, uint64_t, double, double, int64_t*, uint64_t*);
  const FieldKernels* fields[2];
};

// The same code for another instruction set: what is inlined is compiled for the function that it is inlined into.
#define POCKETFED_VARIANT(NAME, TARGET, RUNS_HERE)                                                                     \
  namespace NAME {                                                                                                     \
  bool runs_here() { return RUNS_HERE; }                                                                               \
  TARGET uint64_t encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes, uint64_t* norm) {    \
    return encode_all(x, n, factor, scale, codes, norm);                                                               \
  }                                                                                                                    \
  template <class Field>                                                                                               \
  struct Of {                                                                                                          \
    TARGET static uint64_t lift(const int64_t* codes, uint64_t n, uint64_t* out) {                                     \
      return lift_loop<Field>(codes, n, out);                                                                          \
    }                                                                                                                  \
    TARGET static uint64_t lower(const uint64_t* vector, uint64_t n, int64_t* codes) {                                 \
      return lower_loop<Field>(vector, n, codes);                                                                      \
    }                                                                                                                  \
    TARGET static uint64_t mask(const uint64_t* words, uint64_t n, uint64_t* out) {                                    \
      return mask_loop<Field>(words, n, out);                                                                          \
    }                                                                                                                  \
    TARGET static uint64_t split(const Polynomials& p, const uint64_t* secret, uint64_t n) {                           \
      return split_all<Field>(p, secret, n);                                                                           \
    }                                                                                                                  \
    TARGET static uint64_t encode_split(const Polynomials& p, const float* x, double factor, double scale, uint64_t n, \
                                        uint64_t* norm) {                                                              \
      return encode_split_all<Field>(p, x, factor, scale, n, norm);                                                    \
    }                                                                                                                  \
    TARGET static uint64_t interpolate(uint64_t num_vectors, const uint64_t* const* vectors, const uint64_t* weights,  \
                                       uint64_t n, uint64_t* out) {                                                    \
      return interpolate_all<Field>(num_vectors, vectors, weights, n, out);                                            \
    }                                                                                                                  \
    TARGET static uint64_t accumulate(const uint64_t* vector, uint64_t n, const uint64_t* weight, uint64_t* sums) {    \
      return accumulate_loop<Field>(vector, n, Field::constant(weight), sums);                                         \
    }                                                                                                                  \
    static constexpr FieldKernels kKernels = {lift, lower, mask, split, encode_split, interpolate, accumulate};        \
  };                                                                                                                   \
  constexpr Variant kVariant = {#NAME, runs_here, encode, {&Of<M61>::kKernels, &Of<M127>::kKernels}};                  \
  }

#if defined(__x86_64__)
POCKETFED_VARIANT(avx512, __attribute__((target("avx512f,avx512dq,avx512vl,bmi2"))),
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
POCKETFED_VARIANT(avx2, __attribute__((target("avx2,bmi2"))),
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
#endif
POCKETFED_VARIANT(portable, , true)

constexpr const Variant* kVariants[] = {
#if defined(__x86_64__)
    &avx512::kVariant, &avx2::kVariant,
#endif
    &portable::kVariant};

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> variant{
      *std::find_if(std::begin(kVariants), std::end(kVariants), [](const Variant* v) { return v->runs_here(); })};
  return variant;
}

const Variant& variant() { return *chosen().load(std::memory_order_relaxed); }

const FieldKernels& kernels(int32_t field) { return *variant().fields[field]; }

// --- arguments and statuses --------------------------------------------------------------------------------------

// Whether the caller has `n` items there, as far as can be told: an address, aligned, and a number that can be true.
template <class T>
bool there(const T* items, uint64_t n) {
  return n == 0 || (items != nullptr && reinterpret_cast<uintptr_t>(items) % alignof(T) == 0 && n <= PFS_MAX_ELEMENTS);
}

template <class T>
bool all_there(T* const* vectors, uint64_t num_vectors, uint64_t n) {
  return num_vectors <= PFS_MAX_VALUES && there(vectors, num_vectors) &&
         std::all_of(vectors, vectors + num_vectors, [n](const T* vector) { return there(vector, n); });
}

bool known(int32_t field) { return field == PFS_M61 || field == PFS_M127; }

bool possible(int32_t field, const Polynomials& p, uint64_t n) {
  return known(field) && p.packing >= 1 && p.num_words >= 1 && p.packing <= PFS_MAX_VALUES &&
         p.num_words <= PFS_MAX_VALUES && p.values() <= PFS_MAX_VALUES && all_there(p.words, p.num_words, n) &&
         all_there(p.outputs, p.num_outputs, n);
}

bool canonical(int32_t field, const uint64_t* vector, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    if (field == PFS_M61 ? M61::excess(vector[i]) != 0 : M127::excess(M127::load(vector + 2 * i)) != 0) {
      return false;
    }
  }
  return true;
}

int32_t status_of(uint64_t bad) {
  if ((bad & kOutOfRange) != 0) {
    return PFS_OUT_OF_RANGE;
  }
  if ((bad & kNotCanonical) != 0) {
    return PFS_NOT_CANONICAL;
  }
  return bad == 0 ? PFS_OK : PFS_REJECTED;
}

}  // namespace

extern "C" {

int32_t pfs_abi_version(void) { return PFS_ABI_VERSION; }

const char* pfs_variant(void) { return variant().name; }

int32_t pfs_use_variant(const char* name) {
  if (name == nullptr) {
    return PFS_INVALID_ARGUMENT;
  }
  for (const Variant* candidate : kVariants) {
    if (std::strcmp(candidate->name, name) == 0 && candidate->runs_here()) {
      chosen().store(candidate, std::memory_order_relaxed);
      return PFS_OK;
    }
  }
  return PFS_INVALID_ARGUMENT;
}

int32_t pfs_encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes, uint64_t norm_squared[3]) {
  if (!there(x, n) || !there(codes, n) || !there(norm_squared, 3)) {
    return PFS_INVALID_ARGUMENT;
  }
  return status_of(variant().encode(x, n, factor, scale, codes, norm_squared));
}

int32_t pfs_lift(int32_t field, const int64_t* codes, uint64_t n, uint64_t* out) {
  return known(field) && there(codes, n) && there(out, n) ? status_of(kernels(field).lift(codes, n, out))
                                                          : PFS_INVALID_ARGUMENT;
}

int32_t pfs_lower(int32_t field, const uint64_t* vector, uint64_t n, int64_t* codes) {
  return known(field) && there(vector, n) && there(codes, n) ? status_of(kernels(field).lower(vector, n, codes))
                                                             : PFS_INVALID_ARGUMENT;
}

int32_t pfs_mask(int32_t field, const uint64_t* words, uint64_t n, uint64_t* out) {
  return known(field) && there(words, n) && there(out, n) ? status_of(kernels(field).mask(words, n, out))
                                                          : PFS_INVALID_ARGUMENT;
}

int32_t pfs_split(int32_t field, uint64_t packing, const uint64_t* secret, uint64_t num_words,
                  const uint64_t* const* words, uint64_t num_outputs, uint64_t* const* outputs, uint64_t n) {
  const Polynomials p{packing, num_words, words, num_outputs, outputs};
  return possible(field, p, n) && there(secret, n) ? status_of(kernels(field).split(p, secret, n))
                                                   : PFS_INVALID_ARGUMENT;
}

int32_t pfs_encode_split(int32_t field, uint64_t packing, const float* x, double factor, double scale,
                         uint64_t num_words, const uint64_t* const* words, uint64_t num_outputs,
                         uint64_t* const* outputs, uint64_t n, uint64_t norm_squared[3]) {
  const Polynomials p{packing, num_words, words, num_outputs, outputs};
  return possible(field, p, n) && there(x, n) && there(norm_squared, 3)
             ? status_of(kernels(field).encode_split(p, x, factor, scale, n, norm_squared))
             : PFS_INVALID_ARGUMENT;
}

int32_t pfs_interpolate(int32_t field, uint64_t num_vectors, const uint64_t* const* vectors, const uint64_t* weights,
                        uint64_t n, uint64_t* out) {
  if (!known(field) || !all_there(vectors, num_vectors, n) || !there(weights, num_vectors) || !there(out, n)) {
    return PFS_INVALID_ARGUMENT;
  }
  if (!canonical(field, weights, num_vectors)) {
    return PFS_NOT_CANONICAL;
  }
  return status_of(kernels(field).interpolate(num_vectors, vectors, weights, n, out));
}

int32_t pfs_accumulate(int32_t field, const uint64_t* vector, uint64_t n, const uint64_t* weight, uint64_t* sums) {
  if (!known(field) || !there(vector, n) || !there(weight, 1) || !there(sums, n)) {
    return PFS_INVALID_ARGUMENT;
  }
  return canonical(field, weight, 1) ? status_of(kernels(field).accumulate(vector, n, weight, sums))
                                     : PFS_NOT_CANONICAL;
}

}  // extern "C"
