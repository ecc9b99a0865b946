/* gguf_part.c: see gguf_part.h. */
#include <inttypes.h>

#include "gguf_part.h"
#include "weights.h"

enum {
    HEADER_BYTES = 24,
    KEY_BYTES_MAX = 65535, /* by the specification */
    NAME_BYTES_MAX = 256,  /* the specification says 64; longer ones do no harm here */
    METADATA_BYTES_MIN = 14,
    TENSOR_BYTES_MIN = 33,
    ENTRIES_MAX = INT32_MAX /* so that every count and index fits 32 bits */
};
#define EXTENT_MAX (SIZE_MAX / 8) /* of an offset and of a size: so their sums do not overflow */

/* The name of an entry that lies in the file, for error sentences. */
static kvq_shown show_name(const uint8_t *entry) {
    return kvq_show(entry + 8, (size_t)kvq_load_u64(entry));
}

/* ---- directory --------------------------------------------------------------------------- */

kvq_status kvq_directory_open(kvq_directory *out, uint32_t count) {
    const uint8_t **const at = kvq_alloc(((size_t)count + 1) * sizeof *at);
    uint32_t *const by_name = kvq_alloc((size_t)count * sizeof *by_name);
    if (!at || !by_name) {
        kvq_free((void *)at);
        kvq_free(by_name);
        return kvq_fail(KVQ_ERR_MEMORY, "no memory for a directory of %u entries", count);
    }
    *out = (kvq_directory){at, by_name, count};
    return KVQ_OK;
}

void kvq_directory_close(kvq_directory *directory) {
    kvq_free((void *)directory->at);
    kvq_free(directory->by_name);
    *directory = (kvq_directory){NULL, NULL, 0};
}

static int compare_strings(const uint8_t *a, uint64_t a_length, const uint8_t *b,
                           uint64_t b_length) {
    const int order = memcmp(a, b, (size_t)(a_length < b_length ? a_length : b_length));
    return order ? order : (a_length > b_length) - (a_length < b_length);
}

typedef int compare_fn(const uint8_t *entry_a, const uint8_t *entry_b);

static int compare_names(const uint8_t *a, const uint8_t *b) {
    return compare_strings(a + 8, kvq_load_u64(a), b + 8, kvq_load_u64(b));
}

/* Heapsort: no input makes it slow, and unlike the qsort of some C libraries it takes no memory. */
static void sift_down(uint32_t *index, size_t root, size_t n, const uint8_t **at,
                      compare_fn *compare) {
    const uint32_t moved = index[root];
    for (size_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && compare(at[index[child]], at[index[child + 1]]) < 0) child++;
        if (compare(at[moved], at[index[child]]) >= 0) break;
        index[root] = index[child];
    }
    index[root] = moved;
}

/* index[n] = first, first + 1, ... in ascending order of the entries. */
static void sort_indices(uint32_t *index, uint32_t first, uint32_t n, const uint8_t **at,
                         compare_fn *compare) {
    for (uint32_t i = 0; i < n; i++) index[i] = first + i;
    for (size_t root = n / 2; root-- > 0;) sift_down(index, root, n, at, compare);
    for (size_t last = n; last-- > 1;) {
        const uint32_t largest = index[0];
        index[0] = index[last];
        index[last] = largest;
        sift_down(index, 0, last, at, compare);
    }
}

kvq_status kvq_directory_sort(kvq_directory *directory, const char *label, const char *what) {
    const uint8_t **const at = directory->at;
    const uint32_t *const by_name = directory->by_name;
    sort_indices(directory->by_name, 0, directory->count, at, compare_names);
    for (uint32_t i = 1; i < directory->count; i++) {
        const uint8_t *const entry = at[by_name[i]];
        if (compare_names(at[by_name[i - 1]], entry) == 0) {
            return kvq_fail(KVQ_ERR_FORMAT, "%s: %s %s appears twice, expected once", label, what,
                            show_name(entry).text);
        }
    }
    return KVQ_OK;
}

bool kvq_directory_find(const kvq_directory *directory, const char *name, uint32_t *index) {
    const size_t length = strlen(name);
    for (uint32_t low = 0, high = directory->count; low < high;) {
        const uint32_t middle = low + (high - low) / 2;
        const uint8_t *const entry = directory->at[directory->by_name[middle]];
        const int order =
            compare_strings((const uint8_t *)name, length, entry + 8, kvq_load_u64(entry));
        if (order == 0) {
            *index = directory->by_name[middle];
            return true;
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return false;
}

/* ---- reading with bounds ----------------------------------------------------------------- */

/* Where a walk over entries stands; `what`, `index` and `count` serve the error sentences. */
typedef struct reader {
    kvq_gguf_part *part;
    const uint8_t *at, *end;
    const char *what;
    uint32_t index, count;
} reader;

/* The next `bytes` bytes, or NULL if the file ends before. */
static const uint8_t *take(reader *r, uint64_t bytes) {
    if (bytes > (uint64_t)(r->end - r->at)) return NULL;
    const uint8_t *const p = r->at;
    r->at += bytes;
    return p;
}

static kvq_status fail_short(const reader *r) {
    r->part->ended = true;
    return kvq_fail(KVQ_ERR_FORMAT, "%s: %s %u of %u runs past the end of the file (%zu bytes)",
                    r->part->label, r->what, r->index + 1, r->count, r->part->size);
}

/* Takes the string that names an entry. Only printable ASCII is let through: the specification
 * demands ASCII of keys, and names go to terminals and into C strings. */
static kvq_status read_name(reader *r, uint64_t bytes_max) {
    const uint8_t *const field = take(r, 8);
    if (!field) return fail_short(r);
    const uint64_t length = kvq_load_u64(field);
    if (length == 0 || length > bytes_max) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: the name of %s %u of %u is %" PRIu64
                        " bytes long, expected 1 to %" PRIu64,
                        r->part->label, r->what, r->index + 1, r->count, length, bytes_max);
    }
    const uint8_t *const bytes = take(r, length);
    if (!bytes) return fail_short(r);
    for (uint64_t i = 0; i < length; i++) {
        if (bytes[i] < 0x20 || bytes[i] > 0x7e) {
            return kvq_fail(KVQ_ERR_FORMAT,
                            "%s: the name of %s %u of %u (%s) holds byte 0x%02x, "
                            "expected printable ASCII",
                            r->part->label, r->what, r->index + 1, r->count,
                            kvq_show(bytes, (size_t)length).text, bytes[i]);
        }
    }
    return KVQ_OK;
}

/* ---- header and metadata ----------------------------------------------------------------- */

static kvq_status check_version(const char *label, uint32_t version) {
    if (version == 2 || version == 3) return KVQ_OK;
    if (version != 0 && (version & 0xffffu) == 0) { /* a small number with its bytes swapped */
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "%s: the file is big-endian, expected a little-endian GGUF file", label);
    }
    return kvq_fail(KVQ_ERR_UNSUPPORTED, "%s: GGUF version %u is not supported, expected 2 or 3",
                    label, version);
}

static uint64_t at_most(uint64_t n, uint64_t limit) { return n < limit ? n : limit; }

/* Both counts are checked together, so that all directories together stay smaller than the file. */
static kvq_status check_counts(kvq_gguf_part *part, uint64_t n_metadata, uint64_t n_tensors) {
    const uint64_t bytes = part->size - HEADER_BYTES;
    const uint64_t most_metadata = at_most(bytes / METADATA_BYTES_MIN, ENTRIES_MAX);
    part->ended = n_metadata <= ENTRIES_MAX && n_tensors <= ENTRIES_MAX;
    if (n_metadata > most_metadata) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: the header counts %" PRIu64
                        " metadata entries, expected at most the %" PRIu64 " that %" PRIu64
                        " bytes can hold",
                        part->label, n_metadata, most_metadata, bytes);
    }
    const uint64_t bytes_left = bytes - n_metadata * METADATA_BYTES_MIN;
    const uint64_t most_tensors = at_most(bytes_left / TENSOR_BYTES_MIN, ENTRIES_MAX);
    if (n_tensors > most_tensors) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: the header counts %" PRIu64 " tensors, expected at most the %" PRIu64
                        " that %" PRIu64 " bytes can hold",
                        part->label, n_tensors, most_tensors, bytes);
    }
    part->ended = false;
    return KVQ_OK;
}

/* Bytes of a value of each kvq_meta_type; of a string, at least. */
static const uint8_t value_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};

/* Takes `count` values of `type`, which is not an array, for the metadata entry at `entry`. */
static kvq_status read_values(reader *r, const uint8_t *entry, uint32_t type, uint64_t count) {
    if (count > (uint64_t)(r->end - r->at) / value_bytes[type]) return fail_short(r);
    if (type == KVQ_META_STRING) {
        for (uint64_t i = 0; i < count; i++) {
            const uint8_t *const length = take(r, 8);
            if (!length || !take(r, kvq_load_u64(length))) return fail_short(r);
        }
        return KVQ_OK;
    }
    const uint8_t *const values = take(r, count * value_bytes[type]);
    for (uint64_t i = 0; type == KVQ_META_BOOL && i < count; i++) {
        if (values[i] > 1) {
            return kvq_fail(KVQ_ERR_FORMAT,
                            "%s: metadata key %s holds a bool of %u, expected 0 or 1",
                            r->part->label, show_name(entry).text, values[i]);
        }
    }
    return KVQ_OK;
}

static kvq_status read_meta(reader *r) {
    const uint8_t *const entry = r->at;
    const kvq_status status = read_name(r, KEY_BYTES_MAX);
    if (status != KVQ_OK) return status;
    const uint8_t *field = take(r, 4);
    if (!field) return fail_short(r);
    uint32_t type = kvq_load_u32(field);
    uint64_t count = 1;
    const bool is_array = type == KVQ_META_ARRAY;
    if (is_array) {
        field = take(r, 12);
        if (!field) return fail_short(r);
        type = kvq_load_u32(field);
        count = kvq_load_u64(field + 4);
        if (type == KVQ_META_ARRAY) {
            return kvq_fail(KVQ_ERR_UNSUPPORTED,
                            "%s: metadata key %s is an array of arrays, expected plain elements",
                            r->part->label, show_name(entry).text);
        }
    }
    if (type >= sizeof value_bytes) {
        return kvq_fail(KVQ_ERR_FORMAT, "%s: metadata key %s has %s type %u, expected 0 to %zu",
                        r->part->label, show_name(entry).text, is_array ? "element" : "value", type,
                        sizeof value_bytes - 1);
    }
    return read_values(r, entry, type, count);
}

kvq_status kvq_gguf_part_read_metadata(kvq_gguf_part *part) {
    const uint8_t *const header = part->bytes;
    if (part->size >= 4 && memcmp(header, "GGUF", 4) != 0) {
        return kvq_fail(KVQ_ERR_FORMAT, "%s: begins with \"%s\", expected \"GGUF\"", part->label,
                        kvq_show(header, 4).text);
    }
    if (part->size < HEADER_BYTES) {
        part->ended = true;
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: is %zu bytes long, expected at least the %d of a header", part->label,
                        part->size, (int)HEADER_BYTES);
    }
    kvq_status status = check_version(part->label, kvq_load_u32(header + 4));
    if (status != KVQ_OK) return status;
    const uint64_t n_tensors = kvq_load_u64(header + 8), n_metadata = kvq_load_u64(header + 16);
    if ((status = check_counts(part, n_metadata, n_tensors)) != KVQ_OK) return status;
    part->n_tensors = (uint32_t)n_tensors;
    status = kvq_directory_open(&part->metadata, (uint32_t)n_metadata);
    if (status != KVQ_OK) return status;

    reader r = {.part = part,
                .at = header + HEADER_BYTES,
                .end = header + part->size,
                .what = "metadata entry",
                .count = (uint32_t)n_metadata};
    for (; r.index < r.count; r.index++) {
        part->metadata.at[r.index] = r.at;
        if ((status = read_meta(&r)) != KVQ_OK) return status;
    }
    part->metadata.at[r.count] = r.at;
    return kvq_directory_sort(&part->metadata, part->label, "metadata key");
}

void kvq_gguf_part_meta(const kvq_gguf_part *part, uint32_t index, kvq_meta *out) {
    const uint8_t *p = part->metadata.at[index];
    *out = (kvq_meta){.key = (const char *)p + 8, .key_length = kvq_load_u64(p), .count = 1};
    p += 8 + out->key_length;
    out->type = (int32_t)kvq_load_u32(p);
    p += 4;
    if (out->type == KVQ_META_ARRAY) {
        out->is_array = 1;
        out->type = (int32_t)kvq_load_u32(p);
        out->count = kvq_load_u64(p + 4);
        p += 12;
    }
    out->data = p;
    /* Up to the next entry, or the end of the last: without a walk over an array's strings. */
    out->bytes = (uint64_t)(part->metadata.at[index + 1] - p);
}

/* ---- tensors ----------------------------------------------------------------------------- */

/* The fields of an entry that lies in the file and has 1 to 4 dimensions; returns the offset. */
static uint64_t tensor_fields(const uint8_t *at, kvq_gguf_tensor *out) {
    *out = (kvq_gguf_tensor){.name = (const char *)at + 8,
                             .name_length = (uint32_t)kvq_load_u64(at),
                             .shape = {1, 1, 1, 1}};
    at += 8 + out->name_length;
    out->n_dims = kvq_load_u32(at);
    at += 4;
    for (uint32_t d = 0; d < out->n_dims; d++, at += 8) out->shape[d] = kvq_load_u64(at);
    out->type = kvq_load_u32(at);
    return kvq_load_u64(at + 4);
}

static uint64_t tensor_offset(const uint8_t *at) {
    kvq_gguf_tensor t;
    return tensor_fields(at, &t);
}

static int compare_offsets(const uint8_t *a, const uint8_t *b) {
    const uint64_t offset_a = tensor_offset(a), offset_b = tensor_offset(b);
    return (offset_a > offset_b) - (offset_a < offset_b);
}

/* Bytes of data that type and shape ask for; false if they overflow. The type is known, shape[0] a
 * multiple of its block. */
static bool tensor_bytes(const kvq_gguf_tensor *t, size_t *out) {
    const char *type_name;
    uint32_t block = 1, block_bytes = 0;
    kvq_ggml_type_size(t->type, &type_name, &block, &block_bytes);
    if (t->shape[0] / block > SIZE_MAX) return false;
    size_t bytes = (size_t)(t->shape[0] / block);
    for (uint32_t d = 1; d < 4; d++) {
        const uint64_t n = t->shape[d];
        if (n > SIZE_MAX || !kvq_size_mul(&bytes, bytes, (size_t)n)) return false;
    }
    return kvq_size_mul(out, bytes, block_bytes);
}

/* What can be said of an entry before the beginning of the data is known. */
static kvq_status check_entry(const char *label, const uint8_t *entry) {
    kvq_gguf_tensor t;
    const char *type_name;
    uint32_t block, block_bytes;
    tensor_fields(entry, &t);
    if (!kvq_ggml_type_size(t.type, &type_name, &block, &block_bytes)) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "%s: tensor %s: type id %u is unknown, expected one of ggml's types", label,
                        show_name(entry).text, t.type);
    }
    for (uint32_t d = 0; d < t.n_dims; d++) {
        if (t.shape[d] == 0) {
            return kvq_fail(KVQ_ERR_FORMAT, "%s: tensor %s: dimension %u is 0, expected at least 1",
                            label, show_name(entry).text, d);
        }
    }
    if (t.shape[0] % block != 0) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: tensor %s: rows have %" PRIu64
                        " elements, expected a multiple of the %u in a block of %s",
                        label, show_name(entry).text, t.shape[0], block, type_name);
    }
    return KVQ_OK;
}

static kvq_status read_tensor(reader *r) {
    const uint8_t *const entry = r->at;
    const kvq_status status = read_name(r, NAME_BYTES_MAX);
    if (status != KVQ_OK) return status;
    const uint8_t *const field = take(r, 4);
    if (!field) return fail_short(r);
    const uint32_t n_dims = kvq_load_u32(field);
    if (n_dims < 1 || n_dims > 4) {
        return kvq_fail(KVQ_ERR_FORMAT, "%s: tensor %s has %u dimensions, expected 1 to 4",
                        r->part->label, show_name(entry).text, n_dims);
    }
    if (!take(r, 8 * (uint64_t)n_dims + 12)) return fail_short(r);
    return check_entry(r->part->label, entry);
}

/* The data of a tensor must lie on the alignment and, unless the file may be cut, inside of it. */
static kvq_status check_extent(kvq_gguf_part *part, const uint8_t *at, uint32_t alignment) {
    kvq_gguf_tensor t;
    const uint64_t offset = tensor_fields(at, &t);
    size_t bytes;
    if (offset % alignment != 0) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: tensor %s: offset %" PRIu64
                        ", expected a multiple of the alignment %u",
                        part->label, show_name(at).text, offset, alignment);
    }
    if (!tensor_bytes(&t, &bytes)) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: tensor %s: shape %" PRIu64 "x%" PRIu64 "x%" PRIu64 "x%" PRIu64
                        " overflows, expected data that fit the file",
                        part->label, show_name(at).text, t.shape[0], t.shape[1], t.shape[2],
                        t.shape[3]);
    }
    const bool inside = offset <= part->data_bytes && bytes <= part->data_bytes - offset;
    if (!inside && !part->may_be_cut) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: tensor %s: %zu bytes at offset %" PRIu64 " of the data, "
                        "expected them inside of the %zu bytes that the file has there",
                        part->label, show_name(at).text, bytes, offset, part->data_bytes);
    }
    if (!inside && (offset > EXTENT_MAX || bytes > EXTENT_MAX)) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: tensor %s: %zu bytes at offset %" PRIu64
                        " of the data, expected at most %zu of either",
                        part->label, show_name(at).text, bytes, offset, EXTENT_MAX);
    }
    if (!inside) part->is_cut = true;
    return KVQ_OK;
}

/* Refusing tensors that share bytes keeps the sum of all tensors below the size of the file, or at
 * most at 2 * EXTENT_MAX where it is cut, on which callers may then rely. `by_offset` is room for
 * part->n_tensors indices. */
static kvq_status check_overlaps(const kvq_gguf_part *part, const uint8_t **at,
                                 uint32_t *by_offset) {
    sort_indices(by_offset, part->first_tensor, part->n_tensors, at, compare_offsets);
    for (uint32_t i = 1; i < part->n_tensors; i++) {
        const uint8_t *const before = at[by_offset[i - 1]], *const after = at[by_offset[i]];
        kvq_gguf_tensor t;
        const uint64_t offset = tensor_fields(before, &t);
        size_t bytes = 0;
        tensor_bytes(&t, &bytes);
        if (offset + bytes > tensor_offset(after)) {
            return kvq_fail(KVQ_ERR_FORMAT,
                            "%s: tensors %s and %s overlap, expected data of their own",
                            part->label, show_name(before).text, show_name(after).text);
        }
    }
    return KVQ_OK;
}

kvq_status kvq_gguf_part_read_tensors(kvq_gguf_part *part, uint32_t alignment, kvq_directory *all) {
    const uint8_t **const at = all->at + part->first_tensor;
    reader r = {.part = part,
                .at = part->metadata.at[part->metadata.count],
                .end = part->bytes + part->size,
                .what = "tensor entry",
                .count = part->n_tensors};
    kvq_status status;
    for (; r.index < r.count; r.index++) {
        at[r.index] = r.at;
        if ((status = read_tensor(&r)) != KVQ_OK) return status;
    }

    /* No overflow: an object in memory ends well below SIZE_MAX. A file without tensors may end
     * before the data would begin. */
    part->header_bytes = (size_t)(r.at - part->bytes);
    const size_t begin = kvq_round_up(part->header_bytes, alignment);
    part->data_bytes = begin < part->size ? part->size - begin : 0;
    part->data = part->bytes + (part->data_bytes ? begin : part->size);
    for (uint32_t i = 0; i < part->n_tensors; i++) {
        if ((status = check_extent(part, at[i], alignment)) != KVQ_OK) return status;
    }
    return check_overlaps(part, all->at, all->by_name + part->first_tensor);
}

void kvq_gguf_part_tensor(const kvq_gguf_part *part, const uint8_t *at, kvq_gguf_tensor *out) {
    const uint64_t offset = tensor_fields(at, out);
    size_t bytes = 0;
    tensor_bytes(out, &bytes);
    out->data = part->is_cut ? part->bytes : part->data + offset;
    out->bytes = bytes;
}
