/* map.h: a whole file as read-only memory.
 *
 * Owns the mapping and what differs between systems; knows nothing of the contents. Leaf: called by
 * gguf.c. The system gives no protection against a file that is cut while it is mapped.
 */
#ifndef KVQ_MAP_H
#define KVQ_MAP_H

#include "base.h"

typedef struct kvq_map {
    const uint8_t *data; /* begins on a page boundary; NULL if nothing is mapped */
    size_t bytes;        /* at least 1 */
} kvq_map;

/* Maps the regular, non-empty file at `path` (UTF-8). `label` is how the error sentence calls it.
 * On failure *out is left as it was. */
kvq_status kvq_map_open(kvq_map *out, const char *path, const char *label);
void kvq_map_close(kvq_map *map); /* takes an empty map, and leaves one */

#endif
