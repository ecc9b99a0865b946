/* test_gguf.c: the GGUF reader, on files that are built here byte by byte. */
#include <inttypes.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gguf.h"
#include "test.h"

/* ---- building files ---------------------------------------------------------------------- */

typedef struct image {
    size_t n;
    uint8_t bytes[1 << 17];
} image;

static image image_a, image_b; /* too large for some stacks */

static void put(image *f, const void *bytes, size_t n) {
    memcpy(f->bytes + f->n, bytes, n);
    f->n += n;
}
static void put_u32(image *f, uint32_t v) { put(f, &v, 4); }
static void put_u64(image *f, uint64_t v) { put(f, &v, 8); }
static void put_string(image *f, const char *s) {
    put_u64(f, strlen(s));
    put(f, s, strlen(s));
}

static void put_header(image *f, uint32_t version, uint64_t n_tensors, uint64_t n_metadata) {
    f->n = 0;
    put(f, "GGUF", 4);
    put_u32(f, version);
    put_u64(f, n_tensors);
    put_u64(f, n_metadata);
}

static void put_meta(image *f, const char *key, uint32_t type, const void *value, size_t bytes) {
    put_string(f, key);
    put_u32(f, type);
    put(f, value, bytes);
}
static void put_meta_u32(image *f, const char *key, uint32_t value) {
    put_meta(f, key, KVQ_META_U32, &value, 4);
}
static void put_array(image *f, const char *key, uint32_t type, uint64_t count, const void *values,
                      size_t bytes) {
    put_string(f, key);
    put_u32(f, KVQ_META_ARRAY);
    put_u32(f, type);
    put_u64(f, count);
    put(f, values, bytes);
}

static void put_tensor(image *f, const char *name, uint32_t type, uint64_t n, uint64_t offset) {
    put_string(f, name);
    put_u32(f, 1);
    put_u64(f, n);
    put_u32(f, type);
    put_u64(f, offset);
}

/* Pads to the alignment 32 and appends `bytes` of data: 0, 1, 2, ... */
static void put_data(image *f, size_t bytes) {
    while (f->n % 32) f->bytes[f->n++] = 0;
    for (size_t i = 0; i < bytes; i++) f->bytes[f->n++] = (uint8_t)i;
}

/* The small valid file that most tests break. Where a field of it begins is kept for them. */
/* clang-format off */
enum field {
    MAGIC, VERSION, N_TENSORS, N_METADATA,
    KEY_LENGTH, KEY_BYTES, VALUE_TYPE, ALIGNMENT, BOOL, ARRAY_TYPE, ARRAY_COUNT, FLAGS,
    STRINGS_COUNT, STRING_LENGTH, KEY_TWO,
    NAME_LENGTH, NAME_BYTES, N_DIMS, DIM_0, DIM_1, TENSOR_TYPE, OFFSET,
    NAME_TWO, DIM_TWO, OFFSET_TWO,
    N_FIELDS
};
/* clang-format on */
static size_t field_at[N_FIELDS];

static const image *small_file(uint32_t version) {
    image *const f = &image_a;
    put_header(f, version, 2, 5);
    field_at[MAGIC] = 0;
    field_at[VERSION] = 4;
    field_at[N_TENSORS] = 8;
    field_at[N_METADATA] = 16;
    field_at[KEY_LENGTH] = f->n;
    field_at[KEY_BYTES] = f->n + 8;
    field_at[VALUE_TYPE] = f->n + 8 + strlen("general.alignment");
    put_meta_u32(f, "general.alignment", 32);
    field_at[ALIGNMENT] = f->n - 4;
    put_meta(f, "test.one", KVQ_META_BOOL, "\1", 1);
    field_at[BOOL] = f->n - 1;
    put_array(f, "test.flags", KVQ_META_BOOL, 3, "\0\1\1", 3);
    field_at[ARRAY_TYPE] = f->n - 15;
    field_at[ARRAY_COUNT] = f->n - 11;
    field_at[FLAGS] = f->n - 3;
    put_array(f, "test.strings", KVQ_META_STRING, 2, "", 0);
    field_at[STRINGS_COUNT] = f->n - 8;
    put_string(f, "one");
    field_at[STRING_LENGTH] = f->n;
    put_string(f, "three");
    field_at[KEY_TWO] = f->n + 8;
    put_meta(f, "test.two", KVQ_META_BOOL, "\0", 1);

    field_at[NAME_LENGTH] = f->n;
    field_at[NAME_BYTES] = f->n + 8;
    put_string(f, "blk.0.a");
    field_at[N_DIMS] = f->n;
    put_u32(f, 2);
    field_at[DIM_0] = f->n;
    put_u64(f, 4);
    field_at[DIM_1] = f->n;
    put_u64(f, 3);
    field_at[TENSOR_TYPE] = f->n;
    put_u32(f, 0); /* F32: 48 bytes */
    field_at[OFFSET] = f->n;
    put_u64(f, 0);
    field_at[NAME_TWO] = f->n + 8;
    put_tensor(f, "blk.0.b", 8, 32, 64); /* Q8_0: 34 bytes */
    field_at[DIM_TWO] = f->n - 20;
    field_at[OFFSET_TWO] = f->n - 8;
    put_data(f, 64 + 34);
    return f;
}

/* ---- opening ----------------------------------------------------------------------------- */

/* Opens a copy that has not a byte to spare, so that a sanitizer sees every read past its end. The
 * copy lives until the next call. */
static kvq_status open_image(kvq_gguf **out, const image *f, size_t n) {
    static uint8_t *copy;
    free(copy);
    copy = malloc(n ? n : 1);
    if (n) memcpy(copy, f->bytes, n);
    return kvq_gguf_open_memory(out, copy, n);
}

/* Reads all that the file offers; a sum keeps the reads from being optimized away. */
static unsigned touch_all(const kvq_gguf *file) {
    unsigned sum = 0;
    for (uint64_t i = 0; i < kvq_gguf_meta_count(file); i++) {
        kvq_meta meta;
        kvq_gguf_meta(file, i, &meta);
        for (uint64_t j = 0; j < meta.key_length; j++) sum += (unsigned char)meta.key[j];
        for (uint64_t j = 0; j < meta.bytes; j++) sum += meta.data[j];
    }
    for (uint64_t i = 0; i < kvq_gguf_tensor_count(file); i++) {
        kvq_gguf_tensor t;
        kvq_gguf_tensor_at(file, i, &t);
        for (uint64_t j = 0; j < t.name_length; j++) sum += (unsigned char)t.name[j];
        for (uint64_t j = 0; j < t.bytes; j++) sum += t.data[j];
    }
    return sum;
}

/* NULL if opening failed with `status` and a sentence that holds `fragment`. */
static const char *expect_failure(kvq_status found, const kvq_gguf *file, int status,
                                  const char *fragment) {
    if (found == KVQ_OK) return TEST_FAIL("opened, expected the error: %s", fragment);
    if (file) return TEST_FAIL("a file was given in spite of the error: %s", kvq_error());
    if ((int)found != status)
        return TEST_FAIL("status %d, expected %d: %s", found, status, kvq_error());
    if (!strstr(kvq_error(), fragment)) {
        return TEST_FAIL("\"%s\"\n       does not hold \"%s\"", kvq_error(), fragment);
    }
    return NULL;
}

/* ---- tests of one file ------------------------------------------------------------------- */

static const char *reads_both_versions(void) {
    for (uint32_t version = 2; version <= 3; version++) {
        const image *const f = small_file(version);
        kvq_gguf *file;
        if (open_image(&file, f, f->n) != KVQ_OK) return TEST_FAIL("v%u: %s", version, kvq_error());
        TEST_CHECK(kvq_gguf_meta_count(file) == 5 && kvq_gguf_tensor_count(file) == 2);
        kvq_gguf_tensor t;
        TEST_CHECK(kvq_gguf_find_tensor(file, "blk.0.a", &t));
        TEST_CHECK(t.type == 0 && t.n_dims == 2 && t.shape[0] == 4 && t.shape[1] == 3);
        TEST_CHECK(t.shape[2] == 1 && t.shape[3] == 1 && t.bytes == 48 && t.data[47] == 47);
        TEST_CHECK(kvq_gguf_find_tensor(file, "blk.0.b", &t));
        TEST_CHECK(t.type == 8 && t.n_dims == 1 && t.bytes == 34 && t.data[0] == 64);
        TEST_CHECK(t.name_length == 7 && memcmp(t.name, "blk.0.b", 7) == 0);
        TEST_CHECK(!kvq_gguf_find_tensor(file, "blk.0", &t));
        TEST_CHECK(!kvq_gguf_find_tensor(file, "blk.0.bb", &t));
        TEST_CHECK(!kvq_gguf_find_tensor(file, "", &t));
        touch_all(file);
        kvq_gguf_close(file);
    }
    return NULL;
}

/* One value of each type, told by its key, and what the integer getter makes of it. */
static const struct {
    const char *key;
    uint32_t type, bytes;
    const void *value;
    bool fits_u32;
    uint32_t u32;
} values[] = {
    {"u8", KVQ_META_U8, 1, "\xff", true, 255},
    {"i8", KVQ_META_I8, 1, "\x7f", true, 127},
    {"i8.negative", KVQ_META_I8, 1, "\x80", false, 0},
    {"u16", KVQ_META_U16, 2, "\xfe\xff", true, 65534},
    {"i16", KVQ_META_I16, 2, "\x01\x7f", true, 0x7f01},
    {"i16.negative", KVQ_META_I16, 2, "\xff\xff", false, 0},
    {"u32", KVQ_META_U32, 4, "\xff\xff\xff\xff", true, UINT32_MAX},
    {"i32", KVQ_META_I32, 4, "\x04\x03\x02\x01", true, 0x01020304},
    {"i32.negative", KVQ_META_I32, 4, "\xff\xff\xff\xff", false, 0},
    {"f32", KVQ_META_F32, 4, "\0\0\x80\x3f", false, 0},
    {"bool", KVQ_META_BOOL, 1, "\1", false, 0},
    {"string", KVQ_META_STRING, 11, "\3\0\0\0\0\0\0\0abc", false, 0},
    {"u64", KVQ_META_U64, 8, "\xff\xff\xff\xff\0\0\0\0", true, UINT32_MAX},
    {"u64.large", KVQ_META_U64, 8, "\0\0\0\0\1\0\0\0", false, 0},
    {"i64", KVQ_META_I64, 8, "\5\0\0\0\0\0\0\0", true, 5},
    {"i64.negative", KVQ_META_I64, 8, "\0\0\0\0\0\0\0\x80", false, 0},
    {"f64", KVQ_META_F64, 8, "\0\0\0\0\0\0\xf8\x3f", false, 0},
    {"f64.large", KVQ_META_F64, 8, "\0\0\0\0\0\0\xf0\x7e", false, 0},
};
enum { N_VALUES = sizeof values / sizeof *values };

/* Every value also as an array of three equal elements. */
static kvq_status open_values(kvq_gguf **out) {
    image *const f = &image_a;
    put_header(f, 3, 0, 2 * N_VALUES + 3);
    for (size_t i = 0; i < N_VALUES; i++) {
        put_meta(f, values[i].key, values[i].type, values[i].value, values[i].bytes);
        char key[32];
        snprintf(key, sizeof key, "array.%s", values[i].key);
        put_array(f, key, values[i].type, 3, "", 0);
        for (int j = 0; j < 3; j++) put(f, values[i].value, values[i].bytes);
    }
    put_array(f, "mixed", KVQ_META_U8, 3, "\1\1\2", 3);
    put_array(f, "empty", KVQ_META_U8, 0, "", 0);
    put_meta(f, "empty.string", KVQ_META_STRING, "\0\0\0\0\0\0\0\0", 8);
    return open_image(out, f, f->n);
}

static const char *gives_every_type_of_metadata(void) {
    kvq_gguf *file;
    if (open_values(&file) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (size_t i = 0; i < N_VALUES; i++) {
        kvq_meta by_index, meta, array;
        char key[32];
        snprintf(key, sizeof key, "array.%s", values[i].key);
        kvq_gguf_meta(file, 2 * i, &by_index);
        TEST_CHECK(kvq_gguf_find(file, values[i].key, &meta) && kvq_gguf_find(file, key, &array));
        TEST_CHECK(memcmp(&by_index, &meta, sizeof meta) == 0);
        TEST_CHECK(meta.key_length == strlen(values[i].key));
        TEST_CHECK(memcmp(meta.key, values[i].key, meta.key_length) == 0);
        TEST_CHECK(meta.type == (int32_t)values[i].type && !meta.is_array && meta.count == 1);
        TEST_CHECK(meta.bytes == values[i].bytes);
        TEST_CHECK(memcmp(meta.data, values[i].value, values[i].bytes) == 0);
        TEST_CHECK(array.type == (int32_t)values[i].type && array.is_array && array.count == 3);
        TEST_CHECK(array.bytes == 3 * values[i].bytes);
        TEST_CHECK(memcmp(array.data + 2 * values[i].bytes, values[i].value, values[i].bytes) == 0);
    }
    kvq_meta meta;
    TEST_CHECK(kvq_gguf_find(file, "empty", &meta) && meta.count == 0 && meta.bytes == 0);
    TEST_CHECK(!kvq_gguf_find(file, "absent", &meta));
    kvq_gguf_close(file);
    return NULL;
}

static const char *getters_give_what_fits(void) {
    kvq_gguf *file;
    if (open_values(&file) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (size_t i = 0; i < 2 * N_VALUES; i++) {
        char key[32];
        snprintf(key, sizeof key, "%s%s", i % 2 ? "array." : "", values[i / 2].key);
        uint32_t value = 77;
        const kvq_status status = kvq_gguf_get_u32(file, key, &value);
        const bool fits = values[i / 2].fits_u32;
        if ((status == KVQ_OK) != fits || value != (fits ? values[i / 2].u32 : 77)) {
            return TEST_FAIL("%s as u32: status %d, value %" PRIu32, key, status, value);
        }
    }
    float f = 0;
    bool b = false;
    const char *s;
    size_t length;
    TEST_CHECK(kvq_gguf_get_f32(file, "f32", &f) == KVQ_OK && f == 1.0f);
    TEST_CHECK(kvq_gguf_get_f32(file, "array.f64", &f) == KVQ_OK && f == 1.5f);
    TEST_CHECK(kvq_gguf_get_bool(file, "bool", &b) == KVQ_OK && b);
    TEST_CHECK(kvq_gguf_get_string(file, "string", &s, &length) == KVQ_OK);
    TEST_CHECK(length == 3 && memcmp(s, "abc", 3) == 0);
    TEST_CHECK(kvq_gguf_get_string(file, "empty.string", &s, &length) == KVQ_OK && length == 0);
    kvq_gguf_close(file);
    return NULL;
}

static const char *getters_name_what_they_refuse(void) {
    kvq_gguf *file;
    if (open_values(&file) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    uint32_t u = 0;
    float f = 0;
    bool b = false;
    const char *s = NULL;
    size_t length = 0;
#define REFUSES(CALL, FRAGMENT)                                                                    \
    do {                                                                                           \
        TEST_CHECK((CALL) == KVQ_ERR_FORMAT);                                                      \
        if (!strstr(kvq_error(), FRAGMENT)) {                                                      \
            return TEST_FAIL("\"%s\"\n       does not hold \"%s\"", kvq_error(), FRAGMENT);        \
        }                                                                                          \
    } while (0)
    REFUSES(kvq_gguf_get_u32(file, "string", &u),
            "key string is of type string, expected an integer");
    REFUSES(kvq_gguf_get_u32(file, "f32", &u), "key f32 is of type f32, expected an integer");
    REFUSES(kvq_gguf_get_u32(file, "i8.negative", &u), "key i8.negative is negative, expected");
    REFUSES(kvq_gguf_get_u32(file, "u64.large", &u), "key u64.large is 4294967296, expected");
    REFUSES(kvq_gguf_get_u32(file, "mixed", &u), "key mixed is an array of 3 u8 values, expected");
    REFUSES(kvq_gguf_get_u32(file, "empty", &u), "key empty is an array of 0 u8 values, expected");
    REFUSES(kvq_gguf_get_f32(file, "u32", &f), "key u32 is of type u32, expected an f32 or f64");
    REFUSES(kvq_gguf_get_f32(file, "f64.large", &f), "expected a number that fits an f32");
    REFUSES(kvq_gguf_get_bool(file, "u8", &b), "key u8 is of type u8, expected a bool");
    REFUSES(kvq_gguf_get_string(file, "u8", &s, &length),
            "key u8 is of type u8, expected a string");
    REFUSES(kvq_gguf_get_string(file, "array.string", &s, &length),
            "is an array of 3 string values");
#undef REFUSES
    TEST_CHECK(u == 0 && f == 0 && !b && !s && length == 0);
    kvq_gguf_close(file);
    return NULL;
}

static const char *absent_keys_leave_defaults(void) {
    kvq_gguf *file;
    if (open_values(&file) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    uint32_t u = 7;
    float f = 7;
    bool b = true;
    const char *s = "seven";
    size_t length = 5;
    TEST_CHECK(kvq_gguf_get_u32(file, "absent", &u) == KVQ_OK && u == 7);
    TEST_CHECK(kvq_gguf_get_f32(file, "absent", &f) == KVQ_OK && f == 7);
    TEST_CHECK(kvq_gguf_get_bool(file, "absent", &b) == KVQ_OK && b);
    TEST_CHECK(kvq_gguf_get_string(file, "absent", &s, &length) == KVQ_OK);
    TEST_CHECK(strcmp(s, "seven") == 0 && length == 5);
    kvq_gguf_close(file);
    return NULL;
}

enum { BAD = KVQ_ERR_FORMAT, NEW = KVQ_ERR_UNSUPPORTED };

/* One field of the small file replaced, and what must be said of it. */
static const struct {
    enum field field;
    size_t bytes;
    uint64_t value;
    int status;
    const char *fragment;
} broken[] = {
    {MAGIC, 4, 0x464c457f, BAD, "begins with \"\\x7fELF\", expected \"GGUF\""},
    {VERSION, 4, 0, NEW, "GGUF version 0 is not supported, expected 2 or 3"},
    {VERSION, 4, 1, NEW, "GGUF version 1 is not supported, expected 2 or 3"},
    {VERSION, 4, 4, NEW, "GGUF version 4 is not supported, expected 2 or 3"},
    {VERSION, 4, 0x03000000, NEW, "the file is big-endian, expected a little-endian"},
    {N_TENSORS, 8, 3, BAD, "tensor entry 3 of 3 "},
    {N_TENSORS, 8, UINT64_MAX, BAD, "header counts 18446744073709551615 tensors, expected"},
    {N_METADATA, 8, 12, BAD, "metadata entry"},
    {N_METADATA, 8, 1u << 31, BAD, "header counts 2147483648 metadata entries, expected"},
    {N_METADATA, 8, UINT64_MAX, BAD, "metadata entries, expected at most the "},
    {KEY_LENGTH, 8, 0, BAD, "name of metadata entry 1 of 5 is 0 bytes long, expected 1 to 65535"},
    {KEY_LENGTH, 8, 65536, BAD, "is 65536 bytes long, expected 1 to 65535"},
    {KEY_LENGTH, 8, UINT64_MAX, BAD, "bytes long, expected 1 to 65535"},
    {KEY_LENGTH, 8, 4096, BAD, "metadata entry 1 of 5 runs past the end of the file"},
    {KEY_BYTES, 1, '\n', BAD, "(\\x0aeneral.alignment) holds byte 0x0a, expected printable"},
    {KEY_BYTES, 1, 0xc3, BAD, "(\\xc3eneral.alignment) holds byte 0xc3, expected printable"},
    {VALUE_TYPE, 4, 13, BAD, "general.alignment has value type 13, expected 0 to 12"},
    {VALUE_TYPE, 4, UINT32_MAX, BAD, "has value type 4294967295, expected 0 to 12"},
    {VALUE_TYPE, 4, KVQ_META_F32, BAD, "general.alignment is of type f32, expected an integer"},
    {ALIGNMENT, 4, 0, BAD, "general.alignment is 0, expected a power of two from 8 to 65536"},
    {ALIGNMENT, 4, 4, BAD, "general.alignment is 4, expected a power of two from 8 to 65536"},
    {ALIGNMENT, 4, 12, BAD, "general.alignment is 12, expected a power of two"},
    {ALIGNMENT, 4, 1u << 17, BAD, "general.alignment is 131072, expected a power of two"},
    {ALIGNMENT, 4, 1u << 31, BAD, "general.alignment is 2147483648, expected a power of two"},
    {BOOL, 1, 2, BAD, "metadata key test.one holds a bool of 2, expected 0 or 1"},
    {ARRAY_TYPE, 4, KVQ_META_ARRAY, NEW, "test.flags is an array of arrays, expected"},
    {ARRAY_TYPE, 4, 13, BAD, "test.flags has element type 13, expected 0 to 12"},
    {ARRAY_TYPE, 4, KVQ_META_STRING, BAD, "metadata entry 3 of 5 runs past the end"},
    {ARRAY_COUNT, 8, 1u << 20, BAD, "metadata entry 3 of 5 runs past the end of the file"},
    {ARRAY_COUNT, 8, UINT64_MAX, BAD, "metadata entry 3 of 5 runs past the end of the file"},
    {FLAGS, 1, 0xff, BAD, "metadata key test.flags holds a bool of 255, expected 0 or 1"},
    {STRINGS_COUNT, 8, UINT64_MAX / 8 + 2, BAD, "metadata entry 4 of 5 runs past the end"},
    {STRING_LENGTH, 8, UINT64_MAX, BAD, "metadata entry 4 of 5 runs past the end"},
    {STRING_LENGTH, 8, UINT64_MAX - 7, BAD, "metadata entry 4 of 5 runs past the end"},
    {KEY_TWO, 8, 0x656e6f2e74736574, BAD, "metadata key test.one appears twice, expected once"},
    {NAME_LENGTH, 8, 0, BAD, "name of tensor entry 1 of 2 is 0 bytes long, expected 1 to 256"},
    {NAME_LENGTH, 8, 257, BAD, "is 257 bytes long, expected 1 to 256"},
    {NAME_LENGTH, 8, 1ull << 63, BAD, "bytes long, expected 1 to 256"},
    {NAME_BYTES, 1, 0x1b, BAD, "(\\x1blk.0.a) holds byte 0x1b, expected printable ASCII"},
    {NAME_BYTES, 1, 0, BAD, "(\\x00lk.0.a) holds byte 0x00, expected printable ASCII"},
    {N_DIMS, 4, 0, BAD, "tensor blk.0.a has 0 dimensions, expected 1 to 4"},
    {N_DIMS, 4, 5, BAD, "tensor blk.0.a has 5 dimensions, expected 1 to 4"},
    {N_DIMS, 4, UINT32_MAX, BAD, "has 4294967295 dimensions, expected 1 to 4"},
    {DIM_0, 8, 0, BAD, "tensor blk.0.a: dimension 0 is 0, expected at least 1"},
    {DIM_1, 8, 0, BAD, "tensor blk.0.a: dimension 1 is 0, expected at least 1"},
    {DIM_0, 8, 1ull << 62, BAD, "blk.0.a: shape 4611686018427387904x3x1x1 overflows"},
    {DIM_1, 8, UINT64_MAX, BAD, "blk.0.a: shape 4x18446744073709551615x1x1 overflows"},
    {DIM_1, 8, 1ull << 60, BAD, "blk.0.a: shape 4x1152921504606846976x1x1 overflows"},
    {DIM_1, 8, 1ull << 32, BAD, "blk.0.a: 68719476736 bytes at offset 0 of the data, expected"},
    {TENSOR_TYPE, 4, 137, NEW, "tensor blk.0.a: type id 137 is unknown, expected"},
    {TENSOR_TYPE, 4, 4, NEW, "tensor blk.0.a: type id 4 is unknown, expected"},
    {TENSOR_TYPE, 4, UINT32_MAX, NEW, "type id 4294967295 is unknown, expected"},
    {TENSOR_TYPE, 4, 12, BAD,
     "rows have 4 elements, expected a multiple of the 256 in a block of Q4_K"},
    {OFFSET, 8, 8, BAD, "tensor blk.0.a: offset 8, expected a multiple of the alignment 32"},
    {OFFSET, 8, 1u << 20, BAD, "48 bytes at offset 1048576 of the data, expected"},
    {OFFSET, 8, UINT64_MAX - 31, BAD, "48 bytes at offset 18446744073709551584 of the data"},
    {OFFSET, 8, 32, BAD, "tensors blk.0.a and blk.0.b overlap, expected"},
    {OFFSET_TWO, 8, 32, BAD, "tensors blk.0.a and blk.0.b overlap, expected"},
    {OFFSET_TWO, 8, 96, BAD, "tensor blk.0.b: 34 bytes at offset 96 of the data, expected"},
    {DIM_TWO, 8, 33, BAD, "tensor blk.0.b: rows have 33 elements, expected a multiple of the 32"},
    {DIM_TWO, 8, 64, BAD, "tensor blk.0.b: 68 bytes at offset 64 of the data, expected"},
    {NAME_TWO, 7, 0x612e302e6b6c62, BAD, "tensor blk.0.a appears twice, expected once"},
};

static const char *broken_fields_are_named(void) {
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        small_file(3);
        memcpy(image_a.bytes + field_at[broken[i].field], &broken[i].value, broken[i].bytes);
        kvq_gguf *file;
        const kvq_status status = open_image(&file, &image_a, image_a.n);
        const char *const wrong =
            expect_failure(status, file, broken[i].status, broken[i].fragment);
        if (wrong) return wrong;
    }
    return NULL;
}

static const char *cut_files_are_refused(void) {
    const image *const f = small_file(3);
    for (size_t n = 0; n < f->n; n++) {
        kvq_gguf *file;
        if (open_image(&file, f, n) == KVQ_OK)
            return TEST_FAIL("opened after %zu of %zu bytes", n, f->n);
        TEST_CHECK(!file && kvq_error()[0]);
    }
    return NULL;
}

static const char *flipped_bits_do_no_harm(void) {
    const image *const f = small_file(3);
    size_t opened = 0;
    for (size_t bit = 0; bit < 8 * f->n; bit++) {
        image_a.bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
        kvq_gguf *file;
        if (open_image(&file, f, f->n) == KVQ_OK) {
            touch_all(file);
            kvq_gguf_close(file);
            opened++;
        }
        image_a.bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    TEST_CHECK(opened > 8 * 98); /* at least all those in the data */
    TEST_CHECK(opened < 8 * f->n);
    return NULL;
}

static const char *an_empty_file_has_a_header(void) {
    put_header(&image_a, 3, 0, 0);
    kvq_gguf *file;
    kvq_meta meta;
    TEST_CHECK(open_image(&file, &image_a, image_a.n) == KVQ_OK);
    TEST_CHECK(kvq_gguf_meta_count(file) == 0 && kvq_gguf_tensor_count(file) == 0);
    TEST_CHECK(!kvq_gguf_find(file, "a", &meta));
    kvq_gguf_close(file);
    return NULL;
}

static const char *long_names_are_cut_in_errors(void) {
    static char key[60001];
    memset(key, 'k', sizeof key - 1);
    put_header(&image_a, 3, 0, 2);
    put_meta(&image_a, key, KVQ_META_BOOL, "\0", 1);
    put_meta(&image_a, key, KVQ_META_BOOL, "\0", 1);
    kvq_gguf *file;
    TEST_CHECK(open_image(&file, &image_a, image_a.n) == KVQ_ERR_FORMAT);
    TEST_CHECK(strstr(kvq_error(), "kkk... appears twice, expected once") &&
               strlen(kvq_error()) < 200);
    return NULL;
}

/* Names whose order in the file is neither that of the alphabet nor its reverse. */
static void scattered_name(char *out, size_t size, uint32_t i) {
    snprintf(out, size, "blk.%" PRIu32 ".%s", i * 617 % 1000, i % 3 ? "attn_q.weight" : "ffn");
}

static const char *a_thousand_tensors_are_found(void) {
    image *const f = &image_a;
    char name[32];
    put_header(f, 3, 1000, 0);
    for (uint32_t i = 0; i < 1000; i++) {
        scattered_name(name, sizeof name, i);
        put_tensor(f, name, 24, 1 + i % 32, (999 - i) * 32); /* I8, data in falling order */
    }
    put_data(f, 1000 * 32);
    kvq_gguf *file;
    if (open_image(&file, f, f->n) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (uint32_t i = 0; i < 1000; i++) {
        kvq_gguf_tensor found, at;
        scattered_name(name, sizeof name, i);
        kvq_gguf_tensor_at(file, i, &at);
        TEST_CHECK(at.name_length == strlen(name) && memcmp(at.name, name, at.name_length) == 0);
        TEST_CHECK(at.bytes == 1 + i % 32);
        TEST_CHECK(kvq_gguf_find_tensor(file, name, &found) && found.data == at.data);
    }
    kvq_gguf_close(file);
    return NULL;
}

/* ---- tests of files on disk -------------------------------------------------------------- */

static char directory[] = "/tmp/kvq_test_gguf_XXXXXX";
static char path_buffer[512];

static const char *path_of(const char *name) {
    snprintf(path_buffer, sizeof path_buffer, "%s/%s", directory, name);
    return path_buffer;
}

static bool save(const char *name, const image *f) {
    FILE *const out = fopen(path_of(name), "wb");
    return out && fwrite(f->bytes, 1, f->n, out) == f->n && fclose(out) == 0;
}

/* Part `number` of 3 with `n_here` tensors, named t<number>.<i>, of 32 bytes that begin with
 * 16 * number + i. */
static const image *split_part(uint32_t number, uint32_t n_here, uint32_t n_all) {
    image *const f = &image_b;
    char name[16];
    put_header(f, 3, n_here, 4);
    put_meta(f, "split.no", KVQ_META_U16, &number, 2);
    put_meta(f, "split.count", KVQ_META_U16, "\3", 2);
    put_meta(f, "split.tensors.count", KVQ_META_I32, &n_all, 4);
    put_meta_u32(f, "test.part", number);
    for (uint32_t i = 0; i < n_here; i++) {
        snprintf(name, sizeof name, "t%" PRIu32 ".%" PRIu32, number, i);
        put_tensor(f, name, 24, 32, i * 32);
    }
    put_data(f, n_here * 32);
    for (uint32_t i = 0; i < n_here; i++) {
        f->bytes[f->n - (n_here - i) * 32] = (uint8_t)(16 * number + i);
    }
    return f;
}

#define PART_1 "m-00001-of-00003.gguf"
#define PART_2 "m-00002-of-00003.gguf"
#define PART_3 "m-00003-of-00003.gguf"

/* The good split: parts of 2, 0 and 3 tensors. */
static bool save_split(void) {
    return save(PART_1, split_part(0, 2, 5)) && save(PART_2, split_part(1, 0, 5)) &&
           save(PART_3, split_part(2, 3, 5));
}

static void remove_files(void) {
    static const char *const names[] = {PART_1, PART_2, PART_3, "whole.gguf", "empty.gguf", "pipe"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) remove(path_of(names[i]));
}

static const char *open_fails(const char *name, kvq_status expected, const char *fragment) {
    kvq_gguf *file;
    const kvq_status status = kvq_gguf_open(&file, path_of(name));
    return expect_failure(status, file, expected, fragment);
}

static const char *check_split_files(void) {
    kvq_gguf *file;
    const char *wrong;
    TEST_CHECK(save_split());
    if (kvq_gguf_open(&file, path_of(PART_1)) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    TEST_CHECK(kvq_gguf_tensor_count(file) == 5);
    for (uint32_t i = 0; i < 5; i++) {
        const uint32_t number = i < 2 ? 0 : 2, within = i < 2 ? i : i - 2;
        kvq_gguf_tensor t, found;
        char name[32];
        snprintf(name, sizeof name, "t%" PRIu32 ".%" PRIu32, number, within);
        kvq_gguf_tensor_at(file, i, &t);
        TEST_CHECK(t.name_length == 4 && memcmp(t.name, name, 4) == 0);
        TEST_CHECK(t.bytes == 32 && t.data[0] == 16 * number + within);
        TEST_CHECK(kvq_gguf_find_tensor(file, name, &found) && found.data == t.data);
    }
    uint32_t part = 9;
    TEST_CHECK(kvq_gguf_get_u32(file, "test.part", &part) == KVQ_OK && part == 0);
    kvq_gguf_close(file);

    wrong = open_fails(PART_2, KVQ_ERR_ARGUMENT, "is part 2 of 3, expected the first: ");
    if (wrong) return wrong;
    TEST_CHECK(strstr(kvq_error(), "/" PART_1));
    TEST_CHECK(save(PART_3, split_part(2, 3, 6)));
    wrong = open_fails(PART_1, KVQ_ERR_FORMAT, "part 3 of 3 with 6 tensors in all, expected");
    if (wrong) return wrong;
    TEST_CHECK(save(PART_3, split_part(1, 3, 5)));
    wrong = open_fails(PART_1, KVQ_ERR_FORMAT, "says that it is part 2 of 3 with");
    if (wrong) return wrong;
    TEST_CHECK(save(PART_3, split_part(2, 4, 5)));
    wrong = open_fails(PART_1, KVQ_ERR_FORMAT, "the 3 parts hold 6 tensors, expected the 5");
    if (wrong) return wrong;
    remove(path_of(PART_3));
    wrong = open_fails(PART_1, KVQ_ERR_IO, PART_3 ": cannot be opened: ");
    if (wrong) return wrong;
    TEST_CHECK(save("whole.gguf", split_part(0, 2, 5)));
    wrong = open_fails("whole.gguf", KVQ_ERR_ARGUMENT, "ends in -00001-of-00003.gguf");
    if (wrong) return wrong;
    TEST_CHECK(save(PART_1, split_part(3, 2, 5)));
    wrong = open_fails(PART_1, KVQ_ERR_FORMAT, "split.no is 3, expected less than");
    if (wrong) return wrong;
    put_header(&image_b, 3, 0, 1);
    put_meta_u32(&image_b, "split.count", 3);
    TEST_CHECK(save(PART_1, &image_b));
    wrong = open_fails(PART_1, KVQ_ERR_FORMAT, "split.no is absent, expected it where");
    if (wrong) return wrong;
    put_header(&image_b, 3, 0, 3);
    put_meta_u32(&image_b, "split.count", 1025);
    put_meta_u32(&image_b, "split.no", 0);
    put_meta_u32(&image_b, "split.tensors.count", 0);
    TEST_CHECK(save(PART_1, &image_b));
    wrong = open_fails(PART_1, KVQ_ERR_UNSUPPORTED, "split.count is 1025, expected at most 1024");
    if (wrong) return wrong;
    const image *const f = split_part(0, 2, 5);
    const kvq_status status = open_image(&file, f, f->n);
    return expect_failure(status, file, KVQ_ERR_UNSUPPORTED, "part 1 of 3 of a split");
}

static const char *check_paths(void) {
    kvq_gguf *file;
    const char *wrong;
    TEST_CHECK(save("whole.gguf", small_file(3)));
    if (kvq_gguf_open(&file, path_of("whole.gguf")) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    TEST_CHECK(kvq_gguf_tensor_count(file) == 2);
    kvq_gguf_close(file);
    image_a.n = 0;
    TEST_CHECK(save("empty.gguf", &image_a));
    wrong = open_fails("empty.gguf", KVQ_ERR_IO, "empty.gguf: is empty");
    if (wrong) return wrong;
    wrong = open_fails("", KVQ_ERR_IO, ": is a directory, expected a file");
    if (wrong) return wrong;
    wrong = open_fails("absent.gguf", KVQ_ERR_IO, "absent.gguf: cannot be opened: ");
    if (wrong) return wrong;
    char name[251]; /* of 125 characters of two bytes: errors show the last of them, uncut */
    for (size_t i = 0; i < sizeof name - 1; i++) name[i] = i % 2 ? '\xa9' : '\xc3';
    name[sizeof name - 1] = 0;
    if ((wrong = open_fails(name, KVQ_ERR_IO, "\xc3\xa9: cannot be opened: "))) return wrong;
    TEST_CHECK(memcmp(kvq_error(), "...\xc3\xa9\xc3\xa9", 7) == 0);
    TEST_CHECK(mkfifo(path_of("pipe"), 0600) == 0);
    return open_fails("pipe", KVQ_ERR_IO, "pipe: is not a regular file");
}

static const char *in_a_directory(const char *(*check)(void)) {
    strcpy(directory + sizeof directory - 7, "XXXXXX");
    if (!mkdtemp(directory)) return TEST_FAIL("no temporary directory");
    const char *const wrong = check();
    remove_files();
    rmdir(directory);
    return wrong;
}

static const char *split_files_open_as_one(void) { return in_a_directory(check_split_files); }
static const char *paths_to_no_file_are_named(void) { return in_a_directory(check_paths); }

static const char *closing_nothing_is_allowed(void) {
    kvq_gguf_close(NULL);
    return NULL;
}

const kvq_test tests_gguf[] = {
    {"gguf: versions 2 and 3 are read", reads_both_versions},
    {"gguf: metadata of every type come back as they are", gives_every_type_of_metadata},
    {"gguf: getters give every value that fits", getters_give_what_fits},
    {"gguf: getters name the key, the type found and the type expected",
     getters_name_what_they_refuse},
    {"gguf: absent keys leave the caller's default", absent_keys_leave_defaults},
    {"gguf: a broken field is refused by a sentence that names it", broken_fields_are_named},
    {"gguf: a file cut at any byte is refused", cut_files_are_refused},
    {"gguf: a file with any one bit flipped opens or is refused", flipped_bits_do_no_harm},
    {"gguf: a header alone is a valid file", an_empty_file_has_a_header},
    {"gguf: long names are cut in errors", long_names_are_cut_in_errors},
    {"gguf: a thousand tensors are found by name and keep their order",
     a_thousand_tensors_are_found},
    {"gguf: a split file opens as one, and a wrong part is named", split_files_open_as_one},
    {"gguf: a path that is no file is named", paths_to_no_file_are_named},
    {"gguf: closing NULL is allowed", closing_nothing_is_allowed},
    {NULL, NULL},
};
