/* source_place.h: numbers for places in the sources, known by program counter or by name. */
#ifndef CUSIM_SOURCE_PLACE_H
#define CUSIM_SOURCE_PLACE_H

#include "cusim.h"

namespace cusim {

/* The same number for the same place; less than 2^20 of them. */
uint32_t source_of(uintptr_t program_counter);
uint32_t source_of(Place at);

/* FILE:LINE, and for inlined code where it was inlined: "bytes.h:81 in cache.cu:40". */
const std::string &source_text(uint32_t source);

} // namespace cusim

#endif
