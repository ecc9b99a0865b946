# cuda.mk: building and checking the CUDA device; included by the Makefile.

# ---- kernels on the simulator -------------------------------------------------------------------
#
# A program is linked three times: o2, asan (AddressSanitizer and UBSan), race (the race detector).
# Objects of a variant lie below $(BUILD)/cuda/VARIANT, under the paths of their sources.

SIM = tests/cuda/sim
SIM_VARIANTS = o2 asan race
SIM_CXXFLAGS = -std=c++17 -fPIC -g -ffp-contract=off -Wall -Wextra $(WERROR) -Wshadow \
               -Wno-unknown-pragmas -DKVQ_SIM -Icore -Itests/cuda -I$(SIM) -I$(SIM)/include -MMD -MP
SIM_DEFECTS = 0 1 2 3 4 5 6 7 8 9 10 11
SIM_SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
CUDA_KERNELS = $(sort $(wildcard core/cuda/kernels/*.cu))

# Options of all C++ files, of kernel files besides, and of the linker. ASan guards static shared
# arrays only if it is told of their section. The race detector has the compiler's instrumentation
# call its own functions (libtsan is not linked), and memcpy and its like, which have none.
SIM_ALL_o2 = -O2
SIM_ALL_asan = -O1 $(SIM_SANITIZE) -fsanitize-sections=cusim_shared
SIM_ALL_race = -O2 -DKVQ_RACE
SIM_KERNEL_race = -O1 -fsanitize=thread -fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset
SIM_LINK_asan = $(SIM_SANITIZE)
OBJCOPY ?= objcopy
SIM_FINISH_race = $(OBJCOPY) $(foreach f,memcpy memmove memset,--redefine-sym $(f)=cusim_$(f)) $@
SIM_SOURCES = $(SIM)/cusim.cpp $(SIM)/fiber.cpp $(SIM)/tensor_core.cpp
SIM_MORE_race = $(SIM)/race.cpp $(SIM)/source_place.cpp $(SIM)/warp_cost.cpp

# Objects of a variant: $(call sim_objects,VARIANT,SOURCES)
sim_objects = $(patsubst %,$(BUILD)/cuda/$(1)/%.o,$(basename $(2)))
sim_runtime = $(call sim_objects,$(1),$(SIM_SOURCES) $(SIM_MORE_$(1)))

define SIM_RULES
$(BUILD)/cuda/$(1)/%.o: %.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(SIM_CXXFLAGS) $$(SIM_ALL_$(1)) -c $$< -o $$@

$(BUILD)/cuda/$(1)/%.o: %.c
	@mkdir -p $$(@D)
	$$(CC) $$(KVQ_CFLAGS) -Itests/cuda -MMD -MP $$(SIM_ALL_$(1)) -c $$< -o $$@

$(BUILD)/cuda/$(1)/%.o: %.cu
	@mkdir -p $$(@D)
	$$(CXX) $$(SIM_CXXFLAGS) $$(SIM_ALL_$(1)) $$(SIM_KERNEL_$(1)) -x c++ -c $$< -o $$@
	$$(SIM_FINISH_$(1))
endef
$(foreach variant,$(SIM_VARIANTS),$(eval $(call SIM_RULES,$(variant))))

# A test of kernels is tests/cuda/test_X.cpp, run by `make cuda-X`. It is linked with all kernels, or
# with those that CUDA_KERNELS_X names (without .cu); with the files of tests/cuda that CUDA_SOURCES_X
# names; and with the core. Kernels come first: of an inline function that several objects have, the
# instrumented one is taken. Its argument is the variant, so that it can do less where that is slow.
CUDA_KERNELS_attend = attend decode merge
CUDA_KERNELS_cache = cache merge
CUDA_KERNELS_weights = elementwise gemm matvec
CUDA_SOURCES_attend = attend_case.c

CUDA_TESTS = $(patsubst tests/cuda/test_%.cpp,%,$(sort $(wildcard tests/cuda/test_*.cpp)))
cuda_test_sources = $(or $(CUDA_KERNELS_$(1):%=core/cuda/kernels/%.cu),$(CUDA_KERNELS)) \
                    tests/cuda/test_$(1).cpp $(CUDA_SOURCES_$(1):%=tests/cuda/%)

define CUDA_TEST_RULES
$(BUILD)/cuda/$(1)/test_$(2): $(call sim_objects,$(1),$(call cuda_test_sources,$(2))) \
                              $(call sim_runtime,$(1)) $(BUILD)/libkvq.a
	$$(CXX) -g $$(SIM_LINK_$(1)) $$^ $$(LIBS) -o $$@

.PHONY: cuda-$(2)-$(1)
cuda-$(2)-$(1): $(BUILD)/cuda/$(1)/test_$(2)
	$$< $(1)
endef
$(foreach test,$(CUDA_TESTS),$(foreach variant,$(SIM_VARIANTS),\
	$(eval $(call CUDA_TEST_RULES,$(variant),$(test)))))

.PHONY: cuda-kernels $(CUDA_TESTS:%=cuda-%)
cuda-kernels: $(CUDA_TESTS:%=cuda-%) ## test the CUDA kernels on the simulator, also under sanitizers and for races
$(CUDA_TESTS:%=cuda-%): cuda-%: $(SIM_VARIANTS:%=cuda-\%-%)

# Those that multiply on tensor cores, with sums that are cut off as such cores do (cusim.h, Mma).
.PHONY: cuda-truncating
cuda-truncating: $(BUILD)/cuda/o2/test_attend $(BUILD)/cuda/o2/test_weights ## test the CUDA kernels with sums as tensor cores make them
	@for program in $^; do CUSIM_MMA=truncating $$program truncating || exit 1; done

# ---- the simulator itself -----------------------------------------------------------------------

# Its unit tests hold kernels, so they are compiled like kernel files.
SIM_UNITS = $(SIM)/test_cusim $(SIM)/test_race
$(SIM_UNITS:%=$(BUILD)/cuda/race/%.o): $(BUILD)/cuda/race/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) $(SIM_ALL_race) $(SIM_KERNEL_race) -c $< -o $@
	$(SIM_FINISH_race)

define SIM_TEST_RULES
$(BUILD)/cuda/$(1)/test_cusim: $(BUILD)/cuda/$(1)/$(SIM)/test_cusim.o $(call sim_runtime,$(1))
	$$(CXX) -g $$(SIM_LINK_$(1)) $$^ $$(LIBS) -o $$@

$(SIM_DEFECTS:%=$(BUILD)/cuda/$(1)/defect_%.o): $(BUILD)/cuda/$(1)/defect_%.o: $(SIM)/defects.cu
	@mkdir -p $$(@D)
	$$(CXX) $$(SIM_CXXFLAGS) $$(SIM_ALL_$(1)) $$(SIM_KERNEL_$(1)) -DDEFECT=$$* -x c++ -c $$< -o $$@
	$$(SIM_FINISH_$(1))

$(BUILD)/cuda/$(1)/test_defects: $(SIM_DEFECTS:%=$(BUILD)/cuda/$(1)/defect_%.o) \
                                 $(BUILD)/cuda/$(1)/$(SIM)/test_defects.o $(call sim_runtime,$(1))
	$$(CXX) -g $$(SIM_LINK_$(1)) $$^ $$(LIBS) -o $$@
endef
$(foreach variant,$(SIM_VARIANTS),$(eval $(call SIM_TEST_RULES,$(variant))))

$(BUILD)/cuda/race/test_race: $(BUILD)/cuda/race/$(SIM)/test_race.o $(call sim_runtime,race)
	$(CXX) -g $^ $(LIBS) -o $@

# The fibers of processors that have no switch of their own, on this one.
$(BUILD)/cuda/ucontext/test_cusim: $(SIM)/test_cusim.cpp $(SIM_SOURCES) \
                                   $(wildcard $(SIM)/*.h $(SIM)/include/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) -O1 -DCUSIM_UCONTEXT $(filter %.cpp,$^) $(LIBS) -o $@

.PHONY: sim-test sim-defects
sim-test: $(SIM_VARIANTS:%=$(BUILD)/cuda/%/test_cusim) $(BUILD)/cuda/ucontext/test_cusim \
          $(BUILD)/cuda/race/test_race ## test the simulator that runs CUDA kernels on the CPU
	@for program in $^; do echo $$program; $$program || exit 1; done

sim-defects: $(SIM_VARIANTS:%=$(BUILD)/cuda/%/test_defects) ## show that each checker of CUDA kernels finds its defects
	@for variant in $(SIM_VARIANTS); do \
		echo $(BUILD)/cuda/$$variant/test_defects; $(BUILD)/cuda/$$variant/test_defects $$variant || exit 1; done

# ---- a stand-in for the driver ------------------------------------------------------------------
#
# libcuda.so.1 on the simulator, with all kernels: tests/cuda/fake/fakecuda.h. KVQ_LIBCUDA names it.
# NVIDIA's cuda.h, which every nvcc brings, checks its signatures, and those of cuda_api.def.

FAKE = tests/cuda/fake
FAKE_CUDA = $(BUILD)/cuda/fake/libcuda.so.1
FAKE_CUDA_SOURCES = $(sort $(wildcard $(FAKE)/*.cpp $(FAKE)/*.cu))
CUDA_INCLUDE = $(shell $(NVCC) -dryrun -x cu -c /dev/null -o /dev/null 2>&1 | \
                 sed -n 's/.* INCLUDES="-I\([^"]*\)".*/\1/p')

FAKE_STATIC_SHARED = $(BUILD)/cuda/fake/static_shared.inc

$(FAKE_STATIC_SHARED): tests/cuda/resources.txt
	@mkdir -p $(@D)
	awk '/^kvq_cuda_/ { printf "{\"%s\", %s},\n", $$1, $$(NF - 2) }' $< >$@

$(call sim_objects,o2,$(FAKE_CUDA_SOURCES)): SIM_CXXFLAGS += -isystem $(CUDA_INCLUDE) \
                                                             -I$(BUILD)/cuda/fake
$(call sim_objects,o2,$(FAKE)/libcuda_kernels.cpp): $(FAKE_STATIC_SHARED)
$(FAKE_CUDA): $(call sim_objects,o2,$(CUDA_KERNELS) $(FAKE_CUDA_SOURCES) $(SIM_SOURCES)) \
              $(FAKE)/exports.map
	@mkdir -p $(@D)
	$(CXX) -shared -Wl,-soname,libcuda.so.1 -Wl,--version-script=$(FAKE)/exports.map \
		$(filter %.o,$^) -o $@

$(BUILD)/cuda/fake/libcuda_old.so: $(FAKE)/old_libcuda.c
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) -fvisibility=default -shared $< -o $@

# Its images are those of fake_images.c, so those of the core stay in the archive.
$(BUILD)/cuda/test_driver: tests/cuda/test_driver.c tests/cuda/fake_images.c $(BUILD)/libkvq.a \
                           $(FAKE)/fakecuda.h $(FAKE)/probe_args.h tests/c/test.h
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) -Itests/c -Itests/cuda $(filter %.c %.a,$^) $(LIBS) -o $@

# With the images of the core: without them it fails.
$(BUILD)/cuda/test_session: tests/cuda/test_session.c $(BUILD)/libkvq.a tests/c/test.h
	@mkdir -p $(@D)
	$(CC) $(KVQ_CFLAGS) -Itests/c $(filter %.c %.a,$^) $(LIBS) -o $@

.PHONY: cuda-driver
cuda-driver: $(BUILD)/cuda/test_driver $(BUILD)/cuda/test_session $(FAKE_CUDA) \
             $(BUILD)/cuda/fake/libcuda_old.so ## test how the core uses the CUDA driver, on the stand-in
	$< $(abspath $(FAKE_CUDA)) $(abspath $(BUILD)/cuda/fake/libcuda_old.so)
	KVQ_LIBCUDA=$(abspath $(FAKE_CUDA)) $(BUILD)/cuda/test_session $(BUILD)/cuda/random.gguf

# ---- sessions on the stand-in -------------------------------------------------------------------
#
# The CUDA device behind the Python package. A process loads one driver in its life, so these run in
# one that has the stand-in; elsewhere they skip. An extension without kernels fails them. The tests
# of sessions and models run there too: PYKVQ_TEST_DEVICE says where tests/conftest.py opens models.

CUDA_PYTHON = tests/test_cuda_device.py tests/test_cuda_session.py tests/test_cuda_faults.py \
              tests/test_cancelled_pass.py \
              $(patsubst %,tests/test_%.py,session generation observe_simulate model perplexity \
              cli cli_kv)

.PHONY: cuda-python
cuda-python: ext $(FAKE_CUDA) $(VENV)/.ready-dev ## test sessions on the CUDA device, on the stand-in
	KVQ_LIBCUDA=$(abspath $(FAKE_CUDA)) PYKVQ_TEST_DEVICE=cuda $(PY) -m pytest $(CUDA_PYTHON)

# ---- what kernels take of a GPU -----------------------------------------------------------------

.PHONY: cuda-resources cuda-resources-write
cuda-resources: $(CUDA_13) ## compare registers and memory of the kernels with tests/cuda/resources.txt
	$(PY) tests/cuda/resources.py $(CUDA)/13 tests/cuda/resources.txt

cuda-resources-write: $(CUDA_13) ## write tests/cuda/resources.txt by the kernels as they are
	$(PY) tests/cuda/resources.py $(CUDA)/13 tests/cuda/resources.txt --write

# ---- their machine code ------------------------------------------------------------------------

CUDA_BINARY_TOOLS = $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin

$(VENV)/.ready-cuda-sass: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check nvidia-cuda-cuobjdump==13.5.37 \
		nvidia-cuda-nvdisasm==13.5.37
	@touch $@

.PHONY: cuda-sass
cuda-sass: $(CUDA_13) $(CUDA_12) $(VENV)/.ready-cuda-sass ## check the machine code of the kernels: tensor cores used, no local memory
	$(PY) tests/cuda/sass.py $(CUDA)/13 $(CUDA)/12 --tools $$(echo $(CUDA_BINARY_TOOLS))

# ---- PTX ----------------------------------------------------------------------------------------

.PHONY: cuda-ptx
cuda-ptx: ext $(FAKE_CUDA) $(VENV)/.ready-dev $(VENV)/.ready-cuda-12 ## test the PTX that nvcc and NVRTC make of the kernels, on the interpreter
	$(PY) -m pytest $(CUDA_PTX_TESTS) tests/test_cuda_cost.py tests/test_gpu_check.py tests/test_devices.py

# ---- all of it ----------------------------------------------------------------------------------

# nvcc is looked for when make starts, so the rest runs in a make of its own; and the extension comes
# after the images, to embed them. JOBS of it run side by side, the longest first.
JOBS ?= $(shell nproc)

.PHONY: test-cuda
ifeq ($(shell uname -s),Linux)
test-cuda: $(VENV)/.ready-dev $(if $(NVCC),,cuda-toolkit) ## build the CUDA kernels and run all their tests; no GPU is needed
	$(MAKE) --no-print-directory -j$(JOBS) -Otarget $(CUDA_13)
	$(MAKE) --no-print-directory ext
	$(MAKE) --no-print-directory -j$(JOBS) -Otarget cuda-python cuda-ptx cuda-kernels \
		cuda-truncating cuda-driver cuda-resources sim-test sim-defects
else
test-cuda:
	@echo "test-cuda is skipped: nvcc and the simulator's tools are for Linux."
endif

-include $(shell find $(BUILD)/cuda -name '*.d' 2>/dev/null)
