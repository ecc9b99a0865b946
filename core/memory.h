/* memory.h: how much memory this process may take. kvq.h declares kvq_memory_available. */
#ifndef KVQ_MEMORY_H
#define KVQ_MEMORY_H

#include "base.h"

/* kvq_memory_available() by the files of Linux below `root`; "" stands for those of the system. */
uint64_t kvq_memory_available_below(const char *root);

#endif
