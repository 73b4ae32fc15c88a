# make demo | demo-mediators | demo-compare | demo-steps | test | test-tf | test-cuda | soak | lint | bench | bench-more | demo-clean
# | clean. Needs Python 3.11, git and make; everything else goes into .venv, and TensorFlow, which only test-tf needs, into .venv-tf.
PYTHON ?= python3.11
BIN := .venv/bin
TF_BIN := .venv-tf/bin
D := demo_output
# Processes of the demo: one a GPU (a power of two, to divide its batch), or two on a CPU.
PROCESSES = $(shell $(BIN)/python -c "import torch; n = torch.cuda.device_count() or 2; print(2 ** (n.bit_length() - 1))")
TORCHRUN = $(BIN)/torchrun --standalone --nproc_per_node=$(PROCESSES)

.PHONY: demo demo-mediators demo-compare demo-steps test test-tf test-cuda soak lint bench bench-more demo-clean clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# TensorFlow is laid over the packages of .venv, by a .pth file that names them: a second copy of torch would take 6 GB more.
PRINT_SITE = python -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.venv-tf/installed: .venv/installed evaluations/requirements-tf.txt
	test -x $(TF_BIN)/python || $(PYTHON) -m venv .venv-tf
	$(BIN)/$(PRINT_SITE) > "$$($(TF_BIN)/$(PRINT_SITE))/venv.pth"
	$(TF_BIN)/python -m pip install --quiet --requirement requirements.txt --requirement evaluations/requirements-tf.txt
	$(TF_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test: .venv/installed
	$(BIN)/python -m pytest

test-tf: .venv-tf/installed
	REQUIRE_TENSORFLOW=1 $(TF_BIN)/python -m pytest tests/test_inception_tf.py

# On a machine with a GPU; test keeps off it.
test-cuda: .venv/installed
	REQUIRE_CUDA=1 $(BIN)/python -m pytest tests/test_cuda.py

# A quarter of an hour of kills and fuzz.
soak: .venv/installed
	rm -f soak_report.md
	$(BIN)/python -m pytest -m soak tests/test_soak.py tests/test_elastic.py; status=$$?; cat soak_report.md; exit $$status

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every network against its plain formulation, on a CPU beside the targets: some 40 minutes on two cores.
bench: .venv/installed
	$(BIN)/python -m benchmarks.run

# The other tables of benchmarks/RESULTS.md.
bench-more: .venv/installed
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.curves
	$(BIN)/python -m benchmarks.mediators
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.evaluator

# The demo: the user's own scripts on scikit-learn's handwritten digits. Each step is skipped if what it makes is there.
demo: $(D)/samples.png $(D)/samples_amm.png $(D)/reference.npz $(D)/sampled $(D)/sampled_amm
	@for kind in plain amm; do echo "== evaluator, $$kind"; \
		$(BIN)/python evaluations/evaluator.py $(D)/reference.npz $(D)/$$kind/samples_1000x16x16x3.npz --features pixels; done
	$(BIN)/python examples/digits.py report --data $(D)/digits --samples $(D)/plain/samples_1000x16x16x3.npz \
		--samples-amm $(D)/amm/samples_1000x16x16x3.npz --run "$$(dirname $$(dirname $(CKPT)))" --out $(D)

# By pattern: a run killed before its first checkpoint leaves a folder without one, and the next run is 001.
CKPT := $(D)/runs/*-EDT-Ti-2/checkpoints/latest

$(D)/prepared: | .venv/installed
	$(BIN)/python examples/digits.py prepare $(D)/digits
	touch $@

$(D)/extracted: | $(D)/prepared
	$(BIN)/python extract_features.py --data-path $(D)/digits/train --features-path $(D)/features --vae pixels --image-size 16
	touch $@

$(D)/reference.npz: | $(D)/prepared
	$(BIN)/python evaluations/reference.py $(D)/digits/held_out $@ --image-size 16 --features pixels

# 2,000 steps of batch 32. So short a run wants a high learning rate, a short average, uniform timesteps and no min-SNR weight: under
# the published recipe, made for 400,000 steps, the digits come out less varied than the real ones.
$(D)/trained: | $(D)/extracted
	$(TORCHRUN) train_mask_adan.py --model EDT-Ti/2 --feature-path $(D)/features --results-dir $(D)/runs --resume auto \
		--epochs 1000 --max-steps 2000 --global-batch-size 32 --init-lr 5e-3 --final-lr 1e-4 --lr-decay-steps 2000 \
		--ema-decay 0.995 --timestep-sampler uniform --min-snr-gamma 0 --log-every 100 --ckpt-every 500
	touch $@

SAMPLE = $(TORCHRUN) sample_ddp.py --ckpt $(CKPT) --num-fid-samples 1000 --num-sampling-steps 50 --per-proc-batch-size 250
PICTURES = $(BIN)/python inference.py --ckpt $(CKPT) --per-class 10 --batch-size 100 --num-sampling-steps 50

$(D)/sampled: | $(D)/trained
	$(SAMPLE) --sample-dir $(D)/plain --labels balanced
	touch $@

$(D)/sampled_amm: | $(D)/trained
	$(SAMPLE) --sample-dir $(D)/amm --labels balanced --amm True
	touch $@

$(D)/samples.png: | $(D)/trained
	$(PICTURES) --out $@ --trajectory 10

$(D)/samples_amm.png: | $(D)/trained
	$(PICTURES) --out $@ --amm True

# The mediators' demo: three SiTs with 1, 4 and 16 mediators for an image's 64 tokens take turns in sampling, against the last
# alone. Same data, stamps and short recipe as above; guidance of 1.5, since 1,000 steps leave some unguided digits ill-formed.
MEDIATORS := 1 4 16
SIT_CKPT = $(D)/sit$(1)/*-SiT-Ti-2/checkpoints/latest
STAGES = --ckpt1 $(call SIT_CKPT,1) --ckpt2 $(call SIT_CKPT,4) --ckpt3 $(call SIT_CKPT,16)
SDE = SDE --cfg-scale 1.5 --num-sampling-steps 50
SIT_SAMPLES = --num-fid-samples 500 --per-proc-batch-size 250 --labels balanced
# A network call, on average: midway between the 0.02913 of 1 mediator and the 0.03060 of 16.
BUDGET_GMAC := 0.02986

demo-mediators: $(D)/sampled_switching $(D)/sampled_sit16
	$(BIN)/python -m examples.switching --data $(D)/digits --samples $(D)/switching/samples_500x16x16x3.npz \
		--samples-last $(D)/alone/samples_500x16x16x3.npz --switch-steps $(D)/switching/switch_steps.csv \
		--ckpts $(foreach m,$(MEDIATORS),$(call SIT_CKPT,$(m))) --out $(D)

$(MEDIATORS:%=$(D)/trained_sit%): $(D)/trained_sit%: | $(D)/extracted
	$(TORCHRUN) attention_mediator/train.py --model SiT-Ti/2 --mediator-num $* --feature-path $(D)/features \
		--results-dir $(D)/sit$* --resume auto --epochs 10000 --max-steps 1000 --global-batch-size 32 --lr 5e-3 \
		--final-lr 1e-4 --lr-decay-steps 1000 --ema-decay 0.99 --log-every 100 --ckpt-every 250
	touch $@

# Its last line holds the flags that meet the budget.
$(D)/switch_ratios.txt: | $(MEDIATORS:%=$(D)/trained_sit%)
	$(BIN)/python -m sampling.calibrate_switch $(SDE) $(STAGES) --budget-gmac $(BUDGET_GMAC) > $@
	cat $@

$(D)/sampled_switching: | $(D)/switch_ratios.txt
	$(TORCHRUN) time_step_wise_adjusting/sample_ddp_three.py $(SDE) $(STAGES) $$(tail -n 1 $(D)/switch_ratios.txt) \
		$(SIT_SAMPLES) --sample-dir $(D)/switching
	touch $@

$(D)/sampled_sit16: | $(D)/trained_sit16
	$(TORCHRUN) attention_mediator/sample_ddp.py $(SDE) --ckpt $(call SIT_CKPT,16) $(SIT_SAMPLES) --sample-dir $(D)/alone
	touch $@

# Networks compared on the same data at equal training compute, in multiply-accumulates; masked are those published so. All have
# the recipe of the demo above but for twice its learning rate, which was better for each in trials of 200 or 400 steps, and a
# shorter average: a quarter of MDTv2's steps, which are the dearest, is 160.
COMPARED := EDT-Ti-2 DiT-Ti-2 MDTv2-Ti-2 SiT-Ti-2
COMPARE_GMAC := 4400
COMPARE_BATCH := 32
COMPARE_CALLS := 50
COMPARED_MODEL = --model $(*:%-2=%/2)$(if $(filter SiT%,$*), --mediator-num 16)
COMPARED_OBJECTIVE = $(if $(filter SiT%,$*),,--timestep-sampler uniform --min-snr-gamma 0)

demo-compare: $(COMPARED:%=$(D)/sampled_%)
	$(BIN)/python -m examples.compare report --data $(D)/digits --runs $(COMPARED:%=$(D)/compare/%) --out $(D)

$(COMPARED:%=$(D)/trained_%): $(D)/trained_%: | $(D)/extracted
	steps=$$($(BIN)/python -m examples.compare steps $(COMPARED_MODEL) --batch-size $(COMPARE_BATCH) \
		--budget-gmac $(COMPARE_GMAC)) && \
	$(TORCHRUN) train_mask_adan.py $(COMPARED_MODEL) $(COMPARED_OBJECTIVE) --feature-path $(D)/features \
		--results-dir $(D)/compare/$* --resume auto --epochs 10000 --max-steps $$steps --global-batch-size $(COMPARE_BATCH) \
		--init-lr 1e-2 --final-lr 1e-4 --lr-decay-steps $$steps --ema-decay 0.98 --log-every 100 \
		--ckpt-every $$(((steps + 3) / 4)) --keep-checkpoints 0
	touch $@

$(COMPARED:%=$(D)/sampled_%): $(D)/sampled_%: | $(D)/trained_%
	for ckpt in $(D)/compare/$*/*/checkpoints/*.pt; do \
		$(TORCHRUN) sample_ddp.py --ckpt $$ckpt --num-fid-samples 500 --num-sampling-steps $(COMPARE_CALLS) --no-png \
			--per-proc-batch-size 250 --labels balanced --sample-dir $(D)/compare/$*/samples/$$(basename $$ckpt .pt) || exit 1; done
	touch $@

# Few steps: every solver and guidance on the first demo's network, and the ODE's solvers on one trained as a transport, each with
# several numbers of network calls and three seeds. The weaker network of autoguidance is the first one halfway through its training.
TRANSPORT_CKPT := $(D)/edt_transport/*-EDT-Ti-2/checkpoints/latest
GUIDE_CKPT := $(D)/runs/*-EDT-Ti-2/checkpoints/0001000.pt

demo-steps: | $(D)/trained $(D)/trained_transport
	$(TORCHRUN) -m examples.steps measure --data $(D)/digits --ckpt $(CKPT) --guide-ckpt $(GUIDE_CKPT) \
		--transport-ckpt $(TRANSPORT_CKPT) --out $(D)/steps
	$(BIN)/python -m examples.steps report --measured $(D)/steps --out $(D)

$(D)/trained_transport: | $(D)/extracted
	$(TORCHRUN) train_mask_adan.py --model EDT-Ti/2 --objective transport --feature-path $(D)/features \
		--results-dir $(D)/edt_transport --resume auto --epochs 10000 --max-steps 1500 --global-batch-size 32 --init-lr 5e-3 \
		--final-lr 1e-4 --lr-decay-steps 1500 --ema-decay 0.995 --log-every 100 --ckpt-every 500
	touch $@

demo-clean:
	rm -rf $(D)

clean: demo-clean
	rm -rf .venv .venv-tf build *.egg-info
