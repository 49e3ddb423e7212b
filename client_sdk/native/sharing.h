/*
 * pocketfed's C ABI for sharing secrets: vectors over two Mersenne fields, Shamir shares of fixed-point updates. It
 * needs a C++17 compiler and nothing else; any host that can call C (Python's ctypes, JNI, Swift, Rust) can use it.
 *
 * Vectors
 *   - PFS_M61: elements modulo 2^61 - 1, one uint64 each.
 *   - PFS_M127: elements modulo 2^127 - 1, two uint64 each, the lower one first.
 *   - Vectors that come in are canonical: every element is below the modulus. Vectors that come out are canonical.
 *   - `n` counts elements, up to PFS_MAX_ELEMENTS. Buffers are aligned to their type, and outputs overlap nothing.
 *     Null and misaligned pointers and impossible counts are refused (where n is 0, a pointer may be null); that a
 *     pointer leads to as many elements as `n` says is the caller's word.
 *   - A call that is refused may have written its outputs; what they hold then means nothing.
 *
 * Random words are a stream cipher's output, made by the host, whose AES is better than one that would be written here.
 * A word (or pair of words) is masked to the width of the field; should the modulus itself come out, which happens once
 * in 2^61 (2^127) words, the call answers PFS_REJECTED, and the host goes the slow way, where such a word is left out
 * and the next one takes its place.
 *
 * No branch and no address depends on the content of a vector; only refusals do. No function allocates or starts a
 * thread, and none but pfs_use_variant keeps state: every function may be called from every thread.
 *
 * PFS_ABI_VERSION grows when the meaning or layout of anything here changes or something goes; new functions and new
 * status codes come without. docs/native-abi.md has more.
 */
#ifndef POCKETFED_SHARING_H
#define POCKETFED_SHARING_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PFS_ABI_VERSION 1
#define PFS_MAX_VALUES 256
#define PFS_MAX_ELEMENTS (UINT64_C(1) << 48)
#define PFS_EXPORT __attribute__((visibility("default")))

typedef enum pfs_status {
  PFS_OK = 0,
  PFS_INVALID_ARGUMENT = 1, /* an unknown field, a null or misaligned pointer, a count out of range, no such variant */
  PFS_NOT_CANONICAL = 2,    /* an element of an input is not below the modulus */
  PFS_REJECTED = 3,         /* a masked random word is the modulus */
  PFS_OUT_OF_RANGE = 4      /* a value to encode is NaN or infinite, or an integer is beyond what the field takes */
} pfs_status;

typedef enum pfs_field { PFS_M61 = 0, PFS_M127 = 1 } pfs_field;

/* PFS_ABI_VERSION of the library; a host compares it with the header that it was written against. */
PFS_EXPORT int32_t pfs_abi_version(void);

/* Name of the variant in use: the best of "avx512", "avx2" and "portable" that this processor runs, by default. */
PFS_EXPORT const char* pfs_variant(void);

/* Chooses a variant by name, for the whole process. All of them give the same bits. */
PFS_EXPORT int32_t pfs_use_variant(const char* name);

/*
 * Rounds a clipped vector to a grid: y = (float)(x * factor), code = rint(y * scale), ties to even, both products in
 * double precision; codes up to 2^62. `norm_squared` is a 192-bit number, lowest limb first, to which the sum of
 * code^2 is added.
 */
PFS_EXPORT int32_t pfs_encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes,
                              uint64_t norm_squared[3]);

/* Signed integers, up to 2^60 - 1 (PFS_M61) or 2^62 in magnitude, as elements: negative ones from the top. */
PFS_EXPORT int32_t pfs_lift(int32_t field, const int64_t* codes, uint64_t n, uint64_t* out);

/* The inverse of pfs_lift. */
PFS_EXPORT int32_t pfs_lower(int32_t field, const uint64_t* vector, uint64_t n, int64_t* codes);

/* Random words (n or 2 n of them) as elements. `out` may be `words`. */
PFS_EXPORT int32_t pfs_mask(int32_t field, const uint64_t* words, uint64_t n, uint64_t* out);

/*
 * Shares of a secret: n polynomials, whose values at the points 1 .. num_words are random, one vector of words for each
 * point, and whose values at 0, -1, .. 1 - packing are the secret (n * packing elements: those of one polynomial lie
 * together, the one at 0 first). Writes their values at the next num_outputs points. Up to PFS_MAX_VALUES values
 * determine a polynomial.
 */
PFS_EXPORT int32_t pfs_split(int32_t field, uint64_t packing, const uint64_t* secret, uint64_t num_words,
                             const uint64_t* const* words, uint64_t num_outputs, uint64_t* const* outputs, uint64_t n);

/* pfs_encode, pfs_lift and pfs_split in one pass over n * packing values. */
PFS_EXPORT int32_t pfs_encode_split(int32_t field, uint64_t packing, const float* x, double factor, double scale,
                                    uint64_t num_words, const uint64_t* const* words, uint64_t num_outputs,
                                    uint64_t* const* outputs, uint64_t n, uint64_t norm_squared[3]);

/* out = sum of weights[i] * vectors[i]. The weights are canonical elements. */
PFS_EXPORT int32_t pfs_interpolate(int32_t field, uint64_t num_vectors, const uint64_t* const* vectors,
                                   const uint64_t* weights, uint64_t n, uint64_t* out);

/* sums += weight * vector. The weight is a canonical element. */
PFS_EXPORT int32_t pfs_accumulate(int32_t field, const uint64_t* vector, uint64_t n, const uint64_t* weight,
                                  uint64_t* sums);

#ifdef __cplusplus
}
#endif

#endif /* POCKETFED_SHARING_H */
