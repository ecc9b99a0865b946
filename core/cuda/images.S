/* images.S: the kernels as `make cuda` built them, for every module of kernels.def and each toolkit
 * (13, 12) that KVQ_CUDA_IMAGES_13 and KVQ_CUDA_IMAGES_12 say there are files of:
 *
 *     kvq_cuda_image_13_X: the bytes of 13/X.fatbin, looked for in the assembler's folders
 *     kvq_cuda_bytes_13_X: how many they are, 8 bytes; 0 if there is no file
 */
#if defined(__APPLE__)
#define SYMBOL(name) _##name
#define HIDDEN .private_extern
    .section __TEXT,__const
#elif defined(_WIN32)
#define SYMBOL(name) name
#define HIDDEN .globl
    .section .rdata,"dr"
#else
#define SYMBOL(name) name
#define HIDDEN .hidden
    .section .rodata
#endif

.macro embed toolkit, module, is_there
    .balign 64
    .globl SYMBOL(kvq_cuda_image_\toolkit\()_\module)
    .globl SYMBOL(kvq_cuda_bytes_\toolkit\()_\module)
    HIDDEN SYMBOL(kvq_cuda_image_\toolkit\()_\module)
    HIDDEN SYMBOL(kvq_cuda_bytes_\toolkit\()_\module)
SYMBOL(kvq_cuda_image_\toolkit\()_\module):
    .if \is_there
    .incbin "\toolkit/\module\().fatbin"
    .endif
0:
    .balign 8
SYMBOL(kvq_cuda_bytes_\toolkit\()_\module):
    .quad 0b - SYMBOL(kvq_cuda_image_\toolkit\()_\module)
.endm

#define KVQ_CUDA_KERNEL(module, name)
#define KVQ_CUDA_MODULE(module) embed 13, module, KVQ_CUDA_IMAGES_13
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE
#define KVQ_CUDA_MODULE(module) embed 12, module, KVQ_CUDA_IMAGES_12
#include "cuda/kernels.def"

#if defined(__linux__)
    .section .note.GNU-stack,"",%progbits
#endif
