/* check.h: named tests of the simulator, run in turn; a failure is a line. */
#ifndef CUSIM_CHECK_H
#define CUSIM_CHECK_H

#include "cusim.h"

#include <stdio.h>
#include <string>

namespace check {

struct Test {
    const char *claim;
    void (*run)();
};

inline int n_failed; // checks, in all tests

inline void that(bool holds, const char *what, const char *file, int line) {
    if (holds) return;
    printf("%s:%d: not true: %s\n", file, line, what);
    n_failed++;
}

/* Some error since the last call contains `text`; a test that provokes errors asks for them all. */
inline bool reported(const std::string &text) {
    const std::vector<std::string> errors = cusim::take_errors();
    for (const std::string &error : errors)
        if (error.find(text) != std::string::npos) return true;
    printf("no error says '%s'; there are %zu:\n", text.c_str(), errors.size());
    for (const std::string &error : errors) printf("    %s\n", error.c_str());
    return false;
}

template <size_t n> int run(const Test (&tests)[n]) {
    int n_passed = 0;
    for (const Test &test : tests) {
        const int before = n_failed;
        cusim::options = {};
        cusim::options.echo = false;
        test.run();
        for (const std::string &error : cusim::take_errors()) {
            printf("unexpected error: %s\n", error.c_str());
            n_failed++;
        }
        if (n_failed == before)
            n_passed++;
        else
            printf("FAILED: %s\n", test.claim);
    }
    printf("%d passed\n", n_passed);
    return n_passed == (int)n ? 0 : 1;
}

/* The orders in which a kernel must give the same. */
template <class F> void in_all_orders(F run) {
    using cusim::Order;
    const cusim::Options before = cusim::options;
    for (const Order order : {Order::forward, Order::reverse, Order::random})
        for (uint64_t seed = 1; seed <= (order == Order::random ? 4 : 1); seed++) {
            cusim::options.order = order;
            cusim::options.seed = seed;
            run();
        }
    cusim::options = before;
}

} // namespace check

#define CHECK(condition) check::that(condition, #condition, __FILE__, __LINE__)

#endif
