/* gguf.h: reads GGUF files (v2, v3, little-endian, split or whole) from memory maps.
 *
 * Owns the maps and a compact directory of metadata and tensors. Knows no model. Every count,
 * length, offset and product is checked against the file before it is used, and nothing is
 * allocated beyond the size of the file plus a constant: the file is untrusted. Called by arch.c
 * and session.c. Source: the GGUF specification (ggml docs/gguf.md).
 */
#ifndef KVQ_GGUF_H
#define KVQ_GGUF_H

#include "base.h"

typedef struct kvq_gguf kvq_gguf;

typedef struct kvq_gguf_tensor {
    const char *name; /* name_length bytes in the file, no final zero */
    uint32_t name_length;
    uint32_t type;       /* ggml type id; guaranteed to be one that weights.h knows the size of */
    uint32_t n_dims;     /* 1 to 4 */
    uint64_t shape[4];   /* shape[0] runs fastest; unused are 1 */
    const uint8_t *data; /* not to be read where the file is cut */
    uint64_t bytes;      /* of data, checked to lie in its file unless that is cut */
} kvq_gguf_tensor;

/* Maps `path`. For a file named NAME-00001-of-000NN.gguf whose metadata say split.count > 1, maps
 * the others beside it too; a later part of a split as `path` is an error that names the first. */
kvq_status kvq_gguf_open(kvq_gguf **out, const char *path);

/* The same for a file that may end anywhere after its header: metadata and tensor directory are
 * there, and kvq_gguf_is_cut tells whether the data of tensors are too. */
kvq_status kvq_gguf_open_header(kvq_gguf **out, const char *path);
bool kvq_gguf_is_cut(const kvq_gguf *file);

/* The same over bytes that the caller owns and keeps alive (a single file; used by the fuzzer). */
kvq_status kvq_gguf_open_memory(kvq_gguf **out, const uint8_t *data, size_t bytes);

void kvq_gguf_close(kvq_gguf *file); /* takes NULL */

/* How error sentences call the file: its path, or the end of a long one. */
const char *kvq_gguf_label(const kvq_gguf *file);

uint64_t kvq_gguf_meta_count(const kvq_gguf *file);
void kvq_gguf_meta(const kvq_gguf *file, uint64_t index, kvq_meta *out); /* index < count */
/* False if the key is absent. */
bool kvq_gguf_find(const kvq_gguf *file, const char *key, kvq_meta *out);

uint64_t kvq_gguf_tensor_count(const kvq_gguf *file); /* over all parts */
void kvq_gguf_tensor_at(const kvq_gguf *file, uint64_t index, kvq_gguf_tensor *out);
bool kvq_gguf_find_tensor(const kvq_gguf *file, const char *name, kvq_gguf_tensor *out);

/* Typed access. An absent key leaves *out as it was (the caller's default) and is no error; a value
 * of another type, or one that does not fit, is an error that names the key, what was found and
 * what was expected. Any integer type of the file serves where the value fits; so does an array's
 * first element if all elements are equal (some files give per-layer arrays); f64 serves for f32.
 */
kvq_status kvq_gguf_get_u32(const kvq_gguf *file, const char *key, uint32_t *out);
kvq_status kvq_gguf_get_f32(const kvq_gguf *file, const char *key, float *out);
kvq_status kvq_gguf_get_bool(const kvq_gguf *file, const char *key, bool *out);
/* The string's bytes in the file, no final zero; *length is set with it. */
kvq_status kvq_gguf_get_string(const kvq_gguf *file, const char *key, const char **out,
                               size_t *length);

#endif
