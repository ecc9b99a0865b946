/* old_libcuda.c: a driver that knows its version and nothing else, as one that is too old does. */
int cuDriverGetVersion(int *version);

int cuDriverGetVersion(int *version) {
    *version = 10020;
    return 0;
}
