/*
 * A host in plain C: trains an exported program on data from files, through pocketfed_shim.h alone.
 *
 *   native_host BUNDLE METHOD BATCH SHAPE X Y RATE EPOCHS OUT
 *
 *   BUNDLE   folder with program.pte and weights.safetensors
 *   METHOD   a fused step of the manifest, such as train_b8, whose batch size is BATCH
 *   SHAPE    the manifest's feature_shape: 6, or 8x8
 *   X, Y     raw float32 examples and raw int64 labels, little-endian
 *   RATE     learning rate
 *   OUT      where to write the trained weights, raw float32
 *
 * An app takes METHOD, BATCH and SHAPE from the manifest, and compares the SHA-256 of program.pte with the manifest's
 * before it opens it: a program is code. Examples are taken in order; the last batch may be short and is masked.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pocketfed_shim.h"

enum { MAX_DIMS = PF_MAX_RANK - 1 };

static void fail(const char *what, const char *why) {
  fprintf(stderr, "native_host: %s: %s\n", what, why);
  exit(EXIT_FAILURE);
}

static void check(int32_t status, const char *what) {
  if (status != PF_OK) {
    fail(what, pf_last_error());
  }
}

static void *allocate(size_t count, size_t width) {
  void *memory = calloc(count > 0 ? count : 1, width);
  if (memory == NULL) {
    fail("memory", "there is not enough");
  }
  return memory;
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  long length = -1;
  if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (length = ftell(file)) < 0 || fseek(file, 0, SEEK_SET) != 0) {
    fail(path, strerror(errno));
  }
  *size = (size_t)length;
  char *bytes = allocate(*size, 1);
  if (fread(bytes, 1, *size, file) != *size) {
    fail(path, "cannot be read");
  }
  fclose(file);
  return bytes;
}

static char *read_in(const char *folder, const char *name, size_t *size) {
  const size_t room = strlen(folder) + strlen(name) + 2;
  char *path = allocate(room, 1);
  snprintf(path, room, "%s/%s", folder, name);
  char *bytes = read_file(path, size);
  free(path);
  return bytes;
}

/* The data section of a frame is the flat weight vector: after 8 bytes of header length, and the header. */
static float *weights_of_frame(const char *frame, size_t size, size_t *count) {
  uint64_t header = 0;
  for (int i = 7; i >= 0 && size >= 8; --i) {
    header = header << 8 | (unsigned char)frame[i];
  }
  if (size < 8 || header > size - 8 || (size - 8 - header) % sizeof(float) != 0) {
    fail("weights.safetensors", "is no frame of float32");
  }
  *count = (size_t)(size - 8 - header) / sizeof(float);
  float *weights = allocate(*count, sizeof(float));
  memcpy(weights, frame + 8 + header, *count * sizeof(float));
  return weights;
}

static int32_t parse_shape(const char *text, int64_t *sizes) {
  int32_t rank = 0;
  for (char *end = NULL; rank < MAX_DIMS; text = end + 1) {
    sizes[rank++] = strtoll(text, &end, 10);
    if (sizes[rank - 1] <= 0 || (*end != 'x' && *end != '\0')) {
      fail("SHAPE", "is not like 6 or 8x8");
    }
    if (*end == '\0') {
      return rank;
    }
  }
  fail("SHAPE", "has too many dimensions");
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 10) {
    fputs("usage: native_host BUNDLE METHOD BATCH SHAPE X Y RATE EPOCHS OUT\n", stderr);
    return 2;
  }
  const char *folder = argv[1], *method = argv[2];
  const int64_t batch = strtoll(argv[3], NULL, 10);
  int64_t x_sizes[PF_MAX_RANK] = {batch};
  const int32_t dims = parse_shape(argv[4], x_sizes + 1);
  size_t features = 1;
  for (int32_t i = 1; i <= dims; ++i) {
    features *= (size_t)x_sizes[i];
  }
  size_t size, count, x_bytes, y_bytes;
  float *all_x = (float *)(void *)read_file(argv[5], &x_bytes);
  int64_t *all_y = (int64_t *)(void *)read_file(argv[6], &y_bytes);
  const size_t examples = y_bytes / sizeof(int64_t);
  if (batch < 1 || examples == 0 || x_bytes != examples * features * sizeof(float)) {
    fail("data", "X and Y do not hold the same examples");
  }
  float rate = strtof(argv[7], NULL);
  const long epochs = strtol(argv[8], NULL, 10);

  if (pf_abi_version() != PF_ABI_VERSION) {
    fail("the library", "speaks another ABI than the header");
  }
  char *program = read_in(folder, "program.pte", &size);
  pf_program *handle = NULL;
  check(pf_open(program, size, &handle), "program.pte");
  free(program); /* the library has a copy */
  uint64_t planned = 0;
  check(pf_planned_memory(handle, method, &planned), method);
  char *frame = read_in(folder, "weights.safetensors", &size);
  float *weights = weights_of_frame(frame, size, &count);
  free(frame);

  const size_t rows = (size_t)batch;
  float *x = allocate(rows * features, sizeof(float)), *mask = allocate(rows, sizeof(float));
  int64_t *y = allocate(rows, sizeof(int64_t));
  float loss = 0;
  const int64_t w_sizes[] = {(int64_t)count}, one[] = {1}, rows_sizes[] = {batch};
  /* In the order of the manifest. The new weights may lie where the old ones lay: outputs are written last. */
  const pf_tensor inputs[] = {
      {PF_FLOAT32, 1, w_sizes, weights},  {PF_FLOAT32, 1, one, &rate},        {PF_FLOAT32, dims + 1, x_sizes, x},
      {PF_INT64, 1, rows_sizes, y},       {PF_FLOAT32, 1, rows_sizes, mask},
  };
  const pf_tensor outputs[] = {{PF_FLOAT32, 1, w_sizes, weights}, {PF_FLOAT32, 1, one, &loss}};
  double total = 0;
  for (long epoch = 0; epoch < epochs; ++epoch) {
    total = 0;
    for (size_t at = 0; at < examples; at += rows) {
      const size_t used = examples - at < rows ? examples - at : rows;
      memcpy(x, all_x + at * features, used * features * sizeof(float));
      memset(x + used * features, 0, (rows - used) * features * sizeof(float));
      for (size_t i = 0; i < rows; ++i) {
        y[i] = i < used ? all_y[at + i] : 0;
        mask[i] = i < used ? 1.0F : 0.0F;
      }
      check(pf_run(handle, method, sizeof inputs / sizeof *inputs, inputs, sizeof outputs / sizeof *outputs, outputs),
            method);
      total += (double)loss;
    }
  }
  printf("ExecuTorch %s, %" PRIu64 " bytes planned, mean loss of the last epoch %.6f\n", pf_executorch_version(),
         planned, total / (double)examples);

  FILE *out = fopen(argv[9], "wb");
  if (out == NULL || fwrite(weights, sizeof(float), count, out) != count || fclose(out) != 0) {
    fail(argv[9], "cannot be written");
  }
  pf_close(handle);
  free(weights);
  free(x);
  free(y);
  free(mask);
  free(all_x);
  free(all_y);
  return EXIT_SUCCESS;
}
