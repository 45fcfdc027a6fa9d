# attn.cpp. `make help` lists what can be made.
#
# Settings, on the command line or in the environment:
#   ATTENTION=causal      for make run: causal, infini, lightning, mla, or a pattern such as "lightning*3,causal"
#   RUN_ARGS=             for make run: further options of ./train_gpt2 train, e.g. RUN_ARGS="--steps 5000"
#   CXX=g++               a C++17 compiler with OpenMP
#   CBLAS=openblas        pkg-config's name of a CBLAS (openblas, mkl-dynamic-lp64-iomp, blis); none: the built-in matrix product
#   ARCH=native           the processor to compile for (-march)
ATTENTION ?= causal
RUN_ARGS  ?=
ifeq ($(origin CXX),default)
CXX       := g++
endif
CBLAS     ?= openblas
ARCH      ?= native
export CXX CBLAS

WARNINGS := -Wall -Wextra -Werror
# Fast math for vectorised sums; but finite checks must see infinities and NaN.
FAST     := -O3 -march=$(ARCH) -ffast-math -fno-finite-math-only
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
FAST     += -mprefer-vector-width=512  # the compiler's own default keeps to half of AVX-512's width
endif
BASE      = -std=c++17 -fopenmp $(WARNINGS) -I. -MMD -MP $(shell dev/blas.sh cflags)
LIBS      = $(shell dev/blas.sh libs)
ASAN     := -O1 -g -march=$(ARCH) -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -DARENA_DEBUG
B        := build

.DEFAULT_GOAL := help
.PHONY: FORCE help run test bench asan format deps check-deps clean corpus sabotage references
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z_0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo; sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' Makefile

run: check-deps  ## build, make the corpus, train a small GPT (ATTENTION=causal|infini|lightning|mla|pattern), show what it learnt
	@$(MAKE) --no-print-directory -j2 train_gpt2 corpus
	@dev/run.sh "$(ATTENTION)" $(RUN_ARGS)

TESTS := $(B)/unit_tests $(B)/program_unit_tests $(B)/test_stories $(B)/layer_tests_f64 $(B)/layer_tests test_gpt2

test: check-deps  ## prove every layer, parser and option; the last line counts
	@$(MAKE) --no-print-directory -j2 train_gpt2 $(B)/stories $(TESTS)
	@dev/test/run_tests.sh $(TESTS) dev/test/program_tests.sh

bench: check-deps  ## GPT-2 124M on this CPU: milliseconds a step, and the ratio to its matrix products alone
	@$(MAKE) --no-print-directory $(B)/bench
	@$(B)/bench

asan: check-deps  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory -j2 $(B)/asan/train_gpt2 $(B)/stories $(addprefix $(B)/asan/,$(notdir $(TESTS)))
	@TRAIN_GPT2=$(B)/asan/train_gpt2 dev/test/run_tests.sh $(addprefix $(B)/asan/,$(notdir $(TESTS))) dev/test/program_tests.sh

sabotage: check-deps  ## delete or negate each gradient statement in turn, and see the tests fail (half an hour)
	@dev/test/sabotage.sh

references:  ## write dev/reference/outputs again (needs PyTorch)
	cd dev/reference && python3 make_references.py

format:  ## clang-format over the sources
	clang-format -i *.cpp *.h gpt2/*.h gpt2/*.cpp gpt2/cpu/*.h data/*.cpp dev/*/*.cpp

deps:  ## install what the build needs (as root, or after asking)
	@dev/deps.sh install

check-deps:
	@dev/deps.sh check

clean:  ## remove what was built; runs and corpora stay
	rm -rf $(B) train_gpt2 test_gpt2

# ---- programs ------------------------------------------------------------------------------------------------------------------------------------
# The program around the trainers (options, training loop, files) does not compute: compiled apart, without -O3, it builds beside the trainer.

train_gpt2: $(B)/train_gpt2.o $(B)/program.o
	$(CXX) -fopenmp $^ -o $@ $(LIBS)
test_gpt2: $(B)/test_gpt2.o
	$(CXX) -fopenmp $^ -o $@ $(LIBS)
$(B)/%: $(B)/%.o
	$(CXX) -fopenmp $^ -o $@ $(LIBS)

$(B)/train_gpt2.o: train_gpt2.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/test_gpt2.o: test_gpt2.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/program.o: gpt2/program.cpp | $(B)
	$(CXX) $(BASE) -O1 -c $< -o $@
$(B)/bench.o: dev/cpu/bench.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -c $< -o $@
$(B)/stories.o: data/stories.cpp | $(B)
	$(CXX) $(BASE) -O2 -c $< -o $@
$(B)/test_stories.o: data/test_stories.cpp | $(B)
	$(CXX) $(BASE) -O1 -c $< -o $@
$(B)/layer_tests.o: dev/test/layer_tests.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -O2 -c $< -o $@
# float64, and without a BLAS: our own product gives the same bits for any number of threads, so that the layers can be asked for it too
$(B)/layer_tests_f64.o: dev/test/layer_tests.cpp | $(B)
	$(CXX) $(BASE) $(FAST) -O2 -DREAL=double -DNO_CBLAS -c $< -o $@
$(B)/%.o: dev/test/%.cpp | $(B)
	$(CXX) $(BASE) -O0 -c $< -o $@

# The same under the sanitizers.
$(B)/asan/train_gpt2: $(B)/asan/train_gpt2.o $(B)/asan/program.o
	$(CXX) $(ASAN) -fopenmp $^ -o $@ $(LIBS)
$(B)/asan/%: $(B)/asan/%.o
	$(CXX) $(ASAN) -fopenmp $^ -o $@ $(LIBS)
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
$(B)/asan/unit_tests.o $(B)/asan/program_unit_tests.o: $(B)/asan/%.o: dev/test/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -O0 -c $< -o $@
$(B)/asan/%.o: dev/test/%.cpp | $(B)/asan
	$(CXX) $(BASE) $(ASAN) -c $< -o $@

$(B) $(B)/asan:
	@mkdir -p $@

# Other settings than last time: everything is built again.
SETTINGS = $(CXX) $(BASE) $(FAST) $(ASAN) $(LIBS)
$(B)/settings: FORCE | $(B)
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@
FORCE:
OBJECTS := $(addprefix $(B)/,$(addsuffix .o,train_gpt2 test_gpt2 program bench stories test_stories layer_tests layer_tests_f64 unit_tests program_unit_tests))
$(OBJECTS) $(patsubst $(B)/%,$(B)/asan/%,$(OBJECTS)): $(B)/settings

# ---- the corpus: our own stories (data/stories.cpp) -----------------------------------------------------------------------------------------------

corpus: data/stories/train.txt
data/stories/train.txt: $(B)/stories
	$(B)/stories --out data/stories

-include $(wildcard $(B)/*.d $(B)/asan/*.d)
