/* Times every step of a stream: one float32 row in, one out.
 *
 *     packed_stream MODEL INPUT STEPS [OUTPUT]
 *
 * INPUT holds rows of floats, which are taken over and over; OUTPUT gets the results of all steps. Prints the seconds
 * that loading took, then those of a mean, a median and a 99th percentile step, the clock's own some 25 ns included.
 */
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "fastseq.h"

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int by_size(const void* a, const void* b) {
  const int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
  return (x > y) - (x < y);
}

static int failed(const char* why) {
  fprintf(stderr, "%s\n", why);
  return 1;
}

/* All floats of a file, and how many. */
static float* read_floats(const char* path, size_t* count) {
  FILE* const file = fopen(path, "rb");
  if (!file) return NULL;
  fseek(file, 0, SEEK_END);
  *count = (size_t)ftell(file) / sizeof(float);
  rewind(file);
  float* const found = malloc(*count * sizeof *found + 1);
  if (found && fread(found, sizeof *found, *count, file) != *count) *count = 0;
  fclose(file);
  return found;
}

int main(int argc, char** argv) {
  if (argc < 4) return failed("usage: packed_stream MODEL INPUT STEPS [OUTPUT]");
  const int64_t begin = now();
  fastseq_model* const model = fastseq_model_load(argv[1]);
  if (!model) return failed(fastseq_error());
  const double load = 1e-9 * (double)(now() - begin);
  const size_t I = (size_t)fastseq_model_input_size(model), H = (size_t)fastseq_model_output_size(model);
  const size_t steps = (size_t)atoll(argv[3]);
  size_t floats = 0;
  float* const x = read_floats(argv[2], &floats);
  const size_t rows = floats / I;
  float* const y = calloc(steps * H, sizeof *y);
  int64_t* const spans = malloc(steps * sizeof *spans);
  fastseq_stream* const stream = fastseq_stream_new(model);
  if (!stream) return failed(fastseq_error());
  if (!x || !rows || !steps || !y || !spans) return failed("no input, no steps or no memory");
  int64_t total = 0;
  for (size_t t = 0; t < steps; ++t) {
    const int64_t start = now();
    const int64_t done = fastseq_stream_step(stream, 1, x + t % rows * I, y + t * H, (int64_t)H);
    spans[t] = now() - start;
    if (done != 1) return failed(fastseq_error());
    total += spans[t];
  }
  if (argc > 4) {
    FILE* const file = fopen(argv[4], "wb");
    if (!file || fwrite(y, sizeof *y, steps * H, file) != steps * H || fclose(file)) return failed("cannot write");
  }
  qsort(spans, steps, sizeof *spans, by_size);
  printf("%.9g %.9g %.9g %.9g\n", load, 1e-9 * (double)total / (double)steps, 1e-9 * (double)spans[steps / 2],
         1e-9 * (double)spans[steps * 99 / 100]);
  fastseq_stream_free(stream);
  fastseq_model_free(model);
  free(x);
  free(y);
  free(spans);
  return 0;
}
