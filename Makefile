# pykvq: every task by name. `make` prints the list.
PYTHON ?= python3
CC ?= cc
VENV ?= .venv
BUILD ?= build

CFLAGS ?= -O2 -g
KVQ_CFLAGS = -std=c11 -D_GNU_SOURCE -fPIC -ffp-contract=off -fvisibility=hidden \
             -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Icore $(CFLAGS)
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

CORE = $(sort $(wildcard core/*.c core/kv/*.c core/isa/*.c))
HEADERS = $(wildcard core/*.h core/*.def core/*/*.h core/*/*.def core/*/*.inl tests/c/*.h)
TESTS_C = $(sort $(wildcard tests/c/*.c))
OBJECTS = $(CORE:%.c=$(BUILD)/%.o)

.PHONY: help lib test-c test-sanitize
help: ## print this list
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(BUILD)/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) -c $< -o $@

$(BUILD)/libkvq.a: $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

lib: $(BUILD)/libkvq.a ## build the core as a static library

$(BUILD)/tests_c: $(TESTS_C) $(BUILD)/libkvq.a $(HEADERS)
	$(CC) $(KVQ_CFLAGS) $(TESTS_C) $(BUILD)/libkvq.a -lm -lpthread -o $@

test-c: $(BUILD)/tests_c ## build and run the tests of the core
	$(BUILD)/tests_c
