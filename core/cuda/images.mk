# images.mk: the CUDA kernels, built for images.S to embed; included by the Makefile.
#
# `make cuda` builds them: for each module of kernels.def 13/X.fatbin by nvcc 13, and 12/X.fatbin by
# NVRTC 12.9 (build_image_12.py) for drivers of the CUDA 12 line. It takes minutes, so nothing else
# asks for it; but what was built is embedded wherever the core is linked, and kept up to date. All
# files of an image, or none.
CUDA = $(BUILD)/cuda
CUDA_MODULES := $(shell sed -n 's/^KVQ_CUDA_MODULE(\(.*\))$$/\1/p' core/cuda/kernels.def)
CUDA_13 = $(CUDA_MODULES:%=$(CUDA)/13/%.fatbin)
CUDA_12 = $(CUDA_MODULES:%=$(CUDA)/12/%.fatbin)
CUDA_IMAGES := $(if $(filter-out $(wildcard $(CUDA_13)),$(CUDA_13)),,13) \
               $(if $(filter-out $(wildcard $(CUDA_12)),$(CUDA_12)),,12)

# That of PyPI (`make cuda-toolkit`) serves where there is no other.
ifndef NVCC
NVCC := $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc \
          $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc))
endif
CUDA_CUBINS = 75 80 86 87 89 90 100 110 120
CUDA_PTX = 75 80
CUDA_FLAGS = -std=c++14 -O3 -Icore --threads 1 -Werror all-warnings,cross-execution-space-call \
             -Xcompiler -Wall,-Wextra -Xptxas -v,-warn-spills,-warn-lmem-usage,-Werror
# Of a module: blocks have the same bytes as on the CPU only if products are not fused into sums, be
# it in the encoders or in RoPE, whose keys they take.
CUDA_FLAGS_cache = -fmad=false
CUDA_FLAGS_elementwise = -fmad=false
# Every driver that takes this image knows the smallest form.
CUDA_CODE = --compress-mode=size \
            $(foreach a,$(CUDA_CUBINS),-gencode arch=compute_$a,code=sm_$a) \
            $(foreach a,$(CUDA_PTX),-gencode arch=compute_$a,code=compute_$a)

.PHONY: cuda cuda-toolkit cuda-embedded cuda-flags

cuda: ## build the CUDA kernels, which `make ext` then embeds (minutes; needs nvcc 13)
ifeq ($(NVCC),)
	@echo "No CUDA kernels are built: nvcc is neither in PATH nor in /usr/local/cuda/bin" \
		"(make cuda-toolkit fetches it from PyPI)."
else
	$(MAKE) --no-print-directory $(CUDA_13) $(CUDA_12)
endif

# Changes when flags do.
CUDA_ALL_FLAGS = $(CUDA_FLAGS) $(foreach m,$(CUDA_MODULES),$(CUDA_FLAGS_$m)) $(CUDA_CODE)
$(CUDA)/flags: cuda-flags
	@mkdir -p $(@D)
	@echo '$(CUDA_ALL_FLAGS)' | cmp -s - $@ || echo '$(CUDA_ALL_FLAGS)' >$@

# What ptxas says of registers and memory is kept beside the image, for tests/cuda/resources.py.
$(CUDA)/13/%.fatbin: core/cuda/kernels/%.cu $(CUDA)/flags
	@mkdir -p $(@D)
	@test -n "$(NVCC)" || { echo "$@ is older than its sources, but there is no nvcc to build it:" \
		"remove $(CUDA)/13 to go on without."; exit 1; }
	$(NVCC) $(CUDA_FLAGS) $(CUDA_FLAGS_$*) $(CUDA_CODE) -fatbin -MMD -MP -MF $(@:.fatbin=.d) -o $@ $< \
		2>$(@:.fatbin=.ptxas) || { cat $(@:.fatbin=.ptxas); exit 1; }

$(CUDA)/12/%.fatbin: core/cuda/kernels/%.cu core/cuda/build_image_12.py $(VENV)/.ready-cuda-12
	@mkdir -p $(@D)
	$(PY) core/cuda/build_image_12.py $(if $(CUDA_FLAGS_$*),--option=-$(CUDA_FLAGS_$*)) $< $@

-include $(wildcard $(CUDA)/1[23]/*.d)

$(VENV)/.ready-cuda-12: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check nvidia-cuda-nvrtc-cu12==12.9.86 \
		nvidia-nvfatbin-cu12==12.9.82 nvidia-cuda-runtime-cu12==12.9.79
	@touch $@

cuda-toolkit: $(VENV)/.ready ## fetch nvcc 13.0 from PyPI into the virtual environment (280 MB)
	$(PY) -m pip install -q --disable-pip-version-check 'nvidia-cuda-nvcc==13.0.*' \
		'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*'

# Changes when images come or go.
$(CUDA)/embedded: cuda-embedded
	@mkdir -p $(@D)
	@echo $(CUDA_IMAGES) | cmp -s - $@ || echo $(CUDA_IMAGES) >$@

$(BUILD)/core/cuda/images.o: core/cuda/images.S core/cuda/kernels.def $(CUDA)/embedded \
                             $(foreach i,$(CUDA_IMAGES),$(CUDA_$i))
	@mkdir -p $(@D)
	$(CC) -Icore -Wa,-I$(CUDA) -c $< -o $@ \
		$(foreach i,13 12,-DKVQ_CUDA_IMAGES_$i=$(words $(filter $i,$(CUDA_IMAGES))))
	@test -n "$(strip $(CUDA_IMAGES))" || \
		echo "This build has no CUDA kernels and runs on the CPU alone: make cuda builds them."
