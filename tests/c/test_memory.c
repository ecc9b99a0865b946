/* test_memory.c: what the system and control groups leave, by files below another root. */
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"
#include "test.h"

#define MIB 1048576ull
/* At most 160 MiB are left here, of which a sixteenth stays free. */
#define LESS_HEADROOM(BYTES) ((BYTES) - (BYTES) / 16)

enum { MOST_FILES = 10 };

typedef struct layout {
    const char *what;
    struct {
        const char *path, *text;
    } file[MOST_FILES];
    unsigned long long expected;
} layout;

static const char *const meminfo =
    "MemTotal:  999999 kB\nMemFree:  5 kB\nMemAvailable:  163840 kB\n";

static const layout layouts[] = {
    {"no control group", {{"proc/meminfo", meminfo}}, LESS_HEADROOM(160 * MIB)},
    {"version 2 without a limit",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/a\n"},
      {"sys/fs/cgroup/a/memory.max", "max\n"},
      {"sys/fs/cgroup/a/memory.current", "1048576\n"}},
     LESS_HEADROOM(160 * MIB)},
    {"version 2, of which cached files are not used",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/a/b\n"},
      {"sys/fs/cgroup/a/b/memory.max", "104857600\n"},    /* 100 MiB */
      {"sys/fs/cgroup/a/b/memory.current", "83886080\n"}, /* 80 */
      {"sys/fs/cgroup/a/b/memory.stat",
       "anon 1\nfile 9\nactive_file 20971520\ninactive_file 10485760\n"}}, /* 20, 10 */
     LESS_HEADROOM(50 * MIB)},
    {"version 2, the group around it leaves less",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/a/b\n"},
      {"sys/fs/cgroup/a/b/memory.max", "104857600\n"},
      {"sys/fs/cgroup/a/b/memory.current", "0\n"},
      {"sys/fs/cgroup/a/memory.max", "52428800\n"},
      {"sys/fs/cgroup/a/memory.current", "10485760\n"}},
     LESS_HEADROOM(40 * MIB)},
    {"version 2, slowed down before the limit",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/a\n"},
      {"sys/fs/cgroup/a/memory.max", "104857600\n"},
      {"sys/fs/cgroup/a/memory.high", "73400320\n"}, /* 70 MiB */
      {"sys/fs/cgroup/a/memory.current", "10485760\n"}},
     LESS_HEADROOM(60 * MIB)},
    {"version 2 inside a container",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/\n"},
      {"sys/fs/cgroup/memory.max", "33554432\n"},
      {"sys/fs/cgroup/memory.current", "1048576\n"}},
     LESS_HEADROOM(31 * MIB)},
    {"version 1, its path that of the system outside",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "5:cpu,cpuacct:/docker/1\n4:hugetlb,memory:/docker/1\n0::/\n"},
      {"sys/fs/cgroup/memory/memory.limit_in_bytes", "104857600\n"},
      {"sys/fs/cgroup/memory/memory.usage_in_bytes", "94371840\n"}, /* 90 MiB */
      {"sys/fs/cgroup/memory/memory.stat",
       "inactive_file 1\ntotal_inactive_file 52428800\ntotal_active_file 1048576\n"}},
     LESS_HEADROOM(61 * MIB)},
    {"version 1 without a limit",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "4:memory:/\n"},
      {"sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"},
      {"sys/fs/cgroup/memory/memory.usage_in_bytes", "94371840\n"}},
     LESS_HEADROOM(160 * MIB)},
    {"a limit that is exceeded",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "0::/a\n"},
      {"sys/fs/cgroup/a/memory.max", "1048576\n"},
      {"sys/fs/cgroup/a/memory.current", "2097152\n"}},
     0},
    {"files that are not as they should be",
     {{"proc/meminfo", meminfo},
      {"proc/self/cgroup", "\n:\n0:\nmemory\n0::a\n4:memory:/../..\n"},
      {"sys/fs/cgroup/memory.max", "\n"},
      {"sys/fs/cgroup/memory.current", "x\n"}},
     LESS_HEADROOM(160 * MIB)},
    {"much memory, of which 1 GiB stays free",
     {{"proc/meminfo", "MemAvailable: 1073741824 kB\n"}},
     (1024 - 1) * 1024 * MIB},
};

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *at) {
    (void)about;
    (void)kind;
    (void)at;
    return remove(path);
}

static int write_file(const char *root, const char *name, const char *text) {
    char path[256];
    const int n = snprintf(path, sizeof path, "%s/", root);
    snprintf(path + n, sizeof path - (size_t)n, "%s", name);
    for (char *slash = path + n; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = '\0';
        mkdir(path, 0700); /* it may be there */
    }
    FILE *const file = fopen(path, "w");
    if (!file) return -1;
    fputs(text, file);
    return fclose(file);
}

static const char *memory_is_what_system_and_groups_leave(void) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        char root[] = "/tmp/kvq-memory-XXXXXX";
        if (!mkdtemp(root)) return TEST_FAIL("no folder can be made in /tmp");
        int broken = 0;
        for (int k = 0; k < MOST_FILES && layouts[i].file[k].path; k++) {
            broken |= write_file(root, layouts[i].file[k].path, layouts[i].file[k].text);
        }
        const unsigned long long found = kvq_memory_available_below(root);
        nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        if (broken) return TEST_FAIL("the files of \"%s\" cannot be written", layouts[i].what);
        if (found != layouts[i].expected) {
            return TEST_FAIL("%s: %llu bytes, expected %llu", layouts[i].what, found,
                             layouts[i].expected);
        }
    }
    return NULL;
}

static const char *memory_is_known_where_no_file_tells(void) {
    TEST_CHECK(kvq_memory_available_below("/nowhere") > MIB);
    return NULL;
}

const kvq_test tests_memory[] = {
    {"memory: it is what the system and control groups leave",
     memory_is_what_system_and_groups_leave},
    {"memory: it is known where no file tells", memory_is_known_where_no_file_tells},
    {NULL, NULL},
};
