/* gguf.c: see gguf.h. Here: files and their parts, look-up, typed access. The bytes are read in
 * gguf_part.c. */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "gguf_part.h"

enum {
    ALIGNMENT_DEFAULT = 32,
    ALIGNMENT_MIN = 8,
    ALIGNMENT_MAX = 65536,
    PARTS_MAX = 1024,
    SUFFIX_BYTES = 20 /* "-00001-of-00003.gguf" */
};

struct kvq_gguf {
    bool may_be_cut;
    uint32_t n_parts;
    kvq_gguf_part *parts;  /* [n_parts]; metadata are those of the first */
    kvq_directory tensors; /* of all parts, part after part */
};

/* ---- metadata by key --------------------------------------------------------------------- */

static const char *type_name(int32_t type) {
    static const char *const names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                        "bool", "string", "array", "u64", "i64", "f64"};
    return names[type]; /* the type was checked when the file was opened */
}

static bool find_meta(const kvq_gguf_part *part, const char *key, kvq_meta *out) {
    uint32_t index;
    if (!kvq_directory_find(&part->metadata, key, &index)) return false;
    kvq_gguf_part_meta(part, index, out);
    return true;
}

/* Says what was found in place of what a getter expected. */
static kvq_status fail_value(const kvq_gguf_part *part, const char *key, const kvq_meta *meta,
                             const char *expected) {
    if (meta->is_array) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: metadata key %s is an array of %" PRIu64 " %s values, expected %s",
                        part->label, key, meta->count, type_name(meta->type), expected);
    }
    return kvq_fail(KVQ_ERR_FORMAT, "%s: metadata key %s is of type %s, expected %s", part->label,
                    key, type_name(meta->type), expected);
}

/* Turns an array of equal elements into a single value; leaves any other array as it is. */
static void reduce_array(kvq_meta *meta) {
    if (!meta->is_array || meta->count == 0 || meta->type == KVQ_META_STRING) return;
    const size_t bytes = (size_t)meta->bytes, one = (size_t)(meta->bytes / meta->count);
    if (memcmp(meta->data, meta->data + one, bytes - one) != 0) return; /* each equals the next */
    meta->is_array = 0;
    meta->count = 1;
    meta->bytes = one;
}

/* An integer of any of the file's types; false for a value that is none. Of a negative one only
 * that it is negative is told: no getter takes it. */
static bool load_integer(const kvq_meta *meta, uint64_t *value, bool *negative) {
    const int32_t type = meta->type;
    const bool is_integer = type <= KVQ_META_I32 || type == KVQ_META_U64 || type == KVQ_META_I64;
    if (meta->is_array || !is_integer) return false;
    const bool is_signed =
        type % 2 == 1; /* the specification numbers U8, I8, U16, I16 ... U64, I64 */
    *value = 0;
    memcpy(value, meta->data, (size_t)meta->bytes); /* little-endian */
    *negative = is_signed && (meta->data[meta->bytes - 1] & 0x80u) != 0;
    return true;
}

static kvq_status get_u32(const kvq_gguf_part *part, const char *key, uint32_t *out) {
    static const char expected[] = "an integer from 0 to 4294967295";
    kvq_meta meta;
    uint64_t value;
    bool negative;
    if (!find_meta(part, key, &meta)) return KVQ_OK;
    reduce_array(&meta);
    if (!load_integer(&meta, &value, &negative)) return fail_value(part, key, &meta, expected);
    if (negative) {
        return kvq_fail(KVQ_ERR_FORMAT, "%s: metadata key %s is negative, expected %s", part->label,
                        key, expected);
    }
    if (value > UINT32_MAX) {
        return kvq_fail(KVQ_ERR_FORMAT, "%s: metadata key %s is %" PRIu64 ", expected %s",
                        part->label, key, value, expected);
    }
    *out = (uint32_t)value;
    return KVQ_OK;
}

/* ---- opening ----------------------------------------------------------------------------- */

static void set_label(kvq_gguf_part *part, const char *path) {
    const size_t length = strlen(path), room = sizeof part->label - sizeof "...";
    const char *tail = path;
    if (length > room) {
        tail += length - room;
        /* Not from inside of a UTF-8 character on. */
        while (((unsigned char)*tail & 0xc0u) == 0x80u) tail++;
    }
    snprintf(part->label, sizeof part->label, "%s%s", length > room ? "..." : "", tail);
}

static kvq_status map_part(kvq_gguf_part *part, const char *path, bool may_be_cut) {
    set_label(part, path);
    part->may_be_cut = may_be_cut;
    const kvq_status status = kvq_map_open(&part->map, path, part->label);
    if (status != KVQ_OK) return status;
    part->bytes = part->map.data;
    part->size = part->map.bytes;
    return kvq_gguf_part_read_metadata(part);
}

static kvq_status get_alignment(const kvq_gguf_part *part, uint32_t *out) {
    uint32_t alignment = ALIGNMENT_DEFAULT;
    const kvq_status status = get_u32(part, "general.alignment", &alignment);
    if (status != KVQ_OK) return status;
    const bool power_of_two = (alignment & (alignment - 1)) == 0;
    if (!power_of_two || alignment < ALIGNMENT_MIN || alignment > ALIGNMENT_MAX) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: metadata key general.alignment is %u, "
                        "expected a power of two from %d to %d",
                        part->label, alignment, (int)ALIGNMENT_MIN, (int)ALIGNMENT_MAX);
    }
    *out = alignment;
    return KVQ_OK;
}

/* Reads the tensors of all parts, whose metadata are read, into one directory. */
static kvq_status read_tensors(kvq_gguf *file) {
    uint32_t total = 0;
    for (uint32_t i = 0; i < file->n_parts; i++) {
        if (file->parts[i].n_tensors > INT32_MAX - total) {
            return kvq_fail(KVQ_ERR_UNSUPPORTED, "%s: its parts hold more than %d tensors",
                            file->parts[0].label, INT32_MAX);
        }
        file->parts[i].first_tensor = total;
        total += file->parts[i].n_tensors;
    }
    kvq_status status = kvq_directory_open(&file->tensors, total);
    for (uint32_t i = 0; i < file->n_parts && status == KVQ_OK; i++) {
        uint32_t alignment = 0;
        status = get_alignment(&file->parts[i], &alignment);
        if (status == KVQ_OK) {
            status = kvq_gguf_part_read_tensors(&file->parts[i], alignment, &file->tensors);
        }
    }
    if (status != KVQ_OK) return status;
    return kvq_directory_sort(&file->tensors, file->parts[0].label, "tensor");
}

/* ---- split files ------------------------------------------------------------------------- */

/* What a part says of the whole. A file that is not split says nothing, or a count of 0 or 1. */
typedef struct split {
    uint32_t count, number, n_tensors; /* number counts from 0, file names from 1 */
} split;

static kvq_status get_split(const kvq_gguf_part *part, split *out) {
    kvq_meta meta;
    *out = (split){0, 0, 0};
    kvq_status status = get_u32(part, "split.count", &out->count);
    if (status != KVQ_OK || out->count <= 1) return status;
    static const char *const keys[] = {"split.no", "split.tensors.count"};
    uint32_t *const values[] = {&out->number, &out->n_tensors};
    for (size_t i = 0; i < 2; i++) {
        if (!find_meta(part, keys[i], &meta)) {
            return kvq_fail(KVQ_ERR_FORMAT,
                            "%s: metadata key %s is absent, expected it where split.count is %u",
                            part->label, keys[i], out->count);
        }
        if ((status = get_u32(part, keys[i], values[i])) != KVQ_OK) return status;
    }
    if (out->count > PARTS_MAX) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "%s: metadata key split.count is %u, expected at most %d", part->label,
                        out->count, (int)PARTS_MAX);
    }
    if (out->number >= out->count) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: metadata key split.no is %u, expected less than split.count, %u",
                        part->label, out->number, out->count);
    }
    return KVQ_OK;
}

/* The end of the file name of part `number` of `count`, both at most PARTS_MAX. */
static void format_suffix(char out[SUFFIX_BYTES + 1], uint16_t number, uint16_t count) {
    snprintf(out, SUFFIX_BYTES + 1, "-%05d-of-%05d.gguf", number + 1, count);
}

/* Opens parts 2 to the last of the split `whole`. `path` is that of the first, ends in its suffix,
 * and is overwritten with those of the others. */
static kvq_status open_other_parts(kvq_gguf *file, char *path, const split *whole) {
    kvq_gguf_part *const parts = kvq_alloc(whole->count * sizeof *parts);
    if (!parts) return kvq_fail(KVQ_ERR_MEMORY, "no memory for %u file parts", whole->count);
    parts[0] = file->parts[0];
    kvq_free(file->parts);
    file->parts = parts;
    file->n_parts = whole->count;

    uint64_t n_tensors = parts[0].n_tensors;
    for (uint32_t i = 1; i < whole->count; i++) {
        split part;
        format_suffix(path + strlen(path) - SUFFIX_BYTES, i, whole->count);
        kvq_status status = map_part(&parts[i], path, file->may_be_cut);
        if (status != KVQ_OK || (status = get_split(&parts[i], &part)) != KVQ_OK) return status;
        if (part.count != whole->count || part.number != i || part.n_tensors != whole->n_tensors) {
            return kvq_fail(KVQ_ERR_FORMAT,
                            "%s: says that it is part %u of %u with %u "
                            "tensors in all, expected part %u of %u with %u",
                            parts[i].label, part.number + 1, part.count, part.n_tensors, i + 1,
                            whole->count, whole->n_tensors);
        }
        n_tensors += parts[i].n_tensors;
    }
    if (n_tensors != whole->n_tensors) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: the %u parts hold %" PRIu64 " tensors, "
                        "expected the %u of split.tensors.count",
                        parts[0].label, whole->count, n_tensors, whole->n_tensors);
    }
    return KVQ_OK;
}

/* Opens the other parts if the only one so far is the first of several. `path` (NULL: there is
 * none) is overwritten. */
static kvq_status open_split(kvq_gguf *file, char *path) {
    const kvq_gguf_part *const part = &file->parts[0];
    split whole;
    const kvq_status status = get_split(part, &whole);
    if (status != KVQ_OK || whole.count <= 1) return status;
    if (!path) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "%s: is part %u of %u of a split file, expected a whole one", part->label,
                        whole.number + 1, whole.count);
    }
    char suffix[SUFFIX_BYTES + 1];
    format_suffix(suffix, whole.number, whole.count);
    const size_t length = strlen(path);
    if (length < SUFFIX_BYTES || strcmp(path + length - SUFFIX_BYTES, suffix) != 0) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "%s: says that it is part %u of %u, "
                        "expected a file name that ends in %s, by which to find the others",
                        part->label, whole.number + 1, whole.count, suffix);
    }
    if (whole.number != 0) {
        kvq_gguf_part first;
        format_suffix(path + length - SUFFIX_BYTES, 0, whole.count);
        set_label(&first, path);
        return kvq_fail(KVQ_ERR_ARGUMENT, "%s: is part %u of %u, expected the first: %s",
                        part->label, whole.number + 1, whole.count, first.label);
    }
    return open_other_parts(file, path, &whole);
}

/* ---- open and close ---------------------------------------------------------------------- */

static kvq_gguf *new_file(void) {
    kvq_gguf *const file = kvq_alloc(sizeof *file);
    if (!file) return NULL;
    file->parts = kvq_alloc(sizeof *file->parts);
    if (!file->parts) {
        kvq_free(file);
        return NULL;
    }
    file->n_parts = 1;
    return file;
}

void kvq_gguf_close(kvq_gguf *file) {
    if (!file) return;
    for (uint32_t i = 0; i < file->n_parts; i++) {
        kvq_directory_close(&file->parts[i].metadata);
        kvq_map_close(&file->parts[i].map);
    }
    kvq_directory_close(&file->tensors);
    kvq_free(file->parts);
    kvq_free(file);
}

static kvq_status finish_open(kvq_gguf **out, kvq_gguf *file, kvq_status status) {
    if (status == KVQ_OK) {
        *out = file;
    } else {
        kvq_gguf_close(file);
    }
    return status;
}

static kvq_status open_path(kvq_gguf **out, const char *path, bool may_be_cut) {
    *out = NULL;
    const size_t path_size = strlen(path) + 1;
    kvq_gguf *const file = new_file();
    char *const part_path = kvq_alloc(path_size);
    kvq_status status = KVQ_OK;
    if (!file || !part_path) {
        status = kvq_fail(KVQ_ERR_MEMORY, "no memory to open a file");
    } else {
        memcpy(part_path, path, path_size);
        file->may_be_cut = may_be_cut;
        status = map_part(&file->parts[0], path, may_be_cut);
        if (status == KVQ_OK) status = open_split(file, part_path);
        if (status == KVQ_OK) status = read_tensors(file);
    }
    kvq_free(part_path);
    return finish_open(out, file, status);
}

kvq_status kvq_gguf_open(kvq_gguf **out, const char *path) { return open_path(out, path, false); }

kvq_status kvq_gguf_open_header(kvq_gguf **out, const char *path) {
    return open_path(out, path, true);
}

bool kvq_gguf_is_cut(const kvq_gguf *file) {
    bool cut = false;
    for (uint32_t i = 0; i < file->n_parts; i++) cut = cut || file->parts[i].is_cut;
    return cut;
}

kvq_status kvq_header_measure(const char *label, const uint8_t *data, uint64_t n, uint64_t *bytes) {
    kvq_gguf_part part = {.bytes = data, .size = (size_t)n, .may_be_cut = true};
    kvq_directory tensors = {NULL, NULL, 0};
    uint32_t alignment = 0;
    set_label(&part, label);
    kvq_status status = kvq_gguf_part_read_metadata(&part);
    if (status == KVQ_OK) status = get_alignment(&part, &alignment);
    if (status == KVQ_OK) status = kvq_directory_open(&tensors, part.n_tensors);
    if (status == KVQ_OK) status = kvq_gguf_part_read_tensors(&part, alignment, &tensors);
    *bytes = status == KVQ_OK ? part.header_bytes : 0;
    kvq_directory_close(&tensors);
    kvq_directory_close(&part.metadata);
    return part.ended ? KVQ_OK : status;
}

kvq_status kvq_gguf_open_memory(kvq_gguf **out, const uint8_t *data, size_t bytes) {
    *out = NULL;
    kvq_gguf *const file = new_file();
    if (!file) return kvq_fail(KVQ_ERR_MEMORY, "no memory to open a file");
    kvq_gguf_part *const part = &file->parts[0];
    set_label(part, "(memory)");
    part->bytes = data;
    part->size = bytes;
    kvq_status status = kvq_gguf_part_read_metadata(part);
    if (status == KVQ_OK) status = open_split(file, NULL);
    if (status == KVQ_OK) status = read_tensors(file);
    return finish_open(out, file, status);
}

/* ---- contents ---------------------------------------------------------------------------- */

uint64_t kvq_gguf_meta_count(const kvq_gguf *file) { return file->parts[0].metadata.count; }

void kvq_gguf_meta(const kvq_gguf *file, uint64_t index, kvq_meta *out) {
    kvq_gguf_part_meta(&file->parts[0], (uint32_t)index, out);
}

bool kvq_gguf_find(const kvq_gguf *file, const char *key, kvq_meta *out) {
    return find_meta(&file->parts[0], key, out);
}

uint64_t kvq_gguf_tensor_count(const kvq_gguf *file) { return file->tensors.count; }

void kvq_gguf_tensor_at(const kvq_gguf *file, uint64_t index, kvq_gguf_tensor *out) {
    uint32_t low = 0; /* the last part whose first tensor is not after `index` */
    for (uint32_t high = file->n_parts; high - low > 1;) {
        const uint32_t middle = low + (high - low) / 2;
        *(file->parts[middle].first_tensor <= index ? &low : &high) = middle;
    }
    kvq_gguf_part_tensor(&file->parts[low], file->tensors.at[index], out);
}

bool kvq_gguf_find_tensor(const kvq_gguf *file, const char *name, kvq_gguf_tensor *out) {
    uint32_t index;
    if (!kvq_directory_find(&file->tensors, name, &index)) return false;
    kvq_gguf_tensor_at(file, index, out);
    return true;
}

kvq_status kvq_gguf_get_u32(const kvq_gguf *file, const char *key, uint32_t *out) {
    return get_u32(&file->parts[0], key, out);
}

kvq_status kvq_gguf_get_f32(const kvq_gguf *file, const char *key, float *out) {
    const kvq_gguf_part *const part = &file->parts[0];
    kvq_meta meta;
    if (!find_meta(part, key, &meta)) return KVQ_OK;
    reduce_array(&meta);
    if (!meta.is_array && meta.type == KVQ_META_F32) {
        memcpy(out, meta.data, sizeof *out);
        return KVQ_OK;
    }
    if (meta.is_array || meta.type != KVQ_META_F64) {
        return fail_value(part, key, &meta, "an f32 or f64");
    }
    double value;
    memcpy(&value, meta.data, sizeof value);
    if (isfinite(value) && fabs(value) > FLT_MAX) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "%s: metadata key %s is %g, expected a number that fits an f32",
                        part->label, key, value);
    }
    *out = (float)value;
    return KVQ_OK;
}

kvq_status kvq_gguf_get_bool(const kvq_gguf *file, const char *key, bool *out) {
    const kvq_gguf_part *const part = &file->parts[0];
    kvq_meta meta;
    if (!find_meta(part, key, &meta)) return KVQ_OK;
    reduce_array(&meta);
    if (meta.is_array || meta.type != KVQ_META_BOOL) return fail_value(part, key, &meta, "a bool");
    *out = meta.data[0] != 0;
    return KVQ_OK;
}

kvq_status kvq_gguf_get_string(const kvq_gguf *file, const char *key, const char **out,
                               size_t *length) {
    const kvq_gguf_part *const part = &file->parts[0];
    kvq_meta meta;
    if (!find_meta(part, key, &meta)) return KVQ_OK;
    if (meta.is_array || meta.type != KVQ_META_STRING) {
        return fail_value(part, key, &meta, "a string");
    }
    *out = (const char *)meta.data + 8;
    *length = (size_t)meta.bytes - 8;
    return KVQ_OK;
}

const char *kvq_gguf_label(const kvq_gguf *file) { return file->parts[0].label; }
