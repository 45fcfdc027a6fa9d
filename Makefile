# attn.cpp. `make help` lists what can be made.
#
# Settings, on the command line or in the environment:
#   ATTENTION=causal      for make run: causal, infini, lightning, mla, or a pattern such as "lightning*3,causal"
#   RUN_ARGS=             for make run: further options of ./train_gpt2 train, e.g. RUN_ARGS="--steps 5000"
#   CXX=g++               a C++17 compiler with OpenMP
#   CBLAS=openblas        pkg-config's name of a CBLAS (openblas, mkl-dynamic-lp64-iomp, blis); none: the built-in matrix product
#   ARCH=native           the processor to compile for (-march)
#   CUDA_ARCH=            GPUs to compile for, e.g. "80 90a"; default: the one that is here, or these two
#   NVCC=nvcc             the CUDA compiler, 12 or newer
#   NVCC_OPT=-O3          how far it optimises
#   REFERENCE_OPT=        how far gpu_tests optimises the CPU's trainer; default: as that is
#   SECONDS=600           for make fuzz: how long each target runs
ATTENTION ?= causal
RUN_ARGS  ?=
ifeq ($(origin CXX),default)
CXX       := g++
endif
ARCH      ?= native
export CXX CBLAS

WARNINGS := -Wall -Wextra -Werror
# Fast math for vectorised sums; but finite checks must see infinities and NaN.
FAST     := -O3 -march=$(ARCH) -ffast-math -fno-finite-math-only
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
FAST     += -mprefer-vector-width=512  # the compiler's own default keeps to half of AVX-512's width
endif
BASE      = -std=c++17 -fopenmp $(WARNINGS) -I. -MMD -MP $(shell CBLAS='$(CBLAS)' dev/blas.sh cflags; pkg-config --cflags libpcre2-8)
LIBS      = $(shell CBLAS='$(CBLAS)' dev/blas.sh libs)
PCRE2     = $(shell pkg-config --libs libpcre2-8)
ASAN     := -O1 -g -march=$(ARCH) -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -DARENA_DEBUG
B        := build

# CUDA.
NVCC      ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc),nvcc)
FOUND_ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sed 's/^90$$/90a/' | sort -u)
CUDA_ARCH ?= $(or $(FOUND_ARCH),80 90a)
GENCODE    = $(foreach a,$(CUDA_ARCH),-gencode=arch=compute_$(a),code=sm_$(a))
NVCC_OPT  ?= -O3
REFERENCE_OPT ?= $(FAST)
NVCCFLAGS  = -std=c++17 $(NVCC_OPT) -DNO_CBLAS -I. -MMD -MP --threads 2 -Xcudafe --display_error_number -Xcompiler -fopenmp,-Wall,-Wextra,-Werror $(GENCODE)
CUDA_LIBS  = -lcublasLt -lgomp -ldl $(PCRE2)
CU        := $(B)/cuda
LADDERS   := $(patsubst dev/cuda/%.cu,$(CU)/%,$(wildcard dev/cuda/*.cu))

.DEFAULT_GOAL := help
.PHONY: FORCE help run test bench asan fuzz format deps check-deps check-nvcc clean corpus sabotage references test-gpu bench-gpu ladder ladders profile
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z_0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo; sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' Makefile

run: check-deps  ## build, make the corpus, train a small GPT (ATTENTION=causal|infini|lightning|mla|pattern), show what it learnt
	@$(MAKE) --no-print-directory -j2 train_gpt2 corpus
	@dev/run.sh "$(ATTENTION)" $(RUN_ARGS)

TESTS := $(B)/unit_tests $(B)/program_unit_tests $(B)/data_tests $(B)/fuzz_replay $(B)/tokenizer_tests $(B)/exchange_tests $(B)/test_stories $(B)/layer_tests_f64 $(B)/layer_tests $(B)/generate_tests test_gpt2

SECONDS ?= 600
FUZZ    := $(patsubst dev/fuzz/fuzz_%.cpp,%,$(wildcard dev/fuzz/fuzz_*.cpp))

test: check-deps  ## prove every layer, parser and option; the last line counts
	@$(MAKE) --no-print-directory -j2 train_gpt2 tokenize $(B)/stories $(TESTS)
	@dev/test/run_tests.sh $(TESTS) dev/test/program_tests.sh dev/test/tokenize_tests.sh dev/test/get_tests.sh

bench: check-deps  ## GPT-2 124M on this CPU: milliseconds a step, and the ratio to its matrix products alone
	@$(MAKE) --no-print-directory $(B)/bench
	@$(B)/bench

asan: check-deps  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory -j2 $(B)/asan/train_gpt2 $(B)/asan/tokenize $(B)/stories $(addprefix $(B)/asan/,$(notdir $(TESTS)))
	@TRAIN_GPT2=$(B)/asan/train_gpt2 TOKENIZE=$(B)/asan/tokenize dev/test/run_tests.sh $(addprefix $(B)/asan/,$(notdir $(TESTS))) dev/test/program_tests.sh dev/test/tokenize_tests.sh dev/test/get_tests.sh

fuzz: $(addprefix fuzz-,$(FUZZ))  ## every parser under random input, SECONDS each (dev/fuzz); fuzz-NAME: one of them; -j2: two at a time
fuzz-%: $(B)/fuzz/%
	@mkdir -p $(B)/fuzz/found/$*
	@$< -max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=4096 -print_funcs=0 -artifact_prefix=$(B)/fuzz/$*- $(B)/fuzz/found/$* dev/fuzz/corpus/$* \
	    >$(B)/fuzz/$*.log 2>&1 && echo "$*: $$(tail -n 1 $(B)/fuzz/$*.log)" || { tail -n 40 $(B)/fuzz/$*.log; exit 1; }

sabotage: check-deps  ## delete or negate each gradient statement in turn, and see the tests fail (half an hour)
	@dev/test/sabotage.sh

train_gpt2cu: check-nvcc $(CU)/train_gpt2_bf16.o $(CU)/train_gpt2_float32.o $(B)/program.o  ## the trainer for NVIDIA GPUs
	$(NVCC) $(GENCODE) $(filter %.o,$^) -o $@ $(CUDA_LIBS)
test_gpt2cu: check-nvcc $(CU)/test_gpt2.o $(CU)/train_gpt2_bf16.o $(CU)/train_gpt2_float32.o $(B)/program.o  ## test_gpt2 for the GPU's trainer
	$(NVCC) $(GENCODE) $(filter %.o,$^) -o $@ $(CUDA_LIBS)

test-gpu: train_gpt2 train_gpt2cu test_gpt2cu $(CU)/gpu_tests $(CU)/generate_tests  ## on a GPU: the reference outputs, and the GPU's trainer against the CPU's
	@dev/test/run_tests.sh test_gpt2cu $(CU)/gpu_tests $(CU)/generate_tests dev/test/gpu_program_tests.sh

ladders: check-nvcc $(LADDERS)  ## build every kernel's ladder (dev/cuda), into build/cuda
ladder: ladders  ## on a GPU: check and time every version of every kernel, and write the tables into dev/cuda/README.md
	@dev/cuda/ladder.sh $(LADDERS)

bench-gpu: check-nvcc $(CU)/bench  ## on a GPU: milliseconds a step of GPT-2 124M, 350M, 1558M, and over lengths up to 131072
	@$(CU)/bench
	@$(CU)/bench lengths

profile: train_gpt2cu  ## on a GPU: where the milliseconds of a training step go, by kernel family (Nsight Compute)
	@dev/cuda/profile.sh

references:  ## write dev/reference/outputs again (needs PyTorch)
	cd dev/reference && python3 make_references.py && python3 exchange.py fixtures

format:  ## clang-format over the sources
	clang-format -i *.cpp *.h *.cu *.cuh gpt2/*.h gpt2/*.cpp gpt2/cpu/*.h gpt2/cuda/*.cuh data/*.cpp dev/*/*.cpp dev/cuda/*.cu dev/cuda/*.h

deps:  ## install what the build needs (as root, or after asking)
	@dev/deps.sh install

check-deps:
	@dev/deps.sh check

clean:  ## remove what was built; runs and corpora stay
	rm -rf $(B) train_gpt2 test_gpt2 train_gpt2cu test_gpt2cu tokenize

# ---- programs ------------------------------------------------------------------------------------------------------------------------------------
# The program around the trainers (options, training loop, files) does not compute: compiled apart, without -O3, it builds beside the trainer.

train_gpt2: $(B)/train_gpt2.o $(B)/program.o  ## the trainer
	$(CXX) -fopenmp $^ -o $@ $(LIBS) $(PCRE2)
test_gpt2: $(B)/test_gpt2.o  ## the trainer against the reference outputs
	$(CXX) -fopenmp $^ -o $@ $(LIBS) $(PCRE2)
$(B)/%: $(B)/%.o
	$(CXX) -fopenmp $^ -o $@ $(LIBS) $(PCRE2)
tokenize: $(B)/tokenize.o  ## texts to token shards and back, and vocabularies of one's own
	$(CXX) -fopenmp $^ -o $@ $(PCRE2)

$(B)/train_gpt2.o: train_gpt2.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/test_gpt2.o: test_gpt2.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/program.o: gpt2/program.cpp | $(B)
	$(CXX) $(BASE) -O1 -c $< -o $@
$(B)/bench.o: dev/cpu/bench.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/tokenize.o: data/tokenize.cpp | $(B)
	$(CXX) $(BASE) -O3 -march=$(ARCH) -c $< -o $@
$(B)/stories.o: data/stories.cpp | $(B)
	$(CXX) $(BASE) -O2 -c $< -o $@
$(B)/test_stories.o: data/test_stories.cpp | $(B)
	$(CXX) $(BASE) -O1 -c $< -o $@
$(B)/layer_tests.o: dev/test/layer_tests.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -O2 -c $< -o $@
$(B)/generate_tests.o: dev/test/generate_tests.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -O2 -c $< -o $@
$(B)/tokenizer_tests.o: dev/test/tokenizer_tests.cpp | $(B)
	$(CXX) $(BASE) -O1 -c $< -o $@
# float64, and without a BLAS: our own product gives the same bits for any number of threads, so that the layers can be asked for it too
$(B)/layer_tests_f64.o: dev/test/layer_tests.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -O2 -DREAL=double -DNO_CBLAS -c $< -o $@
$(B)/%.o: dev/test/%.cpp | $(B)
	$(CXX) $(BASE) -O0 -c $< -o $@

# For NVIDIA GPUs: the trainer is compiled once for each working type, and both stand in one program.
check-nvcc:
	@command -v $(NVCC) >/dev/null || { echo "error: no CUDA compiler: install the CUDA toolkit, 12 or newer (https://developer.nvidia.com/cuda-downloads), or give NVCC=/path/to/nvcc; the CPU's trainer is: make train_gpt2" >&2; exit 1; }
	@echo "compiling for GPUs of compute capability: $(CUDA_ARCH)$(if $(FOUND_ARCH),, (none is here))"
$(CU)/train_gpt2_bf16.o: train_gpt2.cu | $(CU)
	$(NVCC) $(NVCCFLAGS) -c $< -o $@
$(CU)/train_gpt2_float32.o: train_gpt2.cu | $(CU)
	$(NVCC) $(NVCCFLAGS) -DGPU_FLOAT32 -c $< -o $@
$(CU)/test_gpt2.o: test_gpt2.cpp | $(CU)
	$(CXX) $(BASE) -O1 -DTEST_GPU -c $< -o $@
$(CU)/gpu_tests.o: dev/test/gpu_tests.cpp | $(CU)
	$(CXX) $(BASE) $(REFERENCE_OPT) -DNO_CBLAS -c $< -o $@
$(CU)/generate_tests.o: dev/test/generate_tests.cpp | $(CU)
	$(CXX) $(BASE) -O1 -DTEST_GPU -c $< -o $@
$(CU)/gpu_tests $(CU)/generate_tests: $(CU)/%: $(CU)/%.o $(CU)/train_gpt2_bf16.o $(CU)/train_gpt2_float32.o $(B)/program.o
	$(NVCC) $(GENCODE) $^ -o $@ $(CUDA_LIBS)
$(CU)/bench.o: dev/cuda/bench.cpp | $(CU)
	$(NVCC) $(NVCCFLAGS) -c $< -o $@
$(CU)/bench: $(CU)/bench.o $(CU)/train_gpt2_bf16.o $(CU)/train_gpt2_float32.o $(B)/program.o
	$(NVCC) $(GENCODE) $(filter %.o,$^) -o $@ $(CUDA_LIBS)
$(CU)/%: dev/cuda/%.cu | $(CU)
	$(NVCC) $(NVCCFLAGS) $< -o $@ $(CUDA_LIBS)

# The same under the sanitizers.
$(B)/asan/train_gpt2: $(B)/asan/train_gpt2.o $(B)/asan/program.o
	$(CXX) $(ASAN) -fopenmp $^ -o $@ $(LIBS) $(PCRE2)
$(B)/asan/%: $(B)/asan/%.o
	$(CXX) $(ASAN) -fopenmp $^ -o $@ $(LIBS) $(PCRE2)
$(B)/asan/%.o: %.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -c $< -o $@
$(B)/asan/%.o: gpt2/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -c $< -o $@
$(B)/asan/%.o: data/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -c $< -o $@
$(B)/asan/layer_tests_f64.o: dev/test/layer_tests.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -DREAL=double -DNO_CBLAS -c $< -o $@
$(B)/asan/program.o: gpt2/program.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -O0 -c $< -o $@
$(addprefix $(B)/asan/,unit_tests.o program_unit_tests.o tokenizer_tests.o data_tests.o fuzz_replay.o exchange_tests.o): $(B)/asan/%.o: dev/test/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -O0 -c $< -o $@
$(B)/asan/%.o: dev/test/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -c $< -o $@

# Fuzz targets: with libFuzzer where clang++ has it, else with dev/fuzz/driver.cpp.
LIBFUZZER = echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' | clang++ -x c++ -fsanitize=fuzzer - -o /dev/null
$(B)/fuzz/%: dev/fuzz/fuzz_%.cpp dev/fuzz/driver.cpp | $(B)/fuzz
	@if $(LIBFUZZER) 2>/dev/null; then \
	    echo "$@: libFuzzer"; \
	    clang++ $(filter-out -fopenmp,$(BASE)) -Wno-unknown-pragmas $(ASAN) -fsanitize=fuzzer $< -o $@ $(LIBS) $(PCRE2); \
	else \
	    echo "$@: dev/fuzz/driver.cpp"; \
	    $(CXX) $(BASE) $(ASAN) -fsanitize-coverage=trace-pc -c $< -o $@.o && \
	    $(CXX) -std=c++17 -fopenmp $(WARNINGS) $(ASAN) dev/fuzz/driver.cpp $@.o -o $@ $(LIBS) $(PCRE2); \
	fi

$(B) $(B)/asan $(B)/fuzz $(CU):
	@mkdir -p $@

# Other settings than last time: everything is built again.
SETTINGS = $(CXX) $(BASE) $(FAST) $(ASAN) $(LIBS)
$(B)/settings: FORCE | $(B)
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@
$(CU)/settings: FORCE | $(CU)
	@echo '$(NVCC) $(NVCCFLAGS) $(REFERENCE_OPT)' | cmp -s - $@ || echo '$(NVCC) $(NVCCFLAGS) $(REFERENCE_OPT)' > $@
$(addprefix $(CU)/,train_gpt2_bf16.o train_gpt2_float32.o bench.o gpu_tests.o) $(LADDERS): $(CU)/settings
$(addprefix $(CU)/,test_gpt2.o gpu_tests.o generate_tests.o): $(B)/settings
FORCE:
OBJECTS := $(addprefix $(B)/,$(addsuffix .o,train_gpt2 test_gpt2 program bench tokenize tokenizer_tests stories test_stories layer_tests layer_tests_f64 generate_tests unit_tests program_unit_tests data_tests fuzz_replay exchange_tests))
$(OBJECTS) $(patsubst $(B)/%,$(B)/asan/%,$(OBJECTS)): $(B)/settings

# ---- the corpus: our own stories (data/stories.cpp) -----------------------------------------------------------------------------------------------

corpus: data/stories/train.txt
data/stories/train.txt: $(B)/stories
	$(B)/stories --out data/stories

-include $(wildcard $(B)/*.d $(B)/asan/*.d $(B)/fuzz/*.d $(CU)/*.d)
