/* image.h: what a fat binary holds, read from its headers. Their form is not documented; this is
 * what the fat binaries of CUDA 12.9 and 13.0 have in common. */
#pragma once

#include <cuda.h>

namespace fakecuda {

/* Whether a driver of this version finds code for this compute capability in the image: a cubin
 * that serves it, or PTX that is not newer than the driver. `image` must be a fat binary;
 * cuModuleLoadData takes other things too, which pykvq never has. */
CUresult check_image(const void *image, int driver_version, int capability);

} // namespace fakecuda
