/* Reads indices from the standard input, gives them to a model one by one, and prints what it makes of them.
 *
 *     cc stream.c -I<folder of fastseq.h> -L<folder of libfastseq.so> -lfastseq -o stream && ./stream MODEL < text
 */
#include <stdio.h>
#include <stdlib.h>

#include "fastseq.h"

static int failed(void) {
  fprintf(stderr, "%s\n", fastseq_error());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: %s MODEL\n", argv[0]), 2;
  fastseq_model* const model = fastseq_model_load(argv[1]);
  if (!model) return failed();
  if (!fastseq_model_input_is_index(model)) return fprintf(stderr, "the model takes no indices\n"), 2;
  const int64_t size = fastseq_model_output_size(model);
  float* const y = malloc((size_t)size * sizeof *y);
  fastseq_stream* const stream = fastseq_stream_new(model);
  if (!stream || !y) return failed();
  int32_t x;
  while (scanf("%d", &x) == 1) {
    const int64_t steps = fastseq_stream_step(stream, 1, &x, y, size);
    if (steps < 0) return failed();
    for (int64_t n = 0; n < steps * size; ++n) printf("%.9g%c", y[n], n + 1 < size ? ' ' : '\n');
  }
  fastseq_stream_free(stream);
  fastseq_model_free(model);
  free(y);
  return 0;
}
