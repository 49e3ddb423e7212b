/*
 * pocketfed's C ABI for sharing secrets: vectors over two Mersenne fields, Shamir shares of fixed-point updates. It
 * needs a C++17 compiler and nothing else; any host that can call C (Python's ctypes, JNI, Swift, Rust) can use it.
 *
 * Vectors
 *   - PFS_M61: elements modulo 2^61 - 1, one little-endian uint64 each.
 *   - PFS_M127: elements modulo 2^127 - 1, two uint64 each, the lower one first.
 *   - Vectors that come in are canonical: every element is below the modulus. What is not is refused as a whole
 *     (PFS_NOT_CANONICAL), and then what was written is meaningless. Vectors that come out are canonical.
 *   - `n` counts elements. Buffers are aligned as uint64, and outputs overlap nothing.
 *
 * Random words are a stream cipher's output, made by the host (AES-256 in counter mode has better implementations than
 * one that would be written here). A word is masked to the width of the field; should the modulus itself come out,
 * which it does once in 2^61 (2^127) words, then the call answers PFS_REJECTED and the host goes the slow way, where
 * such a word is left out and the next one takes its place.
 *
 * No branch and no address depends on the content of a vector; the statuses that do are the two refusals above. No
 * function keeps state, allocates or starts a thread.
 */
#ifndef POCKETFED_SHARING_H
#define POCKETFED_SHARING_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PFS_ABI_VERSION 1
#define PFS_EXPORT __attribute__((visibility("default")))

typedef enum pfs_status {
  PFS_OK = 0,
  PFS_INVALID_ARGUMENT = 1, /* an unknown field, a number that is out of range, or no such variant here */
  PFS_NOT_CANONICAL = 2,    /* an element of an input is not below the modulus */
  PFS_REJECTED = 3,         /* a masked random word is the modulus */
  PFS_OUT_OF_RANGE = 4      /* a value to encode is NaN, infinite, or becomes a code beyond 2^62 */
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
 * double precision. `norm_squared` is a 192-bit number, lowest limb first, to which the sum of code^2 is added.
 */
PFS_EXPORT int32_t pfs_encode(const float* x, uint64_t n, double factor, double scale, int64_t* codes,
                              uint64_t norm_squared[3]);

/* Signed integers as field elements: negative ones from the top. */
PFS_EXPORT int32_t pfs_lift(int32_t field, const int64_t* codes, uint64_t n, uint64_t* out);

/* Random words (n or 2 n of them) as field elements. `out` may be `words`. */
PFS_EXPORT int32_t pfs_mask(int32_t field, const uint64_t* words, uint64_t n, uint64_t* out);

/*
 * Shares 3, 4 and 5 of the quadratic polynomial with f(0) = the secret, f(1) and f(2) = random elements (n or 2 n
 * words each), by finite differences. The secrets are signed integers.
 */
PFS_EXPORT int32_t pfs_split_3_of_5(int32_t field, const int64_t* codes, const uint64_t* words1, const uint64_t* words2,
                                    uint64_t n, uint64_t* share3, uint64_t* share4, uint64_t* share5);

/* pfs_encode and pfs_split_3_of_5 in one pass, in the field PFS_M61. */
PFS_EXPORT int32_t pfs_encode_split_3_of_5(const float* x, uint64_t n, double factor, double scale,
                                           const uint64_t* words1, const uint64_t* words2, uint64_t* share3,
                                           uint64_t* share4, uint64_t* share5, uint64_t norm_squared[3]);

/*
 * outputs[k] = sum over i of matrix[k][i] * inputs[i], of canonical vectors: shares at other points, the secret from
 * shares, parity. The matrix lies row by row, its entries are canonical field elements (one or two words each).
 */
PFS_EXPORT int32_t pfs_combine(int32_t field, uint64_t num_inputs, const uint64_t* const* inputs, uint64_t num_outputs,
                               uint64_t* const* outputs, const uint64_t* matrix, uint64_t n);

/* sums += weight * vector; the weight is below 2^32. */
PFS_EXPORT int32_t pfs_accumulate(int32_t field, const uint64_t* vector, uint64_t n, uint64_t weight, uint64_t* sums);

#ifdef __cplusplus
}
#endif

#endif /* POCKETFED_SHARING_H */
