/*
 * pocketfed's C ABI over ExecuTorch: the seam at which any host that can call C (Python's ctypes, JNI, Swift, Rust)
 * runs an exported program. No C++ type and no exception crosses it. docs/native-abi.md explains it at length.
 *
 * Errors
 *   - A function that can fail returns a pf_status. pf_last_error() then says why, for the calling thread: UTF-8 for
 *     people, not for programs. After a failure a program is as usable as before.
 *   - Null pointers, wrong counts, dtypes, ranks, sizes, unaligned data, and handles that were closed or never opened
 *     are refused. What cannot be told from within is the caller's word: that a pointer leads to as many bytes as its
 *     descriptor says, and that names end in a zero byte.
 *
 * Ownership and lifetime
 *   - Tensors are dense, row-major, little-endian, aligned to their elements. Input buffers are only read, and only
 *     during the call; output buffers belong to the caller and are filled by a copy. Nothing points into the program
 *     after a call returns, nor from the program into the caller's memory in a way that is ever followed.
 *   - Outputs may overlap inputs; they are written last. Outputs that overlap each other are written in order.
 *   - All methods of a program share one set of memory-planned arenas, sized to the largest, so a method must be
 *     functional (every tensor in, every tensor out), as the exported methods are.
 *
 * Threads
 *   - Every function may be called from any thread at any time. Calls on one program take turns, those on different
 *     programs run concurrently, and a program may wander from thread to thread.
 *   - The thread count of kernels is a property of the process (see pf_set_threads).
 *   - A child process made by fork without exec must not call on programs of its parent.
 *
 * Change
 *   - PF_ABI_VERSION grows when the meaning or layout of anything here changes or something goes. New functions and
 *     new status codes come without: treat an unknown code as a failure.
 *
 * A program is code. The runtime checks its structure, but a crafted one can still crash the process: open none whose
 * hash you do not have from somebody you trust.
 */
#ifndef POCKETFED_SHIM_H
#define POCKETFED_SHIM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PF_ABI_VERSION 1
#define PF_MAX_RANK 16
#define PF_MAX_THREADS 256
#define PF_MAX_PROGRAM_BYTES UINT64_C(2147483647)
#define PF_MAX_PLANNED_BYTES UINT64_C(4294967296) /* of all arenas together */
#define PF_EXPORT __attribute__((visibility("default")))

typedef enum pf_status {
  PF_OK = 0,
  PF_INVALID_ARGUMENT = 1,  /* null, unaligned or out of range; an unknown dtype; not the handle of an open program */
  PF_INVALID_PROGRAM = 2,   /* the bytes are not a program that this release can read */
  PF_UNKNOWN_METHOD = 3,    /* the program has no method of that name */
  PF_MISSING_OPERATOR = 4,  /* the method calls an operator that is not registered; the error text names it */
  PF_SIGNATURE = 5,         /* the tensors do not fit the method: number, dtype, shape or size */
  PF_OUT_OF_MEMORY = 6,     /* an allocation failed, or would be beyond PF_MAX_PLANNED_BYTES */
  PF_EXECUTION_FAILED = 7,  /* a kernel or a delegate reported an error */
  PF_BUSY = 8,              /* the thread count cannot change while programs are open */
  PF_INTERNAL = 9           /* anything else */
} pf_status;

typedef enum pf_dtype {
  PF_FLOAT32 = 0,
  PF_FLOAT64 = 1,
  PF_INT32 = 2,
  PF_INT64 = 3,
  PF_BOOL = 4,
  PF_UINT8 = 5,
  PF_INT8 = 6
} pf_dtype;

/* One tensor of a call. `sizes` has `rank` entries; `data` holds product(sizes) elements, fewer than 2^31. */
typedef struct pf_tensor {
  int32_t dtype; /* a pf_dtype */
  int32_t rank;  /* 0 .. PF_MAX_RANK */
  const int64_t* sizes;
  void* data; /* not null, not even for no elements */
} pf_tensor;

/* Stands for an open program. Not an address; never given out twice in a process. */
typedef struct pf_program pf_program;

/* PF_ABI_VERSION of the library; a host compares it with the header that it was written against. */
PF_EXPORT int32_t pf_abi_version(void);

/* The ExecuTorch release whose headers this library was compiled with, e.g. "1.5.1". */
PF_EXPORT const char* pf_executorch_version(void);

/* Why the last failing call on this thread failed. Valid until the next call on this thread; never null. */
PF_EXPORT const char* pf_last_error(void);

/*
 * Opens a program from the bytes of a .pte file, which are copied. Taking bytes, not a path, lets the host run
 * exactly the bytes whose hash it checked. No method is loaded and no planned memory is touched yet. After a failure
 * `*out` is null.
 */
PF_EXPORT int32_t pf_open(const void* data, uint64_t size, pf_program** out);

/*
 * Releases everything the program holds, when a call that is under way has ended. A handle of no open program (null, or
 * closed before) is left alone.
 */
PF_EXPORT void pf_close(pf_program* program);

/* Loads a method ahead of its first run, to learn early whether it can run here. Loading twice is harmless. */
PF_EXPORT int32_t pf_load_method(pf_program* program, const char* method);

/* Bytes that ExecuTorch's memory plan reserves for one call of the method. The method is not loaded. */
PF_EXPORT int32_t pf_planned_memory(pf_program* program, const char* method, uint64_t* bytes);

/*
 * Runs a method (loads it first if needed). `outputs` describes what the caller expects; a difference to what the
 * method returns is PF_SIGNATURE. Whatever the failure, no output buffer has been written.
 */
PF_EXPORT int32_t pf_run(pf_program* program, const char* method, uint64_t num_inputs, const pf_tensor* inputs,
                         uint64_t num_outputs, const pf_tensor* outputs);

/*
 * Fixes the number of threads that kernels use, for the whole process. 1 (the default) means that every kernel runs
 * on the thread that calls pf_run, so that concurrent programs do not wait for one another. Up to PF_MAX_THREADS;
 * PF_BUSY while programs are open, unless it is the number in force.
 */
PF_EXPORT int32_t pf_set_threads(uint32_t threads);

/*
 * Writes the names of all registered operators ("aten::add.out"), each followed by '\n', and returns the number of
 * bytes that the whole list takes. A buffer that is too small (or null) is left untouched.
 */
PF_EXPORT uint64_t pf_registered_operators(char* buffer, uint64_t capacity);

#ifdef __cplusplus
}
#endif

#endif /* POCKETFED_SHIM_H */
