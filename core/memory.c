/* memory.c: how much memory this process may take.
 *
 * On Linux that is the least of what the system has left (MemAvailable) and of what is left in each
 * of the control groups that the process is in: containers, batch systems and systemd limit by
 * them. Formats: proc_pid_cgroup(5), and Documentation/admin-guide/cgroup-v2.rst and
 * cgroup-v1/memory.rst of the kernel.
 */
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <unistd.h>
#endif

enum { PATH_BYTES = 4096, LINE_BYTES = PATH_BYTES + 64 };

/* A sixteenth stays free, 1 GiB at most: for what the process takes beside its sessions, and so
 * that the system need not drop what others read. */
static uint64_t without_headroom(uint64_t bytes) {
    const uint64_t most = (uint64_t)1 << 30, part = bytes / 16;
    return bytes - (part < most ? part : most);
}

/* The number that follows `key` at the beginning of a line of a file; UINT64_MAX if there is no
 * such file, line or number. */
static uint64_t read_number(const char *folder, const char *name, const char *key) {
    char path[PATH_BYTES], line[LINE_BYTES];
    const size_t skipped = strlen(key);
    uint64_t found = UINT64_MAX;
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return found;
    FILE *const file = fopen(path, "r");
    while (file && found == UINT64_MAX && fgets(line, sizeof line, file)) {
        char *end;
        if (strncmp(line, key, skipped) != 0) continue;
        const unsigned long long number = strtoull(line + skipped, &end, 10);
        if (end != line + skipped) found = number;
    }
    if (file) fclose(file);
    return found;
}

/* The files of a control group, in the two versions that Linux has of them. */
typedef struct version {
    const char *controller; /* as /proc/self/cgroup names it */
    const char *mount;
    const char *limit, *slowed;    /* files that are a number: what may be used, and fast */
    const char *used;              /* and is */
    const char *active, *inactive; /* keys of memory.stat: cached files */
} version;

static const version versions[] = {
    {"", "/sys/fs/cgroup", "memory.max", "memory.high", "memory.current", "active_file ",
     "inactive_file "},
    {"memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", NULL, "memory.usage_in_bytes",
     "total_active_file ", "total_inactive_file "},
};

/* What one group leaves; UINT64_MAX where it does not limit ("max"). Beyond `slowed` the system
 * makes processes wait with each page, so that counts as a limit. As in MemAvailable, cached files
 * do not count as used: mapped weights are such. */
static uint64_t left_in(const char *group, const version *v) {
    const uint64_t hard = read_number(group, v->limit, "");
    const uint64_t soft = v->slowed ? read_number(group, v->slowed, "") : UINT64_MAX;
    const uint64_t limit = soft < hard ? soft : hard;
    const uint64_t used = read_number(group, v->used, "");
    if (limit == UINT64_MAX || used == UINT64_MAX) return UINT64_MAX;
    const uint64_t active = read_number(group, "memory.stat", v->active);
    const uint64_t inactive = read_number(group, "memory.stat", v->inactive);
    uint64_t kept = used;
    if (active != UINT64_MAX) kept -= active < kept ? active : kept;
    if (inactive != UINT64_MAX) kept -= inactive < kept ? inactive : kept;
    return kept < limit ? limit - kept : 0;
}

/* The least that a group and those that it is in leave. In a container the path may be one of the
 * system outside, which is not there: then only the mount is, the container's own group. */
static uint64_t left_along(const char *root, const char *path, const version *v) {
    char group[PATH_BYTES];
    uint64_t least = UINT64_MAX;
    const int mount = snprintf(group, sizeof group, "%s%s", root, v->mount);
    if (mount + (int)strlen(path) >= (int)sizeof group) return least;
    strcpy(group + mount, path);
    for (;;) {
        const uint64_t left = left_in(group, v);
        if (left < least) least = left;
        char *const last = strrchr(group + mount, '/');
        if (!last) return least;
        *last = '\0';
    }
}

/* Whether a list, divided by commas, has a word; the empty list is the word "". */
static bool lists(const char *list, const char *word) {
    const size_t n = strlen(word);
    for (;; list++) {
        const size_t length = strcspn(list, ",");
        if (length == n && strncmp(list, word, n) == 0) return true;
        list += length;
        if (!*list) return false;
    }
}

/* The least that the process's groups leave; its lines are ID:CONTROLLERS:PATH. */
static uint64_t left_in_groups(const char *root) {
    char path[PATH_BYTES], line[LINE_BYTES];
    uint64_t least = UINT64_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *const file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *const controllers = strchr(line, ':');
        char *const group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group = '\0';
        for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
            if (!lists(controllers + 1, versions[i].controller)) continue;
            const uint64_t left = left_along(root, group + 1, &versions[i]);
            if (left < least) least = left;
        }
    }
    if (file) fclose(file);
    return least;
}

/* Where no file tells: what Windows tells, elsewhere the whole memory. */
static uint64_t otherwise(void) {
#if defined(_WIN32)
    MEMORYSTATUSEX status = {.dwLength = sizeof status};
    GlobalMemoryStatusEx(&status);
    return status.ullAvailPhys;
#else
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : UINT64_MAX;
#endif
}

uint64_t kvq_memory_available_below(const char *root) {
    const uint64_t kib = read_number(root, "proc/meminfo", "MemAvailable:");
    const uint64_t system = kib == UINT64_MAX ? otherwise() : 1024 * kib;
    const uint64_t groups = left_in_groups(root);
    return without_headroom(system < groups ? system : groups);
}

uint64_t kvq_memory_available(void) { return kvq_memory_available_below(""); }
