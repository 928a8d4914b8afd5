/* Models of fastseq from C. Time comes first everywhere: x [T, B, C], one number after the other.
 *
 * Numbers are float, or int32_t where the model's input or output are indices (characters, codes, labels). A model may
 * be used by several threads at once, a stream by one at a time. Functions that can fail return NULL or -1, and then
 * fastseq_error() tells this thread why. Link with -lfastseq.
 */
#ifndef FASTSEQ_H
#define FASTSEQ_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FASTSEQ_API __attribute__((visibility("default")))
#else
#define FASTSEQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fastseq_model fastseq_model;
typedef struct fastseq_stream fastseq_stream;

/* Of the last call of this thread that failed; never NULL. */
FASTSEQ_API const char* fastseq_error(void);
/* The instruction set that runs. */
FASTSEQ_API const char* fastseq_isa(void);

FASTSEQ_API fastseq_model* fastseq_model_load(const char* path);
FASTSEQ_API fastseq_model* fastseq_model_parse(const void* bytes, size_t size);
/* Streams of the model may outlive this. */
FASTSEQ_API void fastseq_model_free(fastseq_model* model);

/* C of a step of input and of output, whether they are indices, and the floats that a stream's state takes. */
FASTSEQ_API int64_t fastseq_model_input_size(const fastseq_model* model);
FASTSEQ_API int64_t fastseq_model_output_size(const fastseq_model* model);
FASTSEQ_API int fastseq_model_input_is_index(const fastseq_model* model);
FASTSEQ_API int fastseq_model_output_is_index(const fastseq_model* model);
FASTSEQ_API int64_t fastseq_model_state_size(const fastseq_model* model);
/* JSON: layers, tensors and sizes. Lives as long as the model. */
FASTSEQ_API const char* fastseq_model_description(const fastseq_model* model);

/* Whole sequences: x [T, B, C] to y [steps, B, C']. lengths [B] or NULL: the valid steps of each row, 0 .. T; results
 * beyond them are zeros, indices -1. `capacity` numbers fit into y. Returns the steps, as many as T but for models with
 * convolutions, or -1.
 */
FASTSEQ_API int64_t fastseq_model_run(const fastseq_model* model, int64_t T, int64_t B, const void* x,
                                      const int64_t* lengths, int threads, void* y, int64_t capacity);

/* A sequence that comes piece by piece; NULL where the model looks ahead. */
FASTSEQ_API fastseq_stream* fastseq_stream_new(const fastseq_model* model);
FASTSEQ_API void fastseq_stream_free(fastseq_stream* stream);
FASTSEQ_API int fastseq_stream_reset(fastseq_stream* stream);
/* The next T steps, x [T, C] to y [steps, C']. Returns the steps, or -1. */
FASTSEQ_API int64_t fastseq_stream_step(fastseq_stream* stream, int64_t T, const void* x, void* y, int64_t capacity);
/* The same for n streams of one model at once, x [T, n, C] to y [steps, n, C']: each gets what it would get alone. */
FASTSEQ_API int64_t fastseq_streams_step(fastseq_stream* const* streams, int64_t n, int64_t T, const void* x,
                                         int threads, void* y, int64_t capacity);
/* state_size floats. */
FASTSEQ_API int fastseq_stream_save(fastseq_stream* stream, float* state);
FASTSEQ_API int fastseq_stream_load(fastseq_stream* stream, const float* state);

#ifdef __cplusplus
}
#endif

#endif
