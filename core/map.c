/* map.c: see map.h. One small part per system. */
#include "map.h"

#ifdef _WIN32

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

static kvq_status fail_system(const char *label, const char *what) {
    return kvq_fail(KVQ_ERR_IO, "%s: cannot %s (Windows error %lu)", label, what,
                    (unsigned long)GetLastError());
}

/* Opening a directory fails here by itself: that would need FILE_FLAG_BACKUP_SEMANTICS. */
static HANDLE open_utf8(const char *path) {
    const int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, NULL, 0);
    wchar_t *const wide = n > 0 ? kvq_alloc((size_t)n * sizeof *wide) : NULL;
    if (!wide) return INVALID_HANDLE_VALUE;
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, n);
    const HANDLE file = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                                    FILE_ATTRIBUTE_NORMAL, NULL);
    kvq_free(wide);
    return file;
}

static kvq_status map_handle(kvq_map *out, HANDLE file, const char *label) {
    LARGE_INTEGER size;
    if (GetFileType(file) != FILE_TYPE_DISK) {
        return kvq_fail(KVQ_ERR_IO, "%s: is not a regular file", label);
    }
    if (!GetFileSizeEx(file, &size)) return fail_system(label, "be measured");
    if (size.QuadPart == 0) return kvq_fail(KVQ_ERR_IO, "%s: is empty", label);
    if ((unsigned long long)size.QuadPart > PTRDIFF_MAX) {
        return kvq_fail(KVQ_ERR_IO, "%s: is too large to be mapped", label);
    }
    /* The view keeps the mapping alive, and the mapping the file: both handles can go. */
    const HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
    if (!mapping) return fail_system(label, "be mapped");
    const void *const data = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    const kvq_status status = data ? KVQ_OK : fail_system(label, "be mapped");
    CloseHandle(mapping);
    if (data) *out = (kvq_map){data, (size_t)size.QuadPart};
    return status;
}

kvq_status kvq_map_open(kvq_map *out, const char *path, const char *label) {
    const HANDLE file = open_utf8(path);
    if (file == INVALID_HANDLE_VALUE) return fail_system(label, "be opened");
    const kvq_status status = map_handle(out, file, label);
    CloseHandle(file);
    return status;
}

void kvq_map_close(kvq_map *map) {
    if (map->data) UnmapViewOfFile(map->data);
    *map = (kvq_map){NULL, 0};
}

#else

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static kvq_status fail_system(const char *label, const char *what) {
    return kvq_fail(KVQ_ERR_IO, "%s: cannot %s: %s", label, what, strerror(errno));
}

static kvq_status map_descriptor(kvq_map *out, int file, const char *label) {
    struct stat info;
    if (fstat(file, &info) != 0) return fail_system(label, "be examined");
    if (S_ISDIR(info.st_mode)) {
        return kvq_fail(KVQ_ERR_IO, "%s: is a directory, expected a file", label);
    }
    if (!S_ISREG(info.st_mode)) return kvq_fail(KVQ_ERR_IO, "%s: is not a regular file", label);
    if (info.st_size == 0) return kvq_fail(KVQ_ERR_IO, "%s: is empty", label);
    if ((uintmax_t)info.st_size > PTRDIFF_MAX) {
        return kvq_fail(KVQ_ERR_IO, "%s: is too large to be mapped", label);
    }
    const size_t bytes = (size_t)info.st_size;
    void *const data = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) return fail_system(label, "be mapped");
    *out = (kvq_map){data, bytes};
    return KVQ_OK;
}

kvq_status kvq_map_open(kvq_map *out, const char *path, const char *label) {
    /* Non-blocking, because opening a named pipe would otherwise wait for a writer. */
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return fail_system(label, "be opened");
    const kvq_status status = map_descriptor(out, file, label);
    close(file); /* the mapping stays */
    return status;
}

void kvq_map_close(kvq_map *map) {
    if (map->data) munmap((void *)(uintptr_t)map->data, map->bytes);
    *map = (kvq_map){NULL, 0};
}

#endif
