// stream.cpp: see stream.h.
#include "stream.h"

#include <utility>

void CUstream_st::push(fakecuda::Work work) {
    if (capturing) {
        captured.push_back(std::move(work));
    } else {
        queue.push_back(std::move(work));
    }
}

CUresult CUstream_st::drain(fakecuda::Memory &memory, const std::function<bool()> &until) {
    if (!queue.empty()) {
        const fakecuda::Memory::Opened opened(memory);
        while (!queue.empty() && !(until && until())) {
            const fakecuda::Work work = std::move(queue.front());
            queue.pop_front();
            const CUresult result = context->spoiled ? context->spoiled : work();
            if (result != CUDA_SUCCESS) context->spoiled = result;
        }
    }
    return context->spoiled;
}
