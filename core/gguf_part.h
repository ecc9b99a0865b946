/* gguf_part.h: the checked contents of one GGUF file that lies in memory.
 *
 * Owns the walk over the bytes and the directories that point into them; knows no metadata key, no
 * path and no other file. Called by gguf.c alone.
 *
 * A file, little-endian (GGUF specification, ggml docs/gguf.md); only the data are padded:
 *
 *   header    "GGUF" | version u32 | n_tensors u64 | n_metadata u64
 *   metadata  key | type u32 | value        an array's value: type u32 | count u64 | elements
 *   tensors   name | n_dims u32 | shape u64[n_dims] | type u32 | offset u64
 *   data      from the next multiple of the alignment on; the offsets count from there
 *
 * where key, name and every string are `length u64 | bytes`.
 */
#ifndef KVQ_GGUF_PART_H
#define KVQ_GGUF_PART_H

#include "gguf.h"
#include "map.h"

/* Named entries. Costs 12 bytes per entry: less than the 14 that the shortest metadata entry takes
 * in the file (8 + 1 key, 4 type, 1 value), or the 33 of a tensor (8 + 1 name, 4 n_dims, 8 shape, 4
 * type, 8 offset). So the directories of a file are always smaller than the file. */
typedef struct kvq_directory {
    const uint8_t **at; /* [count + 1] entries in the file's order; of metadata also the end */
    uint32_t *by_name;  /* [count] indices into `at`, ascending by name */
    uint32_t count;
} kvq_directory;

/* Directory without entries in it yet, to be filled by the caller. */
kvq_status kvq_directory_open(kvq_directory *out, uint32_t count);
void kvq_directory_close(kvq_directory *directory);
/* Fills by_name. A name that appears twice is an error, in which `label` is the file and `what` the
 * kind of entry. */
kvq_status kvq_directory_sort(kvq_directory *directory, const char *label, const char *what);
bool kvq_directory_find(const kvq_directory *directory, const char *name, uint32_t *index);

typedef struct kvq_gguf_part {
    char label[200]; /* how errors call the file: its path, or the end of a long one */
    kvq_map map;     /* empty where the bytes are the caller's */
    const uint8_t *bytes;
    size_t size;
    bool may_be_cut;     /* set by the caller: data of tensors may lie behind the end of the file */
    bool is_cut;         /* some do */
    bool ended;          /* what failed is that the file ends within its header */
    size_t header_bytes; /* up to the end of the last tensor's entry, once those are read */
    kvq_directory metadata;
    uint32_t n_tensors;
    uint32_t first_tensor; /* index over all parts */
    const uint8_t *data;   /* of tensors; NULL until kvq_gguf_part_read_tensors */
    size_t data_bytes;
} kvq_gguf_part;

/* Checks the header and the metadata of part->bytes and fills metadata and n_tensors. The tensors
 * follow at metadata.at[metadata.count]. */
kvq_status kvq_gguf_part_read_metadata(kvq_gguf_part *part);

/* Checks the part's tensors and enters them in `all`, from index first_tensor on. */
kvq_status kvq_gguf_part_read_tensors(kvq_gguf_part *part, uint32_t alignment, kvq_directory *all);

/* The entry at `index` < metadata.count, and the tensor whose entry begins at `at`: both were
 * checked when they were read, so these cannot fail. Of a part that is cut, `data` is no address to
 * read from. */
void kvq_gguf_part_meta(const kvq_gguf_part *part, uint32_t index, kvq_meta *out);
void kvq_gguf_part_tensor(const kvq_gguf_part *part, const uint8_t *at, kvq_gguf_tensor *out);

#endif
