/* cpu.h: what the core asks of the machine. */
#ifndef KVQ_CPU_H
#define KVQ_CPU_H

int kvq_cpu_count(void); /* online processors */

/* Bytes that can be had without paging: free memory and what the system holds as a cache of files;
 * the whole memory where the system does not tell. */
double kvq_memory_available(void);

#endif
